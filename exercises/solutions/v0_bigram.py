"""Solutions of exercises/v0_bigram.py."""

import math

import torch


def softmax(logits):
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def cross_entropy(logits, targets):
    log_p = torch.log_softmax(logits, -1)
    return -log_p[torch.arange(len(targets)), targets].mean()


def cross_entropy_gradient(logits, targets):
    gradient = torch.softmax(logits, -1)
    gradient[torch.arange(len(targets)), targets] -= 1
    return gradient / len(targets)


def start_loss(vocab_size):
    return math.log(vocab_size)


def bigram_probabilities(ids, vocab_size):
    pairs = ids[:-1] * vocab_size + ids[1:]
    n = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size)
    n_i = n.sum(1, keepdim=True)
    return torch.where(n_i > 0, n / n_i, 1 / vocab_size)


def bits_per_byte(loss, n_predicted, n_bytes):
    return loss * n_predicted / (math.log(2) * n_bytes)


def word_perplexity(loss, n_predicted, n_words):
    return math.exp(loss * n_predicted / n_words)
