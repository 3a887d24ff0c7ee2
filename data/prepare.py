"""Make the token files that the rungs train on.

    python data/prepare.py                             WikiText-2 from the Hugging Face hub, or the bundled sample
    python data/prepare.py --from DIR                  from local files: wiki.{train,valid,test}.tokens or .raw, or
                                                       the hub's parquet files
    python data/prepare.py --dataset wikitext-103-v1   a larger text
    python data/prepare.py --sample                    the bundled sample, data/input.txt
    python data/prepare.py --vocab-size 8192           with a vocabulary of its own, data/bpe_vocab_8192.json
    python data/prepare.py --vocabulary NAME           with the vocabulary data/NAME, as it is
    python data/prepare.py --from DIR --train-vocab    make the two committed vocabularies again, from WikiText-2

For each split it writes `{train,val,test}_ids.pt`, and with the small vocabulary of v0 `{train,val,test}_ids_500.pt`.
A rung that finds none of its files has `data.load_tokens` call `prepare()`.

The text is tokenized exactly as it is, line ends kept, so that bytes and words are those of the published counts:
words are the white-space separated words plus one end-of-line a line.
"""

import argparse
import atexit
import contextlib
import http.client
import os
import re
import secrets
import signal
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

if __name__ == "__main__":

    def stop(number, frame):
        """Ctrl-C and SIGTERM end the program with one line and their usual exit codes, during the imports as well."""
        atexit.unregister(print)
        atexit.register(print, "prepare.py: stopped; no token file was changed in part", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    root = Path(__file__).absolute().parents[1]  # not resolved: data/ may be a symbolic link to a folder elsewhere
    if not (root / "bpe_tokenizer.py").is_file():
        sys.exit("prepare.py: bpe_tokenizer.py is not beside data/; change to its folder, then python data/prepare.py")
    sys.path.insert(0, str(root))

try:
    import fcntl  # locks on files
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
from tqdm import tqdm

import data
from bpe_tokenizer import BPETokenizer

SAMPLE = "input.txt"
LOCK = "prepare.lock"
HUB_DATASET = "Salesforce/wikitext"
DATASETS = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
HUB_TIMEOUT = 8  # seconds until the hub counts as out of reach
BLOCK = 1 << 20  # characters read at a time

# Words of the training splits as published (Merity et al. 2016, arXiv:1609.07843, table 1, end-of-lines included).
PUBLISHED_WORDS = {2_088_628: "wikitext-2", 103_227_021: "wikitext-103"}


def say(line, file=None):
    """Print a line. That it cannot be read, for a closed pipe, a full disk or an old encoding, costs nothing else."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: a closed file
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


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


def _unchanged(paths, read):
    """A function that opens the stream `read()`, which ends in a ValueError if one of its files is not as it is now:
    every vocabulary reads the text anew, and all must read the same."""

    def state():
        return [(path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    def stream():
        yield from read()
        for path, then, now in zip(paths, before, state()):
            if then != now:
                raise ValueError(f"{path} changed while it was read; try again once it is complete")

    before = state()
    return stream


def folder_source(folder, dataset):
    """WikiText as local files. Raises FileNotFoundError if `folder` does not hold all three splits."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{str(folder)!r} is no folder; give --from the folder that holds the WikiText files")
    folder = Path(folder)
    for place in (folder, folder / (dataset or DATASETS[0])):
        for ending in ("tokens", "raw"):
            paths = [place / f"wiki.{name}.{ending}" for name in ("train", "valid", "test")]
            if all(path.is_file() for path in paths):
                return {
                    split: (path.stat().st_size, _unchanged([path], lambda path=path: _read_text(path)))
                    for split, path in zip(data.SPLITS, paths)
                }
        shards = [sorted(place.glob(f"{name}-*.parquet")) for name in ("train", "validation", "test")]
        if all(shards):
            return {
                split: (None, _unchanged(paths, lambda paths=paths: _read_parquet(paths)))
                for split, paths in zip(data.SPLITS, shards)
            }
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
        for split, rows in zip(data.SPLITS, (splits["train"], splits["validation"], splits["test"]))
    }


def sample_source():
    """The bundled sample, split by articles: of every twelve the sixth is for testing, the last for validation."""
    articles = re.split(r"(?m)(?=^ \n = [^=])", (data.DATA_DIR / SAMPLE).read_text(encoding="utf-8"))
    articles = [article for article in articles if article]
    parts = {split: [] for split in data.SPLITS}
    for i, article in enumerate(articles):
        parts["test" if i % 12 == 5 else "val" if i % 12 == 11 else "train"].append(article)
    return {
        split: (sum(len(article.encode()) for article in part), lambda part=part: iter(part))
        for split, part in parts.items()
    }


