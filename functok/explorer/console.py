"""The console: SELECT over the published tables, a result as a grid and a chart, within limits of time and rows.

What a reader types runs in the same database as pages, which reads the root's folders and nothing else
(`functok.explorer.tables`). It must be one SELECT, as DuckDB itself parses it, and call no table function that does
more than read: COPY and ATTACH would write, and `pandas_scan(1)` reads memory.

DuckDB ends a query between two pieces of work, and a call of one function is a piece: `repeat('x', 2000000000)` goes on
for as long as it takes, and neither `max_execution_time` nor `memory_limit` reaches into it. Its reader is answered in
time all the same (`functok.explorer.app.LATE`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import altair as alt
import duckdb

from functok.explorer.grids import kind_of
from functok.explorer.tables import Reader
from schemas.tables import TABLES
from tasks.explore.vocabulary import Choice, Figure, Grid, Query, Refused, Slider
from tasks.report import charts
from tasks.report.text import visible_text
from tasks.report.vocabulary import Chart, Column, Row

MOST_ROWS, MOST_SECONDS = 100_000, 600
DEFAULT_ROWS, DEFAULT_SECONDS = 1_000, 30
CHARTED = 5_000
"""Rows of a chart at most."""

TABLE_FUNCTIONS = frozenset(
    [
        "range",
        "generate_series",
        "unnest",
        "repeat",
        "repeat_row",
        "summary",
        "histogram",
        "histogram_values",
        "json_each",
        "json_tree",
        "read_parquet",
        "parquet_scan",
        "parquet_metadata",
        "parquet_schema",
        "parquet_file_metadata",
        "parquet_kv_metadata",
        "read_csv",
        "read_csv_auto",
        "read_json",
        "read_json_auto",
        "read_ndjson",
        "read_ndjson_auto",
        "read_text",
        "glob",
        "query_table",
        "duckdb_tables",
        "duckdb_columns",
        "duckdb_views",
        "duckdb_functions",
        "duckdb_types",
        "duckdb_keywords",
        "duckdb_settings",
        "duckdb_databases",
        "duckdb_schemas",
        "pragma_table_info",
        "pragma_version",
    ]
)
"""What may stand in FROM; others log, profile, or take addresses in memory."""

FORBIDDEN = frozenset({"write_log", "nextval", "setval", "setseed", "query", "json_execute_serialized_sql"})
"""Functions of values that do more than compute."""

MARKS = {"points": "point", "line": "line", "bars": "bar"}


class Value(Column):
    """A column of a result: values as they are, nothing hidden in them."""

    def cell(self, row: Row) -> str:
        """The text of a row's cell."""
        value = row.get(self.key)
        return "NULL" if value is None else visible_text(value, 400)


@dataclass(frozen=True, kw_only=True)
class Typed:
    """What was typed and chosen.

    Attributes:
        sql: One SELECT.
        rows: At most so many are looked at.
        seconds: For so long.
        explains: Whether its plan is wanted, not its rows.
        x, y: Columns of a chart; empty: none.
        mark: Of `MARKS`.
    """

    sql: str
    rows: int = DEFAULT_ROWS
    seconds: int = DEFAULT_SECONDS
    explains: bool = False
    x: str = ""
    y: str = ""
    mark: str = "points"

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Typed:
        """From the values of an address.

        Raises:
            Refused: if a limit is no number or beyond what there is, or there is no such mark.
        """

        def number(key: str, default: int, most: int) -> int:
            text = values.get(key) or str(default)
            if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
                raise Refused(f"{key} cannot be {visible_text(text, 60)}", hint=f"it may be 1 to {most:,}")
            return int(text)

        mark = values.get("mark") or "points"
        if mark not in MARKS:
            raise Refused(f"there is no mark {visible_text(mark, 60)}", hint=f"it may be {', '.join(MARKS)}")
        return cls(
            sql=values.get("q", "").strip(),
            rows=number("rows", DEFAULT_ROWS, MOST_ROWS),
            seconds=number("seconds", DEFAULT_SECONDS, MOST_SECONDS),
            explains="explain" in values,
            x=values.get("x", ""),
            y=values.get("y", ""),
            mark=mark,
        )


def selected(sql: str, tables: Collection[str] = ()) -> str:
    """One SELECT, without the semicolon after it, as it can stand in parentheses.

    Args:
        sql: What was typed.
        tables: Names of the tables; `<table>_in(documents)` stands beside some.

    Raises:
        Refused: if it is something else, or calls what does more than read; it is named.
    """
    with duckdb.connect(config={"enable_external_access": False}) as parser:
        try:
            statements = parser.extract_statements(sql)
        except duckdb.Error as error:
            raise Refused(
                f"this is no SQL: {error}", hint="one SELECT over the tables at the right"
            ) from error
        if len(statements) != 1:
            what = "nothing" if not statements else f"{len(statements)} statements"
            raise Refused(f"this is {what}, and the console runs one SELECT", hint="run them one by one")
        (statement,) = statements
        if statement.type != duckdb.StatementType.SELECT:
            name = statement.type.name.replace("MULTI", "PIVOT").replace("_", " ")
            raise Refused(
                f"this is {name}, and the console runs SELECT alone: nothing is written from here",
                hint={
                    "PIVOT": "SELECT * FROM (PIVOT …)",
                    "EXPLAIN": "type the SELECT, and press Explain",
                    "PRAGMA": "SHOW TABLES and DESCRIBE are allowed",
                }.get(name, "functok query runs anything"),
            )
        text = statement.query.strip().rstrip(";").rstrip()
        (found,) = parser.execute("SELECT json_serialize_sql(?)", [text]).fetchone() or ("",)
    for kind, name in _functions(json.loads(found)):
        is_read = name in TABLE_FUNCTIONS or name.removesuffix("_in") in tables
        if (kind == "table" and not is_read) or name in FORBIDDEN:
            raise Refused(f"the console runs no {name}()", hint="tables are read by their names")
    return text


