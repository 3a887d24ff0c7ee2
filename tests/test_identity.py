"""What identifies a run in its summary, and which rung a trained model is of."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harness
from bpe_tokenizer import BPETokenizer
from common import ROOT, SMALL_VOCABULARY, same_weights, tiny_tokens
from harness import cli, identity, models

# ----------------------------------------------------------------------------------------------------------
# The commit
# ----------------------------------------------------------------------------------------------------------


def git(folder, *words):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *words]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    """A repository with a Python file and notes in one commit."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("a.py", "notes.md"):
        (folder / name).write_text("1\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_commit_is_that_of_the_repository(repository, tmp_path, monkeypatch):
    head = git(repository, "rev-parse", "HEAD").strip()
    assert identity.commit(repository) == head
    (repository / "notes.md").write_text("2\n")  # no code
    (repository / "b.py").write_text("2\n")  # git does not track it
    assert identity.commit(repository) == head
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of git
    assert identity.commit(repository) == head
    (repository / "a.py").write_text("2\n")
    assert identity.commit(repository) == f"{head} with changes"
    inside = repository / "unpacked"  # of an archive: the repository around it is another one
    inside.mkdir()
    assert identity.commit(inside) is None
    git(tmp_path, "init", "-q", "empty")
    assert identity.commit(tmp_path / "empty") is None


@pytest.mark.skipif(os.name != "posix", reason="the program that takes the place of git is a shell script")
@pytest.mark.parametrize("script", [
    "echo '# branch.oid abc'; exit 128", "exec sleep 60", "exit 0", "printf '\\377'", None,
])  # fmt: skip
def test_a_commit_that_git_does_not_tell_is_unknown(script, tmp_path, monkeypatch):
    """As where git does not trust the folder, hangs, or is not there: never an error."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "bin").mkdir()
    if script is not None:
        (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    else:
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert identity.commit(tmp_path, seconds=0.5) is None


# ----------------------------------------------------------------------------------------------------------
# The text of the rung and the tokens
# ----------------------------------------------------------------------------------------------------------


def test_a_summary_says_what_its_run_was_made_of(load, tmp_path, monkeypatch):
    """The text of the rung and the commit are those that it began with, whatever happens while it trains."""
    module = load("v0", MAX_STEPS=2, EVAL_INTERVAL=1)
    text, path = (ROOT / "v0.py").read_text(encoding="utf-8"), tmp_path / "v0.py"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(path))
    harness.constants(vars(module))  # as when it starts
    commits = iter(["the first", "the second"])
    monkeypatch.setattr(identity, "commit", lambda: next(commits))
    tokens = {split: tiny_tokens(600, 500, seed) for seed, split in enumerate(("train", "val", "test"))}
    for split, one in tokens.items():
        one.digest = f"digest of {split}"

    def edit_and_load(*_):
        path.write_text(text + "# a change\n", encoding="utf-8")
        return tokens

    monkeypatch.setattr(module, "load_tokens", edit_and_load)
    module.main()
    summary = json.loads((Path(module.OUT_DIR) / "summary.json").read_text(encoding="utf-8"))
    assert summary["rung_sha256"] == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert summary["commit"] == "the first"
    assert summary["tokens_sha256"] == identity.tokens_hash(tokens)
    assert cli.source_as_loaded({"__file__": str(path), "main": lambda: "loaded again"}) == text + "# a change\n"
    assert summary["code_sha256"] == identity.code_hash(text)


SAME = [("learning rate", "leaning rote, é"), ("MAX_STEPS = 2560", "MAX_STEPS = 25"),
        ("SEED = 1337\n", "SEED = 1\nNEW = 2\n"),
        ("    if TEMPERATURE == 0:\n", "    if TEMPERATURE == 1:\n"), ("\n\n\ndef draw(", "\n\n\n\ndef draw("),
        ("idx = torch.tensor([ids]", "index = torch.tensor([ids]")]  # fmt: skip
OTHER = [("torch.manual_seed(SEED)\n        model", "torch.manual_seed(1)\n        model"), (".float()", ""),
         ('"val_', '"rest_'), ("betas=(0.9, 0.999)", "betas=(0.9,0.999)"), ("import math\n", "import math, os\n"),
         ("@torch.no_grad()\ndef predictions", "def predictions"), ("range(N_LAYER)", "range(2)"),
         ("    def __init__(self):\n        super", "    def __init__(self, n=0):\n        super"), ("PATIENCE:", "3:")]


@pytest.mark.parametrize(("old", "new"), SAME)
def test_words_constants_and_sampling_do_not_change_the_code(old, new):
    """Constants are compared one by one, so that a new one leaves the results valid."""
    text = (ROOT / "v3.py").read_text(encoding="utf-8")
    assert old in text and identity.code_hash(text.replace(old, new)) == identity.code_hash(text)


@pytest.mark.parametrize(("old", "new"), OTHER)
def test_what_decides_a_loss_is_other_code(old, new):
    text = (ROOT / "v3.py").read_text(encoding="utf-8")
    assert old in text and identity.code_hash(text.replace(old, new)) != identity.code_hash(text)


def test_the_hash_of_code_holds_all_but_words():
    """What is left of a text, written out."""
    text = '''"""Words."""
import x  # why
A = B = 1
b = 2


class C:
    """Doc."""

    def f(self):
        """More
        lines."""
        return "# no comment"


@x.y
@z
def draw():
    pass


if b:
    A = 3
'''
    left = 'import x\nb = 2\nclass C:\n    def f(self):\n        return "# no comment"\nif b:\n    A = 3'
    assert identity.code_hash(text) == identity.short_hash(left)


def test_the_hash_of_the_tokens_is_that_of_all_splits():
    tokens = {split: tiny_tokens(9, 50) for split in ("train", "val", "test")}
    found = [identity.tokens_hash(tokens)]
    assert found == [None]  # the digests are not known
    for split in tokens:
        tokens[split].digest = "abc"
    for split in tokens:
        found.append(identity.tokens_hash(tokens))
        tokens[split].digest = "other"
    assert len(set(found)) == 4 and all(len(one) == 16 and int(one, 16) >= 0 for one in found[1:])


# ----------------------------------------------------------------------------------------------------------
# The rung of a model
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_of(tmp_path):
    """model_of(name): the folder of a model that says it is of the rung `name`."""

    def write(name, weights=None, constants=None):
        tokenizer, folder = BPETokenizer.load(ROOT / "data" / SMALL_VOCABULARY), tmp_path / "run"
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder / "vocabulary.json")
        torch.save({"rung": name, "model": weights or {}, "hyperparameters": constants or {}, "start": [0],
                    "fingerprint": tokenizer.fingerprint}, folder / "model.pt")  # fmt: skip
        return folder

    return write


@pytest.mark.parametrize("name", [
    "os", "sys", "antigravity", "kernels", "harness", "results.experiments", "harness.cli", "../x", "/tmp/x", "", ".",
    "__main__", "v9", "v3.py", 7, None, ["v3"], "words", "broken", "v3\0",
])  # fmt: skip
def test_nothing_but_a_rung_is_imported(name, model_of, tmp_path, monkeypatch):
    """Whatever name a model's file contains."""
    monkeypatch.syspath_prepend(tmp_path)
    leave_a_mark = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    (tmp_path / "words.py").write_text(f"{leave_a_mark}class LanguageModel: pass\n# harness.start(globals())\n")
    (tmp_path / "broken.py").write_text(f"{leave_a_mark}class LanguageModel: pass\nharness.start(globals()\n")
    (tmp_path / "x.py").write_text(leave_a_mark)
    before = {str(name): sys.modules.get(str(name))}
    with pytest.raises(harness.UserError, match="there is no rung of that name here; put the .py file that trained it"):
        harness.load(model_of(name))
    assert {str(name): sys.modules.get(str(name))} == before and not (tmp_path / "executed").exists()


def test_a_copy_of_a_rung_is_loaded(model_of, tmp_path, monkeypatch, load):
    """From a file next to the others, or wherever Python finds it; the model knows its vocabulary."""
    v3 = load("v3", N_EMBD=48, N_HEAD=3)
    weights = v3.LanguageModel(500).state_dict()
    folder = model_of("v3_mine", weights, harness.constants(vars(v3)))
    with pytest.raises(harness.UserError, match="was trained by 'v3_mine', but there is no rung of that name here"):
        harness.load(folder)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "v3_mine.py").write_text((ROOT / "v3.py").read_text(encoding="utf-8"), encoding="utf-8")
    try:
        model, tokenizer = harness.load(folder)
    finally:
        sys.modules.pop("v3_mine", None)
    assert type(model).__module__ == "v3_mine" and same_weights(model.state_dict(), weights)
    assert model.fingerprint == tokenizer.fingerprint == BPETokenizer.load(folder / "vocabulary.json").fingerprint
    (tmp_path / "v3_mine.py").write_text("import nosuchmodule\n" + (ROOT / "v3.py").read_text(encoding="utf-8"))
    with pytest.raises(ModuleNotFoundError):  # a mistake in it is not the user's: it keeps its traceback
        harness.load(folder)


def test_rungs_are_told_by_their_text():
    for path in ROOT.glob("*.py"):
        assert models.is_rung(path.read_text(encoding="utf-8")) == (path.stem[0] == "v"), path


def test_a_model_that_cannot_be_read_is_not_called_damaged(model_of, monkeypatch):
    folder = model_of("v3")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(harness.FileError, match="cannot read .*model.pt: Permission denied; let this user read it"):
        harness.load(folder)
