"""What the checkpoint stages have made, gathered for the tables, and what of it is missing (PAPER 1.4)."""

from __future__ import annotations

from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import Consolidation, Series, consolidation_of
from schemas.pretraining.work import Checkpoint
from schemas.work import CorpusShards, Stage, StagePlan
from tasks.pretraining.checkpoints import find_checkpoints, find_series
from tasks.pretraining.table_plan import ConsolidationResults


def consolidation_stages(config: Config) -> tuple[Stage, ...]:
    """The checkpoint stages that apply to a configuration, in order."""
    section = config.section(Consolidation)
    if section is None:
        return ()
    asked: list[Stage] = ["checkpoints", "losses"]
    asked += ["growth"] * (section.growth is not None)
    asked += ["generations"] * (section.generations is not None)
    return tuple(asked)


def find_results(config: Config, storage: Storage, shards: CorpusShards) -> ConsolidationResults | None:
    """What the checkpoint stages have finished, or None if anything that is asked for is missing.

    Args:
        config: The configuration, its tokenizer resolved.
        storage: Where everything is.
        shards: The tokenized corpus.
    """
    checkpoints = find_checkpoints(config, storage, shards)
    return None if checkpoints is None else _results(config, storage, shards, checkpoints, [])


def plan_consolidation(
    config: Config, storage: Storage, shards: CorpusShards | None
) -> tuple[list[StagePlan], ConsolidationResults | None]:
    """A `StagePlan` for each checkpoint stage that applies, and their results if all are finished."""
    stages = consolidation_stages(config)
    if shards is None:
        unknown = "known once the corpus is tokenized"
        return [StagePlan(stage=stage, done=0, missing=None, reason=unknown) for stage in stages], None
    found = find_series(config, storage, shards)
    untrained = [series for series in consolidation_of(config).series if found[series.name] is None]
    plans = [
        StagePlan(
            stage="checkpoints",
            done=len(found) - len(untrained),
            missing=len(untrained),
            reason="series are new, or what trains them changed"
            if untrained
            else "all checkpoints are there",
            details=tuple(_to_train(config, storage, shards, series) for series in untrained),
        )
    ]
    trained = [checkpoint for series in found.values() for checkpoint in series or ()]
    results = _results(config, storage, shards, trained, plans) if trained else None
    if not untrained:
        return plans, results
    # What of the trained series is done stays done; what the others need is not known.
    done = {plan.stage: plan.done for plan in plans}
    unknown = "known once the checkpoints are there"
    rest = [
        StagePlan(stage=stage, done=done.get(stage, 0), missing=None, reason=unknown) for stage in stages[1:]
    ]
    return plans[:1] + rest, None


def _to_train(config: Config, storage: Storage, shards: CorpusShards, series: Series) -> str:
    from tasks.pretraining.training import started_training

    step, last = started_training(config, storage, shards, series)
    return f"train {series.name}" + (f": goes on after step {step:,} of {last:,}" if step else "")


def _results(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    checkpoints: list[Checkpoint],
    plans: list[StagePlan],
) -> ConsolidationResults | None:
    """Find what is there, adding a plan of each stage after the first to `plans`."""
    from tasks.pretraining.generations import find_generations, missing_generations
    from tasks.pretraining.growth import find_growth, missing_growth
    from tasks.pretraining.losses import find_losses, missing_losses
    from tasks.pretraining.training import training_losses_file

    section = consolidation_of(config)
    losses = find_losses(config, storage, shards, checkpoints)
    # Equal shards, or equal weights under two names, have one folder.
    done, missing = (
        missing_losses(config, storage, shards, checkpoints)
        if losses is None
        else (len({loss.folder for loss in losses}), [])
    )
    changed = "held-out documents or checkpoints are new, or how they are read changed"
    plans.append(
        StagePlan(
            stage="losses",
            done=done,
            missing=len(missing),
            reason=changed if missing else "all losses are there",
            details=tuple(missing),
        )
    )
    growth = find_growth(config, storage, shards, checkpoints) if section.growth else []
    if section.growth:
        n_grown, ungrown = (
            missing_growth(config, storage, shards, checkpoints) if growth is None else (len(growth), [])
        )
        plans.append(
            StagePlan(
                stage="growth",
                done=n_grown,
                missing=len(ungrown),
                reason="an SAE, its judgement or its graph is missing" if ungrown else "all SAEs are there",
                details=tuple(ungrown),
            )
        )
    texts = find_generations(config, storage, checkpoints) if section.generations else []
    if section.generations:
        n_texts, unwritten = (
            missing_generations(config, storage, checkpoints) if texts is None else (len(texts), [])
        )
        plans.append(
            StagePlan(
                stage="generations",
                done=n_texts,
                missing=len(unwritten),
                reason="texts of a checkpoint are missing" if unwritten else "all texts are there",
                details=tuple(unwritten),
            )
        )
    if losses is None or growth is None or texts is None:
        return None
    found = {checkpoint.series for checkpoint in checkpoints}
    return ConsolidationResults(
        checkpoints=tuple(checkpoints),
        losses=tuple(losses),
        growth=tuple(growth),
        generations=tuple(texts),
        training_losses={
            series.name: training_losses_file(config, storage, shards, series)
            for series in section.series
            if series.shape is not None and series.name in found
        },
    )
