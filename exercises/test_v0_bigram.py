"""Checks of v0_bigram.py: against PyTorch, v0.py and closed forms."""

import math

import torch
import torch.nn.functional as F

import harness
import v0
from data import Tokens
from exercises.checking import compare, expect, has_nan, random


def test_softmax(my):
    x = random(3, 5)
    weights = (x - x.amax(-1, True)).exp()
    compare(my.softmax(x.clone()), x.softmax(-1), {
        "the sum runs over the wrong dimension: each row should sum to 1": x.softmax(0),
        "all numbers together sum to 1; each row should": x.flatten().softmax(0).view(3, 5),
        "each row should sum to 1: divide by the sum of the row": weights / weights.sum(),
        "the logits are divided by the largest; it should be subtracted": (x / x.amax(-1, True)).softmax(-1),
        "the exponentials are not divided by their sum": x.exp(),
        "the exponentials are not divided by their sum; the largest was subtracted": weights,
        "the logits themselves are divided by their sum: exp is missing": x / x.sum(-1, keepdim=True),
    })  # fmt: skip
    answer = my.softmax(torch.tensor([[1000.0, 0.0], [-1000.0, -1000.0]]))
    words = "exp(1000) overflows, and exp(-1000) is 0: subtract the largest logit of each row first"
    expect(answer.isfinite().all(), words)
    compare(answer, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    compare(my.softmax(random(2, 3, 4)), random(2, 3, 4).softmax(-1), {
        "the sum should run over the last dimension, -1, of logits with three dimensions too":
            random(2, 3, 4).softmax(1),
    }, "the softmax of logits (2, 3, 4)")  # fmt: skip


def test_cross_entropy(my):
    x, targets = random(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    right = F.cross_entropy(x, targets).item()
    compare(my.cross_entropy(x.clone(), targets), right, {
        "the loss is the mean over the tokens, not their sum": 6 * right,
        "the sign is wrong: a loss is positive": -right,
        "the loss should be in nats: use the natural logarithm": right / math.log(2),
        "the mean should be over the N targets, not over all N * V numbers": right / 5,
        "the logits are not log-probabilities: log_softmax is missing": F.nll_loss(x, targets).item(),
        "the logarithm of the mean is not the mean of the logarithms":
            -x.softmax(-1)[range(6), targets].mean().log().item(),
        "the logarithm is missing": -x.softmax(-1)[range(6), targets].mean().item(),
        "softmax should run over the vocabulary, the last dimension": F.nll_loss(x.log_softmax(0), targets).item(),
        "each row is taken with the targets of all rows: [torch.arange(N), targets] takes one number of each":
            -x.log_softmax(-1)[:, targets].mean().item(),
    }, "the loss")  # fmt: skip


def test_cross_entropy_gradient(my):
    x, targets = random(6, 5).requires_grad_(), torch.tensor([0, 4, 2, 2, 1, 3])
    [right] = torch.autograd.grad(F.cross_entropy(x, targets), x)
    x = x.detach()
    all_targets = x.softmax(-1)
    all_targets[:, targets] -= 1
    compare(my.cross_entropy_gradient(x.clone(), targets), right, {
        "the loss is a mean: divide by N": 6 * right,
        "the sign is wrong: raising the logit of the target lowers the loss": -right,
        "the sign is wrong, and the loss is a mean: divide by N": -6 * right,
        "the one-hot of the target is missing": x.softmax(-1) / 6,
        "the one-hot of the target is missing, and the loss is a mean: divide by N": x.softmax(-1),
        "the logits are taken for probabilities: the softmax is missing": (x - F.one_hot(targets, 5)) / 6,
        "softmax should run over the vocabulary, the last dimension": (x.softmax(0) - F.one_hot(targets, 5)) / 6,
        "the mean should be over the N targets, not over all N * V numbers": right / 5,
        "the one-hot of the target should be divided by N too": x.softmax(-1) / 6 - F.one_hot(targets, 5),
        "1 is subtracted at the targets of all rows: [torch.arange(N), targets] is one place in each row":
            all_targets / 6,
    }, "the gradient")  # fmt: skip


def test_start_loss(my):
    for size in (2, 500, 4096):
        compare(my.start_loss(size), math.log(size), {
            "the loss should be in nats: use the natural logarithm": math.log2(size),
            "the sign is wrong: a loss is positive": -math.log(size),
            "the loss should be in nats: use the natural logarithm, math.log": math.log10(size),
            "this is the probability of a token; the loss is minus the logarithm of it": 1 / size,
        }, f"start_loss({size})")  # fmt: skip
    table = v0.LanguageModel(50)
    ids = torch.arange(50)[None]
    compare(my.start_loss(50), table(ids, ids.flip(1)).item(), what="start_loss(50)")


def test_bigram_probabilities(my):
    ids, V = torch.tensor([0, 1, 3, 1, 3, 3, 0, 1, 0, 4, 4, 1]), 6
    n = torch.zeros(V, V)
    for i, j in zip(ids[:-1], ids[1:]):
        n[i, j] += 1
    n_i = n.sum(1, keepdim=True)
    right = torch.where(n_i > 0, n / n_i, 1 / V)
    wrapped = n.clone()
    wrapped[ids[-1], ids[0]] += 1
    answer = my.bigram_probabilities(ids.clone(), V)
    expect(not has_nan(answer), "a row without examples is 0 / 0, which is nan; it should be uniform, 1 / V")
    compare(answer, right, {
        "the table is transposed: row i should be about what follows token i": right.T,
        "these are counts: divide each row by its sum": n,
        "these are the probabilities of pairs: divide each row by its own sum": n / n.sum(),
        "a row without examples should be uniform, 1 / V; here it is zero": n / n_i.clamp(min=1),
        "each column sums to 1; each row should": n / n.sum(0).clamp(min=1),
        "the first token does not follow the last":
            torch.where(wrapped.sum(1, keepdim=True) > 0, wrapped / wrapped.sum(1, keepdim=True), 1 / V),
        "each pair counts once, however often it occurs; n[ids[:-1], ids[1:]] += 1 adds 1 to a place once, and "
        "tensors as keys of a dict are never equal": torch.where(n_i > 0, (n > 0) / (n > 0).sum(1, True), 1 / V),
        "n_i is how often anything follows i; nothing follows the last token of the text":
            torch.where(n_i > 0, n / torch.bincount(ids, minlength=V)[:, None], 1 / V),
        "this is smoothed: a pair that never occurs should get 0": (n + 1) / (n + 1).sum(1, keepdim=True),
    }, "the table")  # fmt: skip
    model = v0.LanguageModel(V)
    model.table.data = answer.float().clamp(min=1e-30).log()
    trained, optimum = v0.compare_with_counts(model, ids)
    compare(trained, optimum, what="the loss of the table on the text")


def test_bits_per_byte(my):
    compare(my.bits_per_byte(3.0, 1000, 2500), 3.0 * 1000 / 2500 / math.log(2), {
        "the loss should be in bits: divide by log(2)": 3.0 * 1000 / 2500,
        "the loss is multiplied by log(2); a nat is more than a bit: divide": 3.0 * 1000 / 2500 * math.log(2),
        "these are bits per token: multiply by the tokens, divide by the bytes": 3.0 / math.log(2),
        "tokens and bytes are exchanged: multiply by the tokens, divide by the bytes": 3.0 * 2.5 / math.log(2),
        "the loss is a logarithm already: from nats to bits leads a division by log(2)": math.log2(3.0) / 2.5,
        "these are all bits of the text: divide by the bytes": 3000 / math.log(2),
    }, "bits_per_byte(3.0, 1000, 2500)")  # fmt: skip
    metrics = v0_metrics()
    compare(my.bits_per_byte(metrics["loss"], 299, 700), metrics["bpb"], what="bits_per_byte for a text of v0")


def test_word_perplexity(my):
    compare(my.word_perplexity(2.0, 1000, 600), math.exp(2 * 1000 / 600), {
        "this is the perplexity per token: the loss per word is loss * n_predicted / n_words": math.exp(2.0),
        "this is the loss per word: the perplexity is e to it": 2 * 1000 / 600,
        "the perplexity is e to the loss in nats, not 2 to it": 2 ** (2 * 1000 / 600),
        "losses add up, perplexities do not: e to (the loss per word)": math.exp(2.0) * 1000 / 600,
        "e belongs to a loss in nats, which need not be divided by log(2)": math.exp(2 * 1000 / 600 / math.log(2)),
        "tokens and words are exchanged": math.exp(2 * 600 / 1000),
    }, "word_perplexity(2.0, 1000, 600)")  # fmt: skip
    metrics = v0_metrics()
    compare(my.word_perplexity(metrics["loss"], 299, 120), metrics["word_ppl"], what="word_perplexity for a text of v0")


def v0_metrics():
    """What v0 says of a text of 300 tokens, 700 bytes and 120 words, before training."""
    tokens = Tokens(torch.arange(300).remainder(7).to(torch.uint16), 700, 120, "text", "none", [1])
    with harness.override(vars(v0), DEVICE="cpu"):
        return v0.evaluate(v0.LanguageModel(20), tokens)
