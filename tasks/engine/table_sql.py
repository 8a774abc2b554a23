"""Running `sql/<table>.sql` into a Parquet file, and folders of such files that are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from infra.duck import Catalog, create_views, open_duckdb, telling_damage
from infra.manifest import Manifest, commit, load
from infra.storage import Storage, StoredFile
from schemas.config import DuckDb
from schemas.errors import ConfigError, StorageError, whole_message
from sql import read_sql


def write_table(
    resources: DuckDb,
    storage: Storage,
    table: str,
    name: str,
    inputs: Catalog,
    relations: Mapping[str, pa.Table] | None = None,
    **parameters: Any,
) -> StoredFile:
    """Run `sql/<table>.sql` into the Parquet file `name`.

    Args:
        resources: Limits of DuckDB.
        storage: Where inputs and output are.
        table: Which table.
        name: The file to write; it appears whole or not at all.
        inputs: The upstream tables, as views.
        relations: Small upstream tables that are in no file.
        parameters: Values bound to the SQL's `$names`; those it does not name are not bound.

    Returns:
        The file as it was written.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read or written.
    """
    query = read_sql(table)
    with open_duckdb(storage, resources) as connection:
        (statement,) = connection.extract_statements(query)
        bound = {key: value for key, value in parameters.items() if key in statement.named_parameters}
        with explained(f"the table {table}", resources, storage):
            create_views(connection, storage, inputs)
            for view, rows in (relations or {}).items():
                connection.register(view, rows)
            with storage.write_by_path(name, resources.temp_directory or None) as place:
                target = place.path.replace("'", "''")
                connection.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)", bound)
    assert place.stored is not None
    return place.stored


def ensure_folder(
    storage: Storage,
    names: Sequence[str],
    inputs: Mapping[str, Any],
    make: Callable[[], Iterable[StoredFile]],
) -> None:
    """Make and commit the files `names`, all of one folder, if that is not finished.

    Args:
        storage: Where the folder is.
        names: The files.
        inputs: What the folder's key was made of.
        make: Writes the files, and tells of each.
    """
    folder = names[0].rsplit("/", 1)[0]
    if load(storage, folder) is None:
        written = list(make())
        assert {file.name for file in written} == set(names)
        commit(storage, folder, Manifest(stage="tables", inputs=dict(inputs)), written)


@contextmanager
def explained(what: str, resources: DuckDb, storage: Storage) -> Iterator[None]:
    """Turn DuckDB's errors about memory, disk and network into errors that say the way out.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read or written, or is not what was written (`DamagedError`).
    """
    try:
        with telling_damage():
            yield
    except duckdb.OutOfMemoryException as error:
        raise ConfigError(
            f"{what} cannot be made with duckdb.memory_limit = {resources.memory_limit}: {whole_message(error)}",
            hint="raise duckdb.memory_limit, lower duckdb.threads, or give duckdb.temp_directory more space",
        ) from error
    except duckdb.Error as error:
        # What an fsspec filesystem raises comes out as a bare Error that quotes a traceback.
        if not isinstance(error, duckdb.IOException) and type(error) is not duckdb.Error:
            raise
        raise StorageError(
            f"{what} cannot be made under {storage.root}: {whole_message(error)}",
            hint="check space, permissions and network, then run again: finished work is kept",
        ) from error
