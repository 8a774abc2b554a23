"""PAPER 2: what a cache that forgets still knows of a context when it is asked."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("retrieval", "retrieval of {title}")
def retrieval(config: Config) -> None:
    """Read prompts under every policy, and ask what was said in them.

    Args:
        config: The whole configuration; `retention` matters here.
    """
    run_stage("retrieval", config)
