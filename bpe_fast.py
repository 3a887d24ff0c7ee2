"""Byte-pair encoding for whole corpora, in numpy.

The same results as the textbook functions of bpe_tokenizer.py, which the tests hold this file to, in a fraction of the
time. Only the class BPETokenizer calls it:

    counts = count_pretokens(texts, pattern)              # pre-tokens of a corpus and how often each occurs
    merges = learn_merges(counts, n_merges)               # the merges to learn from them
    encoder = BulkEncoder(merge_id, pattern, dtype)       # encoder.encode(parts(texts)) gives arrays of ids
    ids = encode_long_pretoken(pretoken, merge_id)        # where the textbook's loop would take too long

Five ideas make it fast:

1. A natural text repeats itself. Equal pre-tokens get equal numbers (`Chunks`), and only distinct ones are encoded.
   Long ones, such as sentences of Chinese, repeat rarely; they are cut where no token ever goes on (`JoinTable`).
2. What is left to do is done side by side: numpy finds all pre-tokens of a block by the kinds of its characters
   (`gpt2_starts`), looks up all chunks, or makes the next merges in every pre-token, at once.
3. Encoding need not make one merge after the other. One may be made early if no merge before it can ever take one of
   its two tokens away (`PairTable`, `encode_pretokens`), so a few rounds do.
4. Learning keeps the pre-tokens as a linked list of places (`Corpus`), so a merge touches only the places where it
   applies, and it makes several merges at a time where their order cannot matter (`learn_merges`).
5. Memory is bounded: texts come in blocks, and a text that does not repeat itself makes the table of chunks start anew.

Inside, texts are UTF-8 bytes, and two bytes that UTF-8 never has mark their structure. A part is what is pre-tokenized
by itself: a document, or what stands between special tokens. 0xFE ends each part, and a part that 0xFF begins is no
text but a special token, whose id follows in decimal. `pattern` is None for GPT-2's pre-tokens, which are found without
it; with GPT-4's compiled pattern the chunks are larger (`gpt4_starts`), and its findall gives the pre-tokens of each.
"""

import functools
import heapq
import itertools
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

import unicode_classes

BLOCK_BYTES = 1 << 18  # of a text that are looked at together: they stay in the processor's cache
FEW_BYTES = 1024  # of a text that are too few for the table of chunks to pay
NEW_BYTES = 1 << 17  # of new chunks that are encoded together
MANY_CHUNKS = 1 << 18  # of a text after which the table of chunks starts anew, so that memory is bounded
SHORT_BYTES = 15  # of a chunk that two 64-bit numbers hold, beside its length
LONG_BYTES = 64  # of a pre-token beyond which rescanning it for every merge costs more than a heap
MANY_ROUNDS = 64  # of merges, side by side, after which what is left of hard pre-tokens is encoded one by one
NONE = np.iinfo(np.int32).max  # the id of a pair that no merge joins: larger than every id

END, SPECIAL = b"\xfe", b"\xff"  # end of a part; begin of a special token

_CONTRACTION = re.compile(rb"'(?:[sdmt]|ll|ve|re)")
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
# GPT-2's pre-tokens without the pattern
# ----------------------------------------------------------------------------------------------------------

LETTER, NUMBER, OTHER, SPACE, NO_TEXT = range(5)  # kinds of characters


@functools.cache
def _kinds():
    """(the kind of each byte that is a character or a mark, 256 bytes; the kind of each code point, an array)"""
    kind = np.full(0x110000, OTHER, np.uint8)
    for name, ranges in ((LETTER, unicode_classes.LETTERS), (NUMBER, unicode_classes.NUMBERS),
                         (SPACE, unicode_classes.SPACES)):  # fmt: skip
        for part in ranges.split():
            first, _, last = part.partition("-")
            kind[int(first, 16) : int(last or first, 16) + 1] = name
    of_byte = kind[:256].copy()
    of_byte[[*END, *SPECIAL]] = NO_TEXT, NUMBER  # a special token is one piece with its digits
    return of_byte.tobytes(), kind


