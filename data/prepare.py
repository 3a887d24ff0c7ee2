"""Make the token files that the rungs train on.

    python data/prepare.py                             WikiText-2 from the Hugging Face hub, or the bundled sample
    python data/prepare.py --from DIR                  from local files: wiki.{train,valid,test}.tokens or .raw, or
                                                       the hub's parquet files
    python data/prepare.py --from novel.txt --to data/novel    your own text, with its own vocabularies; then
                                                               python v3.py DATA=data/novel
    python data/prepare.py --dataset wikitext-103-v1   a larger text
    python data/prepare.py --dataset roneneldan/TinyStories --to data/stories    any text data set of the hub, with
                                                       --config, --split, --column and --max-bytes where needed
    python data/prepare.py --sample                    the bundled sample, data/input.txt
    python data/prepare.py --vocab-size 8192           learn a vocabulary of 8,192 tokens, data/bpe_vocab_8192.json
    python data/prepare.py --vocabulary NAME           use the vocabulary data/NAME, or any other vocabulary file
    python data/prepare.py --from DIR --train-vocab    learn the two committed vocabularies again, from WikiText-2

Token files and vocabularies are written to the dataset folder --to (default: data/), which the constant DATA of a rung
names. In data/ the committed vocabularies are used; for any other dataset folder, vocabularies are learned from the
training split.

--from takes text files, tables (.jsonl, .json, .csv, .tsv, .parquet, .arrow; each row is a document), either of them
compressed (.gz, .bz2, .xz, .zst, .lz4) or in archives (.zip, .tar), folders of all these, and - for standard input.
Files with train, valid or test in their names, such as x.train.txt, become those splits. Other text is split 90 / 5 / 5
by bytes: between documents if there are many, else at the end of a paragraph or line. A line says which files become
which split. If a text has several documents, <|endoftext|> is placed before each. A text may be larger than memory. A
data set of the hub is read in the same way: its splits are named or cut like files, and its rows are documents. No code
of it is run.

For each split it writes `{train,val,test}_ids.pt`, and with the small vocabulary of v0 `{train,val,test}_ids_500.pt`.
If data/ has no token files yet, a rung makes them: `data.load_tokens` calls `prepare()`.

The text is tokenized exactly as it is, with its line breaks, so that its bytes and words equal the published counts:
words are the white-space separated words plus one end-of-line per line. Separators are tokens, but not bytes of the
text.
"""

import argparse
import atexit
import contextlib
import difflib
import hashlib
import http.client
import os
import re
import secrets
import shlex
import shutil
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

if __name__ == "__main__":
    root = Path(__file__).absolute().parents[1]  # not resolved: data/ may be a symbolic link to a folder elsewhere
    if not (root / "bpe_tokenizer.py").is_file():
        sys.exit("prepare.py: bpe_tokenizer.py is not next to data/; change to its folder, then python data/prepare.py")
    sys.path.insert(0, str(root))
    from harness import signals
    from harness.cli import say

    def stop(number, frame):
        """After a signal that ends a job, end with one line and the signal's exit code, also during the imports."""
        signals.catch(lambda number, frame: None)  # the same signal may arrive again
        atexit.register(say, "prepare.py: stopped; no token file was left incomplete", error=True)
        sys.exit(128 + number)

    signals.catch(stop)

import torch
from tqdm import tqdm

import data
from bpe_tokenizer import PATTERNS, BPETokenizer
from harness.files import Locked, atomic_writes, file_lock
from data.formats import ENCODING_NAMES, File, ReadOptions, read_table, reading, temporary_file, writing
from data.hub import HubError, hub_files, name_of
from data.texts import END, as_paths, read_splits, read_texts, separator_of
from harness.cli import first_line, say
from harness.errors import FileError, MissingFileError, UserError

SAMPLE = "input.txt"
LOCK = "prepare.lock"
HUB_DATASET = "Salesforce/wikitext"
DATASETS = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
HUB_TIMEOUT = 8  # seconds after which the hub counts as unreachable
BLOCK = 1 << 20  # characters read at a time
FEWEST = 10_000  # the least bytes for --max-bytes: each of three splits must have some text

