"""Byte-pair encoding for whole corpora, in numpy.

The same results as the textbook functions of bpe_tokenizer.py, which the tests hold this file to, in a fraction of the
time. Only the class BPETokenizer calls it:

    counts = count_pretokens(texts, pattern)              # pre-tokens of a corpus and how often each occurs
    merges = learn_merges(counts, n_merges)               # the merges to learn from them
    encoder = BulkEncoder(merge_id, pattern, dtype)       # encoder.encode(parts(texts)) gives arrays of ids
    ids = encode_long_pretoken(pretoken, merge_id)        # where the textbook's loop would take too long

Four ideas make it fast:

1. A natural text repeats itself. It is cut into chunks, a word or so each, at places that are found without the pattern
   (`find_cuts`). Equal chunks get equal numbers (`Chunks`), and only distinct ones are pre-tokenized and encoded.
2. What is left to do is done side by side: numpy looks up all chunks of a block, or makes the next merge in every
   pre-token, at once instead of one after the other.
3. Learning keeps the pre-tokens as a linked list of places (`Corpus`), so a merge touches only the places where it
   applies, and it makes several merges at a time where their order cannot matter (`learn_merges`).
4. Encoding looks up pairs of ids in a table made of arrays (`PairTable`).

Inside, texts are UTF-8 bytes, and two bytes that UTF-8 never has mark their structure. A part is what is pre-tokenized
by itself: a document, or what stands between special tokens. 0xFE ends each part, and a part that 0xFF begins is no
text but a special token, whose id follows in decimal. `pattern` is the compiled pattern whose findall gives the
pre-tokens of a part, GPT-2's or GPT-4's: both have a boundary wherever `find_cuts` cuts.
"""

import heapq
import itertools
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

BLOCK_BYTES = 1 << 18  # of a text that are looked at together: they stay in the processor's cache
FEW_BYTES = 1024  # of a text that are too few for the table of chunks to pay
SHORT_BYTES = 15  # of a chunk that two 64-bit numbers hold, beside its length
LONG_BYTES = 64  # of a pre-token beyond which rescanning it for every merge costs more than a heap
NONE = np.iinfo(np.int64).max  # the id of a pair that no merge joins: larger than every id

END, SPECIAL = b"\xfe", b"\xff"  # end of a part; begin of a special token

_NO_CUT = np.isin(np.arange(256), list(b"\t\n\v\f\r \xc2\xe1\xe2\xe3" + END))  # may start white space, or end a part
_MASK = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # selects the first n of 8 bytes
_PAIR = 1 << 32  # the pair of ids a and b is the number a * _PAIR + b, so pairs compare as numbers do

# ----------------------------------------------------------------------------------------------------------
# Texts as bytes
# ----------------------------------------------------------------------------------------------------------

_HOW_TO_READ = "read a file with Path(...).read_text(encoding='utf-8'), turn bytes into text with .decode()"


def shown(value):
    """`value` on one short line, for an error message."""
    return " ".join(repr(value)[:80].split())


def utf8(text):
    """The bytes of `text`. Raises TypeError for what is no str, ValueError for a lone surrogate, which has no UTF-8."""
    if not isinstance(text, str):
        raise TypeError(f"the text must be a str, not {shown(text)}: {_HOW_TO_READ}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"the text has a lone surrogate (U+{code:04X}) at character {error.start}, which UTF-8 "
                         "cannot hold; replace it, e.g. text.encode('utf-8', 'replace').decode()") from None


def each_utf8(texts):
    """An iterator of the bytes of each of `texts`, an iterable of strings or a single one. Raises as `utf8` does."""
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, (bytes, bytearray, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"the text must be a str or an iterable of str, not {shown(texts)}: {_HOW_TO_READ}")
    return map(utf8, texts)


def parts(texts, special_id=()):
    """The concatenation of `texts`, an iterable of strings or a single one, as bytes in which parts are marked.

    special_id: {name of a special token to recognize: its id}. Of the names that fit at a place the longest is taken.
    A name may be split over several texts, so the last bytes of each wait for the next.
    Raises as `utf8` does.
    """
    texts = each_utf8(texts)
    return itertools.chain(_mark(texts, special_id) if special_id else texts, [END])


