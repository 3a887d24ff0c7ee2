"""v4: the modern block, and the question how a transformer knows where its tokens stand: ALiBi against RoPE.

Both are trained under equal conditions and evaluated at 1 to 16 times the length that they were trained on.

- RoPE (Su et al. 2021, arXiv:2104.09864) turns queries and keys by angles that grow with the position, so that
  their product depends on the distance alone.
- ALiBi (Press et al. 2021, arXiv:2108.12409) subtracts from each score the distance times a slope of the head.

What is new against v3:

- model: RMSNorm without weights, also of the embeddings, ReLU squared (So et al. 2021, arXiv:2109.08668), no biases,
  branches and head that start at zero;
- optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of the blocks, a rate
  of their own for embeddings and head, and rates that fall linearly in the second half;
- positions: "rope", "alibi", and for comparison "learned", "sinusoidal", "none"; the table of length extrapolation;
- embeddings drawn in two dimensions, nearest neighbours of tokens;
- generation with a key-value cache.

Weight decay and clipping end here: the length of Muon's step does not depend on that of the gradient.

    python v4_alibi_rope.py                     train, compare, write samples: results in runs/v4_alibi_rope/
    python v4_alibi_rope.py POSITION=rope       one scheme, or several with commas between them
    python v4_alibi_rope.py RESUME=True         go on from the last checkpoints
    python v4_alibi_rope.py PROMPT=" The cat"   continue a text with the trained model of the first scheme
    torchrun --standalone --nproc_per_node=2 v4_alibi_rope.py    train on two devices
"""

import functools
import json
import math

import harness  # first: it answers --help without torch, which takes seconds to load

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bpe_tokenizer import BPETokenizer
from data import load_tokens, vocabulary_file

# ----------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------

DATA = "data"  # home of the text: the folder of its tokens and vocabularies
VOCABULARY = "bpe_vocab.json"  # file in DATA that holds the tokenizer
BATCH_SIZE = 16  # windows a step
MICRO_BATCH_SIZE = 16  # windows that are computed together
BLOCK_SIZE = 256  # tokens in a window: the context that attention reaches
MAX_STEPS = 1280  # 1.72 times the training text
EVAL_INTERVAL = 320  # steps between two evaluations and checkpoints; at least one an epoch is made
PATIENCE = 3  # evaluations without a better one after which training stops early
LEARNING_RATE = 0.03  # of Muon, for the matrices of the blocks, at its highest; it ends at zero
LEARNING_RATE_ADAMW = 0.01  # of AdamW, for the embeddings and the layer that makes the logits
WARMUP_STEPS = 50  # steps until the learning rate is at its highest
COOLDOWN = 0.5  # share of the steps, at the end, in which the learning rate falls
MOMENTUM = 0.85  # of Muon; 0.95 is usual in longer trainings
N_LAYER = 4  # blocks
N_HEAD = 4  # attention heads of a block
N_EMBD = 256  # width: numbers that describe a token on its way through the blocks
POSITION = "alibi,rope"  # position schemes, trained one after the other: alibi, rope, learned, sinusoidal, none
ROPE_BASE = 10000.0  # RoPE's wavelengths go from 2 pi to 2 pi ROPE_BASE tokens
DROPOUT = 0.0  # share of numbers set to zero in training, so that less is learned by heart
STRIDE = 128  # of the overlapping windows in the last evaluation, in tokens
EXTRAPOLATION = (1, 2, 4, 8, 16)  # multiples of BLOCK_SIZE at which the schemes are compared
SAMPLE_TOKENS = 200  # length of the sample written at the end, or of what continues PROMPT
TEMPERATURE = 0.8  # of sampling: below 1 likely tokens become likelier; at 0 the likeliest is taken
TOP_K = 0  # sample from this many of the likeliest tokens; 0: from all
TOP_P = 1.0  # sample from the likeliest tokens that have this probability together
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DTYPE = "auto"  # of matrix products: "float32", "bfloat16", or the faster of them
COMPILE = True  # use torch.compile, if it works here
OUT_DIR = "runs/v4_alibi_rope"  # where the results go
RESUME = False  # go on from the last checkpoint in OUT_DIR, or begin
INIT_FROM = None  # folder of a run from whose weights this one starts: fine-tuning
PROMPT = None  # a text to continue with the trained model, instead of training
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 512, N_LAYER = 12, N_HEAD = 12, N_EMBD = 768,
# DROPOUT = 0.1, MAX_STEPS = 20_000, MOMENTUM = 0.95, LEARNING_RATE = 0.02, and WikiText-103 (python data/prepare.py
# --dataset wikitext-103-v1).


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def window_starts(n_tokens, batch_size, block_size, seed, epoch):
    """Where the windows of an epoch start: cut at a random offset, in random order, (batches, B)."""
    n_batches = (n_tokens - block_size) // (batch_size * block_size)
    if n_batches < 1:
        raise ValueError(f"the training text has {n_tokens} tokens, too few for a batch of {batch_size} windows of "
                         f"{block_size}; lower BATCH_SIZE or BLOCK_SIZE, or train on a longer text")
    random = np.random.default_rng((seed, epoch))  # independent of every other seed and epoch
    starts = random.integers(block_size) + block_size * random.permutation(n_batches * batch_size)
    return torch.from_numpy(starts).view(n_batches, batch_size)


