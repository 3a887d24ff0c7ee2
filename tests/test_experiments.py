"""results/experiments.py: its plan, the edits that lead from v3 to v4, runs that stop and go on, tables."""

import contextlib
import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
    """Every constant exists in its rung, no two trainings share a file, every comparison has three seeds or says so."""
    import harness

    files = {}
    for name, experiment in experiments.EXPERIMENTS.items():
        assert len(experiment.seeds) == 3 or name in ("two_hours", "best")
        assert experiment.asks.endswith("?")
        assert set(experiment.columns) <= experiments.TITLES.keys()
        assert len({run.name for run in experiment.runs}) == len(experiment.runs)
        for run in experiment.runs:
            known = harness._read_source(ROOT / f"{run.rung}.py")[0]
            assert run.constants.keys() <= known.keys(), run
            assert run.measure in ("", *experiments.MEASURES)
            experiments.edited((ROOT / f"{run.rung}.py").read_text(encoding="utf-8"), run.edits)
            files.setdefault(experiments.result_file(run, 1), []).append(run)
            assert experiments.owner(run)[1].measure or not run.measure, run  # measured where it is made
    for runs in files.values():
        assert all(run.training() == runs[0].training() for run in runs)


def test_what_two_experiments_have_in_common_is_made_once(experiments):
    """v3 with its default constants: in the folder of the ladder, whatever it is called elsewhere."""
    shared = [run for name in ("ladder", "v3_to_v4", "learning_rate") for run in experiments.EXPERIMENTS[name].runs
              if run.training() == experiments.Run("v3", "v3").training()]  # fmt: skip
    assert [run.name for run in shared] == ["v3", "v3", "0.002"]
    assert {experiments.result_file(run, 7) for run in shared} == {experiments.RESULTS / "ladder" / "v3-7.json"}


def variant(experiments, edits, tmp_path, name="v3"):
    """A rung after `edits`, as a module."""
    path = tmp_path / "edited" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    path.write_text(experiments.edited(text, edits), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"edited_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(experiments):
    """The runs between v3 and v4, each of them v3 with more edits."""
    return [run for run in experiments.from_v3_to_v4() if run.name.startswith("+") and run.rung == "v3"]


SHAPE = {"N_LAYER": 2, "N_HEAD": 2, "N_EMBD": 32, "BLOCK_SIZE": 32, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8,
         "WARMUP_STEPS": 4, "MAX_STEPS": 20, "DEVICE": "cpu", "DTYPE": "float32"}  # fmt: skip


def test_the_edits_lead_from_v3_to_the_model_of_v4(experiments, load, tmp_path):
    """With all of them v3 has v4's logits for v4's weights, v4's schedule, and v4's rates for embeddings and head."""
    v4 = load(V4, **SHAPE, COOLDOWN=0.5, LEARNING_RATE_ADAMW=0.01)
    v3 = variant(experiments, steps(experiments)[-1].edits, tmp_path)
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
    assert len(steps(experiments)) == len(experiments.STEPS_TO_V4)
    ids = torch.arange(3000) * 7 % 50
    for run in steps(experiments):
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


def test_what_v4_is_tried_with_in_two_hours(experiments, tmp_path):
    """A decay shrinks a matrix of the blocks by the rate times it; tied, embeddings and head are one; dropout in the
    MLP sets a share of its numbers to zero."""
    shape = SHAPE | {"DROPOUT": 0.0, "LEARNING_RATE": 0.05}
    moved = []
    for edits in ((), experiments.weight_decay(0.5)):
        v4 = variant(experiments, edits, tmp_path, V4)
        vars(v4).update(shape)
        torch.manual_seed(1)
        model = randomize(v4.LanguageModel(50, "rope"), 0.1)
        before = model.blocks[0].mlp.fc.weight.detach().clone()
        model(*v4.get_batch(torch.arange(3000) * 7 % 50, 0)).backward()
        for optimizer in v4.make_optimizers(model):
            optimizer.step()
        moved.append(model.blocks[0].mlp.fc.weight.detach())
    torch.testing.assert_close(moved[0] - moved[1], 0.05 * 0.5 * before)

    v4 = variant(experiments, experiments.TIED, tmp_path, V4)
    vars(v4).update(shape)
    model = v4.LanguageModel(50, "rope")
    assert model.head.weight is model.embedding.weight and 0.01 < model.head.weight.std() < 0.03
    v4 = variant(experiments, experiments.DROPOUT_INSIDE, tmp_path, V4)
    vars(v4).update(shape | {"DROPOUT": 0.5})
    mlp = v4.MLP()
    x = torch.randn(64, 32)
    assert not torch.allclose(mlp(x), mlp(x)) and torch.equal(mlp.eval()(x), mlp(x))


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
    monkeypatch.setattr(experiments, "WINDOW_TOKENS", 1000)
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
    assert found["command"].startswith("python v4_alibi_rope.py DATA=") and found["machine"]
    assert "EVAL_INTERVAL=1" in found["command"].split()  # an eighth of six steps
    assert "SEED=2" in found["command"].split()
    assert set(found["measured"]) == {"side_by_side", "sliding", "nats_by_place"}
    assert json.loads((tiny.RESULTS / "tiny" / "v3-no-cosine-2.json").read_text())["edits"]

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "prepare", lambda runs: pytest.fail("what is done needs no text"))
        tiny.main(["tiny", *TINY])
    assert len(started) == 2
    (tiny.RESULTS / "tiny" / "v3-no-cosine-2.json").unlink()
    (tiny.WORK / "tiny" / "v3-no-cosine-2" / "run" / "summary.json").unlink()
    capfd.readouterr()
    tiny.main(["tiny", *TINY])
    assert len(started) == 3 and "going on from step 6" in capfd.readouterr().out
    tiny.main(["--list"])
    assert "tiny            2 of 2 runs" in capfd.readouterr().out


