"""The command line of a rung: its constants as NAME=value, --help, output, and errors in one line."""

import ast
import contextlib
import difflib
import errno
import functools
import hashlib
import itertools
import os
import re
import sys
import time
import traceback
from pathlib import Path

from harness.errors import UserError


def read_source(path):
    """What `parse_source` finds in the file of a rung."""
    return parse_source(Path(path).read_text(encoding="utf-8"))


def parse_source(source):
    """({constant: its comment}, {constant: its value as written}, every name that is assigned or imported) of the text
    of a rung. Constants are the UPPER_CASE names that are set before the first function."""
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


@functools.lru_cache(maxsize=None)
def _source_as_loaded(path, main):
    """`read_source` and a hash of the text, once for each time that the rung was loaded (then `main` is another
    function): somebody may edit the file while it runs."""
    source = Path(path).read_text(encoding="utf-8")
    return *parse_source(source), hashlib.sha256(source.encode()).hexdigest()[:16]


def source_hash(rung):
    """The first 16 hex digits of the SHA-256 of the text of a rung (its globals) as it was loaded."""
    return _source_as_loaded(rung["__file__"], rung["main"])[3]


def usage(path):
    """What --help says: the docstring of the rung in the file `path`, and its constants with their comments."""
    comments, values, _ = read_source(path)
    lines = [ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or "", ""]
    lines += ["Constants, to be set as NAME=value:", ""]
    lines += [f"  {f'{name} = {values[name]}':34}  {comment}".rstrip() for name, comment in comments.items()]
    return "\n".join(lines)


def answer_help():
    """Print the help and end, if the program is a rung that was asked for it."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__)
    with contextlib.suppress(OSError, ValueError):
        if {"-h", "--help"} & set(sys.argv[1:]) and "\n    harness.start(globals())" in path.read_text("utf-8"):
            robust_streams()
            say(usage(path))
            sys.exit()


def robust_streams():
    """Let standard output and error show every line at once, and characters that they cannot show as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # that of a notebook has no such method
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def say(text="", end="\n", error=False):
    """Print a line, at no risk for the run: what cannot be written (a closed pipe, a full disk) is lost, with all that
    follows; what cannot be encoded becomes an escape. `error`: on standard error."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(str(text).encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream is closed
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def first_line(error):
    """The first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_RULES = (  # names, type, what a value must be, whether a value of the type is possible
    ("BATCH_SIZE MICRO_BATCH_SIZE CHUNK_SIZE BLOCK_SIZE CONTEXT_SIZE MAX_STEPS EVAL_INTERVAL PATIENCE N_HEAD N_EMBD "
     "N_HIDDEN STRIDE SAMPLE_TOKENS", int, "a whole number from 1 to 2147483647", lambda v: 1 <= v < 2**31),
    ("SEED WARMUP_STEPS TOP_K", int, "a whole number from 0 to 2147483647", lambda v: 0 <= v < 2**31),
    ("N_LAYER", int, "a whole number from 1 to 10000", lambda v: 1 <= v <= 10000),
    ("LEARNING_RATE LEARNING_RATE_ADAMW WEIGHT_DECAY GRAD_CLIP", float, "a number from 0 to 1e30",
     lambda v: 0 <= v <= 1e30),  # Adam's first step divides it by 0.1
    ("DROPOUT MOMENTUM", float, "a number from 0 to below 1", lambda v: 0 <= v < 1),
    ("COOLDOWN", float, "a number from 0 to 1", lambda v: 0 <= v <= 1),
    ("TEMPERATURE", float, "0, for the likeliest token, or 0.0001 or more", lambda v: v == 0 or 1e-4 <= v <= 1e38),
    ("TOP_P", float, "a number above 0, at most 1", lambda v: 0 < v <= 1),
    ("ROPE_BASE", float, "a number above 1", lambda v: 1 < v <= 1e38),
    ("COMPILE RESUME", bool, "True or False", lambda v: True),
    ("VOCABULARY POSITION DEVICE", str, "a text", lambda v: True),
    ("OUT_DIR DATA", str, "the name of a folder", lambda v: v.strip() != "" and "\0" not in v),
    ("DTYPE", str, '"auto", "float32" or "bfloat16"', lambda v: v in ("auto", "float32", "bfloat16")),
    ("PROMPT", type(None), "a text or None", lambda v: True),
    ("INIT_FROM", type(None), "the name of a folder or None", lambda v: v is None or v.strip() and "\0" not in v),
    ("EXTRAPOLATION", tuple, "whole numbers from 1 on, with commas between them",
     lambda v: len(v) > 0 and all(type(n) is int and 1 <= n < 2**20 for n in v)),
)  # fmt: skip
RULES = {name: rule for names, *rule in _RULES for name in names.split()}


