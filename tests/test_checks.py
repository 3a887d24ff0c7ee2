"""Contradictions that are said, arguments as people write them, ids that do not fit a model, advice that works."""

import ast
import contextlib
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import LATE_RUNGS, MODELS, ROOT, RUNGS, SCHEMES, V4, random_ids, random_model, tiny_tokens

import data
import harness
import harness.cli
import harness.models
import harness.report
from harness.arguments import read_arguments
from harness.checks import conflicts
from harness.errors import UserError

SHORT = {"MAX_STEPS": 2, "EVAL_INTERVAL": 1, "WARMUP_STEPS": 1, "COOLDOWN": 0.5}


def short(module):
    """SHORT, as far as the rung has these constants."""
    return {name: value for name, value in SHORT.items() if hasattr(module, name)}


@pytest.fixture
def load(load, monkeypatch):
    """The same, with little to evaluate and few steps."""

    def load_short(name, n_train=None, **constants):
        module = load(name)
        module = load(name, **{**short(module), **constants})
        monkeypatch.setattr(harness.report, "draw_curves", lambda path, *_, **__: path.write_text("a picture"))
        tokens = data.load_tokens(module.VOCABULARY)
        cut = {k: dataclasses.replace(v, ids=v.ids[: n_train if k == "train" else 600]) for k, v in tokens.items()}
        monkeypatch.setattr(module, "load_tokens", lambda *_: cut)
        return module

    return load_short


# ----------------------------------------------------------------------------------------------------------
# Constants that contradict each other
# ----------------------------------------------------------------------------------------------------------


def defaults(name, device="cpu"):
    """The constants of a rung as its file has them."""
    written = harness.cli.read_source(ROOT / f"{name}.py")[1]
    return {k: device if k == "DEVICE" else ast.literal_eval(v) for k, v in written.items()}


@pytest.mark.parametrize("name", RUNGS)
def test_default_constants_say_nothing(name, load, capsys, monkeypatch):
    for device, processes in (("cpu", 1), ("cuda", 1), ("mps", 1), ("cpu", 2), ("cuda", 8)):
        assert list(conflicts(defaults(name, device), set(), processes)) == []
    module = load(name)
    for constant, value in defaults(name).items():
        monkeypatch.setattr(module, constant, value)
    capsys.readouterr()
    harness.check_constants(vars(module))
    assert capsys.readouterr() == ("", "")


