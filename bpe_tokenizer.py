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
from array import array
from collections import Counter, defaultdict
from itertools import count, islice
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
# Bytes that a white-space character may start with.
_MAY_BE_SPACE = np.isin(np.arange(256), list(b"\t\n\v\f\r \xc2\xe1\xe2\xe3"))
_BLOCK = 1 << 18  # bytes that the bulk path looks at together: they stay in the processor's cache
_FEW = 4096  # characters of a text that are too few for the bulk path to pay
_SHORT = 15  # bytes of a chunk that two 64-bit numbers hold, beside its length
_MASK = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # selects the first n of 8 bytes


def _utf8(text):
    """The bytes of `text`. Raises ValueError for a lone surrogate, which UTF-8 cannot hold."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"the text has a lone surrogate (U+{code:04X}) at character {error.start}, which UTF-8 "
                         "cannot hold; replace it, e.g. text.encode('utf-8', 'replace').decode()") from None


def _cuts(data):
    """Where a text (uint8 array) may be cut so that tokenizing the parts equals tokenizing the whole.

    That is before every space that a non-space follows. GPT-2's pattern has a boundary there whatever comes before: no
    token holds a space after a non-space, and a run of white space gives up its last character.
    """
    spaces = np.flatnonzero(data[:-1] == ord(" "))
    return spaces[~_MAY_BE_SPACE.take(data.take(spaces + 1))]


def _blocks(texts):
    """Cut the concatenation of `texts`, an iterable of strings, at `_cuts` into UTF-8 strings of about `_BLOCK` bytes,
    or more where there is no place to cut."""
    pending, size = [], 0
    for text in texts:
        data = _utf8(text)
        for start in range(0, len(data), _BLOCK):
            piece = data[start : start + _BLOCK]
            pending.append(piece)
            size += len(piece)
            if size < _BLOCK:
                continue
            for tail in (piece[-1000:], piece):  # a place to cut is rarely far from the end
                if len(cuts := _cuts(np.frombuffer(tail, np.uint8))):
                    cut = len(piece) - len(tail) + int(cuts[-1])
                    pending[-1] = piece[:cut]
                    yield b"".join(pending)
                    pending, size = [piece[cut:]], len(piece) - cut
                    break
    yield b"".join(pending)


class _Chunks:
    """Numbers the distinct chunks of a text, from cut to cut, so that costly work is done once a chunk.

    The bytes and the length of a short chunk make two 64-bit numbers. All chunks of a block are looked up side by side
    in a hash table with linear probing (Knuth, The Art of Computer Programming 3, section 6.4), made of numpy arrays.
    A table that is half full gives way to an empty, larger one, so that a chunk may have more than one number.
    """

    def __init__(self):
        self.chunks = []  # the bytes of each chunk, by number
        self.long = {}  # number of each chunk of more than _SHORT bytes
        self._make_table(1 << 17)

    def _make_table(self, size):
        self.used, self.shift = 0, np.uint64(65 - size.bit_length())
        self.low, self.high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)  # free where high is 0
        self.number = np.zeros(size, np.int64)

    def index(self, block):
        """Numbers of the chunks of `block` (bytes, at least one) in order, int64 array."""
        n = len(block)
        data = np.frombuffer(block + bytes(16), np.uint8)
        start = _cuts(data[:n])
        if not len(start) or start[0] > 0:
            start = np.concatenate([[0], start])
        length = np.diff(start, append=n)
        sixteen = np.ndarray(n, "V16", data, strides=(1,))  # the bytes from each place on, which overlap
        numbers = sixteen[start].view("<u8")
        low = numbers[::2] & _MASK.take(length, mode="clip")
        rest = np.clip(length - 8, 0, _SHORT - 8)
        high = numbers[1::2] & _MASK.take(rest) | length.astype(np.uint64) << np.uint64(56)
        long = np.flatnonzero(length > _SHORT)
        if len(long):
            low[long] = high[long] = 1 << 56  # a chunk of one byte, for now
        index, first = self._look_up(low, high)
        self.chunks += [block[i : i + m] for i, m in zip(start[first].tolist(), length[first].tolist())]
        for k, i, m in zip(long.tolist(), start[long].tolist(), length[long].tolist()):
            chunk = block[i : i + m]
            if chunk not in self.long:
                self.long[chunk] = len(self.chunks)
                self.chunks.append(chunk)
            index[k] = self.long[chunk]
        return index

    def _look_up(self, low, high):
        """(number of each key, which keys got a new number, in the order of their numbers)"""
        if max(2 * self.used, self.used + len(low)) > len(self.number):
            self._make_table(4 * max(len(self.number), 1 << len(low).bit_length()))
        mixed = (low ^ high * np.uint64(0xC2B2AE3D27D4EB4F)) * np.uint64(0x9E3779B97F4A7C15)  # odd, otherwise arbitrary
        slot = (mixed >> self.shift).view(np.int64)
        index, new = self.number.take(slot), [np.empty(0, np.int64)]
        todo = np.flatnonzero((self.low.take(slot) != low) | (self.high.take(slot) != high))
        while len(todo):
            place = slot[todo]
            free = np.flatnonzero(self.high.take(place) == 0)
            claimed, winner = np.unique(place[free], return_index=True)  # one of those that meet a free slot gets it
            winner = todo[free[winner]]
            self.low[claimed], self.high[claimed] = low[winner], high[winner]
            self.number[claimed] = np.arange(len(winner)) + len(self.chunks) + sum(map(len, new))
            new.append(winner)
            same = (self.low.take(place) == low[todo]) & (self.high.take(place) == high[todo])
            index[todo[same]] = self.number.take(place[same])
            todo = todo[~same]
            slot[todo] = (slot[todo] + 1) % len(self.number)
        new = np.concatenate(new)
        self.used += len(new)
        return index, new


def _pretokens(chunk):
    """Pre-tokens of a chunk, as bytes."""
    if chunk[:1] == b" " and chunk[1:].isalpha():  # a space and ASCII letters are one: no need to ask the pattern
        return [chunk]
    return [piece.encode() for piece in _PRETOKEN.findall(chunk.decode())]


def _count_pretokens(texts):
    """How often each pre-token, as bytes, occurs in `texts`, an iterable of strings."""
    frequency, chunks, times = Counter(), _Chunks(), np.zeros(0, np.int64)
    for text in texts:
        if len(text) < _FEW:
            _utf8(text)
            frequency.update(piece.encode() for piece in _PRETOKEN.findall(text))
            continue
        for block in _blocks([text]):
            index = chunks.index(block)
            times = np.pad(times, (0, len(chunks.chunks) - len(times)))
            times += np.bincount(index, minlength=len(times))
    for chunk, n in zip(chunks.chunks, times.tolist()):
        if n:
            for piece in _pretokens(chunk):
                frequency[piece] += n
    return frequency


def _gather(values, lengths, index):
    """Concatenation of the variable-length rows number `index` of a table that is stored end to end in `values`."""
    starts = np.cumsum(lengths) - lengths
    n = lengths.take(index)
    shift = starts.take(index) - (np.cumsum(n) - n)  # from the place in the result to the place in the table
    return values.take(np.repeat(shift, n) + np.arange(n.sum()))


# ----------------------------------------------------------------------------------------------------------
# Learning merges
# ----------------------------------------------------------------------------------------------------------

_PAIR = 1 << 32  # the pair of tokens a and b is the number a * _PAIR + b, so pairs compare as numbers do


def _totals(keys, weights):
    """(the distinct `keys` ascending, the sum of the `weights` of each)"""
    order = np.argsort(keys, kind="stable")  # faster than the default, not needed otherwise
    keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else order
    return keys[first], np.add.reduceat(weights[order], first) if len(keys) else weights


class _Corpus:
    """The distinct words of a text in one array of tokens, which merges shorten in place.

    words: their bytes; frequency: how often each occurs in the text. Separators, -1, stand around the words. A merge
    puts its token where the left one was; `left` and `right` link each place to its neighbours that are still in use.
    """

    def __init__(self, words, frequency):
        ends = np.cumsum([len(word) + 1 for word in words], dtype=np.int64)
        inside = np.ones(1 + sum(map(len, words)) + len(words), bool)
        inside[0] = inside[ends] = False
        places = np.flatnonzero(inside)
        self.ids, self.weight = np.full(len(inside), -1), np.zeros(len(inside), np.int64)
        self.ids[places] = text = np.frombuffer(b"".join(words), np.uint8)
        self.weight[places] = np.repeat(np.array(frequency, np.int64), [len(word) for word in words])
        self.left, self.right = np.arange(len(inside)) - 1, np.arange(len(inside)) + 1
        order = places[np.argsort(text, kind="stable")]
        self.places = np.split(order, np.cumsum(np.bincount(text, minlength=256))[:-1])  # of each token, ascending

    def pairs(self, i):
        """(the pairs that start at places `i`, how often each occurs in the text: never if it holds a separator)"""
        j = self.right.take(i)
        return self.ids.take(i) * _PAIR + self.ids.take(j), np.minimum(self.weight.take(i), self.weight.take(j))

    def pair_totals(self):
        """(all pairs ascending, how often each occurs in the text)"""
        return _totals(*self.pairs(np.flatnonzero(self.weight)))

    def find(self, a, b):
        """Places where token a is followed by token b, ascending; of overlapping ones, as in aaa, every second."""
        newer = max(a, b)
        at = self.places[newer]
        self.places[newer] = at = at[self.ids.take(at) == newer]  # some have been merged away
        if a == newer:
            i = at[self.ids.take(self.right.take(at)) == b]
        else:
            i = self.left.take(at)
            i = i[self.ids.take(i) == a]
        if a == b:
            number = np.arange(len(i))
            run = np.maximum.accumulate(np.where(self.left[i] != np.concatenate([[-1], i])[:-1], number, 0))
            i = i[(number - run) % 2 == 0]
        return i

    def new_pairs(self, places):
        """For each of several merges, found at `places` (a list of arrays), a bound on how often a pair that it makes
        occurs: the most frequent neighbour, on either side, of the merged pair."""
        i, merge = np.concatenate(places), np.repeat(np.arange(len(places)), [len(some) for some in places])
        before, after = self.left[i], self.right[self.right[i]]
        sides = [2 * merge * _PAIR + self.ids[before] + 1, (2 * merge + 1) * _PAIR + self.ids[after] + 1]
        weights = [np.minimum(self.weight[i], self.weight[before]), np.minimum(self.weight[i], self.weight[after])]
        keys, total = _totals(np.concatenate(sides), np.concatenate(weights))
        bound = np.zeros(len(places), np.int64)
        np.maximum.at(bound, keys // (2 * _PAIR), total)
        return bound

    def merge(self, places):
        """Merge the pairs at `places`, a list of arrays, into one new token for each array, numbered as they come.

        Returns (pairs whose number changes, by how much).
        """
        new = np.repeat(len(self.places) + np.arange(len(places)), [len(some) for some in places])
        i = np.concatenate(places)
        j = self.right[i]
        before, after = self.left[i], self.right[j]
        touched = np.sort(np.concatenate([before, i, j]))
        touched = touched[np.diff(touched, prepend=-1) > 0]
        old_pairs, old_weights = self.pairs(touched)
        self.ids[i], self.ids[j], self.weight[j] = new, -1, 0
        self.right[i], self.left[after] = after, i
        self.places += places
        pairs, weights = self.pairs(touched)
        return _totals(np.concatenate([old_pairs, pairs]), np.concatenate([-old_weights, weights]))


def _learn_merges(words, frequency, n_merges, progress):
    """The first `n_merges` merges, (left id, right id): each the most frequent pair, of equals the smallest.

    Those that come next are merged together, as long as no two of them overlap in a word (no left token of one is the
    right token of another) and no pair that they make is as frequent as one that still waits: then the order does not
    matter. Only pairs that occur `floor` times or more are kept count of; when all of them are merged, it is lowered.
    """
    corpus = _Corpus(words, frequency)
    merges, counts, heap, floor = [], {}, [], None
    while len(merges) < n_merges:
        batch, lefts, rights = [], set(), set()
        while heap and len(batch) < min(256, n_merges - len(merges)):
            count, pair = -heap[0][0], heap[0][1]
            if count != counts[pair]:  # it has fallen since this entry was pushed
                heapq.heapreplace(heap, (-counts[pair], pair))
                continue
            a, b = divmod(pair, _PAIR)
            if count < floor or a in rights or b in lefts:
                break
            heapq.heappop(heap)
            batch.append((count, a, b))
            lefts.add(a)
            rights.add(b)
        if not batch:
            if floor == 1:
                break  # every word is one token
            pairs, total = corpus.pair_totals()
            floor = max(1, (floor or total.max(initial=1)) // 8)
            often = total >= floor
            counts = dict(zip(pairs[often].tolist(), total[often].tolist()))
            heap = [(-count, pair) for pair, count in counts.items()]
            heapq.heapify(heap)
            continue

        places = [corpus.find(a, b) for _, a, b in batch]
        bounds = np.maximum.accumulate(corpus.new_pairs(places)).tolist()
        n = 1
        while n < len(batch) and batch[n][0] > bounds[n - 1]:
            n += 1
        for count, a, b in batch[n:]:
            heapq.heappush(heap, (-count, a * _PAIR + b))
        pairs, changes = corpus.merge(places[:n])
        for _, a, b in batch[:n]:
            merges.append((a, b))
            if progress:
                progress(len(merges))
        changed = changes != 0
        for pair, change in zip(pairs[changed].tolist(), changes[changed].tolist()):
            if pair in counts:
                counts[pair] += change
            elif change >= floor:
                counts[pair] = change
                heapq.heappush(heap, (-change, pair))
    return merges


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
        # The same table for numpy: a pair is one number. It has a slot in a table; if another pair holds the slot, it
        # is searched for among the sorted numbers.
        keys = np.array([a * self.vocab_size + b for a, b in self.merges], np.int64)
        order = np.argsort(keys)
        self._sorted_keys = np.append(keys[order], _NONE)
        self._sorted_ids = np.append(order + 256, _NONE)
        self._slot_key = np.full(1 << (16 * len(keys) + 1).bit_length(), -1)
        self._slot_id = np.full(len(self._slot_key), _NONE)
        slots = self._slot(keys)
        self._slot_key[slots] = keys
        self._slot_id[slots] = np.arange(len(keys)) + 256
        self._byte_pairs = self._find_pairs(np.arange(256).repeat(256), np.tile(np.arange(256), 256))

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
        merges = _learn_merges(list(frequency), list(frequency.values()), n_merges, progress)
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
        """The same, in O(n log n): a heap of the merges that apply, and a linked list instead of new lists. An entry of
        the heap is one number, new id times 2^40 plus place, which takes less memory than a pair."""
        n, place = len(piece), (1 << 40) - 1
        ids, before, after = array("i", list(piece)), array("i", range(-1, n - 1)), array("i", range(1, n + 1))
        after[-1] = -1
        merge_id = self._pair_id.get
        heap = [new_id << 40 | i for i, pair in enumerate(zip(piece, piece[1:])) if (new_id := merge_id(pair))]
        heapq.heapify(heap)
        while heap:
            entry = heapq.heappop(heap)
            new_id, i = entry >> 40, entry & place
            j = after[i]
            if j < 0 or ids[i] < 0 or merge_id((ids[i], ids[j])) != new_id:
                continue  # a neighbour has been merged away since this entry was pushed
            ids[i], ids[j] = new_id, -1
            after[i] = k = after[j]
            if k >= 0:
                before[k] = i
                if right := merge_id((new_id, ids[k])):
                    heapq.heappush(heap, right << 40 | i)
            h = before[i]
            if h >= 0 and (left := merge_id((ids[h], new_id))):
                heapq.heappush(heap, left << 40 | h)
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
        blocks = _blocks(texts)
        while group := list(islice(blocks, 32)):  # the new chunks of many blocks are encoded together
            indices = [chunks.index(block) if block else np.empty(0, np.int64) for block in group]
            if new := chunks.chunks[len(lengths) :]:
                new_ids, new_lengths = self._encode_chunks(new)
                ids, lengths = np.append(ids, new_ids), np.append(lengths, new_lengths)
            for index in indices:
                yield _gather(ids, lengths, index)

    def _encode_chunks(self, chunks):
        """(ids of all `chunks` end to end, number of ids of each chunk)"""
        pieces, sizes = [], []  # pre-tokens of all chunks, how many of each
        for chunk in chunks:
            some = _pretokens(chunk)
            pieces += some
            sizes.append(len(some))
        number = defaultdict(count().__next__)
        index = np.fromiter(map(number.__getitem__, pieces), np.int64, len(pieces))
        ids, lengths = self._encode_pieces(list(number))
        ends = np.cumsum(lengths[index])[np.cumsum(sizes) - 1]
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
        new_id = self._byte_pairs.take(ids * 256 + np.roll(ids, -1))  # what each id and the next one are merged to
        new_id[np.diff(owner, append=-1) != 0] = _NONE  # the next one belongs to another piece
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
            changed = np.concatenate([place, place[place > 0] - 1])
            after = np.minimum(changed + 1, len(ids) - 1)
            joined = (owner[changed] == owner[after]) & (after > changed)
            new_id[changed] = np.where(joined, self._find_pairs(ids[changed], ids[after]), _NONE)
        ids = np.concatenate([some for some, _ in done] or [ids])
        owner = np.concatenate([some for _, some in done] or [owner])
        return ids[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(pieces))

    def _slot(self, keys):
        return (keys * np.int64(0x1E3779B97F4A7C15) >> 24) & (len(self._slot_key) - 1)  # odd, otherwise arbitrary

    def _find_pairs(self, left, right):
        """The id that each left[i] and right[i] are merged to; `_NONE` where no merge joins them."""
        keys = left * self.vocab_size + right
        slots = self._slot(keys)
        there = self._slot_key.take(slots)
        ids = np.where(there == keys, self._slot_id.take(slots), _NONE)
        taken = np.flatnonzero((there != keys) & (there >= 0))
        found = np.searchsorted(self._sorted_keys, keys[taken])
        ids[taken] = np.where(self._sorted_keys[found] == keys[taken], self._sorted_ids[found], _NONE)
        return ids

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
