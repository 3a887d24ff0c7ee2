"""How fast v3 trains beside other implementations of the same model, and v4's ALiBi beside its RoPE.

    python benchmarks/training.py           all of it, about 30 minutes; the results go to results/benchmarks/
    python benchmarks/training.py --quick   a first look at the small shape in about a minute; writes nothing
    python benchmarks/training.py --gpu     v3 and GPT-2, both compiled, at GPT-2's size on a GPU

The others are GPT-2 of Hugging Face's transformers, torch.nn.TransformerEncoder, and a GPT as small repositories write
it: qkv in one product, fused attention, the head tied to the embedding. Each is trained plainly, with torch.optim.AdamW
in float32 without compilation, and at its best: compiled, in v3's type of numbers, with fused AdamW and, as v3 does,
without giving freed memory back. What counts is v3 against the better of both. All take the same batch of random
tokens, clip gradients and step.

Every contestant lives in a process of its own. In each round each of them works for some seconds while the others
wait, so what slows the machine down for a while hits all of them. What counts is the median of the rounds.

The model's work is counted as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), with the half of
attention that a causal model needs:

    FLOPs per token = 6 * (parameters in matrix products) + 12 * N_LAYER * BLOCK_SIZE * N_EMBD / 2

Parameters in matrix products are those of the blocks and the head, not the looked up embeddings of tokens and
positions. The peak is the fastest of some products of square matrices, which take their turns in the same rounds.
"""

import argparse
import importlib
import importlib.util
import json
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
from benchmarks.steps import random_tokens, run_steps  # noqa: E402
from benchmarks.tables import RESULTS, machine, table  # noqa: E402

GPT2 = "GPT-2's size"
SHAPES = {  # constants of v3, and the vocabulary
    "small": {"N_LAYER": 4, "N_HEAD": 4, "N_EMBD": 192, "BLOCK_SIZE": 128, "BATCH_SIZE": 16, "vocabulary": 4096},
    "large": {"N_LAYER": 6, "N_HEAD": 4, "N_EMBD": 256, "BLOCK_SIZE": 256, "BATCH_SIZE": 16, "vocabulary": 4096},
    GPT2: {"N_LAYER": 12, "N_HEAD": 12, "N_EMBD": 768, "BLOCK_SIZE": 1024, "vocabulary": 50304},
}
BATCHES = [4 << i for i in range(9)]  # tried on a GPU, until one does not fit
WINDOWS, TOKENS = (128, 256, 512, 1024), 4096  # ALiBi against RoPE: values of BLOCK_SIZE, tokens a step
SQUARES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # sizes of the products that show the peak
ROUNDS, SECONDS = 5, 1.2  # of work in a turn
QUICK_ROUNDS, QUICK_SECONDS = 4, 0.5
WARM_UP = 2  # rounds before, which do not count: a fresh process is slower until its memory is all in use
HF, ENCODER, PLAIN, DROPPED = "GPT-2 of transformers", "nn.TransformerEncoder", "a plain GPT", ", dropout 0.1"
BEST = ", compiled"  # and all else that makes a peer fast
QUICK_LEAVES_OUT = ("COMPILE=False", "everywhere", DROPPED + BEST, "product 1024", "product 4096")


def random_batch(shape, device):
    """Inputs (B, T) and, one token later, targets (B, T)."""
    torch.manual_seed(1337)
    windows = torch.randint(shape["vocabulary"], (shape["BATCH_SIZE"], shape["BLOCK_SIZE"] + 1)).to(device)
    return windows[:, :-1], windows[:, 1:]


def rung_steps(turns, rung, shape):
    """Steps of a rung, made by its own `train`."""
    rung = importlib.import_module(rung)
    harness.set_constants(vars(rung), [f"{name}={value}" for name, value in shape.items() if name.isupper()])
    torch.manual_seed(rung.SEED)
    model = rung.LanguageModel(shape["vocabulary"]).to(rung.DEVICE)
    tokens = random_tokens(rung, shape["vocabulary"])
    run_steps(rung, model, tokens, lambda seconds: turns.done(rung.BATCH_SIZE * rung.BLOCK_SIZE))


def hugging_face(shape, dropout, everywhere):
    """GPT-2 of transformers; by its own default dropout is `everywhere`, so on attention weights too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=shape["vocabulary"], n_positions=shape["BLOCK_SIZE"], n_embd=shape["N_EMBD"],
        n_layer=shape["N_LAYER"], n_head=shape["N_HEAD"], embd_pdrop=dropout, resid_pdrop=dropout,
        attn_pdrop=dropout * everywhere, use_cache=False, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder as a language model; `everywhere`: with dropout inside of attention and MLP too."""

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
    """A GPT-2 in few lines: LayerNorm first, qkv in one product, fused attention, GELU, the head tied to the embedding;
    `everywhere`: with dropout of attention weights."""

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


