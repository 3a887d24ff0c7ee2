"""Convert models to and from Hugging Face, and to GGUF: v3 is a GPT-2, v4 with RoPE is an Arcee.

    python convert_hf.py runs/v3 DIR             write a run of v3 as a GPT2LMHeadModel for transformers
    python convert_hf.py runs/v4_alibi_rope DIR  write the run with RoPE as an ArceeForCausalLM
    python convert_hf.py runs/v3 model.gguf      write either for llama.cpp, Ollama and LM Studio (convert_gguf.py)
    python convert_hf.py --from DIR runs/gpt2    make a run of v3 from a GPT-2, or a run of v4 from its own export

Export: transformers loads the folder DIR like any other model, with its tokenizer:

    model = transformers.AutoModelForCausalLM.from_pretrained("DIR")
    tokenizer = transformers.AutoTokenizer.from_pretrained("DIR")

Import: DIR is a folder with config.json, model.safetensors (or its shards) and the tokenizer, as GPT-2 is published. If
there is no such folder, DIR is the name of a model on the hub, which is downloaded.

An imported run can be used like one that was trained here:

    python v3.py OUT_DIR=runs/gpt2 PROMPT=" The castle was"
    python v3.py INIT_FROM=runs/gpt2 ...         fine-tuning: start from it, with its shape and vocabulary

A model is converted only if the result computes the same function; otherwise a line says why not. Nothing from a file
is executed: weights are read from safetensors, settings from JSON. It needs `pip install safetensors` (for GGUF
`pip install gguf`), but not transformers.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

import torch

import convert_gguf
import harness
import v3
import v4_alibi_rope as v4
from bpe_tokenizer import BPETokenizer
from data import prepare
from harness.cli import first_line, is_out_of_memory, robust_streams
from harness.errors import FileError, MissingFileError, UserError
from harness.models import find_model

try:
    import safetensors.torch
except ImportError:
    safetensors = None

END = "<|endoftext|>"  # begins and ends a text, if the vocabulary has it
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "README.md"
HF_FILES = (WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", CARD)
FETCHED = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", WEIGHTS, INDEX, "model-*.safetensors")
MADE_BY = {"made_by": "convert_hf.py"}  # in the file of the weights; lost when transformers saves the model again
RMS_EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds to the mean square by default
FIGURES = (  # of the model card: label, key of summary.json, format
    ("bits per byte", "bpb", ".4f"), ("bits per byte, overlapping windows", "bpb_sliding", ".4f"),
    ("word perplexity", "word_ppl", ",.1f"), ("word perplexity, overlapping windows", "word_ppl_sliding", ",.1f"),
    ("loss per token, nats", "loss", ".4f"), ("most likely token is right", "top_1", ".1%"),
)  # fmt: skip
CARD_TEXT = '''---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small language model: {kind}, a vocabulary of {vocab_size:,} tokens, windows of {window:,} tokens.

{trained}
```python
from transformers import pipeline

generate = pipeline("text-generation", "{name}")  # the folder
print(generate([" The castle was", " In 1939 ,"], batch_size=2, max_new_tokens=50))
```

Batches are padded on the left, as generation requires; for the logits of a batch, pad on the right
(`padding_side="right"`). Prompt and continuation together have at most {window:,} tokens. The model continues text of
the kind that it was trained on. It does not follow instructions, and what it writes is not reliable.
'''
NO_COUNTERPART = {
    "v0": "it is a table of bigrams",
    "v1": "it is an MLP over a window of tokens",
    "v1_1": "it is an MLP over a window of tokens",
    "v2": "its LayerNorm comes after each sub-layer, but GPT-2's comes before",
    "v3_1": "no decoder there with ungated ReLU squared learns a vector for each position",
    "alibi": "no decoder there with ALiBi has RMSNorm and ReLU squared",
    "sinusoidal": "no decoder there with ungated ReLU squared adds sinusoids",
    "none": "every decoder there with ungated ReLU squared encodes positions",
}


# ----------------------------------------------------------------------------------------------------------
# v3 and GPT-2
# ----------------------------------------------------------------------------------------------------------


def gpt2_tensors(V, T, C, n_layer):
    """{name in v3: (name in GPT2LMHeadModel, shape there)} for V tokens, windows of T, width C. Matrices in GPT-2's
    blocks are (inputs, outputs), but those of nn.Linear are (outputs, inputs): see `turned`."""
    table = {"embedding.weight": ("transformer.wte.weight", (V, C)),
             "position_embedding.weight": ("transformer.wpe.weight", (T, C))}  # fmt: skip
    pairs = [("norm", "transformer.ln_f", (C,))]
    for i in range(n_layer):
        pairs += [(f"blocks.{i}.{ours}", f"transformer.h.{i}.{theirs}", shape) for ours, theirs, shape in (
            ("norm_1", "ln_1", (C,)), ("attention.qkv", "attn.c_attn", (C, 3 * C)),
            ("attention.proj", "attn.c_proj", (C, C)), ("norm_2", "ln_2", (C,)),
            ("mlp.0", "mlp.c_fc", (C, 4 * C)), ("mlp.2", "mlp.c_proj", (4 * C, C)),
        )]  # fmt: skip
    for ours, theirs, shape in pairs:
        table |= {f"{ours}.weight": (f"{theirs}.weight", shape), f"{ours}.bias": (f"{theirs}.bias", shape[-1:])}
    return table


def turned(name, tensor):
    """Convert the tensor that GPT-2 calls `name` from GPT-2's layout to v3's, or back."""
    return tensor.T if ".c_" in name and tensor.dim() == 2 else tensor


def to_gpt2(model):
    """(config, {name: tensor}) of the GPT2LMHeadModel that equals a model of v3."""
    (V, C), T, n_layer = model.embedding.weight.shape, model.block_size, len(model.blocks)
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": V, "n_positions": T, "n_embd": C,
        "n_layer": n_layer, "n_head": model.blocks[0].attention.n_head, "n_inner": 4 * C,
        "activation_function": "gelu_new", "layer_norm_epsilon": model.norm.eps, "tie_word_embeddings": True,
        "resid_pdrop": model.dropout.p, "embd_pdrop": model.dropout.p, "attn_pdrop": 0.0,
    }  # fmt: skip
    state, table = model.state_dict(), gpt2_tensors(V, T, C, n_layer)
    return config, {theirs: turned(theirs, state[ours]) for ours, (theirs, _) in table.items()}


def from_gpt2(config, tensors):
    """(constants of the shape, state dict) of v3, from the config and the tensors, {name: tensor}, of a GPT-2. Raises
    ValueError if v3 would compute something else."""
    T, C, n_layer, n_head, V = [_count(config, k) for k in ("n_positions", "n_embd", "n_layer", "n_head", "vocab_size")]
    _same(config, "v3", {  # transformers' default comes first
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * C), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,), "add_cross_attention": (False,), "quantization_config": (None,),
        "pruned_heads": (None, {}), "tie_word_embeddings": (True, False),
    })  # fmt: skip
    dropout = config.get("resid_pdrop", 0.1)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"config.json: resid_pdrop is {dropout!r}; it must be a number from 0 to less than 1")
    bare, tensors = tensors, {}
    for name, tensor in bare.items():
        whole = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not whole.endswith((".attn.bias", ".attn.masked_bias")):  # old files hold the causal mask
            tensors[whole] = tensor
    head, table = tensors.pop("lm_head.weight", None), gpt2_tensors(V, T, C, n_layer)
    _check_tensors(tensors, dict(table.values()), "v3")
    if head is None and not config.get("tie_word_embeddings", True):
        raise UserError("the tensor lm_head.weight is missing, but config.json does not tie it to wte.weight; download "
                        "the model again, or choose another")  # fmt: skip
    if head is not None and not torch.equal(head.float(), tensors["transformer.wte.weight"].float()):
        raise UserError("lm_head.weight differs from wte.weight, but v3, like GPT-2, has one matrix for both; choose "
                        "another model")  # fmt: skip
    shape = {"BLOCK_SIZE": T, "N_LAYER": n_layer, "N_HEAD": n_head, "N_EMBD": C, "DROPOUT": float(dropout)}
    return shape, {ours: turned(theirs, tensors[theirs]) for ours, (theirs, _) in table.items()}


# ----------------------------------------------------------------------------------------------------------
# v4 with RoPE and Arcee
# ----------------------------------------------------------------------------------------------------------


def arcee_tensors(V, C, n_layer):
    """{name in ArceeForCausalLM: shape} for V tokens and width C."""
    shapes = {"model.embed_tokens.weight": (V, C), "lm_head.weight": (V, C), "model.norm.weight": (C,)}
    for i in range(n_layer):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (C, C) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.up_proj.weight": (4 * C, C), f"{layer}.mlp.down_proj.weight": (C, 4 * C)}
        shapes |= {f"{layer}.{x}_layernorm.weight": (C,) for x in ("input", "post_attention")}
    return shapes


def to_arcee(model):
    """(config, {name: tensor}) of the ArceeForCausalLM that equals a model of v4 with RoPE. Arcee has no norm after the
    embedding, so the rows of the embedding are written already normalized."""
    (V, C), n_layer, n_head = model.embedding.weight.shape, len(model.blocks), model.blocks[0].attention.n_head
    config = {
        "architectures": ["ArceeForCausalLM"], "model_type": "arcee", "vocab_size": V, "hidden_size": C,
        "max_position_embeddings": model.block_size, "intermediate_size": 4 * C, "num_hidden_layers": n_layer,
        "num_attention_heads": n_head, "num_key_value_heads": n_head, "head_dim": C // n_head, "hidden_act": "relu2",
        "rms_norm_eps": RMS_EPS, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "rope_theta": model.rope_base,  # its place before transformers 5
    }  # fmt: skip
    tensors = {name: torch.ones(shape) for name, shape in arcee_tensors(V, C, n_layer).items() if len(shape) == 1}
    tensors |= {"model.embed_tokens.weight": v4.norm(model.embedding.weight), "lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        parts = dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                         block.attention.qkv.weight.chunk(3)))  # fmt: skip
        parts |= {"self_attn.o_proj": block.attention.proj.weight, "mlp.up_proj": block.mlp.fc.weight,
                  "mlp.down_proj": block.mlp.proj.weight}  # fmt: skip
        tensors |= {f"model.layers.{i}.{name}.weight": part for name, part in parts.items()}
    return config, tensors


def from_arcee(config, tensors):
    """(constants of the shape, state dict) of v4, from the config and the tensors, {name: tensor}, of an Arcee that
    `to_arcee` could have made. Raises ValueError for any other."""
    T, C, n_layer, n_head, V = [_count(config, k) for k in ("max_position_embeddings", "hidden_size",
                                "num_hidden_layers", "num_attention_heads", "vocab_size")]  # fmt: skip
    _same(config, "v4", {
        "hidden_act": ("relu2",), "rms_norm_eps": (RMS_EPS,), "intermediate_size": (4 * C,),
        "num_key_value_heads": (None, n_head), "head_dim": (None, C // n_head), "attention_bias": (False,),
        "mlp_bias": (False,), "tie_word_embeddings": (False,), "quantization_config": (None,),
        "rope_scaling": (None,),
    }, must=("rms_norm_eps", "intermediate_size"))  # fmt: skip
    rope = config.get("rope_parameters")
    base = rope.get("rope_theta") if isinstance(rope, dict) else None
    plain = rope == {"rope_type": "default", "rope_theta": base} and config.get("rope_theta", base) == base
    if not plain or type(base) not in (int, float) or not 1 < base <= 1e38:
        raise UserError(f"config.json: rope_parameters is {rope!r}, but v4 computes only plain RoPE with a rope_theta "
                        "above 1; choose another model")  # fmt: skip
    _check_tensors(tensors, arcee_tensors(V, C, n_layer), "v4")
    for name, tensor in tensors.items():
        if tensor.dim() == 1 and not (tensor == 1).all():
            raise UserError(f"the weights of {name} are not all 1, but the RMSNorm of v4 has none; choose another "
                            "model")  # fmt: skip
    # Undo the norm: it turned a mean square s into m = s / (s + eps), so s = eps m / (1 - m).
    table = tensors["model.embed_tokens.weight"].double()
    m = table.square().mean(1, keepdim=True)
    if m.max() > 1 + 1e-6:
        raise UserError("rows of model.embed_tokens.weight are longer than any output of the RMSNorm of v4; "
                        "choose another model")  # fmt: skip
    state = {"embedding.weight": (table * (RMS_EPS / (1 - m).clamp(min=1e-9)).sqrt()).float(),
             "head.weight": tensors["lm_head.weight"]}  # fmt: skip
    for i in range(n_layer):
        part = {name: tensors[f"model.layers.{i}.{name}_proj.weight"] for name in (
                "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.up", "mlp.down")}  # fmt: skip
        names = ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj")
        q, k, v, *rest = part.values()
        state |= {f"blocks.{i}.{name}.weight": w for name, w in zip(names, (torch.cat([q, k, v]), *rest))}
    shape = {"BLOCK_SIZE": T, "N_LAYER": n_layer, "N_HEAD": n_head, "N_EMBD": C, "DROPOUT": 0.0, "POSITION": "rope",
             "ROPE_BASE": float(base)}  # fmt: skip
    return shape, state


# ----------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------


def _count(config, field):
    """A field of config.json that must be a positive integer. Raises ValueError."""
    value = config.get(field)
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"config.json: {field} is {value!r}; it must be a whole number of at least 1")
    return value


def _same(config, rung, allowed, must=()):
    """Raises ValueError, naming the field, if a field of config.json does not have one of its `allowed` values. Only
    fields in `must` may not be missing."""
    for field, values in allowed.items():
        if (field in config or field in must) and config.get(field) not in values:
            raise UserError(f"config.json: {field} is {config.get(field)!r}, but {rung} can only compute "
                            f"{' or '.join(map(repr, values))}; choose another model")  # fmt: skip


def _check_tensors(tensors, shapes, rung):
    """Raises ValueError, naming the tensor, if the names and shapes of `tensors` are not `shapes`, {name: shape}."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"the tensor {name} is missing; download the model again, or choose another")
        found, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if found != shape:
            raise UserError(f"the tensor {name} has the shape {found}, but config.json implies {shape}; download the "
                            "model again, or choose another")  # fmt: skip
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"the tensor {name} has the type {dtype}, but only float32, float16 and bfloat16 are read; "
                            "choose another model")  # fmt: skip
    if extra := sorted(tensors.keys() - shapes):
        raise UserError(f"{rung} has no place for the tensor {extra[0]}; choose another model")


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(path):
    """Context that turns an OSError of the system into the message that `path` cannot be read."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error}); make it readable, or name another "
                        "folder") from None  # fmt: skip


def find_folder(given):
    """The folder with config.json of the model to convert. If there is no folder `given`, it is taken as the name of a
    model on the hub, which is downloaded. Raises ValueError with advice."""
    source = Path(given)
    if (source / "config.json").exists():
        return source
    if source.is_dir():
        if (source / "model.pt").exists() or any(source.glob("*/model.pt")):
            raise UserError(f"{source} holds a run, but --from takes a Hugging Face model; to export the run, leave "
                            "out --from")  # fmt: skip
        raise MissingFileError(f"there is no config.json in {source}; name the folder that holds it, together with the "
                               "weights and the tokenizer")  # fmt: skip
    if source.exists() and source.suffix.lower() == ".gguf":
        raise UserError(f"{source} is a GGUF file, but --from takes the folder of a Hugging Face model; name that")
    if source.exists():
        raise UserError(f"{source} is a file; name the folder that holds config.json, the weights and the tokenizer")
    hub = re.fullmatch(r"(https?://huggingface\.co/|hf://)?(\w[\w.-]*(?:/\w[\w.-]*)?)/?", given)
    if hub and (hub[1] or "/" not in hub[2] or not source.parent.is_dir()):  # else a missing folder
        return fetch(given, hub[2])
    raise _missing(given, "NAME", "download a model from the hub")


def _missing(given, name, how):
    """The error for a missing folder. how: the words before the command that downloads the model `name`."""
    folder = "FOLDER" if name == "NAME" else name.rpartition("/")[2]
    then = "" if folder == given else f", then name the folder {folder}"
    return MissingFileError(f"there is no folder {given}; {how} with hf download {name} config.json model.safetensors "
                            f"tokenizer.json --local-dir {folder}{then}")  # fmt: skip


def _kind(config):
    """(rung, function that converts, subfolder of the run's folder) for a model with this config.json. Raises
    ValueError."""
    kinds = {"gpt2": (v3, from_gpt2, ""), "arcee": (v4, from_arcee, "rope")}
    if (kind := config.get("model_type")) not in [*kinds]:
        raise UserError(f"config.json: model_type is {kind!r}, but only {' or '.join(map(repr, kinds))} can become a "
                        "run; choose another model")  # fmt: skip
    return kinds[kind]


def fetch(given, name):
    """The folder of the model `name` in the cache of the hub's library; it is downloaded if needed. The weights, which
    may be large, are downloaded only if the model can become a run. given: what the user called it. Raises ValueError.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise _missing(given, name, "run pip install huggingface_hub, then download the model") from None
    offline = not prepare._hub_answers()
    try:
        for files in (FETCHED[:1], FETCHED):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files, local_files_only=offline))
            if (folder / "config.json").exists():
                _kind(_read_json(folder / "config.json"))
        return folder
    except UserError:
        raise
    except RepositoryNotFoundError:
        raise MissingFileError(f"there is no folder {given}, and the hub has no model {name}, or shows it only after a "
                               "login; name another, or run hf auth login") from None  # fmt: skip
    except Exception as error:  # many kinds: from the hub's library, the network, the disk
        if is_out_of_memory(error):
            raise
        offline = offline or isinstance(error, LocalEntryNotFoundError)
        why = "the hub cannot be reached" if offline else f"the download failed ({first_line(error)})"
        raise _missing(given, name, f"{why}; try again, or where there is a network, download it") from None


