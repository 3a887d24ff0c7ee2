"""Runs that are killed, stopped, damaged, started twice, shared by several processes, out of disk or memory: nothing is
lost, nothing changes, and every advice that a message gives works.

The runs are child processes, forked from one that has imported torch and the rungs: a start costs no imports.
"""

import contextlib
import ctypes
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from common import COMPILED, LATE_RUNGS, MODERN, ROOT, RUNGS, V4

import data
import harness.report
from data import prepare

STEPS = 60
CONSTANTS = {
    "BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 2, "BLOCK_SIZE": 16, "MAX_STEPS": STEPS, "EVAL_INTERVAL": 10, "PATIENCE": 100,
    "WARMUP_STEPS": 4, "N_LAYER": 1, "N_HEAD": 2, "N_EMBD": 16, "DROPOUT": 0.1, "STRIDE": 8, "SAMPLE_TOKENS": 4,
    "COMPILE": False, "DTYPE": "float32", "VOCABULARY": "bpe_vocab_500.json", "POSITION": "rope", "DEVICE": "cpu",
    "EXTRAPOLATION": "1,2",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Child processes
# ----------------------------------------------------------------------------------------------------------


def run_rung(name, arguments, folder, output, at=(), limit=0, threads=1, environ=None, disk=None, screen=None,
             long_evaluation=False, infinite_at=None):  # fmt: skip
    """What a child process does: what `python <name>.py <arguments>` does with the data folder `folder`, writing to
    `output`.out and .err.

    `at`: {event: signal that the process sends itself there, or "hold"}. Events are "batch 7", that of step 7,
    "evaluation 2", the second one, "rename checkpoint.pt 3", before a file takes this name for the third time, and
    "event 40", the fortieth of all. A process that holds waits for `Child.let_go`, and says if a signal comes. `limit`
    bytes of memory can be had. `disk` is (folder, size, whether read-only) of a small disk. `screen`: "full", where
    nothing can be written, or "closed". `long_evaluation`: on the training text. At the step `infinite_at` the loss is
    infinite.
    """
    for number, path in ((1, f"{output}.out"), (2, f"{output}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environ or {})
    torch.set_num_threads(threads)
    data.DATA_DIR, at = folder, dict(at)
    harness.report.draw_curves = lambda path, *_, **__: path.write_text("a picture")  # else most of the time goes there
    rung = importlib.import_module(name)
    get_batch, evaluate, load_tokens, replace = rung.get_batch, rung.evaluate, rung.load_tokens, Path.replace
    evaluation_due, forward = harness.Run.evaluation_due, rung.LanguageModel.forward
    now, seen = {"step": None, "run": None}, Counter()

    def happens(event):
        seen["event"] += 1
        for action in (at.get(event), at.get(f"event {seen['event']}")):
            if action == "hold":
                hold(event)
            elif action:
                signal.raise_signal(action)

    def hold(event):
        os.write(1, f"holds at {event}\n".encode())  # not by print(), which would flush what the run has printed
        told = False
        while not Path(f"{output}.go").exists():
            if now["run"].signals and not told:
                told = os.write(1, b"a signal came\n")
            time.sleep(0.005)

    def batch(ids, step):
        now["step"] = step
        happens(f"batch {step}")
        return get_batch(ids, step)

    def evaluation(*arguments, **options):
        now["step"] = None
        seen["evaluation"] += 1
        happens(f"evaluation {seen['evaluation']}")
        return evaluate(*arguments, **options)

    def rename(path, to):
        seen[Path(to).name] += 1
        happens(f"rename {Path(to).name} {seen[Path(to).name]}")
        return replace(path, to)

    def loop_has_begun(run, step):
        now["run"], rung.get_batch = run, batch  # until then a batch is only tried
        return evaluation_due(run, step)

    def infinite(self, idx, targets=None, *rest, **options):
        loss = forward(self, idx, targets, *rest, **options)
        return loss * math.inf if targets is not None and now["step"] == infinite_at else loss

    if infinite_at is not None:
        rung.LanguageModel.forward = infinite
    harness.Run.evaluation_due, Path.replace = loop_has_begun, rename
    rung.evaluate, sys.argv = evaluation, [f"{name}.py", *arguments]
    if long_evaluation:
        rung.load_tokens = lambda *of: dict.fromkeys(("train", "val", "test"), load_tokens(*of)["train"])
    if limit:
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    if screen == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif screen == "closed":  # then the interpreter has no streams
        sys.stdout = sys.stderr = None
        os.close(1)
        os.close(2)
    try:
        if disk:
            mount(*disk)
        harness.start(vars(rung))
        for stream in (sys.stdout, sys.stderr):  # as the interpreter does when it ends
            stream.flush()
    finally:
        if disk:
            shutil.copytree(disk[0], f"{output}.left")  # the disk goes with this process


def mount(folder, size, read_only):
    """Put a disk of `size` bytes on `folder`, which this process alone sees."""
    libc, user = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())
    new_namespaces, flags = 0x10000000 | 0x00020000, 1 if read_only else 0  # CLONE_NEWUSER, CLONE_NEWNS; MS_RDONLY
    if libc.unshare(new_namespaces) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user[0]} 1")
        Path("/proc/self/gid_map").write_text(f"0 {user[1]} 1")
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, f"size={size}".encode()):
        sys.exit(99)


