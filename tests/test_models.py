"""Tests of what a model computes: logits, loss, metrics, samples, the optimizer Muon, v0's closed form and v4's table.

The models are compared with independent implementations (torch's encoder layer, Hugging Face's GPT-2 and Arcee) or
with plain loops, at random weights.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harness
import kernels
import look
from common import (
    LATE_RUNGS,
    MODELS,
    MODERN,
    RUNGS,
    SCHEMES,
    V4,
    as_gpt2,
    close,
    inputs,
    make_model,
    published_slopes,
    random_ids,
    random_model,
    randomize,
    tiny_tokens,
)
from data import Tokens


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def weight(module):
    return module.weight.detach().double().numpy()


# ----------------------------------------------------------------------------------------------------------
# Logits, against independent implementations
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_v0_looks_up_the_row_of_the_last_token(load):
    model, x = random_model(load("v0"), 50), random_ids(2, 9)
    for b, t in itertools.product(range(2), range(9)):
        assert torch.equal(model(x)[b, t], model.table[x[b, t]])


@pytest.mark.parametrize("name", ("v1", "v1_1"))
@pytest.mark.parametrize("context", [1, 5, 12])
@torch.no_grad()
def test_the_mlp_is_a_plain_loop_over_the_context(name, context, load):
    """Also where the context reaches beyond the beginning of the window: zeros stand there. The first number of all the
    embeddings comes first, then the second of all."""
    model, x = random_model(load(name, CONTEXT_SIZE=context), 50, std=0.3), random_ids(2, 9)
    embedding, hidden, head = (weight(part) for part in (model.embedding, model.hidden, model.head))
    for b, t in itertools.product(range(2), range(9)):
        places = range(t - context + 1, t + 1)
        window = np.stack([embedding[x[b, i]] if i >= 0 else np.zeros(16) for i in places], 1)  # (C, CONTEXT_SIZE)
        expected = head @ np.tanh(hidden @ window.ravel() + model.hidden.bias.numpy()) + model.head.bias.numpy()
        close(model(x)[b, t], torch.from_numpy(expected))


@pytest.mark.parametrize("n_head", [1, 2, 8])
@torch.no_grad()
def test_v2_is_the_encoder_of_torch_with_a_causal_mask(n_head, load):
    model = random_model(load("v2", N_HEAD=n_head, N_LAYER=3), 50, std=0.3)
    layer = nn.TransformerEncoderLayer(32, n_head, 128, dropout=0.0, activation="relu", batch_first=True)
    theirs = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    for block, other in zip(model.blocks, theirs.layers):
        other.self_attn.in_proj_weight.copy_(block.attention.qkv.weight)
        other.self_attn.in_proj_bias.copy_(block.attention.qkv.bias)
        pairs = [(block.attention.proj, other.self_attn.out_proj), (block.norm_1, other.norm1),
                 (block.mlp[0], other.linear1), (block.mlp[2], other.linear2), (block.norm_2, other.norm2)]  # fmt: skip
        for ours, their in pairs:
            their.load_state_dict(ours.state_dict())
    for T in (1, 7, 32):
        x = random_ids(3, T)
        h = model.embedding.weight[x] + model.position_embedding.weight[torch.arange(T)]
        expected = theirs(h, mask=nn.Transformer.generate_square_subsequent_mask(T)) @ model.head.weight.T
        close(model(x), expected + model.head.bias)


@pytest.mark.parametrize("n_head", [1, 2, 8])
@torch.no_grad()
def test_v3_is_the_gpt2_of_hugging_face(n_head, load):
    model = random_model(load("v3", N_HEAD=n_head, N_LAYER=3), 50, std=0.3)
    theirs = as_gpt2(model, n_head)
    for T in (1, 7, 32):
        x = random_ids(3, T)
        close(model(x), theirs(x).logits)


@torch.no_grad()
def test_v4_with_rope_is_the_arcee_model_of_hugging_face(load):
    """RMSNorm, RoPE and ReLU squared without a gate, as in AFM-4.5B."""
    transformers = pytest.importorskip("transformers")
    model = random_model(load(V4, N_LAYER=3, N_HEAD=4, ROPE_BASE=500.0), 50, "rope", std=0.3)
    theirs = transformers.ArceeForCausalLM(transformers.ArceeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, hidden_act="relu2", rms_norm_eps=torch.finfo(torch.float32).eps,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=0,
    )).eval()  # fmt: skip
    table = model.embedding.weight
    weights = {"lm_head.weight": model.head.weight, "model.norm.weight": torch.ones(32),
               "model.embed_tokens.weight": table / table.square().mean(1, keepdim=True).sqrt()}  # fmt: skip
    for i, block in enumerate(model.blocks):
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), block.attention.qkv.weight.chunk(3)))
        parts = {f"self_attn.{name}": part for name, part in {**parts, "o_proj": block.attention.proj.weight}.items()}
        parts |= {"mlp.up_proj": block.mlp.fc.weight, "mlp.down_proj": block.mlp.proj.weight,
                  "input_layernorm": torch.ones(32), "post_attention_layernorm": torch.ones(32)}  # fmt: skip
        weights |= {f"model.layers.{i}.{name}.weight": part for name, part in parts.items()}
    theirs.load_state_dict(weights)
    for T in (1, 7, 32):
        x = random_ids(3, T)
        close(model(x), theirs(x).logits)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + torch.finfo(torch.float32).eps)


def turned(x, base):
    """Each pair (x[i], x[i + D / 2]) at position t as a complex number, times e^(i t base^(-2i / D))."""
    T, D = x.shape
    pairs = x[:, : D // 2] + 1j * x[:, D // 2 :]
    pairs = pairs * np.exp(1j * np.arange(T)[:, None] * base ** (-2 * np.arange(D // 2) / D))
    return np.concatenate([pairs.real, pairs.imag], 1)


def plain_v4(model, ids, n_head, scheme, base=10000.0, drop=lambda x: x):
    """The logits of v4, or with the scheme "learned" of v3_1, for the tokens `ids`, (T, V), in float64, from the
    formulas of the papers. `drop` stands for the dropout."""
    T, width = len(ids), model.embedding.weight.size(1)
    D, i, j = width // n_head, np.arange(T)[:, None], np.arange(T)
    x = rms(weight(model.embedding)[ids])
    if scheme == "learned":
        x = x + weight(model.position_embedding)[:T]
    if scheme == "sinusoidal":
        angles = i / 10000 ** (2 * np.arange(width // 2) / width)
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], 1)
    x = drop(x)
    for block in model.blocks:
        q, k, v = np.split(rms(x) @ weight(block.attention.qkv).T, 3, axis=1)
        heads = []
        for h in range(n_head):
            qh, kh, vh = (a[:, h * D : (h + 1) * D] for a in (q, k, v))
            if scheme == "rope":
                qh, kh = turned(qh, base), turned(kh, base)
            scores = qh @ kh.T / math.sqrt(D)
            if scheme == "alibi":
                scores = scores - published_slopes(n_head)[h] * (i - j)
            heads.append(softmax(np.where(j <= i, scores, -np.inf)) @ vh)
        x = x + drop(np.concatenate(heads, 1) @ weight(block.attention.proj).T)
        x = x + drop(np.maximum(rms(x) @ weight(block.mlp.fc).T, 0) ** 2 @ weight(block.mlp.proj).T)
    return torch.from_numpy(rms(x) @ weight(model.head).T)


@pytest.mark.parametrize("n_head", [1, 2, 6])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_v4_is_what_the_papers_say(scheme, n_head, load):
    module = load(V4, N_EMBD=24, N_HEAD=n_head, ROPE_BASE=500.0 if scheme == "rope" else 10000.0)
    model, x = random_model(module, 50, scheme, std=0.3), random_ids(2, 25)
    expected = torch.stack([plain_v4(model, row, n_head, scheme, module.ROPE_BASE) for row in x.numpy()])
    close(model(x), expected)


@pytest.mark.parametrize("n_head", [1, 2, 6])
@torch.no_grad()
def test_v3_1_is_what_the_papers_say(n_head, load):
    model, x = random_model(load("v3_1", N_EMBD=24, N_HEAD=n_head), 50, std=0.3), random_ids(2, 25)
    close(model(x), torch.stack([plain_v4(model, row, n_head, "learned") for row in x.numpy()]))


# ----------------------------------------------------------------------------------------------------------
# Properties of every model
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "position"), MODELS)
@torch.no_grad()
def test_tokens_that_come_later_have_no_influence(name, position, load):
    model, x = random_model(load(name), 50, position), random_ids(2, 32)
    logits = model(x)
    assert logits.shape == (2, 32, 50)
    for t in (0, 13, 30):
        later = x.clone()
        later[:, t + 1 :] = (x[:, t + 1 :] + 1 + torch.arange(31 - t)) % 50
        close(model(later)[:, : t + 1], logits[:, : t + 1], 1e-5)
        assert (model(later)[:, t + 1 :] - logits[:, t + 1 :]).abs().max() > 1e-2


@pytest.mark.parametrize("name", RUNGS)
def test_the_loss_is_the_mean_cross_entropy_of_the_logits(name, load):
    model, (x, y) = random_model(load(name), 40), random_ids(2, 3, 32, vocab_size=40)
    expected = -model(x).double().log_softmax(-1).gather(-1, y[..., None]).mean()
    assert model(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", LATE_RUNGS)
@torch.no_grad()
def test_logits_and_loss_are_float32_under_autocast(name, load):
    model, x = random_model(load(name), 50), random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == model(x, x).dtype == torch.float32


CHANGES = {  # constants that give a model its shape
    "v0": {}, "v1": {"CONTEXT_SIZE": 3, "N_EMBD": 8, "N_HIDDEN": 8},
    "v1_1": {"CONTEXT_SIZE": 3, "N_EMBD": 8, "N_HIDDEN": 8},
    "v2": {"BLOCK_SIZE": 16, "N_LAYER": 1, "N_HEAD": 4, "N_EMBD": 16},
    **{name: {"BLOCK_SIZE": 16, "N_LAYER": 1, "N_HEAD": 4, "N_EMBD": 16, "DROPOUT": 0.0} for name in ("v3", "v3_1")},
    V4: {"BLOCK_SIZE": 16, "N_LAYER": 1, "N_HEAD": 4, "N_EMBD": 16, "DROPOUT": 0.0, "ROPE_BASE": 50.0},
}  # fmt: skip


@pytest.mark.parametrize(("name", "position"), MODELS)
@torch.no_grad()
def test_a_model_keeps_the_shape_that_it_was_built_with(name, position, load):
    """Whatever the constants of the rung are when it is used."""

    def results():
        torch.manual_seed(0)
        trained = model.train()(x)
        return [trained, model.eval()(x), module.evaluate(model, tokens), [*module.generate(model, [3, 1, 4], 60)]]

    module = load(name, **({"DROPOUT": 0.3} if name in LATE_RUNGS else {}))
    model, x, tokens = random_model(module, 50, position), random_ids(2, 32), tiny_tokens(171, 50)
    before = results()
    for constant, value in CHANGES[name].items():
        setattr(module, constant, value)
    other = make_model(module, 50, position)
    other(x[:, :16])
    after = results()
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2]))
    assert before[2:] == after[2:]


@pytest.mark.parametrize("name", ("v2", *LATE_RUNGS))
def test_a_width_that_the_heads_cannot_share_is_refused(name, load):
    with pytest.raises(ValueError, match="N_EMBD=32 .*N_HEAD=3"):
        make_model(load(name, N_EMBD=32, N_HEAD=3), 50)


def test_odd_dimensions_are_refused_where_numbers_come_in_pairs(load):
    module = load(V4, N_EMBD=15, N_HEAD=3)
    with pytest.raises(ValueError, match="= 5 must be even"):
        make_model(module, 50, "rope")
    with pytest.raises(ValueError, match="N_EMBD=15 must be even"):
        make_model(module, 50, "sinusoidal")
    make_model(module, 50, "alibi")


@pytest.mark.parametrize("position", ["alibi,rope", "learned", ""])
def test_a_model_has_one_scheme(position, load):
    with pytest.raises(ValueError, match=f"POSITION={position}: a model has one scheme"):
        make_model(load(V4), 50, position)


# ----------------------------------------------------------------------------------------------------------
# The beginning: initial weights
# ----------------------------------------------------------------------------------------------------------


def test_v0_starts_with_all_tokens_equally_likely(load):
    assert not load("v0").LanguageModel(50)(torch.arange(20)[None]).any()


@pytest.mark.parametrize("width", [64, 65])
def test_what_v3_starts_from(width, load):
    """Branches add nothing; positions are the sinusoids of Vaswani et al. (section 3.5), as long as the tokens."""
    model = load("v3", N_LAYER=2, N_EMBD=width, N_HEAD=1, BLOCK_SIZE=200).LanguageModel(2000)
    for block in model.blocks:
        assert not block.attention.proj.weight.any() and not block.mlp[-1].weight.any()
        for other in (block.attention.qkv, block.mlp[0]):
            assert other.weight.std().item() == pytest.approx(0.02, rel=0.06)
        assert (block.norm_1.weight == 1).all() and (block.norm_2.weight == 1).all()
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    positions, half = model.position_embedding.weight.detach().numpy() / 0.02 / math.sqrt(2), (width + 1) // 2
    expected = [[f(t / 10000 ** (2 * i / width)) for f in (np.sin, np.cos) for i in range(half)] for t in range(200)]
    np.testing.assert_allclose(positions, np.array(expected)[:, :width], atol=1e-4)
    length = model.position_embedding.weight.square().mean().sqrt().item()
    assert length == pytest.approx(model.embedding.weight.square().mean().sqrt().item(), rel=0.03)


@pytest.mark.parametrize("name", MODERN)
def test_branches_and_head_of_the_modern_block_start_at_zero(name, load):
    model = load(name, N_EMBD=64).LanguageModel(500)
    assert not model(torch.arange(20)[None]).any()
    for block in model.blocks:
        assert not block.attention.proj.weight.any() and not block.mlp.proj.weight.any()
        for other in (block.attention.qkv, block.mlp.fc):
            assert other.weight.std().item() == pytest.approx(1 / 8, rel=0.06)
    if name == "v3_1":
        positions, length = model.position_embedding.weight.detach().numpy(), model.block_size
        expected = [[f(t / 10000 ** (2 * i / 64)) for f in (np.sin, np.cos) for i in range(32)] for t in range(length)]
        np.testing.assert_allclose(positions, expected, atol=1e-4)
    assert model.embedding.weight.std().item() == pytest.approx(0.1, rel=0.06)


# ----------------------------------------------------------------------------------------------------------
# v4: positions, and the cache
# ----------------------------------------------------------------------------------------------------------


def test_alibi_slopes_are_the_published_ones(load):
    slopes = load(V4).alibi_slopes
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert slopes(8) == eight
    assert slopes(12) == pytest.approx(eight + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rel=1e-6)
    for n in range(1, 33):
        assert slopes(n) == pytest.approx(published_slopes(n), rel=1e-6)


@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 9), (4, 9), (9, 9)])
def test_the_bias_of_alibi_is_the_distance_times_the_slope(T, K, load):
    """The queries are the last tokens."""
    bias = load(V4).alibi_bias(6, T, K)
    assert bias.shape == (6, T, K)
    for h, i, j in itertools.product(range(6), range(T), range(K)):
        assert bias[h, i, j].item() == pytest.approx(-published_slopes(6)[h] * (K - T + i - j), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-9), (torch.long, 1e-2)])
def test_rope_depends_on_the_distance_alone(dtype, tolerance, load):
    module, random = load(V4), torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 50, 32, generator=random).double()
    m, n = torch.randint(200, (2, 50), generator=random)
    turn = lambda x, at: module.apply_rope(x, module.rope_table(at.to(dtype), 32, 10000.0))  # noqa: E731
    product = (turn(q, m) * turn(k, n)).sum(-1)
    shift = torch.randint(1, 5000, (50,), generator=random)
    torch.testing.assert_close((turn(q, m + shift) * turn(k, n + shift)).sum(-1), product, rtol=0, atol=tolerance)
    assert ((turn(q, m + shift) * turn(k, n)).sum(-1) - product).abs().max() > 0.1


@pytest.mark.parametrize("pieces", [(1,) * 32, (7,) + (1,) * 25, (5, 9, 1, 17), (31, 1), (2, 30)])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_text(scheme, pieces, load):
    """However many tokens come at once."""
    module = load(V4, N_HEAD=4)
    model, x, cache = random_model(module, 50, scheme), random_ids(2, 32), module.KVCache(random_model(module, 50))
    close(torch.cat([model(part, cache=cache) for part in x.split(pieces, 1)], 1), model(x))
    assert cache.length == 32


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_cache_grows_beyond_a_window(scheme, load):
    module = load(V4)
    model, x = random_model(module, 50, scheme), random_ids(2, 75)
    cache = module.KVCache(model)
    close(torch.cat([model(part, cache=cache) for part in x.split((30, 10, 1, 34), 1)], 1), model(x))


# ----------------------------------------------------------------------------------------------------------
# v1_1: the loss in chunks
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 30, 100])
def test_the_loss_in_chunks_and_its_gradients(chunk_size, load):
    module = load("v1_1", CHUNK_SIZE=chunk_size)
    head, targets = randomize(nn.Linear(6, 11)), torch.arange(30) * 7 % 11
    x = inputs(30, 6).requires_grad_()
    loss, plain = module.loss_in_chunks(x, targets, head), F.cross_entropy(head(x), targets)
    torch.testing.assert_close(loss, plain)
    gradients = (torch.autograd.grad(y, (x, *head.parameters())) for y in (loss, plain))
    torch.testing.assert_close(*gradients)


def test_no_chunk_has_more_logits_than_it_may(load):
    """And all of them share one piece of memory; what is kept for the backward pass has the size of the inputs."""
    head, seen, kept = nn.Linear(6, 11), [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            if op is torch.ops.aten.addmm.out:
                seen.append((len(result), result.data_ptr()))
            return result

    module = load("v1_1", CHUNK_SIZE=8)
    x = inputs(30, 6).requires_grad_()
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module.loss_in_chunks(x, torch.arange(30) % 11, head)
    assert [n for n, _ in seen] == [8, 8, 8, 6] and len({place for _, place in seen}) == 1
    assert kept == [30 * 6, 11 * 6, 11]


def test_the_loss_in_chunks_without_gradients(load):
    """An evaluation computes none; a second backward pass, of twice the loss, has them twice; large logits are fine."""
    module, head, x, targets = load("v1_1", CHUNK_SIZE=8), nn.Linear(6, 11), 300 * inputs(30, 6), torch.arange(30) % 11
    plain = F.cross_entropy(head(x), targets)
    with torch.no_grad():
        torch.testing.assert_close(module.loss_in_chunks(x, targets, head), plain)
    x.requires_grad_()
    loss = module.loss_in_chunks(x, targets, head)
    first = torch.autograd.grad(loss, (x, *head.parameters()), retain_graph=True)
    twice = torch.autograd.grad(2 * loss, (x, *head.parameters()))
    torch.testing.assert_close(twice, tuple(2 * t for t in first))
    torch.testing.assert_close(first, torch.autograd.grad(F.cross_entropy(head(x), targets), (x, *head.parameters())))


# ----------------------------------------------------------------------------------------------------------
# Where v3, v3_1 and v4 drop
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_where_v3_drops(load, monkeypatch):
    """With a dropout that doubles all numbers the model is the one whose embeddings and branches are twice as large."""
    module = load("v3", DROPOUT=0.25)
    model, x = random_model(module, 50, std=0.3), random_ids(2, 32)
    assert {part.p for part in model.modules() if isinstance(part, kernels.Dropout)} == {0.25}
    with monkeypatch.context() as patch:
        patch.setattr(kernels.Dropout, "forward", lambda self, x: 2 * x)
        doubled = model(x)
    ends = [end for block in model.blocks for end in (block.attention.proj, block.mlp[-1])]
    for p in [model.embedding.weight, model.position_embedding.weight, *(p for end in ends for p in end.parameters())]:
        p.mul_(2)
    close(doubled, model(x) / 2)  # the embedding is the last layer too


@pytest.mark.parametrize("scheme", ["learned", *SCHEMES])
@torch.no_grad()
def test_where_the_modern_block_drops(scheme, load, monkeypatch):
    module = load("v3_1" if scheme == "learned" else V4, DROPOUT=0.25)
    model, x = random_model(module, 50, scheme, std=0.3), random_ids(1, 20)
    assert {part.p for part in model.modules() if isinstance(part, kernels.Dropout)} == {0.25}
    monkeypatch.setattr(kernels.Dropout, "forward", lambda self, x: 2 * x)
    close(model(x)[0], plain_v4(model, x[0].numpy(), 2, scheme, drop=lambda x: 2 * x))


# ----------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def brute_force(model, tokens, length, stride=None):
    """All metrics, token by token in float64: each token in the first window that reaches it."""
    ids, stride = tokens.ids.long(), stride or length
    n, start, done = len(ids) - 1, 0, 0
    nats, ranks, confidence = [], [], []
    while done < n:
        end = min(start + length, n)
        logits = model(ids[None, start:end])[0].double().numpy()
        for t in range(done, end):
            row, target = logits[t - start], int(ids[t + 1])
            log_p = row - row.max()
            log_p -= math.log(np.exp(log_p).sum())
            nats.append(-log_p[target])
            ranks.append(sorted(range(len(row)), key=lambda i: -row[i]).index(target))
            confidence.append(math.exp(log_p.max()))
        start, done = start + stride, end
    assert len(nats) == n
    total, ranks, confidence = sum(nats), np.array(ranks), np.array(confidence)
    place = np.digitize(confidence, np.linspace(0, 1, 16)[1:-1])
    gaps = [
        (place == i).mean() * abs(confidence[place == i].mean() - (ranks[place == i] == 0).mean())
        for i in range(15) if (place == i).any()
    ]  # fmt: skip
    return {
        "loss": total / n,
        "bpb": total / math.log(2) / tokens.n_bytes,
        "word_ppl": math.exp(total / tokens.n_words),
        "top_1": (ranks == 0).mean(),
        "top_5": (ranks < 5).mean(),
        "calibration_error": sum(gaps),
    }


def assert_metrics(name, actual, expected):
    keys = list(expected) if name in LATE_RUNGS else ["loss", "bpb", "word_ppl"]
    assert actual == pytest.approx({key: expected[key] for key in keys}, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("n", [2, 6, 33, 34, 129, 257, 301])
@pytest.mark.parametrize("name", RUNGS)
def test_metrics_are_those_of_a_plain_loop(name, n, load):
    """Lengths around a window and a batch; at most lengths the last window is short. Nothing is dropped, and the model
    is left in training, without gradients."""
    module = load(name, **({"DROPOUT": 0.3} if name in LATE_RUNGS else {}))
    model, tokens = random_model(module, 40).train(), tiny_tokens(n, 40)
    actual = module.evaluate(model, tokens)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert_metrics(name, actual, brute_force(model.eval(), tokens, 32))


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32, 64])
@pytest.mark.parametrize("name", LATE_RUNGS)
def test_metrics_with_windows_that_overlap(name, stride, load):
    """A stride longer than the window skips no token."""
    module = load(name)
    model, tokens = random_model(module, 40), tiny_tokens(171, 40)
    actual = module.evaluate(model, tokens, stride)
    assert_metrics(name, actual, brute_force(model.eval(), tokens, 32, min(stride, 32)))


@pytest.mark.parametrize(("size", "stride"), [(8, None), (64, None), (100, 30), (512, None)])
@pytest.mark.parametrize("position", ["alibi", "rope", "sinusoidal", "none"])
def test_metrics_with_windows_of_other_sizes(position, size, stride, load):
    module = load(V4)
    model, tokens = random_model(module, 40, position), tiny_tokens(333, 40)
    actual = module.evaluate(model, tokens, stride, size)
    assert_metrics(V4, actual, brute_force(model.eval(), tokens, size, stride))


@pytest.mark.parametrize("name", RUNGS)
def test_an_evaluation_takes_no_more_tokens_at_once_than_a_training_step(name, load):
    module, seen = load(name), []
    model, tokens = random_model(module, 40), tiny_tokens(1000, 40)
    model.register_forward_hook(lambda model, args, result: seen.append(args[0].numel()))
    most = getattr(module, "MICRO_BATCH_SIZE", module.BATCH_SIZE) * module.BLOCK_SIZE
    module.evaluate(model, tokens)
    assert max(seen) == most and sum(seen) == 999
    if name == V4:
        module.evaluate(model, tokens, size=64)
        module.evaluate(model, tokens, size=8)
        assert max(seen) == most and seen.count(most) == 3 * 7


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_the_calibration_error_adds_up_what_goes_both_ways(name, load):
    """Half of the time the likeliest token comes, whatever its probability: some bins hold too much confidence and some
    too little."""

    class Table(nn.Module):
        block_size = 32

        def forward(self, idx):
            return table[idx]

    table = inputs(40, 40) * torch.linspace(0.5, 4, 40)[:, None]
    ids, guess = random_ids(600, vocab_size=40).tolist(), random_ids(600, vocab_size=2, seed=4).tolist()
    for i in range(1, 600):
        ids[i] = int(table[ids[i - 1]].argmax()) if guess[i] else ids[i]
    tokens = Tokens(torch.tensor(ids).to(torch.uint16), 1200, 300, "tiny", "none")
    assert_metrics(name, load(name).evaluate(Table(), tokens), brute_force(Table(), tokens, 32))


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_a_tie_is_no_right_guess(name, load):
    """All tokens equally likely, as before the first step of v4: the model has guessed nothing."""
    module = load(name)
    model, tokens = random_model(module, 40), tiny_tokens(2000, 40)
    nn.init.zeros_((model.embedding if name == "v3" else model.head).weight)
    metrics = module.evaluate(model, tokens)
    assert metrics["loss"] == pytest.approx(math.log(40), rel=1e-6)
    assert metrics["top_1"] < 0.1 and metrics["top_5"] < 0.25 and metrics["calibration_error"] < 0.1


@pytest.mark.parametrize("name", RUNGS)
def test_a_word_perplexity_that_no_float_can_hold_is_cut(name, load):
    module, tokens = load(name), tiny_tokens(600, 40)
    tokens.n_words = 1
    metrics = module.evaluate(random_model(module, 40), tokens)
    assert metrics["loss"] > 700 / 599 and metrics["word_ppl"] == math.exp(700)


@pytest.mark.parametrize("name", RUNGS)
def test_a_text_without_words_has_no_word_perplexity(name, load):
    module, tokens = load(name), tiny_tokens(600, 40)
    tokens.n_words = 0
    metrics = module.evaluate(random_model(module, 40), tokens)
    assert metrics["word_ppl"] is None and metrics["bpb"] > 0


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_an_evaluation_in_bfloat16_is_close_to_one_in_float32(name, load):
    module = load(name, DTYPE="bfloat16")
    model, tokens = random_model(module, 40), tiny_tokens(500, 40)
    rounded, exact = module.evaluate(model, tokens)["loss"], brute_force(model.eval(), tokens, 32)["loss"]
    assert 1e-5 < abs(rounded / exact - 1) < 0.02


@pytest.mark.parametrize(("stride", "size"), [(None, None), (13, None), (None, 64)])
@pytest.mark.parametrize("name", LATE_RUNGS)
def test_processes_share_an_evaluation(name, stride, size, load, monkeypatch):
    """What three of them add up is what one of them has alone."""
    module, tokens = load(name), tiny_tokens(500, 40)
    model = random_model(module, 40)
    arguments = model, tokens, stride, None if name != V4 else size
    alone, sums = module.evaluate(*arguments), []
    monkeypatch.setattr(harness.distributed, "world_size", lambda: 3)
    for rank in range(3):
        parts = iter(sums)
        sums = []
        monkeypatch.setattr(harness.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(harness, "all_reduce", lambda x, parts=parts: sums.append(x + next(parts, 0)) or sums[-1])
        together = module.evaluate(*arguments)
    assert together == pytest.approx(alone, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------
# Attention weights
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [5, 20, 32])
@pytest.mark.parametrize(("name", "position"), [model for model in MODELS if model[0] in ("v2", *LATE_RUNGS)])
@torch.no_grad()
def test_attention_weights_are_what_the_values_are_weighed_with(name, position, T, load):
    """The sums of values that they weigh, through the last projection, are what the layer itself gives; texts shorter
    and longer than a head is wide. Nothing is dropped, and the model is left as it was, ready to evaluate."""
    module, outputs = load(name, **({"DROPOUT": 0.5} if name in LATE_RUNGS else {})), []
    model, idx = random_model(module, 50, position), random_ids(3, T)
    before = model(idx)
    weights = look.attention_weights(model.train(), idx)
    assert weights.shape == (2, 3, 2, T, T)
    close(weights.sum(-1), torch.ones(2, 3, 2, T), 1e-5)
    assert not weights.triu(1).any()
    hooks = [block.attention.register_forward_hook(lambda attention, inputs, output: outputs.append(
        (attention, inputs[0], output))) for block in model.blocks]  # fmt: skip
    assert torch.equal(model(idx), before) and len(outputs) == 2
    for there, (attention, x, output) in zip(weights, outputs):
        v = attention.qkv(x)[..., 64:].view(3, T, 2, 16).transpose(1, 2)  # (B, H, T, D)
        close(attention.proj((there @ v).transpose(1, 2).reshape(3, T, 32)), output, 1e-4)
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_attention_weights_of_v3_are_those_of_hugging_face(load):
    model, idx = random_model(load("v3"), 50, std=0.2), random_ids(2, 32)
    theirs = as_gpt2(model, 2)
    theirs.set_attn_implementation("eager")
    close(look.attention_weights(model, idx), torch.stack(theirs(idx, output_attentions=True).attentions), 1e-5)


# ----------------------------------------------------------------------------------------------------------
# v0: the closed form
# ----------------------------------------------------------------------------------------------------------


def test_the_optimum_is_that_of_the_counts(load):
    ids, model = random_ids(500, vocab_size=12).to(torch.uint16), random_model(load("v0"), 13)  # one never occurs
    text = ids.tolist()
    pairs, firsts = Counter(zip(text, text[1:])), Counter(text[:-1])
    optimum = -sum(n * math.log(n / firsts[i]) for (i, _), n in pairs.items()) / 499
    table = model.table.detach().double().numpy()
    log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
    trained = -sum(n * log_p[pair] for pair, n in pairs.items()) / 499
    assert load("v0").compare_with_counts(model, ids) == pytest.approx((trained, optimum), rel=1e-9)
    assert optimum < trained


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


def context_of(name, module, ids, window):
    """The tokens that the next one is predicted from. `window`: where that of v4 begins, which reads its last half anew
    when it is full."""
    if name == "v0":
        return ids[-1:]
    if name == V4:
        return ids[window:]
    return ids[-(module.CONTEXT_SIZE if name < "v2" else module.BLOCK_SIZE) :]


@pytest.mark.parametrize("n_prompt", [1, 3, 31, 32, 33, 80])
@pytest.mark.parametrize(("name", "position"), MODELS)
@torch.no_grad()
def test_where_one_token_is_certain_it_is_taken(name, position, n_prompt, load):
    """Through texts that grow longer than the window. Nothing is dropped."""
    constants = {"DROPOUT": 0.3} if name in LATE_RUNGS else {"CONTEXT_SIZE": 6} if name == "v1" else {}
    module = load(name, **constants)
    model = random_model(module, 50, position).train()
    for p in [model.table] if name == "v0" else model.norm.parameters() if name == "v3" else [model.head.weight]:
        p.mul_(1e4)
    prompt = [k * 7 % 50 for k in range(n_prompt)]
    torch.manual_seed(0)  # two tokens may be almost equally likely
    found = [*prompt, *module.generate(model, prompt, 40)]
    ids, window = list(prompt), max(0, n_prompt - 32)
    model.eval()
    while len(ids) < n_prompt + 40:
        if len(ids) - window > 32:
            window = len(ids) - 16
        ids.append(int(model(torch.tensor([context_of(name, module, ids, window)]))[0, -1].argmax()))
    assert found == ids
    assert prompt == [k * 7 % 50 for k in range(n_prompt)]


@pytest.mark.parametrize("constants", [{"TEMPERATURE": 1e-4}, {"TEMPERATURE": 0}, {"TOP_K": 1}, {"TOP_P": 1e-9}])
@pytest.mark.parametrize("name", RUNGS)
@torch.no_grad()
def test_cold_sampling_takes_the_likeliest_token(name, constants, load):
    module = load(name, **constants)
    model, expected = random_model(module, 50), [3, 1, 4]
    while len(expected) < 32:
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert [3, 1, 4, *module.generate(model, [3, 1, 4], 29)] == expected


def kept_distribution(logits, temperature, top_k, top_p):
    """What is sampled from, token by token, in float64: softmax, the likeliest top_k, of them the fewest with top_p."""
    p = softmax(np.array(logits, float) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    order = order[: top_k or len(p)]
    total, kept, sum_of_kept = sum(p[i] for i in order), [], 0.0
    for i in order:
        if kept and top_p < 1 and sum_of_kept >= top_p:
            break
        kept.append(i)
        sum_of_kept += p[i] / total
    return {i: p[i] / sum(p[j] for j in kept) for i in kept}


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (0.7, 3, 1.0), (1.0, 0, 0.6), (1.3, 4, 0.8), (0.5, 100, 0.95), (2.0, 2, 0.3), (1.0, 1, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("name", RUNGS)
def test_what_is_drawn_has_the_distribution_that_the_constants_say(name, temperature, top_k, top_p, load, monkeypatch):
    """The probabilities that go into the draw, row by row, and what comes out of it."""
    module, given = load(name, TEMPERATURE=temperature, TOP_K=top_k, TOP_P=top_p), []
    for place in (torch, kernels):  # v4 has its own
        multinomial = place.multinomial
        monkeypatch.setattr(place, "multinomial", lambda p, *n, m=multinomial: given.append(p) or m(p, *n))
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(50, 9))).float() * 2
    drawn = module.draw(logits)
    assert drawn.shape == (50, 1)
    p = given[0].double() / given[0].double().sum(-1, keepdim=True)
    for row, there, token in zip(logits, p, drawn[:, 0].tolist()):
        expected = kept_distribution(row.tolist(), temperature, top_k, top_p)
        close(there, torch.tensor([expected.get(i, 0.0) for i in range(9)], dtype=torch.double), 1e-5)
        assert token in expected


@pytest.mark.parametrize("name", RUNGS)
def test_top_k_and_top_p_agree_with_hugging_face(name, load, monkeypatch):
    transformers, given = pytest.importorskip("transformers"), []
    for place in (torch, kernels):  # v4 has its own
        monkeypatch.setattr(place, "multinomial", lambda p, *n: given.append(p) or p[:, :1])
    load(name, TEMPERATURE=0.9, TOP_K=20, TOP_P=0.7).draw(logits := inputs(30, 60) * 3)
    for warp in (transformers.TemperatureLogitsWarper(0.9), transformers.TopKLogitsWarper(20),
                 transformers.TopPLogitsWarper(0.7)):  # fmt: skip
        logits = warp(None, logits)
    close(given[0] / given[0].sum(-1, keepdim=True), logits.softmax(-1), 1e-5)


DRAWS = [("v0", 0.5), ("v1", 2.0), ("v1_1", 2.0), *((name, t) for name in ("v2", *LATE_RUNGS) for t in (0.5, 2.0))]


@pytest.mark.parametrize(("name", "temperature"), DRAWS)
@torch.no_grad()
def test_many_draws_follow_the_distribution_of_the_model(name, temperature, load):
    """A chi-squared test, which another temperature does not pass."""
    module = load(name, TEMPERATURE=temperature)
    model, n, prompt = random_model(module, 4, std={"v0": 1.0, "v3_1": 0.8, V4: 0.3}.get(name, 0.4)), 600, [2, 0, 1, 3]
    torch.manual_seed(5)
    counts = np.bincount([next(module.generate(model, prompt, 1)) for _ in range(n)], minlength=4)
    logits = model(torch.tensor([prompt]))[0, -1].double().numpy()
    expected = {t: n * softmax(logits / t) for t in (temperature / 2, temperature, temperature * 2)}
    distance = {t: ((counts - there) ** 2 / there).sum() for t, there in expected.items()}
    bound = 21.1  # of 3 degrees of freedom, not exceeded with a probability of 0.9999
    assert distance.pop(temperature) < bound < min(distance.values())


# ----------------------------------------------------------------------------------------------------------
# Muon
# ----------------------------------------------------------------------------------------------------------


def newton_schulz(G):
    """By the singular values of one matrix, in float64: five rounds of the polynomial of Jordan et al. 2024."""
    U, s, Vh = np.linalg.svd(G.double().numpy(), full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return torch.from_numpy(U * s @ Vh)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (24, 20), (1, 8)])
def test_orthogonalize_changes_the_singular_values_alone(shape, scale, load):
    """Each matrix of the stack separately, whatever the scale of the others."""
    G = inputs(4, *shape) * scale * torch.tensor([1, 10, 0.1, 1000])[:, None, None]
    result = load("v3_1").orthogonalize(G)
    assert result.dtype == G.dtype and result.shape == G.shape
    close(result, torch.stack([newton_schulz(one) for one in G]), 1e-3)
    values = torch.linalg.svdvals(result)
    assert 0.3 < values.min() and values.max() < 1.3
    assert not load("v3_1").orthogonalize(torch.zeros(1, *shape)).any()


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_orthogonalize_in_bfloat16_stays_close(shape, load):
    G = inputs(3, *shape)
    exact, rounded = (load("v3_1").orthogonalize(G, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05


def test_muon_against_a_plain_loop(load):
    """Momentum as a running mean, Nesterov's look ahead, each square third by itself, sqrt(4) for a tall matrix."""
    shapes = {"thirds": (24, 8), "tall": (32, 8), "wide": (8, 32), "square": (8, 8)}
    parameters = {name: [nn.Parameter(inputs(*shape, seed=i)) for i in (1, 2)] for name, shape in shapes.items()}
    groups = [{"params": p, **({"split": 3} if name == "thirds" else {})} for name, p in parameters.items()]
    muon = load("v3_1").Muon(groups, lr=0.1, momentum=0.9)
    flat = [(name, p) for name, both in parameters.items() for p in both]
    expected, momenta = [p.detach().clone() for _, p in flat], [0.0] * len(flat)
    for step in range(4):
        rate = 0.1 / (step + 1)
        for group in muon.param_groups:
            group["lr"] = rate
        for i, (name, p) in enumerate(flat):
            p.grad = inputs(*p.shape, seed=100 * step + i)
            momenta[i] = 0.9 * momenta[i] + 0.1 * p.grad
            ahead = 0.1 * p.grad + 0.9 * momenta[i]
            parts = [newton_schulz(part) for part in ahead.split(8 if name == "thirds" else len(p))]
            expected[i] -= rate * (2 if name == "tall" else 1) * torch.cat(parts)
        muon.step()
    close([p.detach() for _, p in flat], expected, 1e-3)


