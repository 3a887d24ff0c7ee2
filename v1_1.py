"""v1_1: the model of v1 in a fraction of the memory.

The same function, the same batches and, up to the rounding of sums, the same loss in every step, while the peak of
training memory above the imported libraries falls to less than a quarter. Where v1's memory goes, and what is done
about it:

1. Logits: with V = 4,096, those of a batch outweigh all else. The loss is summed over chunks of tokens, and the
   gradient of a chunk is computed with its loss, so only one chunk's logits exist at any time, in memory made once.
2. Activations: a batch is processed in micro-batches whose gradients add up (gradient accumulation).
3. Token ids: 16 bits instead of 64, and memory-mapped: only what a batch touches is read.
4. Optimizer: `fused=True` updates weights and moments in place, without temporary copies of them.
5. Memory that is freed: the C library keeps blocks of some megabytes for later, and the gaps between them add up.
   On Linux it is told to give them back at once.

What is new against v1: `LossInChunks`, the loop over micro-batches, `return_freed_memory`, and the table that shows
where the memory goes.

    python v1_1.py                              train, evaluate, write a sample: results in runs/v1_1/
    python v1_1.py MICRO_BATCH_SIZE=64          set any of the constants below for one run
    python v1_1.py RESUME=True                  continue from the last checkpoint
    python v1_1.py PROMPT=" The castle was"     continue a text with the trained model
"""

import ctypes
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

DATA = "data"  # dataset folder: the tokens and vocabularies of the text
VOCABULARY = "bpe_vocab.json"  # file in DATA that holds the tokenizer
BATCH_SIZE = 64  # windows per step
MICRO_BATCH_SIZE = 4  # windows per forward and backward pass
CHUNK_SIZE = 128  # tokens whose logits exist at the same time
BLOCK_SIZE = 128  # tokens in a window
CONTEXT_SIZE = 8  # tokens from which the model predicts the next one
MAX_STEPS = 640  # 1.72 passes over the training split of WikiText-2
EVAL_INTERVAL = 80  # steps between evaluations and checkpoints; at least one per epoch
PATIENCE = 3  # stop early after this many evaluations without improvement
LEARNING_RATE = 2e-3
N_EMBD = 64  # size of the embedding of a token
N_HIDDEN = 256  # units of the hidden layer
SAMPLE_TOKENS = 200  # length of the sample, or of the continuation of PROMPT
TEMPERATURE = 0.8  # of sampling: below 1 favors likely tokens; 0 takes the likeliest
TOP_K = 0  # sample from this many of the likeliest tokens; 0: from all of them
TOP_P = 1.0  # nucleus sampling: from the fewest likely tokens whose probabilities sum to this
STOP_AT_END = True  # a sample ends where the model ends the text, at <|endoftext|>
SAMPLES = 1  # how many continuations of PROMPT to write
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
OUT_DIR = "runs/v1_1"  # where the results go
RESUME = False  # continue from the last checkpoint in OUT_DIR, if there is one
PROMPT = None  # continue this text with the trained model, instead of training; "-": the text of standard input
# For one GPU: BATCH_SIZE = 256, N_EMBD = 128, N_HIDDEN = 1024, MAX_STEPS = 2000.


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
    windows = harness.to_device(ids[starts[:, None] + torch.arange(BLOCK_SIZE + 1)].long(), DEVICE)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


