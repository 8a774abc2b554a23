"""Grids: a query's rows, sorted, filtered and paged in DuckDB as the page's address says.

In an address, everything of the grid `tokens` begins with `tokens.`: `tokens.sort=-count` (descending by a column),
`tokens.page=3`, and `tokens.<column>=` with what a reader filters that column by. Values are bound, never pasted, and
columns are taken from the query's own, so an address can ask for nothing that the query does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

from tasks.explore.vocabulary import Grid, Link, Query, Refused
from tasks.models.token_texts import NAMED, visible
from tasks.report.queries import rows
from tasks.report.vocabulary import Column, Row

MOST_ROWS = 1_000
"""Rows of a page at most, whatever an address asks for."""

_NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONDITIONS = re.compile(rf"\s*(>=|<=|!=|<>|=|>|<)?\s*({_NUMBER})\s*(%)?\s*(?:,|and|\s|$)", re.IGNORECASE)
_TRUTHS = {"yes": True, "true": True, "1": True, "✓": True, "no": False, "false": False, "0": False}


@dataclass(frozen=True)
class Address:
    """A page's path and the values after it, in order."""

    path: str
    pairs: tuple[tuple[str, str], ...] = ()

    def with_(self, changes: Mapping[str, str | None], anchor: str = "") -> str:
        """The address with some values changed; one that is None is taken out."""
        kept = [(key, value) for key, value in self.pairs if key not in changes]
        new = [(key, value) for key, value in changes.items() if value is not None]
        query = urlencode(kept + new)
        return f"{self.path}{'?' if query else ''}{query}{'#' if anchor else ''}{anchor}"

    def unfiltered(self, grid: Grid) -> str:
        """The address without the grid's filters."""
        return self.with_({f"{grid.key}.{column}": None for column in (*grid.filters, "page")}, grid.key)

    def beside_filters(self, grid: Grid) -> list[tuple[str, str]]:
        """The values that stay when the grid is filtered: all but its filters and its page."""
        own = {f"{grid.key}.{column}" for column in (*grid.filters, "page")}
        return [(key, value) for key, value in self.pairs if key not in own]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What a reader filters a column by.

    Attributes:
        column: Its name.
        kind: What can be typed.
        typed: What was.
        wrong: Why that means nothing; empty where it does.
    """

    column: str
    kind: str
    typed: str = ""
    wrong: str = ""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A column as a page shows it: its text, the address that sorts by it, and its filter."""

    column: Column
    sort: str
    direction: str
    filter: Filter | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell: its text, where it leads, and the bar behind it, in twentieths of the largest value on the page."""

    text: str
    look: str
    to: str = ""
    bar: int | None = None


@dataclass(frozen=True, kw_only=True)
class ShownGrid:
    """A page of a grid.

    Attributes:
        headings: Its columns.
        cells: Its rows.
        others: Filters of columns that are not shown.
        n_rows: Rows as filtered, on all pages.
        first: Number of the first row on this page, from 1.
        pages: (text, address or "") of the pages near this one.
        is_filtered: Whether any filter is in use.
        ignored: What of the address asks for what the grid does not have, each as a sentence.
        sql: As sorted and filtered.
    """

    headings: Sequence[Heading]
    cells: Sequence[Sequence[Cell]]
    others: Sequence[Filter]
    n_rows: int
    first: int
    pages: Sequence[tuple[str, str]]
    is_filtered: bool
    ignored: Sequence[str]
    sql: Query


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A grid's query as an address asks for it, without a limit."""

    query: Query
    filters: Mapping[str, Filter]
    order: str
    ignored: Sequence[str]


def asked(connection: Any, grid: Grid, address: Address) -> _Asked:
    """The grid's query, sorted and filtered."""
    found = connection.execute(f"SELECT * FROM ({grid.query.sql}) LIMIT 0", dict(grid.query.values) or None)
    kinds = {name: kind_of(str(type_)) for name, type_, *_ in found.description}
    given = dict(address.pairs)
    values, conditions, filters = dict(grid.query.values), [], {}
    for column in grid.filters:
        typed = given.get(f"{grid.key}.{column}", "").strip()
        wrong = ""
        if typed:
            try:
                for sql, *bound in _conditions(column, kinds[column], typed):
                    names = [f"filter_{len(values) + place}" for place in range(len(bound))]
                    values |= dict(zip(names, bound, strict=True))
                    conditions.append(sql.format(*(f"${name}" for name in names)))
            except Refused as error:
                wrong = error.message
        filters[column] = Filter(column=column, kind=kinds[column], typed=typed, wrong=wrong)
    own = {key.removeprefix(f"{grid.key}.") for key in given if key.startswith(f"{grid.key}.")}
    unknown = sorted(own - {*grid.filters, "sort", "page"})
    ignored = [f"This table cannot be filtered by {visible(column)}." for column in unknown]
    order = given.get(f"{grid.key}.sort", grid.order)
    if (by := order.removeprefix("-")) not in kinds:
        ignored += [f"It has no {visible(by)} to be sorted by."] if by else []
        order = grid.order
    sql = f"SELECT * FROM (\n{grid.query.sql}\n)"
    if conditions:
        sql += f"\nWHERE {' AND '.join(conditions)}"
    if order:
        by = order.removeprefix("-")
        first = f"{_name(by)} {'DESC' if order[0] == '-' else 'ASC'} NULLS LAST"
        sql += f"\nORDER BY {', '.join([first, *(_name(column) for column in kinds if column != by)])}"
    return _Asked(query=Query(sql=sql, values=values), filters=filters, order=order, ignored=ignored)


