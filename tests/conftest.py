"""Makes the tests import this repository, whatever folder they are started in, and gives them small rungs to test."""

import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores: a thread each, asleep while it waits
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402 - found only now
import harness  # noqa: E402
from common import COMMON, SMALL  # noqa: E402


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data folder of its own: the vocabularies, and the sample with short articles in the held-out splits."""
    from data import prepare

    folder = tmp_path_factory.mktemp("data")
    for name in data.VOCABULARIES:
        shutil.copy(ROOT / "data" / name, folder)
    text = (ROOT / "data" / "input.txt").read_text(encoding="utf-8")
    articles = [article for article in re.split(r"(?m)(?=^ \n = [^=])", text) if article]
    for i in range(5, len(articles), 6):
        articles[i] = articles[i][:2500] + "\n"
    (folder / "input.txt").write_text("".join(articles), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DATA_DIR", folder)
        prepare.prepare(*prepare.open_source(sample=True))
    return folder


DEFAULTS = {}  # rung: its constants as its file sets them


@pytest.fixture
def load(monkeypatch, tmp_path, data_dir):
    """load(name, CONSTANT=value, ...): a rung with small constants, its results in the test's folder; all constants
    are put back after the test. Those of an earlier call are forgotten."""
    monkeypatch.setattr(data, "DATA_DIR", data_dir)

    def load(name, **constants):
        module = importlib.import_module(name)
        defaults = DEFAULTS.setdefault(name, harness.constants(vars(module)))
        values = {**defaults, "OUT_DIR": str(tmp_path / name), **COMMON, **SMALL[name], **constants}
        for constant, value in values.items():
            monkeypatch.setattr(module, constant, value)
        return module

    return load


@pytest.fixture
def start(monkeypatch, capsys):
    """start(module, "NAME=value", ...): (exit code, output, errors) of what `python <rung>.py NAME=value ...` does."""

    def start(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
        capsys.readouterr()
        code = 0
        try:
            harness.start(vars(module))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)

    return start
