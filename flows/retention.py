"""PAPER 2: held-out text, read with a cache that forgets, under every policy and budget."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("retention", "retention of {title}")
def retention(config: Config) -> None:
    """Read held-out sequences under every policy, budget and protocol, beside the full cache.

    Args:
        config: The whole configuration; `retention` matters here.
    """
    run_stage("retention", config)
