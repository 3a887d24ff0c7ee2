"""Models on their way to Hugging Face's transformers and back: the same function, the same tokens, or a line that says
why not."""

import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import (
    ROOT,
    SCHEMES,
    SMALL_VOCABULARY,
    V4,
    kept_weights,
    random_ids,
    random_model,
    randomize,
    same_weights,
    short_tokens,
    train,
)

import convert_hf
import harness
from bpe_tokenizer import BPETokenizer
from data import prepare

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

END = "<|endoftext|>"
VOCABULARY = ROOT / "data" / SMALL_VOCABULARY
NASTY = ["", " ", "\n\n \t x", "don't we'LL", "  1234567  ٣", "naïve Ωμέγα 漢字 हिन्दी 🙂🏽",
         "a\r\nb\u2028c\x00\x7f\xad", "<|endoftext|", "x" * 50 + " " * 50, f"one{END}two {END}{END}\n"]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Runs and models
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """No test reaches the hub, or finds what somebody has fetched from it."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def text():
    return (ROOT / "data" / "input.txt").read_text(encoding="utf-8")


def write_run(module, folder, position="rope", tokenizer=None, std=0.2):
    """A run of `module` with random weights in `folder`. Returns its model."""
    tokenizer = tokenizer or BPETokenizer.load(VOCABULARY)
    model = random_model(module, tokenizer.vocab_size, position, std)
    constants = harness.constants(vars(module)) | ({"POSITION": position} if module.__name__ == V4 else {})
    folder.mkdir(parents=True)
    tokenizer.save(folder / "vocabulary.json")
    torch.save({"rung": module.__name__, "model": model.state_dict(), "hyperparameters": constants,
                "fingerprint": tokenizer.fingerprint, "start": [0]}, folder / "model.pt")  # fmt: skip
    return model


@pytest.fixture(scope="session")
def gpt2_vocabulary(tmp_path_factory, text):
    """A folder with vocab.json and merges.txt as GPT-2 has them, made by Hugging Face's own library."""
    folder = tmp_path_factory.mktemp("vocabulary")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([text[:100_000]], vocab_size=599, special_tokens=[], show_progress=False)
    theirs.save_model(str(folder))
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps({**ids, END: len(ids)}), encoding="utf-8")
    assert len(ids) == 599
    return folder


