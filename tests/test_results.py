"""The pages and the committed results say the same, and what a page names is there."""

import functools
import importlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

import harness
from results import best, checks, continued, pages, plan, store
from results.plan import V4

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ((ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES[:2])
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8")
         for page in ("README.md", "results/README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))}
RUNGS = tuple(dict.fromkeys(run.rung for run in plan.EXPERIMENTS["ladder"].runs))


@functools.lru_cache
def constants_now(rung):
    """{name: value} of the constants of a rung, as JSON would give them back. They are read once: tests change them."""
    module = importlib.import_module(rung)
    assert vars(module)["OUT_DIR"] == f"runs/{rung}"
    return json.loads(json.dumps(harness.constants(vars(module))))


@functools.lru_cache
def committed(folder):
    """{path: content} of the result files below a folder of results/."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results" / folder).rglob("*.json")}


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """results/pages.py works on copies of the pages, in this folder."""
    for page in pages.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_bytes((ROOT / page).read_bytes())
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    return tmp_path


def test_tables_are_what_the_committed_runs_say():
    assert pages.write_tables(check=True)


@pytest.mark.parametrize(("page", "experiment", "run"), [
    ("README.md", "ladder", "v3"), ("results/README.md", "recipe", "usual recipe, rate 0.001"),
])  # fmt: skip
def test_a_changed_number_is_noticed_and_mended(page, experiment, run, copies):
    bpb, text = f"{store.mean_of(store.results_of(experiment)[run], 'val_bpb'):.4f}", (ROOT / page).read_text("utf-8")
    assert bpb in text
    (copies / page).write_text(text.replace(bpb, "0.1234"), encoding="utf-8")
    assert not pages.write_tables(check=True)
    assert "0.1234" in (copies / page).read_text(encoding="utf-8")
    pages.write_tables(check=False)
    assert (copies / page).read_text(encoding="utf-8") == text


def test_a_table_without_a_place_and_a_place_without_a_table_are_noticed(copies):
    (copies / "README.md").write_text(README.replace("<!-- ladder -->", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="no page has a place for ladder"):
        pages.write_tables(check=True)
    (copies / "README.md").write_text(README + "<!-- nothing -->\n<!-- /nothing -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="README.md has a place for an unknown table, nothing"):
        pages.write_tables(check=True)


@pytest.mark.parametrize("rung", ["v3", "v3_1"])
def test_a_cell_is_the_mean_and_the_range_of_the_seeds(rung):
    """Read from the files themselves."""
    files = sorted((ROOT / "results" / "experiments" / "ladder").glob(f"{rung}-*.json"))
    bpb = [json.loads(path.read_text(encoding="utf-8"))["summary"]["val_bpb"] for path in files]
    table = re.search(r"<!-- ladder -->\n(.*?)<!--", README, re.S)[1]
    row = next(line for line in table.splitlines() if line.startswith(f"| {rung} |"))
    assert len(bpb) == 3
    assert [cell.strip(" *") for cell in row.split("|")[4:6]] == [
        f"{sum(bpb) / 3:.4f}", f"{min(bpb):.4f} to {max(bpb):.4f}"]  # fmt: skip


def test_a_way_to_train_stands_with_the_best_of_its_rates():
    """Read from the files themselves."""
    folder, cells = ROOT / "results" / "experiments" / "v3_to_v4", []
    row = next(line for line in RESULTS.splitlines() if line.startswith("| v4's block, AdamW |"))
    for place in ("at-random", "sinusoids", "rope"):
        of_rates = {}
        for path in folder.glob(f"adamw-*-{place}-*.json"):
            bpb = json.loads(path.read_text(encoding="utf-8"))["summary"]["val_bpb"]
            of_rates.setdefault(path.name.split("-")[1], []).append(bpb)
        rate, seeds = min(of_rates.items(), key=lambda one: sum(one[1]) / len(one[1]), default=("", []))
        cells.append((f"{sum(seeds) / len(seeds):.4f}", rate) if seeds else ("–", ""))
    shown = [cell.strip() for cell in row.split("|")[2:-1]]
    assert [(cell.partition(";")[0].partition(" ")[0], cell.partition("; rate ")[2]) for cell in shown] == cells


def test_dropout_is_compared_at_the_end_of_each_schedule():
    """Read from the files themselves: the last evaluation, which is not always the best, is bold where it is lowest."""
    folder = ROOT / "results" / "experiments" / "dropout"
    rows = re.search(r"<!-- dropout -->\n(.*?)<!--", RESULTS, re.S)
    for row in rows[1].splitlines()[2:]:
        readings, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        means, lowest = [], []
        for p in ("0", "0.1", "0.2"):
            logs = [[record["val_bpb"] for record in json.loads(path.read_text(encoding="utf-8"))["log"]]
                    for path in folder.glob(f"{readings}-times-{p}-*.json")]  # fmt: skip
            assert len(logs) > 1
            means.append(sum(log[-1] for log in logs) / len(logs))
            lowest.append(sum(map(min, logs)) / len(logs))
        assert [cell.strip("*").partition(" ")[0] for cell in cells] == [f"{x:.4f}" for x in (*means, *lowest)]
        assert [cell.startswith("**") for cell in cells[:3]] == [x == min(means) for x in means]


def val_bpb_and_steps(pattern):
    """(mean bits per byte, steps) of the files in results/experiments/ that match."""
    found = [json.loads(path.read_text(encoding="utf-8"))["summary"]
             for path in (ROOT / "results" / "experiments").glob(pattern)]  # fmt: skip
    assert found
    return sum(one["val_bpb"] for one in found) / len(found), found[0]["steps"]


def test_vocabularies_are_compared_after_equal_seconds():
    """Read from the files themselves: steps times the time of a step, and np.interp over the logarithm of the time.
    The best is bold, of as much text and of as much time."""
    times = json.loads((ROOT / "results/experiments/step_time.json").read_text(encoding="utf-8"))["seconds"]
    rows = re.search(r"<!-- vocabulary -->\n(.*?)<!--", RESULTS, re.S)[1].splitlines()[2:]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    kinds = ("v2", "ladder/v2-*.json", 190, "v2{}"), ("v4", "ladder/v4-rope-*.json", 300, f"{V4}{{}} POSITION=rope")
    for rung, same, seconds, key in kinds:
        of_rung, texts, after = [row for row in rows if row[0] == rung], [], []
        for _, size, *cells in of_rung:
            number = size.replace(",", "")
            step = times[key.format(f" VOCABULARY=bpe_vocab_{number}.json" if number != "4096" else "")]
            file = f"vocabulary/{rung}-{{}}-{size.replace(',', '-')}-*.json"
            runs = [val_bpb_and_steps(same if number == "4096" else file.format("18.6-mb")),
                    val_bpb_and_steps(file.format("300-s"))]  # fmt: skip
            shown = [text for bpb, steps in runs for text in (f"{steps * step:.0f}", f"{bpb:.4f}")]
            assert [cell.strip("*").partition(" ")[0] for cell in cells[:4]] == shown
            line = sorted((math.log(steps * step), bpb) for bpb, steps in runs)
            assert line[0][0] - 0.05 < math.log(seconds) < line[1][0] + 0.05  # between the two runs
            texts.append(runs[0][0])
            slope = (line[1][1] - line[0][1]) / (line[1][0] - line[0][0])
            after.append(line[0][1] + slope * (math.log(seconds) - line[0][0]))
            assert cells[4].strip("*") == f"{after[-1]:.3f}"
        assert [row[3].startswith("**") for row in of_rung] == [x == min(texts) for x in texts]
        assert [row[6].startswith("**") for row in of_rung] == [x == min(after) for x in after]
        assert len(of_rung) == 6


def test_each_momentum_stands_with_all_its_rates():
    """Read from the files themselves; the best of each size of batches is bold."""
    rows = re.search(r"<!-- momentum -->\n(.*?)<!--", RESULTS, re.S)[1].splitlines()
    rates = re.findall(r"rate ([\d.]+)", rows[0])
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]
    assert len(table) == 6 and rates == sorted(rates, key=float)
    for windows in ("8", "32"):
        of_size = [(m, cells) for size, _, m, *cells in table if size == windows]
        means = {}
        for m, cells in of_size:
            for rate, cell in zip(rates, cells):
                name = f"{windows}-windows-momentum-{m}-rate-{rate}-*.json"
                made = list((ROOT / "results" / "experiments" / "momentum").glob(name))
                assert bool(made) == (cell != "–")
                if made:
                    means[cell] = val_bpb_and_steps(f"momentum/{name}")[0]
                    assert cell.strip("*").partition(" ")[0] == f"{means[cell]:.4f}"
        assert [cell.startswith("**") for cell in means] == [x == min(means.values()) for x in means.values()]


def test_depths_are_compared_after_equal_seconds_too():
    """Read from the files themselves: one layer takes as long for the ladder's text as the others may take."""
    times = json.loads((ROOT / "results/experiments/step_time.json").read_text(encoding="utf-8"))["seconds"]
    rows = re.search(r"<!-- shape -->\n(.*?)<!--", RESULTS, re.S)[1].splitlines()[2:]
    limit = val_bpb_and_steps("shape/1-*-256-1337.json")[1] * times["v3 N_LAYER=1"]
    for row in rows:
        name, *_, cell = (cell.strip() for cell in row.split("|")[1:-1])
        layers, width = name.split(" × ")
        file = f"shape/{layers}-*-256{'-as-long-*' if layers != '1' else ''}-1337.json"
        if cell == "–":
            assert width != "256" or not list((ROOT / "results" / "experiments").glob(file))
            continue
        bpb, steps = val_bpb_and_steps(file)
        step = times[f"v3 N_LAYER={layers}" if layers != "4" else "v3"]
        assert cell.partition(";")[0] == f"{bpb:.4f}" and steps * step == pytest.approx(limit, rel=0.01)


def test_a_part_of_the_recipe_stands_with_what_it_changes():
    """Read from the files themselves, in which each part has one seed."""
    v3 = json.loads((ROOT / "results/experiments/ladder/v3-1337.json").read_text(encoding="utf-8"))["summary"]
    for path in (ROOT / "results" / "experiments" / "recipe_parts").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        bpb = result["summary"]["val_bpb"]
        assert f"| {result['run']} | {bpb:.4f} | {bpb - v3['val_bpb']:+.4f} |" in RESULTS


def test_a_missing_mixture_is_named(tmp_path, monkeypatch):
    """As after `mixture.py` without the second network."""
    (tmp_path / "adaptive.json").write_text('{"runs": [{"run": "results/best"}]}', encoding="utf-8")
    monkeypatch.setattr(best, "LEARNING", tmp_path / "adaptive.json")
    with pytest.raises(ValueError, match=r"no row 'both'; train .* best, then run python .*mixture.py --dynamic 2e-4"):
        best.adapted_word_perplexities()


def test_the_best_runs_are_ranked_among_what_was_published():
    """Read from the files themselves: the worst row comes first."""
    first = json.loads((ROOT / "results/experiments/best/v4-two-hours-1337.json").read_text(encoding="utf-8"))
    mixture = json.loads((ROOT / "results" / "benchmarks" / "mixture.json").read_text(encoding="utf-8"))["runs"]
    mixture = {one["run"]: one for one in mixture}
    sliding, both = mixture["results/best, windows slide by 64"], mixture["both, windows slide by 64"]
    test = {first["summary"]["test_word_ppl"], first["measured"]["test_sliding"]["word_ppl"],
            sliding["test_mixed_word_ppl"], both["test_network_word_ppl"], both["test_mixed_word_ppl"]}  # fmt: skip
    rows = re.search(r"<!-- two_hours_best -->\n(.*?)<!--", README, re.S)[1].splitlines()
    last = [row.split("|")[3].strip() for row in rows if re.match(r"\| (?!model|---)", row)]
    assert {cell.strip("*") for cell in last if "*" in cell} == {f"{ppl:.1f}" for ppl in test}
    assert len(last) == 11 and last == sorted(last, key=lambda cell: -float(cell.strip("*")))
    rows = re.search(r"<!-- adaptive -->\n(.*?)<!--", RESULTS, re.S)[1].splitlines()
    adaptive = [row.split("|")[2].strip() for row in rows if re.match(r"\| (?!model|---)", row)]
    learning = json.loads((ROOT / "results" / "benchmarks" / "adaptive.json").read_text(encoding="utf-8"))["runs"]
    learning = {one["run"]: one for one in learning}
    adapted = {first["measured"]["test_dynamic_eval"]["word_ppl"], learning["results/best"]["test_mixed_word_ppl"],
               learning["both"]["test_network_word_ppl"], learning["both"]["test_mixed_word_ppl"]}  # fmt: skip
    assert {cell.strip("*") for cell in adaptive if "*" in cell} == {f"{ppl:.1f}" for ppl in adapted}
    assert len(adaptive) == 9 and adaptive == sorted(adaptive, key=lambda cell: -float(cell.strip("*")))


# ----------------------------------------------------------------------------------------------------------
# Committed runs
# ----------------------------------------------------------------------------------------------------------


def planned_results():
    """{path: (run, seed)} of all results that the plan has."""
    return {store.result_file(run, seed): (run, seed) for experiment in plan.EXPERIMENTS.values()
            for run in experiment.runs for seed in experiment.seeds}  # fmt: skip


def test_committed_results_are_those_of_the_plan():
    """Every one of them is shown."""
    for path, (run, seed) in planned_results().items():
        if path.exists():
            assert checks.flaw(committed("experiments")[path], run, seed) is None, path


def test_a_constant_that_a_rung_gets_leaves_its_results_valid(monkeypatch):
    """At its default value; a result that was made with another value does not match the plan."""
    read = checks.sources
    grown = {rung: tuple(text.replace("MAX_STEPS = ", "SHARD = False\nMAX_STEPS = ", 1) for text in read(run))
             for rung, run in {rung: plan.Run(rung, rung) for rung in RUNGS}.items()}  # fmt: skip
    assert all("\nSHARD = False\n" in text for text, _ in grown.values())
    monkeypatch.setattr(checks, "sources", lambda run: grown[run.rung])
    for path, (run, seed) in planned_results().items():
        if path.exists() and not run.edits:
            assert checks.flaw(committed("experiments")[path], run, seed) is None, path
            result = json.loads(json.dumps(committed("experiments")[path]))
            result["summary"]["hyperparameters"]["SHARD"] = True
            assert checks.flaw(result, run, seed) == "SHARD was True and is False"


def test_every_result_file_is_that_of_a_planned_run():
    """Under the name that the plan gives it; a file that nothing reads would be left behind unnoticed."""
    planned = planned_results()
    for path, result in committed("experiments").items():
        if path.name != "step_time.json":
            assert path in planned and result["run"] == plan.owner(planned[path][0])[1].name, path


@pytest.mark.parametrize("run", pages.RUNS)
def test_the_committed_runs_of_the_rungs_used_their_constants(run):
    summary = json.loads((ROOT / "results" / "runs" / run / "summary.json").read_text(encoding="utf-8"))
    summary["hyperparameters"].pop("EVAL_INTERVAL")  # it decides no training, and was once a quarter of the steps
    pages.check_defaults(run, summary)
    rung, _, position = run.partition("/")
    assert summary["dataset"] == "wikitext-2-v1" and summary["rung"] == rung
    assert summary.get("position", "") == position


def test_bits_per_byte_fall_from_rung_to_rung_on_the_same_text():
    """Over committed runs with default constants, that saw the same bytes within 0.1%."""
    runs = pages.read_summaries(ROOT / "results" / "runs")
    seen = [run["bytes_seen"] for run in runs.values()]
    assert max(seen) < 1.001 * min(seen)
    bpb = [runs[run]["val_bpb"] for run in pages.RUNS if run not in ("v1_1", f"{plan.V4}/rope")]
    assert bpb == sorted(bpb, reverse=True)
    assert runs["v1_1"]["val_bpb"] == pytest.approx(runs["v1"]["val_bpb"], rel=1e-3)
    assert runs[f"{plan.V4}/rope"]["val_bpb"] < runs["v3_1"]["val_bpb"]


def test_no_result_names_a_place_of_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        place = re.search(r'[" =](/(?:home|root|tmp|work|opt|Users|mnt)/[^" ]*)', path.read_text(encoding="utf-8"))
        assert not place, (path.name, place)


def summary_of(run, dataset="sample", **changes):
    """The summary that a rung leaves with the constants at the top of its file; `changes` are other constants."""
    rung, _, position = run.partition("/")
    constants = constants_now(rung) | ({"POSITION": position} if position else {}) | changes
    return {"rung": rung, "dataset": dataset, "tokenizer": "bpe_vocab.json", "hyperparameters": constants}


def test_finished_runs_are_collected(tmp_path, monkeypatch):
    """What is kept of each, nothing else; not before all are there, of one text and of the rungs as they are."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for run in pages.RUNS:
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        for name in ("log.jsonl", "model.pt", "loss.png"):
            (folder / name).write_text(run)
        with pytest.raises(FileNotFoundError, match=f"no finished run; make it with python {run.partition('/')[0]}.py"):
            pages.collect()
        (folder / "summary.json").write_text(json.dumps(summary_of(run)))
    (tmp_path / "runs" / plan.V4 / "extrapolation.png").write_text("both")
    summary = tmp_path / "runs" / "v2" / "summary.json"
    text = "the runs are not comparable: they trained on"
    for wrong, why in ((summary_of("v2", dataset="novel"), f"{text} novel, sample"), ({}, "v2/summary.json is damaged"),
                       (summary_of("v2", MAX_STEPS=2), r"runs/v2 is not what v2.py makes .*MAX_STEPS was 2 and is"),
                       (summary_of("v2") | {"code_sha256": "beef"}, "the code of v2.py was different")):  # fmt: skip
        summary.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=why):
            pages.collect()
    summary.write_text(json.dumps(summary_of("v2") | {"tokens_sha256": "a"}))
    other = tmp_path / "runs" / "v3" / "summary.json"
    other.write_text(json.dumps(summary_of("v3") | {"tokens_sha256": "b"}))
    with pytest.raises(ValueError, match=f"{text} different texts with the same name .v2: a, v3: b"):
        pages.collect()
    assert not (tmp_path / "results").exists()
    other.write_text(json.dumps(summary_of("v3", DEVICE="cuda", SAMPLE_TOKENS=3) | {"tokens_sha256": "a"}))
    pages.collect()
    folder, names = tmp_path / "results" / "runs", ("log.jsonl", "loss.png", "summary.json")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        f"{plan.V4}/extrapolation.png", *(f"{run}/{name}" for run in pages.RUNS for name in names)}  # fmt: skip


def test_pages_without_a_result_that_they_show_end_in_a_line(copies, tmp_path, monkeypatch):
    """One is missing, one is of another run, the time of a step was not measured, a file is damaged."""
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results" / "experiments")
    shutil.copytree(ROOT / "results" / "experiments", store.RESULTS)
    assert pages.write_tables(check=True)
    path = store.RESULTS / "step_time.json"
    for content, why in (('{"seconds": {}, "peak_mb": {}}', "a step of .* has not been measured yet; .* with python"),
                         ("[]", "step_time.json is damaged")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match=why):
            pages.write_tables(check=True)
    shutil.copy(ROOT / "results" / "experiments" / "step_time.json", path)
    for seed in plan.SEEDS:
        shutil.copy(store.RESULTS / "ladder" / f"v2-{seed}.json", store.RESULTS / "ladder" / f"v3-{seed}.json")
    with pytest.raises(ValueError, match="there is no result for the run 'v3' of the experiment ladder; .* python "):
        pages.write_tables(check=True)


# ----------------------------------------------------------------------------------------------------------
# Pages
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_a_page_links_to_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXTS[page]):
        assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", TEXTS)
def test_links_to_a_heading_find_it(page):
    for other, heading in re.findall(r"\]\(([^)#]*)#([^)]+)\)", TEXTS[page]):
        path = (ROOT / page).parent / other if other else ROOT / page
        headings = re.findall(r"(?m)^#+ (.*)", path.read_text(encoding="utf-8").lower())
        assert heading in [re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings], heading


def test_every_page_is_reached_from_the_readme():
    """And every picture of the results is shown on one of them."""
    assert [page for page in TEXTS if page != "README.md" and f"]({page}" not in README] == []
    shown = {(ROOT / page).parent.joinpath(picture).resolve() for page, text in TEXTS.items()
             for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}  # fmt: skip
    assert set((ROOT / "results").glob("*.png")) <= shown


def commands(text):
    """[words] of every `python FILE ...` that a page shows, in blocks and in sentences."""
    text = re.sub(r"`[^`]*`", lambda code: code[0].replace("\n", " "), text.replace("```", ""))
    return [shlex.split(line) for line in re.findall(r"(?:python|torchrun(?: --\S+)+) ([\w/]+\.py[^`#<\n]*)", text)]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_that_a_page_shows_exist(page):
    """The file is there, a constant is one of the rung's, an option is in the file, an experiment is one."""
    found = commands(TEXTS[page])
    assert len(found) > 5 or page.startswith("docs/")
    for script, *words in found:
        source, rung = (ROOT / script).read_text(encoding="utf-8"), script.removesuffix(".py")
        for word in words:
            if rung in RUNGS and word != "--help":
                assert word.partition("=")[0] in constants_now(rung), (script, word)
            elif word.startswith("--") and word != "--help":
                assert f'"{word.partition("=")[0]}"' in source, (script, word)
            elif script == "results/experiments.py" and word != "NAME":
                name, is_constant, _ = word.partition("=")
                assert any(name in constants_now(one) for one in RUNGS) if is_constant else word in plan.EXPERIMENTS


def test_ci_finds_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m 1 -E '([^']+)'", (ROOT / ".ci" / "run").read_text())[1]
    assert [line for line in README.splitlines() if re.fullmatch(pattern.strip("^$"), line)]


