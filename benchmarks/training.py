"""How fast v3 trains compared with other implementations of the same model, and v4's ALiBi compared with its RoPE.

    python benchmarks/training.py           all of it, about 30 minutes; the results go to results/benchmarks/
    python benchmarks/training.py --quick   a first look at the small shape in about a minute; writes nothing
    python benchmarks/training.py --gpu --nanogpt DIR    v3 and v4 at GPT-2's size on a GPU, about 6 minutes
    python benchmarks/training.py --gpu --quick          the same with one size of micro-batch: about 3 minutes

The peers are GPT-2 of Hugging Face's transformers, torch.nn.TransformerEncoder, and a GPT as in small repositories: qkv
in one product, fused attention, the output layer tied to the embedding. Each is trained plainly, with torch.optim.AdamW
in float32 without compilation, and at its best: compiled, in v3's number type, with fused AdamW and, like v3, without
returning freed memory. v3 is compared with the better of both. All take the same batch of random tokens, clip gradients
and step.

Every contestant has its own process. In each round, each works for some seconds while the others wait, so anything that
slows the machine for a while affects all of them. The median of the rounds counts.

On a GPU the peers are nanoGPT's model (DIR is a checkout of https://github.com/karpathy/nanoGPT) and GPT-2 of
transformers, compiled, in bfloat16, with fused AdamW and the vocabulary padded to a multiple of 64. All make steps with
the same number of windows, each in micro-batches of the size that was fastest for it in a trial. The goal is an MFU of
45% on an H100 or H200.

FLOPs are counted as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B):

    FLOPs per token = 6 * (parameters in matrix products) + 12 * N_LAYER * BLOCK_SIZE * N_EMBD

Parameters in matrix products are those of the blocks and the output layer, not the embeddings of tokens and positions,
which are looked up. On a GPU the rate is divided by the maker's figure for the peak, which gives the model FLOPs
utilization (MFU). On a CPU, attention counts half, as much as a causal model needs, and the peak is the fastest of some
products of square matrices, which take turns in the same rounds.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402
import kernels  # noqa: E402
from benchmarks.steps import StepBehind, random_tokens, run_steps  # noqa: E402
from benchmarks.tables import RESULTS, keep, machine, table  # noqa: E402
from harness import flops  # noqa: E402

GPT2 = "GPT-2's size"
SHAPES = {  # constants of v3, and the vocabulary
    "small": {"N_LAYER": 4, "N_HEAD": 4, "N_EMBD": 192, "BLOCK_SIZE": 128, "BATCH_SIZE": 16, "vocabulary": 4096},
    "large": {"N_LAYER": 6, "N_HEAD": 4, "N_EMBD": 256, "BLOCK_SIZE": 256, "BATCH_SIZE": 16, "vocabulary": 4096},
    GPT2: {"N_LAYER": 12, "N_HEAD": 12, "N_EMBD": 768, "BLOCK_SIZE": 1024, "BATCH_SIZE": 64, "vocabulary": 50257},
}
MICRO_BATCHES, TRIAL_SECONDS = (32, 16, 64), 150  # sizes to try on a GPU; no new one after this many seconds
MEMORY = 1.3e6  # bytes per token of a micro-batch that suffice at GPT-2's size
WINDOWS, TOKENS = (128, 256, 512, 1024), 4096  # ALiBi against RoPE: values of BLOCK_SIZE, tokens a step
SQUARES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # sizes of the products that show the peak
ROUNDS, SECONDS = 5, 1.2  # of work in a turn
QUICK_ROUNDS, QUICK_SECONDS = 4, 0.5
WARM_UP = 2  # first rounds, which do not count: a new process is slower until it uses all its memory
HF, ENCODER, PLAIN, NANO = "GPT-2 of transformers", "nn.TransformerEncoder", "a plain GPT", "nanoGPT"
DROPPED = ", dropout 0.1"
BEST = ", compiled"  # and everything else that makes a peer fast
QUICK_LEAVES_OUT = ("COMPILE=False", "everywhere", DROPPED + BEST, "product 1024", "product 4096")


def random_batch(shape, device):
    """Inputs (B, T), and targets (B, T), which are the inputs shifted by one token."""
    torch.manual_seed(1337)
    windows = torch.randint(shape["vocabulary"], (shape["BATCH_SIZE"], shape["BLOCK_SIZE"] + 1)).to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def rung_steps(turns, rung, shape):
    """Steps of a rung, made by its own `train`."""
    rung = importlib.import_module(rung)
    harness.set_constants(vars(rung), [f"{name}={value}" for name, value in shape.items() if name.isupper()])
    torch.manual_seed(rung.SEED)
    model = rung.LanguageModel(shape["vocabulary"]).to(rung.DEVICE)
    tokens = random_tokens(rung, shape["vocabulary"])

    def on_step(run):
        turns.facts["compiled"] = run.compiled
        return turns.done(rung.BATCH_SIZE * rung.BLOCK_SIZE)

    run_steps(rung, model, tokens, on_step)


def hugging_face(shape, dropout, everywhere, attention="sdpa"):
    """GPT-2 of transformers. By default it has dropout `everywhere`, also on attention weights. When compiled, "sdpa"
    uses a mask, for which there is no flash kernel; "causal" is the same function without a mask."""
    from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

    AttentionInterface.register("causal", AttentionInterface()["sdpa"])
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=shape["vocabulary"], n_positions=shape["BLOCK_SIZE"], n_embd=shape["N_EMBD"],
        n_layer=shape["N_LAYER"], n_head=shape["N_HEAD"], embd_pdrop=dropout, resid_pdrop=dropout,
        attn_pdrop=dropout * everywhere, use_cache=False, attn_implementation=attention, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder as a language model. `everywhere`: with dropout inside attention and MLP, too."""

    def __init__(self, shape, dropout, everywhere):
        super().__init__()
        C, T = shape["N_EMBD"], shape["BLOCK_SIZE"]
        self.embedding, self.position = nn.Embedding(shape["vocabulary"], C), nn.Embedding(T, C)
        self.dropout = nn.Dropout(dropout)
        how = {"activation": "gelu", "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(C, shape["N_HEAD"], 4 * C, dropout, **how)
        if not everywhere:
            block.self_attn.dropout = block.dropout.p = 0.0
        self.blocks = nn.TransformerEncoder(block, shape["N_LAYER"], nn.LayerNorm(C), enable_nested_tensor=False)
        self.head = nn.Linear(C, shape["vocabulary"], bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, idx):
        x = self.dropout(self.embedding(idx) + self.position.weight)
        return self.head(self.blocks(x, self.mask, is_causal=True))


class GPT(nn.Module):
    """A GPT-2 in few lines: LayerNorm first, qkv in one product, fused attention, GELU, the output layer tied to the
    embedding. `everywhere`: with dropout of attention weights."""

    def __init__(self, shape, dropout, everywhere):
        super().__init__()
        C, self.n_head, self.attention_dropout = shape["N_EMBD"], shape["N_HEAD"], dropout * everywhere
        self.embedding, self.position = nn.Embedding(shape["vocabulary"], C), nn.Embedding(shape["BLOCK_SIZE"], C)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm_1": nn.LayerNorm(C), "qkv": nn.Linear(C, 3 * C), "proj": nn.Linear(C, C), "norm_2": nn.LayerNorm(C),
            "mlp": nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(dropout)),
        }) for _ in range(shape["N_LAYER"]))  # fmt: skip
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, shape["vocabulary"], bias=False)
        self.head.weight = self.embedding.weight

    def attend(self, x, block):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in block["qkv"](x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.attention_dropout * self.training)
        return self.dropout(block["proj"](y.transpose(1, 2).reshape(B, T, C)))

    def forward(self, idx):
        x = self.dropout(self.embedding(idx) + self.position(torch.arange(idx.size(1), device=idx.device)))
        for block in self.blocks:
            x = x + self.attend(block["norm_1"](x), block)
            x = x + block["mlp"](block["norm_2"](x))
        return self.head(self.norm(x))


