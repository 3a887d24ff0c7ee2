"""Trained models: read from the folder of a run, and used."""

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
    """A file that is not whole, so that it is of no more use."""


def _is_whole(path):
    """Whether a file of torch has its checksums, at which torch.load does not look. Raises OSError."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except Exception as error:  # of many kinds
            if is_out_of_memory(error):
                raise
            file.seek(0)
            while file.read(1 << 20):  # an error here is one of the disk
                pass
            return False


def read_file(path, keys):
    """The contents of a file of a run, on the CPU. Raises DamagedFile if it is not whole, UserError if it is without
    one of `keys` or cannot be read for another reason."""
    try:
        if not _is_whole(path):
            raise DamagedFile(f"{path} is damaged or cut short; if it is a copy, copy it again, else train again "
                              "without RESUME=True")  # fmt: skip
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in keys}
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"there is no {path}") from None
    except Exception as error:  # torch and pickle raise many kinds
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if path.is_dir():
            raise FileError(f"{path} is a folder, and a file must be in its place; move it away") from None
        if isinstance(error, OSError):
            advice = "let this user read it" if isinstance(error, PermissionError) else "try again, or copy the folder"
            raise FileError(f"cannot read {path}: {error.strerror or error}; {advice}") from None
        why = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{path} is whole, but not what this version of the program writes ({why}); it is of another "
                        "program, or of another version of this one or of torch: use that one, or train again in "
                        "another OUT_DIR") from None  # fmt: skip


def set_weights(model, weights, path):
    """Give `model` the weights that were read from `path`. Raises ValueError if they are those of another model."""
    parts = model.state_dict()
    shapes = {name: part.shape for name, part in parts.items()}
    if not isinstance(weights, dict) or shapes != {name: getattr(v, "shape", None) for name, v in weights.items()}:
        raise UserError(f"the weights in {path} do not fit this model: they are of another rung, or the model has "
                        "been changed since; choose another OUT_DIR, or train again without RESUME")  # fmt: skip
    model.load_state_dict({name: like(x, parts[name]) for name, x in weights.items()})


def find_model(folders):
    """The first of `folders`, below the current folder or the repository, with a trained model; its model.pt stands for
    a folder. Raises FileNotFoundError."""
    folders = [Path(os.path.expanduser(folder)) for folder in folders]
    folders = [folder.parent if folder.name == "model.pt" and not folder.is_dir() else folder for folder in folders]
    bases = dict.fromkeys((Path.cwd(), Path(__file__).resolve().parents[1]))
    places = [base / folder for base in bases for folder in folders]
    for place in places:
        if (place / "model.pt").exists():
            return place
    below = dict.fromkeys(str(path.parent) for place in places for path in sorted(place.glob("*/model.pt")))
    advice = (f"it has models below it, name one: {', '.join(below)}" if below
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
        raise UserError(f"{folder / 'vocabulary.json'} is not the vocabulary that the model beside it was trained "
                        "with; put that one back, or train again")  # fmt: skip
    return saved, tokenizer


def build(rung, saved, tokenizer, folder):
    """The model of a rung (its globals) with the shape and the weights of `saved`, ready to evaluate."""
    if saved["rung"] != Path(rung["__file__"]).stem:
        raise UserError(f"the model in {folder} is of {saved['rung']}.py, not of {Path(rung['__file__']).name}")
    shape = {k: v for k, v in saved["hyperparameters"].items() if k in (*SHAPE, "DROPOUT") and k in rung}
    with override(rung, **shape):
        model = rung["LanguageModel"](tokenizer.vocab_size).to(rung["DEVICE"])
    set_weights(model, saved["model"], folder / "model.pt")
    model.fingerprint = tokenizer.fingerprint  # tokens of another vocabulary would mean nothing to it
    return model.eval()


def is_rung(source):
    """Whether a text is that of a rung: a Python file that defines LanguageModel and, started as a program, calls
    harness.start(globals()). It is not executed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    calls = {ast.unparse(line) for node in tree.body if isinstance(node, ast.If) for line in node.body}
    return "LanguageModel" in classes and "harness.start(globals())" in calls


def import_rung(name, folder):
    """The globals of the rung `name`, which the model in `folder` is of. Anything can stand in a file, so nothing is
    imported that is no rung. Raises ValueError if there is none of that name where Python looks for modules."""
    plain = isinstance(name, str) and name != "__main__" and not set(name) & set("./\\\0:")
    try:
        spec = importlib.util.find_spec(name) if plain and name else None  # finds a file, and runs nothing
        path = Path(spec.origin)
        source = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    except (AttributeError, TypeError, ValueError, OSError):  # no such module, or one without a file
        source = ""
    if not is_rung(source):
        raise UserError(f"the model in {folder} is of {name!r}, and no rung of that name is here; put the .py file "
                        "that trained it beside v0.py")  # fmt: skip
    return vars(importlib.import_module(name))


def load(folder):
    """(model, tokenizer) that a run of any rung has left in `folder`, such as "runs/v3" or "runs/v4_alibi_rope/rope".

    model(idx) gives logits (B, T, V) for ids (B, T) on the DEVICE of the rung. It has the shape that it was trained
    with, whatever the constants of the rung are. Raises FileNotFoundError if there is no model, ValueError if it is
    damaged or of a rung that has been changed since.
    """
    folder = find_model([folder])
    saved, tokenizer = read_model(folder)
    return build(import_rung(saved["rung"], folder), saved, tokenizer, folder), tokenizer
