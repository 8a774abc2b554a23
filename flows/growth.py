"""PAPER 1.4: an SAE for each selected checkpoint, what it has learned, and the checkpoint's graph."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("growth", "feature growth of {title}")
def growth(config: Config) -> None:
    """Train SAEs of one size along pre-training, judge them on held-out text, and make each one's graph.

    Args:
        config: The whole configuration; `consolidation.growth` and `activations` matter here.
    """
    run_stage("growth", config)
