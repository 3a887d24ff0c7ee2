"""v3: the serious run. A deeper model, regularization, a schedule, evaluation metrics, several devices.

The model is GPT-2's (Radford et al. 2019): LayerNorm before each sub-layer and once more at the end, GELU, and an
initialization that keeps the sum of all residual branches at one scale. The attention is the same function as in v2,
computed by one fused kernel or, in short windows on a CPU, block by block.

What is new against v2:

- model: more layers, pre-norm, scaled initialization, dropout, fused attention;
- optimizer: AdamW with weight decay for matrices only, warm-up and cosine, gradient clipping;
- speed: bfloat16 where the hardware is faster with it, `torch.compile` where it works; attention, GELU and dropout in a
  form that a CPU is fast with, freed memory kept for the next step;
- evaluation: windows that overlap, top-1 and top-5 accuracy, expected calibration error, the test split;
- INIT_FROM=runs/... starts from the weights of another run: fine-tuning;
- several devices: torchrun starts a process for each, and they share every batch.

    python v3.py                                train, evaluate, write a sample: results in runs/v3/
    python v3.py DROPOUT=0.1 MAX_STEPS=2000     set any of the constants below for one run
    python v3.py RESUME=True                    go on from the last checkpoint
    python v3.py PROMPT=" The castle was"       continue a text with the trained model
    torchrun --standalone --nproc_per_node=2 v3.py    train on two devices
"""

import functools
import math

import harness  # first: it answers --help without torch, which takes seconds to load

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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
LEARNING_RATE = 2e-3  # at its highest; it ends at zero
WARMUP_STEPS = 60  # steps until the learning rate is at its highest
WEIGHT_DECAY = 0.1  # of matrices and embeddings
GRAD_CLIP = 1.0  # largest norm of the gradient; 0 for no clipping
N_LAYER = 4  # blocks
N_HEAD = 4  # attention heads of a block
N_EMBD = 256  # width: numbers that describe a token on its way through the blocks
DROPOUT = 0.0  # share of numbers set to zero in training, so that less is learned by heart
STRIDE = 128  # of the overlapping windows in the last evaluation, in tokens
SAMPLE_TOKENS = 200  # length of the sample written at the end, or of what continues PROMPT
TEMPERATURE = 0.8  # of sampling: below 1 likely tokens become likelier; at 0 the likeliest is taken
TOP_K = 0  # sample from this many of the likeliest tokens; 0: from all
TOP_P = 1.0  # sample from the likeliest tokens that have this probability together
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DTYPE = "auto"  # of matrix products: "float32", "bfloat16", or the faster of them
COMPILE = True  # use torch.compile, if it works here
OUT_DIR = "runs/v3"  # where the results go
RESUME = False  # go on from the last checkpoint in OUT_DIR, or begin
INIT_FROM = None  # folder of a run from whose weights this one starts: fine-tuning
PROMPT = None  # a text to continue with the trained model, instead of training
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 512, N_LAYER = 12, N_HEAD = 12, N_EMBD = 768,
# DROPOUT = 0.1, MAX_STEPS = 20_000, LEARNING_RATE = 6e-4, and WikiText-103 (python data/prepare.py --dataset
# wikitext-103-v1).


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

    def __init__(self):
        super().__init__()
        self.n_head = N_HEAD
        self.qkv = nn.Linear(N_EMBD, 3 * N_EMBD)
        self.proj = nn.Linear(N_EMBD, N_EMBD)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = attend(q, k, v, (C // self.n_head) ** -0.5)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class GELU(nn.Module):
    """GELU by its tanh formula (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2), with 1 + tanh(z) written as
    2 sigmoid(2 z), which is faster to compute."""

    def forward(self, x):
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


class Block(nn.Module):
    """Attention, then a small MLP for each token by itself; LayerNorm before each, residual connection around."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(N_EMBD)
        self.attention = Attention()
        self.norm_2 = nn.LayerNorm(N_EMBD)
        self.mlp = nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD), GELU(), nn.Linear(4 * N_EMBD, N_EMBD))
        self.dropout = Dropout(DROPOUT)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm_1(x)))  # (B, T, C)
        return x + self.dropout(self.mlp(self.norm_2(x)))


class LanguageModel(nn.Module):
    """Token and position embeddings, N_LAYER blocks, and a linear layer to the logits."""

    def __init__(self, vocab_size):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise ValueError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}, since the heads share the width")
        self.block_size = BLOCK_SIZE
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.dropout = Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.norm = nn.LayerNorm(N_EMBD)
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for block in self.blocks:  # 2 * N_LAYER branches are summed: keep their sum at the scale of one (section 2.3)
            for branch_end in (block.attention.proj, block.mlp[-1]):
                nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * N_LAYER))

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        x = self.embedding(idx) + self.position_embedding.weight[: idx.size(1)]  # (B, T, C)
        x = self.norm(self.blocks(self.dropout(x)))
        logits = self.head(x).float()  # (B, T, V)
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
        scores = q @ k.mT * q.size(-1) ** -0.5  # (B, H, T, T): query i, key j
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
def evaluate(model, tokens, stride=None):
    """Metrics over a whole split: each token after the first is predicted once. Bits per byte and word perplexity do
    not depend on the vocabulary; the loss per token does.

    Windows of the model's size start every `stride` tokens; by default they do not overlap. Where they do, only tokens
    that no earlier window reached are counted, so each has at least size - stride tokens of context.
    The calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) is the mean distance between the
    probability of the likeliest token and how often it is right, in 15 bins of that probability.
    """
    model.eval()
    size = model.block_size
    stride = min(stride or size, size)
    n, n_bins = len(tokens) - 1, 15
    n_windows = max(0, math.ceil((n - size) / stride)) + 1
    nats, top_1, top_5 = 0.0, 0, 0
    bins = torch.zeros(3, n_bins, dtype=torch.double)  # of each: tokens, sum of probabilities, tokens guessed right
    full = n_windows - 1  # the last window of the split may be shorter
    batches = list(torch.arange(full).split(MICRO_BATCH_SIZE)) if full else []
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


def make_optimizer(model):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); biases and LayerNorms do not decay."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def lr_factor(step):
    """Learning rate of a step as a share of the highest: linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP_STEPS) / max(1, MAX_STEPS - WARMUP_STEPS))


