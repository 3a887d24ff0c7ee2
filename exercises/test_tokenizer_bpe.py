"""Checks of tokenizer_bpe.py: against bpe_tokenizer.py, on small cases and on the bundled text."""

import re

import bpe_tokenizer
from exercises.checking import ROOT, compare, expect

TEXT = (ROOT / "data" / "input.txt").read_text(encoding="utf-8").encode("ascii", "ignore").decode()


def test_pretokenize(my):
    patterns = {
        "a space belongs to the word that follows it":
            r"'(?:[stmd]|ll|ve|re)|[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
        "letters and digits should be separate pre-tokens":
            r"'(?:[stmd]|ll|ve|re)| ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
        "contractions are not cut off: 's is one pre-token": r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
        "of several spaces the last belongs to the word that follows":
            r"'(?:[stmd]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+",
        "only a space belongs to the word that follows it; a tab or the end of a line is a pre-token of its own":
            r"'(?:[stmd]|ll|ve|re)|\s?[A-Za-z]+|\s?[0-9]+|\s?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
        "of all the white space before a word only one space belongs to it":
            r"'(?:[stmd]|ll|ve|re)|\s*[A-Za-z]+|\s*[0-9]+|\s*[^\sA-Za-z0-9]+|\s+",
    }  # fmt: skip
    talk = "We'll meet at 5pm in room 12b,   he'd said -- or didn't he?\n\n Yes! "
    for text in (talk, "a\tb\n1\n-", "\n a_b  ", TEXT[:3000]):
        answer = my.pretokenize(text)
        expect(not isinstance(answer, list) or all(answer), "there are empty pieces: with a group in (...) re.findall "
               "returns the group alone, not the whole match: write (?:...)")  # fmt: skip
        if isinstance(answer, list) and all(isinstance(piece, str) for piece in answer):
            joined = "".join(answer)
            expect(len(joined) >= len(text), f"characters are lost: {text[:60]!r} becomes {answer[:12]}")
        mistakes = {words: re.findall(pattern, text) for words, pattern in patterns.items()}
        compare(answer, bpe_tokenizer.PRETOKEN.findall(text), mistakes, f"pretokenize({text[:60]!r})")


def test_best_pair(my):
    compare(my.best_pair([([1, 2], 4), ([8, 9, 8, 9], 1), ([4, 8, 9], 1)]), (1, 2), {
        "the pairs of a pre-token count as often as the pre-token occurs; here each pre-token counts once": (8, 9),
        "the result should be the pair alone, without its count": ((1, 2), 4),
    })  # fmt: skip
    compare(my.best_pair([([5, 6], 2), ([3, 9], 2), ([3, 7], 2)]), (3, 7), {
        "of equally frequent pairs the smallest is the best": (5, 6),
    })  # fmt: skip
    compare(my.best_pair([([5, 6], 1), ([3, 9], 1), ([8, 9], 1), ([7, 7, 7], 1)]), (7, 7), {
        "[7, 7, 7] has the pair (7, 7) twice": (3, 9),
    })  # fmt: skip
    compare(my.best_pair([([2, 300], 1), ([2, 1], 1), ([256, 1], 1)]), (2, 1), {
        "of equally frequent pairs the smallest is the best, not the largest": (256, 1),
    })  # fmt: skip


