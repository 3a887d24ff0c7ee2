"""Tests of data/: the sample, the sources, the token files, their damage, several processes, and the command line."""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tqdm import tqdm

import bpe.pretokens
import data
import forks
from bpe_tokenizer import BPETokenizer
from data import prepare
from harness.errors import FileError, UserError
from harness.files import file_lock

ROOT = Path(__file__).resolve().parents[1]
WIKITEXT = ROOT.parent / "shared" / "wikitext-2"
SMALL = "bpe_vocab_500.json"
HUB_NAMES = {"train": "train", "val": "validation", "test": "test"}
FILE_NAMES = {"train": "train", "val": "valid", "test": "test"}
AGAIN = "python data/prepare.py"


# ----------------------------------------------------------------------------------------------------------
# A data folder of its own, no network, a small text
# ----------------------------------------------------------------------------------------------------------


def make(folder=None, dataset=None, vocabularies=tuple(data.VOCABULARIES)):
    """What the command line does: open a source and tokenize it."""
    prepare.prepare(*prepare.open_source(folder, dataset), vocabularies)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Names of other machines are not looked up, the Hugging Face packages are offline and their caches empty."""
    asked = []
    look_up = socket.getaddrinfo

    def local_only(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost"):
            asked.append(host)
            raise OSError(f"a test asked for the network: {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")  # connect directly to the local sockets of these tests
    # These packages read the environment only once, when they are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "hf" / "modules")
    yield
    assert not asked


@contextlib.contextmanager
def as_data_dir_again(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DATA_DIR", folder)
        yield


@contextlib.contextmanager
def as_data_dir(folder):
    """Let data use `folder`, with a copy of the committed files, in place of data/."""
    folder.mkdir()
    for name in (*data.VOCABULARIES, prepare.SAMPLE):
        shutil.copy(ROOT / "data" / name, folder)
    with as_data_dir_again(folder):
        yield folder


@pytest.fixture
def data_dir(tmp_path):
    with as_data_dir(tmp_path / "data") as folder:
        yield folder


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.load(ROOT / "data" / SMALL)


def make_texts():
    """A text for each split, with what can go wrong: signs of many bytes, all kinds of spaces and line ends."""
    odd = (
        " \n = Ærøskøbing — 東京 = \n \n <unk> costs 5 @,@ 000 € ; naïve 😀 ².  Two  spaces \n"
        " a line\u2028separator , a\x85next line , no\u00a0break , a\r carriage return \r\n \n = = Part = = \n \n\n"
    )
    plain = " \n = Lamp {i} = \n \n The lamp of number {i} burned <unk> hours , it 's said . \n \n"
    text = {split: odd + "".join(plain.format(i=i * k) for i in range(30)) for k, split in enumerate(data.SPLITS, 1)}
    text["train"] += plain.format(i=7) * 1000  # more rows than are read at a time
    return text


TEXTS = make_texts()


@pytest.fixture(scope="module")
def expected(tokenizer):
    """(ids, bytes, words) of each split, straight from the definitions."""
    return {
        split: (tokenizer.encode(text), len(text.encode()), len(text.split()) + text.count("\n"))
        for split, text in TEXTS.items()
    }


def write_text(folder, texts=TEXTS, ending="tokens"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (folder / f"wiki.{FILE_NAMES[split]}.{ending}").write_bytes(text.encode())
    return folder


def write_parquet(folder, texts=TEXTS, shards=1):
    """The hub's layout: a row for each line, the empty string for the line " \\n"."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        rows = ["" if line == " \n" else line for line in re.findall(r"[^\n]*\n", text)]
        for k, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
            table = pyarrow.table({"text": pyarrow.array([rows[i] for i in part], pyarrow.string())})
            pyarrow.parquet.write_table(table, folder / f"{HUB_NAMES[split]}-{k:05}-of-{shards:05}.parquet")
    return folder


def write_hub(folder):
    """A local folder that the `datasets` package reads as it reads the hub's repository."""
    write_parquet(folder / "wikitext-2-v1")
    entries = "".join(f"  - split: {name}\n    path: wikitext-2-v1/{name}-*\n" for name in HUB_NAMES.values())
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n{entries}---\n")
    return folder


def as_expected(tokens, expected):
    return all(
        (some.ids.tolist(), some.n_bytes, some.n_words) == expected[split] and len(some) == len(expected[split][0])
        for split, some in tokens.items()
    )


def bar():
    return tqdm(disable=True)


def tokenize(stream, tokenizer):
    """(ids, bytes, words) of a stream, with the digest checked against its definition."""
    file = io.BytesIO()
    n, digest, n_bytes, n_words = prepare.tokenize(stream, tokenizer, file, bar())
    ids = np.frombuffer(file.getvalue(), "<u2")
    assert len(ids) == n and digest == digest_of(ids)
    return ids, n_bytes, n_words


def digest_of(ids):
    return hashlib.sha256(b"".join(int(i).to_bytes(2, "little") for i in ids)).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------
# The sample
# ----------------------------------------------------------------------------------------------------------


def articles_of(text):
    """The articles of a text in WikiText's form, each with the empty line before its title."""
    lines = text.split("\n")
    starts = [i - 1 for i, line in enumerate(lines) if re.fullmatch(r" = [^=].* = ", line)]
    return ["\n".join(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)])]


def sample_parts():
    return {split: "".join(open_stream()) for split, (_, open_stream) in prepare.sample_source().items()}


def test_sample_is_large_enough():
    text = (data.DATA_DIR / prepare.SAMPLE).read_text(encoding="utf-8")
    assert len(articles_of(text)) >= 60
    assert len(text.encode()) >= 250_000


def test_sample_has_the_form_of_wikitext():
    text = (data.DATA_DIR / prepare.SAMPLE).read_text(encoding="utf-8")
    articles = articles_of(text)
    assert "\n".join(articles) == text  # no line before the first title
    assert all(re.match(r" \n = [^=\n]+ = \n \n", article) for article in articles)
    assert all(line.startswith(" ") and line.endswith(" ") for line in text.removesuffix("\n").split("\n"))


def test_sample_splits_hold_every_article_once():
    whole = articles_of((data.DATA_DIR / prepare.SAMPLE).read_text(encoding="utf-8"))
    parts = [article.strip() for part in sample_parts().values() for article in articles_of(part)]
    assert sorted(parts) == sorted(article.strip() for article in whole)
    assert len(set(parts)) == len(parts)
    assert sum(map(len, sample_parts().values())) == len((data.DATA_DIR / prepare.SAMPLE).read_text(encoding="utf-8"))