def kinds_of(block):
    """The kind of the character that each byte of `block`, bytes of marked parts, belongs to: (n,) uint8."""
    of_byte, of_code_point = _kinds()
    data = np.frombuffer(block + bytes(3), np.uint8)
    kind = np.frombuffer(bytearray(block.translate(of_byte) + bytes(3)), np.uint8)
    lead = np.flatnonzero((data >= 0xC2) & (data < 0xF5))  # the first bytes of characters of more than one
    lead_byte = data.take(lead)
    for size, low, high in ((2, 0xC2, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF5)):
        first = lead[(lead_byte >= low) & (lead_byte < high)]
        if len(first):
            code_point = data.take(first).astype(np.int64) - (256 - (256 >> size))
            for k in range(1, size):
                code_point = code_point << 6 | data.take(first + k) & 63
            of_first = of_code_point.take(code_point, mode="clip")
            for k in range(size):  # all bytes of a character have its kind
                kind[first + k] = of_first
    return kind[: len(block)]


def gpt2_starts(block, kind):
    """Where GPT-2's pre-tokens start: (n,) bool. `block`: bytes of marked parts; `kind`: its `kinds_of`.

    The pattern looks at most three characters ahead, so each place is decided by its neighbours: a new kind of
    character starts a pre-token, one space before it belongs to it, and so do the letters of 's, 't, 'll and so on to
    an apostrophe that starts one; of white space before something else the last character is by itself.
    Ends of parts, and special tokens, are pieces of their own.
    """
    data = np.frombuffer(block, np.uint8)
    before, here = kind[:-1], kind[1:]
    start = np.ones(len(block), bool)
    is_text = here < SPACE
    start[1:] = (here != before) | (before == NO_TEXT)
    start[1:] &= ~(is_text & (data[:-1] == ord(" ")))
    last = (before == SPACE) & is_text  # the last byte of white space
    start[:-1] |= last
    wide = np.flatnonzero(last & (data[:-1] >= 0x80))
    if len(wide):
        start[wide] = False
        for _ in range(2):  # to the first byte of the character, which has two or three
            wide -= data[wide] & 0xC0 == 0x80
        start[wide] = True
    apostrophes = np.flatnonzero(data == ord("'"))
    apostrophes = apostrophes[start[apostrophes]]
    for i in apostrophes.tolist():
        if match := _CONTRACTION.match(block, i):
            start[i + 1] = False
            if match.end() < len(block):
                start[match.end()] = True
    return start


def gpt4_starts(block, kind):
    """Where pieces of a text may start so that pre-tokenizing them by GPT-4's pattern equals pre-tokenizing the whole:
    some of the places where its pre-tokens do, (n,) bool. `block`, `kind`: as in `gpt2_starts`.

    No pre-token goes on after a letter or number with what is none, nor with a number after another sign, nor with a
    space before text after anything. Ends of parts belong to the piece before.
    """
    data = np.frombuffer(block, np.uint8)
    before, here = kind[:-1], kind[1:]
    start = np.ones(len(block), bool)
    start[1:] = (before <= NUMBER) & (here != before) & (here < NO_TEXT) | (before == OTHER) & (here == NUMBER)
    start[1:] |= before == NO_TEXT
    start[:-1] |= (data[:-1] == ord(" ")) & (here < SPACE)
    return start


# ----------------------------------------------------------------------------------------------------------
# Chunks: a text cut into parts that repeat
# ----------------------------------------------------------------------------------------------------------


def last_cut(tail, starts):
    """The last place in `tail`, bytes, where a text may be cut so that all pieces stay what they are; 0 for none.

    It is a start with no white space before it, far enough from both ends of `tail` to be seen for what it is, and
    before no apostrophe, for it may be within a pre-token, and 's is something else where one begins.
    """
    kind, data = kinds_of(tail), np.frombuffer(tail, np.uint8)
    places = np.flatnonzero(starts(tail, kind)[8:-8] & (kind[7:-9] != SPACE) & (data[8:-8] != ord("'")))
    return 8 + int(places[-1]) if len(places) else 0


