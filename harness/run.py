"""A training run in its folder: checkpoints, resume, logs, signals."""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import kernels
from data import vocabulary_file
from harness import distributed
from harness.cli import check_constants, constants, first_line, say
from harness.distributed import all_reduce, barrier, peak_memory_mb, rank, resolve_dtype, world_size
from harness.files import Locked, atomic_write, file_lock
from harness.models import SHAPE, find_model, read_file, read_model, set_weights
from harness.report import Progress, draw_curves, last_lines

DIVERGED = 1e12  # nats from which on a loss counts as not finite: no model comes back from there
RUN_FILES = ("checkpoint.pt", "checkpoint_before.pt", "checkpoint_new.pt", "log.jsonl", "steps.csv", "summary.json",
             "sample.txt", "model.pt", "vocabulary.json", "loss.png")  # fmt: skip
STEP_COLUMNS = ("step", "tokens_seen", "loss", "learning_rate", "grad_norm", "tokens_per_second")  # of steps.csv
# What a resumed run may change. In silence: what only says how to run. With a line: what the next steps depend on. The
# rest, shape and order of the data, must stay.
MAY_CHANGE = ("EVAL_INTERVAL", "PATIENCE", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "STRIDE", "EXTRAPOLATION",
              "DEVICE", "DATA", "OUT_DIR", "RESUME", "INIT_FROM", "PROMPT")  # fmt: skip
MAY_CHANGE_WITH_A_LINE = ("MAX_STEPS", "LEARNING_RATE", "LEARNING_RATE_ADAMW", "WARMUP_STEPS", "COOLDOWN", "MOMENTUM",
                          "WEIGHT_DECAY", "GRAD_CLIP", "DROPOUT", "DTYPE", "COMPILE", "MICRO_BATCH_SIZE",
                          "CHUNK_SIZE")  # fmt: skip


def differing(before, now, but=()):
    """The constants, {name: "NAME was ... and is ..."}, in which two runs differ and that may decide a loss."""
    names = sorted({*before, *now} - {*MAY_CHANGE, *but})
    return {k: f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in names if before.get(k) != now.get(k)}


def same_training(summary, other, but=()):
    """Whether two summaries are of the same text and of constants that differ at most in those of `but`."""
    same_text = summary["dataset"] == other["dataset"]
    return same_text and not differing(summary["hyperparameters"], other["hyperparameters"], but)


