"""Make the token files that the rungs train on, and load them.

    python data/prepare.py                             WikiText-2 from the Hugging Face hub, or the bundled sample
    python data/prepare.py --from DIR                  from local files: wiki.{train,valid,test}.tokens or .raw, or
                                                       the hub's parquet files
    python data/prepare.py --dataset wikitext-103-v1   a larger text
    python data/prepare.py --sample                    the bundled sample, data/input.txt
    python data/prepare.py --vocab-size 8192           with a vocabulary of its own, data/bpe_vocab_8192.json
    python data/prepare.py --from DIR --train-vocab    make the two committed vocabularies again, from WikiText-2

For each split it writes `{train,val,test}_ids.pt`, and with the small vocabulary of v0 `{train,val,test}_ids_500.pt`.
A rung that finds none of its files calls `prepare()` itself.

The text is tokenized exactly as it is, line ends kept, so that bytes and words are those of the published counts:
words are the white-space separated words plus one end-of-line a line.
"""

import argparse
import http.client
import os
import re
import sys
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

DATA_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA_DIR.parent))  # so that `python data/prepare.py` finds the tokenizer

from bpe_tokenizer import BPETokenizer  # noqa: E402

SPLITS = ("train", "val", "test")
VOCABULARIES = {"bpe_vocab.json": 4096, "bpe_vocab_500.json": 500}
SAMPLE = DATA_DIR / "input.txt"
HUB_DATASET = "Salesforce/wikitext"
DATASETS = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
HUB_TIMEOUT = 8  # seconds until the hub counts as out of reach
FORMAT, VERSION = "llm-from-scratch tokens", 1
BLOCK = 1 << 20  # characters read at a time

# Words of the training splits as published (Merity et al. 2016, arXiv:1609.07843, table 1, end-of-lines included).
PUBLISHED_WORDS = {2_088_628: "wikitext-2", 103_227_021: "wikitext-103"}


# ----------------------------------------------------------------------------------------------------------
# Sources: each is a dict from split to (size in bytes or None, function that opens a stream of strings)
# ----------------------------------------------------------------------------------------------------------


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_text(path):
    """Stream a text file in pieces of whole lines. Raises ValueError if it is not UTF-8."""
    with open(path, encoding="utf-8", newline="") as file:
        try:
            while lines := file.readlines(BLOCK):
                yield "".join(lines)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason}); give the WikiText files as published"
            ) from None


def _join_rows(batches):
    """The hub's files hold a line in each row, and an empty row where the text has the line " \\n"."""
    for rows in batches:
        yield "".join(row or " \n" for row in rows)


def _read_parquet(paths):
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            if file.schema_arrow.field("text").type not in (pyarrow.string(), pyarrow.large_string()):
                raise ValueError("its column text does not hold strings")
            batches = file.iter_batches(batch_size=4096, columns=["text"])
            yield from _join_rows(batch.column(0).to_pylist() for batch in batches)
        except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is no WikiText parquet file ({_first_line(error)}); give the files as the hub has them"
            ) from None


def folder_source(folder, dataset):
    """WikiText as local files. Raises FileNotFoundError if `folder` does not hold all three splits."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give --from the folder that holds the WikiText files")
    for place in (folder, folder / (dataset or DATASETS[0])):
        for ending in ("tokens", "raw"):
            paths = [place / f"wiki.{name}.{ending}" for name in ("train", "valid", "test")]
            if all(path.is_file() for path in paths):
                return {
                    split: (path.stat().st_size, lambda path=path: _read_text(path))
                    for split, path in zip(SPLITS, paths)
                }
        shards = [sorted(place.glob(f"{name}-*.parquet")) for name in ("train", "validation", "test")]
        if all(shards):
            return {split: (None, lambda paths=paths: _read_parquet(paths)) for split, paths in zip(SPLITS, shards)}
    raise FileNotFoundError(
        f"{folder} does not hold WikiText: expected wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens (or "
        ".raw), or train-*.parquet, validation-*.parquet and test-*.parquet"
    )


def _hub_answers():
    """Whether the hub answers within `HUB_TIMEOUT` seconds, name look-up included."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    answered = threading.Event()

    def ask():
        try:
            endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # an unfriendly answer is an answer
        except (OSError, ValueError, http.client.HTTPException):
            pass  # no connection, no address, or no web server there

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT)
    return answered.is_set()