def _mark(texts, special_id):
    marks = {utf8(name): END + SPECIAL + b"%d" % id + END for name, id in special_id.items()}
    longest = max(map(len, marks))
    names = re.compile(b"(" + b"|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + b")")
    waiting = b""
    for text in itertools.chain(texts, [END * (longest - 1)]):  # no part of a name, and it lets all before it go
        text = waiting + text
        n = len(text) - (longest - 1)  # a name that starts here or later may go on in the next text
        *pieces, rest = names.split(text)  # text, name, text, name, ..., text
        while pieces and len(text) - len(rest) - len(pieces[-1]) >= n:
            rest = b"".join([*pieces[-2:], rest])
            del pieces[-2:]
        pieces[1::2] = map(marks.get, pieces[1::2])
        done = len(text) - len(rest)
        n = max(n, done)
        yield b"".join(pieces) + text[done:n]
        waiting = text[n:]


def documents(texts, special=None):
    """Each of `texts`, an iterable of strings or a single one, as a part, bytes, after the special token `special`, an
    id, if there is one. Raises as `utf8` does."""
    mark = b"" if special is None else SPECIAL + b"%d" % special + END
    return (mark + text + END for text in each_utf8(texts))


def _no_file_names(documents):
    """The items of `documents`, an iterator. Raises ValueError at its end if every one is the name of a file."""
    name, only_names = b"", True
    for document in documents:
        name = document[:4096].removesuffix(END)
        only_names = only_names and len(name) < 4096 and os.path.isfile(name)
        yield document
    if name and only_names:
        raise ValueError(f"the text is nothing but the name of a file, {name.decode()!r}: {_HOW_TO_READ}")


# ----------------------------------------------------------------------------------------------------------
# Chunks: a text cut into parts that repeat
# ----------------------------------------------------------------------------------------------------------


def find_cuts(data):
    """Where a text may be cut so that pre-tokenizing the pieces equals pre-tokenizing the whole.

    data: (n,) uint8, the UTF-8 bytes of the text, its parts marked. Returns places in it, ascending, int64.
    Those are the ends of parts, and the places before a space that a non-space follows. Both patterns have a boundary
    there whatever comes before: no pre-token holds a space after a non-space, and a run of white space gives up its
    last character if that is a space. Where the next byte only may start a white-space character there is no cut.
    """
    spaces = np.flatnonzero(data[:-1] == ord(" "))
    cuts = spaces[~_NO_CUT.take(data.take(spaces + 1))]
    ends = np.flatnonzero(data == END[0]) + 1
    if not len(ends):
        return cuts
    is_cut = np.zeros(len(data) + 1, bool)
    is_cut[cuts] = is_cut[ends] = True
    return np.flatnonzero(is_cut)


def split_blocks(texts):
    """Cut the concatenation of `texts`, an iterable of bytes, at `find_cuts` into blocks, bytes of about `BLOCK_BYTES`
    each, or more where there is no place to cut. Yields them as the texts are read, at least one."""
    pending, size = [], 0
    for text in texts:
        for start in range(0, len(text), BLOCK_BYTES):
            piece = text[start : start + BLOCK_BYTES]
            pending.append(piece)
            size += len(piece)
            if size < BLOCK_BYTES:
                continue
            for tail in (piece[-1000:], piece):  # a place to cut is rarely far from the end
                if len(cuts := find_cuts(np.frombuffer(tail, np.uint8))):
                    cut = len(piece) - len(tail) + int(cuts[-1])
                    pending[-1] = piece[:cut]
                    yield b"".join(pending)
                    pending, size = [piece[cut:]], len(piece) - cut
                    break
    yield b"".join(pending)


