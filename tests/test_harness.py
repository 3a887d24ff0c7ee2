"""The frame around a run, in this process: constants, --help, the run's folder, pictures, resuming, PROMPT."""

import ast
import builtins
import contextlib
import csv
import dataclasses
import errno
import functools
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    LATE_RUNGS, MODERN, ROOT, RUNGS, SMALL_VOCABULARY, V4, kept_weights, make_model, same_weights, train, without_clock,
)  # fmt: skip
from matplotlib.figure import Figure

import data
import harness.cli
import harness.distributed
import harness.files
import harness.models
import harness.report
import harness.run
import harness.signals
from bpe_tokenizer import BPETokenizer
from data.texts import END
from harness import samples
from results import course

SHORT = {"MAX_STEPS": 2, "EVAL_INTERVAL": 1}
LONG = "a text with some words that is longer than a window of the model, which has thirty-two tokens, and goes on " * 4


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Pictures take most of the time of a short run: only the tests whose name says so draw them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(harness.report, "draw_curves", lambda path, *_, **__: path.write_text("a picture"))


def short_splits(*arguments):
    tokens = data.load_tokens(*arguments)
    return {k: v if k == "train" else dataclasses.replace(v, ids=v.ids[:600]) for k, v in tokens.items()}


@pytest.fixture
def load(load, monkeypatch):
    """The same, with little to evaluate, which would take most of the time of a short run."""

    def load_with_short_splits(name, **constants):
        module = load(name, **constants)
        monkeypatch.setattr(module, "load_tokens", short_splits)
        return module

    return load_with_short_splits


def assert_refused(ended, *texts):
    """Exit code 1, and one line that has all these texts."""
    code, _, err = ended
    assert code == 1, err
    assert len(err.splitlines()) == 1, err
    assert all(text in err for text in texts), err


def run_folder(module):
    """Where the weights of a run are."""
    return Path(module.OUT_DIR) / (module.POSITION.split(",")[0] if module.__name__ == V4 else "")


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


# ----------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_unknown_names_are_refused_with_the_known_ones(name, load, start):
    module = load(name)
    for argument in ("NOSUCH=1", "batch_sizes=1", "Path=1", "=1", "", "--steps", "BATCH 4", "__name__=x"):
        assert_refused(start(module, argument), "there is no constant", "BATCH_SIZE", "BLOCK_SIZE", "OUT_DIR")


IMPOSSIBLE = {  # values that no constant of the kind can have
    int: ("-1", "8.0", "True", "1.5", "four", "", "None", "[4]", "4 4", "{[]: 1}", "f(1)", "1e400", "9" * 5000, "0x",
          "1,2", "1e-3"),
    float: ("-0.1", "nan", "True", "-1", "inf", "1e999", "1e300", "9" * 400, "a", "", "None", "1,2"),
    bool: ("2", "", "None", "maybe"),
    tuple: ("0", "1,0", "1.5", "1,a", "", "()", "True", "[1, 2]", "-1", "1,True", "9" * 30),
}  # fmt: skip
NO_ZERO = {"BATCH_SIZE", "MICRO_BATCH_SIZE", "CHUNK_SIZE", "BLOCK_SIZE", "CONTEXT_SIZE", "MAX_STEPS", "EVAL_INTERVAL",
           "PATIENCE", "N_LAYER", "N_HEAD", "N_EMBD", "N_HIDDEN", "STRIDE", "SAMPLE_TOKENS", "TOP_P",
           "ROPE_BASE"}  # fmt: skip
TEXTS = {
    "VOCABULARY": ("none.json", "", "..", "input.txt", "a\0b"), "OUT_DIR": ("", " ", "a\0b"),
    "DEVICE": ("toaster", "cuda:99", "meta", "", "cpu:0", "cpu:1", "\udc80"), "DTYPE": ("float16", "", "Float32"),
    "POSITION": ("rotary", "", "alibi,", "alibi,Rope", "alibi rope"), "PROMPT": (),
    "DATA": ("", " ", "a\0b", "none", "v3.py"), "INIT_FROM": ("", " ", "a\0b", "none", "v3.py"),
}  # fmt: skip
LARGE = {"N_LAYER": "2147483647", "SEED": "2147483648", "MAX_STEPS": "2147483648", "BATCH_SIZE": "2147483647",
         "DROPOUT": "1", "MOMENTUM": "1.0", "COOLDOWN": "1.01", "LEARNING_RATE": "1e38", "BLOCK_SIZE": "2147483647",
         "EXTRAPOLATION": "2147483648", "N_HEAD": "3", "N_EMBD": "33", "TOP_K": "2147483648", "TOP_P": "1.1",
         "TEMPERATURE": "1e-5"}  # fmt: skip
POSSIBLE = {("v0", "BATCH_SIZE"), ("v1", "N_EMBD"), ("v1_1", "N_EMBD")}  # where there is enough memory


@pytest.mark.parametrize("name", RUNGS)
def test_impossible_values_of_every_constant_are_refused_in_one_line(name, load, start):
    module, kinds = load(name), set()
    for constant, value in harness.constants(vars(module)).items():
        values = TEXTS[constant] if constant in TEXTS else IMPOSSIBLE[type(value)]
        values = values[:3] if type(value) in kinds else values  # all of them once for each kind
        kinds.add(type(value) if constant not in TEXTS else None)
        values += ("0",) if constant in NO_ZERO else ()
        if constant in LARGE and (name, constant) not in POSSIBLE:
            values += (LARGE[constant],)
        for text in values:
            load(name)  # back to what it was
            assert_refused(start(module, f"{constant}={text}"))
    assert not [path for path in Path(module.OUT_DIR).rglob("*.*")]  # nothing was begun


@pytest.mark.parametrize("value", ["8.0", "'8'", "True", "None", "[8]", "__import__('numpy').int64(8)"])
def test_a_constant_of_another_type_in_the_file_is_refused(value, load, start):
    assert_refused(start(load("v1", BATCH_SIZE=eval(value))), "BATCH_SIZE=", "must be a whole number")
    for constant in ("VOCABULARY", "DEVICE", "OUT_DIR", "POSITION", "DTYPE", "DATA"):
        assert_refused(start(load(V4, **{constant: 5})), f"{constant}=5 must be")
        assert_refused(start(load(V4, **{constant: None})), f"{constant}=None must be")
    assert_refused(start(load("v3", PROMPT=5)), "PROMPT=5 must be a string or None")
    assert_refused(start(load("v3", INIT_FROM=5)), "INIT_FROM=5 must be the name of a folder or None")
    assert_refused(start(load(V4, EXTRAPOLATION=[1, 2])), "EXTRAPOLATION=[1, 2] must be whole numbers")


@pytest.mark.parametrize(("name", "zeros"), [
    ("v1", ("LEARNING_RATE", "SEED")), ("v3", ("DROPOUT", "WEIGHT_DECAY", "WARMUP_STEPS", "GRAD_CLIP")),
    ("v3_1", ("DROPOUT", "COOLDOWN", "MOMENTUM", "WARMUP_STEPS")),
])  # fmt: skip
def test_whole_numbers_may_stand_for_fractions(name, zeros, load, start):
    """In the file and on the command line."""
    in_file = start(load(name, **SHORT, **dict.fromkeys(zeros, 0)))
    assert in_file[0] == 0, in_file
    written = start(load(name, **SHORT), *(f"{constant}=0" for constant in zeros))
    assert written[0] == 0, written
    last = [re.findall("training loss .*", out)[-1] for _, out, _ in (in_file, written)]
    assert last[0] == last[1]


