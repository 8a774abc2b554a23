"""The table stage: from committed shards to the contract's tables, by the SQL in `sql/`.

Two groups of tables: `corpus` (counts alone, PAPER 1.1) and `graph` (PAPER 1.2); `tasks.pretraining.tables`
makes a third, `tasks.steering.tables` a fourth. Each table is one COPY of
`sql/<table>.sql` into a folder named by what determines it; edges, the costly ones, have a folder a layer and
are made in as many passes as `duckdb.memory_limit` wants, so they may be many times larger than memory. All
sums are sums of integers: sharding, order and threads cannot change a bit.

Building publishes nothing: it returns a candidate catalogue, which `publish` makes the readers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from infra import verified
from infra.duck import CATALOG, Catalog, create_views, open_duckdb, read_catalog
from infra.manifest import content_key, load_all
from infra.progress import Progress, one_by_one, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import DamagedError, StorageError
from schemas.pretraining.section import Consolidation
from schemas.steering.section import Steering
from schemas.steering.work import SteeringResults
from schemas.tables import TABLES
from schemas.work import CorpusShards, Dictionary, FeatureShard
from tasks.corpus.run_info import run_info_rows
from tasks.engine.catalog_file import write_catalog_file
from tasks.engine.table_plan import (
    GRAPH_TABLES,
    Group,
    checked_layers,
    corpus_group,
    covers_corpus,
    graph_group,
    graph_inputs,
    merged,
)
from tasks.engine.table_sql import ensure_folder, explained, write_table
from tasks.graph.edges import edge_files, ensure_edges
from tasks.graph.power_law import fit_power_law
from tasks.pretraining.table_plan import ConsolidationResults, consolidation_group
from tasks.steering.table_plan import steering_group

__all__ = [
    "build_corpus_tables",
    "build_graph_tables",
    "find_tables",
    "publish",
    "write_catalog_file",
    "write_table",
]

_logger = logging.getLogger(__name__)

POWER_LAW = pa.schema(
    [("layer", pa.int32()), ("alpha", pa.float64()), ("xmin", pa.float64()), ("ks", pa.float64())]
)


def build_corpus_tables(
    config: Config, storage: Storage, shards: CorpusShards, progress: Progress = silent
) -> Catalog:
    """Make the corpus group: `tokens` and `run_info`, and views of documents, rejects and occurrences.

    Returns:
        The candidate catalogue: what is published, with this group in place of the old one. What was made from
        another corpus, model or dictionaries is left out (`tasks.engine.table_plan.merged`).

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read or written.
    """
    group = corpus_group(config, shards)
    build_corpus(config, storage, shards, group, progress)
    return merged(published_catalog(storage), group)


def build_graph_tables(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    features: Sequence[FeatureShard],
    dictionaries: Sequence[Dictionary],
    progress: Progress = silent,
) -> Catalog:
    """Make the graph group (and the corpus group, where it is missing).

    Returns:
        The candidate catalogue, with both groups.

    Raises:
        ConfigError: if a layer has shards and no dictionary or the reverse, or DuckDB cannot work within
            its limits.
        ExpectationError: if an activation is not a finite number.
        StorageError: if a file cannot be read or written.
    """
    layers = checked_layers(features, dictionaries)
    corpus = corpus_group(config, shards)
    total = len(layers) + len(GRAPH_TABLES)
    advance = one_by_one(progress, total)
    progress(0, total, "corpus tables")
    build_corpus(config, storage, shards, corpus)
    for layer in layers:
        inputs = graph_inputs(features, layer)
        wanted = Catalog(sharded={view: inputs[view] for view in ("shard_edges", "activations")})
        ensure_edges(config.duckdb, storage, layer, features, wanted)
        advance(f"edges of layer {layer}")
    edges = edge_files(storage, features)
    if edges is None:
        raise StorageError(
            f"edges under {storage.url('tables')} vanished while the tables were made", hint="run again"
        )
    graph = graph_group(config, shards, features, dictionaries, edges)
    whole = layers if covers_corpus(features, shards) else []
    _build_graph(config, storage, corpus, graph, dictionaries, whole, advance)
    progress(total, total, "graph tables")
    return merged(published_catalog(storage), corpus, graph)


def find_tables(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    features: Sequence[FeatureShard] | None,
    dictionaries: Sequence[Dictionary] | None,
    results: ConsolidationResults | None = None,
    steering: SteeringResults | None = None,
) -> bool:
    """Whether the published tables are those that a run would leave, and all of those it makes are there.

    Args:
        config: The configuration.
        storage: Where everything is.
        shards: The tokenized corpus.
        features: The graph's feature shards, where dictionaries are configured.
        dictionaries: The dictionaries, where some are configured.
        results: What the checkpoint stages have made, where a consolidation is configured.
        steering: What reactivation and steering have made, where cases are configured.
    """
    groups = [corpus_group(config, shards)]
    if config.section(Steering) is not None:
        if steering is None:
            return False
        groups.append(steering_group(config, shards, steering))
    if config.section(Consolidation) is not None:
        if results is None:
            return False
        groups.append(consolidation_group(config, shards, results))
    if config.sae:
        if not features or not dictionaries:
            return False
        checked_layers(features, dictionaries)
        edges = edge_files(storage, features)
        if edges is None:
            return False
        groups.append(graph_group(config, shards, features, dictionaries, edges))
    try:
        published = read_catalog(storage)
    except DamagedError:
        return False
    if merged(published, *groups).lineage != published.lineage:
        return False
    for group in groups:
        if any(published.tables.get(table) != name for table, name in group.tables.items()):
            return False
        if any(published.sharded.get(table) != files for table, files in group.sharded.items()):
            return False
    made = [name for group in groups for name in group.made]
    folders = {name.rsplit("/", 1)[0] for name in (*made, published.tables.get("expectations", made[0]))}
    return folders == set(load_all(storage, sorted(folders)))


def published_catalog(storage: Storage) -> Catalog:
    """What is published, to build a candidate on; nothing where the catalogue is damaged, which is then said."""
    try:
        return read_catalog(storage)
    except DamagedError as error:
        _logger.warning("%s; it is written anew, with the tables of this configuration alone", error.message)
        return Catalog()


def publish(storage: Storage, catalog: Catalog) -> None:
    """Make a candidate catalogue the one that readers see, with the table `expectations` as it stands now."""
    from tasks.engine.validation import expectations_table

    rows = expectations_table(storage)
    parts = {"group": "expectations", "rows": rows.to_pylist()}
    name = f"tables/expectations-{content_key(**parts)}/expectations.parquet"
    ensure_folder(storage, [name], {"group": "expectations"}, lambda: [storage.write_parquet(name, rows)])
    published = replace(catalog, tables={**catalog.tables, "expectations": name})
    storage.write_json(CATALOG, published.to_json())


def build_corpus(
    config: Config, storage: Storage, shards: CorpusShards, group: Group, progress: Progress = silent
) -> None:
    """Make the corpus group's own files, where they are missing."""

    tokens, info = group.tables["tokens"], group.tables["run_info"]

    def make_tokens() -> Iterator[StoredFile]:
        share = config.function_tokens.share
        yield write_table(
            config.duckdb,
            storage,
            "tokens",
            tokens,
            group.inputs,
            share=share,
            n_documents=shards.n_documents,
        )

    def make_info() -> Iterator[StoredFile]:
        with (
            open_duckdb(storage, config.duckdb) as connection,
            explained("the table run_info", config.duckdb, storage),
        ):
            create_views(connection, storage, Catalog(tables={"tokens": tokens}))
            counted = "SELECT count(*), count(*) FILTER (is_function) FROM tokens"
            distinct, function = connection.execute(counted).fetchone()
        rows = run_info_rows(config, storage, shards, distinct_tokens=distinct, function_tokens=function)
        yield storage.write_parquet(info, pa.Table.from_pylist(rows, schema=TABLES["run_info"]))

    progress(0, 2, "corpus tables")
    ensure_folder(storage, [tokens], group.key_parts, make_tokens)
    progress(1, 2, "corpus tables")
    ensure_folder(storage, [info], {"run_info": info, "corpus": group.key}, make_info)
    progress(2, 2, "corpus tables")