def nano_gpt(folder, shape, dropout, everywhere):
    """nanoGPT's model, from the checkout in `folder`, without biases, as in its train.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(
        block_size=shape["BLOCK_SIZE"], vocab_size=shape["vocabulary"], n_layer=shape["N_LAYER"],
        n_head=shape["N_HEAD"], n_embd=shape["N_EMBD"], dropout=dropout, bias=False,
    ))  # fmt: skip


def peer_steps(turns, make, shape, dropout=0.0, everywhere=False, device="cpu", best=None, compiled=True):
    """Steps of the model from `make()`: eager in float32, or at its best: compiled, with numbers of type `best`."""
    if best:
        kernels.keep_freed_memory()
    x, y = random_batch(shape, device)
    micro_batches = list(zip(*(t.split(shape.get("MICRO_BATCH_SIZE", len(t))) for t in (x, y))))
    model = make(shape, dropout, everywhere).to(device).train()
    if best and hasattr(model, "configure_optimizers"):  # nanoGPT's own, with the constants of its train.py
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True if best else None)
    with_loss = "targets" in inspect.signature(model.forward).parameters  # returns (logits, loss)

    def loss_of(x, y):
        if with_loss:
            return model(x, y)[1]
        out = model(x)
        return F.cross_entropy(getattr(out, "logits", out).flatten(0, 1), y.flatten())

    if best and compiled:
        loss_of = torch.compile(loss_of)
    turns.facts["compiled"], step_behind = bool(best and compiled), StepBehind(device)

    while turns.done(x.numel()):
        for micro_x, micro_y in micro_batches:
            with torch.autocast(device, torch.bfloat16, enabled=best == "bfloat16"):
                loss = loss_of(micro_x, micro_y) * (len(micro_x) / len(x))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_behind.wait()


def product_steps(turns, n, dtype, device):
    """A product of square matrices, which shows the peak of the machine; counted in FLOPs."""
    a, b, c = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(3))
    while turns.done(2 * n**3):
        torch.mm(a, b, out=c)


class Turns:
    """A contestant calls this after each step. It reports whether the first steps fit in memory. Then it waits for
    messages with the seconds of a turn, and answers each with tokens (or FLOPs) per second."""

    def __init__(self, connection):
        self.connection, self.seconds, self.n = connection, None, 0
        self.facts = {}  # sent with the first answer

    def done(self, amount):
        """Count a step of `amount` tokens, and wait between two turns. Returns True."""
        self.n += 1
        if self.seconds is None:  # the first steps, which also compile and fill caches
            if self.n == 1 and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if self.n == 3:
                self.synchronize()
                memory = harness.peak_memory_mb("cuda" if torch.cuda.is_available() else "cpu")
                self.wait_for_turn({"memory_mb": memory, **self.facts})
        elif self.n == 0:  # not timed: another contestant has used the caches or the GPU's memory
            self.synchronize()
            self.start = time.perf_counter()
        elif time.perf_counter() - self.start >= self.seconds:
            self.synchronize()
            self.wait_for_turn(self.n * amount / (time.perf_counter() - self.start))
        return True

    def wait_for_turn(self, answer):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.connection.send(answer)
        self.seconds, self.n = self.connection.recv(), -1

    def synchronize(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def serve(connection, work, arguments):
    """The process of a contestant: work in turns until no more are requested."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # only the tables go to stdout
            work(Turns(connection), *arguments)
    except torch.OutOfMemoryError:
        connection.send(False)
    except (EOFError, ConnectionError):  # no more turns
        pass


