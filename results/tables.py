"""The tables of README.md and results/README.md, each a function that returns Markdown."""

import math
import re
from statistics import mean

from benchmarks.tables import table
from results import continued, course, step_time
from results.best import ADAPTIVE, LITERATURE, adapted_word_perplexities, best_run, word_perplexities
from results.plan import (BATCHES, DROPOUTS, EQUAL_SECONDS, EXPERIMENTS, MOMENTA, ONE_LAYER_SECONDS, READINGS, ROOT,
                          VOCABULARIES, Run)  # fmt: skip
from results.store import mean_of, read_json, read_text, results_of, spread, spread_of

BENCHMARKS = ROOT / "results" / "benchmarks"
TIMINGS = ("tokenizer", "training", "generation", "startup", "scaling", "soak", "beside", "ngram", "mixture",
           "adaptive", "llama_cpp")


def model_in_words(summary):
    """A short description of the model in a summary."""
    rung, constants = summary["rung"], summary["hyperparameters"]
    if rung == "v0":
        return "bigram table"
    if rung.startswith("v1"):
        return f"MLP on {constants['CONTEXT_SIZE']} tokens" + (", lean" if rung == "v1_1" else "")
    kinds = {"v2": "transformer", "v3": "GPT-2 block, schedule", "v3_1": "modern block, Muon"}
    kind = kinds.get(rung) or f"{kinds['v3_1']}, {summary['position']}"
    return f"{kind}; {constants['N_LAYER']} × {constants['N_EMBD']}, context {constants['BLOCK_SIZE']}"


def ladder():
    rows, peaks, of_all = [], step_time.read().get("peak_mb", {}), results_of("ladder")
    for run in EXPERIMENTS["ladder"].runs:
        results = of_all[run.name]
        summary, step, peak = results[0]["summary"], step_time.seconds_of(run), peaks.get(step_time.model_key(run))
        rows.append([summary["rung"].replace("_alibi_rope", ""), model_in_words(summary),
                     f"{summary['n_params'] / 1e6:.2f} M", f"**{mean_of(results, 'val_bpb'):.4f}**",
                     spread_of(results, "val_bpb").partition(" ")[2].strip("()"),
                     f"{mean_of(results, 'val_word_ppl'):,.1f}", f"{step * summary['steps'] / 60:.1f}" if step else "–",
                     f"{peak:,.0f}" if peak else "–"])  # fmt: skip
    return table(["rung", "model", "parameters", "val bpb", "lowest to highest", "val word ppl", "training, min",
                  "peak memory, MB"], rows, left=(0, 1))  # fmt: skip


def step_times():
    """The step of each rung of the ladder, in trials of one model after the other."""
    trials, rows = step_time.read(), []
    for run in EXPERIMENTS["ladder"].runs:
        key, constants = step_time.model_key(run), results_of("ladder")[run.name][0]["summary"]["hyperparameters"]
        if key not in trials.get("trials", {}):
            raise step_time.not_measured(run)
        seconds, ms = trials["seconds"][key], sorted(1000 * trial for trial in trials["trials"][key])
        tokens = constants["BATCH_SIZE"] * constants.get("BLOCK_SIZE", 1)
        rows.append([run.name, f"{1000 * seconds:.1f}", f"{ms[0]:.1f} to {ms[-1]:.1f}", f"{ms[-1] / ms[0] - 1:.0%}",
                     f"{tokens / seconds:,.0f}"])  # fmt: skip
    return (table(["rung", "ms per step", "fastest to slowest", "difference", "tokens/s"], rows) +
            f"\n{trials['machine']}, {trials['date']}.")  # fmt: skip


def counting():
    """The rungs of the ladder compared with the best n-gram model: from which evaluation on all seeds are better."""
    counted, of_all, rows = n_gram(), results_of("ladder"), []
    for run in EXPERIMENTS["ladder"].runs:
        results, step, below = of_all[run.name], step_time.seconds_of(run), None
        logs = [{record["step"]: record["val_bpb"] for record in result["log"]} for result in results]
        for n in sorted(logs[0], reverse=True):
            if not all(log.get(n, 9) < counted["val_bpb"] for log in logs):
                break
            below = n
        minutes = f", {below * step / 60:.0f} min" if below and step else ""
        rows.append([run.name, f"{mean_of(results, 'val_bpb') - counted['val_bpb']:+.3f}",
                     f"step {below:,}{minutes}" if below else "never"])  # fmt: skip
    title = f"from the {counted['order']}-gram's {counted['val_bpb']:.4f}"
    return table(["rung", f"val bpb, {title}", "better from"], rows)


