"""PAPER 1.4: the loss of every next-token prediction of held-out documents, at every checkpoint."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("losses", "losses of {title}")
def losses(config: Config) -> None:
    """Read held-out documents with every checkpoint.

    Args:
        config: The whole configuration; `consolidation`, `losses` and `windows` matter here.
    """
    run_stage("losses", config)
