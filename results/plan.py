"""The experiments: what each asks, and the runs that answer it."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

from results.edits import (
    DROPOUT_INSIDE,
    ROPE_AFTER_THEM,
    ROPE_IN_V3,
    STEPS_TO_V3_1,
    TIED,
    recipe,
    weight_decay,
)

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1337, 1338, 1339)
V4 = "v4_alibi_rope"
# Shapes for one GPU, of those constants that a rung has. Their data: python data/prepare.py --dataset wikitext-103-v1
GPU = {"BATCH_SIZE": 64, "MICRO_BATCH_SIZE": 64, "BLOCK_SIZE": 512, "N_LAYER": 12, "N_HEAD": 12, "N_EMBD": 768,
       "MAX_STEPS": 20_000, "DEVICE": "cuda"}  # fmt: skip


# Constants that say how a run is made and decide no loss but for rounding. Any other one that is given with a command
# makes other runs, which are kept apart.
HOW = ("DEVICE", "COMPILE", "SAMPLE_TOKENS")


@dataclass
class Run:
    """One training: a rung with constants and edits of its text."""

    name: str
    rung: str
    constants: dict = field(default_factory=dict)
    edits: tuple = ()  # ((old, new), ...)
    seconds: float = 0.0  # trained for as long on two cores, not for MAX_STEPS
    megabytes: float = 0.0  # trained on as much text, not for MAX_STEPS
    vocab_size: int = 0  # of a vocabulary of its own
    measure: str = ""  # what is measured of the trained model: a name in measures.MEASURES
    other_seeds: dict = field(default_factory=dict)  # constants of all seeds but the first
    base: str = ""  # name of the run that its change is measured from; by default the one before

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
    search: bool = False  # something is chosen by it: its results hold no figures of the test split
    mixed_code: str = ""  # why results of different texts of a rung may stand in one table


ALIBI, ROPE = {"POSITION": "alibi"}, {"POSITION": "rope"}
VOCABULARIES = (500, 1000, 2000, 4096, 8192, 16384)
LADDER_MB = 18.57  # of text that every rung sees by default
SMALLER = {"N_LAYER": 2, "N_EMBD": 128}


def from_v3_to_v4():
    """v3, v3 with more and more of v3_1's parts, v3_1, v4; then RoPE where Muon, or all else, is missing.

    What v3_1 adds to the last of the edits is its optimizer: Muon for the matrices of the blocks, neither weight decay
    nor clipping, and for position embeddings the rate of the other embeddings.
    """
    runs, edits = [Run("v3", "v3")], ()
    for part, more in STEPS_TO_V3_1.items():
        edits += more
        runs.append(Run(f"+ {part}", "v3", edits=edits))
    return [*runs, Run("+ Muon: v3_1", "v3_1"), Run("+ RoPE: v4", V4, ROPE),
            Run("v4 without Muon", "v3", edits=edits + ROPE_AFTER_THEM, base=runs[-1].name),
            Run("v3, only RoPE", "v3", edits=ROPE_IN_V3, base="v3")]  # fmt: skip


def recipes():
    """v3 trained in other ways: all of them together, with more, and without each."""
    all_of_them = recipe()
    runs = [Run("v3", "v3"), Run("all of them", "v3", edits=all_of_them)]
    small = {"BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "MAX_STEPS": 2560, "WARMUP_STEPS": 120, "EVAL_INTERVAL": 640}
    changes = {
        "embeddings at 3 times the rate": {"embedding_rate": 3, "embedding_decay": False},
        "a head of its own at 3 times the rate": {"tied": False, "embedding_rate": 3, "embedding_decay": False},
        "8 windows a step": small, "positions at 3 times the rate": {"position_rate": 3},
        "embeddings do not decay": {"embedding_decay": False}, "not tied": {"tied": False},
        "positions at random": {"sinusoids": False}, "no zeros": {"zeros": False}, "cosine": {"cooldown": False},
        "beta2 0.95": {"beta2": 0.95}, "beta2 0.999": {"beta2": 0.999},
        "all of them, 0.001": {"LEARNING_RATE": 1e-3}, "all of them, 0.004": {"LEARNING_RATE": 4e-3},
    }  # fmt: skip
    for name, change in changes.items():
        constants = {k: v for k, v in change.items() if k.isupper()}
        edits = recipe(**{k: v for k, v in change.items() if not k.isupper()})
        runs.append(Run(name, "v3", constants, edits, base="all of them"))
    return runs


def vocabularies():
    """v2 and v4 with each vocabulary, on as much text as the ladder and for as many seconds."""
    runs = []
    for rung, constants in (("v2", {}), (V4, ROPE)):
        for limit_name, limit in (("18.6 MB", {"megabytes": LADDER_MB}), ("300 s", {"seconds": 300})):
            for size in VOCABULARIES:
                default = size == 4096 and "megabytes" in limit
                more = {} if default else {"vocab_size": size, **limit}
                runs.append(Run(f"{rung.split('_')[0]}, {limit_name}, {size:,}", rung, constants, **more))
    return runs


def positions():
    """Every scheme with windows of 256 tokens, ALiBi and RoPE with half and double, as many tokens a step."""
    runs = [Run("learned, 256", "v3_1", measure="windows")]
    runs += [Run(f"{scheme}, 256", V4, {"POSITION": scheme}, measure="windows") for scheme in ("sinusoidal", "none")]
    for scheme in ("alibi", "rope"):
        for size in (128, 256, 512):
            shape = {"BLOCK_SIZE": size, "BATCH_SIZE": 4096 // size, "MICRO_BATCH_SIZE": 4096 // size}
            constants = {"POSITION": scheme} | (shape if size != 256 else {})
            runs.append(Run(f"{scheme}, {size}", V4, constants, measure="windows"))
    return runs


def dropouts():
    """v3 on texts that it reads often: until it has long been overfitted, where it can be. On a tenth, which takes
    longer than the sample, the first seed shows that; the others end three evaluations after their best one."""
    texts = {"the sample, 89 times": {"DATA": "runs/experiments/sample", "MAX_STEPS": 2000, **SMALLER},
             "a tenth, 20 times": {"DATA": "runs/experiments/tenth", "MAX_STEPS": 1480},
             "all, 5 times": {"MAX_STEPS": 3715}}  # fmt: skip
    return [Run(f"{text}, {p:g}", "v3", {**constants, "DROPOUT": p, "PATIENCE": 1000},
                other_seeds={"PATIENCE": 3} if text.startswith("a tenth") else {})
            for text, constants in texts.items() for p in (0.0, 0.1, 0.2, 0.3)]  # fmt: skip


def two_hours():
    """v4 within 7,200 s, each run another choice; those with edits have the steps of the run without."""
    usual = {"POSITION": "rope", "PATIENCE": 1000, "EXTRAPOLATION": "1,"}
    mild = usual | {"DROPOUT": 0.1}
    choices = {
        "dropout 0": usual, "dropout 0.1": mild, "dropout 0.2": usual | {"DROPOUT": 0.2},
        "windows of 512": mild | {"BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8},
        "windows of 1,024": mild | {"BLOCK_SIZE": 1024, "BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 4},
        "6 × 256": mild | {"N_LAYER": 6}, "4 × 320": mild | {"N_EMBD": 320},
        "3 × 384": mild | {"N_LAYER": 3, "N_EMBD": 384}, "momentum 0.95": mild | {"MOMENTUM": 0.95},
        "rate of Muon 0.02": mild | {"LEARNING_RATE": 0.02},
        "rate of AdamW 0.005": mild | {"LEARNING_RATE_ADAMW": 0.005},
    }  # fmt: skip
    runs = [Run(name, V4, constants, seconds=7200) for name, constants in choices.items()]
    runs.append(Run("vocabulary of 8,192", V4, mild, seconds=7200, vocab_size=8192))
    edits = {"weight decay 0.2": weight_decay(0.2), "embeddings tied": TIED, "dropout in the MLP": DROPOUT_INSIDE}
    runs += [Run(name, V4, mild | {"MAX_STEPS": 6500}, edit) for name, edit in edits.items()]
    longer = mild | {"BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "MAX_STEPS": 6495}
    choices = {"rate of AdamW 0.015": {"LEARNING_RATE_ADAMW": 0.015}, "momentum 0.8": {"MOMENTUM": 0.8},
               "rate of Muon 0.04": {"LEARNING_RATE": 0.04}, "cool-down 0.8": {"COOLDOWN": 0.8},
               "dropout 0.15": {"DROPOUT": 0.15}}  # fmt: skip
    runs += [Run(f"windows of 512, {name}", V4, longer | constants) for name, constants in choices.items()]
    runs.append(Run("windows of 512, dropout in the MLP", V4, longer, DROPOUT_INSIDE))
    runs.append(Run("windows of 512, weight decay 0.02", V4, longer, weight_decay(0.02)))
    return runs


BEST = {"POSITION": "rope", "BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "DROPOUT": 0.1, "STRIDE": 64,
        "PATIENCE": 1000, "MAX_STEPS": 5500}  # about two hours of two Zen 3 cores  # fmt: skip

EXPERIMENTS = {
    "ladder": Experiment(
        "How far does each rung come on the same text?",
        [Run("v0", "v0"), Run("v1", "v1"), Run("v1_1", "v1_1"), Run("v2", "v2"), Run("v3", "v3", measure="temperature"),
         Run("v3_1", "v3_1", measure="windows"), Run("v4, alibi", V4, ALIBI, measure="windows"),
         Run("v4, rope", V4, ROPE, measure="windows")],
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "step_time"),
    ),
    "learning_rate": Experiment(
        "Is v3 well tuned?",
        [Run(f"{rate:g}", "v3", {"LEARNING_RATE": rate} if rate != 2e-3 else {})
         for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)],
        columns=("val_bpb", "val_word_ppl"), search=True,
    ),
    "recipe": Experiment(
        "How is GPT-2's architecture trained well on a text that is read twice?", recipes(), seeds=SEEDS[:1],
        columns=("val_bpb", "val_word_ppl", "n_params"), search=True,
    ),
    "v3_to_v4": Experiment(
        "What makes v4 better than v3?", from_v3_to_v4(), columns=("val_bpb", "val_word_ppl", "step_time")
    ),
    "positions": Experiment(
        "How does a transformer know the positions of its tokens, and what happens beyond the length of training?",
        positions(), columns=("val_bpb", "val_bpb_sliding", "step_time"),
    ),
    "vocabulary": Experiment(
        "Which vocabulary is best, in bits per byte, after as much text, and after as many seconds?", vocabularies(),
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "n_params", "step_time"), search=True,
    ),
    "shape": Experiment(
        "Deeper or wider, after as many seconds?",
        [*(Run(f"{n} × 256", "v3", {} if n == 4 else {"N_LAYER": n}, seconds=600) for n in (1, 2, 4, 6, 8)),
         *(Run(f"4 × {width}", "v3", {"N_EMBD": width}, seconds=600) for width in (128, 192, 320, 384))],
        columns=("val_bpb", "val_word_ppl", "n_params", "bytes_seen", "step_time"), search=True,
    ),
    "beside": Experiment(
        "How good are v2, v3 and v4 after ten minutes, beside what people would run instead (benchmarks/beside.py)?",
        [Run("v2", "v2", seconds=600), Run("v3", "v3", seconds=600), Run("v4, rope", V4, ROPE, seconds=600)],
        columns=("val_bpb", "val_word_ppl", "step_time"),
    ),
    "dropout": Experiment(
        "When does dropout pay?", dropouts(), columns=("val_bpb", "best_step", "steps"), search=True,
    ),
    "two_hours": Experiment(
        "How good a model of WikiText-2 can two cores train in two hours?", two_hours(), seeds=SEEDS[:1],
        columns=("val_bpb", "val_bpb_sliding", "val_word_ppl_sliding", "steps", "n_params"), search=True,
    ),
    "best": Experiment(
        "What does the best choice of two_hours reach in two hours, and with dynamic evaluation?",
        [Run("v4, two hours", V4, BEST, measure="best")], seeds=SEEDS[:1],
        columns=("val_bpb", "val_bpb_sliding", "val_word_ppl_sliding", "steps", "train_seconds"),
    ),
}  # fmt: skip


def owner(run):
    """(name of an experiment, its run): the first that is the same training as `run`."""
    training = run.training()
    for name, experiment in EXPERIMENTS.items():
        for other in experiment.runs:
            if other.rung == run.rung and other.training() == training:
                return name, other
    return None, run


def all_constants(run, seed, gpu=False):
    """The constants of a run but for the number of its steps."""
    rung = vars(importlib.import_module(run.rung)) if gpu else {}
    constants = {k: v for k, v in GPU.items() if k in rung} | run.constants | {"SEED": seed}
    constants |= run.other_seeds if seed in SEEDS[1:] else {}
    if run.vocab_size not in (0, 4096):  # 4,096: that of data/
        constants["VOCABULARY"] = f"bpe_vocab_{run.vocab_size}.json"
    return constants