def hub_source(dataset):
    """WikiText through the `datasets` package. Raises ConnectionError if it is neither in reach nor in the cache."""
    if not Path(HUB_DATASET).is_dir() and not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` then looks into its cache and does not wait for the hub
    import datasets

    try:
        splits = datasets.load_dataset(HUB_DATASET, dataset)
    except Exception as error:  # the package has no common base class for "could not be had"
        raise ConnectionError(f"{HUB_DATASET} could not be loaded ({_first_line(error)}); connect, or give local "
                              "files with --from DIR") from error
    return {
        split: (rows.data.nbytes, lambda rows=rows: _join_rows(batch["text"] for batch in rows.iter(batch_size=4096)))
        for split, rows in zip(SPLITS, (splits["train"], splits["validation"], splits["test"]))
    }


def sample_source():
    """The bundled sample, split by articles: of every twelve the sixth is for testing, the last for validation."""
    articles = re.split(r"(?m)(?=^ \n = [^=])", SAMPLE.read_text(encoding="utf-8"))
    articles = [article for article in articles if article]
    parts = {split: [] for split in SPLITS}
    for i, article in enumerate(articles):
        parts["test" if i % 12 == 5 else "val" if i % 12 == 11 else "train"].append(article)
    return {
        split: (sum(len(article.encode()) for article in part), lambda part=part: iter(part))
        for split, part in parts.items()
    }


def open_source(folder=None, dataset=None, sample=False):
    """(source, name of the data set or of its folder). Where the hub is out of reach it is the sample, and said so."""
    if folder:
        return folder_source(folder, dataset), dataset or Path(folder).resolve().name
    if not sample:
        try:
            return hub_source(dataset or DATASETS[0]), dataset or DATASETS[0]
        except (ConnectionError, ImportError) as error:
            if dataset:
                raise
            print(
                f"The dataset hub cannot be used ({type(error).__name__}), so the small bundled sample is taken. For "
                "the real WikiText-2: python data/prepare.py --from DIR, with a folder that holds its files, or "
                "python data/prepare.py with a connection.",
                file=sys.stderr,
            )
    return sample_source(), "sample"


# ----------------------------------------------------------------------------------------------------------
# Token files
# ----------------------------------------------------------------------------------------------------------


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
        known = ", ".join(sorted(path.name for path in DATA_DIR.glob("bpe_vocab*.json")))
        raise FileNotFoundError(f"there is no vocabulary data/{name}; known are {known}")
    return DATA_DIR / name


def token_file(split, vocabulary):
    """Path of the token file of `split` for the vocabulary file `vocabulary`: bpe_vocab_500.json -> *_ids_500.pt."""
    return DATA_DIR / f"{split}_ids{Path(vocabulary).stem.removeprefix('bpe_vocab')}.pt"


def tokenize(stream, tokenizer, bar, n_words=None):
    """Tokenize a stream of strings, whose words are counted unless `n_words` says how many there are.

    Returns (ids array, bytes, words).
    """
    counts = {"bytes": 0, "words": n_words or 0}

    def counted():
        for text in stream:
            n_bytes = len(text.encode("utf-8"))
            counts["bytes"] += n_bytes
            if n_words is None:
                counts["words"] += len(text.split()) + text.count("\n")
            bar.update(n_bytes)
            yield text

    ids = np.concatenate(list(tokenizer.encode_stream(counted())))
    return ids, counts["bytes"], counts["words"]


def _save(content, path):
    """torch.save, with one kind of error. Raises OSError."""
    try:
        torch.save(content, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        raise OSError(f"cannot write {path}: {_first_line(error)}; is the disk full?") from None


def prepare(source=None, name=None, vocabularies=tuple(VOCABULARIES)):
    """Tokenize all splits of a source with each of `vocabularies` (names of files in data/).

    source: from `open_source`, which is asked if there is none; name: of the data set. The name of a folder gives way
    to that of the data set if the words of its training split are as many as published. Token files that were there
    are replaced once all new ones are complete.
    """
    if source is None:
        source, name = open_source()
    tokenizers = {vocabulary: BPETokenizer.load(vocabulary_file(vocabulary)) for vocabulary in vocabularies}
    sizes = [size for size, _ in source.values()]
    total = sum(sizes) * len(tokenizers) if None not in sizes else None
    written = {}  # temporary file -> (token file, what to say of it)
    words = {}  # of each split
    try:
        with tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, disable=None) as bar:
            for vocabulary, tokenizer in tokenizers.items():
                for split in SPLITS:
                    ids, n_bytes, n_words = tokenize(source[split][1](), tokenizer, bar, words.get(split))
                    words[split] = n_words
                    if len(ids) < 2:
                        raise ValueError(f"the {split} split of this source is empty; give the files as published")
                    if split == "train" and name not in (*DATASETS, "sample") and n_words in PUBLISHED_WORDS:
                        words_removed = any("<unk>" in text for text in source[split][1]())
                        name = PUBLISHED_WORDS[n_words] + ("-v1" if words_removed else "-raw-v1")
                    path = token_file(split, vocabulary)
                    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                    written[beside] = path, (
                        f"{path.parent.name}/{path.name}: {name}, {len(ids):,} tokens, {n_bytes:,} bytes, "
                        f"{n_words:,} words, {n_bytes / len(ids):.2f} bytes per token"
                    )
                    content = {
                        "format": FORMAT, "version": VERSION, "dataset": name, "split": split,
                        "ids": torch.from_numpy(ids), "n_tokens": len(ids), "n_bytes": n_bytes, "n_words": n_words,
                        "tokenizer": vocabulary, "fingerprint": tokenizer.fingerprint,
                    }  # fmt: skip
                    _save(content, beside)
        for beside, (path, line) in written.items():
            beside.replace(path)
            print(line)
    finally:
        for beside in written:
            beside.unlink(missing_ok=True)


def _is_whole(content):
    """Whether the contents of a token file have the types that `prepare` gives them, and as many ids as it says."""
    types = {"ids": torch.Tensor, "n_tokens": int, "n_bytes": int, "n_words": int, "dataset": str, "split": str,
             "tokenizer": str, "fingerprint": str}  # fmt: skip
    if not all(isinstance(content.get(key), kind) for key, kind in types.items()):
        return False
    return content["ids"].dtype == torch.uint16 and content["ids"].shape == (content["n_tokens"],)


def load_tokens(vocabulary):
    """{"train": Tokens, "val": Tokens, "test": Tokens} for the vocabulary file `vocabulary` in data/.

    Makes the token files first if there are none. Raises OSError if a file cannot be read or written and ValueError
    if one is damaged, or was made by another tokenizer, or from another text than its neighbours.
    """
    tokenizer = BPETokenizer.load(vocabulary_file(vocabulary))
    missing = [path.name for split in SPLITS if not (path := token_file(split, vocabulary)).exists()]
    again = "make the token files again with python data/prepare.py"
    if vocabulary not in VOCABULARIES:
        again += f" --vocab-size {Path(vocabulary).stem.removeprefix('bpe_vocab_')}"
    if len(missing) == len(SPLITS):
        others = [path for path in DATA_DIR.glob("train_ids*.pt")]
        if others:
            raise FileNotFoundError(f"there are token files, but not for {vocabulary}; {again}")
        print("There are no token files yet: preparing them.", file=sys.stderr)
        prepare(vocabularies=tuple(VOCABULARIES) if vocabulary in VOCABULARIES else (vocabulary,))
    elif missing:
        raise FileNotFoundError(f"data/{missing[0]} is missing beside the other splits; {again}")
    tokens = {}
    for split in SPLITS:
        path = token_file(split, vocabulary)
        try:
            content = torch.load(path, weights_only=True, mmap=True)
            good = isinstance(content, dict) and content.get("format") == FORMAT
        except (PermissionError, IsADirectoryError) as error:
            raise OSError(f"data/{path.name} cannot be read ({error.strerror}); {again}") from None
        except Exception:  # the unpickler fails in many ways on a damaged file
            good = False
        if good and content.get("version") != VERSION:
            raise ValueError(f"data/{path.name} has version {content.get('version')!r}, not {VERSION}; {again}")
        if not good or not _is_whole(content):
            raise ValueError(f"data/{path.name} is damaged or no token file; {again}")
        if content["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(f"data/{path.name} was made by another tokenizer than data/{vocabulary}; {again}")
        if content["split"] != split:
            raise ValueError(f"data/{path.name} holds the split {content['split']!r}: it was renamed; {again}")
        if int(content["ids"].numpy().max()) >= tokenizer.vocab_size:
            raise ValueError(f"data/{path.name} is damaged: it has ids outside of the vocabulary; {again}")
        tokens[split] = Tokens(**{key: content[key] for key in ("ids", "n_bytes", "n_words", "dataset", "fingerprint")})
    names = {split: some.dataset for split, some in tokens.items()}
    if len(set(names.values())) > 1:
        raise ValueError(f"the token files come from different data sets ({names}); {again}")
    if names["train"] == "sample":
        print("The text is the small bundled sample, data/input.txt. For WikiText-2: python data/prepare.py")
    return tokens


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def train_vocabulary(source, vocabulary, vocab_size):
    """Learn a vocabulary from the training split and save it in data/."""
    text = "".join(source["train"][1]())
    with tqdm(total=vocab_size, desc=f"learning {vocabulary}", unit="token", disable=None) as bar:
        tokenizer = BPETokenizer.train(text, vocab_size, progress=lambda _: bar.update())
    tokenizer.save(DATA_DIR / vocabulary)
    print(f"data/{vocabulary}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the token files that the rungs train on.")
    parser.add_argument("--from", dest="folder", metavar="DIR", help="read WikiText from local files")
    parser.add_argument("--dataset", choices=DATASETS, help=f"which WikiText (default: {DATASETS[0]})")
    parser.add_argument("--sample", action="store_true", help="use the bundled sample")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="learn a vocabulary of N tokens and use it")
    parser.add_argument("--train-vocab", action="store_true", help="learn the two committed vocabularies again")
    args = parser.parse_args(argv)
    vocabularies = dict(VOCABULARIES)
    if args.vocab_size is not None:
        if not 257 <= args.vocab_size <= 1 << 16:
            parser.error(f"--vocab-size {args.vocab_size} must lie between 257 and 65536, since ids take 16 bits")
        vocabularies = {f"bpe_vocab_{args.vocab_size}.json": args.vocab_size}
        if not args.train_vocab and not VOCABULARIES.keys().isdisjoint(vocabularies):
            parser.error(f"a vocabulary of {args.vocab_size} tokens is committed already: leave --vocab-size out")
    source, name = open_source(args.folder, args.dataset, args.sample)
    if args.vocab_size is not None or args.train_vocab:
        for vocabulary, vocab_size in vocabularies.items():
            train_vocabulary(source, vocabulary, vocab_size)
    prepare(source, name, tuple(vocabularies))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; no token file was changed in part")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"prepare.py: {error}")
