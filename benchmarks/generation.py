"""How fast v4 generates: with its key-value cache, and by computing the whole text again for each token.

    python benchmarks/generation.py           some minutes; the results go to results/benchmarks/
    python benchmarks/generation.py --quick   one scheme, two repetitions, under a minute; writes nothing

Each contestant generates 512 tokens from a single one. The plain loop is v3's, on the same v4 model. The peer is
`generate` of Hugging Face's transformers for a GPT-2 of the same shape, with its cache. They take turns, and the
median of the repetitions counts. The weights are random, since the speed does not depend on them.

With a cache, a new token costs the same at every position, except for attention, which covers all earlier tokens. So
the second table shows the time per token by position, and the time of the attention kernel alone.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import v4_alibi_rope as v4  # noqa: E402
from benchmarks.tables import keep, machine, table  # noqa: E402

TOKENS = 512  # to generate
BIN = 128  # positions in a column of the table
VOCAB_SIZE = 4096
REPETITIONS, QUICK_REPETITIONS = 5, 2
TOLERANCE = 1e-3  # of logits, which are of order one


def make_model(position):
    """v4 with random weights, including those that it sets to zero for training."""
    torch.manual_seed(v4.SEED)
    v4.POSITION = position
    model = v4.LanguageModel(VOCAB_SIZE).to(v4.DEVICE).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=v4.N_EMBD**-0.5)
    return model


@torch.no_grad()
def plain_loop(model, ids, n_tokens):
    """v3's `generate`: every new token needs a pass over the whole text."""
    idx = torch.tensor([ids], device=v4.DEVICE)  # (1, T)
    for _ in range(n_tokens):
        logits = model(idx[:, -model.block_size :])[:, -1]  # (1, V)
        idx = torch.cat([idx, v4.draw(logits)], dim=1)
        yield idx[0, -1].item()