def write_gpt2(folder, vocabulary, dtype=torch.float32, shard="1GB", **config):
    """A GPT-2 with random weights as transformers saves it in `folder`. Returns it, in float32."""
    config = {"vocab_size": 600, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, **config}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=599, eos_token_id=599))
    theirs = randomize(theirs, 0.2).to(dtype)
    theirs.save_pretrained(folder, max_shard_size=shard)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary / name, folder)
    return theirs.float().eval()


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def change_weights(folder, change):
    """Rewrite the weights of the model in `folder` after `change` was called with {name: tensor}."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def convert(*arguments):
    convert_hf.main([*map(str, arguments)])


def refusal(*arguments):
    """The one line with which the conversion is refused."""
    with pytest.raises((OSError, ValueError, ImportError)) as caught:
        convert(*arguments)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


def open_hf(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def distance(ours, theirs, size, vocab_size):
    """The largest difference of two logits, in windows of some lengths."""
    windows = [random_ids(3, T, vocab_size=vocab_size, seed=T) for T in (1, 7, size)]
    return max((ours(x) - theirs(x).logits).abs().max().item() for x in windows)


def greedy(theirs, start, n_tokens):
    theirs.generation_config.eos_token_id = None  # the rungs continue after the end of a document
    x = torch.tensor([start])
    mask = torch.ones_like(x)
    out = theirs.generate(x, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
    return out[0, len(start) :].tolist()


def assert_same_tokens(ours, theirs, texts):
    for text in texts:
        ids = ours.encode(text, ours.special_tokens)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


# ----------------------------------------------------------------------------------------------------------
# Out
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [
    {"N_HEAD": 1, "N_LAYER": 1}, {"N_HEAD": 4, "N_LAYER": 3, "DROPOUT": 0.25}, {"N_HEAD": 3, "N_EMBD": 48},
])  # fmt: skip
def test_v3_becomes_a_gpt2(shape, load, tmp_path):
    module = load("v3", BLOCK_SIZE=128, TEMPERATURE=0, **shape)
    ours = write_run(module, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    theirs, tokenizer = open_hf(tmp_path / "hf")
    assert type(theirs) is transformers.GPT2LMHeadModel and theirs.dtype == torch.float32
    assert theirs.config.resid_pdrop == theirs.config.embd_pdrop == module.DROPOUT and theirs.config.attn_pdrop == 0
    assert distance(ours, theirs, 128, 500) < 1e-5
    start = tokenizer(" The castle was")["input_ids"]
    assert greedy(theirs, start, 100) == list(module.generate(ours, start, 100))
    assert tokenizer.model_max_length == theirs.config.n_positions == 128


@pytest.mark.parametrize("shape", [
    {"N_HEAD": 1, "N_LAYER": 1}, {"N_HEAD": 4, "N_LAYER": 3, "ROPE_BASE": 500.0, "DROPOUT": 0.1},
])  # fmt: skip
@pytest.mark.parametrize("std", [0.1, 1e-3])  # short rows of the embedding feel what RMSNorm adds to the mean square
def test_v4_with_rope_becomes_an_arcee_and_comes_back(std, shape, load, tmp_path):
    module = load(V4, BLOCK_SIZE=128, TEMPERATURE=0, **shape)
    ours = write_run(module, tmp_path / "run" / "rope", std=0.1)
    with torch.no_grad():
        ours.embedding.weight.mul_(std / 0.1)
        ours.embedding.weight[7] = 0
    content = torch.load(tmp_path / "run" / "rope" / "model.pt") | {"model": ours.state_dict()}
    torch.save(content, tmp_path / "run" / "rope" / "model.pt")
    convert(tmp_path / "run", tmp_path / "hf")  # the folder of all schemes
    theirs, tokenizer = open_hf(tmp_path / "hf")
    assert type(theirs) is transformers.ArceeForCausalLM and theirs.dtype == torch.float32
    assert distance(ours, theirs, 128, 500) < 1e-5
    start = tokenizer(" The castle was")["input_ids"]
    assert greedy(theirs, start, 100) == list(module.generate(ours, start, 100))
    assert tokenizer.model_max_length == 128

    theirs.save_pretrained(tmp_path / "again")  # as transformers writes it
    shutil.copy(tmp_path / "hf" / "tokenizer.json", tmp_path / "again")
    for folder in ("hf", "again"):
        convert("--from", tmp_path / folder, tmp_path / f"run of {folder}")
        back, vocabulary = harness.load(tmp_path / f"run of {folder}" / "rope")
        x = random_ids(3, 128, vocab_size=500)
        with torch.no_grad():
            assert (back(x) - ours(x)).abs().max() < 1e-5
        with harness.override(vars(module), OUT_DIR=str(tmp_path / f"run of {folder}"), PROMPT=" The castle was"):
            assert module.main().startswith(" The castle was")  # as the conversion says
        assert back.position == "rope" and back.rope_base == module.ROPE_BASE and back.block_size == 128
        assert vocabulary.fingerprint == BPETokenizer.load(VOCABULARY).fingerprint


def test_trained_runs_become_models_and_v3_comes_back(load, tmp_path, text):
    module = load("v3", LEARNING_RATE=0.01)
    _, _, tokens = train(module)
    convert(module.OUT_DIR, tmp_path / "hf")
    theirs, tokenizer = open_hf(tmp_path / "hf")
    ours, vocabulary = harness.load(module.OUT_DIR)
    assert distance(ours, theirs, 32, 500) < 1e-5
    x = tokens["val"].ids[:32].long()
    with torch.no_grad():  # theirs shifts the labels itself
        assert abs(ours(x[None, :-1], x[None, 1:]).item() - theirs(x[None], labels=x[None]).loss.item()) < 1e-5

    convert("--from", tmp_path / "hf", tmp_path / "back")
    assert same_weights(torch.load(tmp_path / "back" / "model.pt")["model"], kept_weights(module))
    before, after = (torch.load(Path(folder) / "model.pt") for folder in (module.OUT_DIR, tmp_path / "back"))
    assert before.keys() == after.keys() and before["fingerprint"] == after["fingerprint"]
    assert (tmp_path / "back" / "vocabulary.json").read_bytes() == VOCABULARY.read_bytes()
    differ = {k for k, v in before["hyperparameters"].items() if after["hyperparameters"][k] != v}
    assert differ <= {"VOCABULARY", "OUT_DIR"}
    assert after["start"] == vocabulary.encode(END, [END])


def test_v4_as_its_main_trains_it_becomes_a_model(load, tmp_path, monkeypatch):
    module = load(V4, POSITION="alibi,rope", MAX_STEPS=4, LEARNING_RATE_ADAMW=0.1)
    tokens = short_tokens(module)
    monkeypatch.setattr(module, "load_tokens", lambda *_: {**tokens, "test": tokens["val"]})
    module.main()
    convert(module.OUT_DIR, tmp_path / "hf")
    ours, _ = harness.load(f"{module.OUT_DIR}/rope")
    theirs, tokenizer = open_hf(tmp_path / "hf")
    assert distance(ours, theirs, 32, 500) < 1e-5
    assert ours(random_ids(1, 32, vocab_size=500)).std() > 0.1  # the head has learned
    assert "POSITION=alibi" in refusal(f"{module.OUT_DIR}/alibi", tmp_path / "other")


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_the_tokenizer_goes_with_the_model(pattern, load, tmp_path, text):
    tokenizer = BPETokenizer.train(text[:50_000], 400, (END, "<|user|>"), pattern=pattern)
    write_run(load("v3"), tmp_path / "run", tokenizer=tokenizer)
    convert(tmp_path / "run", tmp_path / "hf")
    model, theirs = open_hf(tmp_path / "hf")
    assert_same_tokens(tokenizer, theirs, [text[-20_000:], *NASTY, "<|user|> hello"])
    assert theirs.eos_token_id == theirs.bos_token_id == model.config.eos_token_id == tokenizer.encode(END, [END])[0]
    assert model.generation_config.eos_token_id == theirs.eos_token_id and theirs.unk_token == END
    assert theirs.decode([0xE2, 0x82]) == tokenizer.decode([0xE2, 0x82])
    assert theirs.clean_up_tokenization_spaces is False  # else older versions decode " ." as "."
    convert("--from", tmp_path / "hf", tmp_path / "back")
    assert harness.load(tmp_path / "back")[1].fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["v3", V4])
def test_padded_batches_work_as_they_are(name, load, tmp_path):
    write_run(load(name), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    texts = [" The castle was built", " He", " In 1939 ,"]
    pipe = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [pipe(text, **settings)[0]["generated_text"] for text in texts]
    assert [out[0]["generated_text"] for out in pipe(texts, batch_size=2, **settings)] == alone
    model, tokenizer = open_hf(tmp_path / "hf")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].size(1) :]
    assert tokenizer.batch_decode(out, skip_special_tokens=True) == alone
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    for i, text in enumerate(texts):  # as the card says of logits
        one = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert (model(**batch).logits[i, : len(one)] - one).abs().max() < 1e-4


def test_the_card_has_the_figures_of_the_run(load, tmp_path):
    write_run(load("v3"), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    assert "there are no figures" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    summary = {"dataset": "wikitext-2-v1", "seed": 7, "steps": 1280, "tokens_seen": 5_242_880, "epochs": 1.724,
               "val_bpb": 1.66012, "test_bpb": 1.64, "val_word_ppl": 1376.31, "test_word_ppl": None}  # fmt: skip
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    convert(tmp_path / "run", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "1,280 steps, 5,242,880 tokens, 1.72 passes" in card
    assert "| bits per byte | 1.6601 | 1.6400 |" in card and "| word perplexity | 1,376.3 | – |" in card
    (tmp_path / "hf" / "README.md").write_text(card + "and mine", encoding="utf-8")
    assert "or was edited since" in refusal(tmp_path / "run", tmp_path / "hf")  # edited: not overwritten
    (tmp_path / "run" / "summary.json").write_text("{", encoding="utf-8")
    assert "summary.json is damaged" in refusal(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_a_model_that_transformers_has_saved_again_comes_back(pattern, load, tmp_path, text):
    tokenizer = BPETokenizer.train(text[:20_000], 300, pattern=pattern)
    write_run(load("v3"), tmp_path / "run", tokenizer=tokenizer)
    convert(tmp_path / "run", tmp_path / "hf")
    for part in open_hf(tmp_path / "hf"):
        part.save_pretrained(tmp_path / "again")
    convert("--from", tmp_path / "again", tmp_path / "back")
    before, after = (torch.load(tmp_path / run / "model.pt") for run in ("run", "back"))
    assert same_weights(before["model"], after["model"]) and before["fingerprint"] == after["fingerprint"]


def test_a_vocabulary_without_an_end_has_no_end(load, tmp_path, text):
    write_run(load("v3"), tmp_path / "run", tokenizer=BPETokenizer.train(text[:10_000], 300, ()))
    convert(tmp_path / "run", tmp_path / "hf")
    model, theirs = open_hf(tmp_path / "hf")
    assert theirs.eos_token is model.config.eos_token_id is model.generation_config.eos_token_id is None
    convert("--from", tmp_path / "hf", tmp_path / "back")
    assert torch.load(tmp_path / "back" / "model.pt")["start"] == [0]


def test_what_transformers_does_not_compute_is_refused(load, tmp_path):
    for name, why in {"v0": "bigrams", "v1": "MLP", "v1_1": "MLP", "v2": "LayerNorm comes after",
                      "v3_1": "ungated ReLU squared learns a vector for each position"}.items():  # fmt: skip
        write_run(load(name), tmp_path / name)
        message = refusal(tmp_path / name, tmp_path / "hf")
        assert message.startswith(f"{tmp_path / name} holds {name}, which") and why in message
    for scheme in SCHEMES:
        if scheme != "rope":
            write_run(load(V4), tmp_path / "schemes" / scheme, scheme)
            message = refusal(tmp_path / "schemes" / scheme, tmp_path / "hf")
            assert f"POSITION={scheme}" in message and "ReLU squared" in message
    assert "POSITION=alibi" in refusal(tmp_path / "schemes", tmp_path / "hf")  # the folder of all, and no RoPE in it
    assert "no trained model in" in refusal(tmp_path / "nowhere", tmp_path / "hf")
    (tmp_path / "v2" / "model.pt").write_bytes(b"PK")
    assert "damaged" in refusal(tmp_path / "v2", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_model_of_the_user_is_not_overwritten(load, tmp_path, gpt2_vocabulary):
    ours = write_run(load("v3"), tmp_path / "run")
    write_run(load("v3", N_LAYER=1), tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "hf")
    (tmp_path / "hf" / "writing-config.json").write_text("{")  # of a conversion that was killed
    convert(tmp_path / "run", tmp_path / "hf")  # its own it replaces
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == sorted(convert_hf.HF_FILES)
    model, tokenizer = open_hf(tmp_path / "hf")
    assert distance(ours, model, 32, 500) < 1e-5

    model.save_pretrained(tmp_path / "hf")  # as after fine-tuning
    before = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    assert "holds" in refusal(tmp_path / "run", tmp_path / "hf")
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    assert "holds todo.txt" in refusal(tmp_path / "run", tmp_path / "notes")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "run", tmp_path / "empty")
    (tmp_path / "file").touch()
    assert "cannot write to" in refusal(tmp_path / "run", tmp_path / "file")


@pytest.mark.parametrize("name", convert_hf.HF_FILES)
def test_a_full_disk_leaves_what_was_there(name, load, tmp_path, monkeypatch):
    write_run(load("v3"), tmp_path / "run")
    write_run(load("v3", N_LAYER=1), tmp_path / "other")
    convert(tmp_path / "run", tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 1 + convert_hf.HF_FILES.index(name):
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    for folder in ("hf", "new"):
        calls.clear()
        assert "No space left" in refusal(tmp_path / "other", tmp_path / folder)
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == before
    assert not any((tmp_path / "new").iterdir())


# ----------------------------------------------------------------------------------------------------------
# In
# ----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "tied": {},
    "small": {"n_head": 1, "n_layer": 1, "resid_pdrop": 0.0},
    "half": {"dtype": torch.float16, "activation_function": "gelu_pytorch_tanh", "n_head": 2, "n_inner": 128},
    "bfloat16": {"dtype": torch.bfloat16, "n_positions": 20},
    "shards": {"shard": "60KB", "n_embd": 48, "n_head": 3, "n_layer": 3},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_gpt2_becomes_a_run_of_v3(kind, load, tmp_path, gpt2_vocabulary, text):
    theirs = write_gpt2(tmp_path / "hf", gpt2_vocabulary, **PUBLISHED[kind])
    assert (kind == "shards") == (tmp_path / "hf" / convert_hf.INDEX).exists()
    convert("--from", tmp_path / "hf", tmp_path / "run")
    module = load("v3", TEMPERATURE=0)
    ours, tokenizer = harness.load(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "model.pt")
    assert {tensor.dtype for tensor in saved["model"].values()} == {torch.float32} and saved["start"] == [599]
    size = theirs.config.n_positions
    assert ours.block_size == size and ours.dropout.p == theirs.config.resid_pdrop
    assert distance(ours, theirs, size, 600) < 1e-5
    x = random_ids(2, size, vocab_size=600)
    with torch.no_grad():
        assert abs(ours(x[:, :-1], x[:, 1:]).item() - theirs(x, labels=x).loss.item()) < 1e-5
    start = tokenizer.encode(" The castle")
    n = size - len(start)
    assert list(module.generate(ours, start, n)) == greedy(theirs, start, n)
    if kind == "tied":
        reference = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "hf")
        assert_same_tokens(tokenizer, reference, [text[-20_000:], *NASTY])


def test_names_and_buffers_of_old_files_are_understood(load, tmp_path, gpt2_vocabulary):
    """GPT-2 as it was published: no prefix, no head, and the causal mask among the weights."""
    load("v3")
    theirs = write_gpt2(tmp_path / "hf", gpt2_vocabulary)

    def age(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    change_weights(tmp_path / "hf", age)
    convert("--from", tmp_path / "hf", tmp_path / "run")
    assert distance(harness.load(tmp_path / "run")[0], theirs, 32, 600) < 1e-5
    change_weights(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["wte.weight"].clone()}))
    convert("--from", tmp_path / "hf", tmp_path / "with head")
    change_weights(tmp_path / "hf", lambda t: t["lm_head.weight"].add_(1))
    assert "lm_head.weight differs from wte.weight" in refusal("--from", tmp_path / "hf", tmp_path / "odd head")


def test_a_gpt2_with_a_head_of_its_own_is_refused(load, tmp_path, gpt2_vocabulary):
    """Also where the file lacks it; one that equals the embedding is none."""
    load("v3")
    theirs = write_gpt2(tmp_path / "hf", gpt2_vocabulary, tie_word_embeddings=False)
    assert "has one matrix for both" in refusal("--from", tmp_path / "hf", tmp_path / "run")
    change_weights(tmp_path / "hf", lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in refusal("--from", tmp_path / "hf", tmp_path / "run")
    change_weights(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    convert("--from", tmp_path / "hf", tmp_path / "run")
    theirs.lm_head.weight.data.copy_(theirs.transformer.wte.weight)
    assert distance(harness.load(tmp_path / "run")[0], theirs, 32, 600) < 1e-5


def test_a_run_from_gpt2_is_continued_evaluated_and_trained(load, tmp_path, gpt2_vocabulary, text, monkeypatch, capsys):
    """What the help says of such a run can be done."""
    theirs = write_gpt2(tmp_path / "hf", gpt2_vocabulary)
    convert("--from", tmp_path / "hf", tmp_path / "run")
    assert f"python v3.py OUT_DIR={tmp_path / 'run'} PROMPT=" in capsys.readouterr().out
    arguments = (f"OUT_DIR={tmp_path / 'run'}", "PROMPT= The castle", "TEMPERATURE=0", "SAMPLE_TOKENS=12", "DEVICE=cpu")
    done = subprocess.run([sys.executable, ROOT / "v3.py", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    tokenizer = BPETokenizer.load(tmp_path / "run" / "vocabulary.json")
    start = tokenizer.encode(" The castle")
    assert done.stdout == tokenizer.decode(start + greedy(theirs, start, 12)) + "\n"

    (tmp_path / "text.txt").write_text(text[:60_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    prepare.main(["--from", "text.txt", "--to", "home", "--vocabulary", "run/vocabulary.json"])
    module = load("v3", DATA="home", VOCABULARY="bpe_vocab.json", INIT_FROM="run", N_HEAD=4, DROPOUT=0.0, MAX_STEPS=2)
    summary = module.main()
    first = json.loads((tmp_path / "v3" / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    model, _ = harness.load(tmp_path / "run")
    expected = module.evaluate(model, module.load_tokens("bpe_vocab.json", "home")["val"])["loss"]
    assert first["step"] == 0 and first["val_loss"] == expected and summary["val_loss"] < expected


# ----------------------------------------------------------------------------------------------------------
# What is refused on its way in
# ----------------------------------------------------------------------------------------------------------


def test_what_v3_does_not_compute_is_refused_with_the_name_of_the_field(tmp_path, gpt2_vocabulary):
    write_gpt2(tmp_path / "hf", gpt2_vocabulary)
    before = (tmp_path / "hf" / "config.json").read_bytes()
    for field, value in {
        "model_type": "llama", "activation_function": "gelu", "layer_norm_epsilon": 1e-6, "n_inner": 64,
        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
        "add_cross_attention": True, "quantization_config": {"bits": 4}, "vocab_size": 640, "n_head": 5, "n_embd": 0,
        "n_layer": 3, "n_positions": "32", "resid_pdrop": 1.0, "tie_word_embeddings": "no",
    }.items():  # fmt: skip
        change_config(tmp_path / "hf", **{field: value})
        message = refusal("--from", tmp_path / "hf", tmp_path / "run")
        assert {"vocab_size": "wte.weight", "n_layer": "h.2.", "n_head": "5 heads"}.get(field, field) in message, field
        (tmp_path / "hf" / "config.json").write_bytes(before)
    for odd in (None, [], {}, 7):
        change_config(tmp_path / "hf", model_type=odd)
        assert f"model_type is {odd}" in refusal("--from", tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_v4_does_not_compute_is_refused_with_the_name_of_the_field(load, tmp_path):
    write_run(load(V4), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    before = (tmp_path / "hf" / "config.json").read_bytes()
    for field, value in {
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 4,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_theta": 2.0,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}, "rope_scaling": {"factor": 2},
    }.items():  # fmt: skip
        change_config(tmp_path / "hf", **{field: value})
        message = refusal("--from", tmp_path / "hf", tmp_path / "back")
        assert field.replace("theta", "parameters") in message, field
        (tmp_path / "hf" / "config.json").write_bytes(before)
    weights = (tmp_path / "hf" / "model.safetensors").read_bytes()
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"):
        change_weights(tmp_path / "hf", lambda t: t[name][:1].mul_(1.5))
        assert name in refusal("--from", tmp_path / "hf", tmp_path / "back")
        (tmp_path / "hf" / "model.safetensors").write_bytes(weights)


def test_tensors_that_are_missing_or_odd_are_named(tmp_path, gpt2_vocabulary):
    write_gpt2(tmp_path / "hf", gpt2_vocabulary)
    path, name = tmp_path / "hf" / "model.safetensors", "transformer.h.1.mlp.c_proj.weight"
    whole = path.read_bytes()
    for change, words in (
        (lambda t: t.pop(name), "missing"),
        (lambda t: t.update({name: t[name].T.contiguous()}), "shape"),
        (lambda t: t.update({name: t[name].double()}), "float64"),
        (lambda t: t.update({name: t[name].to(torch.int8)}), "int8"),
        (lambda t: t.update({"transformer.h.2.ln_1.weight": torch.ones(32)}), "no place"),
        (lambda t: t.update({"score.weight": torch.ones(2, 32)}), "no place"),
        (lambda t: t.pop("transformer.wte.weight"), "missing"),
    ):
        change_weights(tmp_path / "hf", change)
        message = refusal("--from", tmp_path / "hf", tmp_path / "run")
        assert words in message and re.search(r"h\.1\.mlp\.c_proj|h\.2\.ln_1|score|lm_head|wte", message), message
        path.write_bytes(whole)
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "model.safetensors is damaged" in refusal("--from", tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_that_are_missing_or_damaged_are_named(load, tmp_path, gpt2_vocabulary):
    whole, run = tmp_path / "whole", tmp_path / "run"
    write_gpt2(whole, gpt2_vocabulary, shard="60KB")
    shards = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(shards) > 1
    for name in ("config.json", "vocab.json", "merges.txt", convert_hf.INDEX, shards[-1]):
        shutil.copytree(whole, tmp_path / "hf")
        (tmp_path / "hf" / name).unlink()
        assert name in refusal("--from", tmp_path / "hf", run)
        shutil.rmtree(tmp_path / "hf")
    shutil.copytree(whole, tmp_path / "hf")
    for name, content in (("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"\xff"),
                          ("config.json", b"[" * 100_000), (convert_hf.INDEX, b"{}"),
                          (convert_hf.INDEX, b'{"weight_map": {"x": "../whole/' + shards[0].encode() + b'"}}'),
                          (shards[0], b"what"), ("vocab.json", b"{}")):  # fmt: skip
        before = (tmp_path / "hf" / name).read_bytes()
        (tmp_path / "hf" / name).write_bytes(content)
        assert name in refusal("--from", tmp_path / "hf", run)
        (tmp_path / "hf" / name).write_bytes(before)
    assert "there is no folder" in refusal("--from", tmp_path / "nowhere", run)
    assert not run.exists()
    convert("--from", tmp_path / "hf", run)
    before = (run / "model.pt").read_bytes()
    assert "already holds a run" in refusal("--from", tmp_path / "hf", run)
    assert (run / "model.pt").read_bytes() == before
    (run / "model.pt").unlink()
    assert "vocabulary.json" in refusal("--from", tmp_path / "hf", run)


def test_a_vocabulary_of_another_size_is_refused(tmp_path, gpt2_vocabulary):
    for size in (608, 599):  # padded, and too small
        write_gpt2(tmp_path / str(size), gpt2_vocabulary, vocab_size=size)
        message = refusal("--from", tmp_path / str(size), tmp_path / "run")
        assert f"vocab_size is {size}" in message and "600 tokens" in message


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_not_opened(tmp_path, gpt2_vocabulary):
    write_gpt2(tmp_path / "hf", gpt2_vocabulary)
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    convert("--from", tmp_path / "hf", tmp_path / "run")  # from the weights in the same folder
    (tmp_path / "hf" / "model.safetensors").unlink()
    message = refusal("--from", tmp_path / "hf", tmp_path / "other")
    assert "save_pretrained" in message and "safetensors" in message
    assert not (tmp_path / "exploded").exists()


def test_what_is_said_of_a_pickle_works(load, tmp_path, gpt2_vocabulary):
    load("v3")
    theirs = write_gpt2(tmp_path / "hf", gpt2_vocabulary)
    torch.save(theirs.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    advice = re.search(r"AutoModelForCausalLM.*", refusal("--from", tmp_path / "hf", tmp_path / "run"))[0]
    eval(advice, {"AutoModelForCausalLM": transformers.AutoModelForCausalLM})
    convert("--from", tmp_path / "hf", tmp_path / "run")
    assert distance(harness.load(tmp_path / "run")[0], theirs, 32, 600) < 1e-5


@pytest.mark.parametrize(("name", "model", "folder"), [
    ("gpt2", "gpt2", "gpt2"), ("openai-community/gpt2", "openai-community/gpt2", "gpt2"),
    ("https://huggingface.co/openai-community/gpt2", "openai-community/gpt2", "gpt2"), ("hf://gpt2", "gpt2", "gpt2"),
    ("here/gpt2", "NAME", "FOLDER"), ("./gpt2", "NAME", "FOLDER"), ("/nowhere/a/gpt2", "NAME", "FOLDER"),
])  # fmt: skip
def test_a_name_of_the_hub_is_no_folder(name, model, folder, tmp_path, monkeypatch, gpt2_vocabulary):
    """What is said of it works: here a folder takes the place of what the download leaves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    message = refusal("--from", name, "run")
    assert f"there is no folder {name}; " in message
    files = "config.json model.safetensors tokenizer.json"
    assert f"hf download {model} {files} --local-dir {folder}" in message
    assert message.endswith(f"then name the folder {folder}") == (name != folder)
    if name == "gpt2":
        write_gpt2(tmp_path / folder, gpt2_vocabulary)
        convert("--from", folder, "run")


