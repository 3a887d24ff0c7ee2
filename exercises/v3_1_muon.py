"""v3_1: the modern block and Muon. `pytest exercises/test_v3_1_muon.py` checks your answers.

C is the width of a token; matrices have `rows` x `columns` numbers, and ' marks the transposed one.
"""

import math

import torch


def rms_norm(x):
    """RMSNorm without weights: each token of x (..., C) divided by sqrt(the mean of its squares + eps), where eps
    is torch.finfo(x.dtype).eps. Unlike LayerNorm it does not subtract the mean.

    >>> rms_norm(torch.tensor([3.0, 4.0]))  # the mean of the squares is 12.5
    tensor([0.8485, 1.1314])

    Hint: mean(-1, keepdim=True).
    Read: v3_1.py, `norm`; Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    raise NotImplementedError("your turn")


def relu_squared(x):
    """ReLU squared: x^2 where x is positive, otherwise 0.

    >>> relu_squared(torch.tensor([-2.0, 0.5, 3.0]))
    tensor([0.0000, 0.2500, 9.0000])

    Hint: x.relu(), or torch.where(condition, a, b).
    Read: v3_1.py, `MLP.forward`; So et al. 2021, arXiv:2109.08668.
    """
    raise NotImplementedError("your turn")


def newton_schulz_round(X):
    """A round of Newton-Schulz: 3.4445 X - 4.7750 X X' X + 2.0315 X X' X X' X, for a matrix X (rows, columns).

    It keeps the singular vectors of X and maps each singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5.

    >>> newton_schulz_round(torch.tensor([[1.0, 0.0], [0.0, 0.1]]))
    tensor([[0.7010, 0.0000],
            [0.0000, 0.3397]])

    Hint: with A = X X' it is 3.4445 X + (-4.7750 A + 2.0315 A A) X. X.mT is X'; @ multiplies matrices, ** does not.
    Read: v3_1.py, `orthogonalize`; Jordan et al. 2024.
    """
    raise NotImplementedError("your turn")


def orthogonalize(G):
    """About the nearest orthogonal matrix to G (rows, columns): all singular values become about 1.

    G is divided by (its Frobenius norm + 1e-7); this norm is the root of the sum of all squares. Then come five rounds
    of Newton-Schulz. You may call `newton_schulz_round`. All numbers of G times 1,000 should give the same result.

    >>> orthogonalize(torch.tensor([[300.0, 0.0], [0.0, 200.0]])).diag()
    tensor([1.1171, 0.6821])

    Hint: G.norm() is the Frobenius norm. v3_1 turns a tall matrix on its side first, which saves time and changes
    nothing else.
    Read: v3_1.py, `orthogonalize`.
    """
    raise NotImplementedError("your turn")


def muon_step(weight, grad, buffer, lr, momentum, orthogonalize):
    """A step of Muon: returns the new (weight, buffer), tensors (rows, columns). What comes in is not changed.

    The buffer is a running mean of the gradient: momentum * buffer + (1 - momentum) * grad. Nesterov's look ahead mixes
    in the same way once more: the update is momentum * (the new buffer) + (1 - momentum) * grad. It is orthogonalized.
    The weight moves by lr times that, times sqrt(rows / columns) if the matrix is tall (rows > columns).

    orthogonalize: a function of a matrix, to be called here.

    >>> one = torch.ones(4, 1)
    >>> weight, buffer = muon_step(0 * one, 8 * one, 0 * one, 0.5, 0.75, lambda update: update)
    >>> weight.T, buffer.T  # the buffer is 2, the update 0.75 * 2 + 0.25 * 8 = 3.5, and the scale 2
    (tensor([[-3.5000, -3.5000, -3.5000, -3.5000]]), tensor([[2., 2., 2., 2.]]))

    Hint: rows, columns = weight.shape. Write buffer = momentum * buffer + ..., which makes a new tensor, not
    buffer *= momentum.
    Read: v3_1.py, `Muon.step`; Jordan et al. 2024.
    """
    raise NotImplementedError("your turn")
