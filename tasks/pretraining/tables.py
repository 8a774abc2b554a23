"""The tables of a consolidation (PAPER 1.4): loss buckets, and the graph of each checkpoint that has an SAE.

What is summed over one checkpoint's shards (losses by document, edges, degrees) lies in a folder of that
checkpoint, so one more checkpoint makes its own files and the small tables that span all. All sums are sums
of integers, as in `tasks.graph.tables`; intervals are of exact sums too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from infra import verified
from infra.catalog import Catalog, ShardFile
from infra.manifest import MANIFEST, content_key
from infra.progress import Progress, one_by_one, silent
from infra.storage import Storage, StoredFile
from schemas.arrow import declared
from schemas.config import Config
from schemas.errors import StorageError
from schemas.pretraining.section import consolidation_of, losses_of
from schemas.pretraining.work import Checkpoint, GrownSae
from schemas.tables import MEMBERS, TABLES
from tasks.corpus.tables import build_tokens, corpus_group
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.tables import VERSION, TableGroup, Tables, ensure_folder, write_table
from tasks.graph.edges import edge_files, edge_folder, ensure_edges
from tasks.graph.tables import graph_inputs
from tasks.pretraining.checkpoints import CHECKPOINTS, checkpoint_rows
from tasks.pretraining.generations import GENERATIONS
from tasks.pretraining.growth import GROWTH
from tasks.pretraining.loss_intervals import INTERVALS, bucket_intervals
from tasks.pretraining.losses import LOSSES, file_of, window_of
from tasks.pretraining.plan import plan_training
from tasks.pretraining.state import LOSSES as TRAINING_LOSSES

_EMPTY = {
    "token_losses": "doc_id BIGINT, current_token_id INTEGER, token_id INTEGER, loss FLOAT",
    "shard_document_losses": "doc_id BIGINT, current_is_function BOOLEAN, next_is_function BOOLEAN, n BIGINT, "
    "loss_units BIGINT",
}
"""Inputs of `sql/pretraining/document_losses.sql`, of which a run has one."""

_MADE_WITH = declared("window BIGINT, resamples BIGINT, m BIGINT")


class ConsolidationTables(TableGroup):
    """The tables of the checkpoint series."""

    name = section = "consolidation"
    needs = (TOKENIZE, CHECKPOINTS, LOSSES, GROWTH, GENERATIONS)

    def planned(self, run: Run) -> Tables:
        """The group as it would be published."""
        config, checkpoints = run.config, run.result(CHECKPOINTS)
        growth, texts = run.result(GROWTH), run.result(GENERATIONS)
        corpus = corpus_group(config, run.result(TOKENIZE))
        by_checkpoint = _loss_files(run)
        losses = [file for files in by_checkpoint.values() for file in files]
        sharded = {
            "document_losses": [
                ShardFile(
                    name=f"{_document_losses_folder(corpus.key, files)[0]}/document_losses.parquet",
                    model=model,
                    step=step,
                )
                for (model, step), files in by_checkpoint.items()
            ]
        }
        inputs: dict[str, list[ShardFile]] = {}
        if losses_of(config).keep_tokens:
            sharded["token_losses"] = losses
        else:
            inputs["shard_document_losses"] = losses
        if growth:
            graphs = [(one.checkpoint, _graph_folder(config, corpus.key, one)[0]) for one in growth]
            for table in ("checkpoint_degree", "checkpoint_graph"):
                sharded[table] = [_file_of(one, f"{folder}/{table}.parquet") for one, folder in graphs]
            inputs["learned_features"] = [
                _file_of(one.checkpoint, f"{one.folder}/learned.parquet") for one in growth
            ]
        if texts:
            inputs["generations"] = [
                _file_of(one.checkpoint, f"{one.folder}/generations.parquet") for one in texts
            ]
        if curves := training_losses(run):
            inputs["training_losses"] = [
                ShardFile(name=name, model=series) for series, name in curves.items()
            ]
        parts: dict[str, Any] = {
            "group": self.name,
            "version": VERSION,
            "corpus": corpus.key,
            "checkpoints": checkpoint_rows(checkpoints),
            "resamples": losses_of(config).resamples,
            "window": window_of(config),
            "m": config.graph.rarefaction_m,
            "files": {
                table: [[file.model, file.step, file.name, file.doc_offset] for file in files]
                for table, files in (inputs | sharded).items()
            },
        }
        key = content_key(**parts)
        gathered = [table for table in MEMBERS[self.name] if table in inputs]
        return Tables(
            name=self.name,
            key_parts=parts,
            tables={
                table: f"tables/consolidation-{key}/{table}.parquet"
                for table in ("checkpoints", "loss_buckets", *gathered)
            },
            sharded=sharded,
            made_by_shard=tuple(table for table in sharded if table != "token_losses"),
            inputs=Catalog(sharded=inputs),
            # Checkpoints have dictionaries of their own.
            about=corpus.about[:1],
        )

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make what is missing of the tables."""
        corpus, group = corpus_group(run.config, run.result(TOKENIZE)), self.planned(run)
        by_checkpoint, growth = _loss_files(run), run.result(GROWTH)
        total = len(by_checkpoint) + len(growth) + 1
        advance = one_by_one(progress, total)
        progress(0, total, "consolidation tables")
        build_tokens(run, corpus)
        for (model, step), files in by_checkpoint.items():
            _ensure_document_losses(run, corpus, files)
            advance(f"losses of {model}, step {step}")
        for grown in growth:
            _ensure_graph(run, corpus, grown)
            advance(f"graph of {grown.checkpoint.series}, step {grown.checkpoint.step}")
        ensure_folder(
            run.storage, list(group.tables.values()), group.key_parts, lambda: _write_small(run, group)
        )
        advance("consolidation tables")
        return group

    def beside(self, storage: Storage, catalog: Catalog) -> Mapping[str, pa.Table]:
        """What the tables were made with: those kept from an earlier run may be of another configuration."""
        if "loss_buckets" not in catalog.tables:
            return {}
        manifest = storage.read_json(f"{catalog.tables['loss_buckets'].rsplit('/', 1)[0]}/{MANIFEST}")
        if manifest is None:
            return {}
        row = {name: manifest["inputs"].get(name) for name in _MADE_WITH.names}
        return {"made_with": pa.Table.from_pylist([row], schema=_MADE_WITH)}