def get_batch(ids, step):
    """Batch number `step`: inputs (B, T) and, one token later, targets (B, T). Each window is seen once an epoch."""
    n_batches = (len(ids) - BLOCK_SIZE) // (BATCH_SIZE * BLOCK_SIZE)
    epoch, k = divmod(step, max(n_batches, 1))
    starts = window_starts(len(ids), BATCH_SIZE, BLOCK_SIZE, SEED, epoch)[k]
    starts = starts.view(harness.world_size(), -1)[harness.rank()]  # of several processes each takes its part
    windows = ids[starts[:, None] + torch.arange(BLOCK_SIZE + 1)].long().to(DEVICE)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


def norm(x):
    """RMSNorm without weights (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4)."""
    return F.rms_norm(x, (x.size(-1),))


SCHEMES = ("alibi", "rope", "learned", "sinusoidal", "none")


def rope_table(positions, D, base):
    """Cosines and sines of RoPE's angles, each (T, D / 2), for `positions` (T,) (Su et al. 2021, section 3.2.2)."""
    angles = positions[:, None] * base ** (-torch.arange(0, D, 2, device=positions.device) / D)
    return angles.cos(), angles.sin()


def apply_rope(x, table):
    """Turn the pairs (x[i], x[i + D / 2]) of `x` (..., T, D) by the angles of `table`."""
    cos, sin = table
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).type_as(x)


