"""Solutions of exercises/v3_1_muon.py."""

import torch


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def relu_squared(x):
    return x.relu().square()


def newton_schulz_round(X):
    A = X @ X.mT
    return 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X


def orthogonalize(G):
    X = G / (G.norm() + 1e-7)
    for _ in range(5):
        X = newton_schulz_round(X)
    return X


def muon_step(weight, grad, buffer, lr, momentum, orthogonalize):
    buffer = momentum * buffer + (1 - momentum) * grad
    update = momentum * buffer + (1 - momentum) * grad
    rows, columns = weight.shape
    scale = max(1, rows / columns) ** 0.5
    return weight - lr * scale * orthogonalize(update), buffer