def n_gram():
    """The n-gram model of tokens with the fewest bits per byte on the validation split (benchmarks/ngram.py)."""
    return min(read_json(BENCHMARKS / "ngram.json")["tokens"], key=lambda one: one["val_bpb"])


def closed_form():
    """v0's loss compared with that of the counts, from the run in results/runs/."""
    summary = read_json(ROOT / "results" / "runs" / "v0" / "summary.json")
    trained, best = summary["train_text_loss"], summary["closed_form_loss"]
    return (f"Trained by gradient descent, v0's table reaches {trained:.4f} nats per token on the training text; the "
            f"counts give {best:.4f}, so it comes within {100 * (trained / best - 1):.2f}%.")  # fmt: skip


def memory():
    """Peak memory and speed of v1 and v1_1, from the trials of step_time.json."""
    trials, rows = step_time.read(), []
    for rung in ("v1", "v1_1"):
        key, results = step_time.model_key(Run(rung, rung)), results_of("ladder")[rung]
        if key not in trials["peak_mb"]:
            raise step_time.not_measured(Run(rung, rung))
        constants, peak = results[0]["summary"]["hyperparameters"], trials["peak_mb"][key]
        tokens = constants["BATCH_SIZE"] * constants["BLOCK_SIZE"]
        rows.append([rung, f"{peak:,.0f}", f"{peak - trials['libraries_mb']:,.0f}",
                     f"{tokens / trials['seconds'][key]:,.0f}", spread_of(results, "val_bpb")])  # fmt: skip
    return table(["rung", "peak memory, MB", "of it above the libraries", "tokens/s", "val bpb"], rows)


def recipe():
    """v3's recipe and the usual one, each at several rates."""
    rows = [[name, spread_of(results, "val_bpb"), f"{mean_of(results, 'val_word_ppl'):,.0f}"]
            for name, results in results_of("recipe").items()]  # fmt: skip
    return table(["model", "val bpb", "val word ppl"], rows)


def recipe_search():
    """The trials that led to v3's recipe, one seed: on half of the ladder's text, then on all of it, the best first."""
    rows = [[f"{one['megabytes']:.1f}", f"{one['windows']}", f"{one['rate']:g}", f"{one['beta2']:g}",
             f"{one['warmup']}", one["other"] or "–", f"{one['val_bpb']:.4f}"]
            for one in read_json(ROOT / "results" / "tried" / "v3_recipe.json")]  # fmt: skip
    head = ["text, MB", "windows a step", "rate", "β2", "warm-up, steps", "other", "val bpb"]
    return table(head, rows, left=(5,))


def recipe_parts():
    """v3, and by how much it is worse with each of its parts changed."""
    of_all = results_of("recipe_parts")
    v3 = mean_of(of_all["v3"], "val_bpb")
    rows = [[name, f"{mean_of(results, 'val_bpb'):.4f}",
             "" if name == "v3" else f"{mean_of(results, 'val_bpb') - v3:+.4f}",
             f"{mean_of(results, 'val_word_ppl'):,.0f}"] for name, results in of_all.items()]  # fmt: skip
    return table(["model", "val bpb", "change", "val word ppl"], rows)