class Chunks:
    """Numbers the distinct chunks of a text, from cut to cut, so that costly work is done once a chunk.

    chunks: list of bytes, the chunk of each number.

    The bytes and the length of a short chunk make two 64-bit numbers, its key. All chunks of a block are looked up side
    by side in a hash table with linear probing (Knuth, The Art of Computer Programming 3, section 6.4), made of numpy
    arrays. A table that is half full gives way to an empty, larger one, so that a chunk may get a second number; no two
    chunks share one. Long chunks, which are rare, are numbered by a dict.
    """

    def __init__(self):
        self.chunks = []
        self.long = {}  # number of each chunk of more than SHORT_BYTES
        self._make_table(1 << 17)

    def _make_table(self, size):
        self.used, self.shift = 0, np.uint64(65 - size.bit_length())
        self.low, self.high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)  # free where high is 0
        self.number = np.zeros(size, np.int64)

    def index(self, block):
        """Numbers of the chunks of `block`, bytes, in order: (number of chunks,) int64."""
        if not block:
            return np.empty(0, np.int64)
        n = len(block)
        data = np.frombuffer(block + bytes(16), np.uint8)
        start = find_cuts(data[:n])
        start = np.concatenate([[0], start[np.searchsorted(start, 1) : np.searchsorted(start, n)]])
        length = np.diff(start, append=n)
        is_long = length > SHORT_BYTES
        index = np.empty(len(start), np.int64)
        index[~is_long] = self._index_short(block, data, start[~is_long], length[~is_long])
        long = np.flatnonzero(is_long)
        for k, i, m in zip(long.tolist(), start[long].tolist(), length[long].tolist()):
            chunk = block[i : i + m]
            if chunk not in self.long:
                self.long[chunk] = len(self.chunks)
                self.chunks.append(chunk)
            index[k] = self.long[chunk]
        return index

    def _index_short(self, block, data, start, length):
        sixteen = np.ndarray(len(block), "V16", data, strides=(1,))  # the bytes from each place on, which overlap
        numbers = sixteen[start].view("<u8")
        low = numbers[::2] & _MASK.take(length, mode="clip")
        rest = np.maximum(length - 8, 0)
        high = numbers[1::2] & _MASK.take(rest) | length.astype(np.uint64) << np.uint64(56)
        index, first = self._look_up(low, high)
        self.chunks += [block[i : i + m] for i, m in zip(start[first].tolist(), length[first].tolist())]
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


def _pretokenize(chunk, pattern):
    """Pre-tokens of a chunk, as bytes; of a special token the chunk itself."""
    text = chunk.removesuffix(END)
    if text.removeprefix(b" ").isalpha():  # a space and ASCII letters are one: no need to ask the pattern
        return [text]
    if chunk[:1] == SPECIAL:
        return [chunk]
    if len(text) < len(chunk):
        return [pretoken.encode() for pretoken in pattern.findall(text.decode())]
    # A space and a non-space come next. They must be seen: white space at the end of a part is cut otherwise.
    return [pretoken.encode() for pretoken in pattern.findall(chunk.decode() + " x")[:-1]]


def count_pretokens(texts, pattern):
    """How often each pre-token occurs in `texts`, a string or an iterable of strings, each pre-tokenized by itself.

    Returns a Counter, {pre-token as bytes: how often}. Raises as `utf8` does, and ValueError if the texts are names of
    files, for a vocabulary of file names is never what is wanted.
    """
    counts, chunks, times = Counter(), Chunks(), np.zeros(0, np.int64)
    for block in split_blocks(_no_file_names(documents(texts))):
        index = chunks.index(block)
        times = np.pad(times, (0, len(chunks.chunks) - len(times)))
        times += np.bincount(index, minlength=len(times))
    for chunk, n in zip(chunks.chunks, times.tolist()):
        for pretoken in _pretokenize(chunk, pattern):
            counts[pretoken] += n
    return counts


def gather(values, lengths, index):
    """Rows of a table whose rows have different lengths, end to end.

    values: (lengths.sum(),), all rows end to end; lengths: (rows,) int64; index: (n,) int64, the rows that are wanted.
    Returns an array of the dtype of `values`.
    """
    starts = np.cumsum(lengths) - lengths
    n = lengths.take(index)
    shift = starts.take(index) - (np.cumsum(n) - n)  # from the place in the result to the place in the table
    return values.take(np.repeat(shift, n) + np.arange(n.sum()))


# ----------------------------------------------------------------------------------------------------------
# Learning merges
# ----------------------------------------------------------------------------------------------------------


def _totals(keys, weights):
    """(the distinct `keys` ascending, the sum of the `weights` of each)"""
    order = np.argsort(keys, kind="stable")  # faster than the default, not needed otherwise
    keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else order
    return keys[first], np.add.reduceat(weights[order], first) if len(keys) else weights


