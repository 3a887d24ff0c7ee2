"""Which faults do the tests notice? Plants them one at a time in a copy of the tree and runs the tests there.

    python tests/mutants.py                    all of them: an hour and more
    python tests/mutants.py v3 harness         those of these files
    python tests/mutants.py --jobs 2           two at a time
    python tests/mutants.py --list             say which there are

A fault is noticed if a test fails; without any, all pass, which is tried before. First the tests run that should
notice a fault, then, if they do not, all those of models, training and the harness, or all those of data. A fault
marked as equivalent changes nothing that a test could see, for the reason given. "harness" and "data" are all files of
the folder.
Exit code 1: a fault was not noticed, or could not be planted.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_models.py", "test_training.py", "test_kernels.py", "test_files.py", "test_errors.py", "test_harness.py",
         "test_processes.py", "test_survival.py", "test_identity.py", "test_flops.py",
         "test_benchmark_training.py", "test_checks.py")  # fmt: skip
RESULTS_TESTS = ("test_experiments.py", "test_results.py")  # of faults in results/
DATA_TESTS = ("test_files.py", "test_data.py", "test_texts.py")  # of faults in data/
OWN_TESTS = {  # those to run first
    "kernels.py": "test_kernels.py", "harness/files.py": "test_files.py", "harness/identity.py": "test_identity.py",
    "harness/flops.py": "test_flops.py", "benchmarks/training.py": "test_benchmark_training.py",
    "benchmarks/steps.py": "test_benchmark_training.py", "harness/checks.py": "test_checks.py",
    "harness/arguments.py": "test_checks.py",
}  # fmt: skip
TIMEOUT = 900  # seconds for a run of the tests
MEMORY = 8 << 30  # bytes that it may address: some faults would take all that there is
SLOW = "compiled or memory or fast_alibi"  # left to the second run, unless a fault asks for them

V1, V11, V31, V4, LOOK = "v1.py", "v1_1.py", "v3_1.py", "v4_alibi_rope.py", "look.py"
ARGUMENTS, CHECKS = "harness/arguments.py", "harness/checks.py"
CLI, DISTRIBUTED, MODELS = "harness/cli.py", "harness/distributed.py", "harness/models.py"
REPORT, RESUME, RUN = "harness/report.py", "harness/resume.py", "harness/run.py"
IDENTITY, STORE, RESULT_CHECKS = "harness/identity.py", "results/store.py", "results/checks.py"
FLOPS, TRAINING, STEPS = "harness/flops.py", "benchmarks/training.py", "benchmarks/steps.py"
RESUMED = "resum or killed or finished or damaged"
EVALUATED = '            metrics = evaluate(model, tokens["val"])\n'
TRAINED = '        x, y = get_batch(tokens["train"].ids, step)\n'
NEXT = "        y = tokens.ids[start + 1 : start + len(x) + 1].long().to(DEVICE)\n"
BEST = '                state.best, state.bad_evals = metrics["loss"], 0\n'

# (file, what is broken, text, text with the fault[, pytest's -k of the tests to run first[, why it is equivalent]])
FAULTS = [
    # v0
    ("v0.py", "targets are the inputs", "ids[i + 1 : i + BLOCK_SIZE + 1]", "ids[i : i + BLOCK_SIZE]"),
    ("v0.py", "batches of the next seed", "default_rng((SEED, step))", "default_rng(SEED + step)"),
    ("v0.py", "the last window is never drawn", "integers(len(ids) - BLOCK_SIZE,",
     "integers(len(ids) - BLOCK_SIZE - 1,"),
    ("v0.py", "columns instead of rows", "F.embedding(idx, self.table)", "F.embedding(idx, self.table.T)"),
    ("v0.py", "random table at the start", "torch.zeros(vocab_size, vocab_size)",
     "torch.randn(vocab_size, vocab_size)"),
    ("v0.py", "the loss of another token", NEXT,
     NEXT.replace("start + 1 : start + len(x) + 1", "start : start + len(x)")),
    ("v0.py", "the last window is not evaluated", "(slice(0, whole), slice(whole, None))", "(slice(0, whole),)"),
    ("v0.py", "nats instead of bits", "nats / (math.log(2) * tokens.n_bytes)", "nats / tokens.n_bytes"),
    ("v0.py", "words are bytes", "nats / tokens.n_words", "nats / tokens.n_bytes"),
    ("v0.py", "word perplexity overflows", "math.exp(min(nats / tokens.n_words, 700))",
     "math.exp(nats / tokens.n_words)"),
    ("v0.py", "another learning rate", "lr=LEARNING_RATE)", "lr=LEARNING_RATE / 2)"),
    ("v0.py", "another optimizer", "torch.optim.Adam(", "torch.optim.SGD("),
    ("v0.py", "gradients pile up", "        optimizer.zero_grad()\n", ""),
    ("v0.py", "the sampler ignores the table", "        logits = model(idx[:, -1:])[:, -1]  # (1, V)",
     "        logits = torch.ones(1, len(model.table))"),
    ("v0.py", "greedy takes the unlikeliest", "logits.argmax(-1, keepdim=True)", "logits.argmin(-1, keepdim=True)"),
    ("v0.py", "one more than TOP_K", "ranked[:, TOP_K:] = 0", "ranked[:, TOP_K + 1 :] = 0"),
    ("v0.py", "TOP_P keeps one less", "ranked[:, 1:][likelier >= TOP_P] = 0", "ranked[:, :-1][likelier >= TOP_P] = 0"),
    ("v0.py", "TOP_P of all and not of the TOP_K", "(ranked / ranked.sum(-1, keepdim=True)).cumsum(-1)",
     "ranked.cumsum(-1)"),
    ("v0.py", "the probabilities of other tokens", "torch.zeros_like(p).scatter(-1, order, ranked)", "ranked"),
    ("v0.py", "words where there are none", " if tokens.n_words else None", ""),
    ("v0.py", "pairs in reverse", "ids[:-1].long() * vocab_size + ids[1:].long()",
     "ids[1:].long() * vocab_size + ids[:-1].long()"),
    ("v0.py", "counts of the validation split", 'compare_with_counts(model, tokens["train"].ids)',
     'compare_with_counts(model, tokens["val"].ids)'),
    ("v0.py", "patience counts better evaluations", BEST, BEST.replace(", 0\n", ", state.bad_evals\n")),
    # v1
    (V1, "windows are never shuffled", "random.permutation(n_batches * batch_size)",
     "np.arange(n_batches * batch_size)"),
    (V1, "windows begin at one offset", "random.integers(block_size) + block_size", "block_size"),
    (V1, "one order in every epoch", "default_rng((seed, epoch))", "default_rng(seed)"),
    (V1, "seeds share epochs", "default_rng((seed, epoch))", "default_rng(seed + epoch)"),
    (V1, "the context begins a token too early", "self.context_size - 1, 0))  #",
     "self.context_size, 0))[:, :-1]  #"),
    (V1, "no tanh", "self.hidden(x).tanh()", "self.hidden(x)"),
    (V1, "the loss is a sum", "F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
     'F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")'),
    (V1, "trains on the validation split", TRAINED, TRAINED.replace("train", "val")),
    (V1, "evaluates the training split", EVALUATED, EVALUATED.replace("val", "train")),
    (V1, "gradients pile up", "        optimizer.zero_grad()\n", ""),
    (V1, "samples from a shorter context", "idx[:, -model.context_size :]", "idx[:, -1:]"),
    (V1, "the last weights are kept", '            if metrics["loss"] < state.best:', "            if True:"),
    # v1_1
    (V11, "no memory is given back", "ctypes.CDLL(None).mallopt(-3, 1 << 20)", "pass", "memory"),
    (V11, "each chunk has memory of its own", ", out=room[: len(target)]", ""),
    (V11, "one chunk", "for i in range(0, N, CHUNK_SIZE):", "for i in range(0, N, N):"),
    (V11, "the sum of all tokens is not divided", "(total.log() - logit).sum() / N", "(total.log() - logit).sum()"),
    (V11, "exponentials may overflow", "p -= p.amax(1, keepdim=True)", "p -= 0"),
    (V11, "the gradient does not know the target", "-1 / N))", "0.0))"),
    (V11, "the backward pass forgets what arrives", "grad * gradient for", "gradient for"),
    (V11, "micro-batches count alike", "(len(micro_x) / len(x))", "(MICRO_BATCH_SIZE / len(x))"),
    (V11, "micro-batches are not weighed", " * (len(micro_x) / len(x))", ""),
    (V11, "the loss of the last micro-batch is logged", "loss += micro_loss.detach()",
     "loss = micro_loss.detach()"),
    (V11, "a batch at once", "zip(x.split(MICRO_BATCH_SIZE), y.split(MICRO_BATCH_SIZE))", "[(x, y)]"),
    # v2
    ("v2.py", "gradients pile up", "        optimizer.zero_grad()\n", ""),
    ("v2.py", "scores are not scaled", " / math.sqrt(C // self.n_head)", ""),
    ("v2.py", "a token does not see itself", "dtype=torch.bool).triu(1)", "dtype=torch.bool).triu(0)"),
    ("v2.py", "a token sees the next one", "dtype=torch.bool).triu(1)", "dtype=torch.bool).triu(2)"),
    ("v2.py", "queries and keys exchanged", "        q, k, v = self.qkv(x)", "        k, q, v = self.qkv(x)"),
    ("v2.py", "heads are not put side by side again", "y.transpose(1, 2).reshape(B, T, C)", "y.reshape(B, T, C)"),
    ("v2.py", "no residual connection around attention", "x + self.attention(x)", "self.attention(x)"),
    ("v2.py", "no residual connection around the MLP", "x + self.mlp(x)", "self.mlp(x)"),
    ("v2.py", "GELU", "nn.ReLU()", "nn.GELU()"),
    ("v2.py", "positions are forgotten", " + self.position_embedding.weight[: idx.size(1)]", ""),
    ("v2.py", "the block size of another model", "idx[:, -model.block_size :]", "idx[:, -BLOCK_SIZE:]"),
    ("v2.py", "micro-batches are not weighed", " * (len(micro_x) / len(x))", ""),
    ("v2.py", "another learning rate", "lr=LEARNING_RATE,", "lr=1e-3,"),
    # v3
    ("v3.py", "never sets the learning rate", '            group["lr"] = LEARNING_RATE * lr_factor(step)',
     "            pass"),
    ("v3.py", "trains on the validation split", TRAINED, TRAINED.replace("train", "val")),
    ("v3.py", "test metrics of the validation split", 'evaluate(model, tokens["test"])',
     'evaluate(model, tokens["val"])'),
    ("v3.py", "the last evaluation does not slide", 'evaluate(model, tokens["val"], STRIDE)',
     'evaluate(model, tokens["val"])'),
    ("v3.py", "an evaluation that does not slide", "size, min(stride or size, size))", "size, size)"),
    ("v3.py", "a stride may skip tokens", "size, min(stride or size, size))", "size, stride or size)"),
    ("v3.py", "tokens are counted twice", "torch.where(batch > 0, size - stride, 0)", "torch.where(batch > 0, 0, 0)"),
    ("v3.py", "too little of a window is new", "torch.where(batch > 0, size - stride, 0)",
     "torch.where(batch >= 0, size - stride, 0)"),
    ("v3.py", "a window too many", "max(0, n - size) + stride, stride)", "max(0, n - size) + stride + 1, stride)"),
    ("v3.py", "a window too few", "max(0, n - size) + stride, stride)", "max(0, n - size), stride)"),
    ("v3.py", "top 4", "top_5 += right.sum()", "top_5 += right[:, :4].sum()"),
    ("v3.py", "10 bins", "(15 * confidence", "(10 * confidence"),
    ("v3.py", "certainty has a bin of its own", ".long().clamp(0, 14)", ".long()"),
    ("v3.py", "confidence of the target", "(likeliest[..., 0] - log_total).exp()",
     "(logits.gather(-1, target).squeeze(-1) - log_total).exp()"),
    ("v3.py", "processes keep their bins", "    bins = harness.all_reduce(bins)\n", ""),
    ("v3.py", "differences of calibration cancel out", "(bins[1] - bins[2]).abs().sum()",
     "(bins[1] - bins[2]).sum().abs()"),
    ("v3.py", "evaluates with dropout", "    model.eval()\n    size", "    size"),
    ("v3.py", "stays in evaluation", "    bins = harness.all_reduce(bins)\n    model.train()\n",
     "    bins = harness.all_reduce(bins)\n"),
    ("v3.py", "evaluates in float32 always", "        with harness.autocast(DEVICE, DTYPE):\n            logits",
     "        if True:\n            logits"),
    ("v3.py", "all processes evaluate all", "in harness.share_batches(batches):", "in ((b, True) for b in batches):"),
    ("v3.py", "a batch that fills up counts", "new = counts & (", "new = ("),
    ("v3.py", "all processes train on the first part", "view(harness.world_size(), -1)[harness.rank()]",
     "view(harness.world_size(), -1)[0]"),
    ("v3.py", "one initial scale", "std=0.02 / math.sqrt(2 * N_LAYER)", "std=0.02"),
    ("v3.py", "a wide beginning", "nn.init.normal_(p, std=0.02)", "nn.init.normal_(p, std=0.2)"),
    ("v3.py", "random biases", "nn.init.zeros_(p)", "nn.init.normal_(p, std=0.01)"),
    ("v3.py", "norms after the branches", "x = x + self.dropout(self.attention(self.norm_1(x)))",
     "x = x + self.dropout(self.norm_1(self.attention(x)))"),
    ("v3.py", "one norm for both branches", "self.mlp(self.norm_2(x))", "self.mlp(self.norm_1(x))"),
    ("v3.py", "no last norm", "self.norm(self.blocks(self.dropout(x)))", "self.blocks(self.dropout(x))"),
    ("v3.py", "attention branch is not dropped", "x + self.dropout(self.attention(self.norm_1(x)))",
     "x + self.attention(self.norm_1(x))"),
    ("v3.py", "embeddings are not dropped", "self.blocks(self.dropout(x))", "self.blocks(x)"),
    ("v3.py", "logits stay bfloat16", "kernels.linear(x, self.head.weight).float()",
     "kernels.linear(x, self.head.weight)"),
    ("v3.py", "vectors decay", '{"params": vectors, "weight_decay": 0.0}',
     '{"params": vectors, "weight_decay": WEIGHT_DECAY}'),
    ("v3.py", "nothing decays", '"weight_decay": WEIGHT_DECAY}', '"weight_decay": 0.0}'),
    ("v3.py", "other betas", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
    ("v3.py", "warm-up from zero", "return (step + 1) / WARMUP_STEPS", "return step / WARMUP_STEPS"),
    ("v3.py", "the cosine ends above zero", "max(1, MAX_STEPS - WARMUP_STEPS))", "max(1, MAX_STEPS))"),
    ("v3.py", "gradients are not clipped", "nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP or math.inf)",
     "nn.utils.clip_grad_norm_(model.parameters(), math.inf)"),
    ("v3.py", "clipped where it should not", "GRAD_CLIP or math.inf", "GRAD_CLIP"),
    ("v3.py", "clips values instead of the norm", "clip_grad_norm_", "clip_grad_value_"),
    ("v3.py", "the loss is not in the type of the run", "                with harness.autocast(DEVICE, DTYPE):\n",
     "                if True:\n"),
    ("v3.py", "gradients are exchanged too early", "now=done == len(x)", "now=True"),
    ("v3.py", "all processes drop alike", "harness.seed(SEED, step, harness.rank())",
     "harness.seed(SEED, step, 0)"),
    ("v3.py", "all steps drop alike", "harness.seed(SEED, step, harness.rank())",
     "harness.seed(SEED, 0, harness.rank())"),
    ("v3.py", "random numbers go on as they come", "harness.seed(SEED, step, harness.rank())", "pass",
     "v3 and (killed or seed)"),
    ("v3.py", "early stop a step too late", "state.bad_evals >= PATIENCE", "state.bad_evals > PATIENCE"),
    ("v3.py", "the best weights are not kept", "                run.save_best()\n", ""),
    ("v3.py", "the worst weights are kept", 'if metrics["loss"] < state.best:',
     'if metrics["loss"] > state.best or not step:'),
    ("v3.py", "temperature multiplies", "(logits / TEMPERATURE)", "(logits * TEMPERATURE)"),
    ("v3.py", "no temperature", "(logits / TEMPERATURE)", "logits"),
    ("v3.py", "no fine-tuning", "            run.init_from(INIT_FROM)", "            pass", "weights_of and v3"),
    ("v3.py", "samples with dropout", "    model.eval()\n    idx", "    idx"),
    ("v3.py", "the sample has another seed", "        torch.manual_seed(SEED)\n        start", "        start"),
    ("v3.py", "the model is not compiled", "compiled(micro_x, micro_y)", "model(micro_x, micro_y)",
     "two_processes"),
    ("v3.py", "the model has the head count of another",
     "        B, T, C = x.shape\n        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)",
     "        B, T, C = x.shape\n        q, k, v = self.qkv(x).view(B, T, 3, N_HEAD, C // N_HEAD)"),
    # v3_1
    (V31, "RMSNorm over all positions", "F.rms_norm(x, (x.size(-1),))", "F.rms_norm(x, x.shape[1:])"),
    (V31, "LayerNorm", "F.rms_norm(x, (x.size(-1),))", "F.layer_norm(x, (x.size(-1),))"),
    (V31, "ReLU is not squared", "F.relu(self.fc(x)).square()", "F.relu(self.fc(x))"),
    (V31, "positions are forgotten", " + self.position_embedding.weight[: idx.size(1)]", ""),
    (V31, "positions are normalized with the tokens",
     "norm(self.embedding(idx)) + self.position_embedding.weight[: idx.size(1)]",
     "norm(self.embedding(idx) + self.position_embedding.weight[: idx.size(1)])"),
    (V31, "embeddings have no norm", "x = norm(self.embedding(idx)) +", "x = self.embedding(idx) +"),
    (V31, "the attention branch has no norm", "self.attention(norm(x))", "self.attention(x)"),
    (V31, "the MLP branch has no norm", "self.mlp(norm(x))", "self.mlp(x)"),
    (V31, "no last norm", "x = norm(self.blocks(self.dropout(x)))", "x = self.blocks(self.dropout(x))"),
    (V31, "no dropout behind attention", "x + self.dropout(self.attention(norm(x)))", "x + self.attention(norm(x))"),
    (V31, "embeddings are not dropped", "self.blocks(self.dropout(x))", "self.blocks(x)"),
    (V31, "layers have biases", "3 * N_EMBD, bias=False)", "3 * N_EMBD)"),
    (V31, "the head starts at random", 'if name.endswith("proj.weight") or name == "head.weight":',
     'if name.endswith("proj.weight"):'),
    (V31, "branches start at random", 'if name.endswith("proj.weight") or name == "head.weight":',
     'if name == "head.weight":'),
    (V31, "embeddings of another scale", 'std=0.1 if name == "embedding.weight"',
     'std=0.02 if name == "embedding.weight"'),
    (V31, "positions of the scale of tokens", 'std=0.1 if name == "embedding.weight"',
     'std=0.1 if name.endswith("embedding.weight")'),
    (V31, "another polynomial", "beta=-4.7750", "beta=-4.7"),
    (V31, "four rounds", "for _ in range(5):\n        A", "for _ in range(4):\n        A"),
    (V31, "the stack has one norm", "X.norm(dim=(-2, -1), keepdim=True)", "X.norm()"),
    (V31, "tall matrices stay turned", "(X.mT if tall else X).type_as(G)", "X.reshape(G.shape).type_as(G)"),
    (V31, "products in float32 always", "X = G.to(dtype)", "X = G.float()"),
    (V31, "no look ahead", 'p.grad.lerp(state["momentum"], momentum)', 'state["momentum"].clone()'),
    (V31, "momentum of another share", "lerp_(p.grad, 1 - momentum)", "lerp_(p.grad, 0.05)"),
    (V31, "momentum starts anew", "                if not state:\n", "                if True:\n"),
    (V31, "thirds are orthogonalized together", '{"params": [a.qkv.weight for a in attention], "split": 3}',
     '{"params": [a.qkv.weight for a in attention]}'),
    (V31, "tall matrices get no longer steps", "scale = max(1, rows / columns) ** 0.5", "scale = 1.0"),
    (V31, "AdamW at Muon's rate", "lr=LEARNING_RATE_ADAMW", "lr=LEARNING_RATE"),
    (V31, "AdamW decays", "weight_decay=0.0", "weight_decay=0.1"),
    (V31, "blocks are trained twice", 'if not name.startswith("blocks")]', "if True]"),
    (V31, "positions are not trained", 'if not name.startswith("blocks")]',
     'if not name.startswith(("blocks", "position"))]'),
    (V31, "rates shrink step by step", 'group["lr"] = group["initial_lr"] * lr_factor(step)',
     'group["lr"] = group["lr"] * lr_factor(step)'),
    (V31, "AdamW keeps its rate", "        for optimizer in optimizers:\n            for group",
     "        for optimizer in optimizers[:1]:\n            for group"),
    (V31, "AdamW makes no step", "        for optimizer in optimizers:\n            optimizer.step()",
     "        for optimizer in optimizers[:1]:\n            optimizer.step()"),
    (V31, "no cooldown", "(MAX_STEPS - step) / max(1, COOLDOWN * MAX_STEPS))", "1)"),
    (V31, "warm-up from zero", "(step + 1) / max(1, WARMUP_STEPS)", "step / max(1, WARMUP_STEPS)"),
    (V31, "the norm of the first gradient alone", "get_total_norm(p.grad for p in model.parameters())",
     "get_total_norm([next(model.parameters()).grad])", "every_step_is_a_row"),
    (V31, "resuming forgets AdamW", "run.resume(model, *optimizers)", "run.resume(model, optimizers[0])",
     "v3_1 and (resum or killed or finished)"),
    (V31, "test metrics of the validation split", 'evaluate(model, tokens["test"])', 'evaluate(model, tokens["val"])'),
    (V31, "no fine-tuning", "            run.init_from(INIT_FROM)", "            pass", "weights_of and v3_1"),
    (V31, "the block size of another model", "idx[:, -model.block_size :]", "idx[:, -BLOCK_SIZE:]"),
    # v4
    (V4, "RoPE turns backwards", "[a * cos - b * sin, a * sin + b * cos]", "[a * cos + b * sin, b * cos - a * sin]"),
    (V4, "RoPE turns the queries alone", "q, k = apply_rope(qkv[:2], rope)", "q = apply_rope(q, rope)"),
    (V4, "RoPE with a base of its own", "rope = rope_table(positions, self.head_size, self.rope_base)",
     "rope = rope_table(positions, self.head_size, 10000.0)"),
    (V4, "RoPE forgets the cache", "positions = torch.arange(start, start + idx.size(1)",
     "positions = torch.arange(idx.size(1)"),
    (V4, "cosines before sines", "self.rope_base)[::-1], -1)", "self.rope_base), -1)"),
    (V4, "slopes grow", "[2 ** (-8 * i / power) for i", "[2 ** (-8 / i / power) for i"),
    (V4, "slopes of other head counts", "range(1, 2 * (n_head - power), 2)", "range(2, 2 * (n_head - power) + 1, 2)"),
    (V4, "slopes of another model", "kernels.ALiBiAttention(alibi_slopes(N_HEAD),",
     "kernels.ALiBiAttention(alibi_slopes(4)[:N_HEAD],"),
    (V4, "ALiBi rewards distance", "torch.arange(K) - torch.arange(K - T, K)[:, None]",
     "torch.arange(K - T, K)[:, None] - torch.arange(K)"),
    (V4, "queries are the first tokens", "torch.arange(K - T, K)[:, None]  #", "torch.arange(T)[:, None]  #"),
    (V4, "ALiBi has no bias", "y = self.alibi_attention(q, k, v)", "y = kernels.attention(q, k, v)"),
    (V4, "the cache forgets when it grows", "memory[:, :, : self.length] = x[:, :, : self.length]", "pass"),
    (V4, "the cache writes at its beginning", "memory[:, :, self.length : T] = x", "memory[:, :, : x.size(2)] = x"),
    (V4, "the cache does not count", "cache.length += idx.size(1)", "cache.length += 1"),
    (V4, "all layers share a cache", "cache.extend(self.layer, k, v)", "cache.extend(0, k, v)"),
    (V4, "no dropout behind the MLP", "x + self.dropout(self.mlp(norm(x)))", "x + self.mlp(norm(x))"),
    (V4, "embeddings are not dropped", "        x = self.dropout(x)\n", ""),
    (V4, "the attention branch has no norm", "self.attention(norm(x), rope, cache)", "self.attention(x, rope, cache)"),
    (V4, "embeddings have no norm", "x, rope = norm(self.embedding(idx)), None", "x, rope = self.embedding(idx), None"),
    (V4, "no last norm", "kernels.linear(norm(x), self", "kernels.linear(x, self"),
    (V4, "windows of one size", "size = size or model.block_size", "size = model.block_size"),
    (V4, "an evaluation that does not slide", "size, min(stride or size, size))", "size, size)"),
    (V4, "too many tokens at once", "max(1, MICRO_BATCH_SIZE * model.block_size // size)", "MICRO_BATCH_SIZE"),
    (V4, "test metrics of the validation split", 'evaluate(model, tokens["test"])', 'evaluate(model, tokens["val"])'),
    (V4, "the cache is never emptied", "cache is None or cache.length == size:", "cache is None:"),
    (V4, "a quarter of the window is read anew", "max(1, size // 2)", "max(1, size // 4)"),
    (V4, "a long prompt loses its end", "ids[-size if cache is None",
     "ids[:size] if cache is None else ids[-size if False"),
    (V4, "no temperature", "(logits / TEMPERATURE)", "logits"),
    (V4, "no fine-tuning", 'run.init_from(f"{INIT_FROM}/{POSITION}", INIT_FROM)', "pass", "weights_of"),
    (V4, "fine-tuning does not look for its scheme", 'run.init_from(f"{INIT_FROM}/{POSITION}", INIT_FROM)',
     "run.init_from(INIT_FROM)", "weights_of"),
    (V4, "fine-tuning from a run with a scheme alone is refused", 'run.init_from(f"{INIT_FROM}/{POSITION}", INIT_FROM)',
     'run.init_from(f"{INIT_FROM}/{POSITION}")', "weights_of"),
    (V4, "a number where the text is shorter than the window", "if n < len(tokens) else None for n", "for n"),
    (V4, "a window that is as long as the text counts", "if n < len(tokens) else None",
     "if n <= len(tokens) else None"),
    (V4, "the schemes are compared on the test split", 'extrapolate(model, tokens["val"])',
     'extrapolate(model, tokens["test"])'),
    (V4, "runs of other constants are compared",
     'if summary and harness.same_training(summary, last, but=("POSITION",)):', "if summary:"),
    (V4, "no run has the constants of another", 'but=("POSITION",)', "but=()"),
    (V4, "schemes of other runs are left out", "for position in SCHEMES:\n", 'for position in [last["position"]]:\n'),
    (V4, "windows that were not evaluated are drawn", "for n, bpb in curve.items() if bpb]",
     "for n, bpb in curve.items()]"),
    (V4, "one scheme's curve for all", "(n, bpb) for n, bpb in curve.items() if bpb",
     'n_bpb for n_bpb in curves[last["position"]].items() if n_bpb[1]'),
    (V4, "a scheme's run in another's folder", 'OUT_DIR=f"{OUT_DIR}/{position}"):',
     'OUT_DIR=f"{OUT_DIR}/{positions[0]}"):'),
    (V4, "a scheme is trained twice", 'list(dict.fromkeys(name.strip() for name in POSITION.split(",")))',
     'POSITION.split(",")',
     "moves_the_scheme"),
    (V4, "a prompt takes the first of all schemes", "dict.fromkeys((*positions, *SCHEMES))", "SCHEMES",
     "prompt_finds"),
    (V4, "a prompt takes the schemes of this run alone", "dict.fromkeys((*positions, *SCHEMES))", "positions",
     "prompt_finds"),
    # kernels and look
    ("kernels.py", "attention is not causal", "is_causal=T > 1, scale=scale", "is_causal=False, scale=scale"),
    ("kernels.py", "a new token sees the first alone", "is_causal=T > 1, scale=scale", "is_causal=True, scale=scale"),
    ("kernels.py", "new tokens are queries of the first", "if 1 < T < K:", "if False:"),
    ("kernels.py", "new tokens see their own future", ".tril(K - T)", ".tril(K - T + 1)"),
    ("kernels.py", "new tokens do not see themselves", ".tril(K - T)", ".tril(K - T - 1)"),
    ("kernels.py", "attention in blocks has a scale of its own", "q.size(-1) ** -0.5 if scale is None else scale, []",
     "q.size(-1) ** -0.5, []"),
    ("kernels.py", "scores of blocks are not scaled", "(q[:, :, start:stop] * scale)", "q[:, :, start:stop]"),
    ("kernels.py", "blocks of queries see the future", ".triu(start + 1)", ".triu(start + 2)"),
    ("kernels.py", "blocks of queries see too few keys", "@ k[:, :, :stop].mT", "@ k[:, :, :stop].mT.roll(1, -1)"),
    ("kernels.py", "ALiBi with slopes of 8 bits", "256 * (slope - s), slope - s]", "0 * slope, 0 * slope]"),
    ("kernels.py", "ALiBi with positions of 8 bits", "[position // 256, position % 256]",
     "[torch.zeros_like(position), position]"),
    ("kernels.py", "ALiBi before the scale", "alibi_in_the_dot_product(q * D**-0.5, k, v, self.slopes), scale=1.0)",
     "alibi_in_the_dot_product(q, k, v, self.slopes), scale=D**-0.5)"),
    ("kernels.py", "the fast ALiBi has another sign", "torch.cat([position, -parts], -1)",
     "torch.cat([position, parts], -1)"),
    ("kernels.py", "values are widened with ones", "F.pad(v, (0, 8))", "F.pad(v, (0, 8), value=1.0)"),
    ("kernels.py", "values stay wide", "scale=1.0)[..., :D]", "scale=1.0)"),
    ("kernels.py", "new tokens with ALiBi have no mask",
     "            bias = bias.masked_fill(distance > 0, -math.inf)\n", ""),
    ("kernels.py", "the kept row of ALiBi never grows", " or self.row.size(-1) < K or", " or"),
    ("kernels.py", "new tokens with ALiBi are the first", "torch.arange(K - T, K, device=q.device)[:, None]",
     "torch.arange(T, device=q.device)[:, None]"),
    ("kernels.py", "new tokens with ALiBi see their own future", "distance > 0, -math.inf", "distance > 1, -math.inf"),
    ("kernels.py", "flex attention without compiling", "if self.flex and torch.compiler.is_compiling():",
     "if self.flex:"),
    ("kernels.py", "flex attention is never used", "if self.flex and torch.compiler.is_compiling():", "if False:"),
    ("kernels.py", "flex attention is not scaled", "alibi_by_flex_attention(q * D**-0.5,",
     "alibi_by_flex_attention(q,"),
    ("kernels.py", "flex attention is scaled twice", "seen, scale=1.0)", "seen)"),
    ("kernels.py", "flex attention sees the future", "lambda b, h, i, j: j <= i,", "lambda b, h, i, j: j <= i + 1,"),
    ("kernels.py", "flex attention rewards distance", "score + slopes[h] * (j - i)", "score + slopes[h] * (i - j)"),
    ("kernels.py", "dropout in evaluation", "if not self.training or self.p == 0:", "if self.p == 0:"),
    ("kernels.py", "dropout does not scale", "(keep * (256 / (256 - dropped)))", "keep"),
    ("kernels.py", "neighbours are dropped together", "random.view(torch.uint8)[: x.numel()]",
     "random.view(torch.uint8)[::8].repeat_interleave(8)[: x.numel()]"),
    ("kernels.py", "dropout of another share", "min(255, round(256 * self.p))", "min(255, round(128 * self.p))"),
    ("kernels.py", "GELU with another constant", "0.044715", "0.04"),
    ("kernels.py", "memory is trimmed though it is not kept", "    if _keeps_freed_memory:\n", "    if True:\n"),
    ("kernels.py", "another C library ends the run",
     "    with contextlib.suppress(OSError, TypeError, AttributeError):  # not glibc", "    if True:  # not glibc"),
    (LOOK, "weights of the first head for all", "column.view(B, T, H, D).transpose(1, 2)",
     "column.view(B, T, H, D)[:, :, :1].expand(B, T, H, D).transpose(1, 2)"),
    (LOOK, "weights are not cut to the text", "torch.cat(heads, -1)[..., :T]", "torch.cat(heads, -1)"),
    (LOOK, "weights of queries", "[output[..., : -values.size(1)], values.to(output.dtype).expand(B, -1, -1)]",
     "[values.to(output.dtype).expand(B, -1, -1), output[..., values.size(1) :]]"),
    (LOOK, "weights of the first tokens for all", "[:, start : start + D]", "[:, : min(D, T - start)]"),
    (LOOK, "weights of the first layer for all", "zip(modules, inputs)", "zip(modules, inputs[:1] * len(inputs))"),
    (LOOK, "weights with dropout", "    model.eval()\n", ""),
    (LOOK, "a model goes on with unit vectors",
     "            for hook in hooks:\n                hook.remove()\n", ""),
    # harness
    ("harness/__init__.py", "help is an unknown constant", "cli.answer_help()", "pass", "help"),
    (ARGUMENTS, "unknown constants are accepted", "        if name not in known:\n            near",
     "        if False:\n            near"),
    (ARGUMENTS, "a list ends at its first comma", 'while name in ("POSITION", "EXTRAPOLATION") and', "while False and"),
    (ARGUMENTS, "a flag alone needs a value", '            text = "True"\n', "            pass\n"),
    (ARGUMENTS, "quotes that a shell left stay", "return text[1:-1] if re.fullmatch(", "return text if re.fullmatch("),
    (ARGUMENTS, "a home folder is a name", "os.path.expanduser(text)", "text"),
    (CHECKS, "micro-batches of two shapes", 'batch % micro and "COMPILE" in h:', "False:"),
    (CHECKS, "advice that does not divide", "if batch % n == 0)", "if n < micro)"),
    (CHECKS, "each process has the whole batch", 'h.get("BATCH_SIZE", 1) // processes,',
     'h.get("BATCH_SIZE", 1),'),
    (CHECKS, "a peak that is never reached", "        if peak < 1:\n", "        if peak < 0:\n"),
    (CHECKS, "the peak of another step", "for step in (max(0, crossing), crossing + 1))",
     "for step in (crossing + 1,))"),
    (CHECKS, "sampling that is greedy says nothing", "    if greedy and idle:", "    if False:"),
    (CHECKS, "defaults are noise", 'if "ROPE_BASE" in chosen and', "if"),
    (CHECKS, "compiled code checks ids", "    if torch.compiler.is_compiling():\n        return\n",
     ""),
    (CHECKS, "more tokens than positions", "    if idx.size(1) > positions:", "    if False:"),
    (CHECKS, "negative ids are looked up", "return lowest <= low.item() and", "return"),
    (CHECKS, "a single id is not checked", "0 <= idx.item() < len(table)", "True"),
    (CHECKS, "ids on another device", "    if idx.device != table.device:", "    if False:"),
    (CHECKS, "training waits for a GPU", "elif idx.is_cpu or not model.training and (", "elif True or ("),
    (CHECKS, "generation waits for a GPU", "(torch.is_grad_enabled() or len(idx) > 1)", "True"),
    (CHECKS, "any vocabulary is evaluated", "    if own is not None and own != tokens.fingerprint:", "    if False:"),
    (CHECKS, "a larger vocabulary is evaluated", "    if own is None and table is not None and (",
     "    if False and ("),
    ("harness/errors.py", "advice that processes cannot share", "batch = processes * 2 **", "batch = 2 **",
     "advice"),
    ("harness/errors.py", "advice in a circle", "n_tokens // (batch + 1)", "n_tokens // batch", "advice"),
    (CLI, "v4 says everything for each scheme", "if notes and not _is_of_a_scheme(known) else ():",
     "if notes else ():", "contradictions"),
    (CLI, "a model's limit loses its traceback", "    if isinstance(error, InputError):\n        return None\n", "",
     "mistake"),
    (CLI, "what cannot be lower is named", "if rung.get(name, 1) > 1]", "if name in rung]", "lower"),
    (MODELS, "an error of the device is another model", "    parts = model.state_dict()\n",
     "    try:\n        model.load_state_dict(weights)\n    except RuntimeError:\n        raise UserError(path)\n"
     "    parts = model.state_dict()\n", "device"),
    (MODELS, "a file that cannot be read is damaged", "        if isinstance(error, OSError) and error.errno",
     "        if False and error.errno", "cannot_be_read"),
    (MODELS, "what has no effect is not said", "    if idle := without_effect(", "    if () and (",
     "matter_to_a_prompt"),
    (RUN, "shorter windows keep all positions", 'weights["position_embedding.weight"] = positions[:length]', "pass",
     "fine_tuning"),
    (CLI, "any value is possible", "if type(value) not in kinds or not possible(value):",
     "if type(value) not in kinds:", "refused"),
    (CLI, "any type is possible", "if type(value) not in kinds or not possible(value):", "if not possible(value):",
     "refused"),
    (CLI, "constants of another model stay", "        rung.update(before)\n", "        pass\n", "several or schemes"),
    (CLI, "a broken pipe ends a run", "except (OSError, ValueError):  # ValueError: the stream",
     "except ValueError:  # ValueError: the stream", "output or pipe"),
    (CLI, "what is lost comes back when the program ends", "os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())",
     "pass", "output or pipe or reader"),
    (CLI, "characters that cannot be shown end a run",
     'str(text).encode(encoding, "backslashreplace").decode(encoding)', "str(text)", "another_encoding or stream"),
    (CLI, "a mistake of the program has no traceback", "        if (message := in_one_line(error, rung)) is None:\n",
     "        if (message := in_one_line(error, rung) or first_line(error)) is None:\n", "mistake"),
    (CLI, "every error of a value is one for users", "    if isinstance(error, UserError):\n        return text\n",
     "    if isinstance(error, (ValueError, OSError)):\n        return text\n", "mistake"),
    (CLI, "every lack of a resource is one of memory", '"out of memory|', '"memory|out of memory|', "other_errors"),
    (CLI, "advice for a batch where there is none", '    if rung.get("PROMPT") is not None:\n', "    if False:\n",
     "too_little_memory"),
    (CLI, "exit code 0 after an error", '        sys.exit(f"{name}: {message}")', '        say(f"{name}: {message}")',
     "refused"),
    (CLI, "exit code 0 after a second Ctrl-C", "        sys.exit(130)", "        sys.exit(0)", "second_ctrl_c and v1"),
    (DISTRIBUTED, "runs are not repeatable", "torch.use_deterministic_algorithms(True)",
     "torch.use_deterministic_algorithms(False)", "compiled"),
    (DISTRIBUTED, "deterministic algorithms stay on", "torch.use_deterministic_algorithms(usual[0])", "pass",
     "left_as_it_was"),
    (DISTRIBUTED, "seeds are added up", "np.random.SeedSequence(numbers)", "np.random.SeedSequence(sum(numbers))",
     "streams"),
    (DISTRIBUTED, "bfloat16 is never used", 'enabled=resolve_dtype(device, dtype) == "bfloat16"', "enabled=False",
     "bfloat16"),
    (DISTRIBUTED, "processes keep their gradients",
     "return nn.parallel.DistributedDataParallel(model) if whole else model", "return model",
     "two_processes"),
    (DISTRIBUTED, "a rung of one process trains in two", 'if "SHARD" not in rung:', "if False:", "several_processes"),
    (DISTRIBUTED, "nothing is divided", "        fully_shard(block)\n    fully_shard(model)\n", "        pass\n",
     "divided_model"),
    (DISTRIBUTED, "parts are saved", "    return _full(x).cpu() if", "    return x.to_local().cpu() if", "whole"),
    (DISTRIBUTED, "all matrices are those of the first process", "stack[rank() * n :][:n]", "stack[:n]", "unevenly"),
    (DISTRIBUTED, "each process measures for itself", "    auto_dtypes[device] = faster\n", "", "first_process"),
    (DISTRIBUTED, "constants may differ", "        if differ := [", "        if differ := [] and [", "other_constants"),
    (DISTRIBUTED, "some compile", "return all_reduce(torch.tensor([int(not yes)])).item() == 0", "return yes",
     "one_process_lacks"),
    (DISTRIBUTED, "processes wait for each other for an hour", "        _wait_no_longer_than(TIMEOUT)\n",
     "        pass\n", "first_process"),
    (DISTRIBUTED, "the last batch counts twice", "i < len(batches)", "True", "as_many_passes"),
    (DISTRIBUTED, "processes make as many passes as they have batches",
     "-(-len(batches) // world_size()) * world_size()", "len(batches)", "as_many_passes"),
    ("kernels.py", "no rows of zeros", "(0, 0, 0, -V % 64)", "(0, 0, 0, 0)"),
    ("kernels.py", "a compiler that fails ends the run", "            except Exception:  # a missing compiler",
     "            except ZeroDivisionError:  # a missing compiler"),
    (MODELS, "a loaded model has the constants' shape", "    with override(rung, **shape):", "    if True:",
     "loaded or prompt"),
    (MODELS, "a loaded model trains", "    return model.eval()", "    return model", "loaded"),
    (MODELS, "another vocabulary beside the model", '    if saved["fingerprint"] != tokenizer.fingerprint:',
     "    if False:", "prompt or damaged"),
    (MODELS, "the model of another rung is taken", '    if saved["rung"] != Path(rung["__file__"]).stem:',
     "    if False:", "another_rung"),
    (MODELS, "an empty prompt begins with a line end", ' or saved["start"]', " or [10]", "prompt"),
    (MODELS, "any pickle is opened", 'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
     "damaged"),
    (MODELS, "too little memory is called damage",
     "        if is_out_of_memory(error):\n            raise\n", "", "too_little_memory"),
    (MODELS, "runs of the repository are not found", "dict.fromkeys((Path.cwd(), Path(__file__).resolve().parents[1]))",
     "[Path.cwd()]", "repository"),
    (MODELS, "any module is imported", "    if not is_rung(source):", "    if False:", "nothing_but"),
    (MODELS, "a rung is told by words in a comment", '"harness.start(globals())" in calls',
     '"harness.start(globals())" in source', "nothing_but"),
    (MODELS, "a model does not know its vocabulary", "    model.fingerprint = tokenizer.fingerprint", "    pass",
     "copy_of_a_rung"),
    (CLI, "the hash is that of the text on the disk",
     'return _source_as_loaded(rung["__file__"], rung["main"])[3]',
     'return _source_as_loaded.__wrapped__(rung["__file__"], rung["main"])[3]', "made_of"),
    (IDENTITY, "the commit of a repository around this one", '    if not (folder / ".git").exists():',
     "    if False:"),
    (IDENTITY, "changes of the code are not told", '" with changes" * any(', '" with changes" * 0 * any('),
    (IDENTITY, "a slow git ends the run", "except (OSError, subprocess.SubprocessError)",
     "except OSError"),
    (IDENTITY, "the environment names another repository", 'if not k.startswith("GIT_")', "if True"),
    (IDENTITY, "the hash of one split", 'for split in ("train", "val", "test")]',
     'for split in ("train",)]'),
    (STORE, "what is tried out is a result", "    if not is_tried(overrides):", "    if True:",
     "kept_apart"),
    (STORE, "results of other runs are shown", "    if line is None:", "    if True:", "left_out"),
    (STORE, "what is left out is not named", "        harness.say(line, error=True)", "        pass",
     "left_out"),
    (RESULT_CHECKS, "constants are not compared", "        if before != now:", "        if False:", "left_out"),
    (RESULT_CHECKS, "a constant that is new makes results wrong",
     'before = then.get(name, defaults.get(name, "not set"))', 'before = then.get(name, "not set")', "good_order"),
    (RESULT_CHECKS, "a seed is the name of a file", '    if summary["seed"] != seed:', "    if False:",
     "left_out"),
    (RESULT_CHECKS, "edits are not compared", "    if OTHER_WORDS.get(then, then) != now:", "    if False:",
     "left_out or changed"),
    (RESULT_CHECKS, "a run that was broken off is a result",
     '    if result["log"][-1]["step"] != summary["steps"] or (',
     "    if False and (", "left_out"),
    (RESULT_CHECKS, "as much text is not compared", "        if max_steps > 2 and abs(",
     "        if False and abs(", "plan_that_has_changed"),
    (RESULT_CHECKS, "code is not compared", "        if not reason:", "        if False:", "different_code"),
    (RESULT_CHECKS, "texts are not compared", "groups(found, texts_of).items()", "{}.items()", "different_code"),
    ("results/runner.py", "what was begun otherwise goes on", "    if differ and run.exists():", "    if False:",
     "begun or kept_apart"),
    ("results/runner.py", "another text of the rung goes on", '"rung_sha256": "the text of the rung was another"}', "}",
     "begun"),
    ("results/runner.py", "a run at work is moved aside", "        if output.exists():\n", "        if False:\n",
     "begun"),
    ("results/experiments.py", "a constant that no run has is passed over", "        if not having:",
     "        if False:", "passed_over"),
    ("results/experiments.py", "hours are trained for a table that cannot be made",
     "        check_code(names, todo, args.gpu, overrides)\n", "", "different_code"),
    ("results/pages.py", "a run with other constants is collected", "    if differ:", "    if False:", "collected"),
    ("results/texts.py", "tokens are compared by name", "and hashes and text", "and False and text", "different_texts"),
    ("convert_hf.py", "a name of the hub is a folder", "    if hub and (hub[1]", "    if False and (hub[1]", "hub"),
    ("convert_hf.py", "what the system forbids has a traceback",
     '    except OSError as error:\n        raise FileError(f"{path} cannot',
     '    except ZeroDivisionError as error:\n        raise FileError(f"{path} cannot', "forbids"),
    (REPORT, "the best record is the last", 'best = min(run.records, key=lambda record: record["val_loss"])',
     "best = run.records[-1]", "what_a_run and v2"),
    (REPORT, "bytes of another text", 'round(last["tokens_seen"] * train.n_bytes / len(train))',
     'round(last["tokens_seen"] * train.n_words / len(train))', "short_run and v0"),
    (REPORT, "epochs are steps", '"epochs": last["tokens_seen"] / len(train)', '"epochs": last["step"]',
     "short_run and v0"),
    (REPORT, "the last two lines vanish", ' if metrics else ():', " if not metrics else ():", "last_lines and v3"),
    (REPORT, "windows that overlap have the metrics of the others", "summary[key + end]", "summary[key]",
     "last_lines and v3"),
    (REPORT, "rows of steps that are made again", 'if int(row.split(",")[0]) <= step and', "if", "rows"),
    (REPORT, "a row has the rate of another step", "{step.rate:.6g}", "{step.rate * 2:.6g}", "row"),
    (REPORT, "rows that were cut stay", ' and row.count(",") == head.count(",")]', "]", "rows"),
    (REPORT, "rows without a column that is new are left out", 'row.count(",") == head.count(",")]',
     'row.count(",") == STEP_COLUMNS.count(",")]', "rows"),
    (REPORT, "a new column of an old run has no cell", "[row + empty for row in rows", "[row for row in rows",
     "rows"),
    (REPORT, "the utilization is that of one device", " * run.peak_flops * world_size())", " * run.peak_flops)",
     "devices"),
    (REPORT, "the utilization of another number of tokens", "run.token_flops * run.step_tokens", "run.token_flops",
     "utilization"),
    (FLOPS, "a forward pass alone", "return 3 * forward_flops", "return forward_flops", "flops_of"),
    (FLOPS, "per window and not per token", "/ window[0].numel()", "", "flops_of"),
    (FLOPS, "ALiBi's wider heads count", "kernels.ALiBiAttention.__call__ = lambda", "unused = lambda",
     "flops_of and alibi"),
    (FLOPS, "ALiBi stays replaced", "        kernels.ALiBiAttention.__call__ = usual", "        pass", "flops_of"),
    (FLOPS, "tensors that are no buffers keep their values", "for value in vars(module).values() if torch.is_tensor",
     "for value in () if torch.is_tensor", "edited"),
    (FLOPS, "the model itself is counted and keeps what it makes",
     'copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})',
     'model.to("meta")', "edited"),
    (FLOPS, "tensors made without a device have values", '        torch.device("meta"),\n', "", "edited"),
    (FLOPS, "a model that cannot be counted ends the run", "    except Exception:  # whatever",
     "    except KeyError:  #", "counted"),
    (FLOPS, "a slower chip of a similar name", 'PEAKS.get(" ".join(words), ())', "PEAKS.get(words[0], ())", "gpus"),
    (FLOPS, "float32 has the peak of bfloat16", 'COLUMNS = ("bfloat16", "float32")',
     'COLUMNS = ("float32", "bfloat16")', "gpus"),
    (FLOPS, "the worst of a CPU's products", "best = max(best, 2 * n**3 / min(times))",
     "best = min(best or 1e99, 2 * n**3 / max(times))", "best_of"),
    (FLOPS, "a CPU is measured with products that take too long", "if n > 1024 and 2 * n**3 > best * SECONDS:",
     "if False:", "best_of"),
    (FLOPS, "a CPU is measured in each run", "@functools.cache\n", "", "best_of"),
    (TRAINING, "the slowest micro-batch is kept", "contestants[name][0] < rate:", "contestants[name][0] > rate:",
     "fastest"),
    (TRAINING, "a slower contestant stays in the memory", "            if slower:\n", "            if False:\n",
     "fastest"),
    (TRAINING, "sizes are tried however late it is", "if contestants and time.perf_counter() - began > TRIAL_SECONDS:",
     "if False:", "fastest"),
    (TRAINING, "a peer without the padding", '"vocabulary": -(-shape["vocabulary"] // 64) * 64}',
     '"vocabulary": shape["vocabulary"]}', "path"),
    (TRAINING, "transformers' GPT-2 has no flash kernel", 'functools.partial(hugging_face, attention="causal")',
     "hugging_face", "transformers"),
    (TRAINING, "a peer drops its gradients before the step",
     "        optimizer.step()\n        optimizer.zero_grad()\n",
     "        optimizer.zero_grad()\n        optimizer.step()\n", "transformers"),
    (TRAINING, "both schemes of v4 are ALiBi", '(("v4, RoPE", "rope"),', '(("v4, RoPE", "alibi"),', "themselves"),
    (TRAINING, "half of attention counts on a GPU", "def flops_per_token(shape, attention=1.0):",
     "def flops_per_token(shape, attention=0.5):", "formula"),
    (TRAINING, "contestants print among the tables", "with contextlib.redirect_stdout(sys.stderr):  # the tables",
     "if True:  # the tables", "path"),
    (STEPS, "a program waits for the step that it has asked for",
     "before, self.before = self.before, torch.cuda.Event()", "before = self.before = torch.cuda.Event()",
     "step_before"),
    (REPORT, "another machine is not named", '    if before["made_by"] != made_by:', "    if False:",
     "threads or compiled_any_more"),
    (REPORT, "a schedule that changes is not named",
     'if before["hyperparameters"]["MAX_STEPS"] != max_steps and before["rates"][0] != rate:', "if False:",
     "more_steps"),
    (REPORT, "a picture that cannot be drawn ends the run", "except Exception as error:  # matplotlib",
     "except ZeroDivisionError as error:  # matplotlib", "pictures"),
    (REPORT, "the training length is not marked", "        if mark is not None:", "        if False:", "picture"),
    (REPORT, "without a terminal there is no progress", "if self.print_lines and now", "if False and now", "terminal"),
    (REPORT, "the time that a run takes counts from its beginning", "done, left = self.step - self.first,",
     "done, left = self.step,", "terminal or early"),
    (RESUME, "an earlier run is overwritten", "        path.rename(aside / path.name)", "        pass", "aside"),
    (RESUME, "files of the user's own move with a run",
     "[folder / name for name in RUN_FILES if (folder / name).exists()]", 'sorted(folder.glob("*.*"))', "aside"),
    (RESUME, "folders of the user's own are counted",
     "if any((path / name).exists() for name in RUN_FILES))]", ")]", "users_own"),
    (RESUME, "numbers of earlier runs are used again", "max(numbered, default=0) + 1", "len(numbered) + 1",
     "users_own"),
    (RESUME, "runs of other names are counted", " and path.stem == folder.name}", "}", "aside or users_own"),
    (RESUME, "a checkpoint that has not taken its place is ignored",
     'path = new if new.exists() else run.out_dir / "checkpoint.pt"', 'path = run.out_dir / "checkpoint.pt"',
     "while_a_checkpoint"),
    (RESUME, "the checkpoint before a damaged one is not tried", "        if not before.exists():", "        if True:",
     "gives_way"),
    (RESUME, "resuming forgets the optimizer", "        optimizer.load_state_dict(state)\n", "", RESUMED),
    (RESUME, "resuming forgets the weights", '    set_weights(run.model, saved["model"], path)\n', "", RESUMED),
    (RESUME, "resuming forgets the step", 'SimpleNamespace(step=saved["step"]', "SimpleNamespace(step=0", RESUMED),
    (RESUME, "resuming forgets the best loss", 'best=saved["best"]', 'best=float("inf")', "knows_its_best"),
    (RESUME, "resuming forgets the patience", 'bad_evals=saved["bad_evals"]', "bad_evals=0", "knows_its_best"),
    (RESUME, "resuming forgets the losses", 'saved["losses"].tolist()', "[]", "signal"),
    (RESUME, "resuming forgets the seconds", '= saved["log"], saved["seconds"],', '= saved["log"], 0.0,', "signal"),
    (RESUME, "the rates of the checkpoint win", "            group.update(values)  #", "            pass  #", "rates"),
    (RESUME, "another tokenizer is accepted", '("tokenizer", saved["fingerprint"], train.fingerprint)',
     '("tokenizer", train.fingerprint, train.fingerprint)', "another or resumed"),
    (RESUME, "another text is accepted", '("text", saved["dataset"], train.dataset)',
     '("text", train.dataset, train.dataset)', "another or resumed"),
    (RESUME, "other constants are accepted", '    if differ:\n        raise UserError(f"to resume',
     '    if False:\n        raise UserError(f"to resume', "another or resumed"),
    (RESUME, "constants that changed are not named", "    if changed:\n", "    if False:\n", "may_change"),
    (RESUME, "a run has more steps than it may", 'if saved["step"] > now["MAX_STEPS"]:', "if False:",
     "more_steps or may_change"),
    (RESUME, "the type is chosen anew", 'distributed.auto_dtypes[run.device] = saved["dtype"]', "pass", "auto_chose"),
    (RUN, "the last weights instead of the best",
     '        set_weights(model, read_file(self.out_dir / "model.pt", ("model",))["model"]', "        (lambda *_: 0)(0",
     "what_a_run and v2"),
    (RUN, "the mean loss is that of the last step", "torch.tensor(self.losses).mean().item() if self.losses",
     "self.losses[-1] if self.losses", "evaluations_come"),
    (RUN, "the last step before an evaluation is forgotten", "        if due:\n            self.read_waiting()\n", "",
     "later"),
    (RUN, "a divided model is saved in part", "distributed.whole([self.model.state_dict(), [o.state_dict() for o in "
     "self.optimizers]])", "[self.model.state_dict(), [o.state_dict() for o in self.optimizers]]", "divided_models"),
    (RESUME, "the state of an optimizer is not divided", "distributed.like_param(x, params[i])", "x", "divided_models"),
    (RUN, "losses since the beginning", "        self.losses = []\n", "", "evaluations_come"),
    (RUN, "the log is not written", '        self.write("log.jsonl", ', "        str((", "short_run and v0"),
    (RUN, "no checkpoint at an evaluation", "        self.checkpoint()\n        kernels",
     "        kernels", "what_a_run and v0"),
    (RUN, "tokens are steps", '"tokens_seen": step * self.step_tokens', '"tokens_seen": step', "evaluations_come"),
    (RUN, "the last step is not evaluated",
     'due = step % self.eval_interval == 0 or step == self.constants["MAX_STEPS"]',
     "due = step % self.eval_interval == 0", "evaluations_come"),
    (RUN, "less than one evaluation an epoch", 'min(h["EVAL_INTERVAL"], len(train) // self.step_tokens)',
     'h["EVAL_INTERVAL"]', "evaluations_come"),
    (RUN, "a resumed run evaluates twice", 'return due and not (self.records and self.records[-1]["step"] == step)',
     "return due", RESUMED),
    (RUN, "weights of another head count", '        if differ:\n            raise UserError(f"INIT_FROM',
     '        if False:\n            raise UserError(f"INIT_FROM', "weights"),
    (RUN, "weights of another vocabulary", "        if tokenizer.fingerprint != self.tokens",
     "        if False and tokenizer.fingerprint != self.tokens", "weights"),
    (RUN, "weights of another rung", '        if saved["rung"] != self.name:', "        if False:", "weights"),
    (RUN, "a resumed run starts from other weights again", "INIT_FROM has no effect\")\n            return\n",
     "INIT_FROM has no effect\")\n", "weights"),
    (RUN, "a loss that is not finite is no error", "        if not loss < DIVERGED:", "        if False:", "finite"),
    (RUN, "a validation loss that is not finite is no error", '        if not metrics["loss"] < DIVERGED:',
     "        if False:", "finite"),
    (RUN, "Ctrl-C saves nothing", "else it has just been saved\n                self.checkpoint()",
     "else it has just been saved\n                pass", "signal"),
    (RUN, "a second SIGTERM ends the run at once", "if self.signals and number == signal.SIGINT:", "if self.signals:",
     "second_sigterm"),
    (RUN, "a signal in an evaluation waits for a step", "            self._stop_if(len(self.signals))\n",
     "            pass\n", "signal_in_an_evaluation"),
    (RUN, "exit code 0 after Ctrl-C", "            sys.exit(128 + (self.signals or [signal.SIGTERM])[0])",
     "            sys.exit(0)", "signal"),
    (RUN, "no earlier checkpoint is kept", 'newest.replace(self.out_dir / "checkpoint_before.pt")', "pass", RESUMED),
    (RUN, "a damaged checkpoint displaces the good one", "if newest.exists() and newest != self.damaged:",
     "if newest.exists():", "gives_way"),
    (RUN, "two runs in one folder", 'self.stack.enter_context(file_lock(self.out_dir / "lock"))', "pass", "second_run"),
    (RUN, "the compile step trains", "                model.zero_grad()\n", "", "compiled"),
    (RUN, "handlers of signals stay", "                signal.signal(number, handler)\n", "                pass\n",
     "left_as_it_was"),
    # data
    ("data/prepare.py", "the help of --dataset names another default", "which WikiText (default: {DATASETS[0]})",
     "which WikiText (default: {DATASETS[1]})"),
    ("data/prepare.py", "a second process does not wait", "            except Locked as error:\n",
     "            except Locked as error:\n                locked = False\n                break\n"),
    ("data/prepare.py", "half-written files of a killed process stay", "left.unlink(missing_ok=True)", "pass"),
    ("data/prepare.py", "those of a process at work go too", "if locked:  # whoever", "if True:  # whoever"),
    ("data/prepare.py", "what was made while waiting is made again", "if only_missing:  #", "if False:  #"),
    ("data/prepare.py", "a file may change while it is read", "            if then != now:", "            if False:"),
    ("data/prepare.py", "a word in two pieces counts twice", ' + text.count("\\n") - goes_on', ' + text.count("\\n")'),
    ("data/prepare.py", "the digest is of nothing", "        digest.update(content)\n", ""),
    ("data/prepare.py", "a second --from replaces the first", 'nargs="+", action="extend"', 'nargs="+"'),
    ("data/__init__.py", "ids are not compared with their digest", 'if digest != content["digest"]:', "if False:"),
    ("data/texts.py", "names of splits within words count", "(?<![^\\W_])", ""),
    ("data/texts.py", "one name of a split is enough", ' and len(splits) > 1}', "}"),
    ("data/texts.py", "programs are splits", "            if ending(name) in CODE:\n", "            if False:\n"),
    ("data/texts.py", "held-out text becomes training text", "if len(set(named.values())) > 1 or beside:",
     "if len(set(named.values())) > 1:"),
    ("data/texts.py", "an option that applies to nothing passes", "is not None and not some & kinds:", "is False:"),
    ("data/texts.py", "a file that is given twice is read twice", "if key in seen:", "if False:"),
    ("data/texts.py", "text that splits share is not told", "        if share > 0.01:", "        if False:"),
    ("data/texts.py", "a long text is held whole", "            yield from self._pieces(start, end)\n",
     "            yield self.read(start, end).decode()\n"),
    ("data/texts.py", "what prepare.py made is text", "if made and OUR_FILES.fullmatch(name):", "if False:"),
    ("data/texts.py", "a cut is a character late", "low = max(start, target - slack - 4)",
     "low = max(start, target - slack)"),
    ("data/formats.py", "binary files are text", "    return control > 0.05 * len(text) or", "    return"),
    ("data/formats.py", "byte order marks are ignored", 'return next(marks, options.encoding or "utf-8")',
     'return options.encoding or "utf-8"'),
    ("data/formats.py", "a file may lie about its packing", "    if said and not packing and head:", "    if False:"),
    ("data/formats.py", "hidden files of archives are read", "        elif not is_hidden(place):", "        else:"),
    ("data/formats.py", "separators do not know line ends of Windows", '.replace("\\\\\\n", "\\r?\\n")', ""),
    ("data/formats.py", "a separator in two pieces is missed", ' + separator.count("\\n") - 1', " - len(separator)"),
    ("data/formats.py", "a string of JSON ends with its piece",
     'and not error.msg.startswith("Unterminated string")', ""),
    ("data/formats.py", "a row with too many columns loses some", "if len(row) != len(names):", "if False:"),
    ("data/formats.py", "a parquet column of numbers is text", "_check_row(row, file.name, column)", "pass"),
    ("data/formats.py", "a damaged parquet file raises what pyarrow raises",
     "except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error", "except ZeroDivisionError as error"),
    ("harness/files.py", "a file is not on the disk when it takes its place", "os.fsync(file.fileno())", "pass"),
    ("harness/files.py", "the name of a file is not on the disk", "                    os.fsync(descriptor)\n",
     "                    pass\n"),
    ("harness/files.py", "a half-written file stays", "                    aside.unlink(missing_ok=True)",
     "                    pass"),
    ("harness/files.py", "files are written in place", 'path.with_name(f"writing-{path.name}")', "path"),
    ("harness/files.py", "torch hides the reason of the system", "error = error.__context__", "break"),
    ("harness/files.py", "a signal stops between two places",
     "        with uninterrupted():\n            for aside, path", "        if True:\n            for aside, path"),
    ("harness/files.py", "two processes hold a lock", "        if held is False:", "        if False:"),
    ("harness/files.py", "a lock names nobody", "os.write(descriptor, f", "len(f"),
    ("harness/files.py", "whoever asks for a lock cuts its file", "os.O_RDWR | os.O_CREAT |",
     "os.O_RDWR | os.O_CREAT | os.O_TRUNC |"),
    ("harness/files.py", "a file system without locks ends the program", "            held = None\n",
     "            raise\n"),
]  # fmt: skip


def all_tests(file):
    others = {"data/": DATA_TESTS, "results/": RESULTS_TESTS, "convert_hf.py": ("test_convert.py",)}
    names = next((names for start, names in others.items() if file.startswith(start)), TESTS)
    return [f"tests/{name}" for name in names]


def first_tests(file, chosen):
    """Arguments of pytest for the tests that should notice a fault in `file`."""
    if file.startswith("data/"):
        return all_tests(file)
    if file in OWN_TESTS:
        return [f"tests/{OWN_TESTS[file]}", *(["-k", chosen] if chosen else [])]
    if chosen:
        return [*all_tests(file), "-k", chosen]
    rung, others = Path(file).stem, "not (v0 or v1 or v2 or v3 or gpt2)"
    words = {"v0": "v0 or optimum", "v1": "v1 and not v1_1", "v1_1": "v1_1 or chunk", "v2": "v2",
             "v3": "v3 and not v3_1 or gelu or gpt2", "v3_1": "v3_1 or modern or muon or orthogonalize or once",
             "look": "weights"}  # fmt: skip
    order = reversed(TESTS) if file.startswith("harness/") else TESTS[:2]
    return [f"tests/{name}" for name in order] + ["-k", f"({words.get(rung, others)}) and not ({SLOW})"]


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run_tests(tree, arguments):
    """What is wrong, as the first failed test says, or None."""
    arguments = [a for a in arguments if not a.startswith("tests/") or (tree / a).exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *arguments]
    try:
        done = subprocess.run(command, cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                              text=True, timeout=TIMEOUT, preexec_fn=limit)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "out of time"
    if done.returncode in (0, 5):  # 5: no test was chosen
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].split("::")[-1] if failed else f"exit code {done.returncode}"


def copy_tree(folder):
    """What the tests need, without what was made by earlier runs."""
    ignore = shutil.ignore_patterns(".*", "runs", "*.pt", "*.png", "__pycache__", "notebooks")
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def plant(tree, fault):
    """(whether it was noticed, by what) of a fault in a copy of the tree; raises ValueError if it cannot be planted."""
    file, _, text, wrong, *more = fault
    path = tree / file
    right = path.read_text(encoding="utf-8")
    if right.count(text) != 1 or text == wrong:
        raise ValueError(f"its text occurs {right.count(text)} times")
    path.write_text(right.replace(text, wrong), encoding="utf-8")
    try:
        found = run_tests(tree, first_tests(file, more[0] if more else ""))
        return found or run_tests(tree, all_tests(file))
    finally:
        path.write_text(right, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files, as v3 or harness, or words of what is broken")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS if not arguments.names or any(
        name in (Path(f[0]).stem, *Path(f[0]).parts[:-1]) or name in f[1] for name in arguments.names)]  # fmt: skip
    if arguments.list:
        print("\n".join(f"{file:24} {what}" for file, what, *_ in chosen))
        return
    trees, noticed, missed, equivalent, errors = Queue(), 0, [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for job in range(arguments.jobs):
            trees.put(copy_tree(Path(folder) / str(job)))
        tests = sorted({test for file, *_ in chosen for test in all_tests(file)})
        if failed := run_tests(Path(folder) / "0", tests):
            sys.exit(f"without any fault this fails already: {failed}")

        def one(fault):
            tree, start = trees.get(), time.perf_counter()
            try:
                return fault, plant(tree, fault), time.perf_counter() - start
            except ValueError as error:
                return fault, error, 0.0
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for (file, what, _, _, *more), found, seconds in pool.map(one, chosen):
                name = f"{file}: {what}"
                if isinstance(found, ValueError):
                    errors.append(f"{name} ({found})")
                elif found:
                    noticed += 1
                elif len(more) > 1:
                    equivalent.append(f"{name} ({more[1]})")
                else:
                    missed.append(name)
                print(f"{name:64} {seconds:5.0f} s  {found or 'NOT NOTICED'}", flush=True)
    print(f"\n{noticed} of {noticed + len(missed)} faults are noticed")
    for title, lines in (("not noticed", missed), ("equivalent", equivalent), ("could not be planted", errors)):
        for line in lines:
            print(f"{title}: {line}")
    sys.exit(1 if missed or errors else 0)


if __name__ == "__main__":
    main()
