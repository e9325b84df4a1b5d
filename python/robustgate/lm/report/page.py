"""A page of sections, written as one self-contained HTML file and as Markdown.

Both formats print the same ``Table`` objects, whose cells are text, so their numbers are equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustgate.lm.files import require, write_atomic
from robustgate.lm.report.svg import COLOURS, minus

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What it says.
        heat: How far its background is from cool (0) to hot (1).
        best: Whether it is the best of its column.
        style: Class of the colour of what it names, such as ``c0``.
    """

    text: str
    heat: float | None = None
    best: bool = False
    style: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        cells: The first is its name.
        emphasis: Whether it is the row to look at.
        muted: Whether it stands back, as a bound that no model reaches.
        first: Whether a group of rows begins with it.
    """

    cells: tuple[Cell, ...]
    emphasis: bool = False
    muted: bool = False
    first: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Its head; the first column holds names, the others numbers.
        rows: Its rows.
        caption: How to read it.
        title: What it is called where it is folded away.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str
    title: str = ""

    @property
    def heat(self) -> bool:
        """Whether it is a heat map."""
        return any(cell.heat is not None for row in self.rows for cell in row.cells)

    @classmethod
    def of(
        cls,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        caption: str,
        title: str = "",
        styles: Sequence[str] = (),
    ) -> Table:
        """Build a table from text alone; ``styles`` are the classes of its rows' names."""
        kinds = styles or [""] * len(rows)
        return cls(
            tuple(columns),
            tuple(
                Row((Cell(row[0], style=style), *map(Cell, row[1:])))
                for row, style in zip(rows, kinds, strict=True)
            ),
            caption,
            title,
        )


@dataclass(frozen=True)
class Figure:
    """A figure of the HTML page: an ``<svg>`` element, how to read it, and its heading."""

    svg: str
    caption: str
    title: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a name and the class of its colour."""

    name: str
    style: str


@dataclass(frozen=True)
class Token:
    """A token of a coloured document: text, class of its colour, strength 0 to 1, and a note."""

    text: str
    style: str
    weight: str
    note: str


@dataclass(frozen=True)
class Passage:
    """A labelled stretch of a coloured document."""

    label: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Stat:
    """A number to see first: what it is, its value, and what it means."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Section:
    """A part of a page, in this order.

    Attributes:
        title: Its heading.
        text: Paragraphs.
        legend: Of all its figures.
        figures: HTML only.
        columns: How many figures stand side by side where the screen is wide enough.
        passages: A document coloured token by token; HTML only.
        tables: Its tables.
        folded: Tables that open on a click.
    """

    title: str
    text: tuple[str, ...] = ()
    legend: tuple[Key, ...] = ()
    figures: tuple[Figure, ...] = ()
    columns: int = 1
    passages: tuple[Passage, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()

    @property
    def anchor(self) -> str:
        """Return what a link to it points to."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its heading.
        lead: A paragraph below the heading.
        headline: The one sentence to take away.
        sections: Its parts.
        footer: Small print.
        stats: Numbers to see first.
        legend: Colours that mean the same everywhere on the page.
    """

    title: str
    lead: str
    headline: str
    sections: tuple[Section, ...]
    footer: str
    stats: tuple[Stat, ...] = ()
    legend: tuple[Key, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write ``index.html`` and ``report.md``.

        Args:
            folder: Made if needed.

        Returns:
            Path of ``index.html``.

        Raises:
            ImportError: jinja2 is missing.
            OSError: A file could not be written.
        """
        jinja2 = require("jinja2")
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATES),
            autoescape=lambda name: str(name).endswith(".html.j2"),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["minus"] = minus
        folder.mkdir(parents=True, exist_ok=True)
        for template, name in (("report.md.j2", "report.md"), ("report.html.j2", "index.html")):
            text = environment.get_template(template).render(
                **{field: getattr(self, field) for field in self.__dataclass_fields__},
                colours=COLOURS,
            )
            write_atomic(folder / name, (text.strip() + "\n").encode())
        return folder / "index.html"
