"""Which results belong together: a result is shown only if it matches its planned run, and only next to results from
the same text and the same code."""

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
    """A hash of the texts of some edits, ((old, new), ...)."""
    return short_hash(json.dumps([list(edit) for edit in edits]))


# ----------------------------------------------------------------------------------------------------------
# What a run would be made of now
# ----------------------------------------------------------------------------------------------------------


def sources(run):
    """(source of the rung, the same after the edits of the run), from the disk as it is now."""
    try:
        text = (ROOT / f"{run.rung}.py").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run.rung}.py cannot be read ({error.strerror}); put it back") from None
    return text, edited(text, run.edits)


parsed = functools.lru_cache(maxsize=None)(parse_source)


@functools.lru_cache(maxsize=None)
def defaults_of(text):
    """{name: value} of the constants in the source of a rung, except those whose value is computed."""
    defaults = {}
    for name, value in parsed(text)[1].items():
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError:
            pass
    return defaults


def values(run, constants):
    """The constants of a run, {name: value or its text}, converted to how a summary stores them. Raises ValueError if
    the rung has no such constant, or the constant cannot have such a value."""
    path = str(ROOT / f"{run.rung}.py")
    text = sources(run)[0]
    rung = dict.fromkeys(parsed(text)[0]) | {"__file__": path, "main": short_hash(text)} | defaults_of(text)
    set_constants(rung, [f"{name}={value}" for name, value in constants.items()])
    return json.loads(json.dumps({name: rung[name] for name in constants}))


def planned(run, seed, gpu=False, overrides=None):
    """{name: value} of the constants that the plan and the command give to a run; without the number of steps if that
    depends on a text."""
    constants, overrides = all_constants(run, seed, gpu), overrides or {}
    if run.seconds and "MAX_STEPS" not in overrides:
        constants["MAX_STEPS"] = step_time.steps_within(run.seconds, run)
    known = parsed(sources(run)[0])[0]
    return values(run, constants | {name: text for name, text in overrides.items() if name in known})


# ----------------------------------------------------------------------------------------------------------
# One result
# ----------------------------------------------------------------------------------------------------------


def is_whole(result):
    """Whether the contents of a file have everything that a result has."""
    return (isinstance(result, dict) and all(isinstance(result.get(k), kind) for k, kind in NEEDED.items())
            and all(isinstance(result["summary"].get(k), kind) for k, kind in NEEDED_OF_SUMMARY.items())
            and len(result["log"]) > 0
            and all(isinstance(one, dict) and isinstance(one.get("step"), int) for one in result["log"]))  # fmt: skip


def differing_constants(run, result, wanted):
    """["NAME was ... and is ..."] for the constants in which a result differs from what is `wanted` of its run, or else
    from the rung's default now. A constant that the rung did not have then counts as its default; one that it no longer
    has is compared only if the command of the run set it."""
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
    """Why a result does not match the planned run with this seed; None if it does. Raises ValueError if the plan cannot
    be worked out."""
    if not is_whole(result):
        return "it is damaged or not a result"
    run, overrides = owner(run)[1], overrides or {}
    summary = result["summary"]
    if summary["rung"] != run.rung:
        return f"it is a run of {summary['rung']}.py, but the plan has {run.rung}.py"
    if summary["seed"] != seed:
        return f"its seed is {summary['seed']}"
    then, now = words_of(result["edits"]), words_of(run.edits)
    if OTHER_WORDS.get(then, then) != now:
        return "it was made with edits that are not those in results/edits.py"
    wanted = planned(run, seed, gpu, overrides)
    max_steps = summary["hyperparameters"].get("MAX_STEPS")
    if type(max_steps) is not int:
        return "it is damaged or not a result"
    if run.megabytes and "MAX_STEPS" not in overrides:
        megabytes = max_steps * summary["bytes_seen"] / max(1, summary["steps"]) / 1e6
        if max_steps > 2 and abs(megabytes - run.megabytes) > 0.51 * megabytes / max_steps:
            return f"it was to read {megabytes:.2f} MB, but the plan has {run.megabytes:g} MB"
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
        return f"its run ended after {result['log'][-1]['step']} of {max_steps} steps"
    if run.measure and (not result.get("measured") or result.get("measure", run.measure) != run.measure):
        return f"its model lacks the measurement {run.measure!r}"
    return None


# ----------------------------------------------------------------------------------------------------------
# Several results
# ----------------------------------------------------------------------------------------------------------


def codes_of(result):
    """{(rung, hash of its edits): hash of its code}, as stored in a result."""
    summary, found = result["summary"], {}
    if result.get("code_sha256"):  # of the rung without edits
        found[summary["rung"], words_of(())] = result["code_sha256"]
    if summary.get("code_sha256"):
        found[summary["rung"], words_of(result["edits"])] = summary["code_sha256"]
    return found


def texts_of(result):
    """{what: text}, as stored in a result; empty for a run that is still to be made."""
    summary = result["summary"]
    if "dataset" not in summary:
        return {}
    place = summary["hyperparameters"].get("DATA", "data")
    found = {(place, "text"): summary["dataset"]}
    if summary.get("tokens_sha256"):
        found[place, summary["tokenizer"]] = f"{summary['dataset']} ({summary['tokens_sha256']})"
    return found


def groups(found, of):
    """{what: {text or code: [names of results]}} for `found`, {name: result}, where there is more than one."""
    together = {}
    for name, result in found.items():
        for key, value in of(result).items():
            together.setdefault(key, {}).setdefault(value, []).append(name)
    return {key: one for key, one in together.items() if len(one) > 1}


def check_together(experiment, found, again):
    """Check that the results of an experiment, {name of the file: result}, come from one text, and those of a rung from
    one code, unless the plan gives a reason why different code makes no difference. Returns that reason, or "". Older
    results have no hashes; what is unknown is not compared. Raises ValueError. `again`: the command that makes results
    again."""
    for key, mixed in groups(found, texts_of).items():
        raise UserError(f"results of {experiment} come from different texts in {key[0]} ({listed(mixed)}); move those "
                        f"of one text aside, and {again} makes them again")  # fmt: skip
    reason = EXPERIMENTS[experiment].mixed_code
    for (rung, _), mixed in groups(found, codes_of).items():
        if not reason:
            raise UserError(f"results of {experiment} come from different code of {rung}.py ({listed(mixed)}); move "
                            f"those of one code aside, and {again} makes them again; or say in mixed_code of the plan "
                            "why their losses are the same")  # fmt: skip
        return reason
    return ""


def listed(mixed):
    """{text or code: [names of results]} in words."""
    return "; ".join(f"{value}: {', '.join(names[:3])}{' and more' * (len(names) > 3)}"
                     for value, names in mixed.items())  # fmt: skip
