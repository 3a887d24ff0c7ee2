"""v1_1: the same gradient in less memory. `pytest exercises/test_v1_1_memory.py` checks your answers.

N is a number of tokens, C the width of what comes in, V the size of the vocabulary.
"""

import torch
import torch.nn.functional as F


def accumulated_gradient(loss_of, weight, x, y, micro_batch_size):
    """The gradient of loss_of(weight, x, y) with respect to `weight`, from at most `micro_batch_size` rows at a time.

    loss_of: a function that returns the mean loss of the rows of `x` and `y`. weight: a tensor with requires_grad. The
    last micro-batch may be smaller than the others. Returns a tensor with the shape of `weight`.

    >>> weight = torch.zeros(1, requires_grad=True)
    >>> x, y = torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3)
    >>> accumulated_gradient(lambda weight, x, y: (weight * x - y).mean(), weight, x, y, 2)  # the mean of x
    tensor([3.])

    Hint: x.split(micro_batch_size) cuts into pieces. A mean over all rows is the sum of the means of the pieces, each
    times its share of the rows. torch.autograd.grad(loss, weight) returns a tuple of one gradient.
    Read: v1_1.py, `train`.
    """
    raise NotImplementedError("your turn")


def loss_in_chunks(x, weight, bias, targets, chunk_size):
    """The mean cross-entropy of the logits x @ weight.T + bias, of which at most `chunk_size` rows exist at a time.

    x (N, N_HIDDEN), weight (V, N_HIDDEN), bias (V,), targets (N,). The last chunk may be smaller than the others.

    >>> x, weight, bias = torch.zeros(5, 2), torch.zeros(4, 2), torch.zeros(4)
    >>> round(float(loss_in_chunks(x, weight, bias, torch.tensor([0, 1, 2, 3, 0]), 2)), 4)  # log(4)
    1.3863

    Hint: F.cross_entropy(logits, targets, reduction="sum") gives sums, which add up.
    Read: v1_1.py, `LossInChunks`.
    """
    raise NotImplementedError("your turn")


def gradients_in_chunks(x, weight, bias, targets, chunk_size):
    """The gradients of that loss with respect to x, weight and bias: (N, C), (V, C), (V,). Logits, and gradients with
    respect to them, exist for at most `chunk_size` rows at a time. No backward().

    With d, the gradient with respect to the logits of a chunk (n, V), which is (softmax - one-hot of the target) / N:
    that with respect to x is d @ weight, that with respect to weight is d.T @ x, that with respect to bias the sum of
    the rows of d. N is the number of all tokens, not that of the chunk.

    >>> x, weight, bias = torch.ones(2, 1), torch.zeros(2, 1), torch.zeros(2)
    >>> gradients_in_chunks(x, weight, bias, torch.tensor([0, 0]), 1)[1]
    tensor([[-0.5000],
            [ 0.5000]])

    Hint: each token has its own row in the first gradient; in the other two, what chunks give is added.
    torch.cat joins a list of tensors. F.one_hot(targets, V) of all tokens would be as large as the logits.
    Read: v1_1.py, `LossInChunks`.
    """
    raise NotImplementedError("your turn")
