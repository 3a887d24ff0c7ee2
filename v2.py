"""v2: attention. The first transformer, every step of it written out.

Each token looks at all tokens before it and takes from each what it needs: a query is compared with the keys of
the earlier positions, and the softmax of the scores weighs their values (Vaswani et al. 2017, "Attention Is All You
Need", arXiv:1706.03762, section 3). The model is the decoder of that paper without its cross-attention: every
sub-layer is followed by a residual connection and LayerNorm. Positions are learned vectors. There is no dropout.

What is new against v1_1: the model. The table of the memory and `return_freed_memory`, which costs speed, stay behind;
everything else around the model is the same.

What it reaches on WikiText-2: val bpb 1.778, word perplexity 573, 6.7 minutes of training on two CPU cores.

    python v2.py                                train, evaluate, write a sample: results in runs/v2/
    python v2.py N_LAYER=4 N_HEAD=8             set any of the constants below for one run

Other vocabularies: `python data/prepare.py --vocab-size 8192`, then `python v2.py VOCABULARY=bpe_vocab_8192.json`.
"""

import ast
import functools
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # torch.optim loads it when first used: here it counts as a library, not as training memory
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from bpe_tokenizer import BPETokenizer
from data.prepare import load_tokens, vocabulary_file

# ----------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------

VOCABULARY = "bpe_vocab.json"  # file in data/ that holds the tokenizer
BATCH_SIZE = 16  # windows a step
MICRO_BATCH_SIZE = 8  # windows that are computed together
CHUNK_SIZE = 256  # tokens whose logits exist at the same time
BLOCK_SIZE = 128  # tokens in a window: the context that attention reaches
MAX_STEPS = 2560  # 1.72 times the training text
EVAL_INTERVAL = 640  # steps between two evaluations; at least one an epoch is made
PATIENCE = 3  # evaluations without a better one after which training stops early
LEARNING_RATE = 1e-3
N_LAYER = 2  # blocks
N_HEAD = 4  # attention heads of a block
N_EMBD = 128  # width: numbers that describe a token on its way through the blocks
SAMPLE_TOKENS = 200  # length of the sample written at the end
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
OUT_DIR = "runs/v2"  # where the results go
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 256, N_LAYER = 6, N_HEAD = 6, N_EMBD = 384,
# LEARNING_RATE = 3e-4, MAX_STEPS = 5000.

RUNG = Path(__file__).stem


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


def get_batch(ids, step):
    """Batch number `step`: inputs (B, T) and, one token later, targets (B, T). Each window is seen once an epoch."""
    n_batches = (len(ids) - BLOCK_SIZE) // (BATCH_SIZE * BLOCK_SIZE)
    epoch, k = divmod(step, max(n_batches, 1))
    starts = window_starts(len(ids), BATCH_SIZE, BLOCK_SIZE, SEED + epoch)[k]
    windows = ids[starts[:, None] + torch.arange(BLOCK_SIZE + 1)].long().to(DEVICE)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


def chunk_loss(x, targets, head):
    """Summed cross-entropy of the logits `head(x)`: x (n, C), targets (n,)."""
    return F.cross_entropy(head(x), targets, reduction="sum")


def loss_in_chunks(x, targets, head):
    """Mean cross-entropy of the logits `head(x)`, for x (N, C) and targets (N,), CHUNK_SIZE tokens at a time.

    The logits of a chunk are not kept for the backward pass, which computes them again (Chen et al. 2016, "Training
    Deep Nets with Sublinear Memory Cost", arXiv:1604.06174).
    """
    chunks = zip(x.split(CHUNK_SIZE), targets.split(CHUNK_SIZE))
    return sum(checkpoint(chunk_loss, x, targets, head, use_reentrant=False) for x, targets in chunks) / len(targets)


