"""The README and the committed results say the same, and what the README names is there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import harness

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v4_alibi_rope")


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """results/ladder.py, working on copies of the files that it writes."""
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "results" / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_tables_are_what_the_committed_runs_say(ladder):
    assert ladder.write(check=True)


def test_a_changed_number_is_noticed_and_mended(ladder):
    readme = ladder.ROOT / "README.md"
    bpb = f"{ladder.read_summaries()['v3']['val_bpb']:.4f}"
    readme.write_text(README.replace(bpb, "0.1234"), encoding="utf-8")
    assert not ladder.write(check=True)
    ladder.write(check=False)
    assert readme.read_text(encoding="utf-8") == README


def test_bits_per_byte_fall_from_rung_to_rung_on_the_same_text(ladder):
    """Over committed runs with default constants, that saw the same bytes within 0.1%."""
    runs = ladder.read_summaries()
    seen = [run["bytes_seen"] for run in runs.values()]
    assert max(seen) < 1.001 * min(seen)
    bpb = {rung: run["val_bpb"] for rung, run in runs.items()}
    assert bpb["v0"] > bpb["v1"] > bpb["v2"] > bpb["v3"] > bpb["v4_alibi_rope"]
    assert bpb["v1_1"] == pytest.approx(bpb["v1"], rel=1e-3)


NOT_THEN = {"DATA", "TEMPERATURE", "TOP_K", "TOP_P", "PROMPT", "INIT_FROM"}  # they change no loss


@pytest.mark.parametrize("rung", RUNGS)
def test_committed_runs_used_the_constants_of_the_scripts(rung):
    summary = json.loads((ROOT / "results" / "runs" / rung / "summary.json").read_text())
    now = json.loads(json.dumps(harness.constants(vars(importlib.import_module(rung)))))
    then = summary["hyperparameters"]
    decide = (then.keys() | now.keys()) - {"DEVICE", "RESUME", "EXTRAPOLATION", "CHUNK_SIZE", *NOT_THEN}
    assert {name: then.get(name) for name in decide} == {name: now.get(name) for name in decide}
    assert summary["dataset"] == "wikitext-2-v1"


def test_files_that_the_readme_shows_are_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_ci_finds_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m 1 -E '([^']+)'", (ROOT / ".ci" / "run").read_text())[1]
    assert [line for line in README.splitlines() if re.fullmatch(pattern.strip("^$"), line)]
