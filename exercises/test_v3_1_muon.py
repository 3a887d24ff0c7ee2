"""Checks of v3_1_muon.py: against v3_1.py and singular values."""

import math

import torch
import torch.nn.functional as F

import harness
import v3_1
from exercises.checking import compare, expect, fail, has_nan, random


def test_rms_norm(my):
    x = 1e-3 * random(2, 3, 4) + 1e-3
    squares = x.square().mean(-1, keepdim=True)
    compare(my.rms_norm(x.clone()), v3_1.norm(x), {
        "the mean is subtracted, as in LayerNorm; RMSNorm leaves it": F.layer_norm(x, (4,), eps=1.2e-7),
        "the squares are added up; take their mean": x / (4 * squares + 1.2e-7).sqrt(),
        "the root is missing": x / (squares + 1.2e-7),
        "eps is missing under the root": x / squares.sqrt(),
        "eps belongs under the root, to the mean of the squares": x / (squares.sqrt() + 1.2e-7),
        "the mean is of all tokens together; each token has its own": F.rms_norm(x, x.shape),
        "the mean should be over the last dimension, the numbers of a token": x / (x.square().mean(0) + 1.2e-7).sqrt(),
        "the mean is squared; it should be the mean of the squares":
            x / (x.mean(-1, True) ** 2 + torch.finfo(x.dtype).eps).sqrt(),
        "eps is torch.finfo(x.dtype).eps, not 1e-5": x / (squares + 1e-5).sqrt(),
    }, "the normed x", tolerance=1e-3)  # fmt: skip
    compare(my.rms_norm(torch.zeros(2, 4)), torch.zeros(2, 4), what="the norm of zeros")


def test_relu_squared(my):
    x = random(20)
    compare(my.relu_squared(x.clone()), x.relu().square(), {
        "negative numbers should become 0 before the square": x.square(),
        "this is ReLU: the square is missing": x.relu(),
        "the square keeps its sign here; negative numbers should become 0": x * x.abs(),
    }, "relu_squared(x)")  # fmt: skip


def polynomial(s):
    return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5


def polynomial_of(A):
    """With a number added to a matrix, which adds it to all of its numbers."""
    return 3.4445 - 4.775 * A + 2.0315 * A @ A


def of_singular_values(function, G):
    """G with `function` applied to its singular values."""
    U, s, V = torch.linalg.svd(G.double(), full_matrices=False)
    return ((U * function(s)) @ V).float()


def test_newton_schulz_round(my):
    for shape in ((4, 4), (3, 6), (6, 3)):
        X = random(*shape) / 3
        A = X @ X.mT
        square = {
            "the last X of each product is missing: X X' X": 3.4445 * X - 4.775 * A + 2.0315 * A @ A,
            "the factor made of A belongs to the left of X": 3.4445 * X + X @ (-4.775 * A + 2.0315 * A @ A),
            "on the left of X belongs X X', not X' X": 3.4445 * X + (-4.775 * X.mT @ X + 2.0315 * X.mT @ A @ X) @ X,
            "3.4445 is added to every number of a matrix here; the term is 3.4445 X": polynomial_of(A) @ X,
            "A is X X', with X transposed; here it is X X": 3.4445 * X + (-4.775 * X @ X + 2.0315 * X @ X @ X @ X) @ X,
        } if shape == (4, 4) else {}  # fmt: skip
        compare(my.newton_schulz_round(X.clone()), of_singular_values(polynomial, X), {
            "the numbers of X are raised to powers; X X' X are products of matrices": polynomial(X),
            "the second term is subtracted: its factor is -4.7750":
                of_singular_values(lambda s: polynomial(s) + 2 * 4.775 * s**3, X),
            "the term with X X' X X' X is missing": of_singular_values(lambda s: 3.4445 * s - 4.775 * s**3, X),
            "the term 3.4445 X is missing": of_singular_values(lambda s: polynomial(s) - 3.4445 * s, X),
            "A A is a product of matrices, A @ A; A * A is one of numbers":
                3.4445 * X + (-4.775 * A + 2.0315 * A * A) @ X,
            **square,
            "this is the classic cubic, 1.5 X - 0.5 X X' X": of_singular_values(lambda s: 1.5 * s - 0.5 * s**3, X),
        }, f"a round for a matrix {shape}")  # fmt: skip


