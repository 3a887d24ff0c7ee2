"""What several files of tests share: small constants for the rungs, models and texts, and a short training."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
from data import Tokens

ROOT = Path(__file__).resolve().parents[1]
RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v3_1", "v4_alibi_rope")
V4 = "v4_alibi_rope"
LATE_RUNGS = ("v3", "v3_1", V4)  # they compile, use bfloat16, and train in several processes
MODERN = ("v3_1", V4)  # they have the modern block and Muon
SCHEMES = ("alibi", "rope", "sinusoidal", "none")
MODELS = [(name, "alibi") for name in RUNGS[:-1]] + [(V4, scheme) for scheme in SCHEMES]
COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))
SMALL_VOCABULARY = "bpe_vocab_500.json"

COMMON = {
    "DEVICE": "cpu", "BATCH_SIZE": 8, "BLOCK_SIZE": 32, "MAX_STEPS": 16, "EVAL_INTERVAL": 8, "SAMPLE_TOKENS": 8,
    "VOCABULARY": SMALL_VOCABULARY,
}  # fmt: skip
MLP = {"CONTEXT_SIZE": 4, "N_EMBD": 16, "N_HIDDEN": 32}
TRANSFORMER = {"N_LAYER": 2, "N_HEAD": 2, "N_EMBD": 32, "MICRO_BATCH_SIZE": 4}
LATE = {**TRANSFORMER, "COMPILE": False, "DTYPE": "float32", "WARMUP_STEPS": 4, "STRIDE": 16, "DROPOUT": 0.0}
SMALL = {
    "v0": {},
    "v1": MLP,
    "v1_1": {**MLP, "MICRO_BATCH_SIZE": 4, "CHUNK_SIZE": 50},
    "v2": TRANSFORMER,
    "v3": LATE,
    "v3_1": LATE,
    V4: {**LATE, "POSITION": "alibi", "EXTRAPOLATION": (1, 2)},
}
# Of all trainings that are compiled: another shape costs half a minute, and what is compiled is kept. At this one two
# threads share the products of matrices and the additions of a gradient.
COMPILED = {
    "COMPILE": True, "DTYPE": "bfloat16", "BATCH_SIZE": 16, "MICRO_BATCH_SIZE": 16, "BLOCK_SIZE": 128, "N_LAYER": 1,
    "N_HEAD": 2, "N_EMBD": 64, "DROPOUT": 0.1,
}  # fmt: skip


def make_model(module, vocab_size, position="alibi"):
    with harness.override(vars(module), **({"POSITION": position} if module.__name__ == V4 else {})):
        return module.LanguageModel(vocab_size)


def randomize(model, std=0.5):
    """Random values for all parameters: those that start at zero would hide what they are multiplied with."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * std)
    return model


def random_model(module, vocab_size, position="alibi", std=0.5):
    return randomize(make_model(module, vocab_size, position), std).eval()


def as_gpt2(model, n_head):
    """A model of v3 as Hugging Face's GPT-2, with a copy of its weights: an implementation with no line in common."""
    transformers = pytest.importorskip("transformers")
    vocab_size, width = model.embedding.weight.shape
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=model.block_size, n_embd=width, n_layer=len(model.blocks), n_head=n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
    names = {"transformer.wte": model.embedding, "transformer.wpe": model.position_embedding,
             "transformer.ln_f": model.norm}  # fmt: skip
    for i, block in enumerate(model.blocks):
        names |= {f"transformer.h.{i}.{name}": part for name, part in {
            "ln_1": block.norm_1, "attn.c_attn": block.attention.qkv, "attn.c_proj": block.attention.proj,
            "ln_2": block.norm_2, "mlp.c_fc": block.mlp[0], "mlp.c_proj": block.mlp[2],
        }.items()}  # fmt: skip
    weights = {f"{name}.{k}": v for name, part in names.items() for k, v in part.state_dict().items()}
    transposed = {k: v.T for k, v in weights.items() if ".c_" in k and k.endswith("weight")}  # layers within blocks
    theirs.load_state_dict({**weights, **transposed, "lm_head.weight": weights["transformer.wte.weight"]})
    return theirs.eval()


def published_slopes(n):
    """As in the code of ALiBi's authors: a geometric sequence for powers of two, else two sequences put together."""
    power = 2 ** math.floor(math.log2(n))
    if power == n:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    return published_slopes(power) + published_slopes(2 * power)[0::2][: n - power]


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def inputs(*shape, seed=5, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_ids(*shape, vocab_size=50, seed=3):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def tiny_tokens(n, vocab_size, seed=0):
    ids = random_ids(n, vocab_size=vocab_size, seed=seed).to(torch.uint16)
    return Tokens(ids, n_bytes=3 * n + 1, n_words=n // 2 + 1, dataset="tiny", fingerprint="none", start=[1])


def short_tokens(module, n_val=600):
    """The splits of the rung's text, with the validation split cut to `n_val` tokens."""
    tokens = module.load_tokens(module.VOCABULARY)
    val = tokens["val"]
    tokens["val"] = Tokens(val.ids[:n_val], val.n_bytes * n_val // len(val), val.n_words * n_val // len(val), "sample",
                           val.fingerprint, val.start)  # fmt: skip
    return tokens


def train(module, position="alibi", tokens=None, model=None):
    """What a rung's main() does until the training is over: (records of the evaluations, model with its last weights,
    tokens). `tokens`: by default the rung's text with a short validation split. `model`: by default the one that the
    rung makes. The files are in OUT_DIR, those of v4 too."""
    tokenizer = module.BPETokenizer.load(module.vocabulary_file(module.VOCABULARY))
    tokens = tokens or short_tokens(module)
    with harness.Run(vars(module)) as run:
        torch.manual_seed(module.SEED)
        model = model or make_model(module, tokenizer.vocab_size, position).to(module.DEVICE)
        run.begin(model, tokens)
        module.train(model, tokens, run)
    return run.records, model, tokens


def kept_weights(module, folder=""):
    """The weights in model.pt of OUT_DIR, or of a `folder` below it."""
    return torch.load(Path(module.OUT_DIR) / folder / "model.pt", weights_only=True)["model"]


def without_clock(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def losses(records):
    """Training and validation losses, (evaluations, 2)."""
    return np.array([[record["train_loss"], record["val_loss"]] for record in records])


def same_weights(a, b):
    """Whether two state dicts hold the same values, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
