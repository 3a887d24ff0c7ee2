"""What a model writes: continuations of a prompt, and the sample at the end of a run."""

import re
import sys

import torch

from data.texts import END
from harness import cli
from harness.cli import check_constants, say
from harness.errors import UserError
from harness.models import SHAPE, build, find_model, read_model


def pieces_of(tokenizer, ids, new_ids, stop_at_end=True):
    """The text of `ids` and of `new_ids`, which the model makes of them, piece by piece as it comes. Special tokens
    are no text: none is shown. At the first <|endoftext|> of `new_ids` it stops, or else begins a new paragraph."""
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
    """All pieces as one text."""
    return "".join(pieces_of(tokenizer, ids, new_ids, stop_at_end))


def without_effect(rung, saved, vocab_size):
    """The constants of the command line, as NAME=text, that do not matter to a model that continues a text. `saved`:
    the constants that it was trained with."""
    used = ["PROMPT", "OUT_DIR", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "STOP_AT_END", "SAMPLES", "SEED",
            "DEVICE"]  # fmt: skip
    used += [name for name in SHAPE if name in saved and saved[name] == rung.get(name)]  # repeated, as it was trained
    if saved.get("POSITION") in [name.strip() for name in rung.get("POSITION", "").split(",")]:
        used.append("POSITION")
    if rung["TOP_K"] >= vocab_size:
        used.remove("TOP_K")
    return [f"{name}={text}" for name, text in cli.COMMAND_LINE.items() if name not in used]


def read_prompt(prompt):
    """The text of PROMPT: of "-" what standard input holds, without the end of its last line. Raises UserError."""
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise UserError("PROMPT=- reads standard input, which is closed; pipe a text into it")
    if sys.stdin.isatty():
        say("write the prompt; Ctrl-D at the start of a line ends it (on Windows Ctrl-Z and Enter)", error=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("standard input is no UTF-8 text; convert it first, for example with iconv -t utf-8") from None
    return re.sub(r"\r?\n\Z", "", text)


def continue_prompt(rung, *folders):
    """Print PROMPT and, as it comes, what the trained model in the first of `folders` that has one makes of it, SAMPLES
    times. An empty prompt begins as the text that the model was trained on. Returns the text; of several samples a
    list."""
    check_constants(rung, notes=len(folders) == 1)  # v4, which has several, has checked them
    folder = find_model(folders)
    saved, tokenizer = read_model(folder)
    model = build(rung, saved, tokenizer, folder)
    if idle := without_effect(rung, saved["hyperparameters"], tokenizer.vocab_size):
        cli.say_note(rung, f"PROMPT takes the model in {folder} as it is: {', '.join(idle)} "
                           f"{'has' if len(idle) == 1 else 'have'} no effect")  # fmt: skip
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
