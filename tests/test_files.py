"""Tests of files that are written whole or not at all, and of locks, with processes that die."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import forks
from harness import files
from harness.errors import FileError
from harness.files import Locked, atomic_write, atomic_writes, file_lock
from harness.signals import ENDING

ROOT = Path(__file__).resolve().parents[1]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail(error):
    """A function that raises `error`, whatever it gets."""

    def raise_error(*_, **__):
        raise error

    return raise_error


class SmallDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, n_bytes):
        self.file, self.left = file, n_bytes

    def write(self, content):
        self.left -= len(content)
        if self.left < 0:
            raise FULL
        return self.file.write(content)

    def flush(self):
        self.file.flush()


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_written_beside_its_place_and_then_takes_it(tmp_path, before):
    path = tmp_path / "model.pt"
    if before:
        path.write_bytes(before)

    def write(file):
        file.write(b"new")
        file.flush()
        assert (tmp_path / "writing-model.pt").read_bytes() == b"new"
        assert not before and not path.exists() or path.read_bytes() == before

    atomic_write(str(path), write)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["model.pt"]


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_the_folder_after(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def note_fsync(descriptor):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", lambda path, target: events.append("replace") or replace(path, target))
    atomic_write(tmp_path / "x", lambda file: file.write(b"12345"))
    assert events == ([5, "replace", "folder"] if os.path.exists("/proc/self/fd") else events)
    assert (tmp_path / "x").read_bytes() == b"12345"


@pytest.mark.parametrize("n_bytes", [0, 1000, 100_000])
def test_a_full_disk_under_torch_leaves_the_old_file(tmp_path, n_bytes):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    with pytest.raises(OSError) as caught:
        atomic_write(path, lambda file: torch.save({"x": torch.zeros(50_000)}, SmallDisk(file, n_bytes)))
    assert str(caught.value) == f"cannot write {path}: {FULL.strerror}; make room, or write to another folder"
    assert path.read_bytes() == b"old" and names(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("error, reason", [
    (FULL, FULL.strerror), (RuntimeError("unexpected pos 64 vs 0\nmore"), "unexpected pos 64 vs 0"),
    (OSError("odd"), "odd"), (RuntimeError(), "RuntimeError"),
])  # fmt: skip
def test_errors_of_writing_are_told_in_one_line(tmp_path, error, reason):
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / "x", fail(error))
    assert str(caught.value) == f"cannot write {tmp_path / 'x'}: {reason}; make room, or write to another folder"
    assert names(tmp_path) == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_the_old_file(tmp_path, monkeypatch, where):
    """Some file systems tell only then that there was no room."""
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os if where == "fsync" else Path, where, fail(FULL))
    with pytest.raises(OSError, match="cannot write .*x: No space left"):
        atomic_write(tmp_path / "x", lambda file: file.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("of the writer's own")], ids=repr)
def test_other_exceptions_pass_and_leave_nothing(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(tmp_path / "x", write)
    assert caught.value is error
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["missing", "no folder", "read-only"])
def test_a_folder_that_takes_no_files(tmp_path, monkeypatch, place):
    folder, reason = tmp_path / "folder", errno.ENOENT
    if place == "no folder":
        folder.write_bytes(b"")
        reason = errno.ENOTDIR
    elif place == "read-only":
        folder.mkdir(mode=0o500)
        reason = errno.EACCES
        if os.access(folder, os.W_OK):  # root writes everywhere
            error = OSError(errno.EROFS, os.strerror(errno.EROFS))
            reason = errno.EROFS
            monkeypatch.setattr(files, "open", fail(error), raising=False)
            monkeypatch.setattr(os, "open", fail(error))
    with pytest.raises(OSError) as caught:
        atomic_write(folder / "x", lambda file: file.write(b"new"))
    assert str(caught.value).startswith(f"cannot write {folder / 'x'}: {os.strerror(reason)}; ")
    with pytest.raises(OSError) as caught, file_lock(folder / "lock"):
        pass
    assert not isinstance(caught.value, Locked)
    assert str(caught.value).startswith(f"cannot open the lock {folder / 'lock'} ({os.strerror(reason)}); ")


def test_a_folder_where_the_file_must_go(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(FileError, match="x is a folder, but a file must be written there; remove"):
        atomic_write(tmp_path / "x", lambda file: file.write(b"new"))
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [None, ValueError("too short"), KeyboardInterrupt()], ids=repr)
def test_files_that_belong_together_take_their_places_together(tmp_path, error):
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")
    try:
        with atomic_writes() as write_one:
            for name in "ab":
                write_one(tmp_path / name, lambda file: file.write(b"new"))
                assert {(tmp_path / name).read_bytes() for name in "ab"} == {b"old"}
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert caught is error
    assert {(tmp_path / name).read_bytes() for name in "ab"} == {b"old" if error else b"new"}
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_between_two_places_waits(tmp_path, monkeypatch, number):
    came, replace = [], Path.replace

    def signalled(path, target):
        signal.raise_signal(number)
        assert not came
        return replace(path, target)

    handler = signal.signal(number, lambda number, frame: came.append(number))
    try:
        monkeypatch.setattr(Path, "replace", signalled)
        with atomic_writes() as write_one:
            for name in "ab":
                write_one(tmp_path / name, lambda file: file.write(b"new"))
        assert came == [number]
    finally:
        signal.signal(number, handler)
    assert names(tmp_path) == ["a", "b"]


def test_a_thread_may_write(tmp_path):
    """Only the main thread may handle signals."""
    thread = threading.Thread(target=atomic_write, args=(tmp_path / "x", lambda file: file.write(b"new")))
    thread.start()
    thread.join()
    assert (tmp_path / "x").read_bytes() == b"new"


# A process that writes a file again and again, each time with other bytes.
WRITING = """
import sys
from harness.files import atomic_write
for k in range(10**9):
    atomic_write(sys.argv[1], lambda file: [file.write(bytes([k % 256]) * 1000) for _ in range(200)])
    if k == 3:
        print("now", flush=True)