class LossInChunks(torch.autograd.Function):
    """Mean cross-entropy of the logits x W' + b, CHUNK_SIZE tokens at a time, all of them in one piece of memory.

    Its gradient with respect to the logits is (softmax - one-hot of the target) / N, which is known once the logits
    are. So each chunk adds its loss and its part of all gradients, and its logits make room for the next chunk; the
    backward pass only multiplies by the gradient that arrives.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        """x (N, N_HIDDEN), weight (V, N_HIDDEN), bias (V,), targets (N,)."""
        N, loss = len(x), x.new_zeros(())
        room = x.new_empty(min(CHUNK_SIZE, N), len(weight))
        gradients = [torch.zeros_like(t) for t in (x, weight, bias)] if ctx.needs_input_grad[0] else None
        for i in range(0, N, CHUNK_SIZE):
            x_chunk, target = x[i : i + CHUNK_SIZE], targets[i : i + CHUNK_SIZE, None]
            p = torch.addmm(bias, x_chunk, weight.T, out=room[: len(target)])  # logits (n, V)
            p -= p.amax(1, keepdim=True)  # so that no exponential overflows
            logit = p.gather(1, target)
            total = p.exp_().sum(1, keepdim=True)
            loss += (total.log() - logit).sum() / N
            if gradients:
                p /= N * total  # softmax / N
                p.scatter_add_(1, target, p.new_full(target.shape, -1 / N))
                d_x, d_weight, d_bias = gradients
                torch.mm(p, weight, out=d_x[i : i + CHUNK_SIZE])
                d_weight.addmm_(p.T, x_chunk)
                d_bias += p.sum(0)
        ctx.save_for_backward(*gradients or ())
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *(grad * gradient for gradient in ctx.saved_tensors), None


def loss_in_chunks(x, targets, head):
    """Mean cross-entropy of the logits `head(x)`, for x (N, N_HIDDEN) and targets (N,)."""
    return LossInChunks.apply(x, head.weight, head.bias, targets)


class LanguageModel(nn.Module):
    """The embeddings of the last CONTEXT_SIZE tokens, side by side, through one hidden layer."""

    def __init__(self, vocab_size):
        super().__init__()
        self.block_size, self.context_size = BLOCK_SIZE, CONTEXT_SIZE
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        self.hidden = nn.Linear(CONTEXT_SIZE * N_EMBD, N_HIDDEN)
        self.head = nn.Linear(N_HIDDEN, vocab_size)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        harness.check_ids(self, idx, targets)
        x = self.embedding(idx)  # (B, T, C)
        x = F.pad(x, (0, 0, self.context_size - 1, 0))  # left-pad: position t sees t - CONTEXT_SIZE + 1 to t
        x = x.unfold(1, self.context_size, 1).flatten(2)  # (B, T, C * CONTEXT_SIZE)
        x = self.hidden(x).tanh()  # (B, T, N_HIDDEN)
        if targets is None:
            return self.head(x)  # (B, T, V)
        return loss_in_chunks(x.flatten(0, 1), targets.flatten(), self.head)


# ----------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, tokens):
    """Metrics over a whole split: each token after the first is predicted once. Bits per byte and word perplexity do
    not depend on the vocabulary; the loss per token does. Windows have the model's size and do not overlap."""
    harness.check_tokens(model, tokens)
    model.eval()
    nats, n, size = 0.0, len(tokens) - 1, model.block_size
    for start in range(0, n, MICRO_BATCH_SIZE * size):
        x = tokens.ids[start : min(start + MICRO_BATCH_SIZE * size, n)].long().to(DEVICE)
        y = tokens.ids[start + 1 : start + len(x) + 1].long().to(DEVICE)
        whole = len(x) // size * size
        for part in (slice(0, whole), slice(whole, None)):  # the last window of the split is shorter
            if len(x[part]):
                shape = (-1, min(size, len(x[part])))
                nats += model(x[part].view(shape), y[part].view(shape)).item() * len(x[part])
    model.train()
    return {
        "loss": nats / n,
        "bpb": nats / (math.log(2) * tokens.n_bytes),
        "word_ppl": math.exp(min(nats / tokens.n_words, 700)) if tokens.n_words else None,
    }


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def train(model, tokens, run):
    """Train on tokens["train"]; the weights with the lowest loss on tokens["val"] are kept in the run's folder."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    state = run.resume(model, optimizer)  # step, best loss, evaluations without improvement
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

        x, y = get_batch(tokens["train"].ids, step)
        loss = 0.0
        for micro_x, micro_y in zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE)):
            micro_loss = model(micro_x, micro_y) * (len(micro_x) / len(x))
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = nn.utils.get_total_norm(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        run.step(loss, grad_norm)


def return_freed_memory():
    """Let the C library return every block of 1 MB or more to the system when it is freed (glibc, mallopt(3))."""
    try:
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    except (OSError, TypeError, AttributeError):  # not glibc
        pass


def print_memory(model, tokens, run):
    """Print where the memory goes: as computed from the shapes, next to the same for v1, and as measured."""
    n_params, vocab_size = run.n_params, model.head.out_features
    n_ids = sum(len(split) for split in tokens.values())
    per_token = 4 * (N_EMBD + CONTEXT_SIZE * N_EMBD + N_HIDDEN)  # embedding, window, hidden layer, in float32
    batch, micro_batch = BATCH_SIZE * BLOCK_SIZE, MICRO_BATCH_SIZE * BLOCK_SIZE
    chunk = min(CHUNK_SIZE, micro_batch)
    rows = [
        ("token ids: 64 bits in memory; 16 bits, mapped", 8 * n_ids, 2 * n_ids),
        ("parameters", 4 * n_params, 4 * n_params),
        ("gradients", 4 * n_params, 4 * n_params),
        ("Adam's two moments", 8 * n_params, 8 * n_params),
        ("activations: batch; micro-batch", per_token * batch, per_token * micro_batch),
        ("logits, their log-softmax and gradient: batch; chunk", 12 * vocab_size * batch, 12 * vocab_size * chunk),
    ]
    harness.say(f"{'memory, MB':55}{'v1':>8}{'v1_1':>8}")
    for name, there, here in rows + [("sum", *(sum(row[i] for row in rows) for i in (1, 2)))]:
        harness.say(f"{name:55}{there / 1e6:8.1f}{here / 1e6:8.1f}")
    harness.say(f"{'measured: peak above the imported libraries':63}{run.peak_mb - run.import_mb:8.1f}")


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
    return torch.multinomial(p, 1)


@torch.no_grad()
def generate(model, ids, n_tokens):
    """Continue `ids`, a list of tokens: yields `n_tokens` more, one by one."""
    harness.check_prompt(model, ids)
    model.eval()
    idx = torch.tensor([ids], device=DEVICE)  # (1, T)
    for _ in range(n_tokens):
        logits = model(idx[:, -model.context_size :])[:, -1]  # (1, V)
        idx = torch.cat([idx, draw(logits)], dim=1)
        yield idx[0, -1].item()


# ----------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------


def main():
    """Train, evaluate and sample; the results go to OUT_DIR. Returns the summary, a dict; with PROMPT the text."""
    if PROMPT is not None:
        return harness.continue_prompt(globals(), OUT_DIR)
    return_freed_memory()
    with harness.Run(globals()) as run:
        tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY, DATA))
        tokens = load_tokens(VOCABULARY, DATA)
        torch.manual_seed(SEED)
        model = LanguageModel(tokenizer.vocab_size).to(DEVICE)
        run.begin(model, tokens)
        train(model, tokens, run)

        run.load_best(model)
        print_memory(model, tokens, run)
        torch.manual_seed(SEED)
        start = tokens["train"].start  # of a document
        sample = harness.text_of(tokenizer, start, generate(model, start, SAMPLE_TOKENS), STOP_AT_END)
        return run.finish(sample)


if __name__ == "__main__":
    harness.start(globals())
