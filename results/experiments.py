"""The experiments of this repository: what each asks, and the runs that answer it.

    python results/experiments.py --list               what there is, how many runs are done, how long they took
    python results/experiments.py ladder               make the runs of an experiment that are missing, then its table
    python results/experiments.py ladder --table       only the table, of the runs that are done
    python results/experiments.py ladder DEVICE=cuda   with constants for all of its runs
    python results/experiments.py ladder --gpu         with shapes for one GPU, on the text that data/ holds

A run is a rung with constants, as `python v3.py NAME=value ...` starts it, one after the other, in a folder of its own
below runs/experiments/. It may be stopped at any time: the next start goes on from its last checkpoint. A run that is
done leaves a file in results/experiments/NAME/ with its summary and its evaluations, and is not made again. A change of
a model that no constant makes is an edit of the rung's text, `(old, new)` as in an editor, on a copy in the folder of
the run: `diff` shows it.

Where runs are compared at equal seconds, a short trial tells the speed of each, and the number of steps follows from
it. Such runs should be made on one machine that does nothing else; at equal text losses differ by rounding only.
"""

import argparse
import copy
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402
from benchmarks.tables import machine, table  # noqa: E402
from data import load_tokens  # noqa: E402

WORK, RESULTS = ROOT / "runs" / "experiments", ROOT / "results" / "experiments"
SEEDS = (1337, 1338, 1339)
V4 = "v4_alibi_rope"
TRIAL_STEPS = 30  # of a trial for the speed
# Shapes for one GPU, of those constants that a rung has. Their data: python data/prepare.py --dataset wikitext-103-v1
GPU = {"BATCH_SIZE": 64, "MICRO_BATCH_SIZE": 64, "BLOCK_SIZE": 512, "N_LAYER": 12, "N_HEAD": 12, "N_EMBD": 768,
       "MAX_STEPS": 20_000, "DEVICE": "cuda"}  # fmt: skip


@dataclass
class Run:
    """One training: a rung with constants and edits of its text; `seconds`: trained for as long, not for MAX_STEPS."""

    name: str
    rung: str
    constants: dict = field(default_factory=dict)
    edits: tuple = ()  # ((old, new), ...)
    seconds: float = 0.0
    megabytes: float = 0.0  # trained on as much text, not for MAX_STEPS
    vocab_size: int = 0  # of a vocabulary of its own
    measure: str = ""  # what is measured of the trained model: one of MEASURES


@dataclass
class Experiment:
    """A question, the runs that answer it with each of `seeds`, and the columns of its table."""

    asks: str
    runs: list
    seeds: tuple = SEEDS
    columns: tuple = ("val_bpb", "val_word_ppl", "test_bpb", "train_seconds")


# ----------------------------------------------------------------------------------------------------------
# From v3 to v4: edits of v3's text, each on top of those before it
# ----------------------------------------------------------------------------------------------------------

