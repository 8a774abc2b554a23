"""Stage 1 (PAPER 1.1): tokenize the corpus, each document whole, and count every token."""

from __future__ import annotations

from flows.stage import run_stage, stage_flow
from schemas.config import Config


@stage_flow("tokenize", "tokenize for {title}")
def tokenize(config: Config) -> None:
    """Tokenize what is missing of the corpus into shards with counts.

    Args:
        config: The whole configuration; `corpus`, `model` (its tokenizer) and `dask` matter here.
    """
    run_stage("tokenize", config)
