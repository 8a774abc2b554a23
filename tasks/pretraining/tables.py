"""The tables of a consolidation (PAPER 1.4): loss buckets, and the graph of each checkpoint that has an SAE.

What is summed over one checkpoint's shards (losses by document, edges, degrees) lies in a folder of that
checkpoint, so one more checkpoint makes its own files and the small tables that span all. All sums are sums
of integers, as in `tasks.graph.tables`; intervals are of exact sums too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from infra import verified
from infra.duck import Catalog, ShardFile, read_catalog
from infra.progress import Progress, one_by_one, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import StorageError
from schemas.pretraining.section import losses_of
from schemas.pretraining.work import GrownSae
from schemas.tables import TABLES
from schemas.work import CorpusShards
from tasks.engine.table_plan import Group, corpus_group, graph_inputs, merged
from tasks.engine.table_sql import ensure_folder, write_table
from tasks.graph.edges import edge_files, ensure_edges
from tasks.graph.tables import build_corpus
from tasks.pretraining.loss_intervals import INTERVALS, bucket_intervals
from tasks.pretraining.table_plan import (
    ConsolidationResults,
    checkpoint_rows,
    consolidation_group,
    document_losses_folder,
    graph_folder,
    loss_files,
)

__all__ = ["ConsolidationResults", "build_consolidation_tables"]

_EMPTY = {
    "token_losses": pa.schema(
        [
            *(("doc_id", pa.int64()), ("current_token_id", pa.int32())),
            *(("token_id", pa.int32()), ("loss", pa.float32())),
        ]
    ),
    "shard_document_losses": pa.schema(
        [
            *(("doc_id", pa.int64()), ("current_is_function", pa.bool_())),
            *(("next_is_function", pa.bool_()), ("n", pa.int64()), ("loss_units", pa.int64())),
        ]
    ),
}
"""Inputs of `sql/pretraining/document_losses.sql`, of which a run has one."""


def build_consolidation_tables(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    results: ConsolidationResults,
    progress: Progress = silent,
    onto: Catalog | None = None,
) -> Catalog:
    """Make the consolidation group (and the corpus group, where it is missing).

    Args:
        config: The configuration.
        storage: Where everything is.
        shards: The tokenized corpus.
        results: What the checkpoint stages have made.
        progress: Told of each checkpoint.
        onto: A candidate that holds what else was just made (a graph); none: what is published.

    Returns:
        The candidate catalogue: `onto` with both groups.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        ExpectationError: if an activation is not a finite number.
        StorageError: if a file cannot be read or written.
    """
    corpus = corpus_group(config, shards)
    group = consolidation_group(config, shards, results)
    by_checkpoint = loss_files(config, results)
    total = len(by_checkpoint) + len(results.growth) + 1
    advance = one_by_one(progress, total)
    progress(0, total, "consolidation tables")
    build_corpus(config, storage, shards, corpus)
    for (model, step), files in by_checkpoint.items():
        _ensure_document_losses(config, storage, corpus, files)
        advance(f"losses of {model}, step {step}")
    for grown in results.growth:
        _ensure_graph(config, storage, corpus, grown)
        advance(f"graph of {grown.checkpoint.series}, step {grown.checkpoint.step}")
    ensure_folder(
        storage, list(group.tables.values()), group.key_parts, _whole(config, storage, group, results)
    )
    advance("consolidation tables")
    return merged(read_catalog(storage) if onto is None else onto, corpus, group)


def _ensure_document_losses(
    config: Config, storage: Storage, corpus: Group, files: Sequence[ShardFile]
) -> None:
    folder, parts = document_losses_folder(corpus.key, files)
    name = f"{folder}/document_losses.parquet"
    given, missing = "token_losses", "shard_document_losses"
    if not losses_of(config).keep_tokens:
        given, missing = missing, given

    def make() -> Iterator[StoredFile]:
        inputs = Catalog(tables={"tokens": corpus.tables["tokens"]}, sharded={given: list(files)})
        nothing = {missing: _EMPTY[missing].empty_table()}
        yield write_table(config.duckdb, storage, "document_losses", name, inputs, nothing)

    ensure_folder(storage, [name], parts, make)


def _ensure_graph(config: Config, storage: Storage, corpus: Group, grown: GrownSae) -> None:
    folder, parts = graph_folder(config, corpus.key, grown)
    degree, graph = f"{folder}/checkpoint_degree.parquet", f"{folder}/checkpoint_graph.parquet"

    def make() -> Iterator[StoredFile]:
        layer, shards = grown.dictionary.layer, graph_inputs(grown.features)
        wanted = Catalog(sharded={view: shards[view] for view in ("shard_edges", "activations")})
        ensure_edges(config.duckdb, storage, layer, grown.features, wanted)
        edges = edge_files(storage, grown.features)
        if edges is None:
            raise StorageError(
                f"edges under {storage.url('tables')} vanished while the tables were made", hint="run again"
            )
        counted = Catalog(
            tables={"tokens": corpus.tables["tokens"]},
            sharded={"edges": edges, "shard_graph_counts": shards["shard_graph_counts"]},
        )
        m, size = config.graph.rarefaction_m, grown.dictionary.d_sae
        yield write_table(config.duckdb, storage, "token_degree", degree, counted, m=m)
        reached = Catalog(tables={"checkpoint_degree": degree}, sharded={"edges": edges})
        yield write_table(config.duckdb, storage, "checkpoint_graph", graph, reached, dictionary_size=size)

    ensure_folder(storage, [degree, graph], parts, make)


def _whole(
    config: Config, storage: Storage, group: Group, results: ConsolidationResults
) -> Callable[[], Iterator[StoredFile]]:
    def make() -> Iterator[StoredFile]:
        rows = checkpoint_rows(results.checkpoints)
        checkpoints = pa.Table.from_pylist(rows, schema=TABLES["checkpoints"])
        yield storage.write_parquet(group.tables["checkpoints"], checkpoints)
        losses = group.sharded["document_losses"]
        yield write_table(
            config.duckdb,
            storage,
            "loss_buckets",
            group.tables["loss_buckets"],
            Catalog(sharded={"document_losses": losses}),
            {
                "checkpoints": checkpoints,
                "intervals": _intervals(storage, losses, losses_of(config).resamples),
            },
        )
        for table in group.tables.keys() & group.inputs.sharded.keys():
            gathered = _gathered(storage, table, group.inputs.sharded[table])
            yield storage.write_parquet(group.tables[table], gathered)

    return make


def _intervals(storage: Storage, losses: Sequence[ShardFile], resamples: int) -> pa.Table:
    schema = pa.schema([("model", pa.string()), ("step", pa.int64()), *INTERVALS])
    found = [(file, bucket_intervals(verified.read_table(storage, file.name), resamples)) for file in losses]
    return pa.concat_tables(
        [schema.empty_table(), *(_named(intervals, file, schema) for file, intervals in found)]
    )


def _gathered(storage: Storage, table: str, files: Sequence[ShardFile]) -> pa.Table:
    """Small files of checkpoints or series under each other, their rows in the order that they have."""
    schema = TABLES[table]
    return pa.concat_tables([_named(verified.read_table(storage, file.name), file, schema) for file in files])


def _named(rows: pa.Table, file: ShardFile, schema: pa.Schema) -> pa.Table:
    own = {"model": file.model} | ({} if file.step is None else {"step": file.step})
    columns = [
        pa.array([own[name]] * len(rows), schema.field(name).type) if name in own else rows[name]
        for name in schema.names
    ]
    return pa.table(columns, schema=schema)
