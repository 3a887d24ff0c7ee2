"""Make the runs of the experiments, and their tables.

    python results/experiments.py --list                what there is, and how many runs are done
    python results/experiments.py ladder positions      make the runs of experiments that are missing, then their tables
    python results/experiments.py ladder --table        only the table, of the runs that are done
    python results/experiments.py ladder DEVICE=cuda    with constants for all of its runs
    python results/experiments.py ladder --jobs 8       eight runs at a time: small models leave a GPU room
    python results/experiments.py ladder --gpu          with shapes for one GPU, on the text that data/ holds
    python results/experiments.py shape --step-time     measure how long a step of each model takes here

results/plan.py says what each experiment asks and which runs answer it. A run is a rung with constants, as `python
v3.py NAME=value ...` starts it, in a folder of its own below runs/experiments/. It may be stopped at any time: the next
start goes on from its last checkpoint. A finished run leaves a file in results/experiments/NAME/ with its summary and
its evaluations, and is not made again; what two experiments have in common is made once. A change of a model that no
constant makes is an edit of the rung's text (results/edits.py) on a copy in the folder of the run: `diff` shows it.

Where runs are compared at equal seconds, the number of steps follows from results/experiments/step_time.json, which
--step-time measures. Between machines losses differ by rounding only.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness  # noqa: E402
from benchmarks.tables import machine, table  # noqa: E402
from harness.errors import UserError  # noqa: E402
from results import measures, runner, step_time, store, texts  # noqa: E402
from results.plan import EXPERIMENTS, SEEDS, all_constants, owner  # noqa: E402

# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


def output_folder(run, folder):
    """Where the run in `folder` leaves its results: v4 has a folder for each scheme."""
    return folder / "run" / run.constants.get("POSITION", "")


def constants_of(run, seed, overrides, gpu=False):
    """All constants that the command of a run sets: the planned ones, the steps, an eighth of them as the evaluation
    interval, and those of `overrides`, {name: text}, that the rung has. Raises ValueError if a step time is missing."""
    rung = importlib.import_module(run.rung)
    constants = all_constants(run, seed, gpu)
    if run.seconds:
        constants["MAX_STEPS"] = step_time.steps_within(run.seconds, run)
    elif run.megabytes:
        constants["MAX_STEPS"] = texts.steps_for(run.megabytes, rung, constants)
    constants |= {name: text for name, text in overrides.items() if hasattr(rung, name)}
    constants.setdefault("EVAL_INTERVAL", math.ceil(int(constants.get("MAX_STEPS", rung.MAX_STEPS)) / 8))
    return constants


def make_run(run, seed, overrides, gpu=False, jobs=1):
    """Make one run of an experiment, unless it is done, and keep its results. Returns what went wrong, or None."""
    path = store.result_file(run, seed, gpu)
    if path.exists() or runner.SIGNALS:
        return None
    try:
        run = owner(run)[1]
        constants = constants_of(run, seed, overrides, gpu)
        folder = store.WORK / path.relative_to(store.RESULTS).with_suffix("")
        output, began = output_folder(run, folder), time.time()
        if not (output / "summary.json").exists():
            runner.train(run, folder, constants, jobs)
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        log = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
        results = {
            "run": run.name, "machine": machine(summary["device"]), "date": time.strftime("%Y-%m-%d"),
            "command": f"python {run.rung}.py " + " ".join(f"{k}={v}" for k, v in constants.items()),
            "edits": [list(edit) for edit in run.edits], "summary": summary, "log": list(map(json.loads, log)),
            "sample": (output / "sample.txt").read_text(encoding="utf-8"), "measured": measures.measure(run, output),
        }  # fmt: skip
        store.write_text(path, json.dumps(results, indent=1) + "\n")
        if jobs > 1:
            took = time.time() - began
            harness.say(f"{path.relative_to(store.RESULTS)}: val bpb {summary['val_bpb']:.4f}, {took:.0f} s")
    except UserError as error:
        return str(error)


def make_all(todo, overrides, gpu, jobs):
    """Make all of `todo`, [(run, seed)], `jobs` at a time. Raises ValueError if one fails, after the others."""
    if jobs == 1:
        for run, seed in todo:
            if problem := make_run(run, seed, overrides, gpu):
                raise UserError(problem)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), runner.init_worker) as pool:
        try:
            tasks = [pool.submit(make_run, run, seed, overrides, gpu, jobs) for run, seed in todo]
            problems = [problem for task in tasks if (problem := task.result())]
        except KeyboardInterrupt as reason:
            if isinstance(reason, runner.Stopped):
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise UserError("; ".join(problems))


def missing(names, gpu=False):
    """[(run, seed)] of the experiments that are not done, each training once; all runs with their first seed first."""
    todo = {}
    for k in range(max(len(EXPERIMENTS[name].seeds) for name in names)):
        for name in names:
            for run in EXPERIMENTS[name].runs if k < len(EXPERIMENTS[name].seeds) else ():
                seed = EXPERIMENTS[name].seeds[k]
                todo.setdefault(store.result_file(run, seed, gpu), (run, seed))
    return [one for path, one in todo.items() if not path.exists()]


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------

COLUMNS = {  # key in the summary: (title, form)
    "val_bpb": ("val bpb", "{:.4f}"),
    "val_bpb_sliding": ("val bpb, sliding", "{:.4f}"),
    "val_word_ppl": ("val word ppl", "{:,.1f}"),
    "val_word_ppl_sliding": ("val word ppl, sliding", "{:,.1f}"),
    "test_bpb": ("test bpb", "{:.4f}"),
    "train_seconds": ("training, s", "{:,.0f}"),
    "n_params": ("parameters", "{:,.0f}"),
    "bytes_seen": ("bytes seen", "{:,.0f}"),
    "best_step": ("best step", "{:,.0f}"),
    "steps": ("steps", "{:,.0f}"),
    "step_time": ("a step, s", "{:.3f}"),  # not of the summary
}


def cell(column, run, results):
    """A cell of an experiment's table: the column of a run over its seeds."""
    values = [step_time.seconds_of(run)]
    if column != "step_time":
        values = [result["summary"].get(column) for result in results]
    return store.spread(values, COLUMNS[column][1])


