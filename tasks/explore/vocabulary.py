"""What the explorer's pages are said in: panels of rows, charts, texts and findings, each with the query behind it.

A page is a function from what was asked for (`Asked`: the parts and the query string of its address) to a `Page`; it
asks DuckDB through `Asked.rows` and returns values. It writes no HTML, opens no file and keeps nothing, so it runs in a
test as in the server, for many readers at once. `functok.explorer` turns pages into HTML: it sorts, filters and pages a
`Grid`, offers it as CSV and Parquet, opens any `Query` in the console (*Show SQL*), and escapes all that comes from a
run. An experiment brings pages as it brings sections of the report (`tasks.experiment.Experiment.pages`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, urlencode

from schemas.errors import FunctokError
from tasks.report import queries
from tasks.report.text import visible_text
from tasks.report.vocabulary import Chart, Column, Finding, Row

SQL = Path(__file__).parents[2] / "sql"

LONGEST_ASKED, OPTIONS_TOLD = 60, 12
"""Characters of what an address asks for, and options in its place, that are told where it cannot be."""


class NotThere(FunctokError):
    """What an address names is not in this run; the hint is where to go."""


class Refused(FunctokError):
    """What was asked for cannot be asked so; the hint says how."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """SQL and the values of its `$names`: what a panel was made of, and what *Show SQL* opens.

    Attributes:
        sql: One SELECT.
        values: Bound, never pasted: numbers, texts, lists of these, None.
    """

    sql: str
    values: Mapping[str, object] = field(default_factory=dict)

    @staticmethod
    def of(name: str, **values: object) -> Query:
        """The query in `sql/<name>.sql`, with these values."""
        return Query(sql=(SQL / f"{name}.sql").read_text(encoding="utf-8").strip(), values=values)

    @property
    def text(self) -> str:
        """The SQL with its values as literals, as somebody would type it."""
        # Neither in a text nor in a comment, which a line end in a value would end.
        return re.sub(
            r"'(?:[^']|'')*'|--[^\n]*|\$([a-z_][a-z0-9_]*)",
            lambda match: literal(self.values[match[1]]) if match[1] in self.values else match[0],
            self.sql,
        )


def literal(value: object) -> str:
    """A value as DuckDB SQL has it."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else f"'{value}'::DOUBLE"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, (date, datetime)):
        value = value.isoformat()
    return "'" + str(value).replace("'", "''") + "'"


def address(*parts: object, **values: object) -> str:
    """An address of the explorer, its parts and values encoded: `address("token", 5, layer=7)` is `/token/5?layer=7`.

    What is None is left out. An address of several values under one name is written by giving a list.
    """
    path = "".join(f"/{quote(str(part), safe='')}" for part in parts) or "/"
    known = {key: value for key, value in values.items() if value is not None}
    return f"{path}?{urlencode(known, doseq=True)}" if known else path


@dataclass(frozen=True, kw_only=True)
class Link:
    """A column of a grid whose cells lead somewhere.

    Attributes:
        column: What is shown.
        to: From a row to an address of the explorer, or None where there is nothing to go to.
    """

    column: Column
    to: Callable[[Row], str | None]


FEATURE = Link(
    column=Column("feature_id", "plain", "feature"),
    to=lambda row: address("feature", row["layer"], row["feature_id"]),
)
"""Of rows that name a layer and a feature of it."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table that can be sorted, filtered, paged and downloaded; all of it is in the page's address.

    Sorting, filtering and paging happen in DuckDB, around the query; a download holds all rows as filtered and sorted.

    Attributes:
        key: Its name in the address, and anchor; one of its own on a page.
        caption: What it is.
        query: Its rows; with columns that no `columns` names for links and downloads, if wanted.
        columns: What is shown of a row.
        order: Column that it is sorted by at first, with `-` before it: descending. Ties are broken by the others.
        filters: Columns that a reader can filter by: a text that is contained, a number as `>= 3`, `< 1e-4`, `7`.
        bars: Columns of numbers behind which a bar shows the share of the largest value on the page.
        page_size: Rows a page.
        note: What to know when reading it.
        empty: What is said where there is no row, and what to do to get some.
        is_written: Whether values come as DuckDB writes them: with all digits, and where they are not finite too.
    """

    key: str
    caption: str
    query: Query
    columns: Sequence[Column | Link]
    order: str = ""
    filters: Sequence[str] = ()
    bars: Sequence[str] = ()
    page_size: int = 50
    note: str = ""
    empty: str = "Nothing here."
    is_written: bool = False


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart, and the query behind it.

    Attributes:
        chart: Drawn alive in the page, as SVG where it is saved.
        query: Its data.
        title: Heading.
    """

    chart: Chart
    query: Query
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values, already as people read them; a value may lead somewhere.

    Attributes:
        facts: (name, value, address or "").
        title: Heading.
        query: Where they come from.
    """

    facts: Sequence[tuple[str, str, str]]
    title: str = ""
    query: Query | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found, with verdicts, as in the report."""

    findings: Sequence[Finding]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Shade:
    """A token of a shown text.

    Attributes:
        text: Visible (`tasks.models.token_texts.visible`, or with line ends kept for reading).
        strength: 0 … 1: how dark it is shaded.
        value: Under the cursor, and for those who cannot see shades.
        to: Where a click leads.
        mark: The token that the text is shown for.
        kind: Its hue: what is activated, what is lost (losses), what is gone.
    """

    text: str
    strength: float = 0.0
    value: str = ""
    to: str = ""
    mark: bool = False
    kind: Literal["activation", "loss", "gone"] = "activation"


@dataclass(frozen=True, kw_only=True)
class Context:
    """One text, token by token.

    Attributes:
        tokens: In order.
        about: Beside it: document, position, value.
        to: Where that leads.
    """

    tokens: Sequence[Shade]
    about: str = ""
    to: str = ""


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Texts below one another, tokens shaded by a value.

    Attributes:
        title: Heading.
        contexts: The texts.
        query: Where they come from.
        note: How to read the shades.
        wraps: Whether a text runs over as many lines as it needs; else it is one line, its marked token in view.
    """

    title: str
    contexts: Sequence[Context]
    query: Query | None = None
    note: str = ""
    wraps: bool = False


