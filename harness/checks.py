"""Checks that report a mistake before it causes harm: constants that contradict each other or have no effect, and ids
or texts that do not fit a model."""

import math
import os
import platform
import shlex
from pathlib import Path

import torch

from harness.errors import InputError, UserError

# ----------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------


def conflicts(h, chosen, processes=1):
    """Yield a line for each of the constants `h`, {name: value}, that contradicts another or has no effect. One that
    merely has no effect is reported only if the user has set it: `chosen`. Raises UserError for what cannot work."""
    if h.get("PROMPT") is None:
        _check_devices(h, processes)
        yield from _text(h)
        yield from _batches(h, chosen, processes)
        yield from _schedule(h, chosen)
        yield from _model(h, chosen)
    yield from _sampling(h, chosen)


def _check_devices(h, processes):
    """Raises UserError if several processes cannot use the DEVICE together."""
    device = h.get("DEVICE", "cpu")
    if processes > 1 and device not in ("cpu", "cuda"):
        one = f"names one GPU, but each of the {processes} processes needs its own; set DEVICE=cuda"
        none = "works with one process only; set DEVICE=cpu, or start without torchrun"
        raise UserError(f"DEVICE={device} {one if device.startswith('cuda') else none}")


def _text(h):
    """Checks of DATA, the folder of the text. Raises UserError if it is a file."""
    folder, here, own = Path(h.get("DATA", "data")), Path.cwd() / "data", Path(__file__).absolute().parents[1] / "data"
    if folder.is_file():
        new = f"data/{folder.name.partition('.')[0]}"
        raise UserError(f"DATA={folder} is a file, but DATA must name a dataset folder; make one with python "
                        f"data/prepare.py --from {shlex.quote(str(folder))} --to {new}, and set DATA={new}")
    if folder == Path("data") and here.is_dir() and not here.samefile(own) and any(here.glob("bpe_vocab*.json")):
        yield f"DATA=data always means {own}; to use the folder data/ in the current folder, write DATA={here}"


def _batches(h, chosen, processes):
    """Checks of windows, batches and micro-batches."""
    batch, micro, window = h.get("BATCH_SIZE", 1) // processes, h.get("MICRO_BATCH_SIZE"), h.get("BLOCK_SIZE", math.inf)
    if micro is not None and micro < batch and batch % micro and "COMPILE" in h:
        fits = next(n for n in range(micro, 0, -1) if batch % n == 0)
        larger = "" if h.get("RESUME") else f", or BATCH_SIZE={-(-batch // micro) * micro * processes}"
        each = f", {batch} for each process," if processes > 1 else ""
        raise UserError(f"BATCH_SIZE={h['BATCH_SIZE']}{each} is not a multiple of MICRO_BATCH_SIZE={micro}, and "
                        f"compiled code works for one shape only; set MICRO_BATCH_SIZE={fits}{larger}")  # fmt: skip
    if micro is not None and micro > batch and "MICRO_BATCH_SIZE" in chosen:
        yield f"MICRO_BATCH_SIZE={micro} is larger than a batch: its {batch} windows form one micro-batch"
    if "CHUNK_SIZE" in chosen and h["CHUNK_SIZE"] > min(batch, micro or batch) * window:
        tokens = min(batch, micro or batch) * window
        yield f"CHUNK_SIZE={h['CHUNK_SIZE']} is larger than a micro-batch: its {tokens} tokens form one chunk"
    if h.get("STRIDE", 0) >= window:
        yield f"STRIDE={h['STRIDE']} is not below BLOCK_SIZE={window}: in the last evaluation, windows do not overlap"
    if h.get("CONTEXT_SIZE", 0) > window:
        yield (f"CONTEXT_SIZE={h['CONTEXT_SIZE']} is larger than BLOCK_SIZE={window}: in training, the rest of the "
               "context stays empty")  # fmt: skip


