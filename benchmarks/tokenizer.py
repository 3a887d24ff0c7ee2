"""The tokenizer compared with compiled ones: training, encoding, texts of many kinds, streams, preparing a corpus.

    python benchmarks/tokenizer.py               the bundled sample
    python benchmarks/tokenizer.py --from DIR    from a folder that holds wiki.{train,valid,test}.tokens
    python benchmarks/tokenizer.py --quick       small texts and few repeats: a minute, and no file is written

The peers are rustbpe, Hugging Face tokenizers, sentencepiece and tiktoken: pip install -r benchmarks/requirements.txt.
Ours and theirs take turns. Each run has its own process, so nothing is cached; its clock starts once packages, text and
vocabulary are loaded. A peer that computes the same must give our result before its time counts.

It prints Markdown tables, and writes them and all timings to results/benchmarks/tokenizer.{md,json}. It needs Linux,
where /proc has the peak memory, and 3 GB for temporary files (in TMPDIR, if that is set).
"""

import argparse
import base64
import gc
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python benchmarks/tokenizer.py` finds the tokenizer

from benchmarks import tables  # noqa: E402
from bpe_tokenizer import GPT2_PATTERN, BPETokenizer  # noqa: E402

VOCABULARY = ROOT / "data" / "bpe_vocab.json"
OURS, PEERS = "bpe_tokenizer", ("rustbpe", "tokenizers", "sentencepiece", "tiktoken")
MB = 1_000_000

# MB of the training text to use; vocabularies to learn from it; MB of the streams, of the long text to prepare and of
# each kind of text, vocabularies to learn from some of these; seconds until a run on them is given up; runs of each
# measurement, and of those on long texts
FULL = SimpleNamespace(text_mb=math.inf, vocab_sizes=(500, 4096, 8192, 32768), stream_mb=(10, 100, 500), long_mb=540,
                       kind_mb=5, learn_sizes=(500, 8192, 32768), limit=60, repeats=5, long_repeats=1)  # fmt: skip
QUICK = SimpleNamespace(text_mb=1, vocab_sizes=(500, 4096), stream_mb=(1, 4, 16), long_mb=20,
                        kind_mb=0.2, learn_sizes=(500, 1024), limit=5, repeats=2, long_repeats=1)  # fmt: skip
PRINTED, MEASURED = [], []  # the report: pieces of Markdown, and the numbers of every run

# ----------------------------------------------------------------------------------------------------------
# Measuring: a job is a function of a clock and of what it works on, and runs in a process of its own
# ----------------------------------------------------------------------------------------------------------


class Clock:
    """Measures a `with` block: `seconds`, and `memory`, the bytes that the process's peak rises above its start."""

    def __enter__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory in use now
        self.memory, self.start = -self._peak(), time.perf_counter()

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.memory += self._peak()

    @staticmethod
    def _peak():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def run_job():
    """The child process: job and arguments arrive on standard input, the answer goes to standard output."""
    job, arguments = pickle.load(sys.stdin.buffer)
    clock = Clock()
    result = job(clock, *arguments)
    sys.stdout.buffer.write(pickle.dumps((clock.seconds, clock.memory, result)))


def measure(job, arguments, limit):
    """Run job(clock, *arguments) in a child process: (seconds, memory, result), or a word that says why it failed."""
    try:
        child = subprocess.run([sys.executable, __file__, "--job"], input=pickle.dumps((job, arguments)),
                               capture_output=True, timeout=limit)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"over {limit} s"
    if child.returncode:
        return f"fails:\n{child.stderr.decode()}"
    return pickle.loads(child.stdout)


def compare(labels, size, jobs, *arguments, repeats, same=(), limit=None):
    """Run `jobs`, {tool: job}, in turns. Returns a row of a table, {column: value}, for each, ours first.

    labels: the first columns; size: bytes of the text; same: tools whose result must be ours. Exits with code 1 if one
    is not, or if ours fails. A tool that is not installed is left out.
    """
    runs, rows = {tool: [] for tool in jobs if find_spec(tool)}, []
    for tool in [*runs] * repeats:
        if not (runs[tool] and isinstance(runs[tool][-1], str)):  # it has not failed before
            runs[tool].append(measure(jobs[tool], arguments, limit))
    for tool, some in runs.items():
        row, failed = {**labels, "tool": tool}, some.pop().strip() if isinstance(some[-1], str) else ""
        if failed and tool == OURS:
            sys.exit(f"error: {jobs[tool].__name__} {failed}")
        if tool in same and any(run[2] != runs[OURS][0][2] for run in some):
            sys.exit(f"error: {jobs[tool].__name__} and {jobs[OURS].__name__} do not give the same result")
        MEASURED.append({**row, "job": jobs[tool].__name__, "text, bytes": size, "failed": failed.split("\n")[-1],
                         "seconds": [run[0] for run in some], "memory, bytes": [run[1] for run in some]})  # fmt: skip
        if failed:
            rows.append({**row, "seconds": failed.partition(":")[0]})
        else:
            seconds, memory = median(run[0] for run in some), max(run[1] for run in some)
            ours = rows[0]["seconds"] if rows else seconds
            rows.append({**row, "seconds": seconds, "our speed / its speed": seconds / ours,
                         "MB/s": size / MB / seconds, "memory, MB": memory / MB,
                         "memory per byte of text": memory / size, "result": some[0][2]})  # fmt: skip
    return rows


def say(text):
    print(text + "\n", flush=True)
    PRINTED.append(text)


def show(value):
    """Round fractions to three digits."""
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"
    return f"{value:,}" if isinstance(value, int) else value


def table(rows, *columns):
    """Print a Markdown table of the rows' `columns`; columns of numbers are aligned to the right."""
    left = [i for i, column in enumerate(columns) if isinstance(rows[0][column], str)]
    say(tables.table(columns, [[show(row.get(column, "–")) for column in columns] for row in rows], left).rstrip())


# ----------------------------------------------------------------------------------------------------------
# Texts
# ----------------------------------------------------------------------------------------------------------


def read(path):
    return path.read_bytes().decode("utf-8")


def stream(path, size):
    """The first `size` bytes of a text file, up to the end of a line, in pieces of about a megabyte."""
    with open(path, "rb") as file:
        while size > 0 and (lines := file.readlines(min(size, MB))):
            piece = b"".join(lines)
            size -= len(piece)
            yield piece.decode("utf-8")


def lines_of(text):
    """`text` cut where a line starts with a space and a non-space: tokenizing the parts equals tokenizing the whole."""
    return re.split(r"(?<=\n)(?= \S)", text)


def gather(folder, target, settings):
    """Put wiki.{train,valid,test}.tokens into `target`: those of `folder`, or else the bundled sample, repeated."""
    target.mkdir()
    for split, copies in {"train": 29, "valid": 3, "test": 3}.items():
        name = f"wiki.{split}.tokens"
        text = read(folder / name) if folder else read(ROOT / "data" / "input.txt") * copies
        (target / name).write_bytes(text[: int(min(settings.text_mb * MB, len(text)))].encode("utf-8"))


def write_long_text(path, source, size):
    """Repeat the text `source` up to `size` bytes. In each copy, a different 1 in 500 words is replaced by an invented
    one, since a longer text has more distinct words."""
    draw = random.Random(0)
    words = sorted(word for word in set(read(source).split()) if word.isalpha())
    with open(path, "wb") as file:
        while file.tell() < size:
            for piece in stream(source, min(source.stat().st_size, size - file.tell())):
                parts = piece.split(" ")
                for i in draw.sample(range(len(parts)), len(parts) // 500):
                    if parts[i].isalpha():
                        start, end = draw.choice(words), draw.choice(words)
                        parts[i] = start[: len(start) // 2 + 1] + end[len(end) // 2 :]
                file.write(" ".join(parts).encode("utf-8"))


def words_and_stops(characters, lengths, stops, size):
    """About `size` bytes of invented words of these `lengths`, without spaces, with one of `stops` after every few.
    Frequencies of characters and words follow Zipf's law."""
    draw = np.random.default_rng(0)

    def zipf(n, count, exponent):
        share = np.arange(1, n + 1.0) ** -exponent
        return draw.choice(n, count, p=share / share.sum()).tolist()

    characters = [*characters]
    words = ["".join(characters[i] for i in zipf(len(characters), n, 0.9)) for n in draw.choice(lengths, 20_000)]
    n = size // (3 * min(lengths))
    pieces = [words[i] for i in zipf(len(words), n, 1)]
    for i in draw.integers(n, size=n // 6).tolist():
        pieces[i] += stops[i % len(stops)]
    return "".join(pieces).encode()[:size].decode(errors="ignore")


def rows_of(row, size):
    """Rows row(0), row(1), ... up to `size` bytes of ASCII."""
    rows = [row(0)]
    while len(rows) * len(rows[0]) < 1.3 * size:
        rows.append(row(len(rows)))
    return "".join(rows)[:size]


def kinds_of_text(size):
    """{name: text of about `size` bytes}, made here: like languages without spaces, data, code, and hard ones."""
    draw = random.Random(0)
    common = [bytes([row, cell]).decode("gb2312") for row in range(0xB0, 0xD7) for cell in range(0xA1, 0xFA)]
    draw.shuffle(common)
    hiragana = [chr(c) for c in range(0x3042, 0x3094)]
    thai = [chr(c) for c in (*range(0xE01, 0xE3B), *range(0xE40, 0xE4E))]
    source = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    source = source.decode(errors="ignore").encode()

    def table_row(k):
        numbers = f"{draw.gauss(20, 5):.3f},{draw.random():.6f},{draw.randint(1, 10**6)}"
        place = draw.choice(["north", "south"])
        return f"{k},2024-{draw.randint(1, 12):02}-{draw.randint(1, 28):02},{numbers},{place}\n"

    def record(k):
        tags, url = draw.sample(["red", "green", "blue", "alpha"], 2), f"https://example.org/{draw.getrandbits(40):x}"
        content = {"id": k, "user": f"user{draw.randint(1, 99999)}", "tags": tags, "score": draw.random(), "url": url}
        return json.dumps(content, separators=(",", ":")) + ","

    return {
        "Chinese": words_and_stops(common, [1, 2, 2, 2, 3, 4], ["，", "。", "、", "，", "。\n"], size),
        "Japanese": words_and_stops(hiragana + common[:2000], [1, 2, 2, 3, 4], ["、", "。", "。\n", "「", "」"], size),
        "Thai": words_and_stops(thai, [2, 3, 4, 5, 6, 7], [" ", " ", "\n"], size),
        "CSV": rows_of(table_row, size),
        "minified JSON": rows_of(record, size),
        "source code": (source * (size // len(source) + 1))[:size].decode(errors="ignore"),
        "base64": base64.b64encode(draw.randbytes(size * 3 // 4)).decode(),
        "one letter": "a" * min(size, MB),
        "random letters, no space": "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=size)),
        "only spaces": " " * min(size, MB),
        "random bytes, read as Latin-1": draw.randbytes(size * 2 // 3).decode("latin-1"),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Jobs
# ----------------------------------------------------------------------------------------------------------


def train_ours(clock, path, vocab_size):
    text = read(path)
    with clock:
        tokenizer = BPETokenizer.train(text, vocab_size, special_tokens=())
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]


def train_rustbpe(clock, path, vocab_size):
    """The same algorithm: of two equally frequent pairs it also merges the one with smaller ids."""
    import rustbpe

    text, theirs = read(path), rustbpe.Tokenizer()
    with clock:
        theirs.train_from_iterator([text], vocab_size, pattern=GPT2_PATTERN)
    return [token for token, _ in sorted(theirs.get_mergeable_ranks(), key=lambda ranked: ranked[1])]


def byte_alphabet():
    """GPT-2's character for each byte, in which Hugging Face writes tokens: U+0100 and up for what is not printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(printable + others, map(chr, printable + [256 + k for k in range(len(others))])))


def train_tokenizers(clock, path, vocab_size):
    """The same algorithm, but bytes have other ids, so ties are broken differently. Lines let it use all threads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    lines, theirs, alphabet = lines_of(read(path)), Tokenizer(models.BPE()), byte_alphabet()
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=[*alphabet.values()], show_progress=False)
    with clock:
        theirs.train_from_iterator(lines, trainer)
    byte = {character: byte for byte, character in alphabet.items()}
    return [bytes(map(byte.get, token)) for token in theirs.get_vocab()]


def train_sentencepiece(clock, path, vocab_size):
    """Another algorithm: it merges characters inside words, which are cut only at spaces."""
    from sentencepiece import SentencePieceTrainer

    lines = lines_of(read(path))
    with clock:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=io.BytesIO(), model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            max_sentence_length=MB, minloglevel=2,
        )  # fmt: skip
    return []


def train_stream(clock, path, size):
    """Learns 8,192 tokens. Returns the merges' share of the time; before the first one the text is read and counted."""
    learned = []
    with clock:
        BPETokenizer.train(stream(path, size), 8192, progress=lambda _: learned.append(time.perf_counter()))
    return 1 - (learned[0] - clock.start) / clock.seconds


def digest(ids):
    return hashlib.sha256(np.asarray(ids, np.uint32).tobytes()).digest()


def encode_ours(clock, path, vocabulary=VOCABULARY):
    text, tokenizer = read(path), BPETokenizer.load(vocabulary)
    with clock:
        ids = tokenizer.encode_array(text)
    return digest(ids)


def encode_tiktoken(clock, path, vocabulary=VOCABULARY):
    import tiktoken

    text, ours = read(path), BPETokenizer.load(vocabulary)
    ranks = {ours.token_bytes(i): i for i in range(256 + len(ours.merges))}
    theirs = tiktoken.Encoding(name="ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    with clock:
        ids = theirs.encode_ordinary(text)
    return digest(ids)


def encode_tokenizers(clock, path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    lines, ours, alphabet = lines_of(read(path)), BPETokenizer.load(VOCABULARY), byte_alphabet()
    token = ["".join(map(alphabet.get, ours.token_bytes(i))) for i in range(256 + len(ours.merges))]
    merges = [(token[a], token[b]) for a, b in ours.merges]
    theirs = Tokenizer(models.BPE({text: i for i, text in enumerate(token)}, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    with clock:
        encodings = theirs.encode_batch_fast(lines)
    return digest([i for encoding in encodings for i in encoding.ids])


def encode_stream(clock, path, size):
    tokenizer = BPETokenizer.load(VOCABULARY)
    with clock:
        return sum(len(ids) for ids in tokenizer.encode_stream(stream(path, size)))


def run_python(clock, folder, *arguments):
    """Run a whole command; its memory is the peak of its process."""
    with clock:
        subprocess.run([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    clock.memory = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


def training(settings, path):
    jobs = {OURS: train_ours, "rustbpe": train_rustbpe, "tokenizers": train_tokenizers,
            "sentencepiece": train_sentencepiece}  # fmt: skip
    rows, size = [], path.stat().st_size
    for n in settings.vocab_sizes:
        some = compare({"vocabulary": n}, size, jobs, path, n, repeats=settings.repeats, same=("rustbpe",))
        for row in some:
            row["tokens that are ours"] = len(set(row.get("result", ())).intersection(some[0]["result"])) or "–"
        rows += some
    say(f"## Training on {size / MB:.1f} MB")
    table(rows, "vocabulary", "tool", "seconds", "our speed / its speed", "memory, MB", "tokens that are ours")
    say("rustbpe's tokens must be ours, in order. tokenizers, which gets the lines and uses all threads, breaks ties\n"
        "otherwise. sentencepiece merges characters, not bytes: another algorithm and another vocabulary.")


def encoding(settings, path):
    jobs, size = {OURS: encode_ours, "tiktoken": encode_tiktoken, "tokenizers": encode_tokenizers}, path.stat().st_size
    rows = compare({}, size, jobs, path, repeats=settings.repeats, same=PEERS)
    say(f"## Encoding {size / MB:.1f} MB")
    table(rows, "tool", "seconds", "MB/s", "our speed / its speed", "memory, MB", "memory per byte of text")
    say("With the committed vocabulary of 4,096 tokens; the ids must be ours. encode_array and tiktoken's\n"
        "encode_ordinary use one thread; tokenizers gets the lines as a batch and uses all.")


def kinds(settings, folder):
    """Encode every kind of text, with the committed vocabulary and with its own; learn vocabularies from some kinds."""
    folder.mkdir()
    encoded, learned = [], []
    for name, text in kinds_of_text(int(settings.kind_mb * MB)).items():
        path, own = folder / "text", folder / "vocabulary"
        path.write_bytes(text.encode("utf-8"))
        size = path.stat().st_size
        BPETokenizer.train(text, settings.learn_sizes[1], special_tokens=()).save(own)
        for which, vocabulary in {"committed": VOCABULARY, "its own": own}.items():
            encoded += compare({"text": name, "MB": size / MB, "vocabulary": which}, size,
                               {OURS: encode_ours, "tiktoken": encode_tiktoken}, path, vocabulary,
                               repeats=settings.repeats, same=PEERS, limit=settings.limit)  # fmt: skip
        if name in ("Chinese", "source code"):
            for n in settings.learn_sizes:
                both = {OURS: train_ours, "rustbpe": train_rustbpe}
                learned += compare({"text": name, "vocabulary": n}, size, both, path, n,
                                   repeats=min(3, settings.repeats), same=("rustbpe",))  # fmt: skip
    say(f"## Texts of many kinds, {settings.kind_mb} MB each")
    table(encoded, "text", "vocabulary", "tool", "MB", "seconds", "our speed / its speed", "memory per byte of text")
    say(f"As above; its own vocabulary has {settings.learn_sizes[1]:,} tokens, learned from the text. Texts are made\n"
        f"by this script; source code is the standard library's. A run is given up after {settings.limit} s; why one\n"
        "fails is in `tokenizer.json`.")
    say("## Training on other kinds of text")
    table(learned, "text", "vocabulary", "tool", "seconds", "our speed / its speed", "memory per byte of text")
    say("rustbpe's tokens must be ours, in order.")


def streams(settings, path):
    learned, encoded = [], []
    for megabytes in settings.stream_mb:
        size = megabytes * MB
        some = {"MB": megabytes, "distinct words": len({word for text in stream(path, size) for word in text.split()})}
        for rows, task, job in (learned, "train", train_stream), (encoded, "encode_stream", encode_stream):
            rows += compare({"task": task, **some}, size, {OURS: job}, path, size, repeats=settings.long_repeats)
        learned[-1]["of it merging"] = learned[-1]["seconds"] * learned[-1]["result"]
    say("## Streams")
    table(learned + encoded, "task", "MB", "distinct words", "seconds", "of it merging", "MB/s", "memory, MB")
    say("Training, of 8,192 tokens, reads and counts first; the merges then see only the distinct words. The text is\n"
        "the training text over and over; in each copy another 1 in 500 words is replaced by an invented one.")


def preparing(settings, text, long, copy):
    """Run data/prepare.py in a copy of the files that it needs, so that this checkout's token files do not change."""
    for pattern in ("bpe_tokenizer.py", "bpe/*.py", "harness/*.py", "data/*.py", "data/*.json"):
        for path in ROOT.glob(pattern):
            (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy / path.relative_to(ROOT))
    one = f"from data.prepare import *; prepare(*open_source({str(long)!r}), ['bpe_vocab.json'])"
    rows = []
    for what, source, repeats, arguments in [
        ("the vocabulary of 4,096 tokens", long, settings.long_repeats, ["-c", one]),
        ("both vocabularies", long, settings.long_repeats, ["data/prepare.py", "--from", long]),
        ("both, learned again (--train-vocab)", text, settings.repeats,
         ["data/prepare.py", "--from", text, "--train-vocab"]),
        ("nothing but the start of the program", text, settings.repeats, ["-c", "import data.prepare"]),
    ]:  # fmt: skip
        size = sum(path.stat().st_size for path in source.iterdir())
        labels = {"prepares": what, "MB": size / MB}
        rows += compare(labels, size, {OURS: run_python}, copy, *arguments, repeats=repeats)
    say("## Preparing token files")
    table(rows, "prepares", "MB", "seconds", "memory, MB")
    say("data/prepare.py tokenizes and writes all splits. Seconds and memory are those of the whole process.")


def machine():
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "torch", *PEERS) if find_spec(name)}
    return {"CPU": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(), "Python": platform.python_version(),
            "threads of rustbpe and tokenizers": int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count()), **packages}


def main(argv=None):
    parser = argparse.ArgumentParser(description="The tokenizer side by side with compiled ones.")
    parser.add_argument("--from", dest="folder", metavar="DIR", type=Path, help="WikiText-2: wiki.*.tokens")
    parser.add_argument("--quick", action="store_true", help="small texts, few repeats, no file written")
    args = parser.parse_args(argv)
    settings, folder = QUICK if args.quick else FULL, args.folder
    for name in PEERS:
        if not find_spec(name):
            print(f"{name} is not installed and is left out: pip install {name}", file=sys.stderr)
    facts = machine()
    say("# The tokenizer beside compiled ones")
    say("; ".join(f"{key}: {value}" for key, value in facts.items()) + ".")
    say(f"Medians of {settings.repeats} runs ({settings.long_repeats} on long texts), ours and theirs in turns, each\n"
        "in a process of its own. Memory is what the peak rises above what packages, text and vocabulary take.")
    if not folder:
        say("**The text is the bundled sample, repeated**: the figures are not those of WikiText-2 (`--from DIR`).")
    with tempfile.TemporaryDirectory() as temporary:
        text, long = Path(temporary, "text"), Path(temporary, "long")
        gather(folder, text, settings)
        gather(folder, long, settings)
        train = text / "wiki.train.tokens"
        training(settings, train)
        encoding(settings, train)
        kinds(settings, Path(temporary, "kinds"))
        write_long_text(long / train.name, train, settings.long_mb * MB)
        streams(settings, long / train.name)
        preparing(settings, text, long, Path(temporary, "copy"))
    if not args.quick:
        content = {"date": str(date.today()), "sample": not folder, "machine": facts, "measured": MEASURED}
        tables.keep("tokenizer", content, "\n\n".join(PRINTED) + "\n")


if __name__ == "__main__":
    try:
        run_job() if sys.argv[1:] == ["--job"] else main()
    except KeyboardInterrupt:
        sys.exit("tokenizer.py: stopped")
    except (OSError, ValueError) as error:
        sys.exit(f"tokenizer.py: {error}")
