"""File formats: recognize what a file holds by its first bytes and its extension, and read the texts in it piece by
piece.

It reads plain text, tables (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .feather, .orc), compressed files, and
archives (.zip, .tar) of these. Archives are read in place: nothing is unpacked into a folder. Other formats in which
people keep text are refused with a message that names the format.

A reader yields (bytes of UTF-8, whether a document ends here).
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import reprlib
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from harness.cli import first_line
from harness.errors import FileError, UserError

BLOCK = 1 << 20  # bytes read at a time
HEAD = 1 << 16  # bytes by which a file's format is recognized
ROWS = 256  # rows of a table read at a time
DEEPEST = 4  # levels of archives within archives
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
ENCODING_NAMES = {"ansi": "cp1252", "unicode": "utf-16", "utf-8-bom": "utf-8-sig"}  # as editors call them


@dataclass
class ReadOptions:
    """How to read files: their encoding, what to do with bytes that are invalid in it ("strict" or "replace"), the
    column of a table that holds the text, the separator between the documents of a text, and the most bytes of text to
    read. None: the user did not say."""

    encoding: str | None = None
    errors: str | None = None
    column: str | None = None
    separator: str | None = None
    max_bytes: int | None = None


@dataclass
class File:
    """A file to read: on the disk, in an archive, or compressed."""

    name: str  # for messages
    place: PurePosixPath  # relative to what the user named, without extensions such as .gz
    open: Callable  # gives a binary file; for kind "rows", what a reader yields
    path: Path | None = None  # on the disk
    packed: bool = False  # whether `open` gives a file that cannot seek
    kind: str = "text"

    def head(self):
        with reading(self.name), self.open() as stream:
            return _read(stream, HEAD)

    def chunks(self):
        """Yield the bytes of the file in chunks."""
        with reading(self.name), self.open() as stream:
            while chunk := stream.read(BLOCK):
                yield chunk


class Unread(UserError):
    """A file that is intact but not read; in a folder or archive it is skipped. `what`: what it is, in a few words."""

    def __init__(self, name, what, message=None):
        super().__init__(message or f"{name} is {what}")
        self.name, self.what = str(name), what


class NotText(Unread):
    """A file in a format that this program does not read."""

    def __init__(self, name, what, advice):
        super().__init__(name, what, f"{name} is {what}, which this program does not read; {advice}")


class NoColumn(Unread):
    """A table does not have the column."""

    def __init__(self, name, names, column):
        known = ", ".join(reprlib.repr(name).strip("'") for name in list(names)[:20]) or "none"
        message = f"{name} has no column {column}; it has {known}; choose one with --column NAME"
        if PurePosixPath(name).suffix.lower() in (".csv", ".tsv", ".json"):
            message += ", or rename it to .txt to read it as plain text"
        super().__init__(name, f"without a column {column}", message)


class NoJson(Unread):
    """A file with a JSON extension is not valid JSON."""

    def __init__(self, name, why):
        super().__init__(name, "not JSON", f"{name} is not valid JSON ({why}); correct it, or rename it to .txt to "
                         "read it as plain text")  # fmt: skip


@contextlib.contextmanager
def reading(name):
    """Context that turns errors while reading and unpacking into one line."""
    try:
        yield
    except UserError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise FileError(f"{name} is damaged or incomplete ({first_line(error)}); download it again") from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None):
            raise FileError(f"{name} cannot be read ({error.strerror or error}); make it readable") from None
        raise FileError(f"{name} is damaged or incomplete ({first_line(error)}); download it again") from None


def _read(stream, size):
    """`size` bytes, or all if there are fewer: one read from a pipe may give less."""
    parts = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def temporary_file(scratch):
    """A temporary file without a name, which disappears when it is closed."""
    try:
        return tempfile.TemporaryFile(dir=scratch, prefix="writing-", buffering=1 << 18)
    except OSError as error:
        raise FileError(f"cannot write a temporary file in {scratch} ({error.strerror or error}); make it writable, "
                        "or name another folder with --to") from None  # fmt: skip


@contextlib.contextmanager
def writing(scratch):
    """Context that turns errors while writing a temporary file into one line."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise FileError(f"cannot write a temporary file in {scratch}: {error.strerror or error}; make room, or name a "
                        "folder on another disk with --to") from None  # fmt: skip


def copied(file, scratch):
    """A temporary copy of a file that can seek."""
    copy = temporary_file(scratch)
    with writing(scratch):
        for chunk in file.chunks():
            copy.write(chunk)
        copy.seek(0)
    return copy


