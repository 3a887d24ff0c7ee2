"""v4: the modern block, and the question how a transformer knows where its tokens stand: ALiBi against RoPE.

Both are trained under equal conditions and evaluated at 1 to 16 times the length that they were trained on.

- RoPE (Su et al. 2021, arXiv:2104.09864) turns queries and keys by angles that grow with the position, so that
  their product depends on the distance alone.
- ALiBi (Press et al. 2021, arXiv:2108.12409) subtracts from each score the distance times a slope of the head.

What is new against v3:

- model: RMSNorm without weights, ReLU squared (So et al. 2021, arXiv:2109.08668), branches and head that start at
  zero;
- optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of the blocks, and a
  learning rate that falls linearly in the second half;
- positions: "rope", "alibi", and for comparison "learned", "sinusoidal", "none"; the table of length extrapolation;
- embeddings drawn in two dimensions, nearest neighbours of tokens;
- generation with a key-value cache.

What it reaches on WikiText-2: val bpb 1.403, word perplexity 150, 9.8 minutes of training on two CPU cores.

    python v4_alibi_rope.py                     train, compare, write samples: results in runs/v4_alibi_rope/
    python v4_alibi_rope.py POSITION=rope       one scheme, or several with commas between them
    python v4_alibi_rope.py RESUME=True         go on from the last checkpoints
    python v4_alibi_rope.py PROMPT=" The cat"   continue a text with the trained model of the first scheme
    torchrun --standalone --nproc_per_node=2 v4_alibi_rope.py    train on two devices
"""

import ast
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch._dynamo  # torch.optim loads it when first used: here it counts as a library, not as training memory
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from bpe_tokenizer import BPETokenizer
from data.prepare import load_tokens, vocabulary_file

try:
    import fcntl  # locks on files
except ImportError:  # Windows
    fcntl = None

# ----------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------

VOCABULARY = "bpe_vocab.json"  # file in data/ that holds the tokenizer
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
DROPOUT = 0.0  # share of numbers set to zero in training; it has not paid so far, see the README
STRIDE = 128  # of the overlapping windows in the last evaluation, in tokens
SAMPLE_TOKENS = 200  # length of the sample written at the end
TEMPERATURE = 0.8  # of sampling: below 1 likely tokens become likelier
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DTYPE = "auto"  # of matrix products: "float32", "bfloat16", or the faster of them
COMPILE = True  # use torch.compile, if it works here
OUT_DIR = "runs/v4_alibi_rope"  # where the results go
RESUME = False  # go on from the last checkpoint in OUT_DIR
PROMPT = None  # a text to continue with the trained model, instead of training
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 512, N_LAYER = 12, N_HEAD = 12, N_EMBD = 768,
# DROPOUT = 0.1, MAX_STEPS = 20_000, MOMENTUM = 0.95, LEARNING_RATE = 0.02, and WikiText-103 (python data/prepare.py
# --dataset wikitext-103-v1).

RUNG = Path(__file__).stem
SCHEMES = ("alibi", "rope", "learned", "sinusoidal", "none")
EXTRAPOLATION = (1, 2, 4, 8, 16)  # multiples of BLOCK_SIZE at which the schemes are compared


# ----------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------


def rank():
    """Number of this process, from 0, among those that torchrun started."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_ranks():
    """How many processes train together: 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes():
    """Within, the processes that torchrun started know each other. Raises ValueError if they cannot work together."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    on_gpu, local_rank = DEVICE.startswith("cuda"), int(os.environ["LOCAL_RANK"])
    if BATCH_SIZE % int(os.environ["WORLD_SIZE"]):
        raise ValueError(f"BATCH_SIZE={BATCH_SIZE} must be a multiple of the {os.environ['WORLD_SIZE']} processes")
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs here")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
        yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def wait_for_all():
    """Return when all processes have come to this place."""
    if n_ranks() > 1:
        dist.barrier()


def sum_over_ranks(x):
    """The sum over all processes of the tensor `x`, on the CPU."""
    if n_ranks() > 1:
        x = x.to(DEVICE)
        dist.all_reduce(x)
    return x.cpu()


def distribute(model):
    """`model` as a module whose backward pass averages the gradients over all processes (Li et al. 2020,
    arXiv:2006.15704). Every process holds the whole model and sees its own part of each batch."""
    return nn.parallel.DistributedDataParallel(model) if n_ranks() > 1 else model


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def window_starts(n_tokens, batch_size, block_size, seed):
    """Where the windows of one epoch start: cut at a random offset, in random order, (batches, B)."""
    n_batches = (n_tokens - block_size) // (batch_size * block_size)
    if n_batches < 1:
        raise ValueError(f"the training text has {n_tokens} tokens, too few for a batch of {batch_size} windows of "
                         f"{block_size}; lower BATCH_SIZE or BLOCK_SIZE, or train on a longer text")
    random = torch.Generator().manual_seed(seed)
    offset = torch.randint(block_size, (1,), generator=random)
    order = torch.randperm(n_batches * batch_size, generator=random)
    return (offset + block_size * order).view(n_batches, batch_size)


def read_tokens(vocabulary):
    """The token files of a vocabulary. Where they are missing, one process of each machine makes them first."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank:
        wait_for_all()
    tokens = load_tokens(vocabulary)
    if not local_rank:
        wait_for_all()
    return tokens


