"""results/: the plan of the experiments, the edits that lead from v3 to v4, runs that stop and resume, step times, what
is measured of a model, tables."""

import copy
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import torch.nn.functional as F
from common import V4, randomize, short_tokens

import data
import harness
from benchmarks import mixture
from harness.identity import code_hash
from results import checks, edits, experiments, measures, plan, runner, step_time, store, texts
from results.plan import EXPERIMENTS, Experiment, Run

ROOT = Path(__file__).resolve().parents[1]
HOW = ["DEVICE=cpu", "COMPILE=False", "SAMPLE_TOKENS=4"]
TINY = {"DTYPE": "float32", "N_LAYER": 1, "N_HEAD": 2, "N_EMBD": 32, "BLOCK_SIZE": 32, "BATCH_SIZE": 8,
        "MICRO_BATCH_SIZE": 8, "STRIDE": 16, "WARMUP_STEPS": 4}  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Results in the test's own folder: what store.WORK and store.RESULTS are during the test."""
    monkeypatch.setattr(store, "WORK", tmp_path / "work")
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results")


# ----------------------------------------------------------------------------------------------------------
# The plan
# ----------------------------------------------------------------------------------------------------------


@functools.lru_cache
def source_of(rung):
    """(text, names of the constants) of a rung."""
    path = ROOT / f"{rung}.py"
    return path.read_text(encoding="utf-8"), harness.cli.read_source(path)[0].keys()


def test_the_plan():
    """Every constant exists in its rung, no two trainings share a file, every comparison has three seeds or says so."""
    files = {}
    for name, experiment in EXPERIMENTS.items():
        assert len(experiment.seeds) == 3 or name in ("two_hours", "best", "recipe_parts", "shape")
        assert experiment.asks.endswith("?")
        assert set(experiment.columns) <= experiments.COLUMNS.keys()
        names = [run.name for run in experiment.runs]
        assert len(set(names)) == len(names)
        for run in experiment.runs:
            text, constants = source_of(run.rung)
            assert run.constants.keys() <= constants, run
            assert run.measure in ("", *measures.MEASURES)
            assert run.base in ("", *names)
            edits.edited(text, run.edits)
            files.setdefault(store.result_file(run, 1), []).append(run)
            assert plan.owner(run)[1].measure or not run.measure, run  # measured where it is made
    for runs in files.values():
        assert all(run.training() == runs[0].training() for run in runs)


@pytest.mark.parametrize("rung", [run.rung for run in EXPERIMENTS["ladder"].runs[:-1]])
def test_a_run_with_defaults_is_the_command_that_people_type(rung):
    """Nothing but the seed is set, and evaluations come every eighth of the steps, as in a run of any other length."""
    constants = checks.defaults_of(source_of(rung)[0])
    assert constants["EVAL_INTERVAL"] == math.ceil(constants["MAX_STEPS"] / 8)
    assert experiments.constants_of(Run(rung, rung), 1337, {}) == {"SEED": 1337}


def test_a_search_keeps_no_figures_of_the_test_split(tiny, monkeypatch):
    plan_tiny(monkeypatch, Run("v3", "v3", tiny), search=True)
    experiments.main(["tiny", *HOW])
    summary = json.loads((store.RESULTS / "tiny" / "v3-2.json").read_text())["summary"]
    assert "val_bpb" in summary and not [key for key in summary if key.startswith("test_")]