def _schedule(h, chosen):
    """Checks of steps and learning rates."""
    steps, warmup, cooldown = h.get("MAX_STEPS", 0), h.get("WARMUP_STEPS", 0), h.get("COOLDOWN")
    if cooldown is not None and steps and warmup:
        fall = max(1, cooldown * steps)
        crossing = math.floor((steps * warmup - fall) / (warmup + fall))  # the step at which the two lines meet
        peak = max(min(1, (step + 1) / warmup, (steps - step) / fall) for step in (max(0, crossing), crossing + 1))
        if peak < 1:
            yield (f"WARMUP_STEPS={warmup} and COOLDOWN={cooldown:g} overlap in MAX_STEPS={steps}: the learning rates "
                   f"rise to {peak:.0%} of their peaks")  # fmt: skip
    for name in ("LEARNING_RATE", "LEARNING_RATE_ADAMW"):
        if h.get(name) == 0:
            yield f"{name}=0: the weights that it applies to do not change"
    if "EVAL_INTERVAL" in chosen and h["EVAL_INTERVAL"] > steps:
        yield (f"EVAL_INTERVAL={h['EVAL_INTERVAL']} is larger than MAX_STEPS={steps} and has no effect: the run is "
               "evaluated after its last step anyway")  # fmt: skip


