"""What docs/course.md shows of runs: how the screen of each rung ends, and what a change of its constants does.

On WikiText-2 the screens are those of the runs in results/runs/. On the bundled sample they are those of the runs in
results/course/, made with `python data/prepare.py --sample`, then `python v0.py` and so on. The changes of v0, v1 and
v2 were tried there as well, each with the command that results/course/changes.json gives; those of the later rungs are
runs of experiments.
"""

import contextlib
import io
import json

from benchmarks.tables import table
from harness import report
from results.plan import ROOT, V4
from results.store import mean_of, read_json, read_text, results_of

RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v3_1", V4)  # v1_1 is shown on WikiText-2 alone
TEXTS = {"wikitext": ROOT / "results" / "runs", "sample": ROOT / "results" / "course"}
CHANGES = ROOT / "results" / "course" / "changes.json"
TRIED = ("v0", "v1", "v2")
EVALUATIONS, SAMPLE_LINES, WIDTH = 3, 3, 118  # what is left of a screen


def screen(*folders):
    """How the screen of a finished run ends, from the files in its folder; the sample is shortened. Of v4 the folders
    of all schemes that were trained; the last one is shown, and the table has all."""
    folder, summaries = folders[-1], [read_json(folder / "summary.json") for folder in folders]
    summary, rung = summaries[-1], summaries[-1]["rung"]
    records = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
    sample = [line[:WIDTH] + " ..." * (len(line) > WIDTH) for line in read_text(folder / "sample.txt").splitlines()
              if line.strip()]  # fmt: skip
    lines = [report.evaluation_line(record) for record in records[-EVALUATIONS:]]
    if summary["steps"] < summary["hyperparameters"]["MAX_STEPS"]:
        lines.append(report.stopped_early(summary["hyperparameters"]))
    if rung == "v0":
        trained, optimum = summary["train_text_loss"], summary["closed_form_loss"]
        lines.append(f"loss on the training text: {trained:.4f} nats per token; the best that any table reaches, from "
                     f"the counts: {optimum:.4f} ({100 * (trained / optimum - 1):+.2f}%)")  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        label = f"{rung}, {summary['position']}" if rung == V4 else rung
        report.last_lines(summary, label, "\n".join(sample[:SAMPLE_LINES] + ["..."] * (len(sample) > SAMPLE_LINES)))
    lines += printed.getvalue().splitlines()
    if rung == V4:
        lines += ["", f"validation bits per byte by length of the window (trained on "
                  f"{summary['hyperparameters']['BLOCK_SIZE']} tokens; lower is better)",
                  "tokens".ljust(12) + "".join(f"{n:>9}" for n in summary["extrapolation_bpb"])]  # fmt: skip
        for one in summaries:
            cells = ("–" if bpb is None else f"{bpb:.4f}" for bpb in one["extrapolation_bpb"].values())
            lines.append(one["position"].ljust(12) + "".join(f"{cell:>9}" for cell in cells))
    return lines


def shown_screen(rung, text):
    folder = TEXTS[text] / rung
    folders = [folder / scheme for scheme in ("alibi", "rope")] if rung == V4 else [folder]
    return "```\n" + "\n".join(screen(*folders)) + "\n```"


def changes(rung):
    """Bits per byte of runs with other constants; the first row is what the others are compared with."""
    if rung in TRIED:
        rows, head = tried(rung), "on the bundled sample, one seed"
    elif rung == "v3":
        rows, head = of_the_search(), "on WikiText-2, half of the ladder's text, one seed"
    elif rung == "v3_1":
        rows, head = of_two_hours(), "of v4 on WikiText-2 after two hours, one seed"
    else:
        rows, head = of_positions(), "on WikiText-2, means of three seeds"
    usual = rows[0][1]
    rows = [[f"`{words}`", f"{bpb:.4f}", f"{bpb - usual:+.3f}" if i else ""] for i, (words, bpb) in enumerate(rows)]
    return table(["constants", f"val bpb {head}", "difference"], rows)


def tried(rung):
    """Runs that were made for the course; the first has the constants that all of them have."""
    found = [(one["command"].split()[1:], one["val_bpb"]) for one in read_json(CHANGES)[rung]]
    usual = found[0][0]
    return [(" ".join(words if words == usual else [word for word in words if word not in usual]), bpb)
            for words, bpb in found]  # fmt: skip


def of_the_search():
    """Runs of the search for v3's recipe that change one constant."""
    found = {}
    for one in read_json(ROOT / "results" / "tried" / "v3_recipe.json"):
        if (one["steps"], one["windows"], one["beta2"]) == (1280, 8, 0.999):
            found[one["rate"], one["warmup"], one["other"]] = one["val_bpb"]
    wanted = {"v3.py MAX_STEPS=1280 WARMUP_STEPS=60": (1.4e-3, 60, ""), "LEARNING_RATE=1e-3": (1e-3, 60, ""),
              "LEARNING_RATE=2e-3": (2e-3, 60, ""), "WARMUP_STEPS=300": (1.4e-3, 300, ""),
              "COOLDOWN=0.3": (1.4e-3, 60, "cool-down 0.3"), "COOLDOWN=0.9": (1.4e-3, 60, "cool-down 0.9")}  # fmt: skip
    return [(words, found[key]) for words, key in wanted.items()]


def of_two_hours():
    """Runs of v4, whose optimizer is v3_1's."""
    wanted = {"v4_alibi_rope.py POSITION=rope DROPOUT=0.1 MAX_STEPS=6928": "dropout 0.1",
              "MOMENTUM=0.95": "momentum 0.95", "LEARNING_RATE=0.02": "rate of Muon 0.02",
              "LEARNING_RATE_ADAMW=0.005": "rate of AdamW 0.005"}  # fmt: skip
    return [(words, mean_of(results_of("two_hours")[name], "val_bpb")) for words, name in wanted.items()]


def of_positions():
    wanted = {"v4_alibi_rope.py POSITION=rope": ("ladder", "v4, rope"), "POSITION=alibi": ("ladder", "v4, alibi"),
              "POSITION=sinusoidal": ("positions", "sinusoidal, 256"), "POSITION=none": ("positions", "none, 256"),
              "BLOCK_SIZE=128 BATCH_SIZE=32 MICRO_BATCH_SIZE=32": ("positions", "rope, 128"),
              "BLOCK_SIZE=512 BATCH_SIZE=8 MICRO_BATCH_SIZE=8": ("positions", "rope, 512")}  # fmt: skip
    return [(words, mean_of(results_of(experiment)[name], "val_bpb"))
            for words, (experiment, name) in wanted.items()]


TABLES = {f"screen_{rung}_{text}": lambda rung=rung, text=text: shown_screen(rung, text)
          for rung in RUNGS for text in TEXTS if (rung, text) != ("v1_1", "sample")}  # fmt: skip
TABLES |= {f"changes_{rung}": lambda rung=rung: changes(rung) for rung in RUNGS if rung != "v1_1"}