def constants(rung):
    """The hyperparameters of a rung (its globals), {name: value}: the constants at the top of its file."""
    return {name: rung[name] for name in _source_as_loaded(rung["__file__"], rung["main"])[0]}


def set_constants(rung, arguments):
    """Set constants from NAME=value arguments. Raises ValueError for an unknown name or a value of another type."""
    known = constants(rung)
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name not in known:
            raise UserError(f"there is no constant {name!r}; known are {', '.join(known)}")
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
                raise UserError(f"{name}={text}: {name} must be {must}")
        rung[name] = value


def check_constants(rung):
    """Raises ValueError if a constant has an impossible value, or one was set that the rung does not have, or DEVICE
    cannot be used here."""
    import torch

    known, names = constants(rung), _source_as_loaded(rung["__file__"], rung["main"])[2]
    for name in rung.keys() - names:
        if name.isupper() and type(rung[name]) in (bool, int, float, str, tuple):
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(f"there is no constant {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    for name, value in known.items():
        if name in RULES:
            kind, must, possible = RULES[name]
            kinds = {float: (int, float), type(None): (str, type(None))}.get(kind, (kind,))
            if type(value) not in kinds or not possible(value):
                raise UserError(f"{name}={value} must be {must}")
    try:
        torch.zeros(1, device=known["DEVICE"]).item()
    except Exception as error:  # of many kinds
        raise UserError(f"DEVICE={known['DEVICE']} cannot be used here: {first_line(error).split('. ')[0]}") from None
    if known["DEVICE"].startswith("cpu:"):  # torch would not load what it has saved from there
        raise UserError(f"DEVICE={known['DEVICE']} must be cpu: there is one")


@contextlib.contextmanager
def override(rung, **values):
    """Within, these constants of the rung have these values."""
    before = {name: rung[name] for name in values}
    rung.update(values)
    try:
        yield
    finally:
        rung.update(before)


OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED|size calculation over")
PROCESS_ENDED = re.compile(
    "connection closed by peer|connection reset|broken pipe|remote process exited|timed out|timeout", re.IGNORECASE
)


def in_one_line(error, rung):
    """What to say of an error that the user can mend; None of any other, which may be a mistake in the rung."""
    text = first_line(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, (MemoryError, RuntimeError, OSError)) and (
        isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or OUT_OF_MEMORY.search(text)
    ):
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == rung["__file__"]]  # fmt: skip
        place = f" in line {lines[-1]} of {Path(rung['__file__']).name}" if lines else ""
        return f"out of memory{place}; {_less_memory(rung)} ({text})"
    if type(error).__name__.startswith("Dist") or isinstance(error, RuntimeError) and "gloo" in text:
        if PROCESS_ENDED.search(text):
            return f"another process has ended; RESUME=True goes on from the last checkpoint ({text})"
    return None


def _less_memory(rung):
    """Which constants need less memory if they are lower: of those that this run may change."""
    if rung.get("PROMPT") is not None:
        return "close other programs" + ("" if rung["DEVICE"] == "cpu" else ", or set DEVICE=cpu")
    batch = "MICRO_BATCH_SIZE" if "MICRO_BATCH_SIZE" in rung else "BATCH_SIZE"
    names = [batch, "CHUNK_SIZE", "BLOCK_SIZE", "N_EMBD", "N_HIDDEN", "N_LAYER"]
    if rung["RESUME"] or rung.get("INIT_FROM") is not None:  # the model is what it is
        names = ["MICRO_BATCH_SIZE", "CHUNK_SIZE"]
    names = [name for name in names if name in rung]
    return f"lower {' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}" if names else "close other programs"


def start(rung):
    """What `python v3.py NAME=value ...` does: set constants, then call the main() of the rung. What is wrong that the
    user can mend ends in one line and exit code 1, Ctrl-C in 130; any other error keeps its traceback."""
    from harness.distributed import processes

    robust_streams()
    name = Path(rung["__file__"]).name
    try:
        set_constants(rung, sys.argv[1:])
        with processes(rung):
            rung["main"]()
    except Exception as error:
        if (message := in_one_line(error, rung)) is None:
            raise
        if isinstance(error, UserError) and int(os.environ.get("RANK", 0)):
            time.sleep(10)  # the first process says the same, and torchrun then ends the others
        sys.exit(f"{name}: {message}")
    except KeyboardInterrupt:
        say(f"{name}: stopped; RESUME=True goes on from the last checkpoint", error=True)
        sys.exit(130)
