"""Draw each rung's model, from the ids at the bottom to the loss at the top: docs/pictures/<rung>.png.

    python docs/diagrams.py

Every number in a picture comes from the rung: its constants, and the parameters of the model that it builds. A part
has its share of the parameters and of the work, which is counted from the shapes: the multiply-adds of all products of
matrices for one token. What only looks up or changes single numbers (embeddings, norms, softmax) does not count.
"""

import hashlib
import importlib
import json
import re
import sys
from math import nan, prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402

import harness  # noqa: E402
from bpe_tokenizer import BPETokenizer  # noqa: E402
from data import vocabulary_file  # noqa: E402
from harness.errors import FileError, UserError  # noqa: E402
from harness.pictures import COLORS, heat  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
WIDTH, DPI, FONT = 9, 150, 9  # inches: 900 pixels of a page are 100 to an inch
NEW = {"facecolor": "#FDE8D3", "edgecolor": COLORS[1], "linewidth": 2.8}
OLD = {"facecolor": "white", "edgecolor": "#666666", "linewidth": 1.0}
PALE = {"facecolor": "#F4F4F4", "edgecolor": "#AAAAAA", "linewidth": 0.8}
EARLIER = {"v0": None, "v1": "v0", "v1_1": "v1", "v2": "v1", "v3": "v2", "v3_1": "v3", "v4_alibi_rope": "v3_1"}

# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------

# The parts of all models: name, the parameters that belong to it, and its multiply-adds for one token, as a product.
# L: blocks, C: width, T: tokens in a window, V: vocabulary, W: tokens of context, N: hidden units, F: inputs of the
# last layer. A product with a letter that a rung does not have is 0.
PARTS = [
    ("table", r"table", 0),
    ("tokens", r"embedding\.weight", 0),
    ("positions", r"position_embedding\.weight", 0),
    ("hidden", r"hidden\..*", "W C N"),
    ("norm_1", r"blocks\.\d+\.norm_1\..*", 0),
    ("qkv", r"blocks\.\d+\.attention\.qkv\..*", "L 3 C C"),
    ("scores", None, "L T C"),  # H products of D numbers with each of T keys
    ("mean", None, "L T C"),
    ("proj", r"blocks\.\d+\.attention\.proj\..*", "L C C"),
    ("norm_2", r"blocks\.\d+\.norm_2\..*", 0),
    ("widen", r"blocks\.\d+\.mlp\.(0|fc)\..*", "L 4 C C"),
    ("narrow", r"blocks\.\d+\.mlp\.(2|proj)\..*", "L 4 C C"),
    ("norm", r"norm\..*", 0),
    ("head", r"head\..*", "V F"),
]  # fmt: skip
ATTENTION, MLP = ("qkv", "scores", "mean", "proj"), ("widen", "narrow")


