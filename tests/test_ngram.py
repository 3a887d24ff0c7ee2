"""The n-gram model against its definition, written out with dictionaries, and against published numbers."""

import itertools
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch.nn.functional as F
from common import LATE_RUNGS, MODELS, ROOT, random_model, tiny_tokens

import harness
from benchmarks import mixture, ngram
from results import measures

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
            y = of[1] / (of[1] + 2 * of[2])
            self.discount[n] = [0, 1 - 2 * y * of[2] / of[1], 2 - 3 * y * of[3] / of[2], 3 - 4 * y * of[4] / of[3]]
            assert of[4] and all(0 <= d <= k for k, d in enumerate(self.discount[n])), "the formula does not fit"

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
    ids, other = (np.random.default_rng(seed).zipf(1.5, n) % 230 for seed, n in ((1, 900), (2, 90)))
    ours, theirs = ngram.KneserNey(ids, 230, order), Written(ids.tolist(), 230, order)
    assert set(other) - set(ids)
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


@pytest.mark.parametrize("ids", [[0, 1, 0, 1], text(3000, 7, 5), [k for k in range(40) for _ in range(2 + k % 3)]])
def test_a_text_whose_counts_the_formula_does_not_fit(ids):
    """One without some counts, one in which all is frequent, one with more pairs than single ones."""
    model = ngram.KneserNey(ids, 41, 3)
    p = np.array([[model.probabilities([a, b, w])[-1] for w in range(41)] for a, b in ((0, 1), (1, 1), (40, 40))])
    assert ((0 < p) & (p < 1)).all() and np.allclose(p.sum(1), 1)


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


# ----------------------------------------------------------------------------------------------------------
# A mixture with a network
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "position"), MODELS)
def test_probabilities_of_a_network_are_those_that_its_evaluation_adds_up(name, position, load):
    module, tokens = load(name, BLOCK_SIZE=16), tiny_tokens(150, 40)
    model = random_model(module, 40, position)
    (p, warm) = mixture.network_probabilities(model, tokens.ids, None, (1.0, 1.5))
    assert len(p) == 149
    expected = F.cross_entropy(model(tokens.ids[None, :16].long())[0] / 1.5, tokens.ids[1:17].long())
    assert -np.log(warm[:16]).mean() == pytest.approx(expected.item(), rel=1e-5)
    assert -np.log(p).mean() == pytest.approx(module.evaluate(model, tokens)["loss"], rel=1e-5)
    if name in LATE_RUNGS:
        (sliding,) = mixture.network_probabilities(model, tokens.ids, stride=5)
        assert -np.log(sliding).mean() == pytest.approx(module.evaluate(model, tokens, 5)["loss"], rel=1e-5)


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.8, 0.2), (0.3, 0.7), (0.0, 1.0), (0.5, 0.3, 0.2), (1.0,)])
def test_the_best_weights_are_the_shares_of_the_text(shares):
    """Of a text in which a share of the tokens comes from each model."""
    random, p = np.random.default_rng(5), np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.1, 0.8, 0.1]])
    of = random.choice(len(shares), 200_000, p=shares)
    ids = np.choose(of, [random.choice(3, 200_000, p=one) for one in p[: len(shares)]])
    weights = mixture.best_weights(p[: len(shares), ids])
    assert weights == pytest.approx(shares, abs=0.015) and weights.sum() == pytest.approx(1)


def test_the_best_temperature_is_that_of_the_text():
    """Of a text drawn from the mixture of a model at temperature 2 and of another one."""
    random, logits, other = np.random.default_rng(5), np.log([0.8, 0.15, 0.05]), np.array([0.1, 0.3, 0.6])
    at = {t: np.exp(logits / t) / np.exp(logits / t).sum() for t in (1.0, 2.0, 3.0)}
    ids = np.where(random.random(200_000) < 0.3, random.choice(3, 200_000, p=other),
                   random.choice(3, 200_000, p=at[2.0]))  # fmt: skip
    t, weights = mixture.best_mixture({t: p[None, ids] for t, p in at.items()}, other[ids])
    assert t == 2.0 and weights == pytest.approx([0.7, 0.3], abs=0.02)


