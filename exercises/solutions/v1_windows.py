"""Solutions of exercises/v1_windows.py."""

import torch
import torch.nn.functional as F


def batch_of_windows(ids, starts, block_size):
    windows = ids[starts[:, None] + torch.arange(block_size + 1)]
    return windows[:, :-1], windows[:, 1:]


def batches_in_epoch(n_tokens, batch_size, block_size):
    # At the largest offset, block_size - 1 tokens come before the first window; one follows the last, as a target.
    return (n_tokens - block_size) // (batch_size * block_size)


def embed_by_product(idx, weight):
    return F.one_hot(idx, len(weight)).to(weight.dtype) @ weight


def context_windows(x, context_size):
    x = F.pad(x, (0, 0, context_size - 1, 0))
    return x.unfold(1, context_size, 1).flatten(2)


def mlp_logits(windows, hidden_weight, hidden_bias, head_weight, head_bias):
    hidden = (windows @ hidden_weight.T + hidden_bias).tanh()
    return hidden @ head_weight.T + head_bias


def n_parameters(vocab_size, n_embd, context_size, n_hidden):
    embedding = vocab_size * n_embd
    hidden = (context_size * n_embd + 1) * n_hidden
    head = (n_hidden + 1) * vocab_size
    return embedding + hidden + head