class _Again(io.BufferedReader):
    """An open file, read from its start again. Closing this leaves the file open."""

    def __init__(self, file):
        file.seek(0)
        super().__init__(file)

    def close(self):
        pass


def read_once(file, scratch):
    """A pipe, such as standard input, as a file that can be read again."""
    copy = copied(file, scratch)
    return replace(file, open=lambda: _Again(copy), path=None)


def ending(place):
    return PurePosixPath(place).suffix.lower()


# ----------------------------------------------------------------------------------------------------------
# Formats
# ----------------------------------------------------------------------------------------------------------

PACKINGS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".tbz2": "bzip2", ".xz": "xz", ".txz": "xz",
            ".lzma": "lzma", ".zst": "zstd", ".tzst": "zstd", ".lz4": "lz4"}  # fmt: skip
PACKED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
         ".tab": "csv", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow",
         ".ipc": "arrow", ".orc": "orc"}  # fmt: skip
DECODED = {"text", "jsonl", "json", "csv"}  # the kinds that have an encoding
TABLES = {"jsonl", "json", "csv", "parquet", "arrow", "orc", "rows"}  # the kinds that have columns
UNPACK, CONVERT, EXPORT = "unpack it", "convert it to plain text", "export its texts as .jsonl or .csv"
NOT_READ = {  # first bytes: (what it is, what to do). No text starts with these.
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK), b"Rar!\x1a\x07": ("a RAR archive", UNPACK),
    b"\x1f\x9d": ("packed with compress", UNPACK), b"LZIP\x01": ("packed with lzip", UNPACK),
    b"%PDF-": ("a PDF document", CONVERT), b"{\\rtf": ("a document in Rich Text Format", CONVERT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Office document", CONVERT),
    b"SQLite format 3\0": ("an SQLite database", EXPORT), b"\x93NUMPY": ("a numpy array", EXPORT),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", EXPORT), b"Obj\x01": ("an Avro file", EXPORT),
    **{b"\x80" + bytes([k]): ("a Python pickle", EXPORT) for k in range(2, 6)},
}  # fmt: skip
BINARY = {b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"GIF8": "a picture", b"ID3": "a recording",
          b"OggS": "a recording", b"fLaC": "a recording", b"\x7fELF": "a program", b"MZ": "a program",
          b"GGUF": "a model"}  # fmt: skip


def _packing(head):
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return "bzip2"
    return next((name for magic, name in PACKED.items() if head.startswith(magic)), None)


def _unpacked(stream, packing):
    if packing in ("zstd", "lz4"):
        import pyarrow

        return pyarrow.CompressedInputStream(stream, packing)
    return {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, "lzma": lzma.open}[packing](stream)


class _Unpacked(io.BufferedReader):
    """The uncompressed content of a file. Closing it closes both. Errors name the compression."""

    def __init__(self, file, packing):
        self.below = file.open()
        super().__init__(_RawUnpacked(_unpacked(self.below, packing), packing))

    def close(self):
        super().close()
        self.below.close()


class _RawUnpacked(io.RawIOBase):
    def __init__(self, stream, packing):
        self.stream, self.packing = stream, packing

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            data = self.stream.read(len(buffer))
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if getattr(error, "errno", None):
                raise
            raise EOFError(f"as {self.packing}: {first_line(error)}") from None
        buffer[: len(data)] = data
        return len(data)


def encoding_of(head, options):
    """The encoding of a text that starts with `head`: the one of its byte order mark, or else the one in `options`."""
    marks = (name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark))
    return next(marks, options.encoding or "utf-8")


def is_binary(head, encoding="utf-8"):
    """Whether a file that starts with `head` is binary: in text, control characters are rare, and zero bytes do not
    occur together with invalid characters."""
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    control = len(re.findall("[\0-\x08\x0e-\x1a\x7f-\x84\x86-\x9f]", text))
    return control > 0.05 * len(text) or ("\0" in text and "\ufffd" in text)


def _zip_document(names):
    """(what it is, what to do) if a .zip file is in fact a document, else None."""
    if "[Content_Types].xml" in names:
        return ("an Excel file", "save it as .csv") if "xl/workbook.xml" in names else ("an Office document", CONVERT)
    if "META-INF/container.xml" in names:
        return "an EPUB book", CONVERT
    if names[:1] == ["mimetype"]:
        return "an OpenDocument file", CONVERT
    if any(name.endswith("/data.pkl") for name in names):
        return "a file of torch", EXPORT
    if names and all(name.endswith(".npy") for name in names):
        return "a file of numpy arrays", EXPORT


