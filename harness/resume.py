"""What a run starts from: its last checkpoint, the weights of another run, or a folder that an earlier run has used."""

import shlex
from types import SimpleNamespace

import torch

from harness import distributed
from harness.cli import say
from harness.distributed import barrier, rank
from harness.errors import UserError
from harness.models import SHAPE, DamagedFile, find_model, read_file, read_model, set_weights
from harness.signals import uninterrupted

CHECKPOINTS = ("checkpoint_new.pt", "checkpoint.pt", "checkpoint_before.pt")  # new: a kill kept it from its place
# In the order in which they are moved aside: a kill leaves the newest checkpoint or none.
RUN_FILES = (*reversed(CHECKPOINTS), "log.jsonl", "steps.csv", "summary.json", "sample.txt", "model.pt",
             "vocabulary.json", "loss.png")  # fmt: skip
# What a resumed run may change. In silence: what only says how to run. With a line: what the next steps depend on. The
# rest, shape and order of the data, must stay.
MAY_CHANGE = ("EVAL_INTERVAL", "PATIENCE", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "STOP_AT_END", "SAMPLES",
              "STRIDE", "EXTRAPOLATION", "DEVICE", "SHARD", "DATA", "OUT_DIR", "RESUME", "INIT_FROM",
              "PROMPT")  # fmt: skip
MAY_CHANGE_WITH_A_LINE = ("MAX_STEPS", "LEARNING_RATE", "LEARNING_RATE_ADAMW", "WARMUP_STEPS", "COOLDOWN", "MOMENTUM",
                          "WEIGHT_DECAY", "GRAD_CLIP", "DROPOUT", "DTYPE", "COMPILE", "MICRO_BATCH_SIZE",
                          "CHUNK_SIZE")  # fmt: skip


def differing(before, now, but=()):
    """The constants, {name: "NAME was ... and is ..."}, in which two runs differ and that may decide a loss."""
    names = sorted({*before, *now} - {*MAY_CHANGE, *but})
    return {k: f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in names if before.get(k) != now.get(k)}


def same_training(summary, other, but=()):
    """Whether two summaries are of the same text and of constants that differ at most in those of `but`."""
    same_text = _text(summary) == _text(other)
    return same_text and not differing(summary["hyperparameters"], other["hyperparameters"], but)


def _text(made_of):
    """What tells the text of a run, in a summary or checkpoint: its tokens, or its name where they are not known."""
    return made_of.get("tokens_sha256") or made_of["dataset"]


def move_aside(out_dir):
    """Rename what an earlier run left in the folder, and say how many earlier runs there are beside it."""
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
        say(f"RESUME=True goes on from the checkpoint in {run.out_dir}: INIT_FROM has no effect")
        return
    folder = find_model(folders)
    saved, tokenizer = read_model(folder)
    if saved["rung"] != run.name:
        raise UserError(f"INIT_FROM={folder} holds a model of {saved['rung']}.py, and this is {run.name}.py")
    h, weights, shape = run.constants, saved["model"], saved["hyperparameters"]
    positions, length = weights.get("position_embedding.weight"), h["BLOCK_SIZE"]
    may_differ = ("VOCABULARY", *(("BLOCK_SIZE",) if positions is None or length < len(positions) else ()))
    differ = [f"{k}={v}" for k, v in shape.items() if k in SHAPE and k not in may_differ and v != h[k]]
    if differ:
        raise UserError(f"INIT_FROM={folder} holds a model of another shape; set {' '.join(differ)}")
    if tokenizer.fingerprint != run.tokens["train"].fingerprint:
        vocabulary = shlex.quote(str(folder / "vocabulary.json"))
        raise UserError(f"INIT_FROM={folder} holds a model with another vocabulary than this text; prepare the "
                        f"text with it, python data/prepare.py --from TEXT --to DIR --vocabulary {vocabulary}, and "
                        "set DATA=DIR")  # fmt: skip
    if positions is not None and length < len(positions):
        weights["position_embedding.weight"] = positions[:length]
        say(f"of the {len(positions)} positions that the model has learned, the first {length} are kept")
    set_weights(run.model, weights, folder / "model.pt")
    say(f"starting from the weights in {folder}")


def save_checkpoint(run):
    """What `Run.checkpoint` does. A kill at any moment leaves a whole checkpoint."""
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
    """Put the run in the state of its last checkpoint, or of the one before if that is damaged. Raises OSError if it
    cannot be read, ValueError if all are damaged or it is of another run."""
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
            say(f"{path} is damaged or cut short; going on from the checkpoint before it")
    newest = run.out_dir / "checkpoint.pt"
    run.damaged = newest if path.name == "checkpoint_before.pt" else None
    if path.name == "checkpoint_new.pt":
        barrier()  # all have read it
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
            group.update(values)  # rates and decay are those of the constants
    run.state = SimpleNamespace(step=saved["step"], best=saved["best"], bad_evals=saved["bad_evals"])
    run.records, run.seconds, run.losses = saved["log"], saved["seconds"], saved["losses"].tolist()
    say(f"going on from step {run.state.step:,}")


def check_same_run(run, saved):
    """Raises ValueError if the text, the tokenizer, or constants that decide model or batches, are others than
    those of the checkpoint; says which other constants have changed."""
    before, now, train = saved["hyperparameters"], run.constants, run.tokens["train"]
    changed = differing(before, now)
    differ = [text for name, text in changed.items() if name not in MAY_CHANGE_WITH_A_LINE]
    if _text(saved) != _text({"dataset": train.dataset, **run.identity}):
        same = " of another content, under the same name" if saved["dataset"] == train.dataset else ""
        differ.append(f"the text was {saved['dataset']} and is {train.dataset}{same}")
    if saved["fingerprint"] != train.fingerprint:
        differ.append(f"the tokenizer was {saved['fingerprint']} and is {train.fingerprint}")
    if differ:
        raise UserError(f"to resume the run in {run.out_dir}, set back what differs: {'; '.join(differ)}")
    if saved["step"] > now["MAX_STEPS"]:
        raise UserError(f"the run in {run.out_dir} has made {saved['step']} steps; MAX_STEPS={now['MAX_STEPS']} "
                        "must not be less")  # fmt: skip
    if changed:
        say(f"going on with other constants: {'; '.join(changed.values())}")
    if now["DEVICE"] == before["DEVICE"] and now.get("DTYPE") == before.get("DTYPE") == "auto":
        distributed.auto_dtypes[run.device] = saved["dtype"]
