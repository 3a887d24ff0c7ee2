"""v1: batches of windows, embeddings, a context of several tokens. `pytest exercises/test_v1_windows.py` checks your
answers.

B windows are a batch, T is the length of a window, C the size of an embedding, V the size of the vocabulary.
"""

import torch
import torch.nn.functional as F


def batch_of_windows(ids, starts, block_size):
    """Inputs and targets (x, y), each (B, T): window b begins at ids[starts[b]] and has T = block_size tokens. Its
    targets are the tokens that come next: y[b, t] is the token after x[b, t].

    ids (N,), starts (B,).

    >>> x, y = batch_of_windows(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 2]), 2)
    >>> x.tolist(), y.tolist()
    ([[5, 6], [7, 8]], [[6, 7], [8, 9]])

    Hint: starts[:, None] + torch.arange(T + 1) has the places of T + 1 tokens of each window, (B, T + 1).
    Read: v1.py, `get_batch`.
    """
    raise NotImplementedError("your turn")


def batches_in_epoch(n_tokens, batch_size, block_size):
    """How many whole batches of `batch_size` windows an epoch has, an int. The text of `n_tokens` tokens is cut into
    windows of `block_size` tokens, one after the other from a random offset on, 0 to block_size - 1. Every window needs
    one more token, as the target of its last one; the next window begins with it. The number must not depend on the
    offset.

    >>> batches_in_epoch(1000, 4, 10), batches_in_epoch(409, 4, 10), batches_in_epoch(410, 4, 10)
    (24, 9, 10)

    Hint: in the worst case, how many tokens are lost before the first window and after the last target?
    // divides and rounds down.
    Read: v1.py, `window_starts`.
    """
    raise NotImplementedError("your turn")


def embed_by_product(idx, weight):
    """The embeddings (B, T, C) of the tokens `idx` (B, T), as a matrix product: a one-hot vector of each token times
    `weight` (V, C). Looking rows up, weight[idx], gives the same.

    >>> embed_by_product(torch.tensor([[2, 0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[[5., 6.],
             [1., 2.]]])

    Hint: F.one_hot(idx, V) has integers, and a product needs one type: .to(weight.dtype). V is len(weight).
    Read: v1.py, `LanguageModel.forward`.
    """
    raise NotImplementedError("your turn")


def context_windows(x, context_size):
    """For each token the embeddings of the last `context_size` tokens, itself included: (B, T, C * context_size).

    x (B, T, C). Before the first token are zeros. The order is that of v1: the first numbers of all embeddings, from
    the oldest token to the newest, then the second numbers, and so on.

    >>> context_windows(torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]]), 2)
    tensor([[[ 0.,  1.,  0., 10.],
             [ 1.,  2., 10., 20.],
             [ 2.,  3., 20., 30.]]])

    Hint: F.pad(x, (0, 0, left, right)) adds rows of zeros to the dimension before the last; x.unfold(1, size, 1) gives
    all windows of that length, (B, windows, C, size); flatten(2) joins the dimensions from the third on. In loops,
    mind that x[:, -1] is the last token.
    Read: v1.py, `LanguageModel.forward`; Bengio et al. 2003, section 2.
    """
    raise NotImplementedError("your turn")


def mlp_logits(windows, hidden_weight, hidden_bias, head_weight, head_bias):
    """The logits (B, T, V) of v1 from its windows (B, T, W): a hidden layer of H units with tanh, then a linear layer.

    hidden_weight (H, W), hidden_bias (H,), head_weight (V, H), head_bias (V,): as in nn.Linear, a row of a weight
    belongs to one output.

    >>> one, zero = torch.ones(1, 1), torch.zeros(1)
    >>> mlp_logits(torch.tensor([[[0.5]]]), one, zero, 2 * one, zero + 3)
    tensor([[[3.9242]]])

    Hint: x @ weight.T + bias, and torch.tanh.
    Read: v1.py, `LanguageModel`.
    """
    raise NotImplementedError("your turn")


def n_parameters(vocab_size, n_embd, context_size, n_hidden):
    """How many parameters v1 has: the embeddings, the hidden layer and the last layer, both with biases.

    >>> n_parameters(4096, 64, 8, 256)
    1446144

    Hint: a linear layer has a weight for each pair of an input and an output, and a bias for each output.
    Read: v1.py, `LanguageModel.__init__`.
    """
    raise NotImplementedError("your turn")
