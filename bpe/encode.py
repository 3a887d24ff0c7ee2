"""Encode whole corpora with numpy: the ids of bpe_tokenizer.encode_pretoken for every pre-token, much faster.

    encoder = BulkEncoder(merge_id, pattern, dtype)
    arrays = encoder.encode(pretokens.parts(texts))           # an iterator of arrays of ids
    ids = encode_long_pretoken(pretoken, merge_id)            # one pre-token, where the textbook's loop is too slow

`merge_id` is {(left id, right id): id of the merged token}. A merge is identified by the id that it makes, so the
earlier of two merges has the smaller id; `NONE` stands for no merge.
"""

import heapq
import itertools
from array import array
from collections import defaultdict

import numpy as np

from bpe.learn import every_second
from bpe.pretokens import END, SHORT_BYTES, Chunks, classes_of, gpt2_starts, gpt4_starts, pretokenize, split_blocks

FEW_BYTES = 1024  # texts of at most this many characters are not worth a table of chunks
LONG_BYTES = 64  # in longer pre-tokens a heap is faster than the textbook's loop
NEW_BYTES = 1 << 17  # bytes of new chunks to collect before they are encoded together
MANY_CHUNKS = 1 << 18  # distinct chunks after which the table is emptied, to bound its memory
MANY_ROUNDS = 64  # rounds of merges in all pre-tokens at once; what is left is encoded one by one
NONE = np.iinfo(np.int32).max  # in place of a merge's id: larger than every id


def encode_long_pretoken(pretoken, merge_id):
    """The ids of one pre-token, a list of int, in O(n log n) steps instead of the O(n^2) of the textbook's loop.

    pretoken: bytes or a list of ids. merge_id: {(left id, right id): id of the merged token}.
    A heap holds the merges that apply, and the ids form a linked list. An entry of the heap is the single number
    new id * 2^40 + place, which takes less memory than a tuple.
    """
    n, place = len(pretoken), (1 << 40) - 1
    ids, before, after = array("i", list(pretoken)), array("i", range(-1, n - 1)), array("i", range(1, n + 1))
    after[-1] = -1
    find = merge_id.get
    heap = [new_id << 40 | i for i, pair in enumerate(zip(pretoken, pretoken[1:])) if (new_id := find(pair))]
    heapq.heapify(heap)
    while heap:
        entry = heapq.heappop(heap)
        new_id, i = entry >> 40, entry & place
        j = after[i]
        if j < 0 or ids[i] < 0 or find((ids[i], ids[j])) != new_id:
            continue  # one of the two has been merged since the entry was pushed
        ids[i], ids[j] = new_id, -1
        after[i] = k = after[j]
        if k >= 0:
            before[k] = i
            if right := find((new_id, ids[k])):
                heapq.heappush(heap, right << 40 | i)
        h = before[i]
        if h >= 0 and (left := find((ids[h], new_id))):
            heapq.heappush(heap, left << 40 | h)
    return [i for i in ids if i >= 0]


