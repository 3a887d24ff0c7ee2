"""What counting can do: an n-gram model of the same text, which takes seconds.

    python benchmarks/ngram.py               the tokens and the words of data/; results go to results/benchmarks/
    python benchmarks/ngram.py --data data/novel    another text
    python benchmarks/ngram.py --order 7     n-grams of up to 7 tokens

The model is interpolated modified Kneser-Ney (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling"), the best known method that only counts. Like a trained network it is static: every token gets a
probability before it is read, and only the training split is counted.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import keep, machine, table  # noqa: E402
from bpe_tokenizer import BPETokenizer  # noqa: E402
from data import load_tokens, vocabulary_file  # noqa: E402
from harness.errors import UserError  # noqa: E402


class KneserNey:
    """An n-gram model of a text.

    A sequence of 1 to `order` ids is known by its place among all that the text holds, sorted: first of its history,
    all of it but the last id, then of that id. So a sequence is one number, history * vocab_size + id, and a sorted
    array finds it.
    """

    def __init__(self, ids, vocab_size, order):
        """`ids` (n,): the training text. `vocab_size`: tokens that do not occur in the text share the probability that
        is left for unseen ones."""
        ids = np.asarray(ids, dtype=np.int64)
        self.vocab_size, self.order = vocab_size, order
        self.sequences, self.tables = [], []  # of each length from 1 on
        ending, first, n_seen = [], [], []  # for each length: the sequence that ends at each position, ...
        for n in range(1, order + 1):
            history = ending[-1][n - 2 : -1] if n > 1 else 0  # of the sequences that end at n - 1, n, ...
            numbers = history * vocab_size + ids[n - 1 :]
            sequences, places, which, count = np.unique(numbers, True, True, True)  # where, which, and how often
            self.sequences.append(sequences)
            ending.append(np.concatenate([np.full(n - 1, -1), which]))  # -1: too close to the beginning
            first.append(places + n - 1)
            n_seen.append(count)
        for n in range(1, order + 1):
            count = n_seen[-1]
            if n < order:  # after how many different ids a sequence occurs (equation 20), not how often
                count = np.bincount(ending[n - 1][first[n]], minlength=len(self.sequences[n - 1]))
            history = ending[n - 2][first[n - 1] - 1] if n > 1 else np.zeros(len(count), dtype=np.int64)
            n_histories = len(self.sequences[n - 2]) if n > 1 else 1
            discount = discounts(count)[np.minimum(count, 3)]
            total = np.bincount(history, count, n_histories)  # of all ids after a history
            left = np.bincount(history, discount, n_histories)  # the part of it for unseen sequences
            self.tables.append((count - discount, total, left))

    def probabilities(self, ids):
        """The probability of each of `ids` (n,), given those before it."""
        ids = np.asarray(ids, dtype=np.int64)
        p, history = np.full(len(ids), 1 / self.vocab_size), np.zeros(len(ids), dtype=np.int64)
        for sequences, (count, total, left) in zip(self.sequences, self.tables):
            wanted = history * self.vocab_size + ids
            place = np.minimum(np.searchsorted(sequences, wanted), len(sequences) - 1)
            found = (history >= 0) & (sequences[place] == wanted)
            of = np.maximum(history, 0)
            goes_on = (history >= 0) & (total[of] > 0)  # false if only the end of the text has it
            seen = np.where(found, count[place], 0)
            p = np.where(goes_on, (seen + left[of] * p) / np.where(goes_on, total[of], 1), p)
            history = np.concatenate([[-1], np.where(found, place, -1)[:-1]])
        return p


def discounts(count):
    """The discounts for counts of 0, 1, 2 and 3 or more (Chen and Goodman 1999, equation 26). If too few sequences have
    these counts for a sensible estimate, the discounts are 0.5, 1 and 1.5, as in KenLM."""
    n = [np.count_nonzero(count == k) for k in range(1, 5)]
    if 0 not in n:
        share = n[0] / (n[0] + 2 * n[1])
        estimate = np.array([0, *(k - (k + 1) * share * n[k] / n[k - 1] for k in (1, 2, 3))])
        if ((0 <= estimate) & (estimate <= (0, 1, 2, 3))).all():
            return estimate
    return np.array([0, 0.5, 1, 1.5])


def words_of(text):
    """The words of a text, with one end-of-line per line, as word perplexity counts them."""
    return text.replace("\n", " \n ").replace("\n", "<eol>").split()


def measure_tokens(tokens, vocab_size, order):
    """Metrics of an n-gram model of tokens, as the rungs report them: {"val_bpb": ..., "test_word_ppl": ..., ...}."""
    start = time.perf_counter()
    model = KneserNey(tokens["train"].ids.numpy(), vocab_size, order)
    metrics = {"order": order, "seconds": time.perf_counter() - start}
    for split in ("val", "test"):
        of = tokens[split]
        nats = -np.log(model.probabilities(of.ids.numpy())[1:]).sum()  # the rungs predict all tokens but the first
        metrics[f"{split}_bpb"] = nats / math.log(2) / of.n_bytes
        metrics[f"{split}_word_ppl"] = math.exp(nats / of.n_words) if of.n_words else None
    return metrics


def measure_words(splits, order):
    """The same for a model of words; None if a held-out split has words that the training split lacks, since the result
    would then depend on how those are treated."""
    start = time.perf_counter()
    number = {word: i for i, word in enumerate(dict.fromkeys(splits["train"]))}
    if not number.keys() >= {*splits["val"], *splits["test"]}:
        return None
    ids = {split: np.fromiter(map(number.get, words), dtype=np.int64) for split, words in splits.items()}
    model = KneserNey(ids["train"], len(number), order)
    metrics = {"order": order, "seconds": time.perf_counter() - start}
    for split in ("val", "test"):
        metrics[f"{split}_word_ppl"] = math.exp(-np.log(model.probabilities(ids[split])).mean())
    return metrics


def report(results):
    """The results as Markdown."""
    rows = []
    for kind in ("tokens", "words"):
        for one in results[kind]:
            cells = [one.get(key) for key in ("val_bpb", "test_bpb", "val_word_ppl", "test_word_ppl")]
            cells = [f"{x:.4f}" if x and i < 2 else f"{x:,.1f}" if x else "–" for i, x in enumerate(cells)]
            rows.append([f"{one['order']}-gram of {kind}", *cells, f"{one['seconds']:.1f}"])
    head = ["", "val bpb", "test bpb", "val word ppl", "test word ppl", "seconds to count"]
    return f"{table(head, rows)}\nText: {results['dataset']}.\nMachine: {results['machine']}.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", metavar="DIR", help="dataset folder (default: data)")
    parser.add_argument("--vocabulary", default="bpe_vocab.json", metavar="FILE", help="of the dataset folder")
    parser.add_argument("--order", type=int, default=6, metavar="N", help="longest n-gram (default: 6)")
    args = parser.parse_args()
    if not 1 <= args.order <= 20:
        raise UserError(f"--order {args.order} must be from 1 to 20")
    tokens = load_tokens(args.vocabulary, args.data)
    tokenizer = BPETokenizer.load(vocabulary_file(args.vocabulary, args.data))
    splits = {split: words_of(tokenizer.decode(of.ids.tolist())) for split, of in tokens.items()}
    orders = range(1, args.order + 1)
    results = {"dataset": tokens["train"].dataset, "machine": machine(),
               "tokens": [measure_tokens(tokens, tokenizer.vocab_size, n) for n in orders],
               "words": [one for n in orders if (one := measure_words(splits, n))]}  # fmt: skip
    text = report(results)
    print(text, end="")
    if args.data == "data" and results["dataset"] != "sample":  # what the pages show
        keep("ngram", results, text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"ngram.py: {error}")