class Child:
    """A run in a process of its own."""

    def __init__(self, server, output, *arguments, **options):
        self.output = output
        self.process = server.Process(target=run_rung, args=(*arguments, str(output)), kwargs=options)
        self.process.start()
        self.pid = self.process.pid

    @property
    def out(self):
        path = Path(f"{self.output}.out")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, text, times=1):
        """Return when the child has printed `text` so many times."""
        started = time.monotonic()
        while self.out.count(text) < times:
            if time.monotonic() - started > 300 or self.process.exitcode is not None:
                pytest.fail(f"the child never printed {text!r}: {self.finish()}")
            time.sleep(0.005)

    def send(self, number):
        os.kill(self.pid, number)

    def let_go(self):
        """Let a child that holds go on."""
        Path(f"{self.output}.go").touch()

    def finish(self):
        """(exit code, what it printed, what it said of errors)."""
        self.process.join(300)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"the child does not end: {self.out}")
        return self.process.exitcode, self.out, Path(f"{self.output}.err").read_text(encoding="utf-8")

    def kill(self):
        self.process.kill()
        self.process.join()


@pytest.fixture(scope="module")
def server():
    """What forks the children."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_survival", "torch._dynamo", *RUNGS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # else it would not show whether lines are there at once
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of the compiler's own, which import torch
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with the small vocabulary and a short text."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(ROOT / "data" / "bpe_vocab_500.json", folder)
    draw = random.Random(0)
    for split, n in (("train", 30_000), ("valid", 300), ("test", 300)):
        words = " ".join(draw.choices("the cat sat on a mat and saw the rat".split(), k=n))
        (folder / f"wiki.{split}.tokens").write_text(words + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DATA_DIR", folder)
        prepare.prepare(*prepare.open_source(str(folder)), ["bpe_vocab_500.json"])
    return folder


def command_line(name, out, constants):
    known = harness.constants(vars(importlib.import_module(name)))
    values = {**CONSTANTS, "OUT_DIR": out, **constants}
    return [f"{key}={value}" for key, value in values.items() if key in known]


@pytest.fixture(scope="module")
def begin(server, folder, tmp_path_factory):
    """begin(rung, out, option=..., CONSTANT=...): a Child that trains in the folder `out`. All end with the tests."""
    outputs, children = tmp_path_factory.mktemp("outputs"), []

    def begin(name, out, **options):
        constants = {key: options.pop(key) for key in list(options) if key.isupper()}
        arguments = (name, command_line(name, out, constants), folder)
        children.append(Child(server, outputs / str(len(children)), *arguments, **options))
        return children[-1]

    yield begin
    for child in children:
        child.kill()


@pytest.fixture(scope="module")
def run(begin):
    """The same, until it ends: (exit code, what it printed, what it said of errors)."""
    return lambda *arguments, **options: begin(*arguments, **options).finish()


def part(out, name):
    """Where the weights of a run are."""
    return Path(out) / "rope" if name == V4 else Path(out)


def checkpoint(out, name):
    return torch.load(part(out, name) / "checkpoint.pt", weights_only=True)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def results(out, name):
    """All of a finished run that may not depend on interruptions: no clock, no memory, no folder."""
    folder = part(out, name)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for key in ("train_seconds", "tokens_per_second", "import_memory_mb", "peak_memory_mb", "hyperparameters"):
        summary.pop(key)
    log = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder)]
    weights = {file: torch.load(folder / file, weights_only=True)["model"] for file in ("model.pt", "checkpoint.pt")}
    return summary, log, weights, (folder / "sample.txt").read_text(encoding="utf-8")


def assert_same(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    for file in theirs[2]:
        assert all(torch.equal(ours[2][file][key], theirs[2][file][key]) for key in theirs[2][file])
    assert ours[3] == theirs[3]


def assert_one_line(code, err, *texts):
    assert code == 1
    assert len(err.strip().splitlines()) == 1, err
    assert all(text in err for text in texts), err


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """straight(rung): the results of a run that nothing interrupted."""
    found = {}

    def straight(name):
        if name not in found:
            out = tmp_path_factory.mktemp("straight")
            code, _, err = run(name, out)
            assert code == 0, err
            found[name] = results(out, name)
        return found[name]

    return straight


# ----------------------------------------------------------------------------------------------------------
# Killed and stopped
# ----------------------------------------------------------------------------------------------------------


KILLS = [("v0", 2), ("v1", 2), ("v1_1", 2), ("v2", 2), ("v3", 6), ("v3_1", 3), (V4, 6)]


@pytest.mark.parametrize(("name", "kills"), KILLS)
def test_a_run_that_is_killed_again_and_again_is_the_same_run(name, kills, run, straight, tmp_path):
    """SIGKILL at random events: steps, evaluations, and files that take their names. RESUME=True works from the first
    time on, when there is no checkpoint yet."""
    draw, resumed = random.Random(1), 0
    for _ in range(kills):
        code, out, err = run(name, tmp_path, at={f"event {draw.randint(1, 40)}": signal.SIGKILL}, RESUME=True)
        assert code in (0, -signal.SIGKILL), err
        resumed += "going on from step" in out
    code, out, err = run(name, tmp_path, RESUME=True)
    assert code == 0, err
    assert resumed + ("going on from step" in out) >= kills // 2
    assert_same(results(tmp_path, name), straight(name))


@pytest.mark.parametrize(("event", "step"), [
    ("rename checkpoint_new.pt 1", None),  # no file has the name of a checkpoint yet
    ("rename checkpoint.pt 1", 10), ("rename checkpoint_new.pt 2", 10), ("rename checkpoint_before.pt 1", 20),
    ("rename checkpoint.pt 2", 20), ("rename model.pt 2", 10), ("rename log.jsonl 2", 10),
])  # fmt: skip
def test_a_kill_while_a_checkpoint_is_saved_costs_no_more_than_that_one(event, step, run, straight, tmp_path):
    """Before each of the renames. What is written whole is read, under whatever name it is."""
    code, _, _ = run("v3", tmp_path, at={event: signal.SIGKILL})
    assert code == -signal.SIGKILL
    code, out, err = run("v3", tmp_path, RESUME=True)
    assert code == 0, err
    assert ("RESUME=True begins a run" if step is None else f"going on from step {step}\n") in out
    assert "going on from the checkpoint before it" not in out
    assert_same(results(tmp_path, "v3"), straight("v3"))


def has_compiler():
    return any(map(shutil.which, ("g++", "c++", "clang++")))


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_killed_and_resumed_is_the_same_run_in_two_threads_compiled_in_bfloat16(begin, run, tmp_path):
    """The way in which users train, with the rung that has most parts."""
    name = V4
    constants = {**COMPILED, "MAX_STEPS": 22}
    straight = begin(name, tmp_path / "straight", threads=2, at={"batch 21": "hold"}, **constants)
    straight.wait_for("holds at batch 21\n")
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")  # what a kill at this moment would leave
    straight.let_go()
    code, out, err = straight.finish()
    assert code == 0, err
    assert "without torch.compile" not in out
    code, out, err = run(name, tmp_path / "killed", threads=2, RESUME=True, **constants)
    assert code == 0, err
    assert "going on from step 20" in out
    assert_same(results(tmp_path / "killed", name), results(tmp_path / "straight", name))


@pytest.mark.parametrize(("name", "number", "step"), [
    ("v0", signal.SIGTERM, 13), ("v1", signal.SIGINT, 13), ("v1_1", signal.SIGTERM, 13), ("v2", signal.SIGINT, 13),
    ("v3", signal.SIGINT, 13), ("v3_1", signal.SIGINT, 13), (V4, signal.SIGTERM, 13), ("v3", signal.SIGTERM, STEPS - 1),
    (V4, signal.SIGINT, STEPS - 1),
])  # fmt: skip
def test_a_signal_finishes_the_step_and_saves(name, number, step, run, straight, tmp_path):
    code, out, err = run(name, tmp_path, at={f"batch {step}": number})
    assert code == 128 + number  # 130 or 143
    assert f"stopped after {step + 1} steps; RESUME=True" in err and len(err.splitlines()) == 1
    assert checkpoint(tmp_path, name)["step"] == step + 1
    code, out, err = run(name, tmp_path, RESUME=True)
    assert code == 0, err
    assert f"going on from step {step + 1}\n" in out
    assert_same(results(tmp_path, name), straight(name))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["v1", V4])
def test_a_signal_in_an_evaluation_saves_after_it(name, number, run, tmp_path):
    code, _, err = run(name, tmp_path, at={"evaluation 2": number})
    assert code == 128 + number
    assert "stopped after 20 steps; RESUME=True" in err and len(err.splitlines()) == 1
    assert checkpoint(tmp_path, name)["step"] == read_log(part(tmp_path, name))[-1]["step"] == 20


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_ctrl_c_in_the_evaluations_after_training_loses_nothing(name, run, straight, tmp_path):
    code, _, err = run(name, tmp_path, at={"evaluation 2": signal.SIGINT}, EVAL_INTERVAL=STEPS)
    assert code == 130
    assert "RESUME=True" in err and len(err.splitlines()) == 1
    assert not (part(tmp_path, name) / "summary.json").exists()
    code, out, err = run(name, tmp_path, RESUME=True, EVAL_INTERVAL=STEPS)
    assert code == 0, err
    assert f"going on from step {STEPS}" in out
    weights = results(tmp_path, name)[2]["checkpoint.pt"]
    assert all(torch.equal(p, straight(name)[2]["checkpoint.pt"][key]) for key, p in weights.items())


def test_a_second_sigterm_does_not_cost_the_checkpoint(begin, tmp_path):
    """torchrun passes on what a scheduler also sends to each process by itself."""
    child = begin("v3", tmp_path, at={"batch 13": "hold"})
    child.wait_for("holds at batch 13\n")
    child.send(signal.SIGTERM)
    child.wait_for("a signal came\n")
    child.send(signal.SIGTERM)
    child.let_go()
    code, _, err = child.finish()
    assert code == 143
    assert "stopped after 14 steps; RESUME=True" in err and len(err.splitlines()) == 1
    assert checkpoint(tmp_path, "v3")["step"] == 14


@pytest.mark.parametrize("name", RUNGS)
def test_a_second_ctrl_c_stops_at_once(name, begin, tmp_path):
    """In the middle of a step that never ends."""
    child = begin(name, tmp_path, at={"batch 0": "hold"})
    child.wait_for("holds at batch 0\n")
    child.send(signal.SIGINT)
    child.wait_for("a signal came\n")
    assert child.process.exitcode is None
    child.send(signal.SIGINT)
    code, _, err = child.finish()
    assert code == 130
    assert err == f"{name}.py: stopped; RESUME=True goes on from the last checkpoint\n"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, run, straight, tmp_path):
    """And does not take its place: that one is still there after another kill."""
    assert run("v3", tmp_path, at={"batch 35": signal.SIGKILL})[0] == -signal.SIGKILL
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000]) if damage == "cut" else newest.unlink()
    code, out, err = run("v3", tmp_path, RESUME=True, at={"rename checkpoint.pt 1": signal.SIGKILL})
    assert code == -signal.SIGKILL, err
    assert "going on from the checkpoint before it" in out
    assert "going on from step 20\n" in out
    (tmp_path / "checkpoint_new.pt").unlink()
    code, out, err = run("v3", tmp_path, RESUME=True)
    assert code == 0, err
    assert "going on from step 20\n" in out
    assert_same(results(tmp_path, "v3"), straight("v3"))


# ----------------------------------------------------------------------------------------------------------
# Where nobody looks at the screen
# ----------------------------------------------------------------------------------------------------------


def test_a_run_says_early_how_long_it_takes_and_last_where_its_results_are(begin, tmp_path):
    """Every line is there at once."""
    child = begin("v1", tmp_path, at={"batch 0": "hold"})
    child.wait_for("holds at batch 0\n")
    assert "training tokens" in child.out
    child.let_go()
    assert child.finish()[0] == 0
    child = begin("v1", tmp_path, at={"batch 10": "hold"})
    child.wait_for("holds at batch 10\n")
    assert f"{STEPS - 10} more steps will take about " in child.out and "val loss" in child.out
    child.let_go()
    code, out, err = child.finish()
    assert (code, err) == (0, "")
    last = out.splitlines()[-1]
    assert last.startswith(f"results in {tmp_path}: ")
    assert last.partition(": ")[2].split(", ") == ["log.jsonl", "loss.png", "model.pt", "sample.txt", "steps.csv",
                                                   "summary.json", "vocabulary.json"]  # fmt: skip


REAL = """
import importlib, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import data, harness
data.DATA_DIR = Path({folder!r})
harness.start(vars(importlib.import_module("v0")))
"""

def environment_of_users():
    """With PYTHONUNBUFFERED, which few users set, it would not show whether lines are there at once and whether the
    last ones are lost."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


