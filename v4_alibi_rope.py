"""v4: positions. How a transformer knows the order of its tokens: ALiBi against RoPE.

Both are trained under equal conditions and evaluated in windows of 1 to 16 times the length that they were trained on.

- RoPE (Su et al. 2021, arXiv:2104.09864) turns queries and keys by angles that grow with the position, so that
  their product depends on the distance alone.
- ALiBi (Press et al. 2021, arXiv:2108.12409) subtracts from each score the distance times a slope of the head.

What is new against v3_1:

- positions: "alibi" and "rope", and for comparison "sinusoidal" and "none", in place of learned ones;
- the table of length extrapolation, of all schemes that were trained with the same constants;
- a key-value cache: a new token is computed alone, and not with all those before it.

    python v4_alibi_rope.py                     train ALiBi, then RoPE, and compare: results in runs/v4_alibi_rope/
    python v4_alibi_rope.py POSITION=rope       train one scheme, or several with commas between them
    python v4_alibi_rope.py RESUME=True         continue from the last checkpoints
    python v4_alibi_rope.py PROMPT=" The cat"   continue a text with the trained model of the first scheme
    torchrun --standalone --nproc_per_node=2 v4_alibi_rope.py    train on two devices
"""

import functools
import json
import math
from pathlib import Path

import harness  # first: it answers --help without torch, which takes seconds to load

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from bpe_tokenizer import BPETokenizer
from data import load_tokens, vocabulary_file

# ----------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------

DATA = "data"  # dataset folder: the tokens and vocabularies of the text
VOCABULARY = "bpe_vocab.json"  # file in DATA that holds the tokenizer
BATCH_SIZE = 16  # windows per step
MICRO_BATCH_SIZE = 16  # windows per forward and backward pass
BLOCK_SIZE = 256  # tokens in a window: the context that attention reaches
MAX_STEPS = 1280  # 1.72 passes over the training split of WikiText-2
EVAL_INTERVAL = 160  # steps between evaluations and checkpoints; at least one per epoch
PATIENCE = 3  # stop early after this many evaluations without improvement
LEARNING_RATE = 0.03  # of Muon, for the matrices of the blocks: peak; it ends at zero
LEARNING_RATE_ADAMW = 0.01  # of AdamW, for the embeddings and the last layer
WARMUP_STEPS = 50  # steps in which the learning rate rises to its peak
COOLDOWN = 0.5  # fraction of the steps, at the end, in which the learning rate falls
MOMENTUM = 0.85  # of Muon
N_LAYER = 4  # blocks
N_HEAD = 4  # attention heads of a block
N_EMBD = 256  # width: size of the vector that represents a token
POSITION = "alibi,rope"  # position schemes, trained one after the other: alibi, rope, sinusoidal, none
ROPE_BASE = 10000.0  # RoPE's wavelengths go from 2 pi to 2 pi ROPE_BASE tokens
DROPOUT = 0.0  # fraction of activations set to zero in training, against overfitting
STRIDE = 128  # tokens from one window to the next in the last evaluation, where windows overlap
EXTRAPOLATION = (1, 2, 4, 8, 16)  # multiples of BLOCK_SIZE at which the schemes are compared
SAMPLE_TOKENS = 200  # length of the sample, or of the continuation of PROMPT
TEMPERATURE = 0.8  # of sampling: below 1 favors likely tokens; 0 takes the likeliest
TOP_K = 0  # sample from this many of the likeliest tokens; 0: from all of them
TOP_P = 1.0  # nucleus sampling: from the fewest likely tokens whose probabilities sum to this
STOP_AT_END = True  # a sample ends where the model ends the text, at <|endoftext|>
SAMPLES = 1  # how many continuations of PROMPT to write
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DTYPE = "auto"  # of matrix products: "float32", "bfloat16", or the faster of them
COMPILE = True  # use torch.compile, if it works here
SHARD = False  # divide model and optimizer among the processes, for models larger than one device (FSDP)
OUT_DIR = "runs/v4_alibi_rope"  # where the results go, in a folder for each scheme
RESUME = False  # continue from the last checkpoint in OUT_DIR, if there is one
INIT_FROM = None  # fine-tuning: folder of the run whose weights to start from
PROMPT = None  # continue this text with the trained model, instead of training; "-": the text of standard input
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 512, N_LAYER = 12, N_HEAD = 12, N_EMBD = 768,
# DROPOUT = 0.1, MAX_STEPS = 20_000, EVAL_INTERVAL = 2000, MOMENTUM = 0.95, LEARNING_RATE = 0.02, and WikiText-103
# (python data/prepare.py --dataset wikitext-103-v1).


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def window_starts(n_tokens, batch_size, block_size, seed, epoch):
    """Start indices of the windows of an epoch, (batches, B): the text cut from a random offset, then shuffled."""
    n_batches = (n_tokens - block_size) // (batch_size * block_size)
    if n_batches < 1:
        raise harness.too_few_tokens(n_tokens, batch_size, block_size)
    random = np.random.default_rng((seed, epoch))  # independent of every other seed and epoch
    starts = random.integers(block_size) + block_size * random.permutation(n_batches * batch_size)
    return torch.from_numpy(starts).view(n_batches, batch_size)


