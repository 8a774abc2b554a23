"""functok in Python: the tables of a run at hand, and what the commands `run`, `status` and `report` do.

`functok` is the one name that is meant for import by others; what lies beside it (`tasks`, `infra`, …) may change.
Nothing slow is imported before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from functok.explorer.server import Served
    from infra.storage import Storage
    from schemas.config import Config
    from schemas.work import StageName, StagePlan

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
"""Environment of a run: its own progress is the only one that is shown."""

PRIVATE = {"HF_HUB_DISABLE_TELEMETRY": "1"}


class OpenRun:
    """What runs have published under a root; `functok.open` and `functok.run` give it.

    Its tables are those of one finished run, the last one when they are first asked for: open the root again to see
    what a later run has made. One thread asks it at a time; each of several opens the root for itself.

    Args:
        root: A local path or `s3://bucket/prefix`; credentials come from the environment.
        endpoint_url: S3 endpoint, if not AWS; $AWS_ENDPOINT_URL if not given.

    Example:
        >>> with functok.open("runs/demo") as run:
        ...     run.sql("SELECT min(rank), max(share) < 1 FROM tokens WHERE is_function").fetchall()
        [(1, True)]
    """

    def __init__(self, root: str | Path, endpoint_url: str | None = None) -> None:
        from infra.storage import Storage

        self._storage: Storage = Storage(os.fspath(root), endpoint_url or os.environ.get("AWS_ENDPOINT_URL"))

    def __repr__(self) -> str:
        return f"functok.open({self.root!r})"

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def root(self) -> str:
        """Where everything lies."""
        return self._storage.root

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """The names of the tables, in alphabetical order.

        Raises:
            ConfigError: if nothing is published.
            DamagedError: if a file that is needed is not what was written.

        Example:
            >>> "coverage" in functok.open("runs/demo").tables
            True
        """
        return tuple(name for (name,) in self.sql("SHOW TABLES").fetchall())

    def sql(
        self, query: str, parameters: Sequence[object] | Mapping[str, object] | None = None
    ) -> duckdb.DuckDBPyRelation:
        """A query of the tables, as a relation of DuckDB: `.fetchall()`, `.df()`, `.to_arrow_table()`, `.filter(…)`.

        A file is held against its hash before a query reads it, so what is damaged is never an answer.

        Args:
            query: DuckDB SQL; the tables are views by their names.
            parameters: Values of `?` or of `$name` in it.

        Returns:
            The relation, which lives as long as the run is open; None for a statement that has no result.

        Raises:
            ConfigError: if nothing is published.
            DamagedError: if a file that is needed is not what was written.
            duckdb.Error: if the SQL is wrong.

        Example:
            >>> run = functok.open("runs/demo")
            >>> run.sql("SELECT rank FROM tokens WHERE rank <= $last ORDER BY rank", {"last": 2}).fetchall()
            [(1,), (2,)]
        """
        from infra.duck import telling_damage

        with telling_damage():
            relation: duckdb.DuckDBPyRelation = self._connection.sql(query, params=parameters)
        return relation

    def table(self, name: str) -> pa.Table:
        """A whole table, for Arrow, or with `.to_pandas()` for pandas.

        Raises:
            ConfigError: if nothing is published, or no table of this name.
            DamagedError: if a file that is needed is not what was written.

        Example:
            >>> run = functok.open("runs/demo")
            >>> run.table("coverage").to_pandas().groupby("layer").coverage.max().tolist()
            [1.0]
        """
        from difflib import get_close_matches

        from infra.duck import telling_damage
        from schemas.errors import ConfigError

        if name not in self.tables:
            near = get_close_matches(name, self.tables, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{self.root} has no table {name!r}; {meant}there are {', '.join(self.tables)}")
        with telling_damage():
            return self.sql(f'SELECT * FROM "{name}"').to_arrow_table()

    def report(self) -> str:
        """Write the HTML report anew from the tables, and return its address.

        Raises:
            ConfigError: if nothing is published.
            DamagedError: if a file that is needed is not what was written.

        Example:
            >>> functok.open("runs/demo").report().endswith("runs/demo/report.html")
            True
        """
        from schemas.config import DuckDb
        from tasks.report.report import write_report

        require_published(self._storage)
        return write_report(self._storage, DuckDb())

    def explore(self, *, port: int = 0, model: str | None = None) -> Served:
        """Serve the explorer from this process, on this machine alone, until it is closed.

        Args:
            port: The port, or the next free one; 0: any.
            model: To encode pasted text with: `run` for the run's own model, or where it is now.

        Returns:
            What is served: `.address` for a browser, `.open_browser()`, `.close()`; a block closes it at its end.

        Raises:
            ConfigError: if nothing is published.

        Example:
            >>> with functok.open("runs/demo").explore() as explorer:
            ...     explorer.address.startswith("http://127.0.0.1:")
            True
        """
        from functok.explorer.server import Served

        require_published(self._storage)
        return Served(self._storage, port=port, model=model)

    def close(self) -> None:
        """Close the connection to the tables; the next question opens it again, on what is published then."""
        if "_connection" in self.__dict__:
            self._connection.close()
        for name in ("_connection", "tables"):
            self.__dict__.pop(name, None)

    @cached_property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        from tasks.explore.labels import connect_labelled

        require_published(self._storage)
        connection: duckdb.DuckDBPyConnection = connect_labelled(self._storage)
        return connection


def open(root: str | Path, endpoint_url: str | None = None) -> OpenRun:
    """Open what runs have published under a root.

    Args:
        root: A local path or `s3://bucket/prefix`; credentials come from the environment.
        endpoint_url: S3 endpoint, if not AWS; $AWS_ENDPOINT_URL if not given.

    Raises:
        ConfigError: if nothing is published there.
        DamagedError: if what is published is not what was written.
        StorageError: if the storage cannot be asked.

    Example:
        >>> run = functok.open("runs/demo")
        >>> run.table("coverage").column_names[:3]
        ['layer', 'rank', 'token_id']
    """
    opened = OpenRun(root, endpoint_url)
    _ = opened.tables
    return opened


def run(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    root: str | Path | None = None,
    assignments: Sequence[str] = (),
    only: StageName | None = None,
    start_from: StageName | None = None,
    verify: bool = False,
) -> OpenRun:
    """Run the pipeline as `functok run` does: what is missing or changed is done, progress and results are printed.

    Args:
        config: A TOML file, its content as a dictionary, or a `Config`.
        root: Where everything is written, in place of the configuration's `storage.root`.
        assignments: `key.path=value`, as `--set` takes them.
        only: Run this stage alone.
        start_from: Run this stage and those after it.
        verify: Read every manifest again, instead of the index of those of each stage.

    Returns:
        The root's tables.

    Raises:
        ConfigError: if the configuration is wrong, or has no such stage.
        FunctokError: if a stage fails; what was finished is kept.

    Example:
        >>> functok.run("my.toml").table("graph_summary").num_rows  # doctest: +ELLIPSIS
        nothing to do: everything asked for is up to date
        ...
        1
    """
    from functok.pipeline import run_pipeline
    from infra.interrupt import interruptible

    loaded, storage = opened(config, assignments, root)
    with quiet_libraries(), interruptible(ends_process=False):
        run_pipeline(loaded, storage, only=only, start_from=start_from, verify=verify)
    return OpenRun(storage.root, storage.endpoint_url)


def status(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    root: str | Path | None = None,
    assignments: Sequence[str] = (),
    verify: bool = False,
) -> list[StagePlan]:
    """What `functok status` shows: for each stage what is done, what a run would do now, and why.

    Args:
        config: A TOML file, its content as a dictionary, or a `Config`.
        root: Where everything is, in place of the configuration's `storage.root`.
        assignments: `key.path=value`, as `--set` takes them.
        verify: Read every manifest again, instead of the index of those of each stage.

    Returns:
        A plan a stage, in order: `stage`, `done`, `missing` (None where that is not known yet), `reason`, `details`.

    Raises:
        ConfigError: if the configuration is wrong.
        FunctokError: if it does not fit its model or corpus.

    Example:
        >>> plans = functok.status("my.toml", assignments=["graph.rarefaction_m=7"])
        >>> [plan.stage for plan in plans if plan.missing]
        ['tables', 'report']
    """
    from tasks.stages import plan_run

    loaded, storage = opened(config, assignments, root)
    with quiet_libraries():
        return plan_run(loaded, storage, verify=verify)


def opened(
    config: str | Path | Mapping[str, Any] | Config,
    assignments: Sequence[str] = (),
    root: str | Path | None = None,
) -> tuple[Config, Storage]:
    """A configuration, validated, and its storage; arguments and errors as those of `run`."""
    from infra.config_file import load_config
    from infra.storage import Storage

    if isinstance(assignments, str):
        assignments = [assignments]
    loaded = load_config(config, assignments, None if root is None else os.fspath(root))
    return loaded, Storage(loaded.storage.root, loaded.storage.endpoint_url)


def require_published(storage: Storage) -> None:
    """Do nothing where tables are published.

    Raises:
        ConfigError: if none are.
        DamagedError: if the catalogue is damaged.
        StorageError: if the storage cannot be asked.
    """
    from infra.catalog import read_catalog
    from schemas.errors import ConfigError

    storage.require_place()
    if not read_catalog(storage).tables:
        raise ConfigError(
            f"{storage.root} holds no finished tables", hint="give --root, or run `functok run CONFIG` first"
        )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """In this block and the processes it starts, show no progress but functok's own, and tell no hub of its use."""
    missing = {name: value for name, value in {**QUIET, **PRIVATE}.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
