"""The one style of all pictures: what is the same curve, what a bar means, and what color a cell has."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from harness import pictures, report


def test_the_same_thing_is_the_same_curve():
    assert pictures.curve("rope") == pictures.curve("v4, rope")
    assert pictures.curve("alibi") == pictures.curve("v4, alibi")
    assert pictures.curve("learned") == pictures.curve("v3_1")
    for names in (pictures.RUNGS, pictures.SCHEMES):
        for key in ("color", "marker"):
            assert len({pictures.curve(name)[key] for name in names}) == len(names)


def test_a_picture_of_schemes_has_their_curves(tmp_path, monkeypatch):
    """Whatever their order."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    curves = {"rope": [(1, 2)], "none": [(1, 3)], "other": [(1, 4)]}
    report.draw_curves(tmp_path / "a.png", curves, "x", "loss", "title")
    lines = drawn[0].axes[0].lines
    assert [line.get_color() for line in lines] == [pictures.curve(k)["color"] for k in ("rope", "none", 2)]


def test_bars_reach_from_the_lowest_to_the_highest_seed():
    values = [[1.0, 4.0, 1.3], [2.0, 2.5, 1.5], [7.0]]
    line, _, (bars,) = pictures.seeds(Figure().subplots(), [1, 2, 5], values, **pictures.curve(1))
    assert list(line.get_ydata()) == pytest.approx([2.1, 2, 7])
    assert [tuple(segment[:, 1]) for segment in bars.get_segments()] == [(1, 4), (1.5, 2.5), (7, 7)]


def test_what_is_masked_has_a_color_of_its_own_and_high_is_dark():
    heat, change = pictures.heat(), pictures.change()
    for colors in (heat, change):
        assert tuple(colors(math.nan)[:3]) == to_rgb(pictures.MASKED)
    assert sum(heat(1.0)[:3]) < sum(heat(0.5)[:3]) < sum(heat(0.0)[:3])
    assert min(change(0.5)[:3]) > 0.9  # no change is nearly white
    assert change(1.0)[0] > change(1.0)[2] and change(0.0)[0] < change(0.0)[2]  # orange and purple


def test_cells_are_labeled_so_that_they_can_be_read():
    axes = Figure().subplots()
    pictures.label_cells(axes, np.array([[0.1, math.nan], [0.9, 0.5]]), "{:.1f}".format, lambda value: value > 0.6)
    assert {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts} == {
        (0, 0): ("0.1", "black"), (0, 1): ("0.9", "white"), (1, 1): ("0.5", "black")}  # fmt: skip
