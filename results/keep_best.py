"""Keep a trained model in results/best/, with its weights in bfloat16: two bytes for each.

    python results/keep_best.py RUN        copies the model of a finished run, such as runs/v4_alibi_rope/rope
    python results/keep_best.py            copies that of `python results/experiments.py best`

Then `python v4_alibi_rope.py OUT_DIR=results/best PROMPT="The history of"` writes a text without any training.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402
from data import load_tokens  # noqa: E402
from harness.errors import UserError  # noqa: E402
from harness.files import atomic_write  # noqa: E402
from harness.models import find_model, import_rung, read_file  # noqa: E402
from results.best import best_folder  # noqa: E402

FOLDER = ROOT / "results" / "best"
FILES = ("summary.json", "sample.txt", "vocabulary.json")


def keep(folder, target):
    """Copy the run in `folder` to `target`: summary, sample and vocabulary as they are, the weights in bfloat16."""
    folder, target = find_model([folder]), Path(target)
    if missing := [name for name in FILES if not (folder / name).exists()]:
        raise UserError(f"there is no {missing[0]} in {folder}: the run has not finished; continue it with RESUME=True")
    saved = read_file(folder / "model.pt", ("rung", "model", "hyperparameters", "fingerprint", "start"))
    saved["model"] = {name: x.bfloat16() for name, x in saved["model"].items()}
    target.mkdir(parents=True, exist_ok=True)
    atomic_write(target / "model.pt", lambda file: torch.save(saved, file))
    for name in FILES:
        shutil.copyfile(folder / name, target / name)


def bits_per_byte(folder):
    """Of the model in `folder` on its validation split, in windows side by side; None if its token files are absent."""
    model, _ = harness.load(folder)
    saved = read_file(Path(folder) / "model.pt", ("rung", "hyperparameters"))
    try:
        tokens = load_tokens(*(saved["hyperparameters"][name] for name in ("VOCABULARY", "DATA")))
    except (OSError, UserError):
        return None
    return import_rung(saved["rung"], folder)["evaluate"](model, tokens["val"])["bpb"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="?", default=best_folder(), help="the folder of a finished run of v4 with RoPE")
    folder = parser.parse_args(argv).run
    keep(folder, FOLDER)
    megabytes = (FOLDER / "model.pt").stat().st_size / 1e6
    harness.say(f"kept {folder} in {FOLDER.relative_to(ROOT)}, {megabytes:.1f} MB")
    if (before := bits_per_byte(folder)) is not None:
        harness.say(f"validation bits per byte {before:.5f}, with weights in bfloat16 {bits_per_byte(FOLDER):.5f}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"keep_best.py: {error}")