def test_orthogonalize(my):
    def rounds(n):
        def function(s):
            for _ in range(n):
                s = polynomial(s)
            return s

        return function

    for shape, scale in (((4, 4), 1.0), ((3, 6), 100.0), ((6, 3), 1e-3)):
        G = scale * random(*shape)
        right, unit = v3_1.orthogonalize(G[None])[0], G / G.norm()
        answer = my.orthogonalize(G.clone())
        bad = isinstance(answer, torch.Tensor) and not answer.isfinite().all()
        if bad or (isinstance(answer, torch.Tensor) and answer.norm() > 100):
            fail("the rounds diverge: first divide G by its Frobenius norm, a single number of all of G")
        compare(answer, right, {
            "G is not divided by its norm": of_singular_values(rounds(5), G),
            "G is divided by its largest singular value; it should be the Frobenius norm":
                of_singular_values(rounds(5), G / torch.linalg.matrix_norm(G, 2)),
            "there should be five rounds, not four": of_singular_values(rounds(4), unit),
            "there should be five rounds, not six": of_singular_values(rounds(6), unit),
            "there is one round only; there should be five": of_singular_values(rounds(1), unit),
            "G is divided by its norm again before each round; once is enough": repeated(unit),
            "the result is transposed: turn a tall matrix back": right.T,
            "this is G divided by its norm; what a round returns should go into the next: X = newton_schulz_round(X)":
                unit,
            "the root is missing: the norm is the root of the sum of squares":
                of_singular_values(rounds(5), G / G.square().sum()),
            "this is the nearest orthogonal matrix itself; five rounds come near it only":
                of_singular_values(torch.ones_like, G),
        }, f"the result for a matrix {shape}", tolerance=1e-3)  # fmt: skip


def repeated(X):
    for _ in range(5):
        X = of_singular_values(polynomial, X / X.norm())
    return X


def test_muon_step(my):
    lr, momentum = 0.1, 0.8
    for shape in ((4, 3), (3, 4)):
        weight, grad, old = random(*shape), random(*shape, seed=1), random(*shape, seed=2)
        param = weight.clone().requires_grad_()
        param.grad = grad.clone()
        optimizer = v3_1.Muon([param], lr=lr, momentum=momentum)
        optimizer.state[param]["momentum"] = old.clone()
        with harness.override(vars(v3_1), DEVICE="cpu", DTYPE="float32", COMPILE=False):
            optimizer.step()
        buffer = optimizer.state[param]["momentum"]

        def nearest(update):
            return v3_1.orthogonalize(update[None])[0]

        def moved(update=buffer.lerp(grad, 1 - momentum), scale=max(1, shape[0] / shape[1]) ** 0.5, nearest=nearest):
            return weight - lr * scale * nearest(update)

        inputs = weight.clone(), grad.clone(), old.clone()
        answer = my.muon_step(*inputs, lr, momentum, nearest)
        expect(all(torch.equal(x, y) for x, y in zip(inputs, (weight, grad, old))),
               "what comes in is changed in place: make new tensors")  # fmt: skip
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            fail("the result should be two tensors: return weight, buffer")
        compare(answer[1], buffer, {
            "the buffer is a running mean: the gradient counts by 1 - momentum": momentum * old + grad,
            "the factors are exchanged: the old buffer counts by `momentum`": (1 - momentum) * old + momentum * grad,
            "the buffer should not be orthogonalized; the update is": nearest(buffer),
            "the buffer is the update; it should be the running mean of the gradient alone":
                buffer.lerp(grad, 1 - momentum),
        }, "the buffer")  # fmt: skip
        compare(answer[0], moved(), {
            "Nesterov's look ahead is missing: the update mixes the new buffer with the gradient": moved(buffer),
            "the look ahead takes the old buffer; it should take the new one": moved(old.lerp(grad, 1 - momentum)),
            "in the update the gradient counts by 1 - momentum": moved(momentum * buffer + grad),
            "the factors of the update are exchanged: the new buffer counts by `momentum`":
                moved((1 - momentum) * buffer + momentum * grad),
            "lr is lost: multiply what orthogonalize returns, since it makes all factors of its input vanish":
                weight - nearest(buffer.lerp(grad, 1 - momentum)),
            "the update is not orthogonalized": moved(nearest=lambda update: update),
            "the scale sqrt(rows / columns) of a tall matrix is missing": moved(scale=1),
            "the scale of a wide matrix is 1: it is never below": moved(scale=(shape[0] / shape[1]) ** 0.5),
            "the scale is sqrt(rows / columns) of a tall matrix; the root is missing":
                moved(scale=max(1, shape[0] / shape[1])),
            "the scale is sqrt(columns / rows) here; rows and columns are exchanged":
                moved(scale=max(1, shape[1] / shape[0]) ** 0.5),
            "the weight moves the wrong way: subtract": 2 * weight - moved(),
        }, f"the weight of shape {shape}")  # fmt: skip
