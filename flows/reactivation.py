"""PAPER 1.3: the features of each case's prompts, at every position and layer."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("reactivation", "reactivation with {title}")
def reactivation(config: Config) -> None:
    """Read the features of prompts that differ in one place, to see them come back at later tokens.

    Args:
        config: The whole configuration; `steering.cases`, `model`, `sae` and `windows` matter here.
    """
    run_stage("reactivation", config)
