"""Data sets of the Hugging Face hub: data/hub.py and its command line, on local folders with the layout of the hub's
repositories, which the `datasets` package reads in the same way."""

import json
import random
import re
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

import data
from bpe_tokenizer import BPETokenizer
from data import hub, prepare, texts
from data.formats import ReadOptions
from harness.errors import UserError
from test_data import as_data_dir, no_network  # noqa: F401 - a fixture
from test_texts import END, refusal, story, texts_of

SPLITS = data.SPLITS


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder for a test, next to a copy of data/."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with as_data_dir(tmp_path / "data"):
        yield folder


def stories(n, seed=0):
    return [f"{seed}, {i}. {story(2, seed * 1000 + i)}" for i in range(n)]


def write(folder, splits, configs=None, **columns):
    """A data set: {split: its texts, or None where the column text is not wanted}. configs: {name: its folder}."""
    for place in (configs or {"": ""}).values():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            table = {name: value(rows) for name, value in columns.items()}
            table |= {} if "text" in columns else {"text": rows}
            table = {name: value for name, value in table.items() if value is not None}
            pyarrow.parquet.write_table(pyarrow.table(table), folder / place / f"{split}-00000-of-00001.parquet")
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {f'{place}/' if place else ''}{split}-*\n" for split in splits)
        for name, place in (configs or {"default": ""}).items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    return folder


def make(*args):
    """{split: its documents}, or pieces of its text, that the command line would tokenize."""
    with pytest.MonkeyPatch.context() as patch:
        sources = []
        patch.setattr(prepare, "prepare", lambda source, *args, **kwargs: sources.append(source))
        prepare.main(["--dataset", *map(str, args), "--to", "out", "--vocab-size", "260"])
    return {split: [text if isinstance(text, str) else "".join(text) for text in texts_of_split()]
            for split, (_, texts_of_split) in sources[0].items()}  # fmt: skip


def n_bytes(documents):
    return sum(len(text.encode()) for text in documents)


# ----------------------------------------------------------------------------------------------------------
# Splits
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [(), ("--max-bytes", "1G")])
def test_named_splits_are_taken_as_they_are(here, streamed):
    rows = {"train": stories(60, 1), "validation": stories(5, 2), "test": stories(6, 3)}
    found = make(write(here / "set", rows), *streamed)
    assert found == {"train": rows["train"], "val": rows["validation"], "test": rows["test"]}


def test_the_split_that_is_missing_is_taken_from_train(here):
    rows = {"train": stories(100, 1), "validation": stories(5, 2)}
    found = make(write(here / "set", rows))
    assert found["val"] == rows["validation"]
    assert sorted(found["train"] + found["test"]) == sorted(rows["train"])
    assert 0.03 < n_bytes(found["test"]) / n_bytes(rows["train"]) < 0.07


@pytest.mark.parametrize("name", ["train", "test", "en"])
def test_a_single_split_is_cut_by_documents(here, name):
    rows = stories(200)
    found = make(write(here / "set", {name: rows}))
    assert sorted(sum(found.values(), [])) == sorted(rows)
    for split in ("val", "test"):
        assert 0.03 < n_bytes(found[split]) / n_bytes(rows) < 0.07


def test_a_split_that_is_none_of_the_three_is_left_out_and_said_so(here, capfd):
    rows = {"train": stories(60, 1), "test": stories(5, 2), "unsupervised": stories(50, 3)}
    found = make(write(here / "set", rows))
    assert not set(rows["unsupervised"]) & set(sum(found.values(), []))
    assert re.search("Left out.*unsupervised", capfd.readouterr().err)
    found = make(write(here / "two", {"train": rows["train"], "unsupervised": rows["unsupervised"]}))
    assert sorted(sum(found.values(), [])) == sorted(rows["train"])
    assert re.search("Left out.*unsupervised", capfd.readouterr().err)


def test_names_with_more_than_the_split(here):
    rows = {"train_a": stories(60, 1), "test_a": stories(5, 2), "train_b": stories(50, 3), "test_b": stories(4, 4)}
    found = make(write(here / "set", rows))
    assert found["test"] == rows["test_a"] + rows["test_b"]
    assert sorted(found["train"] + found["val"]) == sorted(rows["train_a"] + rows["train_b"])


@pytest.mark.parametrize("names", [("en", "de"), ("validation", "test"), ("train_a", "train_b")])
def test_splits_that_say_nothing_must_be_chosen(here, capfd, names):
    rows = {name: stories(100, k) for k, name in enumerate(names)}
    line = refusal(capfd, "--dataset", write(here / "set", rows), "--to", "out")
    assert all(name in line for name in names) and "--split" in line and not Path("out").exists()
    assert sorted(sum(make("set", "--split", names[1]).values(), [])) == sorted(rows[names[1]])
    assert sorted(sum(make("set", "--split", *names).values(), [])) == sorted(sum(rows.values(), []))


