"""Which tables reactivation and steering have (PAPER 1.3), and under which names: known before any is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra.duck import Catalog, ShardFile
from infra.manifest import content_key
from schemas.config import Config
from schemas.steering.section import steering_of
from schemas.steering.work import CaseFeatures, LayerFolder, SteeredPrompt, SteeringResults, TraitFeatures
from schemas.work import CorpusShards
from tasks.engine.table_plan import (
    EXPERIMENT_TABLES,
    REACTIVATION_TABLES,
    TRAIT_TABLES,
    VERSION,
    Group,
    corpus_group,
)


def steering_group(config: Config, shards: CorpusShards, results: SteeringResults) -> Group:
    """The tables of a run's cases, traits and experiments; those of what it has none of are left out.

    The order in which the cases' file has its entries changes neither a table nor the key.

    Args:
        config: The configuration, with a section `steering`.
        shards: The tokenized corpus, whose function tokens are the tables'.
        results: What the stages reactivation and steering have made.
    """
    cases, traits, experiments = sorted_results(results)
    parts: dict[str, Any] = {
        "group": "steering",
        "version": VERSION,
        "corpus": corpus_group(config, shards).key,
        "cases": [[case.case, case.folder, _folders(case.layers)] for case in cases],
        "traits": [[trait.trait, _folders(trait.layers)] for trait in traits],
        "experiments": [[experiment.case, experiment.folder] for experiment in experiments],
        "resamples": steering_of(config).resamples,
    }
    key = content_key(**parts)
    wanted = [
        *(REACTIVATION_TABLES if cases else ()),
        *(TRAIT_TABLES if traits else ()),
        *(EXPERIMENT_TABLES if experiments else ()),
    ]
    inputs = {
        "shard_prompt_tokens": [ShardFile(name=f"{case.folder}/prompt_tokens.parquet") for case in cases],
        "shard_prompt_features": [
            ShardFile(name=f"{folder}/prompt_features.parquet", source=case.case)
            for case in cases
            for folder in _folders(case.layers)
        ],
    }
    return Group(
        name="steering",
        key=key,
        key_parts=parts,
        tables={table: f"tables/steering-{key}/{table}.parquet" for table in wanted},
        sharded={},
        inputs=Catalog(sharded=inputs if cases else {}),
    )


def sorted_results(
    results: SteeringResults,
) -> tuple[list[CaseFeatures], list[TraitFeatures], list[SteeredPrompt]]:
    """Cases, traits and experiments in an order that is not the file's."""
    return (
        sorted(results.cases, key=lambda case: (case.case, case.folder)),
        sorted(results.traits, key=lambda trait: (trait.trait, _folders(trait.layers))),
        sorted(results.experiments, key=lambda made: (made.case, made.prompt, made.folder)),
    )


def _folders(layers: Sequence[LayerFolder]) -> list[str]:
    return [entry.folder for entry in sorted(layers, key=lambda entry: entry.layer)]