def get_batch(ids, step):
    """This process's part of batch number `step`: inputs (B, T) and, one token later, targets (B, T), B being
    BATCH_SIZE / n_ranks(). Each window is seen once an epoch."""
    n_batches = (len(ids) - BLOCK_SIZE) // (BATCH_SIZE * BLOCK_SIZE)
    epoch, k = divmod(step, max(n_batches, 1))
    starts = window_starts(len(ids), BATCH_SIZE, BLOCK_SIZE, SEED + epoch)[k].view(n_ranks(), -1)[rank()]
    windows = ids[starts[:, None] + torch.arange(BLOCK_SIZE + 1)].long().to(DEVICE)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


def norm(x):
    """RMSNorm without weights (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4)."""
    return F.rms_norm(x, (x.size(-1),))


def rope_table(positions):
    """Cosines and sines of RoPE's angles, each (T, D / 2), for `positions` (T,) (Su et al. 2021, section 3.2.2)."""
    D = N_EMBD // N_HEAD
    angles = positions[:, None] * ROPE_BASE ** (-torch.arange(0, D, 2, device=positions.device) / D)
    return angles.cos(), angles.sin()


def apply_rope(x, table):
    """Turn the pairs (x[i], x[i + D / 2]) of `x` (B, H, T, D) by the angles of `table`."""
    cos, sin = table
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).type_as(x)