RESULTS = {"summary.json", "sample.txt", "loss.png", "model.pt", "log.jsonl", "checkpoint.pt"}


def assert_results(folder):
    assert all((folder / name).stat().st_size > 0 for name in RESULTS)


@pytest.mark.parametrize("screen", ["full", "closed"])
def test_an_output_that_cannot_be_written_costs_no_results(screen, run, tmp_path):
    code, out, err = run("v0", tmp_path, screen=screen)
    assert (code, out, err) == (0, "", "")
    assert_results(tmp_path)


def test_a_pipe_whose_reader_has_gone_costs_no_results(folder, tmp_path):
    """A process of its own: the interpreter itself writes when it ends."""
    (tmp_path / "child.py").write_text(REAL.format(root=str(ROOT), folder=str(folder)), encoding="utf-8")
    shell = f'set -o pipefail; "$@" 2>&1 | head -n 1 > {tmp_path / "head"}'
    environment = {**environment_of_users(), "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", shell, "bash", sys.executable, str(tmp_path / "child.py"),
                           *command_line("v0", tmp_path / "out", {})], capture_output=True, text=True, env=environment,
                          timeout=300)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "head").read_text().startswith("v0 on ")
    assert_results(tmp_path / "out")


@pytest.mark.parametrize("command", ["bpe_tokenizer.py", "results/experiments.py --list", "v4_alibi_rope.py --help"])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    """The rest of it is lost before it is written, at the latest when the interpreter ends."""
    shell = f'set -o pipefail; "$0" {command} | true'
    done = subprocess.run(["bash", "-c", shell, sys.executable], cwd=ROOT, capture_output=True, text=True,
                          env=environment_of_users(), timeout=300)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# ----------------------------------------------------------------------------------------------------------
