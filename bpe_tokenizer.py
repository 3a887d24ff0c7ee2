"""Byte-level byte-pair encoding (BPE), written by hand.

A tokenizer turns text into integers and back. Byte-pair encoding (Gage 1994; for language models Sennrich et
al. 2016, arXiv:1508.07909; on bytes Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")
starts from the 256 bytes, so that no text is ever unknown, and learns which neighbours to merge:

1. Pre-tokenization cuts the text into words, numbers, punctuation and white space. Merges never cross a cut.
2. Training merges the most frequent pair of neighbouring tokens into a new token, again and again.
3. Encoding replays the merges, the earliest learned first, inside each pre-token of new text.

Ids 0 to 255 are the bytes, merge k makes id 256 + k, special tokens come last. Each step stands below as the textbook
has it. Where much text waits, the class calls bpe_fast.py, which gives the same results in numpy.

    tokenizer = BPETokenizer.train(text, vocab_size=4096)
    ids = tokenizer.encode("Hello world")          # list of int
    ids = tokenizer.encode_array(long_text)        # numpy array, the fast path for whole corpora
    arrays = tokenizer.encode_documents(texts)     # an iterator of them, <|endoftext|> before each text
    text = tokenizer.decode(ids)
    pieces = tokenizer.decode_stream(ids)          # an iterator of str, each id as it comes
    tokenizer.save("vocab.json"); tokenizer = BPETokenizer.load("vocab.json")
    tokenizer = BPETokenizer.from_gpt2("folder")   # the files of GPT-2's own vocabulary

`python bpe_tokenizer.py` shows on the bundled text what all of this does.
"""

import codecs
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import index
from pathlib import Path

import numpy as np

import bpe_fast
import unicode_classes
from bpe_fast import shown, utf8
from harness.files import atomic_write

# ----------------------------------------------------------------------------------------------------------
# Pre-tokenization
# ----------------------------------------------------------------------------------------------------------

# GPT-2's pattern: contractions, then words, numbers and other signs, each with the one space before it, then
# white space, which leaves its last character to what follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-4's (cl100k_base in tiktoken): any one sign may stand before a word, a number has three digits at most, and white
# space is cut at line ends. Both cut combining marks (\p{M}) off the letters before them, and no merge mends that:
# 1.8 kB of Hindi are 452 pre-tokens with GPT-2's pattern, and would be 173 if marks were letters.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def greedy(pattern):
    """`pattern` as Python 3.10 reads it: without possessive repeats, such as x++, which never give back what they took.
    Here a greedy x+ gives nothing back either, since what follows it cannot match any of that. And with \\Z, the end of
    the text, for $, which Python also finds before a last line end."""
    return re.sub(r"([?*+]|\d\})\+", r"\1", pattern).replace("$", r"\Z")


def _compiled(pattern):
    """`pattern` for Python's `re`, with the classes of one fixed Unicode in place of \\p{L}, \\p{N}, \\s and \\S."""
    inside = {r"\p{L}": unicode_classes.LETTERS, r"\p{N}": unicode_classes.NUMBERS, r"\s": unicode_classes.SPACES}
    inside = {name: unicode_classes.members(ranges) for name, ranges in inside.items()}
    pattern = greedy(pattern).replace(r"\S", r"[^\s]")
    for name, members in inside.items():
        alone = rf"{re.escape(name)}(?![^\[]*\])"  # outside of [...]
        pattern = re.sub(alone, lambda _: f"[{members}]", pattern).replace(name, members)
    return re.compile(pattern)


PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}
PRETOKENS = {name: _compiled(pattern) for name, pattern in PATTERNS.items()}
PRETOKEN = PRETOKENS["gpt2"]


def _bulk_pattern(name):
    """What bpe_fast needs to pre-tokenize: the compiled pattern, or None for GPT-2's, which it does by itself."""
    return None if name == "gpt2" else PRETOKENS[name]


def count_pretokens(text, pattern="gpt2"):
    """How often each pre-token occurs in `text`: {pre-token as bytes: how often}."""
    return Counter(pretoken.encode() for pretoken in PRETOKENS[pattern].findall(text))


