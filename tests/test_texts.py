"""Texts of one's own: data/texts.py and dataset folders, against the definitions and other readers."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import shlex
import sqlite3
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet
import pytest
import torch

import data
import forks
import harness
from bpe_tokenizer import BPETokenizer
from data import formats, prepare, texts
from data.formats import ReadOptions
from data.texts import assign, cut_place, read_texts, split_documents
from harness.errors import UserError
from test_data import as_data_dir, no_network  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"
SPLITS = data.SPLITS


@pytest.fixture
def data_dir(tmp_path):
    with as_data_dir(tmp_path / "data") as folder:
        yield folder


@pytest.fixture
def here(tmp_path, monkeypatch, data_dir):
    """A folder to work in, as the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def story(n, seed=0, end="\n\n"):
    """`n` paragraphs of a story, which ends with `end`."""
    r = random.Random(seed)
    words = "the a lamp ship tower keeper Marta sea night rain went saw found left old bright slowly never café".split()
    sentence = lambda: " ".join(r.choice(words) for _ in range(r.randint(4, 12))).capitalize() + "."  # noqa: E731
    return end.join(" ".join(sentence() for _ in range(r.randint(1, 5))) for _ in range(n)) + end


def tokens_of(folder, vocabulary="bpe_vocab.json"):
    return data.load_tokens(vocabulary, folder), BPETokenizer.load(data.vocabulary_file(vocabulary, folder))


def texts_of(folder, vocabulary="bpe_vocab.json"):
    """What the token files of a dataset folder decode to, {split: text}."""
    tokens, tokenizer = tokens_of(folder, vocabulary)
    return {split: tokenizer.decode(some.ids.tolist()) for split, some in tokens.items()}


def in_a_file(documents):
    """`texts.Documents` of a list of bytes."""
    copy = texts.Copy()
    copy.add((document, True) for document in documents)
    return copy.documents(0, len(documents))


def lists(splits):
    return {split: list(documents) for split, documents in splits.items()}


def read_documents(path, options):
    """The documents of a file."""
    (file,) = texts.find_files([path], options, print)
    return list_of(formats.read(file, options))


def list_of(pieces):
    """The documents that a reader gives, but for empty ones."""
    documents, parts = [], []
    for piece, ends in pieces:
        parts.append(piece)
        if ends:
            documents.append(b"".join(parts))
            parts = []
    assert not parts
    return [document for document in documents if document]


def refusal(capfd, *args):
    """The one line with which the command line refuses `args`, exit code 1 or 2 (its usage aside)."""
    with pytest.raises((UserError, SystemExit)) as caught:
        prepare.main([str(arg) for arg in args])
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        return capfd.readouterr().err.splitlines()[-1]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------
# Splits
# ----------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_three_where_paragraphs_end(here):
    text = story(400)
    (here / "novel.txt").write_text(text)
    prepare.main(["--from", "novel.txt", "--to", "novel"])
    parts = texts_of("novel")
    assert "".join(parts[split] for split in SPLITS) == text
    shares = [len(parts[split].encode()) / len(text.encode()) for split in SPLITS]
    assert np.allclose(shares, (0.9, 0.05, 0.05), atol=0.01)
    assert all(part.endswith("\n\n") and not part.startswith("\n") for part in parts.values())
    tokens, tokenizer = tokens_of("novel")
    for split, some in tokens.items():
        assert some.n_bytes == len(parts[split].encode())
        assert some.n_words == len(parts[split].split()) + parts[split].count("\n")
        assert some.dataset == "novel"
        assert some.ids.tolist() == tokenizer.encode(parts[split])
    assert text.startswith(tokenizer.decode(tokens["train"].start)) and 1 <= len(tokens["train"].start) <= 8


@pytest.mark.parametrize("text, end", [
    (story(300, end="\n"), "\n"), (story(300, end="\r\n\r\n"), "\r\n\r\n"), (story(300, end=" "), " "),
    ("天地玄黄宇宙洪荒" * 2000, ""), ("\U0001f600" * 3000, ""), ("x" * 9999, ""), ("a\n" * 20, "\n"),
])  # fmt: skip
def test_where_a_text_may_be_cut(text, end):
    parts = lists(split_documents(in_a_file([text.encode()]), SPLITS))
    assert "".join(document.decode() for split in SPLITS for document in parts[split]) == text
    assert all(len(parts[split]) == 1 for split in SPLITS)
    assert all(parts[split][0].decode().endswith(end) for split in SPLITS)
    if len(text) > 5000:
        assert all(0.03 < len(parts[split][0]) / len(text.encode()) < 0.07 for split in SPLITS[1:])


