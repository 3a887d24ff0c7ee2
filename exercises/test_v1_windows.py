"""Checks of v1_windows.py: against v1.py and plain loops."""

import torch
import torch.nn.functional as F

import harness
import v1
from exercises.checking import check_causal, compare, expect, fail, notice, random


def test_batch_of_windows(my):
    ids, starts, T = torch.arange(20) ** 2, torch.tensor([3, 0, 14]), 5
    x = torch.stack([ids[s : s + T] for s in starts])
    y = torch.stack([ids[s + 1 : s + T + 1] for s in starts])
    before = torch.stack([ids[s + torch.arange(T) - 1] for s in starts])
    compare(my.batch_of_windows(ids.clone(), starts, T), (x, y), {
        "the targets are the inputs themselves; they should be one token later": (x, x),
        "the targets are one token earlier than the inputs, not later": (x, before),
        "the last target is the first token of its window: take one more token from the text": (x, x.roll(-1, 1)),
        "inputs and targets are exchanged": (y, x),
        "these are the places of the tokens in the text; the tokens are ids[places]":
            (starts[:, None] + torch.arange(T), starts[:, None] + torch.arange(1, T + 1)),
        "1 is added to the ids; targets are the tokens one place later": (x, x + 1),
        "the windows have a token too few": (x[:, :-1], y[:, :-1]),
    }, "(x, y)")  # fmt: skip


def test_batches_in_epoch(my):
    for n, B, T in ((432, 4, 10), (1000, 4, 10), (419, 4, 10), (410, 4, 10), (409, 4, 10), (6144, 16, 128),
                    (5000, 7, 9)):  # fmt: skip
        answer, tokens = my.batches_in_epoch(n, B, T), B * T
        if isinstance(answer, float) and answer != int(answer):
            fail("the number of batches should be an int: divide with //, which leaves out what is no whole batch")
        compare(answer, (n - T) // tokens, {
            "a token too many is left out: at most T - 1 before the first window, and one after the last":
                (n - T - 1) // tokens,
            "windows begin T tokens apart: the last target of one is the first token of the next":
                n // (B * (T + 1)),
            "at the largest offset, T - 1, the last window or its target is beyond the end of the text": n // tokens,
            "these are the windows of an epoch: a batch has batch_size of them": (n - T) // T,
            "the last batch is not whole, and does not count: round down": -(-(n - T) // tokens),
        }, f"batches_in_epoch({n}, {B}, {T})")  # fmt: skip
        expect(isinstance(answer, int), "the number of batches should be an int: divide with //")


def test_embed_by_product(my):
    idx, weight = torch.tensor([[3, 0, 1], [2, 2, 1]]), random(5, 2)
    try:
        answer = my.embed_by_product(idx, weight)
    except RuntimeError as error:
        expect("6x4 and 5x2" not in str(error),
               "a one-hot vector should have V numbers, also where the largest id is not in the batch")  # fmt: skip
        raise
    compare(answer, weight[idx], what="the embedding")


def test_context_windows(my):
    B, T, C, n = 2, 5, 3, 4
    x = random(B, T, C)

    def windows(left, by_token=False):
        padded = F.pad(x, (0, 0, left, n)).unfold(1, n, 1)[:, :T]  # (B, T, C, n)
        return (padded.mT if by_token else padded).flatten(2)

    wrapped = torch.stack([x.roll(n - 1 - k, 1) for k in range(n)], -1).flatten(2)
    notice(my.context_windows(x.clone(), n), {
        "before the first token should be zeros; here are the last tokens, since an index below 0 counts from the end":
            wrapped,
    })  # fmt: skip
    check_causal(lambda x: my.context_windows(x, n), random(B, 6, C))
    compare(my.context_windows(x.clone(), n), windows(n - 1), {
        "each embedding is in one piece; in v1 the first numbers of all embeddings come first": windows(n - 1, True),
        "a token is missing from its own window: fewer zeros on the left": windows(n),
        "a token is missing from its own window, and each embedding is in one piece": windows(n, True),
        "the oldest token comes last; it should come first": windows(n - 1).view(B, T, C, n).flip(-1).flatten(2),
        "the new rows should be zeros": F.pad(x.mT, (n - 1, 0), "replicate").mT.unfold(1, n, 1).flatten(2),
    }, "the tensor of windows")  # fmt: skip


def test_mlp_logits(my):
    with harness.override(vars(v1), N_EMBD=3, CONTEXT_SIZE=4, N_HIDDEN=5):
        model = v1.LanguageModel(7)
    idx = torch.tensor([[1, 2, 3], [6, 0, 2]])
    windows = F.pad(model.embedding(idx), (0, 0, 3, 0)).unfold(1, 4, 1).flatten(2)
    (w, b), (head, c) = [(layer.weight, layer.bias) for layer in (model.hidden, model.head)]
    hidden = windows @ w.T + b
    compare(my.mlp_logits(windows.clone(), w, b, head, c), model(idx), {
        "the tanh is missing: without it two linear layers are one": hidden @ head.T + c,
        "the hidden layer of v1 has tanh, not ReLU": hidden.relu() @ head.T + c,
        "the hidden layer of v1 has tanh, not the logistic sigmoid": hidden.sigmoid() @ head.T + c,
        "the bias of the hidden layer belongs within tanh": ((windows @ w.T).tanh() + b) @ head.T + c,
        "the logits should not go through tanh": (hidden.tanh() @ head.T + c).tanh(),
        "the bias of the hidden layer is missing": (windows @ w.T).tanh() @ head.T + c,
        "the bias of the last layer is missing": hidden.tanh() @ head.T,
    }, "the tensor of logits")  # fmt: skip


def test_n_parameters(my):
    for V, C, n, H in ((12, 3, 4, 5), (20, 2, 1, 3)):
        with harness.override(vars(v1), N_EMBD=C, CONTEXT_SIZE=n, N_HIDDEN=H):
            right = sum(p.numel() for p in v1.LanguageModel(V).parameters())
        compare(my.n_parameters(V, C, n, H), right, {
            "the biases are missing": right - H - V,
            "the hidden layer reads context_size embeddings, not one": right - (n - 1) * C * H,
            "the embeddings are missing": right - V * C,
            "the tokens of a context share one table of embeddings": right + (n - 1) * V * C,
            "the bias of the last layer is missing": right - V,
            "the bias of the hidden layer is missing": right - H,
            "a layer has a bias for each output, not for each input: the last has V": right - V + H,
        }, f"n_parameters({V}, {C}, {n}, {H})")  # fmt: skip