class Numbers:
    """Sizes of a rung's model, and of its parts the parameters and the work, both as numbers and as shares."""

    def __init__(self, rung, **constants):
        self.module = importlib.import_module(rung)
        values = vars(self.module)
        if "POSITION" in values:
            constants = {"POSITION": values["POSITION"].split(",")[0], **constants}
        with harness.override(values, DEVICE="cpu", **constants):
            vocabulary = BPETokenizer.load(vocabulary_file(values["VOCABULARY"], values["DATA"]))
            self.model = self.module.LanguageModel(vocabulary.vocab_size)
        names = {"T": "BLOCK_SIZE", "C": "N_EMBD", "L": "N_LAYER", "H": "N_HEAD", "W": "CONTEXT_SIZE", "N": "N_HIDDEN"}
        self.sizes = {letter: values[name] for letter, name in names.items() if name in values}
        self.sizes |= {"B": values.get("MICRO_BATCH_SIZE", values["BATCH_SIZE"]), "V": vocabulary.vocab_size}
        self.sizes["F"] = self.sizes.get("N", self.sizes.get("C", 0))
        if "H" in self.sizes:
            self.sizes["D"] = self.sizes["C"] // self.sizes["H"]
        self.parameters = {part: 0 for part, *_ in PARTS}
        for name, p in self.model.named_parameters():  # a matrix that is used twice comes once
            (part,) = (part for part, pattern, _ in PARTS if pattern and re.fullmatch(pattern, name))
            self.parameters[part] += p.numel()
        self.work = {part: work and prod(int(x) if x.isdigit() else self.sizes.get(x, 0) for x in work.split())
                     for part, _, work in PARTS}  # fmt: skip

    def shares(self, *parts):
        """Shares of (all parameters, all work) that some parts have together."""
        return [sum(numbers[part] for part in parts) / max(1, sum(numbers.values()))
                for numbers in (self.parameters, self.work)]  # fmt: skip

    def share_line(self, *parts):
        """The same in words."""
        def percent(share):
            return "< 0.1%" if share < 0.0005 else f"{100 * share:.1f}%"

        words = [f"{name} {percent(x)}" for name, x in zip(("parameters", "work"), self.shares(*parts)) if x]
        return ", ".join(words) or "no parameters"

    def shape(self, letters, break_before="= "):
        """shape("B T 4C"): "(B, T, 4C) = (8, 256, 1024)"."""
        split = [re.fullmatch(r"(\d*)(\w)", word).groups() for word in letters.split()]
        numbers = ", ".join(str(int(times or 1) * self.sizes[letter]) for times, letter in split)
        words = ", ".join(letters.split()).replace("N", "N_HIDDEN")  # N alone is a number of tokens in the rungs
        return f"({words}) {break_before}({numbers})"


# ----------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------


