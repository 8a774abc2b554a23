"""The tables, in SQL over the shards: checked, then published together."""

from __future__ import annotations

from collections.abc import Sequence

from flows.artifacts import show_catalogue, show_explorer, shown_in_prefect
from flows.stage import look, open_storage, reported_progress, stage_flow, step
from infra.catalog import Catalog, read_catalog
from infra.duck import connect, telling_damage
from schemas.config import Config
from tasks import stages
from tasks.engine import checks
from tasks.engine import tables as engine
from tasks.engine.run import Run
from tasks.engine.tables import TableGroup, Tables


@stage_flow("tables", "tables of {title}")
def tables(config: Config) -> None:
    """Build the tables from the shards, check them against each other, and publish them as one.

    Where what some of them are made of is not finished, the others are published before the flow fails.

    Args:
        config: The whole configuration; `function_tokens`, `graph`, `features` and `duckdb`, and what experiments ask
            of their tables, matter here.
    """
    groups = stages.table_groups(config)
    run = look("tables", config, open_storage(config), groups[0].needs)
    ready = finished(run, groups)
    catalog = check(run, [build(run, group) for group in ready])
    publish(run, catalog)
    show(run, ready)
    lacking = engine.unfinished(run, groups)
    if lacking is not None:
        raise lacking


def finished(run: Run, groups: Sequence[TableGroup]) -> list[TableGroup]:
    """The groups whose shards are there."""

    @step("tables", "look for shards")
    def look() -> list[TableGroup]:
        return [group for group in groups if all(map(run.is_finished, group.needs))]

    return look()


def build(run: Run, group: TableGroup) -> Tables:
    """Make what is missing of a group of tables."""

    @step("tables", group.subject(run.config))
    def build() -> Tables:
        with reported_progress("tables", run.config) as progress:
            return group.build(run, progress)

    return build()


def check(run: Run, made: Sequence[Tables]) -> Catalog:
    """Hold the tables as they would be published against their expectations; nobody has seen them yet."""

    @step("tables", "check")
    def check() -> Catalog:
        catalog = engine.candidate(run.storage, made)
        checks.check_tables(run.config, run.storage, catalog, stages.beside(run.storage, catalog))
        return catalog

    return check()


def publish(run: Run, catalog: Catalog) -> None:
    """Let readers see the checked tables, all at once."""

    @step("tables", "publish")
    def publish() -> None:
        engine.publish(run.storage, catalog)

    publish()


def show(run: Run, groups: Sequence[TableGroup]) -> None:
    """Tables and pictures of what is published, and how to ask it."""
    storage, config = run.storage, run.config
    published = read_catalog(storage).lineage
    with telling_damage(), connect(storage, config.duckdb) as connection:
        for group in groups:
            if group.name in published:
                shown_in_prefect(storage, group.shown(connection, config))
    show_catalogue(storage)
    show_explorer(storage)
