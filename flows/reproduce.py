"""The whole of the paper: from a corpus and models to the tables and their report."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from flows.dictionaries import dictionaries
from flows.features import features
from flows.report import report
from flows.stage import open_storage, stage_flow, watching
from flows.tables import tables
from flows.tokenize import tokenize
from infra.config_file import refuse_secrets
from infra.run_api import ChosenApi, run_api
from infra.run_log import tracebacks
from infra.terminal import terminal_progress
from schemas.config import Config
from schemas.work import StageName
from tasks.stages import check_before_work, experiments_of, stage_named, stages_of


@stage_flow("reproduce", "reproduce with {title}")
def reproduce(config: Config, only: StageName | None = None, start_from: StageName | None = None) -> None:
    """Run every stage that the configuration asks for; each does what is missing.

    Args:
        config: Corpus, model, dictionaries and everything else.
        only: Run this stage alone.
        start_from: Run this stage and those after it.
    """
    stages = stages_of(config, only, start_from)
    check_before_work(config, open_storage(config), stages)
    # PAPER 1.1 and 1.2: tokens, features, and the graph between them
    if "tokenize" in stages:
        tokenize(config)
    if "dictionaries" in stages:
        dictionaries(config)
    if "features" in stages:
        features(config)
    # what stands on it
    for experiment in experiments_of(config):
        for stage in experiment.stages:
            if stage.name in stages:
                getattr(import_module(f"flows.{stage.name}"), stage.name)(config)
    if "tables" in stages:
        tables(config)
    if "report" in stages:
        report(config)


def run(
    config: Config,
    *,
    only: StageName | None = None,
    start_from: StageName | None = None,
    debug: bool = False,
    api: ChosenApi | None = None,
) -> None:
    """Run `reproduce` from a terminal, with a progress bar, on a running Prefect server or a temporary one.

    Args:
        config: The configuration.
        only: Run this stage alone.
        start_from: Run this stage and those after it.
        debug: Show Prefect's own log with tracebacks, and progress as lines.
        api: The API to use, perhaps still starting; chosen here if None.

    Raises:
        FunctokError: what a stage raised, itself; also if Prefect's API cannot be reached.
    """
    refuse_secrets(config)
    stages = stages_of(config, only, start_from)
    with (
        tracebacks(wanted=debug),
        run_api(debug=debug, meanwhile=imports(stages), chosen=api),
        terminal_progress(plain=debug) as progress,
        watching(progress),
    ):
        reproduce(config, only=only, start_from=start_from)


def imports(stages: tuple[str, ...]) -> Iterator[ModuleType]:
    """Import what the stages will use, one library at a time."""
    for name in stages:
        of_stage = ("great_expectations",) if name in {"tables", "report"} else stage_named(name).libraries
        for library in of_stage:
            yield import_module(library)
