"""What the report draws and tabulates, as panels of a page: charts beside their query, tables as grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tasks.explore.vocabulary import Figure, Grid, Link, Query
from tasks.report.vocabulary import Row, Section, Table


def figures(section: Section, query: Query) -> list[Figure]:
    """A section's charts, the first under its title."""
    return [
        Figure(title="" if place else section.title, chart=chart, query=query)
        for place, chart in enumerate(section.charts)
    ]


def grid(
    key: str,
    table: Table,
    query: Query,
    *,
    order: str = "",
    filters: Sequence[str] = (),
    links: Mapping[str, Callable[[Row], str | None]] | None = None,
) -> Grid:
    """A table as a grid: its columns and words, and the rows of a query.

    Args:
        key: Of the grid.
        table: Of the report.
        query: Gives the keys of the table's columns.
        order: Of the grid.
        filters: Of the grid.
        links: Column to where its cells lead.
    """
    to = links or {}
    columns = [
        Link(column=column, to=to[column.key]) if column.key in to else column for column in table.columns
    ]
    return Grid(
        key=key,
        caption=table.caption,
        query=query,
        columns=columns,
        order=order,
        filters=filters,
        note=table.note,
    )


def given(table: Table) -> Query:
    """The rows of a table that no SQL can make, such as bootstrapped ones, as a query that has them in it.

    Args:
        table: With a row at least, and the same keys in all.
    """
    keys = list(table.rows[0])
    columns = [f'unnest($c{place}) AS "{key}"' for place, key in enumerate(keys)]
    values = {f"c{place}": [row[key] for row in table.rows] for place, key in enumerate(keys)}
    return Query(sql=f"SELECT {', '.join(columns)}", values=values)
