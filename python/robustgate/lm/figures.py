"""The report's figures as inline SVG: bars with intervals, lines, stacked areas.

Colours and fonts are classes of the page's style sheet (``c0`` to ``c7``, ``axis``, ``grid``,
``label``), so that a figure follows the page into dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import compress, pairwise

WIDTH = 860
"""Width of a figure that fills the page; one of a pair has half of it."""
COLOURS = 8
"""How many series the style sheet has colours for; further ones start again."""


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
    """One line of a chart: its label and a value per step."""

    label: str
    values: Sequence[float]
    style: str


@dataclass(frozen=True)
class _Axis:
    """Maps data to pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(v) if self.log else v for v in (self.low, self.high))
        at = math.log10(max(value, self.low)) if self.log else value
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round numbers inside the axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            stride = max(1, round((last - first) / count))
            return [10.0**e for e in range(first, last + 1, stride)]
        rough = (self.high - self.low) / count or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * min((m for m in (1, 2, 5, 10) if m * power >= rough), default=10)
        begin, end = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(begin, end + 1)]


def bars(
    title: str,
    rows: Sequence[Bar],
    *,
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Draw horizontal bars with intervals.

    Args:
        title: What a screen reader says.
        rows: Bars from top to bottom.
        x_label: Text below the axis.
        marks: Two values at most with a dashed vertical line, and the lines' labels.

    Returns:
        An ``<svg>`` element.
    """
    left, right, top, step = 170, 90, 26 if marks else 8, 27
    height = top + step * len(rows) + 44
    values = [0.0, *(v for row in rows for v in (row.value, row.lower, row.upper))]
    values += [value for value, _ in marks]
    axis = _Axis(min(values), max(values) * 1.02, left, WIDTH - right)
    bottom = top + step * len(rows) + 4
    out = _x_axis(axis, top - 4, bottom, x_label)
    for i, row in enumerate(rows):
        y = top + step * i + step / 2
        begin, end = sorted((axis(0.0), axis(row.value)))
        out.append(_text(left - 10, y + 4, row.label, "label", "end"))
        out.append(
            f'<rect class="{row.style}" x="{begin:.1f}" y="{y - 8:.1f}" '
            f'width="{max(end - begin, 1):.1f}" height="16" rx="2"/>'
        )
        low, high = axis(row.lower), axis(row.upper)
        out.append(
            f'<path class="whisker" d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8'
            f'M{high:.1f} {y - 4:.1f}v8"/>'
        )
        out.append(_text(max(end, high) + 8, y + 4, row.text, "value"))
    for value, label in marks:
        x = axis(value)
        last = value == max(v for v, _ in marks)
        out.append(f'<path class="mark" d="M{x:.1f} {top - 20}V{bottom}"/>')
        out.append(
            _text(x + (5 if last else -5), top - 12, label, "axis", "start" if last else "end")
        )
    return _svg(title, height, out)


def lines(
    title: str,
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    width: int = WIDTH // 2,
    height: int = 240,
) -> str:
    """Draw lines over the steps 0, 1, ..., each labelled at its end.

    Args:
        title: What a screen reader says.
        series: The lines, all of one length.
        x_label: Text below the axis.
        y_label: Text above the axis.
        log: Logarithmic vertical axis; values that are infinite or not positive are left out.

    Other:
        width: Pixels.
        height: Pixels.

    Returns:
        An ``<svg>`` element.
    """
    left, right, top, bottom = 48, 82, 26, height - 44
    steps = max(len(line.values) for line in series) - 1
    drawable = [[math.isfinite(v) and (v > 0 or not log) for v in line.values] for line in series]
    shown = [
        v for line, ok in zip(series, drawable, strict=True) for v in compress(line.values, ok)
    ]
    low, high = min(shown, default=0.1), max(shown, default=1.0)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    else:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    x = _Axis(0, max(steps, 1), left, width - right)
    y = _Axis(low, high if high > low else low * 10, bottom, top, log)
    out = _x_axis(x, None, bottom, x_label, whole=True)
    for tick in y.ticks(4):
        out.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{width - right}"/>')
        out.append(_text(left - 8, y(tick) + 4, _tick(tick), "axis", "end"))
    out.append(_text(left, top - 12, y_label, "axis"))
    ends = _spread([y(line.values[-1]) for line in series], 15, top, bottom)
    for line, ok, end in zip(series, drawable, ends, strict=True):
        points = [f"{x(i):.1f} {y(v):.1f}" for i, v in compress(enumerate(line.values), ok)]
        out.append(f'<path class="line {line.style}" d="M{"L".join(points)}"/>')
        out.append(_text(width - right + 8, end + 4, line.label, f"name {line.style}"))
    return _svg(title, height, out, width)


def areas(
    title: str,
    weights: Sequence[Sequence[float]],
    labels: Sequence[str],
    pieces: Sequence[tuple[str, int]],
    *,
    x_label: str,
    height: int = 230,
) -> str:
    """Draw shares that sum to 1 as stacked areas along a document.

    Args:
        title: What a screen reader says.
        weights: Shares per position, ``[T][K]``.
        labels: Names of the K shares.
        pieces: Label and first position of each part of the document.
        x_label: Text below the axis.

    Other:
        height: Pixels.

    Returns:
        An ``<svg>`` element.
    """
    left, right, top, bottom = 40, 16, 30, height - 66
    x = _Axis(0, len(weights), left, WIDTH - right)
    y = _Axis(0, 1, bottom, top)
    out = _x_axis(x, None, bottom, x_label, whole=True)
    for tick in (0, 0.5, 1):
        out.append(_text(left - 8, y(tick) + 4, _tick(tick), "axis", "end"))
    base = [0.0] * len(weights)
    for k in range(len(labels)):
        over = [b + row[k] for b, row in zip(base, weights, strict=True)]
        edge = [f"{x(t):.1f} {y(v):.1f}H{x(t + 1):.1f}" for t, v in enumerate(over)]
        back = [f"{x(t + 1):.1f} {y(v):.1f}H{x(t):.1f}" for t, v in enumerate(base)][::-1]
        out.append(f'<path class="area c{k % COLOURS}" d="M{"L".join(edge + back)}Z"/>')
        base = over
    for label, first in pieces:
        out.append(f'<path class="mark" d="M{x(first):.1f} {top - 18}V{bottom}"/>')
        out.append(_text(x(first) + 5, top - 8, f"{label} text", "label"))
    at = float(left)
    for k, label in enumerate(labels):
        out.append(
            f'<rect class="c{k % COLOURS}" x="{at:.0f}" y="{height - 16}" width="11" height="11" '
            'rx="2"/>'
        )
        out.append(_text(at + 16, height - 6, label, "label"))
        at += 34 + 7.2 * len(label)
    return _svg(title, height, out)


def _x_axis(
    axis: _Axis, top: float | None, bottom: float, label: str, whole: bool = False
) -> list[str]:
    out = [f'<path class="axis-line" d="M{axis.start} {bottom}H{axis.end}"/>']
    for tick in axis.ticks():
        if whole and tick != int(tick):
            continue
        if top is not None:
            out.append(f'<path class="grid" d="M{axis(tick):.1f} {top}V{bottom}"/>')
        out.append(_text(axis(tick), bottom + 16, _tick(tick), "axis", "middle"))
    out.append(_text((axis.start + axis.end) / 2, bottom + 33, label, "axis", "middle"))
    return out


def _spread(at: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Move labels apart so that none covers another, in the order they have."""
    order = sorted(range(len(at)), key=lambda i: at[i])
    placed = list(at)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    overflow = max((placed[i] for i in order), default=top) - bottom
    return [p - max(overflow, 0.0) for p in placed]


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(title: str, height: float, parts: Sequence[str], width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
