"""PAPER 1.4: the checkpoints of each pre-training run, trained here or public."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("checkpoints", "checkpoints of {title}")
def checkpoints(config: Config) -> None:
    """Train the models that are trained here, and find the checkpoints of all others.

    Args:
        config: The whole configuration; `consolidation` and `corpus` matter here.
    """
    run_stage("checkpoints", config)
