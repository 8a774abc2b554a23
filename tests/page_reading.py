"""The explorer's pages as tests read them, without a server: what a page asks is asked, and what it names is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from tasks.explore.vocabulary import Asked, Columns, Figure, Grid, Link, Page, PageAt, Panel, Query
from tasks.report.queries import tables_of
from tasks.report.vocabulary import Row

Kind = TypeVar("Kind")


class OneStatement:
    """A connection that can run statements and nothing else, as readers of the explorer have it."""

    def __init__(self, connection: Any) -> None:
        self.execute = connection.execute


def asked(connection: Any, parts: dict[str, str] | None = None, **values: str) -> Asked:
    """What a page is asked with, on a connection of a run's tables."""
    return Asked(
        connection=OneStatement(connection),
        tables=frozenset(tables_of(connection)),
        parts=parts or {},
        values=values,
    )


def built(
    pages: tuple[PageAt, ...],
    path: str,
    connection: Any,
    parts: dict[str, str] | None = None,
    **values: str,
) -> Page:
    """The page at a path, checked: its grids have the columns that they name, its links and charts can be made."""
    (page,) = [one for one in pages if one.path == path]
    made = page.build(asked(connection, parts, **values))
    keys = [grid.key for grid in of(made, Grid)]
    assert len(set(keys)) == len(keys)
    for grid in of(made, Grid):
        _check(grid, connection)
    for figure in of(made, Figure):
        assert figure.chart.alt
        assert figure.chart.spec.to_dict()
        rows(figure.query, connection)
    return made


def of(page: Page, kind: type[Kind]) -> list[Kind]:
    """The panels of a kind, those beside others too."""
    return [panel for panel in _flat(page.panels) if isinstance(panel, kind)]


def grid(page: Page, key: str) -> Grid:
    """The grid of a key."""
    (found,) = [one for one in of(page, Grid) if one.key == key]
    return found


def rows(query: Query, connection: Any) -> list[Row]:
    """A query's rows; its text, with the values in it, gives as many."""
    found = asked(connection).rows(query)
    assert len(asked(connection).rows(Query(sql=query.text))) == len(found)
    return found


def cells(grid: Grid, connection: Any) -> list[list[str]]:
    """What stands in a grid, row by row."""
    columns = [column.column if isinstance(column, Link) else column for column in grid.columns]
    return [[column.cell(row) for column in columns] for row in rows(grid.query, connection)]


def _check(grid: Grid, connection: Any) -> None:
    columns = [column.column if isinstance(column, Link) else column for column in grid.columns]
    cursor = connection.execute(grid.query.sql, dict(grid.query.values) or None)
    there = {column[0] for column in cursor.description}
    wanted = {column.key for column in columns} | {*grid.filters, *grid.bars}
    wanted |= {
        f"{column.key}_{end}" for column in columns if column.shows != "value" for end in ("low", "high")
    }
    wanted |= {grid.order.removeprefix("-")} - {""}
    assert wanted <= there, (grid.key, wanted - there)
    for row in rows(grid.query, connection):
        for column in grid.columns:
            if isinstance(column, Link):
                assert (column.to(row) or "/").startswith("/")


def _flat(panels: Any) -> Iterator[Panel]:
    for panel in panels:
        yield panel
        if isinstance(panel, Columns):
            yield from _flat(panel.panels)
