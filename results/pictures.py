"""The pictures in results/, drawn from results/experiments/ with matplotlib; pages.py asks for them."""

import importlib
from statistics import mean

from harness.errors import FileError, UserError
from results import step_time
from results.best import LITERATURE, best_run, word_perplexities
from results.plan import EXPERIMENTS, ROOT, VOCABULARIES
from results.store import command, full_length, results_of
from results.tables import PLACES, TRAINED, at_best_rate, n_gram


def band(axes, results, x, key, **style):
    """A line through the mean over seeds of `key` in their logs, at x(step), and the area from lowest to highest."""
    length = min(len(result["log"]) for result in results)
    points = [[result["log"][i][key] for result in results] for i in range(length)]
    xs = [x(record["step"]) for record in results[0]["log"][:length]]
    (line,) = axes.plot(xs, list(map(mean, points)), **{"marker": "o", "ms": 3, **style})
    axes.fill_between(xs, list(map(min, points)), list(map(max, points)), alpha=0.25, color=line.get_color(), lw=0)


def bpb_of(results):
    """Validation bits per byte of the seeds."""
    return [result["summary"]["val_bpb"] for result in results]


def plot_ladder(plt):
    """Bits per byte of all rungs over the text that they have seen, and over the time it takes on two cores."""
    figure, (text, clock) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for k, run in enumerate(EXPERIMENTS["ladder"].runs):
        results, seconds = results_of("ladder")[run.name], step_time.seconds_of(run)
        summary = results[0]["summary"]
        style = {"label": run.name, "ls": "--" if run.name == "v1_1" else "-", "color": f"C{k}"}
        megabytes = summary["bytes_seen"] / summary["steps"] / 1e6
        band(text, results, lambda step, megabytes=megabytes: step * megabytes, "val_bpb", **style)
        if seconds:
            band(clock, results, lambda step, seconds=seconds: step * seconds / 60, "val_bpb", **style)
    counted = n_gram()
    for axes in (text, clock):
        axes.axhline(counted["val_bpb"], color="black", ls=":", lw=1, label=f"counting ({counted['order']}-gram)")
    text.set(xlabel="text seen (MB)", ylabel="validation bits per byte", xlim=(0, None))
    clock.set(xlabel="training on two CPU cores (minutes)", xscale="log")
    clock.set_xticks((0.1, 0.3, 1, 3, 10, 30), ("0.1", "0.3", "1", "3", "10", "30"))
    clock.minorticks_off()
    text.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))  # between v0 and all others
    return figure


def plot_v3_to_v4(plt):
    """Ways to train with ways to know positions: the best rate of each, every seed a dot."""
    results = results_of("v3_to_v4")
    figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for k, (trained, title) in enumerate(TRAINED.items()):
        values = {i: bpb_of(at_best_rate(results, trained, place)[1]) for i, place in enumerate(PLACES)}
        values = {i: seeds for i, seeds in values.items() if seeds}
        if values:
            axes.plot(list(values), list(map(mean, values.values())), f"{'os^'[k]}-", color=f"C{k}", label=title)
        for i, seeds in values.items():
            axes.plot([i] * len(seeds), seeds, ".", color=f"C{k}", ms=4)
    axes.set_xticks(range(3), ["learned,\nrandom at the start", "learned,\nsinusoids at the start", "RoPE"])
    axes.set(ylabel="validation bits per byte (lower is better)")
    axes.legend(fontsize=8)
    return figure


def plot_positions(plt):
    """Each scheme in longer windows, side by side and sliding, and where in a window the loss is made."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for k, scheme in enumerate(("alibi", "rope", "sinusoidal", "none", "learned")):
        measured = [result["measured"] for result in results_of("positions")[f"{scheme}, 256"]]
        label = "learned (v3_1)" if scheme == "learned" else scheme
        for ax, way in zip(axes, ("side_by_side", "sliding")):
            sizes = sorted(map(int, measured[0][way]))
            means = [mean(one[way][str(size)] for one in measured) for size in sizes]
            ax.plot(sizes, means, "o-", ms=4, color=f"C{k}", label=label)
        if scheme != "learned":
            nats = list(map(mean, zip(*(one["nats_by_place"] for one in measured))))
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
    """v2 and v4 with each vocabulary, after as much text and after as much time."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    results = results_of("vocabulary")
    for ax, rung in zip(axes, ("v2", "v4")):
        for limit, label in (("18.6 MB", "after 18.6 MB of text"), ("300 s", "after 300 s on two cores")):
            values = {size: bpb_of(results[name]) for size in VOCABULARIES
                      if (name := f"{rung}, {limit}, {size:,}") in results}  # fmt: skip
            low, means, high = (list(map(f, values.values())) for f in (min, mean, max))
            (line,) = ax.plot(list(values), means, "o-", label=label)
            ax.fill_between(list(values), low, high, alpha=0.25, color=line.get_color())
        ax.set(xscale="log", title=rung, xlabel="tokens in the vocabulary", ylabel="validation bits per byte")
        ax.set_xticks(VOCABULARIES, [f"{size:,}" for size in VOCABULARIES], fontsize=8)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    return figure


