"""Text data sets of the Hugging Face hub, read through the `datasets` package: their splits, columns and texts.

Each row is a document. Data sets that consist of text files are read as text files, since the package would turn each
line into a row. No code of a data set is run.
"""

import contextlib
import difflib
import errno
import io
import re
import sys
from pathlib import Path, PurePosixPath

from harness.cli import first_line
from harness.errors import FileError, MissingFileError, UserError
from data.formats import ROWS, File, Unread, check_row, encoded, look_into
from data.texts import SPLIT_NAMES, say_left_out, splits_of

PAGE = "https://huggingface.co/datasets/"
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
ELSEWHERE = "download its files in another way and give them with --from DIR"


class HubError(FileError, ConnectionError):
    """A data set is unavailable: the hub cannot be reached or refuses it, and it is not in the cache."""


def name_of(text):
    """The name of a data set, given a name or an address of the hub. Raises ValueError."""
    found = re.match(rf"(?:{PAGE}|hf://datasets/)([^/]+/[^/?#@]+)", text)
    name = found[1] if found else text
    if Path(name).is_file():
        raise UserError(f"--dataset {name} is a file, not a data set of the hub; read it with --from {name}")
    if name and Path(name).is_dir():
        if any((Path(name) / state).is_file() for state in ("dataset_dict.json", "state.json")):
            raise UserError(f"--dataset {name} is a folder made by save_to_disk; read it with --from {name}")
    elif not NAME.fullmatch(name):
        raise UserError(f"--dataset {name!r} is not the name of a data set; give OWNER/NAME, such as "
                        "roneneldan/TinyStories")  # fmt: skip
    return name


@contextlib.contextmanager
def asking(name):
    """Context that turns errors of the `datasets` package into one line. That package has no base class for its errors,
    so the context must contain only calls of it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _explained(error, name) from error


def _explained(error, name):
    """The error to show to the user for an error of the `datasets` package."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if isinstance(error, DatasetNotFoundError) and "gated" in text:
        return HubError(f"{name} is gated: its owner asks you to agree to terms; agree at {PAGE}{name}, log in with "
                        "hf auth login, and try again")  # fmt: skip
    if isinstance(error, DatasetNotFoundError):
        return HubError(f"there is no data set {name} on the hub, or it is private; check the name at {PAGE}{name}, or "
                        "log in with hf auth login if you may read it")  # fmt: skip
    if re.search("scripts are no longer supported|trust_remote_code|custom code", text):
        return UserError(f"{name} is a program that makes the data set, but this program does not run code of others; "
                         f"look for a copy with .parquet or .jsonl files, or {ELSEWHERE}")  # fmt: skip
    if isinstance(error, DataFilesNotFoundError) or type(error).__name__ == "EmptyDatasetError":
        return UserError(f"{name} has no text files or tables that the datasets package can read ({text}); {ELSEWHERE}")
    if getattr(error, "errno", None) == errno.ENOSPC or "disk space" in text:
        return FileError(f"{name} does not fit on the disk ({text}); make room, or download less with "
                         "--max-bytes")  # fmt: skip
    return HubError(f"{name} could not be loaded ({first_line(error)}); try again, or {ELSEWHERE}")


def _some(names, near=None, most=8):
    """A list of names for a message: at most `most` of them, those similar to `near` first."""
    names = list(map(str, names))
    if near is not None:
        like = [name for name in names if near.lower() in name.lower()]
        like += difflib.get_close_matches(near, names, most)
        names = list(dict.fromkeys(like + names))
    return ", ".join(names[:most]) + f" and {len(names) - most:,} more" * (len(names) > most)