def split_blocks(texts, starts):
    """Cut the concatenation of `texts`, an iterable of bytes, into blocks, bytes of about `BLOCK_BYTES` each, or more
    where there is no place to cut. Yields them as the texts are read, at least one.

    starts: a function as `gpt2_starts` and `gpt4_starts`.
    """
    pending, size, enough = [], 0, BLOCK_BYTES
    for text in texts:
        for first in range(0, len(text), BLOCK_BYTES):
            pending.append(text[first : first + BLOCK_BYTES])
            size += len(pending[-1])
            if size < enough:
                continue
            block = b"".join(pending)
            for tail in (block[-1000:], block[-BLOCK_BYTES:]):  # a place to cut is rarely far from the end
                if cut := last_cut(tail, starts):
                    cut += len(block) - len(tail)
                    yield block[:cut]
                    pending, size, enough = [block[cut:]], len(block) - cut, BLOCK_BYTES
                    break
            else:
                pending, enough = [block], 2 * size
    yield b"".join(pending)


class Chunks:
    """Numbers the distinct chunks of a text, so that costly work is done once a chunk.

    chunks: list of bytes, the chunk of each number.

    The bytes and the length of a short chunk make two 64-bit numbers, its key. All chunks of a block are looked up side
    by side in a hash table with linear probing (Knuth, The Art of Computer Programming 3, section 6.4), made of numpy
    arrays. A table that is half full gives way to an empty, larger one, so that a chunk may get a second number; no two
    chunks share one. Long chunks, which are rare, are numbered by a dict.
    """

    def __init__(self):
        self.chunks, self.size = [], 0  # size: bytes of all of them
        self.long = {}  # number of each chunk of more than SHORT_BYTES
        self._make_table(1 << 17)

    def _make_table(self, size):
        self.used, self.shift = 0, np.uint64(65 - size.bit_length())
        self.low, self.high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)  # free where high is 0
        self.number = np.zeros(size, np.int64)

    def index(self, block, start):
        """Numbers of the chunks of `block`, bytes, in order: (number of chunks,) int64. start: where each starts."""
        data = np.frombuffer(block + bytes(16), np.uint8)
        length = np.diff(start, append=len(block))
        short, long = np.flatnonzero(length <= SHORT_BYTES), np.flatnonzero(length > SHORT_BYTES)
        index = np.empty(len(start), np.int64)
        index[short] = self._index_short(block, data, start.take(short), length.take(short))
        for k, i, m in zip(long.tolist(), start[long].tolist(), length[long].tolist()):
            chunk = block[i : i + m]
            if chunk not in self.long:
                self.size += m
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
        self.size += int(length[first].sum())
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
            self.number[place[free[::-1]]] = free[::-1]  # of several that meet a free slot the first gets it
            free = free[self.number[place[free]] == free]
            claimed, winner = place[free], todo[free]
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
        return [text]
    if len(text) < len(chunk):
        return [pretoken.encode() for pretoken in pattern.findall(text.decode())]
    # Something else comes next. It must be seen: white space at the end of a part is cut otherwise.
    return [pretoken.encode() for pretoken in pattern.findall(chunk.decode() + " x")[:-1]]


def count_pretokens(texts, pattern):
    """How often each pre-token occurs in `texts`, a string or an iterable of strings, each pre-tokenized by itself.

    pattern: as of `BulkEncoder`. Returns a Counter, {pre-token as bytes: how often}. Raises as `utf8` does, and
    ValueError if the texts are names of files, for a vocabulary of file names is never what is wanted.
    """
    counts, chunks, times = Counter(), Chunks(), np.zeros(0, np.int64)
    starts = gpt4_starts if pattern else gpt2_starts
    for block in split_blocks(_no_file_names(documents(texts)), starts):
        index = chunks.index(block, np.flatnonzero(starts(block, kinds_of(block))))
        times = np.pad(times, (0, len(chunks.chunks) - len(times)))
        times += np.bincount(index, minlength=len(times))
    for chunk, n in zip(chunks.chunks, times.tolist()):
        for pretoken in _pretokenize(chunk, pattern) if pattern else [chunk]:
            counts[pretoken] += n
    del counts[END]
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


def _totals(keys, weights, bound):
    """(the distinct `keys` ascending, the sum of the `weights` of each, int64); keys whose sum is 0 may be left out.

    keys: (n,) int64 from 0 to below `bound`.
    """
    if bound <= 8 * len(keys):  # counting takes less than sorting
        total = np.bincount(keys, weights)
        keys = np.flatnonzero(total)
        return keys, total[keys].astype(np.int64)
    order = np.argsort(keys, kind="stable")  # faster than the default, not needed otherwise
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(weights[order], first, dtype=np.int64) if len(first) else np.zeros(0, np.int64)