def _kind(file, head, options):
    """The kind of a file that is neither compressed nor an archive. Raises `NotText`."""
    kind = KINDS.get(ending(file.place), "text")
    if head.startswith((b"PAR1", b"ARROW1", b"FEA1")):
        kind = "parquet" if head.startswith(b"PAR1") else "arrow"
    if not head or kind in ("parquet", "arrow", "orc"):
        return kind
    for magic, (what, advice) in NOT_READ.items():
        if head.startswith(magic):
            raise NotText(file.name, what, advice)
    encoding = encoding_of(head, options)
    if is_binary(head, encoding):
        if head.startswith(b"ORC"):
            return "orc"
        for k, name in ((1, "utf-16-le"), (0, "utf-16-be")):  # every other byte of a letter is zero
            if head[k::2].count(0) > 0.6 * len(head[k::2]) and not is_binary(head, name) and options.encoding is None:
                raise UserError(f"{file.name} looks like {name} text, since most of every second byte is zero; read it "
                                f"with --encoding {name}")  # fmt: skip
        what = next((what for magic, what in BINARY.items() if head.startswith(magic)), "binary data")
        what = "a file of safetensors" if head[8:10] == b'{"' else what
        raise NotText(file.name, what, "give text files")
    if kind == "text" and (options.column or ending(file.place) not in (".txt", ".md")):
        line = head.decode(encoding, "ignore").lstrip("\ufeff \t\r\n").split("\n")[0]
        if options.column and re.match(r"\[\s*(\{|$)", line.strip()):
            return "json"
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and (options.column or "text") in row:
                return "jsonl"
    return kind


def look_into(file, options, scratch, depth=0):
    """Yield what there is to read in a file: the file itself with its kind, or, for an archive, the files in it. Yields
    an `Unread` in place of a file that is not read."""
    if depth > DEEPEST:
        yield NotText(file.name, "an archive nested too deeply", UNPACK)
        return
    head = file.head()
    packing = _packing(head) or ("lzma" if ending(file.place) == ".lzma" and head else None)
    said = PACKINGS.get(ending(file.place))
    if said and not packing and head:
        raise UserError(f"{file.name} is not a {said} file, though its name says so; download it again, or rename it")
    if packing:
        place = file.place
        if said:
            place = place.with_name(place.stem + ".tar" * (ending(place)[1] == "t" and ending(place) != ".tar"))
        inner = replace(file, place=place, open=lambda: _Unpacked(file, packing), packed=True)
        yield from look_into(inner, options, scratch, depth + 1)
    elif head.startswith((b"PK\3\4", b"PK\5\6")):
        yield from _in_zip(file, options, scratch, depth)
    elif head[257:262] == b"ustar" or ending(file.place) == ".tar":
        yield from _in_tar(file, options, scratch, depth)
    else:
        try:
            found = replace(file, kind=_kind(file, head, options))
            if not head and found.kind in DECODED:
                raise Unread(file.name, "empty")
            if found.kind in ("json", "csv"):
                next(read(found, options, scratch), None)  # does it have the column?
            yield found
        except Unread as error:
            yield error


def jumping(file, scratch):
    """The file, opened so that it can seek."""
    return copied(file, scratch) if file.packed else file.open()


def _in_zip(file, options, scratch, depth):
    with reading(file.name):
        archive = zipfile.ZipFile(jumping(file, scratch))
    members = [info for info in archive.infolist() if not info.is_dir()]
    if what := _zip_document([info.filename for info in members]):
        yield NotText(file.name, *what)
        return
    for info in members:
        place = PurePosixPath(info.filename.replace("\\", "/"))
        if info.flag_bits & 1:
            yield NotText(f"{file.name}/{place}", "encrypted", UNPACK)
        elif not is_hidden(place):
            inner = File(f"{file.name}/{place}", file.place / place, lambda info=info: archive.open(info), packed=True)
            yield from look_into(inner, options, scratch, depth + 1)


def _in_tar(file, options, scratch, depth):
    with reading(file.name):
        archive = tarfile.open(fileobj=jumping(file, scratch), mode="r:")
        members = archive.getmembers()
    for info in members:
        place = PurePosixPath(info.name)
        if info.isreg() and not is_hidden(place):
            inner = File(f"{file.name}/{place}", file.place / place, lambda info=info: archive.extractfile(info),
                         packed=True)  # fmt: skip
            yield from look_into(inner, options, scratch, depth + 1)
        elif not info.isdir() and not is_hidden(place):
            yield NotText(f"{file.name}/{place}", "not a file", UNPACK)


def is_hidden(place):
    return any(part.startswith(".") and part.strip(".") or part == "__MACOSX" for part in place.parts)


# ----------------------------------------------------------------------------------------------------------
# Readers
# ----------------------------------------------------------------------------------------------------------