def _folder_name(folder):
    """The name of a folder, as the name of its text: in one line, and not the name of the sample."""
    folder = Path(folder).resolve()
    name = " ".join((folder.name or str(folder)).encode("utf-8", "replace").decode().split())
    return f"{folder.parent.name}/{name}" if name == "sample" else name


def open_source(folder=None, dataset=None, sample=False):
    """(source, name of the data set or of its folder). Where the hub is out of reach it is the sample, and said so."""
    if folder is not None:
        return folder_source(folder, dataset), dataset or _folder_name(folder)
    if not sample:
        try:
            return hub_source(dataset or DATASETS[0]), dataset or DATASETS[0]
        except (ConnectionError, ImportError) as error:
            if dataset:
                raise
            say(
                f"The dataset hub cannot be used ({type(error).__name__}), so the small bundled sample is taken. For "
                "the real WikiText-2: python data/prepare.py --from DIR, with a folder that holds its files, or "
                "python data/prepare.py with a connection.",
                sys.stderr,
            )
    return sample_source(), "sample"


# ----------------------------------------------------------------------------------------------------------
# Token files
# ----------------------------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def only_one():
    """Within, no other process prepares token files: one that does so already is waited for.

    Gives whether it holds the lock, which ends with the process. Where files cannot be locked, it says so.
    """
    with contextlib.ExitStack() as stack:
        locked = False
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            file = stack.enter_context(open(data.DATA_DIR / LOCK, "a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another process is preparing token files: waiting for it to end.", sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError as error:
            say(f"data/ cannot be locked ({error.strerror or error}): prepare token files in one process at a time.",
                sys.stderr)
        yield locked


@contextlib.contextmanager
def uninterrupted():
    """Within, Ctrl-C and SIGTERM wait; they take effect at its end."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    came = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def atomic_writes():
    """Gives a function write(save, path), which calls save(a temporary file). At the end all files that were written so
    take their places back to back; after an exception none does. Raises OSError if a file cannot be written."""
    written = {}  # temporary file -> path

    def write(save, path):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, and a file must take its place; remove it")
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        written[beside] = path
        try:
            save(beside)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or _first_line(error)}") from None
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"cannot write {path}: {_first_line(error)}; is the disk full?") from None

    try:
        yield write
        with uninterrupted():
            for beside, path in written.items():
                beside.replace(path)
    finally:
        with uninterrupted():
            for beside in written:
                beside.unlink(missing_ok=True)


def learn_vocabulary(source, vocabulary, vocab_size):
    """A tokenizer with the vocabulary that the training split teaches: of `vocab_size` tokens, or of fewer, which it
    says, if the text has no more pairs to merge."""
    text = "".join(source["train"][1]())
    with tqdm(total=vocab_size, desc=f"learning {vocabulary}", unit="token", disable=None) as bar:
        tokenizer = BPETokenizer.train(text, vocab_size, progress=lambda _: bar.update())
    if tokenizer.vocab_size < vocab_size:
        say(f"The text has no more pairs to merge: data/{vocabulary} has {tokenizer.vocab_size:,} tokens instead of "
            f"{vocab_size:,}.", sys.stderr)  # fmt: skip
    return tokenizer


def _tokenize_source(source, name, tokenizers, write):
    """Tokenize all splits with each of `tokenizers` (vocabulary -> tokenizer) and `write` the token files. Gives a line
    about each."""
    sizes = [size for size, _ in source.values()]
    total = sum(sizes) * len(tokenizers) if None not in sizes else None
    preparation = secrets.token_hex(8)  # tells files that belong together
    words = {}  # of each split
    with tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, disable=None) as bar:
        for vocabulary, tokenizer in tokenizers.items():
            for split in data.SPLITS:
                ids, n_bytes, n_words = tokenize(source[split][1](), tokenizer, bar, words.get(split))
                words[split] = n_words
                if len(ids) < 2 or n_words < 1:
                    raise ValueError(f"the {split} split of this source is too short: it needs two tokens and a word, "
                                     f"and has {len(ids)} and {n_words}; give the files as published")
                if split == "train" and name not in (*DATASETS, "sample") and n_words in PUBLISHED_WORDS:
                    words_removed = any("<unk>" in text for text in source[split][1]())
                    name = PUBLISHED_WORDS[n_words] + ("-v1" if words_removed else "-raw-v1")
                path = data.token_file(split, vocabulary)
                content = {
                    "format": data.FORMAT, "version": data.VERSION, "preparation": preparation, "dataset": name,
                    "split": split, "ids": torch.from_numpy(ids), "n_tokens": len(ids), "n_bytes": n_bytes,
                    "n_words": n_words, "tokenizer": vocabulary, "fingerprint": tokenizer.fingerprint,
                }  # fmt: skip
                write(lambda beside: torch.save(content, beside), path)
                yield (f"data/{path.name}: {name}, {len(ids):,} tokens, {n_bytes:,} bytes, {n_words:,} words, "
                       f"{n_bytes / len(ids):.2f} bytes per token")


def prepare(source=None, name=None, vocabularies=tuple(data.VOCABULARIES), vocab_sizes=None, only_missing=False):
    """Tokenize all splits of a source with each of `vocabularies` (names of files in data/).

    source: from `open_source`, which is asked if there is none; name: of the data set. The name of a folder gives way
    to that of the data set if the words of its training split are as many as published.
    vocab_sizes: {vocabulary: size in tokens} of those that are learned first, from the training split.
    only_missing: leave vocabularies alone that have token files by now.
    The files that were there are replaced once all new ones are complete. Raises OSError if a file cannot be read or
    written and ValueError if the source or a vocabulary cannot be used.
    """
    lines, tokenizers, vocab_sizes = [], {}, vocab_sizes or {}
    with only_one() as locked:
        if only_missing:  # another process may have made them while this one waited
            vocabularies = [v for v in vocabularies if not any(data.token_file(s, v).exists() for s in data.SPLITS)]
            if not vocabularies:
                return
        if not os.access(data.DATA_DIR, os.W_OK):
            raise PermissionError(f"{data.DATA_DIR} cannot be written, and the token files must go there")
        if locked:  # whoever left a temporary file was killed
            for pattern in ("*_ids*.pt.*.tmp", "bpe_vocab*.json.*.tmp"):
                for left in data.DATA_DIR.glob(pattern):
                    left.unlink(missing_ok=True)
        if source is None:
            source, name = open_source()
        with atomic_writes() as write:
            for vocabulary in vocabularies:
                if vocabulary in vocab_sizes:
                    tokenizer = learn_vocabulary(source, vocabulary, vocab_sizes[vocabulary])
                    write(tokenizer.save, data.DATA_DIR / vocabulary)
                    lines.append(f"data/{vocabulary}: {tokenizer.vocab_size} tokens, fingerprint "
                                 f"{tokenizer.fingerprint}")  # fmt: skip
                else:
                    tokenizer = BPETokenizer.load(data.vocabulary_file(vocabulary))
                if tokenizer.vocab_size > 1 << 16:
                    raise ValueError(f"data/{vocabulary} has {tokenizer.vocab_size:,} tokens, and ids of 16 bits name "
                                     "65,536; take a smaller vocabulary")  # fmt: skip
                tokenizers[vocabulary] = tokenizer
            lines += _tokenize_source(source, name, tokenizers, write)
    for line in lines:
        say(line)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the token files that the rungs train on.")
    parser.add_argument("--from", dest="folder", metavar="DIR", help="read WikiText from local files")
    parser.add_argument("--dataset", choices=DATASETS, help=f"which WikiText (default: {DATASETS[0]})")
    parser.add_argument("--sample", action="store_true", help="use the bundled sample")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="learn a vocabulary of N tokens and use it")
    parser.add_argument("--vocabulary", metavar="NAME", help="use the vocabulary data/NAME, as it is")
    parser.add_argument("--train-vocab", action="store_true", help="learn the two committed vocabularies again")
    args = parser.parse_args(argv)
    if args.sample and (args.folder is not None or args.dataset):
        parser.error("--sample is a text of its own: leave --from and --dataset out, or --sample")
    vocabularies = dict(data.VOCABULARIES)
    if args.vocabulary is not None:
        if args.vocab_size is not None or args.train_vocab:
            parser.error("--vocabulary is used as it is: leave --vocab-size and --train-vocab out, or --vocabulary")
        vocabularies = {args.vocabulary: None}
        data.vocabulary_file(args.vocabulary)  # before the text is fetched
    elif args.vocab_size is not None:
        if not 257 <= args.vocab_size <= 1 << 16:
            parser.error(f"--vocab-size {args.vocab_size} must lie between 257 and 65536, since ids take 16 bits")
        vocabularies = {f"bpe_vocab_{args.vocab_size}.json": args.vocab_size}
        if not args.train_vocab and not data.VOCABULARIES.keys().isdisjoint(vocabularies):
            parser.error(f"a vocabulary of {args.vocab_size} tokens is committed already: leave --vocab-size out")
    source, name = open_source(args.folder, args.dataset, args.sample)
    learn = args.vocab_size is not None or args.train_vocab
    prepare(source, name, tuple(vocabularies), vocabularies if learn else {})


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError, MemoryError) as error:
        sys.exit(f"prepare.py: {' '.join(str(error).splitlines()) or type(error).__name__}")
    finally:
        try:
            sys.stdout and sys.stdout.flush()
        except OSError:  # nobody reads: the program is done all the same, and Python would flush again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