def test_the_mixture_of_a_run(load, monkeypatch):
    module = load("v2", MAX_STEPS=4, EVAL_INTERVAL=4)
    module.main()
    monkeypatch.setattr(ngram, "load_tokens", None)  # not its
    one = mixture.measure([module.OUT_DIR], 3, None)
    tokens = module.load_tokens(module.VOCABULARY)
    counted = ngram.measure_tokens(tokens, 500, 3)
    model, _ = harness.load(module.OUT_DIR)
    for split in ("val", "test"):
        assert one[f"{split}_counted_bpb"] == pytest.approx(counted[f"{split}_bpb"])
        assert one[f"{split}_network_bpb"] == pytest.approx(module.evaluate(model, tokens[split])["bpb"], rel=1e-5)
    assert one["val_mixed_bpb"] < min(one["val_tempered_bpb"], one["val_counted_bpb"]) + 1e-9
    assert sum(one["weights"]) == pytest.approx(1) and one["temperature"] in mixture.TEMPERATURES
    assert one["val_tempered_bpb"] != one["val_network_bpb"] or one["temperature"] == 1
    assert mixture.report([one]).count("\n") == 3
    learning = mixture.measure([module.OUT_DIR], 3, None, (1e-4,))
    assert learning["rates"] == [1e-4]
    assert learning["tried"] == {"0.0001": pytest.approx(learning["val_mixed_bpb"], rel=5e-3)}  # val is one part
    sizes = measures.gradient_sizes(model, tokens["train"])
    for split in ("val", "test"):
        found = measures.dynamic_eval(model, tokens[split], 1e-4, sizes)["bpb"]
        assert learning[f"{split}_network_bpb"] == pytest.approx(found) != one[f"{split}_network_bpb"]
    fitted = []
    best_weights = mixture.best_weights
    monkeypatch.setattr(mixture, "best_weights", lambda p: fitted.append(p.shape[1]) or best_weights(p))
    assert mixture.measure([module.OUT_DIR], 3, None) == one
    assert set(fitted) == {len(tokens["val"]) - 1}  # the test split has no say


def test_a_mixture_of_two_networks(load):
    """It is better than each of them, and two that are the same are no better than one. The parts of the mixture are
    those of the networks: at the weights that are best, its loss is what these give."""
    first = load("v2", MAX_STEPS=40, EVAL_INTERVAL=40, LEARNING_RATE=3e-3)
    second = load("v1", MAX_STEPS=40, EVAL_INTERVAL=40, LEARNING_RATE=3e-3)
    for module in (first, second):
        module.main()
    folders = [first.OUT_DIR, second.OUT_DIR]
    alone = [mixture.measure([folder], 3, None) for folder in folders]
    both, same = mixture.measure(folders, 3, None), mixture.measure(folders[:1] * 2, 3, None)
    assert len(both["weights"]) == 3 and sum(both["weights"]) == pytest.approx(1)
    for kind in ("network", "mixed"):
        assert both[f"val_{kind}_bpb"] < min(one[f"val_{kind}_bpb"] for one in alone) + 1e-6
        assert same[f"val_{kind}_bpb"] == pytest.approx(alone[0][f"val_{kind}_bpb"], rel=1e-4)
    ids = first.load_tokens(first.VOCABULARY)["test"].ids
    parts = [mixture.network_probabilities(harness.load(folder)[0], ids, None, (both["temperature"],))[0]
             for folder in folders]  # fmt: skip
    counted = ngram.KneserNey(first.load_tokens(first.VOCABULARY)["train"].ids.numpy(), 500, 3)
    p = np.array(both["weights"]) @ np.stack([*parts, counted.probabilities(ids.numpy())[1:]])
    bits = -np.log2(p).sum() / first.load_tokens(first.VOCABULARY)["test"].n_bytes
    assert both["test_mixed_bpb"] == pytest.approx(bits)


def test_each_network_learns_at_the_rate_that_is_best_for_the_mixture(load):
    """The combination that brute force finds: here the first network had better not learn, and the second had."""
    modules = [load(name, MAX_STEPS=40, EVAL_INTERVAL=40, LEARNING_RATE=3e-3) for name in ("v2", "v1")]
    for module in modules:
        module.main()
    models, tokens = [harness.load(module.OUT_DIR)[0] for module in modules], module.load_tokens(module.VOCABULARY)
    sizes = [measures.gradient_sizes(model, tokens["train"]) for model in models]
    sizes[1] = [1e-3 * size for size in sizes[1]]  # so it takes far larger steps at the same rate
    part = measures.first_part(tokens["val"], harness.load(modules[0].OUT_DIR)[1], 400)
    counted = ngram.KneserNey(tokens["train"].ids.numpy(), 500, 3).probabilities(part.ids.numpy())[1:]
    rates, found = (0.0, 1e-3), {}
    for one, other in itertools.product(rates, rates):
        p = [measures.learning_probabilities(model, part.ids, rate, of_model, temperatures=mixture.TEMPERATURES)
             for model, rate, of_model in zip(models, (one, other), sizes)]  # fmt: skip
        t, weights = mixture.best_mixture({t: np.stack(q) for t, *q in zip(mixture.TEMPERATURES, *p)}, counted)
        k = mixture.TEMPERATURES.index(t)
        found[one, other] = -np.log2(weights @ np.stack([p[0][k], p[1][k], counted])).sum() / part.n_bytes
    chosen, tried = mixture.choose_rates(models, sizes, rates, part, counted)
    assert list(tried) == ["0, 0", "0, 0.001", "0.001, 0", "0.001, 0.001"]
    assert list(tried.values()) == pytest.approx(list(found.values())) and chosen == min(found, key=found.get)
    assert chosen == (0.0, 1e-3)


