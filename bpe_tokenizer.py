"""Byte-level byte-pair encoding (BPE), written by hand.

A tokenizer turns text into integers and back. Byte-pair encoding (Gage 1994; for language models Sennrich et
al. 2016, arXiv:1508.07909; on bytes Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")
starts with the 256 bytes, so it can encode any text, and learns which neighbours to merge:

1. Pre-tokenization cuts the text into words, numbers, punctuation and white space. Merges never cross a cut.
2. Training merges the most frequent pair of neighbouring tokens into a new token, again and again.
3. Encoding replays the merges, the earliest learned first, inside each pre-token of new text.

Ids 0 to 255 are the bytes, merge k makes id 256 + k, and special tokens have the last ids. The functions below follow
the textbook. For long texts the class uses the package bpe/, which computes the same results faster, with numpy.

    tokenizer = BPETokenizer.train(text, vocab_size=4096)
    ids = tokenizer.encode("Hello world")          # list of int
    ids = tokenizer.encode_array(long_text)        # numpy array, the fast path for whole corpora
    arrays = tokenizer.encode_documents(texts)     # an iterator of arrays, <|endoftext|> before each text
    text = tokenizer.decode(ids)
    pieces = tokenizer.decode_stream(ids)          # an iterator of str, one for each id as it arrives
    tokenizer.save("vocab.json"); tokenizer = BPETokenizer.load("vocab.json")
    tokenizer = BPETokenizer.from_gpt2("folder")   # GPT-2's own vocabulary files

`python bpe_tokenizer.py` demonstrates all of this on the bundled text.
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

import bpe.encode
import bpe.formats
import bpe.learn
import bpe.pretokens
import bpe.unicode
from bpe import shown
from bpe.pretokens import utf8
from harness.errors import FileError, MissingFileError, UserError
from harness.files import atomic_write

# ----------------------------------------------------------------------------------------------------------
# Pre-tokenization
# ----------------------------------------------------------------------------------------------------------

# GPT-2's pattern: contractions; then words, numbers and runs of other signs, each with at most one space before it;
# then white space, without its last character if text follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# GPT-4's pattern (cl100k_base in tiktoken): a word may begin with any one sign, a number has at most three digits, and
# white space is cut at line ends. Both patterns separate combining marks (\p{M}) from the letters before them, and
# merges cannot undo this: GPT-2's pattern cuts 1.8 kB of Hindi into 452 pre-tokens; if marks were letters, into 173.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}
PRETOKENS = {name: bpe.unicode.compile_pattern(pattern) for name, pattern in PATTERNS.items()}
PRETOKEN = PRETOKENS["gpt2"]


def _bulk_pattern(name):
    """The pattern as the package bpe/ expects it: compiled, or None for GPT-2's, which it finds without `re`."""
    return None if name == "gpt2" else PRETOKENS[name]


def count_pretokens(text, pattern="gpt2"):
    """How often each pre-token occurs in `text`: a Counter, {pre-token as bytes: count}."""
    return Counter(pretoken.encode() for pretoken in PRETOKENS[pattern].findall(text))


# ----------------------------------------------------------------------------------------------------------
# Learning merges
# ----------------------------------------------------------------------------------------------------------


def merge(ids, pair, new_id):
    """`ids` with each occurrence of `pair` replaced by `new_id`, from left to right: in aaa, only the first aa."""
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
    """The first `n_merges` merges, a list of (left id, right id). Fewer if every pre-token becomes one token.

    counts: {pre-token as bytes: count}. This is algorithm 1 of Sennrich et al. 2016: each distinct pre-token is
    processed once, weighted by its count. The most frequent pair is merged; among equally frequent pairs, the smallest.
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
    """The ids of one pre-token, a list of int: the earliest learned merge is applied first, wherever it occurs.

    pretoken: bytes. merge_id: {(left id, right id): id of the merged token}; an earlier merge has a smaller id.
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
    """`names` as a tuple of str. Raises ValueError for a single str, which would be a list of one-letter names."""
    if isinstance(names, Iterable) and not isinstance(names, (str, Mapping)):
        names = tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise ValueError(f"{what} must be a list of names, such as ['<|endoftext|>'], not {shown(names)}")


def _is_long(text):
    return isinstance(text, str) and len(text) > bpe.encode.FEW_BYTES


