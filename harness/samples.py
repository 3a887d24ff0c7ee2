"""Text that a model writes: continuations of a prompt, and the sample at the end of a run."""

import re
import sys

import torch

from data.texts import END
from harness import cli
from harness.cli import check_constants, say
from harness.errors import UserError
from harness.models import SHAPE, build, find_model, read_model


def pieces_of(tokenizer, ids, new_ids, stop_at_end=True):
    """Yield the text of `ids` and of `new_ids`, the model's continuation, piece by piece as it arrives. Special tokens
    are not shown. The first <|endoftext|> in `new_ids` ends the text or, without `stop_at_end`, each begins a new
    paragraph."""
    special = set(range(tokenizer.vocab_size - len(tokenizer.special_tokens), tokenizer.vocab_size))
    end = tokenizer.encode(END, [END])[0] if END in tokenizer.special_tokens else None

    def shown():
        yield from (id for id in ids if id not in special)
        for id in new_ids:
            if id == end and stop_at_end:
                return
            yield from [id] if id not in special else tokenizer.encode("\n\n") if id == end else []

    return tokenizer.decode_stream(shown())


def text_of(tokenizer, ids, new_ids, stop_at_end=True):
    """All pieces of `pieces_of` as one text."""
    return "".join(pieces_of(tokenizer, ids, new_ids, stop_at_end))


def without_effect(rung, saved, vocab_size):
    """The constants on the command line, as NAME=text, that have no effect when a trained model continues a prompt.
    `saved`: the constants with which it was trained."""
    used = ["PROMPT", "OUT_DIR", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "STOP_AT_END", "SAMPLES", "SEED",
            "DEVICE"]  # fmt: skip
    used += [name for name in SHAPE if name in saved and saved[name] == rung.get(name)]  # the same as in training
    if saved.get("POSITION") in [name.strip() for name in rung.get("POSITION", "").split(",")]:
        used.append("POSITION")
    if rung["TOP_K"] >= vocab_size:
        used.remove("TOP_K")
    return [f"{name}={text}" for name, text in cli.COMMAND_LINE.items() if name not in used]


def read_prompt(prompt):
    """The text of PROMPT; if that is "-", standard input without its last line break. Raises UserError."""
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise UserError("PROMPT=- reads standard input, but that is closed; pipe a text into it")
    if sys.stdin.isatty():
        say("type the prompt; end it with Ctrl-D on a new line (on Windows: Ctrl-Z, then Enter)", error=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text; convert it first, such as with iconv -t utf-8") from None
    return re.sub(r"\r?\n\Z", "", text)


def continue_prompt(rung, *folders):
    """Print PROMPT and its continuation by the trained model in the first of `folders` that holds one, as it arrives,
    SAMPLES times. An empty prompt starts like the text that the model was trained on. Returns the text, or a list of
    texts if there are several samples."""
    check_constants(rung, notes=len(folders) == 1)  # v4 gives several folders, and has printed the notes
    folder = find_model(folders)
    saved, tokenizer = read_model(folder)
    model = build(rung, saved, tokenizer, folder)
    if idle := without_effect(rung, saved["hyperparameters"], tokenizer.vocab_size):
        cli.say_note(rung, f"PROMPT uses the trained model in {folder}: {', '.join(idle)} "
                           f"{'has' if len(idle) == 1 else 'have'} no effect on it")  # fmt: skip
    ids = tokenizer.encode(read_prompt(rung["PROMPT"]), tokenizer.special_tokens) or saved["start"]
    samples, texts = rung["SAMPLES"], []
    for k in range(samples):
        if samples > 1:
            say(f"--- {k + 1} of {samples} ---")
        torch.manual_seed(rung["SEED"] + k)
        pieces, new_ids = [], rung["generate"](model, ids, rung["SAMPLE_TOKENS"])
        for piece in pieces_of(tokenizer, ids, new_ids, rung["STOP_AT_END"]):
            say(piece, end="")
            pieces.append(piece)
        say()
        texts.append("".join(pieces))
    return texts[0] if samples == 1 else texts