def _builder(name, config, online):
    """The builder, in the terms of `datasets`: the data set before its download. Raises ValueError, with the names of
    its configs, if the user must choose one."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported here instead
    if not sys.stderr or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 an environment variable could set it
    if Path(name).is_dir():
        path = str(Path(name).resolve())
    elif (path := name) in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:  # it would read local files
        raise UserError(f"--dataset {name} names a file format, not a data set; give OWNER/NAME")
    try:
        return datasets.load_dataset_builder(path, config)
    except ValueError as error:
        try:
            configs = datasets.get_dataset_config_names(path)
        except Exception:  # of many kinds; the first error says more
            configs = []
        if config is None and len(configs) > 1:
            raise UserError(f"{name} has several configs; choose one with --config: {_some(configs)}") from None
        if config is not None and configs and config not in configs:
            raise UserError(f"{name} has no config {config!r}; --config takes {_some(configs, config)}") from None
        if not online:
            raise HubError(f"the hub cannot be reached, and the cache does not say what to use; connect to the network "
                           f"({' '.join(str(error).split())})") from None  # fmt: skip
        raise _explained(error, name) from error
    except OSError as error:
        if online:
            raise
        raise HubError(f"the hub cannot be reached, and {name} is not in the cache of the datasets package; connect to "
                       f"the network (and unset HF_HUB_OFFLINE if it is set), or {ELSEWHERE}") from error


def _chosen(name, splits, wanted):
    """The splits to read from `splits`: [(name, the split that the name says, or None)]."""
    if missing := [split for split in wanted or () if split not in splits]:
        raise UserError(f"{name} has no split {missing[0]!r}; --split takes {_some(splits, missing[0])}")
    names = list(dict.fromkeys(wanted or splits))
    found = splits_of([PurePosixPath(split) for split in names])
    if len(names) > 1 and "train" not in found and not wanted:
        train = [split for split in names if SPLIT_NAMES.get(split.lower()) == "train"]
        if len(train) != 1:
            raise UserError(f"{name} has the splits {_some(names)}, but not exactly one for training; choose one or "
                            "several with --split NAME")  # fmt: skip
        return [(split, "train" if split in train else None) for split in names]
    return list(zip(names, found))


def hub_files(name, config, wanted, options, online, say, scratch=None):
    """(the `File`s of a data set, the split that the name of each says, or None, as in `splits_of`).

    config: which part of the data set; wanted: names of splits to read, None for all. online: whether the hub can be
    reached; if not, the cache is used. With `options.max_bytes`, only what is read is downloaded.
    Raises OSError if the data set is unavailable, ValueError if the user must choose a part of it or it holds no text;
    both in one line.
    """
    with asking(name):
        builder = _builder(name, config, online)
        from datasets.packaged_modules.text.text import Text

        if isinstance(builder, Text):
            files = {str(split): list(map(str, urls)) for split, urls in builder.config.data_files.items()}
        elif not online and builder.info.builder_name == "text":
            raise HubError(f"the hub cannot be reached, and the cache does not keep text files such as those of {name}"
                           f"; connect to the network, or {ELSEWHERE}")  # fmt: skip
        elif options.max_bytes is not None and online:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare(verification_mode="no_checks")
            splits = builder.as_dataset()
    if not isinstance(builder, Text):
        chosen = _chosen(name, list(map(str, splits)), wanted)
        return [_rows_file(name, split, splits[split], options) for split, _ in chosen], [as_ for _, as_ in chosen]
    read, found, left_out = [], [], []
    for split, named_after in _chosen(name, list(files), wanted):
        for url in files[split]:
            for each in look_into(_text_file(name, url), options, scratch):
                if isinstance(each, Unread):
                    left_out.append(each)
                else:
                    read.append(each)
                    found.append(named_after)
    if not read:
        raise MissingFileError(f"there is no text in {name}: {left_out[0] if left_out else 'it has no files'}")
    say_left_out(left_out, say)
    return read, found


# ----------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------


def _columns(dataset, place):
    """{column: whether it holds text} for a split, as the data set declares it, or else by its first row."""
    if dataset.features is not None:
        return {name: "string" in str(getattr(feature, "dtype", "")) for name, feature in dataset.features.items()}
    with asking(place):
        row = next(iter(dataset), None)
    return row and {name: value is None or isinstance(value, str) for name, value in row.items()}


def _rows_file(name, split, dataset, options):
    """A split as a `File` of rows. Raises ValueError if it has no such column of text."""
    place, column = f"the split {split} of {name}", options.column or "text"
    columns = _columns(dataset, place)
    if columns and not columns.get(column):
        texts = [each for each, is_text in columns.items() if is_text]
        others = [each for each, is_text in columns.items() if not is_text]
        what = f"the column {column} of {place} holds no text"
        what = what if column in columns else f"{place} has no column {column}"
        known = f"it has {_some(texts)}" if texts else f"none of its columns ({_some(others)}) holds text"
        if texts and others:
            known += f" (and {_some(others)}, without text)"
        raise UserError(f"{what}; {known}; " + ("choose one with --column NAME" if texts else "use another data set"))

    def documents():
        rows, number = iter(dataset.select_columns([column]).iter(batch_size=ROWS)), 0
        while True:
            with asking(name):
                batch = next(rows, None)
            if batch is None:
                return
            for value in batch[column]:
                number += 1
                check_row(value, f"{place}, row {number}", column)
                yield encoded(value, place, options), True

    return File(place, PurePosixPath(split), documents, kind="rows")


# ----------------------------------------------------------------------------------------------------------
# Text files
# ----------------------------------------------------------------------------------------------------------


def _text_file(name, url):
    """A text file of a data set. `url`: its address on the hub, or a local path."""
    shown = re.sub(r"^hf://datasets/|@[0-9a-f]{40}(?=/)", "", url)
    path = Path(url) if Path(url).is_file() else None
    if path and path.is_relative_to(Path(name).resolve()):
        shown = f"{name}/{path.relative_to(Path(name).resolve()).as_posix()}"
    return File(shown, PurePosixPath(shown), lambda: io.BufferedReader(_Remote(url, shown), 1 << 20), path)


class _Remote(io.RawIOBase):
    """An open file on the hub. Connection errors become one line."""

    def __init__(self, url, name):
        import fsspec  # as `datasets` does

        self.name = name
        with asking(name):
            self.file = fsspec.open(url, "rb").open()

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        with asking(self.name):
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset, whence=io.SEEK_SET):
        return self.file.seek(offset, whence)

    def tell(self):
        return self.file.tell()

    def close(self):
        super().close()
        self.file.close()
