"""The pictures in results/, drawn from results/experiments/ with matplotlib; pages.py asks for them."""

import importlib
from statistics import mean

from harness.errors import FileError, UserError
from harness.pictures import BARS, STYLE, curve, seeds
from results import step_time
from results.best import LITERATURE, best_run, word_perplexities
from results.plan import DROPOUTS, EQUAL_SECONDS, EXPERIMENTS, READINGS, ROOT, VOCABULARIES
from results.store import results_of
from results.tables import PLACES, TRAINED, at_best_rate, lengths, n_gram


def note(figure, text):
    """Say below a picture what its bars are and what it was measured on."""
    figure.supxlabel(text, fontsize=8)


def logs(axes, results, x, key, **style):
    """A curve of `key` in the logs of the seeds, at x(step)."""
    length = min(len(result["log"]) for result in results)
    xs = [x(record["step"]) for record in results[0]["log"][:length]]
    seeds(axes, xs, [[result["log"][i][key] for result in results] for i in range(length)], **style)


def bpb_of(results):
    """Validation bits per byte of the seeds."""
    return [result["summary"]["val_bpb"] for result in results]


def plot_ladder(plt):
    """Bits per byte of all rungs over the text that they have seen, and over the time it takes on two cores."""
    figure, (text, clock) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    untimed = []
    for run in EXPERIMENTS["ladder"].runs:
        results, seconds = results_of("ladder")[run.name], step_time.seconds_of(run)
        summary = results[0]["summary"]
        style = {"label": run.name, **curve(run.name)} | ({"lw": 5, "ms": 9, "alpha": 0.6} if run.name == "v1" else {})
        megabytes = summary["bytes_seen"] / summary["steps"] / 1e6
        logs(text, results, lambda step, megabytes=megabytes: step * megabytes, "val_bpb", **style)
        if seconds:
            logs(clock, results, lambda step, seconds=seconds: step * seconds / 60, "val_bpb", **style)
        else:
            untimed.append(run.name)
    counted = n_gram()
    for axes in (text, clock):
        axes.axhline(counted["val_bpb"], color="black", ls=(0, (1, 3)), lw=1)
        axes.annotate(f"counting ({counted['order']}-gram)", (0.01, counted["val_bpb"]), (0, -3), va="top", fontsize=8,
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
    text.set(title="by text", xlabel="text seen (MB)", ylabel="validation bits per byte (lower is better)",
             xlim=(0, None))  # fmt: skip
    clock.set(xlabel="training on two CPU cores (minutes)", xscale="log",
              title="by time" + f" ({' and '.join(untimed)}: steps not timed)" * bool(untimed))  # fmt: skip
    clock.set_xticks((0.1, 0.3, 1, 3, 10, 30), ("0.1", "0.3", "1", "3", "10", "30"))
    clock.minorticks_off()
    figure.legend(*text.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    note(figure, "mean of three seeds; bars, mostly smaller than the marker: lowest to highest; v1_1, which is v1 in "
                 "less memory, lies on v1")  # fmt: skip
    return figure


def plot_v3_to_v4(plt):
    """Ways to train with ways to know positions: the best rate of each."""
    results = results_of("v3_to_v4")
    figure, axes = plt.subplots(figsize=(6.5, 4.2))
    missing = []
    for (trained, title), style in zip(TRAINED.items(), (curve("v3"), curve(7), curve("v4, rope"))):
        values = {i: bpb_of(at_best_rate(results, trained, place)[1]) for i, place in enumerate(PLACES)}
        missing += [f"{title} with {place}" for place, found in zip(PLACES, values.values()) if not found]
        values = {i: found for i, found in values.items() if found}
        seeds(axes, list(values), list(values.values()), label=title, **style | {"markersize": 6})
        for i, found in values.items():
            if len(found) < 3:
                axes.annotate(("one seed", "two seeds")[len(found) - 1], (i, mean(found)), (8, 3), fontsize=8,
                              textcoords="offset points")  # fmt: skip
    axes.set_xticks(range(3), ["learned,\nrandom at the start", "learned,\nsinusoids at the start", "RoPE"])
    axes.set(xlim=(-0.3, 2.45), ylabel="validation bits per byte (lower is better)", xlabel="positions")
    axes.legend(title="block and optimizer")
    note(figure, "mean of three seeds where not noted; bars, where larger than the marker: lowest to highest"
                 + f"\nnot run yet: {'; '.join(missing)}" * bool(missing))  # fmt: skip
    return figure


def plot_positions(plt):
    """Each scheme in longer windows, side by side and sliding, and where in a window the loss is made."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), sharey=True)
    for scheme in ("alibi", "rope", "learned", "sinusoidal", "none"):
        measured = [result["measured"] for result in results_of("positions")[f"{scheme}, 256"]]
        label = {"learned": "learned (v3_1), 256 only"}.get(scheme, scheme)
        for ax, way in zip(axes, ("side_by_side", "sliding")):
            sizes = sorted(map(int, measured[0][way]))
            values = [[one[way][str(size)] for one in measured] for size in sizes]
            style = curve(scheme) | ({"ms": 8, "mfc": "none", "mew": 1.5} if scheme == "learned" else {})
            seeds(ax, sizes, values, **style, label=label)
        if scheme != "learned":
            places = [by_place(one) for one in measured]
            xs = [PLACES_MEAN * (i + 0.5) for i in range(len(places[0]))]
            seeds(axes[2], xs, list(zip(*places)), **curve(scheme))
    for ax, title in zip(axes, ("windows side by side", "windows that slide by 128")):
        ax.set(xscale="log", title=title, xlabel="tokens in a window")
        ax.set_xticks([256, 512, 1024, 2048, 4096], ["256", "512", "1,024", "2,048", "4,096"])
        ax.minorticks_off()
    for ax in axes:
        ax.axvline(256, color="grey", ls=":", lw=1.5, label="training length" if ax is axes[0] else None)
    axes[2].set(title="windows of 1,024 side by side, by place", xlabel="place in the window (tokens)", xlim=(0, 1024),
                xticks=range(0, 1025, 256))  # fmt: skip
    axes[0].set(ylabel="validation bits per byte (lower is better)", ylim=(1.35, 1.75))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    note(figure, "mean of three seeds, bars: lowest to highest; on the first 65,536 tokens of the validation split, so "
                 f"a little off the ladder's values; right: a point is the mean of {PLACES_MEAN} places")  # fmt: skip
    return figure


PLACES_MEAN = 128  # neighboring places of a window in one point of the picture


def by_place(measured):
    """Bits per byte by the place in windows of 1,024: the mean of PLACES_MEAN places each. The measured nats per token
    of 32 places each are scaled by what the whole of the text says of bytes and tokens."""
    nats = measured["nats_by_place"]
    scale = measured["side_by_side"]["1024"] / mean(nats)
    count = PLACES_MEAN // 32
    return [scale * mean(nats[i : i + count]) for i in range(0, len(nats), count)]


def plot_vocabulary(plt):
    """v2 and v4 with each vocabulary, in two lengths: over the time of training."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    for ax, rung in zip(axes, EQUAL_SECONDS):
        for k, size in enumerate(VOCABULARIES):
            runs = sorted(lengths(rung, size).values(), key=lambda run: run[0])
            seeds(ax, [time for time, _ in runs], [bpb_of(results) for _, results in runs], label=f"{size:,}",
                  **curve(k))  # fmt: skip
        low, high = ax.get_xlim()
        ticks = [tick for tick in (50, 70, 100, 150, 200, 300, 400, 600) if 0.9 * low <= tick <= 1.1 * high]
        ax.set(xscale="log", title=rung, xlabel="seconds of training on two Zen 5 cores")
        ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
        ax.minorticks_off()
        ax.axvline(EQUAL_SECONDS[rung], color="grey", ls=":", lw=1.5)
    axes[0].set_ylabel("validation bits per byte (lower is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="tokens in the vocabulary", loc="outside upper center", ncols=6)
    note(figure, "mean of the seeds, bars: lowest to highest; one of the two runs of a curve read 18.6 MB of text\n"
                 "the panels have scales of their own; time for evaluations does not count; dotted: where the table "
                 "compares")  # fmt: skip
    return figure


def plot_dropout(plt):
    """Dropout by how often a text is read: at the ends of schedules of that length, and on the way of the longest."""
    results, (figure, (ends, way)) = results_of("dropout"), plt.subplots(1, 2, figsize=(10, 4.2))
    for k, p in enumerate(DROPOUTS):
        last = [[result["log"][-1]["val_bpb"] for result in results[f"{readings} times, {p:g}"]]
                for readings in READINGS]  # fmt: skip
        seeds(ends, READINGS, last, label=f"dropout {p:g}", **curve(k))
        longest = results[f"{READINGS[-1]} times, {p:g}"]
        readings_a_step = longest[0]["summary"]["epochs"] / longest[0]["summary"]["steps"]
        logs(way, longest, lambda step, x=readings_a_step: x * step, "val_bpb", **curve(k))
    ends.set(title="at the end of a schedule of that length", xscale="log", xlabel="times that the text is read",
             ylabel="validation bits per byte (lower is better)")  # fmt: skip
    ends.set_xticks(READINGS, map(str, READINGS))
    ends.minorticks_off()
    way.set(title=f"on the way of {READINGS[-1]} readings", xlabel="times that the text was read")
    figure.legend(*ends.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    note(figure, "v4 with RoPE, 2 layers of width 128, on a tenth of the text; mean of the seeds, bars: lowest to "
                 "highest; the panels have scales of their own")  # fmt: skip
    return figure


def plot_two_hours(plt):
    """The best run as it went, and the best test perplexities among published ones."""
    log, perplexities = best_run()["log"], word_perplexities()
    figure, (course, bars) = plt.subplots(1, 2, figsize=(11, 4.2))
    run, _ = EXPERIMENTS["best"].runs
    if not (step := step_time.seconds_of(run)):
        raise step_time.not_measured(run)
    minutes = [record["step"] * step / 60 for record in log]
    values = [record["val_word_ppl"] for record in log]
    course.plot(minutes, values, label="windows of 512 side by side", **curve(0))
    sliding = perplexities["v4, windows of 512 that slide by 64"][0]
    course.plot(minutes[-1:], [sliding], label="the same model, windows that slide by 64",
                **curve(1) | {"markersize": 7, "linestyle": ""})  # fmt: skip
    for x, y in list(zip(minutes, values))[:: -max(1, len(log) // 6)]:  # the last, and some before it
        course.annotate(f"{y:.0f}", (x, y), (2, 6), textcoords="offset points", fontsize=8)
    course.annotate(f"{sliding:.0f}", (minutes[-1], sliding), (7, -8), textcoords="offset points", fontsize=8)
    course.set(title="the first network as it trained", xlabel="training on two idle CPU cores (minutes)",
               xlim=(0, 1.12 * minutes[-1]), yscale="log", ylabel="validation word perplexity (lower is better)")
    ticks = [n for n in (50, 70, 100, 150, 200, 300, 400, 600) if sliding * 0.8 < n < max(values) * 1.25]
    course.set_yticks(ticks, [str(n) for n in ticks])
    course.minorticks_off()
    course.legend()
    rows = [(name, test, BARS[0]) for name, (_, test) in perplexities.items()]
    rows += [(name.partition(" (")[0], test, BARS[1]) for name, test in LITERATURE.items()]
    for k, (name, test, style) in enumerate(sorted(rows, key=lambda row: -row[1])):
        bars.barh(k, test, **style)
        bars.text(test + 1, k, f"{test:.1f}", va="center", fontsize=8)
        rows[k] = name
    bars.set_yticks(range(len(rows)), rows)
    bars.invert_yaxis()
    bars.grid(False)
    bars.set(title="beside published models", xlabel="test word perplexity (lower is better)", xlim=(0, 220))
    bars.legend([plt.Rectangle((0, 0), 1, 1, **style) for style in BARS[:2]], ["here, on two CPU cores", "on GPUs"],
                loc="center right")  # fmt: skip
    note(figure, "one run of each, one seed")
    return figure


PICTURES = {"ladder": plot_ladder, "v3_to_v4": plot_v3_to_v4, "positions": plot_positions,
            "vocabulary": plot_vocabulary, "dropout": plot_dropout, "two_hours": plot_two_hours}  # fmt: skip


def draw():
    """Write all pictures to results/."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need a library: pip install matplotlib") from None
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update(STYLE)
    for name, plot in PICTURES.items():
        figure = plot(plt)
        try:
            figure.savefig(ROOT / "results" / f"{name}.png", dpi=110)
        except OSError as error:
            raise FileError(f"cannot write results/{name}.png ({error.strerror}); make room, or make it "
                            "writable") from None  # fmt: skip
        plt.close(figure)