def train(model, tokens, run):
    """Train on tokens["train"]. The weights that are best on tokens["val"] are kept in the folder of the run."""
    optimizer = make_optimizer(model)
    state = run.resume(model, optimizer)  # step, best loss, evaluations without a better one
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

        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * lr_factor(step)
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
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP or math.inf)
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


@torch.no_grad()
def generate(model, ids, n_tokens):
    """Continue `ids`, a list of tokens: yields `n_tokens` more, one by one."""
    model.eval()
    idx = torch.tensor([ids], device=DEVICE)  # (1, T)
    for _ in range(n_tokens):
        logits = model(idx[:, -model.block_size :])[:, -1]  # (1, V)
        idx = torch.cat([idx, draw(logits)], dim=1)
        yield idx[0, -1].item()


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------


def main():
    """Train, evaluate and sample; the results go to OUT_DIR. Returns the summary, a dict; with PROMPT the text."""
    if PROMPT is not None:
        return harness.continue_prompt(globals(), OUT_DIR)
    harness.keep_freed_memory()
    with harness.Run(globals()) as run:
        tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY, DATA))
        with harness.main_process_first():
            tokens = load_tokens(VOCABULARY, DATA)
        torch.manual_seed(SEED)
        model = LanguageModel(tokenizer.vocab_size).to(DEVICE)
        run.begin(model, tokens)
        if INIT_FROM is not None:
            run.init_from(INIT_FROM)
        train(model, tokens, run)

        best = run.load_best(model)
        sliding, test = evaluate(model, tokens["val"], STRIDE), evaluate(model, tokens["test"])
        torch.manual_seed(SEED)
        start = tokens["train"].start  # of a document
        sample = tokenizer.decode([*start, *generate(model, start, SAMPLE_TOKENS)])
        summary = run.finish(
            sample, **{f"val_{k}_sliding": v for k, v in sliding.items()}, **{f"test_{k}": v for k, v in test.items()}
        )
        for name, metrics in (("windows side by side", best), ("windows that overlap", sliding)):
            print(f"validation, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if v is not None))
        return summary


if __name__ == "__main__":
    harness.start(globals())