@pytest.mark.parametrize("n", [40, 200, 1000, 3999, 4001, 100_000])
def test_held_out_splits_of_short_texts_are_not_too_short(n):
    parts = {split: some.n_bytes for split, some in split_documents(in_a_file([b"ab " * (n // 3)]), SPLITS).items()}
    assert sum(parts.values()) == n // 3 * 3
    assert all(size >= min(0.15 * n, 100) for size in parts.values())


def test_cut_place_against_every_place():
    """The nearest end of a paragraph, else of a line, else of a word, else of a character: brute force."""
    r = random.Random(5)
    for _ in range(300):
        text = "".join(r.choice("ab é天\n\n \r") for _ in range(60)).encode()
        target, slack = r.randrange(1, len(text)), r.randrange(1, 20)
        near = [p for p in range(max(0, target - slack) + 1, min(len(text) - 1, target + slack) + 1)]
        window = max(0, target - slack)
        paragraphs = [p for p in near if re.search(rb"\n[ \t\r]*\n\Z", text[window:p])
                      and not re.match(rb"[ \t\r]*\n", text[p : target + slack])]  # fmt: skip
        lines, words = [p for p in near if text[p - 1 : p] == b"\n"], [p for p in near if text[p - 1 : p] in b" \t"]
        place = cut_place(text, target, slack)
        text[:place].decode(), text[place:].decode()
        for places in (paragraphs, lines, words):
            if places:
                assert abs(place - target) == min(abs(p - target) for p in places)
                assert place in places
                break
        else:
            assert 0 <= target - place < 4


def test_documents_stay_whole_and_every_split_has_its_share():
    r = random.Random(2)
    documents = [bytes([65 + i % 26]) * r.randint(1, 400) for i in range(1000)]
    parts = lists(split_documents(in_a_file(documents), SPLITS))
    assert sorted(d for some in parts.values() for d in some) == sorted(documents)
    total = sum(map(len, documents))
    assert np.allclose([sum(map(len, parts[s])) / total for s in SPLITS], (0.9, 0.05, 0.05), atol=0.002)
    third = [sum(map(len, documents[:333])), total]
    places = assign(map(len, documents), (0.9, 0.05, 0.05))
    val = [sum(len(d) for d, k in zip(documents[:n], places) if k == 1) for n in (333, 1000)]
    assert np.allclose(np.divide(val, third), 0.05, atol=0.005)  # of the beginning as of the whole
    assert places == assign(map(len, documents), (0.9, 0.05, 0.05))


def test_few_documents_are_cut(here):
    for name in "abc":
        (here / f"{name}.md").write_text(story(50, seed=ord(name)))
    splits, documents = read_texts([here], ReadOptions(), print)
    whole = b"".join((here / f"{name}.md").read_bytes() for name in "abc")
    assert documents and b"".join(d for split in SPLITS for d in splits[split]) == whole
    assert len(splits["train"]) == 3
    assert np.allclose([sum(map(len, splits[s])) / len(whole) for s in SPLITS], (0.9, 0.05, 0.05), atol=0.02)


@pytest.mark.parametrize("names", [
    ("train.txt", "valid.txt", "test.txt"), ("Train.txt", "validation.txt", "TEST.txt"),
    ("train.md", "val.md", "test.md"), ("train/a.txt", "dev/b.txt", "test/c.txt"),
    ("train-00000-of-00001.txt", "validation-00000-of-00001.txt", "test.txt"),
])  # fmt: skip
def test_files_named_after_the_splits_are_the_splits(here, names, capfd):
    wanted = {}
    for k, (split, name) in enumerate(zip(SPLITS, names)):
        path = here / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted[split] = story(20, seed=k)
        path.write_text(wanted[split])
    (here / "text" / "README.md").write_text("about it")
    prepare.main(["--from", "text", "--to", "own"])
    assert texts_of("own") == wanted
    assert "README.md" in capfd.readouterr().err


@pytest.mark.parametrize("names, splits", [
    ("ptb.train.txt ptb.valid.txt ptb.test.txt", "train val test"), ("x-train.txt x-dev.txt", "train val"),
    ("train-00000-of-00002-a09b74b3ef9c3b56.parquet train-00001-of-00002-ff9b74b3ef9c3b56.parquet "
     "test-00000-of-00001-a09b74b3ef9c3b56.parquet", "train train test"),
    ("data/train-00000-of-00001.parquet data/validation-00000-of-00001.parquet README.md", "train val -"),
    ("ds/train/data-00000-of-00001.arrow ds/test/data-00000-of-00001.arrow", "train test"),
    ("imdb/train/pos/0_1.txt imdb/train/neg/1_1.txt imdb/test/pos/2_1.txt", "train train test"),
    ("wiki.train.raw wiki.valid.raw", "train val"), ("train valid", "train val"), ("a.train a.test", "train test"),
    ("train.en valid.en", "train val"), ("en/train.txt de/train.txt en/test.txt", "train train test"),
    ("Train1.txt TRAIN2.txt Test1.txt", "train train test"), ("c.zip/train.csv c.zip/test.csv", "train test"),
    ("x-train.zip/a.txt x-test.zip/a.txt", "train test"), ("train.txt x.test.txt", "train test"),
    ("a-train.txt test.txt other.txt", "train test -"), ("train_data.jsonl test_data.jsonl", "train test"),
    ("The Girl on the Train.txt|A Test of Wills.txt|Emma.txt", "- - -"), ("training.txt retest.txt", "- -"),
    ("latest.txt trained.txt contest-train.txt", "- - -"), ("train_test.txt train.txt", "- -"),
    ("train.py test.py", "- -"),
    ("src/a.py train/a.py test/a.py", "- - -"), ("train.txt", "-"), ("test.txt", "-"),
])  # fmt: skip
def test_names_that_carry_a_split(names, splits):
    places = list(map(PurePosixPath, names.split("|" if "|" in names else None)))
    assert texts.splits_of(places) == [None if split == "-" else split for split in splits.split()]
    order = random.Random(0).sample(range(len(places)), len(places))  # whatever the order
    assert texts.splits_of([places[i] for i in order]) == [
        None if split == "-" else split for split in (splits.split()[i] for i in order)]  # fmt: skip


@pytest.mark.parametrize("names", ["essays.txt essays.test.txt", "novel.txt test.txt", "a.valid.txt a.test.txt"])
def test_held_out_text_without_training_text_is_refused_with_advice_that_works(here, capfd, names):
    for k, name in enumerate(names.split()):
        (here / name).write_text(story(90, seed=k))
    message = refusal(capfd, "--from", *names.split(), "--to", "own")
    assert "but no file named train" in message
    if "valid" not in names:
        new = re.search(r"rename the training text to (\S+),", message)[1]
        os.rename(names.split()[0], new)
        prepare.main(["--from", new, names.split()[1], "--to", "own", "--vocab-size", "300"])
        assert texts_of("own", "bpe_vocab_300.json")["test"] == story(90, seed=1)


def test_chapters_about_tests_are_no_held_out_text(here):
    for name in ("install.md", "dev.md", "test.md"):
        (here / name).write_text(story(20, seed=len(name)))
    splits, documents = read_texts([here], ReadOptions(), print)
    assert documents and len(splits["train"]) == 3


def test_it_says_which_files_became_which_split(here, capfd):
    for k, name in enumerate(("x.train.txt", "x.valid.txt", "novel.txt")):
        (here / name).write_text(story(60, seed=k))
    prepare.main(["--from", "x.train.txt", "x.valid.txt", "--to", "own", "--vocab-size", "300"])
    parts, lines = texts_of("own", "bpe_vocab_300.json"), capfd.readouterr().err.splitlines()
    assert lines == [f"train: a part of x.train.txt ({len(parts['train'].encode()):,} bytes)",
                     f"val: x.valid.txt ({len(parts['val'].encode()):,} bytes)",
                     f"test: a part of x.train.txt ({len(parts['test'].encode()):,} bytes)"]  # fmt: skip
    prepare.main(["--from", "novel.txt", "--to", "own", "--vocab-size", "300"])
    assert [line.split(" (")[0] for line in capfd.readouterr().err.splitlines()] == [
        f"{split}: a part of novel.txt" for split in SPLITS]  # fmt: skip


@pytest.mark.parametrize("shared, told", [(0, False), (1, True), (10, True)])
def test_text_that_two_splits_share_is_told(here, capfd, shared, told):
    rows = [f"row number {i} of the training text" for i in range(100)]
    for name, some in (("train", rows), ("test", rows[:shared] + [f"a new row {i}" for i in range(10 - shared)])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in some))
    lines = []
    read_texts([here], ReadOptions(), lines.append)
    found = [line for line in lines if "is also in" in line]
    assert bool(found) == told
    if shared == 10:
        assert found == ["100% of test is also in train, so its loss says little."]


@pytest.mark.parametrize("missing, left", [("test", ("train", "valid")), ("valid", ("train", "test"))])
def test_a_split_that_is_missing_is_taken_from_the_training_text(here, missing, left):
    for k, name in enumerate(left):
        (here / f"{name}.txt").write_text(story(200, seed=k))
    prepare.main(["--from", "train.txt", f"{left[1]}.txt", "--to", "own"])
    parts = texts_of("own")
    given = {"valid": "val"}.get(left[1], left[1])
    assert parts[given] == (here / f"{left[1]}.txt").read_text()
    taken = {"valid": "val"}.get(missing, missing)
    assert parts["train"] + parts[taken] == (here / "train.txt").read_text()


def test_folders_named_train_and_test_among_others_are_no_splits(here):
    """A project may have such folders; its other files are not left out."""
    for name in ("train", "test", "src"):
        (here / name).mkdir()
        (here / name / "a.py").write_text(f"{name} = 1\n" * 400)
    splits, documents = read_texts([here], ReadOptions(), print)
    assert documents and b"".join(d for some in splits.values() for d in some).count(b"src = 1") == 400


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz", "x.parquet.gz", "x.parquet", "x.jsonl", "x.md"])
def test_files_of_every_kind_are_read_in_a_folder(here, name):
    path = here / "folder" / name
    path.parent.mkdir()
    plain = path.with_suffix("") if name.endswith(".gz") else path
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a text of its own"] * 30}), plain)
    else:
        plain.write_text('{"text": "a text of its own"}\n' * 30 if "json" in name else "a text of its own\n" * 30)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    splits, documents = read_texts([path.parent], ReadOptions(), print)
    assert documents == (".txt" not in name and ".md" not in name)
    assert b"".join(d for some in splits.values() for d in some).count(b"a text of its own") == 30


def test_code_with_a_file_named_train_is_no_split(here):
    (here / "train.py").write_text("x = 1\n" * 400)
    (here / "test.py").write_text("y = 2\n" * 400)
    splits, documents = read_texts([here], ReadOptions(), print)
    assert documents and len(splits["train"]) == 2  # both are in the training split


@pytest.mark.parametrize("text", ["a b c d e f\n", "hello, this is short. " * 3, "天地玄黄宇宙洪荒日月盈昃辰宿"])
def test_very_short_texts_give_three_splits(here, text):
    (here / "short.txt").write_text(text)
    prepare.main(["--from", "short.txt", "--to", "own", "--vocab-size", "257"])
    assert "".join(texts_of("own", "bpe_vocab_257.json").values()) == text


@pytest.mark.parametrize("text, why", [("ab", "too short"), ("", "empty"), ("a", "too short")])
def test_texts_that_give_no_three_splits(here, capfd, text, why):
    (here / "short.txt").write_text(text)
    message = refusal(capfd, "--from", "short.txt", "--to", "own")
    assert why in message and "published" not in message
    assert not list((here / "own").glob("*.pt"))


# ----------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------

ROWS = ["first", "second\nline", "", "  spaces  ", "天地", f"a {END} b", "\U0001f600"] * 40


def write_rows(folder, kind):
    folder.mkdir(exist_ok=True)
    if kind.startswith("jsonl"):
        text = "\n\n".join(json.dumps({"id": i, "text": row}, ensure_ascii=i % 2 == 0) for i, row in enumerate(ROWS))
        path = folder / f"rows.{kind}"
        (gzip.open if kind.endswith(".gz") else open)(path, "wb").write(text.encode())
    else:
        path = folder / "rows.parquet"
        kinds = {"parquet": pyarrow.string(), "large": pyarrow.large_string(), "dictionary": pyarrow.string()}
        column = pyarrow.array([row or None for row in ROWS], kinds[kind])
        column = column.dictionary_encode() if kind == "dictionary" else column
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(ROWS))), "text": column}), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "large", "dictionary"])
def test_rows_are_documents(here, kind):
    """Each begins with END as one token; what looks like it within a row is plain text."""
    path = write_rows(here / "rows", kind)
    assert read_documents(path, ReadOptions()) == [row.encode() for row in ROWS if row]
    prepare.main(["--from", str(path), "--to", "own"])
    tokens, tokenizer = tokens_of("own")
    end, found = tokenizer.encode(END, [END]), []
    assert len(end) == 1
    for some in tokens.values():
        ids = some.ids.tolist()
        assert ids[0] == end[0]
        starts = [i for i, id in enumerate(ids) if id == end[0]]
        rows = [tokenizer.decode(ids[i + 1 : j]) for i, j in zip(starts, [*starts[1:], len(ids)])]
        for row, i in zip(map(tokenizer.encode, rows), starts):
            assert ids[i + 1 : i + 1 + len(row)] == row
        assert some.n_bytes == sum(len(row.encode()) for row in rows)
        assert some.start == end
        found += rows
    of_train = tokenizer.decode_bytes(tokens["train"].ids)
    rows, _ = read_texts([path], ReadOptions(), print)
    assert tokenizer.merges == BPETokenizer.train([row.decode() for row in rows["train"]], 4096).merges
    assert len(of_train) == sum(map(len, rows["train"])) + len(END) * len(rows["train"])
    assert sorted(found) == sorted(row for row in ROWS if row)