def alibi_slopes(n_head):
    """Slope of each head, H numbers: 2^(-8/H), 2^(-16/H), ..., 2^-8 (Press et al. 2021, section 3).

    If H is no power of two, the slopes of the power of two below it, then every other one of that above it, as in the
    authors' code.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (n_head - power), 2)]


def alibi_bias(n_head, T, K):
    """ALiBi as it is: slope * (j - i), which is added to the score of query i and key j, (H, T, K). The T queries are
    the last of the K tokens."""
    distance = torch.arange(K) - torch.arange(K - T, K)[:, None]  # (T, K)
    return torch.tensor(alibi_slopes(n_head))[:, None, None] * distance


def alibi_in_the_dot_product(q, k, v):
    """The same bias without a mask, for the fused causal kernel: `q`, `k`, `v` (B, H, T, D), `q` scaled, widened by 8
    dimensions in which q . k gains slope * (j - i).

    Where numbers have 8 bits, neither a long position is one nor every slope, but each is a sum of two: position =
    256 (position // 256) + position % 256, exact up to 65,536 tokens, and slope = s + rest, to 16 bits at least.
    """
    B, H, T, _ = k.shape
    position = torch.arange(T, device=k.device)
    position = torch.stack([position // 256, position % 256] * 2, -1).expand(H, T, 4)
    slopes = []
    for slope in alibi_slopes(H):
        mantissa, exponent = math.frexp(slope)
        s = math.ldexp(round(256 * mantissa), exponent - 8)  # its first 8 bits
        slopes.append([256 * s, s, 256 * (slope - s), slope - s])
    slopes = torch.tensor(slopes, device=k.device)[:, None].expand(H, T, 4)
    extra_q, extra_k = torch.cat([slopes, position], -1), torch.cat([position, -slopes], -1)  # (H, T, 8)
    q, k = (torch.cat([x, extra.to(x.dtype).expand(B, H, T, 8)], -1) for x, extra in ((q, extra_q), (k, extra_k)))
    return q, k, F.pad(v, (0, 8))


def flex_parts(n_head, T, device):
    """What FlexAttention needs beforehand: the slopes, and which of `T` tokens each of them sees."""
    seen = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=device)
    return torch.tensor(alibi_slopes(n_head), device=device), seen


def alibi_by_flex_attention(q, k, v, slopes, seen):
    """Causal attention with the same bias, which a compiled kernel adds to each score as it goes (FlexAttention, Dong
    et al. 2024, arXiv:2412.05496): heads stay as wide as they are. `q`, `k`, `v` (B, H, T, D), `q` scaled."""
    return flex_attention(q, k, v, lambda score, b, h, i, j: score + slopes[h] * (j - i), seen, scale=1.0)


class KVCache:
    """Keys and values of the tokens so far, for each layer (B, H, T, D), so that new tokens are computed alone."""

    def __init__(self, model):
        self.length = 0  # tokens that all layers have seen
        self.block_size, self.layers = model.block_size, [None] * len(model.blocks)

    def extend(self, layer, k, v):
        """Append the keys and values of new tokens; returns those of all tokens."""
        T = self.length + k.size(2)
        if self.layers[layer] is None or T > self.layers[layer][0].size(2):  # room for a window, filled from the left
            before, room = self.layers[layer], max(self.block_size, T)
            self.layers[layer] = [x.new_zeros(*x.shape[:2], room, x.size(3)) for x in (k, v)]
            for memory, x in zip(self.layers[layer], before or ()):
                memory[:, :, : self.length] = x[:, :, : self.length]
        for memory, x in zip(self.layers[layer], (k, v)):
            memory[:, :, self.length : T] = x
        return tuple(memory[:, :, :T] for memory in self.layers[layer])


class Dropout(nn.Module):
    """In training, sets a share `p` of numbers to zero and scales the rest so that the mean stays (Srivastava et al.
    2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting"). A CPU rounds the share to n / 256."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        # There, a random number for each element costs more than a layer: one of 64 bits serves eight, a byte each.
        random = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,))
        dropped = min(255, round(256 * self.p))
        keep = random.view(torch.uint8)[: x.numel()].view(x.shape).int() >= dropped  # int: bytes compare one by one
        return x * (keep * (256 / (256 - dropped))).to(x.dtype)


def attend(q, k, v, scale, bias=None):
    """softmax(scale q k' + bias) v for keys and values (B, H, K, D) and the queries of the last T tokens (B, H, T, D):
    a token sees itself and those before it."""
    T, K = q.size(2), k.size(2)
    if bias is not None or 1 < T < K:
        mask = q.new_zeros(1) if bias is None else bias.to(q.dtype)  # (1, H, T, K)
        if T > 1:
            future = torch.ones(T, K, dtype=torch.bool, device=q.device).triu(K - T + 1)
            mask = mask.masked_fill(future, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if T > 512 or q.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale)  # one fused kernel
    # On a CPU its backward pass is slow in short windows. Compiled products of matrices are faster, 128 queries at a
    # time with the keys up to the last of them.
    blocks = []
    for start in range(0, T, 128):
        stop = min(start + 128, T)
        scores = (q[:, :, start:stop] * scale) @ k[:, :, :stop].mT  # (B, H, stop - start, stop)
        future = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)
        weights = scores.float().masked_fill(future, -math.inf).softmax(-1)
        blocks.append(weights.type_as(v) @ v[:, :, :stop])
    return torch.cat(blocks, 2)