def test_sample_splits_are_of_useful_size():
    sizes = {split: len(part.encode()) for split, part in sample_parts().items()}
    assert sizes["train"] > 0.7 * sum(sizes.values())
    assert min(sizes.values()) > 10_000
    assert sizes == {split: size for split, (size, _) in prepare.sample_source().items()}


# ----------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "tokens": write_text,
    "raw": lambda folder: write_text(folder, ending="raw"),
    "tokens in a subfolder": lambda folder: write_text(folder / "wikitext-2-v1").parent,
    "parquet": write_parquet,
    "parquet shards": lambda folder: write_parquet(folder, shards=3),
    "parquet in a subfolder": lambda folder: write_parquet(folder / "wikitext-2-v1").parent,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_files_give_the_tokens_of_the_text(data_dir, tmp_path, expected, layout):
    make(folder=LAYOUTS[layout](tmp_path / "wikitext"), vocabularies=(SMALL,))
    assert as_expected(data.load_tokens(SMALL), expected)


def test_small_blocks_do_not_change_the_tokens(data_dir, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 100)
    make(folder=write_text(tmp_path / "wikitext"), vocabularies=(SMALL,))
    assert as_expected(data.load_tokens(SMALL), expected)


def test_the_datasets_package_gives_the_tokens_of_the_text(data_dir, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(prepare, "HUB_DATASET", str(write_hub(tmp_path / "hub")))
    make(vocabularies=(SMALL,))
    tokens = data.load_tokens(SMALL)
    assert as_expected(tokens, expected)
    assert {some.dataset for some in tokens.values()} == {"wikitext-2-v1"}


def test_empty_rows_and_missing_values_are_empty_lines():
    assert list(prepare._join_rows([["", " = A = \n"], [None, ""]])) == [" \n = A = \n", " \n \n"]


def test_dataset_names_the_subfolder_and_the_data_set(data_dir, tmp_path, expected):
    write_parquet(tmp_path / "wikitext" / "wikitext-103-v1")
    write_parquet(tmp_path / "wikitext" / "wikitext-2-v1", dict.fromkeys(TEXTS, " another text \n"))
    make(tmp_path / "wikitext", "wikitext-103-v1", vocabularies=(SMALL,))
    tokens = data.load_tokens(SMALL)
    assert as_expected(tokens, expected)
    assert tokens["train"].dataset == "wikitext-103-v1"


def test_local_files_of_another_text_are_named_after_their_folder(data_dir, tmp_path):
    make(write_text(tmp_path / "my text"), vocabularies=(SMALL,))
    assert data.load_tokens(SMALL)["val"].dataset == "my text"


@pytest.mark.parametrize("ending, name", [("tokens", "wikitext-2-v1"), ("raw", "wikitext-2-raw-v1")])
def test_published_text_is_recognized_by_its_words(data_dir, tmp_path, expected, monkeypatch, ending, name):
    """The raw text has as many words, but it is another data set."""
    monkeypatch.setattr(prepare, "PUBLISHED_WORDS", {expected["train"][2]: "wikitext-2"})
    texts = TEXTS
    if ending == "raw":
        texts = {split: text.replace("<unk>", "kerosene") for split, text in TEXTS.items()}
    make(write_text(tmp_path / "here", texts, ending), vocabularies=(SMALL,))
    assert data.load_tokens(SMALL)["train"].dataset == name


# ----------------------------------------------------------------------------------------------------------
# The real WikiText-2
# ----------------------------------------------------------------------------------------------------------

needs_wikitext = pytest.mark.skipif(
    not all((WIKITEXT / f"wiki.{name}.tokens").is_file() for name in FILE_NAMES.values()),
    reason="WikiText-2 is absent",
)
PUBLISHED = {"val": (1_121_681, 217_646), "test": (1_256_449, 245_569)}  # bytes, words


@needs_wikitext
@pytest.mark.parametrize("split", PUBLISHED)
def test_wikitext_has_the_published_counts_and_decodes_exactly(tokenizer, split):
    path = WIKITEXT / f"wiki.{FILE_NAMES[split]}.tokens"
    text = "".join(prepare._read_text(path))
    assert text.encode() == path.read_bytes()
    n_words = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        n_words += 1 + sum(1 for word in line.decode().split(" ") if word)
    assert (len(path.read_bytes()), n_words) == PUBLISHED[split]

    ids, *counts = tokenize(prepare._read_text(path), tokenizer)
    assert tuple(counts) == PUBLISHED[split]
    assert tokenizer.decode_bytes(ids.tolist()).decode() == text


@needs_wikitext
def test_wikitext_is_recognized(data_dir):
    make(WIKITEXT, vocabularies=(SMALL,))
    tokens = data.load_tokens(SMALL)
    assert {some.dataset for some in tokens.values()} == {"wikitext-2-v1"}
    assert tokens["train"].n_words == 2_088_628
    assert {split: (tokens[split].n_bytes, tokens[split].n_words) for split in PUBLISHED} == PUBLISHED


# ----------------------------------------------------------------------------------------------------------
# Streaming
# ----------------------------------------------------------------------------------------------------------


def test_a_stream_gives_what_the_whole_text_gives(tokenizer, expected):
    lines = re.findall(r"[^\n]*\n", TEXTS["train"])
    ids, n_bytes, n_words = tokenize((line for line in lines), tokenizer)
    assert (ids.tolist(), n_bytes, n_words) == expected["train"]


def test_a_stream_is_read_bit_by_bit(tokenizer, monkeypatch):
    """The first tokens come before the text has been read to its end."""
    monkeypatch.setattr(bpe.pretokens, "BLOCK_BYTES", 1 << 10)
    piece, n_pieces = TEXTS["train"], 40
    read, read_at_yield = [], []

    def stream():
        for i in range(n_pieces):
            read.append(i)
            yield piece

    class Watched:
        def encode_stream(self, texts):
            for ids in tokenizer.encode_stream(texts):
                read_at_yield.append(len(read))
                yield ids

    prepare.tokenize(stream(), Watched(), io.BytesIO(), bar())
    assert len(read) == n_pieces
    assert read_at_yield[0] < n_pieces // 2
    assert len(set(read_at_yield)) > 2


def test_a_file_is_read_in_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 200)
    pieces = list(prepare._read_text(write_text(tmp_path / "wikitext") / "wiki.valid.tokens"))
    assert len(pieces) > 10
    assert "".join(pieces) == TEXTS["val"]
    assert all(piece[-1] in "\r\n" for piece in pieces)


