"""Make the tables of README.md and results/README.md, and the pictures in results/, from the committed results.

    python results/ladder.py --collect   first copy the finished runs from runs/ to results/runs/
    python results/ladder.py             write tables and pictures
    python results/ladder.py --check     exit with code 1 if a table is not what the results say

What is compared comes from results/experiments/ (one to three seeds; experiments.py makes it), what is shown of a
single run from results/runs/, what is timed from results/benchmarks/.
"""

import argparse
import importlib
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import experiments  # noqa: E402
from benchmarks.tables import table  # noqa: E402
from experiments import V4, Run, key_of_pace, read_pace, spread  # noqa: E402

COMMITTED = ROOT / "results" / "runs"
BENCHMARKS = ROOT / "results" / "benchmarks"
PAGES = ("README.md", "results/README.md")
RUNGS = ("v0", "v1", "v1_1", "v2", "v3", V4)
MEASURED = ("tokenizer", "training", "generation", "startup", "ablation", "scaling", "soak", "beside")  # have tables
KEPT = ("summary.json", "log.jsonl", "steps.csv", "sample.txt", "*.png")  # of a run; the weights are not committed
SIDE, SLIDING = "side_by_side", "sliding"


def collect():
    """Copy summaries, logs, samples and pictures of the runs in runs/ to results/runs/."""
    read_summaries(ROOT / "runs")  # nothing is copied if they do not belong together
    for rung in RUNGS:
        for pattern in KEPT:
            for path in (ROOT / "runs" / rung).rglob(pattern):
                target = COMMITTED / path.relative_to(ROOT / "runs")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def read_summaries(folder=COMMITTED):
    """{rung: the summary of its run in `folder`}. Raises FileNotFoundError if one has none, ValueError if they were
    trained on different texts."""
    for rung in RUNGS:
        if not (folder / rung / "summary.json").exists():
            raise FileNotFoundError(f"{folder.relative_to(ROOT)}/{rung} has no finished run: python {rung}.py makes it")
    summaries = {rung: json.loads((folder / rung / "summary.json").read_text()) for rung in RUNGS}
    datasets = {summary["dataset"] for summary in summaries.values()}
    if len(datasets) > 1:
        raise ValueError(f"the runs are not comparable: they trained on {', '.join(sorted(datasets))}")
    return summaries


def found(experiment):
    """{name of a run: what its seeds found}, of the runs that are done."""
    runs = {run.name: experiments.read_found(run, experiments.EXPERIMENTS[experiment].seeds)
            for run in experiments.EXPERIMENTS[experiment].runs}  # fmt: skip
    return {name: seeds for name, seeds in runs.items() if seeds}


def column(seeds, key, form="{:.4f}"):
    """A number of the summaries of some seeds, as a cell of a table."""
    return spread([one["summary"][key] for one in seeds], form)


def middle(seeds, key):
    return mean(one["summary"][key] for one in seeds)


def pace(run):
    """Seconds a step of `run` on the machine of pace.json."""
    return read_pace()["seconds"].get(key_of_pace(run))


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


def what(s):
    """One line on the model of a summary."""
    h = s["hyperparameters"]
    if s["rung"] == "v0":
        return "bigram table"
    if s["rung"].startswith("v1"):
        return f"MLP on {h['CONTEXT_SIZE']} tokens" + (", lean" if s["rung"] == "v1_1" else "")
    kind = {"v2": "transformer", "v3": "GPT-2 block, schedule"}.get(s["rung"])
    kind = kind or f"modern block, Muon, {s['position']}"
    return f"{kind}; {h['N_LAYER']} × {h['N_EMBD']}, context {h['BLOCK_SIZE']}"