def processes():
    """The context that starts contestants' processes, each from scratch."""
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it would warn of what a stopped process left behind
    return multiprocessing.get_context("spawn")


def start(work, *arguments):
    """Start a contestant in its own process. Returns the connection over which its first answer will arrive."""
    context = processes()
    connection, theirs = context.Pipe()
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the process: Ctrl-C must reach only this one
    context.Process(target=serve, args=(theirs, work, arguments), daemon=True).start()
    signal.signal(signal.SIGINT, usual)
    theirs.close()
    return connection


def say(text):
    print(text, file=sys.stderr, flush=True)


def prepare(makers, at_once):
    """Start contestants, {name: function and arguments}, several at once. Returns {name: (connection, facts)}. One that
    fails or does not fit in memory is left out, and a line says so."""
    ready, names = {}, list(makers)
    for i in range(0, len(names), at_once):
        say(f"preparing {', '.join(names[i : i + at_once])}")
        started = {name: start(*makers[name]) for name in names[i : i + at_once]}
        for name, connection in started.items():
            try:
                facts = connection.recv()
            except (EOFError, ConnectionError):
                say(f"{name} is left out: it failed; its error is above")
                continue
            if facts:
                ready[name] = connection, facts
            else:
                say(f"{name} is left out: it does not fit into memory")
    return ready


