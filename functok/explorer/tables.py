"""The published tables, for many readers at once, while runs publish new ones.

A *generation* is one in-memory DuckDB database whose views are the tables of one finished run; each reader has a cursor
of its own on it, so that one can be interrupted without the others. When `catalog.json` changes, the next reader gets a
new generation, and the old one goes with its last reader. A view is made when a query first names its table, as making
one over S3 reads a footer.

The database can read the root's folders and nothing else, and none of its settings can be changed; that it is not
written to is for `functok.explorer.console` to see to, since COPY and ATTACH write into what may be read.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from infra.catalog import CATALOG, Catalog, read_catalog
from infra.duck import create_views, open_duckdb, telling_damage
from infra.storage import Storage
from schemas.config import DuckDb
from schemas.errors import ConfigError, FunctokError
from tasks.explore.labels import add_feature_labels
from tasks.explore.vocabulary import Query

ASKED_EVERY = 2.0
"""Seconds for which `catalog.json` is not asked for again."""

LESS = "ask for less: fewer rows, a filter, one layer"
"""The way out where something took too long."""

_BATCH = 10_000

_LISTS_ALL = re.compile(r"information_schema|duckdb_|pg_catalog|sqlite_master|\bshow\b", re.IGNORECASE)
"""What lists tables, and so needs all of them."""


class Stopped(FunctokError):
    """A reader's time is over, or nobody waits for the answer any more."""


class Reader:
    """One reader's connection; what `tasks.report.queries` takes for a connection of `infra.duck.connect`.

    Args:
        generation: The tables.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._cursor = generation.cursor()
        self._why = ""

    @property
    def tables(self) -> frozenset[str]:
        """Names of the tables, those whose views were not made yet too."""
        return self.generation.tables

    def execute(self, sql: str, values: Any = None) -> Any:
        """Run one statement; the cursor with its result.

        Raises:
            Stopped: if `stop` was called.
            DamagedError: if a file that is needed is not what was written.
            duckdb.Error: if the SQL is wrong.
        """
        with self.stoppable(), telling_damage():
            self.generation.make_views(sql)
            return self._cursor.execute(sql, values)

    def batches(self, query: Query) -> pa.RecordBatchReader:
        """A query's rows as they are made, never all at once; raises as `execute`, while they are read too."""
        with self.stoppable(), telling_damage():
            self.generation.make_views(query.sql)
            # With values beside it, DuckDB would keep the whole result.
            return self._cursor.sql(query.text).to_arrow_reader(_BATCH)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Raise `Stopped` for what DuckDB raises where it was interrupted."""
        self._require_going()
        try:
            yield
        except duckdb.InterruptException:
            self._require_going()
            raise

    def _require_going(self) -> None:
        if self._why:
            raise Stopped(self._why, hint=LESS)

    def stop(self, why: str) -> None:
        """End what is going on, from another thread, and whatever would follow.

        To be called again until the reader has left: a query that is about to begin is not interrupted.
        """
        self._why = why
        with suppress(duckdb.Error):
            self._cursor.interrupt()

    def close(self) -> None:
        """Leave."""
        self._cursor.close()


class Generation:
    """The tables of one finished run.

    Args:
        storage: Where their files are.
        catalog: Which ones.
        name: Short, another one for another catalogue.
        resources: Memory and threads of all readers together.
    """

    def __init__(self, storage: Storage, catalog: Catalog, name: str, resources: DuckDb) -> None:
        self.storage, self.catalog, self.name = storage, catalog, name
        published = (*catalog.tables, *catalog.sharded)
        self.kept: dict[object, Any] = {}
        """What pages have computed of these tables and need again."""
        self._made: set[str] = set()
        self._lock = threading.Lock()
        self._database = open_duckdb(storage, resources)
        add_feature_labels(self._database, storage, catalog)
        own = self._database.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        self.tables = frozenset(published) | {name for (name,) in own}
        self._published = frozenset(published)
        places = ", ".join(_text(f"{place}/") for place in _places(storage))
        for setting in (
            f"allowed_directories = [{places}]",
            "python_enable_replacements = false",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            self._database.execute(f"SET {setting}")

    def cursor(self) -> Any:
        """A connection of its own to the database."""
        return self._database.cursor()

    def make_views(self, sql: str) -> None:
        """Make the views of the tables that a statement may name.

        Raises:
            DamagedError: if a file is damaged so that its columns cannot be read.
        """
        # `activations_in(documents)` stands beside the view `activations`.
        words = {word.removesuffix("_in") for word in re.findall(r"\w+", sql.lower())}
        wanted = self._published if _LISTS_ALL.search(sql) else self._published & words
        if wanted <= self._made:
            return
        with self._lock:
            for name in sorted(wanted - self._made):
                one = Catalog(
                    tables={name: self.catalog.tables[name]} if name in self.catalog.tables else {},
                    sharded={name: self.catalog.sharded[name]} if name in self.catalog.sharded else {},
                )
                create_views(
                    self._database,
                    self.storage,
                    one,
                    large_too=self.storage.is_local,
                )
                self._made.add(name)


class Tables:
    """What is published under a root, as it is published.

    Args:
        storage: The root.
        resources: Memory and threads of all readers together.

    Raises:
        ConfigError: if nothing is published.
    """

    def __init__(self, storage: Storage, resources: DuckDb | None = None) -> None:
        self.storage = storage
        self._resources = resources or DuckDb()
        self._lock = threading.Lock()
        self._asked_at, self._content = float("-inf"), b""
        self._generation: Generation | None = None
        self.current()

    @property
    def known(self) -> str:
        """The name of the tables that were last seen."""
        return "" if self._generation is None else self._generation.name

    def current(self) -> Generation:
        """The tables that are published now, as known for at most `ASKED_EVERY` seconds."""
        with self._lock:
            if time.monotonic() - self._asked_at >= ASKED_EVERY or self._generation is None:
                self._look()
                self._asked_at = time.monotonic()
            assert self._generation is not None
            return self._generation

    def _look(self) -> None:
        try:
            content = self.storage.read_bytes(CATALOG)
            if content == self._content:
                return
            catalog = read_catalog(self.storage)
            if not catalog.tables:
                raise FileNotFoundError
        except FileNotFoundError:
            # A root that is made anew while one reads keeps its old tables until there are new ones.
            if self._generation is None:
                raise ConfigError(
                    f"{self.storage.root} holds no finished tables",
                    hint="give --root, or run `functok run CONFIG` first",
                ) from None
            return
        except FunctokError:
            if self._generation is None:
                raise
            return
        name = hashlib.sha256(content).hexdigest()[:12]
        # The database before goes with the last of its readers.
        self._generation = Generation(self.storage, catalog, name, self._resources)
        self._content = content

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """A reader of the tables that are published now."""
        reader = Reader(self.current())
        try:
            yield reader
        finally:
            reader.close()


def _places(storage: Storage) -> list[str]:
    """The root as it is written and as its filesystem knows it, and where links lead: DuckDB follows them first."""
    found = [storage.root, storage.path]
    if storage.is_local:
        root = Path(storage.path)
        found += [str(root.resolve()), *(str(one.resolve()) for one in root.iterdir() if one.is_symlink())]
    return list(dict.fromkeys(found))


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
