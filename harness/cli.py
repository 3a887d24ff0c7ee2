"""The command line of a rung: its constants as NAME=value, --help, output, and errors in one line."""

import ast
import contextlib
import difflib
import errno
import functools
import itertools
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

from harness import signals
from harness.arguments import FOLDERS, RULES, read_arguments, read_value
from harness.errors import InputError, UserError


def read_source(path):
    """`parse_source` of the file of a rung."""
    return parse_source(Path(path).read_text(encoding="utf-8"))


def parse_source(source):
    """Read the source of a rung: ({constant: its comment}, {constant: its value as written}, {every name that is
    assigned or imported}). Constants are the UPPER_CASE names that are set before the first function."""
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
    """What `read_source` gives, and the source. The file is read once each time the rung is loaded, which makes a new
    `main`, since somebody may edit it during the run."""
    source = Path(path).read_text(encoding="utf-8")
    return *parse_source(source), source


def source_as_loaded(rung):
    """The source of a rung (its globals) as it was loaded."""
    return _source_as_loaded(rung["__file__"], rung["main"])[3]


def usage(path):
    """The text of --help: the docstring of the rung in the file `path`, and its constants with their comments."""
    comments, values, _ = read_source(path)
    lines = [ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or "", ""]
    lines += ["Constants, which NAME=value sets:", ""]
    lines += [f"  {f'{name} = {values[name]}':34}  {comment}".rstrip() for name, comment in comments.items()]
    return "\n".join(lines)


HELP = {"-h", "--help"}


def answer_help():
    """If the program is a rung and was asked for help, print it and end."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__)
    with contextlib.suppress(OSError, ValueError):
        if HELP & set(sys.argv[1:]) and "\n    harness.start(globals())" in path.read_text("utf-8"):
            robust_streams()
            say(usage(path))
            sys.exit()


def robust_streams():
    """Make standard output and error write every line at once, and write characters that they cannot encode as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # a notebook's stream does not
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def say(text="", end="\n", error=False):
    """Print a line without risk to the run: if it cannot be written (a closed pipe, a full disk), it and all later
    output is lost; a character that cannot be encoded becomes an escape. `error`: to standard error."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(str(text).encode(encoding, "backslashreplace").decode(encoding), end=end, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream is closed
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_note(rung, text):
    """Print a line about the constants of a rung: to standard error if PROMPT prints a text, so that it stays out of
    that text. Only the first process prints it."""
    if int(os.environ.get("RANK", 0)) == 0:
        say(text, error=rung.get("PROMPT") is not None)


def first_line(error):
    """The first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def constants(rung):
    """The constants at the top of a rung (its globals), {name: value}."""
    return {name: rung[name] for name in _source_as_loaded(rung["__file__"], rung["main"])[0]}


COMMAND_LINE = {}  # {name: text} of the constants set on the command line; empty in a notebook


def set_constants(rung, arguments):
    """Set constants from NAME=value arguments, and return those as {name: text}. Raises ValueError for an unknown name
    or a value of the wrong type."""
    known, given = constants(rung), {}
    for name, text in read_arguments(known, arguments):
        if given.get(name, text) != text:
            say_note({"PROMPT": ""}, f"{name} is given twice: {name}={text} is used")
        given[name] = text
        kind, must, _ = RULES.get(name, (type(known[name]), f"of type {type(known[name]).__name__}", None))
        value = read_value(name, text, known[name])
        if kind not in (str, type(None)) and type(value) is not kind:
            hint = "; separate the constants with spaces" if re.search(r"\w=", text) else ""
            raise UserError(f"{name}={text}: {name} must be {must}{hint}")
        rung[name] = value
    return given


def check_constants(rung, notes=True):
    """Raises ValueError if a constant has an impossible value, if a constant was set that the rung does not have, if
    DEVICE cannot be used here, or if constants contradict each other. Prints a line for each that has no effect."""
    import torch

    from harness.checks import conflicts, process_count

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
    for name in FOLDERS:
        if (known.get(name) or "").startswith("~"):  # on the command line it has been replaced
            raise UserError(f"{name}={known[name]}: ~ is expanded only on the command line; write the whole path")
    device = known.get("DEVICE", "cpu")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds
        if is_out_of_memory(error):
            raise UserError(f"DEVICE={device} has no memory left, since another program uses it; end that program, or "
                            f"set DEVICE=cpu ({first_line(error)})") from None  # fmt: skip
        raise UserError(f"DEVICE={device} cannot be used here: {first_line(error).split('. ')[0]}") from None
    if device.startswith("cpu:"):  # torch would not load what it has saved from there
        raise UserError(f"DEVICE={device} names one CPU of several, but torch has only one; set DEVICE=cpu")
    lines = list(conflicts(known, _chosen(rung, known), process_count()))
    for line in lines if notes and not _is_of_a_scheme(known) else ():
        say_note(rung, line)
    if "POSITION" in known and not _is_of_a_scheme(known):
        _checked.update(known)


