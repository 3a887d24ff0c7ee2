"""The best run, two hours on two cores, and what has been published on the same text."""

from results.store import results_of

LITERATURE = {  # word perplexities on the test split of WikiText-2, of models trained on GPUs
    "LSTM, 200 units (GluonNLP's log, 750 epochs)": 101.6,
    "LSTM, 650 units (GluonNLP's log, 750 epochs)": 86.9,
    "LSTM, 1,500 units (GluonNLP's log, 750 epochs)": 82.3,
    "pointer sentinel LSTM (Merity et al. 2016)": 80.8,
    "AWD-LSTM (Merity et al. 2017)": 65.8,
}


def best_run():
    """What its file holds."""
    return results_of("best")["v4, two hours"][0]


def word_perplexities():
    """{how it was evaluated: (word perplexity on the validation split or None, on the test split)}"""
    run = best_run()
    summary, measured = run["summary"], run["measured"]
    return {
        "v4, windows of 512 side by side": (summary["val_word_ppl"], summary["test_word_ppl"]),
        "v4, windows of 512 that slide by 64": (summary["val_word_ppl_sliding"], measured["test_sliding"]["word_ppl"]),
        "v4, sliding, with dynamic evaluation": (None, measured["test_dynamic_eval"]["word_ppl"]),
    }
