"""Checks of v4_positions.py: against v4_alibi_rope.py, and what positions should do to scores."""

import math

import torch
import torch.nn.functional as F

import v4_alibi_rope as v4
from exercises.checking import compare, expect, fail, random


def test_rope_angles(my):
    t, D, base = torch.tensor([0, 1, 5, 300]), 8, 1000.0
    i = torch.arange(D // 2)
    answer = my.rope_angles(t, D, base)
    compare(answer, t[:, None] * base ** (-2 * i / D), {
        "the exponent is -i / D; it should be -2 i / D": t[:, None] * base ** (-i / D),
        "the exponent should be negative: later pairs turn more slowly": t[:, None] * base ** (2 * i / D),
        "torch.arange(0, D, 2) is 2 i already; the exponent is -2 i / D": t[:, None] * base ** (-4 * i / D),
        "the exponent is divided with //; it is no integer": t[:, None] * base ** (-2 * i // D),
        "i counts from 0: the first pair turns by t": t[:, None] * base ** (-2 * (i + 1) / D),
        "the angles are of D numbers; a pair shares one": t[:, None] * base ** (-torch.arange(D) / D),
        "the table is transposed: a row should belong to a position": (t[:, None] * base ** (-2 * i / D)).T,
    }, "the table of angles")  # fmt: skip
    cos, sin = v4.rope_table(t, D, base)
    compare((answer.cos(), answer.sin()), (cos, sin), what="(the table of cosines, the table of sines)")


def test_rotate(my):
    T, D = 6, 8
    x = random(2, 3, T, D)
    angles = torch.arange(T)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    cos, sin = angles.cos(), angles.sin()
    (a, b), (even, odd) = x.chunk(2, -1), (x[..., ::2], x[..., 1::2])
    neighbours = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    turned = a * cos - b * sin
    answer = my.rotate(x.clone(), angles)
    compare(answer, v4.apply_rope(x, (cos, sin)), {
        "neighbours are paired, x[2 i] and x[2 i + 1]; in v4 a pair is x[i] and x[i + D / 2]": neighbours,
        "neighbours are paired, x[2 i] and x[2 i + 1]; in v4 a pair is x[i] and x[i + D / 2], in the result too":
            torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1),
        "the pairs are turned the other way: the minus belongs to the first half":
            torch.cat([a * cos + b * sin, b * cos - a * sin], -1),
        "a minus is missing: (a cos - b sin, a sin + b cos)": torch.cat([a * cos + b * sin, a * sin + b * cos], -1),
        "the first half is overwritten before the second is computed from it; keep a copy of x":
            torch.cat([turned, turned * sin + b * cos], -1),
        "the second half is a sin f + b cos f, with both a and b": torch.cat([turned, a * cos + b * sin], -1),
        "the halves are exchanged": torch.cat([a * sin + b * cos, a * cos - b * sin], -1),
        "the pairs should be put end to end, not alternate":
            torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2),
    }, "the turned x")  # fmt: skip
    expect(torch.allclose(answer.norm(dim=-1), x.norm(dim=-1), atol=1e-4), "a rotation should keep the length of x")
    q, k = random(D).expand(T, D), random(D, seed=1).expand(T, D)
    scores = my.rotate(q, angles) @ my.rotate(k, angles).T
    for distance in range(T):
        along = scores.diagonal(-distance)
        expect(torch.allclose(along, along[:1].expand_as(along), atol=1e-4),
               f"the score of one query and one key at distance {distance} depends on where they are")  # fmt: skip


def test_alibi_slopes(my):
    for H in (8, 4, 1, 16):
        compare(my.alibi_slopes(H), v4.alibi_slopes(H), {
            "the slopes start at 1; the first should be 2^(-8/H)": [2 ** (-8 * h / H) for h in range(H)],
            "the slopes should spread from 2^(-8/H) to 2^-8, whatever H is": [2.0**-h for h in range(1, H + 1)],
            "the slopes are in the wrong order: the first head has the steepest": v4.alibi_slopes(H)[::-1],
            "the sign is wrong: slopes are positive; the distance j - i is not": [-s for s in v4.alibi_slopes(H)],
            "the exponents are not negative": [1 / s for s in v4.alibi_slopes(H)],
        }, f"alibi_slopes({H})")  # fmt: skip