def _read_json(path):
    """The dict in a JSON file. Raises FileNotFoundError, ValueError."""
    try:
        with _reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; download or write it again")
    return content


def read_weights(folder):
    """{name: tensor} of the model in `folder`, from one file or several. Raises FileNotFoundError, ValueError."""
    place = {}  # the file of each tensor
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        place = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(place, dict) or not all(isinstance(x, str) and Path(x).name == x for x in place.values()):
            raise UserError(f"{folder / INDEX} is damaged; download or write it again")
    elif not (folder / WEIGHTS).exists():
        if any(folder.glob("*.bin")):
            raise UserError(f"the weights in {folder} are a pickle, which can run a program, so only safetensors are "
                            f"read; if you trust them, let transformers convert them: "
                            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})")
        raise MissingFileError(f"there is neither {WEIGHTS} nor {INDEX} in {folder}; download one of them")
    tensors = {}
    for file in sorted({*place.values()} or {WEIGHTS}):
        if not (folder / file).exists():
            raise MissingFileError(f"there is no {file} in {folder}, but {INDEX} names it; download it")
        try:
            with _reading(folder / file):
                tensors |= safetensors.torch.load_file(folder / file)
        except (FileError, MemoryError):
            raise
        except Exception as error:  # many kinds, if the file is damaged or newer than the library
            if "memory" in str(error):
                raise
            raise UserError(f"{folder / file} is damaged ({first_line(error)}); download or write it again") from None
    return tensors