def test_files_of_a_folder_are_documents(here):
    folder = here / "a folder"
    (folder / "sub").mkdir(parents=True)
    contents = {f"{i:02}.txt": story(3, seed=i) for i in range(40)} | {"sub/x.md": "x" * 50, "empty.txt": ""}
    for name, text in contents.items():
        (folder / name).write_text(text)
    (folder / ".hidden").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "nowhere").symlink_to(folder / "gone")
    (folder / "linked.txt").symlink_to(folder / "sub" / "x.md")
    (folder / "around").symlink_to(folder)
    lines = []
    splits, documents = read_texts([folder], ReadOptions(), lines.append)
    assert documents
    expected = [text.encode() for text in contents.values() if text]
    assert sorted(d for some in splits.values() for d in some) == sorted(expected)
    left_out = next(line for line in lines if line.startswith("Left out: "))
    assert re.search(r"around \(a link .*, .*nowhere \(not a file\), .* and 3 more$", left_out)
    assert any("given twice: " in line and "x.md" in line for line in lines)


def test_separators_in_a_text(here):
    stories = [story(3, seed=i) for i in range(60)]
    (here / "stories.txt").write_text(f"\n{END}\n".join(stories))
    prepare.main(["--from", "stories.txt", "--to", "plain"])
    prepare.main(["--from", "stories.txt", "--to", "own", "--separator", f"\n{END}\n"])
    tokens, tokenizer = tokens_of("own")
    assert sum(some.ids.tolist().count(tokenizer.encode(END, [END])[0]) for some in tokens.values()) == 60
    assert sum(some.n_bytes for some in tokens.values()) == sum(len(text.encode()) for text in stories)
    tokens, tokenizer = tokens_of("plain")
    assert not any(tokenizer.encode(END, [END])[0] in some.ids.tolist() for some in tokens.values())


def test_a_text_that_holds_the_marker_is_told_of_it(here, capfd):
    (here / "stories.txt").write_text(f"a story {END} another " * 50)
    prepare.main(["--from", "stories.txt", "--to", "own"])
    assert "--separator" in capfd.readouterr().err


def test_another_column(here, capfd):
    with open(here / "rows.jsonl", "w") as file:
        for i in range(50):
            file.write(json.dumps({"title": "t", "body": f"body number {i}"}) + "\n")
    message = refusal(capfd, "--from", "rows.jsonl", "--to", "own")
    assert "line 1" in message and "title, body" in message and "--column" in message
    prepare.main(["--from", "rows.jsonl", "--to", "own", "--column", "body"])
    assert "body number 7" in "".join(texts_of("own").values())


def test_own_parquet_files_named_as_the_hub_names_them_are_not_glued(here):
    """WikiText's rows are the lines of one text; other rows are documents."""
    (here / "own").mkdir()
    for name in ("train", "validation", "test"):
        rows = [f"a row of {name}, number {i}" for i in range(20)] + [""]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), here / "own" / f"{name}-00000-of-00001.parquet")
    prepare.main(["--from", "own", "--to", "own"])
    tokens, tokenizer = tokens_of("own")
    ids = tokens["val"].ids.tolist()
    assert ids.count(tokenizer.encode(END, [END])[0]) == 20
    assert texts_of("own")["val"].split(END)[1:] == [f"a row of validation, number {i}" for i in range(20)]


@pytest.mark.parametrize("kind", ["damaged", "another column"])
def test_bad_parquet_files_named_as_the_hub_names_them(here, capfd, kind):
    for name in ("train", "validation", "test"):
        path = here / f"{name}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"body": [f"a row of {name} {i}" for i in range(9)]}), path)
        if kind == "damaged":
            path.write_bytes(path.read_bytes()[:-20])
    message = refusal(capfd, "--from", here, "--to", "own")
    assert ("not a complete parquet" if kind == "damaged" else "--column") in message and "WikiText" not in message
    if kind != "damaged":
        prepare.main(["--from", str(here), "--to", "own", "--column", "body", "--vocab-size", "300"])
        assert "a row of test 5" in texts_of("own", "bpe_vocab_300.json")["test"]


# ----------------------------------------------------------------------------------------------------------
# Formats
# ----------------------------------------------------------------------------------------------------------

LINES = ["first", 'with "quotes", commas; and\ttabs', "two\nlines", "  spaces  ", "天地", "café 😀"] * 5
TABLE = {"id": list(range(len(LINES))), "text": LINES}


def write_csv(path, delimiter):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("id", "text"), *zip(TABLE["id"], LINES)])


def write_stream(path):
    table = pyarrow.table(TABLE)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


