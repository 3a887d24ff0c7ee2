"""v3: the serious run. A deeper model, regularization, evaluation metrics, and the machinery of a long training.

The model is GPT-2's (Radford et al. 2019): LayerNorm before each sub-layer and once more at the end, GELU, and an
initialization that keeps the sum of all residual branches at one scale. The attention is the same function as in v2,
computed by one fused kernel or, in short windows on a CPU, block by block.

What is new against v2:

- model: more layers, pre-norm, scaled initialization, dropout, fused attention;
- optimizer: AdamW with weight decay for matrices only, warm-up and cosine, gradient clipping;
- speed: bfloat16 where the hardware is faster with it, `torch.compile` where it works; attention, GELU and dropout in a
  form that a CPU is fast with, freed memory kept for the next step; the logits of a micro-batch are computed at once
  again, without `loss_in_chunks`;
- evaluation: windows that overlap, top-1 and top-5 accuracy, expected calibration error, the test split;
- runs that survive: checkpoints, RESUME=True, Ctrl-C, one run a folder; and PROMPT="..." to continue a text;
- several devices: torchrun starts a process for each, and they share every batch.

What it reaches on WikiText-2: val bpb 1.658, word perplexity 374, 8.8 minutes of training on two CPU cores.

    python v3.py                                train, evaluate, write a sample: results in runs/v3/
    python v3.py DROPOUT=0.1 MAX_STEPS=2000     set any of the constants below for one run
    python v3.py RESUME=True                    go on from the last checkpoint
    python v3.py PROMPT=" The castle was"       continue a text with the trained model
    torchrun --standalone --nproc_per_node=2 v3.py    train on two devices
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
LEARNING_RATE = 2e-3  # at its highest; it ends at zero
WARMUP_STEPS = 60  # steps until the learning rate is at its highest
WEIGHT_DECAY = 0.1  # of matrices and embeddings
GRAD_CLIP = 1.0  # largest norm of the gradient
N_LAYER = 4  # blocks
N_HEAD = 4  # attention heads of a block
N_EMBD = 256  # width: numbers that describe a token on its way through the blocks
DROPOUT = 0.0  # share of numbers set to zero in training; it has not paid so far, see the README
STRIDE = 128  # of the overlapping windows in the last evaluation, in tokens
SAMPLE_TOKENS = 200  # length of the sample written at the end
TEMPERATURE = 0.8  # of sampling: below 1 likely tokens become likelier
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
DTYPE = "auto"  # of matrix products: "float32", "bfloat16", or the faster of them
COMPILE = True  # use torch.compile, if it works here
OUT_DIR = "runs/v3"  # where the results go
RESUME = False  # go on from the last checkpoint in OUT_DIR
PROMPT = None  # a text to continue with the trained model, instead of training
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 512, N_LAYER = 12, N_HEAD = 12, N_EMBD = 768,
# DROPOUT = 0.1, MAX_STEPS = 20_000, LEARNING_RATE = 6e-4, and WikiText-103 (python data/prepare.py --dataset
# wikitext-103-v1).

RUNG = Path(__file__).stem


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

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(N_EMBD, 3 * N_EMBD)
        self.out = nn.Linear(N_EMBD, N_EMBD)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, N_HEAD, C // N_HEAD).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = attend(q, k, v, (C // N_HEAD) ** -0.5)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


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

    def forward(self, x):
        x = x + dropout(self.attention(self.norm_1(x)), self.training)  # (B, T, C)
        return x + dropout(self.mlp(self.norm_2(x)), self.training)


class LanguageModel(nn.Module):
    """Token and position embeddings, N_LAYER blocks, and a linear layer to the logits."""

    def __init__(self, vocab_size):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise ValueError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}, since the heads share the width")
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        self.position = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.norm = nn.LayerNorm(N_EMBD)
        self.head = nn.Linear(N_EMBD, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for block in self.blocks:  # 2 * N_LAYER branches are summed: keep their sum at the scale of one (section 2.3)
            for branch_end in (block.attention.out, block.mlp[-1]):
                nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * N_LAYER))

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        x = self.embedding(idx) + self.position.weight[: idx.size(1)]  # (B, T, C)
        x = dropout(x, self.training)
        x = self.norm(self.blocks(x))
        logits = self.head(x).float()  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokens, stride=None):
    """Metrics over a whole split: each token after the first is predicted once. Bits per byte and word perplexity do
    not depend on the vocabulary; the loss per token does.

    Windows of BLOCK_SIZE start every `stride` tokens; by default they do not overlap. Where they do, only the tokens
    that no earlier window reached are counted, so each has at least BLOCK_SIZE - stride tokens of context.
    The calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) is the mean distance between the
    probability of the likeliest token and how often it is right, in 15 bins of that probability.
    """
    model.eval()
    stride = min(stride or BLOCK_SIZE, BLOCK_SIZE)
    n, n_bins = len(tokens) - 1, 15
    n_windows = max(0, math.ceil((n - BLOCK_SIZE) / stride)) + 1
    nats, top_1, top_5 = 0.0, 0, 0
    bins = torch.zeros(3, n_bins, dtype=torch.double)  # of each: tokens, sum of probabilities, tokens guessed right
    full = n_windows - 1  # the last window of the split may be shorter
    batches = list(torch.arange(full).split(BATCH_SIZE)) if full else []
    for batch in [*batches, torch.tensor([full])][rank() :: n_ranks()]:  # each process takes some of them
        length = min(BLOCK_SIZE, n - stride * int(batch[-1]))
        windows = tokens.ids[stride * batch[:, None] + torch.arange(length + 1)].long().to(DEVICE)
        old = torch.where(batch > 0, BLOCK_SIZE - stride, 0)  # tokens that the window before has predicted
        fresh = (torch.arange(length) >= old[:, None]).to(DEVICE)
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


def train(model, tokens):
    """Train on tokens["train"], keep the weights that are best on tokens["val"] in OUT_DIR/model.pt.

    Returns the log, a list with one dict for each evaluation.
    """
    optimizer = make_optimizer(model)
    log, best, worse, seconds, losses, first_step = [], math.inf, 0, 0.0, [], 0
    if RESUME:
        saved = load_checkpoint()
        check_same_run(saved, tokens["train"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        log, best, worse, first_step = saved["log"], saved["best"], saved["worse"], saved["step"]
        seconds, losses = saved["seconds"], saved["losses"].tolist()
    compiled = compile_model(model, *(t[:MICRO_BATCH_SIZE] for t in get_batch(tokens["train"].ids, 0)))
    if not RESUME and rank() == 0:
        for old in Path(OUT_DIR).glob("checkpoint*.pt"):  # of a run before this one
            old.unlink()
    eval_interval = max(1, min(EVAL_INTERVAL, len(tokens["train"]) // (BATCH_SIZE * BLOCK_SIZE)))

    def checkpoint(step):
        save_checkpoint({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "log": log,
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

        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * lr_factor(step)
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
            raise ValueError(not_finite(model, step, loss, log, optimizer.param_groups[0]["lr"]))
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
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
    keys = ("model", "optimizer", "step", "log", "best", "worse", "seconds", "losses", "dataset", "fingerprint",
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
                  "COMPILE", "OUT_DIR", "RESUME", "PROMPT")
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
    idx = torch.tensor([ids], device=DEVICE)  # (1, T)
    for _ in range(n_tokens):
        logits = model(idx[:, -BLOCK_SIZE:])[:, -1] / TEMPERATURE  # (1, V)
        idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return idx[0].tolist()


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
    if TEMPERATURE < 1e-4:
        raise ValueError(f"TEMPERATURE={TEMPERATURE} must be 0.0001 or more; at 0.01 the likeliest token is certain")
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
    names = ("VOCABULARY", "BLOCK_SIZE", "N_LAYER", "N_HEAD", "N_EMBD")
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


def main():
    """Train, evaluate and sample; write the results to OUT_DIR. Returns the summary, a dict."""
    check_constants()
    keep_freed_memory()
    import_mb = peak_memory_mb()
    torch.manual_seed(SEED)
    Path(OUT_DIR).mkdir(parents=True, exist_ok=True)
    tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY))
    tokens = read_tokens(VOCABULARY)
    model = LanguageModel(tokenizer.vocab_size).to(DEVICE)
    if PROMPT is not None:
        return continue_prompt(model, tokenizer)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{RUNG} on {tokens['train'].dataset}: {n_params:,} parameters, {len(tokens['train']):,} training tokens, "
          f"{DEVICE}")

    with only_run_in_folder(), stop_between_steps():
        log = train(model, tokens)
    peak_mb = peak_memory_mb()
    model.load_state_dict(load_saved("model.pt")["model"])
    best = min(log, key=lambda line: line["val_loss"])
    sliding, test = evaluate(model, tokens["val"], STRIDE), evaluate(model, tokens["test"])
    for name, metrics in [(f"windows of {BLOCK_SIZE} tokens", {k: best[k] for k in sliding}),
                          (f"a window every {min(STRIDE, BLOCK_SIZE)} tokens", sliding)]:  # fmt: skip
        print(f"validation, {name}: " + ", ".join(f"{k[4:]} {v:.4f}" for k, v in metrics.items()))

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
        "hyperparameters": constants(),
    }
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
