"""What finished runs have left in results/experiments/, and their numbers over the seeds."""

import json
from statistics import mean

import harness
from results.plan import EXPERIMENTS, ROOT, owner

WORK, RESULTS = ROOT / "runs" / "experiments", ROOT / "results" / "experiments"


def slug(text):
    """A text as the name of a file: "+ Muon: v3_1" is plus-muon-v3_1."""
    words = "".join(c.lower() if c.isalnum() or c in "._" else " " for c in text.replace("+", "plus").replace("×", "x"))
    return "-".join(words.split())


def result_file(run, seed, gpu=False):
    """Where a finished run is kept: in the folder of the first experiment that has it."""
    experiment, run = owner(run)
    return RESULTS / (experiment + "_gpu" * gpu) / f"{slug(run.name)}-{seed}.json"


def read_results(run, seeds, gpu=False):
    """The content of the result files of a run, a dict for each of `seeds` that is done."""
    paths = [result_file(run, seed, gpu) for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def results_of(name):
    """{name of a run: its results, as read_results gives them} of the runs of an experiment that are done."""
    experiment = EXPERIMENTS[name]
    results = {run.name: read_results(run, experiment.seeds) for run in experiment.runs}
    return {run_name: results for run_name, results in results.items() if results}


def full_length(results):
    """Those results whose runs were not stopped early."""
    return [one for one in results if one["summary"]["steps"] == one["summary"]["hyperparameters"]["MAX_STEPS"]]


def mean_of(results, key):
    """The mean of a number of the summaries of some results."""
    return mean(result["summary"][key] for result in results)


def spread(values, form="{:.4f}"):
    """The mean of values, and where they differ the lowest and highest, as a cell of a table; – without values."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    low, high = min(values), max(values)
    text = form.format(mean(values))
    return text if low == high else f"{text} ({form.format(low)} to {form.format(high)})"


def spread_of(results, key, form="{:.4f}"):
    """A number of the summaries of some results, as a cell of a table."""
    return spread([result["summary"][key] for result in results], form)


def write_text(path, text):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    harness.atomic_write(path, lambda file: file.write(text.encode()))
