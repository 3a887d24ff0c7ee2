"""The start of a run: from its last checkpoint, from the weights of another run, or in a folder that an earlier run has
used."""

import shlex
from types import SimpleNamespace

import torch

from harness import distributed
from harness.cli import say
from harness.distributed import barrier, rank
from harness.errors import UserError
from harness.models import SHAPE, DamagedFile, find_model, read_file, read_model, set_weights
from harness.signals import uninterrupted

CHECKPOINTS = ("checkpoint_new.pt", "checkpoint.pt", "checkpoint_before.pt")  # new: left by a kill before its renaming
# In the order in which they are moved aside: after a kill, the newest checkpoint is still there, or none is.
RUN_FILES = (*reversed(CHECKPOINTS), "log.jsonl", "steps.csv", "summary.json", "sample.txt", "model.pt",
             "vocabulary.json", "loss.png")  # fmt: skip
# Constants that a resumed run may change: without a line those that only say how to run, with a line those on which the
# next steps depend. All others must stay: they decide the shape of the model and the order of the data.
MAY_CHANGE = ("EVAL_INTERVAL", "PATIENCE", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "STOP_AT_END", "SAMPLES",
              "STRIDE", "EXTRAPOLATION", "DEVICE", "SHARD", "DATA", "OUT_DIR", "RESUME", "INIT_FROM",
              "PROMPT")  # fmt: skip
MAY_CHANGE_WITH_A_LINE = ("MAX_STEPS", "LEARNING_RATE", "LEARNING_RATE_ADAMW", "WARMUP_STEPS", "COOLDOWN", "MOMENTUM",
                          "WEIGHT_DECAY", "GRAD_CLIP", "DROPOUT", "DTYPE", "COMPILE", "MICRO_BATCH_SIZE",
                          "CHUNK_SIZE")  # fmt: skip


def differing(before, now, but=()):
    """The constants in which two runs differ and that may affect a loss, as {name: "NAME was ... and is ..."}."""
    names = sorted({*before, *now} - {*MAY_CHANGE, *but})
    return {k: f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in names if before.get(k) != now.get(k)}


def same_training(summary, other, but=()):
    """Whether two summaries have the same text and the same constants, except perhaps those in `but`."""
    same_text = _text(summary) == _text(other)
    return same_text and not differing(summary["hyperparameters"], other["hyperparameters"], but)


def _text(made_of):
    """What identifies the text in a summary or checkpoint: the hash of its tokens, or its name if that is unknown."""
    return made_of.get("tokens_sha256") or made_of["dataset"]


def move_aside(out_dir):
    """Move the files of an earlier run from the folder into a new one, and say how many earlier runs are kept."""
    named = out_dir.name not in ("", "..") and not out_dir.is_symlink()
    folder = out_dir if named else out_dir.resolve()
    there = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not there:
        return
    numbered = {int(path.suffix[1:]): path for path in folder.parent.iterdir()
                if path.suffix[1:].isdecimal() and path.stem == folder.name}  # fmt: skip
    aside = folder.with_name(f"{folder.name}.{max(numbered, default=0) + 1}")
    with uninterrupted():
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
    runs = [aside, *(path for path in numbered.values() if any((path / name).exists() for name in RUN_FILES))]
    megabytes = sum(path.stat().st_size for run in runs for path in run.rglob("*") if path.is_file()) / 1e6
    count = "1 earlier run takes" if len(runs) == 1 else f"{len(runs)} earlier runs take"
    say(f"the earlier run in {folder} is now in {aside}; {count} {megabytes:,.0f} MB")


def init_from(run, folders):
    """What `Run.init_from` does."""
    if run.constants["RESUME"] and any(run.out_dir.glob("checkpoint*.pt")):
        say(f"RESUME=True continues from the checkpoint in {run.out_dir}: INIT_FROM has no effect")
        return
    folder = find_model(folders)
    saved, tokenizer = read_model(folder)
    if saved["rung"] != run.name:
        raise UserError(f"INIT_FROM={folder} holds a model of {saved['rung']}.py, but this is {run.name}.py; name a "
                        f"run of {run.name}.py, or start {saved['rung']}.py")  # fmt: skip
    h, weights, shape = run.constants, saved["model"], saved["hyperparameters"]
    positions, length = weights.get("position_embedding.weight"), h["BLOCK_SIZE"]
    may_differ = ("VOCABULARY", *(("BLOCK_SIZE",) if positions is None or length < len(positions) else ()))
    differ = [f"{k}={v}" for k, v in shape.items() if k in SHAPE and k not in may_differ and v != h[k]]
    if differ:
        raise UserError(f"INIT_FROM={folder} holds a model of a different shape; set {' '.join(differ)}")
    if tokenizer.fingerprint != run.tokens["train"].fingerprint:
        vocabulary = shlex.quote(str(folder / "vocabulary.json"))
        raise UserError(f"INIT_FROM={folder} holds a model whose vocabulary is not that of this text; prepare the text "
                        f"with it, python data/prepare.py --from TEXT --to DIR --vocabulary {vocabulary}, and "
                        "set DATA=DIR")  # fmt: skip
    if positions is not None and length < len(positions):
        weights["position_embedding.weight"] = positions[:length]
        say(f"of the {len(positions)} positions that the model has learned, the first {length} are kept")
    set_weights(run.model, weights, folder / "model.pt")
    say(f"starting from the weights in {folder}")


