"""Stage 8 (PAPER 1.4): an SAE for each selected checkpoint, what it has learned, and the checkpoint's graph."""

from __future__ import annotations

from flows.artifacts import show_growth
from flows.checkpoints import finished_checkpoints
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint, GrownSae
from schemas.work import CorpusShards


@stage_flow("growth", "feature growth of {title}")
def growth(config: Config) -> None:
    """Train SAEs of one size along pre-training, judge them on held-out text, and make each one's graph.

    Args:
        config: The whole configuration; `consolidation.growth` and `activations` matter here.
    """
    if consolidation_of(config, "growth").growth is None:
        raise ConfigError("this configuration has no consolidation.growth, so no SAE series", stage="growth")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    checkpoints = needed(finished_checkpoints(config, storage, shards), "checkpoints", storage)
    grown = train_along(config, storage, shards, checkpoints)
    check_growth(config, storage, grown)
    show_growth(storage, grown)


@step("growth", "{series}")
def train_along(
    config: Config, storage: Storage, shards: CorpusShards, checkpoints: list[Checkpoint]
) -> list[GrownSae]:
    """Make the SAEs and graphs that are missing, by the spine's own stages."""
    from tasks.pretraining import growth

    with reported_progress("growth") as progress:
        return growth.grow(config, storage, shards, checkpoints, progress)


@step("growth", "check {series}")
def check_growth(config: Config, storage: Storage, grown: list[GrownSae]) -> None:
    """Hold the SAE series against its expectations."""
    from tasks.pretraining import checks as consolidation_validation

    consolidation_validation.check_growth(config, storage, grown)