def turn(connection, seconds):
    """The rate of a contestant in a turn."""
    connection.send(seconds)
    return connection.recv()


def take_turns(title, contestants, rounds, seconds):
    """Let contestants, {name: connection}, take turns: {name: its rates}."""
    rates = {name: [] for name in contestants}
    for i in range(WARM_UP + rounds):
        say(f"{title}: round {i + 1} of {WARM_UP + rounds}")
        for name, connection in contestants.items():
            rates[name].append(turn(connection, seconds))
    for connection in contestants.values():
        connection.close()
    return {name: values[WARM_UP:] for name, values in rates.items()}


def compete(title, makers, rounds, seconds):
    """Prepare contestants, functions with arguments, and let them take turns: {name: its rates}."""
    say(title)
    ready = prepare(makers, len(makers))
    if len(ready) < len(makers):
        raise ValueError("a contestant failed (see above), so the others were not measured")
    return take_turns(title, {name: connection for name, (connection, _) in ready.items()}, rounds, seconds)


def measure_shape(name, dtype, peers, quick, *duration):
    """v3 and its peers with and without dropout, and products of matrices."""
    shape = SHAPES[name]
    own = {**shape, "DEVICE": "cpu", "DTYPE": dtype, "DROPOUT": 0.0}
    plain = {**own, "DTYPE": "float32", "COMPILE": False}
    makers = {"v3": (rung_steps, "v3", own), "v3, DTYPE=float32 COMPILE=False": (rung_steps, "v3", plain)}
    for who, make in peers.items():
        makers |= {who: (peer_steps, make, shape), who + BEST: (peer_steps, make, shape, 0.0, False, "cpu", dtype)}
    makers["v3" + DROPPED] = (rung_steps, "v3", {**own, "DROPOUT": 0.1})
    for who, make in peers.items():
        makers[who + DROPPED] = (peer_steps, make, shape, 0.1)
        makers[who + DROPPED + BEST] = (peer_steps, make, shape, 0.1, False, "cpu", dtype)
        makers[who + DROPPED + " everywhere" + BEST] = (peer_steps, make, shape, 0.1, True, "cpu", dtype)
    makers |= {f"product {n}": (product_steps, n, dtype, "cpu") for n in SQUARES["cpu"]}
    if quick:
        makers = {who: maker for who, maker in makers.items() if not any(out in who for out in QUICK_LEAVES_OUT)}
    return compete(f"{name} shape", makers, *duration)


def gpu_peers(nanogpt):
    """{name: function that makes the model} for the peers that are installed. A line names each that is not."""
    peers = {}
    if nanogpt:
        peers[NANO] = functools.partial(nano_gpt, str(nanogpt))
    else:
        say("nanoGPT is left out; to have it: git clone https://github.com/karpathy/nanoGPT, then --nanogpt nanoGPT")
    if importlib.util.find_spec("transformers"):
        peers[HF] = functools.partial(hugging_face, attention="causal")
    else:
        say("GPT-2 of transformers is left out; to have it: pip install -r benchmarks/requirements.txt")
    return peers or {PLAIN: GPT}


