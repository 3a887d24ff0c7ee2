"""The texts that runs read: makes texts that are parts of others, and checks that compared runs read the same text."""

import importlib
import math
import shutil

import torch

from bpe_tokenizer import BPETokenizer
from data import largest_and_digest, load_tokens, token_file
from harness.errors import UserError
from harness.identity import tokens_hash
from results import store
from results.plan import EXPERIMENTS, ROOT, all_constants, owner

TENTH_SPLITS = ("val", "test", "train")  # in the order of writing


def text_of(run, constants):
    """The identity of the text that a run with these constants reads."""
    rung = importlib.import_module(run.rung)
    tokens = load_tokens(constants.get("VOCABULARY", rung.VOCABULARY), constants.get("DATA", rung.DATA))
    return {"dataset": tokens["train"].dataset, "tokens_sha256": tokens_hash(tokens)}


def steps_for(megabytes, rung, constants):
    """How many steps a run of the module `rung` needs to read so many megabytes of its training text."""
    train = load_tokens(constants.get("VOCABULARY", rung.VOCABULARY), constants.get("DATA", rung.DATA))["train"]
    step_tokens = math.prod(constants.get(name, getattr(rung, name)) for name in ("BATCH_SIZE", "BLOCK_SIZE"))
    return max(2, round(1e6 * megabytes / (step_tokens * train.n_bytes / len(train))))


def make_tenth(folder):
    """Write the token files of data/ to `folder`, with only the first tenth of the training text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BPETokenizer.load(ROOT / "data" / "bpe_vocab.json")
    for split in TENTH_SPLITS:
        content = torch.load(token_file(split, "bpe_vocab.json"), weights_only=True)
        content["dataset"] = f"a tenth of {content['dataset']}"
        if split == "train":
            content["ids"] = content["ids"][: len(content["ids"]) // 10].clone()
            text = tokenizer.decode_bytes(content["ids"].tolist())
            content |= {"n_tokens": len(content["ids"]), "n_bytes": len(text),
                        "n_words": len(text.split()) + text.count(b"\n"),
                        "digest": largest_and_digest(content["ids"].numpy())[1]}  # fmt: skip
        torch.save(content, folder / f"{split}_ids.pt")
    shutil.copyfile(ROOT / "data" / "bpe_vocab.json", folder / "bpe_vocab.json")


def prepare(runs, overrides=None):
    """Make those texts of `runs` that are parts of others. Raises OSError and ValueError if token files are missing."""
    folders = {run.constants.get("DATA", "data") for run in runs} if "DATA" not in (overrides or {}) else set()
    tenth = store.WORK / "tenth"
    if folders & {"data", "runs/experiments/tenth"}:
        load_tokens("bpe_vocab.json")
    if "runs/experiments/tenth" in folders and not (tenth / "bpe_vocab.json").exists():
        make_tenth(tenth)
    if "data" in folders and "VOCABULARY" not in (overrides or {}):
        for size in sorted({run.vocab_size for run in runs} - {0, 4096}):
            load_tokens(f"bpe_vocab_{size}.json")


def check_texts(todo, overrides, gpu=False):
    """Raises ValueError if a run of `todo`, [(run, seed)], would read another text than the results that it is compared
    with."""
    for run, seed in todo:
        name, planned = owner(run)[0], run.constants.get("DATA", "data")
        constants = all_constants(run, seed, gpu) | overrides
        done = [result["summary"] for other in EXPERIMENTS[name].runs
                if other.constants.get("DATA", "data") == planned
                for result in store.read_results(other, EXPERIMENTS[name].seeds, gpu, overrides)]  # fmt: skip
        here = constants.get("DATA", "data")
        text, names = text_of(run, constants) if done else None, {summary["dataset"] for summary in done}
        vocabulary = constants.get("VOCABULARY", importlib.import_module(run.rung).VOCABULARY)
        hashes = {summary.get("tokens_sha256") for summary in done if summary["tokenizer"] == vocabulary} - {None}
        folder = store.shown(store.result_file(run, seed, gpu, overrides).parent)
        remedy = ("prepare that text with python data/prepare.py --from DIR" if here == "data"
                  else f"remove {here}, which is made again" if here.startswith("runs/experiments/")
                  else "leave DATA out" if not overrides else f"prepare that text in {here}")  # fmt: skip
        if done and text["dataset"] not in names:
            raise UserError(f"{here} holds {text['dataset']!r}, but the runs in {folder} read "
                            f"{', '.join(map(repr, sorted(names)))}; {remedy}; or move {folder} aside to start "
                            "over")  # fmt: skip
        if text and text["tokens_sha256"] and hashes and text["tokens_sha256"] not in hashes:
            raise UserError(f"the tokens in {here} are not those that the runs in {folder} read, though both are named "
                            f"{text['dataset']!r}; {remedy}; or move {folder} aside to start over")  # fmt: skip