RECORDS = [{"id": i, "text": line} for i, line in enumerate(LINES)]
TABLES = {
    "x.csv": lambda path: write_csv(path, ","), "semicolons.csv": lambda path: write_csv(path, ";"),
    "x.TSV": lambda path: write_csv(path, "\t"),
    "x.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "indented.json": lambda path: path.write_text(json.dumps(RECORDS, indent=2, ensure_ascii=False)),
    "columns.json": lambda path: path.write_text(json.dumps(TABLE)),
    "strings.json": lambda path: path.write_text(json.dumps(LINES)),
    "pandas.json": lambda path: path.write_text(json.dumps({"text": dict(enumerate(LINES))})),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
    "x.NDJSON": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
    "wiki_00": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
    "x.feather": lambda path: pyarrow.feather.write_feather(pyarrow.table(TABLE), path),
    "x.arrow": write_stream,
    "x.orc": lambda path: pyarrow.orc.write_table(pyarrow.table(TABLE), path),
    "no ending": lambda path: pyarrow.parquet.write_table(pyarrow.table(TABLE), path),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_tables_of_every_format(here, name):
    TABLES[name](here / name)
    assert read_documents(here / name, ReadOptions()) == [line.encode() for line in LINES]
    if name != "strings.json":
        assert read_documents(here / name, ReadOptions(column="text")) == [line.encode() for line in LINES]
        with pytest.raises(ValueError, match="no column body; it has .*--column|but there is none in "):
            find_and_check([here / name], ReadOptions(column="body"))


def find_and_check(paths, options):
    files = texts.find_files(paths, options, print)
    texts.check_options(options, files)
    for file in files:
        list(formats.read(file, options))


def test_what_datasets_saves_to_a_disk(here):
    saved = datasets.Dataset.from_dict(TABLE)
    saved.save_to_disk(here / "one", num_shards=2)
    datasets.DatasetDict(train=saved, validation=saved.select(range(9)), test=saved.select(range(7))).save_to_disk(
        here / "several")  # fmt: skip
    lines = []
    splits, documents = read_texts([here / "one"], ReadOptions(), lines.append)
    assert documents and sorted(d for some in splits.values() for d in some) == sorted(line.encode() for line in LINES)
    assert any("Left out" in line and "dataset_info.json" in line for line in lines)
    splits, documents = read_texts([here / "several"], ReadOptions(), lines.append)
    for split, n in zip(SPLITS, (len(LINES), 9, 7)):
        assert list(splits[split]) == [line.encode() for line in LINES[:n]]


def test_wikitext_that_datasets_saved_to_a_disk_is_wikitext(here):
    from test_data import HUB_NAMES, TEXTS

    rows = {name: ["" if line == " \n" else line for line in re.findall(r"[^\n]*\n", TEXTS[split])]
            for split, name in HUB_NAMES.items()}  # fmt: skip
    saved = {name: datasets.Dataset.from_dict({"text": some}) for name, some in rows.items()}
    datasets.DatasetDict(saved).save_to_disk(here / "wiki")
    prepare.main(["--from", "wiki", "--to", "own", "--vocab-size", "300"])
    assert texts_of("own", "bpe_vocab_300.json") == TEXTS


def pyarrow_compress(codec):
    def compress(content):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as file:
            file.write(content)
        return sink.getvalue().to_pybytes()

    return compress


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": pyarrow_compress("zstd"),
           "lz4": pyarrow_compress("lz4"),
           "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE)}  # fmt: skip


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_files(here, ending, capfd):
    text = story(300)
    packed = PACKERS[ending](text.encode())
    for name in (f"x.txt.{ending}", f"X.TXT.{ending.upper()}", *(["packed"] if ending != "lzma" else [])):
        (here / name).write_bytes(packed)
        assert read_documents(here / name, ReadOptions()) == [text.encode()]
    TABLES["no ending"](here / "x.parquet")
    (here / f"x.parquet.{ending}").write_bytes(PACKERS[ending]((here / "x.parquet").read_bytes()))
    assert read_documents(here / f"x.parquet.{ending}", ReadOptions()) == [line.encode() for line in LINES]
    (here / f"cut.txt.{ending}").write_bytes(packed[: len(packed) // 2])
    message = refusal(capfd, "--from", f"cut.txt.{ending}", "--to", "own")
    assert "incomplete" in message and formats.PACKINGS[f".{ending}"] in message
    if ending != "lzma":
        (here / f"plain.txt.{ending}").write_text(text)
        assert "though its name says so" in refusal(capfd, "--from", f"plain.txt.{ending}", "--to", "own")


def write_archive(path, contents):
    if ".zip" in path.name:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, {"gz": "w:gz", "tgz": "w:gz", "xz": "w:xz", "bz2": "w:bz2"}.get(
            path.name.lower().rpartition(".")[2], "w")) as archive:  # fmt: skip
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.xz", "X.TAR.BZ2", "archive"])
def test_archives_are_read_in_place(here, name, capfd):
    names = [f"ptb/ptb.{split}.txt" for split in ("train", "valid", "test")]
    contents = {name: story(40, seed=k).encode() for k, name in enumerate(names)}
    extra = {"ptb/picture.png": b"\x89PNG\r\n\x1a\n\0\0", "ptb/.ptb.train.txt": b"hidden " * 99,
             "../outside.txt": b"left out, since it is of no split"}  # fmt: skip
    (here / "from").mkdir()
    path = here / "from" / name
    write_archive(path, contents | extra)
    before = sorted(here.rglob("*"))
    for given in (path, path.parent):
        prepare.main(["--from", str(given), "--to", "own", "--vocab-size", "300"])
        assert list(texts_of("own", "bpe_vocab_300.json").values()) == [text.decode() for text in contents.values()]
        said = capfd.readouterr().err
        assert f"{name}/ptb/ptb.valid.txt" in said and "picture.png (a picture)" in said and "outside.txt" in said
    assert sorted(each for each in here.rglob("*") if "own" not in each.parts) == before
    assert not (here.parent / "outside.txt").exists()


def test_archives_in_archives(here, capfd):
    inner = {"a.txt": b"a text\n" * 90, "b.jsonl.gz": gzip.compress(b'{"text": "a row"}\n' * 9)}
    write_archive(here / "inner.tar.gz", inner)
    write_archive(here / "outer.zip", {"inner.tar.gz": (here / "inner.tar.gz").read_bytes()})
    splits, _ = read_texts([here / "outer.zip"], ReadOptions(), print)
    assert b"".join(d for some in splits.values() for d in some) == b"a text\n" * 90 + b"a row" * 9
    content = b"text"
    for _ in range(9):
        write_archive(here / "deep.zip", {"x.zip": content})
        content = (here / "deep.zip").read_bytes()
    assert "archive nested too deeply" in refusal(capfd, "--from", "deep.zip", "--to", "own")


def torch_file(path):
    torch.save({"a": torch.ones(3)}, path)


def zip_of(**contents):
    def make(path):
        write_archive(path.with_name("made.zip"), {name.replace("__", "/"): text for name, text in contents.items()})
        path.with_name("made.zip").rename(path)

    return make


REFUSED = {  # what it is called, and how it is made
    "x.pdf": ("PDF", b"%PDF-1.7\n%\xe2\xe3\n"), "x.7z": ("7z", b"7z\xbc\xaf\x27\x1c\0\4" + bytes(99)),
    "x.rar": ("RAR", b"Rar!\x1a\7\1\0" + bytes(9)), "x.rtf": ("Rich Text", b"{\\rtf1 hello}"),
    "x.doc": ("Office", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99)),
    "x.docx": ("Office", zip_of(**{"[Content_Types].xml": "<x/>", "word__document.xml": "<x/>"})),
    "x.xlsx": ("Excel", zip_of(**{"[Content_Types].xml": "<x/>", "xl__workbook.xml": "<x/>"})),
    "x.odt": ("OpenDocument", zip_of(mimetype="application/vnd.oasis.opendocument.text")),
    "x.epub": ("EPUB", zip_of(**{"mimetype": "application/epub+zip", "META-INF__container.xml": "<x/>"})),
    "x.db": ("SQLite", lambda path: sqlite3.connect(path).executescript("create table t(text)").close()),
    "x.pkl": ("pickle", pickle.dumps(LINES)), "x.npy": ("numpy", lambda path: np.save(path, np.arange(9))),
    "x.npz": ("numpy", lambda path: np.savez(path, a=np.arange(9))), "x.pt": ("torch", torch_file),
    "x.safetensors": ("safetensors", (16).to_bytes(8, "little") + b'{"a": [1, 2, 3]}' + bytes(50)),
    "x.png": ("picture", b"\x89PNG\r\n\x1a\n\0\0\0"), "x.txt": ("binary", random.Random(1).randbytes(5000)),
    "zeros.txt": ("binary", bytes(5000)), "x.Z": ("compress", b"\x1f\x9d\x90abc"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_its_name_and_left_out_of_folders(here, capfd, name):
    what, content = REFUSED[name]
    path = here / "folder" / name
    path.parent.mkdir()
    content(path) if callable(content) else path.write_bytes(content)
    for options in ([], ["--errors", "replace"], ["--encoding", "latin-1"]):
        message = refusal(capfd, "--from", path, "--to", "own", *options)
        assert name in message and what in message and ";" in message
    assert what in refusal(capfd, "--from", path.parent, "--to", "own")
    (path.parent / "novel.md").write_text(story(20))
    lines = []
    splits, _ = read_texts([path.parent], ReadOptions(), lines.append)
    assert b"".join(d for some in splits.values() for d in some) == story(20).encode()
    assert "Left out" in lines[0] and name in lines[0] and what in lines[0]


def test_tables_without_the_column_in_a_folder_are_left_out(here):
    """As package.json and numbers.csv in a folder of programs."""
    contents = {"a.txt": "a text\n" * 99, "package.json": "{}", "broken.json": "{// comment\n}", "n.csv": "a,b\n1,2\n",
                "count.json": '{"text": 5}', "empty.json": ""}  # fmt: skip
    for name, content in contents.items():
        (here / name).write_text(content)
    lines = []
    splits, documents = read_texts([here], ReadOptions(), lines.append)
    assert not documents and b"".join(d for some in splits.values() for d in some) == contents["a.txt"].encode()
    assert "and 2 more" in lines[0]


@pytest.mark.parametrize("name, content, words", [
    ("x.csv", "id,text\n1,a,b\n", "line 2"), ("x.csv", 'id,text\n1,"a\n', "not fit"), ("x.json", "[{", "valid JSON"),
    ("x.json", '[{"text": "a"}, {"text": "b"', "not valid JSON"), ("x.json", "[" * 100_000, "JSON"),
    ("x.json", '[{"text": "a"}, {"body": "b"}]', "item 2"), ("x.csv", "id,body\n1,a\n", "it has id, body"),
    ("x.json", '{"data": [{"text": "a"}]}', "it has data"), ("x.tsv", "id\tbody\n", "it has id, body"),
    ("x.feather", "ARROW1 nothing", "arrow"), ("x.orc", "ORC nothing", "orc"), ("x.zip", "PK\3\4 nothing", "damaged"),
])  # fmt: skip
def test_damaged_tables_and_archives(here, capfd, name, content, words):
    (here / name).write_text(content)
    message = refusal(capfd, "--from", name, "--to", "own")
    assert name in message and words in message


def test_options_that_apply_to_nothing(here, capfd):
    (here / "a.txt").write_text(story(20))
    (here / "b.md").write_text(story(20))
    TABLES["no ending"](here / "x.parquet")
    for args, words in ((["a.txt", "--column", "body"], "--column"), (["a.txt", "b.md", "--column", "text"], "1 more"),
                        (["x.parquet", "--separator", "x"], "--separator"),
                        (["x.parquet", "--encoding", "cp1252"], "--encoding"),
                        (["x.parquet", "--errors", "replace"], "--errors")):  # fmt: skip
        message = refusal(capfd, "--from", *args, "--to", "own")
        assert words in message and "leave it out" in message
    prepare.main(["--from", "a.txt", "x.parquet", "--column", "text", "--to", "own", "--vocab-size", "260"])
    prepare.main(["--from", "a.txt", "--separator", "nowhere", "--to", "own", "--vocab-size", "260"])
    assert "'nowhere' does not occur" in capfd.readouterr().err


def test_a_column_asks_for_json_in_a_text_file(here):
    (here / "x.txt").write_text(json.dumps([{"body": line} for line in LINES]))
    (here / "y.txt").write_text("\n".join(json.dumps({"body": line}) for line in LINES))
    for name in ("x.txt", "y.txt"):
        assert read_documents(here / name, ReadOptions(column="body")) == [line.encode() for line in LINES]
        assert len(read_documents(here / name, ReadOptions())) == 1  # not asked for: plain text


def test_rows_that_are_empty_are_told(here):
    (here / "x.jsonl").write_text('{"text": "a row"}\n{"text": ""}\n{"text": null}\n' * 9)
    lines = []
    read_texts([here / "x.jsonl"], ReadOptions(), lines.append)
    assert "Left out: 18 of 27 rows, since they are empty" in lines


def random_json(r, depth=0):
    kinds = [None, True, -1.5e3, 7, "", "longer than a few pieces of it, " * 2, 'te"xt \\ \n', "天地", "😀"]
    if depth < 3 and r.random() < 0.4:
        return [random_json(r, depth + 1) for _ in range(r.randrange(4))]
    if depth < 3 and r.random() < 0.4:
        return {str(i): random_json(r, depth + 1) for i in range(r.randrange(4))}
    return r.choice(kinds)


def test_json_in_pieces_of_any_size():
    r = random.Random(0)
    for _ in range(300):
        values = [value for value in (random_json(r, 1) for _ in range(5)) if not isinstance(value, float)]
        in_list = r.random() < 0.5 or any(isinstance(value, list) for value in values[:1])
        text = json.dumps(values, indent=r.choice([None, 2]), ensure_ascii=r.random() < 0.5)
        text = text if in_list else "\n".join(json.dumps(value, indent=r.choice([None, 1])) for value in values)
        size = r.randint(1, 30)
        pieces = iter([text[i : i + size] for i in range(0, len(text), size)])
        assert list(formats._json_values(pieces, "x")) == values, text


@pytest.mark.parametrize("separator", ["x", "\n", "---", "aab", "\n\n"])
def test_separators_in_pieces_of_any_size(separator):
    r = random.Random(1)
    for _ in range(300):
        text = "".join(r.choice(["a", "b", "-", "\n", separator]) for _ in range(40))
        size = r.randint(1, 12)
        pieces = (text[i : i + size] for i in range(0, len(text), size))
        found = list_of((piece.encode(), ends) for piece, ends in formats._split(pieces, separator))
        assert found == [part.encode() for part in text.split(separator) if part]


def test_files_are_read_in_chunks_of_any_size(here, monkeypatch):
    """With characters, lines, quotes and invalid bytes across the ends of chunks."""
    for name in ("x.csv", "x.json", "x.NDJSON"):
        TABLES[name](here / name)
    text = story(9) + "天地😀"
    for encoding in ("utf-8", "utf-16", "utf-32", "cp1252"):
        (here / f"{encoding}.txt").write_bytes(text.encode(encoding, "replace"))
    wrong = "line\n" * 20 + "天" * 7
    (here / "wrong.txt").write_bytes(wrong.encode() + b"\xff")
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(formats, "BLOCK", size)
        for name in ("x.csv", "x.json", "x.NDJSON"):
            assert read_documents(here / name, ReadOptions()) == [line.encode() for line in LINES]
        for encoding in ("utf-8", "utf-16", "utf-32", "cp1252"):
            expected = text.encode(encoding, "replace").decode(encoding).encode()
            options = ReadOptions(encoding=encoding)
            monkeypatch.setattr(formats, "encoding_of", lambda head, options: options.encoding)
            assert read_documents(here / f"{encoding}.txt", options) == [expected]
            monkeypatch.undo()
            monkeypatch.setattr(formats, "BLOCK", size)
        with pytest.raises(ValueError, match=f"line 21: byte 0xFF at offset {len(wrong.encode())} "):
            read_documents(here / "wrong.txt", ReadOptions())


# ----------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "~/here/a b.txt", "$HOME/here/a b.txt", "'a b.txt'", '"a b.txt"', " a b.txt\n", "a*.txt", "sub/../a b.txt",
    ".\\a b.txt", "file://{here}/a%20b.txt", "FILE:{here}/a%20b.txt", "{here}/a b.txt", "**/a?b.txt",
])  # fmt: skip
def test_names_mean_what_people_mean_by_them(here, monkeypatch, name):
    monkeypatch.setenv("HOME", str(here.parent))
    (here / "sub").mkdir()
    (here / "a b.txt").write_text("x")
    (found,) = texts.as_paths([name.format(here=here)])
    assert found.samefile(here / "a b.txt")


def test_several_names_in_one_argument(here):
    for name in ("a.txt", "b.txt", "c,d.txt", "[e].txt"):
        (here / name).write_text("x")
    assert texts.as_paths(["a.txt,b.txt"]) == texts.as_paths(["a.txt, b.txt"]) == [Path("a.txt"), Path("b.txt")]
    assert texts.as_paths(["c,d.txt", "[e].txt"]) == [Path("c,d.txt"), Path("[e].txt")]  # there are such files
    assert texts.as_paths(["[ab].txt"]) == [Path("a.txt"), Path("b.txt")]


@pytest.mark.parametrize("name", ["https://example.org/x.txt", "x*.txt", "~/gone", "a,b", "gone/", "x\0y", "hf://a/b"])
def test_names_of_nothing(here, capfd, name):
    assert repr(name).strip("'") in refusal(capfd, "--from", name, "--to", "own").replace("'", "")


def test_from_may_be_given_twice(here):
    for name in "ab":
        (here / f"{name}.txt").write_text(story(40, seed=ord(name)))
    prepare.main(["--from", "a.txt", "--from", "b.txt", "--to", "own", "--vocab-size", "300"])
    whole = "".join(texts_of("own", "bpe_vocab_300.json").values()).replace(END, "")
    assert whole == story(40, seed=ord("a")) + story(40, seed=ord("b"))


def test_separators_as_a_shell_passes_them(here):
    parts = [f"story number {i:04}" for i in range(400)]
    (here / "x.txt").write_text("\n---\n".join(parts))
    (here / "windows.txt").write_bytes("\r\n---\r\n".join(parts).encode())
    for name in ("x.txt", "windows.txt"):
        prepare.main(["--from", name, "--to", "own", "--separator", "\\n---\\n", "--vocab-size", "300"])
        found = "".join(texts_of("own", "bpe_vocab_300.json").values()).split(END)[1:]
        assert sorted(found) == sorted(parts)
    assert texts.separator_of("a\\tb\\\\n") == "a\tb\\n"


@pytest.mark.parametrize("name", ["utf8", "utf_8", "Utf16", "UTF-16LE", "utf16_le", "ansi", "Latin1", " cp1252"])
def test_names_of_encodings(here, name):
    codec = {"utf16": "utf-16", "utf-16le": "utf-16-le", "utf16_le": "utf-16-le", "ansi": "cp1252"}.get(
        name.lower(), name.strip())  # fmt: skip
    (here / "x.txt").write_bytes(story(30).encode(codec))
    prepare.main(["--from", "x.txt", "--to", "own", "--encoding", name, "--vocab-size", "300"])
    assert "".join(texts_of("own", "bpe_vocab_300.json").values()) == story(30)


def test_the_home_folder_in_the_name_of_a_dataset_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "x.txt").write_text(story(30))
    prepare.main(["--from=~/x.txt", "--to=~/own", "--vocab-size", "300"])
    assert len(data.load_tokens("bpe_vocab_300.json", "~/own")["train"]) > 0
    assert (here / "own" / "train_ids_300.pt").is_file()


