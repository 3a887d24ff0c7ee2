"""Solutions of exercises/v3_training.py."""

import math

import torch


def pre_norm_block(x, norm_1, attention, norm_2, mlp):
    x = x + attention(norm_1(x))
    return x + mlp(norm_2(x))


def gelu(x):
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def dropout(x, p, random, training):
    if not training:
        return x
    return torch.where(random < p, 0, x / (1 - p))


def lr_factor(step, max_steps, warmup_steps, cooldown):
    return min(1, (step + 1) / warmup_steps, (max_steps - step) / (cooldown * max_steps))


def clip_gradients(gradients, max_norm):
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    factor = max_norm / max(norm, max_norm)
    return [g * factor for g in gradients]


def adamw_step(p, grad, m, v, step, lr, betas, eps, weight_decay):
    b1, b2 = betas
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad**2
    corrected_m, corrected_v = m / (1 - b1**step), v / (1 - b2**step)
    p = p - lr * weight_decay * p
    p = p - lr * corrected_m / (corrected_v.sqrt() + eps)
    return p, m, v


def weight_decay_groups(named_parameters):
    decay, rest = [], []
    for name, p in named_parameters:
        (decay if p.dim() == 2 else rest).append(name)
    return decay, rest


def n_parameters(vocab_size, block_size, n_layer, n_embd):
    C = n_embd
    matrices = 3 * C * C + C * C + 4 * C * C + 4 * C * C  # qkv, proj, and the two of the MLP
    vectors = 3 * C + C + 4 * C + C + 2 * 2 * C  # their biases, and the two LayerNorms
    return vocab_size * C + block_size * C + n_layer * (matrices + vectors) + 2 * C


def windows_that_count(n, size, stride):
    windows, start, first = [], 0, 0
    while first < n:
        stop = min(start + size, n)
        windows.append((start, first, stop))
        start, first = start + stride, stop
    return windows
