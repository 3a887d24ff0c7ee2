"""Find the pre-tokens of a corpus with numpy, and count them.

    counts = count_pretokens(texts, pattern)      # {pre-token: how often it occurs}, what learn.learn_merges expects

Encoding uses the same steps: `parts` or `documents` turn texts into bytes, `split_blocks` cuts these into blocks,
`gpt2_starts` or `gpt4_starts` find where the chunks of a block start, and `Chunks` numbers the distinct chunks.

Throughout the package, texts are UTF-8 bytes with two markers, bytes that never occur in UTF-8. A *part* is a stretch
of text that is pre-tokenized on its own: a document, or the text between two special tokens. The byte 0xFE, `END`, ends
every part. A part that starts with the byte 0xFF, `SPECIAL`, is a special token; its id follows in decimal digits.

`pattern` is None for GPT-2's pattern, whose pre-tokens are found without a regular expression, or GPT-4's pattern,
compiled by `unicode.compile_pattern`. A *chunk* is a piece of a block that is looked up as a whole: with GPT-2's
pattern one pre-token, with GPT-4's one or more, which the compiled pattern then separates.
"""

import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from bpe import shown
from bpe.unicode import LETTERS, NUMBERS, SPACES
from harness.errors import UserError

BLOCK_BYTES = 1 << 18  # bytes of text to process together: they fit in the processor's cache
SHORT_BYTES = 15  # longest chunk, in bytes, that fits with its length in two 64-bit numbers

END, SPECIAL = b"\xfe", b"\xff"  # end of a part; start of a special token
LETTER, NUMBER, OTHER, SPACE, NO_TEXT = range(5)  # classes of characters; NO_TEXT: END

_CONTRACTION = re.compile(rb"'(?:[sdmt]|ll|ve|re)")
_MASK = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # _MASK[n] selects the first n of 8 bytes

# ----------------------------------------------------------------------------------------------------------
# Texts as bytes
# ----------------------------------------------------------------------------------------------------------

_HOW_TO_READ = "read a file with Path(...).read_text(encoding='utf-8'), turn bytes into text with .decode()"