# Words of the training splits as published (Merity et al. 2016, arXiv:1609.07843, table 1, end-of-lines included).
PUBLISHED_WORDS = {2_088_628: "wikitext-2", 103_227_021: "wikitext-103"}


# ----------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------


class Source(dict):
    """{split: (size in bytes or None, function that opens a stream of strings)}. `documents`: whether each string is a
    document, with a long document as an iterator of strings; otherwise the strings are pieces of one text. `own`:
    whether it is the user's own text. `files`: {split: its files}, if it comes from files."""

    def __init__(self, splits, documents=False, own=False, files=None):
        super().__init__(splits)
        self.documents, self.own, self.files = documents, own, files or {}


def _read_text(path):
    """Stream a text file in pieces of whole lines. Raises ValueError if it is not UTF-8."""
    with reading(path), open(path, encoding="utf-8", newline="") as file:
        try:
            while lines := file.readlines(BLOCK):
                yield "".join(lines)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); give the WikiText files as they were "
                            "published") from None


def _join_rows(batches):
    """In the hub's files each row is a line, and an empty row is the line " \\n"."""
    for rows in batches:
        yield "".join(row or " \n" for row in rows)


def _read_shards(paths):
    for path in paths:
        file = File(str(path), PurePosixPath(path.name), lambda path=path: open(path, "rb"), path)
        file.kind = path.suffix.removeprefix(".")
        yield from _join_rows(read_table(file))


