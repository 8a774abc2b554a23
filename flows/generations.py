"""Stage 9 (PAPER 1.4): how each checkpoint continues fixed prompts."""

from __future__ import annotations

from flows.checkpoints import finished_checkpoints
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint, GeneratedTexts


@stage_flow("generations", "texts of {title}")
def generations(config: Config) -> None:
    """Continue the prompts with every checkpoint, greedily and sampled with a fixed seed.

    Args:
        config: The whole configuration; `consolidation.generations` matters here.
    """
    if consolidation_of(config, "generations").generations is None:
        raise ConfigError("this configuration has no consolidation.generations", stage="generations")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    checkpoints = needed(finished_checkpoints(config, storage, shards), "checkpoints", storage)
    written = continue_prompts(config, storage, checkpoints)
    check_texts(config, storage, written)


@step("generations", "{series}")
def continue_prompts(config: Config, storage: Storage, checkpoints: list[Checkpoint]) -> list[GeneratedTexts]:
    """Generate what is missing."""
    from tasks.pretraining import generations

    with reported_progress("generations") as progress:
        return generations.generate_texts(config, storage, checkpoints, progress)


@step("generations", "check {series}")
def check_texts(config: Config, storage: Storage, written: list[GeneratedTexts]) -> None:
    """Hold the texts against their expectations."""
    from tasks.pretraining import checks as consolidation_validation

    consolidation_validation.check_generations(config, storage, written)
