"""The experiments of this repository: what each asks, and the runs that answer it.

    python results/experiments.py --list                what there is, and how many runs are done
    python results/experiments.py ladder positions      make the runs of experiments that are missing, then their tables
    python results/experiments.py ladder --table        only the table, of the runs that are done
    python results/experiments.py ladder DEVICE=cuda    with constants for all of its runs
    python results/experiments.py ladder --jobs 8       eight runs at a time: small models leave a GPU room
    python results/experiments.py ladder --gpu          with shapes for one GPU, on the text that data/ holds
    python results/experiments.py shape --pace          measure how long steps take here, see below

A run is a rung with constants, as `python v3.py NAME=value ...` starts it, in a folder of its own below
runs/experiments/. It may be stopped at any time: the next start goes on from its last checkpoint. A run that is done
leaves a file in results/experiments/NAME/ with its summary and its evaluations, and is not made again; what two
experiments have in common is made once. A change of a model that no constant makes is an edit of the rung's text,
`(old, new)` as in an editor, on a copy in the folder of the run: `diff` shows it.

Where runs are compared at equal seconds, results/experiments/pace.json tells how long a step of each takes: measured by
short trials, one after the other, on one machine that does nothing else, all compared ones anew with --pace. The number
of steps follows from it, and with it the loss, on whatever machine the run itself is made: between machines losses
differ by rounding only.
"""

import argparse
import contextlib
import copy
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402
from benchmarks.tables import machine, table  # noqa: E402
from data import load_tokens, token_file  # noqa: E402

WORK, RESULTS = ROOT / "runs" / "experiments", ROOT / "results" / "experiments"
SEEDS = (1337, 1338, 1339)
V4 = "v4_alibi_rope"
TRIAL_STEPS, WARM_UP = 24, 8  # of a trial for the pace, and those of them that do not count
COSTS = ("VOCABULARY", "BATCH_SIZE", "MICRO_BATCH_SIZE", "BLOCK_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "POSITION",
         "DROPOUT")  # constants that the pace depends on
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
    later: dict = field(default_factory=dict)  # constants of all seeds but the first

    def training(self):
        """What makes it the same training as another run: everything but its name and what is measured of it."""
        return self.rung, sorted(self.constants.items()), self.edits, self.seconds, self.megabytes, self.vocab_size


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


def from_v3_to_v4():
    """The runs: v3, v3 with more and more of v4's parts, v4; and what made most, alone. What v4 adds is Muon; with it
    go weight decay and clipping, which it does not need."""
    runs, edits = [Run("v3", "v3")], ()
    for name, more in STEPS_TO_V4.items():
        edits += more
        runs.append(Run(f"+ {name}", "v3", edits=edits))
    return [*runs, Run("+ Muon: v4", V4, {"POSITION": "rope"}), Run("v3, only RoPE", "v3", edits=ROPE[:-1])]


# ----------------------------------------------------------------------------------------------------------
# The experiments
# ----------------------------------------------------------------------------------------------------------

ALIBI, ROPE_ONLY = {"POSITION": "alibi"}, {"POSITION": "rope"}
VOCABULARIES = (500, 1000, 2000, 4096, 8192, 16384)
LADDER_MB = 18.57  # of text that every rung sees by default
SMALLER = {"N_LAYER": 2, "N_EMBD": 128}


def vocabularies():
    """v2 and v4 with each vocabulary, on as much text as the ladder and for as many seconds."""
    runs = []
    for rung, constants in (("v2", {}), (V4, ROPE_ONLY)):
        for what, limit in (("18.6 MB", {"megabytes": LADDER_MB}), ("300 s", {"seconds": 300})):
            for size in VOCABULARIES:
                default = size == 4096 and "megabytes" in limit
                more = {} if default else {"vocab_size": size, **limit}
                runs.append(Run(f"{rung.split('_')[0]}, {what}, {size:,}", rung, constants, **more))
    return runs


