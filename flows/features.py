"""Stage 3 (PAPER 1.2): which token activates which feature, layer by layer."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("features", "features of {title}")
def features(config: Config) -> None:
    """Read the residual stream after each layer and encode it with that layer's dictionary.

    Args:
        config: The whole configuration; `model`, `sae`, `windows` and `activations` matter here.
    """
    run_stage("features", config)
