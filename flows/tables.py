"""Stage 10 (PAPER 1.1 to 1.4): the tables, in SQL over the shards; checked, then published together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.artifacts import show_heat_maps, show_tables
from flows.dictionaries import finished_dictionaries
from flows.features import finished_features
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from flows.tokenize import finished_tokens
from infra.duck import Catalog
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError
from schemas.pretraining.section import Consolidation
from schemas.steering.section import Steering
from schemas.steering.work import SteeringResults
from schemas.work import CorpusShards, Dictionary, FeatureShard

if TYPE_CHECKING:
    from tasks.pretraining.table_plan import ConsolidationResults


@stage_flow("tables", "tables of {title}")
def tables(config: Config) -> None:
    """Build the tables from the shards, check them against each other, and publish them as one.

    Where the features, the cases or the checkpoints' results are not finished, the other tables are published
    before the flow fails.

    Args:
        config: The whole configuration; `function_tokens`, `graph`, `losses`, `steering` and `duckdb` matter
            here.
    """
    storage = open_storage(config)
    config, shards = needed(finished_tokens(config, storage), "tokenize", storage)
    dictionaries = finished_dictionaries(config, storage, shards) if config.sae else None
    features = finished_features(config, storage, shards, dictionaries) if dictionaries else None

    catalog = build_corpus_tables(config, storage, shards)
    if dictionaries and features:
        catalog = build_graph_tables(config, storage, shards, features, dictionaries)
    steered = (
        finished_steering(config, storage, shards, dictionaries)
        if config.section(Steering) and dictionaries
        else None
    )
    if steered:
        catalog = build_steering_tables(config, storage, shards, steered, catalog)
    results = finished_consolidation(config, storage, shards) if config.section(Consolidation) else None
    if results:
        catalog = build_consolidation_tables(config, storage, shards, results, catalog)
    check_tables(config, storage, catalog)
    publish(config, storage, catalog)
    show_tables(config, storage)
    if steered:
        show_heat_maps(config, storage)

    if config.sae:
        needed(dictionaries, "dictionaries", storage)
        needed(features, "features", storage)
    if config.section(Steering) and not steered:
        raise FunctokError(
            f"the stage reactivation or steering is not finished for this configuration in {storage.root}",
            stage="tables",
            hint="functok status says which; run it, or both: functok run CONFIG --from reactivation",
        )
    if config.section(Consolidation) and not results:
        raise FunctokError(
            f"a checkpoint stage is not finished for this configuration in {storage.root}",
            stage="tables",
            hint="functok status says which; run it, or the whole: functok run CONFIG --from checkpoints",
        )


@step("tables", "corpus")
def build_corpus_tables(config: Config, storage: Storage, shards: CorpusShards) -> Catalog:
    """Documents, rejects, occurrences, tokens with their ranks and shares."""
    from tasks.graph import tables

    with reported_progress("tables") as progress:
        return tables.build_corpus_tables(config, storage, shards, progress)


@step("tables", "graph, layer {layers}")
def build_graph_tables(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    features: list[FeatureShard],
    dictionaries: list[Dictionary],
) -> Catalog:
    """Edges, degrees, coverage, rarefied degrees and the power law, per layer."""
    from tasks.graph import tables

    with reported_progress("tables") as progress:
        return tables.build_graph_tables(config, storage, shards, features, dictionaries, progress)


@step("tables", "look for {cases}")
def finished_steering(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: list[Dictionary]
) -> SteeringResults | None:
    """What reactivation and steering have made; None if any of it is missing."""
    from tasks.steering import results as steering_stages

    return steering_stages.find_steering_results(config, storage, shards, dictionaries)


@step("tables", "{cases}")
def build_steering_tables(
    config: Config, storage: Storage, shards: CorpusShards, results: SteeringResults, catalog: Catalog
) -> Catalog:
    """Reactivation, traits and the effects of steering, beside what the candidate already has."""
    from tasks.steering import tables as steering_tables

    with reported_progress("tables") as progress:
        return steering_tables.build_steering_tables(config, storage, shards, results, progress, onto=catalog)


@step("tables", "look for {series}")
def finished_consolidation(
    config: Config, storage: Storage, shards: CorpusShards
) -> ConsolidationResults | None:
    """What the checkpoint stages have made; None if any of it is missing."""
    from tasks.pretraining import results as consolidation

    return consolidation.find_results(config, storage, shards)


@step("tables", "{series}")
def build_consolidation_tables(
    config: Config, storage: Storage, shards: CorpusShards, results: ConsolidationResults, catalog: Catalog
) -> Catalog:
    """Loss buckets, learned features and graphs by checkpoint, beside what the candidate already has."""
    from tasks.pretraining import tables as consolidation_tables

    with reported_progress("tables") as progress:
        return consolidation_tables.build_consolidation_tables(
            config, storage, shards, results, progress, onto=catalog
        )


@step("tables", "check")
def check_tables(config: Config, storage: Storage, catalog: Catalog) -> None:
    """Hold the candidate tables against their expectations; nobody has seen them yet."""
    from tasks.engine import validation

    validation.check_tables(config, storage, catalog)


@step("tables", "publish")
def publish(config: Config, storage: Storage, catalog: Catalog) -> None:
    """Let readers see the checked tables, all at once."""
    from tasks.graph import tables

    tables.publish(storage, catalog)