def alibi_slopes(n_head):
    """Slope of each head, (H,): 2^(-8/H), 2^(-16/H), ..., 2^-8 (Press et al. 2021, section 3).

    If H is no power of two, the slopes of the power of two below it, then every other one of that above it, as in the
    authors' code.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (n_head - power), 2)]
    return torch.tensor(slopes)


def apply_alibi(q, k, v, start):
    """`q`, `k`, `v` (B, H, T, D), widened by 8 dimensions in which q . k / sqrt(D) gains ALiBi's bias.

    The bias of query i and key j is slope * (j - i). Softmax does not change if all scores of a query move alike, so
    slope * j does as well; and that is a product of 1 in the query and slope * j in the key. So ALiBi needs no mask,
    and the fused causal kernel computes it. Three summands carry the bias exactly where numbers have 8 bits.
    """
    B, H, T, D = k.shape
    positions = torch.arange(start, start + T, device=k.device)
    bias = alibi_slopes(H).to(k.device)[:, None] * positions * math.sqrt(D)  # (H, T)
    parts = []
    for _ in range(3):
        parts.append(bias.to(k.dtype))
        bias = bias - parts[-1].float()
    bias = F.pad(torch.stack(parts, -1), (0, 5)).expand(B, H, T, 8)
    ones = F.pad(q.new_ones(B, H, T, 3), (0, 5))
    return torch.cat([q, ones], -1), torch.cat([k, bias], -1), F.pad(v, (0, 8))


class KVCache:
    """Keys and values of the tokens so far, for each layer (B, H, T, D), so that a new token is computed alone."""

    def __init__(self):
        self.length = 0  # tokens that all layers have seen
        self.layers = [None] * N_LAYER

    def extend(self, layer, k, v):
        """Append the keys and values of new tokens; returns those of all tokens."""
        T = self.length + k.size(2)
        if self.layers[layer] is None:  # room for a full window, filled from the left
            room = max(BLOCK_SIZE, T)
            self.layers[layer] = [x.new_zeros(*x.shape[:2], room, x.size(3)) for x in (k, v)]
        for memory, x in zip(self.layers[layer], (k, v)):
            memory[:, :, self.length : T] = x
        return tuple(memory[:, :, :T] for memory in self.layers[layer])


def dropout(x, training):
    """In training, set a share DROPOUT of `x` to zero and scale the rest so that the mean stays (Srivastava et al.
    2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting"). A CPU rounds the share to n / 256.
    """
    if x.device.type != "cpu" or not training or DROPOUT == 0:
        return F.dropout(x, DROPOUT, training)
    # There, a random number for each element costs more than a layer: one of 64 bits serves eight, a byte each.
    random = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,))
    dropped = min(255, round(256 * DROPOUT))
    keep = random.view(torch.uint8)[: x.numel()].view(x.shape).int() >= dropped  # bytes would be compared one by one
    return x * (keep * (256 / (256 - dropped))).to(x.dtype)


def attend(q, k, v, scale):
    """softmax(scale q k') v for queries, keys and values (B, H, T, D): a token sees itself and those before it."""
    T = q.size(2)
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
        self.position, self.layer = position, layer
        self.qkv = nn.Linear(N_EMBD, 3 * N_EMBD, bias=False)
        self.out = nn.Linear(N_EMBD, N_EMBD, bias=False)

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        D, start = C // N_HEAD, cache.length if cache else 0
        q, k, v = self.qkv(x).view(B, T, 3, N_HEAD, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.position == "rope":
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        elif self.position == "alibi":
            q, k, v = apply_alibi(q, k, v, start)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        # A single new token sees all keys; a whole text is masked; a cache is filled by one of the two.
        y = attend(q, k, v, D**-0.5)[..., :D]  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class MLP(nn.Module):
    """For each token by itself: widen, ReLU squared, narrow."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(N_EMBD, 4 * N_EMBD, bias=False)
        self.out = nn.Linear(4 * N_EMBD, N_EMBD, bias=False)

    def forward(self, x):
        return self.out(F.relu(self.inner(x)).square())


class Block(nn.Module):
    """Attention, then a small MLP for each token by itself; RMSNorm before each, residual connection around."""

    def __init__(self, position, layer):
        super().__init__()
        self.attention = Attention(position, layer)
        self.mlp = MLP()

    def forward(self, x, rope, cache):
        x = x + dropout(self.attention(norm(x), rope, cache), self.training)  # (B, T, C)
        return x + dropout(self.mlp(norm(x)), self.training)


class LanguageModel(nn.Module):
    """Token embeddings, N_LAYER blocks that know positions by the scheme `position`, a linear layer to the logits."""

    def __init__(self, vocab_size, position):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise ValueError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}, since the heads share the width")
        if position == "rope" and N_EMBD // N_HEAD % 2:
            raise ValueError(f"N_EMBD / N_HEAD = {N_EMBD // N_HEAD} must be even, since RoPE turns pairs of numbers")
        self.scheme = position
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        if position == "learned":
            self.position = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.ModuleList(Block(position, layer) for layer in range(N_LAYER))
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("out.weight") or name == "head.weight":
                nn.init.zeros_(p)  # at the start every branch is silent and every token equally likely
            else:
                nn.init.normal_(p, std=0.1 if "embedding" in name else N_EMBD**-0.5)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats.

        With a KVCache, `idx` continues the tokens that the cache has seen: a whole text at first, then single tokens.
        """
        start = cache.length if cache else 0
        positions = torch.arange(start, start + idx.size(1), device=idx.device)
        x = norm(self.embedding(idx))  # (B, T, C)
        if self.scheme == "learned":
            x = x + self.position(positions)
        elif self.scheme == "sinusoidal":  # Vaswani et al. 2017, section 3.5, all sines first, then all cosines
            angles = positions[:, None] * ROPE_BASE ** (-torch.arange(0, N_EMBD, 2, device=idx.device) / N_EMBD)
            x = x + torch.cat([angles.sin(), angles.cos()], -1)
        rope = rope_table(positions) if self.scheme == "rope" else None
        x = dropout(x, self.training)
        for block in self.blocks:
            x = block(x, rope, cache)
        if cache:
            cache.length += idx.size(1)
        logits = self.head(norm(x)).float()  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokens, stride=None, length=None):
    """Metrics over a whole split: each token after the first is predicted once. Bits per byte and word perplexity do
    not depend on the vocabulary; the loss per token does.

    Windows of `length`, by default BLOCK_SIZE, start every `stride` tokens; by default they do not overlap. Where they
    do, only the tokens that no earlier window reached are counted, so each has at least length - stride of context.
    The calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) is the mean distance between the
    probability of the likeliest token and how often it is right, in 15 bins of that probability.
    """
    model.eval()
    length = length or BLOCK_SIZE
    stride = min(stride or length, length)
    n, n_bins = len(tokens) - 1, 15
    n_windows = max(0, math.ceil((n - length) / stride)) + 1
    nats, top_1, top_5 = 0.0, 0, 0
    bins = torch.zeros(3, n_bins, dtype=torch.double)  # of each: tokens, sum of probabilities, tokens guessed right
    full = n_windows - 1  # the last window of the split may be shorter
    batches = list(torch.arange(full).split(max(1, BATCH_SIZE * BLOCK_SIZE // length))) if full else []
    for batch in [*batches, torch.tensor([full])][rank() :: n_ranks()]:  # each process takes some of them
        T = min(length, n - stride * int(batch[-1]))
        windows = tokens.ids[stride * batch[:, None] + torch.arange(T + 1)].long().to(DEVICE)
        old = torch.where(batch > 0, length - stride, 0)  # tokens that the window before has predicted
        fresh = (torch.arange(T) >= old[:, None]).to(DEVICE)
        with autocast():
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
    nats, top_1, top_5 = sum_over_ranks(torch.tensor([nats, top_1, top_5], dtype=torch.double)).tolist()
    bins = sum_over_ranks(bins)
    model.train()
    return {
        "val_loss": nats / n,
        "val_bpb": nats / (math.log(2) * tokens.n_bytes),
        "val_word_ppl": math.exp(min(nats / tokens.n_words, 700)),
        "val_top_1": top_1 / n,
        "val_top_5": top_5 / n,
        "val_calibration_error": (bins[1] - bins[2]).abs().sum().item() / n,
    }


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def autocast():
    """Context in which matrix products run in DTYPE."""
    return torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=pick_dtype() == "bfloat16")


@functools.cache
def bfloat16_is_faster(device):
    """Whether products of bfloat16 matrices clearly beat float32 on this device."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(10):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def pick_dtype():
    """Name of the type that matrix products use: DTYPE, or what is faster here."""
    if DTYPE not in ("auto", "float32", "bfloat16"):
        raise ValueError(f'DTYPE={DTYPE} must be "auto", "float32" or "bfloat16"')
    return DTYPE if DTYPE != "auto" else "bfloat16" if bfloat16_is_faster(DEVICE) else "float32"


def compile_model(model, x, y):
    """The compiled model, or the model itself, with a line that says why, where compilation does not work. Several
    processes share its training."""
    if not COMPILE:
        return distribute(model)
    try:
        compiled = distribute(torch.compile(model))
        with autocast():
            compiled(x, y).backward()
        model.zero_grad()
        return compiled
    except Exception as error:  # a missing compiler shows in many ways
        print(f"training without torch.compile: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
        return distribute(model)


def orthogonalize(G):
    """The orthogonal matrix nearest to each matrix of `G` (n, rows, columns), about: all singular values become 1.

    Newton-Schulz iteration with the polynomial 3.4445 x - 4.7750 x^3 + 2.0315 x^5 of the singular values, which takes
    them from anywhere in (0, 1] to between 0.7 and 1.2 within five rounds (Jordan et al. 2024).
    """
    X = G.to(torch.bfloat16 if pick_dtype() == "bfloat16" else torch.float32)
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
        for group in self.param_groups:
            grad = torch.stack([p.grad for p in group["params"]])  # (n, rows, columns)
            state = self.state[group["params"][0]]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(state["momentum"], group["momentum"])  # Nesterov's look ahead
            rows, columns = update.size(1) // group["split"], update.size(2)
            update = orthogonalize(update.reshape(-1, rows, columns)).reshape(update.shape)
            scale = max(1, rows / columns) ** 0.5  # a tall matrix makes longer outputs of the same input
            for p, u in zip(group["params"], update):
                p.sub_(u, alpha=group["lr"] * scale)


def make_optimizers(model):
    """Muon for the matrices of the blocks, AdamW for the embeddings and the head."""
    attention, mlp = [b.attention for b in model.blocks], [b.mlp for b in model.blocks]
    muon = Muon(
        [
            {"params": [a.qkv.weight for a in attention], "split": 3},
            {"params": [a.out.weight for a in attention]},
            {"params": [m.inner.weight for m in mlp]},
            {"params": [m.out.weight for m in mlp]},
        ],
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
    )
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE_ADAMW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for group in muon.param_groups + adamw.param_groups:
        group["highest_lr"] = group["lr"]
    return muon, adamw


def lr_factor(step):
    """Learning rate of a step as a share of the highest: linear warm-up, constant, linear down to zero."""
    return min(1, (step + 1) / max(1, WARMUP_STEPS), (MAX_STEPS - step) / max(1, COOLDOWN * MAX_STEPS))


def train(model, tokens):
    """Train on tokens["train"], keep the weights that are best on tokens["val"] in OUT_DIR/model.pt.

    Returns the log, a list with one dict for each evaluation.
    """
    optimizers = make_optimizers(model)
    log, best, worse, seconds, losses, first_step = [], math.inf, 0, 0.0, [], 0
    if RESUME:
        saved = load_checkpoint()
        check_same_run(saved, tokens["train"])
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        log, best, worse, first_step = saved["log"], saved["best"], saved["worse"], saved["step"]
        seconds, losses = saved["seconds"], saved["losses"].tolist()
    compiled = compile_model(model, *(t[:MICRO_BATCH_SIZE] for t in get_batch(tokens["train"].ids, 0)))
    if not RESUME and rank() == 0:
        for old in Path(OUT_DIR).glob("checkpoint*.pt"):  # of a run before this one
            old.unlink()
    eval_interval = max(1, min(EVAL_INTERVAL, len(tokens["train"]) // (BATCH_SIZE * BLOCK_SIZE)))

    def checkpoint(step):
        save_checkpoint({
            "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step, "log": log,
            "best": best, "worse": worse, "seconds": seconds, "losses": torch.tensor(losses),
            "dataset": tokens["train"].dataset, "fingerprint": tokens["train"].fingerprint,
            "hyperparameters": constants(),
        })  # fmt: skip

    bar = tqdm(total=MAX_STEPS, initial=first_step, desc="training", unit="step", disable=True if rank() else None)
    stop, start = False, time.perf_counter()
    for step in range(first_step, MAX_STEPS + 1):
        if (step % eval_interval == 0 or step == MAX_STEPS) and not (log and log[-1]["step"] == step):
            train_loss = torch.tensor(losses).mean().item() if losses else None
            seconds += time.perf_counter() - start  # the clock stands still while evaluating
            metrics = evaluate(model, tokens["val"])
            seen = step * BATCH_SIZE * BLOCK_SIZE
            log.append({"step": step, "tokens_seen": seen, "seconds": seconds, "train_loss": train_loss, **metrics})
            bar.write(f"step {step:5}  {seconds:5.0f} s  training loss {f'{train_loss:.4f}' if losses else '-':>6}  "
                      f"val loss {metrics['val_loss']:.4f}  val bpb {metrics['val_bpb']:.4f}")
            if metrics["val_loss"] < best:
                best, worse = metrics["val_loss"], 0
                save("model.pt", {"model": model.state_dict(), "hyperparameters": constants(),
                                  "fingerprint": tokens["train"].fingerprint})  # fmt: skip
            else:
                worse += 1
            losses = []
            write_whole("log.jsonl", lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in log)))
            checkpoint(step)
            return_freed_memory()
            start = time.perf_counter()
        if stop or stop_signals and n_ranks() == 1:  # several processes agree on it in a step
            seconds += time.perf_counter() - start
            if not (log and log[-1]["step"] == step):  # else it has just been saved
                checkpoint(step)
            bar.close()
            if rank() == 0:
                print(f"{RUNG}.py: stopped after {step} steps; RESUME=True, beside the same constants, goes on from "
                      "there", file=sys.stderr)  # fmt: skip
            sys.exit(128 + (stop_signals or [signal.SIGTERM])[0])
        if step == MAX_STEPS or worse >= PATIENCE:
            break

        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest_lr"] * lr_factor(step)
        x, y = get_batch(tokens["train"].ids, step)
        torch.manual_seed(hash((SEED, step, rank())))  # so a run that goes on draws what it would have drawn
        loss, left = 0.0, len(x)
        for micro_x, micro_y in zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE)):
            left -= len(micro_x)
            # Processes exchange their gradients once a step, in the last backward pass.
            with compiled.no_sync() if left and n_ranks() > 1 else contextlib.nullcontext():
                with autocast():
                    part = compiled(micro_x, micro_y) * (len(micro_x) / len(x))
                part.backward()
            loss += part.detach()
        loss, stop = sum_over_ranks(torch.tensor([loss.item(), len(stop_signals)], dtype=torch.double)).tolist()
        loss /= n_ranks()
        if not math.isfinite(loss):
            raise ValueError(not_finite(model, step, loss, log, optimizers[0].param_groups[0]["lr"]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        losses.append(loss)
        bar.update()
        if step % 10 == 0:
            rate = (step + 1) * BATCH_SIZE * BLOCK_SIZE / (seconds + time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
    bar.close()
    if worse >= PATIENCE:
        print(f"stopped early: no better validation loss in {PATIENCE} evaluations")
    wait_for_all()  # the first process has written the best weights
    return log


def not_finite(model, step, loss, log, rate):
    """What to say of a loss that is not finite."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    kept = f"the checkpoint of step {log[-1]['step']} is kept; " if log else ""
    return (f"the loss is {loss} at step {step} (learning rate {rate:.3g}, norm of the gradient {norm:.3g}); {kept}"
            "lower the learning rate, raise WARMUP_STEPS, or set DTYPE=float32")


def keep_freed_memory():
    """Let the C library keep freed memory for the next step: fresh pages cost more than computing on them (glibc,
    mallopt(3)). The opposite of v1_1, which trades speed for memory."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for large arrays, which would be returned at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, TypeError, AttributeError):  # another C library: it goes without
        pass


def return_freed_memory():
    """Give what is free now back to the system (glibc, malloc_trim(3)): between two evaluations memory is kept, but the
    gaps that evaluations and checkpoints leave would add up in a long run."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):  # another C library: it goes without
        pass


def save(name, content):
    """Save `content` with torch as OUT_DIR/`name`, whole or not at all, and on the disk when this returns."""

    def write(path):
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())

    write_whole(name, write)


def save_checkpoint(content):
    """Save `content` as checkpoint.pt; the one that was there is kept as checkpoint_before.pt."""
    if rank():
        return
    newest = Path(OUT_DIR) / "checkpoint.pt"
    save("checkpoint_new.pt", content)
    if newest.exists():
        newest.replace(newest.with_name("checkpoint_before.pt"))
    newest.with_name("checkpoint_new.pt").replace(newest)


def load_checkpoint():
    """The last checkpoint, or, with a line that says so, the one before it if that is missing or damaged."""
    keys = ("model", "optimizers", "step", "log", "best", "worse", "seconds", "losses", "dataset", "fingerprint",
            "hyperparameters")  # fmt: skip
    try:
        return load_saved("checkpoint.pt", keys)
    except (OSError, ValueError) as error:
        if not (Path(OUT_DIR) / "checkpoint_before.pt").exists():
            raise
        print(f"{error}; going on from the checkpoint before it")
        return load_saved("checkpoint_before.pt", keys)


stop_signals = []  # Ctrl-C and SIGTERM, once received


@contextlib.contextmanager
def stop_between_steps():
    """Within, Ctrl-C and SIGTERM are put into `stop_signals`, so that the step can be finished; a second one ends the
    program at once."""

    def receive(number, frame):
        if stop_signals:
            raise KeyboardInterrupt
        stop_signals.append(number)

    stop_signals.clear()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    usual = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if n_ranks() == 1:  # else torchrun may be about to stop this process, which has to say first what happened
            for number, handler in usual.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def only_run_in_folder():
    """Within, no other process can train in OUT_DIR. Raises ValueError if one does. The lock ends with its process."""
    path = Path(OUT_DIR) / "lock"
    if fcntl is None or rank():
        yield
        return
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"process {path.read_text().strip()} is training in {OUT_DIR}; wait for it, stop it, or "
                             "choose another OUT_DIR") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def load_saved(name, keys=("model", "hyperparameters", "fingerprint")):
    """Read what `save` wrote. Raises FileNotFoundError if it is not there, ValueError if it is damaged or without one
    of `keys`."""
    path = Path(OUT_DIR) / name
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: train first with python {RUNG}.py")
    try:
        saved = torch.load(path, map_location=DEVICE, weights_only=True)
        saved = {key: saved[key] for key in keys}
    except Exception:  # torch and pickle raise many kinds for a damaged file
        raise ValueError(f"{path} is damaged or no file of this program; delete it and train again") from None
    return saved


def check_same_run(saved, tokens):
    """Raises ValueError if the text, the tokenizer, or constants that decide the losses, differ from those of the
    checkpoint."""
    may_change = ("EVAL_INTERVAL", "PATIENCE", "MAX_STEPS", "SAMPLE_TOKENS", "TEMPERATURE", "STRIDE", "DEVICE",
                  "COMPILE", "OUT_DIR", "RESUME", "PROMPT", "POSITION")
    before, now = saved["hyperparameters"], constants()
    differ = [f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in sorted({*before, *now} - {*may_change})
              if before.get(k) != now.get(k)]
    if saved["dataset"] != tokens.dataset:
        differ.append(f"the text was {saved['dataset']} and is {tokens.dataset}")
    if saved["fingerprint"] != tokens.fingerprint:
        differ.append(f"the tokenizer was {saved['fingerprint']} and is {tokens.fingerprint}")
    if differ:
        raise ValueError(f"to resume the run in {OUT_DIR}, set back what differs: {'; '.join(differ)}")


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, ids, n_tokens):
    """Continue `ids`, a list of tokens, by `n_tokens` drawn at TEMPERATURE. Returns the whole list."""
    model.eval()
    ids, cache, new = list(ids), None, None
    for _ in range(n_tokens):
        if cache is None or cache.length == BLOCK_SIZE:  # read the text, or its last half window, anew
            cache, new = KVCache(), ids[-BLOCK_SIZE if cache is None else -max(1, BLOCK_SIZE // 2) :]
        logits = model(torch.tensor([new], device=DEVICE), cache=cache)[:, -1] / TEMPERATURE  # (1, V)
        new = torch.multinomial(logits.softmax(-1), 1)[0].tolist()
        ids += new
    return ids


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
    lengths = [BLOCK_SIZE * times for times in EXTRAPOLATION]
    return {n: evaluate(model, tokens, length=n)["val_bpb"] if model.scheme != "learned" or n == BLOCK_SIZE else None
            for n in lengths}  # fmt: skip


def nearest_neighbours(model, tokenizer, n=6):
    """For each token of NEIGHBOURS_OF the `n` tokens whose embeddings have the largest cosine with its own."""
    vectors = F.normalize(model.embedding.weight.detach().float(), dim=1)
    found = {}
    for word in NEIGHBOURS_OF:
        ids = tokenizer.encode(word)
        if len(ids) == 1:
            cosines = vectors @ vectors[ids[0]]
            found[word] = [tokenizer.decode([i]) for i in cosines.topk(n + 1).indices.tolist()[1:]]
    return found


def plot_embeddings(model, tokenizer, path):
    """Draw the embeddings of WORDS in the plane of their two first principal components."""
    import matplotlib.pyplot as plt

    kinds = {kind: [w for w in words.split() if len(tokenizer.encode(" " + w)) == 1] for kind, words in WORDS.items()}
    ids = [tokenizer.encode(" " + word)[0] for words in kinds.values() for word in words]
    vectors = F.normalize(model.embedding.weight.detach().float().cpu()[ids], dim=1)
    vectors = vectors - vectors.mean(0)
    flat = vectors @ torch.linalg.svd(vectors, full_matrices=False).Vh[:2].T  # (n, 2)
    figure, axes = plt.subplots(figsize=(10, 8), layout="constrained")
    colors = [f"C{k}" for k, words in enumerate(kinds.values()) for _ in words]
    axes.scatter(*flat.T, s=8, color=colors)
    for k, kind in enumerate(kinds):
        axes.plot([], [], "o", color=f"C{k}", label=kind)
    axes.set(title=f"{RUNG}, {model.scheme}: token embeddings", xlabel="1st principal component", ylabel="2nd")
    axes.legend()
    figure.canvas.draw()  # only now it is known where things stand
    placed = []
    words = [word for words in kinds.values() for word in words]
    for word, color, (x, y) in sorted(zip(words, colors, flat.tolist()), key=lambda label: label[2][1]):
        for rise in range(3, 303, 3):  # points above its dot, as many as keep it clear of the labels before
            text = axes.annotate(word, (x, y), (0, rise), textcoords="offset points", color=color, ha="center")
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in placed):
                break
            text.remove()
        placed.append(box)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def plot_schemes(curves, path, xlabel, title):
    """Draw validation bits per byte; `curves` has for each scheme a list of (x, bits per byte)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for scheme, points in curves.items():
        axes.plot(*zip(*points), "o-", label=scheme)
    if title == "length extrapolation":
        axes.axvline(BLOCK_SIZE, color="grey", linestyle=":", label="training length")
        axes.set_xscale("log", base=2)
    axes.set(xlabel=xlabel, ylabel="validation bits per byte", title=f"{RUNG}: {title}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------


def constants():
    """The hyperparameters: every UPPER_CASE number, string or None of this file."""
    return {k: v for k, v in globals().items()
            if k.isupper() and k != "RUNG" and (v is None or type(v) in (bool, int, float, str))}  # fmt: skip


def set_constants(arguments):
    """Set constants from NAME=value arguments. Raises ValueError for an unknown name or a value of another type."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in constants():
            raise ValueError(f"there is no constant {name!r}; known are {', '.join(constants())}")
        kind = type(globals()[name])
        try:
            new = value if kind in (str, type(None)) else ast.literal_eval(value)
            if kind is float and type(new) is int:
                new = float(new)
            if type(new) is not kind and kind is not type(None):
                raise ValueError
        except (ValueError, SyntaxError, TypeError):
            raise ValueError(f"{name}={value}: {name} must be of type {kind.__name__}") from None
        globals()[name] = new


def check_constants():
    """Raises ValueError if a constant has an impossible value, or DEVICE cannot be used here."""
    for name, value in constants().items():
        if type(value) is int and value < 1 and name != "SEED":
            raise ValueError(f"{name}={value} must be 1 or more")
        if type(value) is int and abs(value) >= 2**31:
            raise ValueError(f"{name}={value} must be less than 2**31")
        if type(value) is float and not 0 <= value <= 1e38:
            raise ValueError(f"{name}={value} must not be negative or above 1e38")
    if DROPOUT >= 1:
        raise ValueError(f"DROPOUT={DROPOUT} must be less than 1")
    if MOMENTUM >= 1:
        raise ValueError(f"MOMENTUM={MOMENTUM} must be less than 1")
    if TEMPERATURE < 1e-4:
        raise ValueError(f"TEMPERATURE={TEMPERATURE} must be 0.0001 or more; at 0.01 the likeliest token is certain")
    if ROPE_BASE <= 1:
        raise ValueError(f"ROPE_BASE={ROPE_BASE} must be more than 1")
    try:
        torch.zeros(1, device=DEVICE).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"DEVICE={DEVICE} cannot be used here: {str(error).splitlines()[0]}") from None


def peak_memory_mb():
    """Peak resident memory of this process, or the accelerator's peak allocation, in MB."""
    if DEVICE.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def write_whole(name, write):
    """Make OUT_DIR/`name` by `write(path)`, whole or not at all. Of several processes the first one does it."""
    if rank():
        return
    path = Path(OUT_DIR) / name
    beside = path.with_name("writing-" + name)
    try:
        write(beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch answers a full disk with errors of its own
        why = getattr(error.__context__ or error, "strerror", None) or f"disk full? {str(error).splitlines()[0]}"
        raise OSError(f"cannot write {path}: {why}; make room, or choose another OUT_DIR") from None
    finally:
        if beside.exists():
            beside.unlink()


def plot_loss(log, path):
    """Draw training and validation loss over the tokens seen."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    seen = [line["tokens_seen"] / 1e6 for line in log]
    axes.plot(seen[1:], [line["train_loss"] for line in log[1:]], "o-", label="training (mean since the last point)")
    axes.plot(seen, [line["val_loss"] for line in log], "s-", label="validation")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title=RUNG)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def continue_prompt(model, tokenizer):
    """Print PROMPT and its continuation by the trained model. Returns the text."""
    saved = load_saved("model.pt")
    then, now = saved["hyperparameters"], constants()
    names = ("VOCABULARY", "BLOCK_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "ROPE_BASE")
    if differ := [f"{k}={then.get(k)}" for k in names if then.get(k) != now[k]]:
        raise ValueError(f"the model in {OUT_DIR} has another shape; add {' '.join(differ)}")
    if saved["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"the model in {OUT_DIR} was trained with another {VOCABULARY}; take that one, or train again")
    model.load_state_dict(saved["model"])
    torch.manual_seed(SEED)
    text = tokenizer.decode(generate(model, tokenizer.encode(PROMPT or "\n"), SAMPLE_TOKENS))
    print(text)
    return text


def in_one_line(error):
    """What to say of an error that the user can mend. Any other one, a mistake of the program, is raised again."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and re.search("memory|size calculation", text):
        return f"out of memory; lower MICRO_BATCH_SIZE, BLOCK_SIZE, N_EMBD or N_LAYER ({text})"
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in text:
        return f"another process has ended; RESUME=True goes on from the last checkpoint ({text})"
    if isinstance(error, RuntimeError):
        raise error
    return text


def run(position):
    """Train, evaluate and sample; write the results to OUT_DIR. Returns the summary, a dict."""
    import_mb = peak_memory_mb()
    torch.manual_seed(SEED)
    Path(OUT_DIR).mkdir(parents=True, exist_ok=True)
    tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY))
    tokens = read_tokens(VOCABULARY)
    model = LanguageModel(tokenizer.vocab_size, position).to(DEVICE)
    if PROMPT is not None:
        return continue_prompt(model, tokenizer)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{RUNG}, {position}, on {tokens['train'].dataset}: {n_params:,} parameters, "
          f"{len(tokens['train']):,} training tokens, {DEVICE}")

    with only_run_in_folder(), stop_between_steps():
        log = train(model, tokens)
    peak_mb = peak_memory_mb()
    model.load_state_dict(load_saved("model.pt")["model"])
    best = min(log, key=lambda line: line["val_loss"])
    sliding, test = evaluate(model, tokens["val"], STRIDE), evaluate(model, tokens["test"])
    for name, metrics in [(f"windows of {BLOCK_SIZE} tokens", {k: best[k] for k in sliding}),
                          (f"a window every {min(STRIDE, BLOCK_SIZE)} tokens", sliding)]:  # fmt: skip
        print(f"validation, {name}: " + ", ".join(f"{k[4:]} {v:.4f}" for k, v in metrics.items()))

    lengths = extrapolate(model, tokens["val"])
    neighbours = nearest_neighbours(model, tokenizer)
    print("nearest neighbours of tokens:")
    for word, found in neighbours.items():
        print(f"  {word!r:10} {' '.join(map(repr, found))}")

    torch.manual_seed(SEED)
    sample = tokenizer.decode(generate(model, tokenizer.encode(" \n ="), SAMPLE_TOKENS))
    print(f"--- sample ---\n{sample}\n--------------")
    summary = {
        "rung": RUNG,
        "dataset": tokens["train"].dataset,
        "tokenizer": VOCABULARY,
        "seed": SEED,
        "device": DEVICE,
        "processes": n_ranks(),
        "dtype": pick_dtype(),
        "n_params": n_params,
        "steps": log[-1]["step"],
        "tokens_seen": log[-1]["tokens_seen"],
        "bytes_seen": round(log[-1]["tokens_seen"] * tokens["train"].n_bytes / len(tokens["train"])),
        "train_seconds": log[-1]["seconds"],
        "tokens_per_second": log[-1]["tokens_seen"] / log[-1]["seconds"],
        "import_memory_mb": import_mb,
        "peak_memory_mb": peak_mb,
        "val_loss": best["val_loss"],
        "val_bpb": best["val_bpb"],
        "val_word_ppl": best["val_word_ppl"],
        "val_top_1": best["val_top_1"],
        "val_top_5": best["val_top_5"],
        "val_calibration_error": best["val_calibration_error"],
        **{f"{k}_sliding": v for k, v in sliding.items()},
        **{k.replace("val_", "test_"): v for k, v in test.items()},
        "best_step": best["step"],
        "position": position,
        "extrapolation_bpb": lengths,
        "nearest_neighbours": neighbours,
        "hyperparameters": constants(),
    }
    write_whole("sample.txt", lambda path: path.write_text(sample, encoding="utf-8"))
    write_whole("loss.png", lambda path: plot_loss(log, path))
    write_whole("embeddings.png", lambda path: plot_embeddings(model, tokenizer, path))
    write_whole("summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    print(f"{RUNG}, {position}, on {summary['dataset']}: val bpb {summary['val_bpb']:.4f}, word perplexity "
          f"{summary['val_word_ppl']:,.1f}, {n_params:,} parameters, {summary['train_seconds']:.0f} s, peak memory "
          f"{summary['peak_memory_mb']:,.0f} MB")
    return summary


