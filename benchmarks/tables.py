"""Tables, a description of the machine, and the place of benchmark results."""

import json
import platform
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks"


def table(head, rows, left=(0,)):
    """A Markdown table; the columns whose numbers are not in `left` are aligned to the right."""
    ruler = ["---" if i in left else "---:" for i in range(len(head))]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in (head, ruler, *rows))


def keep(name, results, text, indent=1, folder=RESULTS):
    """Write the results of a benchmark as `name`.json, and their tables as `name`.md, which the pages show."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=indent) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def machine(device="cpu"):
    """A description of the machine: processor, threads that torch uses, and versions; for a run on a GPU, its name.
    Cloud machines hide the processor's full name, but its family and model tell generations apart."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"
    try:
        text = Path("/proc/cpuinfo").read_text()
        name, family, model = (re.search(rf"{key}\s*: (.*)", text)[1] for key in ("model name", "cpu family", "model"))
        cpu = f"{name} (family {family}, model {model})"
    except (OSError, TypeError):  # not Linux, or a processor without a name
        cpu = platform.processor() or platform.machine()
    cores = torch.get_num_threads()
    return f"{cpu}, {cores} core{'s' * (cores > 1)}, torch {torch.__version__}, Python {platform.python_version()}"