def shape():
    """By depth, then by width, at equal text; the other rates, and equal seconds, beside the usual ones."""
    of_all, rows = results_of("shape"), []
    for name, results in of_all.items():
        if ", " in name:
            continue
        others = [f"{other.partition('rate ')[2]}: {mean_of(of_all[other], 'val_bpb'):.4f}"
                  for other in of_all if other.startswith(f"{name}, rate")]  # fmt: skip
        as_long = results if name == "1 × 256" else of_all.get(f"{name}, as long as 1 × 256")
        time = f"{spread_of(as_long, 'val_bpb')}; {as_long[0]['summary']['epochs']:.2f}" if as_long else "–"
        rows.append([name, f"{results[0]['summary']['n_params'] / 1e6:.2f} M", spread_of(results, "val_bpb"),
                     "; ".join(others) or "–", time])  # fmt: skip
    return table(["v3, layers × width", "parameters", "val bpb at equal text", "at other rates",
                  f"val bpb after {ONE_LAYER_SECONDS} s; readings"], rows)  # fmt: skip


TRAINED = {"v3": "v3's block, AdamW", "AdamW": "v4's block, AdamW", "Muon": "v4's block, Muon"}
PLACES = {"at random": "learned, random at the start", "sinusoids": "learned, sinusoids at the start", "RoPE": "RoPE"}


def at_best_rate(results, trained, place):
    """(learning rate or "", results) of the experiment v3_to_v4 at the best rate for this way of training and of
    encoding positions; ("", []) if there is no result yet."""
    found = {name: results[name] for name in results if re.fullmatch(rf"{trained}[ .\d]*, {place}", name)}
    if not found:
        return "", []
    name = min(found, key=lambda name: mean_of(found[name], "val_bpb"))
    return name.partition(",")[0].removeprefix(trained).strip(), found[name]


def v3_to_v4():
    """Each way of training with each way of encoding positions, at its best rate."""
    results, rows = results_of("v3_to_v4"), []
    for trained, title in TRAINED.items():
        cells = []
        for place in PLACES:
            rate, of_rate = at_best_rate(results, trained, place)
            cells.append(spread_of(of_rate, "val_bpb") + f"; rate {rate}" * bool(rate))
        rows.append([title, *cells])
    return table(["", *PLACES.values()], rows)


def v3_to_v4_rates():
    """All rates of the experiment v3_to_v4."""
    rows, of_all = [], results_of("v3_to_v4")
    for name, results in of_all.items():
        trained, _, place = name.partition(", ")
        kind, _, rate = trained.partition(" ")
        rows.append([TRAINED[kind], PLACES[place], rate or "–", str(len(results)), spread_of(results, "val_bpb")])
    return table(["block and optimizer", "positions", "rate", "seeds", "val bpb"], rows, left=(0, 1))


WAYS = {"side_by_side": "side by side", "sliding": "sliding"}  # of placing windows over a text


def windows_cell(results, way, size):
    return spread([result["measured"][way].get(str(size)) for result in results])


def positions():
    """Every scheme trained at 256 tokens, in windows 1, 4 and 16 times as long."""
    columns, rows = [(size, way) for size in (256, 1024, 4096) for way in WAYS], []
    of_all = results_of("positions")
    for scheme in ("alibi", "rope", "sinusoidal", "learned", "none"):
        results = of_all[f"{scheme}, 256"]
        rows.append([scheme, *(windows_cell(results, way, size).partition(" ")[0] for size, way in columns)])
    return table(["scheme", *(f"{size:,}, {WAYS[way]}" for size, way in columns)], rows)


def positions_all():
    rows, multiples = [], (1, 2, 4, 8, 16)
    for name, results in results_of("positions").items():
        length = results[0]["summary"]["hyperparameters"]["BLOCK_SIZE"]
        for way, title in WAYS.items():
            rows.append([name, title, *(windows_cell(results, way, length * times) for times in multiples)])
    head = ["scheme, trained at", "windows", "as long", *(f"{times} times" for times in multiples[1:])]
    return table(head, rows, left=(0, 1))


def lengths(rung, size):
    """{length: (seconds of training on the cores of step_time.json, results)} of both runs with a vocabulary."""
    runs, of_all = {run.name: run for run in EXPERIMENTS["vocabulary"].runs}, results_of("vocabulary")
    found = {}
    for length in ("18.6 MB", "300 s"):
        name = f"{rung}, {length}, {size:,}"
        found[length] = of_all[name][0]["summary"]["steps"] * step_time.seconds_of(runs[name]), of_all[name]
    return found


