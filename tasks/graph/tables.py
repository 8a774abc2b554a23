"""The tables of the token-feature graph (PAPER 1.2): edges, degrees, coverage, and the power law of each layer.

Edges, the costly ones, have a folder a layer and are made in as many passes as `duckdb.memory_limit` wants, so they may
be many times larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infra import verified
from infra.catalog import Catalog, ShardFile
from infra.progress import Progress, one_by_one, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import ConfigError, StorageError
from schemas.tables import TABLES
from schemas.work import CorpusShards, Dictionary, FeatureShard
from tasks.corpus.tables import build_tokens, corpus_group
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.run import Run
from tasks.engine.stage import Shown
from tasks.engine.tables import VERSION, TableGroup, Tables, ensure_folder, selected, write_table
from tasks.graph import power_law
from tasks.graph.edges import edge_files, ensure_edges
from tasks.graph.features import FEATURES
from tasks.models.token_texts import label, shared_texts

GRAPH_TABLES = ("dictionaries", "token_degree", "feature_degree", "coverage", "graph_summary")
"""In the order in which they are made."""

UPSTREAM: dict[str, tuple[str, ...]] = {
    "token_degree": ("edges", "shard_graph_counts", "tokens"),
    "feature_degree": ("edges", "token_degree"),
    "coverage": ("edges", "token_degree", "dictionaries"),
    "graph_summary": ("token_degree", "feature_degree", "dictionaries"),
}
"""What each SQL of the graph reads."""

POWER_LAW = pa.schema(
    [("layer", pa.int32()), ("alpha", pa.float64()), ("xmin", pa.float64()), ("ks", pa.float64())]
)


class GraphTables(TableGroup):
    """The tables of the graph."""

    name = "graph"
    needs = (TOKENIZE, DICTIONARIES, FEATURES)

    def applies(self, config: Config) -> bool:
        """Where there is a graph to make."""
        return FEATURES.applies(config)

    def subject(self, config: Config) -> str:
        """The layers."""
        return f"graph, {FEATURES.subject(config)}"

    def planned(self, run: Run) -> Tables | None:
        """The group as it would be published; None before its edges are there."""
        features, dictionaries = run.result(FEATURES), run.result(DICTIONARIES)
        checked_layers(features, dictionaries)
        edges = edge_files(run.storage, features)
        if edges is None:
            return None
        return graph_group(run.config, run.result(TOKENIZE), features, dictionaries, edges)

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make what is missing: the edges of each layer, then what sums them up.

        Raises:
            ConfigError: also if a layer has shards and no dictionary or the reverse.
        """
        features, dictionaries, storage = run.result(FEATURES), run.result(DICTIONARIES), run.storage
        layers = checked_layers(features, dictionaries)
        total = len(layers) + len(GRAPH_TABLES)
        advance = one_by_one(progress, total)
        progress(0, total, "graph tables")
        build_tokens(run, corpus_group(run.config, run.result(TOKENIZE)))
        for layer in layers:
            inputs = selected(Catalog(sharded=graph_inputs(features, layer)), ["shard_edges"])
            ensure_edges(run.config.duckdb, storage, layer, features, inputs, run.config.dask)
            advance(f"edges of layer {layer}")
        graph = self.planned(run)
        if graph is None:
            raise StorageError(
                f"edges under {storage.url('tables')} vanished while the tables were made", hint="run again"
            )
        _build(run, graph, advance)
        progress(total, total, "graph tables")
        return graph

    def shown(self, connection: Any, config: Config) -> Iterable[Shown]:
        """PAPER 1.2's table: a row for each of the first ranks, a column for each layer."""
        rows: dict[int, dict[str, Any]] = {}
        for rank, token, layer, coverage in top_coverage(connection):
            row = rows.setdefault(rank, {"rank": rank, "token": token})
            row[f"layer {layer}"] = f"{coverage:.2%}"
        yield Shown(
            name="coverage",
            description="Share of the activated features that the most frequent tokens reach together",
            rows=list(rows.values()),
        )


GRAPH = GraphTables()

TOP_RANKS = 10
"""The ranks of PAPER 1.2's table."""


def top_coverage(connection: Any) -> list[tuple[int, str, int, float]]:
    """(rank, token as people read it, layer, coverage) of the first ranks of each layer, by rank and layer."""
    shared = shared_texts(connection)
    found = connection.execute(
        "SELECT rank, token, token_id, layer, coverage FROM coverage "
        "QUALIFY row_number() OVER (PARTITION BY layer ORDER BY rank) <= ? ORDER BY rank, layer",
        [TOP_RANKS],
    ).fetchall()
    return [
        (rank, label(token, token_id, shared), layer, coverage)
        for rank, token, token_id, layer, coverage in found
    ]


def graph_group(
    config: Config,
    shards: CorpusShards,
    features: Sequence[FeatureShard],
    dictionaries: Sequence[Dictionary],
    edges: Sequence[ShardFile],
) -> Tables:
    """The tables of the token-feature graph, of which `edges` are there already."""
    ordered = sorted(features, key=lambda feature: (feature.layer, feature.part.shard.doc_offset))
    parts: dict[str, Any] = {
        "group": "graph",
        "version": [VERSION, power_law.VERSION],
        "corpus": corpus_group(config, shards).key,
        "features": [[f.layer, f.folder, f.part.shard.doc_offset, f.part.n_documents] for f in ordered],
        "dictionaries": sorted([d.layer, d.key, d.d_sae, d.source, d.quality] for d in dictionaries),
        "m": config.graph.rarefaction_m,
    }
    inputs = graph_inputs(features)
    return Tables.of(
        "graph",
        parts,
        GRAPH_TABLES,
        sharded={"activations": inputs["activations"], "edges": list(edges)},
        made_by_shard=("edges",),
        inputs=Catalog(sharded={"shard_graph_counts": inputs["shard_graph_counts"]}),
    )


