"""Make the runs of the experiments, and their tables.

    python results/experiments.py --list                list the experiments, and how many runs are done
    python results/experiments.py ladder positions      make the missing runs of experiments, then their tables
    python results/experiments.py ladder --table        only the table, from the runs that are done
    python results/experiments.py ladder DEVICE=cuda    how to run: DEVICE, COMPILE and SAMPLE_TOKENS
    python results/experiments.py ladder MAX_STEPS=20   try it out: other constants do not give results (below)
    python results/experiments.py ladder --jobs 8       eight runs at a time: small models do not fill a GPU
    python results/experiments.py ladder --gpu          with shapes for one GPU, on the text in data/
    python results/experiments.py shape --step-time     measure how long a step of each model takes here

results/plan.py says what each experiment asks and which runs answer it. A run is a rung with constants, started as
`python v3.py NAME=value ...` in its own folder below runs/experiments/. You may stop it at any time: the next start
continues from its last checkpoint. A finished run writes a file with its summary and evaluations to
results/experiments/NAME/, and is not made again; a run that two experiments share is made once. A change of a model
that no constant can make is an edit of the rung's source (results/edits.py), made to a copy in the folder of the run.

A result is shown only if it matches the planned run: same rung, constants, seed, edits and number of steps; a line
names each result that is left out. Results from different texts, or from different code of a rung, never share a table.
Runs with other constants, and their table, go to runs/experiments/tried/, into a folder named after these constants.

If runs are compared at equal seconds, the number of steps follows from results/experiments/step_time.json, which
--step-time measures. Between machines, losses differ only by rounding.
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
from harness import signals  # noqa: E402
from harness.errors import UserError  # noqa: E402
from harness.identity import code_hash  # noqa: E402
from results import checks, measures, runner, step_time, store, texts  # noqa: E402
from results.plan import EXPERIMENTS, SEEDS, all_constants, owner  # noqa: E402

NOT_TO_SET = ("SEED", "OUT_DIR", "RESUME", "PROMPT")  # the plan and this program set them, not the user

# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


def output_folder(run, folder):
    """The folder to which the run in `folder` writes its results: v4 has one for each scheme."""
    return folder / "run" / run.constants.get("POSITION", "")


def constants_of(run, seed, overrides, gpu=False):
    """All constants that the command of a run sets: the planned ones, the number of steps, an evaluation interval of an
    eighth of these (as by default), and those of `overrides`, {name: text}, that the rung has. Raises ValueError if a
    step time is missing."""
    rung = importlib.import_module(run.rung)
    constants = all_constants(run, seed, gpu)
    if "MAX_STEPS" in overrides:
        pass  # it does not depend on the time of a step or on the text
    elif run.seconds:
        constants["MAX_STEPS"] = step_time.steps_within(run.seconds, run)
    elif run.megabytes:
        constants["MAX_STEPS"] = texts.steps_for(run.megabytes, rung, constants)
    constants |= {name: text for name, text in overrides.items() if hasattr(rung, name)}
    if "MAX_STEPS" in constants:
        constants.setdefault("EVAL_INTERVAL", math.ceil(int(constants["MAX_STEPS"]) / 8))
    return constants


def make_run(run, seed, overrides, gpu=False, jobs=1):
    """Make one run of an experiment, unless it is done, and write its results. Returns an error message, or None."""
    path = store.result_file(run, seed, gpu, overrides)
    if path.exists() or runner.SIGNALS:
        return None
    try:
        run = owner(run)[1]
        constants = constants_of(run, seed, overrides, gpu)
        folder = store.work_folder(path)
        output, began = output_folder(run, folder), time.time()
        source, text = checks.sources(run)
        made_of = {"rung": run.rung, "code_sha256": code_hash(text), "edits": [list(e) for e in run.edits],
                   "constants": checks.values(run, constants), "text": texts.text_of(run, constants)}  # fmt: skip
        runner.begin(folder, output, made_of)
        if not (output / "summary.json").exists():
            runner.train(run, folder, constants, jobs)
        summary = store.read_json(output / "summary.json")
        if EXPERIMENTS[owner(run)[0]].search:
            summary = {key: value for key, value in summary.items() if not key.startswith("test_")}
        results = {
            "run": run.name, "machine": machine(summary["device"]), "date": time.strftime("%Y-%m-%d"),
            "command": f"python {run.rung}.py " + " ".join(f"{k}={v}" for k, v in constants.items()),
            "edits": [list(edit) for edit in run.edits], "code_sha256": code_hash(source), "summary": summary,
            "log": [json.loads(line) for line in store.read_text(output / "log.jsonl").splitlines()],
            "sample": store.read_text(output / "sample.txt"), "measure": run.measure,
            "measured": measures.measure(run, output),
        }  # fmt: skip
        results = json.loads(json.dumps(results))
        why = checks.flaw(results, run, seed, gpu, overrides)
        if summary["code_sha256"] != made_of["code_sha256"]:
            why = f"the code of {run.rung}.py was changed as it began"
        if why:
            raise UserError(f"the run in {store.shown(folder)} does not match the plan: {why}; start the same command "
                            "again to make it from the beginning")  # fmt: skip
        store.write_text(path, json.dumps(results, indent=1) + "\n")
        if jobs > 1:
            took = time.time() - began
            harness.say(f"{store.shown(path)}: val bpb {summary['val_bpb']:.4f}, {took:.0f} s")
    except UserError as error:
        return str(error)


def make_all(todo, overrides, gpu, jobs):
    """Make all of `todo`, [(run, seed)], `jobs` at a time. If one fails, raises ValueError after the others are done.
    """
    if jobs == 1:
        for run, seed in todo:
            if problem := make_run(run, seed, overrides, gpu):
                raise UserError(problem)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), runner.init_worker) as pool:
        try:
            tasks = [pool.submit(make_run, run, seed, overrides, gpu, jobs) for run, seed in todo]
            problems = [problem for task in tasks if (problem := task.result())]
        except signals.Stopped as reason:
            if reason.number != signal.SIGINT:
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise UserError("; ".join(problems))


def missing(names, gpu=False, overrides=None):
    """[(run, seed)] of all runs that are not done, each training once; the first seeds of all runs come first."""
    todo = {}
    for k in range(max(len(EXPERIMENTS[name].seeds) for name in names)):
        for name in names:
            for run in EXPERIMENTS[name].runs if k < len(EXPERIMENTS[name].seeds) else ():
                seed = EXPERIMENTS[name].seeds[k]
                todo.setdefault(store.result_file(run, seed, gpu, overrides), (run, seed))
    return [one for path, one in todo.items() if not path.exists()]


def check_code(names, todo, gpu, overrides):
    """Raises ValueError if the runs of `todo`, [(run, seed)], would be made with different code than the results with
    which they are compared. Otherwise hours of training would end in a table that cannot be made."""
    now = {}
    for run, seed in todo:
        source, text = map(code_hash, checks.sources(owner(run)[1]))
        summary = {"rung": run.rung, "code_sha256": text}
        now[store.result_file(run, seed, gpu, overrides)] = {
            "edits": owner(run)[1].edits, "code_sha256": source, "summary": summary}  # fmt: skip
    for name in names:
        paths = {store.result_file(run, seed, gpu, overrides) for run in EXPERIMENTS[name].runs
                 for seed in EXPERIMENTS[name].seeds}  # fmt: skip
        more = {f"{path.name} (to be made)": result for path, result in now.items() if path in paths}
        store.check_together(name, gpu, overrides, more)


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


def report(name, gpu=False, overrides=None):
    """A table of the finished runs of an experiment as Markdown; None if there are none. Raises ValueError if they do
    not belong together."""
    experiment, rows, seeds, machines = EXPERIMENTS[name], [], set(), set()
    mixed = store.check_together(name, gpu, overrides)
    for run in experiment.runs:
        if results := store.read_results(run, experiment.seeds, gpu, overrides):
            seeds |= {result["summary"]["seed"] for result in results}
            machines |= {result["machine"] for result in results}
            cells = [cell(column, run, results) for column in experiment.columns]
            rows.append([run.name, len(results), *cells])
    if not rows:
        return None
    timed = step_time.read().get("machine") if "step_time" in experiment.columns else None
    tried = [f"{key}={text}" for key, text in (overrides or {}).items()]
    tried = f" Tried out with {' '.join(tried)}: no results of the experiment." if store.is_tried(overrides) else ""
    mixed = f" Made with different code: {mixed}." if mixed else ""
    return (f"{table(['run', 'seeds', *(COLUMNS[column][0] for column in experiment.columns)], rows)}\n"
            f"{experiment.asks}{tried} Mean (lowest to highest) over the seeds {', '.join(map(str, sorted(seeds)))}. "
            f"Made on: {'; '.join(sorted(machines))}.{f' Seconds a step: {timed}.' if timed else ''}"
            f"{mixed}\n")  # fmt: skip


def list_experiments(names):
    """Print what each experiment asks, how much of it is done, and how long all of it takes."""
    for name in names:
        experiment = EXPERIMENTS[name]
        results = [store.read_result(run, seed) for run in experiment.runs for seed in experiment.seeds]
        done, hours = sum(map(bool, results)), list(map(training_hours, experiment.runs))
        known = [len(experiment.seeds) * time for time in hours if time is not None]
        least = "at least " if len(known) < len(hours) else ""
        need = f", {least}{sum(known):.1f} h of training on two cores like those of step_time.json" if known else ""
        harness.say(f"{name:14} {done:2} of {len(results)} runs{need}\n{'':14} {experiment.asks}")


def training_hours(run):
    """About how many hours a run with one seed takes on the machine of step_time.json; None if that is unknown. The
    steps for a number of megabytes depend on a vocabulary that may be missing here, so they come from a finished run.
    """
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
    parser.add_argument("names", nargs="*", metavar="NAME", help="an experiment, or NAME=value for all its runs")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--table", action="store_true", help="make only the table, no runs")
    parser.add_argument("--step-time", action="store_true", help="make no runs, only measure how long a step takes")
    parser.add_argument("--missing", action="store_true", help="with --step-time: only steps not yet measured")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--gpu", action="store_true", help="shapes for one GPU")
    args = parser.parse_intermixed_args(argv)
    names = [name for name in args.names if "=" not in name]
    overrides = dict(text.partition("=")[::2] for text in args.names if "=" in text)
    store.LEFT_OUT.clear()
    for name in names:
        if name not in EXPERIMENTS:
            raise UserError(f"there is no experiment {name!r}; the experiments are {', '.join(EXPERIMENTS)}")
    check_options(args, names, overrides)
    if args.list or not names:
        return list_experiments(names or EXPERIMENTS)
    if args.step_time:
        runs = [run for name in names for run in EXPERIMENTS[name].runs]
        texts.prepare(runs)
        return step_time.measure(runs, again=not args.missing)
    if not args.table and (todo := missing(names, args.gpu, overrides)):  # tables alone need no text
        check_code(names, todo, args.gpu, overrides)
        texts.prepare([run for run, _ in todo], overrides)
        texts.check_texts(todo, overrides, args.gpu)
        make_all(todo, overrides, args.gpu, max(1, args.jobs))
    for name in names:
        store.say_unknown(name, args.gpu, overrides)
        text = report(name, args.gpu, overrides)
        if text is None:
            say_why = ("all results there were left out; see the lines above" if store.LEFT_OUT
                       else "to make the runs, leave out --table")  # fmt: skip
            raise UserError(f"no run of {name} is done; {say_why}")
        harness.say(text, end="")
        path = store.base_folder(overrides) / (name + "_gpu" * args.gpu) / "table.md"
        store.write_text(path, text)
        if store.is_tried(overrides):
            harness.say(f"kept apart from the results: {store.shown(path)}")


def check_options(args, names, overrides):
    """Raises ValueError for anything that would be ignored: constants that no run has or that the user must not set,
    and options that cannot be combined."""
    if overrides and (args.list or args.step_time or not names):
        raise UserError(f"{next(iter(overrides))} is a constant for runs, but no runs would be made; name an "
                        "experiment, without --list and --step-time")  # fmt: skip
    if args.gpu and args.step_time:
        raise UserError("--step-time measures on two CPU cores, not on a GPU; leave --gpu out")
    if args.missing and not args.step_time:
        raise UserError("--missing only works with --step-time; leave it out, since missing runs are made anyway")
    for name in overrides:
        if name in NOT_TO_SET:
            raise UserError(f"this program sets {name} itself; leave it out")
        known = {run.rung: (run, checks.parsed(checks.sources(run)[0])[0])
                 for experiment in names for run in EXPERIMENTS[experiment].runs}  # fmt: skip
        having = [run for run, constants in known.values() if name in constants]
        if not having:
            of_all = dict.fromkeys(constant for _, constants in known.values() for constant in constants)
            raise UserError(f"no run of {' or '.join(names)} has a constant {name!r}; the constants are "
                            f"{', '.join(of_all)}")  # fmt: skip
        checks.values(having[0], {name: overrides[name]})  # of the right type


def program(argv=None):
    """main(), ending with one line and an exit code if it is stopped or fails."""
    signals.catch(signals.raise_stopped)
    harness.cli.robust_streams()
    try:
        main(argv)
    except signals.Stopped as reason:
        harness.say("experiments.py: stopped; the same command continues from the last checkpoint", error=True)
        sys.exit(128 + reason.number)
    except UserError as error:
        sys.exit(f"experiments.py: {error}")


if __name__ == "__main__":
    program()
