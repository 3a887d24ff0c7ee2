"""harness/flops.py and the column mfu of steps.csv: counted FLOPs against closed forms, peaks, and rows."""

import csv
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import harness
import kernels
from common import SCHEMES, V4, make_model, random_ids, tiny_tokens, train
from harness import flops, report

VOCAB_SIZE = 512


def batch(module):
    x = random_ids(3, module.BLOCK_SIZE, vocab_size=VOCAB_SIZE)
    return x, x


@pytest.mark.parametrize(
    ("name", "position"), [("v2", None), ("v3", None), ("v3_1", None), *((V4, scheme) for scheme in SCHEMES)]
)
def test_flops_of_a_transformer(name, position, load):
    """6 N + 12 L C T for each token (Chowdhery et al. 2022, appendix B): N are the weights of all products of matrices,
    in a block 3 C^2 for queries, keys and values, C^2 behind the heads, 8 C^2 in the MLP. Nothing else changes."""
    module = load(name, BLOCK_SIZE=48, N_LAYER=3, N_HEAD=2, **({} if name == "v2" else {"DROPOUT": 0.1}))
    L, C, T = 3, module.N_EMBD, 48
    model = make_model(module, VOCAB_SIZE, position or "alibi")
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    usual = kernels.ALiBiAttention.__call__
    assert flops.per_token(model, batch(module)) == 6 * (12 * L * C**2 + C * VOCAB_SIZE) + 12 * L * C * T
    assert torch.equal(torch.get_rng_state(), state) and kernels.ALiBiAttention.__call__ is usual
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["v1", "v1_1"])
def test_flops_of_the_mlp(name, load):
    module = load(name)
    weights = module.CONTEXT_SIZE * module.N_EMBD * module.N_HIDDEN + module.N_HIDDEN * VOCAB_SIZE
    assert flops.per_token(make_model(module, VOCAB_SIZE), batch(module)) == 6 * weights


def test_a_table_multiplies_nothing(load):
    module = load("v0")
    assert flops.per_token(make_model(module, VOCAB_SIZE), batch(module)) == 0


def test_what_a_gpu_adds_to_alibi_is_counted_too(load):
    """There the model holds what FlexAttention needs."""
    module = load(V4)
    model = make_model(module, VOCAB_SIZE)
    expected = flops.per_token(model, batch(module))
    for block in model.blocks:
        attention = block.attention.alibi_attention
        attention.flex = kernels.flex_parts(attention.slopes, module.BLOCK_SIZE, "cpu")
    assert flops.per_token(model, batch(module)) == expected > 0


class Edited(nn.Module):
    """A model as a reader may change it: a tensor that is no buffer, one that the first pass keeps, one made without
    a device."""

    def __init__(self, then=lambda x: x):
        super().__init__()
        self.embedding, self.head, self.then = nn.Embedding(64, 8), nn.Linear(8, 64, bias=False), then
        self.scale, self.kept = torch.ones(8), None

    def forward(self, idx, targets=None):
        if self.kept is None:
            self.kept = torch.arange(idx.size(1)) / 2
        return self.then(self.head(self.embedding(idx) * self.scale + self.kept[:, None])).mean()


def test_an_edited_model_is_counted_and_left_as_it_was():
    model = Edited()
    assert flops.per_token(model, [random_ids(2, 5)] * 2) == 6 * 8 * 64
    assert model.kept is None and model.scale.device.type == "cpu"


@pytest.mark.parametrize("then", [lambda x: x * x.mean().item(), lambda x: x @ x, lambda x: x.nothing])
def test_what_cannot_be_counted_ends_nothing(then):
    usual = kernels.ALiBiAttention.__call__
    assert flops.per_token(Edited(then), [random_ids(2, 5)] * 2) is None
    assert kernels.ALiBiAttention.__call__ is usual


# ----------------------------------------------------------------------------------------------------------
# Peaks
# ----------------------------------------------------------------------------------------------------------