def test_alibi_bias(my):
    slopes = v4.alibi_slopes(4)
    for T, K in ((5, 5), (2, 5), (1, 4)):
        seen = torch.ones(T, K).tril(K - T)  # the rest is masked
        right = v4.alibi_bias(4, T, K) * seen
        answer = my.alibi_bias(torch.tensor(slopes), T, K)
        if isinstance(answer, torch.Tensor) and answer.shape == right.shape:
            answer = torch.where(seen > 0, answer, 0)
        from_zero = torch.tensor(slopes)[:, None, None] * (torch.arange(K) - torch.arange(T)[:, None])
        compare(answer, right, {
            "the sign is wrong: the bias lowers the scores of tokens that are far away": -right,
            "the queries are of the last T of K tokens: the first has the position K - T, not 0": from_zero * seen,
            "the first query belongs to token K - T, not to K - T + 1":
                (right - torch.tensor(slopes)[:, None, None]) * seen,
            "each head has its own slope": right[:1].expand(4, T, K),
            "the slopes are missing": right / torch.tensor(slopes)[:, None, None],
        }, f"the bias of {T} queries and {K} keys")  # fmt: skip


def test_sinusoidal_positions(my):
    for T, C, base in ((7, 6, 10000.0), (4, 8, 100.0)):
        cos, sin = v4.rope_table(torch.arange(T), C, base)
        half = torch.arange(T)[:, None] * base ** (-torch.arange(C // 2) / C)
        fast = torch.arange(T)[:, None] * base ** (2 * torch.arange(C // 2) / C)
        compare(my.sinusoidal_positions(T, C, base), torch.cat([sin, cos], -1), {
            "sines and cosines alternate, as in the paper; in v4 come all sines, then all cosines":
                torch.stack([sin, cos], -1).flatten(1),
            "the cosines come first; in v4 the sines do": torch.cat([cos, sin], -1),
            "the exponent is -i / C; it should be -2 i / C": torch.cat([half.sin(), half.cos()], -1),
            "the exponent should be negative: later pairs turn more slowly":
                torch.cat([fast.sin(), fast.cos()], -1),
            "positions count from 0": torch.cat(v4.rope_table(torch.arange(1, T + 1), C, base)[::-1], -1),
            "`base` has no influence": torch.cat(v4.rope_table(torch.arange(T), C, 10000.0)[::-1], -1),
        }, f"sinusoidal_positions({T}, {C}, {base})")  # fmt: skip


def test_attend_with_cache(my):
    B, H, T, D = 2, 3, 5, 4
    q, k, v = random(3, B, H, T, D)
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    unscaled = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    cache, answers = None, []
    for t in range(T):
        answer = my.attend_with_cache(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], cache)
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            fail("the result should be the output and the cache: return y, (keys, values)")
        y, cache = answer
        scores = q[:, :, t : t + 1] @ k[:, :, : t + 1].mT
        before = scores[..., :t] / math.sqrt(D)
        compare(y, right[:, :, t : t + 1], {
            "the scores were not divided by sqrt(D)": unscaled[:, :, t : t + 1],
            "the token sees itself alone: the keys and values of the cache are missing": v[:, :, t : t + 1],
            "the token does not see itself: its own key and value are missing, or a mask hides them (is_causal=True "
            "hides all but the first key of a single query)": before.softmax(-1) @ v[:, :, :t],
            "the scores should be divided by sqrt(D), not by the root of the number of keys":
                (scores / math.sqrt(t + 1)).softmax(-1) @ v[:, :, : t + 1],
            "the softmax is missing": scores / math.sqrt(D) @ v[:, :, : t + 1],
            "the softmax should run over the keys, the last dimension":
                v[:, :, : t + 1].sum(2, keepdim=True),
        }, f"the output for token {t}")  # fmt: skip
        compare(cache, (k[:, :, : t + 1], v[:, :, : t + 1]), {
            "keys and values are exchanged in the cache": (v[:, :, : t + 1], k[:, :, : t + 1]),
            "the cache should hold the new token too": (k[:, :, :t], v[:, :, :t]),
            "the new token belongs at the end: torch.cat([old, new], 2)": (
                k[:, :, : t + 1].roll(1, 2), v[:, :, : t + 1].roll(1, 2)),
            "the cache holds the new token alone": (k[:, :, t : t + 1], v[:, :, t : t + 1]),
        }, f"(the cache of keys after token {t}, the cache of values after token {t})")  # fmt: skip
        answers.append(y)
    compare(torch.cat(answers, 2), right, what="the output for all tokens")
