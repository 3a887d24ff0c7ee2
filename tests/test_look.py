"""What look.py says of a text, and its page in a browser."""

import base64
import contextlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import forks
import look
from bpe_tokenizer import BPETokenizer
from common import LATE_RUNGS, MODELS, ROOT, SMALL_VOCABULARY, V4, random_model
from data import Tokens
from harness.errors import FileError, MissingFileError, UserError

TOKENIZER = BPETokenizer.load(ROOT / "data" / SMALL_VOCABULARY)
END = "<|endoftext|>"
SIZE = 32  # tokens in a window of the small models
TEXT = "The castle was built in the 12th century.\n\n It has a <b>tower</b> & a wall.\t" + "Its owner, Žižek, left 中."


@pytest.fixture
def save(load, tmp_path):
    """save(rung, position): (folder of a run with random weights, the model)"""

    def save(name, position="alibi", start=(10,), **constants):
        module = load(name, **constants)
        model = random_model(module, TOKENIZER.vocab_size, position, std=0.3)
        folder = tmp_path / "runs" / position / name
        folder.mkdir(parents=True)
        names = ("VOCABULARY", "BLOCK_SIZE", "CONTEXT_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "N_HIDDEN", "ROPE_BASE")
        shape = {name: getattr(module, name) for name in names if hasattr(module, name)}
        content = {"rung": name, "model": model.state_dict(), "fingerprint": TOKENIZER.fingerprint, "start": [*start],
                   "hyperparameters": {**shape, "POSITION": position} if name == V4 else shape}  # fmt: skip
        torch.save(content, folder / "model.pt")
        TOKENIZER.save(folder / "vocabulary.json")
        return str(folder), model

    return save


def write_page(text, *folders, to="look.html"):
    """The page as written, and the data in it."""
    look.look_at(text, folders, to)
    page = Path(to).read_text(encoding="utf-8")
    return page, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def seen_before(ids, q, size=SIZE):
    """The ids from which the token after number q is predicted: of the windows that start every half window, those of
    the first one that has q."""
    start = next(start for start in range(0, len(ids), size // 2) if q < start + size)
    return start, torch.tensor([ids[start : q + 1]])


def unpack(passage, n_heads):
    """The attention weights of a passage: for each head a list of rows, of each query one."""
    units = np.frombuffer(base64.b64decode(passage["attention"]), "<u2").reshape(n_heads, -1)
    ends = np.cumsum([q + 2 for q in range(len(passage["ids"]))])
    return [np.split(head, ends[:-1]) for head in units]


@pytest.fixture(autouse=True)
def in_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "position"), MODELS)
@torch.no_grad()
def test_the_numbers_are_those_of_the_forward_pass(name, position, save):
    """Each token is predicted by a pass of its own over what is before it in its window."""
    folder, model = save(name, position)
    _, data = write_page(TEXT, folder)
    (shown,), ids = data["models"], [10, *TOKENIZER.encode(TEXT)]  # 10 is a line break
    (passage,), total = shown["passages"], 0
    assert passage["ids"] == ids[1:] and len(ids) > 2 * SIZE and data["whole"]
    for q, (id, bits, rank, top) in enumerate(zip(*(passage[key] for key in ("ids", "bits", "ranks", "top")))):
        logits = model(seen_before(ids, q)[1])[0, -1].double().numpy()
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert bits == pytest.approx(-math.log2(p[id]), abs=1e-3)
        assert [p for _, p in top] == pytest.approx(np.sort(p)[: -look.LIKELIEST - 1 : -1], rel=1e-4)
        assert [p for _, p in top] == pytest.approx(p[[id for id, _ in top]], rel=1e-4)
        assert abs(p[id] - np.sort(p)[-rank]) < 1e-6
        total -= math.log2(p[id])
    n_bytes, n_words = len(TEXT.encode()), len(TEXT.split()) + 2
    assert (shown["bits"], shown["tokens"]) == (pytest.approx(total, rel=1e-5), len(ids) - 1)
    assert shown["bits_per_byte"] == pytest.approx(total / n_bytes, rel=1e-5)
    assert shown["word_perplexity"] == pytest.approx(2 ** (total / n_words), rel=1e-3)
    if name not in ("v2", *LATE_RUNGS):
        assert passage["attention"] is None and shown["layers"] == 0
        return
    for q, rows in enumerate(zip(*unpack(passage, 4)), 1):
        start, idx = seen_before(ids, q)
        for row, weights in zip(rows, look.attention_weights(model, idx).flatten(0, 2)[:, -1], strict=True):
            assert row.sum() == look.UNITS and not row[:start].any()
            np.testing.assert_allclose(row[start:] / look.UNITS, weights, atol=2 / look.UNITS)


@pytest.mark.parametrize("n_characters", [10, 100, 3000])
def test_the_totals_are_those_of_an_evaluation(n_characters, save, load, data_dir):
    """With windows that overlap by half, and a line break before the text."""
    text = (data_dir / "input.txt").read_text(encoding="utf-8")[5000 : 5000 + n_characters]
    folder, model = save("v3")
    reading = look.Reading(folder, text)
    ids = torch.tensor([10, *TOKENIZER.encode(text)]).to(torch.uint16)
    n_words = len(text.split()) + text.count("\n")
    tokens = Tokens(ids, len(text.encode()), n_words, "", TOKENIZER.fingerprint)
    found = load("v3").evaluate(model, tokens, stride=SIZE // 2)
    assert reading.figures["bits_per_byte"] == pytest.approx(found["bpb"], rel=1e-5)
    assert reading.figures["word_perplexity"] == pytest.approx(found["word_ppl"], rel=1e-4)


def test_what_separates_documents_is_no_part_of_the_text(save):
    folder, _ = save("v0")
    figures = look.Reading(folder, f"one two\n{END}three{END}four five").figures
    assert (figures["bytes"], figures["words"]) == (8 + 5 + 9, 3 + 1 + 2)
    assert figures["tokens"] == sum(len(TOKENIZER.encode(x)) for x in ("one two\n", "three", "four five")) + 2
    assert look.Reading(folder, END).figures["bits_per_byte"] is None
    assert look.Reading(folder, "中文没有空格" * 10).figures["word_perplexity"] is None


def test_a_model_whose_documents_begin_with_a_token_reads_it_first(save):
    end = TOKENIZER.vocab_size - 1
    for start, first in (([end], end), ([298, 302], 10), ([65], 10)):
        folder, _ = save("v0", start=start)
        assert look.Reading(folder, "a b").ids[0] == first
        shutil.rmtree(folder)


@pytest.mark.parametrize(("size", "n"), [(1, 3), (2, 7), (5, 5), (5, 6), (8, 40), (9, 41)])
def test_windows_have_every_token_once_as_new_with_half_a_window_before_it(size, n):
    found = list(look.windows(n, size))
    assert [k for _, new, stop in found for k in range(new, stop)] == list(range(n))
    for start, new, stop in found:
        assert 0 < stop - start <= size and (start == 0 or new - start >= size // 2)


# ----------------------------------------------------------------------------------------------------------
# Passages of a long text
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["word " * 300, "line\n" * 300, "中文" * 300, "x" * 1010, "a\n\n  b " * 9, "é"])
def test_pieces_are_the_whole_text_and_whole_characters(text):
    data = text.encode()
    spans = list(look.pieces(data, 100))
    assert b"".join(data[start:stop] for start, stop in spans) == data
    assert all(data[start:stop].decode() for start, stop in spans)
    assert all(50 <= stop - start <= 150 for start, stop in spans) or len(data) < 100
    if text.startswith(("word", "line")):
        assert all(data[start:stop].decode().strip()[:4] in ("word", "line") for start, stop in spans)


def test_a_long_text_is_shown_by_what_surprises_most(save, monkeypatch):
    """Two models with different vocabularies of their own would cut it alike: passages are spans of bytes."""
    monkeypatch.setattr(look, "WHOLE", 60)
    monkeypatch.setattr(look, "PASSAGE", 12)
    folders = save("v0")[0], save("v2")[0]
    text = "".join(f"Line {k} has some words, and {k * k} more.\n" for k in range(30))
    _, data = write_page(text, *folders)
    readings = [look.Reading(folder, text) for folder in folders]
    assert not data["whole"] and len(data["passages"]) == look.PASSAGES
    surprise = [passage["bits_per_byte"] for passage in data["passages"]]
    assert surprise == sorted(surprise, reverse=True)
    size = 12 * len(text) // len(TOKENIZER.encode(text))
    every = [sum(bits for reading in readings for bits, end in zip(reading.bits[1:].tolist(), reading.ends)
                 if start <= end < stop) / 2 / (stop - start)
             for start, stop in look.pieces(text.encode(), size)]  # fmt: skip
    assert surprise == pytest.approx(sorted(every, reverse=True)[: look.PASSAGES], rel=1e-2)
    for model, reading in zip(data["models"], readings):
        for passage, about in zip(model["passages"], data["passages"]):
            shown = TOKENIZER.decode(passage["ids"])
            lines = text.split("\n")
            assert shown.split("\n")[0] in lines[about["line"] - 1]
            first = passage["n_before"] + 1
            assert reading.ids[first : first + len(passage["ids"])].tolist() == passage["ids"]
            assert passage["bits"] == pytest.approx(reading.bits[first:][: len(passage["ids"])].tolist(), abs=1e-4)
            assert len(passage["ranks"]) == len(passage["top"]) == len(passage["ids"]) > 3


@torch.no_grad()
def test_attention_to_what_is_before_a_passage_is_one_number(save):
    folder, model = save(V4, "rope")
    reading = look.Reading(folder, TEXT)
    ids, i, j = reading.ids.tolist(), 40, 70
    for q, rows in enumerate(zip(*unpack(reading.passage(i, j), 4)), i):
        start, idx = seen_before(ids, q)
        for row, weights in zip(rows, look.attention_weights(model, idx).flatten(0, 2)[:, -1].numpy(), strict=True):
            expected = np.concatenate([np.zeros(start), weights])
            np.testing.assert_allclose(row / look.UNITS, [expected[:i].sum(), *expected[i:]], atol=2 / look.UNITS)


# ----------------------------------------------------------------------------------------------------------
# Tokens to read
# ----------------------------------------------------------------------------------------------------------


def test_tokens_are_shown_readably(save):
    reading = look.Reading(save("v0")[0], "x")
    assert reading.shown(TOKENIZER.vocab_size - 1) == (END, "special")
    for text, shown in ((" ", " "), ("\n", "\n"), ("\t", "⇥"), ("\r", "␍"), ("\0", "U+0000"), ("\x7f", "U+007F")):
        (id,) = TOKENIZER.encode(text)
        assert reading.shown(id) == (shown, "text")
    assert reading.shown(0xE4) == ("\\xe4", "bytes")
    assert look.visible("a\u200bb\u00a0c\u202e\u2028é中") == "aU+200BbU+00A0cU+202EU+2028é中"
    ids = [*"中".encode(), 65, *"é".encode(), *"🏰".encode()]
    assert reading._completed(ids) == {2: "中", 5: "é", 9: "🏰"}
    assert reading._completed([0xAD, 65, 0xE4]) == {}  # a character that begins before, and one that ends later


def test_a_text_cannot_end_its_script(save):
    text = "</script><script>alert(1)</script><!-- @DATA@ "
    page, data = write_page(text, save("v0")[0])
    assert page.count("</script>") == 2 and "<!--" not in page
    assert data["text"] == text.strip() and TOKENIZER.decode(data["models"][0]["passages"][0]["ids"]) == text


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def test_the_command_reads_arguments_files_and_standard_input(save, monkeypatch, capsys, tmp_path):
    folder, other = save("v0")[0], save("v1")[0]
    (tmp_path / "text.txt").write_bytes("\ufeffA café\r\n".encode())
    (tmp_path / "wide.txt").write_bytes("A café\r\n".encode("utf-16"))
    outputs = []
    for words in (["A café\r\n", folder, other], ["--file", "text.txt", folder, other], ["-", folder, other],
                  [folder, "--file", "wide.txt", "--to", "page.html", other, folder]):  # fmt: skip
        if words[0] == "-":
            monkeypatch.setattr(sys, "stdin", open(tmp_path / "text.txt", encoding="ascii"))
        look.main(words)
        outputs.append(capsys.readouterr().out.splitlines())
    for lines in outputs:
        assert lines[:3] == outputs[0][:3] and len(lines) == 4
        assert lines[1].startswith(folder) and lines[2].startswith(other)
    reading = look.Reading(other, "A café\r\n")
    assert outputs[0][2].split()[1:] == [f"{reading.figures['bits_per_byte']:.4f}",
                                         f"{reading.figures['word_perplexity']:,.1f}",
                                         f"{reading.figures['bits']:,.1f}", str(len(TOKENIZER.encode("A café\r\n")))]
    assert Path("look.html").read_bytes() == Path("page.html").read_bytes()


def test_a_folder_of_v4_stands_for_its_schemes(save, tmp_path):
    for scheme in ("none", "rope"):
        folder, _ = save(V4, scheme)
        shutil.move(folder, tmp_path / "v4" / scheme)
    _, data = write_page("A text", str(tmp_path / "v4"))
    assert [model["name"] for model in data["models"]] == [f"{tmp_path}/v4/rope", f"{tmp_path}/v4/none"]


def mistakes(folder):
    """(words of the command line, what is said)"""
    return [
        ([], "name a text and a model"),
        (["The castle"], "name a text and a model"),
        (["--file", "text.txt"], "name a text and a model"),
        (["", folder], "the text is empty"),
        ([" \n\t", folder], "the text is empty"),
        (["caf\udce9", folder], "the text is not UTF-8"),
        (["--file", "empty.txt", folder], "empty.txt is empty"),
        (["--file", "none.txt", folder], "there is no file none.txt"),
        (["--file", ".", folder], r"\. cannot be read \(Is a directory\)"),
        (["--file", "a\0b", folder], "cannot be read"),
        (["--file", "latin.txt", folder], r"latin.txt is not UTF-8 text \(byte 0xE9 at offset 3\)"),
        (["--file", "odd.txt", folder], "odd.txt is not UTF-16 text"),
        (["--file", f"{folder}/model.pt", folder], "holds binary data"),
        (["--file", "zeros", folder], "holds binary data"),
        (["text.txt", folder], "text.txt is a file; to read the text in it, give --file text.txt"),
        ([folder, "The castle"], " is the folder of a model, but the text must come first"),
        ([str(Path(folder).parent), "The castle"], " is the folder of a model, but the text must come first"),
        (["A text", "nowhere"], "there is no trained model in .*nowhere"),
        (["A text", "~no-such-user/run"], "there is no trained model in .*~no-such-user/run"),
        (["A text", "The castle " * 40], r"cannot be read \(File name too long\)"),
        (["A text", "text.txt"], "there is no trained model in .*text.txt"),
        (["A text", "damaged"], "is damaged"),
        (["A text", "nan"], "are not finite"),
        (["A text", "other"], "is not the vocabulary with which the model in this folder was trained"),
        (["A text", folder, "--to", "nowhere/look.html"], "there is no folder nowhere"),
        (["A text", folder, "--to", "."], r"cannot write the page to \. \(Is a directory\)"),
        (["A text", folder, "--to", "x" * 300], r"cannot write the page to x+ \(File name too long\)"),
        (["A text", folder, "--to", "text.txt"], "text.txt already exists and is not a page"),
        (["A text", folder, "--form", "x"], "unrecognized arguments: --form"),
    ]


def test_a_mistake_is_one_line(save, tmp_path, monkeypatch):
    folder, _ = save("v0")
    for name, content in {"text.txt": b"A text", "empty.txt": b"", "latin.txt": b"caf\xe9 noir", "zeros": bytes(100),
                          "odd.txt": "text".encode("utf-16") + b"x"}.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    for name in ("damaged", "nan", "other"):
        shutil.copytree(folder, tmp_path / name)
    with open(tmp_path / "damaged" / "model.pt", "r+b") as file:
        file.truncate(1000)
    saved = torch.load(tmp_path / "nan" / "model.pt")
    saved["model"]["table"][:, 3] = math.nan
    torch.save(saved, tmp_path / "nan" / "model.pt")
    BPETokenizer.load(ROOT / "data" / "bpe_vocab.json").save(tmp_path / "other" / "vocabulary.json")
    (tmp_path / "The").mkdir()  # a word may be the name of a folder
    for words, said in [*mistakes(folder), (["The", "nowhere"], "there is no trained model in .*nowhere")]:
        with pytest.raises((SystemExit, UserError)) as info:
            look.main(words)
        assert re.search(said, str(info.value)), words
        assert "\n" not in str(info.value) and not Path("look.html").exists()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FileError, match="standard input is closed"):
        look.main(["-", folder])
    assert (tmp_path / "text.txt").read_bytes() == b"A text"
    with pytest.raises(MissingFileError):
        look.look_at("A text", ["nowhere"], "look.html")
    with pytest.raises(FileError):
        look.look_at("A text", [folder], "nowhere/look.html")


def test_the_command_ends_with_a_line_and_its_exit_code(tmp_path):
    done = forks.run([ROOT / "look.py", " ", "nowhere"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "look.py: the text is empty, so there is nothing to predict; give at least one word\n"


# ----------------------------------------------------------------------------------------------------------
# In a browser
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_memory_limit():
    """A browser reserves more addresses than a limit of memory may allow (tests/mutants.py sets one)."""
    resource = pytest.importorskip("resource", reason="the tests in a browser need a system like Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("there is no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                     "--disable-background-networking", "--window-size=1200,900"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with without_memory_limit():
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, save):
    """opened(text, rung, ...): the data of the page that is then open, and the models. At the end nothing has been
    complained of, and nothing loaded."""

    def opened(text, *rungs):
        folders, models = zip(*(save(*rung) for rung in rungs))
        _, data = write_page(text, *folders)
        browser.get(Path("look.html").absolute().as_uri())
        return data, models

    yield opened
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def find(parent, css):
    return parent.find_elements("css selector", css)


def point_at(browser, element):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).move_to_element(element).perform()


def tip(browser):
    """The rows (rank, token, probability) of the tip of a token, whose own rank and text come first."""
    (shown,) = find(browser, "#tip:not([hidden])")
    (own, *_), rows = shown.text.split("\n"), find(shown, "tr")
    return own, [[cell.text for cell in find(row, "td")][:3] for row in rows]


def alone(text):
    """How a token is shown on its own."""
    return text.replace(" ", "␣").replace("\n", "↵")


def percentage(text):
    return float(text.removesuffix(" %")) / 100


@torch.no_grad()
def test_pointing_at_a_token_shows_the_probabilities_of_the_model(browser, opened):
    data, models = opened(TEXT, ("v0",), ("v2",), (V4, "rope"))
    cards, ids = find(browser, ".model"), TOKENIZER.encode(TEXT)
    assert [card.find_element("tag name", "h3").text for card in cards] == [m["name"] for m in data["models"]]
    for card, model, shown in zip(cards, models, data["models"]):
        tokens = find(card, ".token")
        assert [int(token.get_attribute("data-id")) for token in tokens] == ids
        for k in (0, 5):
            logits = model(seen_before([10, *ids], k)[1])[0, -1]
            p, order = logits.softmax(-1).sort(descending=True)
            point_at(browser, tokens[k])
            own, rows = tip(browser)
            assert own == alone(TOKENIZER.decode([ids[k]]))
            for (rank, text, probability), i in zip(rows, range(10)):
                assert (rank, text) == (str(i + 1), alone(shown["shown"][str(order[i].item())][0]))
                assert percentage(probability) == pytest.approx(p[i].item(), abs=6e-4)
            rank = order.tolist().index(ids[k]) + 1
            if rank > 10:
                assert len(rows) == 11 and rows[10][:2] == [str(rank), own]
                assert percentage(rows[10][2]) == pytest.approx(p[rank - 1].item(), rel=0.06, abs=6e-4)
        point_at(browser, browser.find_element("tag name", "h1"))
        assert not find(browser, "#tip:not([hidden])")
    totals = [[cell.text for cell in find(row, "td")] for row in find(browser, "#totals tbody tr")]
    assert [row[0] for row in totals] == [f"{model['bits_per_byte']:.4f}" for model in data["models"]]


WEIGHTS = """
    const text = arguments[0].querySelector(".text");
    return Array.from(text.querySelectorAll(".before, .token"), element => +element.dataset.weight);
"""


@torch.no_grad()
def test_a_click_shows_what_each_head_attends_to(browser, opened):
    (_, (model, _)), query = opened("The castle was built in the 12th century.", ("v2",), ("v1",)), 9
    transformer, mlp = find(browser, ".model")
    ids = [10, *TOKENIZER.encode("The castle was built in the 12th century.")]
    weights = look.attention_weights(model, torch.tensor([ids]))[:, 0, :, query + 1]  # (layers, heads, T)
    find(transformer, ".token")[query].click()
    buttons = find(transformer, ".heads button")
    assert len(buttons) == 4 and "attending" in transformer.get_attribute("class")
    for k, button in enumerate(buttons):
        point_at(browser, button)
        shown = browser.execute_script(WEIGHTS, transformer)
        assert sum(shown) == pytest.approx(1, abs=1e-6)
        assert shown == pytest.approx(weights.flatten(0, 1)[k].tolist(), abs=2 / look.UNITS)
        assert button.get_attribute("aria-pressed") == "true"
        most = weights.flatten(0, 1)[k].argmax().item()
        name = alone(TOKENIZER.decode([ids[most]])) if most else "line break"
        assert button.text.split("\n")[0] == name
    find(mlp, ".token")[query].click()
    assert "attending" not in mlp.get_attribute("class")
    find(transformer, ".token")[query].click()
    assert "attending" not in transformer.get_attribute("class") and not find(transformer, ".heads button")


def test_the_keyboard_reaches_everything(browser, opened):
    opened("The castle was built.", ("v2",))
    from selenium.webdriver.common.keys import Keys

    tokens = find(browser, ".token")

    def press(key):
        browser.switch_to.active_element.send_keys(key)

    for key, place in ((Keys.TAB, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1),
                       (Keys.END, -1), (Keys.HOME, 0), (Keys.ARROW_LEFT, 0)):  # fmt: skip
        press(key)
        assert browser.switch_to.active_element == tokens[place] and tip(browser)
    press(Keys.END)
    press(Keys.ENTER)
    assert len(find(browser, ".heads button")) == 4
    press(Keys.TAB)
    press(Keys.TAB)
    assert find(browser, ".heads button")[1].get_attribute("aria-pressed") == "true"
    press(Keys.ESCAPE)
    assert not find(browser, ".heads button") and not find(browser, "#tip:not([hidden])")


def test_a_text_is_no_part_of_the_page(browser, opened):
    """Its HTML is text; what cannot be seen is shown by a sign, and characters of several tokens as a whole."""
    text = f"<img src=x onerror=alert(1)> &amp; </script>\n\ta\u202eb 中\0{END}"
    opened(text, ("v0",))
    assert not find(browser, "img") and browser.execute_script("return document.scripts.length") == 2
    shown = find(browser, ".text")[0].text
    assert "<img src=x onerror=alert(1)> &amp; </script>↵\n⇥a\\xe2\\x80\\xaeU+202Eb" in shown
    assert "\\xe4\\xb8\\xad中U+0000<|endoftext|>" in shown and "line break" in shown


COLORS = """
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const paint = color => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); };
    paint(getComputedStyle(document.body).backgroundColor);
    paint(getComputedStyle(arguments[0]).backgroundColor);
    const background = Array.from(canvas.getImageData(0, 0, 1, 1).data.slice(0, 3));
    paint(getComputedStyle(arguments[0]).color);
    return [background, Array.from(canvas.getImageData(0, 0, 1, 1).data.slice(0, 3))];
"""


def luminance(color):
    """Of WCAG 2.2, "relative luminance"."""
    x = np.array(color) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_can_be_told_apart_without_their_hue(browser, opened, scheme):
    """Stronger is darker on white and lighter on black, and the text keeps the contrast that WCAG asks for."""
    opened("The castle was built.", ("v2",))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    token = find(browser, ".token")[3]
    for mode in ("", "attending"):
        found = []
        for strength in (0, 0.25, 0.5, 0.75, 1):
            browser.execute_script("arguments[0].style.setProperty('--strength', arguments[1]);"
                                   "arguments[0].closest('.model').classList.toggle('attending', arguments[2])",
                                   token, strength, bool(mode))  # fmt: skip
            background, ink = map(luminance, browser.execute_script(COLORS, token))
            assert (max(background, ink) + 0.05) / (min(background, ink) + 0.05) >= 4.5
            found.append(background)
        steps = np.diff(found) * (1 if scheme == "dark" else -1)
        assert (steps > 0).all() and abs(found[-1] - found[0]) > 0.1
