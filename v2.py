"""v2: attention. The first transformer, every step of it written out.

Each token looks at itself and at all tokens before it, and takes a weighted mean of their values: its query is compared
with their keys, and the softmax of these scores gives the weights (Vaswani et al. 2017, "Attention Is All You Need",
arXiv:1706.03762, section 3). The model is the decoder of that paper without its cross-attention: each sub-layer is
followed by a residual connection and LayerNorm. Positions are learned vectors. There is no dropout.

What is new against v1: the model. Of the lesson on memory, v1_1, two things stay: micro-batches and 16-bit ids.

    python v2.py                                train, evaluate, write a sample: results in runs/v2/
    python v2.py N_LAYER=4 N_HEAD=8             set any of the constants below for one run
    python v2.py RESUME=True                    continue from the last checkpoint
    python v2.py PROMPT=" The castle was"       continue a text with the trained model

Other vocabularies: `python data/prepare.py --vocab-size 8192`, then `python v2.py VOCABULARY=bpe_vocab_8192.json`.
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

DATA = "data"  # dataset folder: the tokens and vocabularies of the text
VOCABULARY = "bpe_vocab.json"  # file in DATA that holds the tokenizer
BATCH_SIZE = 16  # windows per step
MICRO_BATCH_SIZE = 8  # windows per forward and backward pass
BLOCK_SIZE = 128  # tokens in a window: the context that attention reaches
MAX_STEPS = 2560  # 1.72 passes over the training split of WikiText-2
EVAL_INTERVAL = 320  # steps between evaluations and checkpoints; at least one per epoch
PATIENCE = 3  # stop early after this many evaluations without improvement
LEARNING_RATE = 1e-3
N_LAYER = 2  # blocks
N_HEAD = 4  # attention heads of a block
N_EMBD = 128  # width: size of the vector that represents a token
SAMPLE_TOKENS = 200  # length of the sample, or of the continuation of PROMPT
TEMPERATURE = 0.8  # of sampling: below 1 favors likely tokens; 0 takes the likeliest
TOP_K = 0  # sample from this many of the likeliest tokens; 0: from all of them
TOP_P = 1.0  # nucleus sampling: from the fewest likely tokens whose probabilities sum to this
STOP_AT_END = True  # a sample ends where the model ends the text, at <|endoftext|>
SAMPLES = 1  # how many continuations of PROMPT to write
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
OUT_DIR = "runs/v2"  # where the results go
RESUME = False  # continue from the last checkpoint in OUT_DIR, if there is one
PROMPT = None  # continue this text with the trained model, instead of training; "-": the text of standard input
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 256, N_LAYER = 6, N_HEAD = 6, N_EMBD = 384,
# LEARNING_RATE = 3e-4, MAX_STEPS = 5000.


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


class Attention(nn.Module):
    """Causal self-attention with N_HEAD heads (Vaswani et al. 2017, equation 1 and section 3.2.2)."""

    def __init__(self):
        super().__init__()
        self.n_head = N_HEAD
        self.qkv = nn.Linear(N_EMBD, 3 * N_EMBD)
        self.proj = nn.Linear(N_EMBD, N_EMBD)
        future = torch.ones(BLOCK_SIZE, BLOCK_SIZE, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)  # [i, j]: j comes after i

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_head)  # (B, H, T, T): query i, key j
        scores = scores.masked_fill(self.future[:T, :T], -math.inf)
        y = scores.softmax(-1) @ v  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # concatenate the heads


class Block(nn.Module):
    """Attention, then a small MLP for each token separately; after each, residual connection and LayerNorm."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(N_EMBD)
        self.attention = Attention()
        self.norm_2 = nn.LayerNorm(N_EMBD)
        self.mlp = nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD), nn.ReLU(), nn.Linear(4 * N_EMBD, N_EMBD))

    def forward(self, x):
        x = self.norm_1(x + self.attention(x))  # (B, T, C)
        return self.norm_2(x + self.mlp(x))


class LanguageModel(nn.Module):
    """Token and position embeddings, N_LAYER blocks, and a linear layer to the logits."""

    def __init__(self, vocab_size):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise harness.UserError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}: the heads share the width")
        self.block_size = BLOCK_SIZE
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.head = nn.Linear(N_EMBD, vocab_size)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        harness.check_ids(self, idx, targets)
        x = self.embedding(idx) + self.position_embedding.weight[: idx.size(1)]  # (B, T, C)
        logits = self.head(self.blocks(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
    with harness.Run(globals()) as run:
        tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY, DATA))
        tokens = load_tokens(VOCABULARY, DATA)
        torch.manual_seed(SEED)
        model = LanguageModel(tokenizer.vocab_size).to(DEVICE)
        run.begin(model, tokens)
        train(model, tokens, run)

        run.load_best(model)
        torch.manual_seed(SEED)
        start = tokens["train"].start  # of a document
        sample = harness.text_of(tokenizer, start, generate(model, start, SAMPLE_TOKENS), STOP_AT_END)
        return run.finish(sample)


if __name__ == "__main__":
    harness.start(globals())
