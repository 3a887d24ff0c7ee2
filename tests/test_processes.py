"""Several processes that train one model: each holds all of it, or a part (SHARD=True); one of them decides for all."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import LATE_RUNGS, same_weights, train, without_clock
from test_survival import (  # noqa: F401 - fixtures
    ALONE,
    alone,
    assert_close,
    assert_one_line,
    begin,
    begin_together,
    checkpoint,
    folder,
    part,
    results,
    run,
    run_rung,
    server,
)

import harness
from harness import distributed
from harness.errors import UserError

# ----------------------------------------------------------------------------------------------------------
# Child processes
# ----------------------------------------------------------------------------------------------------------


def run_odd_rung(odd, *arguments, **options):
    """In a child: run_rung in a process that is unlike the others, and notes what it holds. `odd`: what is unlike."""
    rank = int(os.environ.get("RANK", 0))
    finish, notes = harness.Run.load_best, {}

    def load_best(this, model):
        optimizers = [value for o in this.optimizers for state in o.state.values() for value in state.values()]
        local = [sum(x.to_local().numel() if hasattr(x, "to_local") else x.numel() for x in tensors)
                 for tensors in (model.parameters(), optimizers)]  # fmt: skip
        finish(this, model)
        backend = dist.group.WORLD._get_backend(torch.device("cpu")) if dist.is_initialized() else None
        notes.update(parameters=local[0], state=local[1], n_params=this.n_params, dtype=this.dtype,
                     compiled=this.compiled, timeout=backend and backend.options._timeout.total_seconds())  # fmt: skip

    harness.Run.load_best = load_best
    if odd == "dtype":
        distributed._bfloat16_is_faster = lambda device: rank == 0
    elif odd == "compiler":
        torch.compile = (lambda model, **options: model) if rank == 0 else no_compiler
    try:
        run_rung(*arguments, **options)
    finally:
        Path(f"{arguments[-1]}.json").write_text(json.dumps({**notes, "connected": dist.is_initialized()}))


def no_compiler(*arguments, **options):
    raise RuntimeError("there is no compiler here")


@pytest.fixture
def odd_ones(begin_together, monkeypatch, server):  # noqa: F811
    """odd_ones(odd, rung, out, n, CONSTANT=...): what each of n processes noted; and what the first printed. `code`:
    how all of them end."""
    import test_survival

    def odd_ones(odd, *arguments, code=0, **constants):
        class Server:
            def Process(self, target, args, kwargs):
                return server.Process(target=start_odd, args=(odd, *args), kwargs=kwargs)

        with monkeypatch.context() as patch:
            child = test_survival.Child
            patch.setattr(test_survival, "Child", lambda _, *args, **options: child(Server(), *args, **options))
            children = begin_together(*arguments, **constants)
        finished = [child.finish() for child in children]
        assert [ended for ended, _, _ in finished] == [code] * len(children), finished
        return [json.loads(Path(f"{child.output}.json").read_text()) for child in children], finished[0][1]

    return odd_ones


def start_odd(odd, *arguments, environ=None, **options):
    os.environ.update(environ or {})
    run_odd_rung(odd, *arguments, **options)


# ----------------------------------------------------------------------------------------------------------
# A model that is divided
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_a_divided_model_trains_as_a_whole_one(name, odd_ones, alone, tmp_path):  # noqa: F811
    notes, _ = odd_ones(None, name, tmp_path, 2, SHARD=True, **ALONE)
    assert_close(results(tmp_path, name), alone[name])
    whole = notes[0]["n_params"]
    assert sum(note["parameters"] for note in notes) == whole  # each number is in one process
    assert all(note["parameters"] < 0.55 * whole for note in notes)
    states = 2 if name == "v3" else 1.9  # AdamW keeps two numbers of a parameter, Muon one
    assert all(note["state"] < 0.55 * states * whole for note in notes)
    saved = torch.load(part(tmp_path, name) / "model.pt", weights_only=True)["model"]
    assert all(type(x) is torch.Tensor for x in saved.values())  # whole: any program can load them
    assert sum(x.numel() for x in saved.values()) == whole


@pytest.mark.parametrize(("name", "constants"), [("v3", {}), ("v3_1", {"N_LAYER": 2})])
def test_what_divides_unevenly(name, constants, odd_ones, run, tmp_path):  # noqa: F811
    """Three processes share matrices of 16 rows, batches of the evaluation, and one or two matrices of a shape."""
    constants = {**ALONE, **constants, "BATCH_SIZE": 6, "MAX_STEPS": 12, "EVAL_INTERVAL": 6}
    code, _, err = run(name, tmp_path / "one", **constants)
    assert code == 0, err
    odd_ones(None, name, tmp_path / "three", 3, SHARD=True, **constants)
    assert_close(results(tmp_path / "three", name), results(tmp_path / "one", name))
    odd_ones(None, name, tmp_path / "copies", 3, **constants)
    assert_close(results(tmp_path / "copies", name), results(tmp_path / "one", name))


@pytest.mark.parametrize("name", ["v3", "v3_1"])
def test_checkpoints_of_divided_models_are_whole(name, odd_ones, begin_together, run, alone, tmp_path):  # noqa: F811
    stop = {0: {"batch 33": signal.SIGTERM}}
    notes, _ = odd_ones(None, name, tmp_path, 2, code=143, at_rank=stop, SHARD=True, **ALONE)
    assert not any(note["connected"] for note in notes)  # else a thread of gloo may crash a process at its end
    saved = checkpoint(tmp_path, name)
    assert saved["step"] == 34
    state = [x for o in saved["optimizers"] for values in o["state"].values() for x in values.values()]
    assert all(type(x) is torch.Tensor for x in (*saved["model"].values(), *state))
    code, out, err = run(name, tmp_path, RESUME=True, at={"batch 43": signal.SIGTERM}, **ALONE)  # by one
    assert code == 143 and "continuing from step 34\n" in out, err
    finished = [child.finish() for child in begin_together(name, tmp_path, 4, RESUME=True, SHARD=True, **ALONE)]
    assert [code for code, _, _ in finished] == [0] * 4, finished
    assert "continuing from step 44\n" in finished[0][1] and "4 processes, float32, sharded" in finished[0][1]
    assert_close(results(tmp_path, name), alone[name])


def test_one_process_has_nothing_to_divide(run, alone, tmp_path):  # noqa: F811
    code, out, err = run("v3", tmp_path, SHARD=True, **ALONE)
    assert code == 0, err
    assert "SHARD=True has no effect with one process" in out
    assert results(tmp_path, "v3")[0]["val_bpb"] == alone["v3"][0]["val_bpb"]


# ----------------------------------------------------------------------------------------------------------
# One decides for all
# ----------------------------------------------------------------------------------------------------------


def test_the_first_process_decides_what_dtype_auto_is(odd_ones, tmp_path):
    few = {**ALONE, "MAX_STEPS": 4, "EVAL_INTERVAL": 2, "DTYPE": "auto"}
    notes, _ = odd_ones("dtype", "v3", tmp_path, 2, **few)
    assert [note["dtype"] for note in notes] == ["bfloat16", "bfloat16"]
    assert {note["timeout"] for note in notes} == {distributed.TIMEOUT.total_seconds()}  # the first step is done


@pytest.mark.parametrize("shard", [False, True])
def test_a_compiler_that_one_process_lacks_is_used_by_none(shard, odd_ones, tmp_path):
    few = {**ALONE, "MAX_STEPS": 4, "EVAL_INTERVAL": 2, "COMPILE": True, "SHARD": shard}
    notes, out = odd_ones("compiler", "v3", tmp_path, 2, **few)
    assert [note["compiled"] for note in notes] == [False, False]
    assert "training without torch.compile: it failed in another process\n" in out


def test_processes_with_other_constants_are_refused(begin_together, tmp_path, begin):  # noqa: F811
    """As when two machines are given two commands."""
    commands = itertools.cycle([{"LEARNING_RATE": 0.001}, {"LEARNING_RATE": 0.002}])
    import test_survival

    usual = test_survival.command_line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_survival, "command_line", lambda name, out, c: usual(name, out, {**c, **next(commands)}))
        children = begin_together("v3", tmp_path, 2, **ALONE)
    code, _, err = children[0].finish()  # the other says the same, ten seconds later
    assert_one_line(code, err, "LEARNING_RATE is 0.001 in one process and 0.002 in another; start all processes with")


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_make_as_many_passes(n, world, monkeypatch):
    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(distributed.share_batches(list(range(n)))))
    assert len(set(map(len, shares))) == 1
    assert sorted(batch for share in shares for batch, counts in share if counts) == list(range(n))


# ----------------------------------------------------------------------------------------------------------
# What a GPU does while the program continues
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v2", *LATE_RUNGS])
def test_a_step_that_is_counted_later_is_the_same(name, load, monkeypatch, tmp_path):
    found = []
    for late in (False, True):
        out = tmp_path / str(late)
        module = load(name, MAX_STEPS=10, EVAL_INTERVAL=4, OUT_DIR=str(out))
        monkeypatch.setattr(harness.Run, "reads_late", late)
        records, model, _ = train(module)
        rows = [row.split(",")[:5] for row in (out / "steps.csv").read_text().splitlines()]  # no clock
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        found.append((without_clock(records), rows, saved["losses"].tolist(), without_clock(saved["log"]), model))
    assert found[0][:-1] == found[1][:-1] and same_weights(found[0][-1].state_dict(), model.state_dict())
    assert [row[0] for row in rows[1:]] == [str(n) for n in range(1, 11)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", [3, 4, 7])  # the last before an evaluation, the first after it, the last of all
def test_a_loss_that_is_not_finite_ends_the_run_though_it_is_read_later(step, late, load, monkeypatch):
    module = load("v3", MAX_STEPS=8, EVAL_INTERVAL=4, BATCH_SIZE=4)
    forward, get_batch, now = module.LanguageModel.forward, module.get_batch, [0]
    monkeypatch.setattr(harness.Run, "reads_late", late)
    monkeypatch.setattr(module, "get_batch", lambda ids, n: now.__setitem__(0, n) or get_batch(ids, n))
    monkeypatch.setattr(module.LanguageModel, "forward", lambda self, idx, targets=None: (
        forward(self, idx, targets) * (1 if targets is None or now[0] != step else float("inf"))))  # fmt: skip
    with pytest.raises(UserError, match=f"the loss is inf at step {step} "):
        train(module)
    saved = torch.load(Path(module.OUT_DIR) / "checkpoint.pt", weights_only=True) if step > 3 else {"step": 4}
    assert saved["step"] == 4  # nothing that is not finite was saved
