"""Groups of tables: which there would be, whether they are published, and publishing them.

Each table is one COPY of `sql/<room>/<table>.sql` into a folder named by what determines it, so two plans are equal
exactly where their tables are. All sums are sums of integers: sharding, order and threads cannot change a bit.
Building publishes nothing: it gives a candidate catalogue, which `publish` makes the readers' own.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import duckdb
import pyarrow as pa

from infra.catalog import Catalog, ShardFile, read_catalog, write_catalog
from infra.duck import create_views, open_duckdb, telling_damage
from infra.manifest import Manifest, commit, content_key, load, load_all
from infra.progress import Progress, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config, DuckDb
from schemas.errors import ConfigError, DamagedError, FunctokError, StorageError, whole_message
from schemas.tables import MEMBERS
from schemas.work import StagePlan
from sql import read_sql
from tasks.engine.checks import expectations_table
from tasks.engine.run import Run
from tasks.engine.stage import Asked, Image, Shown, Stage

VERSION = 1
"""Raise when the SQL or what runs it changes what is in a table."""

STAGE = "tables"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A group of tables as it would be published.

    Attributes:
        name: Name of the group.
        key_parts: What its key is made of, readable.
        tables: Table to its file.
        sharded: Table to its shards' files.
        made_by_shard: Those of the sharded tables that this stage makes; the others are the shards' own files.
        inputs: What its SQL reads that is not published.
        about: What it is about: keys of the run's model, then of its dictionaries. Of the corpus' group, where it says
            what is about another run.
    """

    name: str
    key_parts: Mapping[str, Any]
    tables: dict[str, str] = field(default_factory=dict)
    sharded: dict[str, list[ShardFile]] = field(default_factory=dict)
    made_by_shard: tuple[str, ...] = ()
    inputs: Catalog = field(default_factory=Catalog)
    about: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, key_parts: Mapping[str, Any], tables: Iterable[str], **others: Any) -> Tables:
        """A group whose tables lie in one folder, named by its key; `others` are further attributes."""
        folder = f"tables/{name}-{content_key(**key_parts)}"
        files = {table: f"{folder}/{table}.parquet" for table in tables}
        return cls(name=name, key_parts=key_parts, tables=files, **others)

    @property
    def key(self) -> str:
        """Content key of the whole group."""
        return content_key(**self.key_parts)

    @property
    def made(self) -> list[str]:
        """The files that this stage makes."""
        by_shard = [file.name for table in self.made_by_shard for file in self.sharded.get(table, [])]
        return [*self.tables.values(), *by_shard]


class TableGroup(Asked, ABC):
    """Tables that are made and published together.

    Attributes:
        name: Names it in the catalogue (`Catalog.lineage`); its tables are `schemas.tables.MEMBERS[name]`.
        needs: Stages whose results it is made of.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[Stage[Any, Any], ...]]

    def subject(self, config: Config) -> str:
        """What it is of, in a few words."""
        return super().subject(config) or self.name

    @abstractmethod
    def planned(self, run: Run) -> Tables | None:
        """The group as it would be published; None where that is not known before some of it is made."""

    @abstractmethod
    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make what is missing of its tables.

        Raises:
            ConfigError: if DuckDB cannot work within its limits.
            StorageError: if a file cannot be read or written.
        """

    def shown(self, connection: Any, config: Config) -> Iterable[Shown | Image]:
        """What people see of its published tables in Prefect; the connection is one of `infra.duck.connect`."""
        return ()

    def beside(self, storage: Storage, catalog: Catalog) -> Mapping[str, pa.Table]:
        """Small tables that the expectations on its tables read besides, told by the catalogue alone."""
        return {}


def candidate(storage: Storage, made: Sequence[Tables]) -> Catalog:
    """What would be published: what is, with these groups in place of the old ones."""
    return merged(_published(storage), *made)


def publish(storage: Storage, catalog: Catalog) -> None:
    """Make a candidate catalogue the one that readers see, with the table `expectations` as it stands now."""
    rows = expectations_table(storage)
    parts = {"group": "expectations", "rows": rows.to_pylist()}
    name = f"tables/expectations-{content_key(**parts)}/expectations.parquet"
    ensure_folder(storage, [name], {"group": "expectations"}, lambda: [storage.write_parquet(name, rows)])
    published = replace(catalog, tables={**catalog.tables, "expectations": name})
    write_catalog(storage, published)


def are_published(run: Run, groups: Sequence[TableGroup]) -> bool:
    """Whether the published tables are those that a run would leave, and all of those it makes are there."""
    planned = [group.planned(run) for group in groups]
    made = [group for group in planned if group is not None]
    if len(made) < len(planned):
        return False
    try:
        published = read_catalog(run.storage)
    except DamagedError:
        return False
    if merged(published, *made).lineage != published.lineage:
        return False
    for group in made:
        if any(published.tables.get(table) != name for table, name in group.tables.items()):
            return False
        if any(published.sharded.get(table) != files for table, files in group.sharded.items()):
            return False
    names = [name for group in made for name in group.made]
    folders = {name.rsplit("/", 1)[0] for name in (*names, published.tables.get("expectations", names[0]))}
    return folders == set(load_all(run.storage, sorted(folders)))


