"""Solutions of exercises/sampling.py."""

import torch


def with_temperature(logits, temperature):
    if temperature == 0:
        p = torch.zeros_like(logits)
        p[logits.argmax()] = 1
        return p
    return (logits / temperature).softmax(-1)


def top_k(p, k):
    values, places = p.topk(k)
    kept = torch.zeros_like(p)
    kept[places] = values
    return kept / kept.sum()


def top_p(p, share):
    ranked, order = p.sort(descending=True)
    likelier = ranked.cumsum(0) - ranked
    ranked = torch.where(likelier < share, ranked, 0)
    kept = torch.zeros_like(p)
    kept[order] = ranked
    return kept / kept.sum()


def generate_greedily(model, ids, n_tokens, block_size):
    ids, start = list(ids), len(ids)
    for _ in range(n_tokens):
        logits = model(torch.tensor([ids[-block_size:]]))
        ids.append(logits[0, -1].argmax().item())
    return ids[start:]
