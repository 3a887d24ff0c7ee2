"""The model in results/best: how it is kept, and that it opens everywhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from common import ROOT, V4, random_ids, short_tokens
from safetensors.torch import load_file
from test_convert import convert, write_run

import harness
from data import load_tokens
from harness.identity import code_hash
from harness.models import read_file
from results import keep_best

BEST = ROOT / "results" / "best"


def finished_run(module, folder):
    """A run with random weights in `folder`, with the files that a finished one has."""
    model = write_run(module, folder)
    for name in ("summary.json", "sample.txt"):
        (folder / name).write_text(json.dumps({"this": name}), encoding="utf-8")
    return model


def test_a_model_is_kept_in_half_the_bytes(load, tmp_path):
    model = finished_run(load(V4), tmp_path / "run")
    keep_best.keep(tmp_path / "run", tmp_path / "kept")
    assert (tmp_path / "kept/model.pt").stat().st_size < 0.6 * (tmp_path / "run/model.pt").stat().st_size
    for name in ("summary.json", "sample.txt", "vocabulary.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    kept, _ = harness.load(tmp_path / "kept")
    for name, weight in model.state_dict().items():
        assert kept.state_dict()[name].dtype == torch.float32
        assert torch.equal(kept.state_dict()[name], weight.bfloat16().float())


def test_a_kept_model_is_exported(load, tmp_path):
    """With the weights that it is kept with."""
    finished_run(load(V4), tmp_path / "run")
    keep_best.keep(tmp_path / "run", tmp_path / "kept")
    for ending in ("", ".gguf"):
        convert(tmp_path / "kept", tmp_path / f"exported{ending}")
    weights = load_file(tmp_path / "exported/model.safetensors")
    head = read_file(tmp_path / "kept/model.pt", ("model",))["model"]["head.weight"]
    assert torch.equal(weights["lm_head.weight"], head.float()) and (tmp_path / "exported.gguf").exists()


def test_a_kept_model_is_fine_tuned(load, tmp_path):
    """The first evaluation is that of the weights it starts from."""
    module = load(V4, MAX_STEPS=1, EVAL_INTERVAL=1, POSITION="rope", EXTRAPOLATION=(1,), SAMPLE_TOKENS=1,
                  INIT_FROM=str(tmp_path / "kept"))  # fmt: skip
    finished_run(module, tmp_path / "run")
    keep_best.keep(tmp_path / "run", tmp_path / "kept")
    kept, tokens = harness.load(tmp_path / "kept")[0], short_tokens(module)
    tokens["test"] = tokens["val"]
    with harness.override(vars(module), load_tokens=lambda *_: tokens):
        module.main()
    first = json.loads(next(Path(module.OUT_DIR).rglob("log.jsonl")).read_text(encoding="utf-8").splitlines()[0])
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(module.evaluate(kept, tokens["val"])["loss"], rel=1e-5)


def test_a_run_that_has_not_finished_is_not_kept(load, tmp_path):
    write_run(load(V4), tmp_path / "run")
    with pytest.raises(harness.UserError, match="no summary.json in .*run: the run has not finished"):
        keep_best.keep(tmp_path / "run", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def summary_of_best():
    return json.loads((BEST / "summary.json").read_text(encoding="utf-8"))


def test_the_model_that_comes_with_the_repository_is_small_and_of_the_rung_as_it_is():
    summary = summary_of_best()
    assert summary["code_sha256"] == code_hash((ROOT / "v4_alibi_rope.py").read_text(encoding="utf-8"))
    assert summary["n_params"] < 5.5e6 and sum(path.stat().st_size for path in BEST.iterdir()) < 11e6


def test_the_readme_has_its_figures():
    summary, text = summary_of_best(), " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    val, sliding, test = (f"{summary[name]:.1f}" for name in ("val_word_ppl", "val_word_ppl_sliding",
                                                                  "test_word_ppl"))  # fmt: skip
    assert f"| v4, windows of 512 side by side | {val} | **{test}** |" in text
    assert f"| v4, windows of 512 that slide by 64 | {sliding} |" in text and f"v4: {summary['steps']:,} steps" in text
    assert f"Dropout is {summary['hyperparameters']['DROPOUT']} in the first run" in text


def test_the_model_that_comes_with_the_repository_continues_a_prompt():
    """By the README's command, with English words."""
    import v4_alibi_rope as v4

    constants = {"OUT_DIR": "results/best", "PROMPT": "The history of", "SAMPLE_TOKENS": 60}
    with harness.override(vars(v4), **constants):
        text = v4.main()
    words = re.findall(r"[a-z]+", text)
    common = {"the", "of", "and", "in", "to", "a", "was", "is", "by", "on", "as", "for", "with", "from", "it", "that"}
    assert text.startswith("The history of") and sum(word in common for word in words) > 0.15 * len(words)


def test_the_model_that_comes_with_the_repository_is_as_good_as_its_summary_says():
    """On every tenth window of the validation split, about what the whole split gives: the run's weights were rounded
    to bfloat16, and the loss must not show it."""
    try:
        val = load_tokens("bpe_vocab.json", "data")["val"]
    except (OSError, ValueError):
        pytest.skip("data/ has no token files of WikiText-2")
    if val.dataset != "wikitext-2-v1":
        pytest.skip("data/ has another text than WikiText-2")
    model, _ = harness.load(BEST)
    windows = val.ids[: len(val.ids) // 513 * 513].view(-1, 513)[::10].long()
    with torch.no_grad():
        losses = [model(ids[None, :-1], ids[None, 1:]).item() for ids in windows]
    assert sum(losses) / len(losses) == pytest.approx(summary_of_best()["val_loss"], abs=0.1)


def test_kept_weights_compute_the_same_within_their_precision(load, tmp_path):
    model = finished_run(load(V4), tmp_path / "run")
    keep_best.keep(tmp_path / "run", tmp_path / "kept")
    ids = random_ids(1, 32, vocab_size=500)
    with torch.no_grad():
        ours, kept = (m.eval()(ids).log_softmax(-1) for m in (model, harness.load(tmp_path / "kept")[0]))
    assert 0 < (ours - kept).abs().mean() < 0.02 * ours.abs().mean()