def get_batch(ids, step):
    """Batch number `step`: inputs (B, T) and targets (B, T), one token later. Each window comes once per epoch."""
    n_batches = (len(ids) - BLOCK_SIZE) // (BATCH_SIZE * BLOCK_SIZE)
    epoch, k = divmod(step, max(n_batches, 1))
    starts = window_starts(len(ids), BATCH_SIZE, BLOCK_SIZE, SEED, epoch)[k]
    starts = starts.view(harness.world_size(), -1)[harness.rank()]  # each of several processes takes its part
    windows = harness.to_device(ids[starts[:, None] + torch.arange(BLOCK_SIZE + 1)].long(), DEVICE)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


def norm(x):
    """RMSNorm without weights (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4)."""
    return F.rms_norm(x, (x.size(-1),))


SCHEMES = ("alibi", "rope", "sinusoidal", "none")


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

    If H is not a power of two: the slopes for the power of two below it, then every other one for that above, as in the
    authors' code.
    """
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (n_head - power), 2)]


def alibi_bias(n_head, T, K):
    """ALiBi: slope * (j - i) is added to the score of query i and key j, (H, T, K). The T queries are the last of the K
    tokens."""
    distance = torch.arange(K) - torch.arange(K - T, K)[:, None]  # (T, K)
    return torch.tensor(alibi_slopes(n_head))[:, None, None] * distance


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


class Attention(nn.Module):
    """Causal self-attention with N_HEAD heads (Vaswani et al. 2017, equation 1 and section 3.2.2)."""

    def __init__(self, layer):
        super().__init__()
        self.n_head, self.position, self.layer = N_HEAD, POSITION, layer
        self.qkv = nn.Linear(N_EMBD, 3 * N_EMBD, bias=False)
        self.proj = nn.Linear(N_EMBD, N_EMBD, bias=False)
        if POSITION == "alibi":
            self.alibi_attention = kernels.ALiBiAttention(alibi_slopes(N_HEAD), BLOCK_SIZE, DEVICE)

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (B, H, T, D)
        if self.position == "rope":
            q, k = apply_rope(qkv[:2], rope)
        if cache:
            k, v = cache.extend(self.layer, k, v)  # (B, H, K, D): those of all tokens so far
        if self.position == "alibi":
            y = self.alibi_attention(q, k, v)  # softmax(q k' / sqrt(D) + alibi_bias(H, T, K)) v
        else:
            y = kernels.attention(q, k, v)  # F.scaled_dot_product_attention(q, k, v, is_causal=True): (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # concatenate the heads


class MLP(nn.Module):
    """For each token separately: widen, ReLU squared, narrow."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(N_EMBD, 4 * N_EMBD, bias=False)
        self.proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=False)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    """Attention, then a small MLP for each token separately; RMSNorm before each, residual connection around."""

    def __init__(self, layer):
        super().__init__()
        self.attention = Attention(layer)
        self.mlp = MLP()
        self.dropout = kernels.Dropout(DROPOUT)  # nn.Dropout(DROPOUT)

    def forward(self, x, rope, cache):
        x = x + self.dropout(self.attention(norm(x), rope, cache))  # (B, T, C)
        return x + self.dropout(self.mlp(norm(x)))