def bpb_after(seconds, rung, size):
    """Bits per byte after so many seconds: on the line through both runs, over the logarithm of the time."""
    (t0, results0), (t1, results1) = lengths(rung, size).values()
    share = math.log(seconds / t0) / math.log(t1 / t0)
    return (1 - share) * mean_of(results0, "val_bpb") + share * mean_of(results1, "val_bpb")


def vocabulary():
    """Each vocabulary with v2 and v4: both runs with their seconds, and equal seconds; the best of a rung in bold."""
    rows = []
    for rung, seconds in EQUAL_SECONDS.items():
        of_size = {size: [lengths(rung, size), bpb_after(seconds, rung, size)] for size in VOCABULARIES}
        best_text = min(of_size, key=lambda size: mean_of(of_size[size][0]["18.6 MB"][1], "val_bpb"))
        best_time = min(of_size, key=lambda size: of_size[size][1])
        for size, (runs, after) in of_size.items():
            cells = [(f"{time:.0f}", spread_of(results, "val_bpb")) for time, results in runs.values()]
            text, time = cells[0][1], f"{after:.3f}"
            rows.append([rung, f"{size:,}", cells[0][0], f"**{text}**" if size == best_text else text, *cells[1],
                         f"**{time}**" if size == best_time else time])  # fmt: skip
    equal = " or ".join(f"{seconds} s ({rung})" for rung, seconds in EQUAL_SECONDS.items())
    return table(["rung", "vocabulary", "s for 18.6 MB", "val bpb", "s of the other run", "val bpb",
                  f"after {equal}, about"], rows)  # fmt: skip


def dropout():
    """Each number of readings with each dropout rate, the best of a row in bold: at the end, and the lowest value on
    the way there."""
    of_all, rows = results_of("dropout"), []
    for readings in READINGS:
        results = [of_all[f"{readings} times, {p:g}"] for p in DROPOUTS]
        ends = [[result["log"][-1]["val_bpb"] for result in of_p] for of_p in results]
        best = min(ends, key=mean)
        cells = [f"**{spread(values)}**" if values is best else spread(values) for values in ends]
        rows.append([readings, *cells, *(spread_of(of_p, "val_bpb").partition(" ")[0] for of_p in results)])
    head = [f"{when}, dropout {p:g}" for when in ("at the end", "lowest") for p in DROPOUTS]
    return table(["times that the text is read", *head], rows, left=())


def momentum():
    """Each momentum at each rate, with small and with large batches, the best of each size in bold."""
    of_all, rows = results_of("momentum"), []
    rates = sorted({name.rpartition("rate ")[2] for name in of_all}, key=float)
    for windows, steps in BATCHES.items():
        of_size = [name for name in of_all if name.startswith(f"{windows} windows") and of_all[name]]
        best = min(of_size, key=lambda name: mean_of(of_all[name], "val_bpb"), default=None)
        for m in MOMENTA:
            names = [f"{windows} windows, momentum {m:g}, rate {rate}" for rate in rates]
            cells = [spread_of(of_all[name], "val_bpb") if of_all.get(name) else "–" for name in names]
            cells = [f"**{cell}**" if name == best else cell for name, cell in zip(names, cells)]
            rows.append([windows, f"{steps:,}", f"{m:g}", *cells])
    return table(["windows per step", "steps", "momentum", *(f"rate {rate}" for rate in rates)], rows, left=())


def metrics():
    """Windows, accuracy and calibration, averaged over the seeds."""
    rows, forms = [], {"val_bpb": ".4f", "val_bpb_sliding": ".4f", "val_word_ppl": ".1f", "val_word_ppl_sliding": ".1f",
                       "test_bpb": ".4f", "test_word_ppl": ".1f", "val_top_1": ".1%", "val_top_5": ".1%",
                       "val_calibration_error": ".1%"}  # fmt: skip
    for name in ("v3", "v3_1", "v4, alibi", "v4, rope"):
        results = results_of("ladder")[name]
        rows.append([name, *(format(mean_of(results, key), form) for key, form in forms.items())])
    return table(["run", "val bpb", "val bpb, sliding", "val word ppl", "val word ppl, sliding", "test bpb",
                  "test word ppl", "top-1", "top-5", "calibration error"], rows)  # fmt: skip


