"""Checks of v3_training.py: against PyTorch, v3.py and closed forms."""

import math

import torch
import torch.nn.functional as F

import harness
import v3
from exercises.checking import compare, expect, fail, has_nan, notice, random


def test_pre_norm_block(my):
    torch.manual_seed(0)
    with harness.override(vars(v3), BLOCK_SIZE=6, N_EMBD=8, N_HEAD=2, DROPOUT=0.0):
        block = v3.Block()
    for p in block.parameters():
        p.data = torch.rand_like(p)
    norm_1, attention, norm_2, mlp = block.norm_1, block.attention, block.norm_2, block.mlp
    x = random(2, 6, 8)
    post = norm_1(x + attention(x))
    once = x + attention(norm_1(x))
    normed = norm_1(x) + attention(norm_1(x))
    outside = x + norm_1(attention(x))
    compare(my.pre_norm_block(x.clone(), norm_1, attention, norm_2, mlp), block(x), {
        "this is post-norm, as in v2: in v3 LayerNorm comes before each sub-layer": norm_2(post + mlp(post)),
        "the residual connections are missing: add x to the output of each sub-layer":
            mlp(norm_2(attention(norm_1(x)))),
        "what is added to the output of a sub-layer should be x itself, not its LayerNorm":
            norm_2(normed) + mlp(norm_2(normed)),
        "attention and MLP should follow each other, not stand side by side": once + mlp(norm_2(x)),
        "the residual connection around the MLP should add what came out of attention, not the block's input":
            x + mlp(norm_2(once)),
        "LayerNorm is applied to the output of the sub-layer; it should be applied to its input":
            outside + norm_2(mlp(outside)),
        "the second LayerNorm is norm_2": once + mlp(norm_1(once)),
        "the LayerNorms are missing": x + attention(x) + mlp(x + attention(x)),
    }, "the output")  # fmt: skip


def test_gelu(my):
    x = torch.linspace(-4, 4, 41)
    cubic = x + 0.044715 * x**3
    compare(my.gelu(x.clone()), F.gelu(x, approximate="tanh"), {
        "this is GELU with the error function; GPT-2 has the approximation with tanh": F.gelu(x),
        "this is x sigmoid(1.702 x), another approximation": x * (1.702 * x).sigmoid(),
        "this is ReLU": x.relu(),
        "the factor 1 / 2 is missing": 2 * F.gelu(x, approximate="tanh"),
        "the term with x^3 is missing": x / 2 * (1 + (math.sqrt(2 / math.pi) * x).tanh()),
        "the factor sqrt(2 / pi) belongs to the whole sum, x^3 included":
            x / 2 * (1 + (math.sqrt(2 / math.pi) * x + 0.044715 * x**3).tanh()),
        "the factor is sqrt(2 / pi), the root of both": x / 2 * (1 + (math.sqrt(2) / math.pi * cubic).tanh()),
        "the second factor belongs above the line: (x / 2) * (1 + tanh(...))":
            x / (2 * (1 + (math.sqrt(2 / math.pi) * cubic).tanh())),
    }, "gelu(x)", tolerance=1e-5)  # fmt: skip


def test_dropout(my):
    x, u = random(40, 5), torch.rand(40, 5, generator=torch.Generator().manual_seed(1))
    p, keep = 0.25, u >= 0.25
    compare(my.dropout(x.clone(), p, u, False), x, {
        "outside training nothing is dropped": x * keep / 0.75,
        "outside training nothing is dropped, or scaled": x * 0.75,
    }, "the result outside training")  # fmt: skip
    answer, mistakes = my.dropout(x.clone(), p, u, True), {
        "what stays is not scaled: its expected value is 1 - p of what it was": x * keep,
        "what stays is multiplied by 1 - p; it should be divided": x * keep * 0.75,
        "what stays is divided by p; it stays with the probability 1 - p": x * keep / 0.25,
        "a share 1 - p is dropped: what is below p should be": x * ~keep / 0.25,
        "what should be dropped stays, and the other way round": x * ~keep / 0.75,
        "nothing is dropped in training": x,
        "nothing is dropped in training, but all is scaled": x / 0.75,
    }  # fmt: skip
    notice(answer, mistakes)
    if isinstance(answer, torch.Tensor) and answer.shape == x.shape:
        expect(torch.equal(answer == 0, ~keep), "what is dropped is not where the numbers of `random` are below `p`")
    compare(answer, x * keep / 0.75, what="the result in training")
    compare(my.dropout(x.clone(), 0.0, u, True), x, what="the result with p = 0")


