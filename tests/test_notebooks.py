"""The notebooks: as committed, with their outputs; and executed again in a quick form, on the bundled sample."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import forks

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


def code_of(cell):
    """The syntax tree of a cell, without the commands of the notebook."""
    return ast.parse(re.sub(r"^%", "#", cell.source, flags=re.MULTILINE))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_checks_stand_in_hidden_cells_of_their_own(path):
    """So a cell that teaches shows what it found, and a reader is not kept by what guards the notebook."""
    hidden = []
    for cell in read(path).cells:
        if cell.cell_type == "code":
            checks = any(isinstance(node, ast.Assert) for node in ast.walk(code_of(cell)))
            is_hidden = "remove-cell" in cell.metadata.get("tags", ())
            assert checks == is_hidden == cell.metadata.get("jupyter", {}).get("source_hidden", False), cell.source
            hidden += [cell] * is_hidden
    assert len(hidden) <= 6 and not any(cell.outputs for cell in hidden)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_pictures_have_the_style_of_the_repository(path):
    """harness/pictures.py says how they look: no settings, maps or cycles of colors of a notebook's own."""
    styles = []
    for cell in read(path).cells:
        for node in ast.walk(code_of(cell)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.Attribute) and node.attr == "rcParams":
                styles.append(cell)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("imshow", "pcolormesh", "matshow"):
                (map_,) = (ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "cmap")
                assert map_ in ("pictures.heat()", "pictures.change()")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"C\d.*|tab:.*|viridis|PuOr.*|RdBu.*|Greys", node.value), cell.source
    assert len(styles) == 1 and "plt.rcParams.update(pictures.STYLE)" in styles[0].source


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
    done = forks.run(["data/prepare.py", "--sample"], cwd=root, libraries=LIBRARIES)
    assert done.returncode == 0, done.stderr
    return root


# Runs the cells of a notebook from top to bottom, as a kernel does; prints in how many of them something is shown.
CELLS = """
import json, sys
import matplotlib
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
matplotlib.use("module://matplotlib_inline.backend_inline")
InteractiveShell.enable_gui = lambda self, gui=None: None  # there are no windows
shell, shown = InteractiveShell.instance(), 0
for k, source in enumerate(json.load(open(sys.argv[1], encoding="utf-8")), 1):
    with capture_output() as output:
        result = shell.run_cell(source, store_history=True)
    if not result.success:
        sys.exit(f"cell {k} failed:\\n{source}\\n{output.stdout}{output.stderr}")
    shown += bool(output.stdout or output.outputs)
print(shown)
"""
LIBRARIES = ("torch", "torch._dynamo", "matplotlib.pyplot", "matplotlib_inline.backend_inline", "pandas", "tqdm",
             "sklearn.decomposition", "sklearn.manifold", "adjustText", "IPython.core.interactiveshell")  # fmt: skip
WITH_KERNEL = "04_training"  # one is run by nbconvert, as readers run it
CHECKS = {  # a last cell, which computes by other means what a notebook shows
    "00_loss_and_training": """
from collections import Counter
ids = train.ids.tolist()
pairs, firsts = Counter(zip(ids, ids[1:])), Counter(ids[:-1])
entropy = -sum(k * math.log(k / firsts[i]) for (i, _), k in pairs.items()) / (len(ids) - 1)
assert abs(entropy - optimum) < 1e-6 and abs(by_table.loc["counts", "training text"] - entropy) < 1e-6
assert all(differs < 1e-4 * largest for differs, largest in same.values())
assert math.isclose(by_hand["bpb"] * val.n_bytes * math.log(2), by_hand["loss"] * (len(val) - 1), rel_tol=1e-9)
""",
    "06_inside_v4": """
import numpy as np
assert [written[name][1] for name in written] == [list(range(4, 16)), [4] + 11 * [1]]
assert longer["without the cache"] == [min(4 + step, 64) for step in range(N)]
restarts = [step for step, k in enumerate(longer["with the cache"]) if k == 32]
assert restarts == list(range(61, N, 33)) and set(longer["with the cache"]) == {1, 4, 32}
for name, G in momenta.items():
    s = np.linalg.svd(G.double().numpy() / np.linalg.norm(G.double().numpy()), compute_uv=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(np.sort(s)[::-1], np.linalg.svd(v4.orthogonalize(G[None])[0].numpy())[1], atol=0.01)
""",
    "05_what_it_learned": """
table = model.embedding.weight.detach().double().numpy()
table /= np.sqrt((table**2).sum(1, keepdims=True))
assert len(neighbours) >= 4
for word, found in neighbours.items():
    (own,) = tokenizer.encode(word)
    order = [i for i in np.argsort(-(table @ table[own])).tolist() if i != own]
    assert found == [tokenizer.decode([i]) for i in order[:6]]
drawn = table[[tokenizer.encode(" " + word)[0] for word in chosen.word]]
drawn -= drawn.mean(0)
_, axes_of_spread = np.linalg.eigh(drawn.T @ drawn)  # the largest last
np.testing.assert_allclose(np.abs(flat["PCA"]), np.abs(drawn @ axes_of_spread[:, [-1, -2]]), atol=1e-3)
"""}


def quick(cell):
    return "".join(cell["source"]).replace("QUICK = False", "QUICK = True")


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != WITH_KERNEL], ids=by_name)
def test_a_notebook_runs_on_the_sample(path, copy):
    """From a clean start and in order, in quick form; its asserts hold there as well."""
    cells = [quick(cell) for cell in read(copy / "notebooks" / path.name).cells if cell["cell_type"] == "code"]
    cells += [CHECKS[path.stem]] if path.stem in CHECKS else []
    sources = copy / "notebooks" / f"{path.stem}.json"
    sources.write_text(json.dumps(cells), encoding="utf-8")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(copy / "ipython")}
    done = forks.run(["-c", CELLS, sources], cwd=copy / "notebooks", env=env, libraries=LIBRARIES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 3


def test_a_notebook_runs_in_a_kernel(copy):
    notebook = json.loads((copy / "notebooks" / f"{WITH_KERNEL}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = quick(cell)
    path = copy / "notebooks" / f"quick-{WITH_KERNEL}.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=copy / "notebooks", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads(done.stdout)["cells"]
    assert sum(bool(cell.get("outputs")) for cell in cells) > 3