NOTES = [  # rung, constants that somebody sets, what is said
    ("v3", {"MAX_STEPS": 30}, "WARMUP_STEPS=200 and COOLDOWN=0.5 overlap in MAX_STEPS=30: .* rise to 14% of"),
    ("v3_1", {"MAX_STEPS": 75}, "WARMUP_STEPS=50 and COOLDOWN=0.5 overlap .* rise to 86% of"),
    (V4, {"WARMUP_STEPS": 800}, "WARMUP_STEPS=800 and COOLDOWN=0.5 overlap in MAX_STEPS=1280: .* to 89% of"),
    ("v3", {"STRIDE": 512}, "STRIDE=512 is not below BLOCK_SIZE=256: .* windows do not overlap"),
    ("v3", {"BLOCK_SIZE": 64}, "STRIDE=128 is not below BLOCK_SIZE=64"),
    ("v0", {"TEMPERATURE": 0.0, "TOP_K": 5}, "TEMPERATURE=0 always takes the likeliest token: TOP_K=5 has no effect"),
    ("v3", {"TEMPERATURE": 0, "TOP_K": 5, "TOP_P": 0.5}, "TOP_K=5 and TOP_P=0.5 have no effect"),
    ("v2", {"TOP_K": 1, "TEMPERATURE": 2.0}, "TOP_K=1 always takes the likeliest token: TEMPERATURE=2 has no effect"),
    (V4, {"ROPE_BASE": 500.0, "POSITION": "alibi,none"}, "ROPE_BASE=500 has no effect with POSITION=alibi,none"),
    (V4, {"POSITION": "rope,rope"}, "POSITION=rope,rope names rope twice"),
    (V4, {"EXTRAPOLATION": (1, 2, 2)}, "EXTRAPOLATION=1,2,2 names 2 twice"),
    ("v1", {"CONTEXT_SIZE": 8, "BLOCK_SIZE": 4}, "CONTEXT_SIZE=8 is larger than BLOCK_SIZE=4"),
    ("v2", {"MICRO_BATCH_SIZE": 64}, "MICRO_BATCH_SIZE=64 is larger than a batch: its 16 windows form one"),
    ("v1_1", {"CHUNK_SIZE": 10**6}, "CHUNK_SIZE=1000000 is larger than a micro-batch: its [0-9]+ tokens"),
    ("v1", {"EVAL_INTERVAL": 900}, "EVAL_INTERVAL=900 is larger than MAX_STEPS=640 and has no effect"),
    ("v0", {"LEARNING_RATE": 0}, "LEARNING_RATE=0: the weights that it applies to do not change"),
    ("v3_1", {"LEARNING_RATE_ADAMW": 0.0}, "LEARNING_RATE_ADAMW=0: "),
    ("v3", {"DROPOUT": 0.001}, "DROPOUT=0.001 is rounded .* here 0, so nothing is dropped"),
    ("v3", {"DROPOUT": 0.005}, "DROPOUT=0.005 is rounded .* here 0.00391$"),
]
FINE = [
    ("v3", {"BATCH_SIZE": 8}), ("v3", {"BATCH_SIZE": 48}), ("v1_1", {"BATCH_SIZE": 50}), ("v2", {"BATCH_SIZE": 17}),
    ("v0", {"MAX_STEPS": 5}), ("v1", {"MAX_STEPS": 5}), ("v3", {"WARMUP_STEPS": 0}), ("v3_1", {"COOLDOWN": 0.0}),
    ("v3_1", {"COOLDOWN": 1.0, "WARMUP_STEPS": 1}), (V4, {"COOLDOWN": 0.9, "WARMUP_STEPS": 128}),
    ("v3", {"TOP_K": 50, "TOP_P": 0.9}), (V4, {"POSITION": "sinusoidal", "ROPE_BASE": 100.0}), ("v3", {"GRAD_CLIP": 0}),
    ("v3", {"DROPOUT": 0.1}), ("v3", {"DROPOUT": 0.2, "WEIGHT_DECAY": 0}), ("v3", {"PATIENCE": 1000}),
    ("v1", {"PROMPT": "a", "EVAL_INTERVAL": 900}), ("v3", {"PROMPT": "a", "MAX_STEPS": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "constants", "text"), NOTES)
def test_a_contradiction_is_one_line(name, constants, text):
    lines = list(conflicts(defaults(name) | constants, constants.keys()))
    assert len(lines) == 1 and re.search(text, lines[0]), lines


@pytest.mark.parametrize(("name", "constants"), FINE)
def test_constants_that_agree_say_nothing(name, constants):
    assert list(conflicts(defaults(name) | constants, constants.keys())) == []


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_the_peak_of_the_learning_rate_is_that_of_the_schedule(name, load):
    """As the rung computes it, step by step."""
    module, written = load(name), defaults(name)
    for steps in (1, 2, 3, 7, 40):
        for warmup in (0, 1, 2, 5, 40, 100):
            for cooldown in (0.0, 0.1, 0.5, 1.0):
                constants = {"MAX_STEPS": steps, "WARMUP_STEPS": warmup, "COOLDOWN": cooldown}
                vars(module).update(constants)
                peak = max(module.lr_factor(step) for step in range(steps))
                found = [line for line in conflicts(written | constants, ()) if "peak" in line]
                assert bool(found) == (peak < 1), (constants, peak, found)
                if found:
                    assert f" {peak:.0%} of " in found[0], (constants, peak, found)


@pytest.mark.parametrize("name", ["v1", "v3", V4])
def test_contradictions_are_said_once_in_a_run(name, load, start, capsys):
    """On the command line and in a notebook, once in every run; v4 prints them once for all its schemes."""
    module = load(name, TEMPERATURE=0.0, TOP_K=2, **({"POSITION": "alibi,rope"} if name == V4 else {}))
    line = "TEMPERATURE=0 always takes the likeliest token: TOP_K=2 has no effect\n"
    for _ in range(2):
        assert start(module)[1].count(line) == 1
        module.main()
        assert capsys.readouterr().out.count(line) == 1
    assert start(module, "PROMPT=a")[2] == line  # to standard error, not into the text


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_micro_batches_of_two_shapes_are_refused(name, load, start):
    module = load(name, BATCH_SIZE=6)  # micro-batches of 4 and 2
    code, _, err = start(module)
    assert code == 1 and "set MICRO_BATCH_SIZE=3, or BATCH_SIZE=8\n" in err
    with pytest.raises(UserError, match="24, 12 for each process, is not .*; set MICRO_BATCH_SIZE=6, or BATCH_.*=32$"):
        list(conflicts(defaults(name) | {"BATCH_SIZE": 24, "MICRO_BATCH_SIZE": 8}, (), 2))
    with pytest.raises(UserError, match="set MICRO_BATCH_SIZE=6$"):  # the batches of a run must stay
        list(conflicts(defaults(name) | {"BATCH_SIZE": 12, "MICRO_BATCH_SIZE": 8, "RESUME": True}, ()))
    assert not Path(module.OUT_DIR).exists()


def test_the_folder_of_the_text_is_the_one_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("a novel")
    with pytest.raises(UserError, match="is a file, .* --from novel.txt --to data/novel, and set DATA=data/novel$"):
        list(conflicts(defaults("v0") | {"DATA": "novel.txt"}, ()))
    Path("data").mkdir()
    assert list(conflicts(defaults("v0"), ())) == []
    Path("data", "bpe_vocab.json").touch()
    (line,) = conflicts(defaults("v0"), ())
    assert line.startswith(f"DATA=data always means {ROOT / 'data'}; ")
    assert line.endswith(f" write DATA={tmp_path / 'data'}")


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_one_device_is_not_for_several_processes(device):
    with pytest.raises(UserError, match=f"^DEVICE={device} .*; set DEVICE="):
        list(conflicts(defaults("v3", device), (), 2))


@pytest.mark.parametrize("name", RUNGS)
def test_what_does_not_matter_to_a_prompt_is_said(name, load, start):
    """Only of constants on the command line; those that the model was trained with may be repeated."""
    module = load(name)
    assert start(module)[0] == 0
    code, out, err = start(module, "PROMPT=a", f"BLOCK_SIZE={module.BLOCK_SIZE}", "SEED=3", "TOP_P=0.5")
    assert (code, err) == (0, "")
    assert start(module, "PROMPT=a")[1] == out
    known = harness.constants(vars(load(name)))
    idle = ["MAX_STEPS=2", "BLOCK_SIZE=7", "DATA=nowhere", *(["N_LAYER=7"] if "N_LAYER" in known else [])]
    code, out, err = start(module, "PROMPT=a", *idle, "TOP_K=99999")
    assert (code, out) == (0, start(load(name), "PROMPT=a")[1])
    folder = Path(module.OUT_DIR) / ("alibi" if name == V4 else "")
    names = ", ".join([*idle, "TOP_K=99999"])
    assert err == f"PROMPT uses the trained model in {folder}: {names} have no effect on it\n"


# ----------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------

MEANT = [  # what arrives, what it means
    (["--MAX_STEPS=5"], {"MAX_STEPS": 5}), (["--max-steps", "5"], {"MAX_STEPS": 5}),
    (["max_steps=5"], {"MAX_STEPS": 5}), (["MAX_STEPS", "5"], {"MAX_STEPS": 5}),
    (["MAX_STEPS", "=", "5"], {"MAX_STEPS": 5}),
    (["MAX_STEPS=", "5"], {"MAX_STEPS": 5}), (["MAX_STEPS", "=5"], {"MAX_STEPS": 5}),
    (["MAX_STEPS 5"], {"MAX_STEPS": 5}), (["MAX_STEPS = 5"], {"MAX_STEPS": 5}), (["MAX_STEPS=5\r"], {"MAX_STEPS": 5}),
    (["MAX_STEPS=5,", "SEED=3,", "OUT_DIR=x"], {"MAX_STEPS": 5, "SEED": 3, "OUT_DIR": "x"}),
    (["'MAX_STEPS=5'"], {"MAX_STEPS": 5}), (['MAX_STEPS="5"'], {"MAX_STEPS": 5}), (["MAX_STEPS='5'"], {"MAX_STEPS": 5}),
    (["MAX_STEPS=20_000"], {"MAX_STEPS": 20000}), (["MAX_STEPS=20,000"], {"MAX_STEPS": 20000}),
    (["MAX_STEPS=1e3"], {"MAX_STEPS": 1000}), (["LEARNING_RATE=1e-3"], {"LEARNING_RATE": 1e-3}),
    (["LEARNING_RATE=.5"], {"LEARNING_RATE": 0.5}), (["LEARNING_RATE=1"], {"LEARNING_RATE": 1.0}),
    (["RESUME=true"], {"RESUME": True}), (["RESUME=1"], {"RESUME": True}), (["RESUME=FALSE"], {"RESUME": False}),
    (["COMPILE=0"], {"COMPILE": False}), (["COMPILE=off"], {"COMPILE": False}), (["--resume"], {"RESUME": True}),
    (["RESUME", "SEED=3"], {"RESUME": True, "SEED": 3}), (["--RESUME", "false"], {"RESUME": False}),
    (["POSITION=alibi, rope"], {"POSITION": "alibi,rope"}), (["POSITION=alibi,", "rope"], {"POSITION": "alibi,rope"}),
    (["POSITION=alibi", "rope", "SEED=3"], {"POSITION": "alibi,rope", "SEED": 3}),  # PowerShell cuts at commas
    (["EXTRAPOLATION=1", "2", "4"], {"EXTRAPOLATION": (1, 2, 4)}), (["EXTRAPOLATION=1, 2"], {"EXTRAPOLATION": (1, 2)}),
    (["OUT_DIR='a b'"], {"OUT_DIR": "a b"}), (["OUT_DIR='a", "b'", "SEED=3"], {"OUT_DIR": "a b", "SEED": 3}),
    (["OUT_DIR=", "x"], {"OUT_DIR": "x"}), (["OUT_DIR=a=b"], {"OUT_DIR": "a=b"}),
    (["INIT_FROM=None"], {"INIT_FROM": None}), (["INIT_FROM='~/x'"], {"INIT_FROM": "HOME/x"}),
    (["OUT_DIR=~/x"], {"OUT_DIR": "HOME/x"}), (["DATA=~"], {"DATA": "HOME"}),
    (["PROMPT= The cat"], {"PROMPT": " The cat"}), (["--prompt", " The cat"], {"PROMPT": " The cat"}),
    (["PROMPT='The", "cat'"], {"PROMPT": "The cat"}), (['PROMPT="Hello," she said'], {"PROMPT": '"Hello," she said'}),
    (["PROMPT='Tis the", "SEED=3"], {"PROMPT": "'Tis the", "SEED": 3}), (["PROMPT='a'"], {"PROMPT": "'a'"}),
    (["PROMPT=SEED=3"], {"PROMPT": "SEED=3"}), (["PROMPT="], {"PROMPT": ""}), (["PROMPT=~"], {"PROMPT": "~"}),
    (["PROMPT", "2 + 2 = "], {"PROMPT": "2 + 2 = "}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "meant"), MEANT, ids=lambda value: "_".join(value))
def test_arguments_mean_what_people_mean(words, meant, load, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    monkeypatch.setenv("USERPROFILE", "HOME")
    module = importlib.import_module(V4)
    before = harness.constants(vars(module))
    with harness.override(vars(module)):
        try:
            harness.set_constants(vars(module), words)
            after = harness.constants(vars(module))
        finally:
            vars(module).update(before)
    assert {k: v for k, v in after.items() if k in meant or v != before[k]} == meant
    assert all(type(after[k]) is type(v) for k, v in meant.items())


@pytest.mark.parametrize(("words", "said"), [
    (["PROMPT=", "The", "cat"], 'if it belongs to PROMPT, write PROMPT="...", with quotes'),
    (["--N_LAYERS=3"], "did you mean N_LAYER?"), (["BATCHSIZE=3"], "did you mean BATCH_SIZE?"),
    (["SEED=3,N_LAYER=2"], "a whole number from 0 to 2147483647; separate the constants with spaces"),
    (["SEED=3", "4"], "there is no constant '4'"), (["SEED", "N_LAYER=2"], "SEED must be a whole number"),
    (["COMPILE=perhaps"], "COMPILE must be True or False"), (["LEARNING_RATE=0,5"], "LEARNING_RATE must be a number"),
    (["LEARNING_RATE=1,500"], "LEARNING_RATE must be a number"), (["SEED=12,34"], "SEED must be a whole number"),
])  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        harness.set_constants(dict(vars(importlib.import_module("v3"))), words)


def test_a_constant_that_is_given_twice_says_which_counts(load, start):
    code, out, err = start(load("v0"), "SEED=1", "SEED=2", "TOP_K=3", "TOP_K=3")
    assert (code, err) == (0, "SEED is given twice: SEED=2 is used\n")
    twice = start(load("v0"), "PROMPT=b", "SEED=1", "PROMPT=a", "SEED=2")[1]
    assert start(load("v0"), "PROMPT=a", "SEED=2")[1] == twice


def test_a_home_folder_in_a_file_is_refused(load, start):
    code, _, err = start(load("v0", OUT_DIR="~/x"))
    assert code == 1 and "OUT_DIR=~/x: ~ is expanded only on the command line; write the whole path\n" in err


def test_any_words_are_read_or_refused():
    """In one line, whatever their order."""
    known = harness.constants(vars(importlib.import_module(V4)))
    pieces = ["SEED", "=", "3", "SEED=", "=3", "PROMPT='", "'", '"', "", "--", "alibi,", "POSITION=", "EXTRAPOLATION",
              "RESUME"]  # fmt: skip
    random = torch.Generator().manual_seed(1)
    for _ in range(3000):
        words = [pieces[i] for i in torch.randint(len(pieces), (4,), generator=random)]
        with contextlib.suppress(UserError):
            assert {name for name, _ in read_arguments(known, words)} <= known.keys()


# ----------------------------------------------------------------------------------------------------------
# Ids that a model cannot take
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "position"), MODELS)
def test_ids_that_a_model_cannot_take_are_refused_in_plain_words(name, position, load):
    module = load(name)
    model, size = random_model(module, 50, position), module.BLOCK_SIZE
    ids = random_ids(2, size)
    for idx, text in (
        (torch.tensor([[3, 50]]), "there is no token 50: the model's vocabulary has ids 0 to 49"),
        (torch.tensor([[-1]]), "there is no token -1"), (torch.tensor([[3, -7]]), "no token -7"),
        (torch.tensor([[10**12, 0]]), "no token 1000000000000"),
        (torch.tensor([3, 4]), r"tensor \(B, T\).* have shape \(2,\); .* torch.tensor\(\[ids\]\)"),
        ([[3, 4]], "have type list"), (torch.tensor([[3.0]]), r"these are torch.float32; write idx.long\(\)"),
        (torch.tensor([[3]], dtype=torch.uint16), "torch.uint16"),
        (torch.zeros(1, 0, dtype=torch.long), "there are no ids"),
        (ids.to("meta"), r"on meta, but the model is on cpu; write idx.to\('cpu'\)"),
    ):  # fmt: skip
        for mode in (model.train(), model.eval()):
            with pytest.raises(UserError, match=text):
                mode(idx)
    for targets, text in ((ids[:1], r"targets have shape \(1, 32\)"), (ids + 50, "there is no token"),
                          (ids.to("meta"), "on meta, but the ids")):  # fmt: skip
        with pytest.raises(UserError, match=text):
            model(ids, targets)
    longer = random_ids(1, size + 1)
    if hasattr(model, "position_embedding"):
        with pytest.raises(UserError, match=f"^the window has {size + 1} tokens, .* only {size} .* most {size}"):
            model(longer)
    else:
        assert model(longer).shape == (1, size + 1, 50)
    assert model(ids.int()).equal(model(ids)) and model(ids, ids).isfinite()


