"""The tables, in SQL over the shards: checked, then published together."""

from __future__ import annotations

from flows.artifacts import show_catalogue, shown_in_prefect
from flows.stage import look, open_storage, reported_progress, stage_flow, step
from infra.duck import Catalog, connect, read_catalog, telling_damage
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
        config: The whole configuration; `function_tokens`, `graph` and `duckdb`, and what experiments ask of their
            tables, matter here.
    """
    groups = stages.table_groups(config)
    run = look("tables", config, open_storage(config), groups[0].needs)
    ready = [group for group in groups if all(map(run.is_finished, group.needs))]
    made = [build(config, run, group) for group in ready]
    catalog = engine.candidate(run.storage, made)
    check(config, run, catalog)
    publish(config, run, catalog)
    show(run, ready)
    lacking = engine.unfinished(run, groups)
    if lacking is not None:
        raise lacking


def build(config: Config, run: Run, group: TableGroup) -> Tables:
    """Make what is missing of a group of tables."""

    @step("tables", group.subject(config))
    def make(config: Config) -> Tables:
        with reported_progress("tables", config) as progress:
            return group.build(run, progress)

    return make(config)


def check(config: Config, run: Run, catalog: Catalog) -> None:
    """Hold the candidate tables against their expectations; nobody has seen them yet."""

    @step("tables", "check")
    def check(config: Config) -> None:
        checks.check_tables(run.config, run.storage, catalog, stages.beside(run.storage, catalog))

    check(config)


def publish(config: Config, run: Run, catalog: Catalog) -> None:
    """Let readers see the checked tables, all at once."""

    @step("tables", "publish")
    def publish(config: Config) -> None:
        engine.publish(run.storage, catalog)

    publish(config)


def show(run: Run, groups: list[TableGroup]) -> None:
    """Tables and pictures of what is published, and how to ask it."""
    storage, config = run.storage, run.config
    published = read_catalog(storage).lineage
    with telling_damage(), connect(storage, config.duckdb) as connection:
        for group in groups:
            if group.name in published:
                shown_in_prefect(storage, group.shown(connection, config))
    show_catalogue(storage)