# Two runs in one folder
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v1", V4])
def test_a_second_run_in_the_folder_is_refused(name, begin, run, tmp_path):
    first = begin(name, tmp_path, at={"batch 1": "hold"})
    first.wait_for("holds at batch 1\n")
    for constants in ({}, {"RESUME": True}):
        code, _, err = run(name, tmp_path, **constants)
        assert_one_line(code, err, f"process {first.pid} is training in {part(tmp_path, name)}", "another OUT_DIR")
    assert run(name, tmp_path / "other", MAX_STEPS=1)[0] == 0  # as it says
    first.kill()
    code, _, err = run(name, tmp_path, MAX_STEPS=2)  # the lock has gone with its process
    assert code == 0, err


# ----------------------------------------------------------------------------------------------------------
# Losses that are not finite
# ----------------------------------------------------------------------------------------------------------


def assert_finite(out, name):
    """Checkpoint and log are. Returns the step of the last evaluation."""
    assert all(p.isfinite().all() for p in checkpoint(out, name)["model"].values())
    log = read_log(part(out, name))
    assert all(math.isfinite(line["val_loss"]) for line in log)
    return log[-1]["step"]


@pytest.mark.parametrize(("name", "rate", "lower"), [
    ("v0", "LEARNING_RATE", 0.03), ("v1", "LEARNING_RATE", 0.003), ("v1_1", "LEARNING_RATE", 0.003),
    ("v2", "LEARNING_RATE", 0.003), ("v3", "LEARNING_RATE", 0.003), ("v3_1", "LEARNING_RATE_ADAMW", 0.01),
    (V4, "LEARNING_RATE_ADAMW", 0.01),
])  # fmt: skip
def test_a_loss_that_is_not_finite_ends_the_run_and_a_lower_rate_trains(name, rate, lower, run, tmp_path):
    """Before the first checkpoint there is nothing to go on from."""
    code, _, err = run(name, tmp_path, EVAL_INTERVAL=5, **{rate: 1e30})
    assert_one_line(code, err, "loss is", "at step", f"{rate}=1e+30")
    assert "RESUME" not in err
    assert re.search("lower LEARNING_RATE or LEARNING_RATE_ADAMW" if name in MODERN else r"lower LEARNING_RATE\b", err)
    assert "DTYPE" not in err  # it is float32
    assert ("WARMUP_STEPS" in err) == (name in LATE_RUNGS)
    code, _, err = run(name, tmp_path, **{rate: lower})
    assert code == 0, err
    assert assert_finite(tmp_path, name) == STEPS


