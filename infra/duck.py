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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from infra.catalog import Catalog, ShardFile, Shards, read_catalog
from infra.cluster import available_cores
from infra.interrupt import ends_on_interrupt
from infra.storage import Storage
from infra.verified import check_content, check_files
from schemas.config import DuckDb
from schemas.errors import ConfigError, FunctokError
from schemas.tables import SHARDED_SELECT, TABLES

BYTES_PER_THREAD = 125_000_000
"""Memory a thread gets at least: DuckDB cannot spill below about 35 MB each, and advises this."""


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
        connection.execute("SET threads = ?", [threads_within(resources)])
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


def threads_within(resources: DuckDb) -> int:
    """Threads as `duckdb.threads` says, or one a core as far as the memory limit has room for them."""
    room = memory_bytes(resources.memory_limit) // BYTES_PER_THREAD
    return resources.threads or max(1, min(available_cores(), room))


def connect(storage: Storage, resources: DuckDb | None = None) -> Any:
    """A DuckDB connection whose views are the published tables of this root."""
    connection = open_duckdb(storage, resources)
    # A query of a few rows must not read a terabyte first: `functok verify` does.
    create_views(connection, storage, read_catalog(storage), large_too=storage.is_local)
    return connection


def create_views(
    connection: Any,
    storage: Storage,
    catalog: Catalog,
    *,
    shards_schema: str | None = None,
    large_too: bool = True,
) -> None:
    """Create one view for each published table.

    A table kept by shard gets its global `doc_id` (and `source`, `layer`, `model`, `step`) from the catalogue, so that
    a shard's file does not change when other files join the corpus. Which shards there are is not asked before a query
    reads them; in a database that other clients open, they are in the small table `_shards_<table>`. Beside the view
    stands `<table>_in(documents)`, which reads the shards of some documents alone.

    Args:
        connection: Where.
        storage: Where the files are.
        catalog: What is published, or is to be.
        shards_schema: Schema of those small tables: the database is for other clients, and its views hash nothing.
        large_too: Whether views hash what is read by ranges on other machines too (`remote_reading.WHOLE`).

    Raises:
        DamagedError: if a file is damaged so that its columns cannot be read; later, from a query, as the cause of
            DuckDB's error (`telling_damage`).
    """
    for table, name in catalog.tables.items():
        _create_view(
            connection,
            storage,
            table,
            name,
            partial(list, [name]),
            "SELECT * FROM read_parquet({files}{options})",
            shards_schema is None,
        )
    for table, files in catalog.sharded.items():
        view_of_shards(connection, storage, table, files, shards_schema=shards_schema, large_too=large_too)


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
    first: str,
    names: Callable[[], Sequence[str]],
    select: str,
    checked: bool,
    large_too: bool = True,
) -> None:
    """Create a view whose SQL reads `{files}` with `{options}`: the file `first`, and when it is in use all `names`."""
    # A folder above the root that is called layer=7 is no column of ours: no hive partitioning.
    options = ", hive_partitioning = false"
    if not checked:
        listed = f"[{', '.join(_text(storage.url(name)) for name in dict.fromkeys(names()))}]"
        connection.execute(f"CREATE OR REPLACE VIEW {view} AS {select.format(files=listed, options=options)}")
        return
    is_in_use = False

    def files() -> list[str]:
        if not is_in_use:
            return [storage.url(first)]
        with _noting_refusals():
            wanted = list(dict.fromkeys(names()))
            check_files(storage, wanted, large_too=large_too)
        return [storage.url(name) for name in wanted]

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
        check_files(storage, [first])
        raise
    is_in_use = True


def view_of_shards(
    connection: Any,
    storage: Storage,
    table: str,
    files: Sequence[ShardFile],
    *,
    shards_schema: str | None = None,
    large_too: bool = True,
) -> None:
    """Create the view `table` over its shards' files; arguments and errors as those of `create_views`."""
    known = Shards.of(files)
    if not len(known):
        if table not in TABLES:
            raise ConfigError(f"the table {table} has no shards")
        # Files without rows are not written; the columns of the others say no more than the contract.
        described = connection.from_arrow(TABLES[table].empty_table())
        kinds = zip(described.columns, described.types, strict=True)
        columns = ", ".join(f"NULL::{kind} AS {column}" for column, kind in kinds)
        connection.execute(f"CREATE OR REPLACE VIEW {table} AS SELECT {columns} WHERE false")
        return
    shards = (
        _shards_function(connection, storage, table, known)
        if shards_schema is None
        else _shards_table(connection, storage, f"{shards_schema}._shards_{table}", known)
    )
    # Files of equal content share a shard: each is read once and joined with every place it stands in.
    select = (
        f"SELECT {SHARDED_SELECT[table]} FROM read_parquet({{files}}, filename = true{{options}}) AS f "
        f"JOIN {shards} AS s ON s.url = f.filename"
    )
    _create_view(
        connection, storage, table, known.first, lambda: known.names, select, shards_schema is None, large_too
    )
    if shards_schema is None and "doc_id" in SHARDED_SELECT[table]:
        _create_narrow(connection, storage, table, known, shards, large_too)


def _shards_table(connection: Any, storage: Storage, shards: str, files: Shards) -> str:
    """What a table's shards are joined as: rows of a small table."""
    connection.register("_rows", _with_urls(storage, files))
    connection.execute(f"CREATE OR REPLACE TABLE {shards} AS SELECT * FROM _rows")
    connection.unregister("_rows")
    return shards


def _shards_function(connection: Any, storage: Storage, table: str, files: Shards) -> str:
    """What a table's shards are joined as: rows that a function of ours gives, so that they are read when asked for."""

    def shards(asked: pa.ChunkedArray) -> pa.Array:
        with _noting_refusals():
            rows = _with_urls(storage, files).to_struct_array().combine_chunks()
        return pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)

    function = f"shards_of_{table}"
    with suppress(duckdb.Error):
        connection.remove_function(function)
    kind = "url VARCHAR, doc_offset BIGINT, source VARCHAR, layer INTEGER, model VARCHAR, step BIGINT"
    # In Arrow's form a function has arguments; as one with effects it is called by a query and not before.
    connection.create_function(
        function, shards, ["INTEGER"], f"STRUCT({kind})[]", type="arrow", side_effects=True
    )
    return f"(SELECT unnest({function}(0), recursive := true))"


def _with_urls(storage: Storage, files: Shards) -> pa.Table:
    """The rows of shards with addresses in place of names."""
    urls = pc.binary_join_element_wise(storage.root, files.rows["name"], "/")
    return files.rows.set_column(0, "url", urls)


def _create_narrow(
    connection: Any, storage: Storage, table: str, files: Shards, shards: str, large_too: bool
) -> None:
    """Create `<table>_in([doc_id, …], layers := NULL)`: the view's rows of some documents, from their shards alone.

    The view itself reads, and hashes when it is first bound, all shards; a page or a notebook that shows a document
    needs one. Documents are literals or parameters, as what files are read must be known when a query is bound.
    """

    def narrowed(documents: list[int] | None, layers: list[int] | None) -> list[str]:
        with _noting_refusals():
            # A query that asks for no document of a shard needs columns too; its join leaves no row.
            names = files.of_documents(documents or (), layers) or [files.first]
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
