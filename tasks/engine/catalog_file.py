"""`functok catalog PATH`: the published tables as a DuckDB file that any client can open."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

import duckdb
import pyarrow as pa

from infra.catalog import Shards, read_catalog
from infra.duck import create_views, open_duckdb
from infra.storage import Storage
from infra.verified import check_files
from schemas.config import DuckDb
from schemas.errors import ConfigError, StorageError
from schemas.tables import LEFT_IN_PLACE

_DUCKDB_MAGIC = b"DUCK"

STORAGE_VERSION = "v1.5.0"
"""Written in the format of DuckDB 1.5, which clients of 2.0 and of 1.5 read."""


def write_catalog_file(
    storage: Storage, path: str, resources: DuckDb, others: Mapping[str, pa.Table] | None = None
) -> None:
    """Write a DuckDB file, replaced whole if it is there, whose views in `main` are the published tables.

    Small tables are copied into the schema `data`; the large ones (`LEFT_IN_PLACE`) are views over absolute
    paths (or URLs: a client needs its own access to those).

    Args:
        storage: What is published.
        path: The file.
        resources: Limits of DuckDB.
        others: Tables that nobody publishes, to be in it too.

    Raises:
        ConfigError: if nothing is published, or `path` is a folder or a file that is no DuckDB database.
        DamagedError: if a file that is copied is not what was written.
        StorageError: if the file cannot be written or a table cannot be read.
    """
    catalog = read_catalog(storage)
    if not catalog.tables:
        raise ConfigError(f"nothing is published under {storage.root}", hint="run `functok run` first")
    target = Path(path).absolute()
    if target.is_dir():
        raise ConfigError(f"{target} is a folder", hint="give the name of a file")
    if target.exists() and _magic(target) != _DUCKDB_MAGIC:
        raise ConfigError(
            f"{target} is there and is no DuckDB file", hint="give another name: it is not overwritten"
        )
    copied = [name for table, name in catalog.tables.items() if table not in LEFT_IN_PLACE]
    copied += [
        name
        for table, files in catalog.sharded.items()
        if table not in LEFT_IN_PLACE
        for name in Shards.of(files).names
    ]
    check_files(storage, copied)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_duckdb(storage, resources) as connection:
            place = str(aside).replace("'", "''")
            connection.execute(f"ATTACH '{place}' AS made (STORAGE_VERSION '{STORAGE_VERSION}')")
            connection.execute("USE made")
            connection.execute("CREATE SCHEMA data")
            create_views(connection, storage, catalog, shards_schema="data")
            for table in (*catalog.tables, *catalog.sharded):
                if table not in LEFT_IN_PLACE:
                    connection.execute(f"CREATE TABLE data.{table} AS SELECT * FROM main.{table}")
                    connection.execute(f"CREATE OR REPLACE VIEW main.{table} AS SELECT * FROM data.{table}")
                    connection.execute(f"DROP TABLE IF EXISTS data._shards_{table}")
            for table, rows in (others or {}).items():
                connection.register("_rows", rows)
                connection.execute(f"CREATE TABLE data.{table} AS SELECT * FROM _rows")
                connection.execute(f"CREATE VIEW main.{table} AS SELECT * FROM data.{table}")
                connection.unregister("_rows")
            connection.execute("USE memory")
            connection.execute("DETACH made")
        aside.replace(target)
    except (duckdb.Error, OSError) as error:
        raise StorageError(
            f"cannot write the catalogue {target}: {error}",
            hint="check the path and its space, and that the tables are there (`functok status`)",
        ) from error
    finally:
        for leftover in (aside, aside.with_name(f"{aside.name}.wal")):
            leftover.unlink(missing_ok=True)


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(12)[8:]