def decoded(file, options):
    """Yield the text of a file in pieces, without a byte order mark. Raises ValueError, with line and byte, if it is
    not valid in its encoding."""
    first, n_bytes, n_lines, decoder = True, 0, 0, None
    for chunk in file.chunks():
        if decoder is None:
            encoding = encoding_of(chunk, options)
            decoder = codecs.getincrementaldecoder(encoding)(options.errors or "strict")
        n_bytes, n_lines = n_bytes + len(chunk), n_lines + chunk.count(b"\n")
        text = _decode(decoder, chunk, file, encoding, n_bytes, n_lines)
        yield text.removeprefix("\ufeff") if first else text
        first = first and not text
    if decoder and (text := _decode(decoder, b"", file, encoding, n_bytes, n_lines)):
        yield text


def _decode(decoder, chunk, file, encoding, n_bytes, n_lines):
    """Decode the next chunk of a text. So far, `n_bytes` bytes with `n_lines` line breaks have been read."""
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        line = n_lines - error.object.count(b"\n", error.start) + 1
        raise UserError(f"{file.name}, line {line}: byte 0x{error.object[error.start]:02X} at offset "
                        f"{n_bytes - len(error.object) + error.start} is not {encoding} text; give its encoding, "
                        "such as --encoding cp1252, or replace such bytes with --errors replace") from None  # fmt: skip
    except UnicodeError as error:  # an encoding whose errors have no position
        raise UserError(f"{file.name} is not {encoding} text ({error}); try --errors replace") from None


def encoded(text, place, options):
    """The text of a row as bytes; b"" if it is missing. Raises ValueError if UTF-8 cannot encode it."""
    try:
        return (text or "").encode("utf-8", options.errors or "strict")
    except UnicodeEncodeError:
        raise UserError(f"{place}: the text holds half of a surrogate pair, which UTF-8 cannot encode; replace it "
                        "with --errors replace") from None  # fmt: skip


def check_row(value, place, column):
    """Raise ValueError if the value in a row is not text. A missing value is allowed."""
    if value is not None and not isinstance(value, str):
        raise Unread(place, f"without text in its column {column}",
                     f"{place}: the column {column} holds {reprlib.repr(value)}, which is not text; choose another "
                     "with --column NAME")  # fmt: skip


def _split(pieces, separator):
    """Yield (text, whether a document ends) from the pieces of a text. A line break in the separator also matches a
    Windows one."""
    pattern = re.compile(re.escape(separator).replace("\\\n", "\r?\n").replace("\\\r\r?\n", "\r\n"))
    waiting, hold = "", len(separator) + separator.count("\n") - 1  # a separator may start in these characters
    for piece in pieces:
        waiting += piece
        place = 0
        for match in pattern.finditer(waiting):
            yield waiting[place : match.start()], True
            place = match.end()
        end = max(place, len(waiting) - hold)
        yield waiting[place:end], False
        waiting = waiting[end:]
    yield waiting, True


def _read_text(file, options, scratch):
    pieces = decoded(file, options)
    split = ((piece, False) for piece in pieces) if options.separator is None else _split(pieces, options.separator)
    for piece, ends in split:
        yield encoded(piece, file.name, options), ends
    if options.separator is None:
        yield b"", True


def _lines(pieces):
    """The lines of a text in pieces, with their line breaks."""
    waiting = []
    for piece in pieces:
        first, *others = piece.split("\n")
        waiting.append(first)
        for line in others:
            yield "".join(waiting) + "\n"
            waiting = [line]
    if line := "".join(waiting):
        yield line


def _row_text(row, place, options):
    """The text of a row of JSON, as bytes."""
    column = options.column or "text"
    if isinstance(row, str) and options.column is None:
        return encoded(row, place, options)
    if not isinstance(row, dict) or column not in row:
        raise NoColumn(place, row if isinstance(row, dict) else (), column)
    check_row(row[column], place, column)
    return encoded(row[column], place, options)


def _read_jsonl(file, options, scratch):
    for number, line in enumerate(_lines(decoded(file, options)), 1):
        if not line.strip():
            continue
        place = f"{file.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{place} is not valid JSON; a .jsonl file needs one object per line; rename any other "
                            "JSON to .json") from None  # fmt: skip
        yield _row_text(row, place, options), True


