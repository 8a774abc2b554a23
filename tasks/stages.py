"""All stages of a configuration: the spine's, those of the experiments it asks for, the tables and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from infra.catalog import Catalog, read_catalog
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, FunctokError
from schemas.experiments import EXPERIMENTS, asked_for, experiment_rooms
from schemas.work import STAGES, StagePlan
from tasks.engine import tables
from tasks.engine.run import Run, looking, plan
from tasks.engine.stage import Stage
from tasks.engine.tables import TableGroup

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.experiment import Experiment

TABLES, REPORT = "tables", "report"
"""The stages that end every run: they make no units."""


def experiments_of(config: Config) -> list[Experiment]:
    """The experiments that a configuration asks for, in the order of the one list."""
    return [experiment(name) for name in asked_for(config)]


def published_experiments(catalog: Catalog) -> list[Experiment]:
    """The experiments that have published tables, whoever made them; the others are not imported."""
    return [experiment(room.name) for room in experiment_rooms() if room.group in catalog.lineage]


def experiment(name: str) -> Experiment:
    """An experiment by its name."""
    found: Experiment = import_module(f"tasks.{name}").EXPERIMENT
    return found


def spine() -> tuple[Stage[Any, Any], ...]:
    """The stages of PAPER 1.1 and 1.2."""
    from tasks.corpus.tokenization import TOKENIZE
    from tasks.dictionaries.dictionaries import DICTIONARIES
    from tasks.graph.features import FEATURES

    return TOKENIZE, DICTIONARIES, FEATURES


def working_stages(config: Config) -> list[Stage[Any, Any]]:
    """The stages that make units and that a configuration asks for, in order."""
    of_experiments = [stage for one in experiments_of(config) for stage in one.stages]
    return [stage for stage in (*spine(), *of_experiments) if stage.applies(config)]


def stage_named(name: str) -> Stage[Any, Any]:
    """A stage that makes units, by its name.

    Raises:
        KeyError: if there is none.
    """
    every = (*spine(), *(stage for one in EXPERIMENTS for stage in experiment(one).stages))
    return {stage.name: stage for stage in every}[name]


def unit_folders() -> set[str]:
    """The top folders whose folders are each made as one, whatever a configuration asks for."""
    every = (*spine(), *(stage for one in EXPERIMENTS for stage in experiment(one).stages))
    return {TABLES, *(top for stage in every for top in stage.tops)}


def table_groups(config: Config) -> list[TableGroup]:
    """The groups of tables that a configuration asks for, in the order in which they are made."""
    from tasks.corpus.tables import CorpusTables
    from tasks.graph.feature_tables import FEATURE_TABLES
    from tasks.graph.tables import GRAPH

    asked = experiments_of(config)
    groups = [CorpusTables([one.facts for one in asked]), GRAPH, FEATURE_TABLES]
    groups += [one.tables for one in asked]
    return [group for group in groups if group.applies(config)]


def stages_of(config: Config, only: str | None = None, start_from: str | None = None) -> tuple[str, ...]:
    """The names of the stages that a run walks through: all that apply, one, or one and those after it.

    Raises:
        ConfigError: if both choices are made.
        FunctokError: if the one that is made does not apply to the configuration.
    """
    if only is not None and start_from is not None:
        raise ConfigError("`only` and `start_from` exclude each other", hint="leave one of them empty")
    applying = (*(stage.name for stage in working_stages(config)), TABLES, REPORT)
    first = only or start_from
    if first is not None and first not in STAGES:
        raise ConfigError(
            f"there is no stage {first!r}", hint=f"this configuration has {', '.join(applying)}"
        )
    if first is not None and only is not None and first not in applying:
        raise _does_not_apply(config, first, applying)
    chosen = tuple(
        stage
        for stage in applying
        if (only is None or stage == only)
        and (start_from is None or STAGES.index(stage) >= STAGES.index(start_from))
    )
    return chosen


def _does_not_apply(config: Config, name: str, applying: Sequence[str]) -> FunctokError:
    return FunctokError(
        f"the stage {name} does not apply to this configuration",
        hint=f"it has {', '.join(applying)}; {stage_named(name).refuse(config).hint}",
    )


def open_run(config: Config, storage: Storage, tell: Progress = silent) -> Run:
    """A run of a configuration; its tokenizer is resolved where it was trained here."""
    from tasks.corpus.tokenizer_training import with_tokenizer

    return Run(with_tokenizer(config, storage) or config, storage, tell)


def plan_run(config: Config, storage: Storage, *, verify: bool = False) -> list[StagePlan]:
    """What a run would do now, a `StagePlan` a stage, in order.

    No weights are read and nothing of a stage is made.

    Args:
        config: The configuration.
        storage: Where everything is.
        verify: Whether every manifest is read itself, and the indexes (`infra.index`) are written anew.

    Raises:
        FunctokError: if the configuration does not fit its model or corpus.
        StorageError: if the storage cannot be asked; a bucket that is not there is named.
    """
    with looking(storage, verify=verify):
        check_fit(config, storage)
        run = open_run(config, storage)
        plans = plan(run, working_stages(config))
        plans.append(tables.plan_tables(run, table_groups(config)))
        return [*plans, _plan_report(storage, plans[-1])]


def is_up_to_date(plans: Sequence[StagePlan], stages: Sequence[str]) -> bool:
    """Whether none of `stages` has anything to do."""
    return all(plan.missing == 0 for plan in plans if plan.stage in stages)


def check_fit(config: Config, storage: Storage) -> None:
    """Whether layers, windows, tokenizer and dictionaries fit the model, and what experiments ask of them.

    As far as can be told without weights; raises what is wrong.
    """
    from tasks.graph.preflight import check_dictionaries

    known = check_dictionaries(config, storage)
    for one in experiments_of(config):
        one.check_fit(config, storage, known)


def check_before_work(config: Config, storage: Storage, stages: Sequence[str]) -> None:
    """Ask of the model and the dictionaries what can be known before any work is done.

    Raises:
        FunctokError: if they do not fit, or the model's files do not hold it.
    """
    from tasks.graph.preflight import check_model

    check_fit(config, storage)
    if set(stages) - {spine()[0].name, TABLES, REPORT}:
        check_model(config, storage)


def beside(storage: Storage, catalog: Catalog) -> Mapping[str, pa.Table]:
    """What expectations on tables read besides these: of every published group, whoever made it."""
    return {
        view: rows
        for one in published_experiments(catalog)
        for view, rows in one.tables.beside(storage, catalog).items()
    }


def write_report(storage: Storage, config: Config | None = None, progress: Progress = silent) -> str:
    """Write the report of the published tables; its address. Raises as `tasks.report.report.write_report`."""
    from tasks.report import report

    parts = [one.report for one in published_experiments(read_catalog(storage))]
    return report.write_report(storage, None if config is None else config.duckdb, progress, parts)


def _plan_report(storage: Storage, of_tables: StagePlan) -> StagePlan:
    from tasks.report.report import is_report_current

    if of_tables.missing is None:
        return StagePlan(stage=REPORT, done=0, missing=None, reason="known once the tables are there")
    if of_tables.missing:
        return StagePlan(stage=REPORT, done=0, missing=1, reason="the tables will change")
    if is_report_current(storage):
        return StagePlan(stage=REPORT, done=1, missing=0, reason="the report is of these tables")
    return StagePlan(stage=REPORT, done=0, missing=1, reason="the report is missing or of other tables")
