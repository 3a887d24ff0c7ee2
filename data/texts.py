"""Texts of one's own: files become documents, documents become splits.

A document is a row of a .jsonl or .parquet file, one of several text files, or what lies between two separators of a
text file. A single text file without separators is one text, which is cut into three.

Texts are kept as bytes of UTF-8, exactly as they are, line ends included; only a byte order mark is taken off.
"""

import codecs
import gzip
import io
import json
import os
import re
import reprlib
import zlib
from dataclasses import dataclass
from pathlib import Path

from harness.cli import first_line
from harness.errors import FileError, MissingFileError, UserError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test"}  # fmt: skip
TEXT_ENDINGS = (".txt", ".md", ".text", ".tokens", ".raw", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
HELD_OUT = 0.05  # share of each of the two held-out splits
FEWEST_BYTES = 200  # of a held-out split, if the text is long enough
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass
class ReadOptions:
    """How files are read: their encoding, what happens to bytes that do not fit ("strict" or "replace"), the column of
    rows that holds the text, and what separates the documents of a text (None: nothing does)."""

    encoding: str = "utf-8"
    errors: str = "strict"
    column: str = "text"
    separator: str | None = None


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def _read_bytes(path):
    """The contents of a file, unpacked if its name ends in .gz. Raises OSError in one line."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileError(f"{path} is no whole gzip file ({error}); unpack it, or fetch it again") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error})") from None


def _utf8(data, path, options):
    """`data` as bytes of UTF-8 without a byte order mark. Raises ValueError, with line and byte, if it is not text in
    the encoding of `options`."""
    try:
        if codecs.lookup(options.encoding).name == "utf-8":
            data = data.removeprefix(codecs.BOM_UTF8)
            if options.errors == "strict":
                data.decode()
                return data
        text = data.decode(options.encoding, options.errors).removeprefix("\ufeff")
        return text.encode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        mark = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
        advice = f"--encoding {mark}, whose mark it begins with," if mark else "--encoding NAME (such as cp1252)"
        raise UserError(f"{path}, line {line}: byte 0x{data[error.start]:02X} at offset {error.start} is not "
                        f"{options.encoding} text; {advice} or --errors replace reads on") from None  # fmt: skip
    except UnicodeError as error:  # a lone surrogate in UTF-16, or an encoding that knows no places
        raise UserError(f"{path} is not {options.encoding} text ({error}); --errors replace reads on") from None


def _check_row(value, place, column):
    """Raise ValueError if the value of a row is no text. A missing one is none, and allowed."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: the column {column} holds {reprlib.repr(value)}, which is no text")


def _encode_row(value, place, options):
    """The text of a row as bytes: none for a missing one. Raises ValueError if UTF-8 cannot express it."""
    try:
        return (value or "").encode("utf-8", options.errors)
    except UnicodeEncodeError:
        raise UserError(f"{place}: the text holds half of a surrogate pair, which UTF-8 has not; --errors replace "
                        "reads on") from None  # fmt: skip


def _no_column(place, names, column):
    known = ", ".join(map(str, names)) or "none"
    return UserError(f"{place} has no column {column}; it has {known}; --column NAME takes another")


