"""What the report's figures are drawn with: axes, text, and the ``<svg>`` element around them.

Colours and fonts are classes of the page's style sheet (``c0`` to ``c11``, ``axis``, ``grid``,
``label``), so that a figure follows the page into dark mode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH = 1000
"""Width of a figure that fills the page; one of a pair has half of it."""
COLOURS = 12
"""How many series the style sheet has colours for; further ones start again."""


@dataclass(frozen=True)
class Axis:
    """Maps data to pixels, linearly or by logarithm.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Pixel.
        end: Pixel.
        log: Whether the axis is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
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


def x_axis(
    axis: Axis, top: float | None, bottom: float, label: str, *, whole: bool = False, count: int = 5
) -> list[str]:
    """Draw a horizontal axis below a figure.

    Args:
        axis: The axis.
        top: Where grid lines end; none are drawn without.
        bottom: Where the axis lies.
        label: What it says.

    Other:
        whole: Whether values are whole numbers.
        count: How many ticks, about.
    """
    out = [f'<path class="axis-line" d="M{axis.start} {bottom}H{axis.end}"/>']
    for tick in axis.ticks(count):
        if whole and tick != int(tick):
            continue
        if top is not None:
            out.append(f'<path class="grid" d="M{axis(tick):.1f} {top}V{bottom}"/>')
        out.append(text(axis(tick), bottom + 17, tick_label(tick), "axis", "middle"))
    if label:
        out.append(text((axis.start + axis.end) / 2, bottom + 35, label, "axis", "middle"))
    return out


def y_axis(axis: Axis, left: float, right: float, *, count: int = 4) -> list[str]:
    """Draw grid lines from ``left`` to ``right`` with their values at the left."""
    out = []
    for tick in axis.ticks(count):
        out.append(f'<path class="grid" d="M{left} {axis(tick):.1f}H{right}"/>')
        out.append(text(left - 8, axis(tick) + 4, tick_label(tick), "axis", "end"))
    return out


def polyline(points: Sequence[tuple[float, float]], style: str) -> str:
    """Draw a line through pixels."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="line {style}" d="M{path}"/>'


def dot(point: tuple[float, float], style: str) -> str:
    """Draw a dot at a pixel."""
    return f'<circle class="{style}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3"/>'


def text(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    """Draw text at a pixel."""
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(minus(words))}</text>"
    )


def svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """Return an ``<svg>`` element that a screen reader calls by ``title``."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def minus(words: str) -> str:
    """Return text whose negative numbers have a minus sign instead of a hyphen."""
    return re.sub(r"(?<![\w.-])-(?=[\d.])", "\N{MINUS SIGN}", words)


def fixed(value: float, digits: int) -> str:
    """Return a number with so many decimals; never a negative zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def shorten(name: str, longest: int) -> str:
    """Return a name cut to a number of characters."""
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def tick_label(value: float) -> str:
    """Return a tick's value as text."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def spread(at: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Move labels apart so that none covers another, in the order they have.

    Args:
        at: Where they would like to be.
        gap: The least distance between two.
        top: The least place.
        bottom: The largest place, if they fit.
    """
    order = sorted(range(len(at)), key=lambda i: at[i])
    placed = [max(place, top) for place in at]
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    limit = bottom
    for i in reversed(order):
        placed[i] = max(min(placed[i], limit), top)
        limit = placed[i] - gap
    return placed
