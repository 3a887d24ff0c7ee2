r"""The tokenizer: byte-pair encoding. `pytest exercises/test_tokenizer_bpe.py` checks your answers.

Ids 0 to 255 are the bytes, and merge k makes id 256 + k. Read bpe_tokenizer.py after you have tried.
"""

import math
import re
from collections import Counter


def pretokenize(text):
    r"""Cut `text`, ASCII only, into pre-tokens by the rules of GPT-2. Returns a list of str; joined, they are the text.

    At each place the first of these that matches is cut off:

    1. one of the contractions 's 't 'm 'd 'll 've 're;
    2. a run of letters, with the space before it if there is one;
    3. a run of digits, with the space before it if there is one;
    4. a run of other signs that are not white space, with the space before it if there is one;
    5. a run of white space, but if text follows, without its last character: that is left for the next cut;
    6. the white space that is left.

    >>> pretokenize("It's 1759,  said the keeper.")
    ['It', "'s", ' 1759', ',', ' ', ' said', ' the', ' keeper', '.']

    Hint: one pattern for re.findall, its alternatives in this order with | between them; groups as (?:...), since of
    (...) findall returns the group alone. " ?" is a space that may be missing; [^...] is what is not in the list. The
    fifth is \s+(?!\S): after it, nothing but white space or the end may come.
    Read: bpe_tokenizer.py, "Pre-tokenization"; Radford et al. 2019, section 2.2.
    """
    raise NotImplementedError("your turn")


def best_pair(words):
    """The pair of neighbouring ids that is most frequent, a tuple; of equally frequent ones the smallest.

    words: list of (ids, count). `ids`, a list of int, is a pre-token, which occurs `count` times in the text. Every two
    neighbours are a pair: [7, 7, 7] has two. There is at least one pair.

    >>> best_pair([([1, 2, 3], 5), ([2, 3], 1)])
    (2, 3)
    >>> best_pair([([5, 6], 2), ([3, 4], 2)])
    (3, 4)

    Hint: zip(ids, ids[1:]) gives the pairs; a Counter adds up. Tuples can be compared: (3, 4) < (5, 6).
    Read: bpe_tokenizer.py, "Learning merges"; Sennrich et al. 2016, algorithm 1.
    """
    raise NotImplementedError("your turn")


def merge(ids, pair, new_id):
    """`ids`, a list of int, with each occurrence of `pair` replaced by `new_id`, from left to right: a new list.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 256)
    [256, 3, 256]
    >>> merge([7, 7, 7], (7, 7), 256)
    [256, 7]

    Hint: walk with an index. After a merge it moves by two, otherwise by one. A list never equals a tuple, but
    tuple(ids[i : i + 2]) may.
    Read: bpe_tokenizer.py, "Learning merges".
    """
    raise NotImplementedError("your turn")


def learn_merges(counts, n_merges):
    """The first `n_merges` merges of byte-pair encoding, a list of pairs of ids. Fewer if there are no pairs left.

    counts: {pre-token as bytes: how often it occurs}. You may call `best_pair` and `merge`.

    >>> learn_merges({b"ab": 2, b"abc": 3}, 5)
    [(97, 98), (256, 99)]

    Hint: list(b"ab") is [97, 98]. Keep a list of (ids, count); each round finds the best pair and merges it everywhere.
    `best_pair` needs a pair: stop when every pre-token is a single id.
    Read: bpe_tokenizer.py, "Learning merges"; Sennrich et al. 2016, algorithm 1.
    """
    raise NotImplementedError("your turn")


def encode_pretoken(pretoken, merge_id):
    """The ids of one pre-token, a list of int.

    pretoken: bytes. merge_id: {(left id, right id): id of the merged token}. While a pair of neighbours is in
    `merge_id`, the pair that was learned first, that with the smallest new id, is merged wherever it occurs. You may
    call `merge`.

    >>> encode_pretoken(b"abc", {(98, 99): 256, (97, 98): 257})
    [97, 256]

    Hint: min(pairs, key=lambda pair: merge_id.get(pair, math.inf)) is the next pair, or one that is not in `merge_id`.
    A single id has no pairs, and min of nothing is an error.
    Read: bpe_tokenizer.py, "Encoding".
    """
    raise NotImplementedError("your turn")


def decode(ids, merges):
    """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD, the replacement character.

    merges: list of (left id, right id); merge k makes id 256 + k, so a merge may use ids that earlier ones made.

    >>> decode([256, 258, 33], [(72, 105), (195, 169), (32, 257)])
    'Hi é!'

    Hint: first the bytes of every id, in a list that grows from bytes([0]), ..., bytes([255]); then b"".join of those
    of `ids`; then data.decode("utf-8", errors="replace").
    Read: bpe_tokenizer.py, `token_bytes` and `decode`.
    """
    raise NotImplementedError("your turn")