def test_the_list_needs_no_tokens(tiny, capsys, monkeypatch):
    """How many steps some text is depends on its vocabulary; where that is not here the runs that are done tell it."""
    run = tiny.Run("large", "v2", megabytes=1, vocab_size=333)
    monkeypatch.setitem(tiny.EXPERIMENTS, "tiny", tiny.Experiment("Does it run?", [run], seeds=(2,)))
    monkeypatch.setattr(tiny, "read_pace", lambda: {"seconds": {tiny.key_of_pace(run): 36.0}})
    tiny.main(["--list"])
    assert "tiny            0 of 1 runs\n" in capsys.readouterr().out
    tiny.write(tiny.result_file(run, 2), json.dumps({"summary": {"steps": 500}}))
    tiny.main(["--list"])
    assert "tiny            1 of 1 runs, 5.0 h of training" in capsys.readouterr().out


def test_runs_of_different_texts_are_not_compared(tiny, monkeypatch, data_dir):
    """A run is refused, before it begins, where those that are done have read another text, in data/ or in a home that
    is part of it; DATA=... is not let in either. Where nothing is done, any text will do."""
    monkeypatch.setattr(data, "DATA_DIR", data_dir)  # the sample
    monkeypatch.setattr(tiny, "make_all", lambda todo, *rest: pytest.fail("it has begun"))
    run, other = tiny.Run("a", "v3", {"DROPOUT": 0.375}), tiny.Run("b", "v3", {"DROPOUT": 0.125})
    monkeypatch.setitem(tiny.EXPERIMENTS, "tiny", tiny.Experiment("Does it run?", [run, other], seeds=(2, 3)))
    todo = [(other, 2), (run, 3)]
    tiny.check_texts(todo, {})
    summary = {"dataset": "sample"}
    path = tiny.result_file(other, 3)
    tiny.write(path, json.dumps({"summary": summary}))
    tiny.check_texts(todo, {})
    tiny.check_texts(todo, {}, gpu=True)
    tiny.write(path, json.dumps({"summary": {"dataset": "wikitext-2-v1"}}))
    with pytest.raises(ValueError, match="data holds 'sample', and the runs in results/experiments/tiny are of 'wikit"):
        tiny.main(["tiny"])
    tiny.check_texts(todo, {}, gpu=True)  # those are kept in a folder of their own
    tiny.write(tiny.result_file(other, 3, gpu=True), json.dumps({"summary": {"dataset": "wikitext-103-v1"}}))
    with pytest.raises(ValueError, match="experiments/tiny_gpu are of 'wikitext-103-v1'"):
        tiny.check_texts(todo, {}, gpu=True)
    tiny.write(path, json.dumps({"summary": summary}))
    with pytest.raises(FileNotFoundError, match="there is no text in novel"):
        tiny.check_texts(todo, {"DATA": "novel"})