def test_a_name_that_the_rung_does_not_have_is_refused_with_the_nearest(load, monkeypatch, start):
    module = load("v3", **SHORT)
    monkeypatch.setattr(module, "N_LAYERS", 4, raising=False)
    assert_refused(start(module), "there is no constant 'N_LAYERS'", "N_LAYER?")
    with pytest.raises(ValueError, match="did you mean N_LAYER?"):
        module.main()
    assert not Path(module.OUT_DIR).exists()


OWN = '''
"""What a learner may write into a rung."""

MY_RATE = 0.5  # a rate; "#" is allowed
A_B, C_D = 1, 2
ANNOTATED: int = 3
for INDEX in range(3):
    pass
if True:
    CONDITIONAL = "yes"


class X:
    pass


LATER = 5


def main():
    global FROM_MAIN
    FROM_MAIN = 1
    check(globals())
    print(MY_RATE)
'''


def test_constants_of_a_learner_are_constants(tmp_path, start, monkeypatch):
    """Any name that the file sets somewhere is its own; those before the first function can be set."""
    source = f'"""A rung."""\n\nDEVICE = "cpu"\nimport harness\ncheck = harness.check_constants\n{OWN}'
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("own", tmp_path / "own.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code, out, err = start(module, "MY_RATE=0.25")
    assert (code, out) == (0, "0.25\n"), err
    assert harness.constants(vars(module)) == {"DEVICE": "cpu", "MY_RATE": 0.25}
    assert_refused(start(module, "LATER=1"), "there is no constant 'LATER'; the constants are DEVICE, MY_RATE")
    text = harness.cli.usage(tmp_path / "own.py")
    assert text.startswith("A rung.\n") and '  MY_RATE = 0.5                       a rate; "#" is allowed' in text


def test_the_extrapolation_is_set_with_commas(load, start):
    for text, value in (("1,2", (1, 2)), ("4", (4,)), ("(1, 3)", (1, 3)), ("1,", (1,))):
        module = load(V4)
        harness.set_constants(vars(module), [f"EXTRAPOLATION={text}"])
        assert value == module.EXTRAPOLATION
    code, out, _ = start(load(V4, **SHORT), "EXTRAPOLATION=1,3")
    assert code == 0 and re.search(r"^tokens +32 +96$", out, re.M)


def test_texts_are_taken_as_they_stand(load):
    module = load("v3")
    harness.set_constants(vars(module), ["OUT_DIR=a='b'", "PROMPT='12 = 3 * 4' ", "LEARNING_RATE=1", "MAX_STEPS=1_000"])
    assert (module.OUT_DIR, module.PROMPT, module.MAX_STEPS) == ("a='b'", "'12 = 3 * 4' ", 1000)
    assert module.LEARNING_RATE == 1.0 and type(module.LEARNING_RATE) is float


def test_editing_the_file_while_it_trains_changes_nothing(load, monkeypatch, tmp_path):
    """v4 begins its second scheme after hours, with the file as it was read."""
    module = load(V4, **SHORT, POSITION="alibi,rope")
    shutil.copy(module.__file__, tmp_path / f"{V4}.py")
    monkeypatch.setattr(module, "__file__", str(tmp_path / f"{V4}.py"))
    make = module.make_optimizers

    def edit_and_make(model):
        (tmp_path / f"{V4}.py").write_text("NEW = 1\ndef half a line", encoding="utf-8")
        return make(model)

    monkeypatch.setattr(module, "make_optimizers", edit_and_make)
    assert set(module.main()) == {"alibi", "rope"}


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_help_has_the_docstring_and_the_constants_with_their_comments(name, load):
    module = load(name)
    out = harness.cli.usage(module.__file__)
    assert out.startswith(module.__doc__.strip())
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for constant in harness.constants(vars(module)):
        line = next(line for line in out.splitlines() if line.startswith(f"  {constant} = "))
        written, comment = re.search(rf"^{constant} = (.*?)(?:  # (.*))?$", source, re.M).groups(default="")
        if constant == "DEVICE":  # what it is depends on torch
            assert line.replace("'", '"') == f"  DEVICE = {written}"
        else:
            assert line.startswith(f"  {constant} = {ast.literal_eval(written)!r}") and line.endswith(comment)


@pytest.mark.parametrize("name", RUNGS)
def test_help_needs_neither_torch_nor_numpy(name, tmp_path):
    for library in ("torch", "numpy"):
        (tmp_path / f"{library}.py").write_text("raise RuntimeError('this takes long')")
    for argument in ("--help", "-h"):
        done = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), "NOSUCH=1", argument], capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=300)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == harness.cli.usage(ROOT / f"{name}.py") + "\n"


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_ends_with_its_command_line(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert source.endswith('\n\nif __name__ == "__main__":\n    harness.start(globals())\n')


def test_a_rung_can_be_started_in_another_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "v0.py"), "MAX_STEPS=0"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "v0.py: MAX_STEPS=0 must be a whole number from 1 to 2147483647\n"


def test_a_notebook_has_streams_of_another_kind(load, monkeypatch):
    """%run starts a rung there; they cannot be reconfigured."""
    module, out = load("v0", **SHORT), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["v0.py"])
    harness.start(vars(module))
    assert "--- sample ---" in out.getvalue()


def test_the_names_of_the_package_are_those_of_its_files():
    for file, names in harness.NAMES.items():
        for name in names:
            assert getattr(harness, name) is getattr(importlib.import_module(f"harness.{file}"), name)
    with pytest.raises(AttributeError, match="module 'harness' has no attribute 'Walk'"):
        harness.Walk


