"""Read vocabulary files of GPT-2 and Hugging Face, and write Hugging Face's tokenizer.json.

`BPETokenizer.from_gpt2` and `BPETokenizer.hf_tokenizer_json` are the functions to call; they use `read_gpt2` and
`tokenizer_json`. `patterns` is {name: pre-tokenization pattern} with the names "gpt2" and "gpt4".
"""

import json
import re
from pathlib import Path

from bpe import shown
from bpe.unicode import greedy
from harness.errors import MissingFileError, UserError

# These files write the bytes of a token as letters: printable Latin-1 characters as themselves, the other bytes, in
# order, as U+0100 and up. GPT-2 numbers the bytes in the order of these letters.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_GPT2_ORDER = bytes(_PRINTABLE + sorted(set(range(256)) - set(_PRINTABLE)))
_LETTER = dict(zip(_GPT2_ORDER, [*map(chr, _PRINTABLE), *map(chr, range(256, 512))]))
_BYTE = {letter: byte for byte, letter in _LETTER.items()}

_MERGES_FILES, _IDS_FILES = ("merges.txt", "vocab.bpe"), ("vocab.json", "encoder.json")


def _letters(data):
    """Bytes as letters, a str."""
    return "".join(map(_LETTER.get, data))


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


def read_gpt2(path, patterns, make):
    """The vocabulary at `path`, as `make` builds it.

    path: a pathlib.Path, the folder of the files or one of them: merges.txt or vocab.bpe with vocab.json or
    encoder.json, or a tokenizer.json.
    make: called with the merges, a list of (left id, right id), the list of special tokens, the name of the pattern and
    the byte of each of the ids 0 to 255, as bytes.
    Raises FileNotFoundError if files are missing. Raises ValueError if the ids are not the bytes, then the merges in
    order, then the special tokens, if the files ask for what only other tokenizers do, or if `make` raises ValueError.
    """
    files, read = _find_gpt2(path, patterns)
    try:
        return make(*read())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is another kind of file"
        raise UserError(f"cannot use the vocabulary {files}: {reason}") from None


def _find_gpt2(path, patterns):
    """(the files that `path` means, as text; a function that reads the arguments of `make` from them)"""
    folder = path if path.is_dir() else path.parent
    whole = folder / "tokenizer.json" if path.is_dir() else path
    if whole.is_file() and whole.name not in _MERGES_FILES + _IDS_FILES:
        return str(whole), lambda: _read_tokenizer_json(whole, patterns)
    pair = [path if path.name in names else next(filter(Path.is_file, map(folder.joinpath, names)), None)
            for names in (_MERGES_FILES, _IDS_FILES)]
    if None in pair or not path.exists():
        raise MissingFileError(f"no vocabulary at {path}: neither a tokenizer.json nor {' or '.join(_MERGES_FILES)} "
                               f"with {' or '.join(_IDS_FILES)} next to it; name the folder that holds them")
    return " and ".join(map(str, pair)), lambda: _read_merges_and_ids(*pair)


def _read_merges_and_ids(merges_path, ids_path):
    lines = merges_path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    merges = lines[lines[0].startswith("#version") :]
    ids = json.loads(ids_path.read_text(encoding="utf-8"))
    special = [name for name in sorted(ids, key=ids.get)[256 + len(merges) :] if re.fullmatch("<.+>", name)]
    return _from_tokens(ids, merges, special, "gpt2")


def _read_tokenizer_json(path, patterns):
    stored = json.loads(path.read_text(encoding="utf-8"))
    model, added = stored["model"], stored.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {shown(model['type'])}, not BPE")
    for where, key in [*((stored, key) for key in ("normalizer", "truncation", "padding")),
                       *((model, key) for key in ("dropout", "byte_fallback", "ignore_merges",
                                                  "continuing_subword_prefix", "end_of_word_suffix")),
                       *((token, key) for token in added for key in ("single_word", "lstrip", "rstrip"))]:
        if where.get(key):
            raise ValueError(f"its {key} is {shown(where[key])}")
    if not _adds_nothing(stored.get("post_processor")):
        raise ValueError(f"its post_processor is {shown(stored['post_processor'])}")
    cutting = _with_defaults(stored["pre_tokenizer"])
    pattern = [name for name in patterns if _with_defaults(_pre_tokenizer(name, patterns)) == cutting]
    if not pattern:
        raise ValueError(f"its pre_tokenizer is that of neither {' nor '.join(patterns)}: {shown(cutting)}")
    names = {token["content"]: token["id"] for token in sorted(added, key=lambda token: token["id"])}
    return _from_tokens(model["vocab"] | names, model["merges"], list(names), *pattern)