def _read_jsonl(content, path, options):
    for number, line in enumerate(_utf8(content, path, options).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{place} is no JSON; a .jsonl file has an object in each line") from None
        if not isinstance(row, dict) or options.column not in row:
            raise _no_column(place, row if isinstance(row, dict) else (), options.column)
        _check_row(row[options.column], place, options.column)
        yield _encode_row(row[options.column], place, options)


def read_parquet(path, column="text", content=None):
    """Stream the rows of a column of a parquet file in lists of some thousand: strings, and None where one is missing.
    content: the bytes of the file, if it is not to be opened. Raises ValueError, in one line, if it is damaged or has
    no such column of text."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path if content is None else io.BytesIO(content))
        if column not in file.schema_arrow.names:
            raise _no_column(path, file.schema_arrow.names, column)
        for batch in file.iter_batches(batch_size=4096, columns=[column]):
            rows = batch.column(0).to_pylist()
            for row in rows:
                _check_row(row, path, column)
            yield rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no whole parquet file ({first_line(error)}); fetch it again") from None


def _ending(path):
    """The ending of a file, that of what is packed if it is packed: x.jsonl.gz -> .jsonl."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def read_documents(path, options):
    """The documents of one file, a list of bytes, but for empty ones. Raises OSError and ValueError in one line."""
    content, ending = _read_bytes(path), _ending(path)
    if ending in (".jsonl", ".ndjson"):
        documents = _read_jsonl(content, path, options)
    elif ending == ".parquet":
        rows = (row for rows in read_parquet(path, options.column, content) for row in rows)
        documents = (_encode_row(row, path, options) for row in rows)
    else:
        text = _utf8(content, path, options)
        documents = [text] if options.separator is None else text.split(options.separator.encode())
    return [document for document in documents if document]


def _is_binary(path):
    """Whether a file of a folder is not worth reading: pictures and programs have zero bytes, texts have not."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(8192)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return True
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error})") from None
    return _ending(path) != ".parquet" and b"\0" in start and not start.startswith(tuple(BYTE_ORDER_MARKS))


def find_files(paths, say):
    """[(file, its path below what was named)] of files and folders, those of a folder in the order of their names.

    Hidden files are left out, as are links that lead nowhere and files that are no text, which `say` tells.
    Raises FileNotFoundError if there is nothing to read.
    """
    files, left_out = [], []
    if "" in map(str, paths):
        raise MissingFileError("'' is no name; give --from text files or folders of them")
    for path in map(Path, paths):
        if not path.exists():
            raise MissingFileError(f"there is no {str(path)!r}; give --from text files or folders of them")
        if not path.is_dir():
            files.append((path, Path(path.name)))
            continue
        for folder, names, inside in os.walk(path):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for file in (Path(folder, name) for name in sorted(inside) if not name.startswith(".")):
                if not file.is_file() or _is_binary(file):
                    left_out.append(file)
                else:
                    files.append((file, file.relative_to(path)))
    if left_out:
        others = f" and {len(left_out) - 1} more" * (len(left_out) > 1)
        say(f"Left out, since it is no text: {left_out[0]}{others}")
    if not files:
        raise MissingFileError(f"there is no text in {', '.join(map(str, paths))}; give --from text files or folders "
                               "of them")  # fmt: skip
    return files


# ----------------------------------------------------------------------------------------------------------
# Splits
# ----------------------------------------------------------------------------------------------------------


def _split_of(place):
    """The split that a file is named after (train.txt, valid.jsonl.gz, test-00000-of-00001.parquet, train/x.txt), or
    None."""
    if len(place.parts) > 1:
        return SPLIT_NAMES.get(place.parts[0].lower())
    if _ending(place) not in TEXT_ENDINGS:
        return None
    name = place.name.lower().removesuffix(".gz").removesuffix(_ending(place))
    return SPLIT_NAMES.get(re.sub(r"-\d+-of-\d+$", "", name))


def assign(sizes, shares):
    """Index of the share to which each document goes: to the one that lacks most bytes, so that all have their part of
    whatever the text goes through. sizes: bytes of each document; shares: of the whole, they sum to 1."""
    got, total, places = [0] * len(shares), 0, []
    for size in sizes:
        total += size
        k = max(range(len(shares)), key=lambda k: shares[k] * total - got[k])
        got[k] += size
        places.append(k)
    return places


def cut_place(text, target, slack):
    """Where to cut `text`, bytes, near `target`: within `slack` bytes where a paragraph ends, or else a line, or else a
    word; otherwise before the character there."""
    low = max(0, target - slack)
    window = text[low : target + slack]
    for end in (rb"\n(?:[ \t\r]*\n)+", rb"\n", rb"[ \t]"):
        if places := [low + match.end() for match in re.finditer(end, window) if low + match.end() < len(text)]:
            return min(places, key=lambda place: abs(place - target))
    while target > 0 and text[target] & 0xC0 == 0x80:  # the middle of a character
        target -= 1
    return target


def _cut(documents, target, slack):
    """Two lists of documents, of which the first has about `target` bytes; the document there is cut in two."""
    for k, document in enumerate(documents):
        if target < len(document):
            place = cut_place(document, target, slack)
            left, right = document[:place], document[place:]
            return documents[:k] + [left] * bool(left), [right] * bool(right) + documents[k + 1 :]
        target -= len(document)
    return documents, []


def split_documents(documents, names):
    """{name: documents} for the splits `names`, the first of which gets what the others, with HELD_OUT of the bytes
    each, leave. Many documents stay whole; few, or a single text, are cut where a paragraph or a line ends."""
    n_bytes = sum(map(len, documents))
    held_out = max(HELD_OUT, min(0.25, FEWEST_BYTES / max(1, n_bytes)))
    shares = [1 - held_out * (len(names) - 1)] + [held_out] * (len(names) - 1)
    places = assign(map(len, documents), shares)
    parts = {name: [d for d, place in zip(documents, places) if place == k] for k, name in enumerate(names)}
    if all(0.8 * share < sum(map(len, part)) / max(1, n_bytes) < 1.2 * share
           for share, part in list(zip(shares, parts.values()))[1:]):  # fmt: skip
        return parts
    parts, rest = {}, documents
    for name, share in list(zip(names, shares))[:-1]:
        parts[name], rest = _cut(rest, round(share * n_bytes), n_bytes // 60)
    return {**parts, names[-1]: rest}


def read_texts(paths, options, say):
    """({"train": documents, "val": documents, "test": documents}, whether they are documents) of files and folders.

    Files named after the splits are taken as they are; what is missing beside "train" is taken from it. Otherwise
    the text is split. Documents are bytes; if they are none, each split is one text, a list of one.
    Raises OSError if a file cannot be read, ValueError if one is not what its name says, both in one line.
    """
    files = find_files(paths, say)
    if any(len(place.parts) > 1 and _split_of(place) is None for _, place in files):
        splits_of = [None if len(place.parts) > 1 else _split_of(place) for _, place in files]  # a folder among others
    else:
        splits_of = [_split_of(place) for _, place in files]
    named = {split: [file for (file, _), name in zip(files, splits_of) if name == split] for split in SPLITS}
    if named["val"] and named["test"] and not named["train"]:
        raise MissingFileError(f"there are {named['val'][0].name} and {named['test'][0].name}, and no file is named "
                               "train; add it, or give the others another name")  # fmt: skip
    if named["train"] and (named["val"] or named["test"]):
        used = [file for some in named.values() for file in some]
        if other := [str(file) for (file, _), name in zip(files, splits_of) if name is None]:
            say(f"The splits are {', '.join(file.name for file in used[:5])}{' ...' * (len(used) > 5)}; left out is "
                f"{other[0]}{f' and {len(other) - 1} more' * (len(other) > 1)}.")  # fmt: skip
        splits = {split: [d for file in some for d in read_documents(file, options)] for split, some in named.items()}
        if missing := [split for split, some in named.items() if not some]:
            splits.update(split_documents(splits["train"], ["train", *missing]))
    else:
        documents = [document for file, _ in files for document in read_documents(file, options)]
        if not documents:
            raise UserError(f"there is no text in {', '.join(map(str, paths))}: it is empty")
        splits = split_documents(documents, SPLITS)
    return splits, any(len(documents) > 1 for documents in splits.values())