def gpu_makers(shape, device, dtype, peers, compiled):
    """The contestants for a shape, {name: function and arguments}: the rungs as they train, the peers at their best.
    """
    own = {**shape, "DEVICE": device, "DTYPE": dtype, "DROPOUT": 0.0, "COMPILE": compiled}
    padded = {**shape, "vocabulary": -(-shape["vocabulary"] // 64) * 64}
    makers = {"v3": (rung_steps, "v3", own)}
    for name, scheme in (("v4, RoPE", "rope"), ("v4, ALiBi", "alibi")):
        makers[name] = (rung_steps, "v4_alibi_rope", {**own, "POSITION": scheme})
    for name, make in peers.items():
        makers[name] = (peer_steps, make, padded, 0.0, False, device, dtype, compiled)
    return makers


def measure_gpu(device, dtype, peers, micro_batches, compiled, rounds, seconds):
    """Measure the rungs and the peers, each with the micro-batches fastest for it, and matrix products. Returns
    ({name: facts}, {name: rates})."""
    contestants, began = {}, time.perf_counter()  # {name: (rate, connection, facts)}
    for micro_batch in micro_batches:
        if contestants and time.perf_counter() - began > TRIAL_SECONDS:
            say(f"micro-batches of {micro_batch} are not tried: the time for that is over")
            continue
        shape = {**SHAPES[GPT2], "MICRO_BATCH_SIZE": micro_batch}
        makers, at_once = gpu_makers(shape, device, dtype, peers, compiled), 8
        if device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            at_once = max(1, int(free / (MEMORY * micro_batch * shape["BLOCK_SIZE"])))
        for name, (connection, facts) in prepare(makers, at_once).items():
            rate = [turn(connection, seconds) for _ in range(2)][-1]  # the first is slower
            say(f"{name}, micro-batches of {micro_batch}: {rate:,.0f} tokens/s, {facts['memory_mb'] / 1000:.1f} GB"
                f"{'' if facts['compiled'] else ', not compiled'}")  # fmt: skip
            slower = connection
            if name not in contestants or contestants[name][0] < rate:
                slower = contestants[name][1] if name in contestants else None
                contestants[name] = rate, connection, {"micro_batch": micro_batch, **facts}
            if slower:
                slower.close()
    if not contestants:
        raise ValueError(f"nothing could be measured with micro-batches of {', '.join(map(str, micro_batches))}")
    products = prepare({f"product {n}": (product_steps, n, dtype, device) for n in SQUARES[device]}, 8)
    connections = {name: connection for name, (connection, _) in products.items()}
    connections |= {name: connection for name, (_, connection, _) in contestants.items()}
    rates = take_turns(GPT2, connections, rounds, seconds)
    return {name: facts for name, (*_, facts) in contestants.items()}, rates


def flops_per_token(shape, attention=1.0):
    """FLOPs of a forward and backward pass. `attention`: the share of its products that counts."""
    L, C = shape["N_LAYER"], shape["N_EMBD"]
    return 6 * (12 * L * C**2 + C * shape["vocabulary"]) + 12 * L * shape["BLOCK_SIZE"] * C * attention


def gpu_table(results):
    """For each contestant on a GPU: tokens per second, speed relative to the first peer, MFU, memory, micro-batch."""
    rates, rows = results["training"][GPT2], []
    base = next((name for name in (NANO, HF, PLAIN) if name in rates), next(iter(results["contestants"])))
    for name, facts in results["contestants"].items():
        rate, range_ = median(rates[name]), f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        use = f"{rate * flops_per_token(SHAPES[GPT2]) / results['peak']:.1%}" if results["peak"] else "–"
        rows.append([name + (BEST if facts["compiled"] else ", eager"),
                     f"{rate:,.0f} ({range_})", f"{rate / median(rates[base]):.2f}", use,
                     f"{facts['memory_mb'] / 1000:.1f}", facts["micro_batch"]])  # fmt: skip
    return table(["training step", "tokens/s", f"times {base}", "MFU", "peak memory, GB", "windows at once"], rows)


def gpu_report(results):
    """The results of a GPU as Markdown."""
    shape, rates = SHAPES[GPT2], results["training"][GPT2]
    reached = max((median(values) for name, values in rates.items() if name.startswith("product")), default=0.0)
    peak = f"{results['peak'] / 1e12:,.4g} TFLOP/s" if results["peak"] else "not known here"
    return (
        f"{gpu_table(results)}\n{shape['N_LAYER']} × {shape['N_EMBD']}, {shape['N_HEAD']} heads, context "
        f"{shape['BLOCK_SIZE']}, vocabulary {shape['vocabulary']:,} (of the peers padded to a multiple of 64), "
        f"{flops_per_token(shape) / 1e6:,.1f} MFLOPs per token, {shape['BATCH_SIZE']} windows a step, "
        f"{results['dtype']}, no dropout. v4 trains with Muon, the others with AdamW. The peak is {peak}; products of "
        f"square matrices reach {reached / 1e12:,.4g} TFLOP/s. Median (slowest to fastest) of {results['rounds']} "
        f"rounds after a warm-up, in each of which all take a turn of {results['seconds']} s.\n"
        f"Machine: {results['machine']}.\n"
    )


def speed_table(training):
    """Tokens per second, and how many times as fast v3 is with the same dropout."""
    names = [name for name in next(iter(training.values())) if not name.startswith("product")]
    head, rows = ["training step"], {name: [name] for name in names}
    for shape, rates in training.items():
        head += [f"{shape}: tokens/s", "v3 is faster by"]
        for name, row in rows.items():
            rate, v3 = median(rates[name]), median(rates["v3" + DROPPED * (DROPPED in name)])
            row += [f"{rate:,.0f} ({min(rates[name]):,.0f} to {max(rates[name]):,.0f})", f"{v3 / rate:.2f}"]
    return table(head, rows.values())


def best_table(training, dtype):
    """How many times as fast v3 is as each peer at its best."""
    rows = []
    for peer in (peer + dropped for dropped in ("", DROPPED) for peer in (HF, ENCODER, PLAIN)):
        row = [peer]
        for rates in training.values():
            forms = {name: median(rates[name]) for name in (peer, peer + BEST) if name in rates}
            if forms:
                best = max(forms, key=forms.get)
                v3 = median(rates["v3" + DROPPED * (DROPPED in peer)])
                row += [f"compiled, {dtype}" if BEST in best else "eager, float32", f"{v3 / forms[best]:.2f}"]
        rows += [row] if len(row) > 1 else []
    head = ["peer at its best"]
    for shape in training:
        head += [f"{shape}: its best form", "v3 is faster by"]
    return table(head, rows)


def share_table(training, dtype):
    rows = []
    for name, rates in training.items():
        v3, work = median(rates["v3"]), flops_per_token(SHAPES[name], attention=0.5)
        peak = max(median(values) for product, values in rates.items() if product.startswith("product"))
        cost = f"{v3 / median(rates['v3' + DROPPED]) - 1:.1%}" if "v3" + DROPPED in rates else "–"
        rows.append([name, f"{work / 1e6:.1f}", f"{v3 * work / 1e12:.3f}", f"{peak / 1e12:.3f}",
                     f"{v3 * work / peak:.1%}", cost])  # fmt: skip
    return table(["v3", "MFLOPs per token", "TFLOP/s", f"{dtype} peak, TFLOP/s", "share of the peak",
                  "longer step with dropout 0.1"], rows)  # fmt: skip


def position_table(positions):
    rows = []
    for window, rates in positions.items():
        alibi, rope = (1000 * TOKENS / median(rates[scheme]) for scheme in ("alibi", "rope"))
        rows.append([window, f"{alibi:.0f}", f"{rope:.0f}", f"{alibi / rope:.2f}"])
    return table(["v4, tokens in a window", "ALiBi, ms per step", "RoPE, ms per step", "ALiBi / RoPE"], rows)


def report(results):
    """The results as Markdown."""
    training, positions = results["training"], results["positions"]
    tables = [best_table(training, results["dtype"]), speed_table(training), share_table(training, results["dtype"])]
    tables += [position_table(positions)] if positions else []
    shapes = "; ".join(f"{name}: {s['N_LAYER']} × {s['N_EMBD']}, context {s['BLOCK_SIZE']}, vocabulary "
                       f"{s['vocabulary']:,}" for name, s in SHAPES.items() if name in training)  # fmt: skip
    peers = (f"Batch 16. Peers run eager in float32 or, \"compiled\", in {results['dtype']} with fused AdamW and "
             "freed memory kept. They drop what v3 drops, or \"everywhere\" what they drop by default: attention "
             "weights and, in nn.TransformerEncoder, numbers inside of the MLP as well.")
    method = (f"Median (slowest to fastest) of {results['rounds']} rounds after a warm-up, in each of which all take a "
              f"turn of {results['seconds']} s.")  # fmt: skip
    return "\n".join([*tables, f"{shapes}. {peers} {method}\nMachine: {results['machine']}.\n"])


def measure_all(dtype, quick, *duration):
    """What is measured on a CPU: (shapes, windows of several lengths)."""
    peers = {HF: hugging_face, ENCODER: Encoder, PLAIN: GPT}
    if importlib.util.find_spec("transformers") is None:
        print("GPT-2 of transformers is left out; to have it: pip install -r benchmarks/requirements.txt")
        del peers[HF]
    training, positions = {}, {}
    for name in ("small",) if quick else ("small", "large"):
        training[name] = measure_shape(name, dtype, peers, quick, *duration)
    for window in () if quick else WINDOWS:
        shape = {"BLOCK_SIZE": window, "BATCH_SIZE": TOKENS // window, "MICRO_BATCH_SIZE": TOKENS // window // 2,
                 "DEVICE": "cpu", "DTYPE": dtype, "vocabulary": 4096}  # fmt: skip
        makers = {scheme: (rung_steps, "v4_alibi_rope", {**shape, "POSITION": scheme}) for scheme in ("alibi", "rope")}
        positions[window] = compete(f"v4, windows of {window}", makers, *duration)
    return training, positions


def main(argv=None):
    parser = argparse.ArgumentParser(description="Training speed of v3 and v4 compared with plain implementations.")
    parser.add_argument("--quick", action="store_true", help="a first look: less is measured; write nothing without "
                        "--to")  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="v3, v4 and others at GPT-2's size on a GPU")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="checkout of karpathy/nanoGPT, with --gpu")
    parser.add_argument("--micro-batches", type=int, nargs="+", metavar="N", help="windows at once, all tried, with "
                        f"--gpu (default: {' '.join(map(str, MICRO_BATCHES))})")  # fmt: skip
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the results go (default: results/benchmarks)")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # where tests run --gpu
    parser.add_argument("--eager", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.gpu and args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--gpu needs a GPU that torch can use, but there is none; leave it out")
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        raise ValueError(f"--nanogpt {args.nanogpt} has no model.py; name a checkout of nanoGPT")
    micro_batches, batch = args.micro_batches or MICRO_BATCHES[: 1 if args.quick else None], SHAPES[GPT2]["BATCH_SIZE"]
    if uneven := [n for n in micro_batches if n < 1 or batch % n]:
        raise ValueError(f"--micro-batches {uneven[0]}: a step has {batch} windows; name a divisor of that")
    device = args.device if args.gpu else "cpu"
    dtype = harness.resolve_dtype(device, "auto")  # measured now, while nothing else runs
    duration = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    results = {"machine": machine(device), "date": time.strftime("%Y-%m-%d"), "dtype": dtype, "rounds": duration[0],
               "seconds": duration[1]}  # fmt: skip
    if args.gpu:
        peers, compiled = gpu_peers(args.nanogpt), not args.eager
        contestants, rates = measure_gpu(device, dtype, peers, micro_batches, compiled, *duration)
        results |= {"peak": flops.peak(device, dtype), "contestants": contestants, "training": {GPT2: rates}}
        name, text = "training_gpu", gpu_report(results)
    else:
        results["training"], results["positions"] = measure_all(dtype, args.quick, *duration)
        name, text = "training", report(results)
    print(text, end="")
    folder = args.to or (None if args.quick else RESULTS)
    if folder:
        keep(name, results, text, folder=folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("training.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (EOFError, ConnectionError):
        sys.exit("training.py: a contestant failed; its error is above")
    except (OSError, ValueError) as error:
        sys.exit(f"training.py: {error}")
