"""How long a step of each model takes on two cores: results/experiments/step_time.json.

If runs are compared at equal seconds, these times give the number of steps, whatever machine then makes the run. All
times that are compared are measured on one idle machine, in short trials, one after another.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import harness
from benchmarks.tables import machine
from harness.errors import UserError
from results import runner, store
from results.plan import ROOT, SEEDS, all_constants, owner

TRIAL_STEPS, WARM_UP = 24, 8  # steps of a trial, and how many of them do not count
TRIALS = 5  # per run; their median counts
COSTS = ("VOCABULARY", "BATCH_SIZE", "MICRO_BATCH_SIZE", "BLOCK_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "POSITION",
         "DROPOUT")  # constants that the time of a step depends on  # fmt: skip


def model_key(run):
    """The key of the run in step_time.json: the rung, and everything on which the time of a step depends."""
    constants = all_constants(run, 0)
    words = [run.rung, *(f"{name}={constants[name]}" for name in COSTS if name in constants)]
    return " ".join([*words, *([f"({run.name})"] if run.edits else [])])


def read():
    """{"machine", "date", "libraries_mb", "seconds": {model_key: of a step}, "peak_mb": {model_key: of the process},
    "trials": {model_key: [seconds of each trial]}}"""
    path = store.RESULTS / "step_time.json"
    kept = store.read_json(path) if path.exists() else {"seconds": {}, "peak_mb": {}}
    if not isinstance(kept, dict) or not isinstance(kept.get("seconds"), dict):
        raise UserError(f"{store.shown(path)} is damaged; put it back, or remove it and measure again with --step-time")
    return kept


def seconds_of(run):
    """How many seconds a step of `run` takes; None if that was not measured."""
    return read()["seconds"].get(model_key(run))


def steps_within(seconds, run):
    """How many steps `run` makes in so many seconds. Raises ValueError if its step time was not measured."""
    step = seconds_of(run)
    if step is None:
        raise not_measured(run)
    return max(2, round(seconds / step))


def not_measured(run):
    return UserError(f"the time of a step of {run.name} has not been measured yet; measure it with python "
                     f"results/experiments.py {owner(run)[0]} --step-time")  # fmt: skip


def trial(run):
    """(seconds per step, peak memory in MB) of a run that is stopped after a few steps: the median step, and the peak
    of its process. Raises ValueError if the run ends early."""
    folder = store.WORK / "step_time"
    if not Path("/proc/self/status").exists():
        raise UserError("peak memory is read from /proc, which this system does not have; measure step times on Linux")
    shutil.rmtree(folder, ignore_errors=True)
    constants = {**all_constants(run, SEEDS[0]), "MAX_STEPS": 10_000, "DEVICE": "cpu"}
    process = runner.launch(runner.command(run, folder, constants), output=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            for path in (folder / "run").rglob("steps.csv"):
                head, *rows = path.read_text(encoding="utf-8").splitlines()[:-1] or [""]
                if len(rows) >= TRIAL_STEPS:
                    rows = [dict(zip(head.split(","), row.split(","))) for row in rows[WARM_UP:TRIAL_STEPS]]
                    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]
                    seconds = [float(row["tokens_seen"]) / float(row["step"]) / float(row["tokens_per_second"])
                               for row in rows]  # fmt: skip
                    return median(seconds), int(peak) * 1024 / 1e6
        raise UserError(f"the trial of {run.name} ended with exit code {process.returncode}; start the run itself to "
                        "see why")  # fmt: skip
    finally:
        process.kill()
        process.wait()


def libraries_mb():
    """Memory in MB of a process that has loaded the libraries of a rung, but no model."""
    code = "import v1, torch._dynamo, harness; print(harness.peak_memory_mb('cpu'))"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)


def measure(runs, again=True):
    """Measure `runs`, each in TRIALS trials, and keep the results; without `again`, measure only what is missing. The
    runs take turns, since the speed of a machine changes within minutes. On a different machine than before, all
    earlier results are discarded; without `again` that raises UserError instead."""
    kept = read()
    if kept.get("machine", machine()) != machine():
        if not again:
            raise UserError("step_time.json was measured on another machine; measure all of it with --step-time")
        kept = {"seconds": {}, "peak_mb": {}}
    all_trials = kept.setdefault("trials", {})
    todo = {model_key(run): run for run in runs}
    if not again:
        todo = {key: run for key, run in todo.items() if key in all_trials or key not in kept["seconds"]}
    if again:
        all_trials.update({key: [] for key in todo})
    for turn in range(TRIALS):
        for key, run in todo.items():
            trials = all_trials.setdefault(key, [])
            if len(trials) > turn:  # made before this command was stopped
                continue
            kept["libraries_mb"] = kept.get("libraries_mb") or round(libraries_mb(), 1)
            seconds, peak_mb = trial(run)
            peaks = [kept["peak_mb"].get(key, 0)] if trials else []
            trials.append(round(seconds, 5))
            kept["seconds"][key], kept["peak_mb"][key] = median(trials), round(max([*peaks, peak_mb]), 1)
            kept |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
            store.write_text(store.RESULTS / "step_time.json", json.dumps(kept, indent=1) + "\n")
            harness.say(f"{seconds:8.4f} s a step, trial {turn + 1} of {TRIALS}: {key}")
