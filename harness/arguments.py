"""Constants on the command line: the values they may have, and the many ways to write NAME=value."""

import ast
import difflib
import os
import re

from harness.errors import UserError

_RULES = (  # names, type, what a value must be, whether a value of the type is possible
    ("BATCH_SIZE MICRO_BATCH_SIZE CHUNK_SIZE BLOCK_SIZE CONTEXT_SIZE MAX_STEPS EVAL_INTERVAL PATIENCE N_HEAD N_EMBD "
     "N_HIDDEN STRIDE SAMPLE_TOKENS SAMPLES", int, "a whole number from 1 to 2147483647", lambda v: 1 <= v < 2**31),
    ("SEED WARMUP_STEPS TOP_K", int, "a whole number from 0 to 2147483647", lambda v: 0 <= v < 2**31),
    ("N_LAYER", int, "a whole number from 1 to 10000", lambda v: 1 <= v <= 10000),
    ("LEARNING_RATE LEARNING_RATE_ADAMW WEIGHT_DECAY GRAD_CLIP", float, "a number from 0 to 1e30",
     lambda v: 0 <= v <= 1e30),  # Adam's first step divides it by 0.1
    ("DROPOUT MOMENTUM", float, "a number from 0 to less than 1", lambda v: 0 <= v < 1),
    ("COOLDOWN", float, "a number from 0 to 1", lambda v: 0 <= v <= 1),
    ("TEMPERATURE", float, "0, for the likeliest token, or at least 0.0001", lambda v: v == 0 or 1e-4 <= v <= 1e38),
    ("TOP_P", float, "a number above 0 and at most 1", lambda v: 0 < v <= 1),
    ("ROPE_BASE", float, "a number above 1", lambda v: 1 < v <= 1e38),
    ("COMPILE SHARD RESUME STOP_AT_END", bool, "True or False", lambda v: True),
    ("VOCABULARY POSITION DEVICE", str, "a string", lambda v: True),
    ("OUT_DIR DATA", str, "the name of a folder", lambda v: v.strip() != "" and "\0" not in v),
    ("DTYPE", str, '"auto", "float32" or "bfloat16"', lambda v: v in ("auto", "float32", "bfloat16")),
    ("PROMPT", type(None), "a string or None", lambda v: True),
    ("INIT_FROM", type(None), "the name of a folder or None", lambda v: v is None or v.strip() and "\0" not in v),
    ("EXTRAPOLATION", tuple, "whole numbers from 1 up, separated by commas",
     lambda v: len(v) > 0 and all(type(n) is int and 1 <= n < 2**20 for n in v)),
)  # fmt: skip
RULES = {name: rule for names, *rule in _RULES for name in names.split()}
FOLDERS = ("OUT_DIR", "DATA", "INIT_FROM")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # in a PROMPT on the command line
_BOOLS = {**dict.fromkeys(("true", "1", "yes", "on"), True), **dict.fromkeys(("false", "0", "no", "off"), False)}


def read_arguments(known, arguments):
    """Read `arguments` as [(name, text), ...]. An argument is NAME=value, or a form that people and shells turn it
    into: --name=value, NAME value, NAME = value, a flag alone for True, a list that PowerShell has split at its commas,
    quotes that cmd.exe has kept. Raises UserError for a name that is not in `known`."""
    words, pairs = list(arguments), []

    def name_of(word):
        return word.partition("=")[0].strip().lstrip("-\u2013\u2014").replace("-", "_").upper()

    def is_value(word):
        return word != "=" and name_of(word) not in known and not re.match(r"[-\w]+=", word)

    while words:
        word = words.pop(0)
        word = word[1:-1] if re.fullmatch(r"""(['"]).*=.*\1""", word, re.S) and name_of(word[1:]) in known else word
        head, equals, text = word.partition("=")
        if not equals and len(parts := head.split(None, 1)) == 2 and name_of(parts[0]) in known:
            head, text = parts
        name = name_of(head)
        if name not in known:
            near, hint = difflib.get_close_matches(name, known, 1), ""
            if near:
                hint = f"did you mean {near[0]}? "
            elif pairs and not equals:
                hint = f'if it belongs to {pairs[-1][0]}, write {pairs[-1][0]}="...", with quotes; '
            raise UserError(f"there is no constant {head!r}; {hint}the constants are {', '.join(known)}")
        if not equals and not text and words and words[0].startswith("="):
            equals, text = "=", words.pop(0)[1:]
        if type(known[name]) is bool and not text and (not words or words[0].lower() not in _BOOLS) and not equals:
            text = "True"
        elif not text and words and is_value(words[0]) and (name != "PROMPT" or not equals):
            text = words.pop(0)
        if text[:1] in ("'", '"') and text.count(text[0]) == 1:  # cmd.exe ignores single quotes and splits at spaces
            ends = [k for k, word in enumerate(words) if word.endswith(text[0])]
            if ends and all(map(is_value, words[: ends[0] + 1])):
                text, words = " ".join([text, *words[: ends[0] + 1]])[1:-1], words[ends[0] + 1 :]
        while name in ("POSITION", "EXTRAPOLATION") and words and is_value(words[0]):
            text = f"{text.rstrip(',')},{words.pop(0)}"
        pairs.append((name, text))
    return pairs


def _unquoted(text):
    """`text` without surrounding spaces, and without quotes that a shell has kept."""
    text = text.strip()
    return text[1:-1] if re.fullmatch(r"""(['"]).*\1""", text, re.S) else text


def read_value(name, text, before):
    """The value that `text` gives the constant `name`, or None if its type is wrong. `before`: the value that the
    constant has now."""
    kind = RULES[name][0] if name in RULES else type(before)
    if name == "PROMPT":
        text = _unquoted(text) if os.name == "nt" and text.startswith("'") else text.rstrip("\r")
        return re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], text)
    if name not in RULES and kind is str:
        return text
    text = _unquoted(text)
    if name in FOLDERS:
        return None if (name, text) == ("INIT_FROM", "None") else os.path.expanduser(text)
    if kind in (str, type(None)):
        return ",".join(part.strip() for part in text.split(",")) if name == "POSITION" else text
    if kind is bool:
        return _BOOLS.get(text.rstrip(",").lower())
    if kind in (int, float):
        text = text.rstrip(",")
    if kind is int and re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    try:
        value = ast.literal_eval(text)
        if kind is int and type(value) is float and "e" in text.lower() and value.is_integer():
            value = int(value)  # 1e4
        value = (value,) if kind is tuple and type(value) is int else value
        return float(value) if kind is float and type(value) is int else value
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        return None