def _functions(node: Any, kind: str = "value") -> Iterator[tuple[str, str]]:
    """The functions that parsed SQL calls, and whether each stands in FROM."""
    if isinstance(node, dict):
        if "function_name" in node:
            yield kind, str(node["function_name"]).lower()
        inner = "table" if node.get("type") == "TABLE_FUNCTION" else "value"
        for key, value in node.items():
            yield from _functions(value, inner if key == "function" else "value")
    elif isinstance(node, list):
        for one in node:
            yield from _functions(one, kind)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a SELECT gave: a grid, or a plan; a chart where one was chosen, and what can be chosen for one."""

    panels: Sequence[Any]
    plan: str = ""
    chart_controls: Sequence[Choice] = ()


def result(reader: Reader, typed: Typed) -> Result:
    """Run what was typed.

    Raises:
        Refused: if it is no SELECT, or DuckDB refuses it.
    """
    sql = selected(typed.sql, reader.tables)
    with refusing():
        if typed.explains:
            found = reader.execute(f"EXPLAIN {sql}").fetchall()
            return Result(panels=[], plan="\n".join(str(text) for _, text in found))
        shown = grid(reader, sql, typed)
        kinds = _kinds(reader, sql)
        panels: list[Any] = [shown]
        if typed.x in kinds and typed.y in kinds:
            panels.insert(0, _figure(reader, sql, typed, kinds))
    names = [("", "–"), *((name, name) for name in kinds)]
    chosen = [(key, value if value in kinds else "") for key, value in (("x", typed.x), ("y", typed.y))]
    controls = [Choice(key=key, label=key, options=names, value=value) for key, value in chosen]
    marks = Choice(key="mark", label="as", options=[(mark, mark) for mark in MARKS], value=typed.mark)
    return Result(panels=panels, chart_controls=[*controls, marks])


def grid(reader: Reader, sql: str, typed: Typed, *, is_whole: bool = False) -> Grid:
    """A result as a grid: of as many rows as were asked for, or, to be downloaded, of all.

    Raises:
        Refused: if DuckDB refuses the SQL.
    """
    with refusing():
        kinds = _kinds(reader, sql)
    limited = f"SELECT * FROM (\n{sql}\n) LIMIT {typed.rows}"
    return Grid(
        key="result",
        caption="Result",
        query=Query(sql=sql if is_whole else limited),
        columns=[Value(name, "plain" if kind == "number" else "text", name) for name, kind in kinds.items()],
        filters=list(kinds),
        note=f"At most {typed.rows:,} rows, as “rows” says; downloads have all.",
        empty="No row.",
        is_written=True,
    )


@contextmanager
def refusing() -> Iterator[None]:
    """Say what DuckDB says of somebody's SQL.

    Raises:
        Refused: for what DuckDB raises, but an interruption.
    """
    try:
        yield
    except duckdb.InterruptException:
        raise
    except duckdb.Error as error:
        raise Refused(str(error), hint="the tables and their columns are beside the editor") from error


def _kinds(reader: Reader, sql: str) -> dict[str, str]:
    found = reader.execute(f"SELECT * FROM (\n{sql}\n) LIMIT 0")
    return {name: kind_of(str(type_)) for name, type_, *_ in found.description}


def _figure(reader: Reader, sql: str, typed: Typed, kinds: Mapping[str, str]) -> Figure:
    """A chart of two columns of a result."""
    names = {axis: '"' + column.replace('"', '""') + '"' for axis, column in (("x", typed.x), ("y", typed.y))}
    limit = min(typed.rows, CHARTED)
    query = Query(sql=f"SELECT {names['x']} AS x, {names['y']} AS y FROM (\n{sql}\n) LIMIT {limit}")
    found = reader.execute(query.sql)
    rows = [{"x": _charted(x), "y": _charted(y)} for x, y in found.fetchall()]

    def axis(key: str, column: str) -> charts.Axis:
        if kinds[column] == "number" and not (key == "x" and typed.mark == "bars"):
            return charts.linear(key, column)
        return charts.Axis(field=key, title=column, type="ordinal")

    x, y = axis("x", typed.x), axis("y", typed.y)
    base = alt.Chart(charts.data(rows)).encode(x=x.x(), y=y.y())
    mark = {
        "point": lambda: base.mark_point(filled=True, size=26, opacity=0.7, color=charts.BLUE),
        "line": lambda: base.mark_line(color=charts.BLUE, strokeWidth=1.6),
        "bar": lambda: base.mark_bar(color=charts.BLUE),
    }[MARKS[typed.mark]]()
    return Figure(
        title=f"{typed.y} against {typed.x}",
        chart=Chart(spec=charts.single(mark), alt=f"{typed.y} against {typed.x}, {len(rows):,} rows"),
        query=query,
    )


def _charted(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else str(value)


def limits(typed: Typed) -> list[Slider]:
    """The controls of how much a query may take."""
    return [
        Slider(key="rows", label="rows", low=1, high=MOST_ROWS, value=typed.rows),
        Slider(key="seconds", label="seconds", low=1, high=MOST_SECONDS, value=typed.seconds),
    ]


def columns_at_hand(reader: Reader) -> list[tuple[str, list[str]]]:
    """The tables that are there, and their columns."""
    told = {}
    for table in sorted(reader.tables):
        if table in TABLES:
            told[table] = list(TABLES[table].names)
        else:
            told[table] = [
                name for name, *_ in reader.execute(f'SELECT * FROM "{table}" LIMIT 0').description
            ]
    return list(told.items())
