"""Files that are written whole or not at all, and locks that end with their process. Does not load torch."""

import contextlib
import os
from pathlib import Path

import filelock

from harness.cli import first_line, say
from harness.errors import FileError
from harness.signals import uninterrupted


def _cannot_write(path, error):
    """The error to raise, with the operating system's reason, which torch hides behind an error of its own."""
    while not getattr(error, "strerror", None) and error.__context__:
        error = error.__context__
    why = getattr(error, "strerror", None) or first_line(error)
    return FileError(f"cannot write {path}: {why}; make room, or write to another folder")


@contextlib.contextmanager
def atomic_writes():
    """Context for writing several files that belong together: all of them or none. It gives a function
    write_one(path, write), which calls write(file) with a file open for binary writing, "writing-NAME" next to `path`.
    At the end all files are on the disk and move to their paths; after an exception all are removed. Raises OSError,
    in one line, if a file cannot be written."""
    waiting = {}  # the file that is written: its final path

    def write_one(path, write):
        path = Path(path)
        if path.is_dir():
            raise FileError(f"{path} is a folder, but a file must be written there; remove or rename it")
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
                with contextlib.suppress(OSError):  # Windows cannot open folders, some file systems cannot sync them
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
    """Write the file `path` whole or not at all: call write(file) with a file open for binary writing, "writing-NAME"
    next to `path`, then move it to `path`. It is on the disk when this returns. Raises OSError, in one line."""
    with atomic_writes() as write_one:
        write_one(path, write)


class Locked(FileError):
    """Another process holds the lock. `holder`: its process id, or None if the lock file does not say."""

    def __init__(self, path, holder):
        super().__init__(f"{path} is locked by {f'process {holder}' if holder else 'another process'}")
        self.holder = holder


@contextlib.contextmanager
def file_lock(path):
    """Context in which only this process holds the lock `path`: a file with the process id of its holder, which is not
    removed afterwards.

    It does not wait for the lock. The lock ends with the process, however that ends. Gives whether the lock is held: on
    a file system without locks it is not, and a line says so. Raises `Locked` if another process holds it, OSError if
    the file cannot be opened.
    """
    path = Path(path)
    try:
        # Not FileLock or open(path, "w"): they may empty the file and lose the holder's process id.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        why = f"cannot open the lock {path} ({error.strerror}); make it writable, or use another folder"
        raise FileError(why) from None
    try:
        try:
            held = filelock.lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            held = None
            say(f"{path.parent} cannot be locked ({error.strerror or error}): run only one program at a time that "
                "writes there", error=True)  # fmt: skip
        with contextlib.suppress(OSError):  # on a full disk the lock file holds no process id
            # The first byte is a space: on Windows the lock covers it, so others cannot read it.
            os.write(descriptor, f" {os.getpid():<20}\n".encode()) if held else os.lseek(descriptor, 1, os.SEEK_SET)
        if held is False:
            holder = os.read(descriptor, 20).strip()
            raise Locked(path, int(holder) if holder.isdigit() else None)
        yield held is True
    finally:
        os.close(descriptor)