def test_one_of_named_splits_is_cut(here):
    rows = {"train": stories(60, 1), "validation": stories(80, 2)}
    assert sorted(sum(make(write(here / "set", rows), "--split", "validation").values(), [])) == sorted(
        rows["validation"])  # fmt: skip


def test_a_split_that_is_not_there(here, capfd):
    line = refusal(capfd, "--dataset", write(here / "set", {"train": stories(3), "validation": stories(3)}), "--split",
                   "dev")  # fmt: skip
    assert "'dev'" in line and "--split takes train, validation" in line


# ----------------------------------------------------------------------------------------------------------
# Configs, columns, rows
# ----------------------------------------------------------------------------------------------------------


def test_a_config_that_must_be_chosen(here, capfd):
    names = {f"2023.{language}": language for language in ("simple", "en", "de")}
    folder = write(here / "set", {"train": stories(100)}, names)
    line = refusal(capfd, "--dataset", folder)
    assert all(name in line for name in names) and "--config" in line
    line = refusal(capfd, "--dataset", folder, "--config", "de")
    assert "--config takes 2023.de," in line  # the likeliest first
    assert prepare.open_source(dataset="set", config="2023.de")[1] == "set/2023.de"


def test_a_line_names_some_of_many():
    line = hub._some([f"c{i}" for i in range(300)], "C299")
    assert line.startswith("c299, ") and line.endswith(" and 292 more")
    assert hub._some(["b", "a"]) == "b, a"


@pytest.mark.parametrize("streamed", [(), ("--max-bytes", "1G")])
def test_a_column_of_another_name(here, capfd, streamed):
    folder = write(here / "set", {"train": stories(100)}, text=lambda rows: None, body=lambda rows: rows,
                   stars=lambda rows: list(range(len(rows))), tags=lambda rows: [["a"]] * len(rows))  # fmt: skip
    line = refusal(capfd, "--dataset", folder, *streamed)
    assert "no column text" in line and "it has body (and stars, tags, without text)" in line and "--column" in line
    for column in ("stars", "tags"):
        line = refusal(capfd, "--dataset", folder, "--column", column, *streamed)
        assert f"column {column}" in line and "no text" in line and "it has body" in line
    assert sorted(sum(make(folder, "--column", "body", *streamed).values(), [])) == sorted(stories(100))


def test_no_column_of_text(here, capfd):
    folder = write(here / "set", {"train": stories(9)}, text=lambda rows: None, n=lambda rows: list(range(len(rows))))
    line = refusal(capfd, "--dataset", folder)
    assert "none of its columns (n) holds text" in line and "--column" not in line