def test_several_runs_at_a_time(tiny, capfd, monkeypatch):
    """The same files as one after the other; what fails is said after the others, and where its message is."""
    runs = [tiny.Run(name, "v0", tiny.EXPERIMENTS["tiny"].runs[0].constants) for name in "ab"]
    runs[1].constants = {**runs[1].constants, "LEARNING_RATE": 0.25}
    monkeypatch.setitem(tiny.EXPERIMENTS, "tiny", tiny.Experiment("Do they run?", runs, seeds=(2,)))
    monkeypatch.setattr(tiny, "ProcessPoolExecutor", ThreadPool)
    tiny.main(["tiny", *TINY, "--jobs", "2"])
    assert sorted(path.name for path in (tiny.RESULTS / "tiny").iterdir()) == ["a-2.json", "b-2.json", "table.md"]
    assert "tiny/b-2.json: val bpb" in capfd.readouterr().out
    (tiny.RESULTS / "tiny" / "b-2.json").unlink()
    shutil.rmtree(tiny.WORK / "tiny" / "b-2")
    with pytest.raises(ValueError, match="has ended with exit code 1; its message stands in .*screen.txt"):
        tiny.main(["tiny", *TINY, "MAX_STEPS=0", "--jobs", "2"])
    assert "MAX_STEPS=0 must be" in (tiny.WORK / "tiny" / "b-2" / "screen.txt").read_text()


class ThreadPool(ThreadPoolExecutor):
    """In place of processes, which would not know the tiny experiment."""

    def __init__(self, jobs, context, initializer):
        super().__init__(jobs)


STOPPED = """import signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/results"]
import experiments
experiments.WORK, experiments.RESULTS = Path("work"), Path("results")
runs = [experiments.Run(f"run {{k}}", "v0", {{"LEARNING_RATE": 0.1 * k}}) for k in (1, 2, 3, 4, 5)]
experiments.EXPERIMENTS["tiny"] = experiments.Experiment("Does it stop?", runs, seeds=(1337,))
experiments.prepare = lambda runs: None
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell has started in the background ignores it
    experiments.program(["tiny", "DATA={data}", "MAX_STEPS=1000000", "PATIENCE=1000000", "DEVICE=cpu", *sys.argv[1:]])
"""


