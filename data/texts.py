"""The user's own texts: files become documents, documents become splits.

A document is a row of a table, one of several text files, or the text between two separators in a text file. A single
text file without separators is one text, which is cut into three.

All texts are copied to one temporary file as UTF-8, unchanged except that a byte order mark is removed; line breaks
stay as they are. So memory use does not grow with the text, and a pipe or an archive is read only once.
"""

import codecs
import glob
import hashlib
import itertools
import os
import re
import sys
import urllib.parse
import urllib.request
from array import array
from pathlib import Path, PurePosixPath

import numpy as np

from data.formats import (DECODED, TABLES, File, Unread, ending, is_hidden, look_into, read, read_once,
                          temporary_file, writing)  # fmt: skip
from harness.errors import FileError, MissingFileError, UserError

END = "<|endoftext|>"  # placed before each document
END_BYTES = END.encode()
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test"}  # fmt: skip
HELD_OUT = 0.05  # share of each of the two held-out splits
FEWEST_BYTES = 200  # the least bytes of a held-out split, if the text is long enough
SLACK = 8 << 20  # a cut may move by at most this many bytes, to the end of a paragraph or line
BLOCK = 1 << 20  # a long text is read in pieces of this many bytes
GIVE = "give text files, or folders of them, with --from"
STDIN = ("-", "/dev/stdin")
# The name of a program says what the program does, not which split it is: train.py, test.c
CODE = set(".py .ipynb .js .ts .jsx .tsx .c .h .cc .cpp .hpp .cu .java .kt .scala .go .rs .rb .php .pl .lua .sh .bat "
           ".r .jl .m .swift .cs .hs .ml .sql .css .toml .yaml .yml .ini .cfg .lock".split())  # fmt: skip
DOCUMENTATION = {".md", ".rst", ".html", ".tex"}  # it may have chapters about tests
OURS = "made by prepare.py"
OUR_FILES = re.compile(r"bpe_vocab.*\.json|.*_ids.*\.pt|prepared.*\.txt|prepare\.lock|writing-.*")


# ----------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------


def _readings(name):
    """What the user may mean by a name that the shell did not expand: lists of names, in the order to try them."""
    yield [name]
    bare = name.strip().strip("\"'")
    if bare.lower().startswith("file:"):
        bare = urllib.request.url2pathname(urllib.parse.urlsplit(bare).path)
    for each in (bare, os.path.expanduser(os.path.expandvars(bare))):
        yield [each]
        yield [each.replace("\\", "/")]
        yield sorted(glob.glob(each, recursive=True))
        yield [os.path.expanduser(part.strip()) for part in each.split(",")]


def as_paths(names):
    """The files and folders that `names` mean. Unless a file has exactly this name, ~ and patterns such as *.txt are
    expanded if no shell has done so, and quotes and file:// are removed. Raises FileNotFoundError if nothing matches.
    """
    paths = []
    for name in map(os.fspath, names):
        if name == "":
            raise MissingFileError(f"'' is not a name; {GIVE}")
        if re.match(r"(https?|ftp|s3|gs|hf)://", name):
            raise MissingFileError(f"{name} is an address, but files are read from the disk; download it first")
        found = next((some for some in _readings(name) if some and all(map(_is_there, some))), None)
        if found is None and glob.has_magic(name):
            raise MissingFileError(f"no file matches {name!r}; {GIVE}")
        if found is None:
            raise MissingFileError(f"there is no {name!r}; {GIVE}")
        paths += map(Path, found)
    return paths


def _is_there(name):
    return name in STDIN or name != "" and "\0" not in name and os.path.exists(name)


