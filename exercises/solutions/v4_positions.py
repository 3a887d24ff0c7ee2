"""Solutions of exercises/v4_positions.py."""

import math

import torch


def rope_angles(positions, D, base):
    return positions[:, None] * base ** (-torch.arange(0, D, 2) / D)


def rotate(x, angles):
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def alibi_slopes(n_head):
    return [2 ** (-8 * h / n_head) for h in range(1, n_head + 1)]


def alibi_bias(slopes, T, K):
    queries, keys = torch.arange(K - T, K), torch.arange(K)
    distance = keys - queries[:, None]
    return slopes[:, None, None] * distance


def sinusoidal_positions(T, C, base=10000.0):
    angles = rope_angles(torch.arange(T), C, base)
    return torch.cat([angles.sin(), angles.cos()], -1)


def attend_with_cache(q, k, v, cache):
    if cache is not None:
        k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    return scores.softmax(-1) @ v, (k, v)