@pytest.mark.parametrize(("name", "position"), MODELS)
def test_a_prompt_that_a_model_cannot_continue_is_refused(name, position, load):
    module = load(name)
    model = random_model(module, 50, position)
    for ids, text in (([], "no ids to continue"), ([3, 50], "no token 50"), ([-1], "no token -1"),
                      ("text", "list of ids"), ([[3]], "list of ids")):  # fmt: skip
        with pytest.raises(UserError, match=text):
            list(module.generate(model, ids, 2))
    assert len(list(module.generate(model, [3] * 100, 40))) == 40  # longer than the window


def test_a_cache_has_no_limit_of_its_own(load):
    module = load(V4)
    model = random_model(module, 50, "rope")
    cache, ids = module.KVCache(model), random_ids(1, 3 * module.BLOCK_SIZE)
    for part in ids.split(10, dim=1):
        model(part, cache=cache)
    assert cache.length == ids.size(1)
    with pytest.raises(UserError, match="no token 50"):
        model(torch.tensor([[50]]), cache=cache)


def test_weights_of_attention_have_the_same_limits(load):
    import look

    model = random_model(load("v3"), 50)
    with pytest.raises(UserError, match="only 32 positions"):
        look.attention_weights(model, random_ids(1, 33))


@pytest.mark.parametrize("name", LATE_RUNGS)
def test_compiled_code_has_no_check(name, load):
    """One graph, and no time: what it would refuse is not looked at."""
    module = load(name, N_LAYER=1)
    vars(harness).pop("check_ids", None)  # it is found while the model is traced
    model = random_model(module, 50)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = random_ids(2, 32)
    assert compiled(ids, ids).item() == pytest.approx(model(ids, ids).item(), rel=1e-5)
    torch._dynamo.reset()


