"""The text that the rungs train on, as tokens: `load_tokens` reads the token files, `prepare.py` makes them."""

import hashlib
import os
import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from bpe_tokenizer import BPETokenizer
from harness.errors import FileError, MissingFileError, UserError

DATA_DIR = Path(__file__).absolute().parent  # not resolved: data/ may be a symbolic link to a folder elsewhere
SPLITS = ("train", "val", "test")
VOCABULARIES = {"bpe_vocab.json": 4096, "bpe_vocab_500.json": 500}
FORMAT, VERSION = "llm-from-scratch tokens", 4  # of the token files
BYTES_PER_WORD = 20  # with more, white space does not separate words: English has about 6, Chinese some hundreds


@dataclass
class Tokens:
    """The tokens of one split, and the counts that turn losses into metrics of the text."""

    ids: torch.Tensor  # (n,) uint16, memory-mapped
    n_bytes: int  # of the UTF-8 text
    n_words: int  # white-space separated words plus one end-of-line a line; 0 if white space does not separate words
    dataset: str
    fingerprint: str  # of the tokenizer
    start: tuple = ()  # the ids from which a sample starts
    digest: str = ""  # of the ids

    def __len__(self):
        return len(self.ids)


def dataset_dir(folder):
    """Path of the dataset folder `folder`: "data" is the one of this repository; any other is looked up in the current
    folder, then in the repository."""
    folder = os.path.expanduser(folder)
    if Path(folder) == Path("data"):
        return DATA_DIR
    in_repository = DATA_DIR.parent / folder
    return in_repository if in_repository.is_dir() and not Path(folder).is_dir() else Path(folder)


def vocabulary_file(name, folder="data"):
    """Path of the vocabulary `name` in a dataset folder. Raises FileNotFoundError, which lists those that exist."""
    directory = dataset_dir(folder)
    if not directory.is_dir():
        raise MissingFileError(f"there is no dataset folder {folder}; make it with python data/prepare.py --from TEXT "
                               f"--to {shlex.quote(str(folder))}")  # fmt: skip
    if not (directory / name).is_file():
        known = ", ".join(sorted(path.name for path in directory.glob("bpe_vocab*.json") if path.is_file()))
        size = re.fullmatch(r"bpe_vocab_(\d+)\.json", name)
        text = "" if directory == DATA_DIR else f"--from TEXT --to {shlex.quote(str(folder))} "
        more = " (and with --from or --dataset, if you gave them)" if directory == DATA_DIR else ""
        learn = f"; to learn it: python data/prepare.py {text}--vocab-size {size[1]}{more}" if size else ""
        raise MissingFileError(f"there is no vocabulary {folder}/{name}; the folder has {known or 'none'}{learn}")
    return directory / name


def token_file(split, vocabulary, folder="data"):
    """Path of the token file of `split` for the vocabulary file `vocabulary`: bpe_vocab_500.json -> *_ids_500.pt."""
    return dataset_dir(folder) / f"{split}_ids{Path(vocabulary).stem.removeprefix('bpe_vocab')}.pt"


def command_file(vocabulary, folder):
    """Path of the file that holds the command that made the token files for `vocabulary`. Dataset folders other than
    data/ have one."""
    return dataset_dir(folder) / f"prepared{Path(vocabulary).stem.removeprefix('bpe_vocab')}.txt"


def _command(vocabulary, folder):
    """The command that makes the token files of a dataset folder again, for messages."""
    try:
        return command_file(vocabulary, folder).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # they were not made on the command line
        pass
    parts = ["--to", shlex.quote(str(folder))] if dataset_dir(folder) != DATA_DIR else []
    parts += ["--vocabulary", shlex.quote(vocabulary)] if vocabulary not in VOCABULARIES else []
    return " ".join(["python data/prepare.py", *parts])


