"""Results of queries as files: written batch by batch, so that no result has to fit into memory."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import IO, Any

import pyarrow as pa


def write_csv(reader: pa.RecordBatchReader, target: IO[bytes]) -> None:
    """As CSV; lists, structs and maps in it as JSON."""
    from pyarrow import csv

    schema = pa.schema([pa.field(field.name, _flat(field.type)) for field in reader.schema])
    with csv.CSVWriter(target, schema) as writer:
        for batch in reader:
            columns = [_flattened(column) for column in batch.columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def _flat(kind: pa.DataType) -> pa.DataType:
    """CSV has no lists, structs and maps: they become text."""
    return pa.string() if pa.types.is_nested(kind) else kind


def _flattened(column: pa.Array) -> pa.Array:
    if not pa.types.is_nested(column.type):
        return column
    values = column.to_pylist()
    return pa.array([None if value is None else _as_json(value) for value in values], pa.string())


def write_json(reader: pa.RecordBatchReader, target: IO[bytes]) -> None:
    """As a JSON list of objects; what is not finite is null."""
    separator = "[\n"
    for batch in reader:
        for row in batch.to_pylist():
            target.write(f"{separator}{_as_json(row)}".encode())
            separator = ",\n"
    target.write(b"[]\n" if separator == "[\n" else b"\n]\n")


def _as_json(value: Any) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null; decimals become numbers."""
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    # A map is a list of pairs.
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_parquet(reader: pa.RecordBatchReader, target: IO[bytes]) -> None:
    """As Parquet."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(target, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)


WRITERS = {"csv": write_csv, "json": write_json, "parquet": write_parquet}