def separator_of(text):
    r"""The separator that the user means by `text`: a shell does not turn \n into a line break."""
    return re.sub(r"\\([nrtf\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "f": "\f"}.get(match[1], "\\"), text)


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def _walk(folder, left_out):
    """The files of a folder, sorted by name. Links to folders are followed, but not in circles."""
    root = folder.resolve()
    seen = {_identity(each) for each in (root, *root.parents)}

    def fail(error):
        raise FileError(f"{error.filename} cannot be read ({error.strerror}); make it readable")

    for here, names, inside in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(here)
        left_out += [Unread(here / name, "hidden") for name in sorted(names + inside) if is_hidden(Path(name))]
        names[:] = sorted(name for name in names if not is_hidden(Path(name)))
        for name in names[:]:
            inner = (here / name).is_symlink() and (here / name).resolve().is_relative_to(root)  # it is read there
            if inner or (key := _identity(here / name)) in seen and key is not None:
                left_out.append(Unread(here / name, "a link to a folder that is read"))
                names.remove(name)
            else:
                seen.add(key)
        made = "prepare.lock" in inside  # a dataset folder of prepare.py
        for name in sorted(name for name in inside if not is_hidden(Path(name))):
            if made and OUR_FILES.fullmatch(name):
                left_out.append(Unread(here / name, OURS))
            elif not (here / name).is_file():
                left_out.append(Unread(here / name, "not a file"))
            else:
                yield here / name


def _identity(path):
    """What identifies a file, whatever links lead to it."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return (state.st_dev, state.st_ino) if state.st_ino else str(Path(path).resolve())


def find_files(paths, options, say, scratch=None):
    """The `File`s of text in `paths`, which are files, folders and archives; those of a folder are sorted by name.

    A line says what was left out. Raises FileNotFoundError if there is nothing to read, ValueError if a file that the
    user named is not read.
    """
    files, left_out = [], []
    for path in paths:
        if str(path) in STDIN or not (path.is_dir() or path.is_file()):  # a pipe
            name, place = ("standard input", "stdin") if str(path) in STDIN else (str(path), path.name)
            file = File(name, PurePosixPath(place), lambda path=path: _open(path))
            if str(path) not in STDIN and path.is_char_device() and not os.path.samefile(path, os.devnull):
                raise UserError(f"{path} is a device, not a file; {GIVE}")
            named = [read_once(file, scratch)]
        elif path.is_dir():
            named = [_file(each, each.relative_to(path)) for each in _walk(path, left_out)]
        else:
            named = [_file(path, path.name)]
        for file in named:
            for found in look_into(file, options, scratch):
                if not isinstance(found, Unread):
                    files.append(found)
                elif path.is_dir() or found.name != file.name or found.what == "empty":
                    left_out.append(found)
                else:
                    raise found
    left_out.sort(key=lambda each: each.what in ("hidden", OURS))  # last, since they matter least
    if not files:
        why = f": {left_out[0]}" if left_out else ""
        advice = f"; {GIVE}" * (";" not in why)
        raise MissingFileError(f"there is no text in {', '.join(map(str, paths))}{why}{advice}")
    say_left_out(left_out, say)
    return files


def say_left_out(left_out, say):
    """Say which files are not read: a list of `Unread`."""
    if left_out:
        shown = ", ".join(f"{each.name} ({each.what})" for each in left_out[:3])
        say(f"Left out: {shown}{f' and {len(left_out) - 3} more' * (len(left_out) > 3)}")


def _file(path, place):
    return File(str(path), PurePosixPath(Path(place).as_posix()), lambda: open(path, "rb"), path)


def _open(path):
    if str(path) != "-":
        return open(path, "rb")
    if sys.stdin is None or sys.stdin.closed:
        raise FileError("there is no standard input to read; give a file with --from")
    return open(sys.stdin.fileno(), "rb", closefd=False)


def check_options(options, files):
    """Raise ValueError if an option says how to read a kind of file that is not among `files`."""
    kinds = {file.kind for file in files}
    uses = {"separator": {"text"}, "encoding": DECODED, "errors": DECODED, "column": TABLES}
    what = {"separator": "plain text", "encoding": "text files", "errors": "text files",
            "column": "tables (.jsonl, .json, .csv, .tsv, .parquet, .arrow)"}  # fmt: skip
    for option, some in uses.items():
        if getattr(options, option) is not None and not some & kinds:
            others = f" and {len(files) - 1} more" * (len(files) > 1)
            raise UserError(f"--{option} is for {what[option]}, but there is none in {files[0].name}{others}; leave it "
                            "out")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------


class Copy:
    """All documents, one after the other, in a temporary file. `ends`: where each ends; `digests`: a hash of each;
    `empty`: how many had no text; `counted`: how often END occurs."""

    def __init__(self, scratch=None):
        self.file, self.scratch = temporary_file(scratch), scratch
        self.ends, self.digests, self.empty, self.counted = array("q", [0]), array("Q"), 0, 0

    def add(self, pieces):
        """Append the documents of a reader. Returns how many there are, including empty ones."""
        n, size, digest, before = 0, self.ends[-1], hashlib.blake2b(digest_size=8), b""
        with writing(self.scratch):
            for piece, ends in pieces:
                if piece:
                    self.file.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    around = before + piece
                    self.counted += around.count(END_BYTES)
                    before = around[1 - len(END_BYTES) :]
                if not ends:
                    continue
                n += 1
                if size > self.ends[-1]:
                    self.ends.append(size)
                    self.digests.append(int.from_bytes(digest.digest(), "little"))
                    digest, before = hashlib.blake2b(digest_size=8), b""
                else:
                    self.empty += 1
            self.file.flush()
        return n

    def documents(self, first, last):
        """The documents `first` to `last` - 1, once all have been added."""
        if first == last:
            return Documents(self.file, np.empty((0, 2), np.int64))
        ends = np.frombuffer(self.ends, np.int64)[first : last + 1]
        return Documents(self.file, np.lib.stride_tricks.sliding_window_view(ends, 2))  # no copy of the numbers

    def digests_of(self, documents):
        """(digests, sizes in bytes), two arrays, of the `documents` that were not cut."""
        ends, digests = np.frombuffer(self.ends, np.int64), np.frombuffer(self.digests, np.uint64)
        which = np.searchsorted(ends[:-1], documents.spans[:, 0], side="right") - 1
        whole = (ends[which] == documents.spans[:, 0]) & (ends[which + 1] == documents.spans[:, 1])
        return digests[which[whole]], documents.sizes[whole]


class Documents:
    """Documents in a file, as bytes. spans: (n, 2), where each starts and ends."""

    def __init__(self, file, spans):
        self.file, self.spans = file, spans

    def __len__(self):
        return len(self.spans)

    @property
    def sizes(self):
        return self.spans[:, 1] - self.spans[:, 0]

    @property
    def n_bytes(self):
        return int(self.spans[:, 1].sum() - self.spans[:, 0].sum())

    def read(self, start, end):
        self.file.seek(start)
        return self.file.read(end - start)

    def __iter__(self):
        return (self.read(start, end) for start, end in self.pairs())

    def pairs(self):
        """(start, end) of each document."""
        for first in range(0, len(self.spans), 4096):
            yield from self.spans[first : first + 4096].tolist()

    def texts(self):
        """Yield each document as a str, or, if it is long, as an iterator of pieces."""
        for start, end in self.pairs():
            yield self.read(start, end).decode() if end - start <= BLOCK else self._pieces(start, end)

    def pieces(self):
        """Yield the text of all documents in pieces."""
        for start, end in self.pairs():
            yield from self._pieces(start, end)

    def _pieces(self, start, end):
        decoder = codecs.getincrementaldecoder("utf-8")()
        for first in range(start, end, BLOCK):
            yield decoder.decode(self.read(first, min(first + BLOCK, end)))

    def chosen(self, which):
        return Documents(self.file, self.spans[which])


class Budget:
    """How many more bytes of a split to read: a `share` of `max_bytes`, or no limit if that is None."""

    def __init__(self, max_bytes, share):
        self.whole = self.left = float("inf") if max_bytes is None else max(1, round(share * max_bytes))

    def spent_on(self, pieces):
        """Yield what a reader gives, up to the first document that does not fit. If that is the very first, it is cut.
        """
        within = False  # whether a document has started
        for piece, ends in pieces:
            if len(piece) > self.left:
                if within or self.left == self.whole:
                    yield piece[: cut_place(piece, self.left, 0)], True
                self.left = 0
                return
            self.left -= len(piece)
            yield piece, ends
            within = not ends


# ----------------------------------------------------------------------------------------------------------
# Splits
# ----------------------------------------------------------------------------------------------------------

_SPLIT_WORD = re.compile(rf"(?<![^\W_])({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?=\d*(?:[\W_]|$))")


def _split_words(place):
    """[(key, split)] for each part of a path that contains the name of a split, the last part first. The splits of one
    text share a key: ptb.valid.txt and ptb.test.txt share ptb.*, train/x.txt and test/y.txt share */. A part with
    several such names counts as having none."""
    found = []
    for k in reversed(range(len(place.parts))):
        name = place.parts[k].lower()
        if k == len(place.parts) - 1:
            if ending(name) in CODE:
                continue
            if ending(name).removeprefix(".") not in SPLIT_NAMES:
                name = name.removesuffix(ending(name))
        name = re.sub(r"[-_.]\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{8,})?$", "", name)  # a shard
        words = _SPLIT_WORD.findall(name)
        if len(set(words)) == 1 == len(words):
            found.append(((place.parts[:k], _SPLIT_WORD.sub("*", name).rstrip("0123456789")), SPLIT_NAMES[words[0]]))
    return found


def _all_split_words(places):
    """`_split_words` for each of `places`. A folder named test among program files says nothing about splits."""
    words = [_split_words(place) for place in places]
    if any(len(place.parts) > 1 and not some for place, some in zip(places, words)):
        words = [[] if ending(place) in CODE else some for place, some in zip(places, words)]
    return words


def splits_of(places):
    """The split that the name of each of `places` says, or None. A name counts only if a similar one names another
    split: "The Girl on the Train.txt" among other books is not a split."""
    words, together = _all_split_words(places), {}
    for key, split in (pair for some in words for pair in some):
        together.setdefault(key, set()).add(split)
    for (folder, pattern), splits in list(together.items()):  # train.txt and x.test.txt
        if pattern != "*" and (whole := together.get((folder, "*"))):
            if "train" in whole and splits - {"train"} or "train" in splits and whole - {"train"}:
                whole |= splits
                together[folder, pattern] = whole
    sure = {key for key, splits in together.items() if "train" in splits and len(splits) > 1}
    if not sure:
        return [None] * len(places)
    return [next((split for key, split in some if key in sure), some[0][1] if some else None) for some in words]


def _check_held_out(places):
    """Raise FileNotFoundError if there are files named after held-out splits, but no similar one for training."""
    by_key, by_folder = {}, {}
    for place, some in zip(places, _all_split_words(places)):
        by_folder.setdefault(place.parts[:-1], []).append(place)
        for key, split in some if ending(place) not in DOCUMENTATION else ():
            by_key.setdefault(key, {})[place] = split
    for (folder, pattern), named in by_key.items():
        if "train" in named.values() or len(places) == 1:
            continue
        others = [place for place in by_folder.get(folder, ()) if place not in named]
        if len(named) < len(places) and not all(place.parts[:-1] == folder for place in named):
            continue  # folders next to other folders
        whole = re.sub(r"[\W_]*\*[\W_]*", "", pattern)  # x.txt is the training text of x.test.txt
        beside = any(whole in ("", place.stem.lower()) for place in others)
        if len(set(named.values())) > 1 or beside:
            names = " and ".join(sorted(place.name for place in named)[:3])
            raise MissingFileError(f"there is {names}, but no file named train; rename the training text to "
                                   f"train{next(iter(named)).suffix}, or give {names} another name")  # fmt: skip


def assign(sizes, shares):
    """The index of the share to which each document goes: always the share that lacks the most bytes, so that each gets
    documents from all parts of the text. sizes: bytes of each document; shares: fractions that sum to 1."""
    got, total, places = [0] * len(shares), 0, bytearray()
    for size in sizes:
        total += size
        k = max(range(len(shares)), key=lambda k: shares[k] * total - got[k])
        got[k] += size
        places.append(k)
    return places


def cut_place(text, target, slack):
    """Where to cut `text` (bytes) near `target`: within `slack` bytes at the end of a paragraph, or else of a line, or
    else of a word; otherwise before the character at `target`."""
    low = max(0, target - slack)
    window = text[low : target + slack]
    for end in (rb"\n(?:[ \t\r]*\n)+", rb"\n", rb"[ \t]"):
        places = (low + match.end() for match in re.finditer(end, window))
        places = (place for place in places if place < len(text))
        if (place := min(places, key=lambda place: abs(place - target), default=None)) is not None:
            return place
    while target > 0 and text[target] & 0xC0 == 0x80:  # the middle of a character
        target -= 1
    return target


def _cut(documents, target, slack):
    """Split documents into two lists, the first with about `target` bytes; the document at that place is cut in two."""
    ends = np.cumsum(documents.sizes)
    k = int(np.searchsorted(ends, target, side="right"))
    if k == len(ends):
        return documents, documents.chosen(slice(0, 0))
    start, end = documents.spans[k].tolist()
    target = start + target - (int(ends[k]) - (end - start))
    low = max(start, target - slack - 4)
    place = low + cut_place(documents.read(low, min(end, target + slack + 1)), target - low, slack)
    left = np.concatenate([documents.spans[:k], [[start, place]]])[: k + (place > start)]
    right = np.concatenate([[[place, end]], documents.spans[k + 1 :]])
    return Documents(documents.file, left), Documents(documents.file, right)


def split_documents(documents, names):
    """{name: documents} for the splits `names`. Each but the first gets a share HELD_OUT of the bytes, the first gets
    the rest. Many documents stay whole; a few, or a single text, are cut at the end of a paragraph or line."""
    n_bytes = documents.n_bytes
    held_out = max(HELD_OUT, min(0.25, FEWEST_BYTES / max(1, n_bytes)))
    shares = [1 - held_out * (len(names) - 1)] + [held_out] * (len(names) - 1)
    places = np.frombuffer(assign((end - start for start, end in documents.pairs()), shares), np.uint8)
    parts = {name: documents.chosen(places == k) for k, name in enumerate(names)}
    if all(0.8 * share < part.n_bytes / max(1, n_bytes) < 1.2 * share
           for share, part in list(zip(shares, parts.values()))[1:]):  # fmt: skip
        return parts
    parts, rest = {}, documents
    for name, share in list(zip(names, shares))[:-1]:
        parts[name], rest = _cut(rest, round(share * n_bytes), min(n_bytes // 60, SLACK))
    return {**parts, names[-1]: rest}


def _names(files):
    """The names of files for a message: the first four, then how many more."""
    names = list(dict.fromkeys(file.name for file in files))
    return ", ".join(names[:4]) + f" and {len(names) - 4:,} more" * (len(names) > 4)


def _say_splits(splits, sources, say):
    several = any(len(documents) > 1 for documents in splits.values())
    for split, documents in splits.items():
        size = f"{documents.n_bytes:,} bytes"
        size += f" in {len(documents):,} document{'s' * (len(documents) != 1)}" * several
        say(f"{split}: {sources[split]} ({size})")


def _say_copies(copy, splits, say):
    """Say what share of a held-out split is in another split as well."""
    for other, split in itertools.combinations([split for split in SPLITS if split in splits], 2):
        digests, sizes = copy.digests_of(splits[split])
        known, number = np.unique(digests, return_inverse=True)
        seen = np.zeros(len(known) + 1, bool)
        for first in range(0, len(splits[other]), 1 << 17):
            others = copy.digests_of(splits[other].chosen(slice(first, first + (1 << 17))))[0]
            place = np.searchsorted(known, others)
            seen[place[np.append(known, np.uint64(0))[place] == others]] = True
        share = int(sizes[seen[:-1][number]].sum()) / max(1, splits[split].n_bytes)
        if share > 0.01:
            say(f"{share:.0%} of {split} is also in {other}, so its loss says little.")


def read_texts(paths, options, say, scratch=None):
    """Read files and folders: ({"train": documents, "val": documents, "test": documents}, whether these are separate
    documents).

    Files named after splits become those splits, and a missing one is taken from "train". Otherwise the text is split.
    Documents are bytes; a text without separate documents gives each split as a list of one. `say` is called with lines
    about which files became which split, and what was left out. `scratch`: the folder of the temporary copy.
    Raises OSError if a file cannot be read, ValueError if one is not what its name says, both in one line.
    """
    files = find_files(paths, options, say, scratch)
    found = splits_of([file.place for file in files])
    if "train" not in found:
        _check_held_out([file.place for file in files])
    return read_splits(files, found, options, ", ".join(map(str, paths)), say, scratch)


def read_splits(files, found, options, where, say, scratch=None):
    """`read_texts` for a list of `File`s. found: the split that each is named after, or None, as `splits_of` gives it;
    where: the source of the files, for messages."""
    check_options(options, files)
    named = {split: [file for file, name in zip(files, found) if name == split] for split in SPLITS}
    if not named["train"]:
        used = {None: files}
    else:
        used = {split: some for split, some in named.items() if some}
        if others := [file for file, name in zip(files, found) if name is None]:
            say(f"Left out, since the splits are named: {_names(others)}")
    copy, ranges, sections = Copy(scratch), {}, False
    for split, some in used.items():
        first, seen, twice, unread = len(copy.digests), set(), [], []
        budget = Budget(options.max_bytes, HELD_OUT if split in ("val", "test") else 1 - HELD_OUT * (len(used) - 1))
        for file in some:
            key = file.path and (_identity(file.path), file.name.removeprefix(str(file.path)))
            if key in seen:
                twice.append(file)
                continue
            seen |= {key} - {None}
            if budget.left == 0:
                unread.append(file)
                continue
            sections |= _copy_one(copy, file, options, budget, scratch) > 1
        if twice:
            say(f"Read only once, though given twice: {_names(twice)}")
        if unread:
            say(f"Not read, since --max-bytes was already reached: {_names(unread)}")
            used[split] = [file for file in some if all(file is not each for each in unread)]
        ranges[split] = first, len(copy.digests)
    if not copy.digests:
        raise UserError(f"there is no text in {where}: all of it is empty; give another text")
    if copy.empty and any(file.kind in TABLES for file in files):
        say(f"Left out: {copy.empty:,} of {copy.empty + len(copy.digests):,} rows, since they are empty")
    if options.separator is not None and not sections:
        say(f"The separator {options.separator!r} does not occur in the text.")
    if options.separator is None and copy.counted:
        say(f"The text holds {END} {copy.counted:,} times, as plain text; --separator '{END}' splits it there.")
    parts = {split: copy.documents(*places) for split, places in ranges.items()}
    sources = {split: _names(some) for split, some in used.items()}
    if None in used:
        splits = split_documents(parts[None], SPLITS)
        sources = {split: f"a part of {sources[None]}" for split in SPLITS}
    else:
        splits = parts
        if missing := [split for split in SPLITS if split not in splits]:
            splits = splits | split_documents(splits["train"], ["train", *missing])
            sources |= {split: f"a part of {sources['train']}" for split in ("train", *missing)}
        splits = {split: splits[split] for split in SPLITS}
    _say_splits(splits, sources, say)
    _say_copies(copy, splits if None in used else parts, say)
    return splits, any(len(documents) > 1 for documents in splits.values())


def _copy_one(copy, file, options, budget, scratch):
    """Copy the documents of a file to `copy`. Returns how many there are."""

    def state():
        return file.path and (lambda s: (s.st_ino, s.st_size, s.st_mtime_ns))(os.stat(file.path))

    try:
        before = state()
        n = copy.add(budget.spent_on(read(file, options, scratch)))
        after = state()
    except FileNotFoundError as error:
        if isinstance(error, UserError):
            raise
        raise MissingFileError(f"{file.name} was removed while it was being read; try again") from None
    if before != after:
        raise UserError(f"{file.name} changed while it was being read; try again once it is complete")
    return n