class LanguageModel(nn.Module):
    """Token embeddings, N_LAYER blocks with positions by the scheme POSITION, and a linear layer to the logits."""

    def __init__(self, vocab_size):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise harness.UserError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}: the heads share the width")
        if POSITION not in SCHEMES:
            raise harness.UserError(f"POSITION={POSITION}: a model has one scheme, one of {', '.join(SCHEMES)}")
        if POSITION == "rope" and N_EMBD // N_HEAD % 2:
            raise harness.UserError(f"N_EMBD / N_HEAD = {N_EMBD // N_HEAD} must be even: RoPE turns pairs of numbers")
        if POSITION == "sinusoidal" and N_EMBD % 2:
            raise harness.UserError(f"N_EMBD={N_EMBD} must be even, since half of the numbers of a position are sines")
        self.block_size = BLOCK_SIZE
        self.position, self.head_size, self.rope_base = POSITION, N_EMBD // N_HEAD, ROPE_BASE
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        self.dropout = kernels.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block(layer) for layer in range(N_LAYER))
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("proj.weight") or name == "head.weight":
                nn.init.zeros_(p)  # at the start every branch adds nothing, and every token is equally likely
            else:
                nn.init.normal_(p, std=0.1 if name == "embedding.weight" else N_EMBD**-0.5)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats. With a
        KVCache, `idx` continues the tokens that the cache has seen."""
        harness.check_ids(self, idx, targets)
        start = cache.length if cache else 0
        positions = torch.arange(start, start + idx.size(1), device=idx.device)
        x, rope = norm(self.embedding(idx)), None  # (B, T, C)
        if self.position == "sinusoidal":  # Vaswani et al. 2017, section 3.5, all sines first, then all cosines
            x = x + torch.cat(rope_table(positions, x.size(-1), self.rope_base)[::-1], -1)
        elif self.position == "rope":
            rope = rope_table(positions, self.head_size, self.rope_base)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rope, cache)
        if cache:
            cache.length += idx.size(1)
        logits = kernels.linear(norm(x), self.head.weight).float()  # self.head(norm(x)): (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(model, tokens, size, stride):
    """Predict each token of a split after the first, in windows of `size` tokens that start every `stride` tokens.

    Yields for batches of N tokens: the loss of each in nats (N,), the probability of the likeliest token there (N,),
    and whether the five likeliest are right (N, 5). Where windows overlap, a token counts in the first window that
    predicts it. All but those of the first window then have at least size - stride tokens before them.
    """
    n = len(tokens) - 1
    starts = torch.arange(0, max(0, n - size) + stride, stride)  # the last window may be shorter: a batch of its own
    at_once = max(1, MICRO_BATCH_SIZE * model.block_size // size)
    batches = [batch for batch in (*starts[:-1].split(at_once), starts[-1:]) if len(batch)]
    for batch, counts in harness.share_batches(batches):  # each process has its own
        T = min(size, n - int(batch[-1]))
        windows = tokens.ids[batch[:, None] + torch.arange(T + 1)].long().to(DEVICE)  # (b, T + 1)
        with harness.autocast(DEVICE, DTYPE):
            logits = model(windows[:, :-1])  # (b, T, V)
        target = windows[:, 1:, None]  # (b, T, 1)
        log_total = logits.logsumexp(-1)  # (b, T)
        likeliest, ids = logits.topk(5)  # (b, T, 5)
        loss, confidence = log_total - logits.gather(-1, target).squeeze(-1), (likeliest[..., 0] - log_total).exp()
        new = counts & (torch.arange(T) >= torch.where(batch > 0, size - stride, 0)[:, None])  # (b, T): not seen before
        yield [x[new.to(DEVICE)].cpu() for x in (loss, confidence, ids == target)]


def evaluate(model, tokens, stride=None, size=None):
    """Metrics over a whole split: each token after the first is predicted once. Bits per byte and word perplexity do
    not depend on the vocabulary; the loss per token does. Windows have `size` tokens, by default the model's, and start
    every `stride` tokens; by default they do not overlap.

    The calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) is the mean distance between confidence, the
    probability of the likeliest token, and accuracy, how often that token is right, in 15 bins of confidence.
    """
    harness.check_tokens(model, tokens)
    model.eval()
    size = size or model.block_size
    n, nats, top_5 = len(tokens) - 1, 0.0, 0
    bins = torch.zeros(3, 15, dtype=torch.double)  # of each: tokens, sum of their confidence, how many were right
    for loss, confidence, right in predictions(model, tokens, size, min(stride or size, size)):
        nats += loss.double().sum().item()
        top_5 += right.sum().item()
        rows = torch.ones_like(confidence), confidence, right[:, 0]
        place = (15 * confidence.double()).long().clamp(0, 14)
        bins += torch.stack([torch.bincount(place, row.double(), minlength=15) for row in rows])
    nats, top_5 = harness.all_reduce(torch.tensor([nats, top_5], dtype=torch.double)).tolist()
    bins = harness.all_reduce(bins)
    model.train()
    return {
        "loss": nats / n,
        "bpb": nats / (math.log(2) * tokens.n_bytes),
        "word_ppl": math.exp(min(nats / tokens.n_words, 700)) if tokens.n_words else None,
        "top_1": bins[2].sum().item() / n,
        "top_5": top_5 / n,
        "calibration_error": (bins[1] - bins[2]).abs().sum().item() / n,
    }


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def orthogonalize(G, dtype=torch.float32):
    """About the nearest orthogonal matrix to each matrix of `G` (n, rows, columns), by five rounds of Newton-Schulz.

    A matrix with singular values s has odd matrix polynomials, here 3.4445 X - 4.7750 X X' X + 2.0315 X X' X X' X, that
    keep its singular vectors and map each s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5 (Jordan et al. 2024). G is scaled to
    a Frobenius norm of 1 first, so that 0 <= s <= 1. Five rounds take every s above 0.0015 to between 0.68 and 1.2, and
    smaller ones up by a factor of up to 485 = 3.4445^5: 1e-3 to 0.47, 1e-4 to 0.05. `dtype`: of the products.
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
    """MomentUm, Orthogonalized by Newton-schulz (Jordan et al. 2024): gradient descent in which the step of a matrix is
    its momentum with all singular values set to about 1.

    The gradient of a matrix is a sum of outer products, and a few directions that most tokens share make up most of
    it: a step along it hardly moves the others, which may matter as much. Orthogonalized, the step moves every
    direction equally far. It is the steepest descent among steps of one spectral norm, the most by which a step can
    change a layer's output for an input of length 1.

    Matrices of one shape are orthogonalized together. Where a weight holds several matrices, one below the other, as
    that of queries, keys and values does, its group's `split` says how many: each is orthogonalized separately.
    """

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum, "split": 1})

    @torch.no_grad()
    def step(self):
        dtype = getattr(torch, harness.resolve_dtype(DEVICE, DTYPE))
        nearest = kernels.compiled_on_gpu(orthogonalize) if COMPILE else orthogonalize
        for group in self.param_groups:
            params, updates, momentum = group["params"], [], group["momentum"]
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(state["momentum"], momentum))  # Nesterov's look ahead
            rows, columns = params[0].size(0) // group["split"], params[0].size(1)
            updates = harness.divide_work(  # each of several processes takes a part of the (n, split * rows, columns)
                lambda some: nearest(some.view(-1, rows, columns), dtype).view_as(some), updates
            )
            scale = max(1, rows / columns) ** 0.5  # a tall matrix makes longer outputs of the same input
            for p, u in zip(params, updates):
                p.sub_(u, alpha=group["lr"] * scale)