def write_files(folder, files):
    """Write `files`, {name: function that writes to an open binary file}, in `folder`: all of them or none. Raises
    OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write to {folder}: {error.strerror}; name another folder") from None
    with harness.atomic_writes() as write_one:
        for name, write in files.items():
            write_one(folder / name, write)


def _json(content):
    return lambda file: file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def _made_here(folder):
    """Whether this program wrote the model in `folder`, and its card has not been edited since. Raises OSError."""
    card = _digest((folder / CARD).read_bytes()) if (folder / CARD).exists() else None
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            made = file.metadata() or {}
        return MADE_BY.items() <= made.items() and card in (made.get("card"), None)
    except (OSError, safetensors.SafetensorError):
        return False


# ----------------------------------------------------------------------------------------------------------
# Export and import
# ----------------------------------------------------------------------------------------------------------


def find_run(folder):
    """The folder with the model of a run. In v4's folder, which may hold several, RoPE comes first. Raises
    FileNotFoundError."""
    for place in (folder, *(f"{folder}/{scheme}" for scheme in ("rope", *v4.SCHEMES))):
        with contextlib.suppress(FileNotFoundError):
            return find_model([place])
    return find_model([folder])  # its error says where it looked


def read_run(run, program):
    """(folder, config, {name: tensor}, tokenizer) of a run, converted for `program`. Raises OSError, ValueError."""
    with _reading(run):
        if (Path(run) / "config.json").exists() and not (Path(run) / "model.pt").exists():
            raise UserError(f"{run} holds a Hugging Face model, not a run; import it with --from {run}")
        folder = find_run(run)
        model, tokenizer = harness.load(folder)
    rung = type(model).__module__
    kind = getattr(model, "position", rung)
    if kind not in ("v3", "rope"):
        name, why = rung if kind == rung else f"v4 with POSITION={kind}", NO_COUNTERPART.get(kind, "it is unknown here")
        raise UserError(f"{run} holds {name}, which no model in {program} can compute: {why}; name a run of v3, or of "
                        "v4 with POSITION=rope")  # fmt: skip
    try:
        tokenizer.hf_tokenizer_json()
    except ValueError as error:
        raise UserError(f"the vocabulary of {run} cannot be used in {program}: {error}; name another run") from None
    config, tensors = (to_gpt2 if kind == "v3" else to_arcee)(model.cpu())
    return folder, config, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, tokenizer


def end_of(tokenizer):
    """The id of the token that begins and ends a text, or None."""
    return tokenizer.encode(END, [END])[0] if END in tokenizer.special_tokens else None


def window_of(config):
    return config.get("n_positions") or config["max_position_embeddings"]


def model_card(name, run, config):
    """The text of a model's README.md, with the figures of the run in the folder `run`. Raises OSError, ValueError."""
    summary = _read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    number = {key: value for key, value in summary.items() if type(value) in (int, float)}
    trained = "Its run has no summary, so there are no figures.\n"
    if number:
        trained = (f"Trained from scratch on {summary.get('dataset')}: {number.get('steps', 0):,} steps, "
                   f"{number.get('tokens_seen', 0):,} tokens, {number.get('epochs', 0):.2f} passes over the text, seed "
                   f"{summary.get('seed')}.\n\n| | validation | test |\n| --- | ---: | ---: |\n")  # fmt: skip
        for words, key, form in FIGURES:
            cells = [f"{number[x]:{form}}" if (x := f"{split}_{key}") in number else "–" for split in ("val", "test")]
            if cells != ["–", "–"]:
                trained += f"| {words} | {' | '.join(cells)} |\n"
    return CARD_TEXT.format(name=name, trained=trained, kind=config["architectures"][0], window=window_of(config),
                            vocab_size=config["vocab_size"])  # fmt: skip