def utf8(text):
    """`text` as UTF-8 bytes. Raises TypeError if it is not a str, ValueError if it contains a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"the text must be a str, not {shown(text)}: {_HOW_TO_READ}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"the text has a lone surrogate (U+{code:04X}) at character {error.start}, which UTF-8 "
                        "cannot hold; replace it, e.g. text.encode('utf-8', 'replace').decode()") from None


def _items(texts):
    """`texts`, an iterable of str or one str, as an iterable. Raises TypeError for anything else."""
    if isinstance(texts, (bytes, bytearray, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"the text must be a str or an iterable of str, not {shown(texts)}: {_HOW_TO_READ}")
    return [texts] if isinstance(texts, str) else texts


def parts(texts, special_id=()):
    """The concatenation of `texts` as an iterator of bytes, divided into parts at special tokens.

    texts: an iterable of str, or one str. special_id: {name: id} of the special tokens to recognize. If several names
    match at one place, the longest wins. A name may be spread over several texts, so the last bytes of each text are
    held back until the next one has been read.
    Raises as `utf8` does.
    """
    texts = map(utf8, _items(texts))
    return itertools.chain(_mark(texts, special_id) if special_id else texts, [END])


def _mark(texts, special_id):
    """The concatenation of `texts`, bytes, with the names in `special_id` replaced by markers, as an iterator."""
    marks = {utf8(name): END + SPECIAL + b"%d" % id + END for name, id in special_id.items()}
    longest = max(map(len, marks))
    names = re.compile(b"(" + b"|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + b")")
    waiting = b""
    for text in itertools.chain(texts, [END * (longest - 1)]):  # the last item is in no name and releases the rest
        text = waiting + text
        n = len(text) - (longest - 1)  # a name that starts here or later may continue in the next text
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
    """Each of `texts` as one part, an iterator of bytes.

    texts: an iterable of str, or one str. An item may also be an iterator of str, the pieces of a long document.
    special: the id of a special token to put before each, or None. Raises as `utf8` does.
    """
    mark = b"" if special is None else SPECIAL + b"%d" % special + END
    return _mark_documents(_items(texts), mark)


def _mark_documents(texts, mark):
    for text in texts:
        if isinstance(text, Iterator):
            yield from itertools.chain([mark], map(utf8, text), [END])
        else:
            yield mark + utf8(text) + END


def _no_file_names(documents):
    """The items of `documents`, an iterator. Raises ValueError at its end if every one is the name of a file."""
    name, only_names = b"", True
    for document in documents:
        name = document[:4096].removesuffix(END)
        only_names = only_names and len(name) < 4096 and os.path.isfile(name)
        yield document
    if name and only_names:
        raise UserError(f"the text is nothing but the name of a file, {name.decode()!r}: {_HOW_TO_READ}")


# ----------------------------------------------------------------------------------------------------------
# Where chunks start
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def _classes():
    """(the class of each byte that is a whole character or a marker, 256 bytes; the class of each code point, array)"""
    of_code_point = np.full(0x110000, OTHER, np.uint8)
    for name, ranges in ((LETTER, LETTERS), (NUMBER, NUMBERS), (SPACE, SPACES)):
        for part in ranges.split():
            first, _, last = part.partition("-")
            of_code_point[int(first, 16) : int(last or first, 16) + 1] = name
    of_byte = of_code_point[:256].copy()
    of_byte[[*END, *SPECIAL]] = NO_TEXT, NUMBER  # as a number, SPECIAL stays together with its digits
    return of_byte.tobytes(), of_code_point


def classes_of(block):
    """The class of the character that each byte belongs to: (n,) uint8. block: n bytes, with markers."""
    of_byte, of_code_point = _classes()
    data = np.frombuffer(block + bytes(3), np.uint8)
    found = np.frombuffer(bytearray(block.translate(of_byte) + bytes(3)), np.uint8)
    lead = np.flatnonzero((data >= 0xC2) & (data < 0xF5))  # first bytes of the characters that have more than one
    lead_byte = data.take(lead)
    for size, low, high in ((2, 0xC2, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF5)):
        first = lead[(lead_byte >= low) & (lead_byte < high)]
        if len(first):
            code_point = data.take(first).astype(np.int64) - (256 - (256 >> size))
            for k in range(1, size):
                code_point = code_point << 6 | data.take(first + k) & 63
            of_first = of_code_point.take(code_point, mode="clip")
            for k in range(size):
                found[first + k] = of_first
    return found[: len(block)]


def gpt2_starts(block, classes):
    """Where the pre-tokens of GPT-2's pattern start: (n,) bool. block: n bytes, with markers; classes: `classes_of` it.

    The pattern looks at most three characters ahead, so the neighbours of a place decide. A pre-token starts where the
    class changes. One space before text belongs to the text; of other white space before text the last character is a
    pre-token. An apostrophe that starts a pre-token takes the letters of 's, 't, 'll and so on with it. END and special
    tokens count as pre-tokens.
    """
    data = np.frombuffer(block, np.uint8)
    before, here = classes[:-1], classes[1:]
    start = np.ones(len(block), bool)
    is_text = here < SPACE
    start[1:] = (here != before) | (before == NO_TEXT)
    start[1:] &= ~(is_text & (data[:-1] == ord(" ")))
    last = (before == SPACE) & is_text  # the last byte of white space
    start[:-1] |= last
    wide = np.flatnonzero(last & (data[:-1] >= 0x80))
    if len(wide):
        start[wide] = False
        for _ in range(2):  # move to the first byte of the character, which has two or three
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


def gpt4_starts(block, classes):
    """Where GPT-4's pattern certainly starts a pre-token: (n,) bool. block, classes: as for `gpt2_starts`.

    Only places are found where both sides can be pre-tokenized on their own, if the left side knows that text follows:
    no pre-token continues from a letter or a number to another class, from another sign to a number, or from anything
    to a space before text. END belongs to the chunk before it.
    """
    data = np.frombuffer(block, np.uint8)
    before, here = classes[:-1], classes[1:]
    start = np.ones(len(block), bool)
    start[1:] = (before <= NUMBER) & (here != before) & (here < NO_TEXT) | (before == OTHER) & (here == NUMBER)
    start[1:] |= before == NO_TEXT
    start[:-1] |= (data[:-1] == ord(" ")) & (here < SPACE)
    return start


# ----------------------------------------------------------------------------------------------------------
# Blocks and their chunks
# ----------------------------------------------------------------------------------------------------------


def _last_cut(tail, starts):
    """The last place in `tail`, bytes, where a text can be cut without a change to its chunks; 0 if there is none.

    The place is a start without white space before it, and far enough from both ends of `tail` that its neighbours are
    known. It is not at an apostrophe: where a long pre-token has been divided, the apostrophe would become the start of
    a pre-token and could take an s with it.
    """
    classes, data = classes_of(tail), np.frombuffer(tail, np.uint8)
    places = np.flatnonzero(starts(tail, classes)[8:-8] & (classes[7:-9] != SPACE) & (data[8:-8] != ord("'")))
    return 8 + int(places[-1]) if len(places) else 0


def split_blocks(texts, starts):
    """Cut the concatenation of `texts`, an iterable of bytes, into blocks of about `BLOCK_BYTES` bytes.

    starts: where the chunks of a block start: `gpt2_starts`, `gpt4_starts` or `encode.BulkEncoder.starts`.
    Yields blocks, bytes, as the texts are read, at least one. A block is longer where no cut would keep the chunks.
    """
    pending, size, enough = [], 0, BLOCK_BYTES
    for text in texts:
        for first in range(0, len(text), BLOCK_BYTES):
            pending.append(text[first : first + BLOCK_BYTES])
            size += len(pending[-1])
            if size < enough:
                continue
            block = b"".join(pending)
            for tail in (block[-1000:], block[-BLOCK_BYTES:]):  # usually there is a place near the end
                if cut := _last_cut(tail, starts):
                    cut += len(block) - len(tail)
                    yield block[:cut]
                    pending, size, enough = [block[cut:]], len(block) - cut, BLOCK_BYTES
                    break
            else:
                pending, enough = [block], 2 * size
    yield b"".join(pending)


class Chunks:
    """Numbers the distinct chunks of a text, so that costly work is done once per chunk.

    chunks: list of bytes, the chunk with each number. size: bytes of all of them.

    The bytes of a short chunk and its length make two 64-bit numbers, its key. All chunks of a block are looked up
    together in a hash table with linear probing (Knuth, The Art of Computer Programming 3, section 6.4), held in numpy
    arrays. When it is half full, an empty, larger table replaces it, so a chunk may get a second number; but no number
    has two chunks. Long chunks are rare and are numbered by a dict.
    """

    def __init__(self):
        self.chunks, self.size = [], 0
        self._long = {}  # {chunk of more than SHORT_BYTES: number}
        self._make_table(1 << 17)

    def _make_table(self, size):
        self._used, self._shift = 0, np.uint64(65 - size.bit_length())
        self._low, self._high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)  # free where _high is 0
        self._number = np.zeros(size, np.int64)

    def index(self, block, start):
        """The numbers of the chunks of `block`, bytes, in order: (m,) int64. start: (m,) int64, where each starts."""
        data = np.frombuffer(block + bytes(16), np.uint8)
        length = np.diff(start, append=len(block))
        short, long = np.flatnonzero(length <= SHORT_BYTES), np.flatnonzero(length > SHORT_BYTES)
        index = np.empty(len(start), np.int64)
        index[short] = self._index_short(block, data, start.take(short), length.take(short))
        for k, i, m in zip(long.tolist(), start[long].tolist(), length[long].tolist()):
            chunk = block[i : i + m]
            if chunk not in self._long:
                self.size += m
                self._long[chunk] = len(self.chunks)
                self.chunks.append(chunk)
            index[k] = self._long[chunk]
        return index

    def _index_short(self, block, data, start, length):
        sixteen = np.ndarray(len(block), "V16", data, strides=(1,))  # the 16 bytes from each place on; they overlap
        numbers = sixteen[start].view("<u8")
        low = numbers[::2] & _MASK.take(length, mode="clip")
        rest = np.maximum(length - 8, 0)
        high = numbers[1::2] & _MASK.take(rest) | length.astype(np.uint64) << np.uint64(56)
        index, first = self._look_up(low, high)
        self.size += int(length[first].sum())
        self.chunks += [block[i : i + m] for i, m in zip(start[first].tolist(), length[first].tolist())]
        return index

    def _look_up(self, low, high):
        """(the number of each key; which keys are new, in the order of their numbers)"""
        if max(2 * self._used, self._used + len(low)) > len(self._number):
            self._make_table(4 * max(len(self._number), 1 << len(low).bit_length()))
        mixed = (low ^ high * np.uint64(0xC2B2AE3D27D4EB4F)) * np.uint64(0x9E3779B97F4A7C15)  # odd, otherwise arbitrary
        slot = (mixed >> self._shift).view(np.int64)
        index, new = self._number.take(slot), [np.empty(0, np.int64)]
        todo = np.flatnonzero((self._low.take(slot) != low) | (self._high.take(slot) != high))
        while len(todo):
            place = slot[todo]
            free = np.flatnonzero(self._high.take(place) == 0)
            self._number[place[free[::-1]]] = free[::-1]  # if several keys reach a free slot, the first gets it
            free = free[self._number[place[free]] == free]
            claimed, winner = place[free], todo[free]
            self._low[claimed], self._high[claimed] = low[winner], high[winner]
            self._number[claimed] = np.arange(len(winner)) + len(self.chunks) + sum(map(len, new))
            new.append(winner)
            same = (self._low.take(place) == low[todo]) & (self._high.take(place) == high[todo])
            index[todo[same]] = self._number.take(place[same])
            todo = todo[~same]
            slot[todo] = (slot[todo] + 1) % len(self._number)
        new = np.concatenate(new)
        self._used += len(new)
        return index, new


def pretokenize(chunk, pattern):
    """The pre-tokens of a chunk of `gpt4_starts`, a list of bytes without END. pattern: GPT-4's, compiled.

    A special token gives itself.
    """
    text = chunk.removesuffix(END)
    if text.removeprefix(b" ").isalpha():  # ASCII letters after at most one space: one pre-token
        return [text]
    if chunk[:1] == SPECIAL:
        return [text]
    if len(text) < len(chunk):
        return [pretoken.encode() for pretoken in pattern.findall(text.decode())]
    # Text follows, and the pattern must see it: it cuts white space at the end of a part differently.
    return [pretoken.encode() for pretoken in pattern.findall(chunk.decode() + " x")[:-1]]


def count_pretokens(texts, pattern):
    """How often each pre-token occurs: a Counter, {pre-token as bytes: count}.

    texts: an iterable of str, each pre-tokenized on its own, or one str.
    pattern: None for GPT-2's, or GPT-4's, compiled.
    Raises as `utf8` does, and ValueError if all texts are names of files, since nobody wants to learn from these.
    """
    counts, chunks, times = Counter(), Chunks(), np.zeros(0, np.int64)
    starts = gpt4_starts if pattern else gpt2_starts
    for block in split_blocks(_no_file_names(documents(texts)), starts):
        index = chunks.index(block, np.flatnonzero(starts(block, classes_of(block))))
        times = np.pad(times, (0, len(chunks.chunks) - len(times)))
        times += np.bincount(index, minlength=len(times))
    for chunk, n in zip(chunks.chunks, times.tolist()):
        for pretoken in pretokenize(chunk, pattern) if pattern else [chunk]:
            counts[pretoken] += n
    del counts[END]
    return counts
