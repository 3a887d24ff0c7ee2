"""Files that are written whole or not at all, and locks that end with their process. Loads no torch."""

import contextlib
import os
from pathlib import Path

import filelock

from harness.cli import first_line, say
from harness.errors import FileError
from harness.signals import uninterrupted


def _cannot_write(path, error):
    """The error to raise, with the system's words; torch answers a full disk with an error of its own."""
    while not getattr(error, "strerror", None) and error.__context__:
        error = error.__context__
    why = getattr(error, "strerror", None) or first_line(error)
    return FileError(f"cannot write {path}: {why}; make room, or write to another folder")


@contextlib.contextmanager
def atomic_writes():
    """For files that belong together. Gives a function write_one(path, write), which calls write(file) with a file open
    for binary writing, "writing-NAME" beside `path`. At the end all of them take their places; after an exception none
    does, and none is left. They are on the disk then. Raises OSError, in one line, if one cannot be written."""
    waiting = {}  # file: the path that it is for

    def write_one(path, write):
        path = Path(path)
        if path.is_dir():
            raise FileError(f"{path} is a folder, and a file must take its place; remove it")
        aside = path.with_name(f"writing-{path.name}")
        waiting[aside] = path
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            raise _cannot_write(path, error) from None

    try:
        yield write_one
        with uninterrupted():
            for aside, path in waiting.items():
                try:
                    aside.replace(path)
                except OSError as error:
                    raise _cannot_write(path, error) from None
            for folder in {path.parent for path in waiting.values()}:
                with contextlib.suppress(OSError):  # Windows opens no folders, some file systems cannot write them
                    descriptor = os.open(folder, os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
    finally:
        with uninterrupted():
            for aside in waiting:
                with contextlib.suppress(OSError):
                    aside.unlink(missing_ok=True)


def atomic_write(path, write):
    """Make the file `path` by write(file), with a file open for binary writing: whole or not at all, and on the disk
    when this returns. Until then it is "writing-NAME" beside `path`. Raises OSError, in one line, if that fails."""
    with atomic_writes() as write_one:
        write_one(path, write)


class Locked(FileError):
    """Another process holds a lock. `holder`: its process id, or None if the lock file does not tell it."""

    def __init__(self, path, holder):
        super().__init__(f"{path} is locked by {f'process {holder}' if holder else 'another process'}")
        self.holder = holder


@contextlib.contextmanager
def file_lock(path):
    """Within, this process alone holds the lock `path`: a file, which stays, with the process id of its holder.

    It does not wait, and ends with the process, however that ends. Gives whether the lock is held: a file system may
    have no locks, which a line says. Raises `Locked` if another process holds it, OSError if it cannot be opened.
    """
    path = Path(path)
    try:
        # Neither FileLock nor open(path, "w"): they may cut the file, and with it the id of the holder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        why = f"cannot open the lock {path} ({error.strerror}); make it writable, or use another folder"
        raise FileError(why) from None
    try:
        try:
            held = filelock.lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            held = None
            say(f"{path.parent} cannot be locked ({error.strerror or error}): start only one program at a time that "
                "writes there", error=True)  # fmt: skip
        with contextlib.suppress(OSError):  # on a full disk the lock has no id
            # The first byte is a space: on Windows the lock covers it, and others cannot read it.
            os.write(descriptor, f" {os.getpid():<20}\n".encode()) if held else os.lseek(descriptor, 1, os.SEEK_SET)
        if held is False:
            holder = os.read(descriptor, 20).strip()
            raise Locked(path, int(holder) if holder.isdigit() else None)
        yield held is True
    finally:
        os.close(descriptor)
