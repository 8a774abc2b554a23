"""How Arrow schemas are written here."""

from __future__ import annotations

import pyarrow as pa


def schema_of(**columns: pa.DataType) -> pa.Schema:
    """A schema of nullable columns, in the order given."""
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


_KINDS = {
    "VARCHAR": pa.string(),
    "BOOLEAN": pa.bool_(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
}


def declared(columns: str) -> pa.Schema:
    """The schema of columns as SQL declares them: `layer INTEGER, key VARCHAR`."""
    return pa.schema([(name, _KINDS[kind]) for name, kind in map(str.split, columns.split(","))])