def ladder():
    rows, memory = [], read_pace().get("peak_mb", {})
    for run in experiments.EXPERIMENTS["ladder"].runs:
        seeds = found("ladder")[run.name]
        s, step, peak = seeds[0]["summary"], pace(run), memory.get(key_of_pace(run))
        rows.append([s["rung"].replace("_alibi_rope", ""), what(s), f"{s['n_params'] / 1e6:.2f} M",
                     f"**{middle(seeds, 'val_bpb'):.4f}**", column(seeds, "val_bpb").partition(" ")[2].strip("()"),
                     f"{middle(seeds, 'val_word_ppl'):,.1f}", f"{step * s['steps'] / 60:.1f}" if step else "–",
                     f"{peak:,.0f}" if peak else "–"])  # fmt: skip
    return table(["rung", "model", "parameters", "val bpb", "lowest to highest", "val word ppl", "training, min",
                  "peak memory, MB"], rows, left=(0, 1))  # fmt: skip


def closed_form():
    s = read_summaries()["v0"]
    trained, best = s["train_text_loss"], s["closed_form_loss"]
    return (f"Trained by gradient descent, v0's table reaches {trained:.4f} nats per token on the training text; the "
            f"counts give {best:.4f}, so it comes within {100 * (trained / best - 1):.2f}%.")  # fmt: skip


def memory():
    """Peak memory and pace of v1 and v1_1, from the trials of pace.json."""
    kept, rows = read_pace(), []
    for rung in ("v1", "v1_1"):
        key = key_of_pace(Run(rung, rung))
        s = found("ladder")[rung][0]["summary"]["hyperparameters"]
        rows.append([rung, f"{kept['peak_mb'][key]:,.0f}", f"{kept['peak_mb'][key] - kept['libraries_mb']:,.0f}",
                     f"{s['BATCH_SIZE'] * s['BLOCK_SIZE'] / kept['seconds'][key]:,.0f}",
                     column(found("ladder")[rung], "val_bpb")])  # fmt: skip
    return table(["rung", "peak memory, MB", "of it above the libraries", "tokens/s", "val bpb"], rows)


def v3_to_v4():
    rows, before = [], None
    for run in experiments.EXPERIMENTS["v3_to_v4"].runs:
        seeds = found("v3_to_v4")[run.name]
        bpb, step = middle(seeds, "val_bpb"), pace(run)
        base = middle(found("v3_to_v4")["v3"], "val_bpb") if run.name.startswith("v3,") else before
        rows.append([run.name, column(seeds, "val_bpb"), "" if base is None else f"{bpb - base:+.3f}",
                     f"{middle(seeds, 'val_word_ppl'):,.0f}", f"{step:.2f}" if step else "–"])  # fmt: skip
        before = bpb
    return table(["model", "val bpb", "change", "val word ppl", "a step, s"], rows)


def learning_rate():
    rows = [[name, column(seeds, "val_bpb"), f"{middle(seeds, 'val_word_ppl'):,.0f}"]
            for name, seeds in found("learning_rate").items()]  # fmt: skip
    return table(["learning rate of v3", "val bpb", "val word ppl"], rows)


def _measured(seeds, way, size):
    values = [one["measured"][way].get(str(size)) for one in seeds]
    return spread([value for value in values if value is not None])


def positions():
    """Every scheme trained at 256 tokens, in windows of 1, 4 and 16 times as many."""
    rows = []
    for scheme in ("alibi", "rope", "sinusoidal", "learned", "none"):
        seeds = found("positions")[f"{scheme}, 256"]
        rows.append([scheme, *(_measured(seeds, way, size).partition(" ")[0] for size in (256, 1024, 4096)
                               for way in (SIDE, SLIDING))])  # fmt: skip
    return table(["scheme", *(f"{size:,}, {way}" for size in (256, 1024, 4096) for way in ("side by side", "sliding"))],
                 rows)  # fmt: skip


def positions_all():
    rows = []
    for name, seeds in found("positions").items():
        size = seeds[0]["summary"]["hyperparameters"]["BLOCK_SIZE"]
        for title, way in (("side by side", SIDE), ("sliding", SLIDING)):
            rows.append([name, title, *(_measured(seeds, way, size * times) for times in (1, 2, 4, 8, 16))])
    head = ["scheme, trained at", "windows", "as long", *(f"{times} times" for times in (2, 4, 8, 16))]
    return table(head, rows, left=(0, 1))