def compare(schemes):
    """Print bits per byte of each scheme by the length of the window; write logs, samples and curves side by side."""
    print(f"\nvalidation bits per byte by length of the window (trained on {BLOCK_SIZE})")
    print("tokens".ljust(12) + "".join(f"{BLOCK_SIZE * times:9}" for times in EXTRAPOLATION))
    lines, samples, losses, lengths = [], "", {}, {}
    for scheme, summary in schemes.items():
        by_length = summary["extrapolation_bpb"]
        cells = ("-" if bpb is None else f"{bpb:.4f}" for bpb in by_length.values())
        print(scheme.ljust(12) + "".join(f"{cell:>9}" for cell in cells))
        log = [json.loads(line) for line in (Path(OUT_DIR) / scheme / "log.jsonl").read_text().splitlines()]
        lines += [{"position": scheme, **line} for line in log]
        losses[scheme] = [(line["tokens_seen"] / 1e6, line["val_bpb"]) for line in log]
        lengths[scheme] = [(n, bpb) for n, bpb in by_length.items() if bpb is not None]
        samples += f"--- {scheme} ---\n{(Path(OUT_DIR) / scheme / 'sample.txt').read_text(encoding='utf-8')}\n"
    write_whole("log.jsonl", lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in lines)))
    write_whole("sample.txt", lambda path: path.write_text(samples, encoding="utf-8"))
    write_whole("loss.png", lambda path: plot_schemes(losses, path, "tokens seen (millions)", "training"))
    write_whole(
        "extrapolation.png", lambda path: plot_schemes(lengths, path, "tokens in a window", "length extrapolation")
    )


