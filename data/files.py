"""Files that are written whole or not at all, and locks that end with their process."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import filelock

ID_LENGTH = 20  # bytes of a process id in a lock file, padded with spaces


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def uninterrupted():
    """Within, Ctrl-C and SIGTERM wait; they take effect at its end."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    came = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not Python's
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _cannot_write(path, error):
    """The error to raise: with the system's words where there are any, as in the cause of an error of torch's."""
    reason, cause = (str(error).splitlines() or [type(error).__name__])[0], error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
            break
        cause = cause.__context__
    return OSError(f"cannot write {path}: {reason}; make room, or write to another folder")


def _sync_folder(folder):
    """Put the names of the files in `folder` on the disk. Windows does so by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems have no such call
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_writes():
    """For files that belong together. Gives a function write_one(path, write), which calls write(file) with a file open
    for binary writing, "writing-NAME" beside `path`. At the end all these files take their places back to back; after
    an exception none does, and none is left. Raises OSError, in one line, if a file cannot be written."""
    waiting = {}  # file -> the path it is for

    def write_one(path, write):
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, and a file must take its place; remove it")
        aside = path.with_name("writing-" + path.name)
        waiting[aside] = path
        try:
            with open(aside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch answers a full disk with a RuntimeError
            raise _cannot_write(path, error) from None

    try:
        yield write_one
        with uninterrupted():
            try:
                for aside, path in waiting.items():
                    aside.replace(path)
                for folder in {path.parent for path in waiting.values()}:
                    _sync_folder(folder)
            except OSError as error:
                raise _cannot_write(path, error) from None
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


# ----------------------------------------------------------------------------------------------------------
# Locks
# ----------------------------------------------------------------------------------------------------------


class Locked(OSError):
    """Another process holds a lock. `holder`: its process id, or None if the lock file does not tell it."""

    def __init__(self, path, holder):
        super().__init__(f"{path} is locked by {f'process {holder}' if holder else 'another process'}")
        self.holder = holder


@contextlib.contextmanager
def file_lock(path):
    """Within, this process alone holds the lock `path`: a file, which stays, with the process id of its holder.

    It does not wait. The system frees the lock when the process and those that it forked end, however they end. Gives
    whether the lock is held: a file system may have no locks, which a line on stderr says. Raises `Locked` if another
    process holds the lock, and OSError if the file cannot be opened for writing.
    """
    path = Path(path)
    try:
        # Neither FileLock nor open(path, "w"): they may cut the file, and with it the id of the holder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OSError(f"cannot open the lock {path} ({error.strerror}); make it writable, or use another "
                      "folder") from None  # fmt: skip
    try:
        try:
            held = filelock.lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            held = None
            with contextlib.suppress(OSError, ValueError):  # nobody may read stderr
                print(f"{path.parent} cannot be locked ({error.strerror or error}): start only one program at a time "
                      "that writes there", file=sys.stderr)  # fmt: skip
        if held is False:
            raise Locked(path, _holder(descriptor))
        if held:
            with contextlib.suppress(OSError):  # on a full disk the lock has no id
                os.write(descriptor, f" {os.getpid():<{ID_LENGTH}}\n".encode())
        yield held is True
    finally:
        os.close(descriptor)


def _holder(descriptor):
    """The process id in a lock file, or None. The first byte is a space: on Windows the lock covers it, and others
    cannot read it."""
    try:
        os.lseek(descriptor, 1, os.SEEK_SET)
        return int(os.read(descriptor, ID_LENGTH))
    except (OSError, ValueError):
        return None
