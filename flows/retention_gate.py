"""A learned gate for retention."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("retention_gate", "gate of {title}")
def retention_gate(config: Config) -> None:
    """Learn from documents that nobody is measured on which tokens will still be attended to.

    Args:
        config: The whole configuration; `retention` matters here.
    """
    run_stage("retention_gate", config)
