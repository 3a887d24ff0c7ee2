"""results/experiments.py: its plan, the edits that lead from v3 to v4, runs that stop and go on, tables."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import V4, randomize, short_tokens

import data

ROOT = Path(__file__).resolve().parents[1]
TINY = ["DEVICE=cpu", "COMPILE=False", "DTYPE=float32", "N_LAYER=1", "N_HEAD=2", "N_EMBD=32", "BLOCK_SIZE=32",
        "BATCH_SIZE=8", "MICRO_BATCH_SIZE=8", "STRIDE=16", "SAMPLE_TOKENS=4", "WARMUP_STEPS=4"]  # fmt: skip


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """results/experiments.py, with folders of its own."""
    spec = importlib.util.spec_from_file_location("experiments", ROOT / "results" / "experiments.py")
    module = sys.modules["experiments"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    yield module
    del sys.modules["experiments"]


def test_the_plan(experiments):
    """Every constant exists in its rung, no two runs share a file, every comparison has three seeds or says so."""
    import harness

    files = []
    for name, experiment in experiments.EXPERIMENTS.items():
        assert len(experiment.seeds) == 3 or name == "learning_rate"
        assert experiment.asks.endswith("?") or "?" in experiment.asks
        assert set(experiment.columns) <= experiments.TITLES.keys()
        for run in experiment.runs:
            known = harness._read_source(ROOT / f"{run.rung}.py")[0]
            assert run.constants.keys() <= known.keys(), run
            assert run.measure in ("", *experiments.MEASURES)
            files += [experiments.result_file(name, run, seed, False) for seed in experiment.seeds]
    assert len(files) == len(set(files))


def variant(experiments, edits, tmp_path, name="v3"):
    """v3 after `edits`, as a module."""
    path = tmp_path / "edited" / "v3.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(experiments.edited((ROOT / "v3.py").read_text(encoding="utf-8"), edits), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_v3", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHAPE = {"N_LAYER": 2, "N_HEAD": 2, "N_EMBD": 32, "BLOCK_SIZE": 32, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8,
         "WARMUP_STEPS": 4, "MAX_STEPS": 20, "DEVICE": "cpu", "DTYPE": "float32"}  # fmt: skip


def test_the_edits_lead_from_v3_to_the_model_of_v4(experiments, load, tmp_path):
    """With all of them v3 has v4's logits for v4's weights, v4's schedule, and v4's rates for embeddings and head."""
    v4 = load(V4, **SHAPE, COOLDOWN=0.5, LEARNING_RATE_ADAMW=0.01)
    v3 = variant(experiments, experiments.from_v3_to_v4()[-2].edits, tmp_path)
    vars(v3).update(SHAPE)
    theirs, ours = randomize(v4.LanguageModel(50, "rope"), 0.3).eval(), v3.LanguageModel(50).eval()
    for p in (ours.head.weight, *(w for b in ours.blocks for w in (b.attention.proj.weight, b.mlp[-1].weight))):
        assert not p.any()  # zeros at the start
    weights = {k.replace("mlp.fc", "mlp.0").replace("mlp.proj", "mlp.2"): w for k, w in theirs.state_dict().items()}
    ours.load_state_dict(weights)  # every weight of one is one of the other
    idx = torch.randint(50, (2, 32))
    torch.testing.assert_close(ours(idx), theirs(idx))
    assert [v3.lr_factor(k) for k in range(20)] == pytest.approx([v4.lr_factor(k) for k in range(20)])
    groups = v3.make_optimizer(ours).param_groups
    outer = [group for group in groups if "factor" in group]
    assert [id(p) for group in outer for p in group["params"]] == [id(ours.embedding.weight), id(ours.head.weight)]
    assert outer[0]["factor"] * v3.LEARNING_RATE == pytest.approx(v4.LEARNING_RATE_ADAMW)
    held = sorted(id(p) for group in groups for p in group["params"])
    assert held == sorted(id(p) for p in ours.parameters())


def test_every_edit_on_the_way_trains(experiments, tmp_path):
    """Each step is another model or another optimizer, and its loss falls."""
    ids = torch.arange(3000) * 7 % 50
    for run in experiments.from_v3_to_v4()[1:-1]:
        v3 = variant(experiments, run.edits, tmp_path)
        vars(v3).update(SHAPE)
        torch.manual_seed(1)
        model = v3.LanguageModel(50)
        optimizer, losses = v3.make_optimizer(model), []
        for step in range(15):
            loss = model(*v3.get_batch(ids, step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.2, run.name


def test_an_edit_that_does_not_find_its_place_is_refused(experiments):
    for text in ("b", "a a"):
        with pytest.raises(ValueError, match="finds its place"):
            experiments.edited(text, (("a", "c"),))
    assert experiments.edited("a b", (("a", "c"), ("c b", "d"))) == "d"


@pytest.fixture
def tiny(experiments, monkeypatch, data_dir):
    """An experiment of two runs on a text of some thousand tokens."""
    text = {"DATA": str(data_dir), "VOCABULARY": "bpe_vocab_500.json", "MAX_STEPS": 6}
    runs = [experiments.Run("v3: no cosine", "v3", text, experiments.SCHEDULE),
            experiments.Run("v4", V4, {**text, "POSITION": "rope"}, measure="windows")]  # fmt: skip
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", experiments.Experiment("Does it run?", runs, seeds=(2,)))
    return experiments


def test_runs_are_made_once_and_go_on(tiny, capfd, monkeypatch):
    """Edited and plain; what is there is not made again, and a run that had begun goes on from its checkpoint."""
    started, start = [], tiny.start
    monkeypatch.setattr(tiny, "start", lambda run, *rest: started.append(run.name) or start(run, *rest))
    tiny.main(["tiny", *TINY])
    assert started == ["v3: no cosine", "v4"]
    assert "| v4 | 1 |" in capfd.readouterr().out
    files = sorted(path.name for path in (tiny.RESULTS / "tiny").iterdir())
    assert files == ["table.md", "v3-no-cosine-2.json", "v4-2.json"]
    found = json.loads((tiny.RESULTS / "tiny" / "v4-2.json").read_text())
    assert found["summary"]["seed"] == 2 and found["log"][-1]["val_bpb"] == found["summary"]["val_bpb"]
    assert found["command"].startswith("python v4_alibi_rope.py EVAL_INTERVAL=160 ") and found["machine"]
    assert "SEED=2" in found["command"].split()
    assert set(found["measured"]) == {"side_by_side", "sliding", "nats_by_place"}
    assert json.loads((tiny.RESULTS / "tiny" / "v3-no-cosine-2.json").read_text())["edits"]

    tiny.main(["tiny", *TINY])
    assert len(started) == 2
    (tiny.RESULTS / "tiny" / "v4-2.json").unlink()
    (tiny.WORK / "tiny" / "v4-2" / "run" / "summary.json").unlink()
    capfd.readouterr()
    tiny.main(["tiny", *TINY])
    assert len(started) == 3 and "going on from step 6" in capfd.readouterr().out
    tiny.main(["--list"])
    assert "tiny            2 of 2 runs" in capfd.readouterr().out


def test_a_run_that_fails_ends_with_a_line(tiny, capfd):
    with pytest.raises(ValueError, match="has ended with exit code 1; its message stands above"):
        tiny.main(["tiny", *TINY, "MAX_STEPS=0"])
    assert "MAX_STEPS=0 must be" in capfd.readouterr().err
    with pytest.raises(ValueError, match="no run of tiny is done"):
        tiny.main(["tiny", "--table"])


def test_steps_for_a_time_and_for_a_text(experiments, monkeypatch, tmp_path, data_dir):
    """From the speed of a trial after its first third, and from the bytes that a token has."""
    rows = [f"{k},{1000 * k},1,1,1,{100 if k <= 10 else 2000}" for k in range(1, 31)]

    def trial(run, folder, constants):
        folder.mkdir(parents=True)
        (folder / "steps.csv").write_text("\n".join(["head", *rows]) + "\n")

    monkeypatch.setattr(experiments, "start", trial)
    assert experiments.steps_in(None, 60, tmp_path / "run", {}) == 120  # 1,000 tokens a step, 2,000 a second
    module = importlib.import_module("v3")
    tokens = data.load_tokens("bpe_vocab_500.json", str(data_dir))["train"]
    constants = {"VOCABULARY": "bpe_vocab_500.json", "DATA": str(data_dir), "BATCH_SIZE": 4, "BLOCK_SIZE": 32}
    n = experiments.steps_on(0.5, module, constants)
    assert n * 4 * 32 * tokens.n_bytes / len(tokens) == pytest.approx(5e5, rel=0.01)


class Knows:
    """What `windows` needs of a tokenizer."""

    decode_bytes = staticmethod(lambda ids: b"ab" * len(ids))


def test_what_is_measured_in_windows(experiments, load, monkeypatch):
    """Against one pass over the whole for each window."""
    monkeypatch.setattr(experiments, "WINDOW_TOKENS", 700)
    module = load(V4)
    model, tokens = randomize(module.LanguageModel(500, "alibi"), 0.1).eval(), short_tokens(module, 900)
    found = experiments.windows(module, model, tokens, Knows)
    ids = tokens["val"].ids[:700].long()
    nats = [F.cross_entropy(model(ids[None, i : i + 64])[0][: len(ids) - 1 - i], ids[i + 1 : i + 65], reduction="sum")
            for i in range(0, 699, 64)]  # fmt: skip
    assert found["side_by_side"][64] == pytest.approx(sum(nats).item() / math.log(2) / (2 * 699), rel=1e-5)
    assert found["sliding"][64] != pytest.approx(found["side_by_side"][64], rel=1e-6)
    first = [F.cross_entropy(model(ids[None, i : i + 128])[0][:32], ids[i + 1 : i + 33]) for i in range(0, 640, 128)]
    assert len(found["nats_by_place"]) == 4
    assert found["nats_by_place"][0] == pytest.approx(sum(first).item() / 5, rel=1e-5)


def test_the_temperature_is_that_of_the_least_loss(experiments, load, monkeypatch):
    """Logits that are 1.2 times too large ask for about 1.2 times the temperature of the others."""
    monkeypatch.setattr(experiments, "WINDOW_TOKENS", 700)
    module, found = load("v3"), []
    tokens = short_tokens(module, 900)
    model = randomize(module.LanguageModel(500), 0.08).eval()
    ids = tokens["val"].ids[:700].long()
    y = torch.cat([ids[i + 1 : i + 33] for i in range(0, 668, 32)])
    logits = torch.cat([model(ids[None, i : i + 32])[0] for i in range(0, 668, 32)])
    with torch.no_grad():
        loss = [F.cross_entropy(logits / t, y).item() for t in [0.8 + 0.02 * k for k in range(21)]]
    found = experiments.temperature(module, model, tokens, None)
    assert found["temperature"] == pytest.approx(0.8 + 0.02 * loss.index(min(loss)))
    hot = module.evaluate(experiments.Tempered(model, found["temperature"]), tokens["test"])
    assert found["test_tempered"] == hot and found["test"] == module.evaluate(model, tokens["test"])


def test_spreads(experiments):
    assert experiments.spread([1.0, 2.0, 4.5]) == "2.5000 (1.0000 to 4.5000)"
    assert experiments.spread([3, 3], "{:,.0f}") == "3"
    assert experiments.spread([None]) == "–"


@pytest.mark.parametrize("name", [p.parent.name for p in sorted((ROOT / "results" / "experiments").glob("*/table.md"))])
def test_committed_tables_are_those_of_the_committed_runs(name, experiments, tmp_path):
    shutil.copytree(ROOT / "results" / "experiments" / name, tmp_path / "results" / name)
    expected = (ROOT / "results" / "experiments" / name / "table.md").read_text(encoding="utf-8")
    assert experiments.report(name.removesuffix("_gpu"), name.endswith("_gpu")) == expected


def test_an_unknown_experiment_is_refused():
    command = [sys.executable, "results/experiments.py", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice" in done.stderr
