"""Sampling, which is the same in all rungs. `pytest exercises/test_sampling.py` checks your answers.

V is the size of the vocabulary. `draw` in any rung does all of this for several rows at once.
"""

import torch


def with_temperature(logits, temperature):
    """The probabilities (V,) of the next token at a `temperature`: the logits are divided by it before the softmax.

    Below 1 it favors likely tokens. At 0 the likeliest token has the probability 1.

    >>> with_temperature(torch.tensor([0.0, 1.0, 5.0]), 0)
    tensor([0., 0., 1.])

    Hint: torch.softmax, and a case of its own for 0, which cannot be divided by; logits.argmax() is the likeliest.
    Read: any rung, `draw`.
    """
    raise NotImplementedError("your turn")


def top_k(p, k):
    """The probabilities `p` (V,), with all but the `k` largest set to 0, and the rest scaled to sum to 1.

    >>> top_k(torch.tensor([0.125, 0.5, 0.125, 0.25]), 2)
    tensor([0.0000, 0.6667, 0.0000, 0.3333])

    Hint: p.topk(k) returns the largest values and their places; kept[places] = values puts them there.
    Read: any rung, `draw`.
    """
    raise NotImplementedError("your turn")


def top_p(p, share):
    """Nucleus sampling: the fewest likeliest tokens whose probabilities sum to `share` or more stay, the others are set
    to 0, and the rest is scaled to sum to 1.

    The token with which the sum reaches `share` stays. At least the likeliest always stays.

    >>> top_p(torch.tensor([0.125, 0.5, 0.125, 0.25]), 0.6)  # 0.5 is too little, 0.5 + 0.25 is enough
    tensor([0.0000, 0.6667, 0.0000, 0.3333])

    Hint: p.sort(descending=True) returns the sorted values and their places; cumsum(0) adds up. A token stays if the
    sum of those likelier than it is below `share`. Then bring what stays back: kept[places] = values.
    Read: any rung, `draw`; Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    raise NotImplementedError("your turn")


def generate_greedily(model, ids, n_tokens, block_size):
    """The `n_tokens` tokens that continue `ids`, a list of int, each the likeliest one: a list of the new tokens.

    model: a function of idx (1, T) that returns logits (1, T, V); logits[0, t] are those of the token after idx[0, t].
    It takes at most `block_size` tokens, so a longer text is cut to its end.

    >>> next_number = lambda idx: torch.eye(10)[(idx + 1) % 10]  # the likeliest token is one more than the last
    >>> generate_greedily(next_number, [3, 7], 4, block_size=8)
    [8, 9, 0, 1]

    Hint: torch.tensor([ids]) is (1, T). Each new token becomes part of the text before the next one is predicted.
    Read: v2.py, `generate`.
    """
    raise NotImplementedError("your turn")