class PairTable:
    """What merges can do to two neighbouring ids x and y, for many pairs at once:

    0. the merge of x and y;
    1. the earliest merge (L, y) that could ever use y together with a token that ends with x: L is x, or a token whose
       right part is x, or whose right part has the right part x, and so on;
    2. the earliest merge (x, R) that could ever use x together with a token that begins with y.

    merge_id: {(left id, right id): id of the merged token}. n_ids: number of bytes and merges together.
    Each pair has a key, one number, with a slot in a hash table with linear probing (Knuth, The Art of Computer
    Programming 3, section 6.4).
    """

    def __init__(self, merge_id):
        n = len(merge_id)
        self.n_ids = 256 + n
        left, right = np.array(list(merge_id) or np.empty((0, 2)), np.int64).T
        ids = np.array(list(merge_id.values()), np.int64)
        parts = np.full((2, self.n_ids), -1)  # left and right part of each id
        parts[:, ids] = left, right
        found = [(left * self.n_ids + right, ids, np.zeros(n, np.int64))]
        for kind, (end, part) in enumerate(((left, parts[1]), (right, parts[0])), start=1):
            new = ids
            while len(new):
                x, y = (end, right[new - 256]) if kind == 1 else (left[new - 256], end)
                found.append((x * self.n_ids + y, new, np.full(len(new), kind)))
                end = part[end]
                new, end = new[end >= 0], end[end >= 0]
        keys, new, kind = map(np.concatenate, zip(*found))
        distinct, row = np.unique(keys, return_inverse=True)
        self._size = 1 << (4 * len(distinct) + 1).bit_length()
        values = np.full((3, len(distinct) + 1), NONE, np.int32)
        np.minimum.at(values, (kind, row), new)
        self._slot_key, self._slot_row = np.full(self._size, -1), np.full(self._size, len(distinct), np.int32)
        self._values = values
        todo, slot = np.arange(len(distinct)), self._slot(distinct)
        while len(todo):
            free = todo[self._slot_key[slot[todo]] < 0]
            self._slot_key[slot[free]] = distinct[free]  # if several keys want a slot, the last gets it
            got = free[self._slot_key[slot[free]] == distinct[free]]
            self._slot_row[slot[got]] = got
            todo = todo[self._slot_key[slot[todo]] != distinct[todo]]
            slot[todo] = (slot[todo] + 1) % self._size

    def _slot(self, keys):
        return (keys * np.int64(0x1E3779B97F4A7C15) >> 24) & (self._size - 1)  # odd, otherwise arbitrary

    def find(self, left, right):
        """The three merges of each pair of ids, as listed above: (3, n) int32. left, right: (n,) integers."""
        keys = left.astype(np.int64) * self.n_ids + right
        slot = self._slot(keys)
        there = self._slot_key.take(slot)
        row = self._slot_row.take(slot)
        row[there != keys] = self._values.shape[1] - 1
        todo = np.flatnonzero((there != keys) & (there >= 0))  # another pair has the slot
        while len(todo):
            slot[todo] = (slot[todo] + 1) % self._size
            there = self._slot_key.take(slot[todo])
            same = there == keys[todo]
            row[todo[same]] = self._slot_row.take(slot[todo[same]])
            todo = todo[~same & (there >= 0)]
        return self._values.take(row, axis=1)


class JoinTable:
    """Tells which places in a text a token may span. At all others a long pre-token can be cut without a change to its
    ids: Chinese sentences and long numbers fall into pieces that repeat, as words do.

    tokens: list of bytes. For each place inside a token, a table of bits holds the three bytes on either side of it, or
    only the nearest one on a side with fewer (Bloom 1970, "Space/Time Trade-offs in Hash Coding"). Such a table never
    misses what it holds, but sometimes finds what it does not hold; then a cut is missed, which does no harm.
    """

    _SIX, _LEFT, _RIGHT, _TWO = (np.uint64(mask) for mask in (0xFFFFFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF0000, 0xFFFF0000))

    def __init__(self, tokens):
        tokens = [token for token in tokens if len(token) > 1]
        size = np.array([len(token) for token in tokens], np.int64)
        place, end = np.arange(size.sum()), np.repeat(np.cumsum(size), size)
        left = place - end + np.repeat(size, size)  # bytes of the token before each place
        place, left, right = (x[left > 0] for x in (place, left, end - place))
        around = self._around(b"".join(tokens), place)
        with_3 = right >= 3
        mask = np.where(left >= 3, np.where(with_3, self._SIX, self._LEFT), np.where(with_3, self._RIGHT, self._TWO))
        self._two = np.zeros(1 << 16, bool)  # the pairs of bytes in tokens, at right * 256 + left
        self._two[around >> np.uint64(16) & np.uint64(0xFFFF)] = True
        self._shift = np.uint64(64 - max(16, (16 * len(place)).bit_length()))
        self._table = np.zeros(1 << 64 - int(self._shift), bool)
        self._table[self._slot(around & mask)] = True

    @staticmethod
    def _around(text, place):
        """The three bytes before and the three after each place of `text`, in the low 48 bits of a uint64."""
        padded = bytes(3) + text + bytes(8)
        return np.ndarray(len(text) + 3, "<u8", padded, strides=(1,))[place]

    def _slot(self, key):
        return (key * np.uint64(0x9E3779B97F4A7C15) >> self._shift).view(np.int64)

    def joins(self, text, place):
        """Whether a token may span each place: (n,) bool. text: bytes; place: (n,) int64; place i is before byte i."""
        around = self._around(text, place)
        joined = self._two.take((around >> np.uint64(16) & np.uint64(0xFFFF)).view(np.int64))
        some = np.flatnonzero(joined)
        around, found = around[some], np.zeros(len(some), bool)
        for mask in (self._SIX, self._LEFT, self._RIGHT, self._TWO):
            found |= self._table.take(self._slot(around & mask))
        joined[some] = found
        return joined