@pytest.mark.parametrize("content", [story(60).encode(), gzip.compress(story(60).encode())])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_standard_input_and_pipes(here, monkeypatch, content):
    (here / "x").write_bytes(content)
    os.mkfifo(here / "pipe")
    for name in ("-", "pipe"):
        if name == "pipe":
            import threading

            writer = threading.Thread(target=(here / "pipe").write_bytes, args=(content,))
            writer.start()
        else:
            monkeypatch.setattr(sys, "stdin", open(here / "x", encoding="utf-8"))
        prepare.main(["--from", name, "--to", "own", "--vocab-size", "300"])
        assert "".join(texts_of("own", "bpe_vocab_300.json").values()) == story(60)
        assert data.load_tokens("bpe_vocab_300.json", "own")["train"].dataset == "stdin"
    writer.join()


def test_no_standard_input(here, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)
    assert "no standard input" in refusal(capfd, "--from", "-", "--to", "own")


def test_text_in_the_dataset_folder_itself(here, capfd):
    """Files that were made there before do not count as text."""
    (here / "own").mkdir()
    (here / "own" / "novel.txt").write_text(story(60))
    for _ in range(2):
        prepare.main(["--from", "own", "--to", "own", "--vocab-size", "300"])
        assert "".join(texts_of("own", "bpe_vocab_300.json").values()) == story(60)
    assert "bpe_vocab_300.json (made by prepare.py)" in capfd.readouterr().err


