"""Byte-level byte-pair encoding (BPE), written by hand.

A tokenizer turns text into integers and back. Byte-pair encoding (Gage 1994; for language models Sennrich et
al. 2016, arXiv:1508.07909; on bytes Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")
starts from the 256 bytes, so that no text is ever unknown, and learns which neighbours to merge:

1. Pre-tokenization cuts the text into words, numbers, punctuation and white space. Merges never cross a cut.
2. Training merges the most frequent pair of neighbouring tokens into a new token, again and again.
3. Encoding replays the merges, the earliest learned first, inside each pre-token of new text.

Ids 0 to 255 are the bytes, merge k makes id 256 + k, special tokens come last. Each step stands below as the textbook
has it. Where a whole corpus waits, the class calls bpe_fast.py, which gives the same results in numpy.

    tokenizer = BPETokenizer.train(text, vocab_size=4096)
    ids = tokenizer.encode("Hello world")          # list of int
    ids = tokenizer.encode_array(long_text)        # numpy array, the fast path for whole corpora
    text = tokenizer.decode(ids)
    tokenizer.save("vocab.json"); tokenizer = BPETokenizer.load("vocab.json")

`python bpe_tokenizer.py` shows on the bundled text what all of this does.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import index
from pathlib import Path

import numpy as np

import bpe_fast
from bpe_fast import shown, utf8

# ----------------------------------------------------------------------------------------------------------
# Pre-tokenization
# ----------------------------------------------------------------------------------------------------------

# GPT-2's pattern: contractions, then words, numbers and other signs, each with the one space before it, then
# white space, which leaves its last character to what follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Python's `re` knows neither \p{L} nor \p{N}, and its \s is not Unicode's White_Space. But its \w is exactly
# letters, numbers and "_", and its \d is Nd, so only the numbers outside Nd (Nl and No: ² Ⅷ ½) must be listed.
_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_OTHER_NUMBERS = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
PRETOKEN = re.compile(
    GPT2_PATTERN.replace(r"[^\s\p{L}\p{N}]", rf"(?:_|[^\w{_SPACES}])")
    .replace(r"\p{L}", rf"[^\W\d_{_OTHER_NUMBERS}]")
    .replace(r"\p{N}", rf"[\d{_OTHER_NUMBERS}]")
    .replace(r"\s", rf"[{_SPACES}]")
    .replace(r"\S", rf"[^{_SPACES}]")
)


def count_pretokens(text):
    """How often each pre-token occurs in `text`: {pre-token as bytes: how often}."""
    return Counter(pretoken.encode() for pretoken in PRETOKEN.findall(text))


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


class BPETokenizer:
    """Byte-level BPE with GPT-2's pre-tokenization.

    merges: list of (left id, right id), in the order learned; merge k makes id 256 + k.
    special_tokens: list of names that get the ids after the last merge.
    Raises ValueError if a merge names an id that does not exist yet, or a name or merge occurs twice.
    """

    def __init__(self, merges, special_tokens=()):
        try:
            self.merges = [(index(a), index(b)) for a, b in merges]
        except (TypeError, ValueError):
            raise ValueError(f"merges must be a list of (left id, right id), not {shown(merges)}; "
                             "BPETokenizer.load(path) reads a file") from None
        self.special_tokens = _names(special_tokens, "special_tokens")
        self._bytes = [bytes([i]) for i in range(256)]
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
    def train(cls, texts, vocab_size, special_tokens=("<|endoftext|>",), progress=None):
        """Learn a vocabulary of `vocab_size` tokens (bytes, merges and special tokens together).

        texts: a string or an iterable of strings, each pre-tokenized by itself.
        progress: called with the number of merges learned so far, after each of them.
        Among pairs of equal count the smaller pair of ids is merged first, so one text gives one vocabulary. A text
        that runs out of pairs gives a smaller vocabulary. Raises ValueError if `vocab_size` does not hold the bytes and
        the special tokens, and if the texts are names of files.
        """
        special_tokens = cls([], special_tokens).special_tokens
        if not hasattr(vocab_size, "__index__"):
            raise TypeError(f"vocab_size must be an integer, not {shown(vocab_size)}")
        if not (progress is None or callable(progress)):
            raise TypeError(f"progress must be a function, not {shown(progress)}")
        n_merges = index(vocab_size) - 256 - len(special_tokens)
        if n_merges < 0:
            raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
                             "tokens must fit")
        counts = bpe_fast.count_pretokens(texts, PRETOKEN)
        return cls(bpe_fast.learn_merges(counts, n_merges, progress), special_tokens)

    def encode(self, text, allowed_special=()):
        """Ids of `text`, a list of int.

        allowed_special: names of special tokens to recognize in the text; all others are read as plain text.
        Raises TypeError for what is no str, ValueError for a lone surrogate and for a name that is no special token of
        this vocabulary.
        """
        allowed_special = _names(allowed_special, "allowed_special")
        if unknown := set(allowed_special) - set(self.special_tokens):
            raise ValueError(f"{min(unknown)!r} is no special token of this vocabulary: "
                             f"{', '.join(self.special_tokens) or 'it has none'}")
        utf8(text)
        parts = [text]
        if allowed_special:
            names = sorted(allowed_special, key=len, reverse=True)  # the longest first, where several would fit
            parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        ids, known = [], {}
        for k, part in enumerate(parts):
            if k % 2:  # re.split puts the separators at the odd places
                ids.append(self._special_id[part])
                continue
            for pretoken in PRETOKEN.findall(part):
                if pretoken not in known:
                    data = pretoken.encode()
                    is_long = len(data) > bpe_fast.LONG_BYTES
                    encode = bpe_fast.encode_long_pretoken if is_long else encode_pretoken
                    known[pretoken] = encode(data, self._merge_id)
                ids += known[pretoken]
        return ids

    def encode_array(self, text):
        """Ids of `text`, an array of `dtype`, equal to `encode(text)`. The fast path for long texts."""
        return np.concatenate(list(self._bulk_encoder.encode([text])))

    def encode_stream(self, texts):
        """Ids of the concatenation of `texts`, an iterable of strings (or one), as an iterator of arrays of `dtype`.

        Memory grows with the number of different words and not with the length of the text. Raises TypeError and
        ValueError as `encode` does.
        """
        return self._bulk_encoder.encode(texts)

    @cached_property
    def _bulk_encoder(self):
        return bpe_fast.BulkEncoder(self._merge_id, PRETOKEN, self.dtype)

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
        decides = json.dumps([_VERSION, GPT2_PATTERN, self.merges, self.special_tokens])
        return hashlib.sha256(decides.encode()).hexdigest()[:16]

    def _text(self, id):
        """Token `id` as text to read; bytes that are no UTF-8 as \\x escapes."""
        return self._bytes[id].decode("utf-8", errors="backslashreplace")

    def _contents(self):
        """What `save` writes."""
        merges = [[a, b, self._text(256 + k)] for k, (a, b) in enumerate(self.merges)]
        return {"format": _FORMAT, "version": _VERSION, "pattern": GPT2_PATTERN, "special_tokens": self.special_tokens,
                "fingerprint": self.fingerprint, "merges": merges}

    def save(self, path):
        """Write the vocabulary as JSON that a person can read: a line per merge, with the token that it makes."""
        contents = self._contents()
        merges = ",\n  ".join(json.dumps(merge, ensure_ascii=False) for merge in contents.pop("merges"))
        head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in contents.items())
        path = Path(path)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a save that fails leaves the old file whole
        try:
            beside.write_text(f'{{\n{head} "merges": [\n  {merges}\n ]\n}}\n', encoding="utf-8", newline="\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """Read a vocabulary that `save` wrote. Raises OSError if there is none, ValueError if it is not whole."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
                raise ValueError("it is no vocabulary of this tokenizer")
            for key, value in ("version", _VERSION), ("pattern", GPT2_PATTERN):
                if stored.get(key) != value:
                    raise ValueError(f"its {key} is {shown(stored.get(key))}, and this program reads {value}")
            merges = stored.get("merges")
            if not isinstance(merges, list) or not all(isinstance(m, list) and len(m) == 3 for m in merges):
                raise ValueError("its merges are not a list of [left id, right id, text]")
            tokenizer = cls([(a, b) for a, b, _ in merges], stored.get("special_tokens"))
            for key, value in tokenizer._contents().items():
                if json.dumps(stored.get(key)) != json.dumps(value):  # as text, since to Python true and 1 are equal
                    raise ValueError(f"its {key} and the rest of it do not fit together")
        except (ValueError, RecursionError) as error:  # json and UTF-8 errors are ValueErrors too
            reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise ValueError(f"cannot use the vocabulary {path}: {reason}; make it again or take the committed one "
                             "(git checkout)") from None
        return tokenizer


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
    main()
