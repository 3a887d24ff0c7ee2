"""v4: positions, and the key-value cache. `pytest exercises/test_v4_positions.py` checks your answers.

B windows of T tokens; H heads of D numbers; C is the width of a token.
"""

import math

import torch


def rope_angles(positions, D, base):
    """RoPE's angles (T, D / 2): pair i of the token at position t is turned by t * base^(-2 i / D), i = 0 to D / 2 - 1.

    positions (T,): a tensor of integers.

    >>> rope_angles(torch.tensor([0, 1, 2]), 4, 10000.0)
    tensor([[0.0000, 0.0000],
            [1.0000, 0.0100],
            [2.0000, 0.0200]])

    Hint: torch.arange(0, D, 2) is 2 i. positions[:, None] times a row gives a table.
    Read: v4_alibi_rope.py, `rope_table`; Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    raise NotImplementedError("your turn")


def rotate(x, angles):
    """`x` (..., T, D) with its pairs turned by `angles` (T, D / 2): RoPE. A pair (a, b) turned by an angle f is
    (a cos f - b sin f, a sin f + b cos f).

    As in v4, pair i is (x[i], x[i + D / 2]): the first half of x has all a, the second half all b.

    >>> quarter = torch.tensor([[math.pi / 2, 0.0]])
    >>> rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), quarter).round(decimals=4)  # (1, 3) becomes (-3, 1)
    tensor([[-3.,  2.,  1.,  4.]])

    Hint: x.chunk(2, -1), and torch.cat([...], -1). Do not write into x while its old numbers are needed.
    Read: v4_alibi_rope.py, `apply_rope`.
    """
    raise NotImplementedError("your turn")


def alibi_slopes(n_head):
    """ALiBi's slope of each head, a list of H numbers, for H a power of two: 2^(-8/H), 2^(-16/H), ..., 2^-8.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]

    Hint: the exponent of head h, counted from 1, is -8 h / H.
    Read: v4_alibi_rope.py, `alibi_slopes`; Press et al. 2021, arXiv:2108.12409, section 3.
    """
    raise NotImplementedError("your turn")


def alibi_bias(slopes, T, K):
    """What ALiBi adds to the scores, (H, T, K): slope * (j - i) for query i and key j.

    slopes (H,), a tensor. There are K keys, of the tokens 0 to K - 1, and T queries, of the last T of these tokens: the
    first query belongs to token K - T. What comes after a query is masked elsewhere, so here any number will do there.

    >>> alibi_bias(torch.tensor([0.5]), 2, 3).tril(1)
    tensor([[[-0.5000,  0.0000,  0.0000],
             [-1.0000, -0.5000,  0.0000]]])

    Hint: first the distance j - i, (T, K), from two ranges: keys - queries[:, None]. Then slopes[:, None, None] times
    it.
    Read: v4_alibi_rope.py, `alibi_bias`; Press et al. 2021, section 3.
    """
    raise NotImplementedError("your turn")


def sinusoidal_positions(T, C, base=10000.0):
    """Vectors of the positions 0 to T - 1, (T, C): sines and cosines of the angles t * base^(-2 i / C), as in
    Vaswani et al. But as in v4, first all sines, i = 0 to C / 2 - 1, and then all cosines.

    >>> sinusoidal_positions(2, 4)
    tensor([[0.0000, 0.0000, 1.0000, 1.0000],
            [0.8415, 0.0100, 0.5403, 0.9999]])

    Hint: these are the angles of RoPE. You may call `rope_angles`.
    Read: v4_alibi_rope.py, `LanguageModel.forward`; Vaswani et al. 2017, section 3.5.
    """
    raise NotImplementedError("your turn")


def attend_with_cache(q, k, v, cache):
    """Causal attention for one new token: returns (y, cache).

    q, k, v (B, H, 1, D): its query, key and value. cache: None for the first token, else the pair (keys, values) of all
    tokens before it, each (B, H, t, D). y (B, H, 1, D) is what attention over the whole text gives for this token, with
    scores over sqrt(D); the new cache is the pair (keys, values) of all tokens, this one included.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> y, cache = attend_with_cache(0 * one, one, 2 * one, None)
    >>> y, cache = attend_with_cache(0 * one, one, 4 * one, cache)  # equal scores: the mean of 2 and 4
    >>> y.item(), cache[1].flatten().tolist()
    (3.0, [2.0, 4.0])

    Hint: torch.cat along dimension 2; keys.mT exchanges the last two dimensions. The future of a new token is empty, so
    no mask is needed.
    Read: v4_alibi_rope.py, `KVCache` and `Attention.forward`.
    """
    raise NotImplementedError("your turn")
