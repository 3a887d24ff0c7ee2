"""Solutions of exercises/tokenizer_bpe.py."""

import math
import re
from collections import Counter


def pretokenize(text):
    pattern = r"'(?:[stmd]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    return re.findall(pattern, text)


def best_pair(words):
    counts = Counter()
    for ids, count in words:
        for pair in zip(ids, ids[1:]):
            counts[pair] += count
    return min(counts, key=lambda pair: (-counts[pair], pair))


def merge(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def learn_merges(counts, n_merges):
    words = [(list(pretoken), count) for pretoken, count in counts.items()]
    merges = []
    while len(merges) < n_merges and any(len(ids) > 1 for ids, _ in words):
        pair = best_pair(words)
        words = [(merge(ids, pair, 256 + len(merges)), count) for ids, count in words]
        merges.append(pair)
    return merges


def encode_pretoken(pretoken, merge_id):
    ids = list(pretoken)
    while len(ids) > 1:
        pair = min(zip(ids, ids[1:]), key=lambda pair: merge_id.get(pair, math.inf))
        if pair not in merge_id:
            break
        ids = merge(ids, pair, merge_id[pair])
    return ids


def decode(ids, merges):
    pieces = [bytes([i]) for i in range(256)]
    for left, right in merges:
        pieces.append(pieces[left] + pieces[right])
    return b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")