def lengths():
    """v4 with a window of another length, as many tokens a step."""
    return [Run(f"{scheme}, {size}", V4, {"POSITION": scheme} if size == 256 else
                {"POSITION": scheme, "BLOCK_SIZE": size, "BATCH_SIZE": 4096 // size, "MICRO_BATCH_SIZE": 4096 // size},
                measure="windows")
            for scheme in ("alibi", "rope") for size in (128, 256, 512)]  # fmt: skip


def dropouts():
    """v3 on texts that it reads often: until it has long been overfitted, where it can be. On a tenth, which takes
    longer than the sample, the first seed shows that; the others end three evaluations after their best one."""
    texts = {"the sample, 89 times": {"DATA": "runs/experiments/sample", "MAX_STEPS": 2000, **SMALLER},
             "a tenth, 20 times": {"DATA": "runs/experiments/tenth", "MAX_STEPS": 1480},
             "all, 5 times": {"MAX_STEPS": 3715}}  # fmt: skip
    return [Run(f"{text}, {p:g}", "v3", {**constants, "DROPOUT": p, "PATIENCE": 1000},
                later={"PATIENCE": 3} if text.startswith("a tenth") else {})
            for text, constants in texts.items() for p in (0.0, 0.1, 0.2, 0.3)]  # fmt: skip


EXPERIMENTS = {
    "ladder": Experiment(
        "How far does each rung come on the same text?",
        [Run("v0", "v0"), Run("v1", "v1"), Run("v1_1", "v1_1"), Run("v2", "v2"), Run("v3", "v3", measure="temperature"),
         Run("v4, alibi", V4, ALIBI, measure="windows"), Run("v4, rope", V4, ROPE_ONLY, measure="windows")],
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "pace"),
    ),
    "learning_rate": Experiment(
        "Is v3 well tuned?",
        [Run(f"{rate:g}", "v3", {"LEARNING_RATE": rate} if rate != 2e-3 else {})
         for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)],
        columns=("val_bpb", "val_word_ppl"),
    ),
    "v3_to_v4": Experiment(
        "What makes v4 better than v3?", from_v3_to_v4(), columns=("val_bpb", "val_word_ppl", "pace")
    ),
    "positions": Experiment(
        "How does a transformer know where its tokens stand, and what happens beyond the length it was trained on?",
        [*(Run(f"{scheme}, 256", V4, {"POSITION": scheme}, measure="windows")
           for scheme in ("learned", "sinusoidal", "none")), *lengths()],
        columns=("val_bpb", "val_bpb_sliding", "test_bpb", "pace"),
    ),
    "vocabulary": Experiment(
        "Which vocabulary is best, in bits per byte, after as much text, and after as many seconds?", vocabularies(),
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "n_params", "pace"),
    ),
    "shape": Experiment(
        "Deeper or wider, after as many seconds?",
        [*(Run(f"{n} × 256", "v3", {} if n == 4 else {"N_LAYER": n}, seconds=600) for n in (1, 2, 4, 6, 8)),
         *(Run(f"4 × {width}", "v3", {"N_EMBD": width}, seconds=600) for width in (128, 192, 320, 384))],
        columns=("val_bpb", "val_word_ppl", "n_params", "bytes_seen", "pace"),
    ),
    "beside": Experiment(
        "How good are v2, v3 and v4 after ten minutes, beside what people would run instead (benchmarks/beside.py)?",
        [Run("v2", "v2", seconds=600), Run("v3", "v3", seconds=600), Run("v4, rope", V4, ROPE_ONLY, seconds=600)],
        columns=("val_bpb", "val_word_ppl", "pace"),
    ),
    "dropout": Experiment(
        "When does dropout pay?", dropouts(), columns=("val_bpb", "best_step", "steps", "test_bpb"),
    ),
}  # fmt: skip


TIED = (
    ("        for name, p in self.named_parameters():\n", """        self.head.weight = self.embedding.weight
        for name, p in self.named_parameters():\n"""),
    ('std=0.1 if name == "embedding.weight"', 'std=0.02 if name == "embedding.weight"'),
)
DROPOUT_INSIDE = (
    ("        self.proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=False)\n",
     "        self.proj = nn.Linear(4 * N_EMBD, N_EMBD, bias=False)\n        self.dropout = Dropout(DROPOUT)\n"),
    ("self.proj(F.relu(self.fc(x)).square())", "self.proj(self.dropout(F.relu(self.fc(x)).square()))"),
)


def weight_decay(rate):
    """Edits that let the matrices of the blocks decay by `rate` times the learning rate."""
    return (
        ("DROPOUT = 0.0  #", f"WEIGHT_DECAY = {rate}  # of the matrices of the blocks\nDROPOUT = 0.0  #"),
        ("                p.sub_(u, alpha", '''                p.mul_(1 - group["lr"] * WEIGHT_DECAY)
                p.sub_(u, alpha'''),
    )  # fmt: skip


