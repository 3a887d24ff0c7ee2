"""Runs that are killed, stopped, damaged, started twice, shared by several processes, out of disk or memory: nothing is
lost, nothing changes, and every advice that a message gives works.

The runs are child processes, forked from one that has imported torch and the rungs: a start costs no imports.
"""

import builtins
import contextlib
import ctypes
import fcntl
import functools
import importlib
import io
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
import struct
import subprocess
import sys
import termios
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import COMPILED, LATE_RUNGS, MODERN, ROOT, RUNGS, V4

import data
import harness.clock
import harness.report
import harness.signals
from data import prepare
from harness.resume import move_aside

HANGS = 900  # seconds after which a child that does nothing counts as hanging; the slowest machines need a third
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
             long_evaluation=False, infinite_at=None, ignored=(), twice=None, jumps=()):  # fmt: skip
    """What a child process does: what `python <name>.py <arguments>` does with the data folder `folder`, writing to
    `output`.out and .err.

    `at`: {event: signal that the process sends itself there, or a list of them, or "hold"}. Events are "batch 7", that
    of step 7, "evaluation 2", the second one, "rename checkpoint.pt 3", before a file takes this name for the third
    time, "compile", and "event 40", the fortieth of all. A process that holds waits for `Child.let_go`, and says if a
    signal comes. `limit` bytes of memory can be had. `disk` is (folder, size, whether read-only) of a small disk.
    `screen`: "full", where nothing can be written, "closed", or the path of a terminal. `long_evaluation`: on the
    training text. At the step `infinite_at` the loss is infinite. `ignored`: signals. `twice`: the seconds in which a
    signal counts once. `jumps`: {event: (seconds that pass there, seconds of computing that do)}.
    """
    for number, path in ((1, f"{output}.out"), (2, f"{output}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    notes = os.dup(1)
    for number in harness.signals.ENDING:  # whatever the tests ignore
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(environ or {})
    harness.signals.TWICE = harness.signals.TWICE if twice is None else twice
    torch.set_num_threads(threads)
    data.DATA_DIR, at, jumps, jumped = folder, dict(at), dict(jumps), [0, 0]
    harness.report.draw_curves = lambda path, *_, **__: path.write_text("a picture")  # else most of the time goes there
    rung = importlib.import_module(name)
    get_batch, evaluate, load_tokens, replace = rung.get_batch, rung.evaluate, rung.load_tokens, Path.replace
    evaluation_due, forward = harness.Run.evaluation_due, rung.LanguageModel.forward
    now, seen = {"step": None, "run": None}, Counter()

    def happens(event):
        seen["event"] += 1
        jumped[:] = [a + b for a, b in zip(jumped, jumps.get(event, (0, 0)))]
        for action in (at.get(event), at.get(f"event {seen['event']}")):
            if action == "hold":
                hold(event)
            elif action:
                with contextlib.ExitStack() as stack:  # sends all of them, whatever an earlier one raises
                    for number in reversed(action if isinstance(action, list) else [action]):
                        stack.callback(signal.raise_signal, number)

    def hold(event):
        os.write(notes, f"holds at {event}\n".encode())  # not by print(), which would flush what the run has printed
        told = False
        while not Path(f"{output}.go").exists():
            if now["run"].signals and not told:
                told = os.write(notes, b"a signal came\n")
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

    def compiled(model):
        happens("compile")
        raise RuntimeError("no compiler here")

    if "compile" in at:
        torch.compile = compiled
    if jumps:
        harness.clock.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + jumped[0],
                                             process_time=lambda: time.process_time() + jumped[1])  # fmt: skip
    if infinite_at is not None:
        rung.LanguageModel.forward = infinite
    harness.Run.evaluation_due, Path.replace = loop_has_begun, rename
    rung.evaluate, sys.argv = evaluation, [f"{name}.py", *arguments]
    if long_evaluation:
        rung.load_tokens = lambda *of: dict.fromkeys(("train", "val", "test"), load_tokens(*of)["train"])
    if limit:
        with contextlib.suppress(OSError, AttributeError):  # not glibc, where each thread may reserve 64 MB for itself
            ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    if screen == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif screen and screen.startswith("/"):  # a process that leads its session has the terminal that it opens first
        os.setsid()
        terminal = os.open(screen, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(terminal, number)
        os.close(terminal)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
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
            if time.monotonic() - started > HANGS or self.process.exitcode is not None:
                pytest.fail(f"the child never printed {text!r}: {self.finish()}")
            time.sleep(0.005)

    def send(self, number):
        os.kill(self.pid, number)

    def let_go(self):
        """Let a waiting child continue."""
        Path(f"{self.output}.go").touch()

    def finish(self):
        """(exit code, what it printed, what it said of errors)."""
        self.process.join(HANGS)
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
        resumed += "continuing from step" in out
    code, out, err = run(name, tmp_path, RESUME=True)
    assert code == 0, err
    assert resumed + ("continuing from step" in out) >= kills // 2
    assert_same(results(tmp_path, name), straight(name))


class Watch:
    """Copies the folder `out` to `copies`/1, /2, ... before each system call that changes a file in it, and when half
    of the bytes of a write are there: what a kill at these moments would leave. States that differ only in what is
    already in a file of which nobody reads a part ("writing-...") are one."""

    def __init__(self, out, copies):
        self.out, self.copies, self.seen = Path(out), copies, set()
        self.open, fsync = open, os.fsync
        os.fsync = lambda descriptor: (self.copy(), fsync(descriptor))
        builtins.open = io.open = self.open_watched
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_TRUNC)
        if creates or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            if self.out in Path(os.fsdecode(arguments[0])).parents:
                self.copy()

    def open_watched(self, path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **options):
        if not set("wxa+") & set(mode) or isinstance(path, int) or self.out not in Path(path).parents:
            return self.open(path, mode, buffering, encoding, errors, newline, *rest, **options)
        watch = self

        class Raw(io.FileIO):
            def write(self, content):
                watch.copy()
                half = super().write(content[: len(content) // 2])
                watch.copy()
                return half + super().write(content[half:])

        file = io.BufferedWriter(Raw(path, mode.replace("b", "").replace("t", "")))
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline, line_buffering=buffering == 1)

    def copy(self):
        files = {path.name: path.read_bytes() for path in self.out.iterdir() if path.name != "lock"}
        state = tuple(sorted((name, content != b"" if name.startswith("writing-") else content)
                             for name, content in files.items()))  # fmt: skip
        if state not in self.seen:
            self.seen.add(state)
            folder = self.copies / str(len(self.seen))
            folder.mkdir()
            for name, content in files.items():
                with self.open(folder / name, "wb") as file:
                    file.write(content)


def run_watched(name, arguments, folder, output, copies, resume):
    """In a child: train, and copy what a kill would leave at each moment; or else resume from each of the copies."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    data.DATA_DIR = folder
    harness.report.draw_curves = lambda path, *_, **__: path.write_text("a picture")
    rung = importlib.import_module(name)
    harness.set_constants(vars(rung), arguments)
    if not resume:
        Path(rung.OUT_DIR).mkdir()
        Watch(rung.OUT_DIR, copies)
        rung.main()
    for path in list(copies.iterdir()) if resume else ():
        print(f"--- {path.name} ---", flush=True)
        rung.OUT_DIR, rung.RESUME = str(path), True
        rung.main()


def test_a_kill_between_any_two_system_calls_loses_nothing(server, folder, run, tmp_path):
    """From the first file of a run to the last; it begins with the weights of another run."""
    name, constants = "v3", {"MAX_STEPS": 4, "EVAL_INTERVAL": 2}
    assert run(name, tmp_path / "other", SEED=1, **constants)[0] == 0
    constants["INIT_FROM"] = tmp_path / "other"
    (tmp_path / "copies").mkdir()
    for resume in (False, True):
        arguments = (name, command_line(name, tmp_path / "out", constants), folder, tmp_path / "said",
                     tmp_path / "copies", resume)  # fmt: skip
        child = server.Process(target=run_watched, args=arguments)
        child.start()
        child.join()
        assert child.exitcode == 0, (tmp_path / "said").read_text()
    straight, names = results(tmp_path / "out", name), set(os.listdir(tmp_path / "out"))
    copies = [path for path in (tmp_path / "copies").iterdir() if not path.suffix]  # 7.1: what was moved aside
    assert len(copies) > 40
    for copy in copies:
        assert_same(results(copy, name), straight)
        assert {*os.listdir(copy), "checkpoint_before.pt"} == names, copy
        assert steps_of(copy) == steps_of(tmp_path / "out")


def steps_of(folder):
    """steps.csv without its last columns, which depend on the clock."""
    return [line.rsplit(",", 2)[0] for line in (folder / "steps.csv").read_text().splitlines()]


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
    assert "continuing from step 20" in out
    assert_same(results(tmp_path / "killed", name), results(tmp_path / "straight", name))


@pytest.mark.parametrize(("name", "number", "step"), [
    ("v0", signal.SIGTERM, 13), ("v1", signal.SIGQUIT, 13), ("v1_1", signal.SIGXCPU, 13), ("v2", signal.SIGUSR1, 13),
    ("v3", signal.SIGINT, 13), ("v3_1", signal.SIGUSR2, 13), (V4, signal.SIGHUP, 13), ("v3", signal.SIGTERM, STEPS - 1),
    (V4, signal.SIGINT, STEPS - 1),
])  # fmt: skip
def test_a_signal_finishes_the_step_and_saves(name, number, step, run, straight, tmp_path):
    code, out, err = run(name, tmp_path, at={f"batch {step}": number})
    assert code == 128 + number
    assert f"stopped after {step + 1} steps; RESUME=True" in err and len(err.splitlines()) == 1
    assert checkpoint(tmp_path, name)["step"] == step + 1
    code, out, err = run(name, tmp_path, RESUME=True)
    assert code == 0, err
    assert f"continuing from step {step + 1}\n" in out
    assert_same(results(tmp_path, name), straight(name))


@pytest.mark.parametrize(("name", "number"), [
    ("v1", signal.SIGHUP), ("v1", signal.SIGUSR1), (V4, signal.SIGINT), (V4, signal.SIGTERM),
])  # fmt: skip
def test_a_signal_in_an_evaluation_saves_after_it(name, number, run, tmp_path):
    code, _, err = run(name, tmp_path, at={"evaluation 2": number})
    assert code == 128 + number
    assert "stopped after 20 steps; RESUME=True" in err and len(err.splitlines()) == 1
    assert checkpoint(tmp_path, name)["step"] == read_log(part(tmp_path, name))[-1]["step"] == 20


@pytest.mark.parametrize(("name", "number"), [*zip(LATE_RUNGS, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))])
def test_a_signal_in_the_evaluations_after_training_loses_nothing(name, number, run, straight, tmp_path):
    """Even if another follows at once."""
    code, _, err = run(name, tmp_path, at={"evaluation 2": [number, signal.SIGTERM]}, EVAL_INTERVAL=STEPS)
    assert code == 128 + number
    assert err == f"{name}.py: stopped; RESUME=True continues from the last checkpoint\n"
    assert not (part(tmp_path, name) / "summary.json").exists()
    code, out, err = run(name, tmp_path, RESUME=True, EVAL_INTERVAL=STEPS)
    assert code == 0, err
    assert f"continuing from step {STEPS}" in out
    weights = results(tmp_path, name)[2]["checkpoint.pt"]
    assert all(torch.equal(p, straight(name)[2]["checkpoint.pt"][key]) for key, p in weights.items())


@pytest.mark.parametrize(("name", "event"), [("v0", "batch 0"), (V4, "compile")])
def test_a_signal_before_anything_was_learned_ends_the_run_at_once(name, event, run, straight, tmp_path):
    """A model may take a minute to compile."""
    code, out, err = run(name, tmp_path, at={event: signal.SIGHUP}, COMPILE=event == "compile")
    assert (code, err) == (129, f"{name}.py: stopped; RESUME=True continues from the last checkpoint\n")
    assert "without torch.compile" not in out
    assert not list(part(tmp_path, name).glob("checkpoint*"))
    code, _, err = run(name, tmp_path, RESUME=True)
    assert (code, err) == (0, "")
    assert_same(results(tmp_path, name), straight(name))


def test_a_signal_that_is_ignored_stays_so(run, straight, tmp_path):
    """nohup ignores SIGHUP, a shell SIGINT for what runs in the background."""
    numbers = [signal.SIGHUP, signal.SIGINT]
    code, _, err = run("v3", tmp_path, ignored=numbers, at={"batch 0": numbers, "batch 13": numbers})
    assert (code, err) == (0, "")
    assert_same(results(tmp_path, "v3"), straight("v3"))


@pytest.mark.parametrize("numbers", [
    [signal.SIGTERM, signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
])  # fmt: skip
def test_signals_that_come_together_are_one(numbers, run, tmp_path):
    """torchrun forwards a signal that a scheduler also sends to each process directly."""
    code, _, err = run("v3", tmp_path, at={"batch 13": numbers}, twice=1e9)
    assert code == 128 + numbers[0]
    assert "stopped after 14 steps; RESUME=True" in err and len(err.splitlines()) == 1
    assert checkpoint(tmp_path, "v3")["step"] == 14


@pytest.mark.parametrize("name", RUNGS)
def test_a_second_ctrl_c_stops_at_once(name, begin, tmp_path):
    """In the middle of a step that never ends; other signals may come before it as often as they like."""
    child = begin(name, tmp_path, at={"batch 3": "hold"}, twice=0)
    child.wait_for("holds at batch 3\n")
    child.send(signal.SIGTERM)
    child.wait_for("a signal came\n")
    child.send(signal.SIGTERM)
    time.sleep(0.01)
    assert child.process.exitcode is None
    child.send(signal.SIGINT)
    code, _, err = child.finish()
    assert code == 130
    assert err == f"{name}.py: stopped; RESUME=True continues from the last checkpoint\n"


# ----------------------------------------------------------------------------------------------------------
# A terminal that is closed
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def begin_in_terminal(begin):
    """begin_in_terminal(event, rung, out, ...): a Child in a terminal that is closed when the child holds at the event.
    Returns what the terminal has shown, too."""

    def begin_in_terminal(event, *arguments, **options):
        shown, written = os.openpty()
        fcntl.ioctl(shown, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
        os.set_blocking(shown, False)
        child, text = begin(*arguments, screen=os.ttyname(written), at={event: "hold"}, **options), b""
        while f"holds at {event}\n" not in child.out and child.process.exitcode is None:
            with contextlib.suppress(BlockingIOError):
                text += os.read(shown, 10_000)
            time.sleep(0.005)
        os.close(written)
        os.close(shown)
        return child, text

    return begin_in_terminal


@pytest.mark.parametrize(("event", "step"), [("batch 13", 14), ("evaluation 2", 20), ("evaluation 7", STEPS)])
def test_a_terminal_that_is_closed_ends_the_run(event, step, begin_in_terminal, run, straight, tmp_path):
    """The kernel sends SIGHUP, and from then on every write fails, also writes of the progress bar."""
    child, shown = begin_in_terminal(event, "v3", tmp_path)
    assert b"\rtraining:  " in shown
    if event != "evaluation 7":  # which is one after training
        child.wait_for("a signal came\n")
        child.let_go()
    code, _, err = child.finish()
    assert (code, err) == (129, "")
    assert checkpoint(tmp_path, "v3")["step"] == step
    code, out, err = run("v3", tmp_path, RESUME=True)
    assert (code, err) == (0, "")
    assert f"continuing from step {step}\n" in out
    assert_same(results(tmp_path, "v3"), straight("v3"))


def test_a_run_that_outlives_its_terminal_loses_nothing(begin_in_terminal, straight, tmp_path):
    child, _ = begin_in_terminal("batch 13", "v3", tmp_path, ignored=[signal.SIGHUP])
    child.let_go()
    code, _, err = child.finish()
    assert (code, err) == (0, "")
    assert_same(results(tmp_path, "v3"), straight("v3"))


@pytest.fixture(scope="module")
def killed(run, tmp_path_factory):
    """What a kill has left when a third checkpoint had not taken its place: those of steps 30, 20 and 10."""
    out = tmp_path_factory.mktemp("killed")
    assert run("v3", out, at={"rename checkpoint_before.pt 2": signal.SIGKILL})[0] == -signal.SIGKILL
    return out


def test_a_run_that_is_being_moved_aside_has_its_newest_checkpoint_or_none(killed, tmp_path, monkeypatch):
    """Otherwise RESUME=True after a kill would resume from an older one."""
    shutil.copytree(killed, tmp_path / "run")
    rename, left = Path.rename, []

    def note(path, to):
        left.append({path.name for path in (tmp_path / "run").glob("checkpoint*")})
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", note)
    move_aside(tmp_path / "run")
    assert left[0] == {NEW, NEWEST, BEFORE} and left[-1] == set()
    assert all(NEW in names for names in left if names)


NEW, NEWEST, BEFORE = "checkpoint_new.pt", "checkpoint.pt", "checkpoint_before.pt"


@pytest.mark.parametrize(("cut", "gone", "step"), [
    ((), (), 30), ((NEW,), (), 20), ((), (NEW,), 20), ((NEWEST,), (), 30), ((NEWEST,), (NEW,), 10),
    ((), (NEW, NEWEST), 10), ((NEW, NEWEST), (), 10), ((NEWEST, BEFORE), (), 30),
])  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before(cut, gone, step, killed, run, straight, tmp_path):
    """And does not take its place: with the next one there are two good ones."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    for name in cut:
        with open(tmp_path / name, "r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
    for name in gone:
        (tmp_path / name).unlink()
    code, out, err = run("v3", tmp_path, RESUME=True, at={f"batch {step + 10}": signal.SIGKILL})
    assert code == -signal.SIGKILL, err
    assert f"continuing from step {step}\n" in out
    read = [name for name in (NEW, NEWEST, BEFORE) if name not in gone]
    read = read[: [name not in cut for name in read].index(True)]
    assert out.count("is damaged or incomplete; continuing from the checkpoint before it") == len(read)
    whole = [path.name for path in tmp_path.glob("checkpoint*") if zipfile.is_zipfile(path)]
    assert sorted(whole) == [NEWEST, BEFORE]
    code, out, err = run("v3", tmp_path, RESUME=True)
    assert code == 0, err
    assert f"continuing from step {step + 10}\n" in out
    assert_same(results(tmp_path, "v3"), straight("v3"))


# ----------------------------------------------------------------------------------------------------------
# Suspended
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """passes(seconds, computing): so much time passes, with so much computing. Time passes in no other way."""
    now = [100.0, 7.0]
    times = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[1])
    monkeypatch.setattr(harness.clock, "time", times)

    def passes(seconds, computing=0.0):
        now[:] = now[0] + seconds, now[1] + computing

    return passes


def test_the_clock_of_a_run_leaves_suspensions_out(passes):
    clock = harness.clock.Clock()
    seconds = 0.0
    for passed, computing, counts in ((0.25, 0.25, 0.25), (0.75, 0.0, 0.75), (30.0, 29.0, 30.0), (30.0, 100.0, 30.0),
                                      (3600.0, 0.01, harness.clock.TICK), (5.0, 0.5, harness.clock.TICK)):  # fmt: skip
        passes(passed, computing)
        seconds += counts
        assert clock() == pytest.approx(seconds)


def test_the_clock_of_a_run_counts_while_it_waits_for_a_device(passes, monkeypatch):
    """Then it does not compute, but a thread runs and looks at the time."""
    monkeypatch.setattr(harness.clock, "TICK", 0.001)
    with harness.clock.Clock() as clock:
        for _ in range(5):
            passes(0.75)
            for _ in range(2_000):
                if clock.last[0] != harness.clock.time.perf_counter():
                    time.sleep(0.001)
        assert clock() == pytest.approx(5 * 0.75)
    assert not clock.thread.is_alive()


def test_suspensions_are_no_training_time(run, straight, tmp_path):
    """A step in which a day passes, and one that computes for half an hour."""
    jumps = {"batch 13": (86400, 0), "batch 23": (1800, 1800), "evaluation 3": (1800, 1800)}
    code, out, err = run("v3", tmp_path, jumps=jumps)
    assert code == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 1800 < summary["train_seconds"] < 3600
    assert summary["tokens_per_second"] > STEPS * 64 / 3600
    assert read_log(tmp_path)[1]["seconds"] < 1800 < read_log(tmp_path)[2]["seconds"] < 3600
    speeds = [float(line.split(",")[5]) for line in (tmp_path / "steps.csv").read_text().splitlines()[1:]]
    assert min(speeds) == speeds[23] < 1 <= min(speeds[:23])
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
    assert f"the remaining {STEPS - 10} steps will take about " in child.out and "val loss" in child.out
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
# Notebooks and Windows
# ----------------------------------------------------------------------------------------------------------


def in_a_process(server, function, *arguments):
    """Call function(*arguments, output) in a child, which writes JSON to the file `output`. Returns what it wrote."""
    child = server.Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    return json.loads(Path(arguments[-1]).read_text(encoding="utf-8"))


def run_cells(cells, folder, output):
    """In a child: run the cells of a notebook. Writes what each shows, and whether Ctrl-C works as before after it."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    data.DATA_DIR, shown = folder, []
    harness.report.draw_curves = lambda path, *_, **__: path.write_text("a picture")
    shell = InteractiveShell.instance()
    for cell in cells:
        with capture_output() as captured:
            shell.run_cell(cell, store_history=True)
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        shown.append((captured.stdout, captured.stderr, usual))
    Path(output).write_text(json.dumps(shown), encoding="utf-8")


STOP = """
import harness.report
usual = harness.report.write_step
def stop(run, *rest):
    usual(run, *rest)
    if run.state.step == 13:
        harness.report.write_step = usual
        __import__("signal").raise_signal(2)
harness.report.write_step = stop
"""


def test_a_rung_runs_in_a_notebook(server, folder, straight, tmp_path):
    """With %run, from beginning to end, stopped and resumed, with mistakes, and again."""
    pytest.importorskip("IPython")
    words = " ".join(command_line("v3", tmp_path / "out", {}))
    run = f"%run {ROOT / 'v3.py'} {words}"
    cells = [f"%run {ROOT / 'v3.py'} --help", f"{run} N_LAYERS=2", STOP, run, f"{run} RESUME=True",
             f"{run} MAX_STEPS=2", f'{run} PROMPT=" the cat"', "get_batch"]  # fmt: skip
    shown = in_a_process(server, run_cells, cells, folder, tmp_path / "shown")
    assert all(usual for _, _, usual in shown)
    help_, mistake, _, stopped, resumed, again, prompt, name = [out + err for out, err, _ in shown]
    assert "Constants, which NAME=value sets:" in help_
    (line,) = [line for line in mistake.splitlines() if "v3.py: " in line]
    assert "there is no constant 'N_LAYERS'" in line and "Traceback" not in mistake
    assert "v3.py: stopped after 14 steps; RESUME=True" in stopped and "Traceback" not in stopped
    assert "continuing from step 14\n" in resumed and "results in " in resumed
    assert "is now in" in again and "results in " in again
    assert prompt.startswith(" the cat") and "get_batch(ids, step)" in name
    assert_same(results(f"{tmp_path / 'out'}.1", "v3"), straight("v3"))


UNIX = {"fcntl", "resource", "pwd", "grp", "termios"}  # modules that Windows does not have


def train_without_unix(folder, out, output):
    """In a child: import and train each rung as if this were Windows, as far as a program can tell. Writes how much
    memory each has taken."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    for name, module in list(sys.modules.items()):
        place = Path(getattr(module, "__file__", None) or "/").parents
        ours = ROOT in place and ROOT / "tests" not in place and Path(sys.prefix) not in place  # .venv may be in ROOT
        if name in UNIX or name.partition(".")[0] == "filelock" or ours:
            del sys.modules[name]
    for name in UNIX:
        sys.modules[name] = None  # an import of it fails
    memory = SimpleNamespace(peak_wset=123_000_000)
    sys.modules["psutil"] = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: memory))
    for name in ("SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGKILL"):
        delattr(signal, name)
    for name in ("fork", "killpg", "getuid", "getpgid", "setsid", "sched_getaffinity"):
        delattr(os, name)

    def refuse(usual, path, *arguments, **options):
        if isinstance(path, (str, Path)) and str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        if isinstance(path, (str, Path)) and os.path.isdir(path):
            raise PermissionError(path)
        return usual(path, *arguments, **options)

    os.open = functools.partial(refuse, os.open)
    builtins.open = io.open = functools.partial(refuse, open)
    import data
    import harness.report

    data.DATA_DIR, peaks = folder, {}
    harness.report.draw_curves = lambda *_, **__: None
    for name in RUNGS:
        rung = importlib.import_module(name)
        harness.set_constants(vars(rung), command_line(name, out / name, {"MAX_STEPS": 2}))
        rung.main()
        peaks[name] = json.loads((part(out / name, name) / "summary.json").read_text())["peak_memory_mb"]
    Path(output).write_text(json.dumps(peaks))


