"""Which results belong together: a result is shown only where it is that of the planned run, and beside results of the
same text and the same code."""

import ast
import functools
import json
import math

from harness.cli import parse_source, set_constants
from harness.errors import UserError
from harness.identity import short_hash
from results import step_time
from results.edits import OTHER_WORDS, edited
from results.plan import EXPERIMENTS, HOW, ROOT, all_constants, owner

NOT_COMPARED = {*HOW, "OUT_DIR", "RESUME"}
NEEDED = {"run": str, "machine": str, "edits": list, "summary": dict, "log": list}  # of a result: {key: type}
NEEDED_OF_SUMMARY = {"rung": str, "dataset": str, "tokenizer": str, "seed": int, "steps": int, "n_params": int,
                     "bytes_seen": int, "best_step": int, "train_seconds": (int, float), "val_loss": (int, float),
                     "val_bpb": (int, float), "hyperparameters": dict}  # fmt: skip


def words_of(edits):
    """A hash of the words of some edits, ((old, new), ...)."""
    return short_hash(json.dumps([list(edit) for edit in edits]))


# ----------------------------------------------------------------------------------------------------------
# What a run is made of today
# ----------------------------------------------------------------------------------------------------------


def sources(run):
    """(text of the rung, the same after the edits of the run), as they are on the disk now."""
    try:
        text = (ROOT / f"{run.rung}.py").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run.rung}.py cannot be read ({error.strerror}); put it back") from None
    return text, edited(text, run.edits)


parsed = functools.lru_cache(maxsize=None)(parse_source)


@functools.lru_cache(maxsize=None)
def defaults_of(text):
    """{name: value} of the constants of the text of a rung; without those whose value is computed."""
    defaults = {}
    for name, value in parsed(text)[1].items():
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError:
            pass
    return defaults


def values(run, constants):
    """Constants of a run, {name: value or its text}, as a summary would have them. Raises ValueError if the rung has no
    such constant, or cannot have such a value."""
    path = str(ROOT / f"{run.rung}.py")
    text = sources(run)[0]
    rung = dict.fromkeys(parsed(text)[0]) | {"__file__": path, "main": short_hash(text)} | defaults_of(text)
    set_constants(rung, [f"{name}={value}" for name, value in constants.items()])
    return json.loads(json.dumps({name: rung[name] for name in constants}))


def planned(run, seed, gpu=False, overrides=None):
    """{name: value} of the constants that the plan and the command give to a run: all but the number of steps where
    that depends on a text."""
    constants, overrides = all_constants(run, seed, gpu), overrides or {}
    if run.seconds and "MAX_STEPS" not in overrides:
        constants["MAX_STEPS"] = step_time.steps_within(run.seconds, run)
    known = parsed(sources(run)[0])[0]
    return values(run, constants | {name: text for name, text in overrides.items() if name in known})


# ----------------------------------------------------------------------------------------------------------
# One result
# ----------------------------------------------------------------------------------------------------------


def is_whole(result):
    """Whether what was read from a file has what a result has."""
    return (isinstance(result, dict) and all(isinstance(result.get(k), kind) for k, kind in NEEDED.items())
            and all(isinstance(result["summary"].get(k), kind) for k, kind in NEEDED_OF_SUMMARY.items())
            and len(result["log"]) > 0
            and all(isinstance(one, dict) and isinstance(one.get("step"), int) for one in result["log"]))  # fmt: skip


def differing_constants(run, result, wanted):
    """["NAME was ... and is ..."] of the constants in which a result is not what is `wanted` of its run, or else the
    default of today. A constant that the text did not have then counts as its default, and one that it has no longer is
    compared only if the command of the run set it."""
    then, differ = result["summary"]["hyperparameters"], []
    defaults = json.loads(json.dumps(defaults_of(sources(run)[1])))
    set_then = {word.partition("=")[0] for word in str(result.get("command", "")).split()}
    for name in sorted({*then, *wanted} - NOT_COMPARED):
        if name in wanted or name in defaults:
            now = wanted.get(name, defaults.get(name))
        elif name in set_then:
            now = "not set"
        else:
            continue
        before = then.get(name, defaults.get(name, "not set"))
        if before != now:
            differ.append(f"{name} was {before} and is {now}")
    return differ


