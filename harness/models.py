"""Trained models: loaded from the folder of a run."""

import ast
import importlib.util
import os
import zipfile
from pathlib import Path

import torch

from bpe_tokenizer import BPETokenizer
from harness.cli import first_line, is_out_of_memory, override
from harness.distributed import like
from harness.errors import FileError, MissingFileError, UserError

SHAPE = ("VOCABULARY", "BLOCK_SIZE", "CONTEXT_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "N_HIDDEN", "POSITION", "ROPE_BASE")


class DamagedFile(UserError):
    """A file is damaged or incomplete, so it cannot be used."""


def _is_whole(path):
    """Whether the checksums in a torch file are right; torch.load does not check them. Raises OSError."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except Exception as error:  # of many kinds
            if is_out_of_memory(error):
                raise
            file.seek(0)
            while file.read(1 << 20):  # an error here comes from the disk
                pass
            return False


def read_file(path, keys):
    """The contents of a file of a run, on the CPU. Raises DamagedFile if it is damaged or incomplete, UserError if it
    lacks one of `keys` or cannot be read for another reason."""
    try:
        if not _is_whole(path):
            raise DamagedFile(f"{path} is damaged or incomplete; if it is a copy, copy it again, otherwise train again "
                              "without RESUME=True")  # fmt: skip
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in keys}
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"there is no {path}") from None
    except Exception as error:  # torch and pickle raise many kinds
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if path.is_dir():
            raise FileError(f"{path} is a folder, but a file is expected there; move the folder away") from None
        if isinstance(error, OSError):
            advice = "let this user read it" if isinstance(error, PermissionError) else "try again, or copy the folder"
            raise FileError(f"cannot read {path}: {error.strerror or error}; {advice}") from None
        why = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{path} is intact, but this version of the program does not write such files ({why}): another "
                        "program, or another version of this one or of torch, wrote it; use that one, or train again "
                        "in another OUT_DIR") from None  # fmt: skip


def set_weights(model, weights, path):
    """Give `model` the weights that were read from `path`. Raises ValueError if they belong to another model."""
    parts = model.state_dict()
    shapes = {name: part.shape for name, part in parts.items()}
    if not isinstance(weights, dict) or shapes != {name: getattr(v, "shape", None) for name, v in weights.items()}:
        raise UserError(f"the weights in {path} do not fit this model: they belong to another rung, or the model has "
                        "been changed since; choose another OUT_DIR, or train again without RESUME")  # fmt: skip
    model.load_state_dict({name: like(x, parts[name]) for name, x in weights.items()})


def find_model(folders):
    """The first of `folders` that holds a trained model, looked up in the current folder, then in the repository. The
    path of a model.pt means its folder. Raises FileNotFoundError."""
    folders = [Path(os.path.expanduser(folder)) for folder in folders]
    folders = [folder.parent if folder.name == "model.pt" and not folder.is_dir() else folder for folder in folders]
    bases = dict.fromkeys((Path.cwd(), Path(__file__).resolve().parents[1]))
    places = [base / folder for base in bases for folder in folders]
    for place in places:
        if (place / "model.pt").exists():
            return place
    below = dict.fromkeys(str(path.parent) for place in places for path in sorted(place.glob("*/model.pt")))
    advice = (f"there are models below it; choose one: {', '.join(below)}" if below
              else "train one first, or name the folder of a run that has one")  # fmt: skip
    looked = dict.fromkeys(str(base / folders[0]) for base in bases)
    raise MissingFileError(f"there is no trained model in {' or '.join(looked)}; {advice}")


def read_model(folder):
    """What `Run.save_best` wrote in `folder`: (contents of model.pt, tokenizer). Weights that are stored in 16 bits are
    widened to float32. Raises OSError and ValueError."""
    saved = read_file(folder / "model.pt", ("rung", "model", "hyperparameters", "fingerprint", "start"))
    if isinstance(saved["model"], dict):
        saved["model"] = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x
                          for name, x in saved["model"].items()}  # fmt: skip
    tokenizer = BPETokenizer.load(folder / "vocabulary.json")
    if saved["fingerprint"] != tokenizer.fingerprint:
        raise UserError(f"{folder / 'vocabulary.json'} is not the vocabulary with which the model in this folder was "
                        "trained; put that one back, or train again")  # fmt: skip
    return saved, tokenizer


def build(rung, saved, tokenizer, folder):
    """The model of a rung (its globals) with the shape and the weights of `saved`, in evaluation mode."""
    if saved["rung"] != Path(rung["__file__"]).stem:
        raise UserError(f"the model in {folder} was trained by {saved['rung']}.py, not by "
                        f"{Path(rung['__file__']).name}; use {saved['rung']}.py")  # fmt: skip
    shape = {k: v for k, v in saved["hyperparameters"].items() if k in (*SHAPE, "DROPOUT") and k in rung}
    with override(rung, **shape):
        model = rung["LanguageModel"](tokenizer.vocab_size).to(rung["DEVICE"])
    set_weights(model, saved["model"], folder / "model.pt")
    model.fingerprint = tokenizer.fingerprint  # it cannot read the ids of another vocabulary
    return model.eval()


def is_rung(source):
    """Whether `source` is that of a rung: it defines LanguageModel and, when run as a program, calls
    harness.start(globals()). The source is parsed, not executed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    calls = {ast.unparse(line) for node in tree.body if isinstance(node, ast.If) for line in node.body}
    return "LanguageModel" in classes and "harness.start(globals())" in calls


def import_rung(name, folder):
    """The globals of the rung `name`, which trained the model in `folder`. The name comes from a file, so only a rung
    is imported, never another module. Raises ValueError if Python finds no rung of that name."""
    plain = isinstance(name, str) and name != "__main__" and not set(name) & set("./\\\0:")
    try:
        spec = importlib.util.find_spec(name) if plain and name else None  # finds the file without running it
        path = Path(spec.origin)
        source = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    except (AttributeError, TypeError, ValueError, OSError):  # no such module, or one without a file
        source = ""
    if not is_rung(source):
        raise UserError(f"the model in {folder} was trained by {name!r}, but there is no rung of that name here; put "
                        "the .py file that trained it next to v0.py")  # fmt: skip
    return vars(importlib.import_module(name))


def load(folder):
    """(model, tokenizer) from the folder of a finished run of any rung, such as "runs/v3" or "runs/v4_alibi_rope/rope".

    model(idx) gives logits (B, T, V) for ids (B, T) on the DEVICE of the rung. The model has the shape with which it
    was trained, whatever the rung's constants are now. Raises FileNotFoundError if there is no model, ValueError if it
    is damaged or its rung has been changed since.
    """
    folder = find_model([folder])
    saved, tokenizer = read_model(folder)
    return build(import_rung(saved["rung"], folder), saved, tokenizer, folder), tokenizer
