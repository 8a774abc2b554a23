"""Whether a catalogue's tables have the contract's columns and types: asked first, as all else is asked in them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from infra.duck import Catalog
from schemas.expectation import Query
from schemas.tables import TABLES, TOGETHER
from tasks.engine.data_docs import Finding
from tasks.engine.offenders import SHOWN

_COLUMNS = Query(
    name="tables have their columns",
    table="catalogue",
    meaning="Every table of the catalogue's groups is there, with the contract's columns and types.",
    offenders="",
)


def check_columns(connection: Any, catalog: Catalog, views: set[str]) -> Finding:
    """Find the tables and columns that are missing, or of another type.

    Args:
        connection: A DuckDB connection that has the catalogue's views.
        catalog: The catalogue; its groups say which tables there should be.
        views: Names of the views that are there.
    """
    tables = set(views)
    for group, together in TOGETHER:
        if group in catalog.lineage or (not group and views.intersection(together)):
            tables |= set(together)
    offenders = []
    for table in sorted(tables & set(TABLES)):
        described = connection.execute(f"DESCRIBE {table}").fetchall() if table in views else []
        found = {row[0]: str(row[1]) for row in described}
        for column in TABLES[table]:
            kind = _DUCKDB_TYPES[column.type]
            if found.get(column.name) != kind:
                offenders.append(
                    {"table": table, "column": column.name, "type": kind, "found": found.get(column.name)}
                )
    return Finding(expectation=_COLUMNS, count=len(offenders), rows=tuple(offenders[:SHOWN]))


_DUCKDB_TYPES = {
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.string(): "VARCHAR",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.list_(pa.int32()): "INTEGER[]",
}