@pytest.mark.parametrize(("name", "advice"), [
    ("v0", {"LEARNING_RATE": 0.02}), ("v1", {"LEARNING_RATE": 0.001}), ("v1_1", {"LEARNING_RATE": 0.001}),
    ("v3", {"WARMUP_STEPS": 30}), ("v3", {"DTYPE": "float32"}), ("v3_1", {"LEARNING_RATE_ADAMW": 0.003}),
    (V4, {"WARMUP_STEPS": 30}), (V4, {"DTYPE": "float32"}), (V4, {"LEARNING_RATE": 0.01}),
])  # fmt: skip
def test_every_advice_for_a_loss_that_is_not_finite_trains_on(name, advice, run, tmp_path):
    code, _, err = run(name, tmp_path, infinite_at=13, DTYPE="bfloat16")
    assert_one_line(code, err, "the loss is inf at step 13", "and add RESUME=True, which goes on from step 10", *advice)
    assert assert_finite(tmp_path, name) == 10
    code, out, err = run(name, tmp_path, RESUME=True, **{"DTYPE": "bfloat16", **advice})
    assert code == 0, err
    assert "going on from step 10\n" in out and "going on with other constants: " + [*advice][0] in out
    assert ("begun on" in out) == ("DTYPE" in advice)
    assert assert_finite(tmp_path, name) == STEPS