def plot_dropout(axes, text):
    """v3 on a text that it reads many times, with more and more dropout."""
    for k, p in enumerate(("0", "0.1", "0.2", "0.3")):
        results = full_length(results_of("dropout")[f"{text}, {p}"])
        if not results:
            raise UserError(f"no run of {text!r} with dropout {p} was trained to its end, which the picture shows; "
                            f"{command('dropout')} makes it")  # fmt: skip
        summary, n = results[0]["summary"], len(results[0]["log"])
        epochs_a_step = summary["epochs"] / summary["steps"]
        style = {"color": f"C{k}", "ms": 2 if n > 30 else 3}
        band(axes, results, lambda step, x=epochs_a_step: x * step, "val_loss", label=f"dropout {p}", **style)
        axes.plot([epochs_a_step * record["step"] for record in results[0]["log"]],
                  [mean(result["log"][i]["train_loss"] for result in results) for i in range(n)], ":", color=f"C{k}",
                  lw=1)  # fmt: skip
    axes.set(title=f"v3 on {text}", xlabel="times that the text was read", ylabel="loss (dotted: training)")
    axes.legend(fontsize=8)


def plot_dropouts(plt):
    """What dropout does to v3, trained by the usual recipe, where a text is read many times."""
    texts = list(dict.fromkeys(name.rpartition(", ")[0] for name in results_of("dropout")))
    figure, axes = plt.subplots(1, len(texts), figsize=(12, 3.6), layout="constrained")
    for ax, text in zip(axes, texts):
        plot_dropout(ax, text)
    return figure


def plot_two_hours(plt):
    """The best run as it went, and its test perplexities among published ones."""
    log, perplexities = best_run()["log"], word_perplexities()
    figure, (course, bars) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    minutes = [record["seconds"] / 60 for record in log]
    course.plot(minutes, [record["val_word_ppl"] for record in log], "o-", label="windows of 512 side by side")
    sliding = perplexities["v4, windows of 512 that slide by 64"][0]
    course.plot(minutes[-1:], [sliding], "C3D", label="sliding by 64, at the end")
    for record in [*log[:-2], log[-1]]:  # the last two are close together
        course.annotate(f"{record['val_word_ppl']:.0f}", (record["seconds"] / 60, record["val_word_ppl"]), (4, 5),
                        textcoords="offset points", fontsize=8)  # fmt: skip
    course.annotate(f"{sliding:.0f}", (minutes[-1], sliding), (7, -4), textcoords="offset points", fontsize=8)
    course.set(xlabel="training on two CPU cores (minutes)", ylabel="validation word perplexity", xlim=(0, 140),
               ylim=(0, 400))  # fmt: skip
    course.legend(fontsize=8)
    rows = [(name, test, "C0") for name, (_, test) in perplexities.items()]
    rows += [(name.partition(" (")[0], test, "0.7") for name, test in LITERATURE.items()]
    names, values, colors = zip(*sorted(rows, key=lambda row: -row[1]))
    bars.barh(names, values, color=colors)
    for k, test in enumerate(values):
        bars.text(test - 1, k, f"{test:.1f}", va="center", ha="right", fontsize=8)
    bars.invert_yaxis()
    bars.grid(False)
    bars.set(xlabel="test word perplexity (grey: trained on GPUs)")
    return figure


PICTURES = {"ladder": plot_ladder, "v3_to_v4": plot_v3_to_v4, "positions": plot_positions,
            "vocabulary": plot_vocabulary, "dropout": plot_dropouts, "two_hours": plot_two_hours}  # fmt: skip


def draw():
    """Write all pictures to results/."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need a library: pip install matplotlib") from None
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "font.size": 9})
    for name, plot in PICTURES.items():
        figure = plot(plt)
        try:
            figure.savefig(ROOT / "results" / f"{name}.png", dpi=110)
        except OSError as error:
            raise FileError(f"cannot write results/{name}.png ({error.strerror}); make room, or make it "
                            "writable") from None  # fmt: skip
        plt.close(figure)
