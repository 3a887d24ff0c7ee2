"""Checks of v1_1_memory.py: against the loss and the gradients of the whole batch at once."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from exercises.checking import compare, expect, random

V = 7


class Rows(TorchFunctionMode):
    """Watches how many rows of V numbers, such as logits, any tensor has that is computed within."""

    most = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.size(1) == V:
            self.most = max(self.most, len(result))
        return result


def test_accumulated_gradient(my):
    x, y, rows = random(10, 3), random(10, seed=1), []

    def loss_of(weight, x, y):
        rows.append(len(x))
        return (x @ weight - y).square().mean()

    def gradients(*sizes):
        """Of the mean loss of each micro-batch."""
        weight = torch.ones(3, requires_grad=True)
        parts = zip(x.split(sizes), y.split(sizes))
        return torch.stack([torch.autograd.grad(loss_of(weight, *part), weight)[0] for part in parts])

    parts = gradients(4, 4, 2)
    mistakes = {
        "the gradients are added without a factor: each should count by its share of the rows": parts.sum(0),
        "the last micro-batch is smaller, and should count less than the others": parts.mean(0),
        "only the last micro-batch counts: the gradients should be added": parts[-1] * 0.2,
        "the last micro-batch, which is smaller, is missing": 0.4 * (parts[0] + parts[1]),
        "the last micro-batch is smaller: its share is len(its rows) / len(x), not micro_batch_size / len(x)":
            0.4 * parts.sum(0),
        "the gradients count by their rows, but are not divided by the number of all rows":
            4 * parts[0] + 4 * parts[1] + 2 * parts[2],
    }
    [right] = gradients(10)
    rows.clear()
    answer = my.accumulated_gradient(loss_of, torch.ones(3, requires_grad=True), x, y, 4)
    expect(max(rows, default=0) <= 4,
           f"loss_of got {max(rows, default=0)} rows at once; micro-batches have at most 4")  # fmt: skip
    compare(answer, right, mistakes, "the gradient")


def example():
    return random(10, 3), random(V, 3, seed=1), random(V, seed=2), torch.tensor([0, 6, 2, 2, 5, 1, 3, 4, 0, 6])


def test_loss_in_chunks(my):
    x, weight, bias, targets = example()
    each = F.cross_entropy(x @ weight.T + bias, targets, reduction="none")
    with Rows() as rows:
        answer = my.loss_in_chunks(x, weight, bias, targets, 4)
    compare(answer, each.mean().item(), {
        "the mean of the chunks' means: the last chunk is smaller, and counts too much":
            sum(part.mean() for part in each.split(4)).item() / 3,
        "the chunks' means are added; the loss is a mean over all tokens": sum(p.mean() for p in each.split(4)).item(),
        "this is the sum over the tokens: divide by N": each.sum().item(),
        "the last chunk, which is smaller, is missing": each[:8].sum().item() / 10,
        "the last chunk, which is smaller, is missing; the mean should be over all tokens": each[:8].mean().item(),
        "the last chunk is smaller: its mean counts by its own length, not by `chunk_size`":
            sum(part.mean() for part in each.split(4)).item() * 0.4,
        "the bias is missing": F.cross_entropy(x @ weight.T, targets).item(),
    }, "the loss")  # fmt: skip
    expect(rows.most <= 4, f"{rows.most} rows of logits exist at once; a chunk has 4")


def test_gradients_in_chunks(my):
    x, weight, bias, targets = example()
    d = (torch.softmax(x @ weight.T + bias, -1) - F.one_hot(targets, V)) / len(x)
    one_hot, no_bias = F.one_hot(targets, V), (x @ weight.T).softmax(-1)
    chunk_mean = d * torch.tensor([2.5] * 8 + [5.0] * 2)[:, None]

    def gradients(d, x=x):
        return d @ weight, d.T @ x, d.sum(0)

    with Rows() as rows:
        answer = my.gradients_in_chunks(x, weight, bias, targets, 4)
    compare(answer, gradients(d), {
        "each chunk is divided by its own length; N is the number of all tokens": gradients(chunk_mean),
        "the division by N is missing": gradients(10 * d),
        "what the chunks give for weight and bias should be added; here the last chunk replaces it":
            (d @ weight, *gradients(d[8:], x[8:])[1:]),
        "the one-hot of the target is missing": gradients(d + one_hot / len(x)),
        "the gradient with respect to the bias is the sum of the rows of d, not their mean":
            (*gradients(d)[:2], sum(part.mean(0) for part in d.split(4))),
        "the bias is missing in the logits": gradients((no_bias - one_hot) / len(x)),
    }, "(d_x, d_weight, d_bias)")  # fmt: skip
    expect(rows.most <= 4, f"{rows.most} rows of logits, or of their gradients or one-hot vectors, exist at once; "
           "a chunk has 4")  # fmt: skip
