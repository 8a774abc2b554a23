"""Stage 3 (PAPER 1.2): which token activates which feature, layer by layer."""

from __future__ import annotations

from flows.artifacts import show_features
from flows.dictionaries import finished_dictionaries
from flows.support import needed, open_storage, reported_progress, require_layers, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.work import CorpusShards, Dictionary, FeatureShard


@stage_flow("features", "features of {title}")
def features(config: Config) -> None:
    """Read the residual stream after each layer and encode it with that layer's dictionary.

    Args:
        config: The whole configuration; `model`, `sae`, `windows` and `activations` matter here.
    """
    require_layers(config, "features")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    dictionaries = needed(finished_dictionaries(config, storage, shards), "dictionaries", storage)
    activated = extract_and_encode(config, storage, shards, dictionaries)
    check_activations(config, storage, activated, dictionaries)
    show_features(storage, activated)


@step("features", "layer {layers}")
def extract_and_encode(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: list[Dictionary]
) -> list[FeatureShard]:
    """Make the feature shards that are missing: one forward for all layers, encoded on the device."""
    from tasks.graph import features

    with reported_progress("features") as progress:
        return features.extract_features(config, storage, shards, dictionaries, progress)


@step("features", "check layer {layers}")
def check_activations(
    config: Config, storage: Storage, activated: list[FeatureShard], dictionaries: list[Dictionary]
) -> None:
    """Hold the feature shards against their expectations."""
    from tasks.engine import validation

    validation.check_features(config, storage, activated, dictionaries)


@step("features", "look for layer {layers}")
def finished_features(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: list[Dictionary]
) -> list[FeatureShard] | None:
    """The feature shards, for a later stage; None if any is missing."""
    from tasks.graph import features

    return features.find_feature_shards(config, storage, shards, dictionaries)
