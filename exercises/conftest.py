"""How the exercises are checked: where the answers are, and how a gap that is not filled yet is reported."""

import importlib
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

UNWRITTEN = "not yet written"


def pytest_addoption(parser):
    parser.addoption("--solutions", action="store_true", help="check the solutions in place of your answers")


@pytest.fixture
def my(request):
    """Your answers: for test_v2_attention.py the module v2_attention."""
    package = "exercises.solutions" if request.config.getoption("--solutions") else "exercises"
    return importlib.import_module(f"{package}.{request.module.__name__.removeprefix('test_')}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A gap is one line and no traceback."""
    report = yield
    if call.excinfo and call.excinfo.errisinstance(NotImplementedError) and str(call.excinfo.value) == "your turn":
        gap = call.excinfo.traceback[-1]
        line = gap.frame.code.firstlineno + 1
        report.unwritten = line, gap.name
        report.longrepr = f"{UNWRITTEN}: {gap.name}, in line {line} of {gap.path}"
    return report


def pytest_report_teststatus(report):
    """Gaps are counted by themselves, not among the failures; the exit code is still 1."""
    if getattr(report, "unwritten", None):
        return UNWRITTEN, ".", UNWRITTEN.upper()


def pytest_terminal_summary(terminalreporter):
    gaps = defaultdict(list)
    for report in terminalreporter.getreports(UNWRITTEN):
        gaps[Path(report.fspath).name.removeprefix("test_")].append(report.unwritten)
    if gaps:
        terminalreporter.section(UNWRITTEN)
    for file, places in sorted(gaps.items()):
        terminalreporter.line(f"{file}: {', '.join(dict.fromkeys(name for _, name in sorted(places)))}")
