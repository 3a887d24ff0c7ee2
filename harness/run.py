"""A training run in its folder: checkpoints, resume, logs, signals."""

import contextlib
import json
import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import kernels
from data import vocabulary_file
from harness import distributed, flops, report, signals
from harness.cli import check_constants, constants, first_line, place_in, say
from harness.clock import Clock
from harness.distributed import all_reduce, barrier, peak_memory_mb, rank, world_size
from harness.errors import UserError
from harness.files import Locked, atomic_write, file_lock
from harness.identity import identity
from harness.models import read_file, set_weights
from harness.resume import init_from, load_checkpoint, move_aside, save_checkpoint

DIVERGED = 1e12  # nats: a loss this large counts as not finite, since no model recovers from it


class Run:
    """One training run of a rung (its globals) in its folder OUT_DIR. As a context it holds the lock of the folder, and
    at the end restores the settings of the process that it changed."""

    def __init__(self, rung):
        check_constants(rung)
        import torch._dynamo  # noqa: F401 - torch.optim would load it later: count it as a library

        self.rung, self.name, self.constants = rung, Path(rung["__file__"]).stem, constants(rung)
        self.device, self.out_dir = self.constants["DEVICE"], Path(self.constants["OUT_DIR"])
        self.import_mb = peak_memory_mb(self.device)
        self.state = SimpleNamespace(step=0, best=math.inf, bad_evals=0)
        self.records, self.losses, self.seconds = [], [], 0.0  # evaluations, losses since the last one, training time
        self.before = self.progress = None  # before: from the checkpoint of a resumed run, how it ran until then
        self.damaged = None  # a checkpoint that could not be read
        self.waiting = None  # the last step, while a GPU still computes it
        self.compiled, self.signals, self.stack = False, [], contextlib.ExitStack()
        self.clock, self.caught = Clock(), contextlib.ExitStack()  # caught: restores signal handlers

    def __enter__(self):
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            if rank() == 0:
                self.stack.enter_context(file_lock(self.out_dir / "lock"))
        except FileExistsError:
            raise UserError(f"OUT_DIR={self.out_dir} is a file, but results need a folder; name another") from None
        except Locked as error:
            raise UserError(f"process {error.holder} is training in {self.out_dir}; wait for it, stop it, or choose "
                            "another OUT_DIR") from None  # fmt: skip
        except OSError as error:
            raise UserError(f"OUT_DIR={self.out_dir} cannot be used ({error.strerror or error}); make it writable, or "
                            "name another") from None  # fmt: skip
        self.stack.enter_context(distributed.deterministic(self.device))
        self.stack.enter_context(self.clock)
        return self

    def __exit__(self, kind, error, traceback):
        if self.progress is not None:
            self.progress.bar.close()
        if world_size() == 1:  # torchrun may be about to stop this process, which must first report its error
            self.caught.close()
        self.stack.close()
        if kind is None:
            names = sorted(path.name for path in self.out_dir.glob("[!cw]*.*"))  # no checkpoints or unfinished files
            say(f"results in {self.out_dir}: {', '.join(names)}")

    def write(self, name, content):
        """Write the file `name` of the run: `content` itself if it is a string, else torch.save(content). Only the
        first process writes it."""
        if rank() == 0:
            is_text = isinstance(content, str)
            atomic_write(self.out_dir / name, lambda file: file.write(content.encode("utf-8", "backslashreplace"))
                         if is_text else torch.save(content, file))  # fmt: skip

    # -- Beginning and resuming ----------------------------------------------------------------------------

    def begin(self, model, tokens):
        """Prepare the run and print what is trained on which text. `tokens`: from `load_tokens`."""
        h, train = self.constants, tokens["train"]
        batch = self.rung["get_batch"](train.ids, 0)  # a text too short for it is refused before an earlier run moves
        self.token_flops, self.peak_flops = flops.per_token(model, batch), flops.peak(self.device, self.dtype)
        self.model, self.tokens, self.n_params = model, tokens, sum(p.numel() for p in model.parameters())
        self.identity = identity(self)  # now, since files may change during training
        self.step_tokens = h["BATCH_SIZE"] * h["BLOCK_SIZE"]
        self.eval_interval = max(1, min(h["EVAL_INTERVAL"], len(train) // self.step_tokens))
        self.label = f"{self.name}, {h['POSITION']}" if "POSITION" in h else self.name
        model.fingerprint = train.fingerprint  # of the tokenizer whose ids it reads
        if h.get("SHARD") and not self.sharded:
            say("SHARD=True has no effect with one process: start several with torchrun")
        if self.sharded:
            distributed.shard(model)
        else:
            model.to(self.device)
        say(f"{self.label} on {train.dataset}: {self.n_params:,} parameters, {len(train):,} training tokens, "
            f"{h['MAX_STEPS']:,} steps, {self.device}, results in {self.out_dir}")  # fmt: skip
        if self.device != "cpu":
            say(f"on {self.device}, two runs with the same seed differ by rounding")
        self.vocabulary = vocabulary_file(h["VOCABULARY"], h["DATA"]).read_text("utf-8")  # the run keeps its own copy

    def init_from(self, *folders):
        """Start from the weights of a finished run, in the first of `folders` that holds one, unless there is a
        checkpoint to resume. Raises ValueError if that model has a different shape or vocabulary. If positions are
        learned and windows are shorter now, the first positions are kept."""
        init_from(self, folders)

    def resume(self, model, *optimizers):
        """With RESUME=True, load the last checkpoint if there is one; otherwise move the files of an earlier run out of
        the folder. Returns the state: step, best loss, and evaluations without improvement (bad_evals)."""
        self.optimizers, h, rows = optimizers, self.constants, []
        if h["RESUME"] and any(self.out_dir.glob("checkpoint*.pt")):
            load_checkpoint(self)
            rows = report.read_steps(self.out_dir / "steps.csv", self.state.step)
        else:
            if h["RESUME"]:
                say(f"there is no checkpoint in {self.out_dir} yet: RESUME=True starts a new run")
            barrier()
            if rank() == 0:
                move_aside(self.out_dir)
            barrier()
        self._catch_signals()
        if rank() == 0:
            self.write("steps.csv", "".join(row + "\n" for row in (report.STEP_COLUMNS, *rows)))
            self.steps = self.stack.enter_context(open(self.out_dir / "steps.csv", "a", encoding="utf-8", buffering=1))
        self.progress = report.Progress(self)
        self.step_began = self.clock()
        return self.state

    @property
    def sharded(self):
        """Whether the model's parameters are divided among processes."""
        return bool(self.constants.get("SHARD")) and world_size() > 1

    @property
    def dtype(self):
        """The name of the type for matrix products."""
        return distributed.resolve_dtype(self.device, self.constants.get("DTYPE", "float32"))

    def made_by(self):
        """What decides how sums are rounded."""
        how = (", sharded" if self.sharded else "") + (", compiled" if self.compiled else "")
        return (f"torch {torch.__version__}, {self.device}, {torch.get_num_threads()} threads, {world_size()} "
                f"processes, {self.dtype}{how}")  # fmt: skip

    def compile(self, model, batch):
        """The model to be trained, shared by all processes. With COMPILE=True it is compiled, if that works for
        `batch`, (x, y), in all processes; otherwise a line says why not."""
        trained = model
        if self.constants["COMPILE"]:
            say("compiling the model, which takes up to a minute (COMPILE=False starts at once)")
            problem = ""
            try:  # before the model is shared: a process that fails must not leave others waiting for its gradients
                if self.sharded:  # a pass needs all processes: only test whether there is a compiler
                    torch.compile(lambda x: x.sin() + 1)(batch[0].float())
                else:
                    trained = torch.compile(model)
                    with distributed.autocast(self.device, self.constants["DTYPE"]):
                        trained(*batch).backward()
                    model.zero_grad()
            except Exception as error:  # a missing compiler raises many kinds of errors
                problem = first_line(error) + place_in(self.rung, error)
            self.compiled = distributed.all_agree(not problem)
            if self.compiled and world_size() > 1 and self.device.startswith("cuda"):
                torch._dynamo.reset()  # compile again in parts, so that gradients are exchanged meanwhile
            trained = torch.compile(model) if self.compiled else model
            if not self.compiled:
                say(f"training without torch.compile: {problem or 'it failed in another process'}")
        self.step_began = self.clock()
        return distributed.share(trained)

    # -- During training -----------------------------------------------------------------------------------

    def evaluation_due(self, step):
        """Whether the loop should evaluate before this step. The clock of training stops until the next step begins.
        Before the first step, only weights that are already trained are evaluated."""
        due = step % self.eval_interval == 0 or step == self.constants["MAX_STEPS"]
        due = due and (step > 0 or self.constants.get("INIT_FROM") is not None)
        if due:
            self.read_waiting()
        self.evaluation_began = self.clock()
        return due and not (self.records and self.records[-1]["step"] == step)

    def save_best(self):
        """Save the current weights in model.pt, with the constants that give the model its shape, and the vocabulary
        next to it."""
        if not (self.out_dir / "vocabulary.json").exists():
            self.write("vocabulary.json", self.vocabulary)
        train, model = self.tokens["train"], distributed.whole(self.model.state_dict())
        self.write("model.pt", {"rung": self.name, "model": model, "hyperparameters": self.constants,
                                "fingerprint": train.fingerprint, "start": list(train.start)})  # fmt: skip

    def log(self, step, metrics):
        """Record an evaluation of the validation split: on the screen, in log.jsonl, and in a checkpoint."""
        if not metrics["loss"] < DIVERGED:
            raise UserError(report.not_finite(self, "validation loss", metrics["loss"], step))
        train_loss = torch.tensor(self.losses).mean().item() if self.losses else None
        self.records.append({"step": step, "tokens_seen": step * self.step_tokens, "seconds": self.seconds,
                             "train_loss": train_loss, **{f"val_{k}": v for k, v in metrics.items()}})  # fmt: skip
        self.progress.say(report.evaluation_line(self.records[-1]))
        self.losses = []
        self.write("log.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        self.checkpoint()
        kernels.trim_memory()
        if world_size() == 1:  # several processes agree to stop in `step`
            self._stop_if(len(self.signals))
        self.step_began = self.clock()
        self.progress.evaluation_seconds = self.step_began - self.evaluation_began

    def checkpoint(self):
        """Save all that is needed to continue as checkpoint.pt; the previous one is kept as checkpoint_before.pt."""
        save_checkpoint(self)

    def rates(self):
        """The current learning rates of all parameter groups."""
        return [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, loss, grad_norm):
        """Record a step: its mean loss over the windows of this process and the norm of its gradient, as tensors or
        numbers. Raises UserError if the loss is not finite. After a signal that ends a job, it saves a checkpoint and
        ends the program with exit code 128 + its number.

        Reading a number from a GPU means waiting until the GPU has computed it. There, a step is recorded only when the
        next one has been queued, so that the GPU never waits for the program.
        """
        self.state.step += 1
        before = self.waiting
        numbers = distributed.Numbers(self.device, loss, grad_norm, len(self.signals))
        self.waiting = SimpleNamespace(step=self.state.step, rate=self.rates()[0], numbers=numbers)
        stop = self._count(before) if self.reads_late else self.read_waiting()
        self._stop_if(stop)

    @property
    def reads_late(self):
        """Whether a step is recorded one step late."""
        return self.device.startswith("cuda")

    def read_waiting(self):
        """Record the last step, if that is still to do. Returns how many stop signals have arrived."""
        waiting, self.waiting = self.waiting, None
        return self._count(waiting)

    def _count(self, step):
        if step is None:
            return 0
        loss, grad_norm, stop = step.numbers.read()
        now = self.clock()
        seconds, self.step_began = now - self.step_began, now
        self.seconds += seconds
        if rank() == 0:
            report.write_step(self, step, loss, grad_norm, seconds)
        if not loss < DIVERGED:
            raise UserError(report.not_finite(self, "loss", loss, step.step - 1))
        self.losses.append(loss)
        if step.step == self.progress.first + 1:
            distributed.first_step_is_done()
            if self.before:
                report.changes(self, self.made_by(), step.rate)
        self.progress.update(loss, seconds)
        return stop

    def _catch_signals(self):
        """From now on, a signal that ends a job takes effect after the current step. It ends the program at once if no
        step would be lost, or if it is the second one from the keyboard."""
        first, times = self.state.step, []

        def receive(number, frame):
            times.append(time.monotonic())
            again = number in signals.KEYBOARD and times[-1] - times[0] > signals.TWICE
            if again or self.state.step == first and world_size() == 1:
                signals.raise_stopped(number, frame)
            self.signals.append(number)

        self.caught = signals.catch(receive)

    def _stop_if(self, stop):
        if stop:
            self.read_waiting()
            if not (self.records and self.records[-1]["step"] == self.state.step):  # otherwise it has just been saved
                self.checkpoint()
            self.progress.bar.close()
            if rank() == 0:
                say(f"{self.name}.py: stopped after {self.state.step} steps; RESUME=True with the same constants "
                    "continues from there", error=True)  # fmt: skip
            sys.exit(128 + (self.signals or [signal.SIGTERM])[0])

    # -- At the end ----------------------------------------------------------------------------------------

    def load_best(self, model):
        """After training: load the weights of the best evaluation."""
        self.progress.bar.close()
        self._stop_if(all_reduce(torch.tensor(len(self.signals))).item())  # a signal after the last step
        self.caught.close()
        if self.state.step < self.constants["MAX_STEPS"]:
            say(report.stopped_early(self.constants))
        self.peak_mb = peak_memory_mb(self.device)
        barrier()  # until the first process has written the best weights
        set_weights(model, read_file(self.out_dir / "model.pt", ("model",))["model"], self.out_dir / "model.pt")

    def finish(self, sample, **results):
        """Write summary.json, sample.txt and loss.png, then print the results. `results` are added to the summary.
        Returns the summary, a dict."""
        summary = report.summarize(self, results)
        self.write("summary.json", json.dumps(summary, indent=1) + "\n")
        self.write("sample.txt", sample)
        if rank() == 0:
            report.draw_losses(self)
        report.last_lines(summary, self.label, sample)
        return summary
