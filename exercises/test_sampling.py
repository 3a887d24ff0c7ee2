"""Checks of sampling.py: against `draw` of v0.py, and plain loops."""

from unittest import mock

import torch

import harness
import v0
from exercises.checking import compare, expect, fail, has_nan, random

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.9, -2.0, 1.4])


def drawn_from(logits, **constants):
    """The probabilities that v0 draws from, (V,)."""
    with harness.override(vars(v0), **constants), mock.patch("torch.multinomial", lambda p, n: p / p.sum()):
        return v0.draw(logits[None])[0]


def test_with_temperature(my):
    for temperature in (0.5, 1.0, 2.0):
        compare(my.with_temperature(LOGITS.clone(), temperature), drawn_from(LOGITS, TEMPERATURE=temperature), {
            "the logits are multiplied by the temperature, not divided": (LOGITS * temperature).softmax(-1),
            "the temperature has no influence": LOGITS.softmax(-1),
            "the probabilities are divided by the temperature; it should be the logits, before the softmax":
                LOGITS.softmax(-1) / temperature,
            "these are logits: the softmax is missing": LOGITS / temperature,
        }, f"with_temperature(logits, {temperature})")  # fmt: skip
    answer = my.with_temperature(LOGITS.clone(), 0)
    if has_nan(answer):
        fail("at temperature 0 the logits become infinite, and the result nan: it needs a case of its own")
    compare(answer, torch.eye(6)[2], {
        "at temperature 0 the likeliest token should have the probability 1": LOGITS.softmax(-1),
        "this is the place of the likeliest token; the result should be probabilities, 1 at this place": 2,
    }, "with_temperature(logits, 0)")  # fmt: skip


def test_top_k(my):
    p = LOGITS.softmax(-1)
    for k in (2, 1, 6):
        right = drawn_from(LOGITS, TOP_K=k, TEMPERATURE=1.0)
        smallest = torch.where(p <= p.sort().values[k - 1], p, 0)
        fewer = torch.where(p > p.sort(descending=True).values[k - 1], p, 0)
        others, largest = p - smallest, torch.where(right > 0, 0, p)
        begin = p * (torch.arange(6) < k)
        answer = my.top_k(p.clone(), k)
        expect(not has_nan(answer), "nothing is left: the k-th largest probability should stay too")
        compare(answer, right, {
            "the first k tokens are kept, not the likeliest k": begin / begin.sum(),
            "one token too few is kept: the k-th largest stays too": fewer / fewer.sum(),
            "the rest does not sum to 1: divide by its sum": torch.where(right > 0, p, 0),
            "the smallest probabilities are kept, not the largest": smallest / smallest.sum(),
            "the k smallest are set to 0; all but the k largest should be": others / others.sum(),
            "the k largest are set to 0; they should stay, and the others not": largest / largest.sum(),
            "the probabilities have lost their places: they are sorted": right.sort(descending=True).values,
            "the softmax of probabilities is not what scales them: divide by their sum":
                torch.where(right > 0, p, -torch.inf).softmax(-1),
        }, f"top_k(p, {k})")  # fmt: skip


def test_top_p(my):
    p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    logits, order = p.log(), [1, 3, 4, 2, 0]
    for share, n in ((0.3, 1), (0.5, 2), (0.7, 3), (0.97, 5), (1.0, 5)):
        right = drawn_from(logits, TOP_P=share, TEMPERATURE=1.0)

        def first(n):
            kept = torch.zeros(5)
            kept[order[:n]] = p[order[:n]]
            return kept / kept.sum()

        short = first(n - 1) if n > 1 else torch.full((5,), torch.nan)
        unsorted, rising = torch.where(p.cumsum(0) - p < share, p, 0), p.sort()
        unlikely = torch.zeros(5)
        unlikely[rising.indices] = torch.where(rising.values.cumsum(0) - rising.values < share, rising.values, 0)
        answer = my.top_p(p.clone(), share)
        if has_nan(answer):
            fail("nothing is left where the likeliest token alone exceeds `share`: it should always stay" if n == 1 else
                 "nothing is left: what is compared with `share` is the sum from the likeliest token on")  # fmt: skip
        compare(answer, right, {
            "the token with which the sum reaches `share` should stay": short,
            "the rest does not sum to 1: divide by its sum": torch.where(right > 0, p, 0),
            "the probabilities have lost their places: they are sorted": right.sort(descending=True).values,
            "tokens with a probability above 1 - share are kept; what counts is the sum from the likeliest on":
                torch.where(p > 1 - share, p, 0) / p[p > 1 - share].sum(),
            "the sum runs in the order of the tokens; it should run from the likeliest on": unsorted / unsorted.sum(),
            "the sum begins with the least likely token; sort in descending order": unlikely / unlikely.sum(),
            "to bring what stays back to its place, write kept[order] = ...; x[order] sorts once more":
                right.sort(descending=True).values[order],
            "the softmax of probabilities is not what scales them: divide by their sum":
                torch.where(right > 0, p, 0).softmax(-1),
            "the softmax of probabilities is not what scales them; divide by their sum":
                torch.where(right > 0, p, -torch.inf).softmax(-1),
        }, f"top_p(p, {share})")  # fmt: skip


def test_generate_greedily(my):
    block_size, weights = 4, random(11, 11, seed=3)

    def model(idx):
        expect(isinstance(idx, torch.Tensor) and idx.dim() == 2 and len(idx) == 1,
               "the model takes a tensor (1, T)")  # fmt: skip
        expect(idx.size(1) <= block_size,
               f"the model got {idx.size(1)} tokens; it takes at most {block_size}: cut the text to its end")
        return (weights[idx] * (1 + torch.arange(idx.size(1)))[:, None]).cumsum(1)  # it depends on the whole window

    prompt, text = [2, 5, 1], [2, 5, 1]
    while len(text) < 12:
        text.append(int(model(torch.tensor([text[-4:]]))[0, -1].argmax()))
    first = int(model(torch.tensor([prompt]))[0, 0].argmax())
    stuck = int(model(torch.tensor([prompt]))[0, -1].argmax())
    flat = int(model(torch.tensor([prompt]))[0].argmax())
    start = list(prompt)
    while len(start) < 12:
        start.append(int(model(torch.tensor([start[:4]]))[0, -1].argmax()))
    compare(my.generate_greedily(model, prompt, 1, block_size), [stuck], {
        "the next token comes from the logits of the last place, not of the first": [first],
        "argmax runs over the logits of all places; the next token comes from those of the last": [flat],
        "the result should be the new tokens alone, without the prompt": [*prompt, stuck],
    }, "the continuation by one token")  # fmt: skip
    answer = my.generate_greedily(model, prompt, 9, block_size)
    expect(prompt == [2, 5, 1], "the list of the prompt is changed; work on a copy: list(ids)")
    compare(answer, text[3:], {
        "the result should be the new tokens alone, without the prompt": text,
        "each new token should become part of the text before the next one is predicted": [stuck] * 9,
        "a token too few": text[3:-1],
        "a text that is too long is cut to its start; it should be cut to its end": start[3:],
    }, "the continuation")  # fmt: skip