def export(run, folder):
    """Write the model of a run as a Hugging Face model in `folder`. Raises OSError, ValueError."""
    folder = Path(folder)
    with _reading(folder):
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        there -= {f"writing-{name}" for name in HF_FILES}
        ours = there <= {*HF_FILES} and _made_here(folder)
    if there and not ours:
        raise UserError(f"{folder} holds {min(there)}, which this program did not write, or was edited since; "
                        "name a new folder")  # fmt: skip
    source, config, tensors, tokenizer = read_run(run, "transformers")
    end = end_of(tokenizer)
    ids = {f"{x}_token_id": end for x in ("bos", "eos")}
    names = {f"{x}_token": END for x in ("bos", "eos", "unk", "pad") if end is not None}
    with _reading(source):
        card = model_card(folder.resolve().name, source, config).encode()
    made = {"format": "pt", **MADE_BY, "card": _digest(card)}
    write_files(folder, {
        WEIGHTS: lambda file: file.write(safetensors.torch.save(tensors, made)),
        "config.json": _json({**config, **ids, "dtype": "float32"}),
        "generation_config.json": _json({**ids, "pad_token_id": end}),
        "tokenizer.json": _json(tokenizer.hf_tokenizer_json()),
        "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", **names, "padding_side": "left",
                                        "model_max_length": window_of(config), "clean_up_tokenization_spaces": False}),
        CARD: lambda file: file.write(card),
    })  # fmt: skip
    harness.say(f"wrote {folder}, for transformers: {config['architectures'][0]}.from_pretrained({str(folder)!r})")