CONSOLIDATION = ConsolidationTables()


def training_losses(run: Run) -> dict[str, str]:
    """The series that are trained here, and the file of each one's loss curve in the storage."""
    shards = run.result(TOKENIZE)
    return {
        series.name: f"{plan_training(run.config, shards, series).folder}/{TRAINING_LOSSES}"
        for series in consolidation_of(run.config).series
        if series.shape is not None
    }


def _loss_files(run: Run) -> dict[tuple[str, int], list[ShardFile]]:
    """Each checkpoint's files of losses, in corpus order: of single ones where these are kept, else of sums."""
    checkpoints, losses = run.result(CHECKPOINTS), run.result(LOSSES)
    files: dict[tuple[str, int], list[ShardFile]] = {
        (checkpoint.series, checkpoint.step): [] for checkpoint in checkpoints
    }
    for loss in sorted(losses, key=lambda loss: loss.part.shard.doc_offset):
        model, step = loss.checkpoint.series, loss.checkpoint.step
        files[model, step].append(
            ShardFile(
                name=f"{loss.folder}/{file_of(run.config)}.parquet",
                doc_offset=loss.part.shard.doc_offset,
                model=model,
                step=step,
            )
        )
    return files


def _document_losses_folder(corpus: str, files: Sequence[ShardFile]) -> tuple[str, dict[str, Any]]:
    """The folder of one checkpoint's losses by document, and what its key is made of."""
    parts: dict[str, Any] = {
        "group": "document_losses",
        "version": VERSION,
        "corpus": corpus,
        "losses": [[file.name, file.doc_offset] for file in files],
    }
    return f"tables/document_losses-{content_key(**parts)}", parts


def _graph_folder(config: Config, corpus: str, grown: GrownSae) -> tuple[str, dict[str, Any]]:
    """The folder of one checkpoint's degrees and graph, and what its key is made of."""
    parts: dict[str, Any] = {
        "group": "checkpoint_graph",
        "version": VERSION,
        "corpus": corpus,
        "edges": edge_folder(grown.dictionary.layer, grown.features)[0],
        "dictionary_size": grown.dictionary.d_sae,
        "m": config.graph.rarefaction_m,
    }
    return f"tables/checkpoint_graph-{content_key(**parts)}", parts


def _file_of(checkpoint: Checkpoint, name: str) -> ShardFile:
    return ShardFile(name=name, model=checkpoint.series, step=checkpoint.step)


def _ensure_document_losses(run: Run, corpus: Tables, files: Sequence[ShardFile]) -> None:
    folder, parts = _document_losses_folder(corpus.key, files)
    name = f"{folder}/document_losses.parquet"
    given, missing = "token_losses", "shard_document_losses"
    if not losses_of(run.config).keep_tokens:
        given, missing = missing, given

    def make() -> Iterator[StoredFile]:
        inputs = Catalog(tables={"tokens": corpus.tables["tokens"]}, sharded={given: list(files)})
        nothing = {missing: declared(_EMPTY[missing]).empty_table()}
        yield write_table(run.config.duckdb, run.storage, "document_losses", name, inputs, nothing)

    ensure_folder(run.storage, [name], parts, make)


def _ensure_graph(run: Run, corpus: Tables, grown: GrownSae) -> None:
    config, storage = run.config, run.storage
    folder, parts = _graph_folder(config, corpus.key, grown)
    degree, graph = f"{folder}/checkpoint_degree.parquet", f"{folder}/checkpoint_graph.parquet"

    def make() -> Iterator[StoredFile]:
        layer, shards = grown.dictionary.layer, graph_inputs(grown.features)
        wanted = Catalog(sharded={"shard_edges": shards["shard_edges"]})
        ensure_edges(config.duckdb, storage, layer, grown.features, wanted, config.dask)
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


def _write_small(run: Run, group: Tables) -> Iterator[StoredFile]:
    """The tables that span all checkpoints."""
    storage, found = run.storage, run.result(CHECKPOINTS)
    checkpoints = pa.Table.from_pylist(checkpoint_rows(found), schema=TABLES["checkpoints"])
    yield storage.write_parquet(group.tables["checkpoints"], checkpoints)
    losses = group.sharded["document_losses"]
    intervals = _intervals(storage, losses, losses_of(run.config).resamples)
    yield write_table(
        run.config.duckdb,
        storage,
        "loss_buckets",
        group.tables["loss_buckets"],
        Catalog(sharded={"document_losses": losses}),
        {"checkpoints": checkpoints, "intervals": intervals},
    )
    for table in group.tables.keys() & group.inputs.sharded.keys():
        gathered = _gathered(storage, table, group.inputs.sharded[table])
        yield storage.write_parquet(group.tables[table], gathered)


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
