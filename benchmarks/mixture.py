"""What a trained network gains from counting: a mixture of its probabilities with those of an n-gram model.

    python benchmarks/mixture.py                    the rungs that runs/ has, and the best runs; results go to
                                                    results/benchmarks/
    python benchmarks/mixture.py --dynamic 2e-4     the best runs, which keep learning while they read; kept, too
    python benchmarks/mixture.py runs/v3 runs/mine  these runs; results are only printed
    python benchmarks/mixture.py runs/v3 runs/mine --together    both networks and the n-gram model in one mixture

For every token p = (1 - w) p_network + w p_counted, with one weight w for the whole text (Jelinek and Mercer 1980,
"Interpolated estimation of Markov source parameters from sparse data"); several networks have a weight each. The
networks' logits are first divided by a temperature: a network that has read its text many times is too sure (Guo et al.
2017, arXiv:1706.04599). All these numbers are chosen on the validation split. The mixture is a static model like its
parts: each gives a token its probability before it is read. Windows are side by side or, with --stride N, begin every N
tokens. With --dynamic RATE the networks keep learning from what they have read (results/measures.py); then the mixture
is not static either, but still gives every token its probability before it reads it. Of several rates, such as
--dynamic 1e-4,2e-4, each network gets one: all combinations are tried on the first 32,768 tokens of the validation
split.
"""

import argparse
import itertools
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
from results.best import ADDITIONS, BOTH, SLIDING, best_folder  # noqa: E402
from results.measures import WINDOW_TOKENS, first_part, gradient_sizes, learning_probabilities  # noqa: E402
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


def best_weights(parts):
    """The weights of the mixture with the lowest loss, (M,), which add up to 1. `parts`: (M, n) probabilities. Each
    round of expectation maximization gives a part the share of the mixture's probability that it contributed (Jelinek
    and Mercer 1980); that never makes the loss higher."""
    weights = np.full(len(parts), 1 / len(parts))
    for _ in range(200 * (len(parts) > 1)):
        shares = weights[:, None] * parts
        weights = (shares / shares.sum(0)).mean(1)
    return weights


def best_mixture(tempered, counted):
    """(temperature, weights, that of `counted` last) of the mixture with the lowest loss. `tempered`: {temperature:
    (M, n)} probabilities of M networks; `counted`: (n,)."""
    parts = {t: np.stack([*networks, counted]) for t, networks in tempered.items()}
    weights = {t: best_weights(part) for t, part in parts.items()}
    t = max(parts, key=lambda t: np.log(weights[t] @ parts[t]).sum())
    return t, weights[t]


def choose_rates(models, sizes, rates, part, counted):
    """(the rates of `models`, {all rates that were tried, as text: bits per byte}) with which the mixture is best on
    the text `part` (Tokens). `sizes`: the gradient sizes of each model; `counted`: (n - 1,)."""
    learned = [{rate: learning_probabilities(model, part.ids, rate, of_model, temperatures=TEMPERATURES)
                for rate in rates} for model, of_model in zip(models, sizes)]  # fmt: skip
    tried = {}
    for chosen in itertools.product(rates, repeat=len(models)):
        tempered = dict(zip(TEMPERATURES, np.stack([of[rate] for of, rate in zip(learned, chosen)], 1)))
        t, weights = best_mixture(tempered, counted)
        bits = -np.log2(weights @ np.stack([*tempered[t], counted])).sum()
        tried[chosen] = bits / part.n_bytes
    return min(tried, key=tried.get), {", ".join(f"{rate:g}" for rate in chosen): bpb for chosen, bpb in tried.items()}


def read(folder):
    """(hyperparameters, model, tokenizer) of the run in `folder`."""
    saved, _ = read_model(find_model([folder]))
    with rung_of(folder):
        return saved["hyperparameters"], *harness.load(folder)


