"""bpe_tokenizer and the package bpe against independent truths: tiktoken, Hugging Face tokenizers, rustbpe, the `regex`
module, and a trainer and an encoder of a few lines that recount everything in every round; and bpe against the textbook
functions of bpe_tokenizer."""

import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import regex
import rustbpe
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bpe.encode
import bpe.learn
import bpe.pretokens
import bpe.unicode
import bpe_tokenizer
from bpe_tokenizer import PATTERNS, PRETOKEN, PRETOKENS, BPETokenizer, encode_pretoken, learn_merges
from harness.errors import UserError

ROOT = Path(bpe_tokenizer.__file__).resolve().parent
DATA = ROOT / "data"
WIKITEXT = ROOT.parent / "shared" / "wikitext-2"
END = "<|endoftext|>"

# ----------------------------------------------------------------------------------------------------------
# Texts
# ----------------------------------------------------------------------------------------------------------

# The 25 characters of Unicode's White_Space property (PropList.txt), which is what \s means in GPT-2's pattern.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

NASTY = [
    # white space of all kinds, and characters that str.isspace() calls white space and Unicode does not
    "", " ", "  ", "\n", "a  b", "a b ", " a", "  a  ", " \n \n x", "x \n \n ", "\n\n\nx", "x\n", "a \nb", "a\n b",
    "a \n b", "a\n  b", "a  \nb", "a \t b", "\t\ta", "\r\nx\r\n", " \r\n x", "a\xa0b", "a \xa0 b", "\xa0 b", " \xa0",
    "a\u3000b", "a \u3000 b", "\u3000\u3000 \u3000x", "x\x85y \x85 z", "\u2028 x\u2029", "a\u200ab a \u200a b",
    "a\v\fb \v \f c", "\x1c", " \x1c", "\x1c a", "a\x1cb\x1dc\x1ed\x1fe", "a \x1c b", "a \x1c\x1d \x1e  \x1f b",
    "\x1c  x", "\n\x1f\n x", "  \x1f", "\0", "\0\0 \0", "a\u200bb \u200b", "\ufeffx \ufeff", "\u180e x", "\xad",
    # contractions, signs, numbers
    "'", " '", "I'll we've they're it's I'd I'm can't", "'S 'LL 'Ve", "'s'll've", " 's", "''s", "'ss 'tis o'clock",
    "it\u2019s", "'\u017f", "a", "_", "_a_ __init__ a_b _1_ _", "!?...  --- (a)[b]{c}", "a.b,c;d", "1,234.5 3rd v2",
    "12 34  56", "a1b2", " 1a", "\u2167 \u2168x x\xb2 x\xb2y \xbd \xbdcup 1\xbd \u2460\u2461 \u3007",
    "\u0661\u0662 \u0967\u0968 \uff11\uff12", "\U0001d504\U0001d7d8", END, f"a{END}b {END}",
    " @-@ , <unk> = = A = = \n \n", "\tif x:\n\t\treturn  y\n\n\n    z = 1\n", "https://a.b/c?d=e&f=%20",
    # scripts, combining marks, emoji, private use
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u4f60\u597d", "\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \ud558",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0663", "\u05e9\u05c1\u05dc",
    "e\u0301 n\u0303o \u0301 \u0301x Z\u0351\u036b\u0343", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd\U0001f1e9\U0001f1ea", "x\U0001f600y \U0001f600  z",
    "\ue000 \U000f0000 \U0010fffd", "\ufffd ",
    # pre-tokens longer than LONG_BYTES
    "a" * 64, "a" * 65, " " + "ab" * 100, "a" * 1001 + " a", "=" * 300, " " * 200, " " * 200 + "x", "\n" * 200 + " x",
    "x" + "\n " * 99, "1" * 130, "\u4e2d\u6587" * 150, "\u5927\u5bb6\u597d " * 40, "\U0001f600" * 70,
    "na" * 70 + "!" * 70 + " " * 70 + "7" * 70,
]

# Other libraries may know a newer Unicode than Python does, so only characters that Python's Unicode assigns.
assigned = st.characters(exclude_categories=("Cs", "Cn"))
# Few characters that meet often: this is where pre-tokenization goes wrong, if it does.
crowded = st.text(st.sampled_from("      \n\n\t\r\xa0\u3000\x85\x1c\x1faab'sle19\xb2!._\u4e2d\u0301\0"), max_size=40)
joined = st.builds(str.join, st.sampled_from(["", " "]), st.lists(st.sampled_from(NASTY), max_size=4))
texts = st.one_of(crowded, st.text(assigned, max_size=30), joined)
few_letters = st.lists(st.text(st.sampled_from("aaabbc  \n'e1"), max_size=30), min_size=1, max_size=4)


def checked(examples):
    """Settings of a property test: the same examples in every run, none of them kept."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def wikitext(split):
    path = WIKITEXT / f"wiki.{split}.tokens"
    if not path.exists():
        pytest.skip(f"the corpus is absent: {path.name}")
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


@pytest.fixture(scope="module")
def sample():
    return (DATA / "input.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wiki_valid():
    return wikitext("valid")


@pytest.fixture(scope="module")
def vocab():
    return BPETokenizer.load(DATA / "bpe_vocab.json")


@pytest.fixture(scope="module")
def nasty_vocab():
    """Has learned long tokens of many scripts and of many-byte characters."""
    return BPETokenizer.train(NASTY, 1000)


def in_gpt2_order(tokenizer, special_tokens=(END,)):
    """The same merges with the bytes numbered as GPT-2 does."""
    order = bytes([*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173])
    merges = [tuple(order.index(i) if i < 256 else i for i in pair) for pair in tokenizer.merges]
    return BPETokenizer(merges, special_tokens, tokenizer.pattern, order)


@pytest.fixture(scope="module")
def gpt4_vocab(sample):
    return BPETokenizer.train([*NASTY, sample[:100_000]], 1500, pattern="gpt4")


@pytest.fixture(scope="module")
def references(vocab, nasty_vocab, gpt4_vocab):
    """(tokenizer, tiktoken's encoder of its merges, Hugging Face's), for both patterns and both orders of bytes."""
    tokenizers = vocab, nasty_vocab, gpt4_vocab, in_gpt2_order(nasty_vocab), in_gpt2_order(gpt4_vocab)
    return [(t, tiktoken_encoder(t), hugging_face_encoder(t)) for t in tokenizers]


@pytest.fixture
def saved(tmp_path):
    """A small vocabulary and the file that it is saved in."""
    tokenizer = BPETokenizer.train("the cat and the hat, \u00e9t\u00e9 \u4e2d\u6587 \u4e2d\u6587 \"q\" \\ the end", 281)
    tokenizer.save(tmp_path / "vocab.json")
    return tokenizer, tmp_path / "vocab.json"


# ----------------------------------------------------------------------------------------------------------
# Independent truths
# ----------------------------------------------------------------------------------------------------------


# As tiktoken has them (tiktoken_ext/openai_public.py), not taken from the module that is tested.
TIKTOKEN_PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
            r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
}


def tiktoken_of(tokenizer):
    n = 256 + len(tokenizer.merges)
    ranks = {tokenizer.token_bytes(i): i for i in range(n)}
    assert len(ranks) == n  # tiktoken merges by the bytes of a token, so no two tokens may have the same
    special = {name: n + k for k, name in enumerate(tokenizer.special_tokens)}
    return tiktoken.Encoding("ours", pat_str=TIKTOKEN_PATTERNS[tokenizer.pattern], mergeable_ranks=ranks,
                             special_tokens=special)


def tiktoken_encoder(tokenizer):
    return tiktoken_of(tokenizer).encode_ordinary


def hugging_face_encoder(tokenizer):
    """Its tokens are text: GPT-2's alphabet writes bytes that are not printable Latin-1 as U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + k) for k, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    token = ["".join(alphabet[b] for b in tokenizer.token_bytes(i)) for i in range(256 + len(tokenizer.merges))]
    merges = [(token[a], token[b]) for a, b in tokenizer.merges]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(token)}, merges))
    pre = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=tokenizer.pattern == "gpt2")
    if tokenizer.pattern == "gpt4":  # to Oniguruma, x{1,3}+ is (x{1,3})+, and $ the end of a line
        pattern = TIKTOKEN_PATTERNS["gpt4"].replace("{1,3}+", "{1,3}").replace("$", r"\z")
        theirs.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(pattern), "isolated"), theirs.pre_tokenizer])
    return lambda text: theirs.encode(text).ids


def pretokens(text, pattern="gpt2"):
    return regex.findall(TIKTOKEN_PATTERNS[pattern], text)


def bulk_pattern(name):
    """A pattern as the package bpe takes it."""
    return None if name == "gpt2" else PRETOKENS[name]


def slow_merge(ids, a, b, new_id):
    ids = list(ids)
    for i in range(len(ids)):
        if ids[i : i + 2] == [a, b]:
            ids[i : i + 2] = [new_id]
    return ids


def slow_train(texts, n_merges, pattern="gpt2"):
    words = Counter(tuple(word.encode()) for text in texts for word in pretokens(text, pattern))
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            merged[tuple(slow_merge(word, *best, 255 + len(merges)))] += n
        words = merged
    return merges


def slow_encode_piece(piece, merges):
    ids = list(piece)
    for k, (a, b) in enumerate(merges):
        ids = slow_merge(ids, a, b, 256 + k)
    return ids


def slow_encode(text, merges, pattern="gpt2"):
    return [i for word in pretokens(text, pattern) for i in slow_encode_piece(word.encode(), merges)]


def assert_same_ids(tokenizer, text, expected, special=()):
    """encode and encode_array, both on the textbook's path and on the one for long texts, and encode_stream give
    `expected`, and decode and decode_stream give the text again."""
    expected = np.asarray(expected, np.int64)
    for few in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe.encode, "FEW_BYTES", few)
            array, ids = tokenizer.encode_array(text, special), tokenizer.encode(text, special)
        assert array.dtype == tokenizer.dtype and isinstance(ids, list)
        assert np.array_equal(array, expected)
        assert np.array_equal(np.array(ids, np.int64), expected)
    thirds = [text[: len(text) // 3], text[len(text) // 3 : len(text) // 2], "", text[len(text) // 2 :]]
    assert np.array_equal(np.concatenate(list(tokenizer.encode_stream(thirds, special))), expected)
    assert tokenizer.decode(array) == "".join(tokenizer.decode_stream(ids)) == text


@st.composite
def random_merges(draw):
    """A valid list of merges that no training need have made."""
    ids, merges = list(b"ab \n\xc3\xa9"), []
    for i, j in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=15)):
        pair = ids[i % len(ids)], ids[j % len(ids)]
        if pair not in merges:
            ids.append(256 + len(merges))
            merges.append(pair)
    return merges