def flaw(result, run, seed, gpu=False, overrides=None):
    """Why a result is not that of the run with this seed as it is planned today; None if it is. Raises ValueError if
    what is planned cannot be told."""
    if not is_whole(result):
        return "it is damaged or no result"
    run, overrides = owner(run)[1], overrides or {}
    summary = result["summary"]
    if summary["rung"] != run.rung:
        return f"it is of {summary['rung']}.py, and the plan has {run.rung}.py"
    if summary["seed"] != seed:
        return f"its seed is {summary['seed']}"
    then, now = words_of(result["edits"]), words_of(run.edits)
    if OTHER_WORDS.get(then, then) != now:
        return "it was made with other edits of the text than those of results/edits.py"
    wanted = planned(run, seed, gpu, overrides)
    max_steps = summary["hyperparameters"].get("MAX_STEPS")
    if type(max_steps) is not int:
        return "it is damaged or no result"
    if run.megabytes and "MAX_STEPS" not in overrides:
        megabytes = max_steps * summary["bytes_seen"] / max(1, summary["steps"]) / 1e6
        if max_steps > 2 and abs(megabytes - run.megabytes) > 0.51 * megabytes / max_steps:
            return f"it was to read {megabytes:.2f} MB, and the plan has {run.megabytes:g} MB"
        wanted["MAX_STEPS"] = max_steps
    if "rung_sha256" in summary:
        wanted.setdefault("EVAL_INTERVAL", math.ceil(wanted.get("MAX_STEPS", max_steps) / 8))
    else:  # earlier results have other intervals, and no hashes
        wanted.setdefault("EVAL_INTERVAL", summary["hyperparameters"].get("EVAL_INTERVAL"))
    if differ := differing_constants(run, result, wanted):
        return "; ".join(differ)
    if summary["tokenizer"] != summary["hyperparameters"].get("VOCABULARY"):
        return f"its vocabulary is {summary['tokenizer']}"
    worse = sum(record["step"] > summary["best_step"] for record in result["log"])
    if result["log"][-1]["step"] != summary["steps"] or (
        summary["steps"] != max_steps and worse < summary["hyperparameters"].get("PATIENCE", 0)
    ):
        return f"its run has ended after {result['log'][-1]['step']} of {max_steps} steps"
    if run.measure and (not result.get("measured") or result.get("measure", run.measure) != run.measure):
        return f"{run.measure!r} was not measured of its model"
    return None


# ----------------------------------------------------------------------------------------------------------
# Several results
# ----------------------------------------------------------------------------------------------------------


def codes_of(result):
    """{(rung, hash of its edits): hash of its code} that a result names."""
    summary, found = result["summary"], {}
    if result.get("code_sha256"):  # of the rung without edits
        found[summary["rung"], words_of(())] = result["code_sha256"]
    if summary.get("code_sha256"):
        found[summary["rung"], words_of(result["edits"])] = summary["code_sha256"]
    return found


def texts_of(result):
    """{what: text} that a result names; none of a run that is still to be made."""
    summary = result["summary"]
    if "dataset" not in summary:
        return {}
    place = summary["hyperparameters"].get("DATA", "data")
    found = {(place, "text"): summary["dataset"]}
    if summary.get("tokens_sha256"):
        found[place, summary["tokenizer"]] = f"{summary['dataset']} ({summary['tokens_sha256']})"
    return found


def groups(found, of):
    """{what: {text or code: [names of the results]}} of `found`, {name: result}, where there is more than one."""
    together = {}
    for name, result in found.items():
        for key, value in of(result).items():
            together.setdefault(key, {}).setdefault(value, []).append(name)
    return {key: one for key, one in together.items() if len(one) > 1}


def check_together(experiment, found, again):
    """Results of an experiment, {name of the file: result}, must be of the same text, and those of a rung of the same
    code, unless the plan says why other code makes no difference: that reason is returned, or "". Results without
    hashes are of an earlier time: what is not known of them is not compared. Raises ValueError; `again` is the command
    that makes results again."""
    for key, mixed in groups(found, texts_of).items():
        raise UserError(f"results of {experiment} are of different texts in {key[0]} ({listed(mixed)}); move those of "
                        f"one of them aside, and {again} makes them again")  # fmt: skip
    reason = EXPERIMENTS[experiment].mixed_code
    for (rung, _), mixed in groups(found, codes_of).items():
        if not reason:
            raise UserError(f"results of {experiment} are of different code of {rung}.py ({listed(mixed)}); move those "
                            f"of one of them aside, and {again} makes them again; or say in mixed_code of the plan why "
                            "their losses are the same")  # fmt: skip
        return reason
    return ""


def listed(mixed):
    """{text or code: [names of results]} in words."""
    return "; ".join(f"{value}: {', '.join(names[:3])}{' and more' * (len(names) > 3)}"
                     for value, names in mixed.items())  # fmt: skip