def vocabulary():
    all_runs = found("vocabulary")
    columns = [f"{rung}, {limit}" for rung in ("v2", "v4") for limit in ("18.6 MB", "300 s")]
    best = {c: min((name for name in all_runs if name.startswith(c)), key=lambda n: middle(all_runs[n], "val_bpb"))
            for c in columns}  # fmt: skip
    rows = []
    for size in experiments.VOCABULARIES:
        names = [f"{c}, {size:,}" for c in columns]
        cells = [column(all_runs[name], "val_bpb") if name in all_runs else "–" for name in names]
        cells = [f"**{cell}**" if name in best.values() else cell for name, cell in zip(names, cells)]
        rows.append([f"{size:,}", *cells])
    return table(["vocabulary", *columns], rows)


def shape():
    rows = []
    for run in experiments.EXPERIMENTS["shape"].runs:
        seeds = found("shape").get(run.name, [])
        if seeds:
            s = seeds[0]["summary"]
            rows.append([run.name, f"{s['n_params'] / 1e6:.2f} M", f"{s['steps']:,}", column(seeds, "val_bpb"),
                         f"{middle(seeds, 'val_word_ppl'):,.0f}"])  # fmt: skip
    return table(["v3, layers × width", "parameters", "steps", "val bpb", "val word ppl"], rows)


def to_the_end(seeds):
    """Those runs that were not stopped early."""
    return [one for one in seeds if one["summary"]["steps"] == one["summary"]["hyperparameters"]["MAX_STEPS"]]


def dropout():
    """The best validation loss on the way, and the last one."""
    runs, rows = found("dropout"), []
    for text in dict.fromkeys(name.rpartition(", ")[0] for name in runs):
        for p in ("0", "0.1", "0.2", "0.3"):
            if seeds := runs.get(f"{text}, {p}"):
                ends = [one["log"][-1] for one in to_the_end(seeds)]
                losses = [f"{mean(end[key] for end in ends):.2f}" if ends else "–"
                          for key in ("train_loss", "val_loss")]  # fmt: skip
                rows.append([text, p, str(len(seeds)), column(seeds, "val_bpb"),
                             spread([end["val_bpb"] for end in ends]), *losses])  # fmt: skip
    return table(["text", "dropout", "seeds", "best val bpb", "val bpb at the end", "training loss there",
                  "validation loss there"], rows)  # fmt: skip


def metrics():
    """Windows, accuracy and calibration, means of the seeds."""
    rows = []
    for name in ("v3", "v4, alibi", "v4, rope"):
        seeds = found("ladder")[name]
        cells = [f"{middle(seeds, key):.{digits}f}" for key, digits in (
            ("val_bpb", 4), ("val_bpb_sliding", 4), ("val_word_ppl", 1), ("val_word_ppl_sliding", 1), ("test_bpb", 4),
            ("test_word_ppl", 1))]  # fmt: skip
        rows.append([name, *cells, *(f"{100 * middle(seeds, f'val_{key}'):.1f}%"
                                     for key in ("top_1", "top_5", "calibration_error"))])  # fmt: skip
    return table(["run", "val bpb", "val bpb, sliding", "val word ppl", "val word ppl, sliding", "test bpb",
                  "test word ppl", "top-1", "top-5", "calibration error"], rows)  # fmt: skip


def temperature():
    seeds = [one["measured"] for one in found("ladder")["v3"]]
    before, after = ([one[key]["calibration_error"] for one in seeds] for key in ("test", "test_tempered"))
    bpb = [mean(one[key]["bpb"] for one in seeds) for key in ("test", "test_tempered")]
    fitted = spread([one["temperature"] for one in seeds], "{:.2f}")
    return (f"Fitted on the validation split, v3's temperature is {fitted}; with it the calibration error on the "
            f"test split goes from {spread(before, '{:.2%}')} to "
            f"{spread(after, '{:.2%}')}, and bits per byte from {bpb[0]:.4f} to {bpb[1]:.4f}.")  # fmt: skip


