"""benchmarks/training.py --gpu: the same path on a CPU, at a tiny size and eager, with a stand-in for nanoGPT."""

import json
from types import SimpleNamespace

import pytest
import torch

import forked
import harness
from benchmarks import steps, training
from common import SCHEMES, V4, make_model, random_ids
from harness import flops

TINY = {"N_LAYER": 1, "N_HEAD": 2, "N_EMBD": 16, "BLOCK_SIZE": 16, "BATCH_SIZE": 4, "vocabulary": 70}
NANO_MODEL = '''
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config == GPTConfig(16, 128, 1, 2, 16, 0.0, False)  # 70 ids, padded to a multiple of 64
        print("a line that is not the table's")
        self.table = nn.Embedding(128, 128)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        assert device_type == "cpu"
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        assert idx.shape == targets.shape and idx.size(1) == 16
        return logits, nn.functional.cross_entropy(logits.view(-1, 128), targets.view(-1))
'''


@pytest.fixture
def tiny(monkeypatch):
    """--gpu with a tiny shape, turns of one step and processes that are forked."""
    monkeypatch.setattr(training, "processes", forked.server)
    monkeypatch.setitem(training.SHAPES, training.GPT2, TINY)
    monkeypatch.setitem(training.SQUARES, "cpu", (32,))
    for name, value in {"MICRO_BATCHES": (2, 4), "QUICK_ROUNDS": 1, "QUICK_SECONDS": 0.0, "WARM_UP": 1}.items():
        monkeypatch.setattr(training, name, value)
    usual = training.importlib.util.find_spec
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None if name == "transformers" else
                        usual(name))  # fmt: skip
    monkeypatch.setattr(harness, "resolve_dtype", lambda device, dtype: "bfloat16", raising=False)
    monkeypatch.setattr(flops, "peak", lambda device, dtype: {("cpu", "bfloat16"): 1e12}[device, dtype])


def test_the_path_of_a_gpu(tiny, tmp_path, capfd):
    """The rungs as they train and the peers take turns; what they reach is written."""
    (tmp_path / "model.py").write_text(NANO_MODEL)
    arguments = ["--gpu", "--device", "cpu", "--eager", "--quick", "--nanogpt", str(tmp_path), "--to", str(tmp_path)]
    training.main(arguments)
    results = json.loads((tmp_path / "training_gpu.json").read_text())
    names = ["v3", "v4, RoPE", "v4, ALiBi", "nanoGPT"]
    assert list(results["contestants"]) == names
    assert all(facts["micro_batch"] == 2 and facts["memory_mb"] > 0 for facts in results["contestants"].values())
    rates = results["training"][training.GPT2]
    assert set(rates) == {*names, "product 32"} and all(len(values) == 1 for values in rates.values())
    out, err = capfd.readouterr()
    assert out == (tmp_path / "training_gpu.md").read_text() and "not the table's" in err
    row = next(line for line in out.splitlines() if line.startswith("| v4, ALiBi"))
    work = 6 * (12 * 16**2 + 16 * 70) + 12 * 16 * 16
    assert [cell.strip() for cell in row.split("|")[3:5]] == [
        f"{rates['v4, ALiBi'][0] / rates['nanoGPT'][0]:.2f}", f"{rates['v4, ALiBi'][0] * work / 1e12:.1%}"
    ]  # fmt: skip
    assert "GPT-2 of transformers is left out" in err


def test_the_fastest_micro_batch_is_kept_and_no_more_are_tried_when_the_time_is_over(monkeypatch):
    """Contestants that answer at once. `a` is the fastest with 16 windows at once; 64 come too late; `b` fails."""
    rates = {("a", 32): 100.0, ("a", 16): 120.0, ("c", 32): 90.0, ("c", 16): 80.0, ("product 8", None): 1e9}
    clock, open_ones, closed = [0.0], [], []

    class Connection:
        def __init__(self, name, size):
            self.key, self.answers = (name, size), []
            open_ones.append(self)

        def recv(self):
            if not self.answers and self.key[0] == "b":
                raise EOFError
            return self.answers.pop() if self.answers else {"memory_mb": 1000.0, "compiled": True}

        def send(self, seconds):
            clock[0] += 20
            self.answers.append(rates[self.key])

        def close(self):
            closed.append(self.key)

    monkeypatch.setattr(training, "gpu_makers", lambda shape, device, dtype, peers, compiled: {
        name: (None, name, shape["MICRO_BATCH_SIZE"]) for name in "abc"})  # fmt: skip
    monkeypatch.setattr(training, "start", lambda work, name, size, *_: Connection(*(
        (f"product {name}", None) if work is training.product_steps else (name, size))))  # fmt: skip
    monkeypatch.setattr(training, "SQUARES", {"cpu": (8,)})
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    contestants, found = training.measure_gpu("cpu", "bfloat16", {}, (32, 16, 64), True, 2, 1.0)
    assert {name: facts["micro_batch"] for name, facts in contestants.items()} == {"a": 16, "c": 32}
    assert found == {"product 8": [1e9] * 2, "a": [120.0] * 2, "c": [90.0] * 2}
    assert {c.key for c in open_ones if c.key[0] != "b"} == set(closed)


