"""The experiments: what each asks, and the runs that answer it."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

from results import edits

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1337, 1338, 1339)
V4 = "v4_alibi_rope"
# Shapes for one GPU, as far as a rung has these constants. Their text: python data/prepare.py --dataset wikitext-103-v1
GPU = {"BATCH_SIZE": 64, "MICRO_BATCH_SIZE": 64, "BLOCK_SIZE": 512, "N_LAYER": 12, "N_HEAD": 12, "N_EMBD": 768,
       "MAX_STEPS": 20_000, "DEVICE": "cuda"}  # fmt: skip


# Constants that say how a run is made and affect a loss by no more than rounding. With any other constant on the
# command line, a run does not count as a result and is kept apart.
HOW = ("DEVICE", "COMPILE", "SAMPLE_TOKENS")


@dataclass
class Run:
    """One training: a rung with constants and edits of its source."""

    name: str
    rung: str
    constants: dict = field(default_factory=dict)
    edits: tuple = ()  # ((old, new), ...)
    seconds: float = 0.0  # train for this long on two cores instead of for MAX_STEPS
    megabytes: float = 0.0  # train on this much text instead of for MAX_STEPS
    vocab_size: int = 0  # size of its vocabulary, if not the committed one
    measure: str = ""  # measurement of the trained model: a name in measures.MEASURES
    base: str = ""  # name of the run with which it is compared; by default the previous one

    def training(self):
        """What identifies the training: everything except the name of the run and its measurement."""
        return self.rung, sorted(self.constants.items()), self.edits, self.seconds, self.megabytes, self.vocab_size


@dataclass
class Experiment:
    """A question, the runs that answer it with each of `seeds`, and the columns of its table."""

    asks: str
    runs: list
    seeds: tuple = SEEDS
    columns: tuple = ("val_bpb", "val_word_ppl", "test_bpb", "train_seconds")
    search: bool = False  # it is used to choose something, so its results have no figures for the test split
    mixed_code: str = ""  # why results from different code of a rung may share a table


ALIBI, ROPE = {"POSITION": "alibi"}, {"POSITION": "rope"}
VOCABULARIES = (500, 1000, 2000, 4096, 8192, 16384)
LADDER_MB = 18.57  # megabytes of text that every rung sees by default
# How many steps two Zen 3 cores make in five minutes with each of VOCABULARIES, by one trial of each
STEPS_IN_300_S = {"v2": (4059, 3774, 2638, 1812, 867, 488), V4: (336, 331, 321, 276, 204, 150)}
# Seconds of training on the cores of step_time.json after which vocabularies are compared: each has about as long a run
EQUAL_SECONDS = {"v2": 190, "v4": 300}
ONE_LAYER_SECONDS = 118  # in which v3 with one layer trains on the ladder's text, on two idle cores
SMALLER = {"N_LAYER": 2, "N_EMBD": 128}


RATE = 1.4e-3  # v3's learning rate
# v3, initialized and trained as is usual for a GPT-2, at the best rate for that
USUAL = {"BATCH_SIZE": 16, "MICRO_BATCH_SIZE": 16, "MAX_STEPS": 1280, "WARMUP_STEPS": 60, "LEARNING_RATE": 2e-3}


def usual(name, **constants):
    return Run(name, "v3", USUAL | constants, edits.USUAL)


def recipes():
    """v3's recipe and the usual one, each at several rates."""
    runs = [Run("v3", "v3")]
    runs += [Run(f"v3, rate {rate:g}", "v3", {"LEARNING_RATE": rate}) for rate in (7e-4, 1e-3, 2e-3)]
    runs += [usual("usual recipe")]
    runs += [usual(f"usual recipe, rate {rate:g}", LEARNING_RATE=rate) for rate in (5e-4, 1e-3, 4e-3, 8e-3)]
    return runs


