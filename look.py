"""What trained models think of a text: how much each token surprises them, and what they expected instead.

    python look.py "The castle was built in the 12th century." runs/v0 runs/v2 runs/v4_alibi_rope
    python look.py --file novel.txt runs/v3     the text of a file
    cat novel.txt | python look.py - runs/v3    the text of standard input

It prints bits per byte, word perplexity and total bits for each model, and writes look.html (or --to FILE), a page to
open in a browser. The page shows the text once for each model, with each token colored by its surprise. Point at a
token to see what the model expected; click on a token of a transformer to see what its heads attend to. For a long
text, the page shows the passages that surprise the models most.

The text is placed after a line break, or after <|endoftext|> if the model's documents begin with that, so that its
first token is predicted, too. A text longer than the model's window is read in windows that overlap by half. Each token
is scored in the first window that predicts it, so it has at least half a window of context, except near the start.

In Python:

    model, tokenizer = harness.load("runs/v3")
    weights = look.attention_weights(model, torch.tensor([tokenizer.encode("The castle was built in")]))
"""

import argparse
import base64
import codecs
import contextlib
import json
import math
import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path

import harness
import numpy as np
import torch
from tqdm import tqdm

from harness import models
from harness.cli import is_out_of_memory, robust_streams, say
from harness.errors import FileError, MissingFileError, UserError

WHOLE = 500  # tokens: for a longer text, the page shows only passages
PASSAGES, PASSAGE = 5, 100  # how many passages, and about how many tokens in each
LIKELIEST = 10  # most likely tokens that the page lists for each position
UNITS = 65535  # attention weights on the page are 16-bit numbers: this one means 1
TEMPLATE = Path(__file__).absolute().with_name("look.html.in")


@torch.no_grad()
def attention_weights(model, idx):
    """The attention weights of each token (row) over all tokens (columns), in every layer and head of a transformer
    (v2 to v4): (N_LAYER, B, H, T, T) for ids `idx` (B, T).

    The output of attention is a weighted mean of the values. So if the values are replaced by unit vectors, for D
    tokens at a time, the output of each head is D columns of its weights. Queries, keys, positions and the causal mask
    are not touched, so this works for every kind of attention here.
    """
    model.eval()
    inputs, found = [], []
    modules = [block.attention for block in model.blocks]
    hooks = [module.register_forward_pre_hook(lambda module, args: inputs.append(args)) for module in modules]
    model(idx)
    for hook in hooks:
        hook.remove()
    (B, T), H = idx.shape, modules[0].n_head
    for module, args in zip(modules, inputs):
        D, columns = module.proj.in_features // H, []
        for start in range(0, T, D):
            values = torch.eye(T, device=idx.device)[:, start : start + D]  # (T, D): unit vectors
            values = torch.nn.functional.pad(values, (0, D - values.size(1))).repeat(1, H)  # (T, C), all heads alike

            def replace_values(module, args, output, values=values):
                return torch.cat([output[..., : -values.size(1)], values.to(output.dtype).expand(B, -1, -1)], -1)

            hooks = [module.qkv.register_forward_hook(replace_values),
                     module.proj.register_forward_pre_hook(lambda module, args: columns.append(args[0]))]  # fmt: skip
            module(*args)
            for hook in hooks:
                hook.remove()
        heads = [column.view(B, T, H, D).transpose(1, 2) for column in columns]  # (B, H, T, D)
        found.append(torch.cat(heads, -1)[..., :T])
    return torch.stack(found)


# ----------------------------------------------------------------------------------------------------------
# Reading a text with a model
# ----------------------------------------------------------------------------------------------------------