GPUS = {  # as torch.cuda.get_device_name says them: TFLOP/s in bfloat16, in float32
    "Tesla V100-SXM2-16GB": (None, 15.7),
    "Tesla T4": (None, 8.1),
    "NVIDIA A10": (125, 31.2),
    "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 19.5),
    "NVIDIA L4": (121, 30.3),
    "NVIDIA L40S": (362, 91.6),
    "NVIDIA RTX A6000": (154.8, 38.7),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 91.1),
    "NVIDIA H100 80GB HBM3": (989, 67),
    "NVIDIA H100 PCIe": (756, 51),
    "NVIDIA H200": (989, 67),
    "NVIDIA GH200 480GB": (990, 67),
    "NVIDIA B200": (2250, 75),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (None, None),  # slower chips of a similar name
    "NVIDIA GeForce RTX 4090 D": (None, None),
    "Quadro RTX 6000": (None, None),
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": (None, None),  # a seventh of it
    "": (None, None),
}


def test_peaks_of_gpus():
    for name, peaks in GPUS.items():
        found = [flops.peak_of_gpu(name, dtype) for dtype in ("bfloat16", "float32")]
        assert found == [peak and pytest.approx(peak * 1e12) for peak in peaks], name
    assert flops.peak("mps", "float32") is None


def test_the_peak_of_a_cpu_is_the_best_of_its_products(monkeypatch):
    """On a clock that products move: those of 1,024 reach 200 GFLOP/s, smaller ones less. Larger ones would take too
    long on such a CPU. It is measured once."""
    clock, sizes = [0.0], []

    def mm(a, b, out):
        sizes.append(len(a))
        clock[0] += 2 * len(a) ** 3 / {512: 50e9, 1024: 200e9}[len(a)]

    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(torch, "mm", mm)
    flops.peak_of_cpu.cache_clear()
    try:
        assert flops.peak("cpu", "float32") == pytest.approx(200e9)
        assert set(sizes) == {512, 1024} and clock[0] < 0.1
        n = len(sizes)
        assert flops.peak("cpu", "float32") == pytest.approx(200e9) and len(sizes) == n
    finally:
        flops.peak_of_cpu.cache_clear()


# ----------------------------------------------------------------------------------------------------------
# steps.csv
# ----------------------------------------------------------------------------------------------------------


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_of(load, **constants):
    module = load("v1", MAX_STEPS=2, EVAL_INTERVAL=2, **constants)
    tokens = {"train": tiny_tokens(2000, 500), "val": tiny_tokens(100, 500)}
    train(module, tokens=tokens)
    return module, read(f"{module.OUT_DIR}/steps.csv")


def test_each_step_has_its_utilization(load, monkeypatch):
    """That is FLOPs per token times tokens per second, as a share of the peak."""
    monkeypatch.setattr(flops, "peak", lambda device, dtype: {("cpu", "float32"): 1e9}[device, dtype])
    module, rows = run_of(load)
    work = 6 * (module.CONTEXT_SIZE * module.N_EMBD * module.N_HIDDEN + module.N_HIDDEN * 500)
    for row in rows:
        assert float(row["mfu"]) == pytest.approx(work * float(row["tokens_per_second"]) / 1e9, rel=1e-3)


def test_all_devices_could_have_worked(monkeypatch):
    run = SimpleNamespace(token_flops=1e6, step_tokens=1000, peak_flops=1e9)
    monkeypatch.setattr(report, "world_size", lambda: 4)
    assert float(report.mfu(run, 2.0)) == pytest.approx(1e6 * 1000 / (2.0 * 1e9 * 4))


@pytest.mark.parametrize("unknown", ["peak", "per_token"])
def test_without_one_of_the_two_the_cell_is_empty(unknown, load, monkeypatch):
    monkeypatch.setattr(flops, unknown, lambda *arguments: None)
    _, rows = run_of(load)
    assert [row["mfu"] for row in rows] == ["", ""]


def test_rows_of_a_run_without_the_column_are_kept(load):
    """A run that began before there was such a column can be resumed; an incomplete row is dropped."""
    module, rows = run_of(load)
    path = f"{module.OUT_DIR}/steps.csv"
    with open(path, "w") as file:
        names = list(rows[0])[:-1]
        file.write(",".join(names) + "\n" + ",".join(rows[0][name] for name in names) + "\n1,256,8.1,0.1,0.5\n")
    with harness.override(vars(module), RESUME=True, MAX_STEPS=3):
        train(module, tokens={"train": tiny_tokens(2000, 500), "val": tiny_tokens(100, 500)})
    first, last = read(path)
    assert first == {**rows[0], "mfu": ""}
    assert last["step"] == "3" and float(last["mfu"]) > 0
