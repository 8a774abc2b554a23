"""PAPER 1.3: each trait's features, and what setting them does to the answers."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("steering", "steering of {title}")
def steering(config: Config) -> None:
    """Find the features of each trait, and sweep every experiment's strengths, places and controls.

    Args:
        config: The whole configuration; `steering`, `function_tokens`, `model` and `sae` matter here.
    """
    run_stage("steering", config)