def _gather(values, lengths, index):
    """Selected rows of a ragged table, end to end, in the dtype of `values`.

    values: (lengths.sum(),), all rows end to end; lengths: (rows,) int64; index: (n,) int64, the rows to select.
    """
    starts = np.cumsum(lengths) - lengths
    n = lengths.take(index)
    shift = starts.take(index) - (np.cumsum(n) - n)  # from a place in the result to that in the table
    return values.take(np.repeat(shift, n) + np.arange(n.sum()))


class BulkEncoder:
    """Encodes texts with the merges of a vocabulary.

    merge_id: {(left id, right id): id of the merged token}; pattern: None for GPT-2's, or GPT-4's, compiled; dtype: an
    integer type of numpy that holds every id; byte_id: the id of each byte, 256 bytes, or None if they are equal.
    """

    def __init__(self, merge_id, pattern, dtype, byte_id=None):
        self.merge_id, self.pattern, self.dtype, self.byte_id = merge_id, pattern, dtype, byte_id
        self._pair_table = PairTable(merge_id)
        tokens = [bytes([byte_id.index(i) if byte_id else i]) for i in range(256)]
        for a, b in merge_id:
            tokens.append(tokens[a] + tokens[b])
        self.join_table = JoinTable(tokens)
        left, right = np.divmod(np.arange(1 << 16), 256)
        self._byte_pairs = self._pair_table.find(left, right)  # (3, 65536), at left id * 256 + right id

    def encode(self, texts):
        """The ids of `texts`, an iterable of bytes with markers, as an iterator of arrays of `dtype`, one per block.

        Memory is bounded, unless a pre-token has no place where it can be cut.
        """
        chunks, waiting = Chunks(), []
        ids, lengths, size = np.empty(0, self.dtype), np.empty(0, np.int64), 0  # of all chunks so far
        for block in itertools.chain(split_blocks(texts, self.starts), [None]):
            if block is not None:
                waiting.append(chunks.index(block, np.flatnonzero(self.starts(block, classes_of(block)))))
                if len(waiting) < 32 and chunks.size - size < NEW_BYTES:
                    continue  # first collect new chunks from several blocks
            if new := chunks.chunks[len(lengths) :]:
                new_ids, new_lengths = self.encode_chunks(new)
                ids, lengths, size = np.append(ids, new_ids), np.append(lengths, new_lengths), chunks.size
            for index in waiting:
                yield _gather(ids, lengths, index)
            waiting = []
            if len(lengths) > MANY_CHUNKS:  # the text does not repeat itself
                chunks, ids, lengths, size = Chunks(), ids[:0], lengths[:0], 0

    def starts(self, block, classes):
        """Where the chunks of `block`, n bytes with markers, start: (n,) bool. classes: `classes_of(block)`.

        With GPT-4's pattern, as found by `gpt4_starts`. With GPT-2's, at each pre-token, and inside long ones at the
        places that no token spans.
        """
        if self.pattern:
            return gpt4_starts(block, classes)
        start = gpt2_starts(block, classes)
        place = np.flatnonzero(start)
        length = np.diff(place, append=len(block))
        long = np.flatnonzero(length > SHORT_BYTES)
        if len(long):
            rest = length[long] - 1
            inside = np.repeat(place[long] + 1 - (np.cumsum(rest) - rest), rest) + np.arange(rest.sum())
            inside = inside[np.frombuffer(block, np.uint8).take(inside) & 0xC0 != 0x80]  # not inside a character
            start[inside] = ~self.join_table.joins(block, inside)
            # Runs of single bytes are joined into chunks of eight.
            inside = inside[(inside & 7 != 0) & (inside < len(block) - 1)]
            start[inside[start[inside - 1] & start[inside + 1]]] = False
        return start

    def encode_chunks(self, chunks):
        """(the ids of all chunks, end to end, in `dtype`; the number of ids of each chunk, (n,) int64)

        chunks: list of n bytes objects.
        """
        if not self.pattern:
            ids, lengths = self.encode_pretokens(chunks)
            return ids.astype(self.dtype), lengths
        pretokens, sizes = [], []  # the pre-tokens of all chunks; how many each has
        for chunk in chunks:
            some = pretokenize(chunk, self.pattern)
            pretokens += some
            sizes.append(len(some))
        number = defaultdict(itertools.count().__next__)
        index = np.fromiter(map(number.__getitem__, pretokens), np.int64, len(pretokens))
        ids, lengths = self.encode_pretokens(list(number))
        ends = np.append(0, np.cumsum(lengths[index]))[np.cumsum(sizes)]
        return _gather(ids, lengths, index).astype(self.dtype), np.diff(ends, prepend=0)

    def encode_pretokens(self, pretokens):
        """Encode many pre-tokens at once, many merges per round.

        pretokens: list of n bytes objects. Returns (the ids of all pre-tokens, end to end, int32; the number of ids of
        each, (n,) int64). END has no ids, a special token its own.

        A round makes the earliest merge of each pre-token, as the textbook's loop does. It also makes every other merge
        that is earlier than all merges that could ever use one of its two tokens together with a neighbour: nothing
        can change these tokens before its turn, so it can be made now.
        """
        marks = [pretoken[:1] >= END for pretoken in pretokens]  # a special token or END
        texts = [b"" if mark else pretoken for pretoken, mark in zip(pretokens, marks)]
        ids = np.frombuffer(b"".join(texts).translate(self.byte_id), np.uint8).astype(np.int32)
        owner = np.repeat(np.arange(len(texts), dtype=np.int32), [len(text) for text in texts])
        done = [(np.array([int(pretokens[i][1:])], np.int32), np.array([i], np.int32))
                for i, mark in enumerate(marks) if mark and pretokens[i] != END]  # fmt: skip
        pairs = np.append(ids[:-1] * 256 + ids[1:], ids[-1:])
        ends = np.flatnonzero(np.diff(owner, append=-1))  # the last id of each pre-token
        # For each id and the next one: the three merges of PairTable.
        new_id, by_left, by_right = (of_bytes.take(pairs) for of_bytes in self._byte_pairs)
        new_id[ends] = by_left[ends] = by_right[ends] = NONE
        for _ in range(MANY_ROUNDS):
            if not len(ids):
                break
            first = np.flatnonzero(np.diff(owner, prepend=-1))  # where each pre-token starts
            best = np.minimum.reduceat(new_id, first)
            best = np.repeat(best, np.diff(first, append=len(ids)))
            # by_left and by_right are NONE at the last id of a pre-token, so no neighbour is seen across its ends.
            chosen = (new_id < np.roll(by_left, 1)) & (new_id <= np.roll(by_right, -1)) | (new_id == best)
            place = np.flatnonzero(chosen & (new_id != NONE))
            place = place[every_second(np.diff(place, prepend=-2) == 1)]
            ids[place] = new_id[place]
            finished = best == NONE
            some = np.flatnonzero(finished)
            done.append((ids[some], owner[some]))
            keep = ~finished
            keep[place + 1] = False
            place = (np.cumsum(keep) - 1)[place]  # where the merged ids are among the kept ones
            keep = np.flatnonzero(keep)
            ids, owner, new_id, by_left, by_right = (x.take(keep) for x in (ids, owner, new_id, by_left, by_right))
            changed = np.concatenate([place, place[place > 0] - 1])
            after = np.minimum(changed + 1, len(ids) - 1)
            found = self._pair_table.find(ids[changed], ids[after])
            found[:, (owner[changed] != owner[after]) | (after == changed)] = NONE
            new_id[changed], by_left[changed], by_right[changed] = found
        # What is left needs many rounds, such as one letter repeated: one pre-token at a time.
        for some in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(owner)) + 1) if len(ids) else []:
            rest = np.array(encode_long_pretoken(ids[some].tolist(), self.merge_id), np.int32)
            done.append((rest, np.full(len(rest), owner[some[0]])))
        ids = np.concatenate([some for some, _ in done] or [ids])
        owner = np.concatenate([some for _, some in done] or [owner])
        return ids[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(texts))