class Attention(nn.Module):
    """Causal self-attention with N_HEAD heads (Vaswani et al. 2017, equation 1 and section 3.2.2)."""

    def __init__(self, position, layer):
        super().__init__()
        self.n_head, self.position, self.layer = N_HEAD, position, layer
        # On a GPU wider heads may need a slower kernel.
        on_gpu = position == "alibi" and DEVICE.startswith("cuda")
        self.flex = flex_parts(N_HEAD, BLOCK_SIZE, DEVICE) if on_gpu else None
        self.qkv = nn.Linear(N_EMBD, 3 * N_EMBD, bias=False)
        self.proj = nn.Linear(N_EMBD, N_EMBD, bias=False)

    def forward(self, x, rope, bias, cache):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        qkv = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (B, H, T, D)
        if self.position == "rope":
            q, k = apply_rope(qkv[:2], rope)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        if bias is not None:
            y = attend(q, k, v, D**-0.5, bias)  # (B, H, T, D)
        elif self.flex and torch.compiler.is_compiling():
            y = alibi_by_flex_attention(q * D**-0.5, k, v, *self.flex)
        elif self.position == "alibi":
            y = attend(*alibi_in_the_dot_product(q * D**-0.5, k, v), 1.0)[..., :D]
        else:
            y = attend(q, k, v, D**-0.5)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class MLP(nn.Module):
    """For each token by itself: widen, ReLU squared, narrow."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(N_EMBD, 4 * N_EMBD, bias=False)
        self.proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=False)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    """Attention, then a small MLP for each token by itself; RMSNorm before each, residual connection around."""

    def __init__(self, position, layer):
        super().__init__()
        self.attention = Attention(position, layer)
        self.mlp = MLP()
        self.dropout = Dropout(DROPOUT)

    def forward(self, x, rope, bias, cache):
        x = x + self.dropout(self.attention(norm(x), rope, bias, cache))  # (B, T, C)
        return x + self.dropout(self.mlp(norm(x)))


class LanguageModel(nn.Module):
    """Token embeddings, N_LAYER blocks that know positions by the scheme `position`, a linear layer to the logits."""

    def __init__(self, vocab_size, position):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise ValueError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}, since the heads share the width")
        if position == "rope" and N_EMBD // N_HEAD % 2:
            raise ValueError(f"N_EMBD / N_HEAD = {N_EMBD // N_HEAD} must be even, since RoPE turns pairs of numbers")
        if position == "sinusoidal" and N_EMBD % 2:
            raise ValueError(f"N_EMBD={N_EMBD} must be even, since half of the numbers of a position are sines")
        self.position, self.block_size = position, BLOCK_SIZE
        self.n_head, self.head_size, self.rope_base = N_HEAD, N_EMBD // N_HEAD, ROPE_BASE
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        if position == "learned":
            self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.dropout = Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block(position, layer) for layer in range(N_LAYER))
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("proj.weight") or name == "head.weight":
                nn.init.zeros_(p)  # at the start every branch is silent and every token equally likely
            else:
                nn.init.normal_(p, std=0.1 if name == "embedding.weight" else N_EMBD**-0.5)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats.

        With a KVCache, `idx` continues the tokens that the cache has seen.
        """
        start = cache.length if cache else 0
        positions = torch.arange(start, start + idx.size(1), device=idx.device)
        x, rope, bias = norm(self.embedding(idx)), None, None  # (B, T, C)
        if self.position == "learned":
            x = x + self.position_embedding(positions)
        elif self.position == "sinusoidal":  # Vaswani et al. 2017, section 3.5, all sines first, then all cosines
            x = x + torch.cat(rope_table(positions, x.size(-1), self.rope_base)[::-1], -1)
        elif self.position == "rope":
            rope = rope_table(positions, self.head_size, self.rope_base)
        elif self.position == "alibi" and cache:
            bias = alibi_bias(self.n_head, idx.size(1), start + idx.size(1))[None].to(idx.device)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rope, bias, cache)
        if cache:
            cache.length += idx.size(1)
        logits = self.head(norm(x)).float()  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def attention_weights(model, idx):
    """How much each token (row) takes from each (column), in every layer and head: (N_LAYER, B, H, T, T) for ids `idx`
    (B, T). For pictures: it computes what the forward pass passes over."""
    found = []

    def keep(attention, inputs, output):
        B, T, C = inputs[0].shape
        q, k, _ = attention.qkv(inputs[0]).view(B, T, 3, attention.n_head, -1).permute(2, 0, 3, 1, 4)
        if attention.position == "rope":
            q, k = apply_rope(q, inputs[1]), apply_rope(k, inputs[1])
        scores = q @ k.mT * q.size(-1) ** -0.5  # (B, H, T, T): query i, key j
        if attention.position == "alibi":
            scores = scores + alibi_bias(attention.n_head, T, T).to(scores.device)
        future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
        found.append(scores.masked_fill(future, -math.inf).softmax(-1))

    hooks = [block.attention.register_forward_hook(keep) for block in model.blocks]
    model(idx)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokens, stride=None, size=None):
    """Metrics over a whole split: each token after the first is predicted once. Bits per byte and word perplexity do
    not depend on the vocabulary; the loss per token does.

    Windows of `size` tokens, by default the model's, start every `stride` tokens; by default they do not overlap. Where
    they do, only tokens that no earlier window reached are counted, so each has at least size - stride of context.
    The calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) is the mean distance between the
    probability of the likeliest token and how often it is right, in 15 bins of that probability.
    """
    model.eval()
    size = size or model.block_size
    stride = min(stride or size, size)
    n, n_bins = len(tokens) - 1, 15
    n_windows = max(0, math.ceil((n - size) / stride)) + 1
    nats, top_1, top_5 = 0.0, 0, 0
    bins = torch.zeros(3, n_bins, dtype=torch.double)  # of each: tokens, sum of probabilities, tokens guessed right
    full = n_windows - 1  # the last window of the split may be shorter
    batches = list(torch.arange(full).split(max(1, MICRO_BATCH_SIZE * model.block_size // size))) if full else []
    for batch in [*batches, torch.tensor([full])][harness.rank() :: harness.world_size()]:  # each process has its own
        T = min(size, n - stride * int(batch[-1]))
        windows = tokens.ids[stride * batch[:, None] + torch.arange(T + 1)].long().to(DEVICE)
        old = torch.where(batch > 0, size - stride, 0)  # tokens that the window before has predicted
        fresh = (torch.arange(T) >= old[:, None]).to(DEVICE)
        with harness.autocast(DEVICE, DTYPE):
            logits = model(windows[:, :-1])  # (b, T, V)
        target = logits.gather(-1, windows[:, 1:, None]).squeeze(-1)[fresh]  # (N,)
        total = logits.logsumexp(-1)[fresh]  # (N,)
        top = logits.topk(5)
        hits = (top.indices == windows[:, 1:, None])[fresh].cpu()  # (N, 5)
        nats += (total - target).cpu().double().sum().item()
        top_1 += hits[:, 0].sum().item()
        top_5 += hits.sum().item()
        p = (top.values[..., 0][fresh] - total).exp().cpu().double()
        place = (p * n_bins).long().clamp(0, n_bins - 1)
        for row, weights in zip(bins, (torch.ones_like(p), p, hits[:, 0].double())):
            row += torch.bincount(place, weights, minlength=n_bins)
    nats, top_1, top_5 = harness.all_reduce(torch.tensor([nats, top_1, top_5], dtype=torch.double)).tolist()
    bins = harness.all_reduce(bins)
    model.train()
    return {
        "loss": nats / n,
        "bpb": nats / (math.log(2) * tokens.n_bytes),
        "word_ppl": math.exp(min(nats / tokens.n_words, 700)) if tokens.n_words else None,
        "top_1": top_1 / n,
        "top_5": top_5 / n,
        "calibration_error": (bins[1] - bins[2]).abs().sum().item() / n,
    }


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def orthogonalize(G, dtype=torch.float32):
    """The orthogonal matrix nearest to each matrix of `G` (n, rows, columns), about: all singular values become 1.

    Newton-Schulz iteration with the polynomial 3.4445 x - 4.7750 x^3 + 2.0315 x^5 of the singular values, which takes
    them from anywhere in (0, 1] to between 0.7 and 1.2 within five rounds (Jordan et al. 2024).
    """
    X = G.to(dtype)
    if tall := G.size(-2) > G.size(-1):
        X = X.mT.contiguous()  # the smaller side first: products are cheaper
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)  # -4.7750 A + 2.0315 A A, in one pass
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return (X.mT if tall else X).type_as(G)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: a step moves every direction of a matrix by the same amount (Jordan et al. 2024).

    Matrices of one shape are stacked and orthogonalized together. `split` says of how many square matrices, each by
    itself, the matrices of a group are stacked.
    """

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum, "split": 1})

    @torch.no_grad()
    def step(self):
        dtype = getattr(torch, harness.resolve_dtype(DEVICE, DTYPE))
        for group in self.param_groups:
            grad = torch.stack([p.grad for p in group["params"]])  # (n, rows, columns)
            state = self.state[group["params"][0]]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(state["momentum"], group["momentum"])  # Nesterov's look ahead
            rows, columns = update.size(1) // group["split"], update.size(2)
            update = orthogonalize(update.reshape(-1, rows, columns), dtype).reshape(update.shape)
            scale = max(1, rows / columns) ** 0.5  # a tall matrix makes longer outputs of the same input
            for p, u in zip(group["params"], update):
                p.sub_(u, alpha=group["lr"] * scale)


def make_optimizers(model):
    """Muon for the matrices of the blocks, AdamW for the embeddings and the head."""
    attention, mlp = [b.attention for b in model.blocks], [b.mlp for b in model.blocks]
    muon = Muon(
        [
            {"params": [a.qkv.weight for a in attention], "split": 3},
            {"params": [a.proj.weight for a in attention]},
            {"params": [m.fc.weight for m in mlp]},
            {"params": [m.proj.weight for m in mlp]},
        ],
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
    )
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE_ADAMW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for group in muon.param_groups + adamw.param_groups:
        group["initial_lr"] = group["lr"]
    return muon, adamw


def lr_factor(step):
    """Learning rate of a step as a share of the highest: linear warm-up, constant, linear down to zero."""
    return min(1, (step + 1) / max(1, WARMUP_STEPS), (MAX_STEPS - step) / max(1, COOLDOWN * MAX_STEPS))


def train(model, tokens, run):
    """Train on tokens["train"]. The weights that are best on tokens["val"] are kept in the folder of the run."""
    optimizers = make_optimizers(model)
    state = run.resume(model, *optimizers)  # step, best loss, evaluations without a better one
    compiled = run.compile(model, [t[:MICRO_BATCH_SIZE] for t in get_batch(tokens["train"].ids, 0)])
    for step in range(state.step, MAX_STEPS + 1):
        if run.evaluation_due(step):
            metrics = evaluate(model, tokens["val"])
            state.bad_evals += 1
            if metrics["loss"] < state.best:
                state.best, state.bad_evals = metrics["loss"], 0
                run.save_best()
            run.log(step, metrics)
        if step == MAX_STEPS or state.bad_evals >= PATIENCE:
            break

        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor(step)
        x, y = get_batch(tokens["train"].ids, step)
        harness.seed(SEED, step, harness.rank())  # so a run that goes on draws what it would have drawn
        loss, done = 0.0, 0
        for micro_x, micro_y in zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE)):
            done += len(micro_x)
            with harness.exchange_gradients(compiled, now=done == len(x)):
                with harness.autocast(DEVICE, DTYPE):
                    micro_loss = compiled(micro_x, micro_y) * (len(micro_x) / len(x))
                micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = nn.utils.get_total_norm(p.grad for p in model.parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step(loss, grad_norm)


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


def draw(logits):
    """The next token for each row of `logits` (B, V): drawn from the TOP_K likeliest, of them from the fewest that
    have TOP_P of the probability together (Holtzman et al. 2020, arXiv:1904.09751, section 3.1)."""
    if TEMPERATURE == 0:
        return logits.argmax(-1, keepdim=True)
    p = (logits / TEMPERATURE).softmax(-1)
    if TOP_K or TOP_P < 1:
        ranked, order = p.sort(descending=True, stable=True)  # (B, V), likeliest first
        if TOP_K:
            ranked[:, TOP_K:] = 0
        if TOP_P < 1:
            likelier = (ranked / ranked.sum(-1, keepdim=True)).cumsum(-1)[:, :-1]  # before each but the first
            ranked[:, 1:][likelier >= TOP_P] = 0
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    return torch.multinomial(p, 1)


@torch.inference_mode()
def generate(model, ids, n_tokens):
    """Continue `ids`, a list of tokens: yields `n_tokens` more, one by one."""
    model.eval()
    ids, size, cache, new = list(ids), model.block_size, None, None
    for _ in range(n_tokens):
        if cache is None or cache.length == size:  # read the text, or its last half window, anew
            cache, new = KVCache(model), ids[-size if cache is None else -max(1, size // 2) :]
        logits = model(torch.tensor([new], device=DEVICE), cache=cache)[:, -1]  # (1, V)
        new = draw(logits)[0].tolist()
        ids += new
        yield new[0]


# ----------------------------------------------------------------------------------------------------------
# Comparison: length extrapolation, embeddings
# ----------------------------------------------------------------------------------------------------------

WORDS = {  # tokens that are drawn, by kind
    "months": "January March April June July August September October November December",
    "numbers": "one two three four five six seven eight nine ten",
    "places": "London England France Germany Australia Canada America Japan China York",
    "verbs": "said made found took became went came gave wrote began",
    "prepositions": "in on at from into over under between during through",
    "people": "he she his her him they them who king president",
}
NEIGHBOURS_OF = (" two", " London", " king", " said", " music", " 1990", " north", " ,")


def extrapolate(model, tokens):
    """Bits per byte on a split in windows of 1, 2, 4, ... times BLOCK_SIZE; None where the scheme has no positions."""
    sizes = [BLOCK_SIZE * times for times in EXTRAPOLATION]
    return {n: evaluate(model, tokens, size=n)["bpb"] if model.position != "learned" or n <= BLOCK_SIZE else None
            for n in sizes}  # fmt: skip


def single_tokens(texts, tokenizer):
    """{text: id} of those `texts` that are a token each; if few are, of the first 40 merged tokens that are text."""
    found = {text: ids[0] for text in texts if len(ids := tokenizer.encode(text)) == 1}
    first = {text: i for i in range(256, min(tokenizer.vocab_size, 296))
             if (text := tokenizer.decode([i])).isprintable() and "\ufffd" not in text}  # fmt: skip
    return found if len(found) > 2 else first


def nearest_neighbours(model, tokenizer, n=6):
    """For each token of NEIGHBOURS_OF the `n` tokens whose embeddings have the largest cosine with its own."""
    vectors = F.normalize(model.embedding.weight.detach().float(), dim=1)
    return {text: [tokenizer.decode([i]) for i in (vectors @ vectors[id]).topk(n + 1).indices.tolist() if i != id][:n]
            for text, id in list(single_tokens(NEIGHBOURS_OF, tokenizer).items())[:8]}  # fmt: skip


def plot_embeddings(model, tokenizer):
    """Figure of the embeddings of WORDS in the plane of their two first principal components."""
    from matplotlib.figure import Figure

    kind_of = {" " + word: kind for kind, words in WORDS.items() for word in words.split()}
    ids = single_tokens(kind_of, tokenizer)
    kinds = list(dict.fromkeys(kind_of.get(text, "frequent tokens") for text in ids))
    vectors = F.normalize(model.embedding.weight.detach().float().cpu()[list(ids.values())], dim=1)
    vectors = vectors - vectors.mean(0)
    flat = vectors @ torch.linalg.svd(vectors, full_matrices=False).Vh[:2].T  # (n, 2)
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots()
    colors = [f"C{kinds.index(kind_of.get(text, 'frequent tokens'))}" for text in ids]
    axes.scatter(*flat.T, s=8, color=colors)
    for k, kind in enumerate(kinds):
        axes.plot([], [], "o", color=f"C{k}", label=kind)
    axes.set(title=f"v4, {model.position}: token embeddings", xlabel="1st principal component", ylabel="2nd")
    axes.legend()
    figure.draw_without_rendering()  # only now it is known where things stand
    placed = []
    for text, color, (x, y) in sorted(zip(ids, colors, flat.tolist()), key=lambda label: label[2][1]):
        name = text.strip() if all(ord(c) < 0x250 for c in text) else f"token {ids[text]}"  # the font has few scripts
        for rise in range(3, 303, 3):  # points above its dot, as many as keep it clear of the labels before
            label = axes.annotate(name, (x, y), (0, rise), textcoords="offset points", color=color, ha="center",
                                  parse_math=False)  # fmt: skip
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in placed):
                break
            label.remove()
        placed.append(box)
    return figure


def plot_schemes(curves, xlabel, title):
    """Figure of validation bits per byte; `curves` has for each scheme a list of (x, bits per byte)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for position, points in curves.items():
        axes.plot(*zip(*points), "o-", label=position)
    if title == "length extrapolation":
        axes.axvline(BLOCK_SIZE, color="grey", linestyle=":", label="training length")
        axes.set_xscale("log", base=2)
    axes.set(xlabel=xlabel, ylabel="validation bits per byte", title=f"v4: {title}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def compare(run, summaries, records):
    """Write logs, samples and curves of all schemes side by side; print bits per byte by the size of the window."""
    lines = [{"position": position, **record} for position in summaries for record in records[position]]
    run.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    samples = {position: (run.out_dir / position / "sample.txt").read_text(encoding="utf-8") for position in summaries}
    run.write("sample.txt", "".join(f"--- {position} ---\n{sample}\n" for position, sample in samples.items()))
    losses = {position: [(record["tokens_seen"] / 1e6, record["val_bpb"]) for record in records[position]]
              for position in summaries}  # fmt: skip
    sizes = {position: [(n, bpb) for n, bpb in summary["extrapolation_bpb"].items() if bpb is not None]
             for position, summary in summaries.items()}  # fmt: skip
    run.draw("loss.png", plot_schemes, losses, "tokens seen (millions)", "training")
    run.draw("extrapolation.png", plot_schemes, sizes, "tokens in a window", "length extrapolation")
    print(f"\nvalidation bits per byte by size of the window (trained on {BLOCK_SIZE} tokens)")
    print("tokens".ljust(12) + "".join(f"{n:9}" for n in next(iter(summaries.values()))["extrapolation_bpb"]))
    for position, summary in summaries.items():
        cells = ("-" if bpb is None else f"{bpb:.4f}" for bpb in summary["extrapolation_bpb"].values())
        print(position.ljust(12) + "".join(f"{cell:>9}" for cell in cells))


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------


def positions():
    """The schemes that POSITION names. Raises ValueError for an unknown one."""
    for position in POSITION.split(","):
        if position not in SCHEMES:
            raise ValueError(f"POSITION={POSITION}: there is no scheme {position!r}; known are {', '.join(SCHEMES)}")
    return list(dict.fromkeys(POSITION.split(",")))


def run_scheme(position, run):
    """Train, evaluate and sample with one position scheme. Returns the summary, a dict."""
    tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY, DATA))
    with harness.main_process_first():
        tokens = load_tokens(VOCABULARY, DATA)
    torch.manual_seed(SEED)
    model = LanguageModel(tokenizer.vocab_size, position).to(DEVICE)
    run.begin(model, tokens)
    if INIT_FROM is not None:
        run.init_from(INIT_FROM)
    train(model, tokens, run)

    best = run.load_best(model)
    sliding, test = evaluate(model, tokens["val"], STRIDE), evaluate(model, tokens["test"])
    sizes, neighbours = extrapolate(model, tokens["val"]), nearest_neighbours(model, tokenizer)
    torch.manual_seed(SEED)
    start = tokens["train"].start  # of a document
    sample = tokenizer.decode([*start, *generate(model, start, SAMPLE_TOKENS)])
    run.draw("embeddings.png", plot_embeddings, model, tokenizer)
    summary = run.finish(
        sample, **{f"val_{k}_sliding": v for k, v in sliding.items()}, **{f"test_{k}": v for k, v in test.items()},
        position=position, extrapolation_bpb=sizes, nearest_neighbours=neighbours,
    )  # fmt: skip
    for name, metrics in (("windows side by side", best), ("windows that overlap", sliding)):
        print(f"validation, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if v is not None))
    print("nearest neighbours of tokens:")
    for text, found in neighbours.items():
        print(f"  {text!r:10} {' '.join(map(repr, found))}")
    return summary


def main():
    """Train every scheme of POSITION in OUT_DIR/<scheme>/ and compare them. Returns the summary of the best of them,
    with those of all under "schemes"; with PROMPT the text."""
    if PROMPT is not None:
        folders = [f"{OUT_DIR}/{position}" for position in dict.fromkeys((*positions(), *SCHEMES))]
        return harness.continue_prompt(globals(), *folders)  # of the first that is there
    harness.keep_freed_memory()
    summaries, records = {}, {}
    with harness.Run(globals()) as run:
        for position in positions():
            with run.part(position, POSITION=position) as part:
                summaries[position], records[position] = run_scheme(position, part), part.records
        best = min(summaries.values(), key=lambda summary: summary["val_bpb"])
        summary = {**best, "hyperparameters": run.constants, "schemes": summaries}
        run.write("summary.json", json.dumps(summary, indent=1) + "\n")
        if harness.rank() == 0:
            compare(run, summaries, records)
    return summary


if __name__ == "__main__":
    harness.start(globals())