def _build_graph(
    config: Config,
    storage: Storage,
    corpus: Group,
    graph: Group,
    dictionaries: Sequence[Dictionary],
    whole: Sequence[int],
    advance: Callable[[str], None],
) -> None:
    """Make the graph's tables; `whole` are its layers where its documents are all of the corpus, else none."""

    def make() -> Iterator[StoredFile]:
        yield storage.write_parquet(graph.tables["dictionaries"], _dictionary_rows(dictionaries))
        inputs = Catalog(
            tables={**corpus.tables, **graph.tables},
            sharded={**graph.inputs.sharded, "edges": graph.sharded["edges"]},
        )
        relations: dict[str, pa.Table] = {}
        if whole:
            # As often as in the corpus: nothing needs to be read of each shard.
            del inputs.sharded["shard_graph_counts"]
            relations["shard_graph_counts"] = _counts_of_corpus(storage, corpus.tables["tokens"], whole)
        for table in GRAPH_TABLES:
            if table == "graph_summary":
                relations["power_law_fits"] = _power_law_fits(storage, graph.tables["token_degree"])
            if table != "dictionaries":
                known = Catalog(
                    tables={view: name for view, name in inputs.tables.items() if view in UPSTREAM[table]},
                    sharded={
                        view: files for view, files in inputs.sharded.items() if view in UPSTREAM[table]
                    },
                )
                m = config.graph.rarefaction_m
                yield write_table(config.duckdb, storage, table, graph.tables[table], known, relations, m=m)
            advance(table.replace("_", " "))

    ensure_folder(storage, [graph.tables[table] for table in GRAPH_TABLES], graph.key_parts, make)


def _counts_of_corpus(storage: Storage, tokens: str, layers: Sequence[int]) -> pa.Table:
    counted = verified.read_table(storage, tokens, columns=["token_id", "count"])
    return pa.concat_tables(
        [counted.add_column(0, "layer", pa.array([layer] * counted.num_rows, pa.int32())) for layer in layers]
    )


UPSTREAM: dict[str, tuple[str, ...]] = {
    "token_degree": ("edges", "shard_graph_counts", "tokens"),
    "feature_degree": ("edges", "token_degree"),
    "coverage": ("edges", "token_degree", "dictionaries"),
    "graph_summary": ("token_degree", "feature_degree", "dictionaries"),
}
"""What each SQL of the graph reads: a view over a file that is not there yet cannot be made."""


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
        fit = fit_power_law(degrees[layers == layer])
        if fit is not None:
            rows.append({"layer": int(layer), "alpha": fit.alpha, "xmin": fit.xmin, "ks": fit.ks})
    return pa.Table.from_pylist(rows, schema=POWER_LAW)
