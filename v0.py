"""v0: the baseline. A bigram model: the next token is guessed from the last one alone.

The whole model is a table. Row i holds the logits of the token that follows token i, and training moves them by
gradient descent on the cross-entropy. For this model the best table is known without training: the logarithms of
the counts of pairs in the training text. The script prints both losses, so that the training loop, which all later
rungs share, is seen to find what it should.

What is new: everything. The vocabulary has only 500 tokens, so that the table stays small.

What it reaches on WikiText-2: val bpb 2.438, word perplexity 6,055, 0.4 minutes of training on two CPU cores.

    python v0.py                                train, evaluate, write a sample: results in runs/v0/
    python v0.py LEARNING_RATE=1 MAX_STEPS=500  set any of the constants below for one run
"""

import ast
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
from tqdm import tqdm

from bpe_tokenizer import BPETokenizer
from data.prepare import load_tokens, vocabulary_file

# ----------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------

VOCABULARY = "bpe_vocab_500.json"  # file in data/ that holds the tokenizer
BATCH_SIZE = 32  # windows a step
BLOCK_SIZE = 128  # tokens in a window; a bigram looks at one of them at a time
MAX_STEPS = 2199  # 1.72 times the training text
EVAL_INTERVAL = 550  # steps between two evaluations; at least one an epoch is made
PATIENCE = 3  # evaluations without a better one after which training stops early
LEARNING_RATE = 0.03
SAMPLE_TOKENS = 200  # length of the sample written at the end
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
OUT_DIR = "runs/v0"  # where the results go
# For one GPU: BATCH_SIZE = 512, MAX_STEPS = 140; the table is too small to gain more.

RUNG = Path(__file__).stem


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


def get_batch(ids, step):
    """Windows at random places: inputs (B, T) and, one token later, targets (B, T)."""
    if len(ids) <= BLOCK_SIZE:
        raise ValueError(f"the training text has {len(ids)} tokens, too few for a window of {BLOCK_SIZE}; lower "
                         "BLOCK_SIZE")
    random = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(ids) - BLOCK_SIZE, (BATCH_SIZE,), generator=random).tolist()
    x = torch.stack([ids[i : i + BLOCK_SIZE].long() for i in starts])
    y = torch.stack([ids[i + 1 : i + BLOCK_SIZE + 1].long() for i in starts])
    return x.to(DEVICE), y.to(DEVICE)


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """A table of logits: row i belongs to what follows token i."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab_size, vocab_size))

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        logits = F.embedding(idx, self.table)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokens):
    """Metrics over a whole split in windows of BLOCK_SIZE that do not overlap: each token after the first is
    predicted once. Bits per byte and word perplexity do not depend on the vocabulary; the loss per token does."""
    model.eval()
    nats, n = 0.0, len(tokens) - 1
    for start in range(0, n, BATCH_SIZE * BLOCK_SIZE):
        x = tokens.ids[start : min(start + BATCH_SIZE * BLOCK_SIZE, n)].long().to(DEVICE)
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


@torch.no_grad()
def compare_with_counts(model, ids):
    """(loss of the table on the training text, lowest loss that any table has there), in nats per token.

    With n_ij the number of times that j follows i, the best probabilities are n_ij / n_i.
    """
    vocab_size = len(model.table)
    pairs = ids[:-1].long() * vocab_size + ids[1:].long()
    n = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).double()
    best = (n / n.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-300).log()
    trained = model.table.cpu().double().log_softmax(1)
    return -(n * trained).sum().item() / n.sum().item(), -(n * best).sum().item() / n.sum().item()


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def train(model, tokens):
    """Train on tokens["train"], keep the weights that are best on tokens["val"] in OUT_DIR/model.pt.

    Returns the log, a list with one dict for each evaluation.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
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
        loss = model(x, y)
        loss.backward()
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
    trained, optimum = compare_with_counts(model, tokens["train"].ids)
    print(f"loss on the training text: {trained:.4f} nats per token; the best that any table reaches, from the counts: "
          f"{optimum:.4f} ({100 * (trained / optimum - 1):+.2f}%)")

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
        "train_text_loss": trained,
        "closed_form_loss": optimum,
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
        sys.exit(f"{RUNG}.py: out of memory; lower BATCH_SIZE or BLOCK_SIZE")
    except KeyboardInterrupt:
        print(f"{RUNG}.py: stopped", file=sys.stderr)
        sys.exit(130)