def temperature():
    measured = [result["measured"] for result in results_of("ladder")["v3"]]
    before, after = ([one[key]["calibration_error"] for one in measured] for key in ("test", "test_tempered"))
    bpb = [mean(one[key]["bpb"] for one in measured) for key in ("test", "test_tempered")]
    fitted = spread([one["temperature"] for one in measured], "{:.2f}")
    return (f"Fitted on the validation split, v3's temperature is {fitted}; with it the calibration error on the "
            f"test split goes from {spread(before, '{:.2%}')} to "
            f"{spread(after, '{:.2%}')}, and bits per byte from {bpb[0]:.4f} to {bpb[1]:.4f}.")  # fmt: skip


def two_hours():
    rows = []
    for name, results in results_of("two_hours").items():
        for result in results:
            s = result["summary"]
            rows.append([name, f"{s['steps']:,}", f"{s['n_params'] / 1e6:.1f} M", f"{s['val_bpb']:.4f}",
                         f"{s['val_bpb_sliding']:.4f}", f"{s['val_word_ppl_sliding']:.1f}",
                         f"{result['log'][-1]['train_loss']:.2f}"])  # fmt: skip
    return table(["choice", "steps", "parameters", "val bpb", "val bpb, sliding", "val word ppl, sliding",
                  "training loss at the end"], rows)  # fmt: skip


def two_hours_best():
    """The best runs among published static models, the worst first."""
    rows = [(name, f"{val:.1f}", test) for name, (val, test) in word_perplexities().items()]
    rows += [(name, "–", test) for name, test in LITERATURE.items()]
    rows = [[name, val, f"**{test:.1f}**" if name.startswith("v4") else f"{test:.1f}"]
            for name, val, test in sorted(rows, key=lambda row: -row[2])]  # fmt: skip
    texts = []
    for run, title in zip(EXPERIMENTS["best"].runs, ("v4", "The second network")):
        if not (step := step_time.seconds_of(run)):
            raise step_time.not_measured(run)
        s = best_run(run.name)["summary"]
        texts.append(f"{title}: {s['steps']:,} steps of {step:.3f} s on two idle cores, {s['steps'] * step / 60:.0f} "
                     f"minutes, evaluations aside; the text {s['epochs']:.0f} times; {s['n_params'] / 1e6:.1f} million "
                     f"parameters; seed {s['seed']}.")  # fmt: skip
    return table(["model", "val word ppl", "test word ppl"], rows) + "\n" + " ".join(texts) + (
        f" {step_time.read()['machine']}.")


def adaptive():
    """The best runs with dynamic evaluation among other models that adapt to the test text, the worst first."""
    rows = [*adapted_word_perplexities().items(), *ADAPTIVE.items()]
    rows = [[name, f"**{test:.1f}**" if name.startswith("v4") else f"{test:.1f}"]
            for name, test in sorted(rows, key=lambda row: -row[1])]  # fmt: skip
    return table(["model that adapts to the test text", "test word ppl"], rows)


def dynamic_eval():
    """The rates that were tried for dynamic evaluation; 0 means without it."""
    rows = [[f"{float(rate):g}", f"{bpb:.4f}"] for rate, bpb in best_run()["measured"]["rates"].items()]
    return table(["rate", "bpb on the first 32,768 tokens of the validation split"], rows)


def benchmark(name):
    """The table that a benchmark wrote, with its headings moved below those of the page."""
    return re.sub("(?m)^#+ ", "#### ", read_text(BENCHMARKS / f"{name}.md"))


TABLES = {make.__name__: make for make in (
    ladder, step_times, counting, closed_form, memory, recipe, recipe_search, recipe_parts, shape, v3_to_v4,
    v3_to_v4_rates, positions, positions_all, vocabulary, dropout, momentum, metrics, temperature, two_hours,
    two_hours_best, adaptive, dynamic_eval,
)}  # fmt: skip
TABLES["continued"] = continued.page
TABLES |= course.TABLES
TABLES |= {f"benchmark_{name}": lambda name=name: benchmark(name) for name in TIMINGS}