# ----------------------------------------------------------------------------------------------------------
# Disks and memory that are full
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "read_only", "expected"), [
    ("v3", "600k", False, "No space left on device"), (V4, "700k", False, "No space left on device"),
    ("v3", "20k", False, "No space left on device"), ("v0", "4k", False, ""), ("v1", "100k", False, ""),
    ("v3", "300k", True, "Read-only"), ("v0", "300k", True, "Read-only"),
])  # fmt: skip
def test_a_full_disk_costs_no_more_than_the_steps_since_the_checkpoint(name, size, read_only, expected, begin, run,
                                                                       tmp_path):  # fmt: skip
    (tmp_path / "disk").mkdir()
    child = begin(name, tmp_path / "disk" / "out", disk=(str(tmp_path / "disk"), size, read_only))
    code, _, err = child.finish()
    if code == 99:
        pytest.skip("no disk can be mounted here")
    assert_one_line(code, err, expected)
    left = Path(f"{child.output}.left")
    assert not list(left.rglob("writing-*"))
    if read_only:
        assert "OUT_DIR=" in err
        return
    assert "make room" in err
    out, step = left / "out", 0
    with contextlib.suppress(FileNotFoundError):
        step = checkpoint(out, name)["step"]
        assert torch.load(part(out, name) / "model.pt", weights_only=True)["model"]
    if size in ("600k", "700k"):
        assert step > 0
    code, printed, err = run(name, out, RESUME=True)  # after making room
    assert code == 0, err
    assert f"going on from step {step}" in printed or step == 0
    assert run(name, tmp_path / "other", MAX_STEPS=1)[0] == 0