def _byte_order(order):
    """`order` as 256 bytes, or None for the natural order. Raises ValueError unless it holds each byte once."""
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
    special_tokens: list of names, which get the ids after the last merge.
    pattern: "gpt2" or "gpt4".
    byte_order: the bytes of the ids 0 to 255, if not in natural order; `train` always uses the natural order.
    Raises ValueError if a merge uses an id that does not exist yet, if a name or a merge occurs twice, or if `pattern`
    or `byte_order` is invalid.
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
        """Learn a vocabulary of `vocab_size` tokens: bytes, merges and special tokens together.

        texts: an iterable of str, each pre-tokenized on its own, or one str. A long text may be an iterator of str,
        its pieces.
        progress: called with the number of merges learned so far, after each of them. pattern: "gpt2" or "gpt4".
        Among equally frequent pairs the smallest is merged first, so the same text always gives the same vocabulary.
        The vocabulary is smaller if the text runs out of pairs.
        Raises TypeError for an argument of the wrong type, ValueError if `vocab_size` is too small for the bytes and
        the special tokens, or if the texts are only names of files.
        """
        special_tokens = cls([], special_tokens, pattern).special_tokens
        if not hasattr(vocab_size, "__index__"):
            raise TypeError(f"vocab_size must be an integer, not {shown(vocab_size)}")
        if not (progress is None or callable(progress)):
            raise TypeError(f"progress must be a function, not {shown(progress)}")
        n_merges = index(vocab_size) - 256 - len(special_tokens)
        if n_merges < 0:
            raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
                            "tokens must fit")
        counts = bpe.pretokens.count_pretokens(texts, _bulk_pattern(pattern))
        return cls(bpe.learn.learn_merges(counts, n_merges, progress), special_tokens, pattern)

    def encode(self, text, allowed_special=()):
        """The ids of `text`, a list of int.

        allowed_special: names of the special tokens to recognize in the text; all others are read as plain text. If
        several names match at one place, the longest wins.
        Raises TypeError if `text` is not a str, ValueError if it contains a lone surrogate, or if a name is not a
        special token of this vocabulary.
        """
        special_id = self._allowed(allowed_special)
        return self._bulk(text, special_id).tolist() if _is_long(text) else self._few(text, special_id)

    def encode_array(self, text, allowed_special=()):
        """The ids of `text`, as from `encode`, but as an array of `dtype`. Faster for long texts."""
        special_id = self._allowed(allowed_special)
        return self._bulk(text, special_id) if _is_long(text) else np.array(self._few(text, special_id), self.dtype)

    def encode_stream(self, texts, allowed_special=()):
        """The ids of the concatenation of `texts`, as an iterator of arrays of `dtype`.

        texts: an iterable of str, or one str.
        Memory does not grow with the length of the text, only with the longest stretch that cannot be cut, such as one
        letter repeated. Raises TypeError and ValueError as `encode` does.
        """
        return self._bulk_encoder.encode(bpe.pretokens.parts(texts, self._allowed(allowed_special)))

    def encode_documents(self, texts, separator="<|endoftext|>"):
        """The ids of `texts`, each encoded on its own after the id of `separator`, as an iterator of arrays of `dtype`.

        texts: an iterable of str, or of iterators of str, which give a long text in pieces; or one str. separator: a
        special token; inside a text it is plain text.
        Raises TypeError and ValueError as `encode` does.
        """
        [special] = self._allowed([separator]).values()
        return self._bulk_encoder.encode(bpe.pretokens.documents(texts, special))

    def _allowed(self, names):
        """{name: id} of special tokens. Raises ValueError unless `names` is a list of special tokens."""
        names = _names(names, "allowed_special")
        if unknown := set(names) - set(self.special_tokens):
            raise ValueError(f"{min(unknown)!r} is not a special token of this vocabulary, which has "
                             f"{', '.join(self.special_tokens) or 'none'}")
        return {name: self._special_id[name] for name in names}

    def _few(self, text, special_id):
        """The ids of a short text, a list, found with the textbook's functions."""
        utf8(text)  # raises the errors that `encode` promises
        parts = [text]
        if special_id:
            names = sorted(special_id, key=len, reverse=True)  # `re` takes the first that matches
            parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        ids = []
        for k, part in enumerate(parts):
            if k % 2:  # re.split puts the separators at the odd places
                ids.append(special_id[part])
                continue
            for pretoken in PRETOKENS[self.pattern].findall(part):
                data = pretoken.encode().translate(self._byte_id)
                is_long = len(data) > bpe.encode.LONG_BYTES
                ids += (bpe.encode.encode_long_pretoken if is_long else encode_pretoken)(data, self._merge_id)
        return ids

    def _bulk(self, text, special_id):
        """The ids of a long text, an array."""
        return np.concatenate(list(self._bulk_encoder.encode(bpe.pretokens.parts(text, special_id))))

    @cached_property
    def _bulk_encoder(self):
        return bpe.encode.BulkEncoder(self._merge_id, _bulk_pattern(self.pattern), self.dtype, self._byte_id)

    def token_bytes(self, id):
        """The bytes of token `id`. Raises ValueError if there is no such id."""
        if not 0 <= index(id) < len(self._bytes):
            raise ValueError(f"there is no token {id}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return self._bytes[id]

    def decode_bytes(self, ids):
        """The bytes of all `ids`, end to end.

        ids: integers in a list, an array, a tensor or any other one-dimensional iterable.
        Raises TypeError if `ids` is anything else, ValueError for an id outside the vocabulary.
        """
        if not isinstance(ids, (str, bytes)):
            try:
                return b"".join([self.token_bytes(id) for id in (ids.tolist() if hasattr(ids, "tolist") else ids)])
            except TypeError:
                pass
        raise TypeError(f"ids must be integers in one dimension, such as [72, 105], not {shown(ids)}")

    def decode(self, ids):
        """The text of `ids`. Invalid UTF-8 becomes U+FFFD. Takes and raises what `decode_bytes` does."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """The text of `ids` as an iterator of str: one for each id as it arrives, and one more if bytes are left over.

        A character is returned with the id that completes it; the ids before it give "". Joined, the strings equal
        `decode(ids)`.
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
        """The smallest unsigned numpy type with at least 16 bits that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def fingerprint(self):
        """16 hexadecimal digits of a SHA-256 hash of everything that determines the ids."""
        decides = [_VERSION, PATTERNS[self.pattern], self.merges, self.special_tokens, *self._order().values()]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def _text(self, id):
        """Token `id` as readable text; invalid UTF-8 becomes \\x escapes."""
        return self._bytes[id].decode("utf-8", errors="backslashreplace")

    def _order(self):
        """The order of the bytes as `save` writes it: nothing for the natural order."""
        return {"byte_order": list(self.byte_order)} if self.byte_order else {}

    def _contents(self):
        """What `save` writes, a dict."""
        merges = [[a, b, self._text(256 + k)] for k, (a, b) in enumerate(self.merges)]
        return {"format": _FORMAT, "version": _VERSION, "pattern": PATTERNS[self.pattern], **self._order(),
                "special_tokens": self.special_tokens, "fingerprint": self.fingerprint, "merges": merges}

    def to_json(self):
        """The vocabulary as readable JSON, a str: one line per merge, with the token that it makes."""
        contents = self._contents()
        merges = ",\n  ".join(json.dumps(merge, ensure_ascii=False) for merge in contents.pop("merges"))
        head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in contents.items())
        return f'{{\n{head} "merges": [\n  {merges}\n ]\n}}\n'

    def save(self, path):
        """Write the vocabulary to the file `path`, whole or not at all. Raises OSError."""
        atomic_write(path, lambda file: file.write(self.to_json().encode("utf-8")))

    @classmethod
    def load(cls, path):
        """Read a vocabulary that `save` wrote. Raises OSError if it cannot be read, ValueError if it is damaged."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
                raise ValueError("it is not a vocabulary of this tokenizer")
            if stored.get("version") != _VERSION:
                raise ValueError(f"its version is {shown(stored.get('version'))}, but this program reads {_VERSION}")
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
                    raise ValueError(f"its {key} does not match the rest of it")
        except FileNotFoundError:
            raise MissingFileError(f"there is no vocabulary {path}") from None
        except OSError as error:
            raise FileError(f"the vocabulary {path} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:  # json and UTF-8 errors are ValueErrors too
            reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise UserError(f"cannot use the vocabulary {path}: {reason}; make it again, or restore the committed "
                            "one (git checkout)") from None
        return tokenizer

    @classmethod
    def from_gpt2(cls, path):
        """Read a vocabulary in GPT-2's format (merges.txt or vocab.bpe, with vocab.json or encoder.json in the same
        folder) or in Hugging Face's (tokenizer.json).

        path: the folder or one of the files. Raises FileNotFoundError if files are missing, ValueError if the ids are
        not the bytes, then the merges in order, then special tokens, or if the files ask for what this class cannot do.
        """
        return bpe.formats.read_gpt2(Path(path), PATTERNS, cls)

    def hf_tokenizer_json(self):
        """The contents of a tokenizer.json for Hugging Face, a dict: `json.dumps` it.

        There, special tokens are recognized anywhere in a text. Raises ValueError if two tokens have the same bytes,
        since the format identifies tokens by their bytes.
        """
        return bpe.formats.tokenizer_json(self, PATTERNS)


# ----------------------------------------------------------------------------------------------------------
# A demonstration on the bundled text
# ----------------------------------------------------------------------------------------------------------


def main():
    path = Path(__file__).parent / "data" / "input.txt"
    text = path.read_text(encoding="utf-8")
    n_bytes, counts = len(text.encode()), count_pretokens(text)
    print(f"{path.name}: {n_bytes:,} bytes, {counts.total():,} pre-tokens, {len(counts):,} of them distinct\n")

    part = text[:50_000]
    start = time.perf_counter()
    merges = learn_merges(count_pretokens(part), 100)
    textbook = time.perf_counter()
    assert BPETokenizer.train(part, 256 + 100, special_tokens=()).merges == merges
    fast = time.perf_counter()
    print(f"100 merges of its first 50,000 characters: the textbook's loop takes {textbook - start:.2f} s, bpe/ takes\n"
          f"{fast - textbook:.2f} s for the same merges. The first merges of the whole text:")
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
    except BrokenPipeError:  # the reader, such as head, has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