def graph_inputs(features: Sequence[FeatureShard], layer: int | None = None) -> dict[str, list[ShardFile]]:
    """The shards' files that the graph is made of, in corpus order, of one layer or of all."""
    ordered = sorted(features, key=lambda feature: (feature.layer, feature.part.shard.doc_offset))
    wanted = [feature for feature in ordered if layer in (None, feature.layer)]

    def files(name: Callable[[FeatureShard], str]) -> list[ShardFile]:
        return [
            ShardFile(
                name=name(feature),
                doc_offset=feature.part.shard.doc_offset,
                source=feature.part.shard.source,
                layer=feature.layer,
            )
            for feature in wanted
        ]

    return {
        "activations": files(lambda feature: f"{feature.folder}/activations.parquet"),
        "shard_edges": files(lambda feature: f"{feature.folder}/edges.parquet"),
        "shard_graph_counts": files(lambda feature: feature.counts_file),
    }


def covers_corpus(features: Sequence[FeatureShard], shards: CorpusShards) -> bool:
    """Whether every layer's graph has all documents of the corpus, so that tokens are as often in it as there."""
    whole = {shard.doc_offset for shard in shards.shards if shard.n_documents}
    in_graph: dict[int, set[int]] = {feature.layer: set() for feature in features}
    for feature in features:
        if feature.part.n_documents == feature.part.shard.n_documents:
            in_graph[feature.layer].add(feature.part.shard.doc_offset)
    return all(offsets == whole for offsets in in_graph.values())


def checked_layers(features: Sequence[FeatureShard], dictionaries: Sequence[Dictionary]) -> list[int]:
    """The graph's layers, ascending.

    Raises:
        ConfigError: if there is none, or a layer has shards and no dictionary or the reverse.
    """
    layers = sorted({feature.layer for feature in features})
    known = sorted(dictionary.layer for dictionary in dictionaries)
    if not layers or layers != known:
        raise ConfigError(
            f"feature shards are of the layers {layers}, dictionaries of the layers {known}",
            hint="the graph needs both for each layer: run the stages before it",
        )
    return layers


def _build(run: Run, graph: Tables, advance: Callable[[str], None]) -> None:
    shards, features, storage = run.result(TOKENIZE), run.result(FEATURES), run.storage
    corpus = corpus_group(run.config, shards)
    sharded = {**graph.inputs.sharded, "edges": graph.sharded["edges"]}
    inputs = Catalog(tables={**corpus.tables, **graph.tables}, sharded=sharded)

    def make() -> Iterator[StoredFile]:
        relations: dict[str, pa.Table] = {}
        if covers_corpus(features, shards):
            # As often as in the corpus: nothing needs to be read of each shard.
            del sharded["shard_graph_counts"]
            layers = sorted({feature.layer for feature in features})
            relations["shard_graph_counts"] = _counts_of_corpus(storage, corpus.tables["tokens"], layers)
        dictionaries = run.result(DICTIONARIES)
        yield storage.write_parquet(graph.tables["dictionaries"], _dictionary_rows(dictionaries))
        advance("dictionaries")
        for table in GRAPH_TABLES[1:]:
            if table == "graph_summary":
                relations["power_law_fits"] = _power_law_fits(storage, graph.tables["token_degree"])
            known, m = selected(inputs, UPSTREAM[table]), run.config.graph.rarefaction_m
            yield write_table(run.config.duckdb, storage, table, graph.tables[table], known, relations, m=m)
            advance(table.replace("_", " "))

    ensure_folder(storage, [graph.tables[table] for table in GRAPH_TABLES], graph.key_parts, make)


def _counts_of_corpus(storage: Storage, tokens: str, layers: Sequence[int]) -> pa.Table:
    counted = verified.read_table(storage, tokens, columns=["token_id", "count"])
    return pa.concat_tables(
        [counted.add_column(0, "layer", pa.array([layer] * counted.num_rows, pa.int32())) for layer in layers]
    )


def _dictionary_rows(dictionaries: Sequence[Dictionary]) -> pa.Table:
    schema = TABLES["dictionaries"]
    rows = [
        {
            **{name: (dictionary.quality or {}).get(name) for name in schema.names},
            "layer": dictionary.layer,
            "dictionary_size": dictionary.d_sae,
            "source": dictionary.source,
        }
        for dictionary in sorted(dictionaries, key=lambda dictionary: dictionary.layer)
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def _power_law_fits(storage: Storage, token_degree: str) -> pa.Table:
    found = verified.read_table(storage, token_degree, columns=["layer", "degree"])
    layers, degrees = found["layer"].to_numpy(), found["degree"].to_numpy()
    rows = []
    for layer in np.unique(layers):
        fit = power_law.fit_power_law(degrees[layers == layer])
        if fit is not None:
            rows.append({"layer": int(layer), "alpha": fit.alpha, "xmin": fit.xmin, "ks": fit.ks})
    return pa.Table.from_pylist(rows, schema=POWER_LAW)
