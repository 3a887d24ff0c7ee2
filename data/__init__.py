"""The text that the rungs train on, as tokens: `load_tokens` reads the token files, `prepare.py` makes them."""

import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from bpe_tokenizer import BPETokenizer

DATA_DIR = Path(__file__).absolute().parent  # not resolved: data/ may be a symbolic link to a folder elsewhere
SPLITS = ("train", "val", "test")
VOCABULARIES = {"bpe_vocab.json": 4096, "bpe_vocab_500.json": 500}
FORMAT, VERSION = "llm-from-scratch tokens", 2  # of the token files


@dataclass
class Tokens:
    """The tokens of one split, and what is needed to turn losses into metrics of the text."""

    ids: torch.Tensor  # (n,) uint16, memory-mapped
    n_bytes: int  # of the UTF-8 text
    n_words: int  # white-space separated words plus one end-of-line a line
    dataset: str
    fingerprint: str  # of the tokenizer

    def __len__(self):
        return len(self.ids)


def vocabulary_file(name):
    """Path of the vocabulary `name` in data/. Raises FileNotFoundError, listing those that are there."""
    if not (DATA_DIR / name).is_file():
        known = ", ".join(sorted(path.name for path in DATA_DIR.glob("bpe_vocab*.json") if path.is_file()))
        raise FileNotFoundError(f"there is no vocabulary data/{name}; known are {known or 'none'}")
    return DATA_DIR / name


def token_file(split, vocabulary):
    """Path of the token file of `split` for the vocabulary file `vocabulary`: bpe_vocab_500.json -> *_ids_500.pt."""
    return DATA_DIR / f"{split}_ids{Path(vocabulary).stem.removeprefix('bpe_vocab')}.pt"


def _read(path):
    """The contents of a token file, or None if it is damaged. Raises OSError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has much to say about some kinds of damage
            return torch.load(path, weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # the unpickler fails in many ways
        return None


def _flaw(content, split, vocabulary, tokenizer):
    """What is wrong with the contents of a token file, or None."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return "is damaged or no token file"
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        return f"has version {version!r}, not {VERSION}"
    types = {"ids": torch.Tensor, "n_tokens": int, "n_bytes": int, "n_words": int, "dataset": str, "split": str,
             "tokenizer": str, "fingerprint": str, "preparation": str}  # fmt: skip
    if not all(type(content.get(key)) is kind for key, kind in types.items()):
        return "is damaged or no token file"
    ids = content["ids"]
    if ids.dtype != torch.uint16 or ids.shape != (content["n_tokens"],):
        return "is damaged or no token file"
    if content["n_tokens"] < 2 or content["n_bytes"] < 1 or content["n_words"] < 1:  # metrics divide by them
        return "is damaged: it says that its text is empty"
    if content["fingerprint"] != tokenizer.fingerprint:
        return f"was made by another tokenizer than data/{vocabulary}"
    if content["split"] != split:
        return f"holds the split {content['split']!r}: it was renamed"
    if int(ids.numpy().max()) >= tokenizer.vocab_size:
        return "is damaged: it has ids outside of the vocabulary"


def load_tokens(vocabulary):
    """{"train": Tokens, "val": Tokens, "test": Tokens} for the vocabulary file `vocabulary` in data/.

    Makes the token files first if there are none. Raises OSError if a file cannot be read or written and ValueError
    if one is damaged, or was made by another tokenizer, or not together with its neighbours.
    """
    tokenizer = BPETokenizer.load(vocabulary_file(vocabulary))
    command = "python data/prepare.py"
    if vocabulary not in VOCABULARIES:
        command += f" --vocabulary {shlex.quote(vocabulary)}"
    again = f"make the token files again with {command} (and with --from or --dataset, if you gave them)"
    missing = [path.name for split in SPLITS if not (path := token_file(split, vocabulary)).exists()]
    if len(missing) == len(SPLITS):
        if any(DATA_DIR.glob("train_ids*.pt")):
            raise FileNotFoundError(f"there are token files, but not for {vocabulary}; {again}")
        from data.prepare import prepare  # only here: no run needs it whose token files are there

        print("There are no token files yet: preparing them.", file=sys.stderr)
        together = tuple(VOCABULARIES) if vocabulary in VOCABULARIES else (vocabulary,)
        prepare(vocabularies=together, only_missing=True)
    elif missing:
        raise FileNotFoundError(f"data/{missing[0]} is missing beside the other splits; {again}")
    contents = {}
    for split in SPLITS:
        path = token_file(split, vocabulary)
        if not path.is_file():
            raise OSError(f"data/{path.name} is no file; remove it, then {again}")
        try:
            contents[split] = _read(path)
        except OSError as error:
            raise OSError(f"data/{path.name} cannot be read ({error.strerror or error}); {again}") from None
        if flaw := _flaw(contents[split], split, vocabulary, tokenizer):
            raise ValueError(f"data/{path.name} {flaw}; {again}")
    files = ", ".join(token_file(split, vocabulary).name for split in SPLITS)
    names = {split: content["dataset"] for split, content in contents.items()}
    if len(set(names.values())) > 1:
        raise ValueError(f"the token files {files} come from different data sets ({names}); {again}")
    if len({content["preparation"] for content in contents.values()}) > 1:
        raise ValueError(f"the token files {files} were not made together, so their texts may differ; {again}")
    if names["train"] == "sample":
        print(f"The text is the small bundled sample, data/input.txt. For WikiText-2: {command}")
    fields = ("ids", "n_bytes", "n_words", "dataset", "fingerprint")
    return {split: Tokens(**{key: content[key] for key in fields}) for split, content in contents.items()}
