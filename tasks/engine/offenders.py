"""Ask expectations of DuckDB views: how many rows offend, and which.

Conditions on rows of one table are counted in one scan, with the table's totals. What is asked of one folder at
a time runs on several folders at once; the memory limit is the connection's, and DuckDB spills above it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from infra.duck import telling_damage
from infra.storage import Storage
from infra.verified import check_files
from schemas.errors import ExpectationError, FunctokError, StorageError
from schemas.expectation import Expectation, Keys, Query, Rows
from tasks.engine.data_docs import Finding

SHOWN = 5
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Views:
    """One folder's views.

    Attributes:
        folder: The folder, for messages.
        files: View name to its Parquet file in the storage, or to the rows themselves.
        columns: Constant columns that each view has besides the file's own.
        small: Those of the views that are read once and kept while the folder is checked; the others are
            read by each question, so that they need not fit into memory.
    """

    folder: str
    files: Mapping[str, str | pa.Table]
    columns: Mapping[str, str | int | None] = field(default_factory=dict)
    small: frozenset[str] = frozenset()

    @property
    def stored(self) -> list[str]:
        """Those of the views that are files."""
        return [file for file in self.files.values() if isinstance(file, str)]


def applying(expectations: Sequence[Expectation], views: set[str]) -> list[Expectation]:
    """Those of which all views are there."""
    return [entry for entry in expectations if {entry.table, *entry.needs} <= views]


def find_in_views(
    connection: Any, expectations: Sequence[Expectation], views: set[str], place: str
) -> list[Finding]:
    """Ask what applies to the views that a connection has, whole; messages say at which place the data lies.

    Raises:
        ExpectationError: if a view lacks a column.
        StorageError: if a file cannot be read.
    """
    asked = applying(expectations, views)
    return _explained(place, lambda: _ask(connection, asked, {})[0])


Answer = tuple[list[Finding], dict[str, Any]]
"""What was found in one folder: of each expectation, and its totals."""


def find_in_units(
    connection: Any,
    storage: Storage,
    expectations: Sequence[Expectation],
    units: Sequence[Views],
    totals: Mapping[str, Mapping[str, str]],
    views: set[str],
    threads: int = 0,
) -> list[Answer]:
    """Ask each folder, several at once.

    Args:
        connection: A DuckDB connection; its tables are seen from every folder's views.
        storage: Where the files are.
        expectations: What is asked of each folder.
        units: The folders.
        totals: View name to {column: SQL aggregate}, computed in the scan that counts offenders.
        views: Names of views that are there for every folder.
        threads: Folders at once; 0: as many as cores, at most 8.

    Returns:
        The folders' answers, in the order of `units`.

    Raises:
        DamagedError: if a folder offends, and a file of it is not what was written.
        ExpectationError: if a file lacks a column.
        StorageError: if a file cannot be read.
    """

    def ask(unit: Views) -> Answer:
        asked = applying(expectations, views | set(unit.files))

        def run() -> Answer:
            with closing(connection.cursor()) as cursor:
                for view, rows in unit.files.items():
                    constants = "".join(
                        f", {_literal(value)} AS {column}" for column, value in unit.columns.items()
                    )
                    if isinstance(rows, str):
                        kind = "TABLE" if view in unit.small else "VIEW"
                        source = f"read_parquet({_literal(storage.url(rows))}, hive_partitioning = false)"
                    else:
                        kind, source = "VIEW", f"_rows_of_{view}"
                        cursor.register(source, rows)
                    cursor.execute(f"CREATE TEMP {kind} {view} AS SELECT *{constants} FROM {source}")
                return _ask(cursor, asked, {view: totals[view] for view in totals if view in unit.files})

        try:
            found = _explained(storage.url(unit.folder), run)
        except (FunctokError, duckdb.Error):
            check_files(storage, unit.stored)
            raise
        if any(finding.count for finding in found[0]):
            # What offends may be a file that is damaged.
            check_files(storage, unit.stored)
        return found

    workers = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="functok-check") as pool:
        return list(pool.map(ask, units))


def merged(expectations: Sequence[Expectation], answers: Sequence[Sequence[Finding]]) -> list[Finding]:
    """What was found in several folders, added up, in the order of `expectations`."""
    counts: Counter[str] = Counter()
    rows: dict[str, list[dict[str, Any]]] = {}
    for findings in answers:
        for finding in findings:
            counts[finding.expectation.name] += finding.count
            rows.setdefault(finding.expectation.name, []).extend(finding.rows)
    return [
        Finding(expectation=entry, count=counts[entry.name], rows=tuple(rows[entry.name][:SHOWN]))
        for entry in expectations
        if entry.name in rows
    ]


def _ask(
    cursor: Any, expectations: Sequence[Expectation], totals: Mapping[str, Mapping[str, str]]
) -> tuple[list[Finding], dict[str, Any]]:
    scanned: dict[str, int] = {}
    found: dict[str, Any] = {}
    for view in dict.fromkeys([*totals, *(entry.table for entry in expectations if isinstance(entry, Rows))]):
        rows = [entry for entry in expectations if isinstance(entry, Rows) and entry.table == view]
        bad = [f"count(*) FILTER (WHERE ({entry.must}) IS NOT TRUE)" for entry in rows]
        aggregates = [*totals.get(view, {}).values(), *bad]
        values = cursor.execute(f"SELECT {', '.join(aggregates)} FROM {view}").fetchone()
        found |= dict(zip(totals.get(view, {}), values, strict=False))
        scanned |= {
            entry.name: int(value) for entry, value in zip(reversed(rows), reversed(values), strict=False)
        }
    return [_finding(cursor, entry, scanned.get(entry.name)) for entry in expectations], found


def _finding(cursor: Any, entry: Expectation, counted: int | None) -> Finding:
    match entry:
        case Rows(must=must, show=show):
            offenders = f"SELECT {show} FROM {entry.table} WHERE ({must}) IS NOT TRUE"
        case Keys(columns=columns):
            keys = ", ".join(columns)
            if _rises(cursor, entry.table, keys):
                return Finding(expectation=entry, count=0)
            folder = "any_value(folder) AS folder, " if entry.shard else ""
            grouped = f"SELECT {folder}{keys}, count(*) AS rows FROM {entry.table} GROUP BY {keys}"
            offenders = f"{grouped} HAVING count(*) > 1"
        case Query(offenders=offenders):
            counted = None
        case _:
            raise TypeError(f"no such kind of expectation: {type(entry).__name__}")
    if counted is None:
        counted = int(cursor.execute(f"SELECT count(*) FROM ({offenders})").fetchone()[0])
    if counted == 0:
        return Finding(expectation=entry, count=0)
    answer = cursor.execute(f"SELECT * FROM ({offenders}) ORDER BY ALL LIMIT {SHOWN}")
    names = [column[0] for column in answer.description]
    rows = tuple(dict(zip(names, row, strict=True)) for row in answer.fetchall())
    return Finding(expectation=entry, count=counted, rows=rows)


def _rises(cursor: Any, view: str, keys: str) -> bool:
    # A sequence that strictly rises repeats nothing, in whatever order DuckDB reads the rows.
    falls = cursor.execute(
        f"SELECT count(*) FROM (SELECT row({keys}) AS here, lag(row({keys})) OVER () AS before FROM {view}) "
        "WHERE here <= before"
    ).fetchone()[0]
    return int(falls) == 0


def _explained(place: str, ask: Callable[[], T]) -> T:
    try:
        with telling_damage():
            return ask()
    except (duckdb.BinderException, duckdb.CatalogException, duckdb.ConversionException) as error:
        raise ExpectationError(
            f"{place}: a table has not the columns that it should have: {error}",
            hint="delete the folder and run again",
        ) from error
    except (duckdb.IOException, duckdb.InvalidInputException, OSError) as error:
        raise StorageError(
            f"{place}: a file cannot be read: {error}", hint="delete the folder and run again"
        ) from error


def _literal(value: str | int | None) -> str:
    if value is None:
        return "NULL"
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
