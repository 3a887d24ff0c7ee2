"""What the benchmarks share: where results go, tables, and the words for a machine."""

import platform
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks"


def table(head, rows):
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def machine():
    """Processor, number of cores, and versions."""
    try:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor without a name
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} cores, torch {torch.__version__}, Python {platform.python_version()}"