def make_optimizers(model):
    """Muon for the matrices of the blocks, AdamW for the embeddings and the last layer."""
    attention, mlp = [b.attention for b in model.blocks], [b.mlp for b in model.blocks]
    groups = [
        {"params": [a.qkv.weight for a in attention], "split": 3},
        {"params": [a.proj.weight for a in attention]},
        {"params": [m.fc.weight for m in mlp]},
        {"params": [m.proj.weight for m in mlp]},
    ]
    muon = Muon(groups, lr=LEARNING_RATE, momentum=MOMENTUM)
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE_ADAMW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for group in muon.param_groups + adamw.param_groups:
        group["initial_lr"] = group["lr"]
    return muon, adamw


def lr_factor(step):
    """Learning rate of a step as a share of the highest: linear warm-up, constant, linear down to zero."""
    return min(1, (step + 1) / max(1, WARMUP_STEPS), (MAX_STEPS - step) / max(1, COOLDOWN * MAX_STEPS))


def train(model, tokens, run):
    """Train on tokens["train"]; the weights with the lowest loss on tokens["val"] are kept in the run's folder."""
    optimizers = make_optimizers(model)
    state = run.resume(model, *optimizers)  # step, best loss, evaluations without improvement
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
        harness.seed(SEED, step, harness.rank())  # a resumed run draws the same random numbers
        loss, done = 0.0, 0
        for micro_x, micro_y in zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE)):
            done += len(micro_x)
            with harness.sync_gradients(compiled, now=done == len(x)):
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
    """Sample the next token for each row of `logits` (B, V), after top-k and then top-p filtering (nucleus sampling,
    Holtzman et al. 2020, arXiv:1904.09751, section 3.1)."""
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
    return kernels.multinomial(p)  # torch.multinomial(p, 1)


