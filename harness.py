"""The frame around every run: constants, processes, devices, the run's folder and checkpoints, pictures, errors.

Its rule: nothing in here changes a loss, except by rounding. What decides a loss stands in the rungs.

    if __name__ == "__main__":
        harness.start(globals())             # NAME=value, --help, errors in one line; then main()

    with harness.Run(globals()) as run:      # checks the constants, locks OUT_DIR
        run.begin(model, tokens)             # says what is trained
        state = run.resume(model, optimizer) # with RESUME=True from the last checkpoint
        if run.evaluation_due(step): ...
        run.log(step, metrics)               # an evaluation: screen, log.jsonl, checkpoint
        run.step(loss, grad_norm)            # a step: steps.csv; Ctrl-C saves and ends; a loss that is not finite stops
        best = run.load_best(model)          # training is over: the best weights, and their evaluation
        summary = run.finish(sample)         # summary.json, loss.png, sample.txt, and what to say at the end

    model, tokenizer = harness.load("runs/v3")  # what a run of any rung has trained

A rung is handed over as its `globals()`, so its constants are read when they are used.
"""

import ast
import contextlib
import ctypes
import difflib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

# ----------------------------------------------------------------------------------------------------------
# Help, before the libraries are loaded, which takes a second or two
# ----------------------------------------------------------------------------------------------------------