class Attention(nn.Module):
    """Causal self-attention with N_HEAD heads (Vaswani et al. 2017, equation 1 and section 3.2.2)."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(N_EMBD, 3 * N_EMBD)
        self.out = nn.Linear(N_EMBD, N_EMBD)
        future = torch.ones(BLOCK_SIZE, BLOCK_SIZE, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)  # [i, j]: j comes after i

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, N_HEAD, C // N_HEAD).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // N_HEAD)  # (B, H, T, T): query i, key j
        scores = scores.masked_fill(self.future[:T, :T], -math.inf)
        y = scores.softmax(-1) @ v  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class Block(nn.Module):
    """Attention, then a small MLP for each token by itself; after each, residual connection and LayerNorm."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm_1 = nn.LayerNorm(N_EMBD)
        self.mlp = nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD), nn.ReLU(), nn.Linear(4 * N_EMBD, N_EMBD))
        self.norm_2 = nn.LayerNorm(N_EMBD)

    def forward(self, x):
        x = self.norm_1(x + self.attention(x))  # (B, T, C)
        return self.norm_2(x + self.mlp(x))


class LanguageModel(nn.Module):
    """Token and position embeddings, N_LAYER blocks, and a linear layer to the logits."""

    def __init__(self, vocab_size):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise ValueError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}, since the heads share the width")
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        self.position = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.head = nn.Linear(N_EMBD, vocab_size)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        x = self.embedding(idx) + self.position.weight[: idx.size(1)]  # (B, T, C)
        x = self.blocks(x)
        if targets is None:
            return self.head(x)  # (B, T, V)
        return loss_in_chunks(x.flatten(0, 1), targets.flatten(), self.head)


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokens):
    """Metrics over a whole split in windows of BLOCK_SIZE that do not overlap: each token after the first is
    predicted once. Bits per byte and word perplexity do not depend on the vocabulary; the loss per token does."""
    model.eval()
    nats, n = 0.0, len(tokens) - 1
    for start in range(0, n, MICRO_BATCH_SIZE * BLOCK_SIZE):
        x = tokens.ids[start : min(start + MICRO_BATCH_SIZE * BLOCK_SIZE, n)].long().to(DEVICE)
        y = tokens.ids[start + 1 : start + len(x) + 1].long().to(DEVICE)
        whole = len(x) // BLOCK_SIZE * BLOCK_SIZE
        for part in (slice(0, whole), slice(whole, None)):  # the last window of the split is shorter
            if len(x[part]):
                shape = (-1, min(BLOCK_SIZE, len(x[part])))
                nats += model(x[part].view(shape), y[part].view(shape)).item() * len(x[part])
    model.train()
    return {
        "val_loss": nats / n,
        "val_bpb": nats / (math.log(2) * tokens.n_bytes),
        "val_word_ppl": math.exp(min(nats / tokens.n_words, 700)),
    }


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def train(model, tokens):
    """Train on tokens["train"], keep the weights that are best on tokens["val"] in OUT_DIR/model.pt.

    Returns the log, a list with one dict for each evaluation.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    log, best, worse, seconds, losses = [], math.inf, 0, 0.0, []
    eval_interval = max(1, min(EVAL_INTERVAL, len(tokens["train"]) // (BATCH_SIZE * BLOCK_SIZE)))
    bar = tqdm(total=MAX_STEPS, desc="training", unit="step", disable=None)
    start = time.perf_counter()
    for step in range(MAX_STEPS + 1):
        if step % eval_interval == 0 or step == MAX_STEPS:
            train_loss = torch.tensor(losses).mean().item() if losses else None
            seconds += time.perf_counter() - start  # the clock stands still while evaluating
            metrics = evaluate(model, tokens["val"])
            seen = step * BATCH_SIZE * BLOCK_SIZE
            log.append({"step": step, "tokens_seen": seen, "seconds": seconds, "train_loss": train_loss, **metrics})
            bar.write(f"step {step:5}  {seconds:5.0f} s  training loss {f'{train_loss:.4f}' if losses else '-':>6}  "
                      f"val loss {metrics['val_loss']:.4f}  val bpb {metrics['val_bpb']:.4f}")
            if metrics["val_loss"] < best:
                best, worse = metrics["val_loss"], 0
                write_whole("model.pt", lambda path: torch.save(model.state_dict(), path))
            else:
                worse += 1
            if step == MAX_STEPS or worse >= PATIENCE:
                break
            losses, start = [], time.perf_counter()

        x, y = get_batch(tokens["train"].ids, step)
        loss = 0.0
        for micro_x, micro_y in zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE)):
            part = model(micro_x, micro_y) * (len(micro_x) / BATCH_SIZE)
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        bar.update()
        if step % 10 == 0:
            rate = (step + 1) * BATCH_SIZE * BLOCK_SIZE / (seconds + time.perf_counter() - start)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:,.0f} tokens/s")
    bar.close()
    if worse >= PATIENCE:
        print(f"stopped early: no better validation loss in {PATIENCE} evaluations")
    return log


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, ids, n_tokens):
    """Continue `ids`, a list of tokens, by `n_tokens` drawn from the model's distribution. Returns the whole list."""
    model.eval()
    idx = torch.tensor([ids], device=DEVICE)  # (1, T)
    for _ in range(n_tokens):
        logits = model(idx[:, -BLOCK_SIZE:])[:, -1]  # (1, V)
        idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return idx[0].tolist()


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------


