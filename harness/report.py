"""What a run tells: progress while it trains, its summary, and pictures."""

import math
import sys
import time

from tqdm import tqdm

from harness.cli import first_line, say
from harness.distributed import rank
from harness.files import atomic_write

PROGRESS_SECONDS = 30  # between two lines of progress where there is no terminal for a bar


def duration(seconds):
    """A time to read, such as "23 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 5400 else (
        f"{seconds / 3600:.1f} h")  # fmt: skip


class Progress:
    """The bar of a training, or lines of progress where there is no terminal; and once, how long it will take."""

    def __init__(self, step, max_steps, step_tokens, eval_interval, val_tokens):
        self.first, self.step, self.max_steps = step, step, max_steps
        self.step_tokens, self.eval_interval, self.val_tokens = step_tokens, eval_interval, val_tokens
        self.seconds = self.evaluation_seconds = 0.0  # of the steps so far, of the last evaluation
        self.estimated, self.last_line = False, time.perf_counter()
        terminal = sys.stderr.isatty() and not rank()
        self.lines = not (sys.stdout.isatty() and sys.stderr.isatty())
        self.bar = tqdm(total=max_steps, initial=step, desc="training", unit="step", disable=not terminal)

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
            self.say(f"{left:,} more steps will take about {duration(seconds_left)}")
        self.bar.update()
        if done % 10 == 1:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        if self.lines and now - self.last_line >= PROGRESS_SECONDS:
            self.last_line = now
            say(f"step {self.step:5} of {self.max_steps:,}  loss {loss:.3f}  {rate:,.0f} tokens/s"
                f"  about {duration(seconds_left)} left")  # fmt: skip


def last_lines(summary, label, sample):
    """Print the sample and the metrics of a finished run."""
    say(f"--- sample ---\n{sample}\n--------------")
    words = summary["val_word_ppl"]  # of a text that has words
    words = f"word perplexity {words:,.1f}, " if words is not None else ""
    say(f"{label} on {summary['dataset']}: val bpb {summary['val_bpb']:.4f}, {words}{summary['n_params']:,} "
        f"parameters, {summary['train_seconds']:.0f} s, peak memory {summary['peak_memory_mb']:,.0f} MB")
    metrics = [key for key in summary if key.startswith("val_") and f"{key}_sliding" in summary]
    for title, end in (("windows side by side", ""), ("windows that overlap", "_sliding")) if metrics else ():
        values = {key.removeprefix("val_"): summary[key + end] for key in metrics}
        say(f"validation, {title}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None))


def draw_curves(path, curves, xlabel, ylabel, title, log_x=False, mark=None):
    """Draw `curves`, {label: [(x, y), ...]}, as the picture `path`; `mark`: a place on the x-axis. A picture that fails
    costs a line, not the run."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for (label, points), marker in zip(curves.items(), "osD^v"):
            axes.plot(*zip(*points), f"{marker}-", label=label)
        if log_x:
            places = sorted({x for points in curves.values() for x, _ in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{x:,}" for x in places])
        if mark is not None:
            axes.axvline(mark, color="grey", linestyle=":", label="training length")
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        atomic_write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    except Exception as error:  # matplotlib is missing, or cannot draw what it was given
        say(f"{path.name} was not drawn: {first_line(error)}")