def save_checkpoint(run):
    """What `Run.checkpoint` does. Whenever the process is killed, a complete checkpoint remains."""
    model, optimizers = distributed.whole([run.model.state_dict(), [o.state_dict() for o in run.optimizers]])
    if rank():
        return
    new, newest = run.out_dir / "checkpoint_new.pt", run.out_dir / "checkpoint.pt"
    run.write(new.name, {
        "model": model, "optimizers": optimizers, **vars(run.state), "log": run.records,
        "losses": torch.tensor(run.losses), "seconds": run.seconds,
        "rates": run.rates(), "dataset": run.tokens["train"].dataset, "dtype": run.dtype,
        "tokens_sha256": run.identity["tokens_sha256"],
        "fingerprint": run.tokens["train"].fingerprint, "hyperparameters": run.constants,
        "made_by": run.made_by(),
    })  # fmt: skip
    if newest.exists() and newest != run.damaged:
        newest.replace(run.out_dir / "checkpoint_before.pt")
    new.replace(newest)
    run.damaged = None


def load_checkpoint(run):
    """Put the run in the state of its last checkpoint, or of the one before if the last is damaged. Raises OSError if
    it cannot be read, ValueError if all are damaged or it belongs to another run."""
    keys = ("model", "optimizers", "step", "best", "bad_evals", "log", "losses", "seconds", "rates", "dataset",
            "tokens_sha256", "fingerprint", "hyperparameters", "dtype", "made_by")  # fmt: skip
    paths = [path for name in CHECKPOINTS if (path := run.out_dir / name).exists()]
    for path in paths:
        try:
            saved = read_file(path, keys)
            break
        except DamagedFile:
            if path == paths[-1]:
                raise
            say(f"{path} is damaged or incomplete; continuing from the checkpoint before it")
    newest = run.out_dir / "checkpoint.pt"
    run.damaged = newest if path.name == "checkpoint_before.pt" else None
    if path.name == "checkpoint_new.pt":
        barrier()  # until all processes have read it
        if rank() == 0:
            path.replace(newest)
    run.before = {key: saved[key] for key in ("hyperparameters", "rates", "made_by")}
    check_same_run(run, saved)
    set_weights(run.model, saved["model"], path)
    for optimizer, state in zip(run.optimizers, saved["optimizers"]):
        now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state["state"] = {i: {key: distributed.like_param(x, params[i]) for key, x in values.items()}
                          for i, values in state["state"].items()}  # fmt: skip
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, now):
            group.update(values)  # rates and decay come from the constants, not from the checkpoint
    run.state = SimpleNamespace(step=saved["step"], best=saved["best"], bad_evals=saved["bad_evals"])
    run.records, run.seconds, run.losses = saved["log"], saved["seconds"], saved["losses"].tolist()
    say(f"continuing from step {run.state.step:,}")


def check_same_run(run, saved):
    """Raises ValueError if the text, the tokenizer, or a constant that decides the model or the batches differs from
    the checkpoint; says which other constants have changed."""
    before, now, train = saved["hyperparameters"], run.constants, run.tokens["train"]
    changed = differing(before, now)
    differ = [text for name, text in changed.items() if name not in MAY_CHANGE_WITH_A_LINE]
    if _text(saved) != _text({"dataset": train.dataset, **run.identity}):
        same = ", but with other content" if saved["dataset"] == train.dataset else ""
        differ.append(f"the text was {saved['dataset']} and is {train.dataset}{same}")
    if saved["fingerprint"] != train.fingerprint:
        differ.append(f"the tokenizer was {saved['fingerprint']} and is {train.fingerprint}")
    if differ:
        raise UserError(f"the run in {run.out_dir} cannot be resumed with these differences: {'; '.join(differ)}; set "
                        "them back, or choose another OUT_DIR")  # fmt: skip
    if saved["step"] > now["MAX_STEPS"]:
        raise UserError(f"the run in {run.out_dir} has already made {saved['step']} steps, more than MAX_STEPS="
                        f"{now['MAX_STEPS']}; set MAX_STEPS to at least {saved['step']}")  # fmt: skip
    if changed:
        say(f"continuing with changed constants: {'; '.join(changed.values())}")
    if now["DEVICE"] == before["DEVICE"] and now.get("DTYPE") == before.get("DTYPE") == "auto":
        distributed.auto_dtypes[run.device] = saved["dtype"]