def shown(connection: Any, grid: Grid, address: Address) -> ShownGrid:
    """The page of a grid that an address asks for."""
    query = asked(connection, grid, address)
    given = dict(address.pairs)
    size = max(1, min(MOST_ROWS, grid.page_size))
    values = dict(query.query.values)
    typed = given.get(f"{grid.key}.page") or "1"
    page = _page(typed)

    def of_page(number: int) -> list[Row]:
        sql = f"{query.query.sql}\nLIMIT {size} OFFSET {(number - 1) * size}"
        if grid.is_written:
            sql = f"SELECT COLUMNS(*)::VARCHAR FROM (\n{sql}\n)"
        return rows(connection, sql, values or None)

    found = of_page(page)
    if 0 < len(found) < size or (page == 1 and not found):
        n_rows = (page - 1) * size + len(found)
    else:
        counted = connection.execute(f"SELECT count(*) FROM ({query.query.sql})", values or None)
        n_rows = int(counted.fetchone()[0])
        if not found:
            last = max(1, -(-n_rows // size))
            page = last
            found = of_page(page)
    columns = [(c.column, c.to) if isinstance(c, Link) else (c, None) for c in grid.columns]
    largest = {
        key: max((abs(row[key]) for row in found if row.get(key) is not None), default=0) for key in grid.bars
    }
    shown_keys = {column.key for column, _ in columns}
    is_filtered = any(one.typed for one in query.filters.values())
    ignored = [*query.ignored, *([] if typed == str(page) else [f"It has no page {visible(typed)}."])]
    return ShownGrid(
        headings=[_heading(grid, column, query, address) for column, _ in columns],
        cells=[[_cell(row, column, to, largest) for column, to in columns] for row in found],
        others=[one for key, one in query.filters.items() if key not in shown_keys],
        n_rows=n_rows,
        first=(page - 1) * size + 1,
        pages=_pages(grid, address, page, max(1, -(-n_rows // size))),
        is_filtered=is_filtered,
        ignored=ignored,
        sql=query.query,
    )


def _heading(grid: Grid, column: Column, query: _Asked, address: Address) -> Heading:
    by, key = query.order.removeprefix("-"), column.key
    direction = "" if by != key else "descending" if query.order.startswith("-") else "ascending"
    # Numbers are mostly looked for from the largest.
    starts = "" if column.look != "number" else "-"
    to = f"{starts}{key}" if not direction else key if direction == "descending" else f"-{key}"
    return Heading(
        column=column,
        sort=address.with_({f"{grid.key}.sort": to, f"{grid.key}.page": None}, grid.key),
        direction=direction,
        filter=query.filters.get(key),
    )


def _cell(row: Row, column: Column, to: Any, largest: Mapping[str, float]) -> Cell:
    bar = None
    if column.key in largest and row.get(column.key) is not None and largest[column.key]:
        bar = round(20 * abs(row[column.key]) / largest[column.key])
    return Cell(text=column.cell(row), look=column.look, to=(to(row) or "") if to else "", bar=bar)


def _page(text: str) -> int:
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else 1


def _pages(grid: Grid, address: Address, page: int, last: int) -> list[tuple[str, str]]:
    """The first page, the last one and those around this one, with gaps between them."""
    near = sorted({1, last, *range(max(1, page - 2), min(last, page + 2) + 1)})
    shown: list[tuple[str, str]] = []
    for place, number in enumerate(near):
        if place and number > near[place - 1] + 1:
            shown.append(("…", ""))
        to = address.with_({f"{grid.key}.page": str(number)}, grid.key)
        shown.append((f"{number:,}", "" if number == page else to))
    return shown if last > 1 else []


def kind_of(duckdb_type: str) -> str:
    """How a column of this type can be filtered: as a number, a truth or a text."""
    if re.match(r"U?(TINY|SMALL|BIG|HUGE)?INT|INTEGER|UINTEGER|DOUBLE|FLOAT|DECIMAL|NUMBER", duckdb_type):
        return "number"
    return "truth" if duckdb_type.startswith("BOOL") else "text"


def _conditions(column: str, kind: str, typed: str) -> list[tuple[Any, ...]]:
    """SQL with places for values, and the values, of what was typed into a filter.

    Raises:
        Refused: if it means nothing.
    """
    name = _name(column).replace("{", "{{").replace("}", "}}")
    if kind == "text":
        # A blank is shown as ␣, and can be typed as such; some texts are kept as they are shown.
        plain = typed
        for hidden, visible in NAMED.items():
            plain = plain.replace(visible, hidden)
        contains = f"contains(lower({name}::VARCHAR), lower({{}}))"
        return [(contains, typed) if plain == typed else (f"({contains} OR {contains})", typed, plain)]
    if kind == "truth":
        if typed.lower() not in _TRUTHS:
            raise Refused("type yes or no")
        return [(f"{name} = {{}}", _TRUTHS[typed.lower()])]
    found: list[tuple[Any, ...]] = []
    end = 0
    for match in _CONDITIONS.finditer(typed):
        if match.start() != end:
            break
        end = match.end()
        text = match[2].replace("_", "")
        value = int(text) if re.fullmatch(r"[-+]?\d{1,30}", text) else float(text)
        if match[3]:
            value = float(Decimal(text) / 100)
        found.append((f"{name} {match[1] or '='} {{}}", value))
    if end != len(typed) or not found:
        raise Refused("type a number, as 7, >= 3, > 5 % or < 1e-4")
    return found


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
