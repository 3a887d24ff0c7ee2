"""Byte-level byte-pair encoding (BPE), written by hand.

A tokenizer turns text into integers and back. Byte-pair encoding (Gage 1994; for language models Sennrich et
al. 2016, arXiv:1508.07909; on bytes Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")
starts from the 256 bytes, so that no text is ever unknown, and learns which neighbours to merge:

1. Pre-tokenization cuts the text into words, numbers, punctuation and white space. Merges never cross a cut.
2. Training merges the most frequent pair of neighbouring tokens into a new token, again and again.
3. Encoding replays the merges, the earliest learned first, inside each piece of new text.

Ids 0 to 255 are the bytes, merge k makes id 256 + k, special tokens come last.

    tokenizer = BPETokenizer.train(text, vocab_size=4096)
    ids = tokenizer.encode("Hello world")          # list of int
    ids = tokenizer.encode_array(long_text)        # numpy array, the fast path for whole corpora
    text = tokenizer.decode(ids)
    tokenizer.save("vocab.json"); tokenizer = BPETokenizer.load("vocab.json")

`python bpe_tokenizer.py` shows on the bundled text what all of this does.
"""

import hashlib
import heapq
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path

import numpy as np

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
_PRETOKEN = re.compile(
    GPT2_PATTERN.replace(r"[^\s\p{L}\p{N}]", rf"(?:_|[^\w{_SPACES}])")
    .replace(r"\p{L}", rf"[^\W\d_{_OTHER_NUMBERS}]")
    .replace(r"\p{N}", rf"[\d{_OTHER_NUMBERS}]")
    .replace(r"\s", rf"[{_SPACES}]")
    .replace(r"\S", rf"[^{_SPACES}]")
)
_SAFE_CUT = re.compile(rf" [^{_SPACES}]")  # where a text may be cut, see _Chunks
_BLOCK = 1 << 20  # characters that the bulk path looks at together


def _utf8(text):
    """The bytes of `text`. Raises ValueError for a lone surrogate, which UTF-8 cannot hold."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"the text has a lone surrogate (U+{code:04X}) at character {error.start}, which UTF-8 "
                         "cannot hold; replace it, e.g. text.encode('utf-8', 'replace').decode()") from None


class _Chunks:
    """Numbers the distinct chunks of a text, so that costly work is done once a chunk and not once a word.

    A text may be cut before every space that a non-space follows. GPT-2's pattern has a boundary there whatever
    comes before: no token holds a space after a non-space, and a run of white space gives up its last character.
    A cut at any other space is glued again where it splits a run of white space.
    """

    def __init__(self):
        self.number = defaultdict(count().__next__)  # chunk without its leading space -> its number
        self.white = bytearray()  # per chunk: 1 if it starts with white space, plus 2 if it ends with it

    def index(self, block):
        """Numbers of the chunks of `block` in order, int64 array. `block` starts with a space and a non-space."""
        parts = block.split(" ")[1:]
        index = np.fromiter(map(self.number.__getitem__, parts), np.int64, len(parts))
        for part in list(self.number)[len(self.white):]:
            self.white.append((not part or part[0].isspace()) + 2 * (not part or part[-1].isspace()))
        white = np.frombuffer(self.white, np.uint8)[index]
        glue = (white[1:] & 1).astype(bool) & (white[:-1] > 1)  # part i + 1 goes on with the white space of part i
        if glue.any():
            inside = np.concatenate([[False], glue])
            edge = np.flatnonzero(np.diff(np.concatenate([glue, [False]]), prepend=False))
            for i, j in edge.reshape(-1, 2).tolist():
                index[i] = self.number[" ".join(parts[i : j + 1])]
            self.white.extend(bytes(len(self.number) - len(self.white)))
            index = index[~inside]
        return index


def _blocks(texts):
    """Cut the concatenation of `texts`, an iterable of strings, into strings of about `_BLOCK` characters or more,
    so that tokenizing each by itself equals tokenizing the whole. All but the first start with a space."""
    pending, size = [], 0
    for text in texts:
        _utf8(text)
        for start in range(0, len(text), _BLOCK):
            piece = text[start : start + _BLOCK]
            pending.append(piece)
            size += len(piece)
            if size < _BLOCK:
                continue
            cut = piece.rfind(" ", 0, len(piece) - 1)
            while cut >= 0 and piece[cut + 1].isspace():
                cut = piece.rfind(" ", 0, cut)
            if cut >= 0:
                pending[-1] = piece[:cut]
                yield "".join(pending)
                pending, size = [piece[cut:]], len(piece) - cut
    yield "".join(pending)


def _split_head(block):
    """(head, rest) of a block, where rest starts at the first safe cut."""
    found = _SAFE_CUT.search(block)
    cut = found.start() if found else len(block)
    return block[:cut], block[cut:]


def _gather(values, lengths, index):
    """Concatenation of the variable-length rows number `index` of a table that is stored end to end in `values`."""
    starts = np.cumsum(lengths) - lengths
    n = lengths[index]
    shift = starts[index] - (np.cumsum(n) - n)  # from the place in the result to the place in the table
    return values[np.repeat(shift, n) + np.arange(n.sum())]


# ----------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------

_FORMAT = "bpe_tokenizer"
_VERSION = 1
_NONE = np.iinfo(np.int64).max  # the id of a pair that no merge joins: larger than every id
_LONG = 64  # bytes of a pre-token from which on rescanning it for every merge costs more than a heap


def _merge(ids, pair, new_id):
    """`ids` with every occurrence of `pair`, from the left, replaced by `new_id`."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


