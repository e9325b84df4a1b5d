"""A page of sections, written as one self-contained HTML file and as Markdown.

Both formats print the same ``Table`` objects, whose cells are text, so their numbers are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustgate.lm.figures import COLOURS
from robustgate.lm.files import require, write_atomic

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and how far its background is from cool (0) to hot (1)."""

    text: str
    heat: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table; the first cell is its name."""

    cells: tuple[Cell, ...]
    emphasis: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Its head; the first column holds names, the others numbers.
        rows: Its rows.
        caption: How to read it.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str

    @property
    def heat(self) -> bool:
        """Whether it is a heat map."""
        return any(cell.heat is not None for row in self.rows for cell in row.cells)

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
        """Build a table from text alone."""
        return cls(tuple(columns), tuple(Row(tuple(map(Cell, row))) for row in rows), caption)


@dataclass(frozen=True)
class Figure:
    """A figure of the HTML page: an ``<svg>`` element and how to read it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Token:
    """A token of a coloured document: text, class of its colour, strength from 0 to 1."""

    text: str
    style: str
    weight: str


@dataclass(frozen=True)
class Passage:
    """A labelled stretch of a coloured document."""

    label: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading.
        text: Paragraphs.
        figures: HTML only.
        side_by_side: Whether the figures stand side by side where the screen is wide enough.
        passages: A document coloured token by token; HTML only.
        tables: Its tables.
    """

    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    side_by_side: bool = False
    passages: tuple[Passage, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its heading.
        lead: A paragraph below the heading.
        headline: The one sentence to take away.
        sections: Its parts.
        footer: Small print.
    """

    title: str
    lead: str
    headline: str
    sections: tuple[Section, ...]
    footer: str

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
        folder.mkdir(parents=True, exist_ok=True)
        for template, name in (("report.md.j2", "report.md"), ("report.html.j2", "index.html")):
            text = environment.get_template(template).render(
                **{field: getattr(self, field) for field in self.__dataclass_fields__},
                colours=COLOURS,
            )
            write_atomic(folder / name, (text.strip() + "\n").encode())
        return folder / "index.html"
