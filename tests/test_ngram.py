"""The n-gram model against its definition, written out with dictionaries, and against published numbers."""

import math
from collections import Counter

import numpy as np
import pytest
from common import ROOT, tiny_tokens

from benchmarks import ngram

WIKITEXT = ROOT.parent / "shared" / "wikitext-2"


class Written:
    """Interpolated modified Kneser-Ney as Chen and Goodman (1999) write it, for tuples of ids."""

    def __init__(self, ids, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        grams = {n: Counter(tuple(ids[i - n + 1 : i + 1]) for i in range(n - 1, len(ids))) for n in range(1, order + 1)}
        self.count = {order: grams[order]}
        for n in range(1, order):
            self.count[n] = Counter(gram[1:] for gram in grams[n + 1])  # different ids before it
            for gram in grams[n]:
                self.count[n].setdefault(gram, 0)  # only at the beginning of the text
        self.discount = {}
        for n, count in self.count.items():
            of = [sum(c == k for c in count.values()) for k in range(5)]
            if 0 in of[1:]:
                self.discount[n] = [0, 0.5, 0.5, 0.5]
                continue
            y = of[1] / (of[1] + 2 * of[2])
            self.discount[n] = [0, 1 - 2 * y * of[2] / of[1], 2 - 3 * y * of[3] / of[2], 3 - 4 * y * of[4] / of[3]]

    def probability(self, history, w):
        n = len(history) + 1
        lower = self.probability(history[1:], w) if history else 1 / self.vocab_size
        behind = {gram: c for gram, c in self.count[n].items() if gram[:-1] == history}
        total = sum(behind.values())
        if not total:
            return lower
        taken = [self.discount[n][min(c, 3)] for c in behind.values()]
        c = behind.get((*history, w), 0)
        return (c - self.discount[n][min(c, 3)] + sum(taken) * lower) / total


def text(n, seed, vocab_size=6):
    """A text in which ids follow each other unevenly, so that all counts from 1 to 4 occur."""
    random, ids = np.random.default_rng(seed), [0]
    for _ in range(n - 1):
        ids.append((ids[-1] + int(random.zipf(1.6))) % vocab_size)
    return np.array(ids)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_definition(order):
    ids, other = text(400, 1, 60), text(60, 2, 61)  # the last id is not in the training text
    ours, theirs = ngram.KneserNey(ids, 61, order), Written(ids.tolist(), 61, order)
    assert [0, 0.5, 0.5, 0.5] not in theirs.discount.values()
    expected = []
    for i, w in enumerate(other.tolist()):
        history = tuple(other[max(0, i - order + 1) : i].tolist())
        expected.append(theirs.probability(history, w))
    assert np.allclose(ours.probabilities(other), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_probabilities_sum_to_one(order):
    """Of all ids behind a history, also one that the text does not hold or ends with."""
    ids = text(500, 3)
    model = ngram.KneserNey(ids, 9, order)
    for history in (ids[-4:].tolist(), [0, 1, 2], [8, 8], [], ids[100:107].tolist()):
        p = [model.probabilities([*history, w])[-1] for w in range(9)]
        assert sum(p) == pytest.approx(1, abs=1e-12) and min(p) > 0


def test_a_text_without_some_counts():
    p = ngram.KneserNey([0, 1, 0, 1], 2, 3).probabilities([0, 1, 0, 1])
    assert ((0 < p) & (p < 1)).all()


def test_words_end_lines():
    text = " a b\n\n c \n"
    assert ngram.words_of(text) == ["a", "b", "<eol>", "<eol>", "c", "<eol>"]
    assert len(ngram.words_of(text)) == len(text.split()) + text.count("\n")


def test_words_that_training_has_not_have_no_number():
    assert ngram.measure_words({"train": ["a", "b"] * 9, "val": ["a"], "test": ["c"]}, 2) is None


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 is not at hand")
@pytest.mark.parametrize(("order", "val", "test"), [(4, 233.9, 219.1), (5, 232.5, 217.8)])
def test_wikitext_2(order, val, test):
    splits = {split: ngram.words_of((WIKITEXT / f"wiki.{name}.tokens").read_text(encoding="utf-8"))
              for split, name in (("train", "train"), ("val", "valid"), ("test", "test"))}  # fmt: skip
    metrics = ngram.measure_words(splits, order)
    assert metrics["val_word_ppl"] == pytest.approx(val, abs=0.05)
    assert metrics["test_word_ppl"] == pytest.approx(test, abs=0.05)


def test_the_metrics_are_those_of_the_rungs():
    sizes = {"train": 500, "val": 90, "test": 80}
    tokens = {split: tiny_tokens(n, 20, seed=n) for split, n in sizes.items()}
    metrics = ngram.measure_tokens(tokens, 20, 2)
    p = ngram.KneserNey(tokens["train"].ids.numpy(), 20, 2).probabilities(tokens["val"].ids.numpy())
    nats = -sum(math.log(x) for x in p[1:])
    assert metrics["val_bpb"] == pytest.approx(nats / math.log(2) / tokens["val"].n_bytes)
    assert metrics["val_word_ppl"] == pytest.approx(math.exp(nats / tokens["val"].n_words))