@pytest.mark.parametrize("streamed", [(), ("--max-bytes", "1G")])
def test_columns_that_only_the_rows_tell(here, capfd, streamed):
    """Tables of JSON have no types in their heads."""
    (here / "set").mkdir()
    rows = [{"story": text, "meta": {"n": i}} for i, text in enumerate(stories(100))]
    (here / "set" / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line = refusal(capfd, "--dataset", "set", *streamed)
    assert "no column text" in line and "it has story (and meta, without text)" in line
    assert "holds no text" in refusal(capfd, "--dataset", "set", "--column", "meta", *streamed)
    assert sorted(sum(make("set", "--column", "story", *streamed).values(), [])) == sorted(stories(100))


def test_empty_and_missing_rows_are_left_out_and_said_so(here, capfd):
    rows = stories(100)
    found = make(write(here / "set", {"train": rows[:50] + ["", None] + rows[50:]}))
    assert sorted(sum(found.values(), [])) == sorted(rows)
    assert "2 of 102 rows" in capfd.readouterr().err


def test_a_data_set_without_text(here, capfd):
    write(here / "set", {"train": ["", None, ""]})
    assert "it is empty" in refusal(capfd, "--dataset", "set")


def test_text_is_taken_exactly_as_it_is(here):
    rows = [f"{text}\r\nÆr\u2028 東京 \t\n" for text in stories(60)]
    splits = {"train": rows, "validation": rows[:3], "test": rows[:2]}
    assert make(write(here / "set", splits)) == dict(zip(SPLITS, splits.values()))
    prepare.main("--dataset set --to out --vocab-size 260".split())
    assert texts_of("out", "bpe_vocab_260.json") == {
        split: "".join(END + text for text in some) for split, some in zip(SPLITS, splits.values())}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Text files
# ----------------------------------------------------------------------------------------------------------


def test_text_files_are_not_cut_into_lines(here):
    """The `datasets` package would make a row of each line, without its end."""
    (here / "set").mkdir()
    books = {f"book{i:02}.txt": story(30, i, "\r\n\r\n" if i % 2 else "\n\n") for i in range(40)}
    for name, text in books.items():
        (here / "set" / name).write_bytes(text.encode())
    assert sorted(sum(make("set").values(), [])) == sorted(books.values())


def test_a_single_text_file_is_one_text(here):
    (here / "set").mkdir()
    text = story(400)
    (here / "set" / "input.txt").write_text(text)
    assert "".join(sum(make("set").values(), [])) == text
    assert sorted(sum(make("set", "--separator", r"\n\n").values(), [])) == sorted(text.split("\n\n")[:-1])


def test_text_files_of_splits(here):
    (here / "set").mkdir()
    rows = {"train": story(200, 1), "validation": story(9, 2), "test": story(8, 3)}
    for name, text in rows.items():
        (here / "set" / f"{name}.txt").write_text(text)
    assert ["".join(pieces) for pieces in make("set").values()] == list(rows.values())


def test_a_file_of_the_hub_that_cannot_be_read_on(monkeypatch):
    class Broken:
        def __init__(self, *args):
            self.n = 0

        open = lambda self: self  # noqa: E731

        def read(self, size):
            self.n += 1
            if self.n > 3:
                raise RuntimeError("the peer\nis gone")
            return b"one line\n"

        def close(self):
            pass

    import fsspec

    monkeypatch.setattr(fsspec, "open", Broken)
    file = hub._text_file("owner/set", "hf://datasets/owner/set@" + "0" * 40 + "/folder/a.txt")
    assert file.name == "owner/set/folder/a.txt"
    with pytest.raises(ConnectionError, match="owner/set/folder/a.txt.*the peer") as caught:
        list(file.chunks())
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------
# --max-bytes
# ----------------------------------------------------------------------------------------------------------


def pieces_of(documents, size=10**9):
    for text in documents:
        for first in range(0, len(text), size):
            yield text[first : first + size], first + size >= len(text)


def spent(documents, n, size=10**9):
    """What of documents a budget of `n` bytes takes, [document]."""
    parts, taken = [b""], []
    for piece, ends in texts.Budget(n, 1).spent_on(pieces_of(documents, size)):
        parts[-1] += piece
        if ends:
            taken.append(parts.pop())
            parts.append(b"")
    assert parts == [b""]
    return taken


def test_a_budget_takes_whole_documents():
    documents = [b"a" * 10, b"b" * 20, b"c" * 30, b"d"]
    for n, taken in ((30, 2), (59, 2), (60, 3), (61, 4), (999, 4), (10, 1)):
        assert spent(documents, n) == documents[:taken]
    assert spent(documents, None) == documents


def test_a_budget_cuts_a_document_that_is_too_long():
    text = "東京".encode() * 10
    for n in range(1, 60):
        for size in (1000, 7):
            (taken,) = spent([text, b"next"], n, size) if size > 7 or n >= 7 else (b"",)
            assert len(taken) <= n and text.startswith(taken)
            assert size == 7 or taken == text[: n // 3 * 3]


def test_no_more_is_read_than_max_bytes(here, monkeypatch, capfd):
    """Of splits that are named the held-out ones get their usual share."""
    rows = {"train": stories(2000, 1), "validation": stories(2000, 2)}
    write(here / "set", rows)
    read = []
    encoded = hub.encoded
    monkeypatch.setattr(hub, "encoded", lambda text, *args: read.append(text) or encoded(text, *args))
    found = make("set", "--max-bytes", "20K")
    assert 18_000 < n_bytes(sum(found.values(), [])) <= 20_000
    assert n_bytes(read) < 21_000  # the documents that do not fit
    assert found["val"] == rows["validation"][: len(found["val"])] and 700 < n_bytes(found["val"]) <= 1000
    both = found["train"] + found["test"]
    assert sorted(both) == sorted(rows["train"][: len(both)])
    make("set", "--split", "train", "validation", "--max-bytes", "20K")


def test_files_that_are_not_read_are_said(here, capfd):
    write(here / "set", {"en": stories(300, 1), "de": stories(300, 2)})
    found = make("set", "--split", "en", "de", "--max-bytes", "3e4")
    assert set(sum(found.values(), [])) <= set(stories(300, 1))
    lines = capfd.readouterr().err
    assert re.search("Not read, since --max-bytes.*the split de", lines)
    assert re.search("train: a part of the split en of set \\(", lines)


def test_max_bytes_of_files(here):
    (here / "novel.txt").write_text(story(300))
    prepare.main("--from novel.txt --to out --vocab-size 260 --max-bytes 12_345".split())
    found = texts_of("out", "bpe_vocab_260.json")
    assert "".join(found[split] for split in SPLITS) == story(300).encode()[:12_345].decode(errors="ignore")


@pytest.mark.parametrize("text, n", {"20000": 20_000, "20_000": 20_000, "2e4": 20_000, "20k": 20_000, "20KB": 20_000,
                                     "1.5M": 1_500_000, "2 GB": 2 * 10**9, "1T": 10**12}.items())  # fmt: skip
def test_sizes(text, n):
    assert prepare.size(text) == n


@pytest.mark.parametrize("text", ["", "0", "-5", "many", "10", "1.2.3", "5X", "1e99999", "_", "nan", "inf"])
def test_sizes_that_are_none(here, capfd, text):
    line = refusal(capfd, "--dataset", "owner/set", f"--max-bytes={text}")
    assert "--max-bytes" in line and "10,000 or more" in line


# ----------------------------------------------------------------------------------------------------------
# Names, and data sets that cannot be had
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--max-bytes", "1M"], ["--config", "en", "--split", "train"]])
def test_without_the_hub_there_is_one_line(here, capfd, monkeypatch, options):
    monkeypatch.delenv("HF_HUB_OFFLINE")  # nothing answers at its endpoint
    for module in (datasets.config, huggingface_hub.constants):  # as if they were imported while it was in reach
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    line = refusal(capfd, "--dataset", "roneneldan/TinyStories", "--to", "out", *options)
    assert "roneneldan/TinyStories" in line and "--from DIR" in line and "the hub cannot be reached" in line
    assert capfd.readouterr() == ("", "") and not Path("out").exists()
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # nothing waits for it


def test_without_the_hub_the_cache_is_used(here, capfd, monkeypatch):
    rows = {"train": stories(60, 1), "validation": stories(5, 2), "test": stories(6, 3)}
    cached = make(write(here / "set", rows))
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert make("set") == cached
    assert make("set", "--max-bytes", "1M") == cached
    assert "cannot be reached" in refusal(capfd, "--dataset", "another")


ERRORS = {
    "private": (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
                "no data set a/b.*private.*hf auth login"),
    "gated": (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated."),
              "gated.*https://huggingface.co/datasets/a/b.*hf auth login"),
    "script": (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "program.*--from DIR"),
    "script, datasets 3": (ValueError("It contains custom code.\nPass `trust_remote_code=True`"), "program"),
    "files": (DataFilesNotFoundError("No (supported) data files found"), "no text files.*--from DIR"),
    "disk": (OSError(28, "No space left on device"), "disk.*--max-bytes"),
    "space": (OSError("Not enough disk space. Needed: 3 TB"), "disk.*--max-bytes"),
    "server": (HfHubHTTPError.__new__(HfHubHTTPError), "could not be loaded"),
    "no words": (TimeoutError(), "could not be loaded .TimeoutError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.filterwarnings("ignore")
def test_errors_of_the_package_have_one_line(here, capfd, monkeypatch, kind):
    error, expected = ERRORS[kind]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(prepare, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
    assert re.search(expected, refusal(capfd, "--dataset", "a/b"))


def test_an_error_while_rows_are_read_has_one_line(here, capfd, monkeypatch):
    write(here / "set", {"train": stories(600)})

    def broken(self, *args, **kwargs):
        yield {"text": ["one"]}
        raise OSError("the connection\nis gone")

    monkeypatch.setattr(datasets.IterableDataset, "iter", broken)
    line = refusal(capfd, "--dataset", "set", "--max-bytes", "1M")
    assert "set could not be loaded (the connection)" in line and not Path("out").exists()


def test_a_mistake_in_our_own_code_keeps_its_traceback(here, monkeypatch):
    write(here / "set", {"train": stories(60)})
    monkeypatch.setattr(hub, "encoded", lambda *args: {}["mistake"])
    with pytest.raises(KeyError):
        make("set")


@pytest.mark.parametrize("config", [(), ("--config", "default")])
def test_no_code_of_a_data_set_is_run(here, capfd, config, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True, raising=False)
    (here / "set").mkdir()
    (here / "set" / "set.py").write_text(f"open({str(here / 'ran')!r}, 'w')\n")
    assert "program" in refusal(capfd, "--dataset", "set", *config)
    assert not (here / "ran").exists() and datasets.config.HF_DATASETS_TRUST_REMOTE_CODE is False


@pytest.mark.parametrize("name", ["https://huggingface.co/datasets/a/b", "https://huggingface.co/datasets/a/b/viewer/en",
                                  "hf://datasets/a/b", "a/b"])  # fmt: skip
def test_an_address_is_a_name(name):
    assert hub.name_of(name) == "a/b"


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "~/a", "https://example.com/a", "text", "json", "parquet"])
def test_names_of_nothing(here, capfd, name):
    (here / "a.txt").write_text(story(9))  # the package would read it for "text"
    assert "OWNER/NAME" in refusal(capfd, "--dataset", name)


def test_a_folder_with_the_name_of_a_format(here):
    rows = {"train": stories(60, 1), "validation": stories(5, 2), "test": stories(6, 3)}
    assert make(write(here / "json", rows).name)["val"] == rows["validation"]


def test_what_the_other_option_reads(here, capfd):
    (here / "novel.txt").write_text(story(9))
    assert "read it with --from novel.txt" in refusal(capfd, "--dataset", "novel.txt")
    datasets.Dataset.from_dict({"text": stories(9)}).save_to_disk(here / "saved")
    assert "read it with --from saved" in refusal(capfd, "--dataset", "saved")
    (here / "empty").mkdir()
    assert "--from DIR" in refusal(capfd, "--dataset", "empty")


@pytest.mark.parametrize("options, expected", {
    "--dataset a/b --from novel.txt": "leave one",
    "--config x": "--dataset OWNER/NAME", "--split x --sample": "--dataset OWNER/NAME",
    "--dataset wikitext-2-v1 --split test": "wikitext-2-v1 has no such parts",
    "--dataset wikitext-2-v1 --max-bytes 1M": "--max-bytes", "--max-bytes 1M": "--dataset",
    "--dataset a/b --sample": "leave", "--dataset Salesforce/wikitext": "wikitext-103-raw-v1",
    "--dataset wikitext --config all": "wikitext-103-raw-v1", "--dataset wikitext2": "wikitext-2-v1",
}.items())  # fmt: skip
def test_options_that_do_not_go_together(here, capfd, options, expected):
    (here / "novel.txt").write_text(story(9))
    assert expected in refusal(capfd, *options.split())


def test_wikitext_by_its_name_at_the_hub_is_wikitext(here, monkeypatch):
    """Its rows are lines, not documents."""
    asked = []
    monkeypatch.setattr(prepare, "hub_source", lambda dataset: asked.append(dataset) or prepare.sample_source())
    for name in ("Salesforce/wikitext", "wikitext"):
        prepare.main(["--dataset", name, "--config", "wikitext-103-raw-v1", "--to", "out", "--vocab-size", "260"])
    assert asked == ["wikitext-103-raw-v1"] * 2


# ----------------------------------------------------------------------------------------------------------
# Token files
# ----------------------------------------------------------------------------------------------------------


def test_vocabularies_and_the_command_that_made_the_files(here):
    write(here / "set", {"train": stories(100)})
    prepare.main(["--dataset", "set", "--to", "own"])
    tokens = data.load_tokens("bpe_vocab.json", "own")
    assert tokens["train"].dataset == "set" and len(tokens["train"].start) == 1
    committed = data.DATA_DIR / "bpe_vocab.json"
    prepare.main(["--dataset", "set", "--to", "other", "--vocabulary", str(committed)])
    assert data.load_tokens("bpe_vocab.json", "other")["train"].fingerprint == BPETokenizer.load(committed).fingerprint
    (here / "own" / "val_ids.pt").unlink()
    with pytest.raises(UserError) as caught:
        data.load_tokens("bpe_vocab.json", "own")
    assert str(caught.value).endswith("python data/prepare.py --dataset set --to own")


def test_rows_are_read_when_they_are_wanted(here, monkeypatch):
    """So that memory does not grow with the text."""
    rows = [random.Random(i).randbytes(2000).hex() for i in range(3000)]
    write(here / "set", {"train": rows})
    sizes = []
    monkeypatch.setattr(hub, "check_row", lambda value, place, column: sizes.append(int(place.rsplit(" ", 1)[1])))
    for max_bytes in (None, 10**9):
        files, found = hub.hub_files("set", None, None, ReadOptions(max_bytes=max_bytes), True, print)
        sizes.clear()
        reader = files[0].open()
        next(reader)
        assert sizes == [1] and found == [None]  # no row is read before it is wanted
        assert len(list(reader)) == len(rows) - 1
