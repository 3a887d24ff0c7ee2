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
    """A gap, or an error in an answer, is a line or two and no traceback."""
    report = yield
    if call.excinfo:
        answers = Path(item.path).name.removeprefix("test_")
        places = [place for place in call.excinfo.traceback if Path(place.path).name == answers]
        if places and call.excinfo.errisinstance(NotImplementedError) and str(call.excinfo.value) == "your turn":
            report.unwritten = places[-1].lineno, places[-1].name
            report.longrepr = f"{UNWRITTEN}: {places[-1].name}"
        elif call.excinfo.errisinstance(SyntaxError) and Path(call.excinfo.value.filename or "").name == answers:
            error = call.excinfo.value
            line = (error.text or "").strip()
            report.longrepr = f"{type(error).__name__}: {error.msg}\nin {answers}, line {error.lineno}: {line}"
        elif places:
            line = str(places[-1].statement).strip()
            report.longrepr = f"{call.excinfo.exconly()}\nin {answers}, line {places[-1].lineno + 1}: {line}"
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
