"""Solutions of exercises/v1_1_memory.py."""

import torch
import torch.nn.functional as F


def accumulated_gradient(loss_of, weight, x, y, micro_batch_size):
    gradient = torch.zeros_like(weight)
    for micro_x, micro_y in zip(x.split(micro_batch_size), y.split(micro_batch_size)):
        loss = loss_of(weight, micro_x, micro_y) * (len(micro_x) / len(x))
        gradient += torch.autograd.grad(loss, weight)[0]
    return gradient


def loss_in_chunks(x, weight, bias, targets, chunk_size):
    loss = 0.0
    for x_chunk, target in zip(x.split(chunk_size), targets.split(chunk_size)):
        loss += F.cross_entropy(x_chunk @ weight.T + bias, target, reduction="sum")
    return loss / len(x)


def gradients_in_chunks(x, weight, bias, targets, chunk_size):
    d_x, d_weight, d_bias = [], torch.zeros_like(weight), torch.zeros_like(bias)
    for x_chunk, target in zip(x.split(chunk_size), targets.split(chunk_size)):
        d = (x_chunk @ weight.T + bias).softmax(-1)
        d[torch.arange(len(target)), target] -= 1
        d /= len(x)
        d_x.append(d @ weight)
        d_weight += d.T @ x_chunk
        d_bias += d.sum(0)
    return torch.cat(d_x), d_weight, d_bias