def test_lr_factor(my):
    for max_steps, warmup, cooldown in ((100, 10, 0.4), (20, 15, 0.5), (50, 1, 1.0)):
        def schedule(factor):
            return [float(min(1, factor(step))) for step in range(max_steps)]

        def rise(step):
            return (step + 1) / warmup

        def fall(step):
            return (max_steps - step) / (cooldown * max_steps)

        rest = max(1e-9, (1 - cooldown) * max_steps)
        with harness.override(vars(v3), MAX_STEPS=max_steps, WARMUP_STEPS=warmup, COOLDOWN=cooldown):
            right = [float(v3.lr_factor(step)) for step in range(max_steps)]
        answer = [my.lr_factor(step, max_steps, warmup, cooldown) for step in range(max_steps)]
        if all(isinstance(factor, (int, float)) for factor in answer):
            expect(answer[0] != 0, "step 0 has a learning rate of 0 and is lost; it should be 1 / warmup_steps")
            expect(max(answer) <= 1, f"the factor exceeds 1 at step {answer.index(max(answer))}")
            expect(min(answer) >= 0, f"the factor is negative at step {answer.index(min(answer))}")
        compare(answer, right, {
            "the learning rate does not fall at the end": schedule(rise),
            "the learning rate does not rise at the start": schedule(fall),
            "`cooldown` is the share of the steps in which the rate falls; here it falls in all others":
                schedule(lambda step: min(rise(step), (max_steps - step) / rest)),
            "the last step has a learning rate of 0 and is lost; only the step `max_steps` would have 0":
                schedule(lambda step: min(rise(step), (max_steps - 1 - step) / (cooldown * max_steps))),
            "the fall is a cosine; it should be linear":
                schedule(lambda step: min(rise(step), (1 - math.cos(math.pi * min(1, fall(step)))) / 2)),
            "rise and fall are multiplied; where they overlap, the smaller counts":
                schedule(lambda step: min(1, rise(step)) * min(1, fall(step))),
            "where rise and fall overlap, the smaller counts; here it is always the rise":
                schedule(lambda step: rise(step) if step < warmup else fall(step)),
            "where rise and fall overlap, the smaller counts; here it is always the fall":
                schedule(lambda step: fall(step) if fall(step) <= 1 else rise(step)),
            "it falls from the start on; it should only fall in the last part of the steps, a share `cooldown`":
                schedule(lambda step: min(rise(step), 1 - step / max_steps)),
        }, f"lr_factor in {max_steps} steps, warmup_steps={warmup}, cooldown={cooldown}")  # fmt: skip


def test_clip_gradients(my):
    gradients = [random(3, 4), 2 * random(5, seed=1)]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    params = [torch.zeros_like(g).requires_grad_() for g in gradients]
    for p, g in zip(params, gradients):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    compare(my.clip_gradients([g.clone() for g in gradients], 0.5), [p.grad for p in params], {
        "each tensor is clipped by itself; the norm is that of all together":
            [g * min(1, 0.5 / g.norm().item()) for g in gradients],
        "each number is clipped; it should be the norm, so that the direction stays":
            [g.clamp(-0.5, 0.5) for g in gradients],
        "the norms of the tensors are added; it is their squares that add up":
            [g * 0.5 / sum(g.norm().item() for g in gradients) for g in gradients],
        "the root is missing: the norm is the root of the sum of squares": [g * 0.5 / norm**2 for g in gradients],
        "the squares of a tensor are added up in a norm; here their mean is taken":
            [g * 0.5 / sum(g.square().mean().item() for g in gradients) ** 0.5 for g in gradients],
        "nothing is clipped": gradients,
    }, "clip_gradients(gradients, 0.5)", tolerance=1e-5)  # fmt: skip
    compare(my.clip_gradients([g.clone() for g in gradients], 100.0), gradients, {
        "small gradients are scaled up; they should stay as they are": [g * 100 / norm for g in gradients],
    }, "clip_gradients(gradients, 100.0)")  # fmt: skip


