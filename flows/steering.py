"""Stage 5 (PAPER 1.3): each trait's features, and what setting them does to the answers."""

from __future__ import annotations

from flows.artifacts import show_steering
from flows.dictionaries import finished_dictionaries
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.steering.section import steering_of
from schemas.steering.work import SteeredPrompt, TraitFeatures
from schemas.work import CorpusShards, Dictionary


@stage_flow("steering", "steering of {title}")
def steering(config: Config) -> None:
    """Find the features of each trait, and sweep every experiment's strengths, places and controls.

    Args:
        config: The whole configuration; `steering`, `function_tokens`, `model` and `sae` matter here.
    """
    steering_of(config, "steering")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    dictionaries = needed(finished_dictionaries(config, storage, shards), "dictionaries", storage)
    traits, steered = find_and_steer(config, storage, shards, dictionaries)
    check_steering(config, storage, dictionaries, traits, steered)
    show_steering(storage, traits, steered)


@step("steering", "{cases}")
def find_and_steer(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: list[Dictionary]
) -> tuple[list[TraitFeatures], list[SteeredPrompt]]:
    """Find the traits' features and run the experiments that are missing."""
    from tasks.steering import steering

    with reported_progress("steering") as progress:
        return steering.run_steering(config, storage, shards, dictionaries, progress)


@step("steering", "check {cases}")
def check_steering(
    config: Config,
    storage: Storage,
    dictionaries: list[Dictionary],
    traits: list[TraitFeatures],
    steered: list[SteeredPrompt],
) -> None:
    """Hold traits and experiments against their expectations."""
    from tasks.steering import checks as steering_validation

    steering_validation.check_steering(config, storage, dictionaries, traits, steered)