def test_links_to_folders_are_followed_once(here):
    (here / "a").mkdir()
    (here / "elsewhere").mkdir()
    (here / "a" / "x.txt").write_text("x" * 300)
    (here / "elsewhere" / "y.txt").write_text("y" * 300)
    (here / "a" / "train").mkdir()
    (here / "a" / "train" / "z.txt").write_text("z" * 300)
    for name, target in (("far", "../elsewhere"), ("far2", "../elsewhere"), ("up", ".."), ("self", "."), ("b", "c"),
                         ("c", "b"), ("another", "train")):  # fmt: skip
        (here / "a" / name).symlink_to(target)
    lines = []
    splits, _ = read_texts([here / "a"], ReadOptions(), lines.append)
    assert b"".join(d for some in splits.values() for d in some) == b"x" * 300 + b"y" * 300 + b"z" * 300
    assert "/another (a link to a folder that is read)" in lines[0] and "and 3 more" in lines[0]
    assert "/a/train/z.txt" in lines[-1]


# ----------------------------------------------------------------------------------------------------------
# Bytes and encodings
# ----------------------------------------------------------------------------------------------------------


def test_texts_are_kept_as_they_are(here):
    text = "\r\nline one\r\nnul \0 inside\n\ttab\n\x1c odd \u2028 " * 60
    (here / "odd name.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare.main(["--from", "odd name.txt", "--to", "my own"])
    assert "".join(texts_of("my own").values()) == text


def test_bytes_that_are_no_utf8(here, capfd):
    text = "line\n" * 99 + "caf\xe9 au lait\n" + "line\n" * 300
    (here / "latin.txt").write_bytes(text.encode("latin-1"))
    message = refusal(capfd, "--from", "latin.txt", "--to", "own")
    assert "latin.txt" in message and "line 100" in message and "0xE9" in message and "offset 498" in message
    prepare.main(["--from", "latin.txt", "--to", "own", "--encoding", "latin-1"])
    assert "".join(texts_of("own").values()) == text
    prepare.main(["--from", "latin.txt", "--to", "own", "--errors", "replace"])
    assert "".join(texts_of("own").values()) == text.replace("\xe9", "\ufffd")


def test_utf16(here, capfd):
    text = story(60)
    (here / "wide.txt").write_bytes(text.encode("utf-16"))
    (here / "plain.txt").write_text(text)
    for mark, codec in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
                        (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF8, "utf-8")):  # fmt: skip
        for encoding in ([], ["--encoding", "UTF-16"], ["--encoding", codec], ["--encoding", "utf8"]):
            (here / "wide.txt").write_bytes(mark + text.encode(codec))
            prepare.main(["--from", "wide.txt", "--to", "own", "--vocab-size", "300", *encoding])
            assert "".join(texts_of("own", "bpe_vocab_300.json").values()) == text
    (here / "wide.txt").write_bytes(text.encode("utf-16-le"))
    message = refusal(capfd, "--from", "wide.txt", "--to", "own")
    assert "--encoding utf-16-le" in message
    prepare.main(["--from", "wide.txt", "--to", "own", "--encoding", "utf-16-le"])
    assert "".join(texts_of("own").values()) == text