NORMED_EMBEDDINGS = (
    ("x = self.embedding(idx) +", "x = F.rms_norm(self.embedding(idx), (N_EMBD,)) +"),
    ("nn.init.normal_(p, std=0.02)\n            elif",
     'nn.init.normal_(p, std=0.1 if name == "embedding.weight" else 0.02)\n            elif'),
    # embeddings and head at v4's rate, without decay
    ('''    matrices = [p for p in model.parameters() if p.dim() == 2]
''', '''    outer = [model.embedding.weight, model.head.weight]
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] + [model.position_embedding.weight]
'''),
    ('{"params": vectors, "weight_decay": 0.0}]', '''{"params": vectors, "weight_decay": 0.0},
              {"params": outer, "weight_decay": 0.0, "factor": 0.01 / LEARNING_RATE}]'''),
    ('group["lr"] = LEARNING_RATE * lr_factor(step)',
     'group["lr"] = LEARNING_RATE * lr_factor(step) * group.get("factor", 1)'),
)  # fmt: skip
RMS_NORM = (
    ("self.norm_1 = nn.LayerNorm(N_EMBD)", "self.norm_1 = nn.RMSNorm(N_EMBD, elementwise_affine=False)"),
    ("self.norm_2 = nn.LayerNorm(N_EMBD)", "self.norm_2 = nn.RMSNorm(N_EMBD, elementwise_affine=False)"),
    ("self.norm = nn.LayerNorm(N_EMBD)", "self.norm = nn.RMSNorm(N_EMBD, elementwise_affine=False)"),
)
NO_BIASES = (
    ("nn.Linear(N_EMBD, 3 * N_EMBD)", "nn.Linear(N_EMBD, 3 * N_EMBD, bias=False)"),
    ("nn.Linear(N_EMBD, N_EMBD)", "nn.Linear(N_EMBD, N_EMBD, bias=False)"),
    ("nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD), GELU(), nn.Linear(4 * N_EMBD, N_EMBD))",
     "nn.Sequential(nn.Linear(N_EMBD, 4 * N_EMBD, bias=False), GELU(), nn.Linear(4 * N_EMBD, N_EMBD, bias=False))"),
)  # fmt: skip
ZEROS = (
    ("nn.init.normal_(branch_end.weight, std=0.02 / math.sqrt(2 * N_LAYER))",
     "nn.init.zeros_(branch_end.weight)\n        nn.init.zeros_(self.head.weight)"),
    ("else 0.02)\n            elif", "else N_EMBD**-0.5)\n            elif"),
)  # fmt: skip
SCHEDULE = (
    ('''    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP_STEPS) / max(1, MAX_STEPS - WARMUP_STEPS))
''', '''    return min(1, (step + 1) / WARMUP_STEPS, (MAX_STEPS - step) / (0.5 * MAX_STEPS))
'''),
)  # fmt: skip
RELU_SQUARED = (
    ("return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))", "return F.relu(x).square()"),
)
ROPE = (
    ("import harness  # first", "from v4_alibi_rope import apply_rope, rope_table\nimport harness  # first"),
    (" + self.position_embedding.weight[: idx.size(1)]", ""),
    ('''        y = attend(q, k, v, (C // self.n_head) ** -0.5)''',
     '''        table = rope_table(torch.arange(T, device=x.device), C // self.n_head, 10000.0)
        q, k = apply_rope(q, table), apply_rope(k, table)
        y = attend(q, k, v, (C // self.n_head) ** -0.5)'''),
    ("        self.position_embedding = nn.Embedding(BLOCK_SIZE, N_EMBD)\n", ""),
    (" + [model.position_embedding.weight]", ""),
)  # fmt: skip
STEPS_TO_V4 = {  # each with those before it
    "embeddings normed, their own rate": NORMED_EMBEDDINGS,
    "RMSNorm without weights": RMS_NORM,
    "no biases": NO_BIASES,
    "zeros at the start": ZEROS,
    "linear cool-down": SCHEDULE,
    "ReLU squared": RELU_SQUARED,
    "RoPE": ROPE,
}


def from_v3_to_v4(**constants):
    """The runs: v3, v3 with more and more of v4's parts, v4. What the last one adds is Muon; with it go weight decay
    and clipping, which it does not need."""
    runs, edits = [Run("v3", "v3", constants)], ()
    for name, more in STEPS_TO_V4.items():
        edits += more
        runs.append(Run(f"+ {name}", "v3", constants, edits))
    return [*runs, Run("+ Muon: v4", V4, {**constants, "POSITION": "rope"})]


# ----------------------------------------------------------------------------------------------------------
# The experiments
# ----------------------------------------------------------------------------------------------------------

ALIBI, ROPE_ONLY = {"POSITION": "alibi"}, {"POSITION": "rope"}
VOCABULARIES = (500, 1000, 2000, 4096, 8192, 16384)
SMALLER = {"N_LAYER": 2, "N_EMBD": 128, "EVAL_INTERVAL": 250, "PATIENCE": 1000}  # sees its text many times in minutes