def test_every_rung_trains_where_unix_is_absent(server, folder, tmp_path):
    memory = in_a_process(server, train_without_unix, folder, tmp_path, tmp_path / "memory")
    assert memory == dict.fromkeys(RUNGS, 123)
    for name in RUNGS:
        assert [line["step"] for line in read_log(part(tmp_path / name, name))] == [2]


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
    """Before the first checkpoint there is nothing to resume."""
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
    assert_one_line(code, err, "the loss is inf at step 13", "and add RESUME=True to continue from step 10", *advice)
    assert assert_finite(tmp_path, name) == 10
    code, out, err = run(name, tmp_path, RESUME=True, **{"DTYPE": "bfloat16", **advice})
    assert code == 0, err
    assert "continuing from step 10\n" in out and "continuing with changed constants: " + [*advice][0] in out
    assert ("the run began with" in out) == ("DTYPE" in advice)
    assert assert_finite(tmp_path, name) == STEPS


# ----------------------------------------------------------------------------------------------------------
# Disks and memory that are full
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "read_only", "expected"), [
    ("v3", "500k", False, "No space left on device"), (V4, "700k", False, "No space left on device"),
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
    if size in ("500k", "700k"):
        assert step > 0
    code, printed, err = run(name, out, RESUME=True)  # after making room
    assert code == 0, err
    assert f"continuing from step {step}" in printed or step == 0
    assert run(name, tmp_path / "other", MAX_STEPS=1)[0] == 0


LARGE = {"N_EMBD": 512, "MAX_STEPS": 1, "EVAL_INTERVAL": 1}  # a model of 15 MB, a checkpoint of 44 MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited by what /proc says")
def test_too_little_memory_to_load_a_checkpoint_is_not_called_damage(run, tmp_path):
    code, _, err = run("v3", tmp_path, **LARGE)
    assert code == 0, err
    code, _, err = run("v3", tmp_path, limit=30_000_000, RESUME=True, **LARGE)
    assert_one_line(code, err, "v3.py: out of memory in line ", "; lower MICRO_BATCH_SIZE to 1 (")
    code, out, err = run("v3", tmp_path, RESUME=True, **LARGE)
    assert (code, err) == (0, "") and "continuing from step 1\n" in out


def test_to_resume_takes_no_more_memory_than_to_train(run, tmp_path):
    """Nothing of a checkpoint stays in memory once it has been loaded."""
    peaks = []
    for more in ({}, {"RESUME": True, "MAX_STEPS": 2}):
        code, _, err = run("v3", tmp_path, **{**LARGE, **more})
        assert code == 0, err
        peaks.append(json.loads((tmp_path / "summary.json").read_text())["peak_memory_mb"])
    assert peaks[1] < peaks[0] + 15  # the weights


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
    assert "v3.py: another process has ended; RESUME=True continues from the last checkpoint" in err.splitlines()[-1]
    assert "Traceback" not in err
    one_is_told = {3: {"batch 33": signal.SIGHUP}}  # that is enough: they agree
    four = begin_together("v3", tmp_path, 4, at_rank=one_is_told, RESUME=True, **ALONE)
    stopped = [child.finish() for child in four]
    assert [code for code, _, _ in stopped] == [143] * 3 + [129]
    assert "continuing from step 20\n" in stopped[0][1] and "stopped after 34 steps" in stopped[0][2]
    code, out, err = run("v3", tmp_path, RESUME=True, **ALONE)
    assert code == 0, err
    assert "continuing from step 34\n" in out and "1 processes" in out
    assert_close(results(tmp_path, "v3"), alone["v3"])


def test_a_signal_in_the_last_evaluation_of_two_processes_stops_both(begin_together, run, alone, tmp_path):
    told = {1: {"evaluation 6": signal.SIGUSR1}}
    stopped = [child.finish() for child in begin_together("v3", tmp_path, 2, at_rank=told, **ALONE)]
    assert [code for code, _, _ in stopped] == [143, 128 + signal.SIGUSR1]
    assert "stopped after 60 steps; RESUME=True" in stopped[0][2]
    told = {k: {"evaluation 1": signal.SIGHUP} for k in range(2)}  # the first is one after training now
    stopped = [child.finish() for child in begin_together("v3", tmp_path, 2, at_rank=told, RESUME=True, **ALONE)]
    assert [code for code, _, _ in stopped] == [129, 129]
    assert "v3.py: stopped; RESUME=True continues from the last checkpoint" in stopped[0][2]
    code, out, err = run("v3", tmp_path, RESUME=True, **ALONE)
    assert code == 0, err
    assert_close(results(tmp_path, "v3"), alone["v3"])


def test_signals_to_torchrun_and_to_a_process_of_it_save(folder, tmp_path):
    """A scheduler sends them to all processes, and torchrun passes on its own."""
    code = REAL.replace('"v0"', "sys.argv.pop(1)")
    (tmp_path / "child.py").write_text(code.format(root=str(ROOT), folder=str(folder)), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = command_line(V4, tmp_path / "out", {**ALONE, "MAX_STEPS": 100_000, "EVAL_INTERVAL": 100_000})
    environment, pipe = {**environment_of_users(), "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    run = subprocess.Popen([*torchrun, str(tmp_path / "child.py"), V4, *arguments], text=True, env=environment,
                           stdout=pipe, stderr=pipe)  # fmt: skip
    for line in run.stdout:
        if "steps will take about" in line:
            break
    os.kill(int((tmp_path / "out" / "rope" / "lock").read_text()), signal.SIGTERM)
    run.send_signal(signal.SIGHUP)
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0
    assert err.count("RESUME=True with the same constants continues from there") == 1
    steps = int(re.search(r"stopped after (\d+) steps", err)[1])
    assert checkpoint(tmp_path / "out", V4)["step"] == steps >= 10


def test_what_several_processes_cannot_do_is_refused_in_one_line(begin, begin_together, tmp_path):
    alone = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}
    code, _, err = begin("v3", tmp_path, environ=alone, BATCH_SIZE=3).finish()
    assert_one_line(code, err, "v3.py: BATCH_SIZE=3 must be a multiple of 2, the number of processes")
    for name in ("v0", "v1", "v1_1", "v2"):
        code, _, err = begin(name, tmp_path, environ=alone).finish()
        assert_one_line(code, err, f"{name}.py: this rung trains in one process only; start it with python {name}.py")
