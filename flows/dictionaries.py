"""Stage 2: a dictionary (sparse autoencoder) for each layer, fetched, read from disk or trained here."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("dictionaries", "dictionaries for {title}")
def dictionaries(config: Config) -> None:
    """Make the dictionary of every layer ready, and check that it fits the model's residual stream.

    Args:
        config: The whole configuration; `sae` and `model` matter here, and the corpus where it is trained on.
    """
    run_stage("dictionaries", config)