def test_the_readme_has_the_continuations_of_every_rung():
    """Of the runs whose bits per byte are those in results/, in the order of the ladder, cut after some words."""
    stored = json.loads(continued.FILE.read_text(encoding="utf-8"))
    block = re.search(r"<!-- continued -->\n```\n(.*?)```", README, re.S)[1]
    entries = re.split(r"\n(?=\S)", block.strip())
    assert [one["run"] for one in stored] == list(continued.arguments()) and len(entries) == len(stored)
    for entry, one in zip(entries, stored):
        folder = ROOT / (one["run"] if one["run"].startswith("results/") else f"results/{one['run']}")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        assert one["val_bpb"] == summary["val_bpb"] and f"{summary['val_bpb']:.2f}" in entry
        written = entry.partition(f"{summary['val_bpb']:.2f}")[2].split()
        assert written[:-1] == one["text"].split()[: len(written) - 1] and written[-1] == "..." and len(written) > 30


def test_a_prompt_is_continued_by_the_command_of_a_run(monkeypatch):
    words = [f"{V4}.py", "OUT_DIR=results/best", "SAMPLE_TOKENS=4", f"PROMPT={continued.PROMPT}"]
    monkeypatch.setattr(continued, "arguments", lambda: {"results/best": words})
    (one,) = continued.continue_all()
    assert one["text"].startswith(continued.PROMPT.strip()) and len(one["text"]) > len(continued.PROMPT)
    assert one["command"] == f'python {V4}.py OUT_DIR=results/best SAMPLE_TOKENS=4 PROMPT=" The castle was built"'
    monkeypatch.setattr(continued, "arguments", lambda: {"runs/none": ["v0.py"]})
    with pytest.raises(FileNotFoundError, match="make it with python v0.py"):
        continued.continue_all()


