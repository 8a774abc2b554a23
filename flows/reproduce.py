"""The whole of PAPER 1.1 to 1.4: from a corpus and models to the tables and their report."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from flows.checkpoints import checkpoints
from flows.dictionaries import dictionaries
from flows.features import features
from flows.generations import generations
from flows.growth import growth
from flows.losses import losses
from flows.reactivation import reactivation
from flows.report import report
from flows.steering import steering
from flows.support import open_storage, stage_flow, watching
from flows.tables import tables
from flows.tokenize import tokenize
from infra.config_file import refuse_secrets
from infra.run_api import ChosenApi, run_api
from infra.run_log import tracebacks
from infra.terminal import terminal_progress
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.work import Stage


@stage_flow("reproduce", "reproduce with {title}")
def reproduce(config: Config, only: Stage | None = None, start_from: Stage | None = None) -> None:
    """Run every stage that the configuration asks for; each does what is missing.

    Args:
        config: Corpus, model, dictionaries and everything else.
        only: Run this stage alone.
        start_from: Run this stage and those after it.
    """
    stages = stages_to_run(config, only, start_from)
    check(config, stages)
    if "tokenize" in stages:
        tokenize(config)
    if "dictionaries" in stages:
        dictionaries(config)
    if "features" in stages:
        features(config)
    if "reactivation" in stages:
        reactivation(config)
    if "steering" in stages:
        steering(config)
    if "checkpoints" in stages:
        checkpoints(config)
    if "losses" in stages:
        losses(config)
    if "growth" in stages:
        growth(config)
    if "generations" in stages:
        generations(config)
    if "tables" in stages:
        tables(config)
    if "report" in stages:
        report(config)


def check(config: Config, stages: tuple[Stage, ...]) -> None:
    """Ask of the model and the dictionaries what can be known before any work is done.

    Raises:
        FunctokError: if they do not fit, or the model's files do not hold it.
    """
    from tasks.graph.preflight import check_fit, check_model

    storage = open_storage(config)
    check_fit(config, storage)
    if set(stages) - {"tokenize", "tables", "report"}:
        check_model(config, storage)


def stages_to_run(config: Config, only: Stage | None, start_from: Stage | None) -> tuple[Stage, ...]:
    """The stages that a run walks through.

    Raises:
        ConfigError: if both choices are made, or the one made does not apply to the configuration.
    """
    from tasks.engine.plan import stages_of

    if only is not None and start_from is not None:
        raise ConfigError("`only` and `start_from` exclude each other", hint="leave one of them empty")
    stages = stages_of(config, only, start_from)
    if not stages:
        raise ConfigError(
            f"the stage {only or start_from} does not apply to this configuration",
            hint=f"it has {', '.join(stages_of(config))}; [[sae]] gives a graph, [steering] what its features do, "
            "[consolidation] checkpoints",
        )
    return stages


def run(
    config: Config,
    *,
    only: Stage | None = None,
    start_from: Stage | None = None,
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
    stages = stages_to_run(config, only, start_from)
    with (
        tracebacks(wanted=debug),
        run_api(debug=debug, meanwhile=imports(stages), chosen=api),
        terminal_progress(plain=debug) as progress,
        watching(progress),
    ):
        reproduce(config, only=only, start_from=start_from)


def imports(stages: tuple[Stage, ...]) -> Iterator[ModuleType]:
    """Import what the stages will use, one library at a time."""
    libraries: dict[Stage, tuple[str, ...]] = {
        "tokenize": ("transformers", "tasks.corpus.tokenization", "tasks.engine.validation"),
        "dictionaries": ("torch", "tasks.dictionaries.dictionaries", "sae_lens"),
        "features": ("tasks.graph.features",),
        "reactivation": ("tasks.steering.reactivation", "sae_lens"),
        "steering": ("tasks.steering.steering", "sae_lens"),
        "checkpoints": ("tasks.pretraining.checkpoints", "tasks.pretraining.training"),
        "losses": ("tasks.pretraining.losses",),
        "growth": ("tasks.pretraining.growth", "sae_lens"),
        "generations": ("tasks.pretraining.generations",),
        "tables": ("tasks.graph.tables", "great_expectations"),
        "report": ("tasks.report.report",),
    }
    for stage in stages:
        for library in libraries[stage]:
            yield import_module(library)