def two_hours():
    """v4 within 7,200 s, each run another choice; those with edits have the steps of the run without."""
    usual = {"POSITION": "rope", "PATIENCE": 1000, "EXTRAPOLATION": "1,"}
    mild, runs = usual | {"DROPOUT": 0.1}, []
    for name, constants in {
        "dropout 0": usual, "dropout 0.1": mild, "dropout 0.2": usual | {"DROPOUT": 0.2},
        "windows of 512": mild | {"BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8},
        "windows of 1,024": mild | {"BLOCK_SIZE": 1024, "BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 4},
        "6 × 256": mild | {"N_LAYER": 6}, "4 × 320": mild | {"N_EMBD": 320},
        "3 × 384": mild | {"N_LAYER": 3, "N_EMBD": 384}, "momentum 0.95": mild | {"MOMENTUM": 0.95},
        "rate of Muon 0.02": mild | {"LEARNING_RATE": 0.02},
        "rate of AdamW 0.005": mild | {"LEARNING_RATE_ADAMW": 0.005},
    }.items():  # fmt: skip
        runs.append(Run(name, V4, constants, seconds=7200))
    runs.append(Run("vocabulary of 8,192", V4, mild, seconds=7200, vocab_size=8192))
    edits = {"weight decay 0.2": weight_decay(0.2), "embeddings tied": TIED, "dropout in the MLP": DROPOUT_INSIDE}
    runs += [Run(name, V4, mild | {"MAX_STEPS": 6500}, edit) for name, edit in edits.items()]
    longer = mild | {"BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "MAX_STEPS": 6495}
    for name, constants in {"rate of AdamW 0.015": {"LEARNING_RATE_ADAMW": 0.015}, "momentum 0.8": {"MOMENTUM": 0.8},
                            "rate of Muon 0.04": {"LEARNING_RATE": 0.04}, "cool-down 0.8": {"COOLDOWN": 0.8},
                            "dropout 0.15": {"DROPOUT": 0.15}}.items():  # fmt: skip
        runs.append(Run(f"windows of 512, {name}", V4, longer | constants))
    runs.append(Run("windows of 512, dropout in the MLP", V4, longer, DROPOUT_INSIDE))
    runs.append(Run("windows of 512, weight decay 0.02", V4, longer, weight_decay(0.02)))
    return runs


EXPERIMENTS["two_hours"] = Experiment(
    "How good a model of WikiText-2 do two cores make in two hours?", two_hours(), seeds=SEEDS[:1],
    columns=("val_bpb", "val_bpb_sliding", "val_word_ppl_sliding", "steps", "n_params"),
)  # fmt: skip


BEST = {"POSITION": "rope", "BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "DROPOUT": 0.1, "STRIDE": 64,
        "PATIENCE": 1000, "MAX_STEPS": 5500}  # about two hours of two Zen 3 cores  # fmt: skip
EXPERIMENTS["best"] = Experiment(
    "What does the best choice of two_hours make of two hours, and of reading on?",
    [Run("v4, two hours", V4, BEST, measure="best")], seeds=SEEDS[:1],
    columns=("val_bpb", "val_bpb_sliding", "val_word_ppl_sliding", "steps", "train_seconds"),
)  # fmt: skip


def owner(run):
    """(name of an experiment, its run): the first that is the same training as `run`."""
    same = [(name, other) for name, experiment in EXPERIMENTS.items() for other in experiment.runs
            if other.training() == run.training()]  # fmt: skip
    return same[0] if same else (None, run)


# ----------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------


def slug(text):
    """A text as the name of a file: "+ Muon: v4" is plus-muon-v4."""
    words = "".join(c.lower() if c.isalnum() or c in "._" else " " for c in text.replace("+", "plus").replace("×", "x"))
    return "-".join(words.split())


def result_file(run, seed, gpu=False):
    """Where a finished run is kept: in the folder of the first experiment that has it."""
    experiment, run = owner(run)
    return RESULTS / (experiment + "_gpu" * gpu) / f"{slug(run.name)}-{seed}.json"


def edited(text, edits):
    """`text` with every edit made. Raises ValueError if an old passage does not stand in it exactly once."""
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"an edit finds its place {text.count(old)} times instead of once: {old.strip()!r}")
        text = text.replace(old, new)
    return text


def command(run, folder, constants):
    """What starts the run in `folder`; writes the edited rung there."""
    folder.mkdir(parents=True, exist_ok=True)
    script = ROOT / f"{run.rung}.py"
    if run.edits:
        text = edited(script.read_text(encoding="utf-8"), run.edits)
        script = folder / script.name
        script.write_text(text, encoding="utf-8")
    arguments = [f"{name}={value}" for name, value in constants.items()]
    out = os.path.relpath(folder / "run", ROOT)  # it is kept in the summary, where the place of this machine is no use
    return [sys.executable, str(script), *arguments, f"OUT_DIR={out}", "RESUME=True"]


def environment(jobs=1):
    """Of a run that shares the processor with others."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    return {**os.environ, "PYTHONPATH": str(ROOT), **threads}


class Stopped(KeyboardInterrupt):
    """SIGTERM. Unlike Ctrl-C it reaches this process only, not those that it has started."""


def stop(*_):
    raise Stopped


RUNNING, HALTED = [], []  # the rung that this process has started, the signals to stop that it has got


def halt(signum, _frame):
    HALTED.append(signum)
    for process in RUNNING if signum == signal.SIGTERM else ():  # Ctrl-C reaches it by itself
        process.terminate()


def as_worker():
    """In a process that make_all has started: what stops it ends the rung and begins no other."""
    signal.signal(signal.SIGINT, halt)
    signal.signal(signal.SIGTERM, halt)


def start(run, folder, constants, jobs=1):
    """Train in a process of its own, from the last checkpoint if there is one. Raises ValueError if it fails. If this
    process is stopped, the rung finishes its step and saves first."""
    with contextlib.ExitStack() as stack:
        screen = None
        if jobs > 1:  # the lines of several runs would be mixed up
            folder.mkdir(parents=True, exist_ok=True)
            screen = stack.enter_context(open(folder / "screen.txt", "w", encoding="utf-8"))
        process = subprocess.Popen(command(run, folder, constants), cwd=ROOT, env=environment(jobs), stdout=screen,
                                   stderr=screen)  # fmt: skip
        RUNNING[:] = [process]
        try:
            process.wait()
        except KeyboardInterrupt as reason:
            if isinstance(reason, Stopped):
                process.terminate()
            process.wait()
            raise
    if process.returncode:
        where = f"its message stands in {folder / 'screen.txt'}" if screen else "its message stands above"
        raise ValueError(f"the run in {folder} has ended with exit code {process.returncode}; {where}")


def read_run(folder):
    """(summary, evaluations) of the finished run in `folder`."""
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8")), log


def home_of(run, folder):
    """Where the run in `folder` has left its model and its sample."""
    return folder / "run" / run.constants["POSITION"] if "POSITION" in run.constants else folder / "run"


def steps_on(megabytes, module, constants):
    """How many steps make so much of the text that the run trains on."""
    train = load_tokens(constants.get("VOCABULARY", module.VOCABULARY), constants.get("DATA", module.DATA))["train"]
    step_tokens = math.prod(constants.get(name, getattr(module, name)) for name in ("BATCH_SIZE", "BLOCK_SIZE"))
    return max(2, round(1e6 * megabytes / (step_tokens * train.n_bytes / len(train))))


def make_tenth(home):
    """The token files of data/ with the first tenth of the training text only, in the folder `home`."""
    home.mkdir(parents=True, exist_ok=True)
    tokenizer = harness.BPETokenizer.load(ROOT / "data" / "bpe_vocab.json")
    for split in ("val", "test", "train"):  # the last one is looked for
        content = torch.load(token_file(split, "bpe_vocab.json"), weights_only=True)
        content["dataset"] = f"a tenth of {content['dataset']}"
        if split == "train":
            content["ids"] = content["ids"][: len(content["ids"]) // 10].clone()
            text = tokenizer.decode_bytes(content["ids"].tolist())
            content |= {"n_tokens": len(content["ids"]), "n_bytes": len(text),
                        "n_words": len(text.split()) + text.count(b"\n")}  # fmt: skip
        torch.save(content, home / f"{split}_ids.pt")
    shutil.copyfile(ROOT / "data" / "bpe_vocab.json", home / "bpe_vocab.json")


def prepare(runs):
    """Make the texts of the runs that are parts of others. Raises OSError and ValueError if tokens are missing."""
    homes = {run.constants.get("DATA") for run in runs}
    sample, tenth = WORK / "sample", WORK / "tenth"
    if "runs/experiments/sample" in homes and not sample.exists():
        make_it = ["data/prepare.py", "--sample", "--to", str(sample), "--vocabulary", "data/bpe_vocab.json"]
        if subprocess.run([sys.executable, *make_it], cwd=ROOT).returncode:
            raise ValueError(f"python {' '.join(make_it)} has failed; its message stands above")
    load_tokens("bpe_vocab.json")
    if "runs/experiments/tenth" in homes and not (tenth / "bpe_vocab.json").exists():
        make_tenth(tenth)
    for size in sorted({run.vocab_size for run in runs} - {0, 4096}):
        load_tokens(f"bpe_vocab_{size}.json")


def check_texts(todo, own, gpu=False):
    """Raises ValueError if a run of `todo`, [(run, seed)], would read another text than those it is compared with."""
    for run, seed in todo:
        name, home, constants = owner(run)[0], run.constants.get("DATA", "data"), all_constants(run, seed, gpu) | own
        done = {one["summary"]["dataset"] for other in EXPERIMENTS[name].runs
                if other.constants.get("DATA", "data") == home
                for one in read_found(other, EXPERIMENTS[name].seeds, gpu)}  # fmt: skip
        here = constants.get("DATA", "data")
        vocabulary = constants.get("VOCABULARY", importlib.import_module(run.rung).VOCABULARY)
        if done and (text := load_tokens(vocabulary, here)["train"].dataset) not in done:
            folder = f"results/experiments/{name}{'_gpu' * gpu}"
            mend = ("python data/prepare.py --from DIR, the folder with that text, mends it" if here == "data"
                    else f"remove {here}, which is made again" if here.startswith("runs/experiments/")
                    else "leave DATA out")  # fmt: skip
            raise ValueError(f"{here} holds {text!r}, and the runs in {folder} are of {', '.join(map(repr, done))}: "
                             f"{mend}; or move {folder} aside to begin anew")  # fmt: skip


def all_constants(run, seed, gpu=False):
    """The constants of a run but for the number of its steps."""
    module = importlib.import_module(run.rung)
    constants = {k: v for k, v in GPU.items() if gpu and hasattr(module, k)} | run.constants | {"SEED": seed}
    constants |= run.later if seed in SEEDS[1:] else {}
    if run.vocab_size not in (0, 4096):  # 4,096: that of data/
        constants["VOCABULARY"] = f"bpe_vocab_{run.vocab_size}.json"
    return constants


def key_of_pace(run):
    """What stands for the run in pace.json: the rung, and all that a step's time depends on."""
    constants = all_constants(run, 0)
    words = [run.rung, *(f"{name}={constants[name]}" for name in COSTS if name in constants)]
    return " ".join([*words, *([f"({run.name})"] if run.edits else [])])


def read_pace():
    """{"machine", "date", "seconds": {key_of_pace: seconds a step}, "peak_mb": {key_of_pace: memory of the process}}"""
    path = RESULTS / "pace.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seconds": {}, "peak_mb": {}}


def pace_of(run):
    """Seconds a step of `run`. Raises ValueError if that was not measured."""
    found = read_pace()["seconds"].get(key_of_pace(run))
    if found is None:
        name, _ = owner(run)
        raise ValueError(f"how long a step of {run.name} takes was not measured yet: python results/experiments.py "
                         f"{name} --pace")
    return found


def trial(run):
    """(seconds a step, peak memory in MB) of a run that is broken off after some steps: their median, and the most that
    its process held."""
    folder = WORK / "pace"
    shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.Popen(command(run, folder, {**all_constants(run, SEEDS[0]), "MAX_STEPS": 10_000,
                                                     "DEVICE": "cpu"}),
                               cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        while process.poll() is None:
            time.sleep(0.2)
            for path in (folder / "run").rglob("steps.csv"):
                rows = path.read_text(encoding="utf-8").splitlines()[1:-1]
                if len(rows) >= TRIAL_STEPS:
                    rows = [list(map(float, row.split(","))) for row in rows[WARM_UP:TRIAL_STEPS]]
                    peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]
                    return median(tokens / step / rate for step, tokens, *_, rate in rows), int(peak) * 1024 / 1e6
        raise ValueError(f"the trial of {run.name} has ended with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def libraries_mb():
    """Memory in MB of a process that has loaded what a rung needs, before it has a model."""
    code = "import v1, torch._dynamo, harness; print(harness.peak_memory_mb('cpu'))"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)


def measure_pace(runs, again=True):
    """Measure the pace of `runs`, one after the other, and keep it; without `again` only what is missing. On another
    machine than before all that was kept goes. Raises ValueError if that would be so without `again`."""
    kept = read_pace()
    if not again and kept.get("machine", machine()) != machine():
        raise ValueError("pace.json was measured on another machine; measure it whole with --pace")
    if kept.get("machine", machine()) != machine():  # its times stand beside none of another one
        kept = {"seconds": {}, "peak_mb": {}}
    for key, run in {key_of_pace(run): run for run in runs}.items():
        if again or key not in kept["seconds"]:
            kept["libraries_mb"] = kept.get("libraries_mb") or round(libraries_mb(), 1)
            seconds, peak_mb = trial(run)
            kept["seconds"][key], kept["peak_mb"][key] = round(seconds, 5), round(peak_mb, 1)
            kept |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
            write(RESULTS / "pace.json", json.dumps(kept, indent=1) + "\n")
            print(f"{kept['seconds'][key]:8.4f} s a step: {key}", flush=True)


def write(path, text):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def make(run, seed, own, gpu=False, jobs=1):
    """Make one run of an experiment, unless it is done, and keep what it found. Returns what went wrong, or None."""
    path = result_file(run, seed, gpu)
    if path.exists() or HALTED:
        return None
    try:
        run = owner(run)[1]
        module = importlib.import_module(run.rung)
        constants = all_constants(run, seed, gpu)
        if run.seconds:
            constants["MAX_STEPS"] = max(2, round(run.seconds / pace_of(run)))
        elif run.megabytes:
            constants["MAX_STEPS"] = steps_on(run.megabytes, module, constants)
        constants |= {k: v for k, v in own.items() if hasattr(module, k)}
        constants.setdefault("EVAL_INTERVAL", math.ceil(int(constants.get("MAX_STEPS", module.MAX_STEPS)) / 8))
        folder = WORK / path.relative_to(RESULTS).with_suffix("")
        began = time.time()
        if not (folder / "run" / "summary.json").exists():
            start(run, folder, constants, jobs)
        summary, log = read_run(folder)
        summary.pop("schemes", None)
        found = {"run": run.name, "machine": machine(summary["device"]), "date": time.strftime("%Y-%m-%d"),
                 "command": f"python {run.rung}.py " + " ".join(f"{k}={v}" for k, v in constants.items()),
                 "edits": [list(edit) for edit in run.edits], "summary": summary, "log": log,
                 "sample": (home_of(run, folder) / "sample.txt").read_text(encoding="utf-8"),
                 "measured": measure(run, folder)}  # fmt: skip
        write(path, json.dumps(found, indent=1) + "\n")
        if jobs > 1:
            took = time.time() - began
            print(f"{path.relative_to(RESULTS)}: val bpb {summary['val_bpb']:.4f}, {took:.0f} s", flush=True)
    except (OSError, ValueError) as error:
        return str(error)


def make_all(todo, own, gpu, jobs):
    """Make all of `todo`, [(run, seed)], `jobs` at a time. Raises ValueError if one fails, after the others."""
    if jobs == 1:
        for run, seed in todo:
            if problem := make(run, seed, own, gpu):
                raise ValueError(problem)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), as_worker) as pool:
        try:
            tasks = [pool.submit(make, run, seed, own, gpu, jobs) for run, seed in todo]
            problems = [problem for task in tasks if (problem := task.result())]
        except KeyboardInterrupt as reason:
            if isinstance(reason, Stopped):
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise ValueError("; ".join(problems))


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