def constants():
    """The hyperparameters: every UPPER_CASE number or string of this file."""
    return {k: v for k, v in globals().items()
            if k.isupper() and k != "RUNG" and type(v) in (bool, int, float, str)}  # fmt: skip


def set_constants(arguments):
    """Set constants from NAME=value arguments. Raises ValueError for an unknown name or a value of another type."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in constants():
            raise ValueError(f"there is no constant {name!r}; known are {', '.join(constants())}")
        kind = type(globals()[name])
        try:
            new = value if kind is str else ast.literal_eval(value)
            if kind is float and type(new) is int:
                new = float(new)
            if type(new) is not kind:
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
    """Make OUT_DIR/`name` by `write(path)`, whole or not at all."""
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


def main():
    """Train, evaluate and sample; write the results to OUT_DIR. Returns the summary, a dict."""
    check_constants()
    import_mb = peak_memory_mb()
    torch.manual_seed(SEED)
    Path(OUT_DIR).mkdir(parents=True, exist_ok=True)
    tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY))
    tokens = load_tokens(VOCABULARY)
    model = LanguageModel(tokenizer.vocab_size).to(DEVICE)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{RUNG} on {tokens['train'].dataset}: {n_params:,} parameters, {len(tokens['train']):,} training tokens, "
          f"{DEVICE}")

    log = train(model, tokens)
    peak_mb = peak_memory_mb()
    model.load_state_dict(torch.load(Path(OUT_DIR) / "model.pt", weights_only=True))
    best = min(log, key=lambda line: line["val_loss"])

    sample = tokenizer.decode(generate(model, tokenizer.encode(" \n ="), SAMPLE_TOKENS))
    print(f"--- sample ---\n{sample}\n--------------")
    summary = {
        "rung": RUNG,
        "dataset": tokens["train"].dataset,
        "tokenizer": VOCABULARY,
        "seed": SEED,
        "device": DEVICE,
        "dtype": "float32",
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
        "best_step": best["step"],
        "hyperparameters": constants(),
    }
    write_whole("log.jsonl", lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in log)))
    write_whole("sample.txt", lambda path: path.write_text(sample, encoding="utf-8"))
    write_whole("loss.png", lambda path: plot_loss(log, path))
    write_whole("summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    print(f"{RUNG} on {summary['dataset']}: val bpb {summary['val_bpb']:.4f}, word perplexity "
          f"{summary['val_word_ppl']:,.1f}, {n_params:,} parameters, {summary['train_seconds']:.0f} s, peak memory "
          f"{summary['peak_memory_mb']:,.0f} MB")
    return summary


if __name__ == "__main__":
    try:
        set_constants(sys.argv[1:])
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{RUNG}.py: {error}")
    except (MemoryError, RuntimeError) as error:
        if not re.search("memory|size calculation", repr(error), re.IGNORECASE):
            raise
        sys.exit(f"{RUNG}.py: out of memory; lower MICRO_BATCH_SIZE, BLOCK_SIZE, N_EMBD or N_LAYER")
    except KeyboardInterrupt:
        print(f"{RUNG}.py: stopped", file=sys.stderr)
        sys.exit(130)