class BPETokenizer:
    """Byte-level BPE with GPT-2's pre-tokenization.

    merges: list of (left id, right id), in the order learned; merge k makes id 256 + k.
    special_tokens: names that get the ids after the last merge.
    Raises ValueError if a merge names an id that does not exist yet, or a name or merge occurs twice.
    """

    def __init__(self, merges, special_tokens=()):
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.special_tokens = tuple(special_tokens)
        self._bytes = [bytes([i]) for i in range(256)]
        self._pair_id = {}
        for new_id, (a, b) in enumerate(self.merges, start=256):
            if not (0 <= a < new_id and 0 <= b < new_id):
                raise ValueError(f"merge {new_id - 256} joins {a} and {b}, which do not both exist before it")
            if (a, b) in self._pair_id:
                raise ValueError(f"merge {new_id - 256} joins {a} and {b}, as an earlier one does")
            self._pair_id[a, b] = new_id
            self._bytes.append(self._bytes[a] + self._bytes[b])
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            raise ValueError("special tokens must be distinct and not empty")
        self._special_id = {name: 256 + len(self.merges) + k for k, name in enumerate(self.special_tokens)}
        self._bytes += [_utf8(name) for name in self.special_tokens]
        # The same table for numpy: a pair is one number, and the sorted numbers are searched.
        keys = np.array([a * self.vocab_size + b for a, b in self.merges], np.int64)
        order = np.argsort(keys)
        self._sorted_keys = np.append(keys[order], _NONE)
        self._sorted_ids = np.append(order + 256, _NONE)

    # -- Training ------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=("<|endoftext|>",), progress=None):
        """Learn a vocabulary of `vocab_size` tokens (bytes, merges and special tokens together).

        texts: a string or an iterable of strings, each pre-tokenized by itself.
        progress: called with the number of merges learned so far, after each of them.
        Among pairs of equal count the smaller pair of ids is merged first, so one text gives one vocabulary. A text
        that runs out of pairs gives a smaller vocabulary. Raises ValueError if `vocab_size` does not hold the bytes and
        the special tokens.
        """
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
                             "tokens must fit")
        frequency = _count_pretokens([texts] if isinstance(texts, str) else texts)
        words = [list(_utf8(word)) for word in frequency]
        frequency = list(frequency.values())

        counts, where = Counter(), defaultdict(set)  # pair -> occurrences in the text; pair -> words that hold it
        for w, word in enumerate(words):
            for pair in zip(word, word[1:]):
                counts[pair] += frequency[w]
                where[pair].add(w)
        heap = [(-n, pair) for pair, n in counts.items()]
        heapq.heapify(heap)

        merges = []
        while len(merges) < n_merges and heap:
            n, pair = heapq.heappop(heap)
            if -n != counts[pair]:  # the count has fallen since this entry was pushed
                if counts[pair] > 0:
                    heapq.heappush(heap, (-counts[pair], pair))
                continue
            new_id = 256 + len(merges)
            merges.append(pair)
            change = Counter()
            for w in where.pop(pair):
                word, n = words[w], frequency[w]
                merged = _merge(word, pair, new_id)
                for old in zip(word, word[1:]):
                    change[old] -= n
                for new in zip(merged, merged[1:]):
                    change[new] += n
                    where[new].add(w)
                words[w] = merged
            for p, n in change.items():
                counts[p] += n
                if n > 0:
                    heapq.heappush(heap, (-counts[p], p))
            if progress:
                progress(len(merges))
        return cls(merges, special_tokens)

    # -- Encoding ------------------------------------------------------------------------------------------

    def encode(self, text, allowed_special=()):
        """Ids of `text`, a list of int.

        allowed_special: names of special tokens to recognize in the text; all others are read as plain text.
        Raises ValueError for a lone surrogate and for a name that is no special token of this vocabulary.
        """
        allowed_special = set(allowed_special)
        if unknown := allowed_special - set(self.special_tokens):
            raise ValueError(f"{min(unknown)!r} is no special token of this vocabulary: "
                             f"{', '.join(self.special_tokens) or 'it has none'}")
        _utf8(text)
        if allowed_special:
            names = sorted(allowed_special, key=len, reverse=True)
            parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        else:
            parts = [text]
        ids, known = [], {}
        for k, part in enumerate(parts):
            if k % 2:  # re.split puts the separators at the odd places
                ids.append(self._special_id[part])
                continue
            for piece in _PRETOKEN.findall(part):
                if piece not in known:
                    known[piece] = self._encode_piece(_utf8(piece))
                ids += known[piece]
        return ids

    def _encode_piece(self, piece):
        """Ids of one pre-token (bytes): the earliest learned merge first, wherever it applies."""
        if len(piece) > _LONG:
            return self._encode_long_piece(piece)
        ids = list(piece)
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda pair: self._pair_id.get(pair, _NONE))
            if pair not in self._pair_id:
                break
            ids = _merge(ids, pair, self._pair_id[pair])
        return ids

    def _encode_long_piece(self, piece):
        """The same, in O(n log n): a heap of the merges that apply, and a linked list instead of new lists."""
        ids, before, after = list(piece), list(range(-1, len(piece) - 1)), list(range(1, len(piece) + 1))
        after[-1] = -1
        merge_id = self._pair_id.get
        heap = [(new_id, i) for i, pair in enumerate(zip(ids, ids[1:])) if (new_id := merge_id(pair))]
        heapq.heapify(heap)
        while heap:
            new_id, i = heapq.heappop(heap)
            j = after[i]
            if j < 0 or ids[i] < 0 or merge_id((ids[i], ids[j])) != new_id:
                continue  # a neighbour has been merged away since this entry was pushed
            ids[i], ids[j] = new_id, -1
            after[i] = k = after[j]
            if k >= 0:
                before[k] = i
                if right := merge_id((new_id, ids[k])):
                    heapq.heappush(heap, (right, i))
            h = before[i]
            if h >= 0 and (left := merge_id((ids[h], new_id))):
                heapq.heappush(heap, (left, h))
        return [i for i in ids if i >= 0]

    def encode_array(self, text):
        """Ids of `text` as an array of `dtype`, equal to `encode(text)`. The fast path for long texts."""
        return np.concatenate(list(self.encode_stream([text])))

    def encode_stream(self, texts):
        """Ids of the concatenation of `texts`, an iterable of strings, as a sequence of arrays of `dtype`.

        Memory grows with the number of different words and not with the length of the text. Raises ValueError for a
        lone surrogate.
        """
        chunks = _Chunks()
        ids, lengths = np.empty(0, self.dtype), np.empty(0, np.int64)  # of all chunks so far, end to end
        for block in _blocks(texts):
            head, rest = _split_head(block)
            if head:
                yield self._encode_chunks([head])[0]
            if rest:
                index = chunks.index(rest)
                new = [" " + chunk for chunk in list(chunks.number)[len(lengths):]]
                if new:
                    new_ids, new_lengths = self._encode_chunks(new)
                    ids, lengths = np.append(ids, new_ids), np.append(lengths, new_lengths)
                yield _gather(ids, lengths, index)
            if not block:
                yield ids

    def _encode_chunks(self, chunks):
        """(ids of all `chunks` end to end, number of ids of each chunk)"""
        # A space and letters are one pre-token: no need to ask the pattern.
        found = [[chunk] if chunk[1:].isalpha() and chunk[0] == " " else _PRETOKEN.findall(chunk) for chunk in chunks]
        pieces = [piece for some in found for piece in some]
        number = defaultdict(count().__next__)
        index = np.fromiter(map(number.__getitem__, pieces), np.int64, len(pieces))
        ids, lengths = self._encode_pieces([_utf8(piece) for piece in number])
        ends = np.cumsum(lengths[index])[np.cumsum([len(some) for some in found]) - 1]
        return _gather(ids, lengths, index).astype(self.dtype), np.diff(ends, prepend=0)

    def _encode_pieces(self, pieces):
        """`_encode_piece` of many pre-tokens side by side: every round does one merge in each of them.

        Returns (ids of all pieces end to end, number of ids of each piece).
        """
        long = [len(piece) > _LONG for piece in pieces]
        short = [b"" if is_long else piece for piece, is_long in zip(pieces, long)]
        ids = np.frombuffer(b"".join(short), np.uint8).astype(np.int64)
        owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in short])
        done = [(np.array(self._encode_long_piece(pieces[i])), i) for i in np.flatnonzero(long).tolist()]
        done = [(new, np.full(len(new), i)) for new, i in done]
        new_id = self._pair_ids(ids, owner, np.arange(len(ids)))  # what each id and the next one are merged to
        while len(ids):
            first = np.flatnonzero(np.diff(owner, prepend=-1))  # where each piece starts
            best = np.minimum.reduceat(new_id, first)
            best = np.repeat(best, np.diff(first, append=len(ids)))
            finished = best == _NONE
            place = np.flatnonzero((new_id == best) & ~finished)
            # In a run of overlapping pairs, such as aaaa, every second one is merged, from the left.
            number = np.arange(len(place))
            run = np.maximum.accumulate(np.where(np.diff(place, prepend=-2) != 1, number, 0))
            place = place[(number - run) % 2 == 0]
            ids[place] = new_id[place]
            done.append((ids[finished], owner[finished]))
            keep = ~finished
            keep[place + 1] = False
            place = (np.cumsum(keep) - 1)[place]  # where the merged ids are among those that are kept
            ids, owner, new_id = ids[keep], owner[keep], new_id[keep]
            for changed in (place, place[place > 0] - 1):
                new_id[changed] = self._pair_ids(ids, owner, changed)
        ids = np.concatenate([some for some, _ in done] or [ids])
        owner = np.concatenate([some for _, some in done] or [owner])
        return ids[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(pieces))

    def _pair_ids(self, ids, owner, places):
        """The id that ids[i] and ids[i + 1] are merged to, for each i of `places`; `_NONE` where no merge joins them
        or they belong to different pieces."""
        after = np.minimum(places + 1, len(ids) - 1)
        keys = ids[places] * self.vocab_size + ids[after]
        found = np.searchsorted(self._sorted_keys, keys)
        joined = (self._sorted_keys[found] == keys) & (owner[places] == owner[after]) & (after > places)
        return np.where(joined, self._sorted_ids[found], _NONE)

    # -- Decoding ------------------------------------------------------------------------------------------

    def token_bytes(self, id):
        """The bytes that token `id` stands for. Raises ValueError if there is no such id."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"there is no token {id}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return self._bytes[id]

    def decode_bytes(self, ids):
        """The bytes that a sequence of ids stands for. Raises ValueError for an id outside of the vocabulary."""
        return b"".join([self.token_bytes(int(id)) for id in ids])

    def decode(self, ids):
        """The text that a sequence of ids stands for; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # -- Properties, files ---------------------------------------------------------------------------------

    @property
    def vocab_size(self):
        return 256 + len(self.merges) + len(self.special_tokens)

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

    def save(self, path):
        """Write the vocabulary as JSON that a person can read: a line per merge, with the token that it makes."""
        lines = [json.dumps([a, b, self._text(256 + k)], ensure_ascii=False) for k, (a, b) in enumerate(self.merges)]
        text = "{\n" + "".join(
            f' "{key}": {json.dumps(value)},\n'
            for key, value in [("format", _FORMAT), ("version", _VERSION), ("pattern", GPT2_PATTERN),
                               ("special_tokens", self.special_tokens), ("fingerprint", self.fingerprint)]
        ) + ' "merges": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
        path = Path(path)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(text, encoding="utf-8", newline="\n")
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
            if stored.get("version") is not _VERSION:
                raise ValueError(f"it has version {stored.get('version')!r}; this program reads version {_VERSION}")
            if stored.get("pattern") != GPT2_PATTERN:
                raise ValueError("it was made for another pre-tokenization pattern than GPT-2's")
            merges, special_tokens = stored.get("merges"), stored.get("special_tokens")
            if not (isinstance(special_tokens, list) and all(isinstance(name, str) for name in special_tokens)):
                raise ValueError("its special_tokens are not a list of names")
            if not isinstance(merges, list) or not all(
                isinstance(m, list) and len(m) == 3 and type(m[0]) is type(m[1]) is int for m in merges
            ):
                raise ValueError("its merges are not a list of [left id, right id, text]")
            tokenizer = cls([(a, b) for a, b, _ in merges], special_tokens)
            for k, (_, _, text) in enumerate(merges):
                if text != tokenizer._text(256 + k):
                    raise ValueError(f"merge {k} makes {tokenizer._text(256 + k)!r}, but the file says {text!r}")
            if stored.get("fingerprint") != tokenizer.fingerprint:
                raise ValueError("its fingerprint does not fit its contents")
        except (ValueError, RecursionError) as error:  # json and UTF-8 errors are ValueErrors too
            reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise ValueError(f"cannot use the vocabulary {path}: {reason}; make it again or take the committed one "
                             "(git checkout)") from None
        return tokenizer