def gradient_sizes(module, model, tokens, stride=64, n=200):
    """How large the gradient of each weight is, a tensor for each parameter: the root of its mean square over the last
    `stride` tokens of `n` windows of the training text, and a little, so that it can be divided by (Krause et al. 2018,
    section 5)."""
    ids, size, parameters = tokens.ids, model.block_size, list(model.eval().parameters())
    squares, starts = [torch.zeros_like(p) for p in parameters], torch.linspace(0, len(ids) - size - 1, n).long()
    for i in starts.tolist():
        window = ids[i : i + size + 1].long().to(module.DEVICE)
        loss = F.cross_entropy(model(window[None, :-1])[0, -stride:], window[-stride:])
        for square, g in zip(squares, torch.autograd.grad(loss, parameters)):
            square.add_(g * g, alpha=1 / n)
    return [square.sqrt() + 1e-4 for square in squares]


def dynamic_evaluation(module, model, tokens, rate, sizes, stride=64):
    """Bits per byte and word perplexity of a model that goes on learning while it reads: after every `stride` tokens,
    which it predicts with as much context as its windows hold, it makes a step of gradient descent on their loss, that
    of each weight divided by its `sizes` (dynamic evaluation, Krause et al. 2018, arXiv:1709.07432, section 5, without
    the pull back to the first weights). A `rate` of 0 is the evaluation in sliding windows. `stride` is at most the
    length of a window."""
    model, ids, size, nats = copy.deepcopy(model).eval(), tokens.ids.long(), model.block_size, 0.0
    n, parameters = len(ids) - 1, list(model.parameters())
    for i in range(0, n, stride):
        stop = min(i + stride, n)
        start = max(0, stop - size)
        logits = model(ids[None, start:stop].to(module.DEVICE))[0, i - start :]  # (stop - i, V)
        loss = F.cross_entropy(logits, ids[i + 1 : stop + 1].to(module.DEVICE))
        nats += loss.item() * (stop - i)
        with torch.no_grad():
            for p, g, s in zip(parameters, torch.autograd.grad(loss, parameters), sizes):
                p.sub_(g / s, alpha=rate)
    return {"bpb": nats / (math.log(2) * tokens.n_bytes), "word_ppl": math.exp(nats / tokens.n_words)}