def peer_steps(turns, make, shape, dropout=0.0, everywhere=False, device="cpu", best=None):
    """Steps of the model that `make` makes: eager, in float32, or at its best, compiled with numbers of type `best`."""
    if best:
        kernels.keep_freed_memory()
    x, y = random_batch(shape, device)
    model = make(shape, dropout, everywhere).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True if best else None)

    def loss_of(x, y):
        out = model(x)
        return F.cross_entropy(getattr(out, "logits", out).flatten(0, 1), y.flatten())

    if best:
        loss_of = torch.compile(loss_of)

    while turns.done(x.numel()):
        with torch.autocast(device, torch.bfloat16, enabled=best == "bfloat16"):
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def product_steps(turns, n, dtype, device):
    """A product of square matrices, which shows what the machine can do at most; counted in FLOPs."""
    a, b, c = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(3))
    while turns.done(2 * n**3):
        torch.mm(a, b, out=c)


class Turns:
    """What a contestant calls after each step. It says whether the first steps fit into memory, then waits for messages
    of how many seconds a turn takes, and answers each with tokens (or FLOPs) per second."""

    def __init__(self, connection):
        self.connection, self.seconds, self.n = connection, None, 0

    def done(self, amount):
        """Count a step of `amount` tokens; between two turns wait. Returns True."""
        self.n += 1
        if self.seconds is None:
            if self.n == 3:  # the first steps also compile and fill caches
                self.wait_for_turn(True)
        elif self.n == 0:  # not timed: the caches, or the memory of the GPU, were in other hands
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
    """What a contestant's process does: work in turns until nobody asks any more."""
    try:
        work(Turns(connection), *arguments)
    except torch.OutOfMemoryError:
        connection.send(False)
    except (EOFError, ConnectionError):  # no more turns
        pass


def start(work, *arguments):
    """Start a contestant in a process of its own; returns the connection to it, over which its first answer comes."""
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it would tell of what a stopped process left behind
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits it: Ctrl-C is for this one alone
    context.Process(target=serve, args=(theirs, work, arguments), daemon=True).start()
    signal.signal(signal.SIGINT, usual)
    theirs.close()
    return connection


def compete(title, makers, rounds, seconds, started=()):
    """Prepare contestants, functions with arguments, let them and those that are `started` take turns: their rates."""
    print(f"{title}: preparing {', '.join(makers)}", file=sys.stderr, flush=True)
    contestants = {name: start(*maker) for name, maker in makers.items()}
    for contestant in contestants.values():
        contestant.recv()
    contestants = {**dict(started), **contestants}
    rates = {name: [] for name in contestants}
    for i in range(WARM_UP + rounds):
        print(f"{title}: round {i + 1} of {WARM_UP + rounds}", file=sys.stderr, flush=True)
        for name, contestant in contestants.items():
            contestant.send(seconds)
            rates[name].append(contestant.recv())
    for contestant in contestants.values():
        contestant.close()
    return {name: values[WARM_UP:] for name, values in rates.items()}


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


def measure_gpu(shape, batches, device, dtype, peers, *duration):
    """v3 and the peers, compiled and in bf16, each with the largest of `batches` that fits; the peak."""
    largest, contestants = {}, {}
    for name in ("v3", *peers):
        for batch in batches:
            own = {**shape, "BATCH_SIZE": batch, "MICRO_BATCH_SIZE": batch, "DEVICE": device, "DROPOUT": 0.0}
            maker = (rung_steps, "v3", own)
            if name in peers:
                maker = (peer_steps, peers[name], own, 0.0, False, device, "bfloat16")
            contestant = start(*maker)
            if not contestant.recv():
                break
            print(f"{name}: a batch of {batch} fits", file=sys.stderr, flush=True)
            if name in contestants:
                contestants[name].close()
            largest[name], contestants[name] = batch, contestant
        if name not in largest:
            raise ValueError(f"{name} does not fit into the memory with a batch of {batches[0]}")
    products = {f"product {n}": (product_steps, n, dtype, device) for n in SQUARES[device]}
    rates = compete(GPT2, products, *duration, contestants)
    return ", ".join(f"{name} {batch}" for name, batch in largest.items()), rates


def flops_per_token(shape):
    L, C = shape["N_LAYER"], shape["N_EMBD"]
    return 6 * (12 * L * C**2 + C * shape["vocabulary"]) + 12 * L * shape["BLOCK_SIZE"] * C / 2


