"""The result files of finished runs in results/experiments/, and their figures over the seeds."""

import hashlib
import json
import re
import shlex
from statistics import mean

import harness
from harness.errors import FileError, MissingFileError, UserError
from results.plan import EXPERIMENTS, HOW, ROOT, owner

WORK, RESULTS = ROOT / "runs" / "experiments", ROOT / "results" / "experiments"


def slug(text):
    """Turn a text into a file name: "+ Muon: v3_1" becomes plus-muon-v3_1."""
    words = "".join(c.lower() if c.isalnum() or c in "._" else " " for c in text.replace("+", "plus").replace("×", "x"))
    return "-".join(words.split())


def is_tried(overrides):
    """Whether runs with these constants, {name: text}, are only tried out and do not count as results."""
    return any(name not in HOW for name in overrides or ())


def base_folder(overrides=None):
    """The folder of results. Runs with constants that are not in the plan do not count as results: they have their own
    folder below runs/, named after those constants."""
    if not is_tried(overrides):
        return RESULTS
    words = [f"{name}={text}" for name, text in sorted(overrides.items()) if name not in HOW]
    exact = " ".join(words)
    name = re.sub(r"[^\w.,= -]", "_", exact)[:100]
    return WORK / "tried" / (name if name == exact else f"{name} {hashlib.sha256(exact.encode()).hexdigest()[:8]}")


def result_file(run, seed, gpu=False, overrides=None):
    """The result file of a run, in the folder of the first experiment that has the run."""
    experiment, run = owner(run)
    return base_folder(overrides) / f"{experiment}{'_gpu' * gpu}" / f"{slug(run.name)}-{seed}.json"


def work_folder(path):
    """The folder in which to train the run whose result will be the file `path`."""
    below = path.relative_to(RESULTS) if path.is_relative_to(RESULTS) else path.relative_to(WORK)
    return (WORK / below).with_suffix("")


def command(experiment, gpu=False, overrides=None):
    """The command that makes the missing runs of an experiment."""
    words = [f"{name}={text}" for name, text in (overrides or {}).items() if name not in HOW]
    return shlex.join(["python", "results/experiments.py", experiment, *["--gpu"] * gpu, *words])


def shown(path):
    """A path for messages: relative to the repository if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def read_text(path):
    """The text of a file. Raises OSError, ValueError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFileError(f"{shown(path)} is missing; put it back, or make it again") from None
    except OSError as error:
        raise FileError(f"{shown(path)} cannot be read ({error.strerror}); make it readable, or remove it") from None
    except ValueError:
        raise UserError(f"{shown(path)} is damaged; put it back, or remove it and make it again") from None


def read_json(path):
    """The contents of a JSON file. Raises OSError, ValueError."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{shown(path)} is damaged; put it back, or remove it and make it again") from None


LEFT_OUT = {}  # {file: why it is left out}, as already printed


def read_result(run, seed, gpu=False, overrides=None):
    """The contents of the result file of a run with a seed; None if there is none. A file that does not match the
    planned run counts as none, and a line says why."""
    from results import checks  # not at the top: checks imports this file, by way of step_time

    path = result_file(run, seed, gpu, overrides)
    if not path.exists():
        return None
    again = f"remove it or move it aside, and {command(owner(run)[0], gpu, overrides)} makes it again"
    try:
        result = read_json(path)
        why = checks.flaw(result, run, seed, gpu, overrides)
        line = why and f"{shown(path)} is left out: {why}; {again}"
    except UserError as error:
        line = f"{shown(path)} is left out: {error}"
    if line is None:
        return result
    if LEFT_OUT.get(path) != line:
        LEFT_OUT[path] = line
        harness.say(line, error=True)
    return None


def read_results(run, seeds, gpu=False, overrides=None):
    """The contents of the result files of a run, a dict for each of `seeds` that is done."""
    results = [read_result(run, seed, gpu, overrides) for seed in seeds]
    return [result for result in results if result is not None]


def check_together(name, gpu=False, overrides=None, more=None):
    """Raises ValueError if the results of an experiment come from different texts, or from different code of a rung
    without a reason in the plan. Returns that reason. `more`: further results, {name: result}, to check with them."""
    from results import checks

    found = {}
    for run in EXPERIMENTS[name].runs:
        for seed in EXPERIMENTS[name].seeds:
            if (result := read_result(run, seed, gpu, overrides)) is not None:
                found[result_file(run, seed, gpu, overrides).name] = result
    return checks.check_together(name, found | (more or {}), command(name, gpu, overrides))


def say_unknown(name, gpu=False, overrides=None):
    """Say which files in the folder of an experiment belong to no planned run: they are left out."""
    folder = base_folder(overrides) / f"{name}{'_gpu' * gpu}"
    known = {result_file(run, seed, gpu, overrides) for experiment in EXPERIMENTS.values() for run in experiment.runs
             for seed in experiment.seeds}  # fmt: skip
    for path in sorted(set(folder.glob("*.json")) - known):
        harness.say(f"{shown(path)} is left out: the plan has no run with that name and seed; remove it, or move it "
                    "aside", error=True)  # fmt: skip


class Results(dict):
    """{name of a run: its results} of an experiment. Looking up a run without results raises an error in one line."""

    def __init__(self, experiment, results):
        super().__init__(results)
        self.experiment = experiment

    def __missing__(self, name):
        raise UserError(f"there is no result for the run {name!r} of the experiment {self.experiment}; make it with "
                        f"{command(self.experiment)}")  # fmt: skip


def results_of(name):
    """{name of a run: its results, as from read_results} for the finished runs of an experiment."""
    check_together(name)
    results = {run.name: read_results(run, EXPERIMENTS[name].seeds) for run in EXPERIMENTS[name].runs}
    return Results(name, {run_name: results for run_name, results in results.items() if results})


def mean_of(results, key):
    """The mean of a figure in the summaries of some results."""
    return mean(result["summary"][key] for result in results)


def spread(values, form="{:.4f}"):
    """A table cell with the mean of some values and, if they differ, the lowest and highest; – without values."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    low, high = min(values), max(values)
    text = form.format(mean(values))
    return text if low == high else f"{text} ({form.format(low)} to {form.format(high)})"


def spread_of(results, key, form="{:.4f}"):
    """`spread` for a figure in the summaries of some results."""
    return spread([result["summary"][key] for result in results], form)


def make_folder(folder):
    """Make a folder if it does not exist. Raises OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {shown(folder)} ({error.strerror}); make room, or make its parent "
                        "writable") from None  # fmt: skip


def write_text(path, text):
    """Write a file whole or not at all. Raises OSError."""
    make_folder(path.parent)
    harness.atomic_write(path, lambda file: file.write(text.encode()))
