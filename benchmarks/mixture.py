"""What a trained network gains from counting: a mixture of its probabilities with those of an n-gram model.

    python benchmarks/mixture.py                    the rungs that runs/ has, and results/best; results go to
                                                    results/benchmarks/
    python benchmarks/mixture.py runs/v3 runs/mine  these runs; results are only printed

For every token p = (1 - w) p_network + w p_counted, with one weight w for the whole text (Jelinek and Mercer 1980,
"Interpolated estimation of Markov source parameters from sparse data"). The network's logits are first divided by a
temperature: a network that has read its text many times is too sure (Guo et al. 2017, arXiv:1706.04599). Both numbers
are chosen on the validation split. The mixture is a static model like its parts: both give a token its probability
before it is read. Windows are side by side or, with --stride N, begin every N tokens.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness  # noqa: E402
from benchmarks.ngram import KneserNey  # noqa: E402
from benchmarks.tables import ROOT, keep, machine, table  # noqa: E402
from data import load_tokens  # noqa: E402
from harness.errors import UserError  # noqa: E402
from harness.models import find_model, read_model  # noqa: E402
from results.best import ADDITIONS, SLIDING, best_folder  # noqa: E402
from results.pages import RUNS  # noqa: E402
from results.runner import rung_of  # noqa: E402

BEST = ROOT / "results" / "best"
TEMPERATURES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)


@torch.no_grad()
def network_probabilities(model, ids, stride=None, temperatures=(1.0,), at_once=16):
    """The probability that a model of any rung gives each of `ids` (n,) after the first, at each of K temperatures:
    (K, n - 1). Each token is scored in the first window that predicts it."""
    model.eval()
    size, n = model.block_size, len(ids) - 1
    stride = min(stride or size, size)
    starts = torch.arange(0, max(0, n - size) + stride, stride)
    device, found = next(model.parameters()).device, []
    for batch in [*starts[:-1].split(at_once), starts[-1:]]:  # the last window may be shorter
        if not len(batch):
            continue
        T = min(size, n - int(batch[-1]))
        windows = ids[batch[:, None] + torch.arange(T + 1)].long().to(device)  # (b, T + 1)
        logits = model(windows[:, :-1]).float()  # (b, T, V)
        new = torch.arange(T) >= torch.where(batch > 0, size - stride, 0)[:, None]  # (b, T), in no earlier window
        logits, wanted = logits[new], windows[:, 1:][new]  # (m, V), (m,)
        log_p = torch.stack([-F.cross_entropy(logits / t, wanted, reduction="none") for t in temperatures])  # (K, m)
        found.append(log_p.cpu().double().exp())
    return torch.cat(found, 1).numpy()


def best_weight(network, counted):
    """The weight of `counted` in the mixture with the lowest loss. Arguments: (n,) probabilities each. The sum of
    logarithms is concave in the weight, so bisection finds where its slope is zero."""
    low, high = 0.0, 1.0
    for _ in range(40):
        w = (low + high) / 2
        if ((counted - network) / ((1 - w) * network + w * counted)).sum() > 0:
            low = w
        else:
            high = w
    return w


def best_mixture(tempered, counted):
    """(temperature, weight of `counted`) of the mixture with the lowest loss. `tempered`: {temperature: (n,)}."""

    def loss(t, weight):
        return -np.log((1 - weight) * tempered[t] + weight * counted).sum()

    return min(((t, best_weight(network, counted)) for t, network in tempered.items()), key=lambda pair: loss(*pair))


def measure(folder, order, stride):
    """{"temperature", "weight", and for each split the bits per byte and the word perplexity of the network, also at
    that temperature, of the n-gram model, and of the mixture}."""
    saved, _ = read_model(find_model([folder]))
    with rung_of(folder):
        model, tokenizer = harness.load(folder)
    constants = saved["hyperparameters"]
    tokens, metrics, t = load_tokens(constants["VOCABULARY"], constants["DATA"]), {}, None
    if tokens["train"].fingerprint != tokenizer.fingerprint:
        raise UserError(f"the text in {constants['DATA']} no longer has the vocabulary of the model in {folder}; "
                        "prepare it again with the model's vocabulary")  # fmt: skip
    n_gram = KneserNey(tokens["train"].ids.numpy(), tokenizer.vocab_size, order)
    for split in ("val", "test"):
        of = tokens[split]
        network = network_probabilities(model, of.ids, stride, (1.0, *TEMPERATURES))
        network, tempered = network[0], dict(zip(TEMPERATURES, network[1:]))
        counted = n_gram.probabilities(of.ids.numpy())[1:]
        if split == "val":
            t, weight = best_mixture(tempered, counted)
        mixed = (1 - weight) * tempered[t] + weight * counted
        for name, p in {"network": network, "tempered": tempered[t], "counted": counted, "mixed": mixed}.items():
            nats = -np.log(p).sum()
            metrics[f"{split}_{name}_bpb"] = nats / math.log(2) / of.n_bytes
            metrics[f"{split}_{name}_word_ppl"] = math.exp(min(nats / of.n_words, 700)) if of.n_words else None
    return {"run": str(folder), "seed": constants["SEED"], "temperature": t, "weight": weight, **metrics}


def report(results):
    """The results as Markdown."""
    rows = []
    for one in results:
        kinds = ("network", "tempered", "mixed")
        cells = [f"{one[f'val_{name}_bpb']:.4f}" for name in kinds]
        words = [f"{x:,.1f}" if x else "–" for x in (one[f"test_{name}_word_ppl"] for name in kinds)]
        rows.append([one["run"], f"{one['temperature']:g}", f"{one['weight']:.2f}", *cells, *words])
    head = ["run", "temperature", "weight of counting", "val bpb", "with temperature", "and mixed", "test word ppl",
            "with temperature", "and mixed"]  # fmt: skip
    return table(head, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs (default: those of the "
                                                               "rungs, and results/best)")  # fmt: skip
    parser.add_argument("--order", type=int, default=6, metavar="N", help="longest n-gram (default: 6)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from one window to the next")
    args = parser.parse_args()
    if not 1 <= args.order <= 20 or args.stride is not None and args.stride < 1:
        raise UserError("--order must be from 1 to 20, and --stride at least 1")
    folders = {run: (run, args.stride) for run in args.runs}
    if not folders:
        folders = {run: (ROOT / "runs" / run, args.stride) for run in RUNS}
        if missing := [run for run, (folder, _) in folders.items() if not (folder / "model.pt").exists()]:
            harness.say(f"runs/ has no finished run of {', '.join(missing)}: left out")
        folders = {run: folders[run] for run in folders if run not in missing}
        folders |= {"results/best": (BEST, args.stride), f"results/best{SLIDING}": (BEST, 64)}
        if ((edited := best_folder(ADDITIONS)) / "model.pt").exists():
            folders |= {ADDITIONS: (edited, args.stride), ADDITIONS + SLIDING: (edited, 64)}
        else:
            harness.say(f"results/experiments.py best has not trained {ADDITIONS!r} here: left out")
    results = [measure(folder, args.order, stride) | {"run": run} for run, (folder, stride) in folders.items()]
    text = report(results)
    print(text, end="")
    if not args.runs and (args.order, args.stride) == (6, None):
        keep("mixture", {"machine": machine(), "runs": results}, text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"mixture.py: {error}")