@pytest.mark.parametrize(("signum", "jobs"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_what_stops_it_stops_its_runs(signum, jobs, tmp_path, data_dir):
    """Each run that had begun has a checkpoint of the step that it had come to, no other has begun, and no process is
    left. SIGTERM goes to the program alone, Ctrl-C to all of its processes, as a terminal sends it."""
    (tmp_path / "stopped.py").write_text(STOPPED.format(root=str(ROOT), data=data_dir))
    process = subprocess.Popen([sys.executable, "stopped.py", "--jobs", str(jobs)], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        steps = [tmp_path / "work" / "tiny" / f"run-{k}-1337" / "run" / "steps.csv" for k in range(1, jobs + 1)]
        until = time.monotonic() + 300
        while not all(path.exists() and len(path.read_text().splitlines()) > 3 for path in steps):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        (os.kill if signum == signal.SIGTERM else os.killpg)(process.pid, signum)
        _, errors = process.communicate(timeout=300)
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < until:  # until the last process has been reaped
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signum
    assert errors.splitlines()[-1] == "experiments.py: stopped; the same command goes on from the last checkpoint"
    assert "Traceback" not in errors
    assert sorted(path.name for path in (tmp_path / "work" / "tiny").iterdir()) == [
        f"run-{k}-1337" for k in range(1, jobs + 1)]  # fmt: skip
    for path in steps:
        saved = torch.load(path.parent / "checkpoint.pt", weights_only=True)
        assert str(saved["step"]) == path.read_text().splitlines()[-1].partition(",")[0]


def test_a_run_that_fails_ends_with_a_line(tiny, capfd):
    with pytest.raises(ValueError, match="has ended with exit code 1; its message stands above"):
        tiny.main(["tiny", *TINY, "MAX_STEPS=0"])
    assert "MAX_STEPS=0 must be" in capfd.readouterr().err
    with pytest.raises(ValueError, match="no run of tiny is done"):
        tiny.main(["tiny", "--table"])


def test_steps_for_as_much_text(experiments, data_dir):
    """From the bytes that a token has."""
    module = importlib.import_module("v3")
    tokens = data.load_tokens("bpe_vocab_500.json", str(data_dir))["train"]
    constants = {"VOCABULARY": "bpe_vocab_500.json", "DATA": str(data_dir), "BATCH_SIZE": 4, "BLOCK_SIZE": 32}
    n = experiments.steps_on(0.5, module, constants)
    assert n * 4 * 32 * tokens.n_bytes / len(tokens) == pytest.approx(5e5, rel=0.01)


def test_the_pace_is_that_of_a_run(tiny, monkeypatch, capfd):
    """A trial is broken off, its steps but the first ones count; steps for a time follow from it; what is known is not
    measured again unless asked for, and never beside what another machine has measured."""
    run = tiny.EXPERIMENTS["tiny"].runs[1]
    run.constants |= {"N_LAYER": 1, "N_EMBD": 32, "N_HEAD": 2, "BLOCK_SIZE": 16, "BATCH_SIZE": 4, "COMPILE": False}
    with pytest.raises(ValueError, match="was not measured yet: python results/experiments.py tiny --pace"):
        tiny.pace_of(run)
    tiny.measure_pace([run], again=False)
    kept = json.loads((tiny.RESULTS / "pace.json").read_text())
    (key,) = kept["seconds"]
    assert key == (f"{V4} VOCABULARY=bpe_vocab_500.json BATCH_SIZE=4 BLOCK_SIZE=16 N_LAYER=1 N_HEAD=2 N_EMBD=32 "
                   "POSITION=rope")  # fmt: skip
    assert 1e-4 < kept["seconds"][key] < 5
    assert 100 < kept["libraries_mb"] < kept["peak_mb"][key]
    monkeypatch.setattr(tiny, "trial", lambda run: (0.25, 1.0))
    tiny.measure_pace([run], again=False)
    assert tiny.pace_of(run) == kept["seconds"][key]
    tiny.measure_pace([run])
    assert tiny.pace_of(run) == 0.25

    timed = tiny.Run("timed", V4, run.constants, seconds=1)
    timed.constants.pop("MAX_STEPS")
    monkeypatch.setitem(tiny.EXPERIMENTS, "tiny", tiny.Experiment("?", [timed], seeds=(2,)))
    assert tiny.make(timed, 2, {"SAMPLE_TOKENS": "1", "DEVICE": "cpu", "STRIDE": "16", "DTYPE": "float32"}) is None
    assert tiny.read_found(timed, [2])[0]["summary"]["steps"] == 4
    monkeypatch.setattr(tiny, "machine", lambda: "another")
    with pytest.raises(ValueError, match="measured on another machine"):
        tiny.measure_pace([run], again=False)
    monkeypatch.setattr(tiny, "libraries_mb", lambda: 50.0)
    tiny.measure_pace([timed])
    assert tiny.read_pace() | {"date": ""} == {"machine": "another", "date": "", "seconds": {key: 0.25},
                                               "peak_mb": {key: 1.0}, "libraries_mb": 50.0}  # fmt: skip


def test_a_tenth_is_the_beginning_of_the_text(experiments, monkeypatch, tmp_path, data_dir):
    """Its counts are those of its text, and it is loaded like any other."""
    monkeypatch.setattr(experiments, "token_file",
                        lambda split, vocabulary: data_dir / f"{split}_ids_500.pt")  # fmt: skip
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copyfile(data_dir / "bpe_vocab_500.json", tmp_path / "data" / "bpe_vocab.json")
    experiments.make_tenth(tmp_path / "tenth")
    whole = data.load_tokens("bpe_vocab_500.json", str(data_dir))
    part = data.load_tokens("bpe_vocab.json", str(tmp_path / "tenth"))
    assert part["train"].ids.tolist() == whole["train"].ids[: len(whole["train"]) // 10].tolist()
    assert part["val"].ids.tolist() == whole["val"].ids.tolist()
    tokenizer = experiments.harness.BPETokenizer.load(data_dir / "bpe_vocab_500.json")
    text = tokenizer.decode_bytes(part["train"].ids.tolist())
    assert (part["train"].n_bytes, part["train"].n_words) == (len(text), len(text.split()) + text.count(b"\n"))


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


def test_reading_on(experiments, load):
    """Without a rate it is the evaluation in sliding windows; with one it learns a text that repeats itself, and leaves
    the model as it was. The first step is that of an optimizer whose rates are divided by the sizes."""
    module = load("v3")
    model, tokens = randomize(module.LanguageModel(500), 0.1).eval(), short_tokens(module, 897)
    ones = [torch.ones_like(p) for p in model.parameters()]
    still = experiments.dynamic_evaluation(module, model, tokens["val"], 0.0, ones, stride=16)
    assert still["bpb"] == pytest.approx(module.evaluate(model, tokens["val"], stride=16)["bpb"], rel=1e-5)
    again = copy.copy(tokens["val"])
    again.ids = tokens["val"].ids[:100].repeat(9)
    before = model.head.weight.clone()
    still, learned = (experiments.dynamic_evaluation(module, model, again, rate, ones, stride=16)["bpb"]
                      for rate in (0, 1.0))  # fmt: skip
    assert learned < 0.9 * still and torch.equal(model.head.weight, before)

    two = copy.copy(tokens["val"])
    two.ids, ids = tokens["val"].ids[:25], tokens["val"].ids[:25].long()
    sizes = [torch.full_like(p, 1 + k) for k, p in enumerate(model.parameters())]
    found = experiments.dynamic_evaluation(module, model, two, 0.5, sizes, stride=16)
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.5 / (1 + k)} for k, p in enumerate(model.parameters())])
    first = F.cross_entropy(model(ids[None, :16])[0], ids[1:17])
    first.backward()
    optimizer.step()
    second = F.cross_entropy(model(ids[None, :24])[0, 16:], ids[17:], reduction="sum")
    nats = 16 * first.item() + second.item()
    assert found["word_ppl"] == pytest.approx(math.exp(nats / two.n_words), rel=1e-5)


def test_sizes_of_gradients(experiments, load):
    """Of a text that has two windows, which `backward` goes through one by one."""
    module = load("v3")
    model, tokens = randomize(module.LanguageModel(500), 0.1), short_tokens(module, 897)["val"]
    size = model.block_size
    tokens.ids = tokens.ids[: 2 * size + 1]
    sizes = experiments.gradient_sizes(module, model, tokens, stride=5, n=2)
    squares = [0.0] * len(sizes)
    for ids in (tokens.ids[: size + 1].long(), tokens.ids[size:].long()):
        model.zero_grad()
        (-model(ids[None, :-1])[0].log_softmax(-1)[range(size), ids[1:]][-5:].mean()).backward()
        squares = [square + p.grad**2 / 2 for square, p in zip(squares, model.parameters())]
    for found, square in zip(sizes, squares, strict=True):
        torch.testing.assert_close(found, square**0.5 + 1e-4)


def test_the_rate_of_reading_on_is_chosen_on_the_validation_split(experiments, load, monkeypatch):
    """And the test split is read with that rate, and in windows that slide by 64, by the model as it was; the sizes of
    gradients are those on the training split."""
    monkeypatch.setattr(experiments, "WINDOW_TOKENS", 600)
    monkeypatch.setattr(experiments, "first_part", lambda tokens, tokenizer, n: short_tokens(module, n)["val"])
    module = load("v3", BLOCK_SIZE=128)
    model, tokens = randomize(module.LanguageModel(500), 0.1).eval(), short_tokens(module, 700)
    tokens["test"] = tokens["val"]
    found = experiments.best(module, model, tokens, None)
    part, sizes = short_tokens(module, 300)["val"], experiments.gradient_sizes(module, model, tokens["train"])
    for rate, bpb in found["rates"].items():
        assert bpb == experiments.dynamic_evaluation(module, model, part, rate, sizes)["bpb"]
    rate = min(found["rates"], key=found["rates"].get)
    assert rate > 0
    assert found["test_reading_on"] == experiments.dynamic_evaluation(module, model, tokens["test"], rate, sizes)
    assert found["test_sliding"] == module.evaluate(model, tokens["test"], stride=64)


def test_spreads(experiments):
    assert experiments.spread([1.0, 2.0, 4.5]) == "2.5000 (1.0000 to 4.5000)"
    assert experiments.spread([3, 3], "{:,.0f}") == "3"
    assert experiments.spread([1.00001, 1.00003]) == "1.0000 (1.0000 to 1.0000)"  # several seeds, and seen to be
    assert experiments.spread([None]) == "–"


@pytest.mark.parametrize("name", [p.parent.name for p in sorted((ROOT / "results" / "experiments").glob("*/table.md"))])
def test_committed_tables_are_those_of_the_committed_runs(name, experiments, tmp_path):
    shutil.copytree(ROOT / "results" / "experiments" / name, tmp_path / "results" / name)
    expected = (ROOT / "results" / "experiments" / name / "table.md").read_text(encoding="utf-8")
    for other in (ROOT / "results" / "experiments").iterdir():  # a run may be kept in the folder of another
        if other.name != name:
            (shutil.copytree if other.is_dir() else shutil.copyfile)(other, tmp_path / "results" / other.name)
    assert experiments.report(name.removesuffix("_gpu"), name.endswith("_gpu")) == expected


def test_an_unknown_experiment_is_refused():
    command = [sys.executable, "results/experiments.py", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "there is no experiment 'nothing'; known are ladder, " in done.stderr
