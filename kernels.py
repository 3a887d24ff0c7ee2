"""The same maths as the rungs', in a form that a processor computes faster. Nothing here is part of a lesson.

Each function or module names the plain PyTorch expression that it equals; up to rounding, their results and gradients
are the same, which tests/test_kernels.py checks. A rung calls it where that expression would be:

    y = kernels.attention(q, k, v)  # F.scaled_dot_product_attention(q, k, v, is_causal=True)
"""

import contextlib
import ctypes
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# ----------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------


def attention(q, k, v, scale=None):
    """Causal attention: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).

    `k`, `v` (B, H, K, D); `q` (B, H, T, D) are the queries of the last T of the K tokens. Returns (B, H, T, D). The
    scores are multiplied by `scale`, by default 1 / sqrt(D).
    """
    T, K = q.size(2), k.size(2)
    if 1 < T < K:  # is_causal would let the queries start at the first key
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_past(T, K, q.device), scale=scale)
    if T == 1 or T > 512 or q.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale)
    # On a CPU the backward pass of that function is slow in short windows. Compiled matrix products are faster: 128
    # queries at a time, with the keys up to the last of them.
    scale, blocks = q.size(-1) ** -0.5 if scale is None else scale, []
    for start in range(0, T, 128):
        stop = min(start + 128, T)
        scores = (q[:, :, start:stop] * scale) @ k[:, :, :stop].mT  # (B, H, stop - start, stop)
        future = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)
        weights = scores.float().masked_fill(future, -math.inf).softmax(-1)
        blocks.append(weights.type_as(v) @ v[:, :, :stop])
    return torch.cat(blocks, 2)


def _past(T, K, device):
    """Which keys each of the last T of K tokens sees: itself and those before it, (T, K)."""
    return torch.ones(T, K, dtype=torch.bool, device=device).tril(K - T)


class ALiBiAttention:
    """Causal attention with linear biases (Press et al. 2021, arXiv:2108.12409). Where j <= i, bias[h, i, j] is
    slopes[h] * (j - i), else -inf; then it is F.scaled_dot_product_attention(q, k, v, attn_mask=bias).

    `slopes`: one for each head. On a GPU, windows of `block_size` tokens that are compiled go through FlexAttention,
    which is prepared here.
    """

    def __init__(self, slopes, block_size, device):
        self.slopes, self.block_size, self.flex, self.row = slopes, block_size, None, None
        if torch.device(device).type == "cuda":
            self.flex = flex_parts(slopes, block_size, device)

    def __call__(self, q, k, v):
        """`k`, `v` (B, H, K, D); `q` (B, H, T, D) are the queries of the last T of the K tokens."""
        T, K, D = q.size(2), k.size(2), q.size(3)
        if T == 1 < K:  # a new token after those in a cache
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.last_row(q, K))
        if T < K:
            distance = torch.arange(K, device=q.device) - torch.arange(K - T, K, device=q.device)[:, None]  # (T, K)
            bias = torch.tensor(self.slopes, device=q.device)[:, None, None] * distance  # (H, T, K)
            bias = bias.masked_fill(distance > 0, -math.inf)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])
        if self.flex and torch.compiler.is_compiling():
            return alibi_by_flex_attention(q * D**-0.5, k, v, *self.flex)
        return attention(*alibi_in_the_dot_product(q * D**-0.5, k, v, self.slopes), scale=1.0)[..., :D]

    def last_row(self, q, K):
        """The bias of the last of K tokens, (1, H, 1, K): the end of a longer row, which is kept for later tokens."""
        if self.row is None or self.row.size(-1) < K or (self.row.dtype, self.row.device) != (q.dtype, q.device):
            with torch.inference_mode(False):  # it may be used later where gradients are computed
                distance = torch.arange(1 - max(self.block_size, K), 1, device=q.device)
                self.row = (torch.tensor(self.slopes, device=q.device)[:, None, None] * distance).to(q.dtype)[None]
        return self.row[..., self.row.size(-1) - K :]


