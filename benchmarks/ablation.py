"""What parts of v4 are worth: the loss after equal time with the part, and without it.

    python benchmarks/ablation.py             5 variants, 3 seeds, 100 s of training each, about 35 minutes
    python benchmarks/ablation.py --seeds 1   with the first seed only
    python benchmarks/ablation.py --quick     one seed, 5 s each: a test of the program, not a measurement

Every variant is v4 with RoPE and one change. It trains for the same number of seconds (evaluation, compilation and
start-up not counted), its learning rates falling with the share of the time instead of the share of the steps, and is
evaluated over the whole validation split. Each run is a process of its own, nothing runs beside it, and the seeds take
turns with the variants. Finished runs are kept in results/benchmarks/ablation.json; a run that is started again goes on
from there, unless v4 has changed.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import v4_alibi_rope as v4  # noqa: E402
from benchmarks.steps import run_steps  # noqa: E402
from benchmarks.tables import RESULTS, machine, table  # noqa: E402
from bpe_tokenizer import BPETokenizer  # noqa: E402
from data import load_tokens, vocabulary_file  # noqa: E402

SEEDS, SECONDS = (1337, 1338, 1339), 100


# ----------------------------------------------------------------------------------------------------------
# Variants: each changes the module v4 before a model is made
# ----------------------------------------------------------------------------------------------------------


def as_it_is():
    pass


def adamw_for_all():
    """AdamW for the matrices, at v3's learning rate of 2e-3; 4e-3 was worse."""

    def make_optimizers(model):
        blocks = [p for p in model.blocks.parameters()]
        others = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
        groups = [{"params": blocks, "lr": 2e-3}, {"params": others, "lr": v4.LEARNING_RATE_ADAMW}]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for group in adamw.param_groups:
            group["initial_lr"] = group["lr"]
        return (adamw,)

    v4.make_optimizers = make_optimizers


def no_zeros():
    """Branches and head start at random instead of at zero."""
    zeros = nn.init.zeros_
    nn.init.zeros_ = lambda p: nn.init.normal_(p, std=v4.N_EMBD**-0.5) if p.dim() == 2 else zeros(p)


def query_key_norm():
    """Queries and keys divided by their root mean square (Henry et al. 2020, arXiv:2010.04245)."""
    apply_rope = v4.apply_rope
    v4.apply_rope = lambda x, table: apply_rope(v4.norm(x).type_as(x), table)  # the angles do not change the length


def gelu():
    """GELU as in v3, instead of ReLU squared."""

    def forward(self, x):
        x = self.fc(x)
        return self.proj(x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)))

    v4.MLP.forward = forward


VARIANTS = {
    "v4": as_it_is,
    "AdamW instead of Muon": adamw_for_all,
    "random instead of zero initialization of branches and head": no_zeros,
    "GELU instead of ReLU squared": gelu,
    "added: normalized queries and keys": query_key_norm,
}


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------


def train(variant, seed, seconds):
    """Train a variant for some seconds. Returns the metrics over the validation split, steps and tokens seen."""
    v4.SEED, v4.POSITION, clock = seed, "rope", {"spent": 0.0, "steps": 0}
    VARIANTS[variant]()
    tokens = load_tokens(v4.VOCABULARY)
    torch.manual_seed(seed)
    model = v4.LanguageModel(BPETokenizer.load(vocabulary_file(v4.VOCABULARY)).vocab_size).to(v4.DEVICE)

    def lr_factor(step):
        return min(1, (step + 1) / v4.WARMUP_STEPS, (1 - clock["spent"] / seconds) / v4.COOLDOWN)

    def on_step(run):
        clock["spent"], clock["steps"] = run.seconds, clock["steps"] + 1
        return run.seconds < seconds

    v4.lr_factor = lr_factor
    run_steps(v4, model, tokens["train"].ids, on_step)
    metrics = {f"val_{k}": v for k, v in v4.evaluate(model, tokens["val"]).items()}
    return {"steps": clock["steps"], "tokens_seen": clock["steps"] * v4.BATCH_SIZE * v4.BLOCK_SIZE, **metrics}


def report(runs, seeds, seconds):
    rows = []
    for variant in VARIANTS:
        some = [runs[f"{variant}, seed {seed}"] for seed in seeds if f"{variant}, seed {seed}" in runs]
        if len(some) < len(seeds):  # not yet run
            continue
        bpb = [run["val_bpb"] for run in some]
        rate = mean(run["tokens_seen"] for run in some) / seconds
        rows.append([variant, f"{mean(bpb):.4f}", f"{min(bpb):.4f} to {max(bpb):.4f}", f"{rate:,.0f}"])
    number = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return (f"Validation bits per byte after {seconds} s of training, mean of {number} (lowest to highest):\n\n"
            f"{table(['variant', 'val bpb', '', 'tokens/s'], rows)}\nMachine: {machine()}.\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 5 s each")
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=3, help="how many seeds")
    parser.add_argument("--run", nargs=3, metavar=("VARIANT", "SEED", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        variant, seed, seconds = args.run
        print(json.dumps(train(variant, int(seed), float(seconds))))
        return
    seeds, seconds = (SEEDS[:1], 5) if args.quick else (SEEDS[: args.seeds], SECONDS)
    path = RESULTS / "ablation.json"
    version = hashlib.sha256((ROOT / "v4_alibi_rope.py").read_bytes()).hexdigest()[:16]
    stored = json.loads(path.read_text()) if path.exists() and not args.quick else {}
    runs = stored["runs"] if stored.get("version") == version and stored.get("seconds") == seconds else {}
    for seed in seeds:
        for variant in VARIANTS:
            name = f"{variant}, seed {seed}"
            if name in runs:
                continue
            command = [sys.executable, __file__, "--run", variant, str(seed), str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"ablation.py: {name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            runs[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: val bpb {runs[name]['val_bpb']:.4f}, {runs[name]['tokens_seen']:,} tokens", flush=True)
            if not args.quick:
                RESULTS.mkdir(parents=True, exist_ok=True)
                content = {"version": version, "seconds": seconds, "machine": machine(), "runs": runs}
                path.write_text(json.dumps(content, indent=1) + "\n")
    text = report(runs, seeds, seconds)
    print("\n" + text)
    if not args.quick:
        path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
