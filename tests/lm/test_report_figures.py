"""The figures of a report: what is drawn is what was given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from robustgate.lm.report.figures import Bar, Line, areas, bars, heat_map, lines
from robustgate.lm.report.svg import Axis, fixed, minus, shorten, spread


def test_bars_are_as_long_as_their_values():
    figure = bars("t", [Bar("a", 2, 1, 3, "2", "c0"), Bar("b", -1, -2, 0, "-1", "c1")], x_label="x")
    first, second = ElementTree.fromstring(figure).findall("rect")
    assert float(first.get("width")) == pytest.approx(2 * float(second.get("width")), rel=1e-2)
    end = float(second.get("x")) + float(second.get("width"))
    assert end == pytest.approx(float(first.get("x")), abs=0.11)  # both start at zero


def test_lines_leave_out_what_a_logarithm_cannot_show():
    figure = lines(
        "t", [Line("gap", [math.inf, 1.0, 0.1, 0.0], "c0")], x_label="x", y_label="y", log=True
    )
    (path,) = [
        p
        for p in ElementTree.fromstring(figure).findall("path")
        if "line" in p.get("class") and "axis" not in p.get("class")
    ]
    assert path.get("d").count("L") == 1


def test_areas_fill_the_figure():
    figure = areas("t", [(0.25, 0.75), (1.0, 0.0)], ["a", "b"], [("x", 0, "c0")], x_label="token")
    paths = [
        p.get("d")
        for p in ElementTree.fromstring(figure).findall("path")
        if p.get("class").startswith("area")
    ]
    heights = [{float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", d)} for d in paths]
    assert min(heights[0]) == min(heights[1])  # both reach 1
    assert max(heights[0]) > max(heights[1])  # only the first stands on 0


def test_heat_map_has_a_cell_for_every_value_but_those_left_out():
    figure = heat_map(
        *("t", [[0.0, -2.0], [1.0, 0.0]], [("r", "c0"), ("s", "c1")], [("a", "c0"), ("b", "c1")]),
        digits=1,
        warm="low",
        diagonal=False,
    )
    cells = ElementTree.fromstring(figure).findall("rect[@style]")
    assert [cell.get("class") for cell in cells] == ["heat", "heat cold"]
    assert [cell.find("title").text for cell in cells] == ["r, b: \N{MINUS SIGN}2.0", "s, a: 1.0"]
    assert cells[0].get("style") == "--h:1.00"


def test_heat_map_of_many_columns_keeps_the_values_for_pointing():
    names = [(f"expert number {k}", f"c{k}") for k in range(16)]
    figure = heat_map("t", [[0.5] * 16] * 16, names, names, digits=3)
    root = ElementTree.fromstring(figure)
    assert not [text for text in root.findall("text") if text.text == "0.500"]
    assert len(root.findall("rect/title")) == 256


def test_labels_at_the_ends_of_lines_do_not_cover_each_other():
    placed = spread([100.0, 100.0, 101.0, 20.0], gap=15, top=10, bottom=110)
    ordered = sorted(placed)
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(ordered))
    assert ordered[0] >= 10
    assert ordered[-1] <= 110
    assert placed[3] == 20


def test_axis_maps_its_ends_and_ticks_are_round():
    axis = Axis(0.0, 2.3, 100, 200)
    assert (axis(0.0), axis(2.3)) == (100, 200)
    assert axis.ticks() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert Axis(1e-6, 1.0, 0, 100, log=True).ticks(3) == [1e-6, 1e-4, 1e-2, 1.0]


def test_numbers_in_text():
    assert minus("-0.5 (-1 to -0.1) pre-trained 1e-5 a-1") == (
        "\N{MINUS SIGN}0.5 (\N{MINUS SIGN}1 to \N{MINUS SIGN}0.1) pre-trained 1e-5 a-1"
    )
    assert fixed(-0.0001, 3) == "0.000"
    assert shorten("docstrings", 5) == "docs\N{HORIZONTAL ELLIPSIS}"
