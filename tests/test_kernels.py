"""Tests of kernels.py: each function against the plain expression that it names, forwards and backwards."""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

import kernels
from common import COMPILER, close, inputs, published_slopes

# ----------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------


def gradients(y, x):
    """Of a weighted sum of `y` by each of `x`."""
    return torch.autograd.grad((y * inputs(*y.shape, seed=9).to(y.dtype)).sum(), x)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("T", [1, 5, 128, 200, 512, 513])
def test_attention_in_blocks_of_queries_is_that_of_torch(T, scale, monkeypatch):
    """The code for compilation on a CPU, run without compilation."""
    q, k, v = inputs(3, 2, 3, T, 8, dtype=torch.double).requires_grad_().unbind()
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # stay in double
    ours = kernels.attention(q, k, v, scale)
    close(ours, theirs, 1e-12)
    for our, their in zip(gradients(ours, (q, k, v)), gradients(theirs, (q, k, v))):
        close(our, their, 1e-12)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 9), (4, 9), (8, 9), (9, 9)])
def test_queries_are_those_of_the_last_tokens(T, K, compiling, monkeypatch):
    """With and without ALiBi, the result for the last tokens is the end of that for all."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    q, k, v = inputs(3, 2, 4, K, 8, dtype=torch.double).unbind()
    alibi = kernels.ALiBiAttention(published_slopes(4), 16, "cpu")
    for attention in (kernels.attention, alibi):
        close(attention(q[:, :, K - T :], k, v), attention(q, k, v)[:, :, K - T :], 1e-5)


def test_the_bias_of_the_last_token_is_kept_and_right_for_every_length():
    """Also beyond the window that it was made for, in another type, and with gradients after a use without them."""
    alibi = kernels.ALiBiAttention(published_slopes(4), 16, "cpu")
    with torch.inference_mode():
        q, k, v = inputs(3, 1, 4, 40, 8).unbind()
        expected = alibi(q, k, v)
        rows = set()
        for K in (2, 5, 16, 17, 40, 3):
            close(alibi(q[:, :, K - 1 : K], k[:, :, :K], v[:, :, :K]), expected[:, :, K - 1 : K], 1e-5)
            rows.add(alibi.row.size(-1))
    assert rows == {16, 17, 40}
    x = inputs(1, 4, 9, 8).bfloat16().requires_grad_()
    alibi(x[:, :, -1:], x, x).sum().backward()
    assert alibi.row.dtype == torch.bfloat16 and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_head", [3, 4, 12])
def test_the_dot_product_holds_the_bias_exactly(dtype, n_head):
    """With q = k = 0 it is the bias alone. Long positions have more bits than a bfloat16, and so have some slopes."""
    T, D = 4097, 12
    zeros = torch.zeros(1, n_head, T, D, dtype=dtype)
    q, k, v = kernels.alibi_in_the_dot_product(zeros, zeros, zeros + 1, published_slopes(n_head))
    assert q.dtype == k.dtype == v.dtype == dtype
    assert q.shape == k.shape == v.shape == (1, n_head, T, D + 8)
    slopes = torch.tensor(published_slopes(n_head), dtype=torch.double)[:, None]
    for i in (0, 1, 256, 257, 4096):
        actual = (q[0, :, i, None].double() * k[0].double()).sum(-1)  # (H, T)
        torch.testing.assert_close(actual, slopes * (torch.arange(T) - i), rtol=2**-16, atol=0)
    assert torch.equal(v[..., :D], zeros + 1) and not v[..., D:].any()


def alibi_in_double(q, k, v):
    """Attention of the last T queries with ALiBi as a bias on the scores, all in float64; and without the bias."""
    (H, T, D), K = q.shape[1:], k.size(2)
    distance = torch.arange(K - T, K)[:, None] - torch.arange(K)  # (T, K)
    bias = -torch.tensor(published_slopes(H), dtype=torch.double)[:, None, None] * distance
    scores = (q.double() @ k.double().mT) / math.sqrt(D)
    return [s.masked_fill(distance < 0, -math.inf).softmax(-1) @ v.double() for s in (scores + bias, scores)]


def distance_from(expected, actual):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# How far attention may be from that in float64, as a share of its norm: in bfloat16 what rounding costs without
# positions too. Slopes cut to 8 bits would cost 1e-3 in float32; a slope that is wrong by a tenth costs 0.05.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_head", [3, 12])
@torch.no_grad()
def test_the_fast_alibi_is_the_bias_in_double_precision(dtype, n_head):
    alibi = kernels.ALiBiAttention(published_slopes(n_head), 256, "cpu")
    for T in (32, 257, 512, 4096):
        q, k, v = (x.to(dtype) for x in inputs(3, 1, n_head, T, 64))
        expected, without = alibi_in_double(q[:, :, -64:], k, v)  # of the last tokens
        tolerance = TOLERANCE[dtype] * (3 if T > 1024 else 1)  # scores of thousands have few bits behind the point
        assert distance_from(expected, alibi(q, k, v)[:, :, -64:]) < tolerance
        assert distance_from(expected, without) > 0.1
        for last in (1, 3):  # new tokens after those in a cache
            assert distance_from(expected[:, :, -last:], alibi(q[:, :, -last:], k, v)) < 2 * tolerance


@pytest.mark.parametrize("T", [5, 200, 513])
def test_the_gradient_of_the_fast_alibi_is_that_of_the_bias(T):
    q, k, v = inputs(3, 1, 6, T, 8).requires_grad_().unbind()
    expected, _ = alibi_in_double(q, k, v)
    actual = kernels.ALiBiAttention(published_slopes(6), 256, "cpu")(q, k, v)
    for our, their in zip(gradients(actual, (q, k, v)), gradients(expected, (q, k, v))):
        assert distance_from(their.double(), our) < TOLERANCE[torch.float32]


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
@torch.no_grad()
def test_the_fast_alibi_is_the_bias_when_compiled():
    """In bfloat16, where positions and slopes take two numbers each; in blocks of queries, the last of them short."""
    q, k, v = (x.bfloat16() for x in inputs(3, 1, 12, 200, 64))
    expected, _ = alibi_in_double(q, k, v)
    compiled = torch.compile(kernels.ALiBiAttention(published_slopes(12), 256, "cpu"), dynamic=False)
    assert distance_from(expected, compiled(q, k, v)) < 1.5 * TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
@torch.no_grad()
def test_alibi_by_flex_attention_is_the_bias_when_compiled():
    """What a GPU runs; a CPU can compute it forwards."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (x.to(device) for x in inputs(3, 1, 6, 256, 64))
    parts = kernels.flex_parts(published_slopes(6), 256, device)
    flex = torch.compile(lambda q, k, v: kernels.alibi_by_flex_attention(q / 8, k, v, *parts), dynamic=False)
    for dtype in TOLERANCE:
        x = [t.to(dtype) for t in (q, k, v)]
        expected = alibi_in_double(*(t.cpu() for t in x))[0]
        assert distance_from(expected, flex(*x).cpu()) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_alibi_by_flex_attention_is_that_of_the_bias(compiled, monkeypatch):
    """On a CPU torch refuses the backward pass, for which Inductor has no kernel there. Its formula is the same on all
    devices: without that check it runs as it is, and in the graph that is traced for the backward pass."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    q, k, v = inputs(3, 1, 6, 256, 8).requires_grad_().unbind()
    parts = kernels.flex_parts(published_slopes(6), 256, "cpu")
    run = lambda q, k, v: kernels.alibi_by_flex_attention(q * 8**-0.5, k, v, *parts)  # noqa: E731
    run = torch.compile(run, dynamic=False, backend="aot_eager") if compiled else run
    expected, actual = alibi_in_double(q, k, v)[0], run(q, k, v)
    assert distance_from(expected, actual) < TOLERANCE[torch.float32]
    for our, their in zip(gradients(actual, (q, k, v)), gradients(expected, (q, k, v))):
        assert distance_from(their.double(), our) < TOLERANCE[torch.float32]


def test_flex_attention_serves_what_is_compiled_on_a_gpu(monkeypatch):
    """In windows of the length that it was prepared for; everything else takes the other forms."""
    calls, slopes = [], published_slopes(2)
    monkeypatch.setattr(kernels, "flex_parts", lambda *arguments: calls.append(arguments) or ("parts",))
    monkeypatch.setattr(kernels, "alibi_by_flex_attention", lambda q, k, v, *parts: (q, *parts))
    alibi, x = kernels.ALiBiAttention(slopes, 32, "cuda:0"), inputs(1, 2, 32, 8)
    assert calls == [(slopes, 32, "cuda:0")]
    assert alibi(x, x, x).shape == x.shape
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, *parts = alibi(x, x, x)
    assert torch.equal(q, x * 8**-0.5) and parts == ["parts"]
    assert alibi(x[:, :, -1:], x, x).shape == (1, 2, 1, 8)


# ----------------------------------------------------------------------------------------------------------
# Dropout and GELU
# ----------------------------------------------------------------------------------------------------------


def test_gelu_is_that_of_torch():
    x = torch.linspace(-12, 12, 10_001, dtype=torch.double, requires_grad=True)
    ours, theirs = kernels.GELU()(x), F.gelu(x, approximate="tanh")
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)), atol=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_dropout_keeps_the_mean_and_draws_independently(share):
    dropout = kernels.Dropout(share)
    torch.manual_seed(0)
    x = torch.ones(300, 1001)  # not a multiple of eight
    kept = dropout(x)
    p = min(255, round(256 * share)) / 256
    n = x.numel()
    assert torch.allclose(kept[kept > 0], torch.tensor(1 / (1 - p)))
    zero = (kept == 0).double()
    assert abs(zero.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    flat = zero.flatten() - p
    for lag in (1, 2, 7, 8, 9, 1001):  # neighbours, also within the eight that share a random number
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / math.sqrt(n - lag)
    assert not torch.equal(dropout(x), kept)
    x.requires_grad_()
    torch.manual_seed(0)
    dropout(x).sum().backward()
    assert torch.equal(x.grad, kept)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(kernels.Dropout(0.0)(x), x)


def test_dropout_on_another_device_is_that_of_torch():
    """Its shape and type on "meta", where nothing is computed: F.dropout is called."""
    x = torch.ones(3, 5, device="meta")
    assert kernels.Dropout(0.5)(x).shape == (3, 5)


# ----------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------


def test_memory_is_trimmed_only_if_it_is_kept(monkeypatch):
    calls = []

    class Library:
        mallopt = staticmethod(lambda *arguments: calls.append(arguments))
        malloc_trim = staticmethod(lambda n: calls.append("trim"))

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(kernels, "_keeps_freed_memory", False)
    kernels.trim_memory()
    assert calls == []
    kernels.keep_freed_memory()
    kernels.trim_memory()
    assert calls == [(-4, 0), (-1, 2**31 - 1), "trim"]


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(kernels, "_keeps_freed_memory", False)
    kernels.keep_freed_memory()
    assert kernels._keeps_freed_memory is False


# ----------------------------------------------------------------------------------------------------------
# Products of matrices on a GPU
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 63, 64, 65, 500])
def test_rows_of_zeros_change_no_product(V):
    x, weight = inputs(2, 3, 8), inputs(V, 8, seed=6)
    x.requires_grad_(), weight.requires_grad_()
    results = []
    for linear in (kernels.padded_linear, torch.nn.functional.linear):
        y = linear(x, weight)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    for ours, theirs in zip(*results):
        close(ours, theirs)
    assert kernels.linear(x, weight).shape == (2, 3, V)
    product = kernels.linear(x.to("meta"), weight.to("meta"))  # on a device other than the CPU
    assert product.stride(-2) % 64 == 0 and product.shape == (2, 3, V)


def test_a_function_that_cannot_be_compiled_is_called_as_it_is(monkeypatch):
    calls = []

    def compile(function, **options):
        def fail(*arguments):
            calls.append(options)
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    double = kernels.compiled_on_gpu(lambda x, factor: x * factor)
    assert double(torch.ones(2), 2).tolist() == [2, 2] and not calls
    for _ in range(2):
        assert double(torch.ones(2, device="meta"), 2).shape == (2,)
    assert calls == [{"dynamic": False}]  # tried once


def test_an_index_is_drawn_with_its_probability(monkeypatch):
    """Random numbers in equal steps fall on each index as often as its probability says; the ends of the range, and
    a sum that is not one, do no harm."""
    n = 10_000
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.05, 0.25, 0.0]) * 3
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: (torch.arange(n, dtype=torch.double) / n)[:, None])
    drawn = kernels.multinomial(p.expand(n, -1))
    assert drawn.shape == (n, 1)
    assert (torch.bincount(drawn[:, 0], minlength=7) / n - p / 3).abs().max() < 1.5 / n
    for u, index in ((0.0, 5), (1 - 2.0**-53, 1)):  # 1 - u is one, and as small as it gets
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **_: torch.full((1, 1), u, dtype=torch.double))
        assert kernels.multinomial(p[None]).item() == index


def test_rows_are_drawn_independently():
    torch.manual_seed(0)
    drawn = kernels.multinomial(torch.full((2000, 2), 0.5))[:, 0]
    assert 0.45 < drawn.float().mean() < 0.55 and 0.45 < (drawn[1:] == drawn[:-1]).float().mean() < 0.55