def best(module, model, tokens, tokenizer):
    """The test split in windows that slide by 64; and read with dynamic evaluation, its rate chosen on the first 32,768
    tokens of the validation split."""
    part = first_part(tokens["val"], tokenizer, WINDOW_TOKENS // 2)
    sizes = gradient_sizes(module, model, tokens["train"])
    rates = {r: dynamic_evaluation(module, model, part, r, sizes)["bpb"] for r in (0.0, 5e-5, 1e-4, 2e-4, 4e-4)}
    rate = min(rates, key=rates.get)
    return {"test_sliding": module.evaluate(model, tokens["test"], stride=64), "rates": rates,
            "test_reading_on": dynamic_evaluation(module, model, tokens["test"], rate, sizes)}  # fmt: skip


WINDOW_TOKENS = 65_536  # of the validation split, for what costs a pass in many windows
MEASURES = {"windows": windows, "temperature": temperature, "best": best}


def measure(run, folder):
    """What the run's MEASURE finds of the model in `folder`; None without one."""
    if not run.measure:
        return None
    home = home_of(run, folder)
    model, tokenizer = harness.load(str(home))
    constants = json.loads((home / "summary.json").read_text(encoding="utf-8"))["hyperparameters"]
    tokens = load_tokens(constants["VOCABULARY"], constants["DATA"])
    return MEASURES[run.measure](importlib.import_module(run.rung), model, tokens, tokenizer)


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------

FORMATS = {"val_word_ppl": "{:,.1f}", "train_seconds": "{:,.0f}", "peak_memory_mb": "{:,.0f}", "n_params": "{:,.0f}",
           "bytes_seen": "{:,.0f}", "best_step": "{:,.0f}", "steps": "{:,.0f}", "pace": "{:.3f}",
           "val_word_ppl_sliding": "{:,.1f}"}  # fmt: skip
TITLES = {"val_bpb": "val bpb", "val_bpb_sliding": "val bpb, sliding", "val_word_ppl": "val word ppl",
          "test_bpb": "test bpb", "train_seconds": "training, s", "peak_memory_mb": "peak memory, MB",
          "n_params": "parameters", "bytes_seen": "bytes seen", "best_step": "best step", "steps": "steps",
          "pace": "a step, s", "val_word_ppl_sliding": "val word ppl, sliding"}  # fmt: skip


def spread(values, form="{:.4f}"):
    """The mean of values, and where they differ the lowest and highest."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    low, high = min(values), max(values)
    middle = form.format(mean(values))
    return middle if low == high else f"{middle} ({form.format(low)} to {form.format(high)})"


def read_found(run, seeds, gpu=False):
    """What the finished ones of the run with each of `seeds` have found."""
    paths = [result_file(run, seed, gpu) for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def values(found, column, run):
    """The column of a table for each finished run."""
    if column == "pace":
        return [read_pace()["seconds"].get(key_of_pace(run))]
    return [one["summary"].get(column) for one in found]


def report(name, gpu=False):
    """The finished runs of an experiment as Markdown; None if there are none."""
    experiment, rows, seeds, machines, columns = EXPERIMENTS[name], [], set(), set(), EXPERIMENTS[name].columns
    for run in experiment.runs:
        found = read_found(run, experiment.seeds, gpu)
        if not found:
            continue
        seeds |= {one["summary"]["seed"] for one in found}
        machines |= {one["machine"] for one in found}
        cells = [spread(values(found, column, run), FORMATS.get(column, "{:.4f}")) for column in columns]
        rows.append([run.name, len(found), *cells])
    if not rows:
        return None
    head = ["run", "seeds", *(TITLES[column] for column in columns)]
    pace = f" Seconds a step: {read_pace()['machine']}." if "pace" in columns and "machine" in read_pace() else ""
    return (f"{table(head, rows)}\n{experiment.asks} Mean (lowest to highest) over the seeds "
            f"{', '.join(map(str, sorted(seeds)))}. Made on: {'; '.join(sorted(machines))}.{pace}\n")  # fmt: skip


def list_all():
    """Print what each experiment asks, and how much of it is done."""
    for name, experiment in EXPERIMENTS.items():
        files = [result_file(run, seed) for run in experiment.runs for seed in experiment.seeds]
        paces = [read_pace()["seconds"].get(key_of_pace(run)) for run in experiment.runs]
        done = sum(path.exists() for path in files)
        print(f"{name:14} {done:2} of {len(files)} runs{hours(experiment, paces)}\n{'':14} {experiment.asks}")


def hours(experiment, paces):
    """About how long all runs of an experiment take on the machine of pace.json. How many steps a number of megabytes
    is depends on a vocabulary that may not be here, so that is taken from the runs that are done."""
    seconds = 0
    for run, pace in zip(experiment.runs, paces):
        steps = run.constants.get("MAX_STEPS", importlib.import_module(run.rung).MAX_STEPS)
        if run.megabytes:
            steps = next((one["summary"]["steps"] for one in read_found(run, experiment.seeds)), math.nan)
        seconds += run.seconds or (pace * steps if pace else math.nan)
    hours = len(experiment.seeds) * seconds / 3600
    return "" if math.isnan(hours) else f", {hours:.1f} h of training on two cores like those of pace.json"


def main(argv=None):
    parser = argparse.ArgumentParser(description="The experiments of this repository.", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="of an experiment, or NAME=value for all of its runs")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--table", action="store_true", help="make no run, only the table")
    parser.add_argument("--pace", action="store_true", help="make no run, measure how long steps take")
    parser.add_argument("--missing", action="store_true", help="with --pace: only what was not measured")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--gpu", action="store_true", help="shapes for one GPU")
    args = parser.parse_intermixed_args(argv)
    names = [name for name in args.names if "=" not in name]
    own = dict(text.partition("=")[::2] for text in args.names if "=" in text)
    if args.list or not names:
        return list_all()
    for name in names:
        if name not in EXPERIMENTS:
            raise ValueError(f"there is no experiment {name!r}; known are {', '.join(EXPERIMENTS)}")
    runs = [run for name in names for run in EXPERIMENTS[name].runs]
    if args.pace:
        prepare(runs)
        return measure_pace(runs, again=not args.missing)
    if not args.table:
        todo = {}  # all runs with the first seed come first
        for k in range(max(len(EXPERIMENTS[name].seeds) for name in names)):
            for name in names:
                for run in EXPERIMENTS[name].runs if k < len(EXPERIMENTS[name].seeds) else ():
                    todo.setdefault(result_file(run, EXPERIMENTS[name].seeds[k], args.gpu),
                                    (run, EXPERIMENTS[name].seeds[k]))  # fmt: skip
        todo = [one for path, one in todo.items() if not path.exists()]
        if todo:  # tables of what is done need no text
            prepare([run for run, _ in todo])
        check_texts(todo, own, args.gpu)
        make_all(todo, own, args.gpu, max(1, args.jobs))
    for name in names:
        text = report(name, args.gpu)
        if text is None:
            raise ValueError(f"no run of {name} is done; without --table they are made")
        print(text, end="")
        write(RESULTS / (name + "_gpu" * args.gpu) / "table.md", text)


def program(argv=None):
    """main() that ends, stopped or failed, with one line and an exit code."""
    signal.signal(signal.SIGTERM, stop)
    sys.stdout, sys.stderr = harness.Unbreakable(sys.stdout), harness.Unbreakable(sys.stderr)
    try:
        main(argv)
    except KeyboardInterrupt as reason:
        print("experiments.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(143 if isinstance(reason, Stopped) else 130)
    except (OSError, ValueError) as error:
        sys.exit(f"experiments.py: {error}")


if __name__ == "__main__":
    program()
