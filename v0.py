"""v0: the baseline. A bigram model: it predicts the next token from the last one alone.

The whole model is a table. Row i holds the logits of the token after token i; training moves them by gradient descent
on the cross-entropy. The best table is known without training: the logarithms of how often each pair occurs in the
training text, as shares. The script prints both losses, which checks the training loop that all later rungs share.

What is new: everything. The vocabulary has only 500 tokens, to keep the table small.

    python v0.py                                train, evaluate, write a sample: results in runs/v0/
    python v0.py LEARNING_RATE=1 MAX_STEPS=500  set any of the constants below for one run
    python v0.py RESUME=True                    continue from the last checkpoint
    python v0.py PROMPT=" The castle was"       continue a text with the trained model
"""

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
VOCABULARY = "bpe_vocab_500.json"  # file in DATA that holds the tokenizer
BATCH_SIZE = 32  # windows per step
BLOCK_SIZE = 128  # tokens in a window; a bigram sees one of them at a time
MAX_STEPS = 2199  # 1.72 passes over the training split of WikiText-2
EVAL_INTERVAL = 275  # steps between evaluations and checkpoints; at least one per epoch
PATIENCE = 3  # stop early after this many evaluations without improvement
LEARNING_RATE = 0.03
SAMPLE_TOKENS = 200  # length of the sample, or of the continuation of PROMPT
TEMPERATURE = 0.8  # of sampling: below 1 favors likely tokens; 0 takes the likeliest
TOP_K = 0  # sample from this many of the likeliest tokens; 0: from all of them
TOP_P = 1.0  # nucleus sampling: from the fewest likely tokens whose probabilities sum to this
STOP_AT_END = True  # a sample ends where the model ends the text, at <|endoftext|>
SAMPLES = 1  # how many continuations of PROMPT to write
SEED = 1337
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
OUT_DIR = "runs/v0"  # where the results go
RESUME = False  # continue from the last checkpoint in OUT_DIR, if there is one
PROMPT = None  # continue this text with the trained model, instead of training; "-": the text of standard input
# For one GPU: BATCH_SIZE = 512, MAX_STEPS = 140; the table is too small to gain more.

# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


def get_batch(ids, step):
    """Windows at random places: inputs (B, T) and targets (B, T), which are the inputs shifted by one token."""
    if len(ids) <= BLOCK_SIZE:
        raise harness.UserError(f"the training text has {len(ids)} tokens, too few for a window of {BLOCK_SIZE}; lower "
                                f"BLOCK_SIZE to {len(ids) - 1}")
    starts = np.random.default_rng((SEED, step)).integers(len(ids) - BLOCK_SIZE, size=BATCH_SIZE)
    x = torch.stack([ids[i : i + BLOCK_SIZE].long() for i in starts])
    y = torch.stack([ids[i + 1 : i + BLOCK_SIZE + 1].long() for i in starts])
    return x.to(DEVICE), y.to(DEVICE)


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """A table of logits: row i scores the token after token i."""

    def __init__(self, vocab_size):
        super().__init__()
        self.block_size = BLOCK_SIZE  # of the windows that it is evaluated in
        self.table = nn.Parameter(torch.zeros(vocab_size, vocab_size))

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        harness.check_ids(self, idx, targets)
        logits = F.embedding(idx, self.table)  # (B, T, V)
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
    for start in range(0, n, BATCH_SIZE * size):
        x = tokens.ids[start : min(start + BATCH_SIZE * size, n)].long().to(DEVICE)
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


def train(model, tokens, run):
    """Train on tokens["train"]; the weights with the lowest loss on tokens["val"] are kept in the run's folder."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
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
        loss = model(x, y)
        loss.backward()
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
        logits = model(idx[:, -1:])[:, -1]  # (1, V)
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
        trained, optimum = compare_with_counts(model, tokens["train"].ids)
        harness.say(f"loss on the training text: {trained:.4f} nats per token; the best that any table reaches, from "
                    f"the counts: {optimum:.4f} ({100 * (trained / max(optimum, 1e-9) - 1):+.2f}%)")
        torch.manual_seed(SEED)
        start = tokens["train"].start  # of a document
        sample = harness.text_of(tokenizer, start, generate(model, start, SAMPLE_TOKENS), STOP_AT_END)
        return run.finish(sample, train_text_loss=trained, closed_form_loss=optimum)


if __name__ == "__main__":
    harness.start(globals())