def windows(n, size):
    """Yield windows of at most `size` out of n tokens, as (start, new, stop): a window holds the tokens `start` to
    `stop` - 1, and no earlier window holds those from `new`. They overlap by half."""
    start = new = 0
    while new < n:
        stop = min(start + size, n)
        yield start, new, stop
        start, new = start + max(1, size // 2), stop


def size_of(text, special_tokens):
    """(bytes, words) of a text as data/prepare.py counts them: special tokens separate documents and do not count. The
    words are 0 if white space does not separate words."""
    from data import BYTES_PER_WORD

    names = sorted(special_tokens, key=len, reverse=True)
    documents = re.split("|".join(map(re.escape, names)), text) if names else [text]
    n_bytes = sum(len(document.encode()) for document in documents)
    n_words = sum(len(document.split()) + document.count("\n") for document in documents)
    return n_bytes, n_words if n_bytes <= BYTES_PER_WORD * n_words else 0


class Reading:
    """A text, read by the model in the folder `name`.

    `ids` (N,): one token before the text, then the tokens of the text. `bits` (N,): the surprise of each token, -log2
    of its probability; 0 for the first. `ends` (N,): where the bytes of each token end in the text.
    """

    def __init__(self, name, text):
        folder = models.find_model([name])
        saved, self.tokenizer = models.read_model(folder)
        self.name, self.rung, special = name, saved["rung"], self.tokenizer.special_tokens
        self.model = models.build(models.import_rung(self.rung, folder), saved, self.tokenizer, folder)
        self.first_special = self.tokenizer.vocab_size - len(special)
        own_start = len(saved["start"]) == 1 and saved["start"][0] >= self.first_special
        before = saved["start"] if own_start else self.tokenizer.encode("\n")
        self.ids = torch.tensor([*before, *self.tokenizer.encode(text, special)])
        self.ends = np.cumsum([0, *(len(self.tokenizer.token_bytes(id)) for id in self.ids[1:].tolist())])
        self.bits = self._surprise()
        total = self.bits.sum().item()
        if not math.isfinite(total):
            raise UserError(f"the probabilities from the model in {folder} are not finite; train it again, with a "
                            "lower LEARNING_RATE")  # fmt: skip
        n_bytes, n_words = size_of(text, special)
        self.figures = {
            "bits_per_byte": total / n_bytes if n_bytes else None,
            "word_perplexity": math.exp(min(total * math.log(2) / n_words, 700)) if n_words else None,
            "bits": total, "tokens": len(self.ids) - 1, "bytes": n_bytes, "words": n_words,
            "window": self.model.block_size, "vocabulary": self.tokenizer.vocab_size,
        }  # fmt: skip

    @torch.no_grad()
    def _log_probabilities(self, start, new, stop):
        """Log-probabilities of the token after each of the tokens `new` to `stop` - 1, in the window from `start`:
        (stop - new, V)."""
        idx = self.ids[None, start:stop].to(next(self.model.parameters()).device)
        return self.model(idx)[0, new - start :].float().log_softmax(-1).cpu()

    def _surprise(self):
        bits, N = torch.zeros(len(self.ids), dtype=torch.double), len(self.ids)
        hidden = N <= WHOLE or not sys.stderr.isatty()
        with tqdm(total=N, desc=self.name, unit="token", leave=False, disable=hidden) as bar:
            for start, new, stop in windows(N, self.model.block_size):
                targets = self.ids[new + 1 : stop + 1, None]  # (n, 1); the last token of the text has none
                log_p = self._log_probabilities(start, new, stop)[: len(targets)]
                bits[new + 1 : new + 1 + len(targets)] = -log_p.gather(1, targets)[:, 0].double() / math.log(2)
                bar.update(stop - new)
        return bits

    def tokens_of(self, start, stop):
        """(i, j): the tokens i to j - 1 start within the bytes `start` to `stop` of the text."""
        begins = self.ends[:-1]  # where each token starts, without the one before the text
        return tuple((np.searchsorted(begins, [start, stop]) + 1).tolist())

    def passage(self, i, j):
        """What the page shows about the tokens i to j - 1."""
        top, ranks, attention = [], [], []
        for start, new, stop in windows(len(self.ids), self.model.block_size):
            first, last = max(new, i - 1), min(stop, j)  # the token after i - 1 is token i
            if first >= last:
                continue
            targets = self.ids[first + 1 : min(last + 1, j), None]
            log_p = self._log_probabilities(start, new, stop)[first - new :][: len(targets)]
            ranks += (1 + (log_p > log_p.gather(1, targets)).sum(1)).tolist()
            likeliest = (x.tolist() for x in log_p.exp().topk(min(LIKELIEST, log_p.size(1))))
            top += [[(id, float(f"{p:.6g}")) for p, id in zip(*row)] for row in zip(*likeliest)]
            if hasattr(self.model, "blocks"):
                idx = self.ids[None, start:stop].to(next(self.model.parameters()).device)
                weights = attention_weights(self.model, idx).cpu().flatten(0, 2).double().numpy()  # (heads, T, T)
                attention += [attention_row(weights[:, q - start], start, i, q) for q in range(max(first, i), last)]
        ids = self.ids[i:j].tolist()
        return {
            "before": self.shown(self.ids[0].item())[0] if i == 1 else None, "n_before": i - 1,
            "ids": ids, "bits": [round(bits, 4) for bits in self.bits[i:j].tolist()], "ranks": ranks, "top": top,
            "completed": self._completed(ids), "attention": packed(attention) if attention else None,
        }  # fmt: skip

    def _completed(self, ids):
        """{k: the character whose last bytes are in token k}, for characters that are spread over several tokens."""
        decoder, found = codecs.getincrementaldecoder("utf-8")("ignore"), {}
        for k, id in enumerate(ids):
            begun, data = decoder.getstate()[0], self.tokenizer.token_bytes(id)
            text = decoder.decode(data)
            if begun and text:
                found[k] = visible(text[0])
        return found

    def shown(self, id):
        """(text to show for a token, its kind: "text", "bytes" if it is not whole characters, or "special")."""
        data = self.tokenizer.token_bytes(id)
        if id >= self.first_special:
            return visible(data.decode()), "special"
        with contextlib.suppress(UnicodeDecodeError):
            return visible(data.decode()), "text"
        return visible(data.decode(errors="backslashreplace")), "bytes"

    def for_page(self, spans):
        """What the page shows about this model, for passages given as `spans` of bytes, (start, stop)."""
        passages = [self.passage(*self.tokens_of(*span)) for span in spans]
        used = {id for p in passages for id in [*p["ids"], *(id for top in p["top"] for id, _ in top)]}
        blocks = getattr(self.model, "blocks", ())
        heads = blocks[0].attention.n_head if len(blocks) else 0
        return {"name": self.name, "rung": self.rung, "layers": len(blocks), "heads": heads, **self.figures,
                "shown": {id: self.shown(id) for id in sorted(used)}, "passages": passages}  # fmt: skip


def attention_row(weights, start, i, q):
    """The attention of token q in each head, (heads, q - i + 2): first its sum over all tokens before token i, then the
    weights of the tokens i to q. `weights` (heads, T): over the tokens of the window from `start`."""
    row = np.zeros((len(weights), q - i + 2))
    row[:, 0] = weights[:, : max(0, i - start)].sum(1)
    row[:, 1 + max(0, start - i) :] = weights[:, max(0, i - start) : q - start + 1]
    return row


def packed(rows):
    """The rows of all queries, head by head, as 16-bit numbers in base64: each is within 1 / UNITS of its weight,
    and each row sums to UNITS."""
    whole = []
    for row in rows:
        exact = row / row.sum(1, keepdims=True) * UNITS
        units = np.floor(exact)
        missing = UNITS - units.sum(1, keepdims=True)
        order = np.argsort(np.argsort(units - exact, axis=1), axis=1)  # 0 where rounding down cut off most
        whole.append(units + (order < missing))
    return base64.b64encode(np.concatenate(whole, axis=1).astype("<u2").tobytes()).decode()


def visible(text):
    """`text` with a symbol or code in place of each invisible character, except spaces and line breaks."""
    def one(c):
        if c in " \n" or unicodedata.category(c) not in ("Cc", "Cf", "Cn", "Co", "Zs", "Zl", "Zp"):
            return c
        return {"\t": "⇥", "\r": "␍"}.get(c, f"U+{ord(c):04X}")

    return "".join(map(one, text))


# ----------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------


def pieces(data, size):
    """Cut a text (UTF-8 bytes) into spans of about `size` bytes: after a line break, else before a space, else between
    two characters."""
    start = 0
    while start < len(data):
        stop = start + size
        if stop + size // 2 >= len(data):
            stop = len(data)  # avoids a short span at the end
        elif (line := data.rfind(b"\n", start + size // 2, stop)) >= 0:
            stop = line + 1
        elif (space := data.rfind(b" ", start + size // 2, stop)) >= 0:
            stop = space
        else:
            while stop < len(data) and data[stop] & 0xC0 == 0x80:  # within a character
                stop += 1
        yield start, stop
        start = stop


def choose_passages(data, readings):
    """[(start, stop, bits per byte), ...], the passages for the page in bytes of the text: the whole of a short text,
    otherwise the passages with the most bits per byte, averaged over all models."""
    def surprise(start, stop):
        bits = sum(r.bits[slice(*r.tokens_of(start, stop))].sum().item() for r in readings)
        return bits / len(readings) / (stop - start)

    most = max(len(reading.ids) for reading in readings)
    if most <= WHOLE:
        return [(0, len(data), surprise(0, len(data)))]
    spans = [(*span, surprise(*span)) for span in pieces(data, max(1, PASSAGE * len(data) // most))]
    return sorted(spans, key=lambda span: -span[2])[:PASSAGES]


def make_page(text, readings):
    """The page, as a str."""
    data = text.encode()
    chosen = choose_passages(data, readings)
    spans = [(start, stop) for start, stop, _ in chosen]
    content = {
        "text": visible(" ".join(text[:200].split())), "bytes": len(data), "whole": spans == [(0, len(data))],
        "passages": [{"line": data[:start].count(b"\n") + 1, "bits_per_byte": bits} for start, _, bits in chosen],
        "models": [reading.for_page(spans) for reading in readings], "units": UNITS,
    }  # fmt: skip
    script = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    return TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", script)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def read_text(path):
    """The text of a file, or of standard input if `path` is "-". Raises OSError, and ValueError if it is not text."""
    from data.formats import BYTE_ORDER_MARKS, HEAD, is_binary

    name = "standard input" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise FileError("standard input is closed, so it cannot be read; give a text, or --file FILE")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(os.path.expanduser(path)).read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}; name one that holds the text") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise FileError(f"{name} cannot be read ({why}); name a text file that you may read") from None
    encoding = next((known for mark, known in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    if is_binary(data[:HEAD], encoding):
        raise UserError(f"{name} holds binary data, but the models read text; give a plain text file")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not {encoding.upper()} text (byte 0x{data[error.start]:02X} at offset "
                        f"{error.start}); save it as UTF-8") from None  # fmt: skip


def check_text(text, where):
    """Raises ValueError, with advice, if a text is empty or not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not UTF-8; write it to a file in UTF-8, and give --file FILE") from None
    if not text.strip():
        raise UserError(f"{where} is empty, so there is nothing to predict; give at least one word")


def find_all(name):
    """[`name`], or the folders of its schemes if it is the folder of a run of v4 with several."""
    try:
        models.find_model([name])
        return [name]
    except MissingFileError:
        from v4_alibi_rope import SCHEMES  # imported here since the other rungs do not need it

        found = []
        for place in (f"{name}/{scheme}" for scheme in SCHEMES):
            with contextlib.suppress(MissingFileError):
                models.find_model([place])
                found.append(place)
        if not found:
            raise
        return found
    except OSError as error:
        raise FileError(f"{name} cannot be read ({error.strerror}); name the folder of a run") from None


def check_output(path):
    """Raises ValueError or OSError if the page cannot be written to `path`. Only an earlier page is overwritten."""
    beginning = TEMPLATE.read_bytes()[:100]
    if not path.parent.is_dir():
        raise FileError(f"cannot write the page to {path}: there is no folder {path.parent}; make it, or name another "
                        "file with --to")  # fmt: skip
    try:
        with open(path, "rb") as file:
            is_page = file.read(len(beginning)) == beginning
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError(f"cannot write the page to {path} ({error.strerror}); name another file with --to") from None
    if not is_page:
        raise UserError(f"{path} already exists and is not a page of this program; name another file with --to")


def look_at(text, names, to):
    """Print how well the models in the folders `names` predict the text, and write the page to the file `to`."""
    to = Path(os.path.expanduser(to))
    check_output(to)
    readings = [Reading(name, text) for name in dict.fromkeys(place for name in names for place in find_all(name))]
    width = max(len(reading.name) for reading in readings)
    say(f"{'':{width}}  bits per byte  word perplexity   total bits     tokens")
    for reading in readings:
        f = reading.figures
        bpb, ppl = f["bits_per_byte"], f["word_perplexity"]
        bpb = "–" if bpb is None else f"{bpb:.4f}"
        ppl = "–" if ppl is None else f"{ppl:,.1f}" if ppl < 1e9 else f"{ppl:.1e}"
        say(f"{reading.name:{width}}  {bpb:>13}  {ppl:>15}  {f['bits']:>11,.1f}  {f['tokens']:>9,}")
    page = make_page(text, readings)
    harness.atomic_write(to, lambda file: file.write(page.encode()))
    say(f"wrote {to}; open it in a browser")


def main(argv=None):
    what, _, how = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=what, epilog=how, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s TEXT MODEL ...  or  %(prog)s --file FILE MODEL ...")  # fmt: skip
    parser.add_argument("--file", metavar="FILE", help="a file that holds the text, in UTF-8")
    parser.add_argument("--to", metavar="FILE", default="look.html", help="the page to write (default: look.html)")
    parser.add_argument("words", metavar="TEXT MODEL", nargs="*", help="the text, or - for standard input, and folders "
                        "of runs; with --file only the folders")  # fmt: skip
    parser.error = lambda message: sys.exit(f"look.py: {message}; see --help")
    args = parser.parse_intermixed_args(argv)
    if len(args.words) < (2 if args.file is None else 1):
        parser.error("name a text and a model, as in python look.py \"The castle was\" runs/v3")
    text, *names = args.words if args.file is None else [None, *args.words]
    if text is None or text == "-":
        path = text or args.file
        text = read_text(path)
        check_text(text, "standard input" if path == "-" else path)
    else:
        check_text(text, "the text")
        with contextlib.suppress(OSError, ValueError):  # too long for a name, or a null character
            if [*Path(text).glob("model.pt"), *Path(text).glob("*/model.pt")]:
                parser.error(f"{text} is the folder of a model, but the text must come first; put models after it")
            if Path(text).is_file():
                parser.error(f"{text} is a file; to read the text in it, give --file {shlex.quote(text)}")
    look_at(text, names, args.to)


if __name__ == "__main__":
    robust_streams()
    try:
        main()
    except UserError as error:
        sys.exit(f"look.py: {error}")
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit("look.py: out of memory; close other programs, or look at a shorter text")
    except KeyboardInterrupt:
        sys.exit(130)