@torch.inference_mode()
def generate(model, ids, n_tokens):
    """Continue `ids`, a list of tokens: yields `n_tokens` more, one by one."""
    harness.check_prompt(model, ids)
    model.eval()
    ids, size, cache, new = list(ids), model.block_size, None, None
    for _ in range(n_tokens):
        if cache is None or cache.length == size:  # read the text, or when the cache is full its last half window
            cache, new = KVCache(model), ids[-size if cache is None else -max(1, size // 2) :]
        logits = model(torch.tensor([new], device=DEVICE), cache=cache)[:, -1]  # (1, V)
        new = draw(logits)[0].tolist()
        ids += new
        yield new[0]


# ----------------------------------------------------------------------------------------------------------
# Comparison: length extrapolation
# ----------------------------------------------------------------------------------------------------------


def extrapolate(model, tokens):
    """{n: bits per byte of a split in windows of n tokens}, for 1, 2, 4, ... times BLOCK_SIZE; None where the split is
    shorter than such a window."""
    sizes = [BLOCK_SIZE * times for times in EXTRAPOLATION]
    return {n: evaluate(model, tokens, size=n)["bpb"] if n < len(tokens) else None for n in sizes}


def compare(last):
    """Print and draw bits per byte by the length of the window, of every scheme that has a run in OUT_DIR with the same
    constants as `last`, a summary."""
    curves = {}
    for position in SCHEMES:
        path = Path(OUT_DIR, position, "summary.json")
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if summary and harness.same_training(summary, last, but=("POSITION",)):
            curves[position] = {int(n): bpb for n, bpb in summary["extrapolation_bpb"].items()}
        elif summary:
            harness.say(f"{path.parent} is of other constants: it is not compared")
    harness.say(f"\nvalidation bits per byte by length of the window (trained on {BLOCK_SIZE} tokens; lower is better)")
    harness.say("tokens".ljust(12) + "".join(f"{n:>9}" for n in curves[last["position"]]))
    for position, curve in curves.items():
        cells = ("–" if bpb is None else f"{bpb:.4f}" for bpb in curve.values())
        harness.say(position.ljust(12) + "".join(f"{cell:>9}" for cell in cells))
    points = {position: [(n, bpb) for n, bpb in curve.items() if bpb] for position, curve in curves.items()}
    harness.draw_curves(Path(OUT_DIR, "extrapolation.png"), points, "tokens in a window", "validation bits per byte",
                        "v4: length extrapolation", log_x=True, mark=BLOCK_SIZE)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------


def run_scheme():
    """Train, evaluate and sample with the scheme POSITION; the results go to OUT_DIR. Returns the summary, a dict."""
    kernels.keep_freed_memory()
    with harness.Run(globals()) as run:
        tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY, DATA))
        tokens = load_tokens(VOCABULARY, DATA)
        torch.manual_seed(SEED)
        model = LanguageModel(tokenizer.vocab_size).to("cpu" if SHARD else DEVICE)
        run.begin(model, tokens)
        if INIT_FROM is not None:
            run.init_from(f"{INIT_FROM}/{POSITION}", INIT_FROM)
        train(model, tokens, run)

        run.load_best(model)
        sliding = {f"val_{k}_sliding": v for k, v in evaluate(model, tokens["val"], STRIDE).items()}
        test = {f"test_{k}": v for k, v in evaluate(model, tokens["test"]).items()}
        lengths = extrapolate(model, tokens["val"])
        torch.manual_seed(SEED)
        start = tokens["train"].start  # of a document
        sample = harness.text_of(tokenizer, start, generate(model, start, SAMPLE_TOKENS), STOP_AT_END)
        return run.finish(sample, **sliding, **test, position=POSITION, extrapolation_bpb=lengths)


def main():
    """Train every scheme of POSITION in its own folder, OUT_DIR/<scheme>, and compare all that are there.
    Returns {scheme: its summary}; with PROMPT the text."""
    harness.check_constants(globals())
    positions = list(dict.fromkeys(name.strip() for name in POSITION.split(",")))
    if unknown := [position for position in positions if position not in SCHEMES]:
        raise harness.UserError(f"POSITION={POSITION}: there is no scheme {unknown[0]}; known are {', '.join(SCHEMES)}")
    if PROMPT is not None:
        folders = [f"{OUT_DIR}/{position}" for position in dict.fromkeys((*positions, *SCHEMES))]
        return harness.continue_prompt(globals(), OUT_DIR, *folders)  # by the first that is there
    summaries = {}
    for position in positions:
        with harness.override(globals(), POSITION=position, OUT_DIR=f"{OUT_DIR}/{position}"):
            summaries[position] = run_scheme()
    if harness.rank() == 0:
        compare(summaries[positions[-1]])
    return summaries


if __name__ == "__main__":
    harness.start(globals())