def test_a_model_of_the_hub_is_fetched(load, tmp_path, monkeypatch, gpt2_vocabulary):
    """Its config.json first: what cannot become a run costs no download of weights."""
    import huggingface_hub

    theirs = write_gpt2(tmp_path / "hub", gpt2_vocabulary)
    load("v3")
    asked = []

    def snapshot(name, allow_patterns, local_files_only):
        asked.append((name, len(allow_patterns) > 1, local_files_only))
        return str(tmp_path / "hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(prepare, "_hub_answers", lambda: True)
    convert("--from", "someone/gpt2", "run")
    assert asked == [("someone/gpt2", False, False), ("someone/gpt2", True, False)]
    assert distance(harness.load(tmp_path / "run")[0], theirs, 32, 600) < 1e-5
    change_config(tmp_path / "hub", model_type="llama")
    assert "model_type is 'llama'" in refusal("--from", "gpt2", "other") and len(asked) == 3

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    message = refusal("--from", "gpt2", "other")
    assert "No space left" in message and "hf download gpt2" in message


def test_a_folder_that_is_something_else_is_told(load, tmp_path):
    write_run(load("v3"), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    out = tmp_path / "out"
    assert "run holds a run, but --from takes a Hugging Face model" in refusal("--from", tmp_path / "run", out)
    assert f"not a run; import it with --from {tmp_path / 'hf'}" in refusal(tmp_path / "hf", out)
    assert "config.json is a file; name the folder" in refusal("--from", tmp_path / "hf" / "config.json", out)
    (tmp_path / "empty").mkdir()
    assert "there is no config.json in" in refusal("--from", tmp_path / "empty", out)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copytree(tmp_path / "hf", tmp_path / "odd", dirs_exist_ok=True)
        (tmp_path / "odd" / name).unlink()
        (tmp_path / "odd" / name).mkdir()
        assert str(tmp_path / "odd") in refusal("--from", tmp_path / "odd", out)
        (tmp_path / "odd" / name).rmdir()
    assert not out.exists()


@pytest.mark.parametrize("broken", ["iterdir", "exists", "read_text", "mkdir", "glob"])
def test_what_the_system_forbids_ends_in_one_line(broken, load, tmp_path, monkeypatch):
    write_run(load("v3"), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "empty").mkdir()

    def forbid(*_, **__):
        raise PermissionError(13, "Permission denied")

    for arguments in ((tmp_path / "run", tmp_path / "hf"), (tmp_path / "run", tmp_path / "new"),
                      ("--from", tmp_path / "hf", tmp_path / "back"),
                      ("--from", tmp_path / "empty", tmp_path / "back")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(Path, broken, forbid)
            try:
                convert(*arguments)
            except harness.FileError as error:
                assert "Permission denied" in str(error) or "no config.json" in str(error)
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments):
    """(exit code, standard output, what the program says as it ends) of python convert_hf.py <arguments>."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
    code = None
    try:
        runpy.run_path(str(ROOT / "convert_hf.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_the_command_explains_itself_and_ends_in_one_line(monkeypatch, capsys, tmp_path):
    code, out = command(monkeypatch, capsys, "--help")
    assert code == 0 and "--from DIR runs/gpt2" in out and "runs/v3 DIR" in out and "pip install safetensors" in out
    for arguments in ((), ("x",), ("--from", "x"), ("--from", "x", "y", "z"), ("--what",), (tmp_path, tmp_path / "hf")):
        code, out = command(monkeypatch, capsys, *arguments)
        assert code.startswith("convert_hf.py: ") and len(code.splitlines()) == 1 and out == ""  # printed, exit code 1


def test_without_safetensors_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(convert_hf, "safetensors", None)
    assert "pip install safetensors" in refusal("runs/v3", "hf")


def test_a_file_that_cannot_grow_ends_in_one_line(load, tmp_path):
    """A limit on the size of files stands for a full disk, which the libraries meet in their own ways. And transformers
    is not needed."""
    write_run(load("v3"), tmp_path / "run")
    code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
            "sys.modules['transformers'] = None; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "convert_hf.py"), tmp_path / "run", tmp_path / "hf"],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"convert_hf.py: cannot write {tmp_path / 'hf'}")
    assert len(done.stderr.splitlines()) == 1
    assert not any((tmp_path / "hf").iterdir())
