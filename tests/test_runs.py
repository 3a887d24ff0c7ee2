"""Runs of v3 and v4 that are killed, stopped, damaged, started twice, or shared by several processes: nothing is lost,
nothing changes."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
V4 = "v4_alibi_rope"
STEPS = 60
CONSTANTS = {
    "BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 2, "BLOCK_SIZE": 16, "MAX_STEPS": STEPS, "EVAL_INTERVAL": 10, "PATIENCE": 100,
    "WARMUP_STEPS": 4, "N_LAYER": 1, "N_HEAD": 2, "N_EMBD": 16, "DROPOUT": 0.1, "STRIDE": 8, "SAMPLE_TOKENS": 4,
    "COMPILE": False, "DTYPE": "float32", "VOCABULARY": "bpe_vocab_500.json",
}  # fmt: skip
# What a child process runs: the last lines of a rung, with a data folder of its own, with steps that take a while if
# SLOW says so, and with no more than LIMIT bytes of memory beside what it has after its imports.
CHILD = """
import importlib, os, re, sys, time
from pathlib import Path
from data import prepare
prepare.DATA_DIR = Path(os.environ["DATA"])
rung = importlib.import_module(sys.argv[1])
get_batch = rung.get_batch
def slow(ids, step):
    print("step", step, flush=True)
    time.sleep(float(os.environ["SLOW"]))
    return get_batch(ids, step)
rung.get_batch = slow
Path(os.environ["DATA"], "process_" + os.environ.get("RANK", "0")).write_text(str(os.getpid()))
if limit := int(os.environ["LIMIT"]):
    import resource
    size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + limit, size + limit))
sys.argv[1:] = [argument for argument in sys.argv[2:] if argument.partition("=")[0] in rung.constants()]
source = Path(rung.__file__).read_text(encoding="utf-8")
exec(source[source.index('if __name__ == "__main__":'):], {**vars(rung), "__name__": "__main__"})
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with the small vocabulary and a short text."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(ROOT / "data" / "bpe_vocab_500.json", folder)
    draw = random.Random(0)
    for split, n in (("train", 30_000), ("valid", 300), ("test", 300)):
        words = " ".join(draw.choices("the cat sat on a mat and saw the rat".split(), k=n))
        (folder / f"wiki.{split}.tokens").write_text(words + "\n")
    code = "import os; from pathlib import Path; from data import prepare; prepare.DATA_DIR = Path(os.environ['DATA'])"
    code += "; prepare.prepare(*prepare.open_source(os.environ['DATA']), ['bpe_vocab_500.json'])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(folder), check=True, capture_output=True)
    return folder


def environment(data, slow=0, limit=0):
    return {**os.environ, "DATA": str(data), "SLOW": str(slow), "LIMIT": str(limit), "OMP_NUM_THREADS": "1"}


def command(data, rung, out, processes=None, **constants):
    extra = {"POSITION": "rope"} if rung == V4 else {}
    arguments = [f"{k}={v}" for k, v in {**CONSTANTS, **extra, "OUT_DIR": out, **constants}.items()]
    (data / "child.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CHILD}", encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *torchrun, str(data / "child.py"), rung, *arguments]


