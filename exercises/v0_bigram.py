"""v0: loss, gradient and metrics, and the bigram table. `pytest exercises/test_v0_bigram.py` checks your answers.

V is the size of the vocabulary, N a number of tokens.
"""

import math

import torch


def softmax(logits):
    """Probabilities from `logits` (..., V): exp(logit), divided by the sum of these over the last dimension.

    Do not use torch.softmax. Logits of 1,000 must not overflow.

    >>> softmax(torch.tensor([0.0, math.log(3.0)]))
    tensor([0.2500, 0.7500])

    Hint: subtracting the same number from all logits changes nothing; subtract the largest. sum(-1, keepdim=True) keeps
    a dimension to divide by, and amax(-1, keepdim=True) one to subtract.
    Read: v0.py, `draw`.
    """
    raise NotImplementedError("your turn")


def cross_entropy(logits, targets):
    """The loss: the mean of -log(probability of the target), in nats, a number or a tensor of one.

    logits (N, V), targets (N,): row i should predict targets[i]. You may call torch.log_softmax, but not cross_entropy.

    >>> round(float(cross_entropy(torch.zeros(3, 4), torch.tensor([0, 3, 1]))), 4)  # log(4)
    1.3863

    Hint: log_softmax(logits, -1)[torch.arange(N), targets] has one number of each row.
    Read: v0.py, `LanguageModel.forward`.
    """
    raise NotImplementedError("your turn")


def cross_entropy_gradient(logits, targets):
    """The gradient of `cross_entropy` with respect to `logits`, (N, V), written out: no backward().

    Derive it for one row: the derivative of log(sum of exp(logits)) is the softmax, that of -logits[target] is -1 at
    the target. The loss is a mean over N rows.

    >>> cross_entropy_gradient(torch.zeros(1, 4), torch.tensor([2]))
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])

    Hint: (softmax - one-hot of the target) / N. You may call torch.softmax. gradient[torch.arange(N), targets] -= 1
    subtracts 1 at one place in each row.
    Read: v1_1.py, `LossInChunks`.
    """
    raise NotImplementedError("your turn")


def start_loss(vocab_size):
    """The loss in nats of a model that finds all tokens equally likely, as v0 does before its first step.

    >>> round(start_loss(500), 4)
    6.2146

    Hint: every token has the probability 1 / vocab_size.
    Read: v0.py, `LanguageModel`, whose table starts with zeros.
    """
    raise NotImplementedError("your turn")


def bigram_probabilities(ids, vocab_size):
    """The best bigram table, without training: row i holds how likely each token is after token i, (V, V).

    ids (N,): the text, a tensor of integers. The probability of j after i is n_ij / n_i: how often j follows i, divided
    by how often anything follows i. A row of which the text has no example stays uniform, 1 / V.

    >>> bigram_probabilities(torch.tensor([0, 1, 0, 1, 0, 0]), 3)
    tensor([[0.3333, 0.6667, 0.0000],
            [1.0000, 0.0000, 0.0000],
            [0.3333, 0.3333, 0.3333]])

    Hint: a loop over zip(ids[:-1].tolist(), ids[1:].tolist()) is fine; tolist makes plain numbers. Without a loop:
    torch.bincount(i * V + j, minlength=V * V), with i = ids[:-1] and j = ids[1:]. torch.where(condition, a, b) chooses
    for each number.
    Read: v0.py, `compare_with_counts`.
    """
    raise NotImplementedError("your turn")


def bits_per_byte(loss, n_predicted, n_bytes):
    """Bits per byte of a text of `n_bytes` bytes, of which `n_predicted` tokens cost `loss` nats each on average.

    >>> round(bits_per_byte(math.log(2), 1000, 4000), 4)  # a bit for each token of four bytes
    0.25

    Hint: a bit is log(2) nats.
    Read: v0.py, `evaluate`; README.md, "Motivation".
    """
    raise NotImplementedError("your turn")


def word_perplexity(loss, n_predicted, n_words):
    """e to the loss per word of a text of `n_words` words, of which `n_predicted` tokens cost `loss` nats each on
    average.

    >>> round(word_perplexity(math.log(3), 1000, 500), 4)  # two tokens for each word
    9.0

    Hint: all nats of the text, divided by its words; then math.exp.
    Read: v0.py, `evaluate`.
    """
    raise NotImplementedError("your turn")