def test_adamw_step(my):
    lr, betas, eps, decay = 0.1, (0.8, 0.9), 1e-3, 0.5
    b1, b2 = betas
    start, grads = random(6), [random(6, seed=k) for k in (1, 2, 3)]

    def by(step_of):
        p, m, v = start.clone(), torch.zeros(6), torch.zeros(6)
        for step, grad in enumerate(grads, start=1):
            p, m, v = step_of(p, grad, m, v, step)
        return p, m, v

    def variant(correct=True, coupled=False, eps_outside=True, decay_times_lr=True, late=False, swap=False,
                decays=True, keep=False, squared=True, sign=1, root=True, eps_before=False):
        def step_of(p, g, m, v, step):
            g = g + decay * p if coupled else g
            m = (1 - b1) * m + b1 * g if swap else b1 * m + (1 - b1) * g
            square = g**2 if squared else g
            v = (1 - b2) * v + b2 * square if swap else b2 * v + (1 - b2) * square
            mc, vc = (m / (1 - b1**step), v / (1 - b2**step)) if correct else (m, v)
            below = (vc.sqrt() if root else vc) + eps if eps_outside else (vc + eps).sqrt()
            below = (v.sqrt() + eps) / math.sqrt(1 - b2**step) if eps_before else below
            move = sign * lr * mc / below
            shrink = 0 if coupled or not decays else decay * (lr if decay_times_lr else 1)
            return p - shrink * (p - move if late else p) - move, *((mc, vc) if keep else (m, v))

        return by(step_of)

    param = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([param], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    state = optimizer.state[param]
    values = start, grads[0], grads[1], grads[2].square()
    frozen = tuple(x.clone() for x in values)
    answer = my.adamw_step(*frozen, 1, lr, betas, eps, decay)
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        fail("the result should be three tensors: return p, m, v")
    expect(all(torch.equal(x, y) for x, y in zip(frozen, values)),
           "what comes in is changed in place: write m = b1 * m + ..., not m *= b1")  # fmt: skip
    answer = by(lambda p, grad, m, v, step: my.adamw_step(p, grad, m, v, step, lr, betas, eps, decay))
    right = param.detach(), state["exp_avg"], state["exp_avg_sq"]
    compare(answer[1:], right[1:], {
        "m and v come back corrected; the correction is for this step alone": variant(keep=True)[1:],
        "the decay is added to the gradient, as in Adam with L2; in AdamW it acts on p alone":
            variant(coupled=True)[1:],
        "the betas are exchanged with 1 - beta: b1 is what stays of the old m": variant(swap=True)[1:],
        "v is the running mean of the square of the gradient: grad**2": variant(squared=False)[1:],
    }, "(m after three steps, v after three steps)")  # fmt: skip
    if has_nan(answer[0]):
        fail("p contains nan: the root of a negative number? v is not negative, nor is 1 - b2**step, with a power")
    compare(answer[0], right[0], {
        "the correction of m and v by 1 - b^step is missing": variant(correct=False)[0],
        "eps belongs outside of the root: sqrt(v) + eps": variant(eps_outside=False)[0],
        "the decay should be multiplied by lr": variant(decay_times_lr=False)[0],
        "p should decay before it moves": variant(late=True)[0],
        "the decay is missing": variant(decays=False)[0],
        "p moves the wrong way: subtract": variant(sign=-1)[0],
        "the root of v is missing": variant(root=False)[0],
        "v is corrected before its root is taken and eps is added": variant(eps_before=True)[0],
    }, "p after three steps", tolerance=1e-5)  # fmt: skip


def test_weight_decay_groups(my):
    with harness.override(vars(v3), BLOCK_SIZE=6, N_EMBD=8, N_HEAD=2, N_LAYER=1):
        model = v3.LanguageModel(10)
    named = list(model.named_parameters())
    names = {id(p): name for name, p in named}
    groups = v3.make_optimizer(model).param_groups
    right = tuple([names[id(p)] for p in group["params"]] for group in groups)

    def split(decays):
        return [name for name, _ in named if decays(name)], [name for name, _ in named if not decays(name)]

    compare(my.weight_decay_groups(iter(named)), right, {
        "the weight of a LayerNorm should not decay: it is no matrix": split(lambda name: name.endswith("weight")),
        "embeddings are matrices, and decay": split(
            lambda name: name.endswith("weight") and "norm" not in name and "embedding" not in name),
        "the two lists are exchanged: first come those that decay": right[::-1],
        "the lists should be of names alone, without the parameters": tuple(
            [(name, dict(named)[name]) for name in group] for group in right),
        "the second list is empty: the pairs can be walked once only; fill both lists in one loop": (right[0], []),
    }, "(the list of those that decay, the list of the others)")  # fmt: skip
    other = [("table", torch.ones(2, 3)), ("weight", torch.ones(3))]
    compare(my.weight_decay_groups(iter(other)), (["table"], ["weight"]), {
        "what decays should be found by dimensions, not by names": (["weight"], ["table"]),
    }, "the result for a matrix named table and a vector named weight")  # fmt: skip


def test_n_parameters(my):
    for V, T, L, C in ((31, 8, 3, 2), (11, 5, 2, 4)):
        with harness.override(vars(v3), BLOCK_SIZE=T, N_LAYER=L, N_EMBD=C, N_HEAD=1):
            right = sum(p.numel() for p in v3.LanguageModel(V).parameters())
        answer = my.n_parameters(V, T, L, C)
        compare(answer, right, {
            "the last layer is the embedding used again, and has no parameters of its own": right + V * C,
            "the last layer is the embedding used again, without a bias": right + V,
            "the embeddings of positions are missing": right - T * C,
            "the LayerNorm at the end is missing": right - 2 * C,
            "the vectors are missing: biases, and weights and biases of LayerNorm": right - L * 13 * C - 2 * C,
            "the biases of the layers are missing": right - L * 9 * C,
            "a LayerNorm has a weight and a bias": right - L * 2 * C - C,
            "the LayerNorms of the blocks are missing": right - L * 4 * C,
            "a layer has a bias for each output: `qkv` has 3 C, and the MLP's first 4 C": right - L * 5 * C,
            "3 C are missing: `qkv` has biases too, and the MLP's first layer has 4 C": right - L * 3 * C,
            "the vectors of a block are C numbers too few": right - L * C,
            "the vectors of a block are 2 C numbers too few": right - L * 2 * C,
            "the vectors of a block are C numbers too many": right + L * C,
        }, f"n_parameters({V}, {T}, {L}, {C})")  # fmt: skip


def test_windows_that_count(my):
    for n, size, stride in ((10, 4, 3), (20, 6, 2), (21, 6, 4), (12, 4, 4), (9, 4, 4), (3, 8, 2), (8, 8, 1)):
        right, seen, start = [], set(), 0
        while len(seen) < n:  # each window's predictions that no window before has made
            made = range(start, min(start + size, n))
            right.append((start, min(set(made) - seen), made.stop))
            seen |= set(made)
            start += stride
        answer = my.windows_that_count(n, size, stride)
        case = f"windows_that_count({n}, {size}, {stride})"
        if isinstance(answer, list) and all(isinstance(w, (tuple, list)) and len(w) == 3 for w in answer):
            counted = [i for _, first, stop in answer for i in range(first, stop)]
            for start, first, stop in answer:
                expect(start % stride == 0, f"{case}: no window starts at {start}; they start at multiples of {stride}")
                expect(stop == min(start + size, n), f"{case}: the window that starts at {start} makes predictions "
                       f"up to {min(start + size, n) - 1}, so that its `stop` is {min(start + size, n)}")  # fmt: skip
                expect(first < stop, f"{case}: in the window that starts at {start} nothing counts; the window before "
                       "has reached the end")  # fmt: skip
            twice = [i for i in counted if counted.count(i) > 1]
            expect(not twice, f"{case}: prediction {twice[:1]} counts in several windows")
            missing = sorted(set(range(n)) - set(counted))
            expect(not missing, f"{case}: predictions are missing: {missing}; the last window may be shorter")
            early = all(first - start >= size - stride for start, first, _ in answer[1:])
            expect(early, f"{case}: a prediction counts in the first window that makes it, not in the last")
        compare(answer, right, what=case)
        assert len(right) == len(torch.arange(0, max(0, n - size) + stride, stride))  # as in v3.predictions
