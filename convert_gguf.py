"""GGUF: a model and its tokenizer in one file, for llama.cpp, Ollama and LM Studio.

    python convert_hf.py runs/v3 model.gguf                  weights as they are: F32
    python convert_hf.py runs/v3 model.gguf --dtype Q8_0     8 bits per weight, in blocks of 32 with a scale; or F16

llama.cpp computes the same functions as GPT-2 and Arcee in transformers, from the same tensors under other names. Its
own converter recognizes tokenizers by name and refuses unknown ones. This one writes the merges as they are, with
llama.cpp's name for their pattern. It needs `pip install gguf`.
"""

import contextlib

import torch

from harness.errors import UserError

try:
    import gguf
except ImportError:
    gguf = None

DTYPES = ("F32", "F16", "Q8_0")  # of matrices; vectors and learned positions stay F32, as in llama.cpp's converter
PRE = {"gpt2": "gpt-2", "gpt4": "dbrx"}  # a tokenizer's pattern: its name in llama.cpp, for tokenizer.ggml.pre
MADE_BY = "convert_hf.py"
FIELDS = {  # by architecture: a field of config.json and its name in GGUFWriter
    "gpt2": {"n_positions": "context_length", "n_embd": "embedding_length", "n_layer": "block_count",
             "n_inner": "feed_forward_length", "n_head": "head_count", "layer_norm_epsilon": "layer_norm_eps",
             "vocab_size": "vocab_size"},
    "arcee": {"max_position_embeddings": "context_length", "hidden_size": "embedding_length",
              "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
              "num_attention_heads": "head_count", "num_key_value_heads": "head_count_kv",
              "rms_norm_eps": "layer_norm_rms_eps", "head_dim": "rope_dimension_count",
              "rope_theta": "rope_freq_base", "vocab_size": "vocab_size"},
}  # fmt: skip


def neighbours(weight, n_head):
    """The weights of queries or keys (C, C) with their rows in llama.cpp's order. In a head of D rows, RoPE there
    rotates neighbours, rows 2i and 2i + 1; here it rotates rows i and i + D / 2."""
    return weight.view(n_head, 2, -1, weight.size(-1)).transpose(1, 2).reshape(weight.shape)


def gguf_tensors(config, tensors):
    """{name in GGUF: tensor} for the config and tensors from `to_gpt2` or `to_arcee`, with all matrices as (outputs,
    inputs)."""
    arch = config["model_type"]
    n_layer = config["n_layer" if arch == "gpt2" else "num_hidden_layers"]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), n_layer)
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = neighbours(tensor, config["num_attention_heads"])
        elif ".c_" in name and tensor.dim() == 2:  # a matrix in a block of GPT-2: (inputs, outputs)
            tensor = tensor.T
        result[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor.detach().contiguous()
    return result


def stored_dtype(name, tensor, dtype):
    """The name of the type in which a tensor is stored. Raises ValueError if it does not fit."""
    if tensor.dim() == 1 or name == "position_embd.weight":
        return "F32"
    if dtype == "Q8_0" and tensor.size(1) % 32:
        raise UserError(f"a row of {name} has {tensor.size(1)} numbers, but Q8_0 packs 32 at a time; use --dtype F16")
    if dtype == "F16" and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"{name} has numbers too large for F16; use --dtype F32")
    return dtype


def add_tokenizer(writer, tokenizer, end):
    """Add the vocabulary. `end`: the id of the special token that begins and ends a text, or None."""
    content = tokenizer.hf_tokenizer_json()
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    ids = content["model"]["vocab"] | special
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(PRE[tokenizer.pattern])
    writer.add_token_list(sorted(ids, key=ids.get))
    kinds = [gguf.TokenType.NORMAL] * (len(ids) - len(special)) + [gguf.TokenType.CONTROL] * len(special)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    # Without an end token, llama.cpp would use token 11, which may be a comma. Byte 255 occurs in no text.
    stop = content["model"]["vocab"]["ÿ"] if end is None else end
    writer.add_bos_token_id(stop)
    writer.add_eos_token_id(stop)
    if end is not None:
        writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)  # a prompt is encoded as it is


def write(file, name, config, tensors, tokenizer, end, dtype):
    """Write a model to an open `file`. name: of the model; config and tensors: from `to_gpt2` or `to_arcee`. Raises
    OSError, ValueError."""
    with contextlib.closing(gguf.GGUFWriter(file.name, config["model_type"])) as writer:
        writer.add_name(name)
        writer.add_quantized_by(MADE_BY)
        writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16,
                              "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[dtype])  # fmt: skip
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for field, theirs in FIELDS[config["model_type"]].items():
            getattr(writer, f"add_{theirs}")(config[field])
        add_tokenizer(writer, tokenizer, end)
        for name, tensor in gguf_tensors(config, tensors).items():
            stored = gguf.GGMLQuantizationType[stored_dtype(name, tensor, dtype)]
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def made_here(path):
    """Whether this program wrote the file `path`. Raises OSError if it cannot be read."""
    path.open("rb").close()
    try:
        field = gguf.GGUFReader(path).get_field(gguf.Keys.General.QUANTIZED_BY)
        return field is not None and field.contents() == MADE_BY
    except Exception as error:  # many kinds, if the file is not a GGUF
        if isinstance(error, MemoryError):
            raise
        return False