def _load_file(path):
    """The contents of a token file, or None if it is damaged. Raises OSError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about some kinds of damage
            return torch.load(path, weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # the unpickler fails in many ways
        return None


def largest_and_digest(ids):
    """(the largest of `ids`, the first 16 digits of the SHA-256 of all as little-endian 16-bit numbers)"""
    largest, digest = 0, hashlib.sha256()
    for start in range(0, len(ids), 1 << 20):
        some = ids[start : start + (1 << 20)]
        largest = max(largest, int(some.max()))
        digest.update(some.astype("<u2", copy=False))
    return largest, digest.hexdigest()[:16]


def _flaw(content, split, vocabulary, tokenizer, folder):
    """What is wrong with the contents of a token file, or None."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return "is damaged or not a token file"
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        return f"has version {version!r}, but this program reads version {VERSION}"
    types = {"ids": torch.Tensor, "n_tokens": int, "n_bytes": int, "n_words": int, "dataset": str, "split": str,
             "tokenizer": str, "fingerprint": str, "preparation": str, "start": list, "digest": str}  # fmt: skip
    if not all(type(content.get(key)) is kind for key, kind in types.items()):
        return "is damaged or not a token file"
    ids = content["ids"]
    if ids.dtype != torch.uint16 or ids.shape != (content["n_tokens"],):
        return "is damaged or not a token file"
    if content["n_tokens"] < 2 or content["n_bytes"] < 1 or content["n_words"] < 1:  # metrics divide by these
        return "is damaged: by its own counts its text is empty"
    if content["fingerprint"] != tokenizer.fingerprint:
        return f"was not made with the tokenizer in {folder}/{vocabulary}"
    if content["split"] != split:
        return f"holds the split {content['split']!r}: it was renamed"
    start = content["start"]
    if not start or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in start):
        return "is damaged: the ids from which a sample starts are invalid"
    largest, digest = largest_and_digest(ids.numpy())
    if largest >= tokenizer.vocab_size:
        return "is damaged: it has ids outside the vocabulary"
    if digest != content["digest"]:
        return "is damaged: its ids have changed since it was written"


def load_tokens(vocabulary, folder="data"):
    """{"train": Tokens, "val": Tokens, "test": Tokens} of a dataset folder, for the vocabulary file `vocabulary` in it.

    If data/ has no token files yet, makes them first. Raises OSError if a file cannot be read or written, and
    ValueError if one is damaged, was made with another tokenizer, or was not made together with the others.
    """
    tokenizer = BPETokenizer.load(vocabulary_file(vocabulary, folder))
    command = _command(vocabulary, folder)
    again = f"make the token files again with {command}"
    again += " (and with --from or --dataset, if you gave them)" if not re.search("--(from|dataset)", command) else ""
    missing = [path.name for split in SPLITS if not (path := token_file(split, vocabulary, folder)).exists()]
    if len(missing) == len(SPLITS):
        if dataset_dir(folder) != DATA_DIR or any(DATA_DIR.glob("train_ids*.pt")):
            raise MissingFileError(f"there are no token files in {folder} for {vocabulary}; {again}")
        from data.prepare import prepare  # imported here since most runs have their token files

        print("There are no token files yet, so they are made now.", file=sys.stderr)
        together = tuple(VOCABULARIES) if vocabulary in VOCABULARIES else (vocabulary,)
        prepare(vocabularies=together, only_missing=True)
    elif missing:
        raise MissingFileError(f"{folder}/{missing[0]} is missing, though other splits are there; {again}")
    contents = {}
    for split in SPLITS:
        path = token_file(split, vocabulary, folder)
        if not path.is_file():
            raise FileError(f"{folder}/{path.name} is not a file; remove it, then {again}")
        try:
            contents[split] = _load_file(path)
        except OSError as error:
            raise FileError(f"{folder}/{path.name} cannot be read ({error.strerror or error}); {again}") from None
        if flaw := _flaw(contents[split], split, vocabulary, tokenizer, folder):
            raise UserError(f"{folder}/{path.name} {flaw}; {again}")
    files = ", ".join(token_file(split, vocabulary, folder).name for split in SPLITS)
    names = {split: content["dataset"] for split, content in contents.items()}
    if len(set(names.values())) > 1:
        raise UserError(f"the token files {files} come from different data sets ({names}); {again}")
    if len({content["preparation"] for content in contents.values()}) > 1:
        raise UserError(f"the token files {files} were not made together, so their texts may differ; {again}")
    if names["train"] == "sample" and "--sample" not in command:  # the user did not ask for it
        print(f"The text is the small bundled sample, data/input.txt. For WikiText-2: {command}")
    n_bytes, n_words = (sum(content[key] for content in contents.values()) for key in ("n_bytes", "n_words"))
    if n_bytes > BYTES_PER_WORD * n_words:
        for content in contents.values():
            content["n_words"] = 0
    fields = ("ids", "n_bytes", "n_words", "dataset", "fingerprint", "start", "digest")
    return {split: Tokens(**{key: content[key] for key in fields}) for split, content in contents.items()}