# ----------------------------------------------------------------------------------------------------------
# Learning merges
# ----------------------------------------------------------------------------------------------------------


def merge(ids, pair, new_id):
    """`ids` with every occurrence of `pair` replaced by `new_id`, from the left: in aaa, only the first aa."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def learn_merges(counts, n_merges):
    """The first `n_merges` merges, a list of (left id, right id): each the most frequent pair, of equals the smallest.

    counts: {pre-token as bytes: how often it occurs}. This is algorithm 1 of Sennrich et al. 2016: every distinct
    pre-token is looked at once and weighs as much as it occurs. Fewer merges if every pre-token becomes one token.
    """
    words = {pretoken: list(pretoken) for pretoken in counts}
    merges = []
    while len(merges) < n_merges:
        pair_counts = Counter()
        for pretoken, ids in words.items():
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += counts[pretoken]
        if not pair_counts:
            break
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        words = {pretoken: merge(ids, best, 256 + len(merges)) for pretoken, ids in words.items()}
        merges.append(best)
    return merges


# ----------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------


def encode_pretoken(pretoken, merge_id):
    """Ids of one pre-token, bytes, as a list of int: the earliest learned merge first, wherever it applies.

    merge_id: {(left id, right id): id of the merged token}. A merge that was learned earlier has a smaller id.
    """
    ids = list(pretoken)
    while len(ids) > 1:
        pair = min(zip(ids, ids[1:]), key=lambda pair: merge_id.get(pair, math.inf))
        if pair not in merge_id:
            break
        ids = merge(ids, pair, merge_id[pair])
    return ids


# ----------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------

_FORMAT = "bpe_tokenizer"
_VERSION = 1


def _names(names, what):
    """`names` as a tuple of strings. A str is refused, since it would be read as a list of one-letter names."""
    if isinstance(names, Iterable) and not isinstance(names, (str, Mapping)):
        names = tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise ValueError(f"{what} must be a list of names, such as ['<|endoftext|>'], not {shown(names)}")


def _is_long(text):
    return isinstance(text, str) and len(text) > bpe_fast.FEW_BYTES


def _byte_order(order):
    """`order` as 256 bytes, None for the natural order. Raises ValueError if it does not hold each byte once."""
    try:
        order = None if order is None else bytes(list(order))
    except (TypeError, ValueError, OverflowError):
        order = b""
    if order is not None and sorted(order) != list(range(256)):
        raise ValueError("byte_order must hold each of the 256 bytes once")
    return None if order == bytes(range(256)) else order


class BPETokenizer:
    """Byte-level BPE with the pre-tokenization of GPT-2 or GPT-4.

    merges: list of (left id, right id), in the order learned; merge k makes id 256 + k.
    special_tokens: list of names that get the ids after the last merge.
    pattern: "gpt2" or "gpt4".
    byte_order: the bytes of the ids 0 to 255, if not their natural order; training has no other.
    Raises ValueError if a merge names an id that does not exist yet, or a name or merge occurs twice, or for a pattern
    or byte order that is none.
    """

    def __init__(self, merges, special_tokens=(), pattern="gpt2", byte_order=None):
        if not isinstance(pattern, str) or pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, not {shown(pattern)}")
        self.pattern, self.byte_order = pattern, _byte_order(byte_order)
        self._byte_id = self.byte_order and bytes(map(self.byte_order.index, range(256)))  # for bytes.translate
        try:
            self.merges = [(index(a), index(b)) for a, b in merges]
        except (TypeError, ValueError):
            raise ValueError(f"merges must be a list of (left id, right id), not {shown(merges)}; "
                             "BPETokenizer.load(path) reads a file") from None
        self.special_tokens = _names(special_tokens, "special_tokens")
        self._bytes = [bytes([i]) for i in self.byte_order or range(256)]
        self._merge_id = {}
        for new_id, (a, b) in enumerate(self.merges, start=256):
            if not (0 <= a < new_id and 0 <= b < new_id):
                raise ValueError(f"merge {new_id - 256} joins {a} and {b}, which do not both exist before it")
            if (a, b) in self._merge_id:
                raise ValueError(f"merge {new_id - 256} joins {a} and {b}, as an earlier one does")
            self._merge_id[a, b] = new_id
            self._bytes.append(self._bytes[a] + self._bytes[b])
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            raise ValueError("special tokens must be distinct and not empty")
        self._special_id = {name: len(self._bytes) + k for k, name in enumerate(self.special_tokens)}
        self._bytes += [utf8(name) for name in self.special_tokens]

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=("<|endoftext|>",), progress=None, pattern="gpt2"):
        """Learn a vocabulary of `vocab_size` tokens (bytes, merges and special tokens together).

        texts: a string or an iterable of strings, each pre-tokenized by itself.
        progress: called with the number of merges learned so far, after each of them. pattern: "gpt2" or "gpt4".
        Among pairs of equal count the smaller pair of ids is merged first, so one text gives one vocabulary. A text
        that runs out of pairs gives a smaller vocabulary. Raises ValueError if `vocab_size` does not hold the bytes and
        the special tokens, and if the texts are names of files.
        """
        special_tokens = cls([], special_tokens, pattern).special_tokens
        if not hasattr(vocab_size, "__index__"):
            raise TypeError(f"vocab_size must be an integer, not {shown(vocab_size)}")
        if not (progress is None or callable(progress)):
            raise TypeError(f"progress must be a function, not {shown(progress)}")
        n_merges = index(vocab_size) - 256 - len(special_tokens)
        if n_merges < 0:
            raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
                             "tokens must fit")
        counts = bpe_fast.count_pretokens(texts, _bulk_pattern(pattern))
        return cls(bpe_fast.learn_merges(counts, n_merges, progress), special_tokens, pattern)

    def encode(self, text, allowed_special=()):
        """Ids of `text`, a list of int.

        allowed_special: names of special tokens to recognize in the text, the longest where several fit; all others are
        read as plain text.
        Raises TypeError for what is no str, ValueError for a lone surrogate and for a name that is no special token of
        this vocabulary.
        """
        special_id = self._allowed(allowed_special)
        return self._bulk(text, special_id).tolist() if _is_long(text) else self._few(text, special_id)

    def encode_array(self, text, allowed_special=()):
        """Ids of `text`, an array of `dtype`, equal to those of `encode`. The fast path for long texts."""
        special_id = self._allowed(allowed_special)
        return self._bulk(text, special_id) if _is_long(text) else np.array(self._few(text, special_id), self.dtype)

    def encode_stream(self, texts, allowed_special=()):
        """Ids of the concatenation of `texts`, an iterable of strings (or one), as an iterator of arrays of `dtype`.

        Memory does not grow with the length of the text, but with the longest stretch that holds no place to cut, such
        as one letter repeated. Raises TypeError and ValueError as `encode` does.
        """
        return self._bulk_encoder.encode(bpe_fast.parts(texts, self._allowed(allowed_special)))

    def encode_documents(self, texts, separator="<|endoftext|>"):
        """Ids of `texts`, an iterable of strings (or one), each encoded by itself, with the id of the special token
        `separator` before each, as an iterator of arrays of `dtype`. A separator within a text is plain text. Raises as
        `encode` does."""
        [special] = self._allowed([separator]).values()
        return self._bulk_encoder.encode(bpe_fast.documents(texts, special))

    def _allowed(self, names):
        """{name: id} of special tokens. Raises ValueError for what is no list of them."""
        names = _names(names, "allowed_special")
        if unknown := set(names) - set(self.special_tokens):
            raise ValueError(f"{min(unknown)!r} is no special token of this vocabulary: "
                             f"{', '.join(self.special_tokens) or 'it has none'}")
        return {name: self._special_id[name] for name in names}

    def _few(self, text, special_id):
        """Ids of a short text, the textbook's way, a list."""
        utf8(text)
        parts = [text]
        if special_id:
            names = sorted(special_id, key=len, reverse=True)  # `re` takes the first that fits
            parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        ids = []
        for k, part in enumerate(parts):
            if k % 2:  # re.split puts the separators at the odd places
                ids.append(special_id[part])
                continue
            for pretoken in PRETOKENS[self.pattern].findall(part):
                data = pretoken.encode().translate(self._byte_id)
                is_long = len(data) > bpe_fast.LONG_BYTES
                ids += (bpe_fast.encode_long_pretoken if is_long else encode_pretoken)(data, self._merge_id)
        return ids

    def _bulk(self, text, special_id):
        """Ids of a long text, an array."""
        return np.concatenate(list(self._bulk_encoder.encode(bpe_fast.parts(text, special_id))))

    @cached_property
    def _bulk_encoder(self):
        return bpe_fast.BulkEncoder(self._merge_id, _bulk_pattern(self.pattern), self.dtype, self._byte_id)

    def token_bytes(self, id):
        """The bytes that token `id` stands for. Raises ValueError if there is no such id."""
        if not 0 <= index(id) < len(self._bytes):
            raise ValueError(f"there is no token {id}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return self._bytes[id]

    def decode_bytes(self, ids):
        """The bytes that ids stand for: integers in a list, an array, a tensor or another iterable of one dimension.

        Raises TypeError for what is no such thing, ValueError for an id outside of the vocabulary.
        """
        if not isinstance(ids, (str, bytes)):
            try:
                return b"".join([self.token_bytes(id) for id in (ids.tolist() if hasattr(ids, "tolist") else ids)])
            except TypeError:
                pass
        raise TypeError(f"ids must be integers in one dimension, such as [72, 105], not {shown(ids)}")

    def decode(self, ids):
        """The text that ids stand for, as in `decode_bytes`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """An iterator of str, one for each of `ids` as they come, and one more for bytes that are left over.

        A character comes with the id that completes it, "" with those before. Together they are `decode(ids)`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            yield decoder.decode(self.token_bytes(id))
        if rest := decoder.decode(b"", final=True):
            yield rest

    @property
    def vocab_size(self):
        return len(self._bytes)

    @property
    def dtype(self):
        """Smallest unsigned numpy type, of 16 bits or more, that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def fingerprint(self):
        """16 hexadecimal digits of a SHA-256 of everything that decides the ids."""
        decides = [_VERSION, PATTERNS[self.pattern], self.merges, self.special_tokens, *self._order().values()]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def _text(self, id):
        """Token `id` as text to read; bytes that are no UTF-8 as \\x escapes."""
        return self._bytes[id].decode("utf-8", errors="backslashreplace")

    def _order(self):
        """The order of the bytes as `save` writes it: nothing if it is the natural one."""
        return {"byte_order": list(self.byte_order)} if self.byte_order else {}

    def _contents(self):
        """What `save` writes."""
        merges = [[a, b, self._text(256 + k)] for k, (a, b) in enumerate(self.merges)]
        return {"format": _FORMAT, "version": _VERSION, "pattern": PATTERNS[self.pattern], **self._order(),
                "special_tokens": self.special_tokens, "fingerprint": self.fingerprint, "merges": merges}

    def to_json(self):
        """The vocabulary as JSON that a person can read: a line per merge, with the token that it makes."""
        contents = self._contents()
        merges = ",\n  ".join(json.dumps(merge, ensure_ascii=False) for merge in contents.pop("merges"))
        head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in contents.items())
        return f'{{\n{head} "merges": [\n  {merges}\n ]\n}}\n'

    def save(self, path):
        """Write the vocabulary to the file `path`, whole or not at all. Raises OSError."""
        atomic_write(path, lambda file: file.write(self.to_json().encode("utf-8")))

    @classmethod
    def load(cls, path):
        """Read a vocabulary that `save` wrote. Raises OSError if there is none, ValueError if it is not whole."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
                raise ValueError("it is no vocabulary of this tokenizer")
            if stored.get("version") != _VERSION:
                raise ValueError(f"its version is {shown(stored.get('version'))}, and this program reads {_VERSION}")
            pattern = [name for name, pattern in PATTERNS.items() if pattern == stored.get("pattern")]
            if not pattern:
                raise ValueError(f"its pattern, {shown(stored.get('pattern'))}, is none of {', '.join(PATTERNS)}")
            merges = stored.get("merges")
            if not isinstance(merges, list) or not all(isinstance(m, list) and len(m) == 3 for m in merges):
                raise ValueError("its merges are not a list of [left id, right id, text]")
            tokenizer = cls([(a, b) for a, b, _ in merges], stored.get("special_tokens"), *pattern,
                            stored.get("byte_order"))
            for key, value in tokenizer._contents().items():
                if json.dumps(stored.get(key)) != json.dumps(value):  # as text, since to Python true and 1 are equal
                    raise ValueError(f"its {key} and the rest of it do not fit together")
        except (ValueError, RecursionError) as error:  # json and UTF-8 errors are ValueErrors too
            reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise ValueError(f"cannot use the vocabulary {path}: {reason}; make it again or take the committed one "
                             "(git checkout)") from None
        return tokenizer

    @classmethod
    def from_gpt2(cls, path):
        """A vocabulary from files of GPT-2's form: merges.txt or vocab.bpe with vocab.json or encoder.json beside it,
        or the tokenizer.json of Hugging Face.

        path: their folder or one of them. Raises FileNotFoundError if they are not there, ValueError if their ids are
        not the bytes, then the merges in order, then special tokens, or if they do what this class does not.
        """
        import bpe_formats  # only here: training and encoding do without it

        return bpe_formats.read_gpt2(Path(path))

    def hf_tokenizer_json(self):
        """The same tokenizer for Hugging Face: a dict that json.dumps makes the text of a tokenizer.json.

        It recognizes all special tokens wherever they stand. Raises ValueError if two tokens have the same bytes, as
        it tells them apart by these.
        """
        import bpe_formats  # only here: training and encoding do without it

        return bpe_formats.tokenizer_json(self)


# ----------------------------------------------------------------------------------------------------------
# What it does, on the bundled text
# ----------------------------------------------------------------------------------------------------------


def main():
    path = Path(__file__).parent / "data" / "input.txt"
    text = path.read_text(encoding="utf-8")
    n_bytes, counts = len(text.encode()), count_pretokens(text)
    print(f"{path.name}: {n_bytes:,} bytes, {counts.total():,} pre-tokens, {len(counts):,} of them different\n")

    part = text[:50_000]
    start = time.perf_counter()
    merges = learn_merges(count_pretokens(part), 100)
    textbook = time.perf_counter()
    assert BPETokenizer.train(part, 256 + 100, special_tokens=()).merges == merges
    fast = time.perf_counter()
    print(f"100 merges of its first 50,000 characters: the textbook's loop takes {textbook - start:.2f} s, bpe_fast\n"
          f"{fast - textbook:.2f} s for the same. The first merges of the whole text:")
    tokenizer = BPETokenizer.train(text, vocab_size=2048)
    for k in range(12):
        left, right = tokenizer.merges[k]
        print(f"  {left:4} + {right:3} -> {256 + k}   {tokenizer._text(left)!r} + {tokenizer._text(right)!r} -> "
              f"{tokenizer._text(256 + k)!r}")

    example = " The lighthouse keeper's lamp burned 24 candles in 1759 ."
    print(f"\nan example:  {example}")
    print(f"pre-tokens:  {'|'.join(PRETOKEN.findall(example))}")
    sizes = (256, 300, 512, 1024, 2048)
    smaller = {size: BPETokenizer(tokenizer.merges[: size - 256]) for size in sizes}
    for size in sizes:
        print(f"{size:5} tokens: {'|'.join(map(smaller[size]._text, smaller[size].encode(example)))}")
    ids = smaller[2048].encode(example)
    print(f"ids:         {ids}")
    print(f"and back:    {tokenizer.decode(ids)}\n")
    for size in sizes:
        print(f"vocabulary {size:5}: {n_bytes / len(smaller[size].encode_array(text)):.2f} bytes per token")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
