"""The best run, two hours on two cores, and what has been published on the same text."""

from harness.errors import UserError
from results.plan import EXPERIMENTS, ROOT
from results.store import read_json, result_file, results_of, work_folder

MIXTURE, LEARNING = (ROOT / "results" / "benchmarks" / f"{name}.json" for name in ("mixture", "adaptive"))

# Word perplexities on the test split of WikiText-2 of models that were trained on GPUs. GluonNLP's come from its logs
# at commit 2c480f6, each with its epoch; the logs continue to epoch 750.
LITERATURE = {
    "LSTM, 200 units, 7 readings (GluonNLP)": 127.0,
    "LSTM, 200 units, 36 readings (GluonNLP)": 101.6,
    "LSTM, 650 units, 39 readings (GluonNLP)": 86.9,
    "LSTM, 1,500 units, 40 readings (GluonNLP)": 82.3,
    "pointer sentinel LSTM (Merity et al. 2016)": 80.8,
    "AWD-LSTM (Merity et al. 2017)": 65.8,
}
# The same for models that adapt to the test text while they read it: with a neural cache of 2,000 words (Grave et al.
# 2016), or with dynamic evaluation.
ADAPTIVE = {
    "LSTM, 200 units, neural cache (GluonNLP)": 73.7,
    "LSTM, 1,500 units, neural cache (GluonNLP)": 68.7,
    "LSTM, 650 units, neural cache (GluonNLP)": 66.5,
    "AWD-LSTM, neural cache (GluonNLP)": 56.1,
    "AWD-LSTM, dynamic evaluation (Krause et al. 2018)": 44.3,
}


PLAIN, ADDITIONS = (run.name for run in EXPERIMENTS["best"].runs)
SLIDING, BOTH = ", windows slide by 64", "both, windows slide by 64"  # rows of benchmarks/mixture.py


def best_run(name=PLAIN):
    """The contents of the result file of a run of the experiment `best`, PLAIN or ADDITIONS."""
    return results_of("best")[name][0]


def best_folder(name=PLAIN):
    """Where `experiments.py best` trains it, and leaves its weights."""
    run, seed = {run.name: run for run in EXPERIMENTS["best"].runs}[name], EXPERIMENTS["best"].seeds[0]
    return work_folder(result_file(run, seed)) / "run" / run.constants["POSITION"]


def mixtures(path, command, *names):
    """Rows of the file that `command` (benchmarks/mixture.py) wrote. Raises ValueError if one of `names` is missing."""
    rows = {row["run"]: row for row in read_json(path)["runs"]}
    for name in names:
        if name not in rows:
            raise UserError(f"{path.name} has no row {name!r}; train its networks with python results/experiments.py "
                            f"best, then run {command}")  # fmt: skip
    return [rows[name] for name in names]


def word_perplexities():
    """{model and how it was evaluated: (word perplexity on the validation split, on the test split)}, all static."""
    run = best_run()
    summary, measured = run["summary"], run["measured"]
    alone, both = mixtures(MIXTURE, "python benchmarks/mixture.py", "results/best" + SLIDING, BOTH)
    found = {
        "v4, windows of 512 side by side": (summary["val_word_ppl"], summary["test_word_ppl"]),
        "v4, windows of 512 that slide by 64": (summary["val_word_ppl_sliding"], measured["test_sliding"]["word_ppl"]),
    }
    kinds = {"v4 and a 6-gram, sliding": (alone, "mixed"), "v4 and a second network, sliding": (both, "network"),
             "v4, a second network and a 6-gram, sliding": (both, "mixed")}  # fmt: skip
    for name, (row, kind) in kinds.items():
        found[name] = tuple(row[f"{split}_{kind}_word_ppl"] for split in ("val", "test"))
    return found


def adapted_word_perplexities():
    """{models: word perplexity on the test split} with networks that keep learning while they read (dynamic
    evaluation)."""
    alone, both = mixtures(LEARNING, "python benchmarks/mixture.py --dynamic 2e-4", "results/best", "both")
    return {
        "v4, dynamic evaluation": best_run()["measured"]["test_dynamic_eval"]["word_ppl"],
        "v4 and a 6-gram, dynamic evaluation": alone["test_mixed_word_ppl"],
        "v4 and a second network, dynamic evaluation": both["test_network_word_ppl"],
        "v4, a second network and a 6-gram, dynamic evaluation": both["test_mixed_word_ppl"],
    }
