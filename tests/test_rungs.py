"""Tests of the six rungs: training, metrics, models against independent implementations, checkpoints, arguments."""

import importlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import prepare
from data.prepare import Tokens

ROOT = Path(__file__).resolve().parents[1]
RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v4_alibi_rope")
SHUFFLED = RUNGS[1:]  # their batches are the shuffled windows of an epoch
ACCUMULATING = ("v1_1", "v3", "v4_alibi_rope")
RESUMABLE = ("v3", "v4_alibi_rope")
SCHEMES = ("alibi", "rope", "learned", "sinusoidal", "none")
V4 = "v4_alibi_rope"
SMALL_VOCABULARY = "bpe_vocab_500.json"

COMMON = {
    "DEVICE": "cpu", "BATCH_SIZE": 8, "BLOCK_SIZE": 32, "MAX_STEPS": 16, "EVAL_INTERVAL": 8, "SAMPLE_TOKENS": 8,
    "VOCABULARY": SMALL_VOCABULARY,
}  # fmt: skip
TRANSFORMER = {"N_LAYER": 2, "N_HEAD": 2, "N_EMBD": 32, "MICRO_BATCH_SIZE": 4}
LATE = {**TRANSFORMER, "COMPILE": False, "DTYPE": "float32", "WARMUP_STEPS": 4, "STRIDE": 16, "DROPOUT": 0.0}
SMALL = {
    "v0": {},
    "v1": {"CONTEXT_SIZE": 4, "N_EMBD": 16, "N_HIDDEN": 32},
    "v1_1": {"CONTEXT_SIZE": 4, "N_EMBD": 16, "N_HIDDEN": 32, "MICRO_BATCH_SIZE": 4, "CHUNK_SIZE": 50},
    "v2": {**TRANSFORMER, "CHUNK_SIZE": 50},
    "v3": LATE,
    V4: {**LATE, "POSITION": "alibi", "EXTRAPOLATION": (1, 2)},
}
CONTRACT = {
    "rung", "dataset", "tokenizer", "seed", "device", "dtype", "n_params", "steps", "tokens_seen", "bytes_seen",
    "train_seconds", "tokens_per_second", "peak_memory_mb", "val_loss", "val_bpb", "val_word_ppl", "hyperparameters",
}  # fmt: skip
LOG_KEYS = {"step", "tokens_seen", "seconds", "train_loss", "val_loss", "val_bpb", "val_word_ppl"}


# ----------------------------------------------------------------------------------------------------------
# Fixtures and helpers
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder of its own: the vocabularies, and the sample with short articles in the held-out splits."""
    folder = tmp_path_factory.mktemp("data")
    for name in prepare.VOCABULARIES:
        shutil.copy(ROOT / "data" / name, folder)
    text = (ROOT / "data" / "input.txt").read_text(encoding="utf-8")
    articles = [article for article in re.split(r"(?m)(?=^ \n = [^=])", text) if article]
    for i in range(5, len(articles), 6):
        articles[i] = articles[i][:2500] + "\n"
    (folder / "input.txt").write_text("".join(articles), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DATA_DIR", folder)
        patch.setattr(prepare, "SAMPLE", folder / "input.txt")
        prepare.prepare(*prepare.open_source(sample=True))
    return folder


@pytest.fixture
def load(monkeypatch, tmp_path, data_dir):
    """load(name, CONSTANT=value, ...): a rung with small constants; all are put back after the test."""
    monkeypatch.setattr(prepare, "DATA_DIR", data_dir)
    monkeypatch.setattr(prepare, "SAMPLE", data_dir / "input.txt")

    def load(name, **constants):
        module = importlib.import_module(name)
        for constant, value in module.constants().items():
            monkeypatch.setattr(module, constant, value)  # remembers it, also where the rung itself changes it
        for constant, value in {"OUT_DIR": str(tmp_path / name), **COMMON, **SMALL[name], **constants}.items():
            monkeypatch.setattr(module, constant, value)
        return module

    return load


def make_model(module, vocab_size, position="alibi"):
    return module.LanguageModel(vocab_size, *([position] if module.RUNG == V4 else []))


def randomize(model, std=0.5):
    """Random values for all parameters: those that start at zero would hide what they are multiplied with."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * std)
    return model


def random_model(module, vocab_size, position="alibi"):
    return randomize(make_model(module, vocab_size, position)).eval()


def tiny_tokens(n, vocab_size, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (n,), generator=random).to(torch.uint16)
    return Tokens(ids, n_bytes=3 * n + 1, n_words=n // 2 + 1, dataset="tiny", fingerprint="none")


def train(module, position="alibi", n_val=600):
    """What a rung's main() does until the training is over, with a short validation text: (log, model, tokens)."""
    Path(module.OUT_DIR).mkdir(parents=True, exist_ok=True)
    tokenizer = module.BPETokenizer.load(module.vocabulary_file(module.VOCABULARY))
    tokens = module.load_tokens(module.VOCABULARY)
    val = tokens["val"]
    tokens["val"] = Tokens(val.ids[:n_val], val.n_bytes * n_val // len(val), val.n_words * n_val // len(val), "sample",
                           val.fingerprint)  # fmt: skip
    torch.manual_seed(module.SEED)
    model = make_model(module, tokenizer.vocab_size, position)
    return module.train(model, tokens), model, tokens


def kept_weights(module):
    saved = torch.load(Path(module.OUT_DIR) / "model.pt", weights_only=True)
    return saved["model"] if module.RUNG in RESUMABLE else saved


def without_clock(log):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log]


def losses(log):
    return np.array([[line["train_loss"], line["val_loss"]] for line in log[1:]])


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupt_at(monkeypatch, module, at, nth=1):
    """Ctrl-C when batch number `at` is asked for the `nth` time. Returns the function that ends this again."""
    get_batch, asked = module.get_batch, []

    def interrupted(ids, step):
        if step == at:
            asked.append(step)
            if len(asked) == nth:
                raise KeyboardInterrupt
        return get_batch(ids, step)

    monkeypatch.setattr(module, "get_batch", interrupted)
    return lambda: monkeypatch.setattr(module, "get_batch", get_batch)


def count_parameters(module, vocab_size):
    """By hand, from the shapes that the papers give."""
    V, get = vocab_size, vars(module).get
    C, H, L, T = get("N_EMBD"), get("N_HIDDEN"), get("N_LAYER"), module.BLOCK_SIZE
    if module.RUNG == "v0":
        return V * V
    if module.RUNG in ("v1", "v1_1"):
        return V * C + (module.CONTEXT_SIZE * C + 1) * H + (H + 1) * V
    if module.RUNG == V4:  # no biases, no weights in norms, no position table
        return 2 * V * C + 12 * L * C * C
    attention, mlp, norms = 4 * C * C + 4 * C, 8 * C * C + 5 * C, 4 * C
    return 2 * V * C + T * C + L * (attention + mlp + norms) + (V if module.RUNG == "v2" else 2 * C)