def export_gguf(run, path, dtype):
    """Write the model of a run as the GGUF file `path`. Raises OSError, ValueError."""
    path = Path(path)
    with _reading(path):
        if path.is_file() and not convert_gguf.made_here(path):
            raise UserError(f"{path} already exists, and this program did not write it; name another file")
    source, config, tensors, tokenizer = read_run(run, "llama.cpp")
    write_files(path.parent, {path.name: lambda file: convert_gguf.write(
        file, source.resolve().name, config, tensors, tokenizer, end_of(tokenizer), dtype)})  # fmt: skip
    harness.say(f"wrote {path}, for llama.cpp: llama-cli -m {shlex.quote(str(path))} -p \"...\"")
    if tokenizer.pattern == "gpt4":
        harness.say("llama.cpp differs from the pattern gpt4 in two rare cases: spaces after a line break at the end "
                    "of a text, and an apostrophe before ſ; all other text has the same ids")  # fmt: skip


def import_model(source, run):
    """Turn the Hugging Face model in `source` into a run in the folder `run`: a run of v3 in `run` itself, a run of v4
    in the subfolder of its scheme. Raises OSError, ValueError."""
    with _reading(source):
        source = find_folder(source)
    config = _read_json(source / "config.json")
    rung, convert, below = _kind(config)
    folder = Path(run) / below
    with _reading(folder):
        there = [name for name in harness.RUN_FILES if (folder / name).exists()]
    if there:
        raise UserError(f"{folder} already holds a run ({there[0]}); name a new folder")
    with _reading(source):
        shape, state = convert(config, read_weights(source))
        tokenizer = BPETokenizer.from_gpt2(source)
    if tokenizer.vocab_size != config["vocab_size"]:
        raise UserError(f"config.json: vocab_size is {config['vocab_size']}, but the tokenizer has "
                        f"{tokenizer.vocab_size} tokens, and a run has exactly one row for each; choose another "
                        "model")  # fmt: skip
    if shape["N_EMBD"] % shape["N_HEAD"]:
        raise UserError(f"config.json: the width {shape['N_EMBD']} is not a multiple of the {shape['N_HEAD']} heads; "
                        "choose another model")  # fmt: skip
    start = tokenizer.encode(END, [END]) if END in tokenizer.special_tokens else [0]
    content = {
        "rung": rung.__name__, "fingerprint": tokenizer.fingerprint, "start": start,
        "model": {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in state.items()},
        "hyperparameters": {**harness.constants(vars(rung)), **shape, "VOCABULARY": "vocabulary.json",
                            "OUT_DIR": str(folder)},
    }  # fmt: skip
    write_files(folder, {"vocabulary.json": lambda file: file.write(tokenizer.to_json().encode()),
                         "model.pt": lambda file: torch.save(content, file)})  # fmt: skip
    harness.say(f"wrote the run {folder}: python {rung.__name__}.py OUT_DIR={shlex.quote(str(run))} PROMPT=\"...\"")