@pytest.mark.parametrize("name, content, words", [
    ("x.txt.gz", gzip.compress(b"abc " * 5000, mtime=0)[:40], "gzip"), ("x.txt.gz", b"abc", "gzip"),
    ("x.parquet", b"PAR1 nothing PAR1", "parquet"), ("x.jsonl", b'{"text": "a"}\nnonsense\n', "line 2"),
    ("x.jsonl", b'{"text": 5}\n', "not text"), ("x.jsonl", b"[" * 100_000, "not valid JSON"),
    ("x.jsonl", b'{"text": "\\ud800 alone"}\n', "surrogate"), ("x.jsonl", b'["a"]\n', "column text"),
    ("x.txt", b"\xff\xfea\0b", "utf-16"), ("x.jsonl", b"\xe9", "0xE9"),
])  # fmt: skip
def test_damaged_files(here, capfd, name, content, words):
    (here / name).write_bytes(content)
    message = refusal(capfd, "--from", name, "--to", "own")
    assert name in message and words in message and "published" not in message


def test_lone_surrogates_may_be_replaced(here):
    (here / "x.jsonl").write_text('{"text": "\\ud800 alone and a longer text"}\n' * 40)
    prepare.main(["--from", "x.jsonl", "--to", "own", "--errors", "replace"])
    assert "? alone" in "".join(texts_of("own").values())


@pytest.mark.parametrize("args, words", [
    (["--from", "gone.txt"], "gone.txt"), (["--from", ""], "--from"), (["--from", "empty"], "no text"),
    (["--from", "here.txt", "--encoding", "no"], "no"),
    (["--from", "here.txt", "--encoding", "base64"], "base64"), (["--sample", "--separator", "x"], "--separator"),
    (["--from", "here.txt", "--separator", ""], "--separator"),
    (["--from", "here.txt", "--to", "here.txt"], "here.txt"),
    (["--from", "here.txt", "--pattern", "gpt4"], "--pattern"),
    (["--from", "here.txt", "--dataset", "wikitext-2-v1"], "--dataset"),
    (["--from", "here.txt", "--to", "own", "--vocabulary", "gone.json"], "gone.json"),
    (["--from", "here.txt", "--to", "own", "--vocabulary", "here.txt"], "vocabulary"),
])  # fmt: skip
def test_wrong_commands(here, capfd, args, words):
    (here / "here.txt").write_text(story(30))
    (here / "empty").mkdir()
    assert words in refusal(capfd, *args)
    assert not list(here.rglob("*.pt"))


def test_a_file_that_cannot_be_read(here, capfd):
    path = here / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        pytest.skip("permissions do not bind this user")
    assert "cannot be read" in refusal(capfd, "--from", path, "--to", "own")


# ----------------------------------------------------------------------------------------------------------
# Dataset folders
# ----------------------------------------------------------------------------------------------------------


def test_a_dataset_folder_learns_its_own_vocabularies_and_leaves_data_alone(here, data_dir, capfd):
    before = {path.name: path.read_bytes() for path in data_dir.iterdir()}
    (here / "novel.txt").write_text(story(400))
    prepare.main(["--from", "novel.txt", "--to", "texts/novel"])
    out = capfd.readouterr().out
    assert "python v3.py DATA=texts/novel" in out
    assert {path.name: path.read_bytes() for path in data_dir.iterdir()} == before
    for name, size in data.VOCABULARIES.items():
        tokens, tokenizer = tokens_of("texts/novel", name)
        train = tokenizer.decode(tokens["train"].ids.tolist())
        assert tokenizer.merges == BPETokenizer.train(train, size).merges


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_size_and_pattern_of_a_vocabulary(here, pattern, capfd):
    (here / "novel.txt").write_text(story(200))
    prepare.main(["--from", "novel.txt", "--to", "own", "--vocab-size", "300", "--pattern", pattern])
    assert "VOCABULARY=bpe_vocab_300.json" in capfd.readouterr().out
    tokens, tokenizer = tokens_of("own", "bpe_vocab_300.json")
    train = tokenizer.decode(tokens["train"].ids.tolist())
    assert tokenizer.merges == BPETokenizer.train(train, 300, pattern=pattern).merges
    assert tokenizer.fingerprint == BPETokenizer.train(train, 300, pattern=pattern).fingerprint


def test_a_vocabulary_from_elsewhere(here, data_dir):
    """As a run to be fine-tuned has it: it becomes the one that the rungs ask for."""
    (here / "run").mkdir()
    BPETokenizer.train(story(300, seed=9), 400).save(here / "run" / "vocabulary.json")
    (here / "novel.txt").write_text(story(200))
    for _ in range(2):
        prepare.main(["--from", "novel.txt", "--to", "own", "--vocabulary", "run/vocabulary.json"])
        tokens, tokenizer = tokens_of("own")
        assert tokenizer.fingerprint == BPETokenizer.load("run/vocabulary.json").fingerprint
        assert "".join(texts_of("own").values()) == story(200)
    prepare.main(["--from", "novel.txt", "--to", "own", "--vocabulary", str(data_dir / "bpe_vocab.json")])
    assert tokens_of("own")[1].vocab_size == 4096
    prepare.main(["--from", "novel.txt", "--vocabulary", "run/vocabulary.json"])  # into data/, next to its own
    assert tokens_of("data", "bpe_vocab_run.json")[1].fingerprint == tokenizer.fingerprint
    assert BPETokenizer.load(data_dir / "bpe_vocab.json").vocab_size == 4096


def test_an_own_text_in_data_keeps_the_vocabulary_and_is_told_of_dataset_folders(here, data_dir, capfd):
    (here / "novel.txt").write_text(story(400))
    prepare.main(["--from", "novel.txt"])
    assert "--to" in capfd.readouterr().err
    tokens, tokenizer = tokens_of("data")
    assert tokens["train"].dataset == "novel" and tokenizer.vocab_size == 4096


def test_wikitext_in_a_folder_of_its_own_is_wikitext(here):
    from test_data import TEXTS, write_text

    write_text(here / "wiki")
    prepare.main(["--from", "wiki", "--to", "own"])
    assert texts_of("own") == TEXTS
    assert tokens_of("own")[0]["train"].start == tokens_of("own")[1].encode(" \n =")


def test_a_text_without_words_has_no_perplexity_of_words(here):
    (here / "chinese.txt").write_text("天地玄黄宇宙洪荒，日月盈昃辰宿列张。" * 300)
    (here / "english.txt").write_text(story(300))
    for name, words in (("chinese", False), ("english", True)):
        prepare.main(["--from", f"{name}.txt", "--to", name, "--vocab-size", "300"])
        assert all((some.n_words > 0) == words for some in data.load_tokens("bpe_vocab_300.json", name).values())


def test_damage_in_a_dataset_folder_is_mended_by_the_command_that_is_advised(here):
    (here / "my novel.txt").write_text(story(200))
    prepare.main(["--from", "my novel.txt", "--to", "my own"])
    wanted = texts_of("my own")
    path = data.token_file("val", "bpe_vocab.json", "my own")
    for damage in (path.unlink, lambda: path.write_bytes(b"x"), lambda: path.write_bytes(path.read_bytes()[:-100])):
        damage()
        with pytest.raises((OSError, ValueError), match="my own/val_ids.pt") as caught:
            data.load_tokens("bpe_vocab.json", "my own")
        command = str(caught.value).rpartition("again with ")[2]
        assert command.startswith("python data/prepare.py ")
        prepare.main(shlex.split(command)[2:])
        assert texts_of("my own") == wanted