def _json_values(pieces, name):
    """Yield the items of a JSON list, or JSON values that follow each other, while the pieces of text are read."""
    decoder, waiting, place, in_list, number = json.JSONDecoder(), "", 0, False, 0
    while True:
        place = re.compile(r"[\s,]*").match(waiting, place).end()
        if waiting[place : place + 1] == "[" and number == 0 and not in_list:
            in_list, place = True, place + 1
            continue
        if waiting[place : place + 1] == "]" and in_list:
            in_list, place = False, place + 1
            continue
        why, end = "it ends too early", place
        try:
            if place < len(waiting):
                value, end = decoder.raw_decode(waiting, place)
        except json.JSONDecodeError as error:
            why = str(error)
            if error.pos < len(waiting) - 16 and not error.msg.startswith("Unterminated string"):  # not at its end
                raise NoJson(name, why) from None
        except RecursionError:
            raise NoJson(name, "nested too deeply") from None
        if end == place or end == len(waiting):  # the value may continue in the next piece
            more, size = [], 0
            while size <= len(waiting) - place and (piece := next(pieces, None)) is not None:
                more.append(piece)
                size += len(piece)
            if more:
                waiting, place = waiting[place:] + "".join(more), 0
                continue
            if end == place:
                if place < len(waiting) or in_list:
                    raise NoJson(name, why)
                return
        number += 1
        yield value
        place = end


def _read_json(file, options, scratch):
    column = options.column or "text"
    for number, value in enumerate(_json_values(decoded(file, options), file.name), 1):
        place = f"{file.name}, item {number}" if number > 1 else file.name
        if isinstance(value, dict) and isinstance(value.get(column), (list, dict)):  # columns, not rows
            texts = value[column].values() if isinstance(value[column], dict) else value[column]
            for text in texts:
                check_row(text, place, column)
                yield encoded(text, place, options), True
        else:
            yield _row_text(value, place, options), True


def _read_csv(file, options, scratch):
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    column, lines = options.column or "text", _lines(decoded(file, options))
    header = next(lines, "")
    if not header.strip():
        return
    usual = "," if ending(file.place) == ".csv" else "\t"
    for mark in (usual, ",", "\t", ";", "|", usual):
        names = [name.strip() for name in next(csv.reader([header], delimiter=mark))]
        if column in names:
            break
    else:
        raise NoColumn(file.name, names, column)
    rows, k = csv.reader(lines, delimiter=mark, strict=True), names.index(column)
    try:
        for row in rows:
            if row:
                if len(row) != len(names):
                    raise csv.Error(f"it has {len(row)} columns, but the first line has {len(names)}")
                yield encoded(row[k], f"{file.name}, line {rows.line_num + 1}", options), True
    except csv.Error as error:
        raise UserError(f"{file.name}, line {rows.line_num + 1} does not fit the table ({error}); correct it, or "
                        "rename the file to .txt to read it as plain text") from None  # fmt: skip


def _batches(stream, kind, column, name):
    """Yield the column in batches of rows, as pyarrow arrays."""
    import pyarrow.ipc

    if kind == "parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False)
        if column not in file.schema_arrow.names:
            raise NoColumn(name, file.schema_arrow.names, column)
        for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
            yield batch.column(0)
        return
    if kind == "orc":
        import pyarrow.orc

        file = pyarrow.orc.ORCFile(stream)
        if column not in file.schema.names:
            raise NoColumn(name, file.schema.names, column)
        batches = (file.read_stripe(k, [column]) for k in range(file.nstripes))
    else:
        magic = stream.read(6)
        stream.seek(0)
        if magic == b"ARROW1":
            file = pyarrow.ipc.open_file(stream)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            file = batches = pyarrow.ipc.open_stream(stream)
        if column not in file.schema.names:
            raise NoColumn(name, file.schema.names, column)
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            yield batch.column(batch.schema.names.index(column)).slice(start, ROWS)


def read_table(file, column="text", scratch=None):
    """Stream a column of a .parquet, .arrow or .orc file as lists of strings, with None for a missing one. Raises
    ValueError, in one line, if the file is damaged or has no such column of text."""
    import pyarrow

    try:
        with jumping(file, scratch) as stream:
            for batch in _batches(stream, file.kind, column, file.name):
                rows = batch.to_pylist()
                for row in rows:
                    check_row(row, file.name, column)
                yield rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file.name} is not a complete {file.kind} file ({first_line(error)}); download it "
                        "again") from None  # fmt: skip


def _read_rows(file, options, scratch):
    for rows in read_table(file, options.column or "text", scratch):
        for row in rows:
            yield encoded(row, file.name, options), True


READERS = {"text": _read_text, "jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}


def read(file, options, scratch=None):
    """(bytes of UTF-8, whether a document ends here) of a file. Raises OSError and ValueError in one line."""
    if file.kind == "rows":
        return file.open()
    return READERS.get(file.kind, _read_rows)(file, options, scratch)