def _adds_nothing(post_processor):
    """Whether a post_processor leaves the ids as they are. ByteLevel only changes offsets in the text; a template that
    holds nothing but the text is what transformers writes where there was none."""
    kind = (post_processor or {"type": "ByteLevel"})["type"]
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    return kind == "ByteLevel" or kind == "TemplateProcessing" and post_processor.get("single") == single


def _from_tokens(ids, merges, special_tokens, pattern):
    """The arguments of `make`. ids: {token, as letters: id}; merges: list of "left right" or [left, right]."""
    tokens = sorted(ids, key=ids.get)
    if [*map(ids.get, tokens)] != list(range(len(ids))) or len(ids) < 256:
        raise ValueError(f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}")
    if set(tokens[:256]) != set(_BYTE):
        raise ValueError("its first 256 tokens are not the bytes")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for new_id, pair in enumerate(pairs, start=256):
        if len(pair) != 2 or not all(0 <= ids.get(part, -1) < new_id for part in pair):
            raise ValueError(f"merge {new_id - 256} does not join two tokens that exist before it: {shown(pair)}")
        if ids.get("".join(pair)) != new_id:
            raise ValueError(f"merge {new_id - 256}, {shown(pair)}, does not make the id {new_id}")
    if tokens[256 + len(pairs) :] != special_tokens:
        odd = [name for name in tokens[256 + len(pairs) :] if name not in special_tokens] or special_tokens
        raise ValueError(f"the token {shown(odd[0])} is neither made by a merge nor a special token after the merges")
    return [(ids[a], ids[b]) for a, b in pairs], special_tokens, pattern, bytes(map(_BYTE.get, tokens[:256]))


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------


def tokenizer_json(tokenizer, patterns):
    """The contents of a tokenizer.json, a dict, for a BPETokenizer.

    Raises ValueError if two tokens have the same bytes, since the format identifies tokens by their bytes.
    """
    n, special = 256 + len(tokenizer.merges), tokenizer.special_tokens
    tokens = [_letters(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)]
    if len({*tokens, *special}) < n + len({*tokens[n:], *special}):
        raise ValueError("two tokens have the same bytes, which a tokenizer.json cannot hold")
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {token: id for id, token in enumerate(tokens[:n])},
             "merges": [[tokens[a], tokens[b]] for a, b in tokenizer.merges]}
    added = [{"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for id, name in enumerate(special, start=n)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": _pre_tokenizer(tokenizer.pattern, patterns), "post_processor": None,
            "decoder": _decoder(special), "model": model}


def _pre_tokenizer(name, patterns):
    """The pre_tokenizer of a tokenizer.json. GPT-2's pattern is built into its ByteLevel; in other patterns \\z is the
    end of the text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": name == "gpt2"}
    if name == "gpt2":
        return byte_level
    split = {"type": "Split", "pattern": {"Regex": greedy(patterns[name]).replace(r"\Z", r"\z")},
             "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def _with_defaults(pre_tokenizer):
    """A pre_tokenizer with the fields that older files omit, and one value of `trim_offsets`, which affects no ids."""
    def filled(d):
        return {"use_regex": True, **d, "trim_offsets": True} if d.get("type") == "ByteLevel" else d

    return json.loads(json.dumps(pre_tokenizer), object_hook=filled)


def _decoder(special_tokens):
    """The decoder of a tokenizer.json, which turns tokens into text.

    ByteLevel reads the letters of special tokens as bytes too. So special tokens with Latin-1 letters are first
    replaced by their bytes, as letters: the longest first, since the replacement is longer than the name.
    """
    names = [name for name in special_tokens if not name.isascii() and set(name) <= set(_BYTE)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    replace = [{"type": "Replace", "pattern": {"Regex": rf"\A{re.escape(name)}\z"}, "content": _letters(name.encode())}
               for name in sorted(names, key=len, reverse=True)]
    return {"type": "Sequence", "decoders": [*replace, byte_level]} if replace else byte_level