def main():
    """Train every scheme of POSITION in OUT_DIR/<scheme>/ and compare them. Returns the summary of the best of them,
    with those of all under "schemes"; with PROMPT the text."""
    global OUT_DIR, RESUME
    check_constants()
    keep_freed_memory()
    positions, top, resume = POSITION.split(","), OUT_DIR, RESUME
    for position in positions:
        if position not in SCHEMES:
            raise ValueError(f"POSITION={POSITION}: there is no scheme {position!r}; known are {', '.join(SCHEMES)}")
    schemes = {}
    try:
        for position in positions:
            OUT_DIR = f"{top}/{position}"
            RESUME = resume and (position == positions[0] or any(Path(OUT_DIR).glob("checkpoint*.pt")))
            schemes[position] = run(position)
            if PROMPT is not None:
                return schemes[position]
    finally:
        OUT_DIR, RESUME = top, resume

    best = min(schemes.values(), key=lambda summary: summary["val_bpb"])
    summary = {**best, "hyperparameters": constants(), "schemes": schemes}
    if rank() == 0:
        compare(schemes)
    write_whole("summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    return summary


if __name__ == "__main__":
    try:
        set_constants(sys.argv[1:])
        with processes():
            main()
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        message = in_one_line(error)
        if isinstance(error, ValueError) and int(os.environ.get("RANK", 0)):
            time.sleep(10)  # the first process says the same, and torchrun then ends the others
        sys.exit(f"{RUNG}.py: {message}")
    except KeyboardInterrupt:
        print(f"{RUNG}.py: stopped; RESUME=True goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
