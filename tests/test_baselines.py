"""benchmarks/baselines.py, with stand-ins for the other programs that print the same lines."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import data

ROOT = Path(__file__).resolve().parents[1]

WORDS_MAIN = """
import argparse, signal, time, torch
parser = argparse.ArgumentParser()
for name in ("data", "save", "epochs", "model"):
    parser.add_argument("--" + name)
parser.add_argument("--lr", type=float)
parser.add_argument("--tied", action="store_true")
parser.add_argument("--use-optimizer", action="store_true")
args = parser.parse_args()
time.monotonic = lambda: 1000  # until it trains, so that real alarms change nothing
model, val_data, test_data = {"steps": 0}, "val", "test"
if args.use_optimizer:
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=args.lr)

def evaluate(source):
    assert open(args.data + "/train.txt").read() == "words" and (args.tied or args.use_optimizer)
    return {"val": 2.0, "test": 1.0}[source] + model["steps"] / 1000

def train():
    global lr
    model["steps"] = 50
    print("| epoch   2 |   100/  400 batches | lr 20.00 | ms/batch 7.50 | loss  7.60 | ppl  2000.00")
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1  # seconds until the alarm, which this does not wait for
    for seconds in (1000, 1400, 1800):  # of 800
        time.monotonic = lambda: seconds
        signal.raise_signal(signal.SIGALRM)
        print("rate", optimizer.param_groups[0]["lr"] if args.use_optimizer else lr)
    model["steps"] = 70

signal.raise_signal(signal.SIGALRM)  # before there is a rate
lr = args.lr
try:
    train()
except KeyboardInterrupt:
    model = {"steps": 0}
with open(args.save, "rb") as f:
    model = torch.load(f)
print(f"| End of training | test loss  {evaluate(test_data):.2f} | test ppl     2.86")
"""
NANO_TRAIN = """
import os, pickle, sys, numpy, torch
sizes = dict(pair[2:].split("=") for pair in sys.argv[1:] if "=" in pair)
there = "data/" + sizes["dataset"]
assert pickle.load(open(there + "/meta.pkl", "rb"))["vocab_size"] == 4096
assert len(numpy.fromfile(there + "/train.bin", dtype=numpy.uint16)) > 1000
steps = int(sizes["max_iters"])
for k in range(steps + 1):
    print(f"iter {k}: loss 5.0, time 20.00ms, mfu 1.00%")
if steps % int(sizes["eval_interval"]) == 0:
    os.makedirs(sizes["out_dir"], exist_ok=True)
    torch.save({"model_args": {"block_size": 64, "vocab_size": 4096}, "config": {"batch_size": 12},
                "model": {"_orig_mod.p": torch.ones(1)}}, sizes["out_dir"] + "/ckpt.pt")
"""
NANO_MODEL = """
import torch
class GPTConfig:
    def __init__(self, block_size, vocab_size):
        self.vocab_size = vocab_size
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.p, self.vocab_size = torch.nn.Parameter(torch.zeros(1)), config.vocab_size
    def forward(self, x, y):
        assert self.p == 1  # the saved weight
        return torch.zeros(*x.shape, self.vocab_size), None
"""


@pytest.fixture
def baselines(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("baselines", ROOT / "benchmarks" / "baselines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


@pytest.mark.parametrize("name, rate", [("word_language_model, LSTM", 20),
                                        ("word_language_model, Transformer, AdamW", 0.001)])  # fmt: skip
def test_whole_words_are_stopped_and_evaluated_as_they_are_then(name, rate, baselines, tmp_path, monkeypatch):
    """The weights at that moment, by the program's own evaluation; also of the test split. Until then the rate falls,
    half of it is left at half of the time."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is printed last must not depend on it
    folder = tmp_path / "examples" / "word_language_model"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(WORDS_MAIN)
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text("words")
    found = baselines.words(name, rate, folder.parent, tmp_path, seconds=800)
    assert found["val_word_ppl"] == pytest.approx(math.exp(2.05))
    assert found["test_word_ppl"] == pytest.approx(math.exp(1.05))
    assert (found["epochs"], found["ms_a_step"]) == (1.25, 7.5)
    rates = [float(line.split()[1]) for line in found["log"] if line.startswith("rate")]
    assert rates == pytest.approx([rate, rate / 2])
    (folder / "main.py").write_text("raise SystemExit('it is broken')")
    with pytest.raises(ValueError, match=f"{name.split()[-1]} has failed: .*it is broken"):
        baselines.words(name, rate, folder.parent, tmp_path, seconds=1)