def alibi_in_the_dot_product(q, k, v, slopes):
    """ALiBi without a mask, for a fused causal kernel: `q`, `k`, `v` (B, H, T, D), `q` scaled, widened by 8 dimensions
    in which q . k gains slope * (j - i).

    bfloat16 has 8 significant bits: neither a long position nor every slope fits, but each is a sum of two numbers that
    do. position = 256 (position // 256) + position % 256 is exact up to 65,536 tokens; slope = s + rest has 16 bits.
    """
    B, H, T, _ = k.shape
    position = torch.arange(T, device=k.device)
    position = torch.stack([position // 256, position % 256] * 2, -1).expand(H, T, 4)
    parts = []
    for slope in slopes:
        mantissa, exponent = math.frexp(slope)
        s = math.ldexp(round(256 * mantissa), exponent - 8)  # its first 8 bits
        parts.append([256 * s, s, 256 * (slope - s), slope - s])
    parts = torch.tensor(parts, device=k.device)[:, None].expand(H, T, 4)
    extra_q, extra_k = torch.cat([parts, position], -1), torch.cat([position, -parts], -1)  # (H, T, 8)
    q, k = (torch.cat([x, extra.to(x.dtype).expand(B, H, T, 8)], -1) for x, extra in ((q, extra_q), (k, extra_k)))
    return q, k, F.pad(v, (0, 8))


def flex_parts(slopes, T, device):
    """What `alibi_by_flex_attention` needs for windows of `T` tokens: the slopes (H,), and which keys a query sees."""
    seen = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=device)
    return torch.tensor(slopes, device=device), seen


def alibi_by_flex_attention(q, k, v, slopes, seen):
    """ALiBi by a compiled kernel that adds the bias to each score as it is computed (FlexAttention, Dong et al. 2024,
    arXiv:2412.05496), so heads keep their width and a fast kernel. `q`, `k`, `v` (B, H, T, D), `q` scaled."""
    return flex_attention(q, k, v, lambda score, b, h, i, j: score + slopes[h] * (j - i), seen, scale=1.0)


# ----------------------------------------------------------------------------------------------------------
# Dropout and GELU
# ----------------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """nn.Dropout(p), except that on a CPU `p` is rounded to n / 256, and the factor 1 / (1 - p) accordingly.

    On a CPU, drawing a random number for each element costs more than a layer, so one of 64 bits serves eight elements.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        random = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,))
        dropped = min(255, round(256 * self.p))
        keep = random.view(torch.uint8)[: x.numel()].view(x.shape).int() >= dropped  # int: bytes compare one by one
        return x * (keep * (256 / (256 - dropped))).to(x.dtype)


class GELU(nn.Module):
    """nn.GELU(approximate="tanh") (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2), with 1 + tanh(z) written as
    2 sigmoid(2 z), which compiles to faster code."""

    def forward(self, x):
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


def multinomial(p):
    """One index for each row of `p` (B, V), drawn with these probabilities: torch.multinomial(p, 1), (B, 1).

    That function takes V random numbers for a row. On a CPU one is enough: u in (0, 1] falls on the first index whose
    cumulative probability reaches it. The same seed gives other indices, with the same probabilities.
    """
    if p.device.type != "cpu":
        return torch.multinomial(p, 1)
    cumulative = p.double().cumsum(-1)
    u = 1 - torch.rand(len(p), 1, dtype=torch.double)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:])


# ----------------------------------------------------------------------------------------------------------
# Matrix products on a GPU
# ----------------------------------------------------------------------------------------------------------


def linear(x, weight):
    """F.linear(x, weight), (..., V) for `x` (..., C) and `weight` (V, C). On a GPU, rows of zeros are added up to a
    multiple of 64, which its fast kernels need: a vocabulary may have any size."""
    return F.linear(x, weight) if x.device.type == "cpu" else padded_linear(x, weight)


def padded_linear(x, weight):
    """F.linear(x, weight), computed with rows of zeros added up to a multiple of 64."""
    V = weight.size(0)
    return F.linear(x, F.pad(weight, (0, 0, 0, -V % 64)))[..., :V]


@functools.lru_cache(maxsize=None)
def compiled_on_gpu(function):
    """`function` of a tensor, compiled for a GPU: many small operations become few. On a CPU, or if it cannot be
    compiled, `function` runs unchanged."""
    compiled = None

    def call(x, *arguments):
        nonlocal compiled
        if x.device.type != "cpu" and compiled is not function:
            try:
                compiled = compiled or torch.compile(function, dynamic=False)
                return compiled(x, *arguments)
            except Exception:  # a missing compiler raises many kinds; a mistake in the function raises again
                compiled = function
        return function(x, *arguments)

    return call


# ----------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------

_keeps_freed_memory = False


def keep_freed_memory():
    """Let the C library keep freed memory for the next step: fresh pages cost more than computing on them (glibc,
    mallopt(3)). The opposite of v1_1, which trades speed for memory."""
    global _keeps_freed_memory
    with contextlib.suppress(OSError, TypeError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large arrays get no separate blocks, which would be returned at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        _keeps_freed_memory = True


def trim_memory():
    """If freed memory is kept, return what is free now: pieces left by evaluations and checkpoints would add up."""
    if _keeps_freed_memory:
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
