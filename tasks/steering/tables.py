"""The tables of reactivation and steering (PAPER 1.3), from the folders of cases, traits and experiments.

All are small next to a corpus' graph and lie in one folder. Sums are sums of integers and rows are sorted, so
neither the order of the cases' file nor threads can change a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import pyarrow as pa

from infra import verified
from infra.duck import Catalog, create_views, open_duckdb, read_catalog
from infra.progress import Progress, one_by_one, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.steering.section import steering_of
from schemas.steering.work import SteeringResults
from schemas.tables import TABLES
from schemas.work import CorpusShards
from tasks.engine.table_plan import Group, corpus_group, merged
from tasks.engine.table_sql import ensure_folder, explained, write_table
from tasks.graph.tables import build_corpus
from tasks.steering.intervals import case_sums, effect_intervals, experiment_effects, score_intervals
from tasks.steering.loaded_traits import load_layers
from tasks.steering.table_plan import sorted_results, steering_group

__all__ = ["build_steering_tables"]

SORTED_BY = {
    "trait_layers": ("trait", "layer"),
    "trait_features": ("trait", "layer", "place"),
    "steering": ("case", "prompt", "target", "mode", "place", "control", "draw", "strength"),
}
"""Tables that gather the folders' rows, and the keys of these."""


def build_steering_tables(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    results: SteeringResults,
    progress: Progress = silent,
    onto: Catalog | None = None,
) -> Catalog:
    """Make the steering group (and the corpus group, where it is missing).

    Args:
        config: The configuration, with a section `steering`.
        storage: Where everything is.
        shards: The tokenized corpus.
        results: What the stages reactivation and steering have made.
        progress: Told of each table.
        onto: A candidate that holds what else was just made (a graph); none: what is published.

    Returns:
        The candidate catalogue: `onto` with both groups.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read or written.
    """
    corpus = corpus_group(config, shards)
    group = steering_group(config, shards, results)
    total = len(group.tables)
    advance = one_by_one(progress, total)

    def make() -> Iterator[StoredFile]:
        for table in group.tables:
            yield _write(config, storage, corpus, group, results, table)
            advance(table.replace("_", " "))

    progress(0, total, "steering tables")
    build_corpus(config, storage, shards, corpus)
    if group.tables:
        ensure_folder(storage, list(group.tables.values()), group.key_parts, make)
    progress(total, total, "steering tables")
    return merged(read_catalog(storage) if onto is None else onto, corpus, group)


def _write(
    config: Config, storage: Storage, corpus: Group, group: Group, results: SteeringResults, table: str
) -> StoredFile:
    if table in SORTED_BY:
        return storage.write_parquet(group.tables[table], _gathered(storage, table, results))
    made = corpus.tables | group.tables
    inputs = Catalog(
        tables={view: made[view] for view in UPSTREAM[table] if view in made},
        sharded={view: group.inputs.sharded[view] for view in UPSTREAM[table] if view not in made},
    )
    relations: dict[str, pa.Table] = {}
    if table in {"reactivation_scores", "steering_effects"}:
        relations, inputs = _measured(config, storage, table, inputs), Catalog()
    return write_table(config.duckdb, storage, table, group.tables[table], inputs, relations)


UPSTREAM: dict[str, tuple[str, ...]] = {
    "prompt_tokens": ("tokens", "shard_prompt_tokens"),
    "reactivations": ("prompt_tokens", "shard_prompt_features"),
    "reactivation_positions": ("prompt_tokens", "reactivations"),
    "reactivation_scores": ("reactivation_positions",),
    "steering_effects": ("steering",),
}
"""What each table's SQL reads, or what comes before it does."""


def _measured(config: Config, storage: Storage, table: str, inputs: Catalog) -> dict[str, pa.Table]:
    """What the table's SQL sums, by case or by experiment, and the intervals."""
    resamples = steering_of(config).resamples
    with (
        open_duckdb(storage, config.duckdb) as connection,
        explained(f"the table {table}", config.duckdb, storage),
    ):
        create_views(connection, storage, inputs)
        if table == "reactivation_scores":
            sums = case_sums(connection)
            return {"case_sums": sums, "intervals": score_intervals(sums, resamples)}
        effects = experiment_effects(connection)
        return {"experiment_effects": effects, "intervals": effect_intervals(effects, resamples)}


def _gathered(storage: Storage, table: str, results: SteeringResults) -> pa.Table:
    """The folders' rows under each other, sorted by the table's keys."""
    schema = TABLES[table]
    _, traits, experiments = sorted_results(results)
    if table == "trait_layers":
        layers = [
            {"trait": trait.trait, **asdict(layer)}
            for trait in traits
            for layer in load_layers(storage, trait)
        ]
        rows = pa.Table.from_pylist(layers, schema=schema)
    else:
        folders = (
            [made.folder for made in experiments]
            if table == "steering"
            else [entry.folder for trait in traits for entry in trait.layers]
        )
        read = (verified.read_table(storage, f"{folder}/{table}.parquet") for folder in folders)
        rows = pa.concat_tables([part.select(schema.names).cast(schema) for part in read])
    return rows.sort_by([(name, "ascending") for name in SORTED_BY[table]]).combine_chunks()
