"""The notebooks: as committed, with what they show; and executed anew in quick form, on the bundled sample."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATHS = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|var|opt|usr|mnt)/[\w.]|[A-Z]:\\\\")


def by_name(path):
    return path.stem


def read(path):
    return nbformat.read(path, as_version=4)


def texts(cell):
    """All that a cell has printed or shown as text."""
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_is_committed_as_it_was_executed(path):
    """From top to bottom, with its pictures, and without an error."""
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert "QUICK = False" in code[0].source
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert path.stat().st_size < 1.5e6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_names_its_text_and_no_place_of_a_machine(path):
    shown = [text for cell in read(path).cells for text in texts(cell)]
    assert any("wikitext-2-v1" in text for text in shown)
    for text in [*shown, *(cell.source for cell in read(path).cells)]:
        assert not MACHINE_PATHS.search(text), text[:200]


def test_every_notebook_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in readme] == []


def test_the_picture_in_the_guide_is_one_of_the_notebooks():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"!\[.*\]\(../(notebooks/.*\.png)\)", guide)
    outputs = [output for path in NOTEBOOKS for cell in read(path).cells for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert (ROOT / name).read_bytes() in map(base64.b64decode, pictures)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What a newcomer has, with the bundled sample as the text."""
    root = tmp_path_factory.mktemp("notebooks") / "clone"
    root.mkdir()
    for path in [path for folder in (".", "bpe", "harness") for path in (ROOT / folder).glob("*.py")]:
        (root / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    (root / "data").mkdir()
    for pattern in ("*.py", "input.txt", "bpe_vocab.json", "bpe_vocab_500.json"):
        for path in (ROOT / "data").glob(pattern):
            shutil.copy(path, root / "data")
    for folder in ("notebooks", "results", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "data/prepare.py", "--sample"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_runs_on_the_sample(path, copy):
    """In a kernel of its own, in quick form; its asserts hold there as well."""
    notebook = json.loads((copy / "notebooks" / path.name).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).replace("QUICK = False", "QUICK = True")
    quick = copy / "notebooks" / f"quick-{path.name}"
    quick.write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", str(quick)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=copy / "notebooks", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads(done.stdout)["cells"]
    assert sum(bool(cell.get("outputs")) for cell in cells) > 3
