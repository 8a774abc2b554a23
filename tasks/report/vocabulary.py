"""What a report is said in: sections of charts, findings and tables.

Whoever has something to report fills these in. Nobody formats a cell or draws a line by hand: a column's kind says how
its values are set (`Column`), a chart is a declarative spec made of few parts (`tasks.report.charts`), and a verdict
follows from the signs of the intervals that a claim rests on (`every`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tasks.models.token_texts import visible
from tasks.report.text import (
    DASH,
    change,
    decimal,
    integer,
    number,
    passage,
    percent,
    plain,
    signed,
    visible_text,
)

if TYPE_CHECKING:
    from tasks.report.charts import Spec

Row = dict[str, Any]
"""A table's row by the names of its columns, as `tasks.report.queries.rows` gives it."""

Verdict = Literal["holds", "differs", "undecided", "untested", "own"]
Sign = Literal["above", "below", "unclear"]

SAID: dict[Verdict, str] = {
    "holds": "holds here",
    "differs": "does not hold here",
    "undecided": "is undecided here: not every interval lies on one side of zero",
}
"""How a sentence ends that begins with a claim."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> Sign:
        """On which side of zero the whole interval lies."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "unclear"

    def row(self, key: str) -> dict[str, float]:
        """As a table's row holds it: `<key>`, `<key>_low` and `<key>_high`."""
        return {key: self.value, f"{key}_low": self.low, f"{key}_high": self.high}

    @staticmethod
    def of(row: Row, key: str) -> Estimate:
        """The one that a table's row holds under `key`; what is null there is NaN."""
        value, low, high = (row[f"{key}{end}"] for end in ("", "_low", "_high"))
        return Estimate(
            value=math.nan if value is None else value,
            low=math.nan if low is None else low,
            high=math.nan if high is None else high,
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found here.

    Attributes:
        text: One or two sentences.
        verdict: Whether a claim of the paper holds here: `undecided` where these numbers cannot tell, `untested`
            where there are none, `own` where the paper makes no claim.
        title: The claim in a few words, where a section has several.
    """

    text: str
    verdict: Verdict = "own"
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, the text that stands for it, and one to go below it.

    Attributes:
        spec: What to draw (`tasks.report.charts`); the report draws it as an image, a live page as it is.
        alt: What somebody reads who cannot see it.
        caption: Below it.
    """

    spec: Spec
    alt: str
    caption: str = ""


Kind = Literal[
    "text", "token", "code", "passage", "plain", "integer", "number", "decimal", "signed", "change", "percent",
    "met", "mark",
]  # fmt: skip

_FORMATS: dict[Kind, Callable[..., str]] = {
    "text": lambda value, longest=400: visible_text(value, longest),
    "token": visible,
    "code": lambda value: DASH if value is None else value,
    "passage": passage,
    "plain": plain,
    "integer": integer,
    # What is counted has no zeros after it.
    "number": lambda value, digits=3: number(value, digits, is_even=not isinstance(value, int)),
    "decimal": decimal,
    "signed": signed,
    "change": change,
    "percent": percent,
    "met": lambda value: "✓ yes" if value else "✗ no",
    "mark": lambda value: "✓" if value else "",
}


@dataclass(frozen=True)
class Column:
    """A table's column: which value of a row it shows, and how.

    Attributes:
        key: Of the row; an interval's ends are `<key>_low` and `<key>_high`.
        kind: `text`: words; `token`: one token; `code`: a token that is already visible (`text.label`); `passage`: a
            generated text; `plain`: an id or a setting as it is; `integer`, `number` (significant digits), `decimal`,
            `signed`, `change` (with + or −), `percent`; `met`, `mark`: whether it is so. What is not there is a dash; a
            string in a column of numbers stands as it is.
        heading: Above it; empty: the key, its underscores as spaces.
        digits: Of numbers, or the longest a text may be; None: as the kind has it.
        shows: The `value`, its `interval`, or the value with the interval after it.
        factor: Numbers are shown times this.
    """

    key: str
    kind: Kind = "text"
    heading: str = ""
    digits: int | None = None
    shows: Literal["value", "interval", "both"] = "value"
    factor: float = 1

    @property
    def name(self) -> str:
        """What stands above it."""
        return self.heading or self.key.replace("_", " ")

    @property
    def look(self) -> Literal["text", "number", "code"]:
        """How its cells are set."""
        if self.kind in {"token", "code", "passage"}:
            return "code"
        return "text" if self.kind in {"text", "met", "mark"} else "number"

    def cell(self, row: Row) -> str:
        """The text of a row's cell."""
        if self.shows == "value":
            return self._told(row.get(self.key))
        low, high = (self._told(row.get(f"{self.key}_{end}")) for end in ("low", "high"))
        if self.shows == "interval":
            return DASH if DASH in (low, high) else f"{low} to {high}"
        value = self._told(row.get(self.key))
        return value if DASH in (value, low, high) else f"{value} ({low} to {high})"

    def _told(self, value: Any) -> str:
        if isinstance(value, str) and self.look == "number":
            return value
        if self.factor != 1 and value is not None:
            value = self.factor * value
        return _FORMATS[self.kind](value, *([] if self.digits is None else [self.digits]))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of rows, shown by its columns.

    Attributes:
        caption: What it is.
        columns: Its columns.
        rows: Values by the columns' keys; ones that no column names are not shown.
        note: What to know when reading it.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""

    @property
    def cells(self) -> list[list[str]]:
        """The text of every cell, row by row."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report.

    Attributes:
        key: Anchor.
        title: Heading.
        shows: What charts and tables show, and how to read them.
        charts: The charts.
        findings: What was found here.
        tables: Tables below them.
        missing: Why there is nothing to show, and the way out; empty where there is.
    """

    key: str
    title: str
    shows: str = ""
    charts: Sequence[Chart] = ()
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    missing: str = ""


class Part(Protocol):
    """What an experiment tells in the report: a module or an object with these.

    A connection is one of `infra.duck.connect`. What the run has no tables for is not told: the lists are then empty.
    """

    @property
    def HAS_OWN_GRAPHS(self) -> bool:
        """Whether a run that has this part is not expected to have a graph of its `[[sae]]` too."""

    def facts(self, connection: Any) -> list[tuple[str, str]]:
        """Names and numbers for the head of the report."""

    def sections(self, connection: Any) -> list[Callable[[], Section]]:
        """What builds each section."""

    def findings(self, connection: Any) -> list[Finding]:
        """The paper's claims held against this run, for the closing print."""


def every(signs: Iterable[Sign]) -> Verdict:
    """Whether all claims hold: `below` refutes at once, `unclear` leaves it open."""
    found = set(signs)
    return "differs" if "below" in found else "undecided" if "unclear" in found or not found else "holds"


def untested(title: str, why: str) -> Finding:
    """A claim that these tables cannot be asked about."""
    return Finding(title=title, verdict="untested", text=f"{why[:1].upper()}{why[1:]}.")


def holds(claim: bool) -> str:
    """How a sentence ends that begins with a claim which needs no interval."""
    return "holds" if claim else "does not hold"


def estimate(value: Estimate, digits: int = 3) -> str:
    """A number with its interval."""
    if value.value != value.value:
        return "not defined"
    if value.low != value.low:
        return f"{signed(value.value, digits)} (no interval)"
    return f"{signed(value.value, digits)} ({signed(value.low, digits)} to {signed(value.high, digits)})"


def beyond(value: Estimate, words: tuple[str, str] = ("above", "below"), digits: int = 3) -> str:
    """A difference with its interval, told without a sign: `0.310 (0.280 to 0.340) below`."""
    if value.value < 0:
        value = Estimate(value=-value.value, low=-value.high, high=-value.low)
        return f"{estimate(value, digits)} {words[1]}"
    return f"{estimate(value, digits)} {words[0]}"