def test_the_spread_of_step_times_is_that_of_their_trials():
    trials = json.loads((ROOT / "results" / "experiments" / "step_time.json").read_text(encoding="utf-8"))["trials"]
    rows = re.search(r"<!-- step_times -->\n(.*?)<!--", RESULTS, re.S)[1].splitlines()[2:10]
    keys = ("v0", "v1", "v1_1", "v2", "v3", "v3_1", f"{V4} POSITION=alibi", f"{V4} POSITION=rope")
    for row, key in zip(rows, keys, strict=True):
        ms = sorted(1000 * seconds for seconds in trials[key])
        assert len(ms) == 5 and f"| {ms[2]:.1f} | {ms[0]:.1f} to {ms[4]:.1f} |" in row


def test_the_order_of_articles_matters_less_than_a_seed():
    tried = json.loads((ROOT / "results" / "tried" / "article_order.json").read_text(encoding="utf-8"))
    before, shuffled = (one["val_bpb"] for one in tried)
    seeds = [result["summary"]["val_bpb"] for result in store.results_of("ladder")["v4, rope"]]
    assert abs(shuffled - before) < max(seeds) - min(seeds)
    text = " ".join(RESULTS.split())
    assert f"{shuffled:.4f} instead of {before:.4f} (seed 1337; `tried/article_order.json`)" in text
    assert f"three seeds differ by {max(seeds) - min(seeds):.3f}" in text
