"""PAPER 1.4: how each checkpoint continues fixed prompts."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("generations", "texts of {title}")
def generations(config: Config) -> None:
    """Continue the prompts with every checkpoint, greedily and sampled with a fixed seed.

    Args:
        config: The whole configuration; `consolidation.generations` matters here.
    """
    run_stage("generations", config)
