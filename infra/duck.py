"""The one way to a DuckDB connection, and the views that users query.

`connect(storage)` opens an in-memory database whose views are the published tables of that root: the names
and columns of the contract, over Parquet files that any tool can read. What is published is named by
`catalog.json`, which is replaced whole, so a reader sees the tables of one finished run.

DuckDB reads no page checksums (2.0), so a view's files are hashed against their manifests before a query reads them
(`infra.verified.check_files`): the view asks for its files by a function of ours, which DuckDB calls whenever it
binds the view, and so for no table that a query leaves alone. On another machine, what is read whole is hashed as it
is read.
"""

from __future__ import annotations

import os
import re
import tempfile
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import duckdb

from infra.cluster import available_cores
from infra.interrupt import ends_on_interrupt
from infra.storage import REPAIR, Storage
from infra.verified import check_content, check_files
from schemas.config import DuckDb
from schemas.errors import ConfigError, DamagedError, FunctokError
from schemas.tables import SHARDED_SELECT, TABLES

CATALOG = "catalog.json"

BYTES_PER_THREAD = 125_000_000
"""Memory a thread gets at least: DuckDB cannot spill below about 35 MB each, and advises this."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard's file of a table that is kept by shard.

    Attributes:
        name: File name relative to the storage root.
        doc_offset: `doc_id` of the shard's document 0.
        source: URL of the corpus file that the shard was cut from, or the case whose prompts it is of.
        layer: Decoder block, where the table has one.
        model: Checkpoint series, where the table has one.
        step: Optimizer step of the checkpoint, where the table has one.
    """

    name: str
    doc_offset: int = 0
    source: str = ""
    layer: int | None = None
    model: str = ""
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What is published: tables in one file each, and tables kept by shard.

    Attributes:
        tables: Table name to Parquet file name.
        sharded: Table name to its shards' files, in corpus order.
        lineage: Group of tables (`corpus`, `graph`, …) to the key that it was made with.
        about: Group of tables to keys of the model, then of the dictionaries, that it is about.
    """

    tables: dict[str, str] = field(default_factory=dict)
    sharded: dict[str, list[ShardFile]] = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)
    about: dict[str, list[str]] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """Every Parquet file that it names; one that several tables share comes several times."""
        return [*self.tables.values(), *(file.name for files in self.sharded.values() for file in files)]

    def to_json(self) -> dict[str, Any]:
        """The JSON form, with the shards' fields as columns."""
        return {
            "tables": self.tables,
            "sharded": {
                table: {c.name: [getattr(file, c.name) for file in files] for c in fields(ShardFile)}
                for table, files in self.sharded.items()
            },
            "lineage": self.lineage,
            "about": self.about,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Catalog:
        """The inverse of `to_json`; a column that an older catalogue lacks has its default."""
        return cls(
            tables=dict(value["tables"]),
            sharded={
                table: [
                    ShardFile(**dict(zip(columns, row, strict=True)))
                    for row in zip(*columns.values(), strict=True)
                ]
                for table, columns in value["sharded"].items()
            },
            lineage=dict(value["lineage"]),
            about={group: list(keys) for group, keys in value.get("about", {}).items()},
        )


def read_catalog(storage: Storage) -> Catalog:
    """What is published under this root; empty where nothing is.

    Raises:
        DamagedError: if it is not what was written.
    """
    value = storage.read_json(CATALOG)
    try:
        return Catalog() if value is None else Catalog.from_json(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{storage.url(CATALOG)} is damaged: it is no catalogue", hint=REPAIR) from error


def open_duckdb(storage: Storage, resources: DuckDb | None = None, database: str = ":memory:") -> Any:
    """A DuckDB connection with limits set and the storage's filesystem registered; no views."""
    resources = resources or DuckDb()
    connection = duckdb.connect(database)
    ends_on_interrupt(connection)
    spill = resources.temp_directory or os.path.join(tempfile.gettempdir(), "functok-duckdb")
    try:
        # Processes may share it: DuckDB names its files by process, and removes those of dead ones.
        os.makedirs(spill, exist_ok=True)
        connection.execute("SET memory_limit = ?", [resources.memory_limit])
        connection.execute("SET threads = ?", [resources.threads or _threads(resources.memory_limit)])
        connection.execute("SET temp_directory = ?", [spill])
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("SET enable_progress_bar = false")
    except (duckdb.Error, OSError) as error:
        raise ConfigError(
            f"DuckDB refused its settings: {error}", hint="see [duckdb] in the configuration"
        ) from error
    reading = storage.for_duckdb(partial(_require_written, storage))
    if reading is not None:
        connection.register_filesystem(reading)
    return connection


def _require_written(storage: Storage, name: str, content: bytes) -> None:
    """Refuse what DuckDB has read whole from elsewhere, if it is not what was written."""
    with _noting_refusals():
        check_content(storage, name, content)


def memory_bytes(limit: str) -> int:
    """Bytes of a DuckDB memory limit, as the configuration allows it (`3GB`, `512 MiB`)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s?([KMGT])(i?)B", limit)
    if match is None:
        raise ValueError(f"{limit!r} is no memory limit")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1))


def _threads(memory_limit: str) -> int:
    return max(1, min(available_cores(), memory_bytes(memory_limit) // BYTES_PER_THREAD))


def connect(storage: Storage, resources: DuckDb | None = None) -> Any:
    """A DuckDB connection whose views are the published tables of this root."""
    connection = open_duckdb(storage, resources)
    # In a schema of their own, so that SHOW TABLES shows tables and nothing else.
    connection.execute("CREATE SCHEMA files")
    # A query of a few rows must not read a terabyte first: `functok verify` does.
    create_views(
        connection, storage, read_catalog(storage), shards_schema="files", large_too=storage.is_local
    )
    return connection


def create_views(
    connection: Any,
    storage: Storage,
    catalog: Catalog,
    shards_schema: str | None = None,
    *,
    checked: bool = True,
    large_too: bool = True,
) -> None:
    """Create one view for each published table.

    A table kept by shard gets its global `doc_id` (and `source`, `layer`, `model`, `step`) from the small table
    `_shards_<table>` (in `shards_schema`, where given), so that a shard's file does not change when other
    files join the corpus. Beside it stands `<table>_in(documents)`, which reads the shards of some documents alone.

    Args:
        connection: Where.
        storage: Where the files are.
        catalog: What is published, or is to be.
        shards_schema: Schema of the small tables.
        checked: Whether the views hash their files before they are read; a database that other clients open cannot.
        large_too: Whether so are shards' files on other machines that are read by ranges (`remote_reading.WHOLE`).

    Raises:
        DamagedError: if a file is damaged so that its columns cannot be read; later, from a query, as the cause of
            DuckDB's error (`telling_damage`).
    """
    for table, name in catalog.tables.items():
        _create_view(
            connection, storage, table, [name], "SELECT * FROM read_parquet({files}{options})", checked
        )
    for table, files in catalog.sharded.items():
        view_of_shards(connection, storage, table, files, shards_schema, checked=checked, large_too=large_too)


@contextmanager
def telling_damage() -> Iterator[None]:
    """Raise, in place of DuckDB's error about a function of ours, what that function raised.

    Raises:
        FunctokError: why a view's files were refused.
    """
    try:
        yield
    except duckdb.Error as error:
        for refusal in _refusals:
            if refusal.message in str(error):
                raise refusal from error
        raise


_refusals: deque[FunctokError] = deque(maxlen=16)


@contextmanager
def _noting_refusals() -> Iterator[None]:
    try:
        yield
    except FunctokError as error:
        _refusals.appendleft(error)
        raise


def _create_view(
    connection: Any,
    storage: Storage,
    view: str,
    names: Sequence[str],
    select: str,
    checked: bool,
    large_too: bool = True,
) -> None:
    """Create a view whose SQL reads `{files}` with `{options}`."""
    urls = [storage.url(name) for name in dict.fromkeys(names)]
    # A folder above the root that is called layer=7 is no column of ours: no hive partitioning.
    options = ", hive_partitioning = false"
    if not checked:
        listed = f"[{', '.join(_text(url) for url in urls)}]"
        connection.execute(f"CREATE OR REPLACE VIEW {view} AS {select.format(files=listed, options=options)}")
        return
    is_in_use = False

    def files() -> list[str]:
        if is_in_use:
            with _noting_refusals():
                check_files(storage, names, large_too=large_too)
        return urls

    function = f"files_of_{view}"
    with suppress(duckdb.Error):
        connection.remove_function(function)
    connection.create_function(function, files, [], "VARCHAR[]")
    try:
        connection.execute(
            f"CREATE OR REPLACE VIEW {view} AS {select.format(files=f'{function}()', options=options)}"
        )
    except duckdb.Error:
        # The columns are read here, from the first file.
        check_files(storage, names)
        raise
    is_in_use = True


def view_of_shards(
    connection: Any,
    storage: Storage,
    table: str,
    files: list[ShardFile],
    shards_schema: str | None = None,
    *,
    checked: bool = True,
    large_too: bool = True,
) -> None:
    """Create the view `table` over its shards' files; arguments and errors as those of `create_views`."""
    import pyarrow as pa

    if not files:
        if table not in TABLES:
            raise ConfigError(f"the table {table} has no shards")
        # Files without rows are not written; the columns of the others say no more than the contract.
        described = connection.from_arrow(TABLES[table].empty_table())
        kinds = zip(described.columns, described.types, strict=True)
        columns = ", ".join(f"NULL::{kind} AS {column}" for column, kind in kinds)
        connection.execute(f"CREATE OR REPLACE VIEW {table} AS SELECT {columns} WHERE false")
        return
    schema = pa.schema(
        {
            "url": pa.string(),
            "doc_offset": pa.int64(),
            "source": pa.string(),
            "layer": pa.int32(),
            "model": pa.string(),
            "step": pa.int64(),
        }
    )
    rows = pa.Table.from_pylist([{"url": storage.url(file.name), **vars(file)} for file in files], schema)
    shards = f"{shards_schema}._shards_{table}" if shards_schema else f"_shards_{table}"
    connection.register("_rows", rows)
    connection.execute(f"CREATE OR REPLACE TABLE {shards} AS SELECT * FROM _rows")
    connection.unregister("_rows")
    # Files of equal content share a shard: each is read once and joined with every place it stands in.
    select = (
        f"SELECT {SHARDED_SELECT[table]} FROM read_parquet({{files}}, filename = true{{options}}) AS f "
        f"JOIN {shards} AS s ON s.url = f.filename"
    )
    _create_view(connection, storage, table, [file.name for file in files], select, checked, large_too)
    if checked and "doc_id" in SHARDED_SELECT[table]:
        _create_narrow(connection, storage, table, files, shards, large_too)


def _create_narrow(
    connection: Any, storage: Storage, table: str, files: list[ShardFile], shards: str, large_too: bool
) -> None:
    """Create `<table>_in([doc_id, …], layers := NULL)`: the view's rows of some documents, from their shards alone.

    The view itself reads, and hashes when it is first bound, all shards; a page or a notebook that shows a document
    needs one. Documents are literals or parameters, as what files are read must be known when a query is bound.
    """
    by_kind: dict[tuple[Any, ...], list[ShardFile]] = {}
    for file in files:
        by_kind.setdefault((file.layer, file.model, file.step), []).append(file)
    kinds = {kind: sorted(of, key=lambda file: file.doc_offset) for kind, of in by_kind.items()}
    offsets = {kind: [file.doc_offset for file in of] for kind, of in kinds.items()}

    def narrowed(documents: list[int] | None, layers: list[int] | None) -> list[str]:
        wanted: dict[str, None] = {}
        for kind, of in kinds.items():
            if layers is None or kind[0] is None or kind[0] in layers:
                for document in documents or ():
                    last = bisect_right(offsets[kind], document)
                    # A shard without documents begins where the next one does.
                    first = bisect_left(offsets[kind], offsets[kind][last - 1]) if last else 0
                    wanted |= dict.fromkeys(file.name for file in of[first:last])
        # A query that asks for no document of a shard needs columns too; its join leaves no row.
        names = list(wanted) or [files[0].name]
        with _noting_refusals():
            check_files(storage, names, large_too=large_too)
        return [storage.url(name) for name in names]

    function = f"files_of_{table}_in"
    with suppress(duckdb.Error):
        connection.remove_function(function)
    connection.create_function(
        function, narrowed, ["BIGINT[]", "INTEGER[]"], "VARCHAR[]", null_handling="special"
    )
    # Joined by the number in the shard, which DuckDB hands on to the scan, so that other row groups are left alone.
    connection.execute(
        f"CREATE OR REPLACE MACRO {table}_in(documents, layers := NULL) AS TABLE "
        f"SELECT {SHARDED_SELECT[table]} "
        f"FROM read_parquet({function}(documents, layers), filename = true, hive_partitioning = false) AS f "
        f"JOIN (SELECT *, (document - doc_offset)::INTEGER AS doc FROM {shards}, "
        "(SELECT DISTINCT unnest(documents::BIGINT[]) AS document) "
        "WHERE document - doc_offset BETWEEN 0 AND 2147483647) AS s "
        "ON s.url = f.filename AND s.doc = f.doc "
        "WHERE layers IS NULL OR s.layer IS NULL OR list_contains(layers, s.layer)"
    )


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
