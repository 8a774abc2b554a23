"""How Arrow schemas are written here."""

from __future__ import annotations

import pyarrow as pa


def schema_of(**columns: pa.DataType) -> pa.Schema:
    """A schema of nullable columns, in the order given."""
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])