def test_merge(my):
    ids = [1, 2, 3, 1, 2, 1]
    answer = my.merge(ids, (1, 2), 256)
    expect(ids == [1, 2, 3, 1, 2, 1], "the list that came in is changed; the result should be a new one")
    compare(answer, [256, 3, 256, 1], {
        "the last id is lost": [256, 3, 256],
        "every occurrence should be merged, not only the first": [256, 3, 1, 2, 1],
        "the new id is put in, but the right half of the pair stays": [256, 2, 3, 256, 2, 1],
        "nothing is merged; is a list compared with a tuple? They are never equal: tuple(ids[i : i + 2])": ids,
    })  # fmt: skip
    for n in range(2, 6):
        compare(my.merge([7] * n, (7, 7), 256), [256] * (n // 2) + [7] * (n % 2), {
            "an id takes part in one merge only: after a merge, move on by two": [256] * (n - 1) + [7],
            "merge from left to right": [7] * (n % 2) + [256] * (n // 2),
        }, f"merge({[7] * n}, (7, 7), 256)")  # fmt: skip
    for ids in ([], [1], [2, 1], [1, 1, 2, 2]):
        compare(my.merge(ids, (1, 2), 9), bpe_tokenizer.merge(ids, (1, 2), 9), what=f"merge({ids}, (1, 2), 9)")


def test_learn_merges(my):
    compare(my.learn_merges({b"ab": 2, b"abc": 3, b"d": 9}, 10), [(97, 98), (256, 99)], {
        "after the first merge its token, 256, should take part in pairs": [(97, 98), (98, 99)],
        "the first merge makes id 256, the second 257, and so on": [(97, 98), (257, 99)],
        "each round finds the same pair: keep the merged ids for the next round": [(97, 98)] * 10,
        "where no pair is left there are fewer merges: stop": [(97, 98), (256, 99)] + [None] * 8,
    })  # fmt: skip
    counts = bpe_tokenizer.count_pretokens(TEXT[:4000])
    right = bpe_tokenizer.learn_merges(counts, 30)
    once = bpe_tokenizer.learn_merges(dict.fromkeys(counts, 1), 30)
    compare(my.learn_merges(counts, 30), right, {"each pre-token counts as often as it occurs": once})


def test_encode_pretoken(my):
    compare(my.encode_pretoken(b"abc", {(98, 99): 256, (97, 98): 257}), [97, 256], {
        "of the pairs in `merge_id` that with the smallest id comes first: not the leftmost, not the last learned":
            [257, 99],
    })  # fmt: skip
    compare(my.encode_pretoken(b"abab", {(97, 98): 256, (256, 256): 257}), [257], {
        "merged tokens merge again: go on until no pair of neighbours is in `merge_id`": [256, 256],
        "the pair should be merged wherever it occurs; here it is merged once": [256, 97, 98],
    })  # fmt: skip
    compare(my.encode_pretoken(b"x", {}), [120], what="encode_pretoken(b'x', {})")
    tokenizer = bpe_tokenizer.BPETokenizer.load(ROOT / "data" / "bpe_vocab_500.json")
    merge_id = {pair: 256 + k for k, pair in enumerate(tokenizer.merges)}
    for pretoken in list(bpe_tokenizer.count_pretokens(TEXT[:8000]))[:300]:
        right = bpe_tokenizer.encode_pretoken(pretoken, merge_id)
        compare(my.encode_pretoken(pretoken, merge_id), right, what=f"encode_pretoken({pretoken}, ...)")


def test_decode(my):
    merges = [(72, 105), (195, 169), (32, 257)]
    compare(my.decode([195, 169, 33], []), "é!", {
        "a character may need several tokens: join the bytes of all ids first, then decode": "\ufffd\ufffd!",
        "a byte is not a character: join the bytes of all ids, then decode them as UTF-8": "Ã©!",
        "bytes(3) is three bytes of 0; bytes([3]) is the one byte 3": "\0" * (195 + 169 + 33),
    })  # fmt: skip
    compare(my.decode([256, 32, 257, 258], merges), "Hi é é", {
        "left and right are exchanged: a token is its left half, then its right half": "iH \ufffdé\ufffd ",
    }, "decode([256, 32, 257, 258], ...)")  # fmt: skip
    try:
        answer = my.decode([195, 33], [])
    except UnicodeDecodeError:
        expect(False, 'bytes that are not UTF-8 should become U+FFFD: errors="replace"')
    compare(answer, "\ufffd!", {'bytes that are not UTF-8 should become U+FFFD: errors="replace"': "!"})