# ----------------------------------------------------------------------------------------------------------
# Training, for every rung
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_a_short_run_learns_and_writes_its_results(name, load, data_dir):
    module = load(name, VOCABULARY="bpe_vocab.json" if name in RESUMABLE else SMALL_VOCABULARY)
    summary = module.main()
    top = Path(module.OUT_DIR)
    out = top / "alibi" if name == V4 else top
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    assert [line["step"] for line in log] == [0, 8, 16]
    assert all(LOG_KEYS <= line.keys() for line in log)
    assert log[-1]["val_loss"] < log[0]["val_loss"]
    assert log[-1]["train_loss"] < log[1]["train_loss"]
    assert [line["tokens_seen"] for line in log] == [0, 8 * 8 * 32, 16 * 8 * 32]

    assert CONTRACT <= summary.keys()
    assert json.loads((top / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["rung"] == name
    assert summary["dataset"] == "sample"
    assert summary["tokenizer"] == module.VOCABULARY
    assert (summary["seed"], summary["device"], summary["dtype"]) == (1337, "cpu", "float32")
    assert summary["n_params"] == count_parameters(module, prepare.VOCABULARIES[module.VOCABULARY])
    assert (summary["steps"], summary["tokens_seen"]) == (16, 16 * 8 * 32)
    assert summary["train_seconds"] > 0
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens_seen"] / summary["train_seconds"])
    assert summary["peak_memory_mb"] > 0
    assert summary["hyperparameters"]["MAX_STEPS"] == 16
    assert summary["hyperparameters"] == module.constants()

    val, seen = ("".join(prepare.sample_source()[split][1]()) for split in ("val", "train"))
    tokens = module.load_tokens(module.VOCABULARY)
    nats = summary["val_loss"] * (len(tokens["val"]) - 1)
    assert summary["val_loss"] == min(line["val_loss"] for line in log)
    assert summary["val_bpb"] == pytest.approx(nats / math.log(2) / len(val.encode()), rel=1e-9)
    assert summary["val_word_ppl"] == pytest.approx(math.exp(nats / (len(val.split()) + val.count("\n"))), rel=1e-9)
    bytes_per_token = len(seen.encode()) / len(tokens["train"])
    assert summary["bytes_seen"] == pytest.approx(summary["tokens_seen"] * bytes_per_token, abs=1)

    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (out / "sample.txt").read_text(encoding="utf-8").startswith(" \n =")
    assert (out / "model.pt").is_file()
    assert not list(top.rglob("writing-*"))


@pytest.mark.parametrize("name", RUNGS)
def test_the_seed_decides_the_losses(name, load):
    module = load(name, MAX_STEPS=6, EVAL_INTERVAL=3)
    first, again = (without_clock(train(module)[0]) for _ in range(2))
    assert first == again
    other = without_clock(train(load(name, MAX_STEPS=6, EVAL_INTERVAL=3, SEED=1))[0])
    assert other[-1]["val_loss"] != first[-1]["val_loss"]


@pytest.mark.parametrize("name", RUNGS)
def test_early_stop_keeps_the_best_model(name, load):
    """A learning rate at which the loss falls at first is followed by one at which it rises."""
    module = load(name, PATIENCE=2, MAX_STEPS=500, EVAL_INTERVAL=2, LEARNING_RATE=0.3)
    if name == V4:
        module.LEARNING_RATE, module.LEARNING_RATE_ADAMW = 3.0, 1.0
    if name == "v0":
        module.LEARNING_RATE = 10.0
    log, model, tokens = train(module)
    values = [line["val_loss"] for line in log]
    best = int(np.argmin(values))
    assert log[-1]["step"] < 500
    assert len(values) == best + 1 + 2  # two evaluations without a better one
    model.load_state_dict(kept_weights(module))
    assert module.evaluate(model, tokens["val"])["val_loss"] == pytest.approx(values[best], rel=1e-6)


@pytest.mark.parametrize("name", [name for name in RUNGS if name != "v3"])  # whose loss is not finite: an error
def test_a_diverged_training_ends_early_and_without_an_error(name, load):
    """A word perplexity that no float can hold is no reason to lose a run."""
    module = load(name, PATIENCE=1, MAX_STEPS=500, EVAL_INTERVAL=5, LEARNING_RATE=1e4)
    if name == V4:
        module.LEARNING_RATE_ADAMW = 1e4
    log = train(module)[0]
    assert log[-1]["step"] < 500
    assert np.nanargmin([line["val_loss"] for line in log]) == len(log) - 2


# ----------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_unknown_constants_are_refused_with_the_known_names(name, load):
    module = load(name)
    for argument in ("NOSUCH=1", "batch_size=1", "RUNG=x", "Path=1", "=1", ""):
        with pytest.raises(ValueError, match="BATCH_SIZE, .*BLOCK_SIZE, .*OUT_DIR") as error:
            module.set_constants([argument])
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["1.5", "True", "'4'", "four", "", "None", "[4]", "4 4", "{[]: 1}", "f(1)"])
@pytest.mark.parametrize("name", RUNGS)
def test_values_of_the_wrong_type_are_refused(name, value, load):
    module = load(name)
    with pytest.raises(ValueError, match="BATCH_SIZE must be of type int"):
        module.set_constants([f"BATCH_SIZE={value}"])
    assert module.BATCH_SIZE == COMMON["BATCH_SIZE"]


@pytest.mark.parametrize("name", RUNGS)
def test_constants_can_be_set(name, load):
    module = load(name)
    module.set_constants(["BATCH_SIZE=3", "LEARNING_RATE=1", "OUT_DIR='a=b'", "SEED=-5"])
    assert (module.BATCH_SIZE, module.SEED) == (3, -5)
    assert module.LEARNING_RATE == 1.0
    assert type(module.LEARNING_RATE) is float
    assert module.OUT_DIR == "'a=b'"  # strings are taken as they stand, quotes included
    assert module.constants()["OUT_DIR"] == "'a=b'"
    module.set_constants(["LEARNING_RATE=2e-3"])
    assert module.LEARNING_RATE == 0.002


@pytest.mark.parametrize("name", RESUMABLE)
def test_flags_and_the_prompt(name, load):
    module = load(name)
    module.set_constants(["RESUME=True", "PROMPT=12 = 3 * 4"])
    assert module.RESUME is True
    assert module.PROMPT == "12 = 3 * 4"
    with pytest.raises(ValueError, match="RESUME must be of type bool"):
        module.set_constants(["RESUME=1"])


def test_the_command_line_says_in_one_line_what_is_wrong():
    done = subprocess.run([sys.executable, "v0.py", "NOSUCH=1"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert "NOSUCH" in lines[0]
    assert all(name in lines[0] for name in ("VOCABULARY", "BATCH_SIZE", "LEARNING_RATE", "OUT_DIR"))


@pytest.mark.parametrize("name", ("v2", "v3", V4))
def test_a_width_that_the_heads_cannot_share_is_refused(name, load):
    module = load(name, N_EMBD=32, N_HEAD=3)
    with pytest.raises(ValueError, match="N_EMBD=32 .*N_HEAD=3"):
        make_model(module, 50)


def test_rope_refuses_an_odd_dimension(load):
    module = load(V4, N_EMBD=15, N_HEAD=3)
    with pytest.raises(ValueError, match="even"):
        make_model(module, 50, "rope")
    make_model(module, 50, "alibi")


IMPOSSIBLE = [  # constants, and what the error says of them
    ("BATCH_SIZE=0", "BATCH_SIZE=0 must be 1 or more"), ("MAX_STEPS=-5", "MAX_STEPS=-5 must be 1 or more"),
    ("BLOCK_SIZE=0", "BLOCK_SIZE=0 must be 1 or more"), ("LEARNING_RATE=-0.1", "must not be negative or above 1e38"),
    ("LEARNING_RATE=1e999", "must not be negative or above 1e38"), ("DROPOUT=1.5", "DROPOUT=1.5 must be less than 1"),
    ("DROPOUT=-0.1", "DROPOUT=-0.1 must not be negative"), ("MOMENTUM=1.0", "MOMENTUM=1.0 must be less than 1"),
    ("TEMPERATURE=0.0", "TEMPERATURE=0.0 must be 0.0001 or more"),
    ("ROPE_BASE=1.0", "ROPE_BASE=1.0 must be more than 1"),
    ("DEVICE=toaster", "DEVICE=toaster cannot be used here"), ("DEVICE=cuda:99", "DEVICE=cuda:99 cannot be used here"),
    ("DEVICE=meta", "DEVICE=meta cannot be used here"), ("LEARNING_RATE=1e300", "must not be negative or above 1e38"),
    ("BLOCK_SIZE=200000", "tokens, too few for a "), ("VOCABULARY=none.json", "none.json"),
    ("SEED=99999999999", "SEED=99999999999 must be less than 2**31"),
]  # fmt: skip
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in RUNGS}


@pytest.mark.parametrize(("name", "argument", "message"), [
    (name, *case) for name in RUNGS for case in IMPOSSIBLE if f"\n{case[0].partition('=')[0]} = " in SOURCES[name]
    and (name, case[0]) != ("v2", "BLOCK_SIZE=200000")  # there the mask of attention does not fit into the memory
])  # fmt: skip
def test_impossible_constants_are_refused_in_one_line(name, argument, message, load):
    module = load(name)
    module.set_constants([argument])
    with pytest.raises((ValueError, OSError)) as error:
        module.main()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", RESUMABLE)
def test_an_unknown_dtype_is_refused(name, load):
    with pytest.raises(ValueError, match="float16"):
        load(name, DTYPE="float16").pick_dtype()


# ----------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------


def epoch(module, ids, number):
    n_batches = (len(ids) - module.BLOCK_SIZE) // (module.BATCH_SIZE * module.BLOCK_SIZE)
    return [module.get_batch(ids, number * n_batches + k) for k in range(n_batches)]


@pytest.mark.parametrize("name", SHUFFLED)
@pytest.mark.parametrize("n", [1000, 1001, 1039, 40])
def test_every_window_of_an_epoch_comes_once(name, n, load):
    module = load(name, BATCH_SIZE=4, BLOCK_SIZE=8)
    ids = torch.arange(n).to(torch.uint16)  # so that a token says where it stands
    x = torch.cat([x for x, _ in epoch(module, ids, 0)])
    starts = sorted(x[:, 0].tolist())
    assert torch.equal(x, x[:, :1] + torch.arange(8))
    assert starts == list(range(starts[0], starts[0] + 8 * len(x), 8))
    assert starts[0] < 8
    assert n - 8 * len(x) <= 8 + 4 * 8  # what is left out is less than a batch and a window


@pytest.mark.parametrize("name", RUNGS)
def test_targets_are_the_next_tokens(name, load):
    module = load(name, BATCH_SIZE=4, BLOCK_SIZE=8)
    ids = torch.arange(500).to(torch.uint16)
    for step in range(40):
        x, y = module.get_batch(ids, step)
        assert x.shape == y.shape == (4, 8)
        assert torch.equal(y, x + 1)


@pytest.mark.parametrize("name", SHUFFLED)
def test_epochs_differ(name, load):
    module = load(name, BATCH_SIZE=4, BLOCK_SIZE=8)
    ids = torch.arange(1000).to(torch.uint16)
    orders = {tuple(torch.cat([x[:, 0] // 8 for x, _ in epoch(module, ids, k)]).tolist()) for k in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("name", RUNGS)
def test_a_batch_does_not_depend_on_those_before(name, load):
    module = load(name, BATCH_SIZE=4, BLOCK_SIZE=8)
    ids = torch.arange(300).to(torch.uint16)
    forwards = {step: module.get_batch(ids, step)[0] for step in range(20)}
    torch.rand(3)  # nor on the global random numbers
    for step in reversed(range(20)):
        assert torch.equal(module.get_batch(ids, step)[0], forwards[step])


@pytest.mark.parametrize("name", SHUFFLED)
def test_a_text_that_is_too_short_is_refused(name, load):
    module = load(name, BATCH_SIZE=4, BLOCK_SIZE=8)
    for n in (2, 8, 39):
        with pytest.raises(ValueError, match="too few"):
            module.get_batch(torch.zeros(n, dtype=torch.uint16), 0)


# ----------------------------------------------------------------------------------------------------------
# Causality
# ----------------------------------------------------------------------------------------------------------


MODELS = [(name, "alibi") for name in RUNGS[:-1]] + [(V4, scheme) for scheme in SCHEMES]


@pytest.mark.parametrize(("name", "position"), MODELS)
@torch.no_grad()
def test_tokens_that_come_later_have_no_influence(name, position, load):
    module = load(name)
    model = random_model(module, 50, position)
    x = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(3))
    logits = model(x)
    assert logits.shape == (2, 32, 50)
    for t in (0, 1, 13, 30):
        later = x.clone()
        later[:, t + 1 :] = (x[:, t + 1 :] + 1 + torch.arange(31 - t)) % 50
        torch.testing.assert_close(model(later)[:, : t + 1], logits[:, : t + 1], rtol=1e-5, atol=1e-5)
        now = x.clone()
        now[:, t] = (x[:, t] + 1) % 50
        assert (model(now)[:, t] - logits[:, t]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ("v1", "v1_1"))
@torch.no_grad()
def test_the_context_of_the_mlp_has_context_size_tokens(name, load):
    module = load(name, CONTEXT_SIZE=5)
    model = random_model(module, 50)
    x = torch.randint(50, (1, 32), generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[0, 10] = (x[0, 10] + 1) % 50
    differs = ((model(changed) - model(x)).abs().amax(-1)[0] > 1e-6).nonzero().flatten()
    assert differs.tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("position", [s for s in SCHEMES if s != "none"])
@torch.no_grad()
def test_the_schemes_know_the_order_of_tokens(position, load):
    """Swapping two earlier tokens moves the last logits; without positions it cannot, in the first layer."""
    module = load(V4, N_LAYER=1)
    x = torch.arange(20)[None] * 7 % 50
    swapped = x.clone()
    swapped[0, [3, 9]] = x[0, [9, 3]]
    for scheme, moves in ((position, True), ("none", False)):
        model = randomize(make_model(module, 50, scheme), std=0.2).eval()
        distance = (model(swapped)[0, -1] - model(x)[0, -1]).abs().max()
        assert (distance > 1e-3) == moves


# ----------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------


def inputs(B, T, C, seed=5):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ("v2", "v3"))
@pytest.mark.parametrize("n_head", [1, 2, 8])
@torch.no_grad()
def test_attention_is_that_of_torch(name, n_head, load):
    module = load(name, N_HEAD=n_head)
    ours = randomize(module.Attention())
    theirs = nn.MultiheadAttention(32, n_head, batch_first=True)
    theirs.in_proj_weight.copy_(ours.qkv.weight)
    theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    for T in (1, 7, 32):
        x = inputs(3, T, 32)
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_fused_attention_is_the_manual_one(load):
    manual, fused = load("v2").Attention(), load("v3").Attention()
    fused.load_state_dict(randomize(manual).state_dict())
    x = inputs(2, 32, 32)
    torch.testing.assert_close(fused(x), manual(x), rtol=1e-4, atol=1e-4)


def naive_attention(attention, x, n_head, slopes):
    """v4's attention in float64, one query and one key at a time; `slopes` of ALiBi, zeros for none."""
    x = x.double().numpy()
    B, T, C = x.shape
    D = C // n_head
    w_qkv, w_out = (w.weight.detach().double().numpy() for w in (attention.qkv, attention.out))
    q, k, v = np.split(x @ w_qkv.T, 3, axis=-1)
    y = np.zeros((B, T, C))
    for b, head, i in itertools.product(range(B), range(n_head), range(T)):
        part = slice(head * D, (head + 1) * D)
        scores = np.array([
            q[b, i, part] @ k[b, j, part] / math.sqrt(D) + slopes[head] * (j - i) for j in range(i + 1)
        ])  # fmt: skip
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        y[b, i, part] = sum(w * v[b, j, part] for j, w in enumerate(weights))
    return torch.from_numpy(y @ w_out.T).float()


@pytest.mark.parametrize("n_head", [1, 4, 6])
@torch.no_grad()
def test_attention_without_positions_is_a_plain_loop(n_head, load):
    module = load(V4, N_EMBD=24, N_HEAD=n_head)
    attention, x = randomize(module.Attention("none", 0)), inputs(2, 20, 24)
    expected = naive_attention(attention, x, n_head, [0.0] * n_head)
    torch.testing.assert_close(attention(x, None, None), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------
# ALiBi
# ----------------------------------------------------------------------------------------------------------


def published_slopes(n):
    """As in the authors' code: a geometric sequence for powers of two, else two sequences put together."""
    power = 2 ** math.floor(math.log2(n))
    if power == n:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    return published_slopes(power) + published_slopes(2 * power)[0::2][: n - power]


def test_alibi_slopes_are_the_published_ones(load):
    module = load(V4)
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert module.alibi_slopes(8).tolist() == eight
    assert module.alibi_slopes(16).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)], rel=1e-6)
    assert module.alibi_slopes(12).tolist() == pytest.approx(eight + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rel=1e-6)
    for n in range(1, 33):
        assert module.alibi_slopes(n).tolist() == pytest.approx(published_slopes(n), rel=1e-6)


@pytest.mark.parametrize("n_head", [1, 3, 4, 6, 8])
@torch.no_grad()
def test_alibi_attention_is_a_plain_loop_with_a_bias(n_head, load):
    module = load(V4, N_EMBD=24, N_HEAD=n_head)
    attention, x = randomize(module.Attention("alibi", 0)), inputs(2, 25, 24)
    expected = naive_attention(attention, x, n_head, published_slopes(n_head))
    torch.testing.assert_close(attention(x, None, None), expected, rtol=1e-4, atol=1e-4)
    without = naive_attention(attention, x, n_head, [0.0] * n_head)
    assert (without - expected).abs().max() > 1e-2  # so that the test can fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_head", "start"), [(4, 0), (8, 0), (6, 0), (8, 1000)])
def test_the_bias_of_alibi_is_exact(dtype, n_head, start, load):
    """With q = k = 0 the product is the bias alone. Long positions have more bits than a bfloat16."""
    module, T, D = load(V4), 4097 - start, 12
    zeros = torch.zeros(1, n_head, T, D, dtype=dtype)
    q, k, v = module.apply_alibi(zeros, zeros, zeros + 1, start)
    assert q.dtype == k.dtype == v.dtype == dtype
    assert q.size(-1) == k.size(-1) == v.size(-1)
    last = (q[0, :, -1:].float() * k[0].float()).sum(-1).double() / math.sqrt(D)  # (H, T): the last query
    bias = last - last[:, :1]
    expected = torch.tensor(published_slopes(n_head), dtype=torch.double)[:, None] * torch.arange(T)
    torch.testing.assert_close(bias[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4 * start)
    assert torch.equal(v[..., :D], zeros + 1)
    assert not v[..., D:].any()


@torch.no_grad()
def test_alibi_attention_in_bfloat16_stays_close(load):
    module = load(V4, N_EMBD=48, N_HEAD=6)
    attention, x = randomize(module.Attention("alibi", 0), std=0.15), inputs(1, 300, 48)
    expected = attention(x, None, None)
    actual = attention.bfloat16()(x.bfloat16(), None, None).float()
    assert (actual - expected).norm() < 0.02 * expected.norm()


# ----------------------------------------------------------------------------------------------------------
# RoPE
# ----------------------------------------------------------------------------------------------------------


def test_rope_is_a_product_of_complex_numbers(load):
    module = load(V4, N_EMBD=32, N_HEAD=2, ROPE_BASE=500.0)
    x, positions = inputs(2, 20, 16)[:, None], torch.arange(100, 120)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    frequencies = 500.0 ** (-2 * torch.arange(8, dtype=torch.double) / 16)
    turned = pairs * torch.exp(1j * positions[:, None] * frequencies)
    expected = torch.cat([turned.real, turned.imag], -1).float()
    torch.testing.assert_close(module.apply_rope(x, module.rope_table(positions)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.long, 1e-2)])
def test_rope_depends_on_the_distance_alone(dtype, tolerance, load):
    module = load(V4, N_EMBD=32, N_HEAD=1)
    random = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 50, 32, generator=random).double()
    m, n = torch.randint(200, (2, 50), generator=random)
    turn = lambda x, at: module.apply_rope(x, module.rope_table(at.to(dtype)))  # noqa: E731
    product = (turn(q, m) * turn(k, n)).sum(-1)
    shift = torch.randint(1, 5000, (50,), generator=random)
    torch.testing.assert_close((turn(q, m + shift) * turn(k, n + shift)).sum(-1), product, rtol=0, atol=tolerance)
    assert ((turn(q, m + shift) * turn(k, n)).sum(-1) - product).abs().max() > 0.1
    torch.testing.assert_close(turn(q, m).norm(dim=-1), q.norm(dim=-1), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_sinusoidal_position_is_that_of_the_paper(load):
    """Section 3.5 of Vaswani et al. 2017, the sines before the cosines."""
    module = load(V4, N_LAYER=0)
    model = random_model(module, 50, "sinusoidal")
    x = torch.tensor([[3, 3, 3]])
    token = model.embedding.weight[3].double()
    token = token / token.square().mean().sqrt()
    for pos in range(3):
        angles = [pos / 10000 ** (2 * i / 32) for i in range(16)]
        wave = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        h = token + torch.tensor(wave, dtype=torch.double)
        expected = model.head.weight.double() @ (h / h.square().mean().sqrt())
        torch.testing.assert_close(model(x)[0, pos].double(), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def brute_force(model, tokens, length, stride=None):
    """All metrics, token by token in float64: each token in the first window that reaches it."""
    ids, stride = tokens.ids.long(), stride or length
    n, start, done = len(ids) - 1, 0, 0
    nats, ranks, confidence = [], [], []
    while done < n:
        end = min(start + length, n)
        logits = model(ids[None, start:end])[0].double().numpy()
        for t in range(done, end):
            row, target = logits[t - start], int(ids[t + 1])
            log_p = row - row.max()
            log_p -= math.log(np.exp(log_p).sum())
            nats.append(-log_p[target])
            ranks.append(sorted(range(len(row)), key=lambda i: -row[i]).index(target))
            confidence.append(math.exp(log_p.max()))
        start, done = start + stride, end
    assert len(nats) == n
    total, ranks, confidence = sum(nats), np.array(ranks), np.array(confidence)
    place = np.digitize(confidence, np.linspace(0, 1, 16)[1:-1])
    gaps = [
        (place == i).mean() * abs(confidence[place == i].mean() - (ranks[place == i] == 0).mean())
        for i in range(15) if (place == i).any()
    ]  # fmt: skip
    return {
        "val_loss": total / n,
        "val_bpb": total / math.log(2) / tokens.n_bytes,
        "val_word_ppl": math.exp(total / tokens.n_words),
        "val_top_1": (ranks == 0).mean(),
        "val_top_5": (ranks < 5).mean(),
        "val_calibration_error": sum(gaps),
    }


def assert_metrics(actual, expected):
    assert actual.keys() <= expected.keys()
    for key, value in actual.items():
        assert value == pytest.approx(expected[key], rel=2e-5, abs=1e-6), key


@pytest.mark.parametrize("n", [2, 6, 33, 34, 256, 257, 258, 301])
@pytest.mark.parametrize("name", RUNGS)
def test_metrics_are_those_of_a_plain_loop(name, n, load):
    """Lengths around a window and a batch; at most lengths the last window is short."""
    module = load(name)
    model, tokens = random_model(module, 40), tiny_tokens(n, 40)
    actual = module.evaluate(model, tokens)
    model.eval()
    assert_metrics(actual, brute_force(model, tokens, 32))
    assert ("val_top_1" in actual) == (name in RESUMABLE)


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32])
@pytest.mark.parametrize("name", RESUMABLE)
def test_metrics_with_windows_that_overlap(name, stride, load):
    module = load(name)
    model, tokens = random_model(module, 40), tiny_tokens(171, 40)
    actual = module.evaluate(model, tokens, stride)
    assert_metrics(actual, brute_force(model.eval(), tokens, 32, stride))


@pytest.mark.parametrize(("length", "stride"), [(8, None), (64, None), (100, 30), (512, None)])
@pytest.mark.parametrize("position", ["alibi", "rope", "sinusoidal", "none"])
def test_metrics_with_windows_of_other_lengths(position, length, stride, load):
    module = load(V4)
    model, tokens = random_model(module, 40, position), tiny_tokens(333, 40)
    actual = module.evaluate(model, tokens, stride, length)
    assert_metrics(actual, brute_force(model.eval(), tokens, length, stride))


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_stride_longer_than_the_window_skips_no_tokens(name, load):
    """Else the loss, a sum divided by the number of all tokens, comes out too low."""
    module = load(name)
    model, tokens = random_model(module, 40), tiny_tokens(333, 40)
    try:
        loss = module.evaluate(model, tokens, 64)["val_loss"]
    except ValueError:
        return
    assert loss == pytest.approx(brute_force(model.eval(), tokens, 32)["val_loss"], rel=1e-4)


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_tie_is_no_right_guess(name, load):
    """All tokens equally likely, as before the first step of v4: the model has guessed nothing."""
    module = load(name)
    model, tokens = random_model(module, 40), tiny_tokens(2000, 40)
    nn.init.zeros_(model.head.weight)
    metrics = module.evaluate(model, tokens)
    assert metrics["val_loss"] == pytest.approx(math.log(40), rel=1e-6)
    assert metrics["val_top_1"] < 0.1
    assert metrics["val_top_5"] < 0.25
    assert metrics["val_calibration_error"] < 0.1


@pytest.mark.parametrize("name", RUNGS)
def test_the_mean_loss_is_the_cross_entropy_of_the_logits(name, load):
    module = load(name)
    model = random_model(module, 40)
    x, y = torch.randint(40, (2, 3, 32), generator=torch.Generator().manual_seed(1))
    expected = -model(x).double().log_softmax(-1).gather(-1, y[..., None]).mean()
    assert model(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
# v0: the closed form
# ----------------------------------------------------------------------------------------------------------


def markov_text(n, vocab_size):
    random = np.random.default_rng(0)
    rows = random.dirichlet(np.full(vocab_size, 0.3), vocab_size)
    ids = [0]
    for _ in range(n - 1):
        ids.append(int(random.choice(vocab_size, p=rows[ids[-1]])))
    return torch.tensor(ids).to(torch.uint16)


def test_the_optimum_is_that_of_the_counts(load):
    module = load("v0")
    ids, model = markov_text(500, 12), random_model(load("v0"), 13)  # the last token never occurs
    text = ids.tolist()
    pairs, firsts = Counter(zip(text, text[1:])), Counter(text[:-1])
    optimum = -sum(n * math.log(n / firsts[i]) for (i, _), n in pairs.items()) / 499
    table = model.table.detach().double().numpy()
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    trained = -sum(n * log_p[pair] for pair, n in pairs.items()) / 499
    assert module.compare_with_counts(model, ids) == pytest.approx((trained, optimum), rel=1e-9)
    assert optimum < trained


def test_training_finds_the_optimum(load):
    module = load("v0", BATCH_SIZE=64, BLOCK_SIZE=32, MAX_STEPS=600, EVAL_INTERVAL=600, LEARNING_RATE=0.05)
    Path(module.OUT_DIR).mkdir(parents=True)
    text = Tokens(markov_text(3000, 12), 3000, 1000, "tiny", "none")
    model = module.LanguageModel(12)
    module.train(model, {"train": text, "val": text})
    trained, optimum = module.compare_with_counts(model, text.ids)
    assert optimum <= trained < 1.01 * optimum


# ----------------------------------------------------------------------------------------------------------
# v1_1: the same as v1 in less memory
# ----------------------------------------------------------------------------------------------------------


def test_v1_1_has_the_losses_of_v1_in_every_step(load):
    constants = {"MAX_STEPS": 10, "EVAL_INTERVAL": 1, "PATIENCE": 100}
    plain = train(load("v1", **constants))[0]
    lean = train(load("v1_1", **constants, MICRO_BATCH_SIZE=3, CHUNK_SIZE=37))[0]
    np.testing.assert_allclose(losses(lean), losses(plain), rtol=1e-5)


@pytest.mark.parametrize("name", ("v1_1", "v2"))
@pytest.mark.parametrize("chunk_size", [1, 7, 30, 100])
def test_the_loss_in_chunks_and_its_gradients(name, chunk_size, load):
    module = load(name, CHUNK_SIZE=chunk_size)
    head, targets = randomize(nn.Linear(6, 11)), torch.arange(30) * 7 % 11
    x = inputs(1, 30, 6)[0].requires_grad_()
    loss = module.loss_in_chunks(x, targets, head)
    gradients = torch.autograd.grad(loss, (x, *head.parameters()))
    plain = F.cross_entropy(head(x), targets)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain, (x, *head.parameters())))


@pytest.mark.parametrize("name", ACCUMULATING)
def test_micro_batches_add_up_to_the_batch(name, load):
    """3 does not divide 8: the last micro-batch is smaller."""
    logs = {}
    for size in (8, 3, 1):
        module = load(name, MICRO_BATCH_SIZE=size, MAX_STEPS=8, EVAL_INTERVAL=2, PATIENCE=100)
        logs[size] = losses(train(module)[0])
    for size in (3, 1):
        np.testing.assert_allclose(logs[size], logs[8], rtol=1e-3 if name == V4 else 1e-4)


# ----------------------------------------------------------------------------------------------------------
# v3 and v4: checkpoints
# ----------------------------------------------------------------------------------------------------------


LONG = {"MAX_STEPS": 24, "EVAL_INTERVAL": 8}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_run_is_the_same_run(name, dropout, load, monkeypatch, tmp_path):
    module = load(name, **LONG, DROPOUT=dropout, OUT_DIR=str(tmp_path / "straight"))
    straight, _, _ = train(module)
    weights = kept_weights(module)

    load(name, **LONG, DROPOUT=dropout, OUT_DIR=str(tmp_path / "interrupted"))
    go_on = interrupt_at(monkeypatch, module, 17)
    with pytest.raises(KeyboardInterrupt):
        train(module)
    go_on()
    torch.rand(5)  # other random numbers than those that the run left behind
    module.RESUME = True
    resumed, _, _ = train(module)
    assert without_clock(resumed) == without_clock(straight)
    assert same_weights(kept_weights(module), weights)
    seconds = [line["seconds"] for line in resumed]
    assert seconds == sorted(seconds)
    assert without_clock(train(module)[0]) == without_clock(straight)  # a finished run has nothing left to do


@pytest.mark.parametrize("name", RESUMABLE)
def test_resume_without_a_checkpoint_says_so(name, load):
    with pytest.raises(FileNotFoundError, match="checkpoint.pt.* train first"):
        load(name, RESUME=True).main()


@pytest.fixture
def trained(load, tmp_path):
    """trained(name, ...): a rung after two steps; v4 has its files in the folder of its scheme."""

    def trained(name, **constants):
        out = str(tmp_path / name)
        module = load(name, MAX_STEPS=2, EVAL_INTERVAL=2, OUT_DIR=out + ("/alibi" if name == V4 else ""), **constants)
        train(module)
        path = Path(module.OUT_DIR)
        module.OUT_DIR = out
        return module, path

    return trained


@pytest.mark.parametrize("name", RESUMABLE)
def test_resume_with_other_constants_is_refused(name, trained):
    module, _ = trained(name)
    module.N_EMBD, module.SEED, module.RESUME, module.MAX_STEPS = 16, 5, True, 4
    with pytest.raises(ValueError, match="N_EMBD was 32 and is 16; SEED was 1337 and is 5$") as error:
        module.main()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", RESUMABLE)
def test_resume_with_another_text_is_refused(name, trained):
    module, path = trained(name)
    saved = torch.load(path / "checkpoint.pt", weights_only=True)
    torch.save({**saved, "dataset": "another"}, path / "checkpoint.pt")
    module.RESUME = True
    with pytest.raises(ValueError, match="the text was another and is sample$"):
        module.main()


@pytest.mark.parametrize("name", RESUMABLE)
def test_another_tokenizer_of_the_same_name_is_refused(name, trained):
    module, path = trained(name)
    for file in ("checkpoint.pt", "model.pt"):
        saved = torch.load(path / file, weights_only=True)
        torch.save({**saved, "fingerprint": "0123456789abcdef"}, path / file)
    module.RESUME = True
    with pytest.raises(ValueError, match="the tokenizer was 0123456789abcdef and is [0-9a-f]{16}$"):
        module.main()
    module.RESUME, module.PROMPT = False, "a"
    with pytest.raises(ValueError, match="was trained with another bpe_vocab_500.json"):
        module.main()


@pytest.mark.parametrize("name", RESUMABLE)
def test_resume_with_constants_that_may_change(name, trained):
    module, path = trained(name)
    saved = torch.load(path / "checkpoint.pt", weights_only=True)
    saved["hyperparameters"]["DEVICE"] = "cuda"
    torch.save(saved, path / "checkpoint.pt")
    module.MAX_STEPS, module.EVAL_INTERVAL, module.PATIENCE, module.RESUME = 6, 1, 50, True
    module.main()
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 5, 6]