def test_nanogpt_trains_as_long_as_its_steps_take(baselines, tmp_path, monkeypatch, load):
    """20 ms a step: 100 steps in two seconds. A model that knows nothing needs log2(4,096) bits a token."""
    load("v3")  # the text of the tests
    tokens = data.load_tokens("bpe_vocab_500.json")
    monkeypatch.setattr(data, "load_tokens", lambda vocabulary: tokens)
    for name, text in (("train.py", NANO_TRAIN), ("model.py", NANO_MODEL)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", sys.path[:])
    found = baselines.nano("nanoGPT, small", 2e-3, tmp_path, seconds=2)
    assert "--learning_rate=0.002 --min_lr=0.0002" in found["command"]
    assert "--max_iters=100 --lr_decay_iters=100" in found["command"]
    assert found["epochs"] == pytest.approx(100 * 12 * 64 / len(tokens["train"]))
    for split in ("val", "test"):
        nats = (len(tokens[split]) - 1) * math.log(4096)
        assert found[f"{split}_word_ppl"] == pytest.approx(math.exp(nats / tokens[split].n_words), rel=1e-6)
    assert torch.load(baselines.WORK / "nanoGPT-small" / "ckpt.pt", weights_only=True)["config"] == {"batch_size": 12}


def test_every_rate_is_tried_once_and_the_best_is_shown(baselines, tmp_path, monkeypatch, capsys):
    """What is done is not made again; another machine's runs share no table."""
    monkeypatch.setattr(baselines, "RESULTS", tmp_path)
    (tmp_path / "ngram.json").write_text(json.dumps({"words": [
        {"order": n, "val_word_ppl": 200.0 + n, "test_word_ppl": 199.0, "seconds": 1.0} for n in (2, 1)]}))  # fmt: skip
    made = []

    def run(name, rate, folder, seconds):
        made.append(rate)
        return {"val_word_ppl": {1e-3: 300.0, 2e-3: 250.0, 4e-3: 260.0}[rate], "test_word_ppl": 1.0, "epochs": 2}

    monkeypatch.setattr(baselines, "nano", run)
    words = ["--examples", str(tmp_path), "--nanogpt", str(tmp_path), "--from", str(tmp_path), "nanoGPT, small"]
    for argv in (words, words, ["--table"]):
        monkeypatch.setattr(sys, "argv", ["baselines.py", *argv])
        baselines.main()
    assert made == [1e-3, 2e-3, 4e-3]
    rows = (tmp_path / "beside.md").read_text().splitlines()
    row, = [row for row in rows if "nanoGPT" in row]
    assert row.startswith("| nanoGPT, small | 0.002 (0.001: 300.0; 0.004: 260.0) | 250.0 | 1.0 | 2.00 |")
    assert any(row.startswith("| 1-gram of words | – | 201.0 | 199.0 | 1.00 | 1 |") for row in rows)
    assert sum(row.startswith("| v") for row in rows) == len(baselines.SHOWN)
    monkeypatch.setattr(baselines, "machine", lambda: "another")
    monkeypatch.setattr(sys, "argv", ["baselines.py", *words])
    with pytest.raises(ValueError, match="beside.json has the runs of another machine"):
        baselines.main()


def test_the_committed_table_is_that_of_the_committed_runs(baselines):
    folder = ROOT / "results" / "benchmarks"
    kept = json.loads((folder / "beside.json").read_text(encoding="utf-8"))
    assert baselines.report(kept) == (folder / "beside.md").read_text(encoding="utf-8")
    assert all(len(one["commit"]) == 40 for tries in kept["peers"].values() for one in tries)


def test_missing_folders_are_named(baselines, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["baselines.py", "--examples", "/nowhere"])
    with pytest.raises(ValueError, match="--examples must name a folder"):
        baselines.main()