def test_each_vocabulary_of_a_dataset_folder_is_mended_by_the_command_that_made_it(here):
    (here / "novel.txt").write_text(story(200))
    prepare.main(["--from", "novel.txt", "--to", "own"])
    prepare.main(["--from", "novel.txt", "--to", "own", "--vocab-size", "300"])
    for vocabulary in (*data.VOCABULARIES, "bpe_vocab_300.json"):
        wanted = texts_of("own", vocabulary)
        data.token_file("test", vocabulary, "own").unlink()
        with pytest.raises(FileNotFoundError) as caught:
            data.load_tokens(vocabulary, "own")
        prepare.main(shlex.split(str(caught.value).rpartition("again with ")[2])[2:])
        assert texts_of("own", vocabulary) == wanted


def test_a_dataset_folder_that_is_not_there(here):
    with pytest.raises(FileNotFoundError, match=r"--to nowhere$"):
        data.load_tokens("bpe_vocab.json", "nowhere")
    (here / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="the folder has none"):
        data.load_tokens("bpe_vocab.json", "empty")


def test_a_vocabulary_that_is_not_there(here, data_dir):
    """What is said to learn it does, in data/ as in another dataset folder."""
    (here / "novel.txt").write_text(story(60))
    with pytest.raises(FileNotFoundError, match=r"bpe_vocab_4k\.json; the folder has [^;]*$"):
        data.load_tokens("bpe_vocab_4k.json")
    for folder in ("data", "own"):
        if folder == "own":
            prepare.main(["--from", "novel.txt", "--to", "own"])
        with pytest.raises(FileNotFoundError) as caught:
            data.load_tokens("bpe_vocab_300.json", folder)
        advice = str(caught.value).rpartition("to learn it: ")[2].removesuffix(
            " (and with --from or --dataset, if you gave them)")  # fmt: skip
        more = ["--from", "novel.txt"] if folder == "data" else []
        prepare.main([*shlex.split(advice.replace("TEXT", "novel.txt"))[2:], *more])
        assert len(data.load_tokens("bpe_vocab_300.json", folder)["val"]) > 0


def test_a_dataset_folder_below_the_repository_is_found_from_elsewhere(here, data_dir, tmp_path):
    (data_dir.parent / "texts").mkdir()
    (here / "novel.txt").write_text(story(60))
    prepare.main(["--from", "novel.txt", "--to", str(data_dir.parent / "texts" / "novel")])
    assert data.load_tokens("bpe_vocab.json", "texts/novel")["train"].dataset == "novel"


def test_samples_begin_as_the_text_does(here):
    cases = {"chapter.txt": ("Chapter 1\n\n" + story(60), "Chapter 1\n"), "words.txt": (story(60), None),
             "chinese.txt": ("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏" * 100, None)}  # fmt: skip
    for name, (text, start) in cases.items():
        (here / name).write_text(text)
        prepare.main(["--from", name, "--to", f"{name} tokens", "--vocab-size", "257"])
        tokens, tokenizer = tokens_of(f"{name} tokens", "bpe_vocab_257.json")
        began = tokenizer.decode(tokens["train"].start)
        assert text.startswith(began) and "\ufffd" not in began and 8 <= len(tokens["train"].start) <= 12


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_large_texts_in_pieces(here, monkeypatch, pattern):
    """With words, white space and characters across the ends of pieces, in one text and in documents."""
    text = story(300).replace("lamp", "lamp \n\n ") + "天地 " * 99
    (here / "novel.txt").write_text(text)
    (here / "rows.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("lamp")))
    for name in ("novel.txt", "rows.jsonl"):
        prepare.main(["--from", name, "--to", "whole", "--vocab-size", "400", "--pattern", pattern])
        with monkeypatch.context() as patch:
            patch.setattr(texts, "BLOCK", 100)
            prepare.main(["--from", name, "--to", "own", "--vocab-size", "400", "--pattern", pattern])
        tokens, tokenizer = tokens_of("own", "bpe_vocab_400.json")
        wanted, whole = tokens_of("whole", "bpe_vocab_400.json")
        assert tokenizer.fingerprint == whole.fingerprint
        for split in SPLITS:
            assert tokens[split].ids.tolist() == wanted[split].ids.tolist()
            assert (tokens[split].n_bytes, tokens[split].n_words) == (wanted[split].n_bytes, wanted[split].n_words)
    parts = texts_of("whole", "bpe_vocab_400.json")
    for split in SPLITS:
        documents = parts[split].split(END)[1:]
        assert wanted[split].n_words == sum(len(part.split()) + part.count("\n") for part in documents)


def test_from_a_novel_to_its_continuation(here):
    """The two commands of the README, in a process each."""
    (here / "novel.txt").write_text(story(600))

    def python(*args):
        done = forks.run(args, cwd=here)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python(ROOT / "data" / "prepare.py", "--from", "novel.txt", "--to", "data/novel")
    constants = ["DATA=data/novel", "N_LAYER=1", "N_EMBD=32", "N_HEAD=2", "BLOCK_SIZE=32", "MICRO_BATCH_SIZE=16",
                 "MAX_STEPS=4", "SAMPLE_TOKENS=8", "COMPILE=False", "DEVICE=cpu", "STRIDE=16"]  # fmt: skip
    assert "v3 on novel" in python(ROOT / "v3.py", *constants)
    assert python(ROOT / "v3.py", "PROMPT=The lamp", "SAMPLE_TOKENS=5", "DEVICE=cpu").startswith("The lamp")
    model, tokenizer = harness.load(here / "runs" / "v3")
    assert model(torch.tensor([tokenizer.encode("The lamp")])).shape[-1] == tokenizer.vocab_size


def test_reading_leaves_nothing_behind_of_a_failed_preparation(here, capfd):
    (here / "novel.txt").write_text(story(100))
    prepare.main(["--from", "novel.txt", "--to", "own"])
    before = {path.name: path.read_bytes() for path in (here / "own").iterdir()}
    (here / "novel.txt").write_text("ab")
    refusal(capfd, "--from", "novel.txt", "--to", "own")
    assert {path.name: path.read_bytes() for path in (here / "own").iterdir()} == before


@pytest.mark.parametrize("content, encoding, binary", [
    (b"\0\1", "utf-8", True), (b"text", "utf-8", False), ("wide".encode("utf-16"), "utf-16", False),
    (bytes(range(256)) * 50, "latin-1", True), (bytes(range(256)) * 50, "cp1252", True),
    ("Éloïse à l'école".encode("latin-1") * 50, "latin-1", False), ("Привет".encode("cp1251") * 50, "utf-8", False),
    (b"a text with one \0 in it, and more", "utf-8", False), (b"\x1b[31mred\x1b[0m of a log\n" * 9, "utf-8", False),
])  # fmt: skip
def test_binary_files_are_told_from_texts(content, encoding, binary):
    assert formats.is_binary(content, encoding) == binary


MEASURED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bpe.pretokens
from data import prepare

bpe.pretokens.BLOCK_BYTES = 1 << 16  # the encoder collects 32 of them, and the shorter text must fill these

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) >> 10

for name in sys.argv[2:]:
    prepare.main(["--from", name, "--to", "own", "--vocab-size", "280"])
    print("peak", peak())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell the memory in use")
def test_memory_does_not_grow_with_the_text(here):
    text = story(1000)
    rows = "".join(json.dumps({"text": text[i : i + 3000]}) + "\n" for i in range(0, len(text), 3000))
    for ending, part in (("txt", text), ("jsonl", rows)):
        for name, size in (("small", 4), ("large", 24)):
            (here / f"{name}.{ending}").write_text(part * round(size * 1e6 / len(part.encode())), encoding="utf-8")
    names = ["small.txt", "small.jsonl", "large.txt", "large.jsonl"]
    done = forks.run(["-c", MEASURED, ROOT, *names], cwd=here)
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    assert peaks[3] - peaks[1] < 14, peaks  # MB; held whole, the larger texts take 20 MB more, and their ids 25
