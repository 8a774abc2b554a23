"""Stage 6 (PAPER 1.4): the checkpoints of each pre-training run, trained here or public."""

from __future__ import annotations

from flows.artifacts import show_checkpoints
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint
from schemas.work import CorpusShards


@stage_flow("checkpoints", "checkpoints of {title}")
def checkpoints(config: Config) -> None:
    """Train the models that are trained here, and find the checkpoints of all others.

    Args:
        config: The whole configuration; `consolidation` and `corpus` matter here.
    """
    consolidation_of(config, "checkpoints")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    found = train_or_find(config, storage, shards)
    check_series(config, storage, found)
    show_checkpoints(storage, found)


@step("checkpoints", "{series}")
def train_or_find(config: Config, storage: Storage, shards: CorpusShards) -> list[Checkpoint]:
    """Train what is missing; a training that was killed goes on where its last state was saved."""
    from tasks.pretraining import checkpoints

    with reported_progress("checkpoints") as progress:
        return checkpoints.prepare_checkpoints(config, storage, shards, progress)


@step("checkpoints", "check {series}")
def check_series(config: Config, storage: Storage, found: list[Checkpoint]) -> None:
    """Hold the series against their expectations."""
    from tasks.pretraining import checks as consolidation_validation

    consolidation_validation.check_checkpoints(config, storage, found)


@step("checkpoints", "look for {series}")
def finished_checkpoints(config: Config, storage: Storage, shards: CorpusShards) -> list[Checkpoint] | None:
    """The checkpoints, for a later stage; None if one is still to be trained."""
    from tasks.pretraining import checkpoints

    return checkpoints.find_checkpoints(config, storage, shards)
