"""v2: attention. `pytest exercises/test_v2_attention.py` checks your answers.

B windows of T tokens, each a vector of C numbers; H heads of D = C / H numbers.
"""

import math

import torch
import torch.nn.functional as F


def causal_mask(T):
    """Which tokens are in the future of which: (T, T) of bool, True at [i, j] if j comes after i.

    >>> causal_mask(3).int().tolist()
    [[0, 1, 1], [0, 0, 1], [0, 0, 0]]

    Hint: triu(k) of a matrix keeps what is on the k-th diagonal above the main one and further up;
    torch.ones(T, T, dtype=torch.bool) is one to begin with.
    Read: v2.py, `Attention.__init__`.
    """
    raise NotImplementedError("your turn")


def one_head(x, w_q, w_k, w_v):
    """One head of causal attention, (T, D).

    x (T, C); w_q, w_k, w_v (C, D): queries, keys and values are x @ w_q, x @ w_k and x @ w_v. The score of query i and
    key j is their dot product over sqrt(D). The weights of query i are the softmax of its scores with the tokens up to
    i, and output i is the mean of the values with these weights.

    >>> x, w = torch.tensor([[2.0], [4.0]]), torch.ones(1, 1)
    >>> one_head(x, 0 * w, w, w)  # all scores are 0, so each output is a plain mean of the tokens so far
    tensor([[2.],
            [3.]])

    Hint: scores.masked_fill(mask, -math.inf) before the softmax, since exp(-inf) is 0. You may call `causal_mask`.
    Read: v2.py, `Attention.forward`; Vaswani et al. 2017, equation 1; notebooks/02_attention.ipynb.
    """
    raise NotImplementedError("your turn")


def split_heads(qkv, n_head):
    """Queries, keys and values, each (B, H, T, D), from `qkv` (B, T, 3 * C), which has them side by side.

    For each token the first C numbers are the queries of all heads, one head after the other, then come the keys, then
    the values.

    >>> q, k, v = split_heads(torch.arange(12.0).view(1, 1, 12), 2)
    >>> q.tolist(), v.tolist()
    ([[[[0.0, 1.0]], [[2.0, 3.0]]]], [[[[8.0, 9.0]], [[10.0, 11.0]]]])

    Hint: view splits a dimension into several where it is, and does not move numbers: (B, T, 3, H, D). permute then
    changes the order of the dimensions. chunk(3, -1) cuts the last dimension into three.
    Read: v2.py, `Attention.forward`.
    """
    raise NotImplementedError("your turn")


def join_heads(y):
    """The outputs of all heads (B, H, T, D), side by side for each token: (B, T, H * D).

    >>> join_heads(torch.tensor([[[[1, 2], [5, 6]], [[3, 4], [7, 8]]]])).tolist()
    [[[1, 2, 3, 4], [5, 6, 7, 8]]]

    Hint: first bring the dimensions into the order (B, T, H, D); then reshape.
    Read: v2.py, `Attention.forward`, its last line.
    """
    raise NotImplementedError("your turn")


def layer_norm(x, weight, bias):
    """LayerNorm: each token of x (B, T, C) minus its mean, divided by sqrt(its variance + 1e-5), then times `weight`,
    plus `bias`, both (C,). The variance is the mean of the squared distances from the mean: divide by C, not by C - 1.

    >>> layer_norm(torch.tensor([[[1.0, 3.0]]]), torch.ones(2), torch.tensor([0.0, 10.0]))
    tensor([[[-1.0000, 11.0000]]])

    Hint: mean(-1, keepdim=True).
    Read: v2.py, `Block`; Ba et al. 2016, arXiv:1607.06450, equation 3.
    """
    raise NotImplementedError("your turn")


def post_norm_block(x, norm_1, attention, norm_2, mlp):
    """A block of v2, (B, T, C): after attention, and again after the MLP, the input of the sub-layer is added to its
    output (a residual connection), and the sum goes through LayerNorm.

    norm_1, attention, norm_2, mlp: functions of (B, T, C) that return (B, T, C).

    >>> double, add_one, negate = lambda x: 2 * x, lambda x: x + 1, lambda x: -x
    >>> post_norm_block(torch.tensor(3.0), negate, double, negate, add_one)
    tensor(17.)

    Hint: two lines. In the example, negate(3 + 6) = -9, and then negate(-9 + -8) = 17.
    Read: v2.py, `Block.forward`; Vaswani et al. 2017, section 3.1.
    """
    raise NotImplementedError("your turn")
