"""Runs of v3 and v4 that are killed, stopped, damaged or started twice: nothing is lost, nothing changes."""

import json
import os
import random
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
# What a child process runs: a rung with a data folder of its own, and with steps that take a while if SLOW says so.
CHILD = """
import importlib, os, sys, time
from pathlib import Path
from data import prepare
prepare.DATA_DIR = Path(os.environ["DATA"])
rung = importlib.import_module(sys.argv[1])
rung.set_constants(sys.argv[2:])
get_batch = rung.get_batch
def slow(ids, step):
    print("step", step, flush=True)
    time.sleep(float(os.environ.get("SLOW", 0)))
    return get_batch(ids, step)
rung.get_batch = slow
try:
    rung.main()
except (OSError, ValueError) as error:
    sys.exit(f"{rung.RUNG}.py: {error}")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with the small vocabulary and a short text."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(ROOT / "data" / "bpe_vocab_500.json", folder)
    draw = random.Random(0)
    for split, n in (("train", 3000), ("valid", 300), ("test", 300)):
        words = " ".join(draw.choices("the cat sat on a mat and saw the rat".split(), k=n))
        (folder / f"wiki.{split}.tokens").write_text(words + "\n")
    code = "import os; from pathlib import Path; from data import prepare; prepare.DATA_DIR = Path(os.environ['DATA'])"
    code += "; prepare.prepare(*prepare.open_source(os.environ['DATA']), ['bpe_vocab_500.json'])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(folder), check=True, capture_output=True)
    return folder


def environment(data, slow=0):
    return {**os.environ, "DATA": str(data), "SLOW": str(slow), "OMP_NUM_THREADS": "1"}


def start(data, rung, out, slow=0, **constants):
    extra = {"POSITION": "rope"} if rung == V4 else {}
    arguments = [f"{k}={v}" for k, v in {**CONSTANTS, **extra, "OUT_DIR": out, **constants}.items()]
    command = [sys.executable, "-c", CHILD, rung, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment(data, slow), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("rung", ["v3", V4])
def test_a_signal_finishes_the_step_and_saves(rung, number, code, data, straight, tmp_path):
    child = start(data, rung, tmp_path / "out", slow=0.05)
    wait_for(child, "step 13")
    child.send_signal(number)
    stopped, _, err = finish(child)
    assert stopped == code
    assert "stopped after 14 steps; RESUME=True" in err
    assert "Traceback" not in err
    stopped, out, err = finish(start(data, rung, tmp_path / "out", RESUME=True))
    assert stopped == 0, err
    assert "step 14" in out and "step 13\n" not in out
    assert_same(results(tmp_path / "out", rung), straight[rung])


def test_a_second_signal_stops_at_once(data, tmp_path):
    child = start(data, "v3", tmp_path / "out", slow=30)
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
