"""v3: GPT-2's block, and how to train and measure it. `pytest exercises/test_v3_training.py` checks your answers.

B windows of T tokens, each a vector of C numbers.
"""

import math

import torch


def pre_norm_block(x, norm_1, attention, norm_2, mlp):
    """A block of v3, (B, T, C): attention gets the LayerNorm of x, and its output is added to x itself; then the same
    with the MLP.

    norm_1, attention, norm_2, mlp: functions of (B, T, C) that return (B, T, C).

    >>> double, add_one, negate = lambda x: 2 * x, lambda x: x + 1, lambda x: -x
    >>> pre_norm_block(torch.tensor(3.0), negate, double, negate, add_one)
    tensor(1.)

    Hint: in the example, 3 + double(-3) = -3, and then -3 + add_one(3) = 1.
    Read: v3.py, `Block.forward`; Radford et al. 2019, section 2.3. Compare v2.py, `Block.forward`.
    """
    raise NotImplementedError("your turn")


def gelu(x):
    """GELU as GPT-2 has it: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), for each number of a tensor.

    >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1588,  0.0000,  0.8412])

    Hint: torch.tanh for tensors; math.sqrt and math.pi for numbers. In Python x^3 is x**3.
    Read: kernels.py, `GELU`; Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
    """
    raise NotImplementedError("your turn")


def dropout(x, p, random, training):
    """In training: `x` with a share `p` of its numbers set to 0, and the others scaled so that each number keeps its
    expected value. Otherwise `x` itself.

    random: a tensor with the shape of `x`, of numbers drawn evenly from 0 to 1. What is below `p` is dropped.

    >>> dropout(torch.tensor([3.0, 3.0, 3.0]), 0.25, torch.tensor([0.1, 0.5, 0.9]), True)
    tensor([0., 4., 4.])

    Hint: a number stays with the probability 1 - p. By what must it be multiplied?
    Read: kernels.py, `Dropout`; Srivastava et al. 2014.
    """
    raise NotImplementedError("your turn")


def lr_factor(step, max_steps, warmup_steps, cooldown):
    """The learning rate of a step as a share of the highest. Steps are 0, 1, ..., max_steps - 1.

    It rises linearly: step 0 has 1 / warmup_steps, the step warmup_steps - 1 has 1. Then it stays. In the last part of
    the steps, a share `cooldown` of them, it falls linearly towards 0, which the step `max_steps` would have. Where
    rise and fall overlap, the smaller counts. Neither `warmup_steps` nor `cooldown` is 0.

    >>> [lr_factor(step, 10, 2, 0.4) for step in range(10)]
    [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]

    Hint: the smallest of three numbers: what the rise, the middle and the fall have at this step.
    Read: v3.py, `lr_factor`.
    """
    raise NotImplementedError("your turn")


def clip_gradients(gradients, max_norm):
    """A list of gradients, tensors, scaled by one factor so that their norm is at most `max_norm`. Their norm is the
    root of the sum of the squares of all their numbers together. A smaller norm stays as it is.

    >>> clip_gradients([torch.tensor([3.0]), torch.tensor([4.0])], 1.0)
    [tensor([0.6000]), tensor([0.8000])]

    Hint: min(1, max_norm / norm).
    Read: v3.py, `train`, where PyTorch's clip_grad_norm_ does it.
    """
    raise NotImplementedError("your turn")


def adamw_step(p, grad, m, v, step, lr, betas, eps, weight_decay):
    """A step of AdamW: returns the new (p, m, v), tensors of one shape. What comes in is not changed.

    m is the running mean of the gradient, m = b1 m + (1 - b1) grad, and v that of its square, with b2; both start at 0.
    So they are too small in the first steps, and are divided by 1 - b1^step and 1 - b2^step. `step` counts from 1. p
    decays first, by lr * weight_decay * p, and then moves by lr * m / (sqrt(v) + eps), with the corrected m and v.

    betas: (b1, b2).

    >>> zero = torch.zeros(1)
    >>> p, m, v = adamw_step(torch.ones(1), torch.tensor([2.0]), zero, zero, 1, 0.1, (0.9, 0.99), 1e-8, 0.5)
    >>> p, m, v  # 1 - 0.1 * 0.5 - 0.1
    (tensor([0.8500]), tensor([0.2000]), tensor([0.0400]))

    Hint: return the m and v that are not corrected: the correction is made anew in every step.
    Read: v3.py, `make_optimizer`; Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, with lr in its alpha.
    """
    raise NotImplementedError("your turn")


def weight_decay_groups(named_parameters):
    """Names of the parameters that decay, and names of those that do not: two lists, in the order that they come in.

    named_parameters: pairs of (name, parameter), for one loop. In v3 matrices and embeddings decay; biases and
    LayerNorms do not.

    >>> weight_decay_groups(torch.nn.Linear(2, 3).named_parameters())
    (['weight'], ['bias'])

    Hint: names mislead, since LayerNorm has a `weight` too. How many dimensions have its parameters?
    Read: v3.py, `make_optimizer`.
    """
    raise NotImplementedError("your turn")


def n_parameters(vocab_size, block_size, n_layer, n_embd):
    """How many parameters v3 has: an expression of these four numbers.

    Embeddings of tokens and of positions; in each block two LayerNorms, attention with the layers `qkv` and `proj`, and
    an MLP that is four times as wide inside; a LayerNorm at the end. All layers within blocks have biases, a LayerNorm
    has a weight and a bias. The last layer is the embedding, used again.

    >>> n_parameters(4096, 256, 4, 256)
    4273664

    Hint: a block has 12 C^2 numbers in matrices. How many has it in vectors?
    Read: v3.py, `Block` and `LanguageModel`.
    """
    raise NotImplementedError("your turn")


def windows_that_count(n, size, stride):
    """Sliding windows: which predictions count. A list of (start, first, stop), one for each window.

    `n` predictions, 0 to n - 1, are to be made. A window makes those from `start` to `stop` - 1, at most `size` of
    them; windows start at 0, stride, 2 stride, ... until one reaches the end. Where windows overlap, a prediction
    counts in the first window that makes it: those from `first` to `stop` - 1 count.

    >>> windows_that_count(10, 4, 3)
    [(0, 0, 4), (3, 4, 7), (6, 7, 10)]
    >>> windows_that_count(9, 4, 4)
    [(0, 0, 4), (4, 4, 8), (8, 8, 9)]

    Hint: `first` is where the window before has stopped. The window that reaches n is the last.
    Read: v3.py, `predictions`; notebooks/03_positions.ipynb.
    """
    raise NotImplementedError("your turn")