# ----------------------------------------------------------------------------------------------------------
# Ids and bytes
# ----------------------------------------------------------------------------------------------------------


def test_ids_are_bytes_then_merges_then_special_tokens():
    tokenizer = BPETokenizer([(104, 101), (256, 108), (257, 108)], ["<|x|>", "<|\u00e9|>"])
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    names = [b"<|x|>", "<|\u00e9|>".encode()]
    assert [tokenizer.token_bytes(i) for i in range(256, 261)] == [b"he", b"hel", b"hell", *names]
    assert tokenizer.vocab_size == 261
    assert tokenizer.encode("hello") == [258, 111]
    assert tokenizer.encode("hello<|\u00e9|>", allowed_special=["<|\u00e9|>"]) == [258, 111, 260]
    assert tokenizer.decode_bytes([258, 111, 259]) == b"hello<|x|>"
    assert tokenizer.decode([258, 111, 260]) == "hello<|\u00e9|>"


def test_without_merges_ids_are_utf8():
    tokenizer = BPETokenizer([])
    for text in NASTY:
        assert_same_ids(tokenizer, text, list(text.encode()))
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))


@pytest.mark.parametrize("id", [-1, 257, 258, 10**30])
def test_unknown_id_is_a_value_error(id):
    tokenizer = BPETokenizer([(97, 98)])
    for use in (tokenizer.token_bytes, lambda id: tokenizer.decode([97, id]), lambda id: tokenizer.decode_bytes([id])):
        with pytest.raises(ValueError, match=str(id)):
            use(id)


def test_decode_accepts_lists_and_arrays_of_any_integer_type(vocab):
    ids = vocab.encode("The lighthouse keeper")
    for same in (ids, tuple(ids), iter(ids), np.array(ids, np.uint16), np.array(ids, np.int64)):
        assert vocab.decode(same) == "The lighthouse keeper"
    assert vocab.decode([]) == "" and vocab.decode_bytes([]) == b""


def test_decode_of_partial_utf8_gives_replacement_characters():
    tokenizer = BPETokenizer([(0xE2, 0x82)])
    assert tokenizer.decode([0xFF]) == "\ufffd"
    assert tokenizer.decode([97, 256]) == "a\ufffd"
    assert tokenizer.decode([256, 0xAC]) == "\u20ac"
    assert tokenizer.decode_bytes([256]) == b"\xe2\x82"