def _count_pretokens(texts):
    """How often each pre-token occurs in `texts`, an iterable of strings."""
    frequency = Counter()
    for text in texts:
        chunks, times = _Chunks(), np.zeros(0, np.int64)
        for block in _blocks([text]):
            head, rest = _split_head(block)
            frequency.update(_PRETOKEN.findall(head))
            if rest:
                index = chunks.index(rest)
                times = np.pad(times, (0, len(chunks.number) - len(times)))
                times += np.bincount(index, minlength=len(times))
        for chunk, n in zip(chunks.number, times.tolist()):
            if n:
                for piece in _PRETOKEN.findall(" " + chunk):
                    frequency[piece] += n
    return frequency


# ----------------------------------------------------------------------------------------------------------
# What it does, on the bundled text
# ----------------------------------------------------------------------------------------------------------


def main():
    path = Path(__file__).parent / "data" / "input.txt"
    text = path.read_text(encoding="utf-8")
    tokenizer = BPETokenizer.train(text, vocab_size=2048)
    print(f"{path.name}: {len(_utf8(text)):,} bytes, {sum(_count_pretokens([text]).values()):,} pre-tokens, "
          f"{len(_count_pretokens([text])):,} of them different\n")
    print("the first merges:")
    for k in range(12):
        left, right = tokenizer.merges[k]
        print(f"  {left:4} + {right:3} -> {256 + k}   {tokenizer._text(left)!r} + {tokenizer._text(right)!r} -> "
              f"{tokenizer._text(256 + k)!r}")
    example = " The lighthouse keeper's lamp burned 24 candles in 1759 ."
    print(f"\nan example:  {example}")
    print(f"pre-tokens:  {'|'.join(_PRETOKEN.findall(example))}")
    for size in (256, 300, 512, 1024, 2048):
        smaller = BPETokenizer(tokenizer.merges[: size - 256])
        ids = smaller.encode(example)
        print(f"{size:5} tokens: {'|'.join(smaller._text(i) for i in ids)}")
    print(f"ids:         {ids}")
    print(f"and back:    {tokenizer.decode(ids)}\n")
    for size in (256, 300, 512, 1024, 2048):
        smaller = BPETokenizer(tokenizer.merges[: size - 256])
        print(f"vocabulary {size:5}: {len(_utf8(text)) / len(smaller.encode_array(text)):.2f} bytes per token")


if __name__ == "__main__":
    main()