@dataclass(frozen=True, kw_only=True)
class Change:
    """Two texts as a difference, word by word: what went and what came.

    Attributes:
        title: What happened between them.
        before: The first text.
        after: The second.
        note: Below them.
    """

    title: str
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A control of a page: one of several values.

    Attributes:
        key: In the address.
        label: Before it.
        options: (value, shown).
        value: The one that is chosen.
    """

    key: str
    label: str
    options: Sequence[tuple[str, str]]
    value: str


@dataclass(frozen=True, kw_only=True)
class Slider:
    """A control of a page: a whole number, with the box to type it."""

    key: str
    label: str
    low: int
    high: int
    value: int


@dataclass(frozen=True, kw_only=True)
class Box:
    """A control of a page: a text to type; `suggestions` are offered while one types."""

    key: str
    label: str
    value: str = ""
    placeholder: str = ""
    suggestions: Sequence[str] = ()
    is_long: bool = False


Control: TypeAlias = Choice | Slider | Box


@dataclass(frozen=True, kw_only=True)
class Controls:
    """A form that leads to the same page with other values; it works without a script.

    Attributes:
        controls: In order.
        keep: Values of the address that stay.
        title: Heading.
    """

    controls: Sequence[Control]
    keep: Mapping[str, str] = field(default_factory=dict)
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A form whose values are kept beside the run; it is sent, not asked for.

    Attributes:
        to: Address that takes it.
        controls: What can be written.
        title: Heading.
        said: What is to be known.
    """

    to: str
    controls: Sequence[Control]
    title: str
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why there is nothing to show, and what to add to a configuration to get it.

    Attributes:
        what: One sentence.
        way: What to do, as a line of TOML or a command, or in words.
    """

    what: str
    way: str = ""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Panels side by side, where there is room."""

    panels: Sequence[Panel]


Panel: TypeAlias = (
    "Grid | Figure | Facts | Findings | Contexts | Change | Controls | Note | Missing | Columns"
)