def test_committed_results_of_a_search_hold_no_figures_of_the_test_split():
    for name, experiment in EXPERIMENTS.items():
        for path in (ROOT / "results" / "experiments" / name).glob("*-*.json") if experiment.search else ():
            assert not re.search(r'"test_\w+":', path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(("rung", "names"), [
    ("v3", {"ladder": "v3", "recipe": "v3", "recipe_parts": "v3", "v3_to_v4": "v3, sinusoids", "shape": "4 × 256"}),
    ("v3_1", {"ladder": "v3_1", "v3_to_v4": "Muon 0.03, sinusoids", "positions": "learned, 256"}),
])  # fmt: skip
def test_what_experiments_have_in_common_is_made_once(rung, names, folders):
    """A rung with its default constants: in the folder of the ladder, whatever it is called elsewhere."""
    shared = {name: run for name, experiment in EXPERIMENTS.items() for run in experiment.runs
              if run.training() == Run(rung, rung).training()}  # fmt: skip
    assert {name: run.name for name, run in shared.items()} == names
    assert {store.result_file(run, 7) for run in shared.values()} == {store.RESULTS / "ladder" / f"{rung}-7.json"}


# ----------------------------------------------------------------------------------------------------------
# Edits
# ----------------------------------------------------------------------------------------------------------

SHAPE = {"N_LAYER": 2, "N_HEAD": 2, "N_EMBD": 32, "BLOCK_SIZE": 32, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8,
         "WARMUP_STEPS": 4, "MAX_STEPS": 20, "DEVICE": "cpu", "DTYPE": "float32"}  # fmt: skip


def variant(name, changes, folder, **constants):
    """A rung after edits, in SHAPE and with `constants`, as a module of its own."""
    path = folder / "edited" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(edits.edited(source_of(name)[0], changes), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"edited_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(SHAPE | constants)
    return module


def test_the_usual_recipe_is_that_of_gpt2(tmp_path):
    """Radford et al. 2019, section 2.3: ends of branches scaled by their number. Positions at random, a cosine."""
    v3 = variant("v3", edits.USUAL, tmp_path, N_LAYER=8, N_EMBD=64)
    model = v3.LanguageModel(500)
    for part, std in [(model.embedding, 0.02), (model.position_embedding, 0.02), (model.head, 0.02),
                      *((block.attention.proj, 0.005) for block in model.blocks),
                      *((block.mlp[-1], 0.005) for block in model.blocks),
                      *((block.mlp[0], 0.02) for block in model.blocks)]:  # fmt: skip
        assert part.weight.std().item() == pytest.approx(std, rel=0.06)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    vars(v3).update(WARMUP_STEPS=10, MAX_STEPS=110)
    factor = [v3.lr_factor(step) for step in range(111)]
    assert factor[:11] == pytest.approx([*(k / 10 for k in range(1, 11)), 1])
    assert factor[35] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factor[60] == pytest.approx(0.5) and factor[110] == pytest.approx(0, abs=1e-12)
    assert {group["betas"] for group in v3.make_optimizer(model).param_groups} == {(0.9, 0.95)}
    idx = torch.randint(50, (2, 32))
    before = model(idx)
    with torch.no_grad():
        model.head.weight.mul_(2)
        torch.testing.assert_close(model(idx), 2 * before)


def test_embeddings_may_have_rates_and_a_decay_of_their_own(tmp_path):
    v3 = variant("v3", edits.embedding_rates(tokens=3, positions=5, decay=0.0), tmp_path, LEARNING_RATE=0.01)
    model = v3.LanguageModel(50)
    groups = v3.make_optimizer(model).param_groups
    assert [(g.get("factor", 1), g["weight_decay"], len(g["params"])) for g in groups] == [
        (1, v3.WEIGHT_DECAY, 8), (1, 0.0, 18), (3, 0.0, 1), (5, 0.0, 1)]  # fmt: skip
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())


def test_rope_in_v3(tmp_path, monkeypatch):
    """It has no position embeddings; without the rotation it equals v3 with all positions zero."""
    v3, roped, idx = variant("v3", (), tmp_path), variant("v3", edits.ROPE_IN_V3, tmp_path), torch.randint(50, (2, 32))
    model, plain = roped.LanguageModel(50), v3.LanguageModel(50)
    plain.load_state_dict(randomize(model, 0.3).state_dict(), strict=False)
    plain.position_embedding.weight.data.zero_()
    assert model.state_dict().keys() == plain.state_dict().keys() - {"position_embedding.weight"}
    assert not torch.allclose(model(idx), plain(idx))
    assert roped.apply_rope is importlib.import_module(V4).apply_rope
    monkeypatch.setattr(roped, "apply_rope", lambda x, table: x)
    torch.testing.assert_close(model(idx), plain(idx))


@pytest.mark.parametrize("rung", ["v3_1", V4])
def test_adamw_may_take_the_place_of_muon(rung, tmp_path):
    module = variant(rung, edits.ADAMW, tmp_path, POSITION="rope", LEARNING_RATE=0.004)
    model = module.LanguageModel(50)
    matrices, others = module.make_optimizers(model)
    assert isinstance(matrices, torch.optim.AdamW) and matrices.defaults["weight_decay"] == 0.1
    assert {id(p) for p in matrices.param_groups[0]["params"]} == {id(p) for p in model.blocks.parameters()}
    assert [g["initial_lr"] for o in (matrices, others) for g in o.param_groups] == [0.004, module.LEARNING_RATE_ADAMW]


def test_every_edit_trains(tmp_path):
    """Each is another start or another way to train, and its loss falls."""
    runs = {run.edits: run for name in ("recipe", "recipe_parts", "v3_to_v4") for run in EXPERIMENTS[name].runs}
    ids = torch.arange(3000) * 7 % 50
    assert len(runs) > 12
    for run in runs.values():
        module = variant(run.rung, run.edits, tmp_path, POSITION="rope", LEARNING_RATE=0.005)
        torch.manual_seed(1)
        model = module.LanguageModel(50)
        optimizers = module.make_optimizers(model) if run.rung != "v3" else [module.make_optimizer(model)]
        losses = []
        for step in range(15):
            loss = model(*module.get_batch(ids, step))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.2, run.name


def test_the_edits_of_v4(tmp_path):
    """A decay shrinks a matrix of the blocks by the rate times it; tied, embeddings and head are one; dropout in the
    MLP sets a share of its numbers to zero."""
    constants = {"POSITION": "rope", "DROPOUT": 0.0, "LEARNING_RATE": 0.05}
    after = []
    for changes in ((), edits.weight_decay(0.5)):
        v4 = variant(V4, changes, tmp_path, **constants)
        torch.manual_seed(1)
        model = randomize(v4.LanguageModel(50), 0.1)
        before = model.blocks[0].mlp.fc.weight.detach().clone()
        model(*v4.get_batch(torch.arange(3000) * 7 % 50, 0)).backward()
        for optimizer in v4.make_optimizers(model):
            optimizer.step()
        after.append(model.blocks[0].mlp.fc.weight.detach())
    torch.testing.assert_close(after[0] - after[1], 0.05 * 0.5 * before)

    model = variant(V4, edits.TIED, tmp_path, **constants).LanguageModel(50)
    assert model.head.weight is model.embedding.weight and 0.01 < model.head.weight.std() < 0.03
    changes = (*edits.SMEAR, *edits.EMBEDDING_TO_BLOCKS, *edits.embedding_rate(0.03))
    v4, plain = variant(V4, changes, tmp_path, **constants), variant(V4, (), tmp_path, **constants)
    model, without, idx = v4.LanguageModel(50), plain.LanguageModel(50), torch.randint(50, (2, 32))
    assert not model.smear.any() and not any(share.any() for share in model.share)
    assert {g["lr"] for g in v4.make_optimizers(model)[1].param_groups} == {0.03, v4.LEARNING_RATE_ADAMW}
    without.load_state_dict(randomize(model, 0.3).state_dict(), strict=False)
    assert not torch.allclose(model(idx), without(idx))
    cache = v4.KVCache(model)
    parts = [model(part, cache=cache) for part in idx.split((5, 1, 26), 1)]
    torch.testing.assert_close(model(idx), torch.cat(parts, 1))
    with torch.no_grad():
        for p in (model.smear, *model.share):
            p.zero_()
        torch.testing.assert_close(model(idx), without(idx))
        model.smear.fill_(1)  # so each token is embedded as the sum of itself and the one before it
        embedded = torch.nn.functional.rms_norm(model.embedding(idx), (32,))
        embedded[:, 1:] += embedded[:, :-1].clone()
        tables, x = v4.rope_table(torch.arange(32), 16, v4.ROPE_BASE), embedded
        for block in model.blocks:
            x = block(x, tables, None)
        torch.testing.assert_close(model(idx), model.head(v4.norm(x)))

    mlp = variant(V4, edits.DROPOUT_INSIDE, tmp_path, **constants | {"DROPOUT": 0.5}).MLP()
    x = torch.randn(64, 32)
    assert not torch.allclose(mlp(x), mlp(x)) and torch.equal(mlp.eval()(x), mlp(x))


def test_an_edit_that_does_not_find_its_place_is_refused():
    for text in ("b", "a a"):
        with pytest.raises(ValueError, match="the old text of an edit occurs"):
            edits.edited(text, (("a", "c"),))
    assert edits.edited("a b", (("a", "c"), ("c b", "d"))) == "d"


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


def launch(context, words, jobs=1, output=None):
    """In place of runner.launch."""
    return forked.Forked(context, words, output)


@pytest.fixture
def launch_forked(monkeypatch):
    """Rungs are forked from a process that has imported torch."""
    monkeypatch.setattr(runner, "launch", functools.partial(launch, forked.server()))


def plan_tiny(monkeypatch, *runs, seeds=(2,), **fields):
    """Make an experiment "tiny" of the runs, with small constants where they name none."""
    for run in runs:
        small = {name: value for name, value in TINY.items() if name in source_of(run.rung)[1]}
        run.constants = small | run.constants
    monkeypatch.setitem(EXPERIMENTS, "tiny", Experiment("Does it run?", list(runs), seeds=seeds, **fields))


def make_result(run, seed, /, gpu=False, constants=None, changes_of_result=None, **changes):
    """A result file as a finished run leaves it, with other `constants`, with `changes` of its summary and of itself.
    Returns its path."""
    other = constants or {}
    constants = json.loads(json.dumps(checks.defaults_of(source_of(run.rung)[0]))) | {"DEVICE": "cpu"}
    constants |= checks.values(run, plan.all_constants(run, seed, gpu)) | other
    constants |= {"EVAL_INTERVAL": math.ceil(constants["MAX_STEPS"] / 8)} | other
    steps = constants["MAX_STEPS"]
    summary = {"rung": run.rung, "code_sha256": code_hash(checks.sources(run)[1]), "rung_sha256": "",
               "tokens_sha256": None, "dataset": "sample", "seed": seed, "tokenizer": constants["VOCABULARY"],
               "n_params": 1, "steps": steps, "best_step": steps,
               "bytes_seen": 1000 * steps, "train_seconds": 1.0, "val_loss": 1.0, "val_bpb": 1.0 + seed / 1e4,
               "val_word_ppl": 9.0, "test_bpb": 1.5, "hyperparameters": constants} | changes  # fmt: skip
    result = {"run": run.name, "machine": "a machine", "command": f"python {run.rung}.py", "summary": summary,
              "edits": [list(edit) for edit in run.edits], "log": [{"step": steps}]}  # fmt: skip
    result |= changes_of_result or {}
    path = store.result_file(run, seed, gpu)
    store.write_text(path, json.dumps(result))
    return path


@pytest.fixture
def tiny(folders, launch_forked, monkeypatch, data_dir):
    """Constants of runs of some steps on a text of some thousand tokens; small measurements."""
    monkeypatch.setattr(data, "DATA_DIR", data_dir)
    monkeypatch.setattr(measures, "WINDOW_TOKENS", 1000)
    return {"DATA": str(data_dir), "VOCABULARY": "bpe_vocab_500.json", "MAX_STEPS": 6}


def test_runs_are_made_once_and_go_on(tiny, capfd, monkeypatch):
    """Edited and plain. Finished runs are not made again, and a run that had begun resumes from its checkpoint."""
    plan_tiny(monkeypatch, Run("v3, a head", "v3", tiny, edits.HEAD_OF_ITS_OWN, measure="temperature"),
              Run("v4", V4, {**tiny, "POSITION": "rope"}, measure="windows"))  # fmt: skip
    trained, train = [], runner.train
    monkeypatch.setattr(runner, "train", lambda run, *rest: trained.append(run.name) or train(run, *rest))
    experiments.main(["tiny", *HOW])
    assert trained == ["v3, a head", "v4"]
    assert "| v4 | 1 |" in capfd.readouterr().out
    folder = store.RESULTS / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["table.md", "v3-a-head-2.json", "v4-2.json"]
    result = json.loads((folder / "v4-2.json").read_text())
    assert result["summary"]["seed"] == 2 and result["log"][-1]["val_bpb"] == result["summary"]["val_bpb"]
    assert result["command"].startswith("python v4_alibi_rope.py DTYPE=") and result["machine"] and result["sample"]
    assert {"EVAL_INTERVAL=1", "SEED=2"} <= set(result["command"].split())  # an eighth of six steps
    assert "test_bpb" in result["summary"]
    assert set(result["measured"]) == {"side_by_side", "sliding", "nats_by_place"}
    result = json.loads((folder / "v3-a-head-2.json").read_text())
    assert result["measured"]["test"]["bpb"] == pytest.approx(result["summary"]["test_bpb"], rel=1e-4)
    assert result["edits"]

    with monkeypatch.context() as patch:
        patch.setattr(texts, "prepare", lambda *_: pytest.fail("what is done needs no text"))
        experiments.main(["tiny", *HOW])
    assert len(trained) == 2
    (folder / "v3-a-head-2.json").unlink()
    (store.WORK / "tiny" / "v3-a-head-2" / "run" / "summary.json").unlink()
    capfd.readouterr()
    experiments.main(["tiny", *HOW])
    assert len(trained) == 3 and "continuing from step 6" in capfd.readouterr().out
    experiments.main(["--list"])
    assert "tiny            2 of 2 runs" in capfd.readouterr().out


def test_an_edited_run_is_measured_with_its_own_code(tiny, monkeypatch):
    """Its weights do not fit the rung as it is in the repository, which is back afterwards, whatever happens."""
    plan_tiny(monkeypatch, Run("a head", "v3", tiny, edits.HEAD_OF_ITS_OWN), Run("plain", "v3", tiny))
    experiments.main(["tiny", *HOW])
    folder, v3 = store.WORK / "tiny" / "a-head-2" / "run", importlib.import_module("v3")
    with pytest.raises(ValueError, match="do not fit this model"):
        harness.load(folder)
    of_run = mixture.measure([folder], 3, None)
    assert of_run["val_network_bpb"] == pytest.approx(store.read_json(folder / "summary.json")["val_bpb"], rel=1e-4)
    with pytest.raises(ZeroDivisionError), runner.rung_of(folder):
        assert hasattr(importlib.import_module("v3").LanguageModel(50), "head")
        raise ZeroDivisionError
    assert sys.modules["v3"] is v3
    with runner.rung_of(store.WORK / "tiny" / "plain-2" / "run"):
        assert sys.modules["v3"] is v3


def test_the_list_needs_no_tokens(folders, capsys, monkeypatch):
    """How many steps some text is depends on its vocabulary; where that is not here the runs that are done tell it."""
    runs = Run("large", "v2", megabytes=1, vocab_size=333), Run("timed", "v3", seconds=1800)
    plan_tiny(monkeypatch, *runs, seeds=(1337,))
    monkeypatch.setattr(step_time, "read", lambda: {"seconds": {step_time.model_key(runs[0]): 36.0}})
    experiments.main(["--list"])
    assert "tiny            0 of 2 runs, at least 0.5 h of training" in capsys.readouterr().out
    make_result(runs[0], 1337, constants={"MAX_STEPS": 500}, bytes_seen=1_000_000)
    experiments.main(["--list"])
    assert "tiny            1 of 2 runs, 5.5 h of training" in capsys.readouterr().out


def test_runs_of_different_texts_are_not_compared(folders, monkeypatch, data_dir):
    """A run is refused, before it begins, where those that are done have read another text, in data/ or in a home that
    is part of it; DATA=... is not let in either. Where nothing is done, any text will do."""
    monkeypatch.setattr(data, "DATA_DIR", data_dir)  # the sample
    monkeypatch.setattr(experiments, "make_all", lambda *_: pytest.fail("it has begun"))
    run, other = Run("a", "v3", {"DROPOUT": 0.375}), Run("b", "v3", {"DROPOUT": 0.125})
    plan_tiny(monkeypatch, run, other, seeds=(2, 3))
    todo = [(other, 2), (run, 3)]
    texts.check_texts(todo, {})
    make_result(other, 3)
    texts.check_texts(todo, {})
    texts.check_texts(todo, {}, gpu=True)
    make_result(other, 3, dataset="wikitext-2-v1")
    with pytest.raises(ValueError, match="data holds 'sample', but the runs in .*results/tiny read 'wikit"):
        experiments.main(["tiny"])
    texts.check_texts(todo, {}, gpu=True)  # those are kept in a folder of their own
    make_result(other, 3, gpu=True, dataset="wikitext-103-v1")
    with pytest.raises(ValueError, match="results/tiny_gpu read 'wikitext-103-v1'"):
        texts.check_texts(todo, {}, gpu=True)
    make_result(other, 3)
    tokens = data.load_tokens("bpe_vocab.json")
    for split in tokens.values():
        split.digest = "the digest of a split"
    make_result(other, 3, tokens_sha256=harness.identity.tokens_hash(tokens))
    with monkeypatch.context() as patch:
        patch.setattr(texts, "load_tokens", lambda *_: tokens)
        texts.check_texts(todo, {})
        tokens["val"].digest = "of another text"
        with pytest.raises(ValueError, match="tokens in .*data are not those .* both are named 'sample'"):
            texts.check_texts(todo, {})
    texts.check_texts(todo, {"DATA": "novel"})  # it is tried out, and nothing of it is done


class ThreadPool(ThreadPoolExecutor):
    """In place of processes, which would not know the tiny experiment."""

    def __init__(self, jobs, context, initializer):
        super().__init__(jobs)


def test_several_runs_at_a_time(tiny, capfd, monkeypatch):
    """The same files as one after the other; what fails is said after the others, and where its message is."""
    plan_tiny(monkeypatch, Run("a", "v0", tiny), Run("b", "v0", {**tiny, "LEARNING_RATE": 0.25}))
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", ThreadPool)
    experiments.main(["tiny", "DEVICE=cpu", "--jobs", "2"])
    folder = store.RESULTS / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["a-2.json", "b-2.json", "table.md"]
    assert "tiny/b-2.json: val bpb" in capfd.readouterr().out
    (folder / "b-2.json").unlink()
    shutil.rmtree(store.WORK / "tiny" / "b-2")
    plan_tiny(monkeypatch, Run("a", "v0", tiny), Run("b", "v0", {**tiny, "LEARNING_RATE": 0.25, "MAX_STEPS": 0}))
    with pytest.raises(ValueError, match="ended with exit code 1; its message is in .*screen.txt"):
        experiments.main(["tiny", "DEVICE=cpu", "--jobs", "2"])
    assert "MAX_STEPS=0 must be" in (store.WORK / "tiny" / "b-2" / "screen.txt").read_text()


def test_a_run_that_fails_ends_with_a_line(tiny, capfd, monkeypatch):
    plan_tiny(monkeypatch, Run("a", "v0", {**tiny, "MAX_STEPS": 0}))
    with pytest.raises(ValueError, match="ended with exit code 1; its message is above"):
        experiments.main(["tiny", "DEVICE=cpu"])
    assert "MAX_STEPS=0 must be" in capfd.readouterr().err
    with pytest.raises(ValueError, match="no run of tiny is done"):
        experiments.main(["tiny", "--table"])


def test_what_a_rung_is_started_with(monkeypatch):
    """The interpreter finds this repository, the process is in its folder, and has its share of the cores."""
    started = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda words, **options: started.append((words, options)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    runner.launch(["a"], jobs=4, output="file")
    ((words, options),) = started
    assert words == ["a"] and (options["cwd"], options["stdout"], options["stderr"]) == (ROOT, "file", "file")
    assert options["env"] == {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


def program_of_long_runs(jobs, data_dir):
    """In a child: the program with five runs that do not end, in the folder that it is in. All of its processes are
    forked from it."""
    context = multiprocessing.get_context("fork")
    runner.launch = functools.partial(launch, context)
    experiments.multiprocessing = SimpleNamespace(
        get_context=lambda kind: context, active_children=multiprocessing.active_children
    )
    store.WORK, store.RESULTS = Path("work").resolve(), Path("results").resolve()
    long = {"DATA": str(data_dir), "VOCABULARY": "bpe_vocab_500.json", "MAX_STEPS": 1000000, "PATIENCE": 1000000}
    runs = [Run(f"run {k}", "v0", {**long, "LEARNING_RATE": 0.1 * k}) for k in (1, 2, 3, 4, 5)]
    EXPERIMENTS["tiny"] = Experiment("Does it stop?", runs, seeds=(1337,))
    texts.prepare = lambda runs, overrides: None
    experiments.program(["tiny", "DEVICE=cpu", "--jobs", str(jobs)])


@pytest.mark.parametrize(("signum", "jobs"), [
    (signal.SIGTERM, 1), (signal.SIGHUP, 2), (signal.SIGTERM, 2), (signal.SIGINT, 2),
])  # fmt: skip
def test_what_stops_it_stops_its_runs(signum, jobs, tmp_path, data_dir):
    """Each run that had begun has a checkpoint of the step that it had come to, no other has begun, and no process is
    left. SIGTERM goes to the program alone, Ctrl-C and SIGHUP to all of its processes, as a terminal sends them."""
    steps = [tmp_path / "work" / "tiny" / f"run-{k}-1337" / "run" / "steps.csv" for k in range(1, jobs + 1)]
    with forked.process_group(program_of_long_runs, (jobs, data_dir), tmp_path, tmp_path / "screen") as process:
        errors, until = tmp_path / "screen.err", time.monotonic() + 300
        while not all(path.exists() and len(path.read_text().splitlines()) > 3 for path in steps):
            assert process.is_alive() and time.monotonic() < until, errors.read_text()
            time.sleep(0.02)
        (os.kill if signum == signal.SIGTERM else os.killpg)(process.pid, signum)
        process.join()
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < until:  # until the last process has been reaped
                os.killpg(process.pid, 0)
                time.sleep(0.02)
    assert process.exitcode == 128 + signum
    lines = errors.read_text().splitlines()
    assert lines[-1] == "experiments.py: stopped; the same command continues from the last checkpoint"
    assert "Traceback" not in errors.read_text()
    assert sorted(path.name for path in (tmp_path / "work" / "tiny").iterdir()) == [
        f"run-{k}-1337" for k in range(1, jobs + 1)]  # fmt: skip
    for path in steps:
        saved = torch.load(path.parent / "checkpoint.pt", weights_only=True)
        assert str(saved["step"]) == path.read_text().splitlines()[-1].partition(",")[0]


def test_an_unknown_experiment_is_refused(launch_forked, capfd):
    """By the program itself."""
    process = runner.launch([sys.executable, ROOT / "results" / "experiments.py", "nothing"])
    assert process.wait() == 1
    assert "experiments.py: there is no experiment 'nothing'; the experiments are ladder, " in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# What belongs together
# ----------------------------------------------------------------------------------------------------------


def test_what_is_tried_out_is_kept_apart(tiny, capfd, monkeypatch):
    """The numbers of two steps never come back as the result; how a run is made keeps nothing apart."""
    run = Run("a", "v0", tiny)
    plan_tiny(monkeypatch, run)
    experiments.main(["tiny", "DEVICE=cpu", "MAX_STEPS=2", "LEARNING_RATE=1"])
    out = capfd.readouterr().out
    assert "Tried out with DEVICE=cpu MAX_STEPS=2 LEARNING_RATE=1: no results" in out and "kept apart" in out
    assert not store.RESULTS.exists()
    (path,) = store.WORK.rglob("a-2.json")
    assert path.parent == store.WORK / "tried" / "LEARNING_RATE=1 MAX_STEPS=2" / "tiny"
    assert json.loads(path.read_text())["summary"]["steps"] == 2
    experiments.main(["tiny", "DEVICE=cpu"])
    result = json.loads((store.RESULTS / "tiny" / "a-2.json").read_text())
    assert result["summary"]["steps"] == 6 and result["code_sha256"] == result["summary"]["code_sha256"]
    experiments.main(["tiny", "MAX_STEPS=2", "LEARNING_RATE=1", "--table"])  # what was tried is done, too
    assert "Tried out with MAX_STEPS=2 LEARNING_RATE=1" in capfd.readouterr().out
    shutil.copy(path, store.RESULTS / "tiny" / "a-2.json")
    with pytest.raises(ValueError, match="all results there were left out"):
        experiments.main(["tiny", "DEVICE=cpu"])
    assert "LEARNING_RATE was 1.0 and is 0.03; MAX_STEPS was 2 and is 6; remove it" in capfd.readouterr().err

    run.constants["MAX_STEPS"] = 5  # the plan changes, the result is removed, and what is left of its run is not it
    store.result_file(run, 2).unlink()
    experiments.main(["tiny", "DEVICE=cpu"])
    assert "held another run (MAX_STEPS was 6 and is 5); that is now in run.1" in capfd.readouterr().out
    assert json.loads(store.result_file(run, 2).read_text())["summary"]["steps"] == 5


@pytest.mark.parametrize(("words", "why"), [
    (["tiny", "MAX_STEP=2"], "no run of tiny has a constant 'MAX_STEP'"),
    (["tiny", "SEED=3"], "this program sets SEED itself"), (["tiny", "OUT_DIR=x"], "sets OUT_DIR itself"),
    (["tiny", "MAX_STEPS=few"], "MAX_STEPS=few: MAX_STEPS must be"), (["MAX_STEPS=2"], "name an experiment"),
    (["tiny", "MAX_STEPS=2", "--step-time"], "without --list and --step-time"),
    (["tiny", "--gpu", "--step-time"], "leave --gpu out"), (["tiny", "--missing"], "only works with --step-time"),
])  # fmt: skip
def test_what_would_be_passed_over_is_refused(words, why, folders, monkeypatch):
    monkeypatch.setattr(experiments, "make_all", lambda *_: pytest.fail("it has begun"))
    plan_tiny(monkeypatch, Run("a", "v0"))
    with pytest.raises(ValueError, match=why):
        experiments.main(words)


PLANNED = Run("a", "v3", {"DROPOUT": 0.375, "MAX_STEPS": 80, "PATIENCE": 3})
OTHERS = {  # what is wrong with a result of PLANNED: (how it was made, what is said)
    "steps": ({"constants": {"MAX_STEPS": 2}}, "MAX_STEPS was 2 and is 80"),
    "constant of the plan": ({"constants": {"DROPOUT": 0.1}}, "DROPOUT was 0.1 and is 0.375"),
    "default": ({"constants": {"N_EMBD": 64}}, "N_EMBD was 64 and is 32"),
    "interval": ({"constants": {"EVAL_INTERVAL": 1}}, "EVAL_INTERVAL was 1 and is 10"),
    "text": ({"constants": {"DATA": "data/own"}}, "DATA was data/own and is data"),
    "vocabulary": ({"constants": {"VOCABULARY": "x.json"}, "tokenizer": "x.json"}, "VOCABULARY was x.json"),
    "constant that is gone": ({"constants": {"TWIST": 7}, "changes_of_result": {"command": "python v3.py TWIST=7"}},
                              "TWIST was 7 and is not set"),
    "seed": ({"seed": 3}, "its seed is 3"),
    "rung": ({"rung": "v3_1"}, "it is a run of v3_1.py"),
    "edits": ({"changes_of_result": {"edits": [["a", "b"]]}}, "edits that are not those"),
    "end": ({"changes_of_result": {"log": [{"step": 10}]}}, "ended after 10 of 80 steps"),
    "early end": ({"steps": 40, "best_step": 30, "changes_of_result": {"log": [{"step": 30}, {"step": 40}]}},
                  "ended after 40 of 80 steps"),
    "damage": ({"hyperparameters": None}, "damaged or not a result"),
    "no log": ({"changes_of_result": {"log": []}}, "damaged or not a result"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", OTHERS)
def test_a_result_of_another_run_is_left_out_with_a_line(wrong, folders, monkeypatch, capsys):
    how, why = OTHERS[wrong]
    plan_tiny(monkeypatch, PLANNED, seeds=(2, 4))
    make_result(PLANNED, 4)
    path = make_result(PLANNED, 2, **how)
    experiments.main(["tiny", "--table"])
    out, err = capsys.readouterr()
    assert "| a | 1 |" in out and "over the seeds 4." in out
    assert f"{path} is left out: " in err and why in err and len(err.splitlines()) == 1
    assert "remove it or move it aside, and python results/experiments.py tiny makes it again" in err
    path.unlink()
    assert experiments.missing(["tiny"]) == [(PLANNED, 2)]  # as the line says


def test_a_result_in_good_order_is_shown(folders, monkeypatch, capsys):
    """Also one that was stopped by its patience, one made on another device, and those of a time when the rung lacked
    or had a constant."""
    plan_tiny(monkeypatch, PLANNED, seeds=(2, 3, 4, 5))
    make_result(PLANNED, 2, steps=40, best_step=10, changes_of_result={"log": [{"step": 10 * k} for k in (1, 2, 3, 4)]})
    make_result(PLANNED, 3, constants={"DEVICE": "cuda", "COMPILE": False, "SAMPLE_TOKENS": 3, "REMOVED": 1})
    for seed in (4, 5):
        path = make_result(PLANNED, seed)
        result = json.loads(path.read_text())
        for name in ("GRAD_CLIP", "PATIENCE"):  # the plan does not name it, or names its default
            del result["summary"]["hyperparameters"][name]
        path.write_text(json.dumps(result))
    result["summary"] = {k: v for k, v in result["summary"].items() if not k.endswith("sha256")}
    result["summary"]["hyperparameters"]["EVAL_INTERVAL"] = 64
    path.write_text(json.dumps(result))
    experiments.main(["tiny", "--table"])
    out, err = capsys.readouterr()
    assert "| a | 4 |" in out and err == ""


def test_files_that_no_run_of_the_plan_has_are_named(folders, monkeypatch, capsys):
    plan_tiny(monkeypatch, PLANNED)
    path = make_result(PLANNED, 2)
    shutil.copy(path, path.with_name("a-3.json"))
    (path.with_name("b-2.json")).write_text("{")
    experiments.main(["tiny", "--table"])
    err = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in err] == [f"{path.with_name(name)} is left out"
                                                        for name in ("a-3.json", "b-2.json")]  # fmt: skip
    path.write_text("{")
    with pytest.raises(ValueError, match="no run of tiny is done"):
        experiments.main(["tiny", "--table"])
    assert f"{path} is left out: {path} is damaged; put it back, or remove it" in capsys.readouterr().err


def test_a_plan_that_has_changed_leaves_results_out(folders, monkeypatch, capsys):
    """Edits, what is measured, seconds and megabytes."""
    run = Run("a", "v3", {"MAX_STEPS": 80}, edits.COSINE)
    plan_tiny(monkeypatch, run)
    make_result(run, 2)
    assert experiments.report("tiny")
    for field, value, why in (("edits", edits.HEAD_OF_ITS_OWN, "made with edits that are not those"),
                              ("measure", "windows", "lacks the measurement 'windows'")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(run, field, value)
            assert experiments.report("tiny") is None and why in capsys.readouterr().err
    assert experiments.report("tiny")
    words = {checks.words_of((("a", "b"),)): checks.words_of(edits.COSINE)}
    make_result(run, 2, changes_of_result={"edits": [["a", "b"]]})
    assert experiments.report("tiny") is None
    monkeypatch.setattr(checks, "OTHER_WORDS", words)
    assert experiments.report("tiny")

    timed, fed = Run("timed", "v3", seconds=40), Run("fed", "v3", megabytes=0.04)
    plan_tiny(monkeypatch, timed, fed)
    make_result(fed, 2, constants={"MAX_STEPS": 40})
    make_result(timed, 2, constants={"MAX_STEPS": 40})
    capsys.readouterr()
    assert "fed" in experiments.report("tiny") and "step of timed has not been measured" in capsys.readouterr().err
    for seconds, text in ((1.0, "| timed | 1 |"), (0.5, "MAX_STEPS was 40 and is 80")):
        times = {"seconds": {step_time.model_key(timed): seconds}}
        monkeypatch.setattr(step_time, "read", lambda times=times: times)
        assert text in experiments.report("tiny") + capsys.readouterr().err
    fed.megabytes = 0.05
    store.LEFT_OUT.clear()
    assert "| fed" not in (experiments.report("tiny") or "")
    assert "0.04 MB, but the plan has 0.05" in capsys.readouterr().err


def test_results_of_different_code_share_a_table_only_with_a_reason(folders, monkeypatch, capsys):
    """Those of one rung, edited or not; nothing is trained for a table that cannot be made."""
    runs = Run("a", "v3", {"DROPOUT": 0.375}), Run("b", "v3", {"DROPOUT": 0.125}), Run("c", "v0"), Run(
        "d", "v3", {"DROPOUT": 0.25}, edits.COSINE)  # fmt: skip
    plan_tiny(monkeypatch, *runs, seeds=(2, 3))
    now = code_hash(source_of("v3")[0])
    for run in runs[:3]:
        make_result(run, 2)
    make_result(runs[3], 2, changes_of_result={"code_sha256": now})
    assert experiments.report("tiny")
    other = {"code_sha256": "beef"}, {"changes_of_result": {"code_sha256": "beef"}}
    for changed, how in zip((runs[1], runs[3]), other):
        make_result(changed, 2, **how)
        with pytest.raises(ValueError, match=f"different code of v3.py .*{now}: a-2.json.*beef: {changed.name}-2.json.*"
                                             "; move those of one code aside"):  # fmt: skip
            experiments.main(["tiny", "--table"])
        monkeypatch.setattr(EXPERIMENTS["tiny"], "mixed_code", "the words of a comment")
        assert "Made with different code: the words of a comment.\n" in experiments.report("tiny")
        monkeypatch.setattr(EXPERIMENTS["tiny"], "mixed_code", "")
        make_result(changed, 2, changes_of_result={"code_sha256": now})
    assert "different code" not in experiments.report("tiny")

    monkeypatch.setattr(experiments, "make_all", lambda *_: pytest.fail("it has begun"))
    for run in runs:
        make_result(run, 2, code_sha256="beef")
    with pytest.raises(ValueError, match=r"beef: a-2.json.*a-3.json \(to be made\)"):
        experiments.main(["tiny"])
    make_result(runs[0], 2, dataset="another")
    with pytest.raises(ValueError, match="different texts in data .*another: a-2.json; sample: "):
        experiments.report("tiny")


def test_what_was_begun_otherwise_does_not_go_on(folders, tmp_path, capsys):
    """A run of other constants, another text or other code is moved aside, with its checkpoint; one that only another
    device began goes on."""
    folder, made_of = tmp_path / "a-2", {"rung": "v3", "code_sha256": "a", "edits": [], "text": {"dataset": "sample"},
                                         "constants": {"MAX_STEPS": 80, "DEVICE": "cpu"}}  # fmt: skip
    output = folder / "run"
    others = [{"constants": {"MAX_STEPS": 2}}, {"code_sha256": "b"}, {"text": {"dataset": "b"}},
              {"edits": [["a", "b"]]}]  # fmt: skip
    for k, other in enumerate(others):
        runner.begin(folder, output, made_of | other)
        output.mkdir(exist_ok=True)
        (output / "checkpoint.pt").write_text("begun")
        runner.begin(folder, output, made_of | other)
        assert (output / "checkpoint.pt").exists()
        runner.begin(folder, output, made_of)
        assert not output.exists() and (folder / f"run.{k + 1}" / "checkpoint.pt").read_text() == "begun"
        assert f"that is now in run.{k + 1}" in capsys.readouterr().out
    output.mkdir()
    runner.begin(folder, output, made_of | {"constants": {"MAX_STEPS": 80, "DEVICE": "cuda"}})
    assert output.exists() and capsys.readouterr().out == ""
    (output / "summary.json").write_text('{"code_sha256": "b"}')  # the text changed between the note and the start
    runner.begin(folder, output, made_of)
    assert not output.exists()
    output.mkdir()
    (folder / "made_of.json").unlink()
    with harness.file_lock(output / "lock"), pytest.raises(ValueError, match=f"process {os.getpid()} is training in"):
        runner.begin(folder, output, made_of)
    runner.begin(folder, output, made_of)
    assert not output.exists()


# ----------------------------------------------------------------------------------------------------------
# Texts and step times
# ----------------------------------------------------------------------------------------------------------


def test_steps_for_as_much_text(data_dir):
    """From the bytes that a token has."""
    tokens = data.load_tokens("bpe_vocab_500.json", str(data_dir))["train"]
    constants = {"VOCABULARY": "bpe_vocab_500.json", "DATA": str(data_dir), "BATCH_SIZE": 4, "BLOCK_SIZE": 32}
    n = texts.steps_for(0.5, importlib.import_module("v3"), constants)
    assert n * 4 * 32 * tokens.n_bytes / len(tokens) == pytest.approx(5e5, rel=0.01)


def test_a_tenth_is_the_beginning_of_the_text(monkeypatch, tmp_path, data_dir):
    """Its counts match its text, and it is loaded like any other."""
    monkeypatch.setattr(texts, "token_file", lambda split, vocabulary: data_dir / f"{split}_ids_500.pt")
    monkeypatch.setattr(texts, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copyfile(data_dir / "bpe_vocab_500.json", tmp_path / "data" / "bpe_vocab.json")
    texts.make_tenth(tmp_path / "tenth")
    whole = data.load_tokens("bpe_vocab_500.json", str(data_dir))
    part = data.load_tokens("bpe_vocab.json", str(tmp_path / "tenth"))
    assert part["train"].ids.tolist() == whole["train"].ids[: len(whole["train"]) // 10].tolist()
    assert part["val"].ids.tolist() == whole["val"].ids.tolist()
    tokenizer = texts.BPETokenizer.load(data_dir / "bpe_vocab_500.json")
    text = tokenizer.decode_bytes(part["train"].ids.tolist())
    assert (part["train"].n_bytes, part["train"].n_words) == (len(text), len(text.split()) + text.count(b"\n"))


def test_the_step_time_is_that_of_a_run(tiny, monkeypatch):
    """A trial is broken off, its steps but the first ones count; steps for a time follow from it; what is known is not
    measured again unless asked for, and never beside what another machine has measured."""
    shape = {"N_LAYER": 1, "N_EMBD": 32, "N_HEAD": 2, "BLOCK_SIZE": 16, "BATCH_SIZE": 4, "COMPILE": False}
    run = Run("v4", V4, tiny | shape | {"POSITION": "rope"})
    plan_tiny(monkeypatch, run)
    with pytest.raises(ValueError, match="measured yet; .* python results/experiments.py tiny --step-time"):
        step_time.steps_within(1, run)
    monkeypatch.setattr(step_time, "TRIALS", 1)
    step_time.measure([run], again=False)
    kept = json.loads((store.RESULTS / "step_time.json").read_text())
    (key,) = kept["seconds"]
    assert key == (f"{V4} VOCABULARY=bpe_vocab_500.json BATCH_SIZE=4 MICRO_BATCH_SIZE=8 BLOCK_SIZE=16 N_LAYER=1 "
                   "N_HEAD=2 N_EMBD=32 POSITION=rope")  # fmt: skip
    assert 1e-4 < kept["seconds"][key] < 5
    assert 100 < kept["libraries_mb"] < 1000 and 100 < kept["peak_mb"][key] < 1000
    monkeypatch.setattr(step_time, "trial", lambda run: (0.25, 1.0))
    step_time.measure([run], again=False)
    assert step_time.seconds_of(run) == kept["seconds"][key]
    step_time.measure([run])
    assert step_time.seconds_of(run) == 0.25

    timed = Run("timed", V4, {k: v for k, v in run.constants.items() if k != "MAX_STEPS"}, seconds=1)
    assert experiments.constants_of(timed, 2, {})["MAX_STEPS"] == 4
    monkeypatch.setattr(step_time, "machine", lambda: "another")
    with pytest.raises(ValueError, match="measured on another machine"):
        step_time.measure([run], again=False)
    monkeypatch.setattr(step_time, "libraries_mb", lambda: 50.0)
    step_time.measure([timed])
    assert step_time.read() | {"date": ""} == {"machine": "another", "date": "", "seconds": {key: 0.25},
                                               "peak_mb": {key: 1.0}, "trials": {key: [0.25]},
                                               "libraries_mb": 50.0}  # fmt: skip


def test_trials_take_turns_and_go_on(folders, monkeypatch):
    """The median of five trials counts, the highest memory, and what was made before an interruption stays."""
    runs = [Run("v2", "v2"), Run("v3", "v3")]
    seconds, order = iter([5, 50, 1, 10, 4, 40, 2, 20, 3, 30]), []

    def trial(run):
        order.append(run.name)
        if len(order) == 4:
            raise KeyboardInterrupt
        value = next(seconds)
        return value, float(value)

    monkeypatch.setattr(step_time, "trial", trial)
    monkeypatch.setattr(step_time, "libraries_mb", lambda: 50.0)
    with pytest.raises(KeyboardInterrupt):
        step_time.measure(runs)
    assert step_time.read()["trials"] == {step_time.model_key(runs[0]): [5, 1], step_time.model_key(runs[1]): [50]}
    step_time.measure(runs, again=False)
    assert order == ["v2", "v3", "v2", "v3", "v3", *["v2", "v3"] * 3]
    assert [step_time.seconds_of(run) for run in runs] == [3, 30]
    assert list(step_time.read()["peak_mb"].values()) == [5.0, 50.0]
    step_time.measure(runs, again=False)
    assert len(order) == 11


# ----------------------------------------------------------------------------------------------------------
# What is measured of a model
# ----------------------------------------------------------------------------------------------------------


class Knows:
    """What `windows` needs of a tokenizer."""

    decode_bytes = staticmethod(lambda ids: b"ab" * len(ids))


def test_what_is_measured_in_windows(load, monkeypatch):
    """Against one pass over the whole for each window."""
    monkeypatch.setattr(measures, "WINDOW_TOKENS", 700)
    module = load(V4)
    model, tokens = randomize(module.LanguageModel(500), 0.1).eval(), short_tokens(module, 900)
    found = measures.windows(module, model, tokens, Knows)
    ids = tokens["val"].ids[:700].long()
    nats = [F.cross_entropy(model(ids[None, i : i + 64])[0][: len(ids) - 1 - i], ids[i + 1 : i + 65], reduction="sum")
            for i in range(0, 699, 64)]  # fmt: skip
    assert found["side_by_side"][64] == pytest.approx(sum(nats).item() / math.log(2) / (2 * 699), rel=1e-5)
    assert found["sliding"][64] != pytest.approx(found["side_by_side"][64], rel=1e-6)
    first = [F.cross_entropy(model(ids[None, i : i + 128])[0][:32], ids[i + 1 : i + 33]) for i in range(0, 640, 128)]
    assert len(found["nats_by_place"]) == 4
    assert found["nats_by_place"][0] == pytest.approx(sum(first).item() / 5, rel=1e-5)


def test_the_temperature_is_that_of_the_least_loss(load, monkeypatch):
    """Logits that are 1.2 times too large ask for about 1.2 times the temperature of the others."""
    monkeypatch.setattr(measures, "WINDOW_TOKENS", 700)
    module = load("v3")
    tokens = short_tokens(module, 900)
    model = randomize(module.LanguageModel(500), 0.08).eval()
    ids = tokens["val"].ids[:700].long()
    y = torch.cat([ids[i + 1 : i + 33] for i in range(0, 668, 32)])
    logits = torch.cat([model(ids[None, i : i + 32])[0] for i in range(0, 668, 32)])
    with torch.no_grad():
        loss = [F.cross_entropy(logits / t, y).item() for t in [0.8 + 0.02 * k for k in range(21)]]
    found = measures.temperature(module, model, tokens, None)
    assert found["temperature"] == pytest.approx(0.8 + 0.02 * loss.index(min(loss)))
    hot = module.evaluate(measures.Tempered(model, found["temperature"]), tokens["test"])
    assert found["test_tempered"] == hot and found["test"] == module.evaluate(model, tokens["test"])


def test_dynamic_evaluation(load):
    """Without a rate it is the evaluation in sliding windows; with one it learns a text that repeats itself, and leaves
    the model as it was. The first step is that of an optimizer whose rates are divided by the sizes."""
    module = load("v3")
    model, tokens = randomize(module.LanguageModel(500), 0.1).eval(), short_tokens(module, 897)
    ones = [torch.ones_like(p) for p in model.parameters()]
    still = measures.dynamic_eval(model, tokens["val"], 0.0, ones, stride=16)
    assert still["bpb"] == pytest.approx(module.evaluate(model, tokens["val"], stride=16)["bpb"], rel=1e-5)
    again = copy.copy(tokens["val"])
    again.ids = tokens["val"].ids[:100].repeat(9)
    before = model.embedding.weight.clone()
    still, learned = (measures.dynamic_eval(model, again, rate, ones, stride=16)["bpb"]
                      for rate in (0, 1.0))  # fmt: skip
    assert learned < 0.9 * still and torch.equal(model.embedding.weight, before)

    two = copy.copy(tokens["val"])
    two.ids, ids = tokens["val"].ids[:25], tokens["val"].ids[:25].long()
    sizes = [torch.full_like(p, 1 + k) for k, p in enumerate(model.parameters())]
    found = measures.dynamic_eval(model, two, 0.5, sizes, stride=16)
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.5 / (1 + k)} for k, p in enumerate(model.parameters())])
    first = F.cross_entropy(model(ids[None, :16])[0], ids[1:17])
    first.backward()
    optimizer.step()
    second = F.cross_entropy(model(ids[None, :24])[0, 16:], ids[17:], reduction="sum")
    nats = 16 * first.item() + second.item()
    assert found["word_ppl"] == pytest.approx(math.exp(nats / two.n_words), rel=1e-5)


def test_sizes_of_gradients(load):
    """Of a text that has two windows, which `backward` goes through one by one."""
    module = load("v3")
    model, tokens = randomize(module.LanguageModel(500), 0.1), short_tokens(module, 897)["val"]
    size = model.block_size
    tokens.ids = tokens.ids[: 2 * size + 1]
    sizes = measures.gradient_sizes(model, tokens, stride=5, n=2)
    squares = [0.0] * len(sizes)
    for ids in (tokens.ids[: size + 1].long(), tokens.ids[size:].long()):
        model.zero_grad()
        (-model(ids[None, :-1])[0].log_softmax(-1)[range(size), ids[1:]][-5:].mean()).backward()
        squares = [square + p.grad**2 / 2 for square, p in zip(squares, model.parameters())]
    for found, square in zip(sizes, squares, strict=True):
        torch.testing.assert_close(found, square**0.5 + 1e-4)


def test_the_rate_of_dynamic_evaluation_is_chosen_on_the_validation_split(load, monkeypatch):
    """And the test split is read with that rate, and in windows that slide by 64, by the model as it was; the sizes of
    gradients are those on the training split."""
    monkeypatch.setattr(measures, "WINDOW_TOKENS", 600)
    monkeypatch.setattr(measures, "first_part", lambda tokens, tokenizer, n: short_tokens(module, n)["val"])
    module = load("v3", BLOCK_SIZE=128)
    model, tokens = randomize(module.LanguageModel(500), 0.1).eval(), short_tokens(module, 700)
    tokens["test"] = tokens["val"]
    found = measures.best_run(module, model, tokens, None)
    part, sizes = short_tokens(module, 300)["val"], measures.gradient_sizes(model, tokens["train"])
    for rate, bpb in found["rates"].items():
        assert bpb == measures.dynamic_eval(model, part, rate, sizes)["bpb"]
    rate = min(found["rates"], key=found["rates"].get)
    assert rate > 0
    assert found["test_dynamic_eval"] == measures.dynamic_eval(model, tokens["test"], rate, sizes)
    assert found["test_sliding"] == module.evaluate(model, tokens["test"], stride=64)


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


def test_spreads():
    assert store.spread([1.0, 2.0, 4.5]) == "2.5000 (1.0000 to 4.5000)"
    assert store.spread([3, 3], "{:,.0f}") == "3"
    assert store.spread([1.00001, 1.00003]) == "1.0000 (1.0000 to 1.0000)"  # several seeds, and seen to be
    assert store.spread([None]) == "–"


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(store.RESULTS.glob("*/table.md"))])
def test_committed_tables_are_those_of_the_committed_runs(name):
    expected = (store.RESULTS / name / "table.md").read_text(encoding="utf-8")
    assert experiments.report(name.removesuffix("_gpu"), name.endswith("_gpu")) == expected