def main(argv=None):
    what, _, how = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=what, epilog=how, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s RUN DIR  or  %(prog)s RUN FILE.gguf  or  %(prog)s --from DIR RUN")
    parser.add_argument("--from", dest="source", metavar="DIR", help="import this Hugging Face model as a run")
    parser.add_argument("--dtype", type=str.upper, choices=convert_gguf.DTYPES, help="type of the weights in a GGUF "
                        "file: F32 (as they are, the default), F16 or Q8_0")  # fmt: skip
    parser.add_argument("folders", metavar="RUN DIR", nargs="+", help="a run, and the folder or .gguf file to write "
                        "its model to; with --from, the folder of the new run")  # fmt: skip
    parser.error = lambda message: sys.exit(f"convert_hf.py: {message}; see --help")
    args = parser.parse_args(argv)
    args.folders = list(map(os.path.expanduser, args.folders))
    if len(args.folders) != (2 if args.source is None else 1):
        parser.error("name a run and a folder for the model, or, with --from, a model and a folder for the run")
    is_gguf = args.folders[-1].lower().endswith(".gguf")
    if args.source is not None and is_gguf:
        parser.error("--from writes a run, not a GGUF file: name a folder for the run")
    if args.dtype and not is_gguf:
        parser.error("--dtype is for GGUF files only: name a file that ends in .gguf, or leave --dtype out")
    if is_gguf and convert_gguf.gguf is None:
        raise UserError("writing GGUF files needs a library that is not installed; pip install gguf")
    if not is_gguf and safetensors is None:
        raise UserError("Hugging Face files need a library that is not installed; pip install safetensors")
    if is_gguf:
        export_gguf(*args.folders, args.dtype or "F32")
    elif args.source is None:
        export(*args.folders)
    else:
        import_model(os.path.expanduser(args.source), *args.folders)


if __name__ == "__main__":
    robust_streams()
    try:
        main()
    except (UserError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit(f"convert_hf.py: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