@dataclass(frozen=True, kw_only=True)
class Page:
    """What an address shows.

    Attributes:
        title: Heading, and the window's.
        panels: From above.
        lead: One or two sentences: what this is, and how to read it.
        trail: Pages above it: (name, address).
        beside: (name, address) of neighbours: the same at other layers, the next, the one before. The keys ← and →
            turn to those whose name has the word `before`, and `next` or `after`.
    """

    title: str
    panels: Sequence[Panel]
    lead: str = ""
    trail: Sequence[tuple[str, str]] = ()
    beside: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a page is made from.

    Attributes:
        connection: Of `infra.duck.connect`, this reader's own; the tables of one finished run.
        parts: Of the address: those in braces of `PageAt.path`.
        values: Of the query string, the last of each name.
        lists: Of the query string, all of each name.
        tables: Names of the tables that are there.
        root: The run's root, as people write it.
        context: What the server knows beside the tables, by name: `storage` (`infra.storage.Storage`) and `catalog`
            (`infra.catalog.Catalog`) of what is shown, and `encode` (`tasks.explore.encoding`) where a model was given.
    """

    connection: Any
    tables: frozenset[str]
    parts: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    root: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    brought: Sequence[TokenValues | DensityBounds] = ()

    def has(self, *tables: str) -> bool:
        """Whether all of these tables are published."""
        return self.tables >= set(tables)

    def rows(self, query: Query) -> list[Row]:
        """The query's rows; what is not finite is None."""
        return queries.rows(self.connection, query.sql, dict(query.values) or None)

    def row(self, query: Query) -> Row | None:
        """Its first row; None where there is none."""
        return next(iter(self.rows(query)), None)

    def value(self, query: Query) -> Any:
        """The first value of its first row; None where there is none."""
        return queries.value(self.connection, query.sql, dict(query.values) or None)

    def part(self, key: str) -> int:
        """A whole number of the address.

        Raises:
            NotThere: if it is none, or one that no table can hold.
        """
        try:
            number = int(self.parts[key])
        except ValueError:
            raise NotThere(f"{self.parts[key]!r} is no whole number", hint="look at the address") from None
        if abs(number) >= 1 << 63:
            raise NotThere(f"{number} is larger than any number here", hint="look at the address")
        return number

    def chosen(
        self,
        key: str,
        options: Sequence[object],
        default: object | None = None,
        *,
        elsewhere: Iterable[object] = (),
    ) -> str:
        """The option that the address chooses; where it chooses none, the default, or the first.

        Args:
            key: In the address.
            options: What can be chosen.
            default: Where nothing is.
            elsewhere: What can be chosen where the page's other controls stand otherwise: a form sends it along, and
                it counts as nothing.

        Raises:
            NotThere: if the address names what is none of all these.
        """
        names, asked = [str(option) for option in options], self.values.get(key)
        if asked is not None and asked in names:
            return asked
        if asked and asked not in map(str, elsewhere):
            told = [visible_text(name, LONGEST_ASKED) for name in names if name]
            known = ", ".join([*told[:OPTIONS_TOLD], *(["…"] if len(told) > OPTIONS_TOLD else [])])
            what = f"there is no {key} {visible_text(asked, LONGEST_ASKED)} here"
            raise NotThere(what, hint=f"it may be {known}" if known else "")
        return str(options[0] if default is None else default) if names else ""

    def kept(self, name: object, make: Callable[[], Any]) -> Any:
        """What was made once for the tables of a run, or is made now."""
        kept = self.context.get("kept", {})
        if name not in kept:
            kept[name] = make()
        return kept[name]

    def choice(
        self,
        key: str,
        label: str,
        options: Sequence[tuple[str, str]],
        default: object | None = None,
        *,
        elsewhere: Iterable[object] = (),
    ) -> Choice:
        """A control of these options, at the one that is chosen (`chosen`, with its error)."""
        value = self.chosen(key, [option for option, _ in options], default, elsewhere=elsewhere)
        return Choice(key=key, label=label, options=options, value=value)

    def whole(self, key: str, low: int, high: int) -> int | None:
        """A whole number of the address; None where it has none under this name.

        Raises:
            Refused: if it is none, or not between these two, both included.
        """
        asked = self.values.get(key, "").strip()
        if not asked:
            return None
        is_whole = asked.removeprefix("-").isdecimal() and asked.isascii() and len(asked) < LONGEST_ASKED
        if not is_whole or not low <= int(asked) <= high:
            what = f"{key} cannot be {visible_text(asked, LONGEST_ASKED)} here"
            raise Refused(what, hint=f"it may be a whole number, {low:,} to {high:,}")
        return int(asked)

    def number(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number of the address, or the default; raises as `whole`."""
        asked = self.whole(key, low, high)
        return max(low, min(high, default)) if asked is None else asked


@dataclass(frozen=True, kw_only=True)
class PageAt:
    """A page and where it is.

    Attributes:
        path: Address with parts in braces: `/token/{token_id}`. An experiment's begin with `/<its name>`.
        title: In the menu, where it has a place there.
        build: Makes it.
        menu: Whether it stands in the menu.
    """

    path: str
    title: str
    build: Callable[[Asked], Page]
    menu: bool = False


@dataclass(frozen=True, kw_only=True)
class Action:
    """An address that takes a `Note`: it is sent to, and what it does is kept beside the run.

    Attributes:
        path: Address with parts in braces: `/label/{layer}/{feature_id}`.
        act: Does it, with what was written in `Asked.values`, and says which address is looked at next; raises
            `Refused` or `NotThere`.
    """

    path: str
    act: Callable[[Asked], str]


@dataclass(frozen=True, kw_only=True)
class TokenValues:
    """Numbers that an experiment has measured at the tokens of texts: the page of a text shades by them too.

    Attributes:
        name: One word, in addresses and under the cursor.
        shown: What it is, where a reader chooses what to shade by.
        needs: The tables that it takes.
        series: A row for each time that it was measured, the one to show at first last.
        told: How such a row is told.
        values: The query in `sql/` that gives `position` and `value`; it has `doc_id`, `first`, `last` and a row's
            columns.
        kind: The shade's hue.
    """

    name: str
    shown: str
    needs: tuple[str, ...]
    series: Query
    told: Callable[[Row], str]
    values: str
    kind: Literal["activation", "loss", "gone"] = "activation"


@dataclass(frozen=True, kw_only=True)
class DensityBounds:
    """Densities between which an experiment calls a feature by a name, such as learned.

    Attributes:
        name: The word.
        needs: The tables that it takes.
        bounds: One row of `low` and `high`, null where there are none.
    """

    name: str
    needs: tuple[str, ...]
    bounds: Query
