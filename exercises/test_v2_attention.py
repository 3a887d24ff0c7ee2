"""Checks of v2_attention.py: against PyTorch and v2.py."""

import math

import torch
import torch.nn.functional as F

import harness
import v2
from exercises.checking import check_causal, compare, expect, has_nan, notice, random


def test_causal_mask(my):
    ones = torch.ones(4, 4, dtype=torch.bool)
    answer = my.causal_mask(4)
    compare(answer, ones.triu(1), {
        "the past is hidden, and the future is seen: the mask is transposed": ones.tril(-1),
        "the mask is inverted: True should be where j comes after i": ones.tril(),
        "a token should see itself: the diagonal should be False": ones.triu(),
        "the next token is in the future too": ones.triu(2),
        "the mask should be of bool, True and False": ones.triu(1).float(),
        "the mask should be of bool; what is added to the scores is another form": ones.triu(1) * -1e9,
    }, "the mask")  # fmt: skip
    with harness.override(vars(v2), BLOCK_SIZE=7):
        compare(my.causal_mask(7), v2.Attention().future, what="the mask for 7 tokens")


def test_one_head(my):
    T, C, D = 6, 8, 4
    x, w_q, w_k, w_v = random(T, C), random(C, D, seed=1), random(C, D, seed=2), random(C, D, seed=3)
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def head(scale=math.sqrt(D), hidden=future, q=q, k=k, dim=-1):
        return (q @ k.T / scale).masked_fill(hidden, -math.inf).softmax(dim) @ v

    scores = q @ k.T / math.sqrt(D)
    answer = my.one_head(x, w_q, w_k, w_v)
    expect(not has_nan(answer),
           "the output contains nan: does every token see itself at least? And 0 * -inf is nan")  # fmt: skip
    notice(answer, {
        "the mask puts 0 in place of the scores of the future; exp(0) is 1, so it needs -inf":
            scores.masked_fill(future, 0).softmax(-1) @ v,
        "the mask is applied after the softmax, so the weights of a token do not sum to 1":
            scores.softmax(-1).masked_fill(future, 0) @ v,
        "the softmax runs over the queries; it should run over the keys, the last dimension": head(dim=0),
        "the past is hidden, and the future is seen: the mask is transposed": head(hidden=future.T),
        "the softmax is missing: the scores are divided by their sum":
            scores.tril() / scores.tril().sum(1, keepdim=True) @ v,
    })  # fmt: skip
    check_causal(lambda x: my.one_head(x, w_q, w_k, w_v), x)
    compare(answer, head(), {
        "the scores were not divided by sqrt(D)": head(scale=1),
        "the scores were divided by sqrt(C); D, the size of a head, is the number of terms": head(scale=math.sqrt(C)),
        "the scores were divided by D; the root is missing": head(scale=D),
        "the scores were multiplied by sqrt(D), not divided": head(scale=1 / math.sqrt(D)),
        "queries and keys are exchanged: row i should belong to query i": head(q=k, k=q),
        "the scores should be divided by sqrt(D) before the softmax, not the weights after it":
            head(scale=1) / math.sqrt(D),
    }, "the output")  # fmt: skip


def test_split_heads(my):
    B, T, H, D = 2, 3, 4, 5
    qkv = random(B, T, 3 * H * D)
    right = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    by_head = qkv.view(B, T, H, 3, D).permute(3, 0, 2, 1, 4)
    interleaved = qkv.view(B, T, 3, D, H).permute(2, 0, 4, 1, 3)
    compare(my.split_heads(qkv.clone(), H), tuple(right), {
        "heads and tokens are exchanged: the shape should be (B, H, T, D)": tuple(right.transpose(2, 3)),
        "a head gets numbers of several tokens: view does not move numbers; transpose or permute after it":
            tuple(part.reshape(B, H, T, D) for part in qkv.chunk(3, -1)),
        "a head gets numbers of several tokens: view does not move numbers; permute after it":
            tuple(qkv.view(3, B, H, T, D)),
        "in `qkv` come the queries of all heads, then their keys; not head by head": tuple(by_head),
        "a head has D numbers that are neighbours, not every H-th number": tuple(interleaved),
    }, "(q, k, v)")  # fmt: skip


