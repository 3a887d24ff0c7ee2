"""docs/course.md: every section has its parts, and what it says of scripts and of results is so."""

import importlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from common import RUNGS, V4

import bpe_tokenizer
import v3
import v3_1
from harness.arguments import RULES
from harness.cli import set_constants
from results import course, step_time, tables
from results.plan import Run
from results.store import mean_of, read_json, results_of
from results.tables import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
SECTIONS = {heading: body for heading, body in re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", TEXT)}
STEPS = {"v0": "v0", "tokenizer": "bpe_tokenizer", "v1": "v1", "v1_1": "v1_1", "v2": "v2", "v3": "v3", "v3_1": "v3_1",
         "v4": V4}  # of the course: the script that each is about
PARTS = ("The question", "Before", "Time", "Run", "What happens", "A surprise", "Change first", "Questions",
         "Exercises", "Read on", "Next")  # fmt: skip


def section(step):
    """The text of the section about a rung, or about the tokenizer."""
    (body,) = [body for heading, body in SECTIONS.items() if re.search(rf"(: |the ){step}(,|$)", heading)]
    return body


def code(text):
    """What stands between backticks, outside of blocks, each on one line."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("step", STEPS)
def test_a_section_has_its_parts_in_order(step):
    text = section(step)
    places = [text.find(f"\n**{part}") for part in PARTS]
    assert -1 not in places and places == sorted(places), dict(zip(PARTS, places))
    assert f"`python {STEPS[step]}.py`" in text
    questions, answers = re.search(r"\*\*Questions\*\*.*?(?=\*\*Exercises)", text, re.S)[0].split("<summary>Answers")
    numbers = [re.findall(r"(?m)^(\d)\. ", part) for part in (questions, answers)]
    assert numbers[0] == numbers[1] and 3 <= len(numbers[0]) <= 5
    assert f"](../exercises/{step}_" in text or step == "tokenizer" and "](../exercises/tokenizer_bpe.py)" in text
    if step != "tokenizer":
        assert f"](pictures/{STEPS[step]}.png)" in text
        shown = re.findall(r"<!-- screen_(\w+) -->\n(.*?)<!-- /", text, re.S)
        texts = ("wikitext",) if step == "v1_1" else ("wikitext", "sample")
        assert [name for name, _ in shown] == [f"{STEPS[step]}_{name}" for name in texts]
        assert all(len(lines.splitlines()) > 8 for _, lines in shown)


def test_outputs_and_tables_are_those_of_the_files():
    """Those of no other page: all tables of all pages are compared in test_results.py."""
    shown = dict(re.findall(r"<!-- ((?:screen|changes)_\w+) -->\n(.*?)<!-- /", TEXT, re.S))
    assert shown.keys() == course.TABLES.keys()
    assert [name for name, text in shown.items() if text.strip() != course.TABLES[name]().strip()] == []


@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung != "v1_1"])
def test_runs_on_the_sample_are_those_of_the_commands(rung):
    """Of v4 both schemes."""
    (command,) = re.findall(rf"on the bundled sample: <code>(.*)</code></summary>\n\n<!-- screen_{rung}_sample", TEXT)
    assert command.split()[:2] == ["python", f"{rung}.py"]
    expected = dict(vars(importlib.import_module(rung)))
    set_constants(expected, command.split()[2:])
    for path in (course.TEXTS["sample"] / rung).rglob("summary.json"):
        summary = read_json(path)
        if rung == V4:
            expected |= {"POSITION": path.parent.name, "OUT_DIR": f"runs/{rung}/{path.parent.name}"}
        made_with = summary["hyperparameters"]
        wanted = json.loads(json.dumps({name: expected[name] for name in made_with}))
        assert {name for name in wanted if wanted[name] != made_with[name]} <= {"RESUME", "DEVICE"}
        assert summary["dataset"] == "sample"


def test_every_rung_has_a_section_and_an_evening_in_the_plan():
    assert set(RUNGS) < set(STEPS.values())
    assert re.findall(r"(?m)^\| (\d) \|", SECTIONS["The plan"]) == list("1234567")


@pytest.mark.parametrize("step", [step for step in STEPS if step != "tokenizer"])
def test_constants_exist_and_can_have_the_values_that_are_given(step):
    """Those of commands, of tables and of sentences, in the rung that is named or else in that of the section."""
    found = 0
    for span in code(section(step)):
        words = shlex.split(span.removeprefix("python "))
        name = words[0].removesuffix(".py") if words[0].endswith(".py") else STEPS[step]
        values = [word for word in words if re.match(r"[A-Z_]{4,}=", word)]
        if name in RUNGS and values:
            rung = dict(vars(importlib.import_module(name)))
            for constant in set_constants(rung, values):
                assert constant not in RULES or RULES[constant][2](rung[constant]), (span, constant)
            found += len(values)
        elif name in RUNGS and re.fullmatch(r"[A-Z]+_[A-Z_]+", span):
            assert span in vars(importlib.import_module(name)), span
    assert found >= 3 or step == "v1_1"


@pytest.mark.parametrize("step", STEPS)
def test_names_and_lines_of_a_script_are_in_it(step):
    """Names of functions and attributes, and lines that an answer quotes."""
    source = (ROOT / f"{STEPS[step]}.py").read_text(encoding="utf-8")
    known = {"exp(logit)", "compile", "gpt4", "the", "t", ".grad", "backward()", "x + attention(x)", "steps.csv",
             "lr_factor(0)", "lr_factor(1280)", "lr_factor(1281)", "p.sub_(u, alpha=...)",
             "merge([97, 97, 97], (97, 97), 256)", "[256, 97]"}  # fmt: skip
    for span in code(section(step)):
        if span in known or re.match(r"python |--|<|[A-Z]|exercises/|\d\d_|v\d\S*$|\w+\.py|.*=\d", span):
            continue
        assert span.removesuffix("()") in source, span


def test_constants_of_the_symbols_exist():
    constants = {span for span in code(SECTIONS["Symbols"]) if re.fullmatch(r"[A-Z_]{4,}", span)}
    assert constants == {"BATCH_SIZE", "MICRO_BATCH_SIZE", "BLOCK_SIZE", "N_EMBD", "VOCABULARY", "N_HEAD"}
    assert constants <= vars(v3_1).keys()


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------


def bpb(experiment, run, key="val_bpb"):
    return mean_of(results_of(experiment)[run], key)


def bytes_per_token(rung):
    return bpb("ladder", rung, "val_loss") / math.log(2) / bpb("ladder", rung)


def windows(run, way, size):
    results = results_of("positions")[run]
    return sum(result["measured"][way][str(size)] for result in results) / len(results)


def best_of_momentum(m):
    """Bits per byte with small batches at the best rate for this momentum."""
    results = results_of("momentum")
    return min(mean_of(results[name], "val_bpb") for name in results if name.startswith(f"8 windows, momentum {m},"))


def pairs():
    return next(one for one in read_json(BENCHMARKS / "ngram.json")["tokens"] if one["order"] == 2)


def peak_above_libraries(rung):
    trials = step_time.read()
    return trials["peak_mb"][step_time.model_key(Run(rung, rung))] - trials["libraries_mb"]


NUMBERS = {  # step: numbers as the section has them, and what they are
    "tokenizer": {
        "3.53": lambda: bpb("ladder", "v0", "val_loss"), "3.78": lambda: bpb("ladder", "v3", "val_loss"),
        "2.44": lambda: bpb("ladder", "v0"), "1.54": lambda: bpb("ladder", "v3"),
        "0.06": lambda: bpb("vocabulary", "v2, 18.6 MB, 1,000") - bpb("ladder", "v2"),
        "0.12": lambda: bpb("ladder", "v2") - bpb("vocabulary", "v2, 18.6 MB, 16,384"),
        "0.02": lambda: tables.bpb_after(190, "v2", 1000) - tables.bpb_after(190, "v2", 4096),
        "2.1": lambda: bytes_per_token("v0"), "3.5": lambda: bytes_per_token("v3"),
        "3.7804": lambda: read_json(course.TEXTS["wikitext"] / "v3" / "summary.json")["val_loss"],
        "1.5397": lambda: 3.7804430 * 316_665 / math.log(2) / 1_121_681,
    },
    "v0": {"6.21": lambda: math.log(500)},
    "v1": {"1.7533": lambda: pairs()["val_bpb"], "1.8184": lambda: bpb("ladder", "v1"), "8.32": lambda: math.log(4096)},
    "v1_1": {"592": lambda: peak_above_libraries("v1"), "81": lambda: peak_above_libraries("v1_1")},
    "v2": {"0.04": lambda: bpb("ladder", "v1") - bpb("ladder", "v2"),
           "0.12": lambda: bpb("ladder", "v2") - bpb("vocabulary", "v2, 18.6 MB, 16,384")},
    "v3": {"1.6601": lambda: bpb("recipe", "usual recipe"), "1.5405": lambda: bpb("ladder", "v3"),
           "0.06": lambda: bpb("v3_to_v4", "v3, at random") - bpb("ladder", "v3")},
    "v3_1": {"0.01": lambda: best_of_momentum("0.95") - best_of_momentum("0.85"),
             "1.4440": lambda: bpb("two_hours", "momentum 0.95"), "1.3301": lambda: bpb("two_hours", "dropout 0.1"),
             "8.3178": lambda: math.log(4096)},
    "v4": {"1.3931": lambda: windows("alibi, 256", "side_by_side", 4096),
           "1.4145": lambda: windows("alibi, 256", "side_by_side", 256),
           "1.3961": lambda: windows("alibi, 256", "sliding", 256),
           "1.3915": lambda: windows("alibi, 256", "sliding", 4096),
           "1.4089": lambda: windows("rope, 256", "side_by_side", 256)},
}  # fmt: skip


@pytest.mark.parametrize("step", NUMBERS)
def test_numbers_of_a_section_are_those_of_the_results(step):
    prose = re.sub(r"(?s)<!-- (\w+) -->.*?<!-- /\1 -->", "", section(step))
    for shown, value in NUMBERS[step].items():
        assert re.search(rf"(?<![\d.]){re.escape(shown)}(?!\d)", prose), shown
        assert f"{value():.{len(shown.partition('.')[2])}f}" == shown


def test_parameters_are_those_of_the_models():
    for step, vocab_size, numbers in (("v1", 4096, {"1,446,144": ".*", "1,052,672": r"head\..*"}),
                                      ("v2", 4096, {"198,272": r"blocks\.0\..*"})):  # fmt: skip
        model = importlib.import_module(step).LanguageModel(vocab_size)
        for shown, pattern in numbers.items():
            assert shown in section(step)
            assert f"{sum(p.numel() for n, p in model.named_parameters() if re.fullmatch(pattern, n)):,}" == shown


def test_the_rate_of_v3_falls_after_the_step_that_an_answer_names():
    assert v3.lr_factor(0) == 1 / 200 and v3.lr_factor(1280) == 1 and v3.lr_factor(1281) == 1279 / 1280


def test_singular_values_are_what_the_section_on_muon_says():
    text = " ".join(section("v3_1").split())
    before = torch.tensor([0.999, 0.05, 0.0015, 0.00017, 0.0001])  # of norm 1
    after = torch.linalg.svdvals(v3_1.orthogonalize(torch.diag(before)[None])[0])
    assert 0.679 < after[:3].min() and after[:3].max() < 1.2 and "between 0.68 and 1.2, if" in text
    assert f"{after[3]:.2f}" == "0.08" and "485 times, to 0.08" in text
    assert f"{after[4]:.2f}" == "0.05" and "0.0001 becomes 0.05" in text


def test_the_tokenizer_prints_what_the_course_shows(monkeypatch, capsys):
    """The loop of the textbook, which takes seconds, is left out."""
    def same(counts, n_merges):
        return bpe_tokenizer.BPETokenizer.train(text[:50_000], 256 + n_merges, special_tokens=()).merges

    text = (ROOT / "data" / "input.txt").read_text(encoding="utf-8")
    monkeypatch.setattr(bpe_tokenizer, "learn_merges", same)
    bpe_tokenizer.main()
    assert capsys.readouterr().out.endswith(re.search(r"(?ms)^```\n(.*?)^```", section("tokenizer"))[1])


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("tokenizer", "v1_1")])
def test_the_tables_of_changes_compare_one_constant_at_a_time(step):
    """With the first row, which has the constants that all of them have."""
    rows = re.findall(r"(?m)^\| `([^`]+)` \| ([\d.]+) \| ([-+\d.]*) \|$", section(step))
    assert len(rows) >= 4
    for words, value, difference in rows[1:]:
        assert difference == f"{float(value) - float(rows[0][1]):+.3f}" or abs(
            float(difference) - float(value) + float(rows[0][1])) < 2e-3, words
