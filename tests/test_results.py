"""The README and the committed results say the same, and what the README names is there."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import harness

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "results/README.md")  # those with tables
README, RESULTS = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in (*PAGES, "docs/guide.md", "docs/design.md")}
NAMED = {"README.md": ("v3_to_v4", "v3"), "results/README.md": ("shape", "4 × 192")}
RUNGS = ("v0", "v1", "v1_1", "v2", "v3", "v4_alibi_rope")


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """results/ladder.py, working on copies of the files that it writes."""
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "results" / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "results").mkdir()
    for page in PAGES:
        (tmp_path / page).write_bytes((ROOT / page).read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_tables_are_what_the_committed_runs_say(ladder):
    assert ladder.write(check=True)


def test_a_changed_number_is_noticed_and_mended(ladder):
    for page, text in zip(PAGES, (README, RESULTS)):
        experiment, run = NAMED[page]
        bpb = f"{ladder.middle(ladder.found(experiment)[run], 'val_bpb'):.4f}"
        assert bpb in text
        (ladder.ROOT / page).write_text(text.replace(bpb, "0.1234"), encoding="utf-8")
        assert not ladder.write(check=True)
        ladder.write(check=False)
        assert (ladder.ROOT / page).read_text(encoding="utf-8") == text


def test_a_table_without_a_place_and_a_place_without_a_table_are_noticed(ladder):
    readme = ladder.ROOT / "README.md"
    readme.write_text(README.replace("<!-- ladder -->", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="no page has a place for ladder"):
        ladder.write(check=True)
    readme.write_text(README + "<!-- nothing -->\n<!-- /nothing -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="README.md asks for a table that nothing makes: nothing"):
        ladder.write(check=True)


def test_a_cell_is_the_mean_and_the_range_of_the_seeds(ladder):
    """Read from the files themselves."""
    folder = ROOT / "results" / "experiments" / "ladder"
    bpb = [json.loads(path.read_text())["summary"]["val_bpb"] for path in sorted(folder.glob("v3-*.json"))]
    row = next(line for line in README.splitlines() if line.startswith("| v3 | GPT-2 block"))
    assert len(bpb) == 3
    assert [cell.strip(" *") for cell in row.split("|")[4:6]] == [
        f"{sum(bpb) / 3:.4f}", f"{min(bpb):.4f} to {max(bpb):.4f}"]  # fmt: skip


def test_the_two_hours_stand_among_what_was_published(ladder):
    """Read from the file itself: the worst row comes first, and the sample is the beginning of the run's."""
    (path,) = (ROOT / "results" / "experiments" / "best").glob("*-*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    test = {found["summary"]["test_word_ppl"], *(found["measured"][key]["word_ppl"]
                                                 for key in ("test_sliding", "test_reading_on"))}  # fmt: skip
    rows = re.search(r"<!-- two_hours_best -->\n(.*?)<!--", README, re.S)[1].splitlines()
    last = [row.split("|")[3].strip() for row in rows if re.match(r"\| (?!model|---)", row)]
    assert {cell.strip("*") for cell in last if "*" in cell} == {f"{ppl:.1f}" for ppl in test}
    assert len(last) == 8 and last == sorted(last, key=lambda cell: -float(cell.strip("*")))
    shown = re.search(r"<!-- sample -->\n```\n(.*?)```", README, re.S)[1].split()
    assert len(shown) > 90 and found["sample"].split()[: len(shown) - 1] == [word for word in shown if word != "..."]


def test_experiments_used_the_constants_of_the_scripts(ladder):
    """But for those that their command sets."""
    for path in sorted((ROOT / "results" / "experiments").glob("*/*-*.json")):
        found = json.loads(path.read_text())
        _, script, *words = found["command"].split()
        now = json.loads(json.dumps(harness.constants(vars(importlib.import_module(script.removesuffix(".py"))))))
        own = dict(word.partition("=")[::2] for word in words)
        then = found["summary"]["hyperparameters"]
        decide = now.keys() - own.keys() - {"OUT_DIR", "RESUME", "DEVICE"}
        assert {k: then[k] for k in decide} == {k: now[k] for k in decide}, path
        assert found["summary"]["seed"] == int(own["SEED"])


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


def test_files_that_a_page_shows_are_there():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), link


def test_links_to_a_heading_find_it():
    for page, text in TEXTS.items():
        for other, heading in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
            path = (ROOT / page).parent / other if other else ROOT / page
            headings = re.findall(r"(?m)^#+ (.*)", path.read_text(encoding="utf-8").lower())
            assert heading in [re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings], (page, heading)


def test_every_page_is_reached_from_the_readme():
    """And every picture of the results is shown on one of them."""
    assert [page for page in TEXTS if page != "README.md" and f"]({page}" not in README] == []
    shown = {(ROOT / page).parent.joinpath(picture).resolve() for page, text in TEXTS.items()
             for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}  # fmt: skip
    assert set((ROOT / "results").glob("*.png")) <= shown


def commands(text):
    """[words] of every `python FILE ...` that a page shows, in blocks and in sentences."""
    text = re.sub(r"`[^`]*`", lambda code: code[0].replace("\n", " "), text.replace("```", ""))
    return [shlex.split(line) for line in re.findall(r"(?:python|torchrun(?: --\S+)+) ([\w/]+\.py[^`#\n]*)", text)]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_that_a_page_shows_exist(page):
    """The file is there, a constant is one of the rung's, an option stands in the file, an experiment is one."""
    found = commands(TEXTS[page])
    assert len(found) > 5 or page == "docs/design.md"
    for script, *words in found:
        source = (ROOT / script).read_text(encoding="utf-8")
        rung = script.removesuffix(".py") in RUNGS
        known = harness._read_source(ROOT / script)[0] if rung else {}
        for word in words:
            if rung and word != "--help":
                assert word.partition("=")[0] in known, (script, word)
            elif word.startswith("--") and word != "--help":
                assert f'"{word.partition("=")[0]}"' in source, (script, word)
            elif script == "results/experiments.py" and word != "NAME":
                assert f'"{word}": Experiment(' in source or f'EXPERIMENTS["{word}"]' in source, word


def test_the_readme_is_read_in_some_minutes():
    """Without tables, commands and references it has the words of about five minutes, at 250 a minute."""
    prose = re.sub(r"```.*?```|(?m:^[|<!][^\n]*)", "", README.partition("## References")[0], flags=re.S)
    assert len(prose.split()) < 1400


def test_ci_finds_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m 1 -E '([^']+)'", (ROOT / ".ci" / "run").read_text())[1]
    assert [line for line in README.splitlines() if re.fullmatch(pattern.strip("^$"), line)]


def test_no_result_names_a_place_of_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        found = re.search(r'[" =](/(?:home|root|tmp|work|opt|Users|mnt)/[^" ]*)', path.read_text(encoding="utf-8"))
        assert not found, (path.name, found)