def _chosen(rung, known):
    """The constants of a rung that the user has set: on the command line, or to a value other than the one in its
    file."""
    written, chosen = _source_as_loaded(rung["__file__"], rung["main"])[1], set(COMMAND_LINE)
    for name in known.keys() & RULES.keys():
        with contextlib.suppress(ValueError, SyntaxError):  # DEVICE is an expression
            if ast.literal_eval(written[name]) != known[name]:
                chosen.add(name)
    return chosen


_checked = {}  # the constants of v4, with all its schemes, as they were last checked


def _is_of_a_scheme(known):
    """Whether these are the constants of one scheme within a run of v4 that trains several. Those have been checked."""
    schemes = [name.strip() for name in _checked.get("POSITION", "").split(",")]
    return known.get("POSITION") in schemes and known["OUT_DIR"] == f"{_checked['OUT_DIR']}/{known['POSITION']}"


@contextlib.contextmanager
def override(rung, **values):
    """Context in which these constants of the rung have these values."""
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


def is_out_of_memory(error):
    """Whether the error means that there was too little memory, on a CPU or a GPU."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or (
        isinstance(error, (RuntimeError, OSError)) and bool(OUT_OF_MEMORY.search(first_line(error))))  # fmt: skip


def in_one_line(error, rung):
    """The message for an error that the user can fix; None for any other, which may be a mistake in the rung."""
    text = first_line(error)
    if isinstance(error, InputError):
        return None
    if isinstance(error, UserError):
        return text
    if is_out_of_memory(error):
        return f"out of memory{place_in(rung, error)}; {_less_memory(rung)} ({text})"
    if type(error).__name__.startswith("Dist") or isinstance(error, RuntimeError) and "gloo" in text:
        if PROCESS_ENDED.search(text):
            return f"another process has ended; RESUME=True continues from the last checkpoint ({text})"
    return None


def place_in(rung, error):
    """Where in the rung an error arose, such as " in line 9 of v3.py", or "" if it arose elsewhere. torch.compile gives
    the place only in its message."""
    text = "".join(traceback.format_exception(error))
    lines = re.findall(rf'File "{re.escape(rung["__file__"])}", line (\d+)', text)
    return f" in line {lines[-1]} of {Path(rung['__file__']).name}" if lines else ""


def _less_memory(rung):
    """Advice on which constants to lower so that less memory is used: those that this run may change and that are not
    yet at their lowest."""
    if rung.get("PROMPT") is not None:
        return "close other programs" + ("" if rung.get("DEVICE") == "cpu" else ", or set DEVICE=cpu")
    batch, processes = rung.get("BATCH_SIZE", 1 << 31), int(os.environ.get("WORLD_SIZE", 1))
    names = ["CHUNK_SIZE", "BLOCK_SIZE", "N_EMBD", "N_HIDDEN", "N_LAYER"]
    if rung.get("RESUME"):  # neither the model nor its batches can change
        names = ["CHUNK_SIZE"]
    elif rung.get("INIT_FROM") is not None:
        names = ["CHUNK_SIZE", "BLOCK_SIZE"]
    advice = [name for name in names if rung.get(name, 1) > 1]
    if "MICRO_BATCH_SIZE" in rung:
        windows = min(rung["MICRO_BATCH_SIZE"], batch // processes)
        fits = [n for n in range(1, windows // 2 + 1) if batch // processes % n == 0]
        advice = [f"MICRO_BATCH_SIZE to {fits[-1]}" if fits else "", *advice]
    elif batch > processes and not rung.get("RESUME"):
        advice = [f"BATCH_SIZE to {batch // processes // 2 * processes}", *advice]
    advice = [part for part in advice if part]
    return f"lower {' or '.join(filter(None, (', '.join(advice[:-1]), advice[-1])))}" if advice else (
        "close other programs, or use a device with more memory")  # fmt: skip


def start(rung):
    """What `python v3.py NAME=value ...` does: set constants, then call the main() of the rung. An error that the user
    can fix ends the program with one line and exit code 1. A signal that ends a job ends it with one line and exit code
    128 + its number (Ctrl-C: 130). Any other error keeps its traceback."""
    from harness.distributed import processes

    robust_streams()
    if HELP & set(sys.argv[1:]):  # a notebook has imported harness before, so `answer_help` did not run
        return say(usage(rung["__file__"]))
    name = Path(rung["__file__"]).name
    try:
        with signals.catch(signals.raise_stopped):
            COMMAND_LINE.update(set_constants(rung, sys.argv[1:]))
            with processes(rung):
                rung["main"]()
    except Exception as error:
        if (message := in_one_line(error, rung)) is None:
            raise
        if isinstance(error, UserError) and int(os.environ.get("RANK", 0)):
            time.sleep(10)  # the first process prints the same, and torchrun then ends the others
        sys.exit(f"{name}: {message}")
    except KeyboardInterrupt as stopped:
        advice = "" if rung.get("PROMPT") is not None else "; RESUME=True continues from the last checkpoint"
        if not int(os.environ.get("RANK", 0)):
            say(f"{name}: stopped{advice}", error=True)
        sys.exit(128 + getattr(stopped, "number", signal.SIGINT))
    finally:
        COMMAND_LINE.clear()
        for to_stderr in (False, True):
            say(end="", error=to_stderr)  # lost output is not an error when the program ends