LARGE = {"N_EMBD": 512, "MAX_STEPS": 1, "EVAL_INTERVAL": 1}  # a model of 15 MB, a checkpoint of 44 MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited by what /proc says")
def test_too_little_memory_to_load_a_checkpoint_is_not_called_damage(run, tmp_path):
    code, _, err = run("v3", tmp_path, **LARGE)
    assert code == 0, err
    code, _, err = run("v3", tmp_path, limit=30_000_000, RESUME=True, **LARGE)
    assert_one_line(code, err, "v3.py: out of memory in line ", "; lower MICRO_BATCH_SIZE to 1 (")
    code, out, err = run("v3", tmp_path, RESUME=True, **LARGE)
    assert (code, err) == (0, "") and "going on from step 1\n" in out


BIG = {"MICRO_BATCH_SIZE": 2048, "BATCH_SIZE": 2048, "BLOCK_SIZE": 8, "CHUNK_SIZE": 100_000, "N_HIDDEN": 8}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited by what /proc says")
@pytest.mark.parametrize("name", RUNGS)
def test_out_of_memory_says_what_to_lower_and_that_works(name, run, tmp_path):
    limit = 40_000_000 if name == "v1_1" else 90_000_000
    constants = {**BIG, "MAX_STEPS": 4, "EVAL_INTERVAL": 2}
    code, _, err = run(name, tmp_path, limit=limit, **constants)
    assert_one_line(code, err, f"{name}.py: out of memory in line ", "; lower ")
    lower = re.search(r"lower (\w+)", err)[1]
    assert lower == ("BATCH_SIZE" if name in ("v0", "v1") else "MICRO_BATCH_SIZE")
    resume = {"RESUME": True} if lower == "MICRO_BATCH_SIZE" else {}  # the batches of a run must stay
    code, out, err = run(name, tmp_path, limit=limit, **{**constants, "CHUNK_SIZE": 100, lower: 16, **resume})
    assert code == 0, err
    assert read_log(part(tmp_path, name))[-1]["step"] == 4


@pytest.mark.parametrize("name", ["v1_1", "v2", *LATE_RUNGS])
def test_evaluation_takes_the_memory_of_a_micro_batch(name, run, tmp_path):
    """A larger batch at the same micro-batch costs its gradients nothing, and evaluations and extrapolation neither."""
    peaks = {}
    for size in (4, 512):
        constants = {"MICRO_BATCH_SIZE": 4, "MAX_STEPS": 1, "BLOCK_SIZE": 32, "STRIDE": 32, "CHUNK_SIZE": 128}
        code, _, err = run(name, tmp_path / str(size), long_evaluation=True, EXTRAPOLATION="1,4", BATCH_SIZE=size,
                           **constants)  # fmt: skip
        assert code == 0, err
        summary = json.loads((part(tmp_path / str(size), name) / "summary.json").read_text())
        peaks[size] = summary["peak_memory_mb"]
    assert peaks[512] < peaks[4] + 15  # the logits of 512 windows take 33 MB


# ----------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------

ALONE = {"DROPOUT": 0.0, "MICRO_BATCH_SIZE": 1}  # dropout differs between numbers of processes


