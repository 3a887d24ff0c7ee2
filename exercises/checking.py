"""What the checks share: they compare an answer with the right one, and name the commonest mistakes in words."""

import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NOTHING = "is None: is a `return` missing?"


def fail(words):
    """End the check with these words, and without a traceback."""
    pytest.fail(words, pytrace=False)


def expect(condition, words):
    if not condition:
        fail(words)


def compare(answer, right, mistakes=None, what="the result", tolerance=1e-4):
    """Fail unless `answer` equals `right`: a number, a tensor, a list, a text, or a tuple of them.

    mistakes: {words: what the function would return if it made this mistake}. what: a name of the result, in the
    singular; that of a tuple may be "(a, b)", with a name for each part.
    """
    if isinstance(right, (list, tuple)) and isinstance(answer, torch.Tensor) and answer.dim():
        answer = tuple(answer)  # a tensor can be unpacked as well
    if not equal(answer, right, tolerance):
        notice(answer, mistakes or {}, tolerance)
        fail(difference(answer, right, what, tolerance))


def notice(answer, mistakes, tolerance=1e-4):
    """Fail if `answer` is what one of the mistakes makes."""
    for words, wrong in mistakes.items():
        if equal(answer, wrong, tolerance):
            fail(words)


def has_nan(answer):
    return isinstance(answer, torch.Tensor) and bool(answer.isnan().any())


def equal(a, b, tolerance=1e-4):
    if isinstance(b, torch.Tensor):
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or (a.dtype == torch.bool) != (b.dtype == torch.bool):
            return False
        return torch.allclose(a.detach().double(), b.detach().double(), rtol=tolerance, atol=tolerance)
    if isinstance(b, (list, tuple)):
        same_length = isinstance(a, (list, tuple)) and len(a) == len(b)
        return same_length and all(equal(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(b, (int, float)) and isinstance(a, (int, float, torch.Tensor)):
        one = not isinstance(a, torch.Tensor) or a.numel() == 1
        return one and math.isclose(float(a), b, rel_tol=tolerance, abs_tol=tolerance)
    return a == b


def difference(answer, right, what, tolerance):
    """In words, how `answer` differs from `right`."""
    if answer is None:
        return f"{what} {NOTHING}"
    if isinstance(right, (list, tuple)) and not isinstance(answer, (list, tuple)):
        return f"{what} is of type {type(answer).__name__}; it should be a {type(right).__name__}"
    if isinstance(right, (list, tuple)) and len(str(right)) > 80:
        k = next((k for k, pair in enumerate(zip(answer, right)) if not equal(*pair, tolerance)), None)
        if k is None:
            return f"{what} should have {len(right)} values, and has {len(answer)}"
        names = what.strip("()").split(", ") if what.startswith("(") else []
        part = names[k] if len(names) == len(right) else f"{what}[{k}]"
        return difference(answer[k], right[k], part, tolerance)
    if not isinstance(right, torch.Tensor):
        if isinstance(right, (int, float)) and isinstance(answer, torch.Tensor) and answer.numel() != 1:
            return f"{what} has the shape {tuple(answer.shape)}; it should be one number"
        return f"{what} is not right\n  yours: {short(answer)}\n  right: {short(right)}"
    if not isinstance(answer, torch.Tensor):
        return f"{what} is of type {type(answer).__name__}; it should be a tensor of shape {tuple(right.shape)}"
    if answer.shape != right.shape:
        return f"{what} has the shape {tuple(answer.shape)}; it should have {tuple(right.shape)}"
    if answer.dtype != right.dtype and torch.bool in (answer.dtype, right.dtype):
        return f"{what} has the type {answer.dtype}; it should have {right.dtype}"
    if not answer.isfinite().all():
        return f"{what} contains nan or infinity"
    if right.numel() <= 12:
        return f"{what} is not right\n  yours: {rounded(answer)}\n  right: {rounded(right)}"
    wrong = ~torch.isclose(answer.double(), right.double(), rtol=tolerance, atol=tolerance)
    place = tuple(wrong.nonzero()[0].tolist())
    return (f"{what} is not right: {int(wrong.sum())} of {right.numel()} numbers are wrong. The first, at "
            f"{list(place)}, is {rounded(answer[place])} and should be {rounded(right[place])}")  # fmt: skip


def short(x):
    return text if len(text := repr(x)) <= 300 else text[:300] + " ..."


def rounded(x):
    """The numbers of a tensor, to four decimals, in lists."""
    return (x.detach().double() * 1e4).round().div(1e4).tolist() if x.dtype.is_floating_point else x.tolist()


def check_causal(function, x):
    """Fail if an output of `function`, of tokens x (..., T, C), changes when a later token changes."""
    before, T = function(x.clone()), x.size(-2)
    if not isinstance(before, torch.Tensor) or before.shape[:-1] != x.shape[:-1]:
        return  # `compare` says what is wrong with it
    for later in range(1, T):
        changed = x.clone()
        changed[..., later, :] += 1
        for place, (old, new) in enumerate(zip(before.unbind(-2), function(changed).unbind(-2))):
            if place < later and not equal(new, old):
                fail(f"the future leaks: output {place} changes when token {later} changes")


def random(*shape, seed=0):
    """Numbers from a normal distribution, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