def measure(folders, order, stride, rates=(), known=None):
    """{"temperature", "weights" of the networks and of the n-gram model, and for each split the bits per byte and the
    word perplexity of the network or of the mixture of several networks, also at that temperature, of the n-gram model,
    and of the mixture of all}. With `rates` the networks keep learning, each with one of them, and {"rates", "tried"}
    are in the result, too. `known` keeps the probabilities of networks for other mixtures."""
    constants, models, tokenizers = zip(*map(read, folders))
    tokens, metrics = load_tokens(constants[0]["VOCABULARY"], constants[0]["DATA"]), {}
    for folder, tokenizer in zip(folders, tokenizers):
        if tokens["train"].fingerprint != tokenizer.fingerprint:
            raise UserError(f"the text in {constants[0]['DATA']} does not have the vocabulary of the model in "
                            f"{folder}; prepare it again with the model's vocabulary")  # fmt: skip
    n_gram, temperatures = KneserNey(tokens["train"].ids.numpy(), tokenizer.vocab_size, order), (1.0, *TEMPERATURES)
    sizes, chosen = [gradient_sizes(model, tokens["train"]) for model in models if rates], [None] * len(models)
    if rates:
        part = first_part(tokens["val"], tokenizer, WINDOW_TOKENS // 2)
        chosen, tried = choose_rates(models, sizes, rates, part, n_gram.probabilities(part.ids.numpy())[1:])
        metrics |= {"rates": list(chosen), "tried": tried}
    for split in ("val", "test"):
        of, found, known = tokens[split], [], {} if known is None else known
        for k, (folder, model, rate) in enumerate(zip(folders, models, chosen)):
            key = str(folder), split, stride, rate
            if key not in known and rate is None:
                known[key] = network_probabilities(model, of.ids, stride, temperatures)
            elif key not in known:
                known[key] = learning_probabilities(model, of.ids, rate, sizes[k], temperatures=temperatures)
            found.append(known[key])
        alone, *tempered = np.stack(found, 1)  # (M, n) at each temperature
        tempered, counted = dict(zip(TEMPERATURES, tempered)), n_gram.probabilities(of.ids.numpy())[1:]
        if split == "val":
            t, weights = best_mixture(tempered, counted)
            of_networks = best_weights(alone), best_weights(tempered[t])
        mixed = weights @ np.stack([*tempered[t], counted])
        kinds = {"network": of_networks[0] @ alone, "tempered": of_networks[1] @ tempered[t], "counted": counted}
        for name, p in (kinds | {"mixed": mixed}).items():
            nats = -np.log(p).sum()
            metrics[f"{split}_{name}_bpb"] = nats / math.log(2) / of.n_bytes
            metrics[f"{split}_{name}_word_ppl"] = math.exp(min(nats / of.n_words, 700)) if of.n_words else None
    return {"run": " + ".join(map(str, folders)), "seed": constants[0]["SEED"], "temperature": t,
            "weights": weights.tolist(), **metrics}  # fmt: skip


def report(results):
    """The results as Markdown."""
    rows = []
    for one in results:
        kinds = ("network", "tempered", "mixed")
        cells = [f"{one[f'val_{name}_bpb']:.4f}" for name in kinds]
        words = [f"{x:,.1f}" if x else "–" for x in (one[f"test_{name}_word_ppl"] for name in kinds)]
        rows.append([one["run"], f"{one['temperature']:g}", f"{one['weights'][-1]:.2f}", *cells, *words])
    head = ["run", "temperature", "weight of counting", "val bpb", "with temperature", "and mixed", "test word ppl",
            "with temperature", "and mixed"]  # fmt: skip
    return table(head, rows)


def usual_rows(dynamic=False):
    """{name of a row: (folders of its networks, stride)}: the rungs, the best runs, and both of these together; if the
    networks keep learning, only the best runs."""
    best, second = BEST, best_folder(ADDITIONS)
    if dynamic:
        rows = {"results/best": ([best], None), ADDITIONS: ([second], None), "both": ([best, second], None)}
    else:
        rows = {run: ([ROOT / "runs" / run], None) for run in RUNS}
        rows |= {"results/best": ([best], None), f"results/best{SLIDING}": ([best], 64), ADDITIONS: ([second], None),
                 ADDITIONS + SLIDING: ([second], 64), BOTH: ([best, second], 64)}  # fmt: skip
    for name, (folders, _) in list(rows.items()):
        if missing := [folder for folder in folders if not (folder / "model.pt").exists()]:
            harness.say(f"there is no trained model in {missing[0].relative_to(ROOT)}: {name!r} is left out")
            del rows[name]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs (default: those of the rungs, "
                                                               "results/best, and the second of the experiment best)")
    parser.add_argument("--together", action="store_true", help="mix all RUNs with each other, too")
    parser.add_argument("--order", type=int, default=6, metavar="N", help="longest n-gram (default: 6)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from one window to the next")
    parser.add_argument("--dynamic", metavar="RATE", help="let the networks learn after every 64 tokens, at this rate "
                                                          "or the best of several, such as 1e-4,2e-4")
    args = parser.parse_args()
    if not 1 <= args.order <= 20 or args.stride is not None and args.stride < 1:
        raise UserError("--order must be from 1 to 20, and --stride at least 1")
    try:
        rates = tuple(map(float, args.dynamic.split(","))) if args.dynamic is not None else ()
    except ValueError:
        rates = (math.nan,)
    if not all(0 <= rate < math.inf for rate in rates) or rates and args.stride is not None:
        raise UserError("--dynamic takes a rate of at least 0, or several with commas between them, without --stride")
    if not args.runs and (args.stride, args.together) != (None, False):
        raise UserError("--stride and --together are for runs that you name")
    groups = [args.runs] if args.together else [[run] for run in args.runs]
    rows = {" + ".join(group): (group, args.stride) for group in groups} or usual_rows(bool(rates))
    results, known = [], {}
    for run, (folders, stride) in rows.items():
        results.append(measure(folders, args.order, stride, rates, known) | {"run": run})
        harness.say(report(results[-1:]).splitlines()[-1])
    text = report(results)
    print(text, end="")
    if not args.runs and args.order == 6:
        keep("adaptive" if rates else "mixture", {"machine": machine(), "runs": results}, text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"mixture.py: {error}")