def _every_second(overlaps):
    """Which of the places of a pair to merge. overlaps: (n,) bool, whether each place overlaps the one before it.

    In a run of overlapping places, as those of aa in aaaa, every second one is merged, from the left.
    """
    number = np.arange(len(overlaps))
    run = np.maximum.accumulate(np.where(overlaps, 0, number))  # where the run of each place starts
    return (number - run) % 2 == 0


class Corpus:
    """The pre-tokens of a text, each once, laid out end to end with separators between them, to merge pairs in.

    ids: (n,) int32, the id at each place, -1 at separators; weight: (n,), how often the pre-token of each place occurs,
    0 at separators and places that are no longer in use. A merge puts its id where the left one was. left, right: (n,),
    the neighbours of each place that are still in use, a linked list. places: for each id, the places that hold it,
    ascending, among others that did. Numbers have 32 bits where those hold them.
    """

    def __init__(self, counts):
        sizes = np.array([len(pretoken) for pretoken in counts], np.int64)
        text = np.frombuffer(b"\0".join([b"", *counts, b""]), np.uint8)
        n, times = len(text), np.array(list(counts.values()), np.int64)
        place = np.int32 if n < 1 << 31 else np.int64
        separators = np.append(0, np.cumsum(sizes + 1))
        order = np.argsort(text, kind="stable").astype(place)
        in_use = np.ones(n, bool)
        in_use[separators] = False
        order = order[in_use[order]]
        ends = np.cumsum(np.bincount(text, minlength=256) - np.eye(1, 256, dtype=np.int64)[0] * len(separators))
        self.places = np.split(order, ends[:-1])
        self.ids = text.astype(np.int32)
        self.weight = np.zeros(n, np.int32 if times.sum() < 1 << 31 else np.int64)
        self.weight[1:] = np.repeat(times.astype(self.weight.dtype), sizes + 1)[: n - 1]
        self.ids[separators], self.weight[separators] = -1, 0
        self.left, self.right = np.arange(-1, n - 1, dtype=place), np.arange(1, n + 1, dtype=place)

    def _weights(self, i, j):
        """How often each of the pairs of places `i` and `j` occurs: never if it holds a separator."""
        return np.minimum(self.weight.take(i), self.weight.take(j))

    def pair_totals(self):
        """(all distinct pairs, how often each occurs in the text). A pair of ids a and b is the number a * 2^32 + b."""
        n_ids, found = len(self.places), []
        in_use = np.flatnonzero(self.weight)
        for i in np.array_split(in_use, len(in_use) // (1 << 20) + 1):
            j = self.right.take(i)
            i, j = i[self.weight.take(j) > 0], j[self.weight.take(j) > 0]
            keys = self.ids.take(i) * np.int64(n_ids) + self.ids.take(j)
            found.append(_totals(keys, self._weights(i, j), n_ids**2))
        keys, total = _totals(*map(np.concatenate, zip(*found)), n_ids**2)
        return keys // n_ids * _PAIR + keys % n_ids, total

    def find(self, a, b):
        """Where each of several merges applies: (places of the left ids, ascending for each merge; the number of the
        merge of each). Of overlapping places, as in aaa, every second. a, b: (n,) int64, left and right ids."""
        rarer, some = [], []
        for left, right in zip(a.tolist(), b.tolist()):
            rarer.append(id := left if len(self.places[left]) < len(self.places[right]) else right)
            at = self.places[id]
            if len(at) > 64:
                self.places[id] = at = at[self.ids.take(at) == id]  # some have been merged away
            some.append(at)
        rarer, merge = np.array(rarer), np.repeat(np.arange(len(a)), [len(at) for at in some])
        at = np.concatenate(some)
        i = np.where((rarer == a)[merge], at, self.left.take(at))
        fits = (self.ids.take(at) == rarer[merge]) & (self.ids.take(i) == a[merge])
        i, merge = i[fits], merge[fits]
        fits = self.ids.take(self.right.take(i)) == b[merge]
        i, merge = i[fits], merge[fits]
        overlaps = (self.left.take(i[1:]) == i[:-1]) & (merge[1:] == merge[:-1]) & (a == b)[merge[1:]]
        fits = _every_second(np.append(np.zeros(min(1, len(i)), bool), overlaps))
        return i[fits], merge[fits]

    def bounds_of_new_pairs(self, i, merge, n):
        """For each of `n` merges, which apply at `i`, as `find` has them, the pairs that it makes with what follows and
        with what precedes: (how often the most frequent with what follows occurs, the most frequent with what precedes,
        the smallest id that precedes as often), (n,) int64 each. They are bounds, since the neighbours may merge."""
        n_ids = len(self.places)
        bounds = np.zeros((2, n), np.int64)
        for side, neighbour in enumerate((self.right.take(self.right.take(i)), self.left.take(i))):
            keys = merge * n_ids + np.maximum(self.ids.take(neighbour), 0)
            keys, total = _totals(keys, self._weights(i, neighbour), n * n_ids)
            np.maximum.at(bounds[side], keys // n_ids, total)
        smallest = np.full(n, n_ids)
        often = total == bounds[1, keys // n_ids]
        np.minimum.at(smallest, keys[often] // n_ids, keys[often] % n_ids)
        return *bounds, smallest

    def merge(self, a, b, i, merge):
        """Make merges of `a` and `b`, (n,) int64, at `i`, as `find` has them, into new ids, numbered as they come.

        Returns (pairs, by how much the count of each changes); a pair that loses may come twice.
        """
        n, first_new = len(a), len(self.places)
        n_ids = first_new + n
        j = self.right[i]
        before, after = self.left[i], self.right[j]
        weight = self.weight[i]
        # Pairs that go: the left one of each with what precedes, unless that is merged too and counts it, and the right
        # one with what follows.
        self.ids[j] = -2
        apart = self.ids[before] != -2
        self.ids[j] = b[merge]
        parts = [(0, merge[apart], before[apart], weight[apart]), (1, merge, after, weight)]
        gone = [(kind * n + k, self.ids[x], np.minimum(w, self.weight[x])) for kind, k, x, w in parts]
        self.ids[i], self.ids[j], self.weight[j] = first_new + merge, -1, 0
        self.right[i], self.left[after] = after, i
        ends = np.cumsum(np.bincount(merge, minlength=n)).tolist()
        self.places += [i[start:end] for start, end in zip([0, *ends], ends)]
        before = self.left[i]
        apart = self.ids[before] < first_new
        parts = [(2, merge[apart], before[apart], weight[apart]), (3, merge, after, weight)]
        come = [(kind * n + k, self.ids[x], np.minimum(w, self.weight[x])) for kind, k, x, w in parts]
        group, other, change = map(np.concatenate, zip(*gone, *come))
        some = change > 0
        keys, change = _totals(group[some] * n_ids + other[some], change[some], 4 * n * n_ids)
        group, other = np.divmod(keys, n_ids)
        kind, k = np.divmod(group, n)
        new = first_new + k
        one = np.choose(kind, [other, b[k], other, new])
        two = np.choose(kind, [a[k], other, new, other])
        lost = np.bincount(merge, weight, minlength=n).astype(np.int64)  # of each merged pair itself
        pairs = np.concatenate([a * _PAIR + b, one * _PAIR + two])
        return pairs, np.concatenate([-lost, np.where(kind < 2, -change, change)])


def learn_merges(counts, n_merges, progress=None):
    """The first `n_merges` merges, a list of (left id, right id): each the most frequent pair, of equals the smallest.

    counts: {pre-token as bytes: how often it occurs}. progress: called with the number of merges, after each of them.

    The textbook's result (Sennrich et al. 2016, arXiv:1508.07909, algorithm 1). Those that come next are merged
    together, as long as no two of them overlap in a pre-token (no left id of one is the right id of another) and no
    pair that they make comes before one that still waits: then the order does not matter. Of equally frequent ones that
    could only be one whose left id is smaller, for a new id is larger than all others. Only pairs that occur
    `floor` times or more are kept count of; when all of them are merged, it is lowered.
    """
    corpus = Corpus(counts)
    merges, pair_counts, heap, floor, n = [], {}, [], None, 0
    while len(merges) < n_merges:
        batch, lefts, rights = [], set(), set()
        while heap and len(batch) < min(2 * n + 8, n_merges - len(merges)):  # about as many as the last time
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

        a, b = np.array([pair[1:] for pair in batch], np.int64).T
        i, merge = corpus.find(a, b)
        bounds = [bound.tolist() for bound in corpus.bounds_of_new_pairs(i, merge, len(batch))]
        n, highest, smallest = 0, 0, {}  # how many can be made; of the pairs that they make, by count, the left id
        for (count, left, _), *new in zip(batch, *bounds):
            if highest > count or smallest.get(count, left) < left:
                break
            n, (after, before, first) = n + 1, new
            highest, smallest[before] = max(highest, after, before), min(first, smallest.get(before, first))
        for count, left, right in batch[n:]:
            heapq.heappush(heap, (-count, left * _PAIR + right))
        made = slice(np.searchsorted(merge, n))
        pairs, changes = corpus.merge(a[:n], b[:n], i[made], merge[made])
        for _, left, right in batch[:n]:
            merges.append((left, right))
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
    """Ids of one pre-token, bytes or a list of ids, as a list: the textbook's result in O(n log n) instead of O(n^2).

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
    """What merges can do to two ids side by side, x and y, as numpy arrays, to look up many pairs at once:

    - the merge of the two;
    - the first merge that can ever take y with what is left of it, which by then ends with x: (L, y) where x is L, or
      the right part of L, or the right part of that, and so on;
    - the first merge that can ever take x with what is right of it, which by then begins with y: (x, R).

    A merge is told by the id that it makes, none by `NONE`. A pair is one number, its key, which has a slot in a hash
    table with linear probing (Knuth, The Art of Computer Programming 3, section 6.4).
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
        self.size = 1 << (4 * len(distinct) + 1).bit_length()
        values = np.full((3, len(distinct) + 1), NONE, np.int32)
        np.minimum.at(values, (kind, row), new)
        self.slot_key, self.slot_row = np.full(self.size, -1), np.full(self.size, len(distinct), np.int32)
        self.values = values
        todo, slot = np.arange(len(distinct)), self._slot(distinct)
        while len(todo):
            free = todo[self.slot_key[slot[todo]] < 0]
            self.slot_key[slot[free]] = distinct[free]  # of several that want a slot the last gets it
            got = free[self.slot_key[slot[free]] == distinct[free]]
            self.slot_row[slot[got]] = got
            todo = todo[self.slot_key[slot[todo]] != distinct[todo]]
            slot[todo] = (slot[todo] + 1) % self.size

    def _slot(self, keys):
        return (keys * np.int64(0x1E3779B97F4A7C15) >> 24) & (self.size - 1)  # odd, otherwise arbitrary

    def find(self, left, right):
        """What is to know of pairs of ids, (3, n) int32: see above. left, right: (n,) integers."""
        keys = left.astype(np.int64) * self.n_ids + right
        slot = self._slot(keys)
        there = self.slot_key.take(slot)
        row = self.slot_row.take(slot)
        row[there != keys] = self.values.shape[1] - 1
        todo = np.flatnonzero((there != keys) & (there >= 0))  # another pair holds the slot
        while len(todo):
            slot[todo] = (slot[todo] + 1) % self.size
            there = self.slot_key.take(slot[todo])
            same = there == keys[todo]
            row[todo[same]] = self.slot_row.take(slot[todo[same]])
            todo = todo[~same & (there >= 0)]
        return self.values.take(row, axis=1)


class JoinTable:
    """Tells between which bytes of a text a token can go on. Where none can, no merge ever joins what stands there, and
    a long pre-token may be cut: Chinese sentences and numbers fall into pieces that repeat, as words do.

    tokens: list of bytes. Of every place inside of a token up to three bytes to the left and to the right of it, or one
    if there are fewer, are kept in a table of bits (Bloom 1970, "Space/Time Trade-offs in Hash Coding"), which forgets
    none and at times finds one that was not put in: then there is a cut less.
    """

    SIX, LEFT, RIGHT, TWO = (np.uint64(mask) for mask in (0xFFFFFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF0000, 0xFFFF0000))

    def __init__(self, tokens):
        tokens = [token for token in tokens if len(token) > 1]
        size = np.array([len(token) for token in tokens], np.int64)
        place, end = np.arange(size.sum()), np.repeat(np.cumsum(size), size)
        left = place - end + np.repeat(size, size)  # bytes of the token before each place
        place, left, right = (x[left > 0] for x in (place, left, end - place))
        around = self._around(b"".join(tokens), place)
        with_3 = right >= 3
        mask = np.where(left >= 3, np.where(with_3, self.SIX, self.LEFT), np.where(with_3, self.RIGHT, self.TWO))
        self.two = np.zeros(1 << 16, bool)  # pairs of bytes in a token, by right * 256 + left
        self.two[around >> np.uint64(16) & np.uint64(0xFFFF)] = True
        self.shift = np.uint64(64 - max(16, (16 * len(place)).bit_length()))
        self.table = np.zeros(1 << 64 - int(self.shift), bool)
        self.table[self._slot(around & mask)] = True

    @staticmethod
    def _around(text, place):
        """The three bytes before and after each place of `text`, in the low 48 bits of an uint64."""
        padded = bytes(3) + text + bytes(8)
        return np.ndarray(len(text) + 3, "<u8", padded, strides=(1,))[place]

    def _slot(self, key):
        return (key * np.uint64(0x9E3779B97F4A7C15) >> self.shift).view(np.int64)

    def joins(self, text, place):
        """Whether a token may go on across each place of `text`, bytes: (n,) bool for places (n,)."""
        around = self._around(text, place)
        joined = self.two.take((around >> np.uint64(16) & np.uint64(0xFFFF)).view(np.int64))
        some = np.flatnonzero(joined)
        around, found = around[some], np.zeros(len(some), bool)
        for mask in (self.SIX, self.LEFT, self.RIGHT, self.TWO):
            found |= self.table.take(self._slot(around & mask))
        joined[some] = found
        return joined


class BulkEncoder:
    """Encodes corpora with the merges `merge_id`, {(left id, right id): id of the merged token}.

    pattern: the compiled pattern of GPT-4, or None for that of GPT-2, which is not needed; dtype: an integer numpy type
    that holds every id; byte_id: the id of each byte, 256 bytes, or None where they are the same.
    """

    def __init__(self, merge_id, pattern, dtype, byte_id=None):
        self.merge_id, self.pattern, self.dtype, self.byte_id = merge_id, pattern, dtype, byte_id
        self.pair_table = PairTable(merge_id)
        tokens = [bytes([byte_id.index(i) if byte_id else i]) for i in range(256)]
        for a, b in merge_id:
            tokens.append(tokens[a] + tokens[b])
        self.join_table = JoinTable(tokens)
        left, right = np.divmod(np.arange(1 << 16), 256)
        self.byte_pairs = self.pair_table.find(left, right)  # by left id * 256 + right id: (3, 65536)

    def encode(self, texts):
        """Ids of `texts`, an iterable of bytes in which parts are marked: an iterator of arrays of `dtype`, one for
        each block. Memory is bounded, but for a pre-token that can nowhere be cut."""
        chunks, waiting = Chunks(), []
        ids, lengths, size = np.empty(0, self.dtype), np.empty(0, np.int64), 0  # of all chunks so far, end to end
        for block in itertools.chain(split_blocks(texts, self.starts), [None]):
            if block is not None:
                waiting.append(chunks.index(block, np.flatnonzero(self.starts(block, kinds_of(block)))))
                if len(waiting) < 32 and chunks.size - size < NEW_BYTES:
                    continue  # the new chunks of many blocks are encoded together
            if new := chunks.chunks[len(lengths) :]:
                new_ids, new_lengths = self.encode_chunks(new)
                ids, lengths, size = np.append(ids, new_ids), np.append(lengths, new_lengths), chunks.size
            for index in waiting:
                yield gather(ids, lengths, index)
            waiting = []
            if len(lengths) > MANY_CHUNKS:  # a text that does not repeat itself
                chunks, ids, lengths, size = Chunks(), ids[:0], lengths[:0], 0

    def starts(self, block, kind):
        """Where the chunks of `block` start, (n,) bool: pieces of `gpt4_starts`, or GPT-2's pre-tokens, of which long
        ones are cut where no token goes on. `kind`: its `kinds_of`."""
        if self.pattern:
            return gpt4_starts(block, kind)
        start = gpt2_starts(block, kind)
        place = np.flatnonzero(start)
        length = np.diff(place, append=len(block))
        long = np.flatnonzero(length > SHORT_BYTES)
        if len(long):
            rest = length[long] - 1
            inside = np.repeat(place[long] + 1 - (np.cumsum(rest) - rest), rest) + np.arange(rest.sum())
            inside = inside[np.frombuffer(block, np.uint8).take(inside) & 0xC0 != 0x80]  # not within a character
            start[inside] = ~self.join_table.joins(block, inside)
            # Of many single bytes in a row, eight are a chunk.
            inside = inside[(inside & 7 != 0) & (inside < len(block) - 1)]
            start[inside[start[inside - 1] & start[inside + 1]]] = False
        return start

    def encode_chunks(self, chunks):
        """(ids of all `chunks`, a list of bytes, end to end, as `dtype`; number of ids of each chunk, int64)"""
        if not self.pattern:
            ids, lengths = self.encode_pretokens(chunks)
            return ids.astype(self.dtype), lengths
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
        """The textbook's encoding of many pre-tokens side by side, many merges a round.

        pretokens: list of bytes. Returns (ids of all of them end to end, int32; number of ids of each, int64).

        A round makes the first merge that waits in each pre-token, as the textbook does. It also makes every other one
        that comes before all that could ever take one of its two tokens from it, on either side: its turn would come,
        and until then nothing changes it, so it may as well be made at once.
        """
        marks = [pretoken[:1] >= END for pretoken in pretokens]  # a special token, or the end of a part
        texts = [b"" if mark else pretoken for pretoken, mark in zip(pretokens, marks)]
        ids = np.frombuffer(b"".join(texts).translate(self.byte_id), np.uint8).astype(np.int32)
        owner = np.repeat(np.arange(len(texts), dtype=np.int32), [len(text) for text in texts])
        done = [(np.array([int(pretokens[i][1:])], np.int32), np.array([i], np.int32))
                for i, mark in enumerate(marks) if mark and pretokens[i] != END]  # fmt: skip
        pairs = np.append(ids[:-1] * 256 + ids[1:], ids[-1:])
        ends = np.flatnonzero(np.diff(owner, append=-1))  # the next id belongs to another pre-token
        new_id, by_left, by_right = (of_bytes.take(pairs) for of_bytes in self.byte_pairs)
        new_id[ends] = by_left[ends] = by_right[ends] = NONE
        for _ in range(MANY_ROUNDS):
            if not len(ids):
                break
            first = np.flatnonzero(np.diff(owner, prepend=-1))  # where each pre-token starts
            best = np.minimum.reduceat(new_id, first)
            best = np.repeat(best, np.diff(first, append=len(ids)))
            # In front of the first and after the last id of a pre-token, by_left and by_right are NONE.
            chosen = (new_id < np.roll(by_left, 1)) & (new_id <= np.roll(by_right, -1)) | (new_id == best)
            place = np.flatnonzero(chosen & (new_id != NONE))
            place = place[_every_second(np.diff(place, prepend=-2) == 1)]
            ids[place] = new_id[place]
            finished = best == NONE
            some = np.flatnonzero(finished)
            done.append((ids[some], owner[some]))
            keep = ~finished
            keep[place + 1] = False
            place = (np.cumsum(keep) - 1)[place]  # where the merged ids are among those that are kept
            keep = np.flatnonzero(keep)
            ids, owner, new_id, by_left, by_right = (x.take(keep) for x in (ids, owner, new_id, by_left, by_right))
            changed = np.concatenate([place, place[place > 0] - 1])
            after = np.minimum(changed + 1, len(ids) - 1)
            found = self.pair_table.find(ids[changed], ids[after])
            found[:, (owner[changed] != owner[after]) | (after == changed)] = NONE
            new_id[changed], by_left[changed], by_right[changed] = found
        for some in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(owner)) + 1) if len(ids) else []:
            rest = np.array(encode_long_pretoken(ids[some].tolist(), self.merge_id), np.int32)
            done.append((rest, np.full(len(rest), owner[some[0]])))
        ids = np.concatenate([some for some, _ in done] or [ids])
        owner = np.concatenate([some for _, some in done] or [owner])
        return ids[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(texts))
