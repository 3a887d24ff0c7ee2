"""A run as a GGUF file: by the rules of llama.cpp it computes the same function and has the same tokens, or a line says
why not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import ROOT, SCHEMES, V4, random_ids
from test_convert import END, NASTY, convert, refusal, write_run

import convert_gguf
from bpe_tokenizer import PRETOKENS, BPETokenizer

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # what llama.cpp does for "dbrx", in llama-vocab.cpp


def read(path):
    """({field: value}, {name: tensor as stored, dequantized}, {name: its type}) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def gpt2_logits(fields, t, ids):
    """As in llama.cpp's models/gpt2.cpp, for one window."""
    C, H, eps = (fields[f"gpt2.{x}"] for x in ("embedding_length", "attention.head_count",
                                               "attention.layer_norm_epsilon"))  # fmt: skip
    linear = lambda x, name: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (C,), t[f"{name}.weight"], t[f"{name}.bias"], eps)  # noqa: E731
    x = t["token_embd.weight"][ids] + t["position_embd.weight"][: len(ids)]
    for i in range(fields["gpt2.block_count"]):
        y = linear(norm(x, f"blk.{i}.attn_norm"), f"blk.{i}.attn_qkv")
        q, k, v = y.view(len(ids), 3, H, -1).permute(1, 2, 0, 3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(ids), C)
        x = x + linear(y, f"blk.{i}.attn_output")
        hidden = F.gelu(linear(norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up"), approximate="tanh")
        x = x + linear(hidden, f"blk.{i}.ffn_down")
    return norm(x, "output_norm") @ t["token_embd.weight"].T


def arcee_logits(fields, t, ids):
    """As in llama.cpp's models/arcee.cpp, for one window; its RoPE turns neighbouring pairs."""
    C, H, eps, base, D = (fields[f"arcee.{x}"] for x in (
        "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon", "rope.freq_base",
        "rope.dimension_count"))  # fmt: skip
    norm = lambda x, name: F.rms_norm(x, (C,), t[f"{name}.weight"], eps)  # noqa: E731
    angles = torch.arange(len(ids))[:, None] * base ** (-torch.arange(0, D, 2) / D)  # (T, D / 2)
    turn = torch.polar(torch.ones_like(angles), angles)
    x = t["token_embd.weight"][ids]
    for i in range(fields["arcee.block_count"]):
        y = norm(x, f"blk.{i}.attn_norm")
        q, k, v = ((y @ t[f"blk.{i}.attn_{x}.weight"].T).view(len(ids), H, D).transpose(0, 1) for x in "qkv")
        q, k = (torch.view_as_real(torch.view_as_complex(x.reshape(H, len(ids), -1, 2)) * turn).flatten(2)
                for x in (q, k))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(ids), C)
        x = x + y @ t[f"blk.{i}.attn_output.weight"].T
        hidden = F.relu(norm(x, f"blk.{i}.ffn_norm") @ t[f"blk.{i}.ffn_up.weight"].T) ** 2
        x = x + hidden @ t[f"blk.{i}.ffn_down.weight"].T
    return norm(x, "output_norm") @ t["output.weight"].T


@pytest.mark.parametrize(("name", "arch", "logits"), [("v3", "gpt2", gpt2_logits), (V4, "arcee", arcee_logits)])
@pytest.mark.parametrize("shape", [{"N_HEAD": 1, "N_LAYER": 1}, {"N_HEAD": 4, "N_LAYER": 3}])
def test_a_gguf_computes_the_same(name, arch, logits, shape, load, tmp_path):
    constants = {**shape, "N_EMBD": 64, **({"ROPE_BASE": 500.0} if name == V4 else {})}
    ours = write_run(load(name, **constants), tmp_path / "run", std=0.1)
    convert(tmp_path / "run", tmp_path / "model.gguf")
    fields, tensors, types = read(tmp_path / "model.gguf")
    assert set(types.values()) == {"F32"}
    ids = random_ids(1, 32, vocab_size=500)
    with torch.no_grad():
        assert (logits(fields, tensors, ids[0]) - ours(ids)[0]).abs().max() < 1e-4
    assert fields["general.architecture"] == arch and fields["general.name"] == "run"
    assert {k.partition(".")[2]: v for k, v in fields.items() if k.startswith(arch) and "rope" not in k} == {
        "context_length": 32, "embedding_length": 64, "feed_forward_length": 256, "vocab_size": 500,
        "block_count": shape["N_LAYER"], "attention.head_count": shape["N_HEAD"],
        **({"attention.layer_norm_epsilon": pytest.approx(1e-5)} if arch == "gpt2" else {
            "attention.head_count_kv": shape["N_HEAD"],
            "attention.layer_norm_rms_epsilon": pytest.approx(torch.finfo(torch.float32).eps)}),
    }  # fmt: skip
    assert fields["general.file_type"] == 0


@pytest.mark.parametrize("name", ["v3", V4])
def test_matrices_are_stored_in_fewer_bits(name, load, tmp_path):
    write_run(load(name), tmp_path / "run")
    read_as = {}
    for dtype, kind in (("F32", 0), ("F16", 1), ("Q8_0", 7)):
        convert(tmp_path / "run", tmp_path / f"{dtype}.gguf", "--dtype", dtype.lower())
        fields, read_as[dtype], types = read(tmp_path / f"{dtype}.gguf")
        assert fields["general.file_type"] == kind and fields["general.quantization_version"] == 2
        for part, tensor in read_as["F32"].items():
            matrix = tensor.dim() == 2 and part != "position_embd.weight"
            assert types[part] == (dtype if matrix else "F32")
            if dtype == "F16" and matrix:
                assert torch.equal(read_as["F16"][part], tensor.half().float())
            elif matrix and dtype == "Q8_0":  # half a step of the scale of a block, which is itself in 16 bits
                step = tensor.view(-1, 32).abs().amax(1, keepdim=True) / 127
                assert ((read_as[dtype][part] - tensor).view(-1, 32).abs() <= 0.57 * step).all()
            else:
                assert torch.equal(read_as[dtype][part], tensor)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_the_tokens_of_a_gguf_are_the_same(pattern, load, tmp_path, capsys):
    text = (ROOT / "data" / "input.txt").read_text(encoding="utf-8")
    ours = BPETokenizer.train(text[:50_000], 400, (END, "<|user|>"), pattern=pattern)
    write_run(load("v3"), tmp_path / "run", tokenizer=ours)
    convert(tmp_path / "run", tmp_path / "model.gguf")
    assert ("end of a text" in capsys.readouterr().out) == (pattern == "gpt4")
    fields, _, _ = read(tmp_path / "model.gguf")
    get = lambda name: fields.get(f"tokenizer.ggml.{name}")  # noqa: E731
    assert get("model") == "gpt2" and get("pre") == {"gpt2": "gpt-2", "gpt4": "dbrx"}[pattern]
    assert get("token_type") == [1] * 398 + [3] * 2 and get("tokens")[398:] == [END, "<|user|>"]
    assert [get(f"{x}_token_id") for x in ("bos", "eos", "padding")] == [398] * 3 and get("add_bos_token") is False
    vocabulary = {token: id for id, token in enumerate(get("tokens")[:398])}
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    theirs.pre_tokenizer = plain if pattern == "gpt2" else tokenizers.pre_tokenizers.Sequence([split, plain])
    for sample in (text[-20_000:], *NASTY):
        assert theirs.encode(sample).ids == ours.encode(sample), sample[:50]
    pieces = [piece for piece, _ in theirs.pre_tokenizer.pre_tokenize_str("a\n  ")]
    assert len(pieces) == len(PRETOKENS[pattern].findall("a\n  ")) + (pattern == "gpt4")  # as the line says


def test_without_an_end_no_text_ends_it(load, tmp_path):
    """llama.cpp would take token 11, a line break of sorts or a comma."""
    write_run(load("v3"), tmp_path / "run", tokenizer=BPETokenizer.train("ab ab", 258, ()))
    convert(tmp_path / "run", tmp_path / "model.gguf")
    fields, _, _ = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.bos_token_id"] == 255
    assert "tokenizer.ggml.padding_token_id" not in fields and len(fields["tokenizer.ggml.tokens"]) == 258


def test_what_llama_cpp_does_not_compute_is_refused(load, tmp_path):
    target = tmp_path / "model.gguf"
    for name in ("v0", "v1", "v1_1", "v2", "v3_1"):
        write_run(load(name), tmp_path / name)
        message = refusal(tmp_path / name, target)
        assert message.startswith(f"{tmp_path / name} holds {name}, which no model in llama.cpp can compute")
    for scheme in set(SCHEMES) - {"rope"}:
        write_run(load(V4), tmp_path / "schemes" / scheme, scheme)
        assert f"POSITION={scheme}, which no model in llama.cpp" in refusal(tmp_path / "schemes" / scheme, target)
    write_run(load("v3", N_EMBD=48, N_HEAD=3), tmp_path / "odd")
    assert "use --dtype F16" in refusal(tmp_path / "odd", target, "--dtype", "Q8_0")
    assert "no trained model in" in refusal(tmp_path / "nowhere", target)
    assert not target.exists()
    convert(tmp_path / "odd", target, "--dtype", "F16")


def test_a_file_of_the_user_is_not_overwritten(load, tmp_path, monkeypatch):
    write_run(load("v3"), tmp_path / "run")
    target = tmp_path / "new" / "model.gguf"
    convert(tmp_path / "run", target)
    before = target.read_bytes()
    convert(tmp_path / "run", target, "--dtype", "F16")  # its own it replaces
    assert target.read_bytes() != before
    theirs = gguf.GGUFWriter(target, "gpt2")
    for step in (theirs.write_header_to_file, theirs.write_kv_data_to_file, theirs.write_tensors_to_file, theirs.close):
        step()
    for content in (target.read_bytes(), b"", b"notes", before[:500]):
        target.write_bytes(content)
        assert "did not write it" in refusal(tmp_path / "run", target)
        assert target.read_bytes() == content
    target.unlink()
    target.mkdir()
    assert "is a folder" in refusal(tmp_path / "run", target)


def test_a_full_disk_leaves_the_gguf_that_was_there(load, tmp_path, monkeypatch):
    write_run(load("v3"), tmp_path / "run")
    target = tmp_path / "model.gguf"
    convert(tmp_path / "run", target)
    before = target.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    assert "No space left" in refusal(tmp_path / "run", target, "--dtype", "F16")
    assert target.read_bytes() == before and not list(tmp_path.glob("writing-*"))


def test_the_command_line_of_a_gguf(load, tmp_path, monkeypatch):
    for arguments, words in (
        (("runs/v3", "folder", "--dtype", "F16"), "--dtype is for GGUF"),
        (("runs/v3", "model.gguf", "--dtype", "Q4"), "invalid choice: 'Q4'"),
        (("--from", "gpt2", "model.gguf"), "--from writes a run"),
    ):
        with pytest.raises(SystemExit) as end:
            convert(*arguments)
        assert words in end.value.code and len(end.value.code.splitlines()) == 1
    (tmp_path / "model.gguf").touch()
    assert "is a GGUF file, but --from takes" in refusal("--from", tmp_path / "model.gguf", tmp_path / "run")
    monkeypatch.setattr(convert_gguf, "gguf", None)
    assert "pip install gguf" in refusal("runs/v3", "model.gguf")