class Picture:
    """A figure in inches from the lower left corner. It keeps a list of all that is drawn, for `fingerprint`."""

    def __init__(self, rung, numbers, notes=()):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.drawn, self.boxes, self.segments = [], [], []
        self.figure = Figure(dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH))
        self.axes.axis("off")
        self.legend(rung, numbers, notes)
        self.rung, self.numbers = rung, numbers

    def fingerprint(self):
        return hashlib.sha256(json.dumps(self.drawn).encode()).hexdigest()

    def text(self, x, y, words, ha="left", **style):
        self.drawn.append(["text", round(x, 3), round(y, 3), words, ha, style])
        self.axes.text(x, y, words, ha=ha, va="center" if "\n" in words else "center_baseline", zorder=5,
                       **{"fontsize": FONT, "linespacing": 1.15, **style})  # fmt: skip

    def rectangle(self, x, y, width, height, new=False, zorder=2, **style):
        """x is its middle, y its lower edge."""
        from matplotlib.patches import Rectangle

        style = {**(NEW if new else OLD), **style}
        left = x - width / 2
        self.drawn.append(["rectangle", round(left, 3), round(y, 3), round(width, 3), round(height, 3), style])
        self.axes.add_patch(Rectangle((left, y), width, height, zorder=zorder, **style))
        self.boxes.append((left, y, left + width, y + height))

    def line(self, *points, arrow=True, **style):
        """A line through points, with an arrow head at its end."""
        xs, ys = zip(*points)
        self.drawn.append(["line", [(round(x, 3), round(y, 3)) for x, y in points], arrow, style])
        self.segments += zip(points, points[1:])
        style = {"color": "black", "lw": 1.2, "zorder": 1, **style}
        self.axes.plot(xs, ys, solid_capstyle="butt", solid_joinstyle="miter", **style)
        if arrow:
            head = {"arrowstyle": "-|>,head_width=0.2,head_length=0.4", "color": "black", "shrinkA": 0, "shrinkB": 0}
            self.axes.annotate("", points[-1], points[-2], arrowprops={**head, "lw": style["lw"]})

    def plus(self, x, y):
        """A circle with a plus: two tensors are added."""
        self.drawn.append(["plus", round(x, 3), round(y, 3)])
        self.axes.plot([x], [y], "o", ms=13, mfc="white", mec="black", zorder=3)
        self.axes.plot([x], [y], "+", ms=8, mec="black", mew=1.3, zorder=4)

    def grid(self, x, y, shades, cell=0.07):
        """A matrix as small squares, from white (0) to black (1); NaN is masked. (x, y): its lower left corner."""
        n, m = len(shades), len(shades[0])
        self.drawn.append(["grid", round(x, 3), round(y, 3), cell, str(shades)])
        self.boxes.append((x, y, x + cell * m, y + cell * n))
        edges = x + cell * numpy.arange(m + 1), y + cell * numpy.arange(n + 1)
        self.axes.pcolormesh(*edges, numpy.array(shades[::-1]), cmap=heat(), vmin=0, vmax=1, edgecolors="#777777",
                             linewidth=0.4)  # fmt: skip

    def legend(self, rung, numbers, notes):
        """At the bottom: what is new but has no box, the legend, and what the letters mean."""
        letters = {"B": "windows at once", "T": "tokens in a window", "C": "width of a token", "H": "heads",
                   "N": "units of the hidden layer", "D": "width of a head", "V": "vocabulary"}  # fmt: skip
        lines = ["   ".join(f"{letter.replace('N', 'N_HIDDEN')} {words}" for letter, words in letters.items()
                           if letter in numbers.sizes)]  # fmt: skip
        if rung == "v0":
            lines += ["percentage: share of all parameters"]
        else:
            lines += ["percentages: shares of all parameters, and of all work: multiply-adds of products of matrices, "
                      "counted from", "the shapes; " + ("all blocks together, attention over the whole window; "
                      if "L" in numbers.sizes else "") + "the backward pass takes twice as many"]  # fmt: skip
        self.bottom = 0.05
        for words in reversed(lines):
            self.bottom += 0.19
            self.text(0.2, self.bottom, words)
        self.bottom += 0.25
        kinds = [("new in this rung", {"new": True}), (f"as in {EARLIER[rung]}", {}), ("not kept", {"linestyle": "--"})]
        for i, (words, style) in enumerate(kinds[: 1 if rung == "v0" else 3 if rung == "v1_1" else 2]):
            self.rectangle(0.4 + 2 * i, self.bottom - 0.07, 0.4, 0.15, **style)
            self.text(0.7 + 2 * i, self.bottom, words)
        self.bottom += 0.06 if notes else 0
        for words in reversed(notes):
            self.bottom += 0.19
            self.text(0.2, self.bottom, words)
        self.bottom += 0.19
        self.line((0.2, self.bottom), (WIDTH - 0.2, self.bottom), arrow=False, lw=0.6)
        self.bottom += 0.14

    def finish(self, top):
        """The title, above all else; returns the picture."""
        parameters, work = (sum(numbers.values()) for numbers in (self.numbers.parameters, self.numbers.work))
        self.text(0.2, top + 0.5, re.match(r"(.+?: .+?)\.", self.numbers.module.__doc__)[1], fontsize=12, weight="bold")
        self.text(0.2, top + 0.25, f"{parameters:,} parameters; work: " + (
            f"{work:,} multiply-adds for each token (forward pass)" if work else "none, since a table is only looked up"
        ))  # fmt: skip
        self.drawn.append(["height", round(top + 0.7, 3)])
        self.figure.set_size_inches(WIDTH, top + 0.7)
        self.axes.set_ylim(0, top + 0.7)
        return self

    def save(self, path):
        """With 64 colors, which saves half of the size."""
        from PIL import Image, PngImagePlugin

        self.canvas.draw()
        about = PngImagePlugin.PngInfo()
        about.add_text("Drawn", self.fingerprint())
        image = Image.fromarray(numpy.asarray(self.canvas.buffer_rgba())).convert("RGB")
        image = image.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(path, pnginfo=about, optimize=True)