def test_a_mistake_of_the_program_keeps_its_traceback(load, monkeypatch, start):
    module = load("v0")
    for error in (RuntimeError("a shape is wrong"), TypeError("x"), KeyError("y")):
        monkeypatch.setattr(module, "train", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            start(module)


# ----------------------------------------------------------------------------------------------------------
# The folder of a run
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v1", V4])
def test_a_second_run_moves_the_first_aside_and_leaves_what_is_not_of_it(name, load, start):
    module = load(name, **SHORT)
    folder = run_folder(module)
    (folder / "plots").mkdir(parents=True)
    own = [folder / "mine.png", folder / "notes.txt", folder / "plots" / "loss.png", folder / "my_checkpoint.pt"]
    for path in own:
        path.write_text("mine")
    assert "earlier run" not in start(module)[1]
    files, weights = names(folder), (folder / "model.pt").read_bytes()
    text = start(module, "SEED=1")[1]
    aside = folder.with_name(f"{folder.name}.1")
    assert text.count(f"the earlier run in {folder} is now in {aside}; 1 earlier run takes ") == 1
    assert all(path.read_text() == "mine" for path in own)
    assert names(aside) == files - {"lock", "mine.png", "notes.txt", "my_checkpoint.pt", "plots"}
    assert (aside / "model.pt").read_bytes() == weights
    assert [json.loads((run / "summary.json").read_text())["seed"] for run in (aside, folder)] == [1337, 1]
    assert {line["step"] for line in read_log(folder)} == {1, 2}


def test_v4_moves_the_scheme_aside_that_it_trains_again(load, start):
    module = load(V4, **SHORT, POSITION="alibi,rope")
    out = Path(module.OUT_DIR)
    start(module)
    assert names(out) == {"alibi", "rope", "extrapolation.png"}
    alibi = {path: path.read_bytes() for path in (out / "alibi").iterdir()}
    assert start(module, "POSITION=rope,rope")[1].count("is now in") == 1
    assert names(out) == {"alibi", "rope", "rope.1", "extrapolation.png"}
    assert {path: path.read_bytes() for path in (out / "alibi").iterdir()} == alibi
    assert names(out / "rope.1") == names(out / "alibi") - {"lock"}


def test_a_run_that_is_refused_moves_nothing(load, start):
    module = load("v1", **SHORT)
    start(module)
    before = names(module.OUT_DIR)
    for argument in ("BATCH_SIZE=100000", "BLOCK_SIZE=100000", "VOCABULARY=x", "DEVICE=x", "NOSUCH=1"):
        load("v1", **SHORT)
        assert start(module, argument)[0] == 1
    assert names(module.OUT_DIR) == before
    assert names(Path(module.OUT_DIR).parent) == {"v1"}


def test_folders_of_the_users_own_keep_their_files(load, start, tmp_path):
    """They look like earlier runs by their names alone. They are not counted as runs either."""
    module, drafts = load("v1", **SHORT, OUT_DIR=str(tmp_path / "paper")), {}
    for number in (1, *range(3, 11)):
        drafts[tmp_path / f"paper.{number}" / "draft.txt"] = f"draft {number}" * 100_000
    drafts[tmp_path / "notes.20" / "model.pt"] = "a model of paper"
    for path, text in drafts.items():
        path.parent.mkdir()
        path.write_text(text)
    lines = [start(module)[1] for _ in range(3)]
    assert names(tmp_path) == {"paper", "notes.20", "paper.1", *(f"paper.{number}" for number in range(3, 13))}
    assert {path: path.read_text() for path in drafts} == drafts and all(len(names(p.parent)) == 1 for p in drafts)
    aside = [tmp_path / "paper.11", tmp_path / "paper.12"]
    size = [sum(path.stat().st_size for path in run.iterdir()) / 1e6 for run in aside]
    assert f"is now in {aside[0]}; 1 earlier run takes {size[0]:.0f} MB\n" in lines[1]
    assert f"is now in {aside[1]}; 2 earlier runs take {sum(size):.0f} MB\n" in lines[2]


@pytest.mark.parametrize("out", [".", "sub/..", "a.b", "[1]", "link"])
def test_folders_with_unusual_names(out, load, start, monkeypatch, tmp_path):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    module = load("v1", **SHORT, OUT_DIR=out)
    for k in (1, 2):
        code, text, err = start(module)
        assert code == 0, err
        aside = {".": "here.", "sub/..": "here.", "link": "elsewhere."}.get(out, f"here/{out}.") + str(k)
        assert not (tmp_path / aside).exists()
    start(module)
    assert "model.pt" in names(tmp_path / aside)
    assert (tmp_path / "here" / "link").is_symlink()


def test_a_folder_that_cannot_be_used_is_refused(load, start, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere", tmp_path / ("x" * 300)):
        assert_refused(start(load("v1", OUT_DIR=str(out))), f"OUT_DIR={out} ")
    assert start(load("v1", **SHORT, OUT_DIR=str(tmp_path / "other")))[0] == 0
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(number, load, start, monkeypatch):
    def no_lock(descriptor, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(harness.files.filelock, "lock_descriptor", no_lock)
    module = load("v1", **SHORT)
    code, _, err = start(module)
    assert code == 0, err
    assert err == (f"{module.OUT_DIR} cannot be locked ({os.strerror(number)}): run only one program at a time that "
                   "writes there\n")  # fmt: skip


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    harness.atomic_write(tmp_path / "a.txt", lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"half")
        raise RuntimeError("no space\nmore lines")

    with pytest.raises(OSError, match="cannot write .*a.txt: no space; make room, or write to another folder$"):
        harness.atomic_write(tmp_path / "a.txt", fail)
    with pytest.raises(OSError, match="cannot write .*No such file"):
        harness.atomic_write(tmp_path / "gone" / "a.txt", lambda file: None)
    with pytest.raises(KeyboardInterrupt):
        harness.atomic_write(tmp_path / "a.txt", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(OSError, match="a.txt is a folder|Not a directory|cannot write"):
        harness.atomic_write(tmp_path / "a.txt" / "below.txt", lambda file: None)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "first")]


def write(text):
    return lambda file: file.write(text.encode())


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, OSError])
def test_files_that_belong_together_are_written_together(error, tmp_path):
    """Until the last of them is whole, the old ones are there."""
    for text in ("old", "new"):
        with harness.atomic_writes() as write_one:
            for name in "ab":
                write_one(tmp_path / name, write(text))
                assert {**contents(tmp_path), "a": "old", "b": "old"} == contents(tmp_path) or text == "old"
        assert contents(tmp_path) == {"a": text, "b": text}
    with pytest.raises(error):
        with harness.atomic_writes() as write_one:
            write_one(tmp_path / "a", write("half"))
            raise error
    (tmp_path / "c").mkdir()
    with pytest.raises(OSError, match="c is a folder"):
        with harness.atomic_writes() as write_one:
            for name in "abc":
                write_one(tmp_path / name, write("half"))
    (tmp_path / "c").rmdir()
    assert contents(tmp_path) == {"a": "new", "b": "new"}


@pytest.mark.parametrize("number", harness.signals.ENDING)
def test_a_signal_while_files_take_their_places_waits(number, tmp_path, monkeypatch):
    def stop(number, frame):
        raise KeyboardInterrupt

    replace, before = Path.replace, signal.signal(number, stop)
    monkeypatch.setattr(Path, "replace", lambda path, to: (replace(path, to), signal.raise_signal(number)))
    try:
        with pytest.raises(KeyboardInterrupt):
            with harness.atomic_writes() as write_one:
                for name in "ab":
                    write_one(tmp_path / name, write("new"))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert contents(tmp_path) == {"a": "new", "b": "new"}


# ----------------------------------------------------------------------------------------------------------
# Results, and what is said of them
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_results_are_on_the_disk_before_the_sample_is_printed(name, load, monkeypatch):
    module, seen = load(name, **SHORT), []
    folder = run_folder(module)
    expected = {"summary.json", "sample.txt", "loss.png", "model.pt", "log.jsonl", "checkpoint.pt"}

    class Watch(io.StringIO):
        def write(self, text):
            if "--- sample ---" in text:
                seen.append(names(folder))
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Watch())
    module.main()
    assert seen[0] >= expected


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
def test_an_output_in_another_encoding_costs_no_results(encoding, load, monkeypatch):
    module = load(V4, **SHORT)
    monkeypatch.setattr(module, "generate", lambda *_: "天".encode())  # a token each, in any vocabulary
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", [f"{V4}.py"])
    harness.start(vars(module))
    assert ("天" if encoding == "utf-16" else "\\u5929") in out.buffer.getvalue().decode(encoding)
    assert "summary.json" in names(run_folder(module))


