"""Running `sql/<table>.sql` into a Parquet file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
import pyarrow as pa

from infra.duck import Catalog, create_views, open_duckdb
from infra.errors import ConfigError, StorageError
from infra.storage import Storage
from schemas.config import DuckDb
from sql import read_sql


def write_table(
    resources: DuckDb,
    storage: Storage,
    table: str,
    name: str,
    inputs: Catalog,
    relations: Mapping[str, pa.Table] | None = None,
    **parameters: Any,
) -> None:
    """Run `sql/<table>.sql` into the Parquet file `name`.

    Args:
        resources: Limits of DuckDB.
        storage: Where inputs and output are.
        table: Which table.
        name: The file to write; it appears whole or not at all.
        inputs: The upstream tables, as views.
        relations: Small upstream tables that are in no file.
        parameters: Values bound to the SQL's `$names`; those it does not name are not bound.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read or written.
    """
    query = read_sql(table)
    with open_duckdb(storage, resources) as connection:
        (statement,) = connection.extract_statements(query)
        bound = {key: value for key, value in parameters.items() if key in statement.named_parameters}
        try:
            create_views(connection, storage, inputs)
            for view, rows in (relations or {}).items():
                connection.register(view, rows)
            with storage.write_by_url(name) as url:
                target = url.replace("'", "''")
                connection.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)", bound)
        except duckdb.OutOfMemoryException as error:
            raise ConfigError(
                f"the table {table} cannot be made with duckdb.memory_limit = {resources.memory_limit}: {error}",
                hint="raise duckdb.memory_limit, lower duckdb.threads, or give duckdb.temp_directory more space",
            ) from error
        except duckdb.IOException as error:
            raise StorageError(
                f"the table {table} cannot be written to {storage.url(name)}: {error}",
                hint="check space, permissions and network, then run again: finished work is kept",
            ) from error