def test_micro_batches_divide_a_step(tmp_path):
    with pytest.raises(ValueError, match="--micro-batches 48: a step has 64 windows"):
        training.main(["--gpu", "--device", "cpu", "--micro-batches", "48"])
    with pytest.raises(ValueError, match="has no model.py"):
        training.main(["--gpu", "--device", "cpu", "--nanogpt", str(tmp_path)])


def test_the_rungs_are_made_of_the_shape_and_of_themselves():
    """Constants are those of the shape, and where it says nothing the rung's own: a name that no rung has would end
    there."""
    makers = training.gpu_makers({**TINY, "MICRO_BATCH_SIZE": 2}, "cuda", "bfloat16", {}, True)
    for _, rung, constants in makers.values():
        known = harness.constants(vars(__import__(rung)))
        assert {name for name in constants if name.isupper()} <= set(known)
        assert constants["COMPILE"] and constants["vocabulary"] == 70 and constants["DROPOUT"] == 0.0
    assert [constants.get("POSITION") for *_, constants in makers.values()] == [None, "rope", "alibi"]


@pytest.mark.parametrize(("name", "position"), [("v3", None), *((V4, scheme) for scheme in SCHEMES)])
def test_one_formula_for_all(name, position, load):
    """It is what counting gives for the rungs."""
    shape = {"N_LAYER": 2, "N_HEAD": 2, "N_EMBD": 32, "BLOCK_SIZE": 32, "vocabulary": 128}
    module = load(name, **{k: v for k, v in shape.items() if k.isupper()})
    x = random_ids(1, 32, vocab_size=128)
    model = make_model(module, 128, position or "alibi")
    assert training.flops_per_token(shape) == flops.per_token(model, (x, x))
    assert training.flops_per_token(shape) - training.flops_per_token(shape, attention=0.5) == 6 * 2 * 32 * 32


def test_a_program_waits_for_the_step_before(monkeypatch):
    """On a GPU: of three steps for the first two, each when the next one has been asked for."""
    did = []

    class Event:
        def __init__(self):
            self.k = sum("record" in line for line in did)

        def record(self):
            did.append(f"record {self.k}")

        def synchronize(self):
            did.append(f"wait {self.k}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    on_cpu = steps.StepBehind("cpu")
    on_cpu.wait()
    on_cpu.wait()
    assert did == []
    on_gpu = steps.StepBehind("cuda")
    for _ in range(3):
        on_gpu.wait()
    assert did == ["record 0", "record 1", "wait 0", "record 2", "wait 1"]


def test_transformers_at_its_best(monkeypatch):
    """Two steps of GPT-2 in micro-batches, compiled, in bfloat16 and with fused AdamW, train every weight. Attention is
    causal without a mask, as flash kernels need it."""
    pytest.importorskip("transformers")
    models, calls, compile_usually = [], [], torch.compile

    def backend(graph, inputs):
        calls.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    def make(*arguments):
        model = training.gpu_peers(None)[training.HF](*arguments)
        models.append((model, {name: p.clone() for name, p in model.named_parameters()}))
        return model

    class Turns:
        facts, n = {}, 0

        def done(self, amount):
            assert amount == 4 * 16
            self.n += 1
            return self.n < 3

    monkeypatch.setattr(torch, "compile", lambda function: compile_usually(function, backend=backend))
    turns, shape = Turns(), {**TINY, "vocabulary": 128, "MICRO_BATCH_SIZE": 2}
    training.peer_steps(turns, make, shape, best="bfloat16")
    [(model, before)] = models
    assert (turns.n, turns.facts) == (3, {"compiled": True})
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
