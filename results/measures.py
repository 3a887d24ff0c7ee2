"""Measurements of a trained model beyond those of its run: windows, temperature, dynamic evaluation.

Each function in MEASURES takes the module of the rung, the model, the splits of its text, {"val": Tokens, ...}, and the
tokenizer. It returns a dict that the result holds as "measured".
"""

import copy
import importlib
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

import harness
from data import load_tokens
from results.runner import rung_of

WINDOW_TOKENS = 65_536  # tokens of the validation split for measurements that need many passes


def first_part(tokens, tokenizer, n):
    """The first `n` tokens of a split, with the number of bytes and words in them."""
    part = copy.copy(tokens)
    part.ids = tokens.ids[:n]
    text = tokenizer.decode_bytes(part.ids[1:].tolist())
    part.n_bytes, part.n_words = len(text), len(text.split()) + text.count(b"\n")
    return part


def windows(module, model, tokens, tokenizer):
    """Bits per byte on the first 65,536 tokens of the validation split in windows of 1 to 16 times the training length,
    side by side and sliding by half the training length, each {size: bpb}. Also, for windows of 4 times the training
    length, the loss in nats by position in the window, averaged over 32 positions at a time. A model with learned
    positions is measured only in windows of the training length.

    Longer windows side by side improve the loss in part because fewer tokens are near the start of a window. Sliding
    windows have no such effect: all but the first tokens have at least size - stride tokens of context.
    """
    length, part = model.block_size, first_part(tokens["val"], tokenizer, WINDOW_TOKENS)
    sizes = [length * times for times in ((1,) if hasattr(model, "position_embedding") else (1, 2, 4, 8, 16))]
    side_by_side = {size: module.evaluate(model, part, size=size)["bpb"] for size in sizes}
    sliding = {size: module.evaluate(model, part, stride=length // 2, size=size)["bpb"] for size in sizes}
    T, ids = sizes[min(2, len(sizes) - 1)], part.ids.long()
    n, nats = (len(ids) - 1) // T, torch.zeros(T, dtype=torch.double)
    with torch.no_grad():
        for i in range(0, n * T, T):
            logits, y = model.eval()(ids[None, i : i + T].to(module.DEVICE))[0], ids[i + 1 : i + T + 1]
            nats += F.cross_entropy(logits, y.to(module.DEVICE), reduction="none").double().cpu() / n
    return {"side_by_side": side_by_side, "sliding": sliding, "nats_by_place": nats.view(-1, 32).mean(1).tolist()}


class Tempered(torch.nn.Module):
    """A model whose logits are divided by a temperature."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature, self.block_size = model, temperature, model.block_size

    def forward(self, idx):
        return self.model(idx) / self.temperature


def temperature(module, model, tokens, tokenizer):
    """Temperature scaling (Guo et al. 2017, arXiv:1706.04599, section 4.2): the temperature with the lowest loss on the
    first 65,536 tokens of the validation split, and the metrics of the test split before and after."""
    tried, part = [0.8 + 0.02 * k for k in range(21)], tokens["val"].ids[:WINDOW_TOKENS].long()
    T, nats = model.block_size, torch.zeros(len(tried), dtype=torch.double)
    with torch.no_grad():
        for i in range(0, len(part) - T, T):
            logits = model.eval()(part[None, i : i + T].to(module.DEVICE))[0]
            y = part[i + 1 : i + T + 1].to(module.DEVICE)
            nats += torch.tensor([F.cross_entropy(logits / t, y).item() for t in tried])
    best = tried[int(nats.argmin())]
    return {"temperature": best, "test": module.evaluate(model, tokens["test"]),
            "test_tempered": module.evaluate(Tempered(model, best), tokens["test"])}  # fmt: skip


def gradient_sizes(model, tokens, stride=64, n=200):
    """The typical size of the gradient of each weight, a tensor for each parameter: the root mean square over the last
    `stride` tokens of `n` windows of the training text, plus a small number so that it can be a divisor (Krause et al.
    2018, section 5)."""
    ids, size, parameters = tokens.ids, model.block_size, list(model.eval().parameters())
    stride = min(stride, size)
    squares, starts = [torch.zeros_like(p) for p in parameters], torch.linspace(0, len(ids) - size - 1, n).long()
    for i in starts.tolist():
        window = ids[i : i + size + 1].long().to(parameters[0].device)
        loss = F.cross_entropy(model(window[None, :-1])[0, -stride:], window[-stride:])
        for square, g in zip(squares, torch.autograd.grad(loss, parameters)):
            square.add_(g * g, alpha=1 / n)
    return [square.sqrt() + 1e-4 for square in squares]


def learning_probabilities(model, ids, rate, sizes, stride=64, temperatures=(1.0,)):
    """The probability that a model which keeps learning from `ids` (n,) while it predicts them gives each one after the
    first, at each of K temperatures: (K, n - 1) (dynamic evaluation, Krause et al. 2018, arXiv:1709.07432, section 5,
    without the decay to the original weights).

    After every `stride` tokens, predicted with as much context as a window holds, it takes one step of gradient descent
    on their loss; the step of each weight is divided by its value in `sizes`, a tensor for each parameter. A `rate` of
    0 gives the usual evaluation in sliding windows. A `stride` longer than a window is cut. Only a copy of the model is
    changed.
    """
    model, ids = copy.deepcopy(model).eval(), ids.long()
    stride = min(stride, model.block_size)
    parameters, found = list(model.parameters()), []
    for i in range(0, len(ids) - 1, stride):
        stop = min(i + stride, len(ids) - 1)
        start = max(0, stop - model.block_size)
        logits = model(ids[None, start:stop].to(parameters[0].device))[0, i - start :].float()  # (stop - i, V)
        y = ids[i + 1 : stop + 1].to(logits.device)
        with torch.no_grad():
            log_p = torch.stack([-F.cross_entropy(logits / t, y, reduction="none") for t in temperatures])
            found.append(log_p.cpu().double().exp())
        gradients = torch.autograd.grad(F.cross_entropy(logits, y), parameters)
        with torch.no_grad():
            for p, g, s in zip(parameters, gradients, sizes):
                p.sub_(g / s, alpha=rate)
    return torch.cat(found, 1).numpy()


def dynamic_eval(model, tokens, rate, sizes, stride=64):
    """Bits per byte and word perplexity on the split `tokens` of a model that keeps learning from it."""
    nats = -np.log(learning_probabilities(model, tokens.ids, rate, sizes, stride)).sum()
    return {"bpb": nats / (math.log(2) * tokens.n_bytes), "word_ppl": math.exp(nats / tokens.n_words)}


def best_run(module, model, tokens, tokenizer):
    """Evaluations of the test split: in windows that slide by 64, and with dynamic evaluation, whose rate is chosen on
    the first 32,768 tokens of the validation split."""
    part = first_part(tokens["val"], tokenizer, WINDOW_TOKENS // 2)
    sizes = gradient_sizes(model, tokens["train"])
    rates = {r: dynamic_eval(model, part, r, sizes)["bpb"] for r in (0.0, 5e-5, 1e-4, 2e-4, 4e-4)}
    rate = min(rates, key=rates.get)
    return {"test_sliding": module.evaluate(model, tokens["test"], stride=64), "rates": rates,
            "test_dynamic_eval": dynamic_eval(model, tokens["test"], rate, sizes)}  # fmt: skip


MEASURES = {"windows": windows, "temperature": temperature, "best": best_run}


def measure(run, folder):
    """The measurement that run.measure names, of the model in `folder`; None if it names none."""
    if not run.measure:
        return None
    constants = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["hyperparameters"]
    tokens = load_tokens(constants["VOCABULARY"], constants["DATA"])
    with rung_of(folder):
        model, tokenizer = harness.load(str(folder))
        return MEASURES[run.measure](importlib.import_module(run.rung), model, tokens, tokenizer)
