"""The report's page: sections of pictures and tables, set by one template that escapes everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tasks.report.style import svg_uri
from tasks.report.vocabulary import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 96


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table's column: its heading, and how its cells are set."""

    name: str
    kind: Literal["text", "number", "token"] = "text"

    @property
    def look(self) -> str:
        """As the new page wants it."""
        return "code" if self.kind == "token" else self.kind


def number_column(name: str) -> Column:
    """A column of numbers."""
    return Column(name=name, kind="number")


def number_columns(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [number_column(name) for name in names]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of cells that are already text.

    Attributes:
        caption: What it is.
        columns: Its columns.
        rows: Its cells, as many a row as there are columns.
        note: What to know when reading it.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def cells(self) -> Sequence[Sequence[str]]:
        """As the new page wants it."""
        return self.rows


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as a data URI, its size in CSS pixels, the text that stands for it, and one to go below it."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        key: Anchor.
        title: Heading.
        shows: What the figure or the tables show, and how to read them.
        picture: The figure, if there is one.
        pictures: More figures, where one is not enough.
        findings: What was found here.
        tables: Tables below it.
        missing: Why there is nothing to show, and the way out; empty where there is.
    """

    key: str
    title: str
    shows: str = ""
    picture: Picture | None = None
    pictures: Sequence[Picture] = ()
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = field(default_factory=tuple)
    missing: str = ""

    @property
    def charts(self) -> list[Picture]:
        """All figures, in order."""
        return [*([self.picture] if self.picture is not None else []), *self.pictures]


def picture(figure: Figure, alt: str, caption: str = "") -> Picture:
    """A figure as the page shows it."""
    width, height = figure.get_size_inches()
    return Picture(
        uri=svg_uri(figure),
        width=round(width * PIXELS_PER_INCH),
        height=round(height * PIXELS_PER_INCH),
        alt=alt,
        caption=caption,
    )
