"""Text data sets of the Hugging Face hub, through the `datasets` package: which splits and columns they have, and how
their text is read.

A row is a document. Data sets of text files are read as text files are, since the package would make a row of each
line. No code of a data set is run.
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
ELSEWHERE = "fetch its files in another way and give them with --from DIR"


class HubError(FileError, ConnectionError):
    """A data set cannot be had: the hub is out of reach, or does not give it, and it is not in the cache."""


def name_of(text):
    """The name of a data set as a user may write it: an address of the hub is one, too. Raises ValueError."""
    found = re.match(rf"(?:{PAGE}|hf://datasets/)([^/]+/[^/?#@]+)", text)
    name = found[1] if found else text
    if Path(name).is_file():
        raise UserError(f"--dataset {name} is a file, and a data set of the hub is expected; --from {name} reads it")
    if name and Path(name).is_dir():
        if any((Path(name) / state).is_file() for state in ("dataset_dict.json", "state.json")):
            raise UserError(f"--dataset {name} is a folder made by save_to_disk; --from {name} reads it")
    elif not NAME.fullmatch(name):
        raise UserError(f"--dataset {name!r} is no name of a data set; names have the form OWNER/NAME, such as "
                        "roneneldan/TinyStories")  # fmt: skip
    return name


@contextlib.contextmanager
def asking(name):
    """Within, an error of the `datasets` package has one line. It has no common base class for its errors, so this must
    hold calls of that package alone."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _explained(error, name) from error


def _explained(error, name):
    """The error for the user that stands for one of the `datasets` package."""
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
        return UserError(f"{name} is a program that makes the data set, and programs of others are not run here; look "
                         f"for a copy that has its files as parquet or .jsonl, or {ELSEWHERE}")  # fmt: skip
    if isinstance(error, DataFilesNotFoundError) or type(error).__name__ == "EmptyDatasetError":
        return UserError(f"{name} has no files of text or tables that the datasets package reads ({text}); {ELSEWHERE}")
    if getattr(error, "errno", None) == errno.ENOSPC or "disk space" in text:
        return FileError(f"{name} does not fit on the disk ({text}); make room, or give --max-bytes, with which only "
                         "that is fetched")  # fmt: skip
    return HubError(f"{name} could not be loaded ({first_line(error)}); try again, or {ELSEWHERE}")


def _some(names, near=None, most=8):
    """Some of many names for a line, those like `near` first."""
    names = list(map(str, names))
    if near is not None:
        like = [name for name in names if near.lower() in name.lower()]
        like += difflib.get_close_matches(near, names, most)
        names = list(dict.fromkeys(like + names))
    return ", ".join(names[:most]) + f" and {len(names) - most:,} more" * (len(names) > most)


def _builder(name, config, online):
    """What `datasets` calls a builder: the data set, before it is fetched. Raises ValueError, with the names of its
    configs, if one must be chosen."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is said here
    if not sys.stderr or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 an environment variable could set it
    if Path(name).is_dir():
        path = str(Path(name).resolve())
    elif (path := name) in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:  # it would read files here
        raise UserError(f"--dataset {name} is the name of a format, and that of a data set is expected, OWNER/NAME")
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
            raise HubError(f"the hub cannot be reached, and the cache does not tell what to take: "
                           f"{' '.join(str(error).split())}") from None  # fmt: skip
        raise _explained(error, name) from error
    except OSError as error:
        if online:
            raise
        raise HubError(f"the hub cannot be reached, and {name} is not in the cache of the datasets package; connect to "
                       f"the network (and unset HF_HUB_OFFLINE if it is set), or {ELSEWHERE}") from error


def _chosen(name, splits, wanted):
    """The splits to read of `splits`, [(its name, the split that it is named after or None)]."""
    if missing := [split for split in wanted or () if split not in splits]:
        raise UserError(f"{name} has no split {missing[0]!r}; --split takes {_some(splits, missing[0])}")
    names = list(dict.fromkeys(wanted or splits))
    found = splits_of([PurePosixPath(split) for split in names])
    if len(names) > 1 and "train" not in found and not wanted:
        train = [split for split in names if SPLIT_NAMES.get(split.lower()) == "train"]
        if len(train) != 1:
            raise UserError(f"{name} has the splits {_some(names)}, and none is the only one for training; choose with "
                            "--split NAME, or several names")  # fmt: skip
        return [(split, "train" if split in train else None) for split in names]
    return list(zip(names, found))


def hub_files(name, config, wanted, options, online, say, scratch=None):
    """(the `File`s of a data set, the split that each is named after or None, as `splits_of` has it).

    config: which part of the data set; wanted: names of its splits, all if None. online: whether the hub can be asked;
    else the cache is. With `options.max_bytes` no more is fetched than what is read.
    Raises OSError if it cannot be had, ValueError if it is not clear what of it, or holds no text, both in one line.
    """
    with asking(name):
        builder = _builder(name, config, online)
        from datasets.packaged_modules.text.text import Text

        if isinstance(builder, Text):
            files = {str(split): list(map(str, urls)) for split, urls in builder.config.data_files.items()}
        elif not online and builder.info.builder_name == "text":
            raise HubError(f"the hub cannot be reached, and text files such as those of {name} are not kept in the "
                           f"cache; connect to the network, or {ELSEWHERE}")  # fmt: skip
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
    """{column: whether it holds text} of a split: as the data set says, else as its first row shows."""
    if dataset.features is not None:
        return {name: "string" in str(getattr(feature, "dtype", "")) for name, feature in dataset.features.items()}
    with asking(place):
        row = next(iter(dataset), None)
    return row and {name: value is None or isinstance(value, str) for name, value in row.items()}


def _rows_file(name, split, dataset, options):
    """A split as a file of rows. Raises ValueError if it has no such column of text."""
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
        raise UserError(f"{what}; {known}; " + ("--column NAME takes one" if texts else "take another data set"))

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
    """A text file of a data set: its address at the hub, or a path of this machine."""
    shown = re.sub(r"^hf://datasets/|@[0-9a-f]{40}(?=/)", "", url)
    path = Path(url) if Path(url).is_file() else None
    if path and path.is_relative_to(Path(name).resolve()):
        shown = f"{name}/{path.relative_to(Path(name).resolve()).as_posix()}"
    return File(shown, PurePosixPath(shown), lambda: io.BufferedReader(_Remote(url, shown), 1 << 20), path)


class _Remote(io.RawIOBase):
    """An open file of the hub. Errors of the connection have one line."""

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