def test_a_gpu_does_not_wait_in_training_and_generation(load):
    """Ids on the device "meta" have no values: reading one raises an error."""
    model, ids = random_model(load("v3"), 50).to("meta"), random_ids(1, 8).to("meta")
    model.train()
    assert model(ids, ids).device.type == "meta"
    model.eval()
    with torch.no_grad():
        assert model(ids).shape == (1, 8, 50)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(ids)


@pytest.mark.parametrize("name", RUNGS)
def test_evaluating_on_ids_of_another_vocabulary_is_an_error(name, load):
    module = load(name)
    model, tokens = random_model(module, 50), tiny_tokens(100, 50)
    assert module.evaluate(model, tokens)["loss"] > 0  # a model that was not trained here
    with pytest.raises(UserError, match="ids up to 9[0-9], but the model's vocabulary ends at 49.*--vocabulary RUN"):
        module.evaluate(model, tiny_tokens(5000, 100))
    model.fingerprint = "none"
    assert module.evaluate(model, tokens)["loss"] > 0
    model.fingerprint = "0123456789abcdef"
    with pytest.raises(UserError, match="with the vocabulary 0123456789abcdef, but .* another one, none; tokenize"):
        module.evaluate(model, tokens)
    with pytest.raises(UserError, match=r"one split; choose one, such as tokens\['train'\]"):
        module.evaluate(model, {"train": tokens})