def _unchanged(paths, read):
    """A function that opens the stream `read()`. The stream ends in a ValueError if a file has changed since this call:
    each vocabulary reads the text again, and all must read the same."""

    def state():
        return [(path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    def stream():
        yield from read()
        for path, then, now in zip(paths, before, state()):
            if then != now:
                raise UserError(f"{path} changed while it was being read; try again once it is complete")

    before = state()
    return stream


def _is_wikitext(path):
    """Whether a table holds WikiText in the hub's format: its first line is a title."""
    try:
        text = next(_read_shards([path]), "").lstrip("\n ")
    except ValueError:  # damaged, or with other columns: not WikiText
        return False
    return re.match(r"= [^\n]+ = \n", text) is not None


def folder_source(folder, dataset):
    """WikiText from local files, or None if `folder` holds something else. Raises FileNotFoundError if it holds only a
    part of WikiText, or if `dataset` asks for WikiText and it is not there."""
    folder = Path(folder)
    for place in (folder, folder / (dataset or DATASETS[0])):
        for ending in ("tokens", "raw"):
            paths = [place / f"wiki.{name}.{ending}" for name in ("train", "valid", "test")]
            if all(path.is_file() for path in paths):
                return Source({
                    split: (path.stat().st_size, _unchanged([path], lambda path=path: _read_text(path)))
                    for split, path in zip(data.SPLITS, paths)
                }, files={split: [path] for split, path in zip(data.SPLITS, paths)})  # fmt: skip
        for pattern in ("{}-*.parquet", "{}/data-*.arrow"):  # as on the hub, as saved by `datasets`
            shards = [sorted(place.glob(pattern.format(name))) for name in ("train", "validation", "test")]
            if all(shards) and (dataset or _is_wikitext(shards[0][0])):
                return Source({
                    split: (None, _unchanged(paths, lambda paths=paths: _read_shards(paths)))
                    for split, paths in zip(data.SPLITS, shards)
                }, files=dict(zip(data.SPLITS, shards)))  # fmt: skip
    if dataset or any(folder.glob("wiki.*.tokens")) or any(folder.glob("wiki.*.raw")):
        raise MissingFileError(
            f"{folder} does not hold all of WikiText; add what is missing: wiki.train.tokens, wiki.valid.tokens and "
            "wiki.test.tokens (or .raw), or train-*.parquet, validation-*.parquet and test-*.parquet"
        )


def own_source(paths, options, scratch=None):
    """The user's own text in files and folders. `scratch`: the folder for a temporary copy. Raises what `read_texts`
    raises."""
    return _source_of(*read_texts(paths, options, _say_error, scratch))


def _source_of(splits, documents):
    return Source({split: (some.n_bytes, some.texts if documents else some.pieces) for split, some in splits.items()},
                  documents, own=True)  # fmt: skip


def _say_error(line):
    say(line, error=True)


def _hub_answers():
    """Whether the hub answers within `HUB_TIMEOUT` seconds, including the DNS look-up."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    answered = threading.Event()

    def ask():
        try:
            endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # an error status is an answer, too
        except (OSError, ValueError, http.client.HTTPException):
            pass  # no connection, no address, or no web server there

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT)
    return answered.is_set()


def _ask_hub(name):
    """Whether the data set `name` can be read: it is a local folder, or the hub answers. If not, make the `datasets`
    package use its cache without waiting for the hub."""
    if Path(name).is_dir() or _hub_answers():
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("datasets.config", "huggingface_hub.constants"):  # they read the variable only on import
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True
    return False


def hub_source(dataset):
    """WikiText through the `datasets` package. Raises ConnectionError if neither the hub nor the cache has it."""
    _ask_hub(HUB_DATASET)
    import datasets

    try:
        splits = datasets.load_dataset(HUB_DATASET, dataset)
    except Exception as error:  # the package has no base class for its errors
        raise HubError(f"{HUB_DATASET} could not be loaded ({first_line(error)}); connect to the network, or give "
                       "local files with --from DIR") from error
    return Source({
        split: (rows.data.nbytes, lambda rows=rows: _join_rows(batch["text"] for batch in rows.iter(batch_size=4096)))
        for split, rows in zip(data.SPLITS, (splits["train"], splits["validation"], splits["test"]))
    })


def other_hub_source(name, options, config=None, splits=None, scratch=None):
    """Any text data set of the hub. config: which part of it; splits: names of the splits to read; scratch: the folder
    for a temporary copy. Raises what `data.hub.hub_files` raises."""
    files, found = hub_files(name, config, splits, options, _ask_hub(name), _say_error, scratch)
    return _source_of(*read_splits(files, found, options, name, _say_error, scratch))


def sample_source():
    """The bundled sample, split by articles: of every twelve, the sixth is for testing and the last for validation."""
    articles = re.split(r"(?m)(?=^ \n = [^=])", (data.DATA_DIR / SAMPLE).read_text(encoding="utf-8"))
    articles = [article for article in articles if article]
    parts = {split: [] for split in data.SPLITS}
    for i, article in enumerate(articles):
        parts["test" if i % 12 == 5 else "val" if i % 12 == 11 else "train"].append(article)
    return Source({
        split: (sum(len(article.encode()) for article in part), lambda part=part: iter(part))
        for split, part in parts.items()
    })


def _name_of(paths):
    """A name for the text in some files or a folder: one line, and never the name of the sample."""
    path = Path(paths[0]).resolve()
    name = path.name if path.is_dir() else path.name.split(".")[0] if path.is_file() else "stdin"  # a pipe
    name = " ".join((name or str(path)).encode("utf-8", "replace").decode().split())
    name = f"{path.parent.name}/{name}" if name == "sample" else name
    return name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def open_source(paths=None, dataset=None, sample=False, options=None, scratch=None, config=None, splits=None):
    """(source, name of the data set or of its files). If the hub cannot be reached and the user asked for no data set,
    this is the bundled sample, and a line says so.

    paths: a file or folder, or a list of them. dataset: one of `DATASETS`, or the name of any data set of the hub, of
    which `config` and `splits` choose a part. options: how to read these texts, `ReadOptions`. scratch: the folder for
    a temporary copy of them.
    """
    if dataset is not None and dataset not in DATASETS:
        name = _name_of([dataset]) if Path(dataset).is_dir() else dataset
        name = f"{name}/{config}" if config else name
        source = other_hub_source(dataset, options or ReadOptions(), config, splits, scratch)
        return source, "a data set named sample" if name == "sample" else name
    if paths is not None:
        paths = as_paths([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        source = folder_source(paths[0], dataset) if len(paths) == 1 and os.path.isdir(paths[0]) else None
        if dataset and source is None:
            raise MissingFileError(f"{str(paths[0])!r} is not a folder with WikiText, which --dataset asks for; name "
                                   "one that is, or leave --dataset out")  # fmt: skip
        return source or own_source(paths, options or ReadOptions(), scratch), dataset or _name_of(paths)
    if not sample:
        try:
            return hub_source(dataset or DATASETS[0]), dataset or DATASETS[0]
        except (HubError, ImportError) as error:
            if dataset:
                raise
            say(
                f"The Hugging Face hub cannot be used ({type(error).__name__}), so the small bundled sample is used. "
                "For the real WikiText-2: python data/prepare.py --from DIR, with a folder that holds its files, or "
                "python data/prepare.py once there is a connection.",
                error=True,
            )
    return sample_source(), "sample"


# ----------------------------------------------------------------------------------------------------------
# Token files
# ----------------------------------------------------------------------------------------------------------


def tokenize(stream, tokenizer, file, bar, n_words=None, documents=False):
    """Tokenize a stream of strings and write the ids to `file` as 16-bit numbers. If the strings are `documents`, END
    is placed before each. Words are counted unless `n_words` gives their number.

    Returns (number of ids, their digest, bytes, words).
    """
    counts = {"ids": 0, "bytes": 0, "words": n_words or 0}
    digest = hashlib.sha256()

    def counted(pieces):
        before = " "  # the last character
        for text in pieces:
            n_bytes = len(text.encode("utf-8"))
            counts["bytes"] += n_bytes
            if n_words is None:
                goes_on = not before.isspace() and not text[:1].isspace() and text != ""  # a word in two pieces
                counts["words"] += len(text.split()) + text.count("\n") - goes_on
                before = text[-1:] or before
            bar.update(n_bytes)
            yield text

    if documents:
        texts = (counted(text) if isinstance(text, Iterator) else next(counted([text])) for text in stream)
    for ids in (tokenizer.encode_documents(texts) if documents else tokenizer.encode_stream(counted(stream))):
        content = ids.astype("<u2", copy=False).tobytes()
        digest.update(content)
        with writing("the dataset folder"):
            file.write(content)
        counts["ids"] += len(ids)
    return counts["ids"], digest.hexdigest()[:16], counts["bytes"], counts["words"]


def save(content, ids, file):
    """Write a token file like torch.save, with the ids from the file `ids`, which are never in memory all at once."""
    with torch.serialization.skip_data():
        torch.save({**content, "ids": torch.empty(content["n_tokens"], dtype=torch.uint16)}, file)
    file.flush()
    with zipfile.ZipFile(file.name) as archive:
        (place,) = [info.header_offset for info in archive.infolist() if info.filename.endswith("/data/0")]
    with open(file.name, "rb") as written:
        written.seek(place)
        place += 30 + sum(struct.unpack("<26xHH", written.read(30)))  # past the header, a name and padding
    file.seek(place)
    ids.seek(0)
    shutil.copyfileobj(ids, file, 1 << 20)


@contextlib.contextmanager
def alone_in(directory):
    """Context in which no other process prepares token files in `directory`. It waits for one that already does. Gives
    whether the folder is locked: on a file system without locks it is not."""
    with contextlib.ExitStack() as stack:
        told = False
        while True:
            try:
                locked = stack.enter_context(file_lock(directory / LOCK))
                break
            except Locked as error:
                if not told:
                    who = f"Process {error.holder}" if error.holder else "Another process"
                    say(f"{who} is making token files: waiting for it to end.", error=True)
                told = True
                time.sleep(0.1)
        yield locked


def learn_vocabulary(source, vocabulary, vocab_size, folder="data", pattern="gpt2"):
    """A tokenizer with a vocabulary learned from the training split. It has `vocab_size` tokens, or fewer if the text
    has no more pairs to merge; a line says so."""
    texts = source["train"][1]()
    with tqdm(total=vocab_size, desc=f"learning {vocabulary}", unit="token", disable=None) as bar:
        tokenizer = BPETokenizer.train(texts if source.documents else [iter(texts)], vocab_size, pattern=pattern,
                                       progress=lambda _: bar.update())  # fmt: skip
    if tokenizer.vocab_size < vocab_size:
        say(f"The text has no more pairs to merge: {folder}/{vocabulary} has {tokenizer.vocab_size:,} tokens instead "
            f"of {vocab_size:,}.", error=True)  # fmt: skip
    return tokenizer


def _beginning(source, tokenizer):
    """The ids from which a sample of the text starts: END if documents start with it; in WikiText what precedes the
    title of an article; otherwise the first line, or its first eight or so tokens."""
    if source.documents:
        return tokenizer.encode(END, [END])
    start = next(text for text in source["train"][1]() if text)[:1000]
    if start.startswith(" \n ="):
        return tokenizer.encode(" \n =")
    line = re.match(r"\s*[^\n]*\n?", start)[0]
    ids = tokenizer.encode(line)
    return next(ids[:n] for n in range(8, 13) if n >= len(ids) or "\ufffd" not in tokenizer.decode(ids[:n]))  # whole


def _tokenize_source(source, name, tokenizers, write_one, folder):
    """Tokenize all splits with each of `tokenizers`, {vocabulary: tokenizer}, and write the token files. Yields a line
    about each file."""
    sizes = [size for size, _ in source.values()]
    total = sum(sizes) * len(tokenizers) if None not in sizes else None
    preparation = secrets.token_hex(8)  # marks files that belong together
    words = {}  # of each split
    with (contextlib.ExitStack() as stack,
          tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, disable=None) as bar):  # fmt: skip
        for vocabulary, tokenizer in tokenizers.items():
            start = None
            for split in data.SPLITS:
                ids = stack.enter_context(temporary_file(data.dataset_dir(folder)))
                n_tokens, digest, n_bytes, n_words = tokenize(source[split][1](), tokenizer, ids, bar, words.get(split),
                                                              source.documents)  # fmt: skip
                words[split] = n_words
                if n_tokens < 2 or n_words < 1:
                    advice = "give a longer text" if source.own else "give the files as published"
                    raise UserError(f"the {split} split of this text is too short: it needs two tokens and a word, "
                                    f"but has {n_tokens} and {n_words}; {advice}")
                if split == "train" and name not in (*DATASETS, "sample") and n_words in PUBLISHED_WORDS:
                    words_removed = any("<unk>" in text for text in source[split][1]() if isinstance(text, str))
                    name = PUBLISHED_WORDS[n_words] + ("-v1" if words_removed else "-raw-v1")
                start = start or _beginning(source, tokenizer)
                path = data.token_file(split, vocabulary, folder)
                content = {
                    "format": data.FORMAT, "version": data.VERSION, "preparation": preparation, "dataset": name,
                    "split": split, "n_tokens": n_tokens, "digest": digest, "n_bytes": n_bytes, "n_words": n_words,
                    "start": start, "tokenizer": vocabulary, "fingerprint": tokenizer.fingerprint,
                }  # fmt: skip
                write_one(path, lambda file: save(content, ids, file))
                ids.close()
                yield (f"{folder}/{path.name}: {name}, {n_tokens:,} tokens, {n_bytes:,} bytes, {n_words:,} words, "
                       f"{n_bytes / n_tokens:.2f} bytes per token")


def prepare(source=None, name=None, vocabularies=tuple(data.VOCABULARIES), vocab_sizes=None, only_missing=False,
            folder="data", given=None, pattern="gpt2", command=None):  # fmt: skip
    """Tokenize all splits of a source with each of `vocabularies` (names of files in the dataset folder `folder`).

    source: from `open_source`, which is called if there is none. name: of the data set; if the training split has the
    published number of words of a WikiText, that name replaces the name of a folder.
    vocab_sizes: {vocabulary: size in tokens} of vocabularies to learn first, from the training split, which `pattern`
    cuts into pre-tokens. given: {vocabulary: tokenizer} of vocabularies to copy into the folder.
    only_missing: skip vocabularies that have token files by now.
    command: the command line, kept in a folder other than data/ for messages that say how to make its files again.
    Existing files are replaced once all new ones are complete. Raises OSError if a file cannot be read or written, and
    ValueError if the source or a vocabulary cannot be used.
    """
    lines, tokenizers, vocab_sizes, given = [], {}, vocab_sizes or {}, given or {}
    directory = data.dataset_dir(folder)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {folder} ({error.strerror}); name another with --to") from None
    if not os.access(directory, os.W_OK):
        raise FileError(f"{directory} is not writable, but the token files must go there; make it writable, or name "
                        "another with --to")  # fmt: skip
    with alone_in(directory) as locked:
        if only_missing:  # another process may have made them while this one waited
            vocabularies = [name for name in vocabularies
                            if not any(data.token_file(split, name, folder).exists() for split in data.SPLITS)]
            if not vocabularies:
                return
        if locked:  # a killed process has left unfinished files
            for files in ("writing-*_ids*.pt", "writing-bpe_vocab*.json", "writing-prepared*.txt"):
                for left in directory.glob(files):
                    left.unlink(missing_ok=True)
        if source is None:
            source, name = open_source()
        with atomic_writes() as write_one:
            for vocabulary in vocabularies:
                if vocabulary in vocab_sizes or vocabulary in given:
                    tokenizer = given.get(vocabulary) or learn_vocabulary(
                        source, vocabulary, vocab_sizes[vocabulary], folder, pattern)  # fmt: skip
                    write_one(directory / vocabulary, lambda file: file.write(tokenizer.to_json().encode()))
                    lines.append(f"{folder}/{vocabulary}: {tokenizer.vocab_size} tokens, fingerprint "
                                 f"{tokenizer.fingerprint}")  # fmt: skip
                else:
                    tokenizer = BPETokenizer.load(data.vocabulary_file(vocabulary, folder))
                if tokenizer.vocab_size > 1 << 16:
                    raise UserError(f"{folder}/{vocabulary} has {tokenizer.vocab_size:,} tokens, but 16-bit ids "
                                    "allow only 65,536; use a smaller vocabulary")  # fmt: skip
                tokenizers[vocabulary] = tokenizer
            lines += _tokenize_source(source, name, tokenizers, write_one, folder)
            for vocabulary in vocabularies if command else ():
                write_one(data.command_file(vocabulary, folder), lambda file: file.write(f"{command}\n".encode()))
    for line in lines:
        say(line)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def _choose_vocabularies(parser, args):
    """The vocabularies that the command line asks for: (their names, {name: size} of those to learn,
    {name: tokenizer} of those to copy)."""
    in_data = data.dataset_dir(args.folder) == data.DATA_DIR
    names = dict(data.VOCABULARIES)
    if args.vocabulary is not None:
        if args.vocab_size is not None or args.train_vocab or args.pattern:
            parser.error("--vocabulary uses a vocabulary as it is, while --vocab-size, --train-vocab and --pattern are "
                         "for learning one: leave out one or the other")  # fmt: skip
        path, directory = Path(args.vocabulary), data.dataset_dir(args.folder)
        if path.is_file() and path.resolve().parent != directory.resolve():  # in another folder
            name = f"bpe_vocab_{path.resolve().parent.name}.json" if in_data else "bpe_vocab.json"
            return [name], {}, {name: BPETokenizer.load(path)}
        if not path.is_file() and not directory.is_dir():
            raise MissingFileError(f"there is no vocabulary file {args.vocabulary!r}; name one that exists, or leave "
                                   "--vocabulary out to learn one")  # fmt: skip
        return [data.vocabulary_file(path.name if path.is_file() else args.vocabulary, args.folder).name], {}, {}
    if args.vocab_size is not None:
        if not 257 <= args.vocab_size <= 1 << 16:
            parser.error(f"--vocab-size {args.vocab_size} must be from 257 to 65536, since ids have 16 bits")
        names = {f"bpe_vocab_{args.vocab_size}.json": args.vocab_size}
        if in_data and not args.train_vocab and not data.VOCABULARIES.keys().isdisjoint(names):
            parser.error(f"data/ already has a vocabulary of {args.vocab_size} tokens: leave --vocab-size out")
        return list(names), names, {}
    return list(names), {} if in_data and not args.train_vocab else names, {}


def size(text):
    """The value of --max-bytes, in the ways that people write it: 5000000, 5_000_000, 5e6, 5M or 5MB."""
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d)?) ?([kmgt]?)b?", text.strip(), re.IGNORECASE)
    n = round(float(found[1].replace("_", "")) * 1000 ** " kmgt".index(found[2].lower() or " ")) if found else 0
    if n < FEWEST:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes, {FEWEST:,} or more, such as 100M or 2G")
    return n


def _as_option(given):
    """The first of some arguments, as it is written on the command line."""
    return next(iter(given)).replace("_", "-")


def _choose_dataset(parser, args):
    """Check --dataset, --config and --split. Returns whether --dataset is a data set of the hub other than WikiText."""
    if args.dataset is not None and args.dataset not in DATASETS:
        args.dataset = name_of(args.dataset)
        if args.dataset.lower() in (HUB_DATASET.lower(), HUB_DATASET.split("/")[1]):
            if args.config not in DATASETS:
                parser.error(f"WikiText has four configs: give --dataset with one of {', '.join(DATASETS)}")
            args.dataset, args.config = args.config, None
        elif not Path(args.dataset).is_dir() and difflib.get_close_matches(args.dataset, DATASETS, cutoff=0.7):
            parser.error(f"argument --dataset: invalid choice: {args.dataset!r} (choose from {', '.join(DATASETS)}, or "
                         "give the name of a data set of the hub, OWNER/NAME)")  # fmt: skip
    of_hub = args.dataset is not None and args.dataset not in DATASETS
    if of_hub and args.paths is not None:
        parser.error(f"--dataset {args.dataset} and --from name different texts: leave one of them out")
    for option in ("config", "split"):
        if vars(args)[option] is not None and not of_hub:
            parser.error(f"--{option} chooses a part of a data set of the hub: name it with --dataset OWNER/NAME" +
                         f"; {args.dataset} has no such parts" * (args.dataset is not None))  # fmt: skip
    return of_hub


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the token files that the rungs train on.")
    parser.add_argument("--from", dest="paths", metavar="PATH", nargs="+", action="extend", help="read text files, "
                        "tables, archives, or folders of them: WikiText's, or your own text")  # fmt: skip
    parser.add_argument("--to", dest="folder", metavar="DIR", default="data", help="dataset folder for token files "
                        "and vocabularies (default: data)")  # fmt: skip
    parser.add_argument("--dataset", metavar="NAME", help=f"one of the WikiTexts {', '.join(DATASETS)} (default: "
                        f"{DATASETS[0]}), or any text data set of the Hugging Face hub, such as "
                        "roneneldan/TinyStories")  # fmt: skip
    parser.add_argument("--config", metavar="NAME", help="which config of a data set of the hub: a language, a subset")
    parser.add_argument("--split", metavar="NAME", nargs="+", help="which splits of it to read (default: all)")
    parser.add_argument("--max-bytes", type=size, metavar="N", help="read at most N bytes of the text, such as 100M or "
                        "2G; no more than that is downloaded from the hub")  # fmt: skip
    parser.add_argument("--sample", action="store_true", help="use the bundled sample")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="learn a vocabulary of N tokens and use it")
    parser.add_argument("--vocabulary", metavar="FILE", help="use an existing vocabulary: a name in the dataset "
                        "folder, or any other file")  # fmt: skip
    parser.add_argument("--train-vocab", action="store_true", help="learn the two committed vocabularies again")
    parser.add_argument("--pattern", choices=PATTERNS, help="how to cut the text into words for a new vocabulary "
                        "(default: gpt2)")  # fmt: skip
    parser.add_argument("--separator", metavar="TEXT", help=f"what separates documents in text files, such as {END!r}")
    parser.add_argument("--column", metavar="NAME", help="the column with the text, in tables (.jsonl, .parquet) and "
                        "in data sets of the hub (default: text)")  # fmt: skip
    parser.add_argument("--encoding", metavar="NAME", help="encoding of text files (default: utf-8)")
    parser.add_argument("--errors", choices=("strict", "replace"), help="replace: replace invalid bytes by U+FFFD")
    args = parser.parse_args(argv)
    args.folder = os.path.expanduser(args.folder)
    args.vocabulary = args.vocabulary and os.path.expanduser(args.vocabulary)
    if args.sample and (args.paths is not None or args.dataset):
        parser.error("--sample is a text of its own: leave --from and --dataset out")
    of_hub = _choose_dataset(parser, args)
    given = {name: value for name in ("separator", "column", "encoding", "errors", "max_bytes")
             if (value := vars(args)[name]) is not None}  # fmt: skip
    if given and args.paths is None and not of_hub:
        parser.error(f"--{_as_option(given)} says how to read files: name them with --from, or a data set of the hub "
                     "with --dataset")  # fmt: skip
    if "" in given.values():
        parser.error(f"--{next(name for name, value in given.items() if value == '')} must not be empty")
    if args.separator:
        given["separator"] = separator_of(args.separator)
    if args.encoding:
        name = re.sub(r"^utf[-_ ]?(8|16|32)[-_ ]?(?=.)", r"utf-\1-", args.encoding.strip().lower())  # UTF16LE
        given["encoding"] = ENCODING_NAMES.get(name, name)
        try:
            bytes(8).decode(given["encoding"], "replace")
        except (LookupError, ValueError) as error:
            parser.error(f"--encoding: {error}")
    vocabularies, vocab_sizes, files = _choose_vocabularies(parser, args)  # before the text is fetched
    if args.pattern and not vocab_sizes:
        parser.error("--pattern is for learning a vocabulary, but this learns none: name another dataset folder "
                     "with --to, or give --vocab-size")  # fmt: skip
    directory = data.dataset_dir(args.folder)  # if it does not exist yet, its nearest parent
    scratch = next(folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.is_dir())
    source, name = open_source(args.paths, args.dataset, args.sample, ReadOptions(**given), scratch, args.config,
                               args.split)  # fmt: skip
    for split, shards in source.files.items():
        say(f"{split}: {', '.join(map(str, shards))}", error=True)
    if given and not source.own:
        parser.error(f"--{_as_option(given)} is for your own texts, but this is WikiText: leave it out")
    in_data = data.dataset_dir(args.folder) == data.DATA_DIR
    if source.own and in_data and not vocab_sizes:
        say("data/ keeps the vocabulary of WikiText-2, and these token files replace the ones there. With --to "
            "data/NAME, a text gets its own folder and its own vocabulary.", error=True)  # fmt: skip
    command = shlex.join(["python", "data/prepare.py", *(sys.argv[1:] if argv is None else argv)])
    prepare(source, name, tuple(vocabularies), vocab_sizes, folder=args.folder, given=files,
            pattern=args.pattern or "gpt2", command=None if in_data else command)  # fmt: skip
    if not in_data:
        constants = [f"DATA={args.folder}"] + [f"VOCABULARY={v}" for v in vocabularies if v not in data.VOCABULARIES]
        say(f"Train on it: python v3.py {shlex.join(constants)}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, ImportError, MemoryError) as error:
        sys.exit(f"prepare.py: {' '.join(str(error).splitlines()) or type(error).__name__}")
    finally:
        try:
            sys.stdout and sys.stdout.flush()
        except OSError:  # the reader is gone: no error, and Python must not flush again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