def two_hours():
    rows = []
    for run in experiments.EXPERIMENTS["two_hours"].runs:
        for one in found("two_hours").get(run.name, []):
            s = one["summary"]
            rows.append([run.name, f"{s['steps']:,}", f"{s['n_params'] / 1e6:.1f} M", f"{s['val_bpb']:.4f}",
                         f"{s['val_bpb_sliding']:.4f}", f"{s['val_word_ppl_sliding']:.1f}",
                         f"{one['log'][-1]['train_loss']:.2f}"])  # fmt: skip
    return table(["choice", "steps", "parameters", "val bpb", "val bpb, sliding", "val word ppl, sliding",
                  "training loss at the end"], rows)  # fmt: skip


LITERATURE = {  # word perplexities on the test split of WikiText-2, of models trained on GPUs
    "LSTM, 200 units (GluonNLP's log, 750 epochs)": 101.6,
    "LSTM, 650 units (GluonNLP's log, 750 epochs)": 86.9,
    "LSTM, 1,500 units (GluonNLP's log, 750 epochs)": 82.3,
    "pointer sentinel LSTM (Merity et al. 2016)": 80.8,
    "AWD-LSTM (Merity et al. 2017)": 65.8,
}


def best_run():
    """The run of two hours on two cores."""
    return found("best")["v4, two hours"][0]


def best_in_words():
    """{way of reading: (word perplexity on the validation split or None, on the test split)} of that run."""
    s, measured = best_run()["summary"], best_run()["measured"]
    return {"v4, windows of 512 side by side": (s["val_word_ppl"], s["test_word_ppl"]),
            "v4, windows of 512 that slide by 64": (s["val_word_ppl_sliding"], measured["test_sliding"]["word_ppl"]),
            "v4, sliding, and learning from what it has read": (None, measured["test_reading_on"]["word_ppl"])}


def two_hours_best():
    """Two hours of two cores among what has been published, the worst first."""
    rows = [(name, f"{val:.1f}" if val else "–", test) for name, (val, test) in best_in_words().items()]
    rows += [(name, "–", test) for name, test in LITERATURE.items()]
    rows = [[name, val, f"**{test:.1f}**" if name.startswith("v4") else f"{test:.1f}"]
            for name, val, test in sorted(rows, key=lambda row: -row[2])]  # fmt: skip
    s, log = best_run()["summary"], best_run()["log"]
    at = max((r for r in log if r["seconds"] <= 7200), key=lambda r: r["step"])
    return (table(["model", "val word ppl", "test word ppl"], rows) +
            f"\nv4: {s['steps']:,} steps, the text {s['epochs']:.1f} times; {s['n_params'] / 1e6:.1f} million "
            f"parameters; seed {s['seed']}; {s['train_seconds']:,.0f} s of training (after {at['seconds']:,.0f} s "
            f"{at['val_word_ppl']:.1f} on the validation split in windows side by side, {log[-1]['val_word_ppl']:.1f} "
            f"at the end). {best_run()['machine']}.")  # fmt: skip


def reading_on():
    """The rates that were tried for it: 0 is the evaluation without it."""
    rows = [[f"{float(rate):g}", f"{bpb:.4f}"] for rate, bpb in best_run()["measured"]["rates"].items()]
    return table(["rate", "bpb on the first 32,768 tokens of the validation split"], rows)


def sample(words=110):
    """How the sample of the run of two hours begins, as it is but for the ends of lines."""
    text = best_run()["sample"]
    paragraphs = [line.split() for line in text.splitlines() if line.strip()]
    lines, left = [], words
    for paragraph in paragraphs:
        lines += [*textwrap.wrap(" ".join(paragraph[:left]) + (" ..." if len(paragraph) > left else ""), 118), ""]
        left -= len(paragraph)
        if left <= 0:
            break
    return "```\n" + "\n".join(lines).strip() + "\n```"


TABLES = (ladder, closed_form, memory, v3_to_v4, learning_rate, positions, positions_all, vocabulary, shape, dropout,
          metrics, temperature, two_hours, two_hours_best, reading_on, sample)  # fmt: skip