@pytest.mark.parametrize("name", ["v3", "v3_1"])
def test_an_evaluation_in_windows_beyond_the_positions_is_refused(name, load):
    module = load(name)
    with pytest.raises(UserError, match="64 tokens, but the model has learned only 32 positions"):
        module.evaluate(random_model(module, 50), tiny_tokens(500, 50), size=64)


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_is_not_called_damaged(error, tmp_path, monkeypatch):
    torch.save({}, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match=f"cannot read .*model.pt: {error.strerror}") as caught:
        harness.models.read_file(tmp_path / "model.pt", ())
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"),
                                   RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])  # fmt: skip
def test_too_little_memory_to_read_is_not_damage(error, tmp_path, monkeypatch):
    torch.save({}, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as caught:
        harness.models.read_file(tmp_path / "model.pt", ())
    assert caught.value is error


def test_an_error_of_the_device_is_not_called_another_model(monkeypatch):
    model = torch.nn.Linear(2, 2)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    weights = model.state_dict()
    monkeypatch.setattr(model, "load_state_dict", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="illegal memory"):
        harness.models.set_weights(model, weights, "model.pt")
    more = {"more": torch.ones(1)}
    for other in (torch.nn.Linear(2, 3).state_dict(), {}, weights | more, [1], weights | {"bias": 3}):
        with pytest.raises(UserError, match="do not fit this model"):
            harness.models.set_weights(torch.nn.Linear(2, 2), other, "model.pt")


def test_a_model_is_named_by_its_folder_or_its_file(load, monkeypatch, tmp_path):
    module = load("v0", OUT_DIR=str(tmp_path / "run"))
    module.main()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/run", "~/run/model.pt", tmp_path / "run" / "model.pt"):
        assert harness.models.find_model([name]) == tmp_path / "run"


def test_files_that_hide_modules_are_named(tmp_path):
    for name in ("random.py", "data.py", "mine.py", "v3.py", "results.txt"):
        (tmp_path / name).touch()
    (tmp_path / "bpe").mkdir()
    (tmp_path / "look").mkdir()
    (tmp_path / "look" / "__init__.py").touch()
    found = harness.hidden_modules(tmp_path)
    assert found == [str(tmp_path / name) for name in ("data.py", "look", "random.py")]
    assert harness.hidden_modules(ROOT) == []
    (tmp_path / "random.py").unlink()
    (tmp_path / "copy.py").write_text("import harness")  # a program in the same folder that hides a module itself
    done = subprocess.run([sys.executable, str(tmp_path / "copy.py")], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    lines = [f"{tmp_path / name} hides a module of the same name that is needed here; rename it" for name in
             ("copy.py", "data.py", "look")]  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()) == (0, lines)


# ----------------------------------------------------------------------------------------------------------
# Advice
# ----------------------------------------------------------------------------------------------------------


def advised(message):
    """The first thing that a message advises, as arguments: "set NAME=value NAME=value", "lower NAME to value", "NAME
    was value and is ..."."""
    if back := re.findall(r"([A-Z_]+) was (\S+) and is", message):
        return [f"{name}={value.strip(chr(39))}" for name, value in back]
    advice = message.partition(";")[2].split(", or ")[0]
    return [f"{name}={value}" for name, value in re.findall(r"\b([A-Z_]+)(?:=| to )([\w.]+)", advice)]


def follow(start, load, name, *arguments, n_train=None, **constants):
    """Start a rung, then again with what each message advises, until it succeeds. Returns the messages."""
    messages = []
    while True:
        code, _, err = start(load(name, n_train=n_train, **constants), *arguments)
        if code == 0:
            return messages
        advice = advised(err)
        assert advice and err not in messages and len(messages) < 6, [*messages, err]
        messages.append(err)
        arguments = [a for a in arguments if a.split("=")[0] not in {b.split("=")[0] for b in advice}] + advice


@pytest.mark.parametrize("name", RUNGS)
@pytest.mark.parametrize("n_train", [2, 3, 20, 64, 200])
def test_advice_for_a_short_text_is_followed_until_it_works(name, n_train, load, start):
    follow(start, load, name, n_train=n_train, BATCH_SIZE=16)


@pytest.mark.parametrize("name", LATE_RUNGS)
@pytest.mark.parametrize("n_train", [20, 37, 70])
def test_advice_for_fine_tuning_on_a_short_text_ends(name, n_train, load, start):
    """Windows have 32 tokens, and the text is hardly longer."""
    folder = load(name).OUT_DIR
    assert start(load(name))[0] == 0
    messages = follow(start, load, name, "N_LAYER=3", f"INIT_FROM={folder}", "BATCH_SIZE=16", n_train=n_train)
    assert len(messages) <= 2


@pytest.mark.parametrize("arguments", [
    ("BATCH_SIZE=6",), ("BATCH_SIZE=7", "MICRO_BATCH_SIZE=3"), ("N_EMBD=33",), ("N_EMBD=1", "N_HEAD=3"), ("N_HEAD=5",),
])  # fmt: skip
@pytest.mark.parametrize("name", LATE_RUNGS)
def test_advice_for_constants_that_contradict_each_other_works(name, arguments, load, start):
    assert len(follow(start, load, name, *arguments)) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_advice_for_the_width_of_each_scheme_works(scheme, load, start):
    for arguments in (("N_EMBD=9", "N_HEAD=3"), ("N_EMBD=7", "N_HEAD=1"), ("N_EMBD=10", "N_HEAD=4")):
        expected = {"rope": 1, "sinusoidal": 1}.get(scheme, int(arguments[0] == "N_EMBD=10"))
        assert len(follow(start, load, V4, f"POSITION={scheme}", *arguments)) == expected


@pytest.mark.parametrize("name", RUNGS)
def test_advice_for_a_resumed_run_works(name, load, start):
    assert start(load(name))[0] == 0
    other = ["SEED=5", "BATCH_SIZE=4", *(["N_EMBD=8"] if name != "v0" else [])]
    assert len(follow(start, load, name, "RESUME=True", *other)) == 1


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("n", [10, 290, 700, 3000, 9000])
def test_advice_for_several_processes_keeps_their_batches_equal(processes, n, load, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    error = harness.too_few_tokens(n, 16 * processes, 256)
    found = dict(advice.split("=") for advice in advised(str(error)))
    batch, block = int(found["BATCH_SIZE"]), int(found.get("BLOCK_SIZE", 256))
    assert batch % processes == 0 and n >= (batch + 1) * block
    constants = defaults("v3") | {"BATCH_SIZE": batch, "BLOCK_SIZE": block, "STRIDE": 0}
    assert list(conflicts(constants, (), processes)) == []