def _model(h, chosen):
    """Checks of positions, dropout and precision."""
    device, dropout, positions = h.get("DEVICE", "cpu"), h.get("DROPOUT", 0), h.get("POSITION", "")
    names = [name.strip() for name in positions.split(",")]
    width, unit = h.get("N_EMBD", 0), h.get("N_HEAD", 1) * (2 if "rope" in names else 1)
    unit *= 1 + ("sinusoidal" in names and unit % 2)
    if "N_HEAD" in h and width % unit:
        even = " twice" if unit > h["N_HEAD"] else ""
        raise UserError(f"N_EMBD={width} is not a multiple of{even} N_HEAD={h['N_HEAD']}, but the heads share the width"
                        f"{', half of it for sines' if even else ''}; set N_EMBD={max(unit, width // unit * unit)}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield f"POSITION={positions} names {', '.join(repeated)} twice: each scheme is trained only once"
    if "ROPE_BASE" in chosen and not {"rope", "sinusoidal"} & set(names):
        yield f"ROPE_BASE={h['ROPE_BASE']:g} has no effect with POSITION={positions}: only rope and sinusoidal use it"
    sizes = h.get("EXTRAPOLATION", ())
    if repeated := sorted({n for n in sizes if sizes.count(n) > 1}):
        yield f"EXTRAPOLATION={','.join(map(str, sizes))} names {', '.join(map(str, repeated))} twice"
    share = min(255, round(256 * dropout)) / 256  # as kernels.Dropout rounds it
    if device == "cpu" and abs(share - dropout) > 0.1 * min(dropout, 1 - dropout):
        none = ", so nothing is dropped" if share == 0 else ""
        yield f"DROPOUT={dropout:g} is rounded to a multiple of 1/256 on a CPU, here {share:.3g}{none}"
    if h.get("DTYPE") == "bfloat16" and not _has_bfloat16(device):
        yield f"DTYPE=bfloat16 is slow here: the {device} has no instructions for it; float32 is faster"


def _has_bfloat16(device):
    """Whether the device has instructions for bfloat16; True if that is unknown."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return not (device == "cpu" and known and platform.machine() in ("x86_64", "AMD64")) or known()


def _sampling(h, chosen):
    """Checks of sampling."""
    filters = {"TOP_K": h.get("TOP_K", 0) > 0, "TOP_P": h.get("TOP_P", 1) < 1}
    greedy = "TEMPERATURE=0" if h.get("TEMPERATURE") == 0 else "TOP_K=1" if h.get("TOP_K") == 1 else None
    idle = [name for name, used in filters.items() if used and f"{name}=1" != greedy]
    if greedy == "TOP_K=1":
        idle = [name for name in ("TEMPERATURE", "TOP_P") if name in chosen]
    if greedy and idle:
        values = " and ".join(f"{name}={h[name]:g}" for name in idle)
        yield f"{greedy} always takes the likeliest token: {values} {'has' if len(idle) == 1 else 'have'} no effect"
    if h.get("SAMPLES", 1) > 1 and (greedy or h.get("PROMPT") is None):
        why = f"with {greedy} all samples are the same" if greedy else "a run without PROMPT writes one sample only"
        yield f"SAMPLES={h['SAMPLES']}: {why}"


def process_count():
    """How many processes torchrun has started: 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


# ----------------------------------------------------------------------------------------------------------
# Ids and texts
# ----------------------------------------------------------------------------------------------------------


def check_ids(model, idx, targets=None):
    """The first line of a model's forward: raises UserError if `idx` (B, T), or `targets` of the same shape, are not
    ids for this model. It costs nothing in compiled code, and never waits for a GPU in training or generation."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(idx, torch.Tensor) or idx.dim() != 2:
        found = f"shape {tuple(idx.shape)}" if isinstance(idx, torch.Tensor) else f"type {type(idx).__name__}"
        raise InputError(f"a model takes ids as a tensor (B, T), windows by tokens, but these have {found}; for one "
                         "text write torch.tensor([ids])")  # fmt: skip
    if idx.numel() == 0:
        raise InputError("there are no ids, but a model needs a token to predict the next one; give at least one")
    if idx.dtype not in (torch.int64, torch.int32):
        raise InputError(f"ids must be whole numbers of type int64, but these are {idx.dtype}; write idx.long()")
    positions = getattr(model._modules.get("position_embedding"), "num_embeddings", math.inf)
    if idx.size(1) > positions:
        raise InputError(f"the window has {idx.size(1)} tokens, but the model has learned only {positions} positions; "
                         f"give it windows of at most {positions} tokens, such as idx[:, -{positions}:]")  # fmt: skip
    if targets is not None and (targets.shape != idx.shape or targets.device != idx.device):
        raise InputError(f"the targets have shape {tuple(targets.shape)} on {targets.device}, but the ids have "
                         f"{tuple(idx.shape)} on {idx.device}; give one target for each id, there")  # fmt: skip
    table = _table(model)
    if table is None:
        return
    if idx.device != table.device:
        raise InputError(f"the ids are on {idx.device}, but the model is on {table.device}; write "
                         f"idx.to('{table.device}')")  # fmt: skip
    if idx.numel() == 1:  # a generated token
        known = not idx.is_cpu or 0 <= idx.item() < len(table)
    elif idx.is_cpu or not model.training and (torch.is_grad_enabled() or len(idx) > 1):  # generation has one row
        known = _within(idx, len(table))
    else:
        known = True
    if not known:
        raise _outside(idx.flatten().tolist(), len(table))
    if targets is not None and targets.is_cpu and not _within(targets, len(table), -100):  # cross_entropy skips -100
        raise _outside(targets[targets != -100].tolist(), len(table))


def check_prompt(model, ids):
    """The first line of `generate`: raises UserError if the model cannot continue the list `ids`. Thanks to it, a GPU
    need not check the ids again for each new token."""
    table = _table(model)
    if not len(ids):
        raise InputError("there are no ids to continue; give at least one token, such as the start of a document")
    if any(isinstance(id, (str, float, list)) for id in ids):
        raise InputError("generate continues a list of ids, which are whole numbers; write tokenizer.encode(text)")
    if table is not None and not 0 <= min(ids) <= max(ids) < len(table):
        raise _outside(ids, len(table))


def check_tokens(model, tokens):
    """The first line of `evaluate`: raises UserError if the ids of `tokens`, one split, are not from the model's
    vocabulary."""
    if isinstance(tokens, dict):
        raise InputError(f"evaluate takes the tokens of one split; choose one, such as tokens[{list(tokens)[0]!r}]")
    own, table = getattr(model, "fingerprint", None), _table(model)
    advice = ("tokenize the text with the model's own vocabulary: python data/prepare.py --from TEXT --to DIR "
              "--vocabulary RUN/vocabulary.json")  # fmt: skip
    if own is not None and own != tokens.fingerprint:
        raise InputError(f"the model was trained with the vocabulary {own}, but these tokens are ids of another one, "
                         f"{tokens.fingerprint}; {advice}")  # fmt: skip
    if own is None and table is not None and (largest := int(tokens.ids.numpy().max())) >= len(table):
        raise InputError(f"these tokens have ids up to {largest}, but the model's vocabulary ends at {len(table) - 1}: "
                         f"they are from another vocabulary; {advice}")  # fmt: skip


def _table(model):
    """The weight with a row for each token of a model's vocabulary, or None if no weight has one of the usual names."""
    return model._parameters.get("table") if "table" in model._parameters else getattr(
        model._modules.get("embedding"), "weight", None)  # fmt: skip


def _within(ids, vocab_size, lowest=0):
    low, high = ids.aminmax()
    return lowest <= low.item() and high.item() < vocab_size


def _outside(ids, vocab_size):
    id = next(id for id in ids if not 0 <= id < vocab_size)
    return InputError(f"there is no token {id}: the model's vocabulary has ids 0 to {vocab_size - 1}; encode the text "
                      "with the tokenizer of the model")  # fmt: skip