def test_a_line_on_a_stream_as_the_user_made_it(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    harness.say("天 \udc80")
    assert out.buffer.getvalue() == b"\\u5929 \\udc80\n"


METRICS = ("loss", "bpb", "word_ppl", "top_1", "top_5", "calibration_error")


@pytest.mark.parametrize("name", RUNGS)
def test_the_last_lines_are_the_metrics_and_the_place_of_the_results(name, load, start):
    module = load(name, **SHORT)
    code, out, err = start(module)
    assert code == 0, err
    folder = run_folder(module)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    sample = (folder / "sample.txt").read_text(encoding="utf-8")
    lines = out.partition(f"--- sample ---\n{sample}\n--------------\n")[2].splitlines()
    label = f"{name}, alibi" if name == V4 else name
    assert lines[0].startswith(f"{label} on sample: val bpb {summary['val_bpb']:.4f}, word perplexity "
                               f"{summary['val_word_ppl']:,.1f}, {summary['n_params']:,} parameters, ")  # fmt: skip
    expected = [", ".join(f"{k} {summary[f'val_{k}{end}']:.4f}" for k in METRICS if f"val_{k}{end}" in summary)
                for end in ("", "_sliding")]  # fmt: skip
    if name in LATE_RUNGS:
        assert lines[1] == f"validation, windows side by side: {expected[0]}"
        assert lines[2] == f"validation, overlapping windows: {expected[1]}"
        assert expected[0] != expected[1] and all(text.count(",") == len(METRICS) - 1 for text in expected)
        lines[1:3] = []
    assert lines[1].startswith(f"results in {folder}: log.jsonl, loss.png, ")
    assert len(lines) == 2 or name == V4
    train, val, bpb = (read_log(folder)[-1][key] for key in ("train_loss", "val_loss", "val_bpb"))
    assert f"  training loss {train:.4f}  val loss {val:.4f}  val bpb {bpb:.4f}\n" in out
    shown = [line for line in course.screen(folder) if line[:50] not in sample]  # as docs/course.md shows it
    assert len(shown) > 4 and set(shown) <= {*out.splitlines(), "..."}


def test_v4_compares_the_schemes_that_were_trained_with_the_same_constants(load, start):
    """Those of this run and of earlier ones; a dash where the text is shorter than the window."""
    def table(out):
        lines = out.partition("\nvalidation bits per byte by length of the window")[2].splitlines()[1:]
        return {line.split()[0]: line.split()[1:] for line in lines}

    module = load(V4, **SHORT, POSITION="alibi,rope", EXTRAPOLATION=(1, 1_000_000 // 32))
    bpb = {}
    for scheme, summary in module.main().items():
        bpb[scheme] = [f"{summary['extrapolation_bpb'][32]:.4f}", "–"]
        assert summary["extrapolation_bpb"][32] == pytest.approx(summary["val_bpb"], rel=1e-6)
    out = start(module, "POSITION=none")[1]
    found = table(out)
    assert found.pop("none")[1] == "–" and found == {"tokens": ["32", "1000000"], **bpb}
    out = start(module, "POSITION=sinusoidal", "SEED=1")[1]
    assert table(out).keys() == {"tokens", "sinusoidal"}
    for scheme in ("alibi", "rope", "none"):
        assert f"{Path(module.OUT_DIR) / scheme} is of other constants: it is not compared\n" in out


def test_a_validation_loss_that_is_not_finite_ends_the_run(load, start, monkeypatch):
    """The losses of the steps before may all be finite."""
    module = load("v3", **SHORT)
    monkeypatch.setattr(module, "evaluate", lambda *_: {"loss": math.nan, "bpb": math.nan})
    assert_refused(start(module), "v3.py: the validation loss is nan at step 1 (LEARNING_RATE=")


@pytest.fixture
def figures(monkeypatch):
    """{title: the figure that was saved}."""
    found, savefig = {}, Figure.savefig

    def save(figure, file, **options):
        found[figure.axes[0].get_title()] = figure
        savefig(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return found


def points(figure):
    """{label of a curve: its points}."""
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


def test_the_picture_of_the_loss_has_every_evaluation(load, figures, start):
    """A run that starts from trained weights is evaluated before its first step, when there is no training loss yet."""
    module = load("v3", MAX_STEPS=4, EVAL_INTERVAL=2)
    for constants in ([], [f"INIT_FROM={module.OUT_DIR}"]):
        code, _, err = start(module, *constants)
        assert code == 0, err
        log = [{**line, "millions": line["tokens_seen"] / 1e6} for line in read_log(run_folder(module))]
        assert [line["step"] for line in log] == ([0, 2, 4] if constants else [2, 4])
        assert points(figures["v3"]) == {
            "training (mean since the last point)": [[x["millions"], x["train_loss"]] for x in log[-2:]],
            "validation": [[x["millions"], x["val_loss"]] for x in log],
        }
        assert (run_folder(module) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_the_extrapolation_has_every_scheme(load, figures):
    module = load(V4, **SHORT, POSITION="alibi,rope", EXTRAPOLATION=(1, 2, 1_000_000 // 32))
    summaries = module.main()
    curves = points(figures["v4: length extrapolation"])
    marked = curves.pop("training length")
    assert marked[0][0] == marked[1][0] == 32
    assert curves == {scheme: [[n, summary["extrapolation_bpb"][n]] for n in (32, 64)]
                      for scheme, summary in summaries.items()}  # fmt: skip
    assert (Path(module.OUT_DIR) / "extrapolation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["v0", V4])
def test_pictures_that_cannot_be_drawn_cost_a_line(name, load, start, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no font\nmore lines")

    module = load(name, **SHORT)
    monkeypatch.setattr(Figure, "savefig", fail)
    code, out, err = start(module)
    assert (code, err) == (0, "")
    pictures = {"v0": {"loss.png"}, V4: {"loss.png", "extrapolation.png"}}[name]
    assert all(f"{picture} was not drawn: no font\n" in out for picture in pictures)
    assert "summary.json" in names(run_folder(module)) and not [*Path(module.OUT_DIR).rglob("*.png")]


def test_without_matplotlib_a_run_has_all_but_its_pictures(load, start, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    module = load(V4, **SHORT)
    code, out, err = start(module)
    assert (code, err) == (0, "")
    assert "loss.png was not drawn: " in out and "extrapolation.png was not drawn: " in out
    assert names(run_folder(module)) >= {"summary.json", "sample.txt", "model.pt", "log.jsonl"}


@pytest.mark.parametrize("name", ["v0", *LATE_RUNGS])
def test_a_run_without_a_terminal_says_how_far_it_is(name, load, start, monkeypatch):
    """Every 30 seconds, by a clock in which a step takes 8 seconds and an evaluation 6."""
    module, now = load(name, MAX_STEPS=16, EVAL_INTERVAL=4), [0.0]
    step, evaluate = harness.Run.step, module.evaluate

    def after(seconds, function, *arguments, **options):
        now[0] += seconds
        return function(*arguments, **options)

    times = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0])  # it computes all the time
    for file in (harness.clock, harness.report):
        monkeypatch.setattr(file, "time", times)
    monkeypatch.setattr(harness.Run, "step", lambda *arguments: after(8, step, *arguments))
    monkeypatch.setattr(module, "evaluate", functools.partial(after, 6, evaluate))
    code, out, err = start(module)
    assert (code, err) == (0, "")
    progress = [line for line in out.splitlines() if re.match(r"step +\d+ of", line)]
    # Seconds after each step, with a star where 30 have passed: 8 16 24 32* 46 54 62* 70 84 92* 100 108 122* 130 ...
    seen = [int(re.match(r"step +(\d+) of 16  loss \d\.\d{3}  32 tokens/s  about ", line)[1]) for line in progress]
    assert seen == [4, 7, 10, 13]
    rest = [line.partition("about ")[2] for line in progress]
    assert rest[1:] == [f"{8 * (16 - step) + 6 * math.ceil((16 - step) / 4)} s left" for step in seen[1:]]
    estimate = 14 * 8 + 4 * 600 / 32 / 3  # of four evaluations: forward, a third of the work
    assert f"the remaining 14 steps will take about {estimate / 60:.0f} min\n" in out  # said after ten seconds
    summary = json.loads((run_folder(module) / "summary.json").read_text())
    assert summary["train_seconds"] == 16 * 8 and summary["tokens_per_second"] == 32
    assert [line["seconds"] for line in read_log(run_folder(module))] == [32, 64, 96, 128]
    out = start(module, "RESUME=True", "MAX_STEPS=32")[1]  # the steps before are not counted as steps of this run
    progress = [line for line in out.splitlines() if re.match(r"step +\d+ of", line)]
    assert len(progress) == 4 and all("  32 tokens/s  " in line for line in progress)


# ----------------------------------------------------------------------------------------------------------
# Going on
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_resuming_without_a_checkpoint_begins_and_says_so(name, load, start):
    module = load(name, **SHORT)
    code, out, err = start(module, "RESUME=True")
    assert code == 0, err
    assert f"there is no checkpoint in {run_folder(module)} yet: RESUME=True starts a new run\n" in out
    code, out, err = start(module, "RESUME=True")
    assert "yet" not in out and "continuing from step 2\n" in out


@pytest.mark.parametrize("name", RUNGS)
def test_a_finished_run_with_more_steps_goes_on(name, load, start):
    module = load(name, MAX_STEPS=8, EVAL_INTERVAL=4)
    start(module)
    code, out, err = start(module, "RESUME=True", "MAX_STEPS=12")
    assert code == 0, err
    assert "continuing with changed constants: MAX_STEPS was 8 and is 12\n" in out and "continuing from step 8\n" in out
    jump = re.search("^MAX_STEPS determines the schedule: the learning rate jumps from (\\S+) to (\\S+), ", out, re.M)
    assert bool(jump) == (name in LATE_RUNGS)
    if name == "v3":  # warm-up, then a fall to step 12
        assert float(jump[2]) == pytest.approx(module.LEARNING_RATE * module.lr_factor(8), rel=1e-2)
    assert [line["step"] for line in read_log(run_folder(module))] == [4, 8, 12]
    assert_refused(start(module, "RESUME=True", "MAX_STEPS=11"),
                   "has already made 12 steps, more than MAX_STEPS=11; set MAX_STEPS to at least 12")  # fmt: skip
    assert [line["step"] for line in read_log(run_folder(module))] == [4, 8, 12]


@pytest.fixture
def trained(load, start):
    """trained(rung, ...): the rung after two steps, its constants as they were."""

    def trained(name, **constants):
        module = load(name, **{**SHORT, **constants})
        code, _, err = start(module)
        assert code == 0, err
        return module

    return trained


MUST_STAY = {"N_EMBD": 8, "N_LAYER": 1, "N_HEAD": 1, "SEED": 5, "BATCH_SIZE": 4, "BLOCK_SIZE": 16, "N_HIDDEN": 8,
             "CONTEXT_SIZE": 2, "ROPE_BASE": 100.0, "VOCABULARY": "bpe_vocab.json"}  # fmt: skip
MAY_CHANGE = {"LEARNING_RATE": 0.01, "LEARNING_RATE_ADAMW": 0.02, "WARMUP_STEPS": 1, "COOLDOWN": 0.1, "MOMENTUM": 0.5,
              "WEIGHT_DECAY": 0.3, "GRAD_CLIP": 0.5, "DROPOUT": 0.2, "DTYPE": "bfloat16", "MICRO_BATCH_SIZE": 1,
              "CHUNK_SIZE": 30, "MAX_STEPS": 3}  # fmt: skip
IN_SILENCE = {"EVAL_INTERVAL": 2, "PATIENCE": 7, "SAMPLE_TOKENS": 5, "TEMPERATURE": 0.5, "STRIDE": 8, "TOP_K": 3,
              "TOP_P": 0.5, "STOP_AT_END": False, "SAMPLES": 1, "EXTRAPOLATION": (1,), "SHARD": True,
              "INIT_FROM": "a folder that is gone"}  # fmt: skip


@pytest.mark.parametrize("name", RUNGS)
def test_what_a_resumed_run_may_change(name, trained, load, start):
    module = trained(name)
    known = harness.constants(vars(module))
    assert known.keys() - {"POSITION", "COMPILE", "DEVICE", "DATA", "OUT_DIR", "RESUME", "PROMPT"} <= {
        *MUST_STAY, *MAY_CHANGE, *IN_SILENCE}  # fmt: skip
    for constant in MUST_STAY.keys() & known.keys():
        load(name, **SHORT, RESUME=True, **{constant: MUST_STAY[constant]})
        assert_refused(start(module), "set them back", f"{constant} was {known[constant]!r} and is ")
    changed = {k: v for k, v in MAY_CHANGE.items() if k in known}
    silent = {k: v for k, v in IN_SILENCE.items() if k in known}
    load(name, **{**SHORT, **changed, **silent, "RESUME": True})
    code, out, err = start(module)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("continuing with changed constants: "))
    assert {part.split(" was ")[0] for part in line.partition(": ")[2].split("; ")} == changed.keys()
    assert read_log(run_folder(module))[-1]["step"] == 3


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_the_rates_of_a_resumed_run_are_those_of_the_constants(name, trained, load, monkeypatch, start):
    module, rates = trained(name, MAX_STEPS=4, EVAL_INTERVAL=2, WARMUP_STEPS=0), []
    step = harness.Run.step
    monkeypatch.setattr(harness.Run, "step", lambda run, *loss: (rates.append(run.rates()), step(run, *loss)))
    load(name, MAX_STEPS=8, EVAL_INTERVAL=2, WARMUP_STEPS=0, RESUME=True, LEARNING_RATE=0.5)
    assert start(module)[0] == 0
    assert rates[0][0] == pytest.approx(0.5 * module.lr_factor(4))


@pytest.mark.parametrize("name", ["v1", *LATE_RUNGS])
def test_resuming_with_another_text_or_tokenizer_is_refused(name, trained, start):
    module = trained(name)
    path = run_folder(module) / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "dataset": "another", "tokens_sha256": "0123456789abcdef"}, path)
    assert_refused(start(module, "RESUME=True"), "the text was another and is sample")
    torch.save({**saved, "tokens_sha256": "0123456789abcdef"}, path)  # as after a change of its files
    assert_refused(start(module, "RESUME=True"), "the text was sample and is sample, but with other content")
    torch.save({**saved, "dataset": "another"}, path)  # the same tokens, in a folder of another name
    assert start(module, "RESUME=True", "MAX_STEPS=3")[0] == 0
    torch.save({**saved, "fingerprint": "0123456789abcdef"}, path)
    assert_refused(start(module, "RESUME=True"), "the tokenizer was 0123456789abcdef and is ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_that_auto_chose_is_kept(dtype, trained, load, start, monkeypatch):
    """On another machine, or under another load, auto could choose differently."""
    monkeypatch.setattr(harness.distributed, "auto_dtypes", {"cpu": dtype})
    module = trained("v3", DTYPE="auto")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    monkeypatch.setattr(harness.distributed, "auto_dtypes", {"cpu": other})
    code, out, err = start(module, "RESUME=True", "MAX_STEPS=4")
    assert code == 0, err
    assert "rounding" not in out
    assert json.loads((Path(module.OUT_DIR) / "summary.json").read_text())["dtype"] == dtype
    monkeypatch.setattr(harness.distributed, "auto_dtypes", {"cpu": dtype})
    load("v3", **SHORT)
    code, out, err = start(module, "RESUME=True", "MAX_STEPS=6", f"DTYPE={other}")
    assert code == 0, err
    assert re.search(f"^the run began .*, {dtype} and continues .*, {other}: losses may differ by rounding$", out, re.M)


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_a_model_that_is_not_compiled_any_more_is_named(name, trained, load, start, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    module = trained(name, COMPILE=True)
    load(name, **{**SHORT, "COMPILE": True, "MAX_STEPS": 4, "RESUME": True})
    out = start(module)[1]
    assert "rounding" not in out and "compiling the model" in out

    def fail(model):
        raise RuntimeError("no compiler\nmore lines")

    monkeypatch.setattr(torch, "compile", fail)
    load(name, **{**SHORT, "COMPILE": True, "MAX_STEPS": 6, "RESUME": True})
    code, out, err = start(module)
    assert code == 0, err
    assert "training without torch.compile: no compiler\n" in out
    assert re.search("^the run began .*, compiled and continues .*, float32: losses may differ by rounding$", out, re.M)


def test_what_cannot_be_compiled_says_where_it_is(load, start, monkeypatch):
    """torch.compile tells the line of a rung in the words of its error."""
    module = load("v3", **{**SHORT, "COMPILE": True})
    where = f'cannot trace\n\nfrom user code:\n  File "{module.__file__}", line 77, in forward\n    x\n'
    monkeypatch.setattr(torch, "compile", lambda model: (_ for _ in ()).throw(RuntimeError(where)))
    code, out, err = start(module)
    assert code == 0, err
    assert "training without torch.compile: cannot trace in line 77 of v3.py\n" in out


def test_another_number_of_threads_is_named(trained, start):
    module, threads = trained("v3"), torch.get_num_threads()
    other = 1 if threads > 1 else 2  # more threads than cores would wait for each other
    torch.set_num_threads(other)
    try:
        out = start(module, "RESUME=True", "MAX_STEPS=4")[1]
    finally:
        torch.set_num_threads(threads)
    assert re.search(rf"{threads} threads.* continues with .*{other} threads.*: losses may differ by rounding", out)


class Bomb:
    """Unpickled by plain pickle, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def damage(path, kind, bomb):
    content = path.read_bytes()
    if kind == "other":
        torch.save([1, 2], path)
    elif kind == "bomb":
        torch.save({**torch.load(path, weights_only=True), "hyperparameters": Bomb(bomb)}, path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello\n",
                          "changed": content[:-2000] + bytes(2000),
                          "bit": content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1])
                          + content[len(content) // 2 + 1 :]}[kind])  # fmt: skip


WHOLE = "is intact, but this version of the program does not write such files "
NOT_USED = {"folder": "checkpoint.pt is a folder, but a file is expected there; move the folder away",
            "model": f"checkpoint.pt {WHOLE}(it has no 'optimizers'): another program, or another version",
            "bomb": f"checkpoint.pt {WHOLE}(Weights only load failed",
            "other": f"checkpoint.pt {WHOLE}(list indices must be "}


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "other", "model", "bomb", "folder", "changed", "bit"])
@pytest.mark.parametrize("name", ["v0", V4])
def test_damaged_files_are_refused_in_one_line(name, kind, trained, start, tmp_path):
    module = trained(name)
    folder = run_folder(module)
    for path in (folder / "checkpoint.pt", folder / "checkpoint_before.pt", folder / "model.pt"):
        if kind == "model":  # it has no optimizer and no log
            if path.name != "model.pt":
                shutil.copy(folder / "model.pt", path)
        else:
            damage(path, kind, tmp_path / "went off")
    damaged = "checkpoint_before.pt is damaged or incomplete; if it is a copy, copy it again, otherwise train again "
    assert_refused(start(module, "RESUME=True"), NOT_USED.get(kind, damaged))
    if kind != "model":
        module.RESUME = False
        refused = NOT_USED.get(kind, damaged).partition(".pt ")[2][:20]
        assert_refused(start(module, "PROMPT=a"), f"model.pt {refused}")
    assert not (tmp_path / "went off").exists()
    if kind != "folder":
        module.RESUME, module.PROMPT = False, None
        assert start(module)[0] == 0  # train again, as the message says


@pytest.mark.parametrize(("number", "after", "said"), [
    (errno.EACCES, 0, "cannot read {path}: Permission denied; let this user read it"),
    (errno.EIO, 0, "cannot read {path}: Input/output error; try again, or copy the folder"),
    (errno.EIO, 1000, "cannot read {path}: Input/output error; try again, or copy the folder"),
    (errno.ESTALE, 1000, "cannot read {path}: Stale file handle; try again, or copy the folder"),
    (errno.ENOMEM, 0, "out of memory in line "), (errno.ENOMEM, 1000, "out of memory in line "),
])  # fmt: skip
def test_a_checkpoint_that_cannot_be_read_is_kept(number, after, said, load, start, monkeypatch):
    """And no older one takes its place: it may be whole. An error at the opening, or after some bytes."""
    module = load("v3", **SHORT)
    assert start(module)[0] == 0
    path, usual = run_folder(module) / "checkpoint.pt", open

    class Raw(io.FileIO):
        def readinto(self, buffer):
            if self.tell() + len(buffer) > after:
                raise OSError(number, os.strerror(number))
            return super().readinto(buffer)

    def fail(name, *arguments, **options):
        if name not in (path, str(path)):
            return usual(name, *arguments, **options)
        if not after:
            raise OSError(number, os.strerror(number))
        return io.BufferedReader(Raw(name), 100)

    with monkeypatch.context() as patch:
        for module_of_python in (builtins, io):
            patch.setattr(module_of_python, "open", fail)
        assert_refused(start(module, "RESUME=True", "MAX_STEPS=3"), said.format(path=path))
    code, out, _ = start(module, "RESUME=True", "MAX_STEPS=3")
    assert code == 0 and "continuing from step 2\n" in out


def test_a_checkpoint_of_a_newer_torch_says_so(load, start):
    module = load("v3", **SHORT)
    assert start(module)[0] == 0
    path = run_folder(module) / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        content = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for info, text in content.items():
            archive.writestr(info, b"99" if info.filename.endswith("/version") else text)
    ended = start(module, "RESUME=True", "MAX_STEPS=3")
    assert_refused(ended, WHOLE, "Attempted to read a PyTorch file with version 99")


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_a_checkpoint_of_a_changed_model_is_refused(name, trained, start, monkeypatch):
    module = trained(name)

    class Changed(module.LanguageModel):
        def __init__(self, vocab_size):
            super().__init__(vocab_size)
            self.more = torch.nn.Linear(2, 2)

    monkeypatch.setattr(module, "LanguageModel", Changed)
    assert_refused(start(module, "RESUME=True"), "do not fit this model")
    module.RESUME = False
    assert_refused(start(module, "PROMPT=a"), "model.pt do not fit this model")


# ----------------------------------------------------------------------------------------------------------
# PROMPT
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", LONG, " a \U0001f600 smile \U0001f600", "\n", "\0", "<|endoftext|>"])
@pytest.mark.parametrize("name", RUNGS)
def test_a_prompt_is_continued_by_the_model_as_trained(name, prompt, trained, load, start, monkeypatch, tmp_path):
    """Whatever the constants of its shape are now; without the text. An empty one begins as the text does. The mark
    between texts ends it, and is not shown."""
    known = harness.constants(vars(load(name)))
    shape = {"N_LAYER": (1, 2), "N_EMBD": (32, 33), "N_HEAD": (2, 3), "BLOCK_SIZE": (16, 4), "CONTEXT_SIZE": (4, 2)}
    module = trained(name, SAMPLE_TOKENS=40, **{k: v for k, (v, _) in shape.items() if k in known})
    other = {k: v for k, (_, v) in shape.items() if k in known} | {"VOCABULARY": "none.json"}
    load(name, PROMPT=prompt, SAMPLE_TOKENS=40, **other)
    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "gone")
    code, out, err = start(module)
    assert (code, err) == (0, "")
    assert out.startswith(prompt.replace(END, "") or " \n =" * (not prompt))
    assert start(module)[1] == out  # the seed decides
    assert {constant: getattr(module, constant) for constant in other} == other
    model, tokenizer = harness.load(run_folder(module))
    torch.manual_seed(module.SEED)
    ids = tokenizer.encode(prompt or " \n =", tokenizer.special_tokens)
    new_text = tokenizer.decode_bytes(list(module.generate(model, ids, 40)))
    before = tokenizer.decode_bytes(ids).replace(END.encode(), b"")
    assert (before + new_text.partition(END.encode())[0]).decode(errors="replace") + "\n" == out
    everything = start(module, "STOP_AT_END=False")[1]
    assert (before + new_text.replace(END.encode(), b"\n\n")).decode(errors="replace") + "\n" == everything


def test_several_samples_of_a_prompt(trained, start):
    """The first equals a single sample; each has its own seed."""
    module = trained("v2", SAMPLE_TOKENS=12)
    code, out, err = start(module, "PROMPT= The", "SAMPLES=3", "STOP_AT_END=False")
    assert (code, err) == (0, "")
    parts = re.split(r"^--- (\d) of 3 ---\n", out, flags=re.M)
    assert parts[0] == "" and parts[1::2] == ["1", "2", "3"]
    for k, text in enumerate(parts[2::2]):
        assert start(module, "PROMPT= The", f"SEED={1337 + k}", "SAMPLES=1", "STOP_AT_END=False")[1] == text
    assert len(set(parts[2::2])) == 3
    out = start(module, "PROMPT=a", "SAMPLES=2", "TEMPERATURE=0")
    assert "SAMPLES=2: with TEMPERATURE=0 all samples are the same" in out[2]


@pytest.mark.parametrize(("given", "prompt"), [
    (b"The\nend\n", "The\nend"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), ("\ufeffé".encode(), "é"), (b"-", "-"), (b"", ""),
])  # fmt: skip
def test_a_prompt_from_standard_input(given, prompt, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert samples.read_prompt("-") == prompt
    assert samples.read_prompt("- a") == "- a"


def test_standard_input_that_is_no_text(trained, start, monkeypatch):
    module = trained("v2")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert_refused(start(module, "PROMPT=-"), "standard input is not UTF-8 text; convert it first")
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(start(module, "PROMPT=-"), "standard input, but that is closed; pipe a text into it")


def test_a_prompt_on_the_command_line_may_hold_line_ends(load):
    for text, prompt in ((r"a\nb", "a\nb"), (r"\ta", "\ta"), (r"\\nabla", r"\nabla"), (r"\alpha", r"\alpha"),
                         ("a\\", "a\\")):  # fmt: skip
        module = load("v2")
        harness.set_constants(vars(module), [f"PROMPT={text}"])
        assert module.PROMPT == prompt


def test_special_tokens_are_no_text():
    """Of a tokenizer with several, only <|endoftext|> ends a sample."""
    tokenizer = BPETokenizer([], ("<|pad|>", END))
    ids = [257, 97, 256, 98]
    assert samples.text_of(tokenizer, ids, [256, 99, 257, 100]) == "abc"
    assert samples.text_of(tokenizer, ids, [256, 99, 257, 100], stop_at_end=False) == "abc\n\nd"
    assert samples.text_of(BPETokenizer([]), [97], [98]) == "ab"


def test_a_prompt_finds_the_scheme_that_was_trained(trained, load, start, monkeypatch):
    """The first scheme that POSITION names, or else any other."""
    module, read, found = trained(V4, POSITION="rope"), harness.models.read_model, []
    folder = run_folder(module)
    monkeypatch.setattr(samples, "read_model", lambda folder: found.append(folder.name) or read(folder))
    load(V4, PROMPT=" The")
    for position in ("alibi,rope", "alibi"):
        code, out, err = start(module, f"POSITION={position}")
        assert code == 0 and out.startswith(" The"), err
    shutil.copytree(folder, folder.with_name("alibi"))
    assert start(module, "POSITION=rope,alibi")[0] == start(module, "POSITION=none")[0] == 0
    assert found == ["rope", "rope", "rope", "alibi"]


def test_a_prompt_finds_the_run_of_the_repository(trained, start, monkeypatch, tmp_path):
    module = trained("v3")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(harness.models, "__file__", str(tmp_path / "harness" / "models.py"))
    code, out, err = start(module, "PROMPT=a", "OUT_DIR=v3")
    assert code == 0 and out.startswith("a"), err
    assert_refused(start(module, "PROMPT=a", "OUT_DIR=none"), f"no trained model in {tmp_path}/elsewhere/none or "
                   f"{tmp_path}/none", "train one first")  # fmt: skip


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_prompts_that_cannot_be_continued_are_refused(name, trained, load, start):
    module = trained(name)
    assert_refused(start(module, "PROMPT=\udc80"), "surrogate")
    for argument in ("DEVICE=toaster", "TEMPERATURE=-1", "TOP_P=0", "SAMPLE_TOKENS=0", "OUT_DIR=", "OUT_DIR=a\0b",
                     "OUT_DIR=none"):  # fmt: skip
        load(name)
        assert_refused(start(module, "PROMPT=a", argument))
    load(name)
    path = run_folder(module) / "model.pt"
    torch.save({**torch.load(path, weights_only=True), "fingerprint": "0123456789abcdef"}, path)
    assert_refused(start(module, "PROMPT=a"), "vocabulary.json is not the vocabulary")
    (run_folder(module) / "vocabulary.json").unlink()
    assert_refused(start(module, "PROMPT=a"), "vocabulary.json")


@pytest.mark.parametrize("other", ["v0", "v1", "v2"])
def test_the_model_of_another_rung_is_refused(other, trained, load, start):
    out = trained(other).OUT_DIR
    assert_refused(start(load("v3", PROMPT="a", OUT_DIR=out)), out, f"was trained by {other}.py, not by v3.py")


def test_a_prompt_is_printed_as_it_comes_and_in_whole_characters(trained, start, monkeypatch):
    """Piece by piece: the first before the last token is drawn, and never half a character."""
    module = trained("v2")
    written, pieces = [], []
    text = "é天\U0001f600 end"
    ids = list(text.encode())  # a byte each, in any vocabulary

    def generate(model, prompt, n_tokens):
        for id in ids:
            pieces.append(len(written))
            yield id

    class Screen:
        def write(self, piece):
            written.append(piece)

        def flush(self):
            pass

    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(module, "PROMPT", "a")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Screen())
        assert harness.continue_prompt(vars(module), module.OUT_DIR) == "a" + text
    assert "".join(written) == f"a{text}\n" and "\ufffd" not in "".join(written)
    assert pieces[-1] > pieces[0]


# ----------------------------------------------------------------------------------------------------------
# Trained models in Python, and as a beginning
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_a_run_is_loaded_ready_to_evaluate(name, trained, load):
    """Whatever the constants are by then: the metrics of the loaded model are those that the run reported."""
    module = trained(name, BLOCK_SIZE=16, **({"POSITION": "rope"} if name == V4 else {}))
    folder = run_folder(module)
    summary = json.loads((folder / "summary.json").read_text())
    load(name, **{k: v for k, v in {"BLOCK_SIZE": 64, "N_EMBD": 48, "N_LAYER": 1, "N_HEAD": 3, "CONTEXT_SIZE": 2,
                                    "N_HIDDEN": 5, "BATCH_SIZE": 3, "DROPOUT": 0.9, "ROPE_BASE": 3.0}.items()
                  if k in harness.constants(vars(module))})  # fmt: skip
    before = harness.constants(vars(module))
    model, tokenizer = harness.load(folder)
    assert harness.constants(vars(module)) == before and not model.training
    tokens = module.load_tokens(SMALL_VOCABULARY)
    assert tokenizer.fingerprint == tokens["val"].fingerprint
    assert module.evaluate(model, tokens["val"])["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, tokenizer.vocab_size)


def test_several_runs_are_loaded_at_once(trained):
    folders = [run_folder(trained("v3")), run_folder(trained("v2", N_EMBD=16)), run_folder(trained("v3", N_EMBD=16))]
    # the second run of v3 has moved the first aside
    folders[0] = folders[0].with_name("v3.1")
    widths = [harness.load(folder)[0].embedding.embedding_dim for folder in folders]
    assert widths == [32, 16, 16]
    with pytest.raises(FileNotFoundError, match="no trained model in"):
        harness.load("runs/none at all")
    with pytest.raises(FileNotFoundError, match=r"models below it; choose one: \S*/v2, \S*/v3, \S*/v3\.1$"):
        harness.load(folders[0].parent)


def test_a_run_of_a_rung_that_is_gone_is_refused_in_one_line(trained):
    path = run_folder(trained("v0")) / "model.pt"
    torch.save({**torch.load(path, weights_only=True), "rung": "v99"}, path)
    with pytest.raises(ValueError, match="was trained by 'v99', but there is no rung of that name here"):
        harness.load(path.parent)


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_a_run_starts_from_the_weights_of_another(name, trained, load, start):
    """Its first evaluation is the last one of the other run; moved aside or not, it is named by its folder."""
    module = trained(name)
    kept, folder = kept_weights(module, *(["alibi"] if name == V4 else [])), module.OUT_DIR
    best = json.loads((run_folder(module) / "summary.json").read_text())["val_loss"]
    for out in (folder + " tuned", folder):  # next to the other run, or in its place
        still = {"LEARNING_RATE": 0.0} | ({"LEARNING_RATE_ADAMW": 0.0} if name in MODERN else {})
        load(name, **SHORT, **still, INIT_FROM=folder, OUT_DIR=out)
        code, text, err = start(module)
        assert code == 0, err
        assert "starting from the weights in" in text
        assert read_log(run_folder(module))[0]["val_loss"] == pytest.approx(best, rel=1e-6)
        assert same_weights(kept_weights(module, *(["alibi"] if name == V4 else [])), kept)
    module.INIT_FROM, module.MAX_STEPS = "gone", 4
    assert start(module, "RESUME=True")[0] == 0  # the checkpoint has the weights


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_weights_of_another_shape_or_vocabulary_are_refused_in_one_line(name, trained, load, start):
    module = trained(name)
    folder = module.OUT_DIR
    new = {**SHORT, "INIT_FROM": folder, "OUT_DIR": folder + " new"}
    load(name, **new, N_LAYER=3, N_EMBD=48)
    assert_refused(start(module), "a different shape; set N_LAYER=2 N_EMBD=32")
    load(name, **new, VOCABULARY="bpe_vocab.json")
    assert_refused(start(module), "whose vocabulary is not", "--vocabulary", "vocabulary.json")
    load(name, **new, BLOCK_SIZE=64)
    if name == V4:
        assert start(module)[0] == 0
    else:  # the table of positions has a row for each token of a window
        assert_refused(start(module), "set BLOCK_SIZE=32")
    load(name, **{**new, "INIT_FROM": str(run_folder(trained("v2")))})
    assert_refused(start(module), "of v2.py", name)


# ----------------------------------------------------------------------------------------------------------
# steps.csv
# ----------------------------------------------------------------------------------------------------------


def read_steps(folder):
    with open(folder / "steps.csv", newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", RUNGS)
def test_every_step_is_a_row(name, load, start):
    """Its loss is one of those whose mean log.jsonl has; its norm is that of the gradient, before it is clipped."""
    module = load(name, MAX_STEPS=6, EVAL_INTERVAL=3)
    assert start(module)[0] == 0
    rows, log = read_steps(run_folder(module)), read_log(run_folder(module))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens_seen"] for row in rows] == [256 * k for k in range(1, 7)]
    for k, record in enumerate(log):
        mean = np.mean([row["loss"] for row in rows[3 * k : 3 * k + 3]])
        assert mean == pytest.approx(record["train_loss"], rel=1e-5)
    rates = [module.LEARNING_RATE * getattr(module, "lr_factor", lambda step: 1)(k) for k in range(6)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates, rel=1e-5)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    torch.manual_seed(module.SEED)
    tokens = data.load_tokens(module.VOCABULARY)
    model = make_model(module, BPETokenizer.load(data.vocabulary_file(module.VOCABULARY)).vocab_size)
    model(*module.get_batch(tokens["train"].ids, 0)).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_norm_is_that_before_clipping(load, start):
    norms = []
    for clip in (1e-3, 0.0):
        module = load("v3", **SHORT, GRAD_CLIP=clip)
        assert start(module)[0] == 0
        norms.append(read_steps(run_folder(module))[0]["grad_norm"])
    assert norms[0] == norms[1] > 0.1


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resumed_run_goes_on_with_its_rows(damaged, load, start):
    """Rows of steps after the checkpoint are those of a run that was killed: they are made again. The last of them may
    have been cut, here after the first digit of its step."""
    module = load("v1", MAX_STEPS=4, EVAL_INTERVAL=2)
    assert start(module)[0] == 0
    path = run_folder(module) / "steps.csv"
    before = read_steps(path.parent)
    with open(path, "a") as file:
        file.write("5,1280,1.0,1.0,1.0,1,0.1\n1")
    if damaged:
        path.write_bytes(b"\xff\0")
    assert start(module, "RESUME=True", "MAX_STEPS=6")[0] == 0
    rows = read_steps(path.parent)
    assert [row["step"] for row in rows] == ([5, 6] if damaged else [1, 2, 3, 4, 5, 6])
    assert damaged or rows[:4] == before and rows[4]["loss"] != 1.0


# ----------------------------------------------------------------------------------------------------------
# What the frame may not do
# ----------------------------------------------------------------------------------------------------------


def test_no_clipping_without_grad_clip(load, monkeypatch):
    """GRAD_CLIP=0 trains as a limit does that no gradient reaches."""
    losses = {}
    for clip in (0.0, 1e30, 1e-3):
        records, _, _ = train(load("v3", **SHORT, GRAD_CLIP=clip, WARMUP_STEPS=0, LEARNING_RATE=0.1))
        losses[clip] = without_clock(records)[-1]["val_loss"]
    assert losses[0.0] == losses[1e30] != losses[1e-3]


def test_the_process_is_left_as_it_was(load):
    """A notebook or a test continues in the same process, after a run and after a failed one."""

    def state():
        signals = [signal.getsignal(number) for number in harness.signals.ENDING], threading.active_count()
        return signals, torch.are_deterministic_algorithms_enabled(), harness.constants(vars(module))

    for constants, error in ((SHORT, None), ({**SHORT, "LEARNING_RATE": 1e30, "WARMUP_STEPS": 0}, ValueError)):
        module = load("v3", **constants)
        before = state()
        with pytest.raises(error, match="not finite|loss is nan") if error else contextlib.nullcontext():
            module.main()
        assert state() == before
