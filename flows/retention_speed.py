"""PAPER 2: tokens decoded a second, against the full cache in alternation."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("retention_speed", "speed of {title}")
def retention_speed(config: Config) -> None:
    """Decode with each policy's cache and the full one in turns.

    Args:
        config: The whole configuration; `retention` matters here.
    """
    run_stage("retention_speed", config)
