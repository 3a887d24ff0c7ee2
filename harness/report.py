"""What a run reports: progress during training, its summary, and pictures."""

import contextlib
import io
import math
import sys
import time

from tqdm import tqdm

from harness.cli import first_line, say
from harness.distributed import rank, world_size
from harness.errors import FileError
from harness.files import atomic_write
from harness.pictures import NUMBERS, STYLE, curve

PROGRESS_SECONDS = 30  # between two progress lines if there is no terminal for a bar
STEP_COLUMNS = "step,tokens_seen,loss,learning_rate,grad_norm,tokens_per_second,mfu"  # of steps.csv


def duration(seconds):
    """A duration in words, such as "23 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 5400 else (
        f"{seconds / 3600:.1f} h")  # fmt: skip


class Progress:
    """The progress bar of a run, or progress lines if there is no terminal; and once, how long the run will take."""

    def __init__(self, run):
        self.first, self.step, self.max_steps = run.state.step, run.state.step, run.constants["MAX_STEPS"]
        self.step_tokens, self.eval_interval = run.step_tokens, run.eval_interval
        self.val_tokens = len(run.tokens["val"])
        self.seconds = self.evaluation_seconds = 0.0  # of the steps so far, of the last evaluation
        self.estimated, self.last_line = False, time.perf_counter()
        terminal = sys.stderr.isatty() and not rank()
        self.print_lines = not (sys.stdout.isatty() and sys.stderr.isatty())
        self.bar = tqdm(total=self.max_steps, initial=self.step, desc="training", unit="step", disable=not terminal)

    def say(self, text):
        """Print a line above the bar."""
        with self.bar.external_write_mode():
            say(text)

    def update(self, loss, seconds):
        """Count a step that took `seconds`."""
        self.step, self.seconds, now = self.step + 1, self.seconds + seconds, time.perf_counter()
        done, left = self.step - self.first, self.max_steps - self.step
        step_seconds = self.seconds / done
        rate = self.step_tokens / step_seconds
        evaluation = self.evaluation_seconds or self.val_tokens / rate / 3  # forward: a third of a step's work
        seconds_left = step_seconds * left + evaluation * math.ceil(left / self.eval_interval)
        if not self.estimated and left and (done >= 10 or self.seconds > 10):
            self.estimated = True
            self.say(f"the remaining {left:,} steps will take about {duration(seconds_left)}")
        self.bar.update()
        if done % 10 == 1:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        if self.print_lines and now - self.last_line >= PROGRESS_SECONDS:
            self.last_line = now
            say(f"step {self.step:5} of {self.max_steps:,}  loss {loss:.3f}  {rate:,.0f} tokens/s"
                f"  about {duration(seconds_left)} left")  # fmt: skip


def read_steps(path, step):
    """The rows of steps.csv up to `step`, with empty cells for columns that older versions did not write; none if the
    file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        head, *rows = path.read_text(encoding="utf-8").splitlines()
        empty = "," * (STEP_COLUMNS.count(",") - head.count(","))
        return [row + empty for row in rows if int(row.split(",")[0]) <= step and row.count(",") == head.count(",")]
    return []


def mfu(run, seconds):
    """Model FLOPs utilization of a step, as a cell of steps.csv; empty if the FLOPs or the peak are unknown."""
    if run.token_flops is None or run.peak_flops is None:
        return ""
    return f"{run.token_flops * run.step_tokens / (seconds * run.peak_flops * world_size()):.4g}"


def write_step(run, step, loss, grad_norm, seconds):
    """Add the row of a step to steps.csv."""
    seconds = max(seconds, 1e-9)
    try:
        run.steps.write(f"{step.step},{step.step * run.step_tokens},{loss:.6g},{step.rate:.6g},"
                        f"{grad_norm:.6g},{run.step_tokens / seconds:.0f},{mfu(run, seconds)}\n")  # fmt: skip
    except OSError as error:
        raise FileError(f"cannot write {run.out_dir / 'steps.csv'}: {error.strerror}; make room, then continue from "
                        "the last checkpoint with RESUME=True") from None  # fmt: skip


def not_finite(run, what, loss, step):
    """The message about a loss that is not finite, with what the user can do."""
    h, records = run.constants, run.records
    rates = [name for name in h if name.startswith("LEARNING_RATE") or name == "WEIGHT_DECAY" and h[name] > 1]
    advice = [f"lower {' or '.join(rates)}"]
    advice += ["raise WARMUP_STEPS"] if "WARMUP_STEPS" in h else []
    advice += ["set DTYPE=float32"] if run.dtype != "float32" else []
    kept = f" and add RESUME=True to continue from step {records[-1]['step']}" if records else ""
    values = ", ".join(f"{name}={h[name]:g}" for name in rates)
    return f"the {what} is {loss} at step {step} ({values}); {', or '.join(advice)}{kept}"