def report(name, gpu=False):
    """The finished runs of an experiment as Markdown; None if there are none."""
    experiment, rows, seeds, machines = EXPERIMENTS[name], [], set(), set()
    for run in experiment.runs:
        if results := store.read_results(run, experiment.seeds, gpu):
            seeds |= {result["summary"]["seed"] for result in results}
            machines |= {result["machine"] for result in results}
            cells = [cell(column, run, results) for column in experiment.columns]
            rows.append([run.name, len(results), *cells])
    if not rows:
        return None
    timed = step_time.read().get("machine") if "step_time" in experiment.columns else None
    return (f"{table(['run', 'seeds', *(COLUMNS[column][0] for column in experiment.columns)], rows)}\n"
            f"{experiment.asks} Mean (lowest to highest) over the seeds {', '.join(map(str, sorted(seeds)))}. "
            f"Made on: {'; '.join(sorted(machines))}.{f' Seconds a step: {timed}.' if timed else ''}\n")  # fmt: skip


def list_all():
    """Print what each experiment asks, how much of it is done, and how long all of it takes."""
    for name, experiment in EXPERIMENTS.items():
        files = [store.result_file(run, seed) for run in experiment.runs for seed in experiment.seeds]
        done, hours = sum(path.exists() for path in files), list(map(training_hours, experiment.runs))
        known = [len(experiment.seeds) * time for time in hours if time is not None]
        least = "at least " if len(known) < len(hours) else ""
        need = f", {least}{sum(known):.1f} h of training on two cores like those of step_time.json" if known else ""
        harness.say(f"{name:14} {done:2} of {len(files)} runs{need}\n{'':14} {experiment.asks}")


def training_hours(run):
    """About how long a run takes with one seed on the machine of step_time.json; None if that is not known. How many
    steps a number of megabytes is depends on a vocabulary that may not be here, so a finished run tells it."""
    if run.seconds:
        return run.seconds / 3600
    steps = run.constants.get("MAX_STEPS", importlib.import_module(run.rung).MAX_STEPS)
    if run.megabytes:
        results = store.read_results(run, SEEDS)
        steps = results[0]["summary"]["steps"] if results else None
    seconds = step_time.seconds_of(run)
    return steps * seconds / 3600 if steps and seconds else None


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description="The experiments of this repository.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="of an experiment, or NAME=value for all of its runs")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--table", action="store_true", help="make no run, only the table")
    parser.add_argument("--step-time", action="store_true", help="make no run, measure how long a step takes")
    parser.add_argument("--missing", action="store_true", help="with --step-time: only what was not measured")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--gpu", action="store_true", help="shapes for one GPU")
    args = parser.parse_intermixed_args(argv)
    names = [name for name in args.names if "=" not in name]
    overrides = dict(text.partition("=")[::2] for text in args.names if "=" in text)
    if args.list or not names:
        return list_all()
    for name in names:
        if name not in EXPERIMENTS:
            raise UserError(f"there is no experiment {name!r}; known are {', '.join(EXPERIMENTS)}")
    if args.step_time:
        runs = [run for name in names for run in EXPERIMENTS[name].runs]
        texts.prepare(runs)
        return step_time.measure(runs, again=not args.missing)
    if not args.table and (todo := missing(names, args.gpu)):  # tables of what is done need no text
        texts.prepare([run for run, _ in todo])
        texts.check_texts(todo, overrides, args.gpu)
        make_all(todo, overrides, args.gpu, max(1, args.jobs))
    for name in names:
        text = report(name, args.gpu)
        if text is None:
            raise UserError(f"no run of {name} is done; without --table they are made")
        harness.say(text, end="")
        store.write_text(store.RESULTS / (name + "_gpu" * args.gpu) / "table.md", text)


def program(argv=None):
    """main() that ends, stopped or failed, with one line and an exit code."""
    signal.signal(signal.SIGTERM, runner.raise_stopped)
    harness.cli.robust_streams()
    try:
        main(argv)
    except KeyboardInterrupt as reason:
        harness.say("experiments.py: stopped; the same command goes on from the last checkpoint", error=True)
        sys.exit(143 if isinstance(reason, runner.Stopped) else 130)
    except UserError as error:
        sys.exit(f"experiments.py: {error}")


if __name__ == "__main__":
    program()