"""


@pytest.mark.parametrize("k", range(3))
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path, k):
    child = forks.start(["-c", WRITING, tmp_path / "x"], cwd=ROOT)
    child.wait_for("now")
    os.kill(child.pid, signal.SIGKILL)
    assert child.finish().returncode == -signal.SIGKILL
    content = (tmp_path / "x").read_bytes()
    assert len(content) == 200_000 and len(set(content)) == 1
    assert set(names(tmp_path)) <= {"x", "writing-x"}
    atomic_write(tmp_path / "x", lambda file: file.write(b"new"))
    assert names(tmp_path) == ["x"]


# ----------------------------------------------------------------------------------------------------------
# Locks
# ----------------------------------------------------------------------------------------------------------

HOLDING = """
import sys, time
from harness.files import file_lock
with file_lock(sys.argv[1]) as held:
    print("held" if held else "not held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
ASKING = """
import sys
from harness.files import Locked, file_lock
try:
    with file_lock(sys.argv[1]) as held:
        print("free" if held else "no locks")
except Locked as error:
    print(error.holder, isinstance(error, OSError), error)
"""


def ask(path):
    """What another process says of a lock."""
    done = forks.run(["-c", ASKING, path], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.parametrize("text", [None, "", "12345\n", "x" * 100])
def test_a_lock_is_held_by_one_process_that_others_can_name(tmp_path, text):
    """Whatever an earlier holder left in the file, and as often as others try."""
    path = tmp_path / "lock"
    if text is not None:
        path.write_text(text)
    with file_lock(path) as held:
        assert held
        for _ in range(2):
            assert ask(path) == f"{os.getpid()} True {path} is locked by process {os.getpid()}"
    assert ask(path) == "free"
    with file_lock(path) as held:
        assert held
    assert names(tmp_path) == ["lock"]


def test_a_lock_excludes_the_process_itself_too(tmp_path):
    with file_lock(tmp_path / "lock"):
        with pytest.raises(Locked) as caught, file_lock(tmp_path / "lock"):
            pass
        assert caught.value.holder == os.getpid()
        assert ask(tmp_path / "lock").startswith(str(os.getpid()))  # it is still held


def test_an_exception_frees_a_lock(tmp_path):
    with pytest.raises(KeyError), file_lock(tmp_path / "lock"):
        raise KeyError
    assert ask(tmp_path / "lock") == "free"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(tmp_path, number):
    path = tmp_path / "lock"
    child = forks.start(["-c", HOLDING, path, "60"], cwd=ROOT)
    child.wait_for("held")
    with pytest.raises(Locked) as caught, file_lock(path):
        pass
    assert caught.value.holder == child.pid
    os.kill(child.pid, number)
    assert child.finish().returncode == -number
    with file_lock(path) as held:
        assert held
        assert ask(path).startswith(str(os.getpid()))


def test_of_several_processes_one_holds_a_lock(tmp_path):
    children = [forks.start(["-c", HOLDING, tmp_path / "lock", "0.5"], cwd=ROOT) for _ in range(3)]
    done = [child.finish() for child in children]
    assert sorted(one.stdout for one in done) == ["", "", "held\n"]
    holder = children[[one.stdout for one in done].index("held\n")].pid
    assert sum(f"is locked by process {holder}" in one.stderr for one in done) == 2


def test_a_lock_file_that_names_no_process(tmp_path, monkeypatch):
    """Its disk was full when it was taken."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail(FULL))
        lock = file_lock(tmp_path / "lock")
        assert lock.__enter__()
    assert ask(tmp_path / "lock") == f"None True {tmp_path / 'lock'} is locked by another process"
    lock.__exit__(None, None, None)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_without_locks_it_goes_on_and_says_so_in_a_line(tmp_path, monkeypatch, capfd, number):
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fail(OSError(number, os.strerror(number))))
    with file_lock(tmp_path / "lock") as held:
        assert not held
    assert capfd.readouterr() == ("", f"{tmp_path} cannot be locked ({os.strerror(number)}): run only one program at "
                                      "a time that writes there\n")  # fmt: skip


def test_files_are_written_without_torch():
    """It takes seconds to load, and a tokenizer is saved without it."""
    code = "import sys, harness.files, bpe_tokenizer; print(sorted({'torch', 'tqdm', 'data'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