def test_what_five_rounds_do_to_a_singular_value(load):
    """What the docstring of `orthogonalize` says, for matrices of a Frobenius norm of 1 with a small value `s`."""
    small = torch.tensor([1e-4, 1e-3, *np.geomspace(0.0015, 0.7, 300)], dtype=torch.double)
    matrices = torch.diag_embed(torch.stack([(1 - small**2).sqrt(), small], 1))  # (n, 2, 2)
    result = load("v3_1").orthogonalize(matrices, torch.double).diagonal(dim1=1, dim2=2)
    assert result[:2, 1].tolist() == pytest.approx([0.05, 0.47], abs=0.005)
    assert 0.679 < result[2:].min() and result.max() < 1.21


def test_the_momentum_of_muon_survives_saving(load, tmp_path):
    module = load("v3_1")

    def step(muon, p, seed):
        p.grad = inputs(8, 8, seed=seed)
        muon.step()

    p = nn.Parameter(inputs(8, 8))
    muon = module.Muon([p], lr=0.1, momentum=0.95)
    for seed in (1, 2):
        step(muon, p, seed)
    torch.save(muon.state_dict(), tmp_path / "muon.pt")
    copy = nn.Parameter(p.detach().clone())
    restored = module.Muon([copy], lr=0.5, momentum=0.1)
    restored.load_state_dict(torch.load(tmp_path / "muon.pt", weights_only=True))
    step(muon, p, 3)
    step(restored, copy, 3)
    assert torch.equal(p, copy)


# ----------------------------------------------------------------------------------------------------------
# v4: length extrapolation
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", SCHEMES)
def test_extrapolation_is_the_loss_in_longer_windows(position, load):
    """And none where the text is shorter than a window, which would be read in a shorter one."""
    module, tokens = load(V4, EXTRAPOLATION=(1, 2, 4, 9, 10, 16)), tiny_tokens(32 * 9 + 1, 40)
    model = random_model(module, 40, position)
    found = module.extrapolate(model, tokens)
    assert module.extrapolate(model, tiny_tokens(32 * 9, 40))[288] is None  # 287 of them can be predicted
    expected = {n: brute_force(model.eval(), tokens, n)["bpb"] for n in (32, 64, 128, 288)}
    assert found.pop(320) is None and found.pop(512) is None
    assert found == pytest.approx(expected, rel=1e-5)