EXPERIMENTS = {
    "ladder": Experiment(
        "How far does each rung come on the same text?",
        [Run("v0", "v0"), Run("v1", "v1"), Run("v1_1", "v1_1"), Run("v2", "v2"), Run("v3", "v3", measure="temperature"),
         Run("v4, alibi", V4, ALIBI, measure="windows"), Run("v4, rope", V4, ROPE_ONLY, measure="windows")],
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "train_seconds", "peak_memory_mb"),
    ),
    "learning_rate": Experiment(
        "Is v3 well tuned?",
        [Run(f"{rate:g}", "v3", {"LEARNING_RATE": rate, "MAX_STEPS": 640}) for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)],
        seeds=SEEDS[:1],
    ),
    "v3_to_v4": Experiment("What makes v4 better than v3?", from_v3_to_v4(MAX_STEPS=640)),
    "positions": Experiment(
        "How does a transformer know where its tokens stand, and what happens beyond the length it was trained on?",
        [*(Run(scheme, V4, {"POSITION": scheme}, measure="windows") for scheme in ("learned", "sinusoidal", "none")),
         *(Run(f"{scheme}, {size}", V4, {"POSITION": scheme, "BLOCK_SIZE": size, "BATCH_SIZE": 4096 // size,
                                         "MICRO_BATCH_SIZE": 4096 // size}, measure="windows")
           for size in (128, 512) for scheme in ("alibi", "rope"))],
        columns=("val_bpb", "val_bpb_sliding", "test_bpb", "train_seconds"),
    ),
    "vocabulary": Experiment(
        "Which vocabulary is best, in bits per byte, after as much text, and after as many seconds?",
        [Run(f"{rung.split('_')[0]}, {size:,}, {what}", rung, ROPE_ONLY if rung == V4 else {}, vocab_size=size, **limit)
         for what, limit in (("4 MB", {"megabytes": 4}), ("120 s", {"seconds": 120}))
         for rung in ("v2", V4) for size in VOCABULARIES],
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "train_seconds"),
    ),
    "shape": Experiment(
        "Deeper or wider, after as many seconds?",
        [*(Run(f"{n} × 256", "v3", {"N_LAYER": n}, seconds=240) for n in (1, 2, 4, 6, 8)),
         *(Run(f"4 × {width}", "v3", {"N_EMBD": width}, seconds=240) for width in (128, 192, 320, 384))],
        columns=("val_bpb", "val_word_ppl", "n_params", "bytes_seen", "train_seconds"),
    ),
    "dropout": Experiment(
        "When does dropout pay? On the sample, read about ninety times.",
        [Run(f"{p:g}", "v3", {"DATA": "runs/experiments/sample", "DROPOUT": p, "MAX_STEPS": 2000, **SMALLER})
         for p in (0.0, 0.1, 0.2, 0.3)],
        columns=("val_bpb", "best_step", "test_bpb", "train_seconds"),
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------


def slug(text):
    """A text as the name of a file: "+ Muon: v4" is plus-muon-v4."""
    words = "".join(c.lower() if c.isalnum() or c in "._" else " " for c in text.replace("+", "plus").replace("×", "x"))
    return "-".join(words.split())


def result_file(experiment, run, seed, gpu):
    """Where a finished run is kept."""
    return RESULTS / (experiment + "_gpu" * gpu) / f"{slug(run.name)}-{seed}.json"


def edited(text, edits):
    """`text` with every edit made. Raises ValueError if an old passage does not stand in it exactly once."""
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"an edit finds its place {text.count(old)} times instead of once: {old.strip()!r}")
        text = text.replace(old, new)
    return text


def start(run, folder, constants):
    """Train in a process of its own, from the last checkpoint if there is one. Raises ValueError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    script = ROOT / f"{run.rung}.py"
    if run.edits:
        text = edited(script.read_text(encoding="utf-8"), run.edits)
        script = folder / script.name
        script.write_text(text, encoding="utf-8")
    arguments = [f"{name}={value}" for name, value in constants.items()]
    done = subprocess.run([sys.executable, str(script), *arguments, f"OUT_DIR={folder / 'run'}", "RESUME=True"],
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    if done.returncode:
        raise ValueError(f"the run in {folder} has ended with exit code {done.returncode}; its message stands above")


def read_run(folder):
    """(summary, evaluations) of the finished run in `folder`."""
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8")), log


def steps_in(run, seconds, folder, constants):
    """How many steps the run makes in so many seconds: from a short trial, whose first steps do not count."""
    path = folder / "steps_per_second.json"
    if not path.exists():
        trial = {**constants, "MAX_STEPS": TRIAL_STEPS, "EVAL_INTERVAL": TRIAL_STEPS, "SAMPLE_TOKENS": 1}
        shutil.rmtree(folder / "trial", ignore_errors=True)
        start(run, folder / "trial", trial)
        steps = next((folder / "trial").rglob("steps.csv")).read_text().splitlines()[1 + TRIAL_STEPS // 3 :]
        step_tokens = float(steps[0].split(",")[1]) / float(steps[0].split(",")[0])
        pace = mean(step_tokens / float(row.split(",")[5]) for row in steps)  # seconds a step
        path.write_text(json.dumps(1 / pace))
    return max(2, round(seconds * json.loads(path.read_text())))


def steps_on(megabytes, module, constants):
    """How many steps make so much of the text that the run trains on."""
    train = load_tokens(constants.get("VOCABULARY", module.VOCABULARY), constants.get("DATA", module.DATA))["train"]
    step_tokens = math.prod(constants.get(name, getattr(module, name)) for name in ("BATCH_SIZE", "BLOCK_SIZE"))
    return max(2, round(1e6 * megabytes / (step_tokens * train.n_bytes / len(train))))


def prepare(run, constants):
    """Constants for a vocabulary of the run's own size. Makes the tokens of the sample, if the run trains on it; raises
    ValueError if those of the vocabulary are missing."""
    home = ROOT / constants.get("DATA", "data")
    if home == WORK / "sample" and not home.exists():
        command = ["data/prepare.py", "--sample", "--to", str(home), "--vocabulary", "data/bpe_vocab.json"]
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            raise ValueError(f"python {' '.join(command)} has failed; its message stands above")
    if run.vocab_size in (0, 4096):  # 4,096: that of data/
        return {}
    name = f"bpe_vocab_{run.vocab_size}.json"
    if not (home / f"train_ids_{run.vocab_size}.pt").exists():
        raise ValueError(f"there are no tokens of a vocabulary of {run.vocab_size:,}; to make them: python "
                         f"data/prepare.py --vocab-size {run.vocab_size} (and --from DIR, where the text is)")
    return {"VOCABULARY": name}


def make(name, run, seed, own, gpu):
    """Make one run of an experiment, unless it is done, and keep what it found."""
    path = result_file(name, run, seed, gpu)
    if path.exists():
        return
    module = importlib.import_module(run.rung)
    constants = {"EVAL_INTERVAL": 160} | {k: v for k, v in GPU.items() if gpu and hasattr(module, k)} | run.constants
    constants |= {"SEED": seed} | prepare(run, constants)
    folder = WORK / path.relative_to(RESULTS).with_suffix("")
    if run.seconds or run.megabytes:
        steps = steps_in(run, run.seconds, folder, constants | own) if run.seconds else (
            steps_on(run.megabytes, module, constants))  # fmt: skip
        constants |= {"MAX_STEPS": steps, "EVAL_INTERVAL": max(1, math.ceil(steps / 4))}
    constants |= own
    if not (folder / "run" / "summary.json").exists():
        start(run, folder, constants)
    summary, log = read_run(folder)
    summary.pop("schemes", None)
    found = {"run": run.name, "machine": machine(), "date": time.strftime("%Y-%m-%d"),
             "command": f"python {run.rung}.py " + " ".join(f"{k}={v}" for k, v in constants.items()),
             "edits": [list(edit) for edit in run.edits], "summary": summary, "log": log,
             "measured": measure(run, folder)}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


# ----------------------------------------------------------------------------------------------------------
# What is measured of a trained model
# ----------------------------------------------------------------------------------------------------------


def first_part(tokens, tokenizer, n):
    """The first `n` tokens of a split, with as many bytes and words as they have."""
    part = copy.copy(tokens)
    part.ids = tokens.ids[:n]
    text = tokenizer.decode_bytes(part.ids[1:].tolist())
    part.n_bytes, part.n_words = len(text), len(text.split()) + text.count(b"\n")
    return part


def windows(module, model, tokens, tokenizer):
    """Bits per byte on the first 65,536 tokens of the validation split in windows of 1 to 16 times the training length,
    side by side and sliding by half the training length; and, in windows of 4 times, by place in the window.

    Windows side by side gain from length because fewer tokens stand early in a window. Sliding ones do not: all but the
    first tokens have at least size - stride before them.
    """
    size, part = model.block_size, first_part(tokens["val"], tokenizer, WINDOW_TOKENS)
    sizes = [size * times for times in ((1,) if getattr(model, "position", "") == "learned" else (1, 2, 4, 8, 16))]
    found = {"side_by_side": {n: module.evaluate(model, part, size=n)["bpb"] for n in sizes},
             "sliding": {n: module.evaluate(model, part, stride=size // 2, size=n)["bpb"] for n in sizes}}  # fmt: skip
    T, ids = sizes[min(2, len(sizes) - 1)], part.ids.long()
    n, nats = (len(ids) - 1) // T, torch.zeros(T, dtype=torch.double)
    with torch.no_grad():
        for i in range(0, n * T, T):
            logits, y = model.eval()(ids[None, i : i + T].to(module.DEVICE))[0], ids[i + 1 : i + T + 1]
            nats += F.cross_entropy(logits, y.to(module.DEVICE), reduction="none").double().cpu() / n
    found["nats_by_place"] = nats.view(-1, 32).mean(1).tolist()  # 32 places in each
    return found


class Tempered(torch.nn.Module):
    """A model whose logits are divided by a temperature."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature, self.block_size = model, temperature, model.block_size

    def forward(self, idx):
        return self.model(idx) / self.temperature


def temperature(module, model, tokens, tokenizer):
    """Temperature scaling (Guo et al. 2017, arXiv:1706.04599, section 4.2): that of the least loss on the first 65,536
    tokens of the validation split, and the metrics of the test split before and after."""
    tried, part = [0.8 + 0.02 * k for k in range(21)], tokens["val"].ids[:WINDOW_TOKENS].long()
    T, nats = model.block_size, torch.zeros(len(tried), dtype=torch.double)
    with torch.no_grad():
        for i in range(0, len(part) - T, T):
            logits = model.eval()(part[None, i : i + T].to(module.DEVICE))[0]
            y = part[i + 1 : i + T + 1].to(module.DEVICE)
            nats += torch.tensor([F.cross_entropy(logits / t, y).item() for t in tried])
    best = tried[int(nats.argmin())]
    return {"temperature": best, "test": module.evaluate(model, tokens["test"]),
            "test_tempered": module.evaluate(Tempered(model, best), tokens["test"])}  # fmt: skip


WINDOW_TOKENS = 65_536  # of the validation split, for what costs a pass in many windows
MEASURES = {"windows": windows, "temperature": temperature}


def measure(run, folder):
    """What the run's MEASURE finds of the model in `folder`; None without one."""
    if not run.measure:
        return None
    home = folder / "run" / run.constants["POSITION"] if "POSITION" in run.constants else folder / "run"
    model, tokenizer = harness.load(str(home))
    constants = json.loads((home / "summary.json").read_text(encoding="utf-8"))["hyperparameters"]
    tokens = load_tokens(constants["VOCABULARY"], constants["DATA"])
    return MEASURES[run.measure](importlib.import_module(run.rung), model, tokens, tokenizer)


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------

FORMATS = {"val_word_ppl": "{:,.1f}", "train_seconds": "{:,.0f}", "peak_memory_mb": "{:,.0f}", "n_params": "{:,.0f}",
           "bytes_seen": "{:,.0f}", "best_step": "{:,.0f}"}  # fmt: skip
TITLES = {"val_bpb": "val bpb", "val_bpb_sliding": "val bpb, sliding", "val_word_ppl": "val word ppl",
          "test_bpb": "test bpb", "train_seconds": "training, s", "peak_memory_mb": "peak memory, MB",
          "n_params": "parameters", "bytes_seen": "bytes seen", "best_step": "best step"}  # fmt: skip


def spread(values, form="{:.4f}"):
    """The mean of values, and where they differ the lowest and highest."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    low, middle, high = (form.format(x) for x in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def report(name, gpu=False):
    """The finished runs of an experiment as Markdown; None if there are none."""
    experiment, rows, seeds, machines = EXPERIMENTS[name], [], set(), set()
    for run in experiment.runs:
        paths = [result_file(name, run, seed, gpu) for seed in experiment.seeds]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        if not found:
            continue
        seeds |= {one["summary"]["seed"] for one in found}
        machines |= {one["machine"] for one in found}
        cells = [spread([one["summary"].get(k) for one in found], FORMATS.get(k, "{:.4f}")) for k in experiment.columns]
        rows.append([run.name, len(found), *cells])
    if not rows:
        return None
    head = ["run", "seeds", *(TITLES[column] for column in experiment.columns)]
    return (f"{table(head, rows)}\n{experiment.asks} Mean (lowest to highest) over the seeds "
            f"{', '.join(map(str, sorted(seeds)))}. Made on: {'; '.join(sorted(machines))}.\n")  # fmt: skip


def list_all():
    """Print what each experiment asks, and how much of it is done."""
    for name, experiment in EXPERIMENTS.items():
        files = [result_file(name, run, seed, False) for run in experiment.runs for seed in experiment.seeds]
        done = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]
        minutes = sum(one["summary"]["train_seconds"] for one in done) / 60
        took = f", {minutes:,.0f} minutes of training" if done else ""
        print(f"{name:14} {len(done):2} of {len(files)} runs{took}\n{'':14} {experiment.asks}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="The experiments of this repository.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", nargs="?", choices=list(EXPERIMENTS), help="of an experiment")
    parser.add_argument("constants", nargs="*", metavar="NAME=value", help="constants for all of its runs")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--table", action="store_true", help="make no run, only the table")
    parser.add_argument("--gpu", action="store_true", help="shapes for one GPU")
    args = parser.parse_args(argv)
    if args.list or args.name is None:
        return list_all()
    own = dict(argument.partition("=")[::2] for argument in args.constants)
    experiment = EXPERIMENTS[args.name]
    for seed in () if args.table else experiment.seeds:  # all runs with the first seed come first
        for run in experiment.runs:
            make(args.name, run, seed, own, args.gpu)
    text = report(args.name, args.gpu)
    if text is None:
        raise ValueError(f"no run of {args.name} is done; without --table they are made")
    print(text, end="")
    (RESULTS / (args.name + "_gpu" * args.gpu) / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("experiments.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"experiments.py: {error}")