def test_join_heads(my):
    B, H, T, D = 2, 3, 4, 5
    y = random(B, H, T, D)
    compare(my.join_heads(y.clone()), y.transpose(1, 2).reshape(B, T, H * D), {
        "tokens are mixed: bring the dimensions into the order (B, T, H, D) before reshape": y.reshape(B, T, H * D),
        "the numbers of the heads alternate; each head should be in one piece": y.permute(0, 2, 3, 1).flatten(2),
    }, "the tensor of joined heads")  # fmt: skip


def test_layer_norm(my):
    x, weight, bias = 0.01 * random(2, 3, 4), random(4, seed=1), random(4, seed=2)
    x[0] += 2

    def norm(x=x, mean=x.mean(-1, keepdim=True), eps=1e-5, **how):
        return (x - mean) / (x.var(-1, keepdim=True, **how) + eps).sqrt()

    plain = norm(correction=0)
    compare(my.layer_norm(x.clone(), weight, bias), F.layer_norm(x, (4,), weight, bias), {
        "the variance divides by C - 1; here by C: var(-1, correction=0)": norm() * weight + bias,
        "1e-5 is missing under the root": norm(correction=0, eps=0) * weight + bias,
        "1e-5 belongs under the root, to the variance":
            (x - x.mean(-1, True)) / (x.std(-1, keepdim=True, correction=0) + 1e-5) * weight + bias,
        "the mean is not subtracted": norm(mean=0, correction=0) * weight + bias,
        "x is divided by the variance: the root is missing":
            (x - x.mean(-1, True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5) * weight + bias,
        "the standard deviation divides by C - 1, and 1e-5 belongs under the root, to the variance":
            (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5) * weight + bias,
        "`weight` and `bias` are missing": plain,
        "`bias` is added last, after the product with `weight`": (plain + bias) * weight,
        "`bias` is missing": plain * weight,
        "mean and variance are of all tokens together; each token has its own":
            F.layer_norm(x, x.shape) * weight + bias,
        "mean and variance should be over the last dimension, the numbers of a token":
            (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * weight + bias,
        "mean and variance should be over the last dimension; here they are over the tokens of a window":
            (x - x.mean(1, True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias,
    }, "the normed x")  # fmt: skip


def test_post_norm_block(my):
    torch.manual_seed(0)
    with harness.override(vars(v2), BLOCK_SIZE=6, N_EMBD=8, N_HEAD=2):
        block = v2.Block()
    for p in block.parameters():
        p.data = torch.rand_like(p)
    norm_1, attention, norm_2, mlp = block.norm_1, block.attention, block.norm_2, block.mlp
    x = random(2, 6, 8)
    pre = x + attention(norm_1(x))
    inner = x + norm_1(attention(x))
    once = norm_1(x + attention(x))
    unnormed = norm_1(x) + attention(x)
    compare(my.post_norm_block(x.clone(), norm_1, attention, norm_2, mlp), block(x), {
        "this is pre-norm, as in v3: in v2 LayerNorm comes after the sum": pre + mlp(norm_2(pre)),
        "the residual connections are missing: add the input of each sub-layer": norm_2(mlp(norm_1(attention(x)))),
        "LayerNorm is applied to the output of the sub-layer; it should be applied to the sum":
            inner + norm_2(mlp(inner)),
        "the second residual connection should add what the MLP got, not the block's input": norm_2(x + mlp(once)),
        "attention and MLP should follow each other, not stand side by side": norm_2(once + mlp(x)),
        "the second LayerNorm is norm_2": norm_1(once + mlp(once)),
        "LayerNorm is applied before the sum; it should be applied to it": norm_2(unnormed) + mlp(unnormed),
        "the MLP should get what comes out of the first LayerNorm": norm_2(once + mlp(x + attention(x))),
    }, "the output")  # fmt: skip
