"""Stage 4 (PAPER 1.3): the features of each case's prompts, at every position and layer."""

from __future__ import annotations

from flows.artifacts import show_reactivation
from flows.dictionaries import finished_dictionaries
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from flows.tokenize import finished_tokens
from infra.storage import Storage
from schemas.config import Config
from schemas.steering.section import steering_of
from schemas.steering.work import CaseFeatures
from schemas.work import CorpusShards, Dictionary


@stage_flow("reactivation", "reactivation with {title}")
def reactivation(config: Config) -> None:
    """Read the features of prompts that differ in one place, to see them come back at later tokens.

    Args:
        config: The whole configuration; `steering.cases`, `model`, `sae` and `windows` matter here.
    """
    steering_of(config, "reactivation")
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    dictionaries = needed(finished_dictionaries(config, storage, shards), "dictionaries", storage)
    read = encode_prompts(config, storage, dictionaries)
    check_reactivation(config, storage, shards, dictionaries, read)
    show_reactivation(storage, read)


@step("reactivation", "{cases}")
def encode_prompts(config: Config, storage: Storage, dictionaries: list[Dictionary]) -> list[CaseFeatures]:
    """Check the cases' file, and encode the prompts of the cases that are missing."""
    from tasks.steering import cases, reactivation

    cases.check_cases(config, storage)
    with reported_progress("reactivation") as progress:
        return reactivation.compute_reactivations(config, storage, dictionaries, progress)


@step("reactivation", "check {cases}")
def check_reactivation(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    dictionaries: list[Dictionary],
    read: list[CaseFeatures],
) -> None:
    """Hold the cases against their expectations."""
    from tasks.steering import checks as steering_validation

    steering_validation.check_reactivation(config, storage, shards, dictionaries, read)
