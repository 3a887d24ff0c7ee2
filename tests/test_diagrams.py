"""docs/diagrams.py: the numbers in the pictures against counts by other means, the layout, and the committed files."""

import functools
import importlib.util

import pytest
from PIL import Image

import harness
from common import ROOT, RUNGS, V4, random_ids
from harness import flops

pytest.importorskip("matplotlib")
spec = importlib.util.spec_from_file_location("diagrams", ROOT / "docs" / "diagrams.py")
diagrams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagrams)


@functools.cache
def picture_of(rung):
    return diagrams.draw(rung)


def numbers_of(rung):
    return picture_of(rung).numbers


@pytest.mark.parametrize("rung", RUNGS)
def test_every_parameter_belongs_to_a_part(rung):
    """Counted in the weights that a run saves, where a matrix that is used twice comes once."""
    numbers = numbers_of(rung)
    assert sum(numbers.parameters.values()) == sum(x.numel() for x in numbers.model.state_dict().values())
    assert sum(numbers.shares(part)[0] for part in numbers.parameters) == pytest.approx(1)


@pytest.mark.parametrize("rung", RUNGS)
def test_the_work_is_what_torch_counts(rung):
    """A multiply-add is two operations, and the backward pass has two products for each of the forward pass."""
    numbers = numbers_of(rung)
    ids = random_ids(1, numbers.sizes["T"], vocab_size=numbers.sizes["V"])
    with harness.override(vars(numbers.module), DEVICE="cpu"):
        assert 6 * sum(numbers.work.values()) == flops.per_token(numbers.model, (ids, ids))
    assert sum(numbers.shares(part)[1] for part in numbers.work) == pytest.approx(0 if rung == "v0" else 1)


@pytest.mark.parametrize("rung", RUNGS)
def test_every_part_is_shown(rung):
    """With its share, in a box of its own."""
    numbers = numbers_of(rung)
    words = [text.get_text() for text in picture_of(rung).axes.texts]
    for part in numbers.parameters:
        if numbers.parameters[part] or numbers.work[part]:
            assert numbers.share_line(part) in words, part


def inside(a, b, room=0.0):
    """Whether rectangle a (left, bottom, right, top) lies in b."""
    return all(x >= y + room for x, y in zip(a[:2], b[:2])) and all(x <= y - room for x, y in zip(a[2:], b[2:]))


def apart(a, b):
    return any(x <= y + 1e-6 for x, y in ((a[2], b[0]), (b[2], a[0]), (a[3], b[1]), (b[3], a[1])))


@pytest.mark.parametrize("rung", RUNGS)
def test_nothing_overlaps_and_nothing_is_cut(rung):
    """Each text is within the figure, apart from all other texts and all lines, and inside or outside of each box."""
    picture = picture_of(rung)
    width, height = picture.figure.get_size_inches()
    texts = {}
    for text in picture.axes.texts:
        if text.get_text():
            box = text.get_window_extent(picture.canvas.get_renderer()).get_points().ravel() / diagrams.DPI
            texts[text.get_text(), tuple(box.round(3))] = box
            assert text.get_fontsize() >= 9
    for (name, _), a in texts.items():
        assert inside(a, (0, 0, width, height), 0.03), name
        for (other, _), b in texts.items():
            assert a is b or apart(a, b), (name, other)
        for b in picture.boxes:
            assert apart(a, b) or inside(a, b, 0.04), (name, b)
        for (x0, y0), (x1, y1) in picture.segments:  # which are all horizontal or vertical
            assert apart(a, (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))), (name, (x0, y0))
    for i, a in enumerate(picture.boxes):
        assert inside(a, (0, 0, width, height), 0.03), a
        assert all(apart(a, b) or inside(a, b) or inside(b, a) for b in picture.boxes[:i]), a


@pytest.mark.parametrize("rung", RUNGS)
def test_the_committed_picture_is_current(rung):
    """Its file says what was drawn in it; `python docs/diagrams.py` draws it anew."""
    path = diagrams.FOLDER / f"{rung}.png"
    picture = picture_of(rung)
    with Image.open(path) as image:
        assert image.text["Drawn"] == picture.fingerprint()
        assert image.size == picture.canvas.get_width_height()
    assert path.stat().st_size < 120_000


def test_rope_and_alibi_share_a_picture():
    assert diagrams.draw(V4, POSITION="rope").fingerprint() == picture_of(V4).fingerprint()


def test_a_picture_changes_with_the_rung():
    assert diagrams.draw("v1", N_HIDDEN=300).fingerprint() != picture_of("v1").fingerprint()


def test_there_is_a_picture_of_each_rung():
    assert sorted(path.stem for path in diagrams.FOLDER.iterdir()) == sorted(RUNGS) == sorted(diagrams.EARLIER)