class Run:
    """One training run of a rung (its globals) in its folder OUT_DIR.

    As a context it holds the lock of its folder, and puts back what it changes in the process.
    """

    def __init__(self, rung):
        check_constants(rung)
        import torch._dynamo  # noqa: F401 - torch.optim loads it when first used: it counts as a library

        self.rung, self.name, self.constants = rung, Path(rung["__file__"]).stem, constants(rung)
        self.device, self.out_dir = self.constants["DEVICE"], Path(self.constants["OUT_DIR"])
        self.import_mb = peak_memory_mb(self.device)
        self.state = SimpleNamespace(step=0, best=math.inf, bad_evals=0)
        self.records, self.losses, self.seconds = [], [], 0.0  # evaluations, losses since the last, of training
        self.before = self.progress = self.compiled = None  # before: what a checkpoint says of the run until then
        self.signals, self.handlers, self.stack = [], {}, contextlib.ExitStack()

    def __enter__(self):
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            if rank() == 0:
                self.stack.enter_context(file_lock(self.out_dir / "lock"))
        except FileExistsError:
            raise ValueError(f"OUT_DIR={self.out_dir} is a file; name a folder") from None
        except Locked as error:
            raise ValueError(f"process {error.holder} is training in {self.out_dir}; wait for it, stop it, or choose "
                             "another OUT_DIR") from None  # fmt: skip
        except OSError as error:
            raise ValueError(f"OUT_DIR={self.out_dir} cannot be used: {error.strerror or error}") from None
        self.stack.enter_context(distributed.deterministic(self.device))
        return self

    def __exit__(self, kind, error, traceback):
        if self.progress is not None:
            self.progress.bar.close()
        self._restore_signals()
        self.stack.close()
        if kind is None:
            names = sorted(path.name for path in self.out_dir.glob("[!cw]*.*"))  # no checkpoints, nothing half written
            say(f"results in {self.out_dir}: {', '.join(names)}")

    # -- Beginning and resuming ----------------------------------------------------------------------------

    def begin(self, model, tokens):
        """Say what is trained on which text: `tokens` as `load_tokens` gives them."""
        h = self.constants
        self.rung["get_batch"](tokens["train"].ids, 0)  # what makes no batch is refused before a run is moved aside
        self.model, self.tokens, self.n_params = model, tokens, sum(p.numel() for p in model.parameters())
        self.step_tokens = h["BATCH_SIZE"] * h["BLOCK_SIZE"]
        self.eval_interval = max(1, min(h["EVAL_INTERVAL"], len(tokens["train"]) // self.step_tokens))
        self.label = f"{self.name}, {h['POSITION']}" if "POSITION" in h else self.name
        say(f"{self.label} on {tokens['train'].dataset}: {self.n_params:,} parameters, {len(tokens['train']):,} "
            f"training tokens, {h['MAX_STEPS']:,} steps, {self.device}, results in {self.out_dir}")  # fmt: skip
        if self.device != "cpu":
            say(f"on {self.device} two runs of one seed differ by rounding")
        self.vocabulary = vocabulary_file(h["VOCABULARY"], h["DATA"]).read_bytes()  # the run keeps its own copy

    def init_from(self, *folders):
        """Start from the weights of the finished run in the first of `folders` that holds one, unless a checkpoint is
        there to resume. Raises ValueError if its model has another shape or vocabulary."""
        if self.constants["RESUME"] and any(self.out_dir.glob("checkpoint*.pt")):
            return
        folder = find_model(folders)
        saved, tokenizer = read_model(folder)
        if saved["rung"] != self.name:
            raise ValueError(f"INIT_FROM={folder} holds a model of {saved['rung']}.py, and this is {self.name}.py")
        may_differ = ("VOCABULARY",) if "position_embedding.weight" in saved["model"] else ("VOCABULARY", "BLOCK_SIZE")
        differ = [f"{k}={v}" for k, v in saved["hyperparameters"].items()
                  if k in SHAPE and k not in may_differ and v != self.constants[k]]  # fmt: skip
        if differ:
            raise ValueError(f"INIT_FROM={folder} holds a model of another shape; set {' '.join(differ)}")
        if tokenizer.fingerprint != self.tokens["train"].fingerprint:
            raise ValueError(f"INIT_FROM={folder} holds a model with another vocabulary than this text; prepare the "
                             f"text with --vocabulary {folder / 'vocabulary.json'}")  # fmt: skip
        set_weights(self.model, saved["model"], folder / "model.pt")
        say(f"starting from the weights in {folder}")

    def resume(self, model, *optimizers):
        """With RESUME=True load the last checkpoint, if there is one. Else what an earlier run left in the folder is
        moved aside. Returns the state: step, best loss, evaluations without a better one (bad_evals)."""
        self.optimizers, h = optimizers, self.constants
        if h["RESUME"] and any(self.out_dir.glob("checkpoint*.pt")):
            self._load_checkpoint()
        else:
            if h["RESUME"]:
                say(f"there is no checkpoint in {self.out_dir} yet: RESUME=True begins a run")
            barrier()
            self._move_aside()
            barrier()
        self._catch_signals()
        self._open_steps()
        self.progress = Progress(self.state.step, h["MAX_STEPS"], self.step_tokens, self.eval_interval,
                                 len(self.tokens["val"]))  # fmt: skip
        self.step_began = time.perf_counter()
        return self.state

    def _open_steps(self):
        """Begin steps.csv, or keep what it holds of the steps up to here."""
        if rank():
            return
        path, lines = self.out_dir / "steps.csv", []
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: it begins anew
            lines = path.read_text(encoding="utf-8").splitlines()[1:]
            lines = [line for line in lines if int(line.split(",")[0]) <= self.state.step and line.count(",") == 5]
        self.write("steps.csv", "".join(line + "\n" for line in (",".join(STEP_COLUMNS), *lines)))
        self.steps = self.stack.enter_context(open(path, "a", encoding="utf-8", buffering=1))

    def _move_aside(self):
        """Rename what an earlier run left in the folder, and say how many earlier runs there are beside it."""
        if rank():
            return
        named = self.out_dir.name not in ("", "..") and not self.out_dir.is_symlink()
        folder = self.out_dir if named else self.out_dir.resolve()
        there = [folder / name for name in RUN_FILES if (folder / name).exists()]
        if not there:
            return
        numbers = {int(path.suffix[1:]): path for path in folder.parent.iterdir()
                   if path.suffix[1:].isdecimal() and path.stem == folder.name}  # fmt: skip
        aside = folder.with_name(f"{folder.name}.{max(numbers, default=0) + 1}")
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
        runs = [aside, *(path for path in numbers.values() if any((path / name).exists() for name in RUN_FILES))]
        megabytes = sum(path.stat().st_size for run in runs for path in run.rglob("*") if path.is_file()) / 1e6
        count = "1 earlier run takes" if len(runs) == 1 else f"{len(runs)} earlier runs take"
        say(f"the earlier run in {folder} is now in {aside}; {count} {megabytes:,.0f} MB")

    def _load_checkpoint(self):
        keys = ("model", "optimizers", "step", "best", "bad_evals", "log", "losses", "seconds", "rates", "dataset",
                "fingerprint", "hyperparameters", "dtype", "compiled", "made_by")  # fmt: skip
        path, before = self.out_dir / "checkpoint.pt", self.out_dir / "checkpoint_before.pt"
        try:
            saved = read_file(path, keys)
        except (OSError, ValueError) as error:
            if not before.exists():
                raise
            say(f"{error}; going on from the checkpoint before it")
            path, saved = before, read_file(before, keys)
        self.before = {key: saved[key] for key in ("hyperparameters", "rates", "compiled")}
        self._check_same_run(saved)
        set_weights(self.model, saved["model"], path)
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, now):
                group.update(values)  # rates and decay are those of the constants
        self.state = SimpleNamespace(step=saved["step"], best=saved["best"], bad_evals=saved["bad_evals"])
        self.records, self.seconds, self.losses = saved["log"], saved["seconds"], saved["losses"].tolist()
        say(f"going on from step {self.state.step:,}")

    def _check_same_run(self, saved):
        """Raises ValueError if the text, the tokenizer, or constants that decide model or batches, are others than
        those of the checkpoint; says which other constants have changed."""
        before, now, tokens = saved["hyperparameters"], self.constants, self.tokens["train"]
        changed = differing(before, now)
        differ = [text for name, text in changed.items() if name not in MAY_CHANGE_WITH_A_LINE]
        if saved["dataset"] != tokens.dataset:
            differ.append(f"the text was {saved['dataset']} and is {tokens.dataset}")
        if saved["fingerprint"] != tokens.fingerprint:
            differ.append(f"the tokenizer was {saved['fingerprint']} and is {tokens.fingerprint}")
        if differ:
            raise ValueError(f"to resume the run in {self.out_dir}, set back what differs: {'; '.join(differ)}")
        if saved["step"] > now["MAX_STEPS"]:
            raise ValueError(f"the run in {self.out_dir} has made {saved['step']} steps; MAX_STEPS={now['MAX_STEPS']} "
                             "must not be less")  # fmt: skip
        if changed:
            say(f"going on with other constants: {'; '.join(changed.values())}")
        if now["DEVICE"] == before["DEVICE"] and now.get("DTYPE") == before.get("DTYPE") == "auto":
            distributed.auto_dtypes[self.device] = saved["dtype"]
        elif saved["dtype"] != self.dtype:
            say(f"matrix products were {saved['dtype']} and are {self.dtype} from here on")
        if saved["made_by"] != self._made_by():
            say(f"begun on {saved['made_by']}; goes on with {self._made_by()}: losses may differ by rounding")

    def _made_by(self):
        return f"torch {torch.__version__}, {self.device}, {torch.get_num_threads()} threads, {world_size()} processes"

    @property
    def dtype(self):
        """Name of the type that matrix products use."""
        return resolve_dtype(self.device, self.constants.get("DTYPE", "float32"))

    def compile(self, model, batch):
        """The model as it is trained: compiled if COMPILE says so and it works with `batch`, (x, y), else with a line
        that says why not; shared by all processes."""
        compiled, self.compiled = model, False
        if self.constants["COMPILE"]:
            say("compiling the model, which takes up to a minute (COMPILE=False starts at once)")
            try:
                compiled = distributed.share(torch.compile(model))
                with distributed.autocast(self.device, self.constants["DTYPE"]):
                    compiled(*batch).backward()
                model.zero_grad()
                self.compiled = True
            except Exception as error:  # a missing compiler shows in many ways
                say(f"training without torch.compile: {first_line(error)}")
        if self.before and self.before["compiled"] != self.compiled:
            how = "with" if self.before["compiled"] else "without"
            say(f"the checkpoint is of a model {how} torch.compile: losses may differ by rounding")
        self.step_began = time.perf_counter()
        return compiled if self.compiled else distributed.share(model)

    # -- While it trains -----------------------------------------------------------------------------------

    def evaluation_due(self, step):
        """Whether the loop should evaluate before this step. Training time does not pass until the next step begins.
        Before the first step only weights that were trained already are worth it."""
        due = step % self.eval_interval == 0 or step == self.constants["MAX_STEPS"]
        due = due and (step > 0 or self.constants.get("INIT_FROM") is not None)
        self.evaluation_began = time.perf_counter()
        return due and not (self.records and self.records[-1]["step"] == step)

    def save_best(self):
        """Keep the weights as they are now in model.pt, with the constants that give the model its shape, and the
        vocabulary beside them."""
        content = {"rung": self.name, "model": self.model.state_dict(), "hyperparameters": self.constants,
                   "fingerprint": self.tokens["train"].fingerprint,
                   "start": list(self.tokens["train"].start)}  # fmt: skip
        if not (self.out_dir / "vocabulary.json").exists():
            self.write("vocabulary.json", self.vocabulary)
        self.write("model.pt", content)

    def log(self, step, metrics):
        """Note an evaluation of the validation split: on the screen, in log.jsonl, and in a checkpoint."""
        if not metrics["loss"] < DIVERGED:
            raise ValueError(self._not_finite("validation loss", metrics["loss"], step))
        train_loss = torch.tensor(self.losses).mean().item() if self.losses else None
        self.records.append({"step": step, "tokens_seen": step * self.step_tokens, "seconds": self.seconds,
                             "train_loss": train_loss, **{f"val_{k}": v for k, v in metrics.items()}})  # fmt: skip
        self.progress.say(f"step {step:5}  {self.seconds:5.0f} s  training loss "
                          f"{f'{train_loss:.4f}' if self.losses else '-':>6}  val loss {metrics['loss']:.4f}  val bpb "
                          f"{metrics['bpb']:.4f}")  # fmt: skip
        self.losses = []
        self.write("log.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        self.checkpoint()
        kernels.trim_memory()
        if world_size() == 1:  # several processes agree on it in a step
            self._stop_if(len(self.signals))
        self.step_began = time.perf_counter()
        self.progress.evaluation_seconds = self.step_began - self.evaluation_began

    def checkpoint(self):
        """Save all that it takes to go on as checkpoint.pt; the one that was there is kept as checkpoint_before.pt."""
        if rank():
            return
        new, newest = self.out_dir / "checkpoint_new.pt", self.out_dir / "checkpoint.pt"
        self.write(new.name, {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            **vars(self.state), "log": self.records, "losses": torch.tensor(self.losses), "seconds": self.seconds,
            "rates": self._rates(), "dataset": self.tokens["train"].dataset,
            "fingerprint": self.tokens["train"].fingerprint, "hyperparameters": self.constants, "dtype": self.dtype,
            "compiled": self.compiled, "made_by": self._made_by(),
        })  # fmt: skip
        if newest.exists():
            newest.replace(self.out_dir / "checkpoint_before.pt")
        new.replace(newest)

    def _rates(self):
        return [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, loss, grad_norm):
        """Count a step: its mean loss over the windows of this process, and the norm of its gradient. Raises ValueError
        if the loss is not finite; after Ctrl-C or SIGTERM saves a checkpoint and ends the program with exit code 130 or
        143."""
        loss, grad_norm = (x.item() if torch.is_tensor(x) else x for x in (loss, grad_norm))
        self.state.step += 1
        loss, stop = all_reduce(torch.tensor([loss, len(self.signals)], dtype=torch.double)).tolist()
        loss, now = loss / world_size(), time.perf_counter()
        seconds, self.step_began = now - self.step_began, now
        self.seconds += seconds
        if rank() == 0:
            self._write_step(loss, grad_norm, seconds)
        if not loss < DIVERGED:
            raise ValueError(self._not_finite("loss", loss, self.state.step - 1))
        self.losses.append(loss)
        if self.before and self.state.step == self.progress.first + 1:
            then, here, max_steps = self.before["rates"][0], self._rates()[0], self.constants["MAX_STEPS"]
            if self.before["hyperparameters"]["MAX_STEPS"] != max_steps and then != here:
                say(f"MAX_STEPS decides the schedule: the learning rate goes from {then:.3g} to {here:.3g} here. A run "
                    f"with MAX_STEPS={max_steps} from the start ends elsewhere")  # fmt: skip
        self.progress.update(loss, seconds)
        self._stop_if(stop)

    def _write_step(self, loss, grad_norm, seconds):
        try:
            self.steps.write(f"{self.state.step},{self.state.step * self.step_tokens},{loss:.6g},{self._rates()[0]:.6g}"
                             f",{grad_norm:.6g},{self.step_tokens / max(seconds, 1e-9):.0f}\n")  # fmt: skip
        except OSError as error:
            raise OSError(f"cannot write {self.out_dir / 'steps.csv'}: {error.strerror}; make room, and RESUME=True "
                          "goes on from the last checkpoint") from None  # fmt: skip

    def _not_finite(self, what, loss, step):
        """What to say of a loss that is not finite, and what the user can do."""
        rates = [name for name in self.constants if name.startswith("LEARNING_RATE")]
        rates += ["WEIGHT_DECAY"] if self.constants.get("WEIGHT_DECAY", 0) > 1 else []
        values = ", ".join(f"{name}={self.constants[name]:g}" for name in rates)
        advice = [f"lower {' or '.join(rates)}"]
        advice += ["raise WARMUP_STEPS"] if "WARMUP_STEPS" in self.constants else []
        advice += ["set DTYPE=float32"] if self.dtype != "float32" else []
        kept = f" and add RESUME=True, which goes on from step {self.records[-1]['step']}" if self.records else ""
        return f"the {what} is {loss} at step {step} ({values}); {', or '.join(advice)}{kept}"

    def _catch_signals(self):
        """From now on Ctrl-C and SIGTERM let the step be finished; a second one ends the program at once."""

        def receive(number, frame):
            if self.signals:
                raise KeyboardInterrupt
            self.signals.append(number)

        if threading.current_thread() is threading.main_thread() and not self.handlers:  # others receive no signals
            self.handlers = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}

    def _restore_signals(self):
        if world_size() == 1:  # else torchrun may be about to stop this process, which has to say first what happened
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.handlers = {}

    def _stop_if(self, stop):
        if not stop:
            return
        if not (self.records and self.records[-1]["step"] == self.state.step):  # else it has just been saved
            self.checkpoint()
        self.progress.bar.close()
        if rank() == 0:
            say(f"{self.name}.py: stopped after {self.state.step} steps; RESUME=True, beside the same constants, goes "
                "on from there", error=True)  # fmt: skip
        sys.exit(128 + (self.signals or [signal.SIGTERM])[0])

    # -- At the end ----------------------------------------------------------------------------------------

    def load_best(self, model):
        """Training is over: load the weights of the best evaluation. Returns its metrics."""
        self.progress.bar.close()
        self._restore_signals()
        if self.state.step < self.constants["MAX_STEPS"]:
            say(f"stopped early: no better validation loss in {self.constants['PATIENCE']} evaluations")
        self.peak_mb = peak_memory_mb(self.device)
        barrier()  # the first process has written the best weights
        model.load_state_dict(read_file(self.out_dir / "model.pt", ("model",))["model"])
        self.best = min(self.records, key=lambda record: record["val_loss"])
        return {k.removeprefix("val_"): v for k, v in self.best.items() if k.startswith("val_")}

    def finish(self, sample, **results):
        """Write summary.json, sample.txt and loss.png, then say how it ended. `results` are added to the summary.
        Returns the summary, a dict."""
        last, train, h = self.records[-1], self.tokens["train"], self.constants
        summary = {
            "rung": self.name, "dataset": train.dataset, "tokenizer": h["VOCABULARY"], "seed": h["SEED"],
            "device": self.device, "processes": world_size(), "dtype": self.dtype, "n_params": self.n_params,
            "steps": last["step"], "tokens_seen": last["tokens_seen"],
            "bytes_seen": round(last["tokens_seen"] * train.n_bytes / len(train)),
            "epochs": last["tokens_seen"] / len(train), "train_seconds": last["seconds"],
            "tokens_per_second": last["tokens_seen"] / last["seconds"], "import_memory_mb": self.import_mb,
            "peak_memory_mb": self.peak_mb, **{k: v for k, v in self.best.items() if k.startswith("val_")},
            "best_step": self.best["step"], **results, "hyperparameters": h,
        }  # fmt: skip
        self.write("summary.json", json.dumps(summary, indent=1) + "\n")
        self.write("sample.txt", sample)
        if rank() == 0:
            seen = [record["tokens_seen"] / 1e6 for record in self.records]
            train_loss = [(x, record["train_loss"]) for x, record in zip(seen, self.records)]
            draw_curves(self.out_dir / "loss.png", {
                "training (mean since the last point)": [(x, y) for x, y in train_loss if y is not None],
                "validation": [(x, record["val_loss"]) for x, record in zip(seen, self.records)],
            }, xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title=self.label)  # fmt: skip
        last_lines(summary, self.label, sample)
        return summary

    def write(self, name, content):
        """Write the file `name` of the run: a text, bytes, or what torch.save writes. Of several processes the first
        one does it."""
        if rank():
            return
        if isinstance(content, str):
            content = content.encode("utf-8", "backslashreplace")
        save = (lambda file: file.write(content)) if isinstance(content, bytes) else (
            lambda file: torch.save(content, file))  # fmt: skip
        atomic_write(self.out_dir / name, save)
