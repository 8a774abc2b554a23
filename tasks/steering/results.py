"""What reactivation and steering have made, gathered for the tables, and what of it is missing (PAPER 1.3)."""

from __future__ import annotations

from collections.abc import Sequence

from infra.storage import Storage
from schemas.config import Config
from schemas.steering.section import Steering
from schemas.steering.work import CaseFeatures, SteeredPrompt, SteeringResults, TraitFeatures
from schemas.work import CorpusShards, Dictionary, Stage, StagePlan


def steering_stages(config: Config) -> tuple[Stage, ...]:
    """The stages that a configuration's cases ask for, in order."""
    return () if config.section(Steering) is None else ("reactivation", "steering")


def find_steering_results(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: Sequence[Dictionary]
) -> SteeringResults | None:
    """What both stages have finished, or None if anything that is asked for is missing.

    Args:
        config: The configuration, its tokenizer resolved, with a section `steering`.
        storage: Where everything is.
        shards: The tokenized corpus.
        dictionaries: The dictionary of each layer.

    Raises:
        ConfigError: if the cases cannot be used as asked.
    """
    from tasks.steering.reactivation import find_reactivations
    from tasks.steering.steering import find_steering

    cases = find_reactivations(config, storage, dictionaries)
    steered = None if cases is None else find_steering(config, storage, shards, dictionaries)
    return _results(cases, steered)


def plan_steering(
    config: Config,
    storage: Storage,
    shards: CorpusShards | None,
    dictionaries: Sequence[Dictionary] | None,
) -> tuple[list[StagePlan], SteeringResults | None]:
    """A `StagePlan` for each stage that applies, and their results if both are finished.

    Manifests are read, and to know the corpus' function tokens its counts; no model is. Nothing is written.

    Raises:
        ConfigError: if the cases cannot be used as asked.
    """
    from tasks.steering.reactivation import find_reactivations, missing_reactivations
    from tasks.steering.steering import find_steering, missing_steering

    if shards is None or dictionaries is None:
        unknown = "known once the corpus and the dictionaries are there"
        stages = steering_stages(config)
        return [StagePlan(stage=stage, done=0, missing=None, reason=unknown) for stage in stages], None
    cases = find_reactivations(config, storage, dictionaries)
    steered = find_steering(config, storage, shards, dictionaries)
    n_read, unread = (
        missing_reactivations(config, storage, dictionaries) if cases is None else (len(cases), [])
    )
    n_steered, unsteered = (
        missing_steering(config, storage, shards, dictionaries)
        if steered is None
        else (len(steered[0]) + len(steered[1]), [])
    )
    plans = [
        _plan("reactivation", "cases", n_read, unread),
        _plan("steering", "traits and experiments", n_steered, unsteered),
    ]
    return plans, _results(cases, steered)


def _results(
    cases: Sequence[CaseFeatures] | None,
    steered: tuple[Sequence[TraitFeatures], Sequence[SteeredPrompt]] | None,
) -> SteeringResults | None:
    if cases is None or steered is None:
        return None
    traits, experiments = steered
    return SteeringResults(cases=tuple(cases), traits=tuple(traits), experiments=tuple(experiments))


def _plan(stage: Stage, what: str, n_done: int, missing: Sequence[str]) -> StagePlan:
    changed = f"{what} are new or damaged, or their model, dictionaries or settings changed"
    return StagePlan(
        stage=stage,
        done=n_done,
        missing=len(missing),
        reason=changed if missing else f"all {what} are there",
        details=tuple(missing),
    )