def _read_source(path):
    """({constant: its comment}, {constant: its value as it is written}, all names that the file gives to something) of
    the file of a rung."""
    source = Path(path).read_text(encoding="utf-8")
    tree, lines, comments, values, names = ast.parse(source), source.split("\n"), {}, {}, set()
    for node in itertools.takewhile(lambda node: not isinstance(node, (ast.FunctionDef, ast.ClassDef)), tree.body):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name) and target.id.isupper():
                rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
                comments[target.id] = rest.partition("#")[2].strip()
                values[target.id] = ast.unparse(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return comments, values, names


def usage(path):
    """What --help says: the docstring of the rung in the file `path`, and its constants with their comments."""
    comments, values, _ = _read_source(path)
    lines = [ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or "", ""]
    lines += ["Constants, to be set as NAME=value:", ""]
    lines += [f"  {f'{name} = {values[name]}':34}  {comment}".rstrip() for name, comment in comments.items()]
    return "\n".join(lines)


class Unbreakable:
    """Standard output or error, which costs no run: what cannot be written there (a closed pipe, a full disk) is lost,
    a character that it cannot show becomes an escape, and every line is there at once."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # none: it was closed
        self.stream.reconfigure(line_buffering=True, errors="backslashreplace")

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return len(text)

    def flush(self):
        self.write("")
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _answer_help():
    """Print the help and end, if the program is a rung that was asked for it."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__)
    with contextlib.suppress(OSError, ValueError):
        if {"-h", "--help"} & set(sys.argv[1:]) and "\n    harness.start(globals())" in path.read_text("utf-8"):
            print(usage(path), file=Unbreakable(sys.stdout))
            sys.exit()


_answer_help()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bpe_tokenizer import BPETokenizer  # noqa: E402
from data import vocabulary_file  # noqa: E402

try:
    import fcntl  # locks on files
except ImportError:  # Windows
    fcntl = None

DIVERGED = 1e12  # nats from which on a loss counts as not finite: no model comes back from there
PROGRESS_SECONDS = 30  # between two lines of progress where there is no terminal for a bar
KEPT_RUNS = 10  # earlier runs that are kept beside an OUT_DIR
RUN_FILES = ("checkpoint.pt", "checkpoint_before.pt", "checkpoint_new.pt", "log.jsonl", "steps.csv", "summary.json",
             "sample.txt", "model.pt", "vocabulary.json", "loss.png", "embeddings.png",
             "extrapolation.png")  # fmt: skip
STEP_COLUMNS = ("step", "tokens_seen", "loss", "learning_rate", "grad_norm", "tokens_per_second")  # of steps.csv


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------

_COUNT = (int, "a whole number from 1 to 2147483647", lambda v: 1 <= v < 2**31)
_FROM_ZERO = (int, "a whole number from 0 to 2147483647", lambda v: 0 <= v < 2**31)
_RATE = (float, "a number from 0 to 1e30", lambda v: 0 <= v <= 1e30)  # Adam's first step divides it by 0.1
_SHARE = (float, "a number from 0 to below 1", lambda v: 0 <= v < 1)
_FLAG = (bool, "True or False", lambda v: True)
_TEXT = (str, "a text", lambda v: True)
RULES = {  # name: (type, what a value must be, whether a value of the type is possible)
    **dict.fromkeys(("BATCH_SIZE", "MICRO_BATCH_SIZE", "CHUNK_SIZE", "BLOCK_SIZE", "CONTEXT_SIZE", "MAX_STEPS",
                     "EVAL_INTERVAL", "PATIENCE", "N_HEAD", "N_EMBD", "N_HIDDEN", "STRIDE",
                     "SAMPLE_TOKENS"), _COUNT),
    **dict.fromkeys(("SEED", "WARMUP_STEPS", "TOP_K"), _FROM_ZERO),
    **dict.fromkeys(("LEARNING_RATE", "LEARNING_RATE_ADAMW", "WEIGHT_DECAY", "GRAD_CLIP"), _RATE),
    **dict.fromkeys(("DROPOUT", "MOMENTUM"), _SHARE),
    **dict.fromkeys(("COMPILE", "RESUME"), _FLAG),
    **dict.fromkeys(("VOCABULARY", "POSITION", "DEVICE"), _TEXT),
    "N_LAYER": (int, "a whole number from 1 to 10000", lambda v: 1 <= v <= 10000),
    "PROMPT": (type(None), "a text or None", lambda v: True),
    "INIT_FROM": (type(None), "the name of a folder or None", lambda v: v is None or v.strip() and "\0" not in v),
    "COOLDOWN": (float, "a number from 0 to 1", lambda v: 0 <= v <= 1),
    "TEMPERATURE": (float, "0, for the likeliest token, or 0.0001 or more", lambda v: v == 0 or 1e-4 <= v <= 1e38),
    "TOP_P": (float, "a number above 0, at most 1", lambda v: 0 < v <= 1),
    "ROPE_BASE": (float, "a number above 1", lambda v: 1 < v <= 1e38),
    "DTYPE": (str, '"auto", "float32" or "bfloat16"', lambda v: v in ("auto", "float32", "bfloat16")),
    **dict.fromkeys(("OUT_DIR", "DATA"), (str, "the name of a folder", lambda v: v.strip() != "" and "\0" not in v)),
    "EXTRAPOLATION": (tuple, "whole numbers from 1 on, with commas between them",
                      lambda v: len(v) > 0 and all(type(n) is int and 1 <= n < 2**20 for n in v)),
}  # fmt: skip
SHAPE = ("VOCABULARY", "BLOCK_SIZE", "CONTEXT_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "N_HIDDEN", "POSITION", "ROPE_BASE")
# What a resumed run may change. In silence: what only says how to run. With a line: what the next steps depend on. The
# rest, shape and order of the data, must stay.
MAY_CHANGE = ("EVAL_INTERVAL", "PATIENCE", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "STRIDE", "EXTRAPOLATION",
              "DEVICE", "DATA", "OUT_DIR", "RESUME", "INIT_FROM", "PROMPT")  # fmt: skip
MAY_CHANGE_WITH_A_LINE = ("MAX_STEPS", "LEARNING_RATE", "LEARNING_RATE_ADAMW", "WARMUP_STEPS", "COOLDOWN", "MOMENTUM",
                          "WEIGHT_DECAY", "GRAD_CLIP", "DROPOUT", "DTYPE", "COMPILE", "MICRO_BATCH_SIZE",
                          "CHUNK_SIZE")  # fmt: skip


def constants(rung):
    """The hyperparameters of a rung, {name: value}: the UPPER_CASE names set in its file before the first function."""
    return {name: rung[name] for name in _read_source(rung["__file__"])[0]}


def set_constants(rung, arguments):
    """Set constants from NAME=value arguments. Raises ValueError for an unknown name or a value of another type."""
    known = constants(rung)
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name not in known:
            raise ValueError(f"there is no constant {name!r}; known are {', '.join(known)}")
        kind, must, _ = RULES.get(name, (type(known[name]), f"of type {type(known[name]).__name__}", None))
        value = None if (name, text) == ("INIT_FROM", "None") else text
        if kind not in (str, type(None)):
            try:
                value = ast.literal_eval(text)
                value = (value,) if kind is tuple and type(value) is int else value
                value = float(value) if kind is float and type(value) is int else value
            except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
                value = None
            if type(value) is not kind:
                raise ValueError(f"{name}={text}: {name} must be {must}")
        rung[name] = value


def check_constants(rung):
    """Raises ValueError if a constant has an impossible value, or one was set that the rung does not have, or DEVICE
    cannot be used here."""
    known, names = constants(rung), _read_source(rung["__file__"])[2]
    for name in rung.keys() - names:
        if name.isupper() and type(rung[name]) in (bool, int, float, str, tuple):
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"there is no constant {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    for name, value in known.items():
        if name in RULES:
            kind, must, possible = RULES[name]
            kinds = {float: (int, float), type(None): (str, type(None))}.get(kind, (kind,))
            if type(value) not in kinds or not possible(value):
                raise ValueError(f"{name}={value} must be {must}")
    try:
        torch.zeros(1, device=known["DEVICE"]).item()
    except Exception as error:  # of many kinds
        why = first_line(error)
        raise ValueError(f"DEVICE={known['DEVICE']} cannot be used here: {why.split('. ')[0]}") from None
    if known["DEVICE"].startswith("cpu:"):  # torch would not load what it has saved from there
        raise ValueError(f"DEVICE={known['DEVICE']} must be cpu: there is one")


# ----------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------


def rank():
    """Number of this process, from 0, among those that torchrun started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together: 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Return when all processes have come to this place."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(x):
    """The sum over all processes of the tensor `x`, on the CPU."""
    if world_size() > 1:
        x = x.to("cuda") if dist.get_backend() == "nccl" else x
        dist.all_reduce(x)
    return x.cpu()


@contextlib.contextmanager
def init_distributed(rung):
    """Within, the processes that torchrun started know each other, and the first of them talks. Raises ValueError if
    they cannot work together."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    on_gpu, local_rank, n = rung["DEVICE"].startswith("cuda"), int(os.environ["LOCAL_RANK"]), os.environ["WORLD_SIZE"]
    if "harness.rank()" not in Path(rung["__file__"]).read_text(encoding="utf-8"):
        raise ValueError(f"this rung trains in one process: python {Path(rung['__file__']).name}")
    if rung["BATCH_SIZE"] % int(n):
        raise ValueError(f"BATCH_SIZE={rung['BATCH_SIZE']} must be a multiple of the {n} processes")
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs here")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
        yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


@contextlib.contextmanager
def main_process_first():
    """Within, the first process of each machine goes ahead, and the others follow when it is done."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank:
        barrier()
    yield
    if not local_rank:
        barrier()


def exchange_gradients(model, now):
    """Context of a forward and backward pass: `now` says whether the processes average their gradients in it, as they
    do in the last of several micro-batches."""
    return model.no_sync() if world_size() > 1 and not now else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------
# Devices
# ----------------------------------------------------------------------------------------------------------

_dtypes = {}  # device: what "auto" means there, found out once


def resolve_dtype(device, dtype):
    """Name of the type that matrix products use: `dtype`, or for "auto" the faster of float32 and bfloat16."""
    if dtype != "auto":
        return dtype
    if device not in _dtypes:
        _dtypes[device] = "bfloat16" if _bfloat16_is_faster(device) else "float32"
    return _dtypes[device]


def _bfloat16_is_faster(device):
    """Whether products of bfloat16 matrices clearly beat float32 on this device."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(10):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


def autocast(device, dtype):
    """Context in which matrix products run in `dtype`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=resolve_dtype(device, dtype) == "bfloat16")


def seed(*numbers):
    """Begin the stream of torch's random numbers that belongs to these whole numbers, independent of all others."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def keep_freed_memory():
    """Let the C library keep freed memory for the next step: fresh pages cost more than computing on them (glibc,
    mallopt(3)). The opposite of v1_1, which trades speed for memory."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library: it goes without
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for large arrays, which would be returned at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        Run.keeps_freed_memory = True


def peak_memory_mb(device):
    """Peak resident memory of this process, or the accelerator's peak allocation, in MB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def atomic_write(path, write):
    """Make the file `path` by `write(file)`, whole or not at all, and on the disk when this returns. Of several
    processes the first one does it. Raises OSError."""
    if rank():
        return
    path = Path(path)
    beside = path.with_name("writing-" + path.name)
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch answers a full disk with errors of its own
        why = getattr(error.__context__ or error, "strerror", None) or f"disk full? {str(error).splitlines()[0]}"
        raise OSError(f"cannot write {path}: {why}; make room, or choose another OUT_DIR") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _load_file(path, device, keys):
    """Read what `Run` saved. Raises FileNotFoundError if it is not there, ValueError if it is damaged or without one of
    `keys`."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        return {key: saved[key] for key in keys}
    except Exception:  # torch and pickle raise many kinds for a damaged file
        raise ValueError(f"{path} is damaged or no file of this program; delete it and train again") from None


def _load_weights(model, weights, path):
    """Give `model` the weights that were read from `path`. Raises ValueError if they are those of another model."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError(f"the weights in {path} do not fit this model: they are of another rung, or the model has "
                         "been changed since; choose another OUT_DIR, or train again") from None  # fmt: skip


@contextlib.contextmanager
def _temporarily(rung, values):
    """Within, the names in `values` have these values in the rung."""
    before = {name: rung[name] for name in values}
    rung.update(values)
    try:
        yield
    finally:
        rung.update(before)


def _find_model(folders):
    """The first of `folders`, below the current folder or this one, that holds a trained model. Raises
    FileNotFoundError."""
    bases = dict.fromkeys((Path.cwd(), Path(__file__).resolve().parent))
    places = [base / folder for base in bases for folder in folders]
    for place in places:
        if (place / "model.pt").exists():
            return place
    looked = dict.fromkeys(str(place.parent if len(folders) > 1 else place) for place in places)
    below = dict.fromkeys(str(path.parent) for place in places for path in sorted(place.glob("*/model.pt")))
    mend = (f"it has models below it, name one: {', '.join(below)}" if below
            else "train one first, or name the folder of a run that has one")  # fmt: skip
    raise FileNotFoundError(f"there is no trained model in {' or '.join(looked)}; {mend}")


def _load_model(folder, device):
    """What `Run.save_best` wrote in `folder`: (contents of model.pt, tokenizer). Raises OSError and ValueError."""
    saved = _load_file(folder / "model.pt", device, ("rung", "model", "hyperparameters", "fingerprint", "start"))
    tokenizer = BPETokenizer.load(folder / "vocabulary.json")
    if saved["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"{folder / 'vocabulary.json'} is not the vocabulary that the model beside it was trained "
                         "with; put that one back, or train again")  # fmt: skip
    return saved, tokenizer


def _build(rung, saved, tokenizer, folder):
    """The model of a rung (its globals) with the shape and the weights of `saved`, ready to evaluate."""
    if saved["rung"] != Path(rung["__file__"]).stem:
        raise ValueError(f"the model in {folder} is of {saved['rung']}.py, not of {Path(rung['__file__']).name}")
    shape = {k: v for k, v in saved["hyperparameters"].items() if k in (*SHAPE, "DROPOUT") and k in rung}
    with _temporarily(rung, shape):
        scheme = [shape["POSITION"]] if "POSITION" in shape else []
        model = rung["LanguageModel"](tokenizer.vocab_size, *scheme).to(rung["DEVICE"])
    _load_weights(model, saved["model"], folder / "model.pt")
    return model.eval()


def load(folder):
    """(model, tokenizer) that a run of any rung has left in `folder`, such as "runs/v3" or "runs/v4_alibi_rope/rope".

    model(idx) gives logits (B, T, V) for ids (B, T) on the DEVICE of the rung. It has the shape that it was trained
    with, whatever the constants of the rung are. Raises FileNotFoundError if there is no model, ValueError if it is
    damaged or of a rung that has been changed since.
    """
    folder = _find_model([folder])
    name = _load_file(folder / "model.pt", "cpu", ("rung",))["rung"]
    try:
        rung = vars(importlib.import_module(name))
    except ImportError:
        raise ValueError(f"the model in {folder} is of {name}.py, which cannot be imported from here") from None
    saved, tokenizer = _load_model(folder, rung["DEVICE"])
    return _build(rung, saved, tokenizer, folder), tokenizer


def continue_prompt(rung, *folders):
    """Print PROMPT and what the trained model in the first of `folders` that has one makes of it, as it comes: an
    empty one begins as the text that it was trained on. Returns the text."""
    check_constants(rung)
    folder = _find_model(folders)
    saved, tokenizer = _load_model(folder, rung["DEVICE"])
    model = _build(rung, saved, tokenizer, folder)
    ids = tokenizer.encode(rung["PROMPT"], tokenizer.special_tokens) or saved["start"]
    torch.manual_seed(rung["SEED"])
    pieces = []
    for piece in tokenizer.decode_stream(itertools.chain(ids, rung["generate"](model, ids, rung["SAMPLE_TOKENS"]))):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


# ----------------------------------------------------------------------------------------------------------
# A run
# ----------------------------------------------------------------------------------------------------------


def _duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 5400 else (
        f"{seconds / 3600:.1f} h")  # fmt: skip


class Run:
    """One training run of a rung in its folder OUT_DIR. `changed`: constants that differ from those of the rung, as
    OUT_DIR and POSITION do for each scheme of v4.

    As a context it holds the lock of its folder, and puts back what it changes in the process.
    """

    keeps_freed_memory = False

    def __init__(self, rung, parent=None, **changed):
        if parent is None:  # later the file may have been edited
            check_constants(rung)
        import torch._dynamo  # noqa: F401 - torch.optim loads it when first used: it counts as a library

        self.rung, self.parent, self.name = rung, parent, Path(rung["__file__"]).stem
        self.constants = {**(parent.constants if parent else constants(rung)), **changed}
        self.device, self.out_dir = self.constants["DEVICE"], Path(self.constants["OUT_DIR"])
        self.import_mb = parent.import_mb if parent else peak_memory_mb(self.device)
        self.state = SimpleNamespace(step=0, best=math.inf, bad_evals=0)
        self.records, self.losses, self.seconds = [], [], 0.0  # evaluations, losses since the last, of training
        self.saved = self.bar = self.compiled = None
        self.estimated = self.began_evaluation = self.evaluation_seconds = 0.0
        self.signals, self.handlers = [], {}
        self.closing = contextlib.ExitStack()

    def part(self, name, **changed):
        """A run within this one, in the folder `name` below its own."""
        return Run(self.rung, self, OUT_DIR=str(self.out_dir / name), **changed)

    def __enter__(self):
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            if self.parent is None and rank() == 0:
                self._lock()
        except FileExistsError:
            raise ValueError(f"OUT_DIR={self.out_dir} is a file; name a folder") from None
        except OSError as error:
            raise ValueError(f"OUT_DIR={self.out_dir} cannot be used: {error.strerror}") from None
        if self.device == "cpu":  # else parallel additions come in any order, and no two runs are the same
            usual = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads memory before it is written
            self.closing.callback(torch.use_deterministic_algorithms, usual[0])
            self.closing.callback(setattr, torch.utils.deterministic, "fill_uninitialized_memory", usual[1])
        return self

    def __exit__(self, kind, error, traceback):
        if self.bar is not None:
            self.bar.close()
        self._restore_signals()
        self.closing.close()
        if kind is None and self.parent is None:
            names = sorted(path.name for path in self.out_dir.glob("[!cw]*.*"))  # no checkpoints, nothing half written
            print(f"results in {self.out_dir}: {', '.join(names)}")

    def _lock(self):
        """Keep other processes from training in the folder. The lock ends with this process."""
        path = self.out_dir / "lock"
        if fcntl is None:
            return
        file = self.closing.enter_context(open(path, "a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"process {path.read_text().strip()} is training in {self.out_dir}; wait for it, stop it, "
                             "or choose another OUT_DIR") from None  # fmt: skip
        except OSError as error:  # a file system without locks
            print(f"{self.out_dir} cannot be locked ({error.strerror}): do not start a second run in it")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()

    # -- Beginning and resuming ----------------------------------------------------------------------------

    def begin(self, model, tokens):
        """Say what is trained on which text: `tokens` as `load_tokens` gives them."""
        self.rung["get_batch"](tokens["train"].ids, 0)  # what makes no batch is refused before a run is moved aside
        self.model, self.tokens, self.n_params = model, tokens, sum(p.numel() for p in model.parameters())
        step_tokens = self.constants["BATCH_SIZE"] * self.constants["BLOCK_SIZE"]
        self.eval_interval = max(1, min(self.constants["EVAL_INTERVAL"], len(tokens["train"]) // step_tokens))
        self.label = f"{self.name}, {self.constants['POSITION']}," if self.parent else self.name
        print(f"{self.label} on {tokens['train'].dataset}: {self.n_params:,} parameters, {len(tokens['train']):,} "
              f"training tokens, {self.constants['MAX_STEPS']:,} steps, {self.device}, results in {self.out_dir}")
        if self.device != "cpu":
            print(f"on {self.device} two runs of one seed differ by rounding")
        vocabulary = vocabulary_file(self.constants["VOCABULARY"], self.constants["DATA"])
        self.vocabulary = vocabulary.read_bytes()  # the run keeps its own copy

    def init_from(self, folder):
        """Start from the weights of the finished run in `folder`, or of the scheme in it that this one trains, unless a
        checkpoint is there to resume. Raises ValueError if its model has another shape or vocabulary."""
        if self.constants["RESUME"] and any(self.out_dir.glob("checkpoint*.pt")):
            return
        folder = _find_model([folder] if self.parent is None else [f"{folder}/{self.constants['POSITION']}", folder])
        saved, tokenizer = _load_model(folder, self.device)
        if saved["rung"] != self.name:
            raise ValueError(f"INIT_FROM={folder} holds a model of {saved['rung']}.py, and this is {self.name}.py")
        may_differ = ("VOCABULARY",) if "position_embedding.weight" in saved["model"] else ("VOCABULARY", "BLOCK_SIZE")
        differ = [f"{k}={v}" for k, v in saved["hyperparameters"].items()
                  if k in SHAPE and k not in may_differ and v != self.constants[k]]  # fmt: skip
        if differ:
            raise ValueError(f"INIT_FROM={folder} holds a model of another shape; set {' '.join(differ)}")
        if tokenizer.fingerprint != self.tokens["train"].fingerprint:
            raise ValueError(f"INIT_FROM={folder} holds a model with another vocabulary than this text; prepare the "
                             f"text with --vocabulary {folder / 'vocabulary.json'}")  # fmt: skip
        _load_weights(self.model, saved["model"], folder / "model.pt")
        print(f"starting from the weights in {folder}")

    def resume(self, model, *optimizers):
        """With RESUME=True load the last checkpoint, if there is one. Else what an earlier run left in the folder is
        moved aside. Returns the state: step, best loss, evaluations without a better one (bad_evals)."""
        self.optimizers = optimizers
        if self.constants["RESUME"] and any(self.out_dir.glob("checkpoint*.pt")):
            self._load_checkpoint()
        else:
            if self.constants["RESUME"]:
                print(f"there is no checkpoint in {self.out_dir} yet: RESUME=True begins a run")
            barrier()
            (self if self.constants["RESUME"] else self.parent or self)._move_aside()
            self.out_dir.mkdir(parents=True, exist_ok=True)
            barrier()
        if self.parent:
            self.parent.has_begun = True
        self._catch_signals()
        terminal = sys.stderr.isatty() and not rank()
        self._open_steps()
        self.bar = tqdm(total=self.constants["MAX_STEPS"], initial=self.state.step, desc="training", unit="step",
                        disable=not terminal)  # fmt: skip
        self.lines = not (sys.stdout.isatty() and sys.stderr.isatty())
        self.mark = self.said = time.perf_counter()
        self.first_step, self.first_seconds = self.state.step, self.seconds
        return self.state

    has_begun = False

    def _open_steps(self):
        """Begin steps.csv, or keep what it holds of the steps up to here."""
        if rank():
            return
        path, lines = self.out_dir / "steps.csv", []
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: it begins anew
            lines = path.read_text(encoding="utf-8").splitlines()[1:]
            lines = [line for line in lines if int(line.split(",")[0]) <= self.state.step and line.count(",") == 5]
        text = "".join(line + "\n" for line in (",".join(STEP_COLUMNS), *lines))
        atomic_write(path, lambda file: file.write(text.encode()))
        self.steps = self.closing.enter_context(open(path, "a", encoding="utf-8", buffering=1))

    def _write_step(self, loss, grad_norm, seconds):
        step_tokens, step = self.constants["BATCH_SIZE"] * self.constants["BLOCK_SIZE"], self.state.step
        try:
            self.steps.write(f"{step},{step * step_tokens},{loss:.6g},{self._rates()[0]:.6g},{grad_norm:.6g},"
                             f"{step_tokens / max(seconds, 1e-9):.0f}\n")  # fmt: skip
        except OSError as error:
            raise OSError(f"cannot write {self.out_dir / 'steps.csv'}: {error.strerror}; make room, and RESUME=True "
                          "goes on from the last checkpoint") from None  # fmt: skip

    def _move_aside(self):
        """Move what an earlier run left in the folder to one beside it. Of more than KEPT_RUNS of them, the one that
        trained least goes."""
        if rank() or self.has_begun or not self.out_dir.exists():
            return
        named = self.out_dir.name not in ("", "..") and not self.out_dir.is_symlink()
        folder = self.out_dir if named else self.out_dir.resolve()
        there = [folder / name for name in RUN_FILES if (folder / name).exists()]
        there += [folder / scheme for scheme in self.rung.get("SCHEMES", ())
                  if any((folder / scheme / name).exists() for name in RUN_FILES)]  # fmt: skip
        if not there:
            return
        aside = {int(path.suffix[1:]): path for path in folder.parent.iterdir()
                 if path.suffix[1:].isdecimal() and path.stem == folder.name}  # fmt: skip
        number = max(aside, default=0) + 1
        aside[number] = folder.with_name(f"{folder.name}.{number}")
        aside[number].mkdir()
        for path in there:
            path.rename(aside[number] / path.name)
        message = f"the earlier run in {folder} is now in {aside[number]}"
        aside = [path for path in aside.values() if not (path / "lock").exists()]  # else it is an OUT_DIR of its own
        if len(aside) > KEPT_RUNS:
            least = min(aside, key=_trained_seconds)
            shutil.rmtree(least, ignore_errors=True)
            message += f"; {KEPT_RUNS} are kept, so {least}, which had trained least, is deleted"
        print(message)

    def _load_checkpoint(self):
        keys = ("model", "optimizers", "step", "best", "bad_evals", "log", "losses", "seconds", "rates", "dataset",
                "fingerprint", "hyperparameters", "dtype", "compiled", "made_by")  # fmt: skip
        newest, before = self.out_dir / "checkpoint.pt", self.out_dir / "checkpoint_before.pt"
        try:
            saved = _load_file(newest, self.device, keys)
        except (OSError, ValueError) as error:
            if not before.exists():
                raise
            print(f"{error}; going on from the checkpoint before it")
            saved = _load_file(before, self.device, keys)
        self._check_same_run(saved)
        _load_weights(self.model, saved["model"], newest)
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, now):
                group.update(values)  # rates and decay are those of the constants
        self.state = SimpleNamespace(step=saved["step"], best=saved["best"], bad_evals=saved["bad_evals"])
        self.records, self.seconds, self.losses = saved["log"], saved["seconds"], saved["losses"].tolist()
        self.saved = saved
        print(f"going on from step {self.state.step:,}")

    def _check_same_run(self, saved):
        """Raises ValueError if the text, the tokenizer, or constants that decide model or batches, are others than
        those of the checkpoint; says which other constants have changed."""
        before, now, tokens = saved["hyperparameters"], self.constants, self.tokens["train"]
        changed = {k: f"{k} was {before.get(k)!r} and is {now.get(k)!r}"
                   for k in sorted({*before, *now} - {*MAY_CHANGE}) if before.get(k) != now.get(k)}  # fmt: skip
        differ = [text for name, text in changed.items() if name not in MAY_CHANGE_WITH_A_LINE]
        if saved["dataset"] != tokens.dataset:
            differ.append(f"the text was {saved['dataset']} and is {tokens.dataset}")
        if saved["fingerprint"] != tokens.fingerprint:
            differ.append(f"the tokenizer was {saved['fingerprint']} and is {tokens.fingerprint}")
        if differ:
            raise ValueError(f"to resume the run in {self.out_dir}, set back what differs: {'; '.join(differ)}")
        if saved["step"] > now["MAX_STEPS"]:
            raise ValueError(f"the run in {self.out_dir} has made {saved['step']} steps; MAX_STEPS={now['MAX_STEPS']} "
                             "must not be less")  # fmt: skip
        if changed:
            print(f"going on with other constants: {'; '.join(changed.values())}")
        if now["DEVICE"] == before["DEVICE"] and now.get("DTYPE") == before.get("DTYPE") == "auto":
            _dtypes[self.device] = saved["dtype"]
        elif saved["dtype"] != self.dtype:
            print(f"matrix products were {saved['dtype']} and are {self.dtype} from here on")
        if saved["made_by"] != self._made_by():
            print(f"begun on {saved['made_by']}; goes on with {self._made_by()}: losses may differ by rounding")

    def _made_by(self):
        return f"torch {torch.__version__}, {self.device}, {torch.get_num_threads()} threads, {world_size()} processes"

    @property
    def dtype(self):
        """Name of the type that matrix products use."""
        return resolve_dtype(self.device, self.constants.get("DTYPE", "float32"))

    def compile(self, model, batch):
        """The model as it is trained: compiled if COMPILE says so and it works with `batch`, (x, y), else with a line
        that says why not; shared by all processes, whose gradients DistributedDataParallel averages (Li et al. 2020,
        arXiv:2006.15704). Every process holds the whole model and sees its own part of each batch."""
        compiled, self.compiled = model, False
        if self.constants["COMPILE"]:
            print("compiling the model, which takes up to a minute (COMPILE=False starts at once)")
            try:
                compiled = self._share(torch.compile(model))
                with autocast(self.device, self.constants["DTYPE"]):
                    compiled(*batch).backward()
                model.zero_grad()
                self.compiled = True
            except Exception as error:  # a missing compiler shows in many ways
                print(f"training without torch.compile: {first_line(error)}")
        if self.saved and self.saved["compiled"] != self.compiled:
            before = "with" if self.saved["compiled"] else "without"
            print(f"the checkpoint is of a model {before} torch.compile: losses may differ by rounding")
        self.mark = time.perf_counter()
        return compiled if self.compiled else self._share(model)

    def _share(self, model):
        return nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model

    # -- While it trains -----------------------------------------------------------------------------------

    def evaluation_due(self, step):
        """Whether the loop should evaluate before this step. Training time does not pass until the next step begins.
        Before the first step only weights that were trained already are worth it."""
        due = step % self.eval_interval == 0 or step == self.constants["MAX_STEPS"]
        due = due and (step > 0 or self.constants.get("INIT_FROM") is not None)
        self.began_evaluation = time.perf_counter()
        return due and not (self.records and self.records[-1]["step"] == step)

    def save_best(self):
        """Keep the weights as they are now in model.pt, with the constants that give the model its shape, and the
        vocabulary beside them."""
        content = {"rung": self.name, "model": self.model.state_dict(), "hyperparameters": self.constants,
                   "fingerprint": self.tokens["train"].fingerprint,
                   "start": list(self.tokens["train"].start)}  # fmt: skip
        if not (self.out_dir / "vocabulary.json").exists():
            atomic_write(self.out_dir / "vocabulary.json", lambda file: file.write(self.vocabulary))
        atomic_write(self.out_dir / "model.pt", lambda file: torch.save(content, file))

    def log(self, step, metrics):
        """Note an evaluation of the validation split: on the screen, in log.jsonl, and in a checkpoint."""
        if not metrics["loss"] < DIVERGED:
            raise ValueError(self._not_finite("validation loss", metrics["loss"], step))
        train_loss = torch.tensor(self.losses).mean().item() if self.losses else None
        self.records.append({
            "step": step, "tokens_seen": step * self.constants["BATCH_SIZE"] * self.constants["BLOCK_SIZE"],
            "seconds": self.seconds, "train_loss": train_loss, **{f"val_{k}": v for k, v in metrics.items()},
        })  # fmt: skip
        self.bar.write(f"step {step:5}  {self.seconds:5.0f} s  training loss "
                       f"{f'{train_loss:.4f}' if self.losses else '-':>6}  val loss {metrics['loss']:.4f}  val bpb "
                       f"{metrics['bpb']:.4f}")  # fmt: skip
        self.losses = []
        self._write_log()
        self.checkpoint()
        if self.keeps_freed_memory:  # what evaluations and checkpoints leave in pieces would add up
            with contextlib.suppress(OSError, TypeError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
        if world_size() == 1:  # several processes agree on it in a step
            self._stop_if(len(self.signals))
        self.mark = time.perf_counter()
        self.evaluation_seconds = self.mark - self.began_evaluation

    def _write_log(self):
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        atomic_write(self.out_dir / "log.jsonl", lambda file: file.write(text.encode()))

    def checkpoint(self):
        """Save all that it takes to go on as checkpoint.pt; the one that was there is kept as checkpoint_before.pt."""
        if rank():
            return
        content = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            **vars(self.state), "log": self.records, "losses": torch.tensor(self.losses), "seconds": self.seconds,
            "rates": self._rates(), "dataset": self.tokens["train"].dataset,
            "fingerprint": self.tokens["train"].fingerprint, "hyperparameters": self.constants, "dtype": self.dtype,
            "compiled": self.compiled, "made_by": self._made_by(),
        }  # fmt: skip
        new, newest = self.out_dir / "checkpoint_new.pt", self.out_dir / "checkpoint.pt"
        atomic_write(new, lambda file: torch.save(content, file))
        if newest.exists():
            newest.replace(self.out_dir / "checkpoint_before.pt")
        new.replace(newest)

    def _rates(self):
        return [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, loss, grad_norm):
        """Count a step: its mean loss over the windows of this process, and the norm of its gradient. Raises ValueError
        if the loss is not finite; after Ctrl-C or SIGTERM saves a checkpoint and ends the program with exit code 130 or
        143."""
        loss, grad_norm = (x.item() if torch.is_tensor(x) else x for x in (loss, grad_norm))
        self.state.step += 1
        loss, stop = all_reduce(torch.tensor([loss, len(self.signals)], dtype=torch.double)).tolist()
        loss /= world_size()
        now = time.perf_counter()
        seconds = now - self.mark
        self.seconds, self.mark = self.seconds + seconds, now
        if rank() == 0:
            self._write_step(loss, grad_norm, seconds)
        if not loss < DIVERGED:
            raise ValueError(self._not_finite("loss", loss, self.state.step - 1))
        self.losses.append(loss)
        if self.saved and self.state.step == self.first_step + 1:
            self._say_how_the_rate_changed()
        self.bar.update()
        self._say_progress(loss)
        self._stop_if(stop)

    def _say_how_the_rate_changed(self):
        for before, now in list(zip(self.saved["rates"], self._rates()))[:1]:
            if self.saved["hyperparameters"]["MAX_STEPS"] != self.constants["MAX_STEPS"] and before != now:
                print(f"MAX_STEPS decides the schedule: the learning rate goes from {before:.3g} to {now:.3g} here. A "
                      f"run with MAX_STEPS={self.constants['MAX_STEPS']} from the start ends elsewhere")  # fmt: skip

    def _say_progress(self, loss):
        steps, now = self.state.step - self.first_step, time.perf_counter()
        pace = (self.seconds - self.first_seconds) / steps
        rate = self.constants["BATCH_SIZE"] * self.constants["BLOCK_SIZE"] / pace
        left = self.constants["MAX_STEPS"] - self.state.step
        evaluation = self.evaluation_seconds or len(self.tokens["val"]) / rate / 3  # forward: a third of a step's work
        seconds_left = pace * left + evaluation * math.ceil(left / self.eval_interval)
        if not self.estimated and left and (steps >= 10 or self.seconds - self.first_seconds > 10):
            self.estimated = now
            self.bar.write(f"{left:,} more steps will take about {_duration(seconds_left)}")
        if steps % 10 == 1:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        if self.lines and now - self.said >= PROGRESS_SECONDS:
            self.said = now
            print(f"step {self.state.step:5} of {self.constants['MAX_STEPS']:,}  loss {loss:.3f}  {rate:,.0f} tokens/s"
                  f"  about {_duration(seconds_left)} left", flush=True)  # fmt: skip

    def _not_finite(self, what, loss, step):
        """What to say of a loss that is not finite, and what the user can do."""
        rates = [name for name in self.constants if name.startswith("LEARNING_RATE")]
        rates += ["WEIGHT_DECAY"] if self.constants.get("WEIGHT_DECAY", 0) > 1 else []
        values = ", ".join(f"{name}={self.constants[name]:g}" for name in rates)
        advice = [f"lower {' or '.join(rates)}"]
        advice += ["raise WARMUP_STEPS"] if "WARMUP_STEPS" in self.constants else []
        advice += ["set DTYPE=float32"] if self.dtype != "float32" else []
        kept = f" and add RESUME=True, which goes on from step {self.records[-1]['step']}" if self.records else ""
        return f"the {what} is {loss} at step {step} ({values}); {', or '.join(advice)}{kept}"

    def _catch_signals(self):
        """From now on Ctrl-C and SIGTERM let the step be finished; a second one ends the program at once."""

        def receive(number, frame):
            if self.signals:
                raise KeyboardInterrupt
            self.signals.append(number)

        if threading.current_thread() is threading.main_thread() and not self.handlers:  # others receive no signals
            self.handlers = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}

    def _restore_signals(self):
        if world_size() == 1:  # else torchrun may be about to stop this process, which has to say first what happened
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.handlers = {}

    def _stop_if(self, stop):
        if not stop:
            return
        if not (self.records and self.records[-1]["step"] == self.state.step):  # else it has just been saved
            self.checkpoint()
        self.bar.close()
        if rank() == 0:
            print(f"{self.name}.py: stopped after {self.state.step} steps; RESUME=True, beside the same constants, "
                  "goes on from there", file=sys.stderr)  # fmt: skip
        sys.exit(128 + (self.signals or [signal.SIGTERM])[0])

    # -- At the end ----------------------------------------------------------------------------------------

    def load_best(self, model):
        """Training is over: load the weights of the best evaluation. Returns its metrics."""
        self.bar.close()
        self._restore_signals()
        if self.state.step < self.constants["MAX_STEPS"]:
            print(f"stopped early: no better validation loss in {self.constants['PATIENCE']} evaluations")
        self.peak_mb = peak_memory_mb(self.device)
        barrier()  # the first process has written the best weights
        model.load_state_dict(_load_file(self.out_dir / "model.pt", self.device, ("model",))["model"])
        self.best = min(self.records, key=lambda record: record["val_loss"])
        return {k.removeprefix("val_"): v for k, v in self.best.items() if k.startswith("val_")}

    def finish(self, sample, **results):
        """Write summary.json, sample.txt and loss.png, then say how it ended. `results` are added to the summary.
        Returns the summary, a dict."""
        last, train, h = self.records[-1], self.tokens["train"], self.constants
        summary = {
            "rung": self.name, "dataset": train.dataset, "tokenizer": h["VOCABULARY"], "seed": h["SEED"],
            "device": self.device, "processes": world_size(), "dtype": self.dtype, "n_params": self.n_params,
            "steps": last["step"], "tokens_seen": last["tokens_seen"],
            "bytes_seen": round(last["tokens_seen"] * train.n_bytes / len(train)),
            "epochs": last["tokens_seen"] / len(train), "train_seconds": last["seconds"],
            "tokens_per_second": last["tokens_seen"] / last["seconds"], "import_memory_mb": self.import_mb,
            "peak_memory_mb": self.peak_mb, **{k: v for k, v in self.best.items() if k.startswith("val_")},
            "best_step": self.best["step"], **results, "hyperparameters": h,
        }  # fmt: skip
        self.write("summary.json", json.dumps(summary, indent=1) + "\n")
        self.write("sample.txt", sample)
        self.draw("loss.png", plot_loss, self.records, self.label)
        print(f"--- sample ---\n{sample}\n--------------")
        word_ppl = summary["val_word_ppl"]  # of a text that has words
        words = f"word perplexity {word_ppl:,.1f}, " if word_ppl is not None else ""
        print(f"{self.label} on {summary['dataset']}: val bpb {summary['val_bpb']:.4f}, {words}{self.n_params:,} "
              f"parameters, {summary['train_seconds']:.0f} s, peak memory {summary['peak_memory_mb']:,.0f} MB")
        return summary

    def write(self, name, text):
        """Write `text` to the file `name` of the run."""
        atomic_write(self.out_dir / name, lambda file: file.write(text.encode("utf-8", "backslashreplace")))

    def draw(self, name, plot, *arguments):
        """Make the picture `name` of the run from the figure that `plot(*arguments)` returns. One that fails costs a
        line, not the run."""
        if rank():
            return
        try:
            figure = plot(*arguments)
            atomic_write(self.out_dir / name, lambda file: figure.savefig(file, dpi=120, format="png"))
        except Exception as error:  # matplotlib is missing, or cannot draw what it was given
            print(f"{name} was not drawn: {first_line(error)}")


def _trained_seconds(folder):
    """Seconds of training of the run in `folder`, as its logs tell."""
    seconds = 0.0
    for path in folder.rglob("log.jsonl"):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            seconds += json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["seconds"]
    return seconds


def plot_loss(records, title):
    """Figure of training and validation loss over the tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, seen = figure.subplots(), [record["tokens_seen"] / 1e6 for record in records]
    means = [(x, record["train_loss"]) for x, record in zip(seen, records) if record["train_loss"] is not None]
    axes.plot(*zip(*means), "o-", label="training (mean since the last point)")
    axes.plot(seen, [record["val_loss"] for record in records], "s-", label="validation")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def in_one_line(error, rung):
    """What to say of an error that the user can mend. Any other one, a mistake of the program, is raised again."""
    text = first_line(error)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and re.search("memory|size calculation", text):
        batch = "MICRO_BATCH_SIZE" if "MICRO_BATCH_SIZE" in rung else "BATCH_SIZE"
        lower = [name for name in (batch, "CHUNK_SIZE", "BLOCK_SIZE", "N_EMBD", "N_HIDDEN", "N_LAYER") if name in rung]
        return f"out of memory; lower {', '.join(lower[:-1])} or {lower[-1]} ({text})"
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in text:
        return f"another process has ended; RESUME=True goes on from the last checkpoint ({text})"
    if isinstance(error, RuntimeError):
        raise error
    return text


def start(rung):
    """What `python v3.py NAME=value ...` does: set constants, call the main() of the rung, and end with one line and
    exit code 1 if something is wrong that the user can mend, with 130 after Ctrl-C."""
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    name = Path(rung["__file__"]).name
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(usage(rung["__file__"]))
            return
        set_constants(rung, sys.argv[1:])
        with init_distributed(rung):
            rung["main"]()
    except (OSError, ValueError, MemoryError, RuntimeError, ImportError) as error:
        message = in_one_line(error, rung)
        if isinstance(error, ValueError) and int(os.environ.get("RANK", 0)):
            time.sleep(10)  # the first process says the same, and torchrun then ends the others
        sys.exit(f"{name}: {message}")
    except KeyboardInterrupt:
        print(f"{name}: stopped; RESUME=True goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