def parts():
    """v3, and v3 with one part of its recipe removed or replaced."""
    larger = {"BATCH_SIZE": 16, "MICRO_BATCH_SIZE": 16, "MAX_STEPS": 1280, "LEARNING_RATE": 2e-3, "WARMUP_STEPS": 100}
    smaller = {"BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 4, "MAX_STEPS": 5120, "LEARNING_RATE": 1e-3, "WARMUP_STEPS": 400}
    changes = {
        "positions start at random": edits.RANDOM_POSITIONS, "a head of its own": edits.HEAD_OF_ITS_OWN,
        "branches start small, not at zero": edits.SMALL_BRANCHES, "cosine": edits.COSINE,
        "beta2 0.95": edits.beta2(0.95), "beta2 0.99": edits.beta2(0.99), "16 windows a step": larger,
        "4 windows a step": smaller, "warm-up of 60 steps": {"WARMUP_STEPS": 60},
        "cool-down from the start": {"COOLDOWN": 1.0}, "8 heads": {"N_HEAD": 8},
        "no weight decay": {"WEIGHT_DECAY": 0.0}, "embeddings do not decay": edits.embedding_rates(decay=0.0),
        "token embeddings at twice the rate": edits.embedding_rates(tokens=2),
        "positions at twice the rate": edits.embedding_rates(positions=2),
    }  # fmt: skip
    return [Run("v3", "v3"), *(Run(name, "v3", change) if isinstance(change, dict) else Run(name, "v3", {}, change)
                               for name, change in changes.items())]  # fmt: skip


# Rates, the usual one first, and edits
OPTIMIZERS = {"AdamW": ((2e-3, 1e-3, 4e-3), edits.ADAMW), "Muon": ((0.03, 0.015, 0.06), ())}


def from_v3_to_v4():
    """Three ways of encoding positions with three ways of training: v3, the modern block with AdamW, and with Muon; the
    modern block at three rates each."""
    places = {"at random": ("v3_1", {}, edits.RANDOM_POSITIONS_IN_V3_1), "sinusoids": ("v3_1", {}, ()),
              "RoPE": (V4, ROPE, ())}  # fmt: skip
    runs = [Run("v3, at random", "v3", {}, edits.RANDOM_POSITIONS), Run("v3, sinusoids", "v3"),
            Run("v3, RoPE", "v3", {}, edits.ROPE_IN_V3)]  # fmt: skip
    for k in range(3):
        for optimizer, (rates, other) in OPTIMIZERS.items():
            for place, (rung, constants, change) in places.items():
                more = {"LEARNING_RATE": rates[k]} if (optimizer, k) != ("Muon", 0) else {}
                runs.append(Run(f"{optimizer} {rates[k]:g}, {place}", rung, constants | more, (*change, *other)))
    return runs


ADDITIONS = (*edits.SMEAR, *edits.EMBEDDING_TO_BLOCKS)


def additions():
    """v4 with a few lines more: shares of the embeddings that are added elsewhere, zero at the start, and a rate of its
    own for the embedding."""
    changes = {"v4, rope": (), "smear": edits.SMEAR, "embedding to each block": edits.EMBEDDING_TO_BLOCKS,
               "both": ADDITIONS, "embedding at 0.03": edits.embedding_rate(0.03),
               "both, embedding at 0.03": (*ADDITIONS, *edits.embedding_rate(0.03))}  # fmt: skip
    return [Run(name, V4, ROPE, change) for name, change in changes.items()]


def vocabularies():
    """v2 and v4 with each vocabulary, in two lengths: on as much text as in the ladder, and for about equal seconds."""
    runs = []
    for rung, constants in (("v2", {}), (V4, ROPE)):
        title = rung.split("_")[0]
        for size in VOCABULARIES:
            more = {"vocab_size": size, "megabytes": LADDER_MB} if size != 4096 else {}
            runs.append(Run(f"{title}, 18.6 MB, {size:,}", rung, constants, **more))
        for size, steps in zip(VOCABULARIES, STEPS_IN_300_S[rung]):
            runs.append(Run(f"{title}, 300 s, {size:,}", rung, constants | {"MAX_STEPS": steps}, vocab_size=size))
    return runs


def positions():
    """Every scheme with windows of 256 tokens, ALiBi and RoPE also with 128 and 512, with equal tokens per step."""
    runs = [Run("learned, 256", "v3_1", measure="windows")]
    runs += [Run(f"{scheme}, 256", V4, {"POSITION": scheme}, measure="windows") for scheme in ("sinusoidal", "none")]
    for scheme in ("alibi", "rope"):
        for size in (128, 256, 512):
            shape = {"BLOCK_SIZE": size, "BATCH_SIZE": 4096 // size, "MICRO_BATCH_SIZE": 4096 // size}
            constants = {"POSITION": scheme} | (shape if size != 256 else {})
            runs.append(Run(f"{scheme}, {size}", V4, constants, measure="windows"))
    return runs


READINGS, DROPOUTS = (2, 4, 8, 16), (0.0, 0.1, 0.2)


def dropouts():
    """A small v4 on a tenth of the text, which it reads several times. Each run has a schedule of its own, which ends
    when the last reading does."""
    small = {**ROPE, **SMALLER, "DATA": "runs/experiments/tenth", "PATIENCE": 1000, "EXTRAPOLATION": "1,"}
    return [Run(f"{readings} times, {p:g}", V4, {**small, "MAX_STEPS": 74 * readings, "DROPOUT": p})
            for readings in READINGS for p in DROPOUTS]  # fmt: skip


MOMENTA, BATCHES = (0.7, 0.85, 0.95), {8: 1280, 32: 320}  # windows per step: steps
RATES = {(8, 0.95): (0.0075, 0.015, 0.03, 0.06)}  # of Muon, where there are more than the usual three


def momenta():
    """A small v4 with several values of Muon's momentum, each at several rates, with small and with large batches of
    the same text."""
    small = {**ROPE, **SMALLER, "EXTRAPOLATION": "1,"}
    return [Run(f"{windows} windows, momentum {m:g}, rate {rate:g}", V4,
                {**small, "BATCH_SIZE": windows, "MICRO_BATCH_SIZE": windows, "MAX_STEPS": steps,
                 "WARMUP_STEPS": steps // 25, "MOMENTUM": m, "LEARNING_RATE": rate})
            for windows, steps in BATCHES.items() for m in MOMENTA
            for rate in RATES.get((windows, m), (0.015, 0.03, 0.06))]  # fmt: skip


def shapes():
    """v3 with several depths and widths; the extremes also at other rates, and some depths for equal seconds, with the
    same share of the steps for warm-up."""
    runs = [Run(f"{n} × 256", "v3", {} if n == 4 else {"N_LAYER": n}) for n in (1, 2, 4, 8)]
    runs += [Run(f"4 × {width}", "v3", {"N_EMBD": width}) for width in (128, 384)]
    for name, shape in {"1 × 256": {"N_LAYER": 1}, "8 × 256": {"N_LAYER": 8}, "4 × 128": {"N_EMBD": 128},
                        "4 × 384": {"N_EMBD": 384}}.items():  # fmt: skip
        runs += [Run(f"{name}, rate {rate:g}", "v3", shape | {"LEARNING_RATE": rate})
                 for rate in (RATE / 1.4, 1.4 * RATE)]  # fmt: skip
    runs += [Run(f"{n} × 256, as long as 1 × 256", "v3", ({} if n == 4 else {"N_LAYER": n}) | {"WARMUP_STEPS": warmup},
                 seconds=ONE_LAYER_SECONDS) for n, warmup in ((2, 138), (4, 85))]  # fmt: skip
    return runs


def two_hours():
    """v4 with about as many steps as two Zen 3 cores make in two hours (one trial each), each run with one choice
    changed; runs with edits have the number of steps of the run without."""
    base = {"POSITION": "rope", "PATIENCE": 1000, "EXTRAPOLATION": "1,"}
    mild = base | {"DROPOUT": 0.1}
    choices = {
        "dropout 0": base | {"MAX_STEPS": 6621}, "dropout 0.1": {"MAX_STEPS": 6928},
        "dropout 0.2": {"DROPOUT": 0.2, "MAX_STEPS": 6863},
        "windows of 512": {"BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "MAX_STEPS": 6495},
        "windows of 1,024": {"BLOCK_SIZE": 1024, "BATCH_SIZE": 4, "MICRO_BATCH_SIZE": 4, "MAX_STEPS": 5337},
        "6 × 256": {"N_LAYER": 6, "MAX_STEPS": 4565}, "4 × 320": {"N_EMBD": 320, "MAX_STEPS": 4654},
        "3 × 384": {"N_LAYER": 3, "N_EMBD": 384, "MAX_STEPS": 4372},
        "momentum 0.95": {"MOMENTUM": 0.95, "MAX_STEPS": 6928},
        "rate of Muon 0.02": {"LEARNING_RATE": 0.02, "MAX_STEPS": 6928},
        "rate of AdamW 0.005": {"LEARNING_RATE_ADAMW": 0.005, "MAX_STEPS": 6928},
    }  # fmt: skip
    runs = [Run(name, V4, constants if name == "dropout 0" else mild | constants)
            for name, constants in choices.items()]  # fmt: skip
    runs.append(Run("vocabulary of 8,192", V4, mild | {"MAX_STEPS": 5339}, vocab_size=8192))
    changes = {"weight decay 0.2": edits.weight_decay(0.2), "embeddings tied": edits.TIED,
               "dropout in the MLP": edits.DROPOUT_INSIDE}  # fmt: skip
    runs += [Run(name, V4, mild | {"MAX_STEPS": 6500}, change) for name, change in changes.items()]
    longer = mild | {"BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "MAX_STEPS": 6495}
    choices = {"rate of AdamW 0.015": {"LEARNING_RATE_ADAMW": 0.015}, "momentum 0.8": {"MOMENTUM": 0.8},
               "rate of Muon 0.04": {"LEARNING_RATE": 0.04}, "cool-down 0.8": {"COOLDOWN": 0.8},
               "dropout 0.15": {"DROPOUT": 0.15}}  # fmt: skip
    runs += [Run(f"windows of 512, {name}", V4, longer | constants) for name, constants in choices.items()]
    runs.append(Run("windows of 512, dropout in the MLP", V4, longer, edits.DROPOUT_INSIDE))
    runs.append(Run("windows of 512, weight decay 0.02", V4, longer, edits.weight_decay(0.02)))
    return runs


BEST = {"POSITION": "rope", "BLOCK_SIZE": 512, "BATCH_SIZE": 8, "MICRO_BATCH_SIZE": 8, "DROPOUT": 0.2, "STRIDE": 64,
        "PATIENCE": 1000, "MAX_STEPS": 20000}  # less than two hours of two Zen 5 cores  # fmt: skip

# A second network for an ensemble with the first; both together train for two hours
SECOND = BEST | {"DROPOUT": 0.15, "MAX_STEPS": 6500}
WITH_ADDITIONS = "v4 with additions, half an hour"

EXPERIMENTS = {
    "ladder": Experiment(
        "How far does each rung come on the same text?",
        [Run("v0", "v0"), Run("v1", "v1"), Run("v1_1", "v1_1"), Run("v2", "v2"), Run("v3", "v3", measure="temperature"),
         Run("v3_1", "v3_1", measure="windows"), Run("v4, alibi", V4, ALIBI, measure="windows"),
         Run("v4, rope", V4, ROPE, measure="windows")],
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "step_time"),
    ),
    "recipe": Experiment(
        "What does v3's recipe gain over the usual one of GPT-2, if both are well tuned?", recipes(),
        columns=("val_bpb", "val_word_ppl", "n_params"), search=True,
    ),
    "v3_to_v4": Experiment(
        "What makes v4 better than v3?", from_v3_to_v4(), columns=("val_bpb", "val_word_ppl"), search=True,
    ),
    "recipe_parts": Experiment(
        "Which parts of v3's recipe does it take on a text that is read twice?", parts(), seeds=SEEDS[:1],
        columns=("val_bpb", "val_word_ppl"), search=True,
    ),
    "positions": Experiment(
        "How does a transformer know the positions of its tokens, and what happens beyond the length of training?",
        positions(), columns=("val_bpb", "val_bpb_sliding", "step_time"),
    ),
    "vocabulary": Experiment(
        "Which vocabulary is best, in bits per byte, after as much text, and after as much time?", vocabularies(),
        columns=("val_bpb", "val_word_ppl", "bytes_seen", "n_params", "step_time"), search=True,
    ),
    "shape": Experiment(
        "Deeper or wider, on the same text?", shapes(), seeds=SEEDS[:1],
        columns=("val_bpb", "val_word_ppl", "n_params", "step_time"), search=True,
    ),
    "dropout": Experiment(
        "From how many readings of a text on does dropout pay?", dropouts(), columns=("val_bpb", "best_step", "steps"),
        search=True,
    ),
    "momentum": Experiment(
        "Which momentum suits Muon, with small and with large batches?", momenta(), columns=("val_bpb", "steps"),
        search=True,
    ),
    "additions": Experiment(
        "Do a few more lines make v4 better?", additions(), columns=("val_bpb", "val_word_ppl"), search=True,
    ),
    "two_hours": Experiment(
        "How good a model of WikiText-2 can two cores train in two hours?", two_hours(), seeds=SEEDS[:1],
        columns=("val_bpb", "val_bpb_sliding", "val_word_ppl_sliding", "steps", "n_params"), search=True,
    ),
    "best": Experiment(
        "What does v4 reach in two hours of training, alone and together with a second network?",
        [Run("v4, two hours", V4, BEST, measure="best"), Run(WITH_ADDITIONS, V4, SECOND, ADDITIONS)],
        seeds=SEEDS[:1],
        columns=("val_bpb", "val_bpb_sliding", "val_word_ppl_sliding", "steps", "train_seconds"),
    ),
}  # fmt: skip


def owner(run):
    """(name of an experiment, its run) for the first run with the same training as `run`."""
    training = run.training()
    for name, experiment in EXPERIMENTS.items():
        for other in experiment.runs:
            if other.rung == run.rung and other.training() == training:
                return name, other
    return None, run


def all_constants(run, seed, gpu=False):
    """The constants of a run, except a number of steps that must be computed."""
    rung = vars(importlib.import_module(run.rung)) if gpu else {}
    constants = {k: v for k, v in GPU.items() if k in rung} | run.constants | {"SEED": seed}
    if run.vocab_size not in (0, 4096):  # 4,096: the vocabulary in data/
        constants["VOCABULARY"] = f"bpe_vocab_{run.vocab_size}.json"
    return constants