class Bomb:
    """Unpickled by plain pickle, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other", "model", "bomb"])
@pytest.mark.parametrize("name", RESUMABLE)
def test_a_damaged_checkpoint_is_refused(name, damage, trained, tmp_path):
    module, path = trained(name)
    for checkpoint in (path / "checkpoint.pt", path / "checkpoint_before.pt"):
        content = checkpoint.read_bytes()
        if damage == "other":
            torch.save([1, 2], checkpoint)
        elif damage == "model":  # it has no optimizer and no log
            shutil.copy(path / "model.pt", checkpoint)
        elif damage == "bomb":
            torch.save({**torch.load(checkpoint, weights_only=True), "log": Bomb(tmp_path / "went off")}, checkpoint)
        else:
            checkpoint.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello\n"}[damage])
    module.RESUME = True
    with pytest.raises(ValueError, match="checkpoint_before.pt is damaged") as error:
        module.main()
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "went off").exists()
    module.RESUME, module.PROMPT = False, "a"
    shutil.copy(path / "checkpoint.pt", path / "model.pt")
    if damage != "model":
        with pytest.raises(ValueError, match="model.pt is damaged"):
            module.main()
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize("name", RUNGS)
def test_a_file_is_written_whole_or_not_at_all(name, load):
    module = load(name)
    out = Path(module.OUT_DIR)
    out.mkdir()
    module.write_whole("a.txt", lambda path: path.write_text("first"))

    def fail(path):
        path.write_text("half")
        raise RuntimeError("no space\nmore lines")

    with pytest.raises(OSError, match="cannot write .*a.txt: disk full. no space; make room, or choose .*OUT_DIR$"):
        module.write_whole("a.txt", fail)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("a.txt", "first")]


# ----------------------------------------------------------------------------------------------------------
# v3 and v4: a text to continue
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [" The castle was", "", " many words" * 60, " a \U0001f600 smile \U0001f600", "\n"])
@pytest.mark.parametrize("name", RESUMABLE)
def test_a_prompt_is_continued(name, prompt, trained):
    module, _ = trained(name)
    module.PROMPT, module.SAMPLE_TOKENS = prompt, 40
    text = module.main()
    assert text.startswith(prompt)
    assert len(text) > len(prompt) + 10
    assert module.main() == text  # the seed decides


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_prompt_without_a_model_says_so(name, load):
    with pytest.raises(FileNotFoundError, match="train first"):
        load(name, PROMPT="a").main()


@pytest.mark.parametrize(("constant", "value"), [("N_EMBD", 16), ("N_LAYER", 1), ("N_HEAD", 4)])
@pytest.mark.parametrize("name", RESUMABLE)
def test_a_prompt_for_a_model_of_another_shape_is_refused(name, constant, value, trained):
    """The weights of another number of heads have the same shape, but mean something else."""
    module, _ = trained(name)
    before = getattr(module, constant)
    setattr(module, constant, value)
    module.PROMPT = "a"
    with pytest.raises(ValueError, match=f"{constant}={before}"):
        module.main()


# ----------------------------------------------------------------------------------------------------------
# v3 and v4: how they train
# ----------------------------------------------------------------------------------------------------------


def test_residual_branches_start_small(load):
    model = load("v3", N_LAYER=8, N_EMBD=64).LanguageModel(500)
    for block in model.blocks:
        for end in (block.attention.out, block.mlp[-1]):
            assert end.weight.std().item() == pytest.approx(0.02 / 4, rel=0.06)
        for other in (block.attention.qkv, block.mlp[0]):
            assert other.weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_v4_starts_with_all_tokens_equally_likely(load):
    model = load(V4).LanguageModel(50, "rope")
    assert not model(torch.arange(20)[None]).any()


@pytest.mark.parametrize("name", RESUMABLE)
@torch.no_grad()
def test_dropout_acts_in_training_only(name, load):
    module = load(name)
    model, x = random_model(module, 50), torch.arange(20)[None]
    plain = model(x)
    assert torch.equal(model.train()(x), plain)
    module.DROPOUT = 0.3
    assert not torch.equal(model(x), plain)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), plain)


@pytest.mark.parametrize("name", RUNGS)
def test_evaluation_leaves_the_model_in_training(name, load):
    module = load(name)
    model = random_model(module, 40).train()
    module.evaluate(model, tiny_tokens(50, 40))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_exactly_the_matrices_decay(load):
    module = load("v3", WEIGHT_DECAY=0.25)
    model = module.LanguageModel(50)
    groups = module.make_optimizer(model).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.25 if p.ndim == 2 else 0.0 for p in model.parameters()}


def test_v4_trains_every_parameter_once(load):
    module = load(V4)
    for scheme in SCHEMES:
        model = module.LanguageModel(50, scheme)
        held = [id(p) for o in module.make_optimizers(model) for group in o.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_the_learning_rate_of_v3(load):
    module = load("v3", WARMUP_STEPS=10, MAX_STEPS=110)
    factor = [module.lr_factor(step) for step in range(111)]
    assert factor[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert factor[10] == 1
    assert factor[60] == pytest.approx(0.5)
    assert factor[35] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factor[110] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(factor[10:]))


def test_the_learning_rate_of_v4(load):
    module = load(V4, WARMUP_STEPS=10, MAX_STEPS=100, COOLDOWN=0.4)
    factor = [module.lr_factor(step) for step in range(101)]
    assert factor[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert factor[10:61] == [1] * 51
    assert factor[60:] == pytest.approx([1 - k / 40 for k in range(41)])


@pytest.mark.parametrize("name", RESUMABLE)
def test_no_warm_up_is_possible(name, load):
    assert load(name, WARMUP_STEPS=0).lr_factor(0) == 1


def test_the_gradient_of_v3_is_clipped(load, monkeypatch):
    """The norm that the optimizer sees is never larger than GRAD_CLIP."""
    module, norms = load("v3", MAX_STEPS=4, GRAD_CLIP=0.01), []
    step = torch.optim.AdamW.step

    def observed(self, *args, **kwargs):
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for g in self.param_groups for p in g["params"])))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", observed)
    train(module)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_steps_are_those_without_compilation(load, capsys):
    constants = {"MAX_STEPS": 5, "EVAL_INTERVAL": 1, "PATIENCE": 100, "N_LAYER": 1, "N_EMBD": 16}
    eager = train(load("v3", **constants))[0]
    compiled = train(load("v3", **constants, COMPILE=True))[0]
    assert "without torch.compile" not in capsys.readouterr().out
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-4)


@pytest.mark.parametrize("name", RESUMABLE)
def test_training_goes_on_where_compilation_fails(name, load, monkeypatch, capsys):
    def fail(model):
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", fail)
    log = train(load(name, COMPILE=True, MAX_STEPS=2))[0]
    assert log[-1]["step"] == 2
    assert "training without torch.compile: no compiler\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", RESUMABLE)
def test_bfloat16_stays_close_to_float32(name, load):
    constants = {"MAX_STEPS": 20, "EVAL_INTERVAL": 5, "PATIENCE": 100}
    exact = losses(train(load(name, **constants))[0])
    rounded = losses(train(load(name, **constants, DTYPE="bfloat16"))[0])
    np.testing.assert_allclose(rounded, exact, rtol=0.02)
    assert not np.array_equal(rounded, exact)


# ----------------------------------------------------------------------------------------------------------
# The parts of v3 and v4 that are written for speed
# ----------------------------------------------------------------------------------------------------------


def test_gelu_is_that_of_torch(load):
    x = torch.linspace(-12, 12, 10_001, dtype=torch.double, requires_grad=True)
    ours, theirs = load("v3").GELU()(x), F.gelu(x, approximate="tanh")
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)), atol=1e-12)


@pytest.mark.parametrize("T", [1, 5, 128, 200, 256, 512, 513])
@pytest.mark.parametrize("name", RESUMABLE)
def test_attention_in_blocks_of_queries_is_that_of_torch(name, T, load, monkeypatch):
    """The code that is compiled on a CPU, run as it stands."""
    module = load(name)
    q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # stay in double
    ours = module.attend(q, k, v, 0.3)
    assert torch.allclose(ours, theirs, atol=1e-12)
    weight = torch.randn_like(ours)
    for ours_grad, their_grad in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs))):
        assert torch.allclose(ours_grad, their_grad, atol=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("name", RESUMABLE)
def test_dropout_keeps_the_mean_and_draws_independently(name, share, load):
    module = load(name, DROPOUT=share)
    torch.manual_seed(0)
    x = torch.ones(300, 1001)  # not a multiple of eight
    kept = module.dropout(x, True)
    p = min(255, round(256 * share)) / 256
    n = x.numel()
    assert torch.allclose(kept[kept > 0], torch.tensor(1 / (1 - p)))
    zero = (kept == 0).double()
    assert abs(zero.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    flat = zero.flatten() - p
    for lag in (1, 2, 7, 8, 9, 1001):  # neighbours, also within the eight that share a random number
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * p * (1 - p) / math.sqrt(n - lag)
    assert not torch.equal(module.dropout(x, True), kept)
    assert torch.equal(module.dropout(x, False), x)
    x.requires_grad_()
    torch.manual_seed(0)
    module.dropout(x, True).sum().backward()
    assert torch.equal(x.grad, kept)


def test_compiled_bfloat16_training_follows_the_plain_one(load, data_dir):
    """Two hundred steps of v3 and v4, compiled and in bfloat16 where that works, beside float32 without compilation."""
    for name in RESUMABLE:
        curves = {}
        for dtype, compiled in (("float32", False), ("bfloat16", True)):
            constants = {"MAX_STEPS": 200, "EVAL_INTERVAL": 50, "DTYPE": dtype, "COMPILE": compiled, "N_LAYER": 1}
            log = train(load(name, **constants))[0]
            curves[compiled] = torch.tensor([line["val_loss"] for line in log])
        assert curves[False][-1] < curves[False][0] - 0.2  # it has learned something
        assert (curves[True] - curves[False]).abs().max() < 0.05


# ----------------------------------------------------------------------------------------------------------
# v4: Muon
# ----------------------------------------------------------------------------------------------------------


def matrix(rows, columns, seed=0):
    """A matrix with singular values from 0.1 to 3."""
    random = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(torch.randn(rows, columns, generator=random), full_matrices=False)
    return U @ torch.diag(torch.linspace(3, 0.1, min(rows, columns))) @ Vh


@pytest.mark.parametrize(("rows", "columns"), [(48, 16), (16, 48), (32, 32), (1, 8)])
def test_orthogonalize_keeps_directions_and_levels_lengths(rows, columns, load):
    G = matrix(rows, columns)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    middle = U.T @ load(V4).orthogonalize(G[None])[0] @ Vh.T  # the singular values, if the directions are kept
    assert (middle - middle.diag().diag()).abs().max() < 1e-3
    assert middle.diag().min() > 0.6
    assert middle.diag().max() < 1.3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (16, 64), (24, 20)])
def test_orthogonalize_random_matrices(rows, columns, scale, load):
    G = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(2)) * scale
    values = torch.linalg.svdvals(load(V4).orthogonalize(G))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalize_a_batch_is_one_by_one(load):
    module = load(V4)
    G = torch.stack([matrix(12, 20, seed) * 10**seed for seed in range(4)])
    together = module.orthogonalize(G)
    assert together.dtype == G.dtype
    for one, alone in zip(together, G):
        torch.testing.assert_close(one, module.orthogonalize(alone[None])[0], rtol=1e-4, atol=1e-5)
    assert not module.orthogonalize(torch.zeros(1, 3, 4)).any()


def test_muon_against_a_plain_loop(load):
    """Momentum as a running mean, Nesterov's look ahead, each square third by itself, sqrt(4) for a tall matrix."""
    module = load(V4)
    square, tall = (nn.Parameter(matrix(*shape)) for shape in ((24, 8), (32, 8)))
    muon = module.Muon([{"params": [square], "split": 3}, {"params": [tall]}], lr=0.1, momentum=0.9)
    expected, momenta = [square.detach().clone(), tall.detach().clone()], [0.0, 0.0]
    for step in range(4):
        square.grad, tall.grad = matrix(24, 8, step + 1), matrix(32, 8, step + 5)
        for i, grad in enumerate((square.grad.clone(), tall.grad.clone())):
            momenta[i] = 0.9 * momenta[i] + 0.1 * grad
            ahead = 0.1 * grad + 0.9 * momenta[i]
            parts = [module.orthogonalize(part[None])[0] for part in ahead.split(8 if i == 0 else 32)]
            expected[i] -= 0.1 * (1 if i == 0 else 2) * torch.cat(parts)
        muon.step()
    torch.testing.assert_close([square.detach(), tall.detach()], expected, rtol=1e-4, atol=1e-4)