class Column:
    """Boxes above each other, joined by arrows: each call draws above the one before."""

    def __init__(self, picture, x, y, width):
        self.picture, self.x, self.y, self.width = picture, x, y, width

    def arrow(self, label="", gap=None, xs=(), at=0.5):
        """An arrow up, or several at `xs`, with a label on the right of the first one."""
        gap = gap or (0.48 if "\n" in label else 0.34 if label else 0.22)
        for x in xs or [self.x]:
            self.picture.line((x, self.y), (x, self.y + gap))
        if label:
            self.picture.text((xs or [self.x])[0] + 0.1, self.y + gap * at - 0.02, label)
        self.y += gap

    def box(self, name, *lines, new=False, x=None, width=None, **style):
        """`name` is bold. Returns the middle of the right edge."""
        x, width, step = x or self.x, width or self.width, 0.165
        height = step * (1 + len(lines)) + 0.13
        self.picture.rectangle(x, self.y, width, height, new, **style)
        for i, words in enumerate((name, *lines)):
            y = self.y + height - 0.065 - step * (i + 0.5)
            self.picture.text(x, y, words, ha="center", **({} if i else {"weight": "bold"}))
        self.y += height
        return x + width / 2, self.y - height / 2

    def plus(self):
        self.y += 0.09
        self.picture.plus(self.x, self.y)
        self.y += 0.09

    def panel(self, bottom, title, origin):
        """A pale frame around the column, from `bottom`, with a dotted line from the box of which it shows details."""
        picture, left, (x, y) = self.picture, 4.55, origin
        picture.rectangle(left + 2.15, bottom, 4.3, self.y + 0.08 - bottom, zorder=-1, **PALE)
        picture.text(left + 0.12, bottom + 0.17, title, weight="bold")
        at = min(max(y, bottom + 0.1), self.y)
        picture.line((x, y), (left - 0.1, y), (left - 0.1, at), (left, at), arrow=False, ls=":")

    def loss(self, numbers, new=False):
        """From the logits to the loss."""
        self.arrow(f"logits {numbers.shape('B T V')}")
        self.box("cross-entropy", "with the tokens that follow (B, T)", new=new)
        self.arrow("loss: one number, the mean")


# ----------------------------------------------------------------------------------------------------------
# The rungs
# ----------------------------------------------------------------------------------------------------------


def draw_v0(picture, numbers):
    column = Column(picture, 1.6, picture.bottom, 2.6)
    column.arrow(f"ids {numbers.shape('B T')}")
    table = column.box("table of logits " + numbers.shape("V V"), numbers.share_line("table"), new=True)
    column.loss(numbers, new=True)
    inside, cell, n = Column(picture, 6.7, picture.bottom, 0), 0.11, 12
    left, low = 5.6, inside.y + 0.35
    picture.grid(left, low, [[0.55 * (i == 5)] * n for i in range(n)], cell)
    row = low + 6.5 * cell
    picture.line((left - 0.3, row), (left, row))
    picture.text(left - 0.4, row, "id i", ha="right")
    picture.text(left + n * cell + 0.1, row, "row i: logits of the\ntoken after token i")
    inside.y = low + n * cell + 0.05
    inside.panel(picture.bottom, "inside the table", table)
    return picture.finish(column.y)


def draw_context(column, numbers, new):
    """v1 and v1_1 up to the hidden layer."""
    s, W, C, N = numbers.shape, *(numbers.sizes[letter] for letter in "WCN")
    column.arrow(f"ids {s('B T')}")
    column.box("token embedding " + s("V C"), numbers.share_line("tokens"), new=new)
    column.arrow(s("B T C"))
    context = column.box(f"the last {W} tokens, side by side", "no parameters", new=new)
    column.arrow(s(f"B T {W}C"))
    column.box(f"hidden layer, {W * C} → {N}", numbers.share_line("hidden"), new=new)
    column.arrow(s("B T N", "\n= "))
    column.box("tanh", new=new)
    return context


def draw_v1(picture, numbers):
    W, C, N, V = (numbers.sizes[letter] for letter in "WCNV")
    column = Column(picture, 1.6, picture.bottom, 2.8)
    context = draw_context(column, numbers, new=True)
    column.arrow(numbers.shape("B T N", "\n= "))
    column.box(f"last layer, {N} → {V}", numbers.share_line("head"), new=True)
    column.loss(numbers)

    cell, bottom = 0.5, picture.bottom + 0.5
    for i in range(W):
        inside = Column(picture, 6.7 + cell * (i - W / 2 + 0.5), bottom + 0.6, cell - 0.08)
        inside.box(f"t−{W - 1 - i}" if i < W - 1 else "t", new=True)
        inside.arrow()
        inside.box(str(C), width=cell, new=True)
    inside = Column(picture, 6.7, inside.y, 2.8)
    inside.arrow(f"{W} × {C} = {W * C} numbers")
    inside.box("hidden layer, tanh, last layer", new=True)
    inside.arrow("logits of the token at t+1")
    picture.text(4.67, bottom + 0.36, "places before the start of the window hold zeros")
    inside.panel(bottom, f"position t sees {W} tokens, itself the last", context)
    return picture.finish(column.y)