@checked(300)
@given(st.lists(st.sampled_from([*b"a\xe2\x82\xac\xc3\xa9\xf0\x9f\x98\x80\xff\x80", 256, 257, 258]), max_size=30))
def test_decoding_a_stream_equals_decoding_the_whole(ids):
    tokenizer = BPETokenizer([(0xE2, 0x82), (0x80, 0xF0)], ["<|\u00e9|>"])
    pieces = list(tokenizer.decode_stream(iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(ids) <= len(pieces) <= len(ids) + 1


def test_a_character_comes_whole_with_its_last_byte(vocab):
    assert list(BPETokenizer([]).decode_stream("a\u20ac\u00e9".encode())) == ["a", "", "", "\u20ac", "", "\u00e9"]
    assert list(BPETokenizer([]).decode_stream(b"a\xe2\x82")) == ["a", "", "", "\ufffd"]
    assert list(vocab.decode_stream([])) == []
    ids = iter([*vocab.encode("The lighthouse"), 10**6])
    stream = vocab.decode_stream(ids)
    assert next(stream) == vocab.decode(vocab.encode("The lighthouse")[:1])  # the id that is none is not read yet
    with pytest.raises(ValueError, match="1000000"):
        list(stream)


@pytest.mark.parametrize("merges", [[(97, 256)], [(257, 97)], [(-1, 97)], [(97, 98), (97, 98)], [(97, 10**30)]])
def test_impossible_merges_are_value_errors(merges):
    with pytest.raises(ValueError, match="merge"):
        BPETokenizer(merges)


@pytest.mark.parametrize("names", [["<|a|>", "<|a|>"], [""], ["<|a|>", ""]])
def test_impossible_special_tokens_are_value_errors(names):
    with pytest.raises(ValueError, match="special"):
        BPETokenizer([], names)


def test_dtype_is_the_smallest_that_holds_every_id():
    # Descending, so that the last merge joins bytes that a text can hold: NUL and NUL.
    pairs = list(product(range(255, -1, -1), repeat=2))
    largest_small = BPETokenizer(pairs[: 65536 - 256])
    assert largest_small.vocab_size == 65536 and largest_small.dtype == np.uint16
    assert BPETokenizer([]).dtype == np.uint16
    assert BPETokenizer(pairs[: 65536 - 256], [END]).dtype == np.uint32
    large = BPETokenizer(pairs)
    assert large.dtype == np.uint32
    assert_same_ids(large, "\0\0", [65791])


# ----------------------------------------------------------------------------------------------------------
# Pre-tokenization
# ----------------------------------------------------------------------------------------------------------


EVERY = [c for c in map(chr, range(sys.maxunicode + 1)) if not "\ud800" <= c <= "\udfff"]


def matches_of_tiktoken(pattern, text):
    """What `pattern` matches in `text`, end to end; tiktoken drops the rest."""
    ranks = {bytes([i]): i for i in range(256)}
    theirs = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return theirs.decode(theirs.encode_ordinary(text))


@pytest.fixture(scope="module")
def classes():
    """{pattern: the characters of all that tiktoken takes for it}"""
    return {name: set(matches_of_tiktoken(name, "".join(EVERY))) for name in (r"\p{L}", r"\p{N}", r"\s")}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_code_point_is_cut_as_its_class_is(classes, pattern):
    """With "a", "1" or "!" in place of each letter, number and other sign the boundaries are the same."""
    letters, numbers, spaces = classes.values()
    assert spaces == set(WHITE_SPACE)
    some = [*EVERY[:0x33000], *EVERY[0x33000::97]]  # few are assigned beyond, and no letters or numbers
    assert not {*EVERY[0x33000:]} & (letters | numbers)
    alike = {c: "a" if c in letters else "1" if c in numbers else "!" for c in some if c > "\x7f" and c not in spaces}
    alike = str.maketrans(alike)
    for text in ("".join(some), "".join(f" x{c}" for c in some), "".join(f"{c}1" for c in some)):
        lengths = [*map(len, PRETOKENS[pattern].findall(text))]
        assert lengths == [*map(len, pretokens(text.translate(alike), pattern))]


def test_tables_are_those_of_tiktoken_and_hugging_face(classes):
    for name, table in ((r"\p{L}", bpe.unicode.LETTERS), (r"\p{N}", bpe.unicode.NUMBERS)):
        codes = sorted(map(ord, classes[name]))
        starts = [c for c, before in zip(codes, [-2, *codes]) if c != before + 1]
        ends = [c for c, after in zip(codes, [*codes[1:], -2]) if c + 1 != after]
        assert table.split() == [f"{a:x}-{b:x}" if a < b else f"{a:x}" for a, b in zip(starts, ends)]
        removed = tokenizers.normalizers.Replace(tokenizers.Regex(name + "+"), "")
        assert set(EVERY) - set(removed.normalize_str("".join(EVERY))) == classes[name]


def test_classes_of_assigned_characters_are_those_of_python_and_regex(classes):
    """Other versions of Unicode, but a character keeps its class."""
    old = [c for c in EVERY if unicodedata.category(c) != "Cn"]
    for name, members in classes.items():
        assert set(regex.findall(name, "".join(old))) == members & set(old)
        if name != r"\s":
            assert {c for c in old if unicodedata.category(c)[0] == name[3]} == members & set(old)


def test_newer_letters_do_not_depend_on_python(vocab):
    """U+A7CB is a letter since Unicode 16.0, U+A7CE since 17.0, U+10D4A since 16.0."""
    assert PRETOKEN.findall(" x\ua7cb x\ua7ce \U00010d4a\U00010d4b") == [
        " x\ua7cb", " x", "\ua7ce", " \U00010d4a\U00010d4b"]  # fmt: skip


def test_letters_of_gpt4_contractions_are_of_both_cases():
    """(?i:s) of tiktoken also matches U+017F, the long s; no other character of all."""
    for before, after in ("'", ""), ("'l", ""), ("'", "e"), ("'v", ""), ("'r", ""):
        text = "".join(f"{before}{c}{after}!" for c in EVERY)
        ours = re.findall(PATTERNS["gpt4"].split("|[^")[0], text)
        assert "".join(ours) == matches_of_tiktoken(r"'(?i:[sdmt]|ll|ve|re)", text)
        assert before != "'" or after or set(ours) == {"'" + c for c in "sSdDmMtT\u017f"}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text", NASTY)
def test_pretokens_of_nasty_strings(text, pattern):
    assert PRETOKENS[pattern].findall(text) == pretokens(text, pattern)


@checked(400)
@given(texts, st.sampled_from(list(PATTERNS)))
def test_pretokens_equal_those_of_the_regex_module(text, pattern):
    found = PRETOKENS[pattern].findall(text)
    assert found == pretokens(text, pattern)
    assert "".join(found) == text


@checked(600)
@given(st.one_of(crowded, st.text(st.sampled_from("  \n\t\xa0a1!'s"), max_size=25)), st.sampled_from(list(PATTERNS)))
@example("a \n  b", "gpt4")
def test_a_text_may_be_cut_before_every_space_that_a_non_space_follows(text, pattern):
    """If each piece but the last sees that a space and a non-space come next."""
    cuts = [0, *(i for i in range(len(text) - 1) if text[i] == " " and text[i + 1] not in WHITE_SPACE), len(text)]
    pieces = [text[i:j] for i, j in zip(cuts, cuts[1:])]
    apart = [p for piece in pieces[:-1] for p in pretokens(piece + " x", pattern)[:-1]]
    assert apart + pretokens(pieces[-1], pattern) == pretokens(text, pattern)


@checked(200)
@given(texts, st.sampled_from([1, 7, 64]), st.sampled_from(list(PATTERNS)))
@example("a \n  b\n ", 64, "gpt4")
def test_counts_of_pretokens(text, block, pattern):
    """The counts from which training starts, each text separately, with blocks so small that a text has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe.pretokens, "BLOCK_BYTES", block)
        several = [text, text[:5], "", text[5:]]
        expected = Counter(piece.encode() for text in several for piece in pretokens(text, pattern))
        assert bpe.pretokens.count_pretokens(several, bulk_pattern(pattern)) == expected
        assert sum((bpe_tokenizer.count_pretokens(text, pattern) for text in several), Counter()) == expected


def starts_of(block, starts=bpe.pretokens.gpt2_starts):
    """Where the pieces of `block` start, a list."""
    return np.flatnonzero(starts(block, bpe.pretokens.classes_of(block))).tolist()


def ends_of(pieces):
    """Where each of `pieces`, bytes placed end to end, starts."""
    return list(itertools.accumulate(map(len, pieces[:-1]), initial=0)) if pieces else []


@checked(600)
@given(st.lists(st.one_of(crowded, texts), min_size=1, max_size=4))
@example(["'ll's 'S \u3000'd", "", "a\u2003 \n", " '"])
@example(["\u0e01\u0e31\U0001f600\u0300a1\u0661\u00b2", "\u00a0\u00a0x"])
def test_pretokens_start_where_the_pattern_has_them(parts):
    """Found without the pattern, in a block of several parts with a special token after each."""
    pieces, end = [], bpe.pretokens.END
    for part in parts:
        pieces += [*map(str.encode, pretokens(part)), end, bpe.pretokens.SPECIAL + b"4096", end]
    assert starts_of(b"".join(pieces)) == ends_of(pieces)


def test_the_class_of_every_character(classes):
    """All bytes of a character have its class, which is tiktoken's."""
    text = "".join(EVERY).encode()
    found = bpe.pretokens.classes_of(text)
    first = np.flatnonzero(np.frombuffer(text, np.uint8) & 0xC0 != 0x80)
    assert (found == np.repeat(found[first], np.diff(first, append=len(text)))).all()
    names = {bpe.pretokens.LETTER: r"\p{L}", bpe.pretokens.NUMBER: r"\p{N}", bpe.pretokens.SPACE: r"\s"}
    for number, name in names.items():
        assert {c for c, k in zip(EVERY, found[first].tolist()) if k == number} == classes[name]
    assert set(found.tolist()) == {*names, bpe.pretokens.OTHER}


@checked(500)
@given(st.one_of(crowded, texts))
@example("a \n  b")
@example("x's 12a,5 \u3000b'D")
def test_pieces_for_gpt4_are_pretokenized_as_the_whole(text):
    """If each but the last sees that a space and a non-space come next, where it ends with white space."""
    data = text.encode()
    starts = [*starts_of(data, bpe.pretokens.gpt4_starts), len(data)] if data else [0]
    pieces = [data[i:j].decode() for i, j in zip(starts, starts[1:])]
    apart = [p for piece in pieces[:-1] for p in pretokens(piece + " x", "gpt4")[:-1]]
    assert apart + (pretokens(pieces[-1], "gpt4") if pieces else []) == pretokens(text, "gpt4")


def test_chunks_are_numbered_as_a_dict_would():
    """Chunks of 1 to 20 bytes, some of them zero bytes; more of them than the first hash table holds."""
    draw = random.Random(0)
    words = [bytes(draw.choices(b"\0\1ab?", k=draw.randrange(20))).replace(b"?", b"\xc3\xa9") for _ in range(2000)]
    words += [b"%d" % i for i in range(150_000)]
    chunks, seen = bpe.pretokens.Chunks(), {}
    for _ in range(40):
        block = b"".join(b" x" + word for word in draw.choices(words, k=draw.choice([1, 10, 20_000])))
        numbers = chunks.index(block, np.array(starts_of(block))).tolist()
        assert b"".join(chunks.chunks[k] for k in numbers) == block
        for k in numbers:
            seen.setdefault(k, chunks.chunks[k])
            assert seen[k] == chunks.chunks[k]
    assert len(chunks._number) > 1 << 17  # the table has grown
    assert len(chunks.chunks) < 2 * len(set(chunks.chunks))  # and few chunks were numbered again


@pytest.mark.parametrize(
    ("block", "numbers", "distinct"),
    [(b"a,b;" * 1000, [0], 1), (b"x" * 15, [0], 1), (b"x" * 16, [0], 1), (b" " + b"y" * 15, [0], 1),
     ((b" " + b"x" * 14) * 3, [0, 0, 0], 1), ((b" " + b"x" * 15) * 3, [0, 0, 0], 1),
     (b" 23456789012345p 23456789012345`", [0, 1], 2),  # p and ` agree in the bits that the length 16 lacks
     (b" " + b"x" * 20 + b" a b" + b" " + b"y" * 20 + b" a" + b" " + b"x" * 20, [2, 0, 1, 3, 0, 2], 4)],
    ids=lambda value: repr(value)[:12],
)
def test_each_chunk_is_kept_once(block, numbers, distinct):
    """Around SHORT_BYTES, where a key no longer holds the whole chunk; twice, so that all of them are known."""
    chunks = bpe.pretokens.Chunks()
    starts = np.array([0, *(i for i in range(1, len(block)) if block[i] == 32)])
    for _ in range(2):
        assert chunks.index(block, starts).tolist() == numbers
        assert len(chunks.chunks) == len(set(chunks.chunks)) == distinct
        assert b"".join(chunks.chunks[k] for k in numbers) == block


# ----------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------


def test_sample_equals_tiktoken_and_hugging_face(references, sample):
    for tokenizer, theirs, hugging_face in references:
        assert tokenizer.encode(sample) == theirs(sample)
        part = sample[:100_000]
        assert hugging_face(part) == theirs(part) == tokenizer.encode(part)
        assert_same_ids(tokenizer, part[:10_000], theirs(part[:10_000]))


def test_wikitext_equals_tiktoken_and_hugging_face(references, wiki_valid):
    for tokenizer, theirs, hugging_face in (references[0], references[-1]):
        expected = theirs(wiki_valid)
        assert hugging_face(wiki_valid) == expected
        array = tokenizer.encode_array(wiki_valid)
        assert array.tolist() == tokenizer.encode(wiki_valid) == expected
        pieces = (wiki_valid[i : i + 99_991] for i in range(0, len(wiki_valid), 99_991))
        assert np.concatenate(list(tokenizer.encode_stream(pieces))).tolist() == expected


@pytest.mark.parametrize("text", NASTY)
def test_nasty_strings_equal_tiktoken_and_hugging_face(references, text):
    for tokenizer, theirs, hugging_face in references:
        expected = theirs(text)
        assert hugging_face(text) == expected
        assert_same_ids(tokenizer, text, expected)


def test_20_000_random_strings_equal_tiktoken(references):
    """Characters of one script and of all, white space, contractions, pieces of the nasty strings, and plain bytes."""
    tokenizer, theirs, _ = references[0]
    draw = random.Random(2026)
    scripts = [(32, 127), (9, 33), (0, 256), (0x370, 0x600), (0x900, 0xE00), (0x2000, 0x2070), (0x3000, 0x3100),
               (0x4E00, 0x9FFF), (0xFE00, 0x10000), (0x1F300, 0x1F700), (0, 0x110000)]  # fmt: skip
    pieces = [c for c in WHITE_SPACE + "\x1c\x1f'_-.1a" if c] + ["'s", "'ll", "'T", " the", "  ", "ing", *NASTY[1:87]]

    def character(low, high):
        c = chr(draw.randrange(low, high))
        return c if unicodedata.category(c) not in ("Cs", "Cn") else "\ue000"  # tiktoken's Unicode may be newer

    def string():
        kind, n = draw.randrange(4), min(200, int(draw.expovariate(1 / 12)))
        if kind == 0:
            return draw.randbytes(n).decode("utf-8", draw.choice(["replace", "ignore"]))
        if kind == 1:
            return "".join(draw.choices(pieces, k=n // 3))
        some = draw.choices(scripts, k=draw.choice([1, 1, 2, 5]))
        return "".join(character(*draw.choice(some)) if draw.random() < 0.8 else draw.choice(pieces) for _ in range(n))

    for k in range(20):
        strings = [string() for _ in range(1000)]
        for text in strings:
            ids = tokenizer.encode(text)
            assert ids == theirs(text), repr(text)
            assert tokenizer.decode(ids) == text
        together = "".join(strings)
        assert tokenizer.encode_array(together).tolist() == theirs(together)
        for other, theirs_of_other, _ in references[1:] if k < 8 else ():
            assert other.encode_array(together).tolist() == theirs_of_other(together)


@checked(80)
@given(text=texts)
def test_any_text_equals_tiktoken_and_hugging_face(references, text):
    for tokenizer, theirs, hugging_face in references:
        expected = theirs(text)
        assert hugging_face(text) == expected
        assert_same_ids(tokenizer, text, expected)


@checked(200)
@given(random_merges(), st.text(st.sampled_from("aaabb  \n\u00e9"), max_size=100))
def test_any_merges_equal_textbook_encoding(merges, text):
    assert_same_ids(BPETokenizer(merges), text, slow_encode(text, merges))


@checked(200)
@given(random_merges(), st.lists(st.sampled_from(list(b"aab\xc3\xa9")), min_size=1, max_size=200))
def test_long_pieces_equal_textbook_encoding(merges, piece):
    """Three ways to encode one pre-token: the textbook's, the heap, and all pre-tokens side by side."""
    merge_id, piece = {pair: 256 + k for k, pair in enumerate(merges)}, bytes(piece)
    expected = slow_encode_piece(piece, merges)
    assert encode_pretoken(piece, merge_id) == expected
    assert bpe.encode.encode_long_pretoken(piece, merge_id) == expected
    some = [piece, b"a", bpe.pretokens.END, piece, bpe.pretokens.SPECIAL + b"300"]
    encoder = bpe.encode.BulkEncoder(merge_id, None, np.uint16)
    for rounds in (0, 1, 2, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe.encode, "MANY_ROUNDS", rounds)
            ids, lengths = encoder.encode_pretokens(some)
            assert ids.tolist() == expected + [97] + expected + [300]
            assert lengths.tolist() == [len(expected), 1, 0, len(expected), 1]


@checked(150)
@given(random_merges(), st.lists(st.lists(st.sampled_from(list(b"aab\xc3\xa9")), min_size=1, max_size=40), max_size=30))
def test_many_pieces_equal_textbook_encoding(merges, pieces):
    merge_id, pieces = {pair: 256 + k for k, pair in enumerate(merges)}, [*map(bytes, pieces)]
    ids, lengths = bpe.encode.BulkEncoder(merge_id, None, np.uint16).encode_pretokens(pieces)
    apart = [slow_encode_piece(piece, merges) for piece in pieces]
    assert ids.tolist() == sum(apart, [])
    assert lengths.tolist() == [*map(len, apart)]


def test_equal_pairs_are_merged_from_the_left_also_if_the_first_is_made_last():
    """In the second round xa, xaxa and qq are side by side, and the first xa is not yet a token."""
    q, v, w, x, a = b"qvwxa"
    merges = [(q, q), (v, w), (257, x), (x, a), (259, 259)]
    expected = [w, 260, 259, 256]
    assert slow_encode_piece(b"wxaxaxaqq", merges) == expected
    encoder = bpe.encode.BulkEncoder({pair: 256 + k for k, pair in enumerate(merges)}, None, np.uint16)
    assert encoder.encode_pretokens([b"wxaxaxaqq"])[0].tolist() == expected


@checked(150)
@given(random_merges(), st.lists(st.sampled_from(list(b"aab\xc3\xa9")), min_size=2, max_size=60))
def test_a_pretoken_is_cut_only_where_no_merge_can_join(merges, piece):
    """Encoded apart, the parts give what the whole gives."""
    piece, merge_id = bytes(piece), {pair: 256 + k for k, pair in enumerate(merges)}
    table = bpe.encode.BulkEncoder(merge_id, None, np.uint16).join_table
    places = np.arange(1, len(piece))
    cuts = [0, *places[~table.joins(piece, places)].tolist(), len(piece)]
    apart = [slow_encode_piece(piece[i:j], merges) for i, j in zip(cuts, cuts[1:])]
    assert sum(apart, []) == slow_encode_piece(piece, merges)


def test_pretokens_are_cut_where_no_token_goes_on():
    table = bpe.encode.JoinTable([b"ab", b"abc", b"xyz123", b"q", b"stuvwxyz"])
    for text, pieces in ((b"ab", 1), (b"abc", 1), (b"bcd", 2), (b"xyz123", 1), (b"xyz129", 3), (b"qq", 2), (b"ba", 2),
                         (b"stuvwxyz", 1), (b"tuvw", 3), (b"zx", 2)):  # fmt: skip
        places = np.arange(1, len(text))
        assert 1 + (~table.joins(text, places)).sum() == pieces


def test_long_pieces_of_random_bytes(vocab):
    draw, merge_id = random.Random(0), {pair: 256 + k for k, pair in enumerate(vocab.merges)}
    encoder = bpe.encode.BulkEncoder(merge_id, None, vocab.dtype)
    for n in (1, 2, 65, 300):
        for alphabet in (range(256), b"etaoin", b" t", b"="):
            piece = bytes(draw.choices(alphabet, k=n))
            expected = slow_encode_piece(piece, vocab.merges)
            assert encode_pretoken(piece, merge_id) == expected
            assert bpe.encode.encode_long_pretoken(piece, merge_id) == expected
            ids, _ = encoder.encode_pretokens([piece])
            assert ids.tolist() == expected


@checked(250)
@given(texts, st.lists(st.integers(0, 200), max_size=8), st.sampled_from([1, 7, 64]), st.sampled_from(list(PATTERNS)))
@example("a b " + " " * 7 + "\n c", [3, 4], 1, "gpt2")
def test_stream_cut_anywhere_equals_whole(text, cuts, block, pattern):
    """With blocks so small that a text has many."""
    tokenizer = BPETokenizer([(32, 97), (256, 97), (10, 32), (32, 32), (258, 259), (115, 39)], (), pattern)
    expected = slow_encode(text, tokenizer.merges, pattern)
    cuts = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[i:j] for i, j in zip(cuts, cuts[1:])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe.pretokens, "BLOCK_BYTES", block)
        arrays = list(tokenizer.encode_stream(iter(pieces)))
        assert all(array.dtype == tokenizer.dtype for array in arrays)
        assert np.concatenate(arrays).tolist() == expected
        patch.setattr(bpe.encode, "FEW_BYTES", 0)
        assert tokenizer.encode_array(text).tolist() == expected
        starts = bpe.pretokens.gpt2_starts if pattern == "gpt2" else bpe.pretokens.gpt4_starts
        assert b"".join(bpe.pretokens.split_blocks(map(str.encode, pieces), starts)) == text.encode()


@pytest.mark.parametrize("text", ["'" * 30 + "s ", "!'s" * 9, "a" * 40 + "'s", "\u4e2d\u6587" * 20 + "'s\u3000 ",
                                  "12" * 30, "\n" * 40 + " s"])  # fmt: skip
def test_long_pretokens_in_small_blocks(monkeypatch, text):
    """Blocks may end in them, and what follows is then cut as if it began there."""
    tokenizer = BPETokenizer([(39, 115), (32, 115), (10, 32)], ())
    for k in range(8):
        whole = text[k:] + text * 5
        expected = slow_encode(whole, tokenizer.merges)
        for block in (17, 24, 33, 64):
            monkeypatch.setattr(bpe.pretokens, "BLOCK_BYTES", block)
            assert np.concatenate(list(tokenizer.encode_stream([whole]))).tolist() == expected


def test_no_text_is_one_empty_array(vocab):
    """So the arrays of any text can be concatenated."""
    for arrays in (vocab.encode_stream([]), vocab.encode_stream(["", ""]), vocab.encode_documents([])):
        assert [array.tolist() for array in arrays] == [[]]


@pytest.mark.parametrize("block", [7, 64, 5000])
def test_sample_in_small_blocks(monkeypatch, vocab, sample, block):
    text = sample[:40_000]
    expected = tiktoken_encoder(vocab)(text)
    monkeypatch.setattr(bpe.pretokens, "BLOCK_BYTES", block)
    arrays = list(vocab.encode_stream(text[i : i + 997] for i in range(0, len(text), 997)))
    assert len(arrays) > len(text) / (block + 20) / 2  # it really came in blocks
    assert np.concatenate(arrays).tolist() == expected


def test_pair_table_equals_the_dict():
    """Crowded, so that many pairs share a slot, and asked for pairs that it does not hold."""
    draw = random.Random(0)
    pairs = list(dict.fromkeys((draw.randrange(256 + k // 9), draw.randrange(256 + k // 9)) for k in range(9000)))
    merge_id = {pair: 256 + k for k, pair in enumerate(pairs)}
    table = bpe.encode.PairTable(merge_id)
    keys = np.array([a * table.n_ids + b for a, b in pairs])
    assert len(set(table._slot(keys).tolist())) < len(pairs)  # some pairs share a slot
    asked = pairs + [(draw.randrange(table.n_ids), draw.randrange(table.n_ids)) for _ in range(20_000)]
    left, right = np.array(asked).T
    assert table.find(left, right)[0].tolist() == [merge_id.get(pair, bpe.encode.NONE) for pair in asked]


def test_pair_table_knows_which_merges_may_take_a_token():
    """By the words of its docstring: all merges, and all that is at the end, or at the beginning, of their parts."""
    draw = random.Random(0)
    pairs = list(dict.fromkeys((draw.randrange(253 + k), draw.randrange(253 + k)) for k in range(3, 200)))
    pairs = [(a % (256 + k), b % (256 + k)) for k, (a, b) in enumerate(pairs)]
    merge_id = {pair: 256 + k for k, pair in enumerate(pairs)}
    parts = {id: pair for pair, id in merge_id.items()}

    def edge(id, side):
        return {id} | (edge(parts[id][side], side) if id in parts else set())

    expected = {}
    for (a, b), id in sorted(merge_id.items(), key=lambda item: -item[1]):  # the first merge is written last
        expected |= {(x, b, 1): id for x in edge(a, 1)} | {(a, y, 2): id for y in edge(b, 0)}
    every = np.arange(256 + len(pairs))
    left, right = np.repeat(every, len(every)), np.tile(every, len(every))
    found = bpe.encode.PairTable(merge_id).find(left, right)
    for row in (1, 2):
        some = np.flatnonzero(found[row] != bpe.encode.NONE)
        known = zip(left[some].tolist(), right[some].tolist(), found[row][some].tolist())
        assert {(x, y, row): id for x, y, id in known} == {key: expected[key] for key in expected if key[2] == row}


def test_nothing_encodes_to_nothing(vocab):
    assert vocab.encode("") == []
    for texts in ([], [""], ["", ""], iter([])):
        arrays = list(vocab.encode_stream(texts))
        assert sum(len(array) for array in arrays) == 0
        assert all(array.dtype == vocab.dtype for array in arrays)
    assert vocab.encode_array("").shape == (0,)


@checked(300)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_decoding_gives_the_text_again(vocab, text):
    """Unassigned characters too."""
    assert vocab.decode(vocab.encode(text)) == text
    assert vocab.decode(vocab.encode_array(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "abc \udfff", "x" * 99 + "\udc00", "\ud83d\ude00"])
def test_lone_surrogate_is_a_value_error_that_names_it(vocab, text):
    name = next(f"U+{ord(c):04X}" for c in text if "\ud800" <= c <= "\udfff")
    uses = [vocab.encode, vocab.encode_array, lambda text: list(vocab.encode_stream(["ok ", text])),
            lambda text: BPETokenizer.train(text, 300), lambda text: BPETokenizer([], [text])]
    for use in uses:
        with pytest.raises(ValueError) as caught:
            use(text)
        assert type(caught.value) is UserError and name in str(caught.value)


# ----------------------------------------------------------------------------------------------------------
# Special tokens
# ----------------------------------------------------------------------------------------------------------


def test_special_tokens_appear_only_when_allowed_by_name():
    tokenizer = BPETokenizer([(97, 98)], ["<|a|>", "<|b|>"])
    text = "ab<|a|><|b|>ab"
    assert tokenizer.encode(text) == [256, *b"<|a|><|b|>", 256]
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
    assert tokenizer.encode(text, allowed_special={"<|b|>"}) == [256, *b"<|a|>", 258, 256]
    assert tokenizer.encode(text, allowed_special=("<|a|>", "<|b|>")) == [256, 257, 258, 256]
    assert tokenizer.encode("<|a|>", allowed_special=["<|a|>"]) == [257]
    assert tokenizer.encode("ab", allowed_special=["<|a|>"]) == [256]
    assert tokenizer.encode("", allowed_special=["<|a|>"]) == []


@pytest.mark.parametrize("names", [["<|b|>"], ["<|a|>", "<|b|>"], [""]])
def test_unknown_special_token_is_a_value_error(names):
    with pytest.raises(ValueError, match="not a special token"):
        BPETokenizer([], ["<|a|>"]).encode("x", allowed_special=names)
    with pytest.raises(ValueError, match="not a special token"):
        BPETokenizer([]).encode("x", allowed_special=names)
    for encode in (BPETokenizer([]).encode_array, BPETokenizer([]).encode_stream):
        with pytest.raises(ValueError, match="not a special token"):
            encode("x", allowed_special=names)


@pytest.mark.parametrize("names", [["<|a|>", "<|a|>b"], ["<|a|>b", "<|a|>"]])
def test_longest_of_overlapping_special_tokens_first(names):
    tokenizer = BPETokenizer([], names)
    short, long = 256 + names.index("<|a|>"), 256 + names.index("<|a|>b")
    assert tokenizer.encode("<|a|>b<|a|>c", allowed_special=names) == [long, short, 99]
    assert tokenizer.encode("<|a|>b", allowed_special=["<|a|>"]) == [short, 98]


def test_special_token_of_pattern_characters_is_read_literally():
    tokenizer = BPETokenizer([], [".*", "a|b", "("])
    assert tokenizer.encode("x.*a|b(a", allowed_special=[".*", "a|b", "("]) == [120, 256, 257, 258, 97]


SPECIAL = (END, "<|a|>", "<|a|>b", "a b", "  ", " <s> ", "\n\u3000", "<|\u00e9|>", "aa", "aba")


@checked(150)
@given(
    st.lists(st.one_of(st.sampled_from([*SPECIAL, *SPECIAL, " ", "  ", "\n", "a", "b", "x", " a", "<|"]), crowded),
             max_size=8).map("".join),
    st.sets(st.sampled_from(SPECIAL)), st.sampled_from(list(PATTERNS)), st.sampled_from([1, 7, 64]),
    st.lists(st.integers(0, 60), max_size=5))
@example("a  <|endoftext|> \n <|endoftext|><|endoftext|>  b", {END}, "gpt4", 7, [9])
@example("x <|a|>b <|a|>", {"<|a|>", "<|a|>b"}, "gpt2", 64, [7])
@example("aaaababa aaa", {"aa", "aba"}, "gpt2", 64, [3, 4, 5, 6, 7])
def test_special_tokens_in_any_text(text, allowed, pattern, block, cuts):
    """By every way to encode, and in pieces that cut a name: as if the parts between them were texts of their own."""
    tokenizer = BPETokenizer([(32, 32), (32, 97), (10, 32), (97, 98), (256, 256)], SPECIAL, pattern)
    names, expected, rest = sorted(allowed, key=len, reverse=True), [], ""
    i = 0
    while i <= len(text):
        name = next((name for name in names if text.startswith(name, i)), None)
        if name or i == len(text):
            expected += slow_encode(rest, tokenizer.merges, pattern)
            rest = ""
        if name:
            expected.append(256 + 5 + SPECIAL.index(name))
        else:
            rest += text[i : i + 1]
        i += len(name or " ")
    cuts = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe.pretokens, "BLOCK_BYTES", block)
        assert_same_ids(tokenizer, text, expected, allowed)
        pieces = (text[i:j] for i, j in zip(cuts, cuts[1:]))
        assert np.concatenate(list(tokenizer.encode_stream(pieces, allowed))).tolist() == expected


def test_special_tokens_equal_tiktoken(references, sample):
    for tokenizer, _, _ in references:
        text = sample[:20_000].replace(" \n", END).replace("the", END) + END
        expected = tiktoken_of(tokenizer).encode(text, allowed_special="all")
        assert expected.count(256 + len(tokenizer.merges)) > 200
        assert_same_ids(tokenizer, text, expected, [END])


@checked(100)
@given(st.lists(st.one_of(texts, st.sampled_from(["", END, " ", "a \n "])), max_size=6),
       st.sampled_from(list(PATTERNS)), st.sampled_from([1, 64, 1 << 18]))
@example(["", "a", "", ""], "gpt2", 64)
def test_documents_are_encoded_by_themselves(documents, pattern, block):
    tokenizer = BPETokenizer([(32, 97), (32, 32), (10, 32), (60, 124)], ["<|x|>", END], pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe.pretokens, "BLOCK_BYTES", block)
        for separator in tokenizer.special_tokens:
            [special] = tokenizer.encode(separator, [separator])
            arrays = list(tokenizer.encode_documents(iter(documents), separator))
            assert all(array.dtype == tokenizer.dtype for array in arrays)
            expected = [i for text in documents for i in [special, *slow_encode(text, tokenizer.merges, pattern)]]
            assert sum((array.tolist() for array in arrays), []) == expected


def test_many_short_documents_come_in_few_arrays(vocab, sample):
    lines, end = sample.split("\n") * 3, vocab.vocab_size - 1
    arrays = list(vocab.encode_documents(lines))
    assert len(arrays) < 10
    assert np.concatenate(arrays).tolist() == [i for line in tiktoken_of(vocab).encode_ordinary_batch(lines)
                                               for i in [end, *line]]


def test_separator_is_a_special_token(vocab):
    for name in ("<|other|>", "", "the"):
        with pytest.raises(ValueError, match="not a special token"):
            vocab.encode_documents(["a"], name)
    assert_refuses(lambda: vocab.encode_documents(["a"], None), ValueError, "list of names")
    assert_refuses(lambda: vocab.encode_documents(5), TypeError, "iterable of str, not 5")


def test_text_around_special_tokens_is_tokenized_by_itself(vocab):
    end = vocab.vocab_size - 1
    for left, right in [("the cat ", " sat"), ("  ", "  x"), ("a\n", "\nb")]:
        ids = vocab.encode(left + END + right, allowed_special=[END])
        assert ids == [*vocab.encode(left), end, *vocab.encode(right)]
        assert vocab.decode(ids) == left + END + right


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def rust_tokens(text, vocab_size, pattern="gpt2"):
    """Tokens by rank of rustbpe, which like us merges the smaller of two equally frequent pairs."""
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator([text], vocab_size, pattern=TIKTOKEN_PATTERNS[pattern])
    return [token for token, _ in sorted(theirs.get_mergeable_ranks(), key=lambda pair: pair[1])]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_of_sample_equal_rustbpe(sample, pattern):
    ours = BPETokenizer.train(sample, 2048, special_tokens=(), pattern=pattern)
    assert [ours.token_bytes(i) for i in range(2048)] == rust_tokens(sample, 2048, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_of_wikitext_equal_rustbpe(wiki_valid, pattern):
    ours = BPETokenizer.train(wiki_valid, 4096, special_tokens=(), pattern=pattern)
    assert [ours.token_bytes(i) for i in range(4096)] == rust_tokens(wiki_valid, 4096, pattern)


@checked(100)
@given(st.one_of(few_letters, st.lists(texts, min_size=1, max_size=3)), st.sampled_from(list(PATTERNS)))
def test_training_equals_recounting_every_round(texts, pattern):
    merges = slow_train(texts, 30, pattern)
    tokenizer = BPETokenizer.train(texts, 256 + 30 + 1, pattern=pattern)
    assert tokenizer.merges == merges
    counts = sum((bpe_tokenizer.count_pretokens(text, pattern) for text in texts), Counter())
    assert learn_merges(counts, 30) == merges
    for text in texts:
        assert_same_ids(tokenizer, text, slow_encode(text, merges, pattern))


def test_merges_of_small_corpora_equal_the_textbook():
    """Few letters, runs of one letter and small counts: many pairs overlap, and many are equally frequent."""
    draw = random.Random(0)
    for _ in range(200):
        letters, counts = b"abcdef"[: draw.randrange(1, 7)], {}
        for _ in range(draw.randrange(1, 40)):
            repeats = draw.choice([(1,), (1, 1, 2, 3, 8)])
            word = bytes(c for c in draw.choices(letters, k=draw.randrange(1, 9)) for _ in range(draw.choice(repeats)))
            counts[word] = draw.randrange(1, draw.choice([2, 4, 20]))
        assert bpe.learn.learn_merges(counts, 40) == learn_merges(counts, 40)


def test_merges_of_sample_equal_the_textbook(sample):
    counts = bpe_tokenizer.count_pretokens(sample[:10_000])
    merges = learn_merges(counts, 150)
    assert len(merges) == 150
    assert bpe.learn.learn_merges(counts, 150) == merges
    assert BPETokenizer.train(sample[:10_000], 406, special_tokens=()).merges == merges


@pytest.mark.parametrize(
    "text",
    [" " + "a" * 9000, "a" * 9000, "a b" * 2000 + "  c" * 99 + " " * 5000, " \u3000" * 3000],
    ids=["a space and a word", "a word", "words and spaces", "spaces"],
)
def test_long_texts_with_few_places_to_cut(monkeypatch, text):
    """Blocks without one, and one at the very start, where the first block is empty."""
    monkeypatch.setattr(bpe.pretokens, "BLOCK_BYTES", 1000)
    assert bpe.pretokens.count_pretokens(text, None) == Counter(piece.encode() for piece in pretokens(text))
    tokenizer = BPETokenizer.train(text, 270)
    assert tokenizer.merges == slow_train([text], 13)
    assert_same_ids(tokenizer, text, slow_encode(text, tokenizer.merges))


def test_each_text_is_pretokenized_by_itself():
    joined = BPETokenizer.train("ab" * 9, 300, special_tokens=())
    apart = BPETokenizer.train(["ab"] * 9, 300, special_tokens=())
    assert apart.merges == [(97, 98)]
    assert joined.merges == slow_train(["ab" * 9], 44) != apart.merges
    assert BPETokenizer.train((text for text in ["ab"] * 9), 300, special_tokens=()).merges == apart.merges


@pytest.mark.parametrize(("size", "special"), [(255, ()), (256, (END,)), (0, ()), (-1, ()), (257, ("<|a|>", "<|b|>"))])
def test_too_small_vocabulary_is_a_value_error(size, special):
    with pytest.raises(ValueError, match=f"vocab_size={size}"):
        BPETokenizer.train("some text", size, special_tokens=special)


def test_smallest_vocabulary_has_no_merges():
    tokenizer = BPETokenizer.train("some text", 257)
    assert tokenizer.merges == [] and tokenizer.vocab_size == 257


@pytest.mark.parametrize(("text", "merges"), [("", 0), ("a b c", 2), ("aaaa", 2), ("abc abc", 3), ([], 0)])
def test_text_that_runs_out_of_pairs_gives_a_smaller_vocabulary(text, merges):
    tokenizer = BPETokenizer.train(text, 1000)
    assert tokenizer.merges == slow_train([text] if isinstance(text, str) else text, 1000)
    assert tokenizer.vocab_size == 256 + merges + 1
    assert tokenizer.special_tokens == (END,)


def test_progress_counts_the_merges():
    seen = []
    tokenizer = BPETokenizer.train("the cat and the hat and the rat", 256 + 8, special_tokens=(), progress=seen.append)
    assert seen == list(range(1, len(tokenizer.merges) + 1)) == list(range(1, 9))


def test_merges_of_a_smaller_vocabulary_come_first(sample):
    large = BPETokenizer.train(sample[:50_000], 600)
    assert BPETokenizer.train(sample[:50_000], 400).merges == large.merges[:143]


def test_training_does_not_depend_on_hash_order():
    code = ("from bpe_tokenizer import BPETokenizer as T; text = open('data/input.txt', encoding='utf-8').read(60000); "
            "t = T.train(text, 700); print(t.fingerprint, sum(t.encode(text)))")
    printed = set()
    for seed in ("0", "1", "20"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        printed.add(run.stdout)
    assert len(printed) == 1


def test_training_on_wikitext_gives_the_committed_file(tmp_path):
    BPETokenizer.train(wikitext("train"), 500).save(tmp_path / "vocab.json")
    assert (tmp_path / "vocab.json").read_bytes() == (DATA / "bpe_vocab_500.json").read_bytes()


# ----------------------------------------------------------------------------------------------------------
# Misuse
# ----------------------------------------------------------------------------------------------------------

NO_TEXTS = [b"abc", bytearray(b"abc"), None, 5, 1.5, True, Path("a.txt"), np.array([1, 2]), {"train": "abc"}, len]


def assert_refuses(call, kind, *words):
    """`call` raises just `kind`, with a message of one line that holds `words`."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind and len(message.splitlines()) == 1 and len(message) < 250, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", [*NO_TEXTS, ["a"], ("a",)], ids=repr)
def test_what_is_no_text_is_a_type_error(vocab, text):
    for call in (vocab.encode, vocab.encode_array, lambda text: list(vocab.encode_stream(["a", text])),
                 lambda text: BPETokenizer.train(["a", text], 300)):
        assert_refuses(lambda: call(text), TypeError, "must be a str", "read_text", ".decode()")


@pytest.mark.parametrize("texts", [*NO_TEXTS, [1, 2], [b"a"]], ids=repr)
def test_what_is_no_iterable_of_texts_is_a_type_error(vocab, texts):
    for call in (lambda: list(vocab.encode_stream(texts)), lambda: BPETokenizer.train(texts, 300)):
        assert_refuses(call, TypeError, "must be a str", "read_text")


def test_a_stream_that_cannot_be_read_is_refused_before_it_is_asked_for_ids(vocab):
    assert_refuses(lambda: vocab.encode_stream(5), TypeError, "iterable of str, not 5")


def test_a_single_text_is_a_stream_of_one(vocab):
    assert np.concatenate(list(vocab.encode_stream("a string of text"))).tolist() == vocab.encode("a string of text")


def test_names_of_files_are_no_training_text(tmp_path, monkeypatch, saved):
    tokenizer, path = saved
    (tmp_path / "a").write_text("text")
    monkeypatch.chdir(tmp_path)
    for texts in (str(path), [str(path)], (str(path), "a"), iter(["a", "vocab.json"]), "a"):
        assert_refuses(lambda: BPETokenizer.train(texts, 300), UserError, "name of a file", "read_text")
    for texts in (["a", "b"], ["b", "a"], "vocab", [str(tmp_path)], ["a", "a "], "a\0", "a/" * 3000, ["a", ""]):
        BPETokenizer.train(texts, 300)
    assert tokenizer.encode("a") == tokenizer.encode_array("a").tolist() == [97]  # a text to encode may be anything


@pytest.mark.parametrize("size", [300.0, "300", None, [300], np.float32(300)], ids=repr)
def test_vocab_size_is_an_integer(size):
    assert_refuses(lambda: BPETokenizer.train("some text", size), TypeError, "vocab_size", "integer")


def test_vocab_size_may_be_an_integer_of_numpy():
    assert BPETokenizer.train("aaa", np.uint16(257), special_tokens=()).merges == [(97, 97)]


def test_progress_is_a_function():
    assert_refuses(lambda: BPETokenizer.train("some text", 300, progress=True), TypeError, "progress", "function")


@pytest.mark.parametrize("names", ["<s>", "", b"<s>", None, 5, [1], ["<s>", None], [b"<s>"], {"<s>": 1}], ids=repr)
def test_special_tokens_are_a_list_of_names(vocab, names):
    for call in (lambda: BPETokenizer([], names), lambda: BPETokenizer.train("text", 300, names),
                 lambda: BPETokenizer.train(iter([]), 300, special_tokens=names)):
        assert_refuses(call, ValueError, "special_tokens must be a list of names")
    assert_refuses(lambda: vocab.encode("text", allowed_special=names), ValueError, "allowed_special must be a list")


def test_special_tokens_may_come_in_any_collection():
    for names in (["<a>", "<b>"], ("<a>", "<b>"), {"<a>": 0, "<b>": 1}.keys(), iter(["<a>", "<b>"])):
        assert BPETokenizer([], names).special_tokens == ("<a>", "<b>")
    assert BPETokenizer.train("ab", 300, iter(["<a>"])).special_tokens == ("<a>",)
    assert BPETokenizer([], ["<a>"]).encode("<a>", allowed_special=frozenset(["<a>"])) == [256]


def test_special_tokens_are_checked_before_the_text_is_read():
    assert_refuses(lambda: BPETokenizer.train(iter([1]), 300, ["<a>", "<a>"]), ValueError, "distinct")


@pytest.mark.parametrize("merges", ["vocab.json", None, 5, [97], [(97,)], [(97, 98, 99)], [("a", "b")], ["ab"],
                                    [(97.0, 98)], [(97, None)], Path("vocab.json")], ids=repr)
def test_merges_are_pairs_of_ids(merges):
    assert_refuses(lambda: BPETokenizer(merges), ValueError, "merges must be a list of (left", "load(path)")


@pytest.mark.parametrize("ids", ["abc", "", b"abc", 5, None, [1.5], [97, "b"], [[97, 98]], [97, None], np.array(97),
                                 np.array([[97, 98]]), np.array([1.5]), np.arange(900.0), {"ids": [1]}], ids=repr)
def test_what_is_no_sequence_of_ids_is_a_type_error(vocab, ids):
    for call in (vocab.decode, vocab.decode_bytes):
        assert_refuses(lambda: call(ids), TypeError, "integers in one dimension")


def test_decode_accepts_tensors_and_numpy_integers(vocab):
    torch = pytest.importorskip("torch")
    ids = vocab.encode("The lighthouse keeper")
    for same in (torch.tensor(ids), torch.tensor(ids, dtype=torch.int32), list(torch.tensor(ids)), map(np.uint16, ids)):
        assert vocab.decode(same) == "The lighthouse keeper"
    assert vocab.token_bytes(np.uint16(ids[0])) == vocab.token_bytes(torch.tensor(ids[0])) == b"T"
    for wrong in (torch.tensor([ids, ids]), torch.tensor(5), torch.tensor([1.5]), torch.randn(50, 50)):
        assert_refuses(lambda: vocab.decode(wrong), TypeError, "integers in one dimension")


# ----------------------------------------------------------------------------------------------------------
# The module
# ----------------------------------------------------------------------------------------------------------


def test_main_shows_the_textbook_at_work(monkeypatch, capsys):
    learned = []

    def watched(*given):
        learned.append(learn_merges(*given))
        return learned[-1]

    monkeypatch.setattr(bpe_tokenizer, "learn_merges", watched)
    bpe_tokenizer.main()
    shown = capsys.readouterr().out
    assert len(learned[0]) == 100
    assert "373,238 bytes" in shown and "100 merges" in shown
    assert "32 + 116 -> 256   ' ' + 't' -> ' t'" in shown
    assert "pre-tokens:   The| lighthouse| keeper|'s|" in shown
    assert "and back:     The lighthouse keeper's lamp burned 24 candles in 1759 .\n" in shown
    assert "vocabulary   256: 1.00 bytes per token" in shown


def test_main_would_notice_a_difference(monkeypatch):
    monkeypatch.setattr(bpe_tokenizer, "learn_merges", lambda counts, n_merges: [(97, 98)])
    with pytest.raises(AssertionError):
        bpe_tokenizer.main()


def test_importing_and_loading_needs_numpy_only(saved):
    _, path = saved
    code = (f"import sys, bpe_tokenizer; bpe_tokenizer.BPETokenizer.load({str(path)!r}).decode([97]); "
            "print({'torch', 'tqdm', 'regex', 'tiktoken'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("bpe_vocab.json", 4096), ("bpe_vocab_500.json", 500)])
def test_committed_vocabularies(tmp_path, name, size):
    tokenizer = BPETokenizer.load(DATA / name)
    assert tokenizer.vocab_size == size and tokenizer.special_tokens == (END,)
    tokenizer.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_saving_and_loading(saved, nasty_vocab):
    tokenizer, path = saved
    odd = BPETokenizer([(13, 10), (0xE2, 0x80), (257, 0xA8)], ["<\u2028\"\\>"])
    for each in (tokenizer, nasty_vocab, BPETokenizer([]), odd):
        each.save(path)
        first = path.read_bytes()
        again = BPETokenizer.load(str(path))
        assert again.merges == each.merges and again.special_tokens == each.special_tokens
        assert again.fingerprint == each.fingerprint
        again.save(str(path))
        assert path.read_bytes() == first
        assert b"\r" not in first
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_a_failed_save_keeps_the_old_file(saved, monkeypatch):
    tokenizer, path = saved
    before = path.read_bytes()

    def fails(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        BPETokenizer([(97, 98)]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_fingerprints_of_natural_order_and_gpt2_pattern_are_those_of_always(vocab):
    assert vocab.fingerprint == json.loads((DATA / "bpe_vocab.json").read_text(encoding="utf-8"))["fingerprint"]
    same = BPETokenizer(vocab.merges, vocab.special_tokens, "gpt2", range(256))
    assert same.fingerprint == vocab.fingerprint and same.byte_order is None


def test_saving_and_loading_patterns_and_orders_of_bytes(references, tmp_path):
    prints = set()
    for tokenizer, _, _ in references:
        tokenizer.save(tmp_path / "vocab.json")
        again = BPETokenizer.load(tmp_path / "vocab.json")
        assert (again.merges, again.special_tokens) == (tokenizer.merges, tokenizer.special_tokens)
        assert (again.pattern, again.byte_order) == (tokenizer.pattern, tokenizer.byte_order)
        prints.add(again.fingerprint)
        stored = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
        assert ("byte_order" in stored) == (tokenizer.byte_order is not None)
    assert len(prints) == len(references)


@pytest.mark.parametrize("pattern", ["gpt3", None, 5, ["gpt2"], PATTERNS["gpt2"]], ids=repr)
def test_pattern_is_one_of_two_names(pattern):
    assert_refuses(lambda: BPETokenizer([], pattern=pattern), ValueError, "pattern must be one of gpt2, gpt4")
    assert_refuses(lambda: BPETokenizer.train("a", 300, pattern=pattern), ValueError, "pattern must be one of")


@pytest.mark.parametrize("order", [b"", range(255), [0] * 256, range(1, 257), 5, "a" * 256, [1.5] * 256, [10**30]],
                         ids=lambda order: repr(order)[:12])
def test_byte_order_holds_each_byte_once(order):
    assert_refuses(lambda: BPETokenizer([], byte_order=order), ValueError, "each of the 256 bytes once")


# ----------------------------------------------------------------------------------------------------------
# Files of GPT-2 and of Hugging Face
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory, sample):
    """A vocabulary of 2000 that Hugging Face trained and wrote in GPT-2's form, and tiktoken's reading of it."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1999, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([sample[:200_000], *NASTY], trainer)
    theirs.add_special_tokens([END])
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save(str(folder / "tokenizer.json"))
    theirs.model.save(str(folder))  # vocab.json, merges.txt
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps({**ids, END: 1999}), encoding="utf-8")  # as GPT-2's has it
    return folder


def gpt2_files(folder, source, *names):
    """Copies of files in `folder`, from those of these kinds in `source`."""
    kinds = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt", "my.json": "tokenizer.json"}
    for name in names:
        (folder / name).write_bytes((source / kinds.get(name, name)).read_bytes())
    return folder


def test_vocabulary_of_hugging_face_gives_the_ids_of_both_libraries(gpt2_folder, wiki_valid):
    ours = BPETokenizer.from_gpt2(gpt2_folder)
    assert (ours.vocab_size, ours.special_tokens, ours.pattern) == (2000, (END,), "gpt2")
    assert ours.byte_order[:3] == b"!\"#" and ours.byte_order[-2:] == b"\xa0\xad"
    theirs, tik = tokenizers.Tokenizer.from_file(str(gpt2_folder / "tokenizer.json")), tiktoken_of(ours)
    for text in [*NASTY, END.join(NASTY), wiki_valid[:300_000]]:
        expected = theirs.encode(text).ids
        assert tik.encode(text, allowed_special="all") == expected
        assert ours.encode(text, [END]) == ours.encode_array(text, [END]).tolist() == expected
        assert ours.decode(expected) == text


def test_every_form_of_the_files_is_the_same_vocabulary(gpt2_folder, tmp_path):
    expected = BPETokenizer.from_gpt2(gpt2_folder / "tokenizer.json").fingerprint
    for k, names in enumerate([["merges.txt", "vocab.json"], ["vocab.bpe", "encoder.json"], ["vocab.bpe", "vocab.json"],
                               ["merges.txt", "encoder.json"]]):
        (tmp_path / str(k)).mkdir()
        folder = gpt2_files(tmp_path / str(k), gpt2_folder, *names)
        for path in (folder, str(folder), *map(folder.joinpath, names)):
            assert BPETokenizer.from_gpt2(path).fingerprint == expected
    gpt2_files(tmp_path, gpt2_folder, "my.json")
    stored = json.loads((tmp_path / "my.json").read_text(encoding="utf-8"))
    stored["model"]["merges"] = [" ".join(pair) for pair in stored["model"]["merges"]]  # as older releases write them
    stored["model"]["vocab"][END] = 1999
    del stored["model"]["type"], stored["pre_tokenizer"]["use_regex"]
    stored["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (tmp_path / "my.json").write_text(json.dumps(stored), encoding="utf-8")
    assert BPETokenizer.from_gpt2(tmp_path / "my.json").fingerprint == expected
    assert BPETokenizer.from_gpt2(gpt2_folder / "vocab.json").fingerprint == expected  # and not tokenizer.json


@pytest.mark.parametrize("names", [[], ["merges.txt"], ["vocab.json"], ["vocab.bpe"], ["my.json"]])
def test_missing_files_of_gpt2(gpt2_folder, tmp_path, names):
    gpt2_files(tmp_path, gpt2_folder, *names)
    for path in (tmp_path, tmp_path / "merges.txt", tmp_path / "tokenizer.json", tmp_path / "none"):
        with pytest.raises(FileNotFoundError) as caught:
            BPETokenizer.from_gpt2(path)
        message = str(caught.value)
        assert str(path) in message and "vocab.bpe" in message and len(message.splitlines()) == 1


LIKE_BERT = {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0}}, "pre_tokenizer": {"type": "BertPreTokenizer"}}
GPT4_ELSEWHERE = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": TIKTOKEN_PATTERNS["gpt4"]}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # {1,3}+ differs
OTHER_KINDS = {
    "WordPiece": (lambda d: d.update(LIKE_BERT), "WordPiece"),
    "no model": (lambda d: d.pop("model"), "another kind"),
    "another pre_tokenizer": (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
    "no pre_tokenizer": (lambda d: d.update(pre_tokenizer=None), ""),
    "space in front": (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
    "no pattern": (lambda d: d["pre_tokenizer"].update(use_regex=False), "pre_tokenizer"),
    "another pattern": (lambda d: d.update(pre_tokenizer=GPT4_ELSEWHERE), "pre_tokenizer"),
    "normalizer": (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
    "byte fallback": (lambda d: d["model"].update(byte_fallback=True), "byte_fallback"),
    "ignores merges": (lambda d: d["model"].update(ignore_merges=True), "ignore_merges"),
    "dropout": (lambda d: d["model"].update(dropout=0.1), "dropout"),
    "suffix": (lambda d: d["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "truncation": (lambda d: d.update(truncation={"max_length": 5}), "truncation"),
    "tokens around": (lambda d: d.update(post_processor={"type": "TemplateProcessing"}), "post_processor"),
    "special token strips": (lambda d: d["added_tokens"][0].update(lstrip=True), "lstrip"),
    "special token first": (lambda d: (d["model"].update(vocab={t: i + 1 for t, i in d["model"]["vocab"].items()}),
                                       d["added_tokens"][0].update(id=0)), "not the bytes"),
    "special token beyond a gap": (lambda d: d["added_tokens"][0].update(id=2005), "ids"),
    "no added tokens": (lambda d: (d["model"]["vocab"].update({END: 1999}), d.pop("added_tokens")), END),
    "a token less": (lambda d: d["model"]["vocab"].popitem(), "ids"),
    "a merge less": (lambda d: d["model"]["merges"].pop(), "token"),
    "a merge more": (lambda d: d["model"]["merges"].append(["a", "b"]), "merge 1743"),
    "merges swapped": (lambda d: d["model"]["merges"].insert(0, d["model"]["merges"].pop(1)), "merge 0"),
    "unknown part": (lambda d: d["model"]["merges"].__setitem__(3, ["a", "?!?"]), "merge 3"),
    "merge of three": (lambda d: d["model"]["merges"].__setitem__(3, "a b c"), "merge 3"),
    "merge of numbers": (lambda d: d["model"]["merges"].__setitem__(3, [1, 2]), "merge 3"),
    "merge null": (lambda d: d["model"]["merges"].__setitem__(3, None), ""),
    "no merges": (lambda d: d["model"].pop("merges"), ""),
    "ids as text": (lambda d: d["model"]["vocab"].update({"a": "64"}), ""),
    "vocab as list": (lambda d: d["model"].update(vocab=[["a", 0]]), ""),
}


def assert_gpt2_refused(path, word=""):
    with pytest.raises(ValueError) as caught:
        BPETokenizer.from_gpt2(path)
    message = str(caught.value)
    assert type(caught.value) is UserError and len(message.splitlines()) == 1 and len(message) < 400
    assert str(path) in message and word in message


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_tokenizer_json_of_another_kind(gpt2_folder, tmp_path, kind):
    change, word = OTHER_KINDS[kind]
    stored = json.loads((gpt2_folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(stored)
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    assert_gpt2_refused(tmp_path / "tokenizer.json", word)


def test_truncated_files_of_gpt2(gpt2_folder, tmp_path):
    gpt2_files(tmp_path, gpt2_folder, "merges.txt", "vocab.json", "my.json")
    for name in ("merges.txt", "vocab.json", "my.json"):
        path = tmp_path / name
        content = path.read_bytes()
        for size in [0, 1, 20, len(content) // 2, *range(len(content) - 60, len(content) - 2, 3)]:
            path.write_bytes(content[:size])
            assert_gpt2_refused(path)
        path.write_bytes(content)
    for content in (b"[" * 100_000, b"null", b"[]", b"3", b"\xff", b"{}"):
        (tmp_path / "vocab.json").write_bytes(content)
        (tmp_path / "my.json").write_bytes(content)
        assert_gpt2_refused(tmp_path / "vocab.json")
        assert_gpt2_refused(tmp_path / "my.json")


ODD_SPECIAL = (END, "<|\u00e9|>", "<|\u00c3\u00a9|>", "<|\u00e9|>\u00e9",
               "<| x|>", "<|\u4e2d|>", "\u0120.*[a]", " \u00e9")


@pytest.fixture(scope="module")
def exported(references):
    """(tokenizer with odd special tokens, Hugging Face's reading of it) for both patterns and orders."""
    ours = [BPETokenizer(t.merges, ODD_SPECIAL, t.pattern, t.byte_order) for t, _, _ in references]
    return [(t, tokenizers.Tokenizer.from_str(json.dumps(t.hf_tokenizer_json()))) for t in ours]


@checked(200)
@given(text=st.lists(st.one_of(texts, st.sampled_from(ODD_SPECIAL)), max_size=5).map("".join))
@example(text="a \n " + END + "  \n" + "".join(ODD_SPECIAL))
@example(text="\n".join([*NASTY, *ODD_SPECIAL]))
def test_written_tokenizer_json_gives_the_same_ids(exported, text):
    for ours, theirs in exported:
        ids = ours.encode(text, ODD_SPECIAL)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
        assert theirs.decode(ids) == ours.decode([i for i in ids if i < 256 + len(ours.merges)])


def test_written_tokenizer_json_reads_back(exported, tmp_path):
    for ours, theirs in exported:
        for content in (json.dumps(ours.hf_tokenizer_json()), theirs.to_str()):
            (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
            assert BPETokenizer.from_gpt2(tmp_path).fingerprint == ours.fingerprint


@pytest.mark.parametrize("given", [([(97, 98), (256, 99), (98, 99), (97, 258)],), ([], ["a"]), ([(97, 98)], ["ab"]),
                                   ([(195, 169)], ["\u00e9"])], ids=repr)
def test_tokens_that_look_alike_cannot_be_written(given):
    assert_refuses(BPETokenizer(*given).hf_tokenizer_json, ValueError, "same bytes")


def test_fingerprint_changes_with_whatever_decides_the_ids():
    variants = [([], ()), ([(97, 98)], ()), ([(98, 97)], ()), ([(97, 98), (98, 97)], ()), ([(98, 97), (97, 98)], ()),
                ([(97, 98)], ["<|a|>"]), ([(97, 98)], ["<|b|>"]), ([(97, 98)], ["<|a|>", "<|b|>"]),
                ([(97, 98)], ["<|b|>", "<|a|>"]), ([], (), "gpt4"), ([], (), "gpt2", range(255, -1, -1))]
    prints = [BPETokenizer(*variant).fingerprint for variant in variants]
    assert len(set(prints)) == len(prints)
    assert [BPETokenizer(*variant).fingerprint for variant in variants] == prints
    assert all(regex.fullmatch("[0-9a-f]{16}", one) for one in prints)


def assert_refused(path):
    """`path` is refused with a ValueError of one line that names the file."""
    with pytest.raises(ValueError) as caught:
        BPETokenizer.load(path)
    message = str(caught.value)
    assert type(caught.value) is UserError
    assert str(path) in message
    assert len(message.splitlines()) == 1


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        BPETokenizer.load(tmp_path / "vocab.json")
    with pytest.raises(OSError):
        BPETokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{", b"{}", b"[]", b"null", b"3", b'"bpe_tokenizer"', b"NaN", b'{"format": "bpe_tokenizer"}', b"\x80",
     b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"\0" * 100, b"PK\x03\x04", b"1" * 5000, b"[" * 100_000, b'{"a":' * 100_000,
     b'{"format": "bpe_tokenizer", "version": ' + b"[" * 300 + b"]" * 300 + b"}", b'{"version": 1, "merges": []}',
     b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', b"<html>\n</html>\n"],
    ids=lambda content: repr(content[:12]),
)
def test_file_that_is_no_vocabulary(tmp_path, content):
    (tmp_path / "vocab.json").write_bytes(content)
    assert_refused(tmp_path / "vocab.json")


def test_truncated_file(saved):
    _, path = saved
    content = path.read_bytes().rstrip()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        assert_refused(path)


DAMAGE = {
    "format": lambda d: d.update(format="another"),
    "no format": lambda d: d.pop("format"),
    "newer version": lambda d: d.update(version=2),
    "version as text": lambda d: d.update(version="1"),
    "version of two lines": lambda d: d.update(version="1\n\u20282"),
    "no version": lambda d: d.pop("version"),
    "pattern": lambda d: d.update(pattern=r"\w+|\s+"),
    "no pattern": lambda d: d.pop("pattern"),
    "another pattern of ours": lambda d: d.update(pattern=PATTERNS["gpt4"]),
    "order of bytes": lambda d: d.update(byte_order=[*range(255, -1, -1)]),
    "order of few bytes": lambda d: d.update(byte_order=[1, 0]),
    "order of bytes as a number": lambda d: d.update(byte_order=256),
    "fingerprint": lambda d: d.update(fingerprint="0" * 16),
    "no fingerprint": lambda d: d.pop("fingerprint"),
    "no merges": lambda d: d.pop("merges"),
    "fewer merges": lambda d: d["merges"].pop(),
    "merges null": lambda d: d.update(merges=None),
    "merges as text": lambda d: d.update(merges="[]"),
    "merges as object": lambda d: d.update(merges={}),
    "merge names itself": lambda d: d["merges"][0].__setitem__(0, 256),
    "merge names a later id": lambda d: d["merges"][1].__setitem__(1, 270),
    "merge names a special token": lambda d: d["merges"][0].__setitem__(1, 280),
    "merge names a negative id": lambda d: d["merges"][0].__setitem__(0, -1),
    "merge names a huge id": lambda d: d["merges"][0].__setitem__(0, 10**100),
    "merge twice": lambda d: d["merges"].append(d["merges"][0]),
    "merges swapped": lambda d: d["merges"].insert(0, d["merges"].pop(1)),
    "token text": lambda d: d["merges"][3].__setitem__(2, "another"),
    "token text with a surrogate": lambda d: d["merges"][3].__setitem__(2, "\ud800"),
    "token text of two lines": lambda d: d["merges"][3].__setitem__(2, "a\n\u2028\x85b"),
    "token text null": lambda d: d["merges"][3].__setitem__(2, None),
    "merge of floats": lambda d: d["merges"].__setitem__(0, [float(d["merges"][0][0]), *d["merges"][0][1:]]),
    "merge of infinity": lambda d: d["merges"][0].__setitem__(0, float("inf")),
    "merge of booleans": lambda d: d["merges"].__setitem__(0, [True, False, "\x01\0"]),
    "merge of a boolean": lambda d: d["merges"][0].__setitem__(1, True),
    "merge of strings": lambda d: d["merges"].__setitem__(0, [str(d["merges"][0][0]), str(d["merges"][0][1]), "x"]),
    "merge of lists": lambda d: d["merges"][0].__setitem__(0, [97]),
    "merge null": lambda d: d["merges"].__setitem__(0, None),
    "merge of two": lambda d: d["merges"][0].pop(),
    "merge of four": lambda d: d["merges"][0].append("x"),
    "merge as text": lambda d: d["merges"].__setitem__(0, "abc"),
    "no special tokens": lambda d: d.pop("special_tokens"),
    "another special token": lambda d: d.update(special_tokens=["<|other|>"]),
    "special tokens null": lambda d: d.update(special_tokens=None),
    "special tokens as text": lambda d: d.update(special_tokens=END),
    "special token of a number": lambda d: d.update(special_tokens=[1]),
    "special token twice": lambda d: d.update(special_tokens=[END, END]),
    "special token empty": lambda d: d.update(special_tokens=[""]),
    "special token with a surrogate": lambda d: d.update(special_tokens=["\ud800"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file(saved, damage):
    tokenizer, path = saved
    good = json.loads(path.read_text(encoding="utf-8"))
    bad = copy.deepcopy(good)
    DAMAGE[damage](bad)
    path.write_text(json.dumps(bad), encoding="utf-8")
    assert_refused(path)
    path.write_text(json.dumps(good), encoding="utf-8")  # the damage it was, not how the file is laid out
    assert BPETokenizer.load(path).merges == tokenizer.merges


def test_booleans_are_no_ids(tmp_path):
    """Python holds True and 1 to be equal, so all else in this file fits."""
    path = tmp_path / "vocab.json"
    BPETokenizer([(1, 0)]).save(path)
    content = path.read_text(encoding="utf-8")
    assert content.count("[1, 0, ") == 1
    for ids in ("[true, 0, ", "[1, false, ", "[true, false, "):
        path.write_text(content.replace("[1, 0, ", ids), encoding="utf-8")
        assert_refused(path)


def test_mutated_files_are_refused_or_read_right(saved):
    tokenizer, path = saved
    content, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        mutated = bytearray(content)
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            i, kind = draw.randrange(len(mutated)), draw.randrange(6)
            if kind == 0:
                mutated[i] = draw.randrange(256)
            elif kind == 1:
                mutated[i] = draw.choice(b'0123456789[]{}",:-.eE \n\\')
            elif kind == 2:
                mutated[i] ^= 1 << draw.randrange(8)
            elif kind == 3:
                del mutated[i : i + draw.randrange(1, 20)]
            elif kind == 4:
                mutated.insert(i, draw.randrange(256))
            else:
                mutated[i:i] = mutated[i : i + draw.randrange(1, 40)]
        path.write_bytes(mutated)
        try:
            loaded = BPETokenizer.load(path)
        except ValueError as error:
            refused += 1
            assert type(error) is UserError
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
        else:
            assert loaded.fingerprint == tokenizer.fingerprint
            assert (loaded.merges, loaded.special_tokens) == (tokenizer.merges, tokenizer.special_tokens)
    assert refused > 200
