"""Stage 7 (PAPER 1.4): the loss of every next-token prediction of held-out documents, at every checkpoint."""

from __future__ import annotations

from flows.checkpoints import finished_checkpoints
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint, LossShard
from schemas.work import CorpusShards


@stage_flow("losses", "losses of {title}")
def losses(config: Config) -> None:
    """Read held-out documents with every checkpoint.

    Args:
        config: The whole configuration; `consolidation`, `losses` and `windows` matter here.
    """
    consolidation_of(config, "losses")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    checkpoints = needed(finished_checkpoints(config, storage, shards), "checkpoints", storage)
    measured = read_heldout(config, storage, shards, checkpoints)
    check_losses(config, storage, measured)


@step("losses", "{series}")
def read_heldout(
    config: Config, storage: Storage, shards: CorpusShards, checkpoints: list[Checkpoint]
) -> list[LossShard]:
    """Compute the losses that are missing."""
    from tasks.pretraining import losses

    with reported_progress("losses") as progress:
        return losses.compute_losses(config, storage, shards, checkpoints, progress)


@step("losses", "check {series}")
def check_losses(config: Config, storage: Storage, measured: list[LossShard]) -> None:
    """Hold the loss shards against their expectations."""
    from tasks.pretraining import checks as consolidation_validation

    consolidation_validation.check_losses(config, storage, measured)
