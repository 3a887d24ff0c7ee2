"""v3: GPT-2, trained with care. A deeper model, regularization, a schedule, metrics, several devices.

The model is GPT-2 (Radford et al. 2019): LayerNorm before each sub-layer and once more at the end, GELU, and the
embedding used again as the last layer. What it starts from, and how it is trained, is tuned for a text that is read
twice. What is new against v2:

- model: more layers, pre-norm, dropout, no last layer of its own;
- start: small embeddings, positions as sinusoids, branches that add nothing;
- optimizer: AdamW with weight decay for matrices only, warm-up and cool-down, gradient clipping;
- speed: bfloat16 where the hardware is faster with it, torch.compile, fused attention, several devices;
- evaluation: windows that overlap, top-1 and top-5 accuracy, expected calibration error, the test split;
- INIT_FROM starts from the weights of another run: fine-tuning.

    python v3.py                                train, evaluate, write a sample: results in runs/v3/
    python v3.py DROPOUT=0.1 MAX_STEPS=2000     set any of the constants below for one run
    python v3.py RESUME=True                    continue from the last checkpoint
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

import kernels
from bpe_tokenizer import BPETokenizer
from data import load_tokens, vocabulary_file

# ----------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------

DATA = "data"  # dataset folder: the tokens and vocabularies of the text
VOCABULARY = "bpe_vocab.json"  # file in DATA that holds the tokenizer
BATCH_SIZE = 8  # windows per step
MICRO_BATCH_SIZE = 8  # windows per forward and backward pass
BLOCK_SIZE = 256  # tokens in a window: the context that attention reaches
MAX_STEPS = 2560  # 1.72 passes over the training split of WikiText-2
EVAL_INTERVAL = 320  # steps between evaluations and checkpoints; at least one per epoch
PATIENCE = 3  # stop early after this many evaluations without improvement
LEARNING_RATE = 1.4e-3  # peak; it ends at zero
WARMUP_STEPS = 200  # steps in which the learning rate rises to its peak
COOLDOWN = 0.5  # fraction of the steps, at the end, in which the learning rate falls
WEIGHT_DECAY = 0.1  # of matrices and embeddings
GRAD_CLIP = 1.0  # largest norm of the gradient; 0 for no clipping
N_LAYER = 4  # blocks
N_HEAD = 4  # attention heads of a block
N_EMBD = 256  # width: size of the vector that represents a token
DROPOUT = 0.0  # fraction of activations set to zero in training, against overfitting
STRIDE = 128  # tokens from one window to the next in the last evaluation, where windows overlap
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
OUT_DIR = "runs/v3"  # where the results go
RESUME = False  # continue from the last checkpoint in OUT_DIR, if there is one
INIT_FROM = None  # fine-tuning: folder of the run whose weights to start from
PROMPT = None  # continue this text with the trained model, instead of training; "-": the text of standard input
# For one GPU: BATCH_SIZE = 64, MICRO_BATCH_SIZE = 64, BLOCK_SIZE = 512, N_LAYER = 12, N_HEAD = 12, N_EMBD = 768,
# DROPOUT = 0.1, MAX_STEPS = 20_000, EVAL_INTERVAL = 2000, LEARNING_RATE = 6e-4, and WikiText-103 (python
# data/prepare.py --dataset wikitext-103-v1).


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
        y = kernels.attention(q, k, v)  # F.scaled_dot_product_attention(q, k, v, is_causal=True): (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # concatenate the heads


class Block(nn.Module):
    """Attention, then a small MLP for each token separately; LayerNorm before each, residual connection around."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(N_EMBD)
        self.attention = Attention()
        self.norm_2 = nn.LayerNorm(N_EMBD)
        gelu = kernels.GELU()  # nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD), gelu, nn.Linear(4 * N_EMBD, N_EMBD))
        self.dropout = kernels.Dropout(DROPOUT)  # nn.Dropout(DROPOUT)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm_1(x)))  # (B, T, C)
        return x + self.dropout(self.mlp(self.norm_2(x)))


class LanguageModel(nn.Module):
    """Token and position embeddings, N_LAYER blocks, and the token embeddings again, to the logits."""

    def __init__(self, vocab_size):
        super().__init__()
        if N_EMBD % N_HEAD:
            raise harness.UserError(f"N_EMBD={N_EMBD} must be a multiple of N_HEAD={N_HEAD}: the heads share the width")
        self.block_size = BLOCK_SIZE
        self.embedding = nn.Embedding(vocab_size, N_EMBD)
        self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.dropout = kernels.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.norm = nn.LayerNorm(N_EMBD)
        for name, p in self.named_parameters():
            if name.endswith(("bias", "proj.weight", "mlp.2.weight")):
                nn.init.zeros_(p)  # at the start every branch adds nothing
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        angles = torch.arange(BLOCK_SIZE)[:, None] * 1e4 ** (-torch.arange(0, N_EMBD, 2) / N_EMBD)
        waves = torch.cat([angles.sin(), angles.cos()], -1)[:, :N_EMBD]  # (T, C), Vaswani et al. 2017, section 3.5
        self.position_embedding.weight.data.copy_(0.02 * math.sqrt(2) * waves)  # of the size of the tokens

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of the token after each of `idx` (B, T); with `targets` (B, T) the mean loss in nats."""
        harness.check_ids(self, idx, targets)
        x = self.embedding(idx) + self.position_embedding.weight[: idx.size(1)]  # (B, T, C)
        x = self.norm(self.blocks(self.dropout(x)))
        logits = kernels.linear(x, self.embedding.weight).float()  # x @ self.embedding.weight.T: (B, T, V)
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


def make_optimizer(model):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); biases and LayerNorms do not decay. The second moment is a
    mean over many steps, since a step has few tokens (Marek et al. 2025, arXiv:2507.07101)."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), fused=True)


def lr_factor(step):
    """Learning rate of a step as a share of the highest: linear warm-up, constant, linear down to zero."""
    return min(1, (step + 1) / max(1, WARMUP_STEPS), (MAX_STEPS - step) / max(1, COOLDOWN * MAX_STEPS))


def train(model, tokens, run):
    """Train on tokens["train"]; the weights with the lowest loss on tokens["val"] are kept in the run's folder."""
    optimizer = make_optimizer(model)
    state = run.resume(model, optimizer)  # step, best loss, evaluations without improvement
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
        harness.seed(SEED, step, harness.rank())  # a resumed run draws the same random numbers
        loss, done = 0.0, 0
        for micro_x, micro_y in zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE)):
            done += len(micro_x)
            with harness.sync_gradients(compiled, now=done == len(x)):
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
    kernels.keep_freed_memory()
    with harness.Run(globals()) as run:
        tokenizer = BPETokenizer.load(vocabulary_file(VOCABULARY, DATA))
        tokens = load_tokens(VOCABULARY, DATA)
        torch.manual_seed(SEED)
        model = LanguageModel(tokenizer.vocab_size).to("cpu" if SHARD else DEVICE)
        run.begin(model, tokens)
        if INIT_FROM is not None:
            run.init_from(INIT_FROM)
        train(model, tokens, run)

        run.load_best(model)
        sliding = {f"val_{k}_sliding": v for k, v in evaluate(model, tokens["val"], STRIDE).items()}
        test = {f"test_{k}": v for k, v in evaluate(model, tokens["test"]).items()}
        torch.manual_seed(SEED)
        start = tokens["train"].start  # of a document
        sample = harness.text_of(tokenizer, start, generate(model, start, SAMPLE_TOKENS), STOP_AT_END)
        return run.finish(sample, **sliding, **test)


if __name__ == "__main__":
    harness.start(globals())