def changes(run, made_by, rate):
    """Say what differs from the run before the checkpoint, though it is the same run: rounding, and the schedule."""
    before, max_steps = run.before, run.constants["MAX_STEPS"]
    if before["made_by"] != made_by:
        say(f"the run began with {before['made_by']} and continues with {made_by}: losses may differ by rounding")
    if before["hyperparameters"]["MAX_STEPS"] != max_steps and before["rates"][0] != rate:
        say(f"MAX_STEPS determines the schedule: the learning rate jumps from {before['rates'][0]:.3g} to {rate:.3g}, "
            f"so the run will not end like one with MAX_STEPS={max_steps} from the start")  # fmt: skip


def summarize(run, results):
    """The summary of a finished run: what identifies it, its metrics, `results`, and its constants."""
    train, h, last = run.tokens["train"], run.constants, run.records[-1]
    best = min(run.records, key=lambda record: record["val_loss"])
    return {
        "rung": run.name, **run.identity, "dataset": train.dataset, "tokenizer": h["VOCABULARY"], "seed": h["SEED"],
        "device": run.device, "processes": world_size(), "dtype": run.dtype, "n_params": run.n_params,
        "steps": last["step"], "tokens_seen": last["tokens_seen"],
        "bytes_seen": round(last["tokens_seen"] * train.n_bytes / len(train)),
        "epochs": last["tokens_seen"] / len(train), "train_seconds": last["seconds"],
        "tokens_per_second": last["tokens_seen"] / last["seconds"], "import_memory_mb": run.import_mb,
        "peak_memory_mb": run.peak_mb, **{k: v for k, v in best.items() if k.startswith("val_")},
        "best_step": best["step"], **results, "hyperparameters": h,
    }  # fmt: skip


def evaluation_line(record):
    """What is printed of an evaluation, a record of log.jsonl."""
    train_loss = "-" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
    return (f"step {record['step']:5}  {record['seconds']:5.0f} s  training loss {train_loss:>6}  val loss "
            f"{record['val_loss']:.4f}  val bpb {record['val_bpb']:.4f}")  # fmt: skip


def stopped_early(constants):
    """What is printed of a run that has ended before MAX_STEPS."""
    return f"stopped early: no better validation loss in {constants['PATIENCE']} evaluations"


def last_lines(summary, label, sample):
    """Print the sample and the metrics of a finished run."""
    say(f"--- sample ---\n{sample}\n--------------")
    words = summary["val_word_ppl"]  # None if white space does not separate words
    words = f"word perplexity {words:,.1f}, " if words is not None else ""
    say(f"{label} on {summary['dataset']}: val bpb {summary['val_bpb']:.4f}, {words}{summary['n_params']:,} "
        f"parameters, {summary['train_seconds']:.0f} s, peak memory {summary['peak_memory_mb']:,.0f} MB")
    metrics = [key for key in summary if key.startswith("val_") and f"{key}_sliding" in summary]
    for title, end in (("windows side by side", ""), ("overlapping windows", "_sliding")) if metrics else ():
        values = {key.removeprefix("val_"): summary[key + end] for key in metrics}
        say(f"validation, {title}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None))


def draw_losses(run):
    """Draw the losses of the run as loss.png. The training loss is a mean of steps, with dropout, so it lags behind."""
    curves = {"training (mean since the last point)": "train_loss", "validation": "val_loss"}
    points = {label: [(record["tokens_seen"] / 1e6, record[key]) for record in run.records if record[key] is not None]
              for label, key in curves.items()}  # fmt: skip
    draw_curves(run.out_dir / "loss.png", points, "tokens seen (millions)", "loss (nats per token)",
                run.label.replace(", ", " with "))  # fmt: skip


def draw_curves(path, curves, xlabel, ylabel, title, log_x=False, mark=None):
    """Draw `curves` of losses, {label: [(x, y), ...]}, as the picture `path`; `mark`: a place on the x-axis. A picture
    that fails costs a line, not the run."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        png = io.BytesIO()
        with rc_context(STYLE):
            figure = Figure(figsize=(7, 4.5))
            axes = figure.subplots()
            for k, (label, points) in enumerate(curves.items()):
                axes.plot(*zip(*points), **curve(label if label in NUMBERS else k), label=label)
            if log_x:
                places = sorted({x for points in curves.values() for x, _ in points})
                axes.set_xscale("log", base=2)
                axes.set_xticks(places, [f"{x:,}" for x in places])
            if mark is not None:
                axes.axvline(mark, color="grey", linestyle=":", linewidth=2, label="training length")
            axes.set(xlabel=xlabel, ylabel=f"{ylabel}, lower is better", title=title)
            axes.legend()
            figure.savefig(png, dpi=120, format="png")
        atomic_write(path, lambda file: file.write(png.getvalue()))
    except Exception as error:  # matplotlib is missing, or cannot draw what it was given
        say(f"{path.name} was not drawn: {first_line(error)}")
