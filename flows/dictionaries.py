"""Stage 2: a dictionary (sparse autoencoder) for each layer, fetched, read from disk or trained here."""

from __future__ import annotations

from flows.artifacts import show_dictionaries
from flows.support import needed, open_storage, reported_progress, require_layers, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.work import CorpusShards, Dictionary


@stage_flow("dictionaries", "dictionaries for {title}")
def dictionaries(config: Config) -> None:
    """Make the dictionary of every layer ready, and check that it fits the model's residual stream.

    Args:
        config: The whole configuration; `sae` and `model` matter here, and the corpus where it is trained on.
    """
    require_layers(config, "dictionaries")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    ready = fetch_or_train(config, storage, shards)
    check_quality(config, storage, ready)
    show_dictionaries(storage, ready)


@step("dictionaries", "layer {layers}")
def fetch_or_train(config: Config, storage: Storage, shards: CorpusShards) -> list[Dictionary]:
    """Fetch, copy or train the dictionaries that are missing."""
    from tasks.dictionaries import dictionaries

    with reported_progress("dictionaries") as progress:
        return dictionaries.prepare_dictionaries(config, storage, shards, progress)


@step("dictionaries", "check layer {layers}")
def check_quality(config: Config, storage: Storage, ready: list[Dictionary]) -> None:
    """Hold the dictionaries against their expectations."""
    from tasks.engine import validation

    validation.check_dictionaries(config, storage, ready)


@step("dictionaries", "look for layer {layers}")
def finished_dictionaries(config: Config, storage: Storage, shards: CorpusShards) -> list[Dictionary] | None:
    """The dictionaries, for a later stage; None if any is missing or no longer the one asked for."""
    from tasks.dictionaries import dictionaries

    return dictionaries.find_dictionaries(config, storage, shards)