def test_the_momentum_of_muon_survives_saving(load, tmp_path):
    module = load(V4)

    def step(muon, p, seed):
        p.grad = matrix(8, 8, seed)
        muon.step()

    p = nn.Parameter(matrix(8, 8))
    muon = module.Muon([p], lr=0.1, momentum=0.95)
    for seed in (1, 2):
        step(muon, p, seed)
    torch.save(muon.state_dict(), tmp_path / "muon.pt")
    copy = nn.Parameter(p.detach().clone())
    restored = module.Muon([copy], lr=0.5, momentum=0.1)
    restored.load_state_dict(torch.load(tmp_path / "muon.pt", weights_only=True))
    step(muon, p, 3)
    step(restored, copy, 3)
    assert torch.equal(p, copy)


# ----------------------------------------------------------------------------------------------------------
# v4: generation, comparison of schemes, embeddings
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_prompt", [1, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_text(scheme, n_prompt, load):
    module = load(V4)
    model = random_model(module, 50, scheme)
    x = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(3))
    cache = module.KVCache()
    pieces = [model(x[:, :n_prompt], cache=cache)]
    pieces += [model(x[:, t : t + 1], cache=cache) for t in range(n_prompt, 32)]
    assert cache.length == 32
    torch.testing.assert_close(torch.cat(pieces, 1), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_cold_sampling_takes_the_likeliest_token(scheme, load):
    module = load(V4, TEMPERATURE=1e-5)
    model = random_model(module, 50, scheme)
    expected = [3, 1, 4]
    while len(expected) < 32:
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert module.generate(model, [3, 1, 4], 29) == expected


@pytest.mark.parametrize("n_prompt", [1, 31, 32, 33, 80])
@pytest.mark.parametrize(("name", "position"), MODELS)
def test_a_text_may_grow_longer_than_the_window(name, position, n_prompt, load):
    module = load(name)
    model, prompt = random_model(module, 50, position), [k * 7 % 50 for k in range(n_prompt)]
    ids = module.generate(model, prompt, 40)
    assert len(ids) == n_prompt + 40
    assert ids[:n_prompt] == prompt
    assert all(0 <= i < 50 for i in ids)


def test_extrapolation_is_none_where_positions_are_missing(load):
    module = load(V4, EXTRAPOLATION=(1, 2, 4))
    tokens = tiny_tokens(300, 40)
    learned = module.extrapolate(random_model(module, 40, "learned"), tokens)
    assert learned == {32: learned[32], 64: None, 128: None}
    model = random_model(module, 40, "rope")
    rope = module.extrapolate(model, tokens)
    for n in (32, 64, 128):
        assert rope[n] == pytest.approx(brute_force(model.eval(), tokens, n)["val_bpb"], rel=1e-5)


@pytest.mark.parametrize("position", ["rotary", "", "alibi,", "alibi,Rope"])
def test_an_unknown_scheme_is_refused(position, load):
    module = load(V4, POSITION=position)
    with pytest.raises(ValueError, match="known are alibi, rope, learned, sinusoidal, none"):
        module.main()
    assert not Path(module.OUT_DIR).exists()


def test_nearest_neighbours_are_sorted_by_cosine(load):
    module = load(V4, VOCABULARY="bpe_vocab.json")
    tokenizer = module.BPETokenizer.load(module.vocabulary_file("bpe_vocab.json"))
    model = random_model(module, tokenizer.vocab_size)
    vectors = model.embedding.weight.detach().double().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = module.nearest_neighbours(model, tokenizer, n=5)
    assert len(found) >= 4
    for word, neighbours in found.items():
        (own,) = tokenizer.encode(word)
        order = np.argsort(-(vectors @ vectors[own]))
        assert neighbours == [tokenizer.decode([int(i)]) for i in order if i != own][:5]


def test_two_schemes_are_compared_and_resumed(load, monkeypatch, tmp_path):
    """Interrupted in the second scheme, before and after its first checkpoint, the comparison ends the same."""
    constants = {"POSITION": "alibi,rope", "MAX_STEPS": 4, "EVAL_INTERVAL": 2, "VOCABULARY": "bpe_vocab.json"}
    module = load(V4, **constants, OUT_DIR=str(tmp_path / "straight"))
    summary = module.main()
    top = tmp_path / "straight"
    assert module.OUT_DIR == str(top)
    for scheme in ("alibi", "rope"):
        names = {path.name for path in (top / scheme).iterdir()}
        assert names >= {"log.jsonl", "summary.json", "loss.png", "sample.txt", "model.pt", "checkpoint.pt"}
        assert (top / scheme / "embeddings.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((top / scheme / "summary.json").read_text())["position"] == scheme
    assert (top / "extrapolation.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((top / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert list(summary["schemes"]) == ["alibi", "rope"]
    assert summary["val_bpb"] == min(one["val_bpb"] for one in summary["schemes"].values())
    assert list(summary["schemes"]["rope"]["extrapolation_bpb"]) == [32, 64]

    module = load(V4, **constants, OUT_DIR=str(tmp_path / "interrupted"))
    go_on = interrupt_at(monkeypatch, module, 3, nth=2)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    go_on()
    assert module.OUT_DIR == str(tmp_path / "interrupted")
    module.RESUME = True
    resumed = module.main()
    for scheme in ("alibi", "rope"):
        for key in ("val_loss", "val_loss_sliding", "test_loss", "extrapolation_bpb", "nearest_neighbours", "steps"):
            assert resumed["schemes"][scheme][key] == summary["schemes"][scheme][key]


@pytest.mark.parametrize("vocabulary", [SMALL_VOCABULARY, "bpe_vocab.json"])
def test_embeddings_are_drawn_with_any_vocabulary(vocabulary, load, tmp_path):
    """In a small vocabulary few of the words are single tokens."""
    module = load(V4)
    tokenizer = module.BPETokenizer.load(module.vocabulary_file(vocabulary))
    module.plot_embeddings(random_model(module, tokenizer.vocab_size), tokenizer, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