def draw_v1_1(picture, numbers):
    B, T, W, C, N, V = (numbers.sizes[letter] for letter in "BTWCNV")
    batch, tokens, chunk = numbers.module.BATCH_SIZE, B * T, min(numbers.module.CHUNK_SIZE, B * T)
    column = Column(picture, 2.0, picture.bottom + 0.3, 2.9)
    picture.text(0.35, picture.bottom + 0.15, f"for each of {batch // B} micro-batches of {B} windows:")
    draw_context(column, numbers, new=False)
    column.arrow(f"(B · T, N_HIDDEN)\n= ({tokens}, {N})")
    start = column.y
    picture.text(0.5, start + 0.15, f"for each of {-(-tokens // chunk)} chunks of {chunk} tokens:")
    column.y += 0.3
    column.box(f"last layer, {N} → {V}", numbers.share_line("head"))
    column.arrow()
    column.box(f"logits (chunk, V) = ({chunk}, {V})", "overwritten by the next chunk", new=True, linestyle="--")
    column.arrow()
    column.box("cross-entropy and its gradient", "at once, not in the backward pass", new=True)
    column.y += 0.12
    picture.rectangle(2.0, start, 3.25, column.y - start, new=True, zorder=0, facecolor="white")
    column.arrow("loss, gradients")
    column.box("backward pass of the layers below", "then their activations are freed", new=True)
    column.y += 0.12
    picture.rectangle(2.0, picture.bottom, 3.6, column.y - picture.bottom, new=True, zorder=-1, facecolor="white")
    column.arrow("sums over the micro-batches")
    column.box("step of Adam, in place", new=True)

    def megabytes(n):
        return f"{n / 1e6:.1f} MB"

    per_token = 4 * (C + W * C + N)  # embedding, context, hidden layer, in float32
    there, here = 4 * V * batch * T, 4 * V * chunk  # bytes of logits
    rows = [("in memory at the same time", "v1", "v1_1"), ("a token id of the text", "8 bytes", "2 bytes, mapped"),
            ("windows", str(batch), str(B)), ("their activations", megabytes(per_token * batch * T),
            megabytes(per_token * tokens)), ("tokens with logits", f"{batch * T:,}", f"{chunk:,}"),
            ("these logits", megabytes(there), megabytes(here))]  # fmt: skip
    y = column.y - 0.8
    for i, row in enumerate(rows):
        for x, words in zip((4.35, 6.55, 7.5), row):
            picture.text(x, y, words, **({} if i else {"weight": "bold"}))
        picture.line((4.35, y - 0.14), (8.8, y - 0.14), arrow=False, lw=0.5)
        y -= 0.29
    picture.text(4.35, y - 0.5, "these logits as areas", weight="bold")
    for x, size, name in ((5.4, there, "v1"), (7.7, here, "v1_1")):
        side = 2.1 * (size / there) ** 0.5
        picture.rectangle(x, y - 0.7 - side, side, side, new=name == "v1_1")
        picture.text(x, y - 3, f"{name}: {megabytes(size)}", ha="center")
    return picture.finish(column.y)


