"""One prompt, continued by every rung: results/runs/continued.json.

    python results/continued.py    with the weights of the default runs in runs/, and with results/best

Each text is what the command in the file prints, so `python v0.py` and then `python v0.py PROMPT=" The castle was
built"` shows it again. The weights of runs/ are not committed.
"""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402
from harness.errors import MissingFileError, UserError  # noqa: E402
from results import store  # noqa: E402
from results.plan import V4  # noqa: E402

FILE = ROOT / "results" / "runs" / "continued.json"
PROMPT = " The castle was built"
WORDS, WIDTH = 34, 118  # of a text, and of a line, on a page


def arguments():
    """{folder of a run: what follows `python` to continue PROMPT with it}, in the order of the ladder."""
    runs = {f"runs/{rung}": [f"{rung}.py"] for rung in ("v0", "v1", "v1_1", "v2", "v3", "v3_1")}
    runs |= {f"runs/{V4}/{scheme}": [f"{V4}.py", f"POSITION={scheme}"] for scheme in ("alibi", "rope")}
    runs["results/best"] = [f"{V4}.py", "OUT_DIR=results/best"]
    return {folder: [*words, f"PROMPT={PROMPT}"] for folder, words in runs.items()}


def continue_all():
    """A list of {"run", "command", "val_bpb", "text"}. Raises FileNotFoundError if a run is missing, ValueError if one
    is not a default run or cannot continue the prompt."""
    found = []
    for folder, words in arguments().items():
        path = ROOT / folder / "summary.json"
        if not path.exists():
            raise MissingFileError(f"there is no {folder}; make it with python {words[0]}")
        summary = store.read_json(path)
        kept = ROOT / "results" / folder / "summary.json"
        if folder.startswith("runs/") and store.read_json(kept)["val_bpb"] != summary["val_bpb"]:
            raise UserError(f"{folder} is not the run in results/{folder}; copy the default runs there with python "
                            "results/pages.py --collect")  # fmt: skip
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise UserError(f"{folder} cannot continue the prompt: {done.stderr.strip()}")
        command = " ".join(["python", *words]).replace(f"PROMPT={PROMPT}", f'PROMPT="{PROMPT}"')
        found.append({"run": folder, "command": command, "val_bpb": summary["val_bpb"], "text": done.stdout.strip()})
        harness.say(f"{folder}: {done.stdout.strip()[:70]} ...")
    return found


def shown(text, words=WORDS):
    """The first `words` words of a text, in one line."""
    start = " ".join(re.split(r"\s+", text.strip())[:words])
    return start + (" ..." if len(text.split()) > words else "")


def page():
    """All continuations, each with the name of its model and its bits per byte."""
    lines = []
    for one in store.read_json(FILE):
        name = one["run"].removeprefix("runs/").replace(f"{V4}/", "v4, ")
        head = f"{name:14}{one['val_bpb']:.2f}  "
        lines += textwrap.wrap(head + shown(one["text"]), WIDTH, subsequent_indent=" " * len(head))
    return "```\n" + "\n".join(lines) + "\n```"


if __name__ == "__main__":
    try:
        store.write_text(FILE, json.dumps(continue_all(), indent=1, ensure_ascii=False) + "\n")
    except (UserError, OSError) as error:
        sys.exit(f"continued.py: {error}")