def speed_table(training):
    """Tokens per second, and how many times as many v3 reaches with the same dropout."""
    names = [name for name in next(iter(training.values())) if not name.startswith("product")]
    head, rows = ["training step"], {name: [name] for name in names}
    for shape, rates in training.items():
        head += [f"{shape}: tokens/s", "v3 is faster by"]
        for name, row in rows.items():
            rate, v3 = median(rates[name]), median(rates["v3" + DROPPED * (DROPPED in name)])
            row += [f"{rate:,.0f} ({min(rates[name]):,.0f} to {max(rates[name]):,.0f})", f"{v3 / rate:.2f}"]
    return table(head, rows.values())


def best_table(training, dtype):
    """How many times as fast as each peer at its best v3 is."""
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
        v3, flops = median(rates["v3"]), flops_per_token(SHAPES[name])
        peak = max(median(values) for product, values in rates.items() if product.startswith("product"))
        cost = f"{v3 / median(rates['v3' + DROPPED]) - 1:.1%}" if "v3" + DROPPED in rates else "–"
        rows.append([name, f"{flops / 1e6:.1f}", f"{v3 * flops / 1e12:.3f}", f"{peak / 1e12:.3f}",
                     f"{v3 * flops / peak:.1%}", cost])  # fmt: skip
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
    training, positions, batches = results["training"], results["positions"], results.get("batches")
    tables = [] if batches else [best_table(training, results["dtype"])]
    tables += [speed_table(training), share_table(training, results["dtype"])]
    tables += [position_table(positions)] if positions else []
    shapes = "; ".join(f"{name}: {s['N_LAYER']} × {s['N_EMBD']}, context {s['BLOCK_SIZE']}, vocabulary "
                       f"{s['vocabulary']:,}" for name, s in SHAPES.items() if name in training)  # fmt: skip
    if batches:
        peers = f"Compiled, in bf16, with the largest batch that fits: {batches}."
    else:
        peers = (f"Batch 16. Peers run eager in float32 or, \"compiled\", in {results['dtype']} with fused AdamW and "
                 "freed memory kept. They drop what v3 drops, or \"everywhere\" what they drop by default: attention "
                 "weights and, in nn.TransformerEncoder, numbers inside of the MLP as well.")
    method = (f"Median (slowest to fastest) of {results['rounds']} rounds after a warm-up, in each of which all take a "
              f"turn of {results['seconds']} s.")  # fmt: skip
    return "\n".join([*tables, f"{shapes}. {peers} {method}\nMachine: {results['machine']}.\n"])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Training speed of v3 and v4 beside plain implementations.")
    parser.add_argument("--quick", action="store_true", help="the small shape only, few rounds; write nothing")
    parser.add_argument("--gpu", action="store_true", help="v3 and GPT-2 at GPT-2's size on a GPU")
    args = parser.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu needs a GPU that torch can use, and there is none")
    peers = {HF: hugging_face, PLAIN: GPT} if args.gpu else {HF: hugging_face, ENCODER: Encoder, PLAIN: GPT}
    if importlib.util.find_spec("transformers") is None:
        print("GPT-2 of transformers is left out; to have it: pip install -r benchmarks/requirements.txt")
        del peers[HF]
    device = "cuda" if args.gpu else "cpu"
    dtype = harness.resolve_dtype(device, "auto")  # found out here and now, while nothing else runs
    duration = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    results = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "dtype": dtype, "rounds": duration[0],
               "seconds": duration[1], "training": {}, "positions": {}}  # fmt: skip
    if args.gpu:
        results["machine"] = f"{torch.cuda.get_device_name()}, {results['machine']}"
        measured = measure_gpu(SHAPES[GPT2], BATCHES, device, dtype, peers, *duration)
        results["batches"], results["training"][GPT2] = measured
    else:
        for name in ("small",) if args.quick else ("small", "large"):
            results["training"][name] = measure_shape(name, dtype, peers, args.quick, *duration)
        for window in () if args.quick else WINDOWS:
            shape = {"BLOCK_SIZE": window, "BATCH_SIZE": TOKENS // window, "MICRO_BATCH_SIZE": TOKENS // window // 2,
                     "DEVICE": "cpu", "DTYPE": dtype, "vocabulary": 4096}  # fmt: skip
            makers = {scheme: (rung_steps, "v4_alibi_rope", {**shape, "POSITION": scheme})
                      for scheme in ("alibi", "rope")}  # fmt: skip
            results["positions"][window] = compete(f"v4, windows of {window}", makers, *duration)
    text = report(results)
    print(text, end="")
    if not args.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / ("training_gpu" if args.gpu else "training")
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("training.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (EOFError, ConnectionError):
        sys.exit("training.py: a contestant failed; its error stands above")
    except (OSError, ValueError) as error:
        sys.exit(f"training.py: {error}")
