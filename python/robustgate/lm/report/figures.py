"""The report's figures as inline SVG: bars with intervals, lines, stacked areas, heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import compress
from typing import Literal

from robustgate.lm.report.svg import (
    COLOURS,
    WIDTH,
    Axis,
    dot,
    fixed,
    minus,
    polyline,
    shorten,
    spread,
    svg,
    text,
    tick_label,
    x_axis,
    y_axis,
)

_DOTS = 12
"""Up to so many points a line shows each."""


@dataclass(frozen=True)
class Bar:
    """One horizontal bar.

    Attributes:
        label: Text at its left.
        value: Length.
        lower: Lower end of the interval.
        upper: Upper end of the interval.
        text: The value as the tables print it.
        style: Class of the bar.
    """

    label: str
    value: float
    lower: float
    upper: float
    text: str
    style: str


@dataclass(frozen=True)
class Line:
    """One line of a chart: its label, a value for each step, and its class."""

    label: str
    values: Sequence[float]
    style: str


def bars(
    title: str,
    rows: Sequence[Bar],
    *,
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    width: int = WIDTH,
    labels: int = 262,
) -> str:
    """Draw horizontal bars with intervals.

    Args:
        title: What a screen reader says.
        rows: Bars from top to bottom.
        x_label: Text below the axis.
        marks: Two values at most with a dashed vertical line, and the lines' labels.

    Other:
        width: Pixels.
        labels: Pixels kept for the bars' labels.

    Returns:
        An ``<svg>`` element.
    """
    left, right, top, step = labels, 78, 30 if marks else 6, 25
    values = [0.0, *(v for row in rows for v in (row.value, row.lower, row.upper))]
    values += [value for value, _ in marks]
    low, high = min(values), max(values)
    axis = Axis(low, high + 0.02 * ((high - low) or 1.0), left, width - right)
    bottom = top + step * len(rows) + 4
    out = x_axis(axis, top - 4, bottom, x_label)
    if low < 0:
        out.append(f'<path class="axis-line" d="M{axis(0):.1f} {top - 4}V{bottom}"/>')
    for i, row in enumerate(rows):
        y = top + step * i + step / 2
        begin, end = sorted((axis(0.0), axis(row.value)))
        strong = "label strong" if row.style == "chosen" else "label"
        out.append(text(left - 12, y + 4, shorten(row.label, int(labels / 6.8)), strong, "end"))
        out.append(
            f'<rect class="{row.style}" x="{begin:.1f}" y="{y - 7:.1f}" '
            f'width="{max(end - begin, 2):.1f}" height="14" rx="2.5"/>'
        )
        near, far = axis(row.lower), axis(row.upper)
        if near < far:
            out.append(
                f'<path class="whisker" d="M{near:.1f} {y:.1f}H{far:.1f}M{near:.1f} {y - 4:.1f}v8'
                f'M{far:.1f} {y - 4:.1f}v8"/>'
            )
        out.append(text(max(end, far) + 8, y + 4, row.text, f"value {strong}"))
    for value, label in marks:
        x = axis(value)
        last = value == max(v for v, _ in marks)
        out.append(f'<path class="mark" d="M{x:.1f} {top - 20}V{bottom}"/>')
        out.append(
            text(x + (5 if last else -5), top - 12, label, "axis", "start" if last else "end")
        )
    return svg(title, width, bottom + 42, out)


def lines(
    title: str,
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    at: Sequence[float] | None = None,
    log: bool = False,
    mark: float | None = None,
    limits: tuple[float, float] | None = None,
    named: bool = True,
    width: int = WIDTH // 2,
    height: int = 260,
) -> str:
    """Draw lines, each labelled at its end.

    Args:
        title: What a screen reader says.
        series: The lines, all of one length.
        x_label: Text below the axis.
        y_label: Text above the axis.

    Other:
        at: Where the values lie on the horizontal axis; at 0, 1, ... if left out.
        log: Logarithmic vertical axis; values that are infinite or not positive are left out.
        mark: Value on the horizontal axis with a dashed line.
        limits: Least and largest value of the vertical axis; those of the lines if left out.
        named: Whether the lines are labelled.
        width: Pixels.
        height: Pixels.

    Returns:
        An ``<svg>`` element.
    """
    longest = max((len(line.label) for line in series), default=0)
    left, right, top = 46, 14 + min(7.3 * longest, 190) * named, 30 if y_label else 10
    bottom = height - (44 if x_label else 26)
    steps = range(max(len(line.values) for line in series)) if at is None else at
    drawable = [[math.isfinite(v) and (v > 0 or not log) for v in line.values] for line in series]
    shown = [
        v for line, ok in zip(series, drawable, strict=True) for v in compress(line.values, ok)
    ]
    low, high = limits or (min(shown, default=0.1), max(shown, default=1.0))
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    elif limits is None:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    x = Axis(steps[0], max(steps[-1], steps[0] + 1e-9), left, width - right)
    y = Axis(low, high if high > low else low * 10, bottom, top, log)
    out = y_axis(y, left, width - right)
    out += x_axis(x, None, bottom, x_label, whole=at is None, count=5 if named else 3)
    out.append(text(left - 30, top - 14, y_label, "axis"))
    if mark is not None:
        out.append(f'<path class="mark" d="M{x(mark):.1f} {top - 6}V{bottom}"/>')
    ends = spread([y(min(max(line.values[-1], low), high)) for line in series], 15, top, bottom)
    for line, ok, end in zip(series, drawable, ends, strict=True):
        points = [(x(i), y(v)) for i, v in compress(zip(steps, line.values, strict=True), ok)]
        out.append(polyline(points, line.style))
        if len(points) <= _DOTS:
            out += [dot(point, line.style) for point in points]
        if named:
            out.append(
                text(width - right + 8, end + 4, shorten(line.label, 26), f"name {line.style}")
            )
    return svg(title, width, height, out)


def areas(
    title: str,
    weights: Sequence[Sequence[float]],
    labels: Sequence[str],
    pieces: Sequence[tuple[str, int, str]],
    *,
    x_label: str,
    height: int = 246,
) -> str:
    """Draw shares that sum to 1 as stacked areas along a document.

    Args:
        title: What a screen reader says.
        weights: Shares per position, ``[T][K]``.
        labels: Names of the K shares.
        pieces: Label, first position and class of the colour of each part of the document.
        x_label: Text below the axis.

    Other:
        height: Pixels.

    Returns:
        An ``<svg>`` element.
    """
    left, right, top, bottom = 40, 8, 36, height - 44
    x = Axis(0, len(weights), left, WIDTH - right)
    y = Axis(0, 1, bottom, top)
    out = x_axis(x, None, bottom, x_label, whole=True, count=10)
    out += [text(left - 8, y(tick) + 4, tick_label(tick), "axis", "end") for tick in (0, 0.5, 1)]
    base = [0.0] * len(weights)
    for k, label in enumerate(labels):
        over = [b + row[k] for b, row in zip(base, weights, strict=True)]
        edge = [f"{x(t):.1f} {y(v):.1f}H{x(t + 1):.1f}" for t, v in enumerate(over)]
        back = [f"{x(t + 1):.1f} {y(v):.1f}H{x(t):.1f}" for t, v in enumerate(base)][::-1]
        out.append(
            f'<path class="area c{k % COLOURS}" d="M{"L".join(edge + back)}Z">'
            f"<title>{escape(label)}</title></path>"
        )
        base = over
    ends = [*(first for _, first, _ in pieces[1:]), len(weights)]
    for (label, first, style), end in zip(pieces, ends, strict=True):
        out.append(f'<path class="mark" d="M{x(first):.1f} {top - 22}V{bottom}"/>')
        out.append(
            f'<rect class="{style}" x="{x(first):.1f}" y="{top - 9}" '
            f'width="{x(end) - x(first):.1f}" height="5"/>'
        )
        out.append(text(x(first) + 5, top - 15, f"{label} text", "label"))
    return svg(title, WIDTH, height, out)


def heat_map(
    title: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, str]],
    *,
    digits: int,
    warm: Literal["high", "low"] = "high",
    diagonal: bool = True,
    width: int = WIDTH // 2,
) -> str:
    """Draw a matrix as coloured cells with their values.

    Args:
        title: What a screen reader says.
        values: The matrix; 0 has no colour.
        rows: Label of each row and the class of its colour.
        columns: Label of each column and the class of its colour.

    Other:
        digits: Decimals of the values.
        warm: Whether values above or below 0 are warm; the others are cold.
        diagonal: Whether the diagonal says anything; it is left blank otherwise.
        width: Pixels.

    Returns:
        An ``<svg>`` element.
    """
    left, top, cell = 118, 34, 34
    step = (width - left - 4) / len(columns)
    drawn = [
        (i, j, value)
        for i, row in enumerate(values)
        for j, value in enumerate(row)
        if diagonal or i != j
    ]
    sizes = (abs(value) for _, _, value in drawn if math.isfinite(value))
    largest = max(sizes, default=0.0) or 1.0
    out = []
    for j, (label, style) in enumerate(columns):
        at = left + step * (j + 0.5)
        out.append(f'<rect class="{style}" x="{at - 9:.1f}" y="{top - 8}" width="18" height="3"/>')
        out.append(text(at, top - 14, shorten(label, max(3, int(step / 7))), "axis", "middle"))
    for i, (label, style) in enumerate(rows):
        y = top + cell * (i + 0.5)
        out.append(f'<rect class="{style}" x="{left - 8}" y="{y - 9}" width="3" height="18"/>')
        out.append(text(left - 15, y + 4, shorten(label, 14), "axis", "end"))
    for i, j, value in drawn:
        tone = "heat" if (value >= 0) == (warm == "high") else "heat cold"
        said, y = fixed(value, digits), top + cell * i
        out.append(
            f'<rect class="{tone}" style="--h:{min(abs(value) / largest, 1.0) ** 0.7:.2f}" '
            f'x="{left + step * j + 1:.1f}" y="{y + 1}" width="{step - 2:.1f}" '
            f'height="{cell - 2}" rx="4"><title>{escape(rows[i][0])}, {escape(columns[j][0])}: '
            f"{minus(said)}</title></rect>"
        )
        if step >= 7 * (digits + 3):
            out.append(text(left + step * (j + 0.5), y + cell / 2 + 4, said, "cell", "middle"))
    return svg(title, width, top + cell * len(rows) + 4, out)