def plan_tables(run: Run, groups: Sequence[TableGroup]) -> StagePlan:
    """What the table stage has, and what a run would do now."""
    needs = [needed for group in groups for needed in group.needs]
    if not all(map(run.is_finished, needs)):
        return StagePlan(stage=STAGE, done=0, missing=None, reason="known once the shards are there")
    if are_published(run, groups):
        return StagePlan(stage=STAGE, done=1, missing=0, reason="the published tables are current")
    return StagePlan(
        stage=STAGE, done=0, missing=1, reason="the published tables are missing or of other shards"
    )


def merged(published: Catalog, *groups: Tables) -> Catalog:
    """A catalogue, published or itself a candidate, with `groups` in place of those of the same names.

    What was made from another corpus (a graph, an experiment) goes with the old corpus, which is told by the group
    that says what the run is about. So does what is about another model than the run's, or about dictionaries of which
    the run has others: one report is about one model. What another configuration has made of the same stays, also where
    this version has no such experiment: tables that no group has here are then those of that one.
    `expectations` goes always, as it is written again when the candidate is published.
    """
    replaced = {group.name for group in groups}
    corpus = next((group for group in groups if group.name == "corpus"), None)
    if corpus is not None:
        is_same = published.lineage.get("corpus") == corpus.key
        replaced |= {
            name
            for name in {*MEMBERS, *published.lineage}
            if not (is_same and _is_of(published.about.get(name, []), corpus.about))
        }
    known = {table for members in MEMBERS.values() for table in members}
    others = {*published.tables, *published.sharded} - known
    gone = {"expectations", *(table for group in replaced for table in MEMBERS.get(group, others))}
    tables = {table: name for table, name in published.tables.items() if table not in gone}
    sharded = {table: files for table, files in published.sharded.items() if table not in gone}
    lineage = {group: key for group, key in published.lineage.items() if group not in replaced}
    about = {group: keys for group, keys in published.about.items() if group not in replaced}
    for group in groups:
        tables |= group.tables
        sharded |= group.sharded
        lineage[group.name] = group.key
        if corpus is not None:
            about[group.name] = list(group.about or corpus.about)
    return Catalog(tables=tables, sharded=sharded, lineage=lineage, about=about)


def write_table(
    resources: DuckDb,
    storage: Storage,
    table: str,
    name: str,
    inputs: Catalog,
    relations: Mapping[str, pa.Table] | None = None,
    **parameters: Any,
) -> StoredFile:
    """Run a table's SQL into the Parquet file `name`.

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
    with opened(f"the table {table}", resources, storage, inputs) as connection:
        for view, rows in (relations or {}).items():
            connection.register(view, rows)
        return copy_table(connection, resources, storage, table, name, **parameters)


def copy_table(
    connection: Any,
    resources: DuckDb,
    storage: Storage,
    table: str,
    name: str,
    options: str = "",
    **parameters: Any,
) -> StoredFile:
    """Run a table's SQL on a connection that has its upstream tables, into the Parquet file `name`.

    Args:
        connection: Of `opened`.
        resources: Limits of DuckDB.
        storage: Where the output is.
        table: Which table.
        name: The file to write; it appears whole or not at all.
        options: Further options of the COPY.
        parameters: Values bound to the SQL's `$names`; those it does not name are not bound.
    """
    query = read_sql(table)
    (statement,) = connection.extract_statements(query)
    bound = {key: value for key, value in parameters.items() if key in statement.named_parameters}
    with storage.write_by_path(name, resources.temp_directory or None) as place:
        target = place.path.replace("'", "''")
        connection.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet, COMPRESSION zstd{options})", bound)
    assert place.stored is not None
    return place.stored


def ensure_folder(
    storage: Storage,
    names: Sequence[str],
    inputs: Mapping[str, Any],
    make: Callable[[], Iterable[StoredFile]],
) -> None:
    """Have the files `names`, all of one folder whose key `inputs` made, written and committed, if that is not done."""
    folder = names[0].rsplit("/", 1)[0]
    if load(storage, folder) is None:
        written = list(make())
        assert {file.name for file in written} == set(names)
        commit(storage, folder, Manifest(stage=STAGE, inputs=dict(inputs)), written)


def selected(inputs: Catalog, views: Sequence[str]) -> Catalog:
    """Those of the upstream tables that one table's SQL reads: a view over a file that is not there cannot be made."""
    return Catalog(
        tables={view: name for view, name in inputs.tables.items() if view in views},
        sharded={view: files for view, files in inputs.sharded.items() if view in views},
    )


@contextmanager
def opened(what: str, resources: DuckDb, storage: Storage, inputs: Catalog) -> Iterator[Any]:
    """A DuckDB connection that has the upstream tables as views; its errors are `explained`."""
    with open_duckdb(storage, resources) as connection, explained(what, resources, storage):
        create_views(connection, storage, inputs)
        yield connection


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


def unfinished(run: Run, groups: Sequence[TableGroup]) -> FunctokError | None:
    """Why not all tables of a configuration could be made, after the others were; None where all are."""
    for group in groups:
        for needed in group.needs:
            if not run.is_finished(needed):
                try:
                    run.result(needed)
                except FunctokError as error:
                    return error
    return None


def _published(storage: Storage) -> Catalog:
    """What is published; nothing where the catalogue is damaged, which is then said."""
    try:
        return read_catalog(storage)
    except DamagedError as error:
        _logger.warning("%s; it is written anew, with the tables of this configuration alone", error.message)
        return Catalog()


def _is_of(about: Sequence[str], run: Sequence[str]) -> bool:
    """Whether published tables are about a run's model, and about none but its dictionaries where it has any."""
    return about[:1] == list(run[:1]) and (len(run) == 1 or set(about) <= set(run))