def write(check):
    """Write all tables into the pages, or with `check` change nothing. Returns whether they were up to date."""
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    makers = {make.__name__: make for make in TABLES}
    for name in MEASURED:
        path = BENCHMARKS / f"{name}.md"
        makers[f"benchmark_{name}"] = lambda path=path: re.sub("(?m)^#+ ", "#### ", path.read_text(encoding="utf-8"))
    current = True
    for page, text in pages.items():
        new = text
        for mark in re.findall(r"<!-- (\w+) -->\n", text):
            if mark not in makers:
                raise ValueError(f"{page} asks for a table that nothing makes: {mark}")
            place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
            made = makers[mark]().strip()
            new = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", new)
        if new != text:
            current = False
            if not check:
                (ROOT / page).write_text(new, encoding="utf-8")
    unused = makers.keys() - {mark for text in pages.values() for mark in re.findall(r"<!-- (\w+) -->\n", text)}
    if unused:
        raise ValueError(f"no page has a place for {', '.join(sorted(unused))}: <!-- name --> ... <!-- /name -->")
    return current


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


def band(axes, seeds, x, y, **style):
    """A line through the mean over seeds, and the area from the lowest to the highest of them."""
    length = min(len(one["log"]) for one in seeds)
    points = [[one["log"][k] for one in seeds] for k in range(length)]
    xs = [x(at[0], seeds[0]) for at in points]
    line = axes.plot(xs, [mean(map(y, at)) for at in points], **{"marker": "o", "ms": 3, **style})[0]
    axes.fill_between(xs, [min(map(y, at)) for at in points], [max(map(y, at)) for at in points], alpha=0.25,
                      color=line.get_color(), lw=0)  # fmt: skip


def val_bpb(record):
    return record["val_bpb"]


def plot_ladder(plt):
    """Bits per byte of all rungs over the text that they have seen, and over the time it takes on two cores."""
    figure, (text, clock) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for k, run in enumerate(experiments.EXPERIMENTS["ladder"].runs):
        seeds, step = found("ladder")[run.name], pace(run)
        style = {"label": run.name, "ls": "--" if run.name == "v1_1" else "-", "color": f"C{k}"}
        megabytes = seeds[0]["summary"]["bytes_seen"] / seeds[0]["summary"]["steps"] / 1e6
        band(text, seeds, lambda r, one, per_step=megabytes: r["step"] * per_step, val_bpb, **style)
        if step:
            band(clock, seeds, lambda r, one, step=step: r["step"] * step / 60, val_bpb, **style)
    text.set(xlabel="text seen (MB)", ylabel="validation bits per byte", xlim=(0, None))
    clock.set(xlabel="training on two CPU cores (minutes)", xscale="log")
    clock.set_xticks((0.1, 0.3, 1, 3, 10, 30), ("0.1", "0.3", "1", "3", "10", "30"))
    clock.minorticks_off()
    text.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))  # between v0 and all others
    return figure


def plot_v3_to_v4(plt):
    """What each of v4's parts adds to those before it; every seed a dot."""
    runs = list(found("v3_to_v4").items())
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    before = None
    for k, (name, seeds) in enumerate(runs):
        values = [one["summary"]["val_bpb"] for one in seeds]
        start = mean(one["summary"]["val_bpb"] for one in found("v3_to_v4")["v3"]) if name.startswith("v3,") else before
        if start is not None:
            axes.plot([start, mean(values)], [k, k], lw=7, alpha=0.5, solid_capstyle="butt",
                      color="C0" if mean(values) < start else "C3")  # fmt: skip
            axes.text(max(*values, start) + 0.004, k, f"{mean(values) - start:+.3f}", va="center", fontsize=8)
        axes.plot(values, [k] * len(values), "k.", ms=5)
        before = mean(values)
    axes.set_yticks(range(len(runs)), [name for name, _ in runs])
    axes.invert_yaxis()
    axes.set(xlabel="validation bits per byte (dots: seeds; bars: change)", xlim=(None, 1.7))
    return figure