def _every_second(overlaps):
    """Which of the places of a pair to merge. overlaps: (n,) bool, whether each place overlaps the one before it.

    In a run of overlapping places, as those of aa in aaaa, every second one is merged, from the left.
    """
    number = np.arange(len(overlaps))
    run = np.maximum.accumulate(np.where(overlaps, 0, number))  # where the run of each place starts
    return (number - run) % 2 == 0


class Corpus:
    """The distinct pre-tokens of a text in one array of ids, which merges shorten in place.

    counts: {pre-token as bytes: how often it occurs in the text}.
    ids: (n,) int64, all pre-tokens end to end with separators, -1, around them; weight: (n,) int64, how often the
    pre-token of each place occurs, 0 for separators and places that are no longer in use. A merge puts its id where the
    left one was. left, right: (n,) int64, the neighbours of each place that are still in use, a linked list.
    places: for each id, the places that hold it, ascending, among others that did.
    """

    def __init__(self, counts):
        sizes = np.array([len(pretoken) for pretoken in counts], np.int64)
        inside = np.ones(1 + sizes.sum() + len(sizes), bool)
        inside[0] = inside[np.cumsum(sizes + 1)] = False
        places = np.flatnonzero(inside)
        self.ids, self.weight = np.full(len(inside), -1), np.zeros(len(inside), np.int64)
        self.ids[places] = text = np.frombuffer(b"".join(counts), np.uint8)
        self.weight[places] = np.repeat(np.array(list(counts.values()), np.int64), sizes)
        self.left, self.right = np.arange(len(inside)) - 1, np.arange(len(inside)) + 1
        order = places[np.argsort(text, kind="stable")]
        self.places = np.split(order, np.cumsum(np.bincount(text, minlength=256))[:-1])

    def pairs(self, i):
        """(the pairs that start at places `i`, how often each occurs in the text: never if it holds a separator)

        A pair of ids a and b is the number a * 2^32 + b, so (n,) int64 for (n,) places.
        """
        j = self.right.take(i)
        return self.ids.take(i) * _PAIR + self.ids.take(j), np.minimum(self.weight.take(i), self.weight.take(j))

    def pair_totals(self):
        """(all distinct pairs ascending, how often each occurs in the text)"""
        return _totals(*self.pairs(np.flatnonzero(self.weight)))

    def find(self, a, b):
        """Places where id a is followed by id b, ascending; of overlapping ones, as in aaa, every second."""
        newer = max(a, b)
        at = self.places[newer]
        self.places[newer] = at = at[self.ids.take(at) == newer]  # some have been merged away
        if a == newer:
            i = at[self.ids.take(self.right.take(at)) == b]
        else:
            i = self.left.take(at)
            i = i[self.ids.take(i) == a]
        if a == b:
            i = i[_every_second(self.left[i] == np.concatenate([[-1], i])[:-1])]
        return i

    def bounds_of_new_pairs(self, places):
        """For each of several merges, found at `places` (a list of arrays), a bound on how often a pair that it makes
        occurs: how often the most frequent neighbour, on either side, of the merged pair occurs. int64."""
        i, merge = np.concatenate(places), np.repeat(np.arange(len(places)), [len(some) for some in places])
        before, after = self.left[i], self.right[self.right[i]]
        sides = [2 * merge * _PAIR + self.ids[before] + 1, (2 * merge + 1) * _PAIR + self.ids[after] + 1]
        weights = [np.minimum(self.weight[i], self.weight[before]), np.minimum(self.weight[i], self.weight[after])]
        keys, total = _totals(np.concatenate(sides), np.concatenate(weights))
        bound = np.zeros(len(places), np.int64)
        np.maximum.at(bound, keys // (2 * _PAIR), total)
        return bound

    def merge(self, places):
        """Merge the pairs at `places`, a list of arrays, into one new id for each array, numbered as they come.

        Returns (pairs around these places, ascending; by how much the count of each changes).
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


def learn_merges(counts, n_merges, progress=None):
    """The first `n_merges` merges, a list of (left id, right id): each the most frequent pair, of equals the smallest.

    counts: {pre-token as bytes: how often it occurs}. progress: called with the number of merges, after each of them.

    The textbook's result (Sennrich et al. 2016, arXiv:1508.07909, algorithm 1). Those that come next are merged
    together, as long as no two of them overlap in a pre-token (no left id of one is the right id of another) and no
    pair that they make is as frequent as one that still waits: then the order does not matter. Only pairs that occur
    `floor` times or more are kept count of; when all of them are merged, it is lowered.
    """
    corpus = Corpus(counts)
    merges, pair_counts, heap, floor = [], {}, [], None
    while len(merges) < n_merges:
        batch, lefts, rights = [], set(), set()
        while heap and len(batch) < min(256, n_merges - len(merges)):
            count, pair = -heap[0][0], heap[0][1]
            if count != pair_counts[pair]:  # it has fallen since this entry was pushed
                heapq.heapreplace(heap, (-pair_counts[pair], pair))
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
                break  # every pre-token is one token
            pairs, total = corpus.pair_totals()
            floor = max(1, (floor or total.max(initial=1)) // 8)
            often = total >= floor
            pair_counts = dict(zip(pairs[often].tolist(), total[often].tolist()))
            heap = [(-count, pair) for pair, count in pair_counts.items()]
            heapq.heapify(heap)
            continue

        places = [corpus.find(a, b) for _, a, b in batch]
        bounds = np.maximum.accumulate(corpus.bounds_of_new_pairs(places)).tolist()
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
            if pair in pair_counts:
                pair_counts[pair] += change
            elif change >= floor:
                pair_counts[pair] = change
                heapq.heappush(heap, (-change, pair))
    return merges


# ----------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------


def encode_long_pretoken(pretoken, merge_id):
    """Ids of one pre-token, bytes, as a list of int: the textbook's result in O(n log n) instead of O(n^2).

    merge_id: {(left id, right id): id of the merged token}.
    A heap holds the merges that apply, and a linked list takes the place of new lists. An entry of the heap is one
    number, new id times 2^40 plus place, which takes less memory than a pair.
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
            continue  # a neighbour has been merged away since this entry was pushed
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
    """The dict {(left id, right id): id} as numpy arrays, to look up many pairs at once.

    A pair is one number, its key, which has a slot in a table. If another pair holds the slot, the key is searched for
    among the sorted keys.
    """

    def __init__(self, merge_id):
        self.n_ids = 256 + len(merge_id)
        keys = np.array([a * self.n_ids + b for a, b in merge_id], np.int64)
        ids = np.array(list(merge_id.values()), np.int64)
        order = np.argsort(keys)
        self.sorted_keys, self.sorted_ids = np.append(keys[order], NONE), np.append(ids[order], NONE)
        self.slot_key = np.full(1 << (16 * len(keys) + 1).bit_length(), -1)
        self.slot_id = np.full(len(self.slot_key), NONE)
        slots = self._slot(keys)
        self.slot_key[slots], self.slot_id[slots] = keys, ids

    def _slot(self, keys):
        return (keys * np.int64(0x1E3779B97F4A7C15) >> 24) & (len(self.slot_key) - 1)  # odd, otherwise arbitrary

    def find(self, left, right):
        """The ids that pairs merge to, `NONE` where no merge joins them. left, right and the result: (n,) int64."""
        keys = left * self.n_ids + right
        slots = self._slot(keys)
        there = self.slot_key.take(slots)
        ids = np.where(there == keys, self.slot_id.take(slots), NONE)
        taken = np.flatnonzero((there != keys) & (there >= 0))
        found = np.searchsorted(self.sorted_keys, keys[taken])
        ids[taken] = np.where(self.sorted_keys[found] == keys[taken], self.sorted_ids[found], NONE)
        return ids


class BulkEncoder:
    """Encodes corpora with the merges `merge_id`, {(left id, right id): id of the merged token}.

    pattern: the compiled pre-tokenization pattern; dtype: an integer numpy type that holds every id; byte_id: the id of
    each byte, 256 bytes, or None where they are the same.
    """

    def __init__(self, merge_id, pattern, dtype, byte_id=None):
        self.merge_id, self.pattern, self.dtype, self.byte_id = merge_id, pattern, dtype, byte_id
        self.pair_table = PairTable(merge_id)
        left, right = np.divmod(np.arange(1 << 16), 256)
        self.byte_pairs = self.pair_table.find(left, right)  # by left id * 256 + right id

    def encode(self, texts):
        """Ids of `texts`, an iterable of bytes in which parts are marked: an iterator of arrays of `dtype`, one for
        each block. Memory grows with the number of distinct chunks and not with the length of the text."""
        blocks = split_blocks(texts)
        chunks = Chunks()
        ids, lengths = np.empty(0, self.dtype), np.empty(0, np.int64)  # of all chunks so far, end to end
        while group := list(itertools.islice(blocks, 32)):  # the new chunks of many blocks are encoded together
            indices = [chunks.index(block) for block in group]
            if new := chunks.chunks[len(lengths) :]:
                new_ids, new_lengths = self.encode_chunks(new)
                ids, lengths = np.append(ids, new_ids), np.append(lengths, new_lengths)
            for index in indices:
                yield gather(ids, lengths, index)

    def encode_chunks(self, chunks):
        """(ids of all `chunks`, a list of bytes, end to end, as `dtype`; number of ids of each chunk, int64)"""
        pretokens, sizes = [], []  # pre-tokens of all chunks, how many of each
        for chunk in chunks:
            some = _pretokenize(chunk, self.pattern)
            pretokens += some
            sizes.append(len(some))
        number = defaultdict(itertools.count().__next__)
        index = np.fromiter(map(number.__getitem__, pretokens), np.int64, len(pretokens))
        ids, lengths = self.encode_pretokens(list(number))
        ends = np.append(0, np.cumsum(lengths[index]))[np.cumsum(sizes)]
        return gather(ids, lengths, index).astype(self.dtype), np.diff(ends, prepend=0)

    def encode_pretokens(self, pretokens):
        """The textbook's encoding of many pre-tokens side by side: every round does one merge in each of them.

        pretokens: list of bytes. Returns (ids of all of them end to end, number of ids of each), both int64.
        """
        alone = [len(pretoken) > LONG_BYTES or pretoken[:1] == SPECIAL for pretoken in pretokens]
        short = [b"" if is_alone else pretoken for pretoken, is_alone in zip(pretokens, alone)]
        ids = np.frombuffer(b"".join(short).translate(self.byte_id), np.uint8).astype(np.int64)
        owner = np.repeat(np.arange(len(pretokens)), [len(pretoken) for pretoken in short])
        done = [(np.array(self._encode_alone(pretokens[i])), i) for i in np.flatnonzero(alone).tolist()]
        done = [(new, np.full(len(new), i)) for new, i in done]
        new_id = self.byte_pairs.take(ids * 256 + np.roll(ids, -1))  # what each id and the next one are merged to
        new_id[np.diff(owner, append=-1) != 0] = NONE  # the next one belongs to another pre-token
        while len(ids):
            first = np.flatnonzero(np.diff(owner, prepend=-1))  # where each pre-token starts
            best = np.minimum.reduceat(new_id, first)
            best = np.repeat(best, np.diff(first, append=len(ids)))
            finished = best == NONE
            place = np.flatnonzero((new_id == best) & ~finished)
            place = place[_every_second(np.diff(place, prepend=-2) == 1)]
            ids[place] = new_id[place]
            done.append((ids[finished], owner[finished]))
            keep = ~finished
            keep[place + 1] = False
            place = (np.cumsum(keep) - 1)[place]  # where the merged ids are among those that are kept
            ids, owner, new_id = ids[keep], owner[keep], new_id[keep]
            changed = np.concatenate([place, place[place > 0] - 1])
            after = np.minimum(changed + 1, len(ids) - 1)
            joined = (owner[changed] == owner[after]) & (after > changed)
            new_id[changed] = np.where(joined, self.pair_table.find(ids[changed], ids[after]), NONE)
        ids = np.concatenate([some for some, _ in done] or [ids])
        owner = np.concatenate([some for _, some in done] or [owner])
        return ids[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(pretokens))

    def _encode_alone(self, pretoken):
        """Ids of a special token or of a long pre-token, bytes, as a list of int."""
        if pretoken[:1] == SPECIAL:
            return [int(pretoken[1:-1])]
        return encode_long_pretoken(pretoken.translate(self.byte_id), self.merge_id)
