"""Make the tables of the README and ladder.png from the committed runs.

    python results/ladder.py --collect   first copy the finished runs from runs/ to results/runs/, and those in
                                         runs/experiments/ to results/experiments/
    python results/ladder.py             write the tables from results/runs/ and results/benchmarks/
    python results/ladder.py --check     exit with code 1 if a table is not what they say
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import table  # noqa: E402

COMMITTED = ROOT / "results" / "runs"
EXPERIMENTS = ROOT / "results" / "experiments"
BENCHMARKS = ROOT / "results" / "benchmarks"
RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v4_alibi_rope")
MEASURED = ("tokenizer", "training", "generation", "startup", "ablation", "scaling", "soak")  # scripts with tables
KEPT = ("summary.json", "log.jsonl", "steps.csv", "sample.txt", "*.png")  # of a run; the weights are not committed


def collect():
    """Copy summaries, logs, samples and pictures of the runs in runs/ to results/runs/."""
    for rung in RUNGS:
        if not (ROOT / "runs" / rung / "summary.json").exists():
            raise FileNotFoundError(f"runs/{rung} has no finished run: python {rung}.py makes it")
        for pattern in KEPT:
            for path in (ROOT / "runs" / rung).rglob(pattern):
                target = COMMITTED / path.relative_to(ROOT / "runs")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    for path in (ROOT / "runs" / "experiments").glob("*/summary.json"):
        target = EXPERIMENTS / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def read_summaries():
    summaries = {rung: json.loads((COMMITTED / rung / "summary.json").read_text()) for rung in RUNGS}
    datasets = {summary["dataset"] for summary in summaries.values()}
    if len(datasets) > 1:
        raise ValueError(f"the runs are not comparable: they trained on {', '.join(sorted(datasets))}")
    return summaries


def what(s):
    """One line on the model of a summary."""
    h = s["hyperparameters"]
    if s["rung"] == "v0":
        return "bigram table"
    if s["rung"].startswith("v1"):
        return f"MLP on {h['CONTEXT_SIZE']} tokens" + (", lean" if s["rung"] == "v1_1" else "")
    kind = {"v2": "transformer", "v3": "GPT-2 block, schedule, bf16"}.get(s["rung"])
    kind = kind or f"modern block, Muon, {s['position']}"
    return f"{kind}; {h['N_LAYER']} × {h['N_EMBD']}, context {h['BLOCK_SIZE']}"


def ladder(summaries):
    runs = [s for s in summaries.values() if "schemes" not in s] + [*summaries["v4_alibi_rope"]["schemes"].values()]
    rows = [
        [
            s["rung"].replace("_alibi_rope", ""), what(s), f"{s['n_params']:,}", f"{s['bytes_seen'] / 1e6:.1f}",
            f"**{s['val_bpb']:.4f}**", f"{s['val_word_ppl']:,.1f}", f"{s['train_seconds']:,.0f}",
            f"{s['tokens_per_second']:,.0f}", f"{s['peak_memory_mb']:,.0f}",
        ]
        for s in runs
    ]  # fmt: skip
    head = ["rung", "model", "parameters", "MB of text seen", "val bpb", "val word perplexity", "training, s",
            "tokens/s", "peak memory, MB"]  # fmt: skip
    return table(head, rows, left=(0, 1))


def memory(summaries):
    rows = []
    for rung in ("v1", "v1_1"):
        s = summaries[rung]
        rows.append([rung, f"{s['peak_memory_mb']:,.0f}", f"{s['import_memory_mb']:,.0f}",
                     f"{s['peak_memory_mb'] - s['import_memory_mb']:,.0f}", f"{s['tokens_per_second']:,.0f}",
                     f"{s['val_bpb']:.4f}"])  # fmt: skip
    above = [s["peak_memory_mb"] - s["import_memory_mb"] for s in (summaries["v1"], summaries["v1_1"])]
    return table(["rung", "peak memory, MB", "of it libraries, MB", "above the libraries, MB", "tokens/s", "val bpb"],
                 rows) + f"\nv1_1 needs {above[1] / above[0]:.2f} of v1's memory above the libraries."  # fmt: skip


def metrics(summaries):
    v4 = summaries["v4_alibi_rope"]["schemes"]
    runs = {"v3": summaries["v3"], **{f"v4, {scheme}": s for scheme, s in v4.items()}}
    rows = [
        [
            name, f"{s['val_bpb']:.4f}", f"{s['val_bpb_sliding']:.4f}", f"{s['val_word_ppl']:.1f}",
            f"{s['val_word_ppl_sliding']:.1f}", f"{s['test_bpb']:.4f}", f"{s['test_word_ppl']:.1f}",
            f"{100 * s['val_top_1']:.1f}%", f"{100 * s['val_top_5']:.1f}%", f"{100 * s['val_calibration_error']:.1f}%",
        ]
        for name, s in runs.items()
    ]  # fmt: skip
    return table(["run", "val bpb", "val bpb, sliding", "val word ppl", "val word ppl, sliding", "test bpb",
                  "test word ppl", "top-1", "top-5", "calibration error"], rows)  # fmt: skip


def extrapolation(summaries):
    schemes = summaries["v4_alibi_rope"]["schemes"]
    lengths = list(next(iter(schemes.values()))["extrapolation_bpb"])
    rows = [[name, *("–" if b is None else f"{b:.4f}" for b in s["extrapolation_bpb"].values())]
            for name, s in schemes.items()]  # fmt: skip
    return table(["scheme", *(f"{n} tokens" for n in lengths)], rows)


def closed_form(summaries):
    s = summaries["v0"]
    trained, best = s["train_text_loss"], s["closed_form_loss"]
    return (f"Trained by gradient descent, v0's table reaches {trained:.4f} nats per token on the training text; the "
            f"counts give {best:.4f}, so it comes within {100 * (trained / best - 1):.2f}%.")  # fmt: skip


def progress(summaries):
    """Validation bits per byte of v4 while it trains, from the logs."""
    logs = {}
    for scheme in summaries["v4_alibi_rope"]["schemes"]:
        path = COMMITTED / "v4_alibi_rope" / scheme / "log.jsonl"
        logs[scheme] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [["scheme", *(f"{line['tokens_seen'] / 1e6:.1f} M tokens" for line in next(iter(logs.values())))]]
    for scheme, log in logs.items():
        rows.append([scheme, *(f"{line['val_bpb']:.4f} ({line['seconds']:.0f} s)" for line in log)])
    return table(rows[0], rows[1:])


def experiments(summaries):
    """Runs in results/experiments/, below the default run of their rung."""
    runs = [json.loads(path.read_text()) for path in sorted(EXPERIMENTS.glob("*/summary.json"))]
    defaults = [summaries[rung] for rung in RUNGS if rung in {run["rung"] for run in runs}]
    rows = []
    for s in sorted([*defaults, *runs], key=lambda s: (s["rung"], s["dataset"] == "sample")):  # a stable sort
        default = summaries[s["rung"]]["hyperparameters"]
        ignored = {"OUT_DIR", "MAX_STEPS", "EVAL_INTERVAL", "DEVICE", "MICRO_BATCH_SIZE"}  # columns tell the rest
        changed = [f"{k} = {v}" for k, v in s["hyperparameters"].items() if k not in ignored and v != default.get(k)]
        best = s["bytes_seen"] * s["best_step"] / s["steps"]
        rows.append([s["rung"], s["dataset"], ", ".join(changed) or "default", f"{s['val_bpb']:.4f}",
                     f"{s['val_word_ppl']:,.1f}", f"{best / 1e6:.1f}", f"{s['bytes_seen'] / 1e6:.1f}"])  # fmt: skip
    return table(["rung", "text", "changed", "best val bpb", "val word perplexity", "best after, MB", "trained on, MB"],
                 rows, left=(0, 1, 2))  # fmt: skip


def short_run(summaries):
    """What v4 reaches when it is given a minute or two, and by which command."""
    s = json.loads((EXPERIMENTS / "v4_100_seconds" / "summary.json").read_text())
    default = summaries["v4_alibi_rope"]["hyperparameters"]
    changed = [f"{k}={v}" for k, v in s["hyperparameters"].items() if v != default[k] and k != "OUT_DIR"]
    return (f"`python v4_alibi_rope.py {' '.join(changed)}` reaches {s['val_bpb']:.4f} bits per byte after "
            f"{s['train_seconds']:.0f} seconds of training.")  # fmt: skip


def plot(path):
    """Draw the validation bits per byte of all rungs over the text that they have seen."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for folder in (*RUNGS[:-1], *sorted(p.parent.relative_to(COMMITTED) for p in COMMITTED.glob("v4*/*/summary.json"))):
        s = json.loads((COMMITTED / folder / "summary.json").read_text())
        log = [json.loads(line) for line in (COMMITTED / folder / "log.jsonl").read_text().splitlines()]
        log = [line for line in log if line["step"]]
        seen = [line["tokens_seen"] * s["bytes_seen"] / s["tokens_seen"] / 1e6 for line in log]
        label = str(folder).replace("_alibi_rope/", ", ")
        axes.plot(seen, [line["val_bpb"] for line in log], "o--" if label == "v1_1" else "o-", label=label)
    axes.set(xlabel="text seen (MB)", ylabel="validation bits per byte", title="The ladder")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(check):
    """Write all tables into the README, or with `check` change nothing. Returns whether they were up to date."""
    summaries, path = read_summaries(), ROOT / "README.md"
    tables = (ladder, closed_form, memory, metrics, extrapolation, progress, short_run, experiments)
    made = {make.__name__: make(summaries) for make in tables}
    before = readme = path.read_text(encoding="utf-8")
    for name in MEASURED:
        if (BENCHMARKS / f"{name}.md").exists() and f"<!-- benchmark_{name} -->" in readme:
            text = (BENCHMARKS / f"{name}.md").read_text(encoding="utf-8")
            made[f"benchmark_{name}"] = re.sub("(?m)^#+ ", "#### ", text)
    for mark, text in made.items():
        place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
        if not place.search(readme):
            raise ValueError(f"README.md has no place for the table: <!-- {mark} --> ... <!-- /{mark} -->")
        readme = place.sub(lambda found, text=text: f"{found[1]}{text.strip()}\n{found[2]}", readme)
    if readme != before and not check:
        path.write_text(readme, encoding="utf-8")
    return readme == before


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the README's tables from the committed run summaries.")
    parser.add_argument("--collect", action="store_true", help="first copy the finished runs from runs/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not current")
    args = parser.parse_args(argv)
    if args.collect:
        collect()
    current = write(args.check)
    if not args.check:
        plot(ROOT / "results" / "ladder.png")
    print("README.md is current" if current else "README.md is not current" if args.check else "README.md is written")
    return 1 if args.check and not current else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"ladder.py: {error}")