TRANSFORMERS = {
    "v2": {
        "norm": "LayerNorm", "pre_norm": False, "activation": "ReLU", "head": "last layer",
        "new": "positions block norm attention mlp qkv scores mask softmax mean proj widen activation narrow".split(),
        "notes": ["Of v1_1 two things stay: micro-batches, and token ids of 16 bits."],
    },
    "v3": {
        "norm": "LayerNorm", "pre_norm": True, "activation": "GELU",
        "head": "embedding again", "new": "norm activation head".split(),
        "notes": ["LayerNorm moves: it comes before each branch, and once more at the end.",
                  "Also new: more blocks; positions start as sinusoids, and the last matrix of each branch at zero; "
                  "dropout of embeddings", "and branches, at a rate of {DROPOUT:g} here; AdamW, warm-up and cool-down "
                  "of the learning rate, clipped gradients."],
    },
    "v3_1": {
        "norm": "RMSNorm", "pre_norm": True, "activation": "ReLU squared",
        "head": "last layer", "new": "norm activation head".split(),
        "notes": ["Also new: no biases; the last layer starts at zero; Muon trains the matrices of the blocks,",
                  "AdamW the embeddings and the last layer; no weight decay, no clipping."],
    },
    "v4_alibi_rope": {
        "norm": "RMSNorm", "pre_norm": True, "activation": "ReLU squared", "head": "last layer",
        "new": "rope alibi cache".split(),
        "notes": ["A model has one scheme, RoPE or ALiBi, and no positions are added to the embedding any more.",
                  "For comparison: sinusoids that are added there, or no positions at all."],
    },
}  # fmt: skip


def draw_transformer(picture, numbers):
    spec, s, sizes = TRANSFORMERS[picture.rung], numbers.shape, numbers.sizes
    C, V, share = sizes["C"], sizes["V"], numbers.share_line

    def new(name):
        return {"new": name in spec["new"]}

    column = Column(picture, 1.45, picture.bottom, 2.5)
    column.arrow(f"ids {s('B T')}")
    column.box("token embedding", s("V C"), share("tokens"))
    if spec["norm"] == "RMSNorm":
        column.arrow(s("B T C"))
        column.box(spec["norm"], "no parameters", **new("norm"))
    if numbers.parameters["positions"]:
        column.arrow(gap=0.38)
        column.plus()
        beside = Column(picture, 3.35, column.y - 0.42, 1.9)
        beside.box("learned positions", s("T C"), share("positions"), **new("positions"))
        picture.line((2.4, column.y - 0.09), (column.x + 0.09, column.y - 0.09))
        column.arrow(s("B T C"), gap=0.56, at=0.74)
    else:
        column.arrow(s("B T C"))

    def branch(part, norm, name, parts):
        """From the stream to the right, up through the boxes, and back to the stream."""
        start = column.y + 0.12
        side = Column(picture, 3.1, start, 2.2)
        picture.line((column.x, start), (side.x, start), arrow=False)
        side.arrow()
        if spec["pre_norm"]:
            side.box(spec["norm"], share(norm), **new("norm"))
            side.arrow()
        origin = side.box(name, share(*parts), **new(part))
        picture.line((side.x, side.y), (side.x, side.y + 0.22), (column.x + 0.09, side.y + 0.22))
        picture.line((column.x, column.y), (column.x, side.y + 0.13), lw=2.5, arrow=False)
        column.y = side.y + 0.13
        column.plus()
        if not spec["pre_norm"]:
            column.arrow()
            column.box(spec["norm"], share(norm), width=1.9, **new("norm"))
        return origin

    start = column.y
    attention = branch("attention", "norm_1", "attention", ATTENTION)
    picture.text(0.3, column.y + 0.18, f"× {sizes['L']} blocks", weight="bold")
    mlp = branch("mlp", "norm_2", "MLP", MLP)
    picture.line((column.x, column.y), (column.x, column.y + 0.15), lw=2.5, arrow=False)
    column.y += 0.15
    style = {"new": True, "facecolor": "white"} if "block" in spec["new"] else PALE
    picture.rectangle(2.25, start, 4.2, column.y - start, zorder=-1, **style)
    picture.text(1.35, attention[1], "residual\nstream", ha="right")
    column.arrow(s("B T C"))
    if spec["pre_norm"]:
        column.box(spec["norm"], share("norm"), **new("norm"))
        column.arrow(s("B T C"))
    tied = [] if numbers.parameters["head"] else ["tied: counted once, below"]
    column.box(f"{spec['head']}, {C} → {V}", share("head"), *tied, **new("head"))
    column.loss(numbers)

    q, k, v, n = 5.5, 6.7, 8.2, 6
    inside = Column(picture, 6.7, picture.bottom + 0.35, 3.7)
    inside.arrow(s("B T C"))
    inside.box(f"queries, keys, values, {C} → {3 * C}", share("qkv"), **new("qkv"))
    for x, letter in zip((q, k, v), "qkv"):
        picture.text(x - 0.1, inside.y + 0.24, letter, ha="right", weight="bold")
    picture.text(k + 0.08, inside.y + 0.22, "each " + s("B H T D", "\n= "))
    low = inside.y
    inside.arrow(xs=(q, k), gap=0.48)
    if "rope" in spec["new"]:
        inside.box("if RoPE: turn q and k", "by angles that grow with position", x=6.1, width=2.5, new=True)
        turned = inside.y
        inside.arrow(xs=(k,))
        picture.line((v, low), (v, inside.y))
        inside.box("cache of k and v", "only when it generates", x=7.5, width=2.1, new=True)
        low = inside.y
        inside.arrow(xs=(k,))
        picture.line((q, turned), (q, inside.y))
    inside.x, inside.width = 6.1, 2.5
    inside.box("scores q · k / √D", share("scores"), **new("scores"))
    inside.arrow(s("B H T T", "\n= "))
    if "alibi" in spec["new"]:
        slopes = ", ".join(f"1/{1 / slope:g}" for slope in numbers.module.alibi_slopes(sizes["H"]))
        inside.box("if ALiBi: add slope · (j − i)", f"slopes {slopes}", new=True)
        picture.grid(7.5, inside.y - 0.44, [[1 - (i - j) / n if j <= i else nan for j in range(n)] for i in range(n)])
        inside.arrow()
    inside.box("mask", "query i sees keys j ≤ i", **new("mask"))
    picture.grid(7.5, inside.y - 0.44, [[0.6 if j <= i else nan for j in range(n)] for i in range(n)])
    inside.arrow()
    inside.box("softmax over the keys", **new("softmax"))
    inside.arrow(s("B H T T", "\n= "))
    picture.line((v, low), (v, inside.y))
    inside.x, inside.width = 6.7, 3.7
    inside.box("weighted mean of the values", share("mean"), **new("mean"))
    inside.arrow(s("B H T D"))
    inside.box(f"heads side by side, projection {C} → {C}", share("proj"), **new("proj"))
    inside.arrow(s("B T C"))
    inside.panel(picture.bottom, "inside attention", attention)

    bottom = inside.y + 0.25
    inside = Column(picture, 6.7, bottom + 0.35, 3.0)
    inside.arrow(s("B T C"))
    inside.box(f"widen, {C} → {4 * C}", share("widen"), **new("widen"))
    inside.arrow(s("B T 4C"))
    inside.box(spec["activation"], **new("activation"))
    inside.arrow(s("B T 4C"))
    inside.box(f"narrow, {4 * C} → {C}", share("narrow"), **new("narrow"))
    inside.arrow(s("B T C"))
    inside.panel(bottom, "inside the MLP", mlp)
    return picture.finish(max(column.y, inside.y + 0.1))