@pytest.fixture
def begin_together(begin):
    """begin_together(rung, out, n): n children that train together, as torchrun would start them. `at_rank`: {rank: the
    `at` of that child}."""

    def begin_together(name, out, n, at_rank=None, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        at_rank = at_rank or {}
        return [begin(name, out, environ={**where, "RANK": str(k), "LOCAL_RANK": str(k)}, at=at_rank.get(k, ()),
                      **options) for k in range(n)]  # fmt: skip

    return begin_together


def assert_close(ours, theirs):
    """The same losses, up to the order in which float32 numbers are added."""
    assert [line["step"] for line in ours[1]] == [line["step"] for line in theirs[1]]
    for mine, other in zip(ours[1], theirs[1]):
        assert mine["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
        assert mine["step"] == 0 or mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    for key in ("val_bpb_sliding", "test_word_ppl", "tokens_seen", "steps", "best_step"):
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-3)


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """Results of a run of each rung in a single process, without dropout."""
    found = {}
    for name in LATE_RUNGS:
        out = tmp_path_factory.mktemp("alone")
        code, _, err = run(name, out, **ALONE)
        assert code == 0, err
        found[name] = results(out, name)
    return found


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_two_processes_do_what_one_does(name, begin_together, alone, tmp_path):
    for k, child in enumerate(begin_together(name, tmp_path, 2, **ALONE)):
        code, out, err = child.finish()
        assert code == 0, err
        assert out.count("val bpb") == (0 if k else len(alone[name][1]) + 1)  # only one of them talks
    ours = results(tmp_path, name)
    assert_close(ours, alone[name])
    for key in ("val_loss", "val_bpb", "val_top_1", "val_top_5"):  # an evaluation in two parts is one in one part
        assert ours[1][0][key] == pytest.approx(alone[name][1][0][key], rel=1e-6)


def test_a_dead_process_ends_the_run_which_others_can_continue(begin_together, run, alone, tmp_path):
    first, second = begin_together("v3", tmp_path, 2, at_rank={1: {"batch 25": signal.SIGKILL}}, **ALONE)
    code, _, err = first.finish()
    assert code == 1 and second.finish()[0] == -signal.SIGKILL
    assert "v3.py: another process has ended; RESUME=True goes on from the last checkpoint" in err.splitlines()[-1]
    assert "Traceback" not in err
    one_is_told = {3: {"batch 33": signal.SIGTERM}}  # that is enough: they agree
    four = begin_together("v3", tmp_path, 4, at_rank=one_is_told, RESUME=True, **ALONE)
    stopped = [child.finish() for child in four]
    assert [code for code, _, _ in stopped] == [143] * 4
    assert "going on from step 20\n" in stopped[0][1] and "stopped after 34 steps" in stopped[0][2]
    code, out, err = run("v3", tmp_path, RESUME=True, **ALONE)
    assert code == 0, err
    assert "going on from step 34\n" in out and "1 processes" in out
    assert_close(results(tmp_path, "v3"), alone["v3"])


def test_sigterm_to_torchrun_saves(folder, tmp_path):
    code = REAL.replace('"v0"', "sys.argv.pop(1)")
    (tmp_path / "child.py").write_text(code.format(root=str(ROOT), folder=str(folder)), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = command_line(V4, tmp_path / "out", {**ALONE, "MAX_STEPS": 100_000, "EVAL_INTERVAL": 100_000})
    environment, pipe = {**environment_of_users(), "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    run = subprocess.Popen([*torchrun, str(tmp_path / "child.py"), V4, *arguments], text=True, env=environment,
                           stdout=pipe, stderr=pipe)  # fmt: skip
    for line in run.stdout:
        if "more steps will take about" in line:
            break
    run.terminate()
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0
    assert err.count("RESUME=True, beside the same constants, goes on from there") == 1
    steps = int(re.search(r"stopped after (\d+) steps", err)[1])
    assert checkpoint(tmp_path / "out", V4)["step"] == steps >= 10


def test_what_several_processes_cannot_do_is_refused_in_one_line(begin, begin_together, tmp_path):
    alone = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}
    code, _, err = begin("v3", tmp_path, environ=alone, BATCH_SIZE=3).finish()
    assert_one_line(code, err, "v3.py: BATCH_SIZE=3 must be a multiple of the 2 processes")
    for name in ("v0", "v1", "v1_1", "v2"):
        code, _, err = begin(name, tmp_path, environ=alone).finish()
        assert_one_line(code, err, f"{name}.py: this rung trains in one process: python {name}.py")