def plot_positions(plt):
    """Each scheme in longer windows, side by side and sliding, and where in a window the loss is made."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for k, scheme in enumerate(("alibi", "rope", "sinusoidal", "none", "learned")):
        seeds = found("positions").get(f"{scheme}, 256")
        for ax, way in zip(axes, (SIDE, SLIDING)):
            sizes = sorted(map(int, seeds[0]["measured"][way]))
            means = [mean(one["measured"][way][str(size)] for one in seeds) for size in sizes]
            ax.plot(sizes, means, "o-", ms=4, color=f"C{k}", label=scheme)
        if scheme != "learned":
            nats = [mean(at) for at in zip(*(one["measured"]["nats_by_place"] for one in seeds))]
            axes[2].plot([32 * i + 16 for i in range(len(nats))], nats, color=f"C{k}", lw=1.3, label=scheme)
    for ax, title in zip(axes, ("windows side by side", "windows that slide by 128")):
        ax.axvline(256, color="grey", ls=":")
        ax.set(xscale="log", title=title, xlabel="tokens in a window", ylim=(1.37, 1.75))
        ax.set_xticks([256, 512, 1024, 2048, 4096], ["256", "512", "1,024", "2,048", "4,096"])
        ax.minorticks_off()
    axes[2].axvline(256, color="grey", ls=":")
    axes[2].set(title="windows of 1,024, side by side", xlabel="place in the window", ylabel="loss (nats per token)",
                ylim=(3.1, 4.3))  # fmt: skip
    axes[0].set_ylabel("validation bits per byte")
    axes[0].legend(fontsize=8)
    return figure


def plot_vocabulary(plt):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for ax, rung in zip(axes, ("v2", "v4")):
        for limit, color in (("18.6 MB", "C0"), ("300 s", "C1")):
            runs = {size: found("vocabulary").get(f"{rung}, {limit}, {size:,}") for size in experiments.VOCABULARIES}
            runs = {size: [one["summary"]["val_bpb"] for one in seeds] for size, seeds in runs.items() if seeds}
            label = f"after {limit}" + (" of text" if "MB" in limit else " on two cores")
            ax.plot(list(runs), list(map(mean, runs.values())), "o-", color=color, label=label)
            ax.fill_between(list(runs), list(map(min, runs.values())), list(map(max, runs.values())), alpha=0.25,
                            color=color)  # fmt: skip
        ax.set(xscale="log", title=rung, xlabel="tokens in the vocabulary", ylabel="validation bits per byte")
        ax.set_xticks(experiments.VOCABULARIES, [f"{size:,}" for size in experiments.VOCABULARIES], fontsize=8)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    return figure


def plot_shape(plt):
    """v3 by depth and by width at equal seconds, and what dropout does where a text is read many times."""
    runs = found("dropout")
    texts = list(dict.fromkeys(name.rpartition(", ")[0] for name in runs))
    rows = (2 + len(texts)) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(9, 3.4 * rows), layout="constrained", squeeze=False)
    axes = axes.flatten()
    for ax in axes[1 + len(texts) :]:
        ax.remove()
    lines = {"depth (width 256)": [f"{n} × 256" for n in (1, 2, 4, 6, 8)],
             "width (4 layers)": [f"4 × {w}" for w in (128, 192, 256, 320, 384)]}  # fmt: skip
    for k, (title, names) in enumerate(lines.items()):
        points = [(name, [one["summary"]["val_bpb"] for one in seeds]) for name in names
                  if (seeds := found("shape").get(name))]  # fmt: skip
        params = [found("shape")[name][0]["summary"]["n_params"] / 1e6 for name, _ in points]
        low, middles, high = ([f(values) for _, values in points] for f in (min, mean, max))
        axes[0].plot(params, middles, "o-", color=f"C{k}", label=title)
        axes[0].fill_between(params, low, high, alpha=0.25, color=f"C{k}")
        for (name, _), x, y in zip(points, params, middles):
            if k == 0 or name != "4 × 256":  # it stands on both lines
                axes[0].annotate(name, (x, y), (7, -3), textcoords="offset points", fontsize=7)
    axes[0].set(title="v3 after 600 s on two cores", xlabel="parameters (millions)", xlim=(1, 12))
    axes[0].set_ylabel("validation bits per byte")
    axes[0].legend(fontsize=8)
    for ax, text in zip(axes[1:], texts):
        for k, p in enumerate(("0", "0.1", "0.2", "0.3")):
            if seeds := to_the_end(runs.get(f"{text}, {p}", [])):
                style = {"ms": 2} if len(seeds[0]["log"]) > 30 else {}
                epochs = lambda r, one: r["step"] / one["summary"]["steps"] * one["summary"]["epochs"]  # noqa: E731
                band(ax, seeds, epochs, lambda r: r["val_loss"], color=f"C{k}", label=f"dropout {p}", **style)
                ax.plot([epochs(r, seeds[0]) for r in seeds[0]["log"]],
                        [mean(one["log"][i]["train_loss"] for one in seeds) for i in range(len(seeds[0]["log"]))], ":",
                        color=f"C{k}", lw=1)  # fmt: skip
        ax.set(title=f"v3 on {text}", xlabel="times that the text was read", ylabel="loss (dotted: training)")
        ax.legend(fontsize=8)
    return figure


def plot_two_hours(plt):
    """The run of two hours as it went, and where it stands among what has been published."""
    run, words = best_run(), best_in_words()
    figure, (course, bars) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    minutes = [r["seconds"] / 60 for r in run["log"]]
    course.plot(minutes, [r["val_word_ppl"] for r in run["log"]], "o-", label="windows of 512 side by side")
    sliding = words["v4, windows of 512 that slide by 64"][0]
    course.plot(minutes[-1:], [sliding], "C3D", label="sliding by 64, at the end")
    for r in [*run["log"][:-2], run["log"][-1]]:  # the last two stand close together
        course.annotate(f"{r['val_word_ppl']:.0f}", (r["seconds"] / 60, r["val_word_ppl"]), (4, 5),
                        textcoords="offset points", fontsize=8)  # fmt: skip
    course.annotate(f"{sliding:.0f}", (minutes[-1], sliding), (7, -4), textcoords="offset points", fontsize=8)
    course.set(xlabel="training on two CPU cores (minutes)", ylabel="validation word perplexity", xlim=(0, 140),
               ylim=(0, 400))  # fmt: skip
    course.legend(fontsize=8)
    rows = sorted([*((name, test, "C0") for name, (_, test) in words.items()),
                   *((name.partition(" (")[0], test, "0.7") for name, test in LITERATURE.items())],
                  key=lambda row: -row[1])  # fmt: skip
    bars.barh([name for name, *_ in rows], [test for _, test, _ in rows], color=[color for *_, color in rows])
    for k, (_, test, _) in enumerate(rows):
        bars.text(test - 1, k, f"{test:.1f}", va="center", ha="right", fontsize=8)
    bars.invert_yaxis()
    bars.grid(False)
    bars.set(xlabel="test word perplexity (grey: trained on GPUs)")
    return figure


PICTURES = {"ladder": plot_ladder, "v3_to_v4": plot_v3_to_v4, "positions": plot_positions,
            "vocabulary": plot_vocabulary, "shape": plot_shape, "two_hours": plot_two_hours}  # fmt: skip


def draw():
    import matplotlib

    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "font.size": 9})
    for name, plot in PICTURES.items():
        figure = plot(plt)
        figure.savefig(ROOT / "results" / f"{name}.png", dpi=110)
        plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make tables and pictures from the committed results.")
    parser.add_argument("--collect", action="store_true", help="first copy the finished runs from runs/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not current")
    args = parser.parse_args(argv)
    if args.collect:
        collect()
    current = write(args.check)
    if not args.check:
        draw()
    print("the tables are current" if current else "a table is not current" if args.check else "the tables are written")
    return 1 if args.check and not current else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"ladder.py: {error}")