def start(data, rung, out, slow=0, limit=0, **constants):
    return subprocess.Popen(command(data, rung, out, **constants), cwd=ROOT, env=environment(data, slow, limit),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def finish(child):
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err


def wait_for(child, line):
    """Read what the child prints until `line`."""
    for printed in child.stdout:
        if printed.strip() == line:
            return
    pytest.fail(f"the child never printed {line!r}: {child.stderr.read()}")


def results(out, rung):
    """Everything of a finished run that may not depend on interruptions: no clock, no memory, no folder."""
    folder = Path(out) / "rope" if rung == V4 else Path(out)
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("train_seconds", "tokens_per_second", "import_memory_mb", "peak_memory_mb", "hyperparameters"):
        summary.pop(key)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in log:
        line.pop("seconds")
    weights = {name: torch.load(folder / name, weights_only=True)["model"] for name in ("model.pt", "checkpoint.pt")}
    return summary, log, weights, (folder / "sample.txt").read_text()


def assert_same(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    for name in ours[2]:
        assert all(torch.equal(ours[2][name][key], theirs[2][name][key]) for key in theirs[2][name])
    assert ours[3] == theirs[3]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Results of a run of each rung that nothing interrupted."""
    found = {}
    for rung in ("v3", V4):
        out = tmp_path_factory.mktemp("straight") / rung
        code, _, err = finish(start(data, rung, out))
        assert code == 0, err
        found[rung] = results(out, rung)
    return found


@pytest.mark.parametrize(("rung", "kills"), [("v3", 14), (V4, 6)])
def test_a_run_that_is_killed_again_and_again_is_the_same_run(rung, kills, data, straight, tmp_path):
    """SIGKILL at random moments: in steps, evaluations, and while files are written."""
    draw, out = random.Random(1), tmp_path / "out"
    folder = out / "rope" if rung == V4 else out
    for _ in range(kills):
        exists = any((folder / f"checkpoint{end}.pt").exists() for end in ("", "_before"))
        child = start(data, rung, out, slow=0.01, RESUME=exists)
        for printed in child.stdout:  # the first step is near: imports are done
            if printed.startswith("step"):
                break
        time.sleep(draw.uniform(0, 0.4))
        child.kill()
        child.communicate()
    exists = any((folder / f"checkpoint{end}.pt").exists() for end in ("", "_before"))
    code, _, err = finish(start(data, rung, out, RESUME=exists))
    assert code == 0, err
    assert_same(results(out, rung), straight[rung])


@pytest.mark.parametrize(("rung", "number", "step"), [
    ("v3", signal.SIGINT, 13), ("v3", signal.SIGTERM, STEPS - 1),
    (V4, signal.SIGTERM, 13), (V4, signal.SIGINT, STEPS - 1),
])  # fmt: skip
def test_a_signal_finishes_the_step_and_saves(rung, number, step, data, straight, tmp_path):
    child = start(data, rung, tmp_path / "out", slow=0.05)
    wait_for(child, f"step {step}")
    child.send_signal(number)
    stopped, _, err = finish(child)
    assert stopped == 128 + number
    assert f"stopped after {step + 1} steps; RESUME=True" in err
    assert "Traceback" not in err
    stopped, out, err = finish(start(data, rung, tmp_path / "out", RESUME=True))
    assert stopped == 0, err
    steps = [int(line.split()[1]) for line in out.splitlines() if re.fullmatch(r"step \d+", line)]
    assert steps[1:] == [*range(step + 1, STEPS)]  # the first is that of the compilation
    assert_same(results(tmp_path / "out", rung), straight[rung])


def test_a_second_signal_stops_at_once(data, tmp_path):
    child = start(data, "v3", tmp_path / "out", slow=5)
    wait_for(child, "step 0")
    wait_for(child, "step 0")
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert finish(child)[0] != 0


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, data, straight, tmp_path):
    child = start(data, "v3", tmp_path / "out", slow=0.02)
    wait_for(child, "step 35")
    child.kill()
    child.communicate()
    newest = tmp_path / "out" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000]) if damage == "cut" else newest.unlink()
    code, out, err = finish(start(data, "v3", tmp_path / "out", RESUME=True))
    assert code == 0, err
    assert "going on from the checkpoint before it" in out
    assert "step 20\n" in out
    assert_same(results(tmp_path / "out", "v3"), straight["v3"])


def test_a_second_run_in_the_folder_is_refused(data, tmp_path):
    first = start(data, "v3", tmp_path / "out", slow=0.2)
    wait_for(first, "step 1")
    code, _, err = finish(start(data, "v3", tmp_path / "out"))
    assert code == 1
    assert f"process {first.pid} is training in" in err and len(err.strip().splitlines()) == 1
    first.kill()
    first.communicate()
    code, _, err = finish(start(data, "v3", tmp_path / "out", MAX_STEPS=2))  # the lock has gone with its process
    assert code == 0, err


@pytest.mark.parametrize("rung", ["v3", V4])
def test_a_loss_that_is_not_finite_keeps_the_checkpoint(rung, data, tmp_path):
    out, rate = tmp_path / "out", "LEARNING_RATE_ADAMW" if rung == V4 else "LEARNING_RATE"
    code, _, err = finish(start(data, rung, out, MAX_STEPS=40, WARMUP_STEPS=1, EVAL_INTERVAL=30, **{rate: 1e38}))
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "the loss is" in err and "at step" in err and "norm of the gradient" in err and "step 0 is kept" in err
    saved = torch.load((out / "rope" if rung == V4 else out) / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 0
    assert all(p.isfinite().all() for p in saved["model"].values())


# ----------------------------------------------------------------------------------------------------------
# Disks and memory that are full
# ----------------------------------------------------------------------------------------------------------

# In a mount namespace of its own: a small disk at $DISK, a run on it, and a copy of what is left there afterwards.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$SIZE tmpfs "$DISK" || exit 99
if [ "$READ_ONLY" ]; then mount -o remount,ro "$DISK"; fi
"$@"; code=$?
cp -r "$DISK" "$LEFT"
exit $code
"""


@pytest.mark.parametrize(("rung", "size", "read_only", "kept"), [
    ("v3", "600k", "", 10), (V4, "700k", "", 20), ("v3", "20k", "", None), ("v3", "300k", "1", None),
    ("v0", "4k", "", None),
])  # fmt: skip
def test_a_full_disk_costs_no_more_than_the_steps_since_the_checkpoint(rung, size, read_only, kept, data, tmp_path):
    (tmp_path / "disk").mkdir()
    first = command(data, rung, tmp_path / "disk" / "out")
    where = {"SIZE": size, "READ_ONLY": read_only, "DISK": str(tmp_path / "disk"), "LEFT": str(tmp_path / "left")}
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]
    try:
        done = subprocess.run([*unshare, *first], cwd=ROOT, env={**environment(data), **where}, capture_output=True,
                              text=True, timeout=120)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode in (1, 99) and not (tmp_path / "left").exists():
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    expected = "Read-only" if read_only else "disk full?" if rung == "v0" else "No space left on device; make room"
    assert expected in done.stderr
    assert not list((tmp_path / "left").rglob("writing-*"))
    if kept is not None:
        folder = tmp_path / "left" / "out" / ("rope" if rung == V4 else "")
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == kept
        assert torch.load(folder / "model.pt", weights_only=True)["model"]
        code, out, err = finish(start(data, rung, tmp_path / "left" / "out", RESUME=True))
        assert code == 0, err
        assert f"step {kept}\n" in out and f"step {kept - 1}\n" not in out


@pytest.mark.parametrize("rung", ["v0", "v1", "v1_1", "v2", "v3", V4])
def test_out_of_memory_says_what_to_lower(rung, data, tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is limited by what /proc says")
    constants = {"MICRO_BATCH_SIZE": 4096, "BATCH_SIZE": 4096, "BLOCK_SIZE": 8, "CHUNK_SIZE": 100_000, "N_HIDDEN": 8}
    run = start(data, rung, tmp_path / "out", limit=100_000_000, **constants)
    code, _, err = finish(run)
    assert code == 1
    assert f"{rung}.py: out of memory; lower " in err and len(err.strip().splitlines()) == 1, err


# ----------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------

ALONE = {"DROPOUT": 0.0, "MICRO_BATCH_SIZE": 1}  # dropout differs between numbers of processes


def assert_close(ours, theirs):
    """The same losses, up to the order in which float32 numbers are added."""
    assert [line["step"] for line in ours[1]] == [line["step"] for line in theirs[1]]
    for mine, other in zip(ours[1], theirs[1]):
        assert mine["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
        assert mine["step"] == 0 or mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    for key in ("val_bpb_sliding", "test_word_ppl", "tokens_seen", "steps", "best_step"):
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=1e-3)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Results of a run of each rung in a single process, without dropout."""
    found = {}
    for rung in ("v3", V4):
        out = tmp_path_factory.mktemp("alone") / rung
        code, _, err = finish(start(data, rung, out, **ALONE))
        assert code == 0, err
        found[rung] = results(out, rung)
    return found


@pytest.mark.parametrize("rung", ["v3", V4])
def test_two_processes_do_what_one_does(rung, data, alone, tmp_path):
    code, out, err = finish(start(data, rung, tmp_path / "out", processes=2, **ALONE))
    assert code == 0, err
    ours = results(tmp_path / "out", rung)
    assert_close(ours, alone[rung])
    # Before the first step the weights are the same, so the evaluation in two parts must be the one in one part.
    for key in ("val_loss", "val_bpb", "val_top_1", "val_top_5", "val_calibration_error"):
        assert ours[1][0][key] == pytest.approx(alone[rung][1][0][key], rel=1e-9)
    assert out.count("val bpb") == len(ours[1]) + 1  # only one of them talks


@pytest.mark.parametrize("rung", ["v3", V4])
def test_every_process_reads_its_own_part(rung, monkeypatch):
    module = importlib.import_module(rung)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    ids = torch.arange(100_000).to(torch.int32)
    whole = module.get_batch(ids, 3)
    monkeypatch.setattr(module, "n_ranks", lambda: 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        parts.append(module.get_batch(ids, 3))
    for ours, part in zip(whole, zip(*parts)):
        assert torch.equal(torch.cat(part), ours)


def test_a_dead_process_ends_the_run_which_others_can_continue(data, alone, tmp_path):
    run = start(data, "v3", tmp_path / "out", slow=0.02, processes=2, **ALONE)
    wait_for(run, "step 25")
    started = time.monotonic()
    os.kill(int((data / "process_1").read_text()), signal.SIGKILL)
    code, _, err = finish(run)
    assert code != 0
    assert time.monotonic() - started < 60
    assert "v3.py: another process has ended; RESUME=True goes on from the last checkpoint" in err
    run = start(data, "v3", tmp_path / "out", slow=0.02, processes=4, RESUME=True, **ALONE)
    wait_for(run, "step 20")  # of the last checkpoint
    wait_for(run, "step 33")
    run.terminate()
    assert finish(run)[0] != 0
    code, out, err = finish(start(data, "v3", tmp_path / "out", RESUME=True, **ALONE))
    assert code == 0, err
    assert "step 32\n" not in out
    assert_close(results(tmp_path / "out", "v3"), alone["v3"])


def test_sigterm_to_torchrun_saves(data, tmp_path):
    run = start(data, V4, tmp_path / "out", slow=0.05, processes=2, **ALONE)
    wait_for(run, "step 12")
    run.terminate()
    code, _, err = finish(run)
    assert code != 0
    assert err.count("RESUME=True, beside the same constants, goes on from there") == 1
    steps = int(re.search(r"stopped after (\d+) steps", err)[1])
    assert torch.load(tmp_path / "out" / "rope" / "checkpoint.pt", weights_only=True)["step"] == steps >= 13


def test_a_batch_that_cannot_be_divided_is_refused(data, tmp_path):
    code, _, err = finish(start(data, "v3", tmp_path / "out", processes=2, BATCH_SIZE=3))
    assert code == 1
    assert err.count("v3.py: BATCH_SIZE=3 must be a multiple of the 2 processes") == 1 and 'v3.py", line' not in err