DRAWN_BY = {"v0": draw_v0, "v1": draw_v1, "v1_1": draw_v1_1}
NOTES = {
    "v1": ["Also new: a vocabulary of {V:,} tokens; batches of windows from a shuffled epoch."],
    "v1_1": ["The model is that of v1, and so are its losses, up to rounding. Also new: freed memory goes back to "
             "the system at once."],
}  # fmt: skip
NOTES |= {rung: transformer["notes"] for rung, transformer in TRANSFORMERS.items()}


def draw(rung, **constants):
    """The Picture of a rung, with the constants that its file sets, or with others."""
    numbers = Numbers(rung, **constants)
    known = {**vars(numbers.module), **numbers.sizes}
    picture = Picture(rung, numbers, [note.format_map(known) for note in NOTES.get(rung, ())])
    return DRAWN_BY.get(rung, draw_transformer)(picture, numbers)


def main():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the pictures need a library: pip install matplotlib") from None
    for rung in EARLIER:
        path = FOLDER / f"{rung}.png"
        picture = draw(rung)
        try:
            FOLDER.mkdir(exist_ok=True)
            picture.save(path)
        except OSError as error:
            raise FileError(f"cannot write {path} ({error.strerror}); make room, or make it writable") from None


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"diagrams.py: {error}")