def hugging_face():
    """GPT-2 of transformers in the shape of v4, and a function that generates with it as v4 does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=v4.BLOCK_SIZE, n_embd=v4.N_EMBD, n_layer=v4.N_LAYER,
                        n_head=v4.N_HEAD, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).to(v4.DEVICE).eval()

    def generate(model, ids, n_tokens):
        idx = torch.tensor([ids], device=v4.DEVICE)
        return model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, temperature=v4.TEMPERATURE,
                              top_k=0, use_cache=True, min_new_tokens=n_tokens, max_new_tokens=n_tokens,
                              pad_token_id=0)[0, len(ids) :].tolist()  # fmt: skip

    return model, generate


@torch.no_grad()
def largest_difference(model):
    """The largest difference between logits computed token by token with a cache and logits of the whole text at once.
    """
    idx = torch.randint(VOCAB_SIZE, (1, TOKENS), device=v4.DEVICE)
    cache = v4.KVCache(model)
    cached = torch.cat([model(idx[:, i : i + 1], cache=cache) for i in range(TOKENS)], dim=1)
    difference = (cached - model(idx)).abs().max().item()
    if not difference < TOLERANCE:
        raise ValueError(f"the logits with and without cache differ by {difference:.1e}, more than {TOLERANCE}")
    return difference


def token_seconds(model, generate, n_tokens):
    """Generate tokens. Returns the seconds that each took, from the end of one pass through the model to the next."""
    ends = []
    hook = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    start = time.perf_counter()
    ids = list(generate(model, [0], n_tokens))
    stop = time.perf_counter()
    hook.remove()
    if len(ids) != n_tokens or len(ends) != n_tokens:
        raise ValueError(f"{len(ids)} tokens and {len(ends)} passes instead of {n_tokens}")
    ends[-1] = stop  # the last token is done when all is done
    return [b - a for a, b in zip([start, *ends], ends)]


@torch.no_grad()
def attention_seconds(position):
    """The attention kernel alone: one query against all keys up to `position`, with separate memory in each layer."""
    layers = torch.randn(v4.N_LAYER, 2, 1, v4.N_HEAD, v4.BLOCK_SIZE, v4.N_EMBD // v4.N_HEAD, device=v4.DEVICE)
    q = torch.randn_like(layers[0, 0, :, :, :1])
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        for k, v in layers[..., :position, :]:
            F.scaled_dot_product_attention(q, k, v)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def bins(seconds):
    """Mean seconds of the tokens in each bin of positions."""
    return [mean(seconds[i : i + BIN]) for i in range(0, len(seconds), BIN)]


def report(results):
    """The results as Markdown."""
    rates = {name: median(TOKENS / sum(run) for run in runs) for name, runs in results["seconds"].items()}
    rows = []
    for name, rate in rates.items():
        plain = rates.get(name.replace("cache", "plain loop"))
        rows.append([name, f"{rate:.0f}", f"{1000 / rate:.2f}", f"{rate / plain:.1f}" if plain else "–"])
    speed = table(["generation", "tokens/s", "ms per token", "times the plain loop"], rows)
    by_position = {name: [median(column) for column in zip(*map(bins, runs))]
                   for name, runs in results["seconds"].items()}  # fmt: skip
    by_position["attention kernel alone"] = results["attention_seconds"]
    rows = [[name, *(f"{1000 * t:.2f}" for t in times), f"{1000 * (times[-1] - times[0]):.2f}"]
            for name, times in by_position.items()]  # fmt: skip
    columns = [f"{i} to {min(i + BIN, TOKENS)}" for i in range(0, TOKENS, BIN)]
    positions = table(["ms per token at positions", *columns, "last less first"], rows)
    n = results["repetitions"]
    return (f"{speed}\n{positions}\n{TOKENS} tokens from a single one, batch 1; {v4.N_LAYER} layers of width "
            f"{v4.N_EMBD}, {v4.N_HEAD} heads, vocabulary {VOCAB_SIZE:,}, window {v4.BLOCK_SIZE}. Medians of {n} "
            f"repetitions in turn. Logits with and without cache differ by {results['largest_difference']:.0e} at most."
            f"\nMachine: {results['machine']}.\n")  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed of generation by v4, with and without key-value cache.")
    parser.add_argument("--quick", action="store_true", help="one scheme, two repetitions; write nothing")
    args = parser.parse_args(argv)
    v4.DEVICE = "cpu"
    v4.BLOCK_SIZE = TOKENS  # the window holds all of them
    contestants, difference = {}, 0.0
    for position in ("rope",) if args.quick else ("alibi", "rope"):
        model = make_model(position)
        difference = max(difference, largest_difference(model))
        contestants[f"v4, {position}, cache"] = (model, v4.generate)
        contestants[f"v4, {position}, plain loop"] = (model, plain_loop)
    try:
        contestants["GPT-2 of transformers, cache"] = hugging_face()
    except ModuleNotFoundError:
        print("GPT-2 of transformers is left out; to have it: pip install -r benchmarks/requirements.txt")
    for contestant in contestants.values():
        token_seconds(*contestant, 16)  # not counted: work that is done only once
    repetitions = QUICK_REPETITIONS if args.quick else REPETITIONS
    seconds = {name: [] for name in contestants}
    for i in range(repetitions):
        for name, contestant in contestants.items():
            print(f"repetition {i + 1} of {repetitions}: {name}", file=sys.stderr, flush=True)
            seconds[name].append(token_seconds(*contestant, TOKENS))
    results = {
        "machine": machine(), "date": time.strftime("%Y-%m-%d"), "repetitions": repetitions,
        "largest_difference": difference, "seconds": seconds,
        "attention_seconds": [attention_seconds(i + BIN // 2) for i in range(0, TOKENS, BIN)],
    }  # fmt: skip
    text = report(results)
    print(text, end="")
    if not args.quick:
        keep("generation", results, text, indent=None)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("generation.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"generation.py: {error}")