# ----------------------------------------------------------------------------------------------------------
# Without the hub
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch):
    """A local socket in place of the hub. It takes connections, and answers what it is told to, or never."""
    listening = socket.create_server(("127.0.0.1", 0))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
    monkeypatch.setattr(prepare, "HUB_TIMEOUT", 0.5)

    def answer(content):
        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(content)

        threading.Thread(target=serve, daemon=True).start()

    yield answer
    listening.close()


def test_a_silent_hub_is_out_of_reach(endpoint):
    start = time.monotonic()
    assert prepare._hub_answers() is False
    assert time.monotonic() - start < 5


def test_a_slow_name_look_up_does_not_hold_up(endpoint, monkeypatch):
    done = threading.Event()

    def look_up(*args, **kwargs):
        done.wait(20)
        raise OSError("Name or service not known")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", look_up)
    start = time.monotonic()
    assert prepare._hub_answers() is False
    assert time.monotonic() - start < 5
    done.set()


def test_a_closed_port_is_out_of_reach(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert prepare._hub_answers() is False


def test_the_wait_for_the_hub_is_short():
    assert prepare.HUB_TIMEOUT < 10


@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden", "500 Internal Server Error"])
def test_any_answer_means_in_reach(endpoint, status):
    endpoint(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    assert prepare._hub_answers() is True


def test_an_answer_that_is_no_http_prints_no_traceback(endpoint, monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    endpoint(b"this is something else\r\n\r\n")
    prepare._hub_answers()
    assert not failed


@pytest.mark.parametrize("address", ["", "no address", "ftp:/", "http://[", "http://127.0.0.1:port"])
def test_an_endpoint_that_is_no_address_prints_no_traceback(monkeypatch, address):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", address)
    prepare._hub_answers()
    assert not failed


def test_without_the_hub_the_sample_is_taken_and_said_so_in_one_line(data_dir, capfd):
    make(vocabularies=(SMALL,))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "sample" in lines[0] and "--from" in lines[0]
    assert data.load_tokens(SMALL)["train"].dataset == "sample"


def test_without_the_hub_an_own_vocabulary_says_so_only_once(data_dir, capfd):
    prepare.main(["--vocab-size", "300"])
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_without_the_hub_a_data_set_asked_for_is_an_error(data_dir):
    with pytest.raises(ConnectionError) as caught:
        make(dataset="wikitext-2-v1")
    assert "\n" not in str(caught.value)
    assert prepare.HUB_DATASET in str(caught.value)
    assert not list(data_dir.glob("*.pt"))


def test_an_error_of_the_datasets_package_without_words(data_dir, monkeypatch):
    def fail(*args):
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError):
        make(dataset="wikitext-2-v1")


# ----------------------------------------------------------------------------------------------------------
# Token files
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Token files of the small text, made once."""
    base = tmp_path_factory.mktemp("made")
    with as_data_dir(base / "data") as folder:
        make(write_text(base / "text"), vocabularies=(SMALL,))
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


@pytest.fixture
def files(data_dir, made):
    """A data folder with good token files, and a shorter sample, which is soon tokenized."""
    path = data_dir / prepare.SAMPLE
    path.write_text("\n".join(articles_of(path.read_text(encoding="utf-8"))[:12]), encoding="utf-8")
    for name, content in made.items():
        (data_dir / name).write_bytes(content)
    return data_dir


def test_token_file_names(data_dir):
    names = [data.token_file("val", vocabulary).name for vocabulary in ("bpe_vocab.json", SMALL)]
    assert names == ["val_ids.pt", "val_ids_500.pt"]


def test_token_files_hold_what_they_say(files, tokenizer, expected):
    preparation = torch.load(data.token_file("train", SMALL), weights_only=True)["preparation"]
    assert re.fullmatch("[0-9a-f]{16}", preparation)
    for split in data.SPLITS:
        content = torch.load(data.token_file(split, SMALL), weights_only=True, mmap=True)
        ids, n_bytes, n_words = expected[split]
        assert content.pop("ids").tolist() == ids
        assert content == {
            "format": data.FORMAT, "version": 4, "preparation": preparation, "dataset": "text", "split": split,
            "n_tokens": len(ids), "digest": digest_of(ids), "n_bytes": n_bytes, "n_words": n_words, "tokenizer": SMALL,
            "fingerprint": tokenizer.fingerprint, "start": tokenizer.encode(" \n ="),
        }  # fmt: skip


def test_token_files_are_16_bit(files):
    tokenizer = BPETokenizer.load(data.vocabulary_file(SMALL))
    tokens = data.load_tokens(SMALL)
    assert tokenizer.vocab_size == 500
    for split, some in tokens.items():
        assert some.ids.dtype == torch.uint16
        assert some.ids.dim() == 1
        assert data.token_file(split, SMALL).stat().st_size < 2 * len(some) + 4096


def test_load_tokens_prepares_once(data_dir, monkeypatch, capfd):
    first = data.load_tokens("bpe_vocab.json")
    assert first["train"].dataset == "sample"
    assert len(list(data_dir.glob("*_ids*.pt"))) == 6
    assert "no token files yet" in capfd.readouterr().err
    monkeypatch.setattr(prepare, "prepare", None)
    second = data.load_tokens("bpe_vocab.json")
    assert all(torch.equal(first[split].ids, second[split].ids) for split in data.SPLITS)
    assert capfd.readouterr().err == ""


def snapshot(folder):
    """What is in a folder, but for the lock, which may stay."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != prepare.LOCK}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("unexpected pos 64 vs 0\nmore")]
)
def test_a_full_disk_leaves_the_old_files(files, tmp_path, monkeypatch, error):
    def save_half(content, file):
        file.write(b"half")
        raise error

    before = snapshot(files)
    monkeypatch.setattr(prepare.torch, "save", save_half)
    with pytest.raises(OSError) as caught:
        make(write_text(tmp_path / "other"), vocabularies=(SMALL,))
    assert "\n" not in str(caught.value)
    assert snapshot(files) == before


def test_an_interrupt_while_writing_leaves_the_old_files(files, tmp_path, monkeypatch):
    def stop(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    before = snapshot(files)
    monkeypatch.setattr(prepare.torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        make(write_text(tmp_path / "other"), vocabularies=(SMALL,))
    assert snapshot(files) == before


@pytest.mark.parametrize("learn, replaced", [(False, 0), (False, 1), (False, 2), (True, 1), (True, 2)])
def test_files_of_a_preparation_that_was_cut_short_are_refused(files, tmp_path, learn, replaced):
    """As if it had been killed between two replacements."""
    options = "--vocab-size 500 --train-vocab" if learn else f"--vocabulary {SMALL}"
    texts = {split: text + " more rain fell , and more \n" * 50 for split, text in TEXTS.items()}
    before, replace, done = snapshot(files), Path.replace, []

    def replace_some(path, target):
        if target in (files / SMALL, *(data.token_file(split, SMALL) for split in data.SPLITS)):
            if len(done) == replaced:
                raise SystemExit
            done.append(target)
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace_some)
        with pytest.raises(SystemExit):
            prepare.main(["--from", str(write_text(tmp_path / "text", texts)), *options.split()])
    assert not list(files.glob("writing-*"))
    if replaced == 0:
        assert snapshot(files) == before
    else:
        message = assert_refused("train_ids_500.pt" if learn and replaced == 1 else "val_ids_500.pt")
        assert ("not made with the tokenizer" if learn else "not made together") in message
        follow(message)


def test_nothing_is_printed_before_all_files_are_in_their_places(data_dir, tmp_path, monkeypatch):
    lines = []

    def say(line, error=False):
        if not error:
            lines.append((line, len(list(data_dir.glob("*.pt")))))

    monkeypatch.setattr(prepare, "say", say)
    prepare.main(["--from", str(write_text(tmp_path / "text")), "--vocab-size", "300"])
    assert len(lines) == 4 and all(n == 3 for _, n in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_replacements_waits(files, tmp_path, monkeypatch, number):
    came, replace = [], Path.replace

    def signalled(path, target):
        signal.raise_signal(number)
        assert not came
        return replace(path, target)

    handler = signal.signal(number, lambda number, frame: came.append(number))
    try:
        monkeypatch.setattr(Path, "replace", signalled)
        make(write_text(tmp_path / "other"), vocabularies=(SMALL,))
    finally:
        signal.signal(number, handler)
    assert came == [number]
    assert data.load_tokens(SMALL)["test"].dataset == "other"


def test_what_a_killed_process_left_is_removed(files, tmp_path):
    for name in ("writing-train_ids.pt", "writing-test_ids_500.pt", "writing-bpe_vocab_300.json"):
        (files / name).write_bytes(b"half")
    (files / "writing-a-novel.txt").write_bytes(b"of somebody else")
    make(write_text(tmp_path / "other"), vocabularies=(SMALL,))
    assert [path.name for path in files.glob("writing-*")] == ["writing-a-novel.txt"]


@pytest.mark.parametrize("name", ["test_ids_500.pt", SMALL])
def test_a_folder_where_a_file_must_go(files, tmp_path, name):
    (files / name).unlink()
    (files / name).mkdir()
    before = snapshot(files)
    with pytest.raises(OSError, match=f"{name} is a folder.*remove or rename it"):
        prepare.main(["--from", str(write_text(tmp_path / "other")), "--vocab-size", "500", "--train-vocab"])
    assert snapshot(files) == before


def test_a_data_folder_that_cannot_be_written(files, tmp_path, monkeypatch):
    """It is refused before anything is read."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(prepare, "tokenize", None)
    before = snapshot(files)
    with pytest.raises(FileError, match="is not writable"):
        make(write_text(tmp_path / "other"), vocabularies=(SMALL,))
    assert snapshot(files) == before


def test_a_vocabulary_too_large_for_16_bits(files, tmp_path, monkeypatch):
    monkeypatch.setattr(BPETokenizer, "vocab_size", (1 << 16) + 1)
    before = snapshot(files)
    with pytest.raises(ValueError, match="65,537 tokens"):
        make(write_text(tmp_path / "other"), vocabularies=(SMALL,))
    assert snapshot(files) == before


# ----------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------


def test_a_second_process_waits_and_takes_what_the_first_one_made(tmp_path, made):
    """Two rungs in a fresh clone."""
    root = make_copy(tmp_path / "copy")
    code = f"from data import load_tokens; print(load_tokens({SMALL!r})['val'].dataset)"
    with file_lock(root / "data" / prepare.LOCK):
        child = forks.start(["-c", code], cwd=root, env=OFFLINE)
        child.wait_for("waiting")
        told = child.err.splitlines()
        assert len(told) == 2 and "no token files" in told[0] and f"Process {os.getpid()} is making" in told[1]
        for name, content in made.items():
            (root / "data" / name).write_bytes(content)
            (root / "data" / name.replace("_500", "")).write_bytes(content)
    done = child.finish()
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (0, "text\n", told)


def test_the_lock_ends_with_the_preparation(data_dir, tmp_path):
    folder = write_text(tmp_path / "text")
    for _ in range(2):
        make(folder, vocabularies=(SMALL,))
    with pytest.raises(ValueError):
        make(write_text(folder, TEXTS | {"test": ""}), vocabularies=(SMALL,))
    with file_lock(data_dir / prepare.LOCK) as locked:
        assert locked


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_without_locks_it_goes_on_and_says_so_in_a_line(data_dir, tmp_path, monkeypatch, capfd, error):
    def fail(file, how):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fail)
    (data_dir / "writing-bpe_vocab_300.json").write_bytes(b"of a process that may be at work")
    make(write_text(tmp_path / "text"), vocabularies=(SMALL,))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "cannot be locked" in lines[0]
    assert (data_dir / "writing-bpe_vocab_300.json").exists()
    assert len(data.load_tokens(SMALL)["train"]) > 0


# ----------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------


def refusal(vocabulary=SMALL):
    """The one line with which load_tokens refuses the files."""
    with pytest.raises((OSError, ValueError)) as caught:
        data.load_tokens(vocabulary)
    message = str(caught.value)
    assert "\n" not in message
    return message


def follow(message, vocabulary=SMALL, **values):
    """Do as a message says: run its only command, with `values` for its placeholders. The token files then load."""
    (command,) = re.findall(r"python data/prepare\.py(?: --[a-z-]+ (?:'[^']+'|[\w.]+))*", message)
    for key, value in values.items():
        command = command.replace(key, shlex.quote(str(value)))
    prepare.main(shlex.split(command)[2:])
    return data.load_tokens(vocabulary)


def assert_refused(name="train_ids_500.pt"):
    message = refusal()
    assert name in message and AGAIN in message
    return message


def change(split="train", without=(), **values):
    """Change entries of a token file."""
    path = data.token_file(split, SMALL)
    content = torch.load(path, weights_only=True)
    content = {key: value for key, value in (content | values).items() if key not in without}
    torch.save(content, path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("split", data.SPLITS)
def test_one_split_missing(files, split):
    data.token_file(split, SMALL).unlink()
    assert_refused(f"{split}_ids_500.pt")


def test_token_files_of_the_other_vocabulary_only(files):
    message = refusal("bpe_vocab.json")
    assert "bpe_vocab.json" in message and AGAIN in message


def test_advice_for_an_own_vocabulary_names_it(files):
    BPETokenizer.train(TEXTS["val"], 300).save(files / "bpe_vocab_300.json")
    assert f"{AGAIN} --vocabulary bpe_vocab_300.json" in refusal("bpe_vocab_300.json")


def test_a_folder_in_place_of_a_file(files):
    data.token_file("train", SMALL).unlink()
    data.token_file("train", SMALL).mkdir()
    assert "remove it" in assert_refused()


def test_empty_file(files):
    data.token_file("train", SMALL).write_bytes(b"")
    assert_refused()


@pytest.mark.parametrize("keep", [1, 4, 100, 0.1, 0.5, 0.9, -100, -22, -1])
def test_truncated_file(files, made, keep):
    content = made["train_ids_500.pt"]
    end = int(keep * len(content)) if isinstance(keep, float) else keep
    data.token_file("train", SMALL).write_bytes(content[:end])
    assert_refused()


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05", b"{", b"\x1f\x8b", b"\x93NUMPY"])
@pytest.mark.parametrize("size", [3, 5000])
def test_random_bytes(files, start, size):
    data.token_file("train", SMALL).write_bytes(start + np.random.default_rng(size).bytes(size))
    assert_refused()


def test_changed_bytes_give_no_other_kind_of_error(files, made):
    """A byte changed where the file keeps its structure is refused in the usual way, or does not matter."""
    content = made["val_ids_500.pt"]
    random = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        place = int(random.integers(700)) * (1 if random.random() < 0.5 else -1)
        changed[place] = int(random.integers(256))
        data.token_file("val", SMALL).write_bytes(changed)
        try:
            data.load_tokens(SMALL)
        except (OSError, ValueError) as error:
            assert "val_ids_500.pt" in str(error) and "\n" not in str(error), (place, changed[place])


@pytest.mark.parametrize("kind", ["torch", "pickle", "entry"])
def test_pickle_bomb_does_not_go_off(files, tmp_path, kind):
    path, marker = data.token_file("train", SMALL), tmp_path / "marker"
    if kind == "torch":
        torch.save(Bomb(marker), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        change(dataset=Bomb(marker))
    assert_refused()
    assert not marker.exists()


FOREIGN = {
    "tensor": torch.arange(10),
    "weights": {"layer.weight": torch.zeros(3)},
    "list": [data.FORMAT],
    "number": 5,
    "old format": torch.arange(10, dtype=torch.int16),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_torch_file(files, kind):
    path = data.token_file("train", SMALL)
    torch.save(FOREIGN[kind], path, _use_new_zipfile_serialization=kind != "old format")
    assert_refused()


@pytest.mark.parametrize(
    "key", ["version", "fingerprint", "preparation", "ids", "n_tokens", "split", "n_bytes", "n_words", "dataset",
            "digest"]
)
def test_missing_entry(files, key):
    change(without=(key,))
    assert_refused()


@pytest.mark.parametrize("ids", [None, 5, "abc", {}], ids=repr)
def test_ids_that_are_no_tensor(files, ids):
    change(ids=ids)
    assert_refused()


@pytest.mark.parametrize("version", [1, 2, 3, 5, "4", True, 4.0, torch.tensor([4, 4])], ids=repr)
def test_wrong_version(files, version):
    change(version=version)
    assert "version" in assert_refused()


def test_files_of_the_first_version(files):
    """They did not say which of them belong together."""
    for split in data.SPLITS:
        change(split, without=("preparation",), version=1)
    assert "version 1" in assert_refused()


@pytest.mark.parametrize("key", ["n_bytes", "n_words"])
@pytest.mark.parametrize("value", [0, -5, True, 2.0])
def test_counts_that_nothing_can_be_divided_by(files, key, value):
    change("test", **{key: value})
    assert_refused("test_ids_500.pt")


@pytest.mark.parametrize("n", [0, 1])
def test_a_split_without_two_tokens(files, n):
    ids = torch.load(data.token_file("val", SMALL), weights_only=True)["ids"]
    change("val", ids=ids[:n].clone(), n_tokens=n)
    assert_refused("val_ids_500.pt")


@pytest.mark.parametrize("cut", [1, 100])
def test_number_of_ids_does_not_match(files, cut):
    ids = torch.load(data.token_file("train", SMALL), weights_only=True)["ids"]
    change(ids=ids[:-cut].clone())
    assert_refused()


def test_ids_that_are_not_those_that_were_written(files):
    """One of them is another one of the vocabulary."""
    path = data.token_file("train", SMALL)
    ids = torch.load(path, weights_only=True)["ids"].numpy().copy()
    ids[len(ids) // 2] = (ids[len(ids) // 2] + 1) % 500
    change(ids=torch.from_numpy(ids))
    assert "have changed since it was written" in assert_refused()


def test_digests_are_loaded(files, expected):
    assert {split: some.digest for split, some in data.load_tokens(SMALL).items()} == {
        split: digest_of(ids) for split, (ids, _, _) in expected.items()
    }


def test_token_files_of_another_tokenizer(files):
    BPETokenizer.train(TEXTS["val"], 300).save(files / SMALL)
    message = assert_refused()
    assert "not made with the tokenizer" in message and SMALL in message


def test_renamed_file(files):
    shutil.copy(data.token_file("val", SMALL), data.token_file("train", SMALL))
    assert "renamed" in assert_refused()


def test_splits_of_different_data_sets(files):
    change("test", dataset="wikitext-103-v1")
    message = refusal()
    assert "wikitext-103-v1" in message and AGAIN in message


@pytest.mark.parametrize("split", data.SPLITS)
def test_splits_of_different_preparations(files, tmp_path, split):
    """Nothing but the preparation tells these texts from each other: name and tokenizer are the same."""
    other = data.token_file(split, SMALL).read_bytes()
    texts = {each: text + " more \n" for each, text in TEXTS.items()}
    make(write_text(tmp_path / "text", texts), vocabularies=(SMALL,))
    assert len(data.load_tokens(SMALL)["test"]) > 0
    data.token_file(split, SMALL).write_bytes(other)
    assert "together" in assert_refused(f"{split}_ids_500.pt")


def test_a_file_that_cannot_be_read(files, monkeypatch):
    def fail(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(torch, "load", fail)
    assert "Permission denied" in assert_refused()


def test_damage_is_told_by_one_line_and_no_warning(files, made, recwarn):
    protocol = made["train_ids_500.pt"].replace(b"\x80\x02}", b"\x80\x09}", 1)  # of the pickle, about which torch warns
    data.token_file("train", SMALL).write_bytes(protocol)
    with contextlib.suppress(ValueError):
        data.load_tokens(SMALL)
    assert not recwarn.list


def test_missing_vocabulary(files):
    message = refusal("bpe_vocab_700.json")
    assert "bpe_vocab_700.json" in message and SMALL in message


@pytest.mark.parametrize("damage", ["empty", "truncated", "bytes", "list", "merge", "fingerprint"])
def test_damaged_vocabulary(files, damage):
    path = files / SMALL
    content = path.read_bytes()
    path.write_bytes({
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "bytes": np.random.default_rng(0).bytes(500),
        "list": b"[]",
        "merge": re.sub(rb"\[\d+, ", b"[97, ", content, count=1),
        "fingerprint": re.sub(rb'"fingerprint": "\w+"', b'"fingerprint": "0123456789abcdef"', content),
    }[damage])  # fmt: skip
    message = refusal()
    assert SMALL in message and "git checkout" in message


# ----------------------------------------------------------------------------------------------------------
# Advice
# ----------------------------------------------------------------------------------------------------------

TROUBLE = {
    "missing": lambda path: path.unlink(),
    "damaged": lambda path: path.write_bytes(b"damage"),
    "first version": lambda path: change("val", without=("preparation",), version=1),
    "empty": lambda path: change("val", n_words=0),
    "other split": lambda path: shutil.copy(data.token_file("test", SMALL), path),
    "other text": lambda path: change("val", dataset="wikitext-103-v1"),
    "other preparation": lambda path: change("val", preparation="0123456789abcdef"),
    "other tokenizer": lambda path: change("val", fingerprint="0123456789abcdef"),
    "ids": lambda path: change("val", ids=torch.full((2,), 500, dtype=torch.uint16), n_tokens=2),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_advice_of_a_refusal_mends_it(files, trouble):
    TROUBLE[trouble](data.token_file("val", SMALL))
    assert follow(assert_refused("val_ids_500.pt"))["val"].dataset == "sample"


def test_advice_for_a_folder_in_place_of_a_file(files):
    path = data.token_file("val", SMALL)
    path.unlink()
    path.mkdir()
    message = assert_refused("val_ids_500.pt")
    assert "remove it" in message
    path.rmdir()
    follow(message)


@pytest.mark.parametrize("name", ["bpe_vocab.json", "bpe_vocab_300.json", "bpe_vocab_my own.json", "letters.json"])
def test_advice_for_a_vocabulary_without_token_files_keeps_the_vocabulary(files, name):
    if name not in data.VOCABULARIES:
        BPETokenizer.train(TEXTS["val"], 300).save(files / name)
    before = (files / name).read_bytes()
    follow(refusal(name), name)
    assert (files / name).read_bytes() == before


@pytest.mark.parametrize("name", ["bpe_vocab.json", "bpe_vocab_300.json"])
def test_advice_for_those_who_have_the_sample_only(data_dir, tmp_path, monkeypatch, capfd, name):
    if name not in data.VOCABULARIES:
        BPETokenizer.train(TEXTS["val"], 300).save(data_dir / name)
    data.load_tokens(name)
    line = capfd.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(prepare, "HUB_DATASET", str(write_hub(tmp_path / "hub")))  # now there is a connection
    assert follow(line, name)["train"].dataset == "wikitext-2-v1"
    assert "sample" not in capfd.readouterr().out


def test_who_asked_for_the_sample_is_not_advised(data_dir, tmp_path, capfd):
    for asked in (["--sample"], []):
        folder = str(tmp_path / f"folder of {len(asked)}")
        prepare.main([*asked, "--to", folder, "--vocabulary", str(data_dir / SMALL)])
        assert data.load_tokens("bpe_vocab.json", folder)["train"].dataset == "sample"
        assert ("For WikiText-2" in capfd.readouterr().out) == (not asked)


def test_advice_of_those_without_a_hub(data_dir, tmp_path, monkeypatch, capfd):
    data.load_tokens(SMALL)
    with_folder, with_connection = capfd.readouterr().err.splitlines()[-1].split(", or")
    assert follow(with_folder, DIR=write_text(tmp_path / "my text"))["train"].dataset == "my text"
    monkeypatch.setattr(prepare, "HUB_DATASET", str(write_hub(tmp_path / "hub")))
    assert follow(with_connection)["train"].dataset == "wikitext-2-v1"


@pytest.mark.parametrize("options", ["--vocab-size 500", "--vocab-size 500 --sample"])
def test_advice_to_leave_the_vocabulary_size_out(data_dir, capfd, options):
    with pytest.raises(SystemExit):
        prepare.main(options.split())
    assert "leave --vocab-size out" in capfd.readouterr().err
    prepare.main(["--sample"])
    assert len(data.load_tokens(SMALL)["train"]) > 0


@pytest.mark.parametrize("options", [
    "--sample --from nowhere", "--sample --dataset wikitext-2-v1", "--vocabulary bpe_vocab.json --vocab-size 300",
    "--vocabulary bpe_vocab.json --train-vocab",
])  # fmt: skip
def test_options_that_exclude_each_other(data_dir, capfd, options):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(options.split())
    assert stopped.value.code == 2 and "leave" in capfd.readouterr().err
    assert not list(data_dir.glob("*.pt"))


# ----------------------------------------------------------------------------------------------------------
# Bad sources
# ----------------------------------------------------------------------------------------------------------


def source_refusal(data_dir, folder):
    """The one line with which prepare refuses a source. No token file is written."""
    before = snapshot(data_dir)
    with pytest.raises(UserError) as caught:
        make(folder, vocabularies=(SMALL,))
    message = str(caught.value)
    assert message and "\n" not in message
    assert snapshot(data_dir) == before
    return message


def test_folder_missing(data_dir, tmp_path):
    message = source_refusal(data_dir, tmp_path / "nowhere")
    assert "nowhere" in message and "--from" in message


@pytest.mark.parametrize("missing", [("train", "val"), ("val",)])
def test_folder_without_all_files(data_dir, tmp_path, missing):
    folder = write_text(tmp_path / "wikitext")
    for split in missing:
        (folder / f"wiki.{FILE_NAMES[split]}.tokens").unlink()
    message = source_refusal(data_dir, folder)
    assert str(folder) in message and "wiki.valid.tokens" in message


@pytest.mark.parametrize("split", data.SPLITS)
def test_file_that_is_not_utf8(data_dir, tmp_path, split):
    path = write_text(tmp_path / "wikitext") / f"wiki.{FILE_NAMES[split]}.tokens"
    path.write_bytes(" = caf\xe9 = \n".encode("latin-1"))
    message = source_refusal(data_dir, path.parent)
    assert path.name in message and "UTF-8" in message


@pytest.mark.parametrize("write", [write_text, write_parquet])
@pytest.mark.parametrize("split", data.SPLITS)
def test_empty_split(data_dir, tmp_path, split, write):
    folder = write(tmp_path / "wikitext", TEXTS | {split: ""})
    assert f"{split} split" in source_refusal(data_dir, folder)


@pytest.mark.parametrize("text", [" ", " " * 100, "\t\u3000", "a", "\n"], ids=repr)
@pytest.mark.parametrize("split", data.SPLITS)
def test_split_without_two_tokens_and_a_word(data_dir, tmp_path, split, text):
    folder = write_text(tmp_path / "wikitext", TEXTS | {split: text})
    assert f"{split} split" in source_refusal(data_dir, folder)


def test_a_training_text_of_nothing_but_newlines(data_dir, tmp_path):
    n = 100_001
    folder = write_text(tmp_path / "text", TEXTS | {"train": "\n" * n})
    make(folder, vocabularies=(SMALL,))
    train = data.load_tokens(SMALL)["train"]
    assert (train.n_bytes, train.n_words) == (n, n)
    assert BPETokenizer.load(data.vocabulary_file(SMALL)).decode(train.ids.tolist()) == "\n" * n
    before = snapshot(data_dir)
    with pytest.raises(ValueError, match="the train split .* has 1 and 100001"):  # a vocabulary learned from it
        prepare.main(["--from", str(folder), "--vocab-size", "300"])
    assert snapshot(data_dir) == before


@pytest.mark.parametrize("write", [write_text, write_parquet])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_file_that_changes_while_it_is_read(data_dir, tmp_path, monkeypatch, write, after):
    """In the first pass, between the splits, and before the second vocabulary reads it."""
    folder, passes, tokenize = write(tmp_path / "wikitext"), [], prepare.tokenize

    def change_first(stream, *args):
        passes.append(stream)
        if len(passes) == after:
            stream = iter([next(stream), *stream]) if after > 1 else stream
            write(folder, TEXTS | {"train": TEXTS["train"] + " more \n"})
        return tokenize(stream, *args)

    monkeypatch.setattr(prepare, "tokenize", change_first)
    before = snapshot(data_dir)
    with pytest.raises(ValueError, match="changed while it was being read"):
        make(folder)
    assert snapshot(data_dir) == before


def test_a_file_that_grows_under_the_reader(tmp_path):
    path = write_text(tmp_path / "wikitext") / "wiki.train.tokens"
    stream = prepare.folder_source(tmp_path / "wikitext", None)["train"][1]()
    next(stream)
    with open(path, "a") as file:
        file.write(" more \n")
    with pytest.raises(ValueError, match="changed while it was being read"):
        list(stream)


def test_a_file_that_cannot_be_opened(data_dir, tmp_path, monkeypatch):
    folder = write_text(tmp_path / "wikitext")

    def fail(path, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(prepare, "open", fail, raising=False)
    assert "wiki.train.tokens" in source_refusal(data_dir, folder)


def test_a_folder_in_place_of_a_text(data_dir, tmp_path):
    path = write_text(tmp_path / "wikitext") / "wiki.valid.tokens"
    path.unlink()
    path.mkdir()
    assert "wiki.valid.tokens" in source_refusal(data_dir, path.parent)
    path = write_parquet(tmp_path / "hub") / "train-00000-of-00001.parquet"
    path.unlink()
    path.mkdir()
    assert "but no file named train" in source_refusal(data_dir, path.parent)


def test_an_empty_name_is_no_folder(data_dir):
    assert "--from" in source_refusal(data_dir, "")


@pytest.mark.parametrize("folder, name", [
    ("my text", "my text"), ("Ærø\n東京", "Ærø 東京"), ("caf\udce9", "caf?"), ("plays/sample", "plays/sample"),
])  # fmt: skip
def test_names_of_folders(data_dir, tmp_path, capfd, folder, name):
    make(write_text(tmp_path / folder), vocabularies=(SMALL,))
    assert data.load_tokens(SMALL)["train"].dataset == name
    assert "bundled sample" not in capfd.readouterr().out


def test_parquet_of_random_bytes(data_dir, tmp_path):
    path = write_parquet(tmp_path / "wikitext") / "validation-00000-of-00001.parquet"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    assert path.name in source_refusal(data_dir, path.parent)


def test_parquet_with_damaged_pages(data_dir, tmp_path):
    """The end of the file, which lists its contents, is whole, but the contents are not."""
    path = write_parquet(tmp_path / "wikitext") / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = np.random.default_rng(0).bytes(396)
    path.write_bytes(content)
    assert path.name in source_refusal(data_dir, path.parent)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_truncated_parquet(data_dir, tmp_path, keep):
    path = write_parquet(tmp_path / "wikitext") / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert path.name in source_refusal(data_dir, path.parent)


@pytest.mark.parametrize("column", [{"line": ["a \n"]}, {"text": [1, 2, 3]}, {"text": [b"\xff\xfe"]}], ids=str)
def test_parquet_without_a_column_of_text(data_dir, tmp_path, column):
    path = write_parquet(tmp_path / "wikitext") / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table(column), path)
    assert path.name in source_refusal(data_dir, path.parent)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
OFFLINE.pop("PYTHONUNBUFFERED", None)  # buffered output can fail once more, at the end of the program


def make_copy(root):
    """A copy of what `python data/prepare.py` needs."""
    (root / "data").mkdir(parents=True)
    code = [path for folder in (".", "data", "bpe", "harness") for path in (ROOT / folder).glob("*.py")]
    for path in (*code, *(ROOT / "data" / name for name in (*data.VOCABULARIES, prepare.SAMPLE))):
        copied = root / path.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(path, copied)
    return root


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return make_copy(tmp_path_factory.mktemp("copies") / "copy")


def run(root, *args, **options):
    return forks.run(["data/prepare.py", *args], cwd=root, env=OFFLINE, **options)


def test_data_may_be_a_symbolic_link(tmp_path):
    """And prepare.py may be called from elsewhere."""
    root = make_copy(tmp_path / "my copy")
    (root / "data").rename(tmp_path / "elsewhere")
    try:
        (root / "data").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no symbolic links here")
    command = [sys.executable, str(root / "data" / "prepare.py"), "--sample", "--vocabulary", SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=OFFLINE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "elsewhere" / "val_ids_500.pt").is_file()
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from data import DATA_DIR, load_tokens"
    code += f"; print(DATA_DIR); load_tokens({SMALL!r})"
    code += "; assert not {'datasets', 'pyarrow', 'data.prepare'} & sys.modules.keys()"  # only preparing needs them
    done = forks.run(["-c", code], cwd=tmp_path, env=OFFLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == str(root / "data")
    # Called by the link's target, it cannot know what is next to the link.
    done = subprocess.run([sys.executable, "prepare.py"], cwd=root / "data", capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert AGAIN in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_the_output_cannot_encode(data_dir, tmp_path, monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    make(write_text(tmp_path / "Ærø 東京"), vocabularies=(SMALL,))
    expected = {"ascii": "\\xc6r\\xf8 \\u6771\\u4eac", "cp1252": "Ærø \\u6771\\u4eac", "utf-8": "Ærø 東京"}
    assert [expected[encoding] in line for line in written.getvalue().decode(encoding).splitlines()] == [True] * 3
    assert data.load_tokens(SMALL)["test"].dataset == "Ærø 東京"


@pytest.mark.parametrize("stdout", ["full", "closed", "none"])
def test_files_are_whole_if_stdout_cannot_be_written(data_dir, tmp_path, monkeypatch, expected, stdout):
    if stdout == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    output = open("/dev/full", "w") if stdout == "full" else io.StringIO()
    if stdout == "closed":
        output.close()
    monkeypatch.setattr(sys, "stdout", None if stdout == "none" else output)
    make(write_text(tmp_path / "text"), vocabularies=(SMALL,))
    with contextlib.suppress(OSError):  # what the full disk did not take
        output.close()
    assert as_expected(data.load_tokens(SMALL), expected)
    assert not list(data_dir.glob("writing-*"))


# The command line, with a pause after the second token file.
PAUSING = """
import runpy, sys, time, torch
save, saved = torch.save, []
def pause(content, file):
    save(content, file)
    saved.append(file)
    if len(saved) == 2:
        print("now", flush=True)
        time.sleep(60)
torch.save = pause
sys.argv = ["data/prepare.py", *sys.argv[1:]]
runpy.run_path("data/prepare.py", run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_it_in_one_line_and_changes_nothing(tmp_path, made, number, code):
    root = make_copy(tmp_path / "copy")
    for name, content in made.items():
        (root / "data" / name).write_bytes(content)
    before = snapshot(root / "data")
    child = forks.start(["-c", PAUSING, "--sample", "--vocab-size", "300"], cwd=root, env=OFFLINE)
    child.wait_for("now")
    assert len(list((root / "data").glob("writing-*"))) == 3  # a vocabulary and two splits
    os.kill(child.pid, number)
    done = child.finish()
    assert (done.returncode, done.stdout) == (code, "now\n")
    assert len(done.stderr.splitlines()) == 1 and "stopped" in done.stderr
    assert snapshot(root / "data") == before


# In its own mount namespace: a small disk that holds data/, and a copy of what is left there afterwards.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$SIZE tmpfs "$DISK" || exit 99
cp data/* "$DISK"
mv data before; ln -s "$DISK" data
"$@"; code=$?
cp -r "$DISK" "$LEFT"
exit $code
"""


def test_a_real_disk_that_is_full(tmp_path, made):
    root = make_copy(tmp_path / "copy")
    for name, content in made.items():
        (root / "data" / name).write_bytes(content)
    before = snapshot(root / "data")
    (tmp_path / "disk").mkdir()
    where = {"SIZE": "900k", "DISK": str(tmp_path / "disk"), "LEFT": str(tmp_path / "left")}
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]
    try:
        done = subprocess.run([*unshare, sys.executable, "-B", "data/prepare.py", "--sample"], cwd=root,
                              env=OFFLINE | where, capture_output=True, text=True)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode in (1, 99) and not (tmp_path / "left").exists():
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "No space left on device; make room" in done.stderr
    assert snapshot(tmp_path / "left") == before


def test_command_line_makes_six_files_of_the_sample(copy):
    done = run(copy, "--sample")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = {line.split(":")[0] for line in done.stdout.splitlines()}
    made = {f"data/{split}_ids{size}.pt" for split in data.SPLITS for size in ("", "_500")}
    assert names == made
    assert all((copy / name).is_file() for name in names)


def test_command_line_with_a_missing_folder_says_so_in_one_line(copy):
    done = run(copy, "--from", "nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr and "--from" in done.stderr


def test_command_line_makes_a_vocabulary_of_its_own_even_if_nobody_reads_what_it_prints(copy):
    done = run(copy, "--vocab-size", "300", "--sample", closed_stdout=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert BPETokenizer.load(copy / "data" / "bpe_vocab_300.json").vocab_size == 300
    for split in data.SPLITS:
        content = torch.load(copy / "data" / f"{split}_ids_300.pt", weights_only=True)
        assert content["tokenizer"] == "bpe_vocab_300.json"
        assert int(content["ids"].to(torch.int32).max()) < 300


def test_a_text_with_too_few_pairs_gives_a_smaller_vocabulary_and_says_so(data_dir, tmp_path, capfd):
    folder = write_text(tmp_path / "text", dict.fromkeys(TEXTS, "the cat sat on the mat \n" * 9))
    prepare.main(["--from", str(folder), "--vocab-size", "5000"])
    out, err = capfd.readouterr()
    size = BPETokenizer.load(data.vocabulary_file("bpe_vocab_5000.json")).vocab_size
    assert size < 300
    *files, line = err.splitlines()
    assert [file.split(":")[0] for file in files] == list(data.SPLITS) and f"{size} tokens instead of 5,000" in line
    assert len(out.splitlines()) == 4 and f"bpe_vocab_5000.json: {size} tokens" in out
    assert int(data.load_tokens("bpe_vocab_5000.json")["train"].ids.numpy().max()) < size
    prepare.main(["--from", str(folder), "--vocab-size", "260"])
    assert capfd.readouterr().err.splitlines() == files


@pytest.mark.parametrize("size", ["5", "0", "-1", "256", "65537", "many"])
def test_command_line_refuses_a_vocabulary_size(data_dir, capfd, size):
    before = snapshot(data_dir)
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["--sample", "--vocab-size", size])
    assert stopped.value.code == 2
    assert "--vocab-size" in capfd.readouterr().err
    assert snapshot(data_dir) == before


def test_command_line_refuses_an_unknown_data_set(data_dir, capfd):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["--dataset", "wikitext-4"])
    assert stopped.value.code == 2
    assert "wikitext-2-v1" in capfd.readouterr().err


def test_help_names_the_default_data_set(data_dir, capfd):
    """The one that is asked for if --dataset is not given."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "hub_source", lambda dataset: asked.append(dataset) or prepare.sample_source())
        prepare.open_source()
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    (named,) = re.findall(r"\(default:\s+(wikitext[^)]+)\)", capfd.readouterr().out)
    assert asked == [named] == ["wikitext-2-v1"]