def test_without_names_it_is_of_all_rungs_and_kept(load, tmp_path, monkeypatch, capsys):
    """In the order of the ladder, then of the best runs, also in sliding windows, and of both together. A run that is
    missing is left out, with a line; what is asked for by name, or otherwise than usual, is printed only. With
    --dynamic the rows are the best runs."""
    for name in ("v1", "v2"):
        load(name, MAX_STEPS=4, EVAL_INTERVAL=4, OUT_DIR=str(tmp_path / "runs" / name)).main()
    kept, made, measure = [], [], mixture.measure
    places = [tmp_path / "runs" / "v1", tmp_path / "none"]
    monkeypatch.setattr(mixture, "ROOT", tmp_path)
    monkeypatch.setattr(mixture, "BEST", tmp_path / "runs" / "v2")
    monkeypatch.setattr(mixture, "best_folder", lambda name: {mixture.ADDITIONS: places.pop(0)}[name])
    monkeypatch.setattr(mixture, "RUNS", ("v0", "v2", "v1"))
    monkeypatch.setattr(mixture, "keep", lambda *what: kept.append(what))
    monkeypatch.setattr(mixture, "measure", lambda *what: made.append(what) or measure(*what))
    for words in ([], ["--order", "2"], [str(tmp_path / "runs" / name) for name in ("v1", "v2")]):
        monkeypatch.setattr(sys, "argv", ["mixture.py", *words])
        capsys.readouterr()
        mixture.main()
        out = capsys.readouterr().out
        assert ("no trained model in runs/v0: 'v0' is left out" in out) == (not words or "--order" in words)
        assert ("no trained model in none: 'both, windows slide by 64' is left out" in out) == ("--order" in words)
        assert len(kept) == 1
    (name, results, text), rows = kept[0], out.splitlines()
    sliding = ", windows slide by 64"
    names = ["v2", "v1", "results/best", "results/best" + sliding, mixture.ADDITIONS, mixture.ADDITIONS + sliding,
             "both" + sliding]  # fmt: skip
    assert name == "mixture" and [one["run"] for one in results["runs"]] == names
    one, other = (tmp_path / "runs" / name for name in ("v2", "v1"))
    assert [what[:3:2] for what in made[:7]] == [([one], None), ([other], None), ([one], None), ([one], 64),
                                                 ([other], None), ([other], 64), ([one, other], 64)]  # fmt: skip
    assert str(tmp_path) not in json.dumps(results) and results["runs"][0]["seed"] == 1337
    assert rows[-2].split("|")[2:] == text.splitlines()[3].split("|")[2:]  # the same figures for the same run
    monkeypatch.setattr(sys, "argv", ["mixture.py", "--together", *words])
    mixture.main()
    assert made[-1][0] == words and len(kept) == 1
    places.append(other)
    monkeypatch.setattr(sys, "argv", ["mixture.py", "--dynamic", "1e-4,0"])
    mixture.main()
    name, results, _ = kept[1]
    assert name == "adaptive"
    assert [one["run"] for one in results["runs"]] == ["results/best", mixture.ADDITIONS, "both"]
    rates = (1e-4, 0.0)
    assert [what[:4:3] for what in made[-3:]] == [([one], rates), ([other], rates), ([one, other], rates)]
    for words in (["-1"], ["1e-4,,2"], ["often"], ["0", "--stride", "9"]):
        monkeypatch.setattr(sys, "argv", ["mixture.py", "--dynamic", *words])
        with pytest.raises(ValueError, match="--dynamic takes a rate of at least 0"):
            mixture.main()
    for words in (["--stride", "8"], ["--together"]):
        monkeypatch.setattr(sys, "argv", ["mixture.py", *words])
        with pytest.raises(ValueError, match="are for runs that you name"):
            mixture.main()
