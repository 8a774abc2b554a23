"""The tables of single features against slow, obvious references: sorted lists, `Fraction` and `math.log2`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from builders import (
    Cut,
    Document,
    build,
    make_config,
    make_dictionary,
    random_documents,
    run_of,
    write_corpus,
    write_features,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.catalog import Catalog, ShardFile, read_catalog
from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config
from schemas.graph.feature_tables import TABLES
from schemas.work import FeatureShard, GraphShard, TokenShard
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.checks import check_tables
from tasks.engine.run import Run
from tasks.engine.tables import are_published, candidate, publish
from tasks.graph.feature_tables import FEATURE_TABLES, ensure_layer
from tasks.graph.features import FEATURES
from tasks.graph.tables import GRAPH, graph_inputs

SAES = [make_dictionary(4, 50), make_dictionary(1, 64)]
GROUPS = (CorpusTables(), GRAPH, FEATURE_TABLES)
FEW = {"features": {"top_examples": 3, "decile_examples": 2, "histogram_bins": 7}}
MADE = ("feature_examples", "feature_histogram", "feature_summary", "feature_tokens")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def cut_up(documents: list[Document], starts: list[int], in_graph: int) -> list[Cut]:
    bounds = [0, *sorted(starts), len(documents)]
    return [
        Cut(source="a.jsonl", documents=documents[start:end], in_graph=max(0, min(end, in_graph) - start))
        for start, end in pairwise(bounds)
    ]


def run_with(config: Config, storage: Storage, cuts: list[Cut], seed: int = 0) -> Run:
    shards = write_corpus(storage, cuts, seed=seed)
    features = write_features(storage, cuts, shards, SAES, seed=seed)
    return run_of(config, storage, {TOKENIZE: shards, DICTIONARIES: SAES, FEATURES: features})


def rows_of(storage: Storage, catalog: Catalog, table: str) -> list[tuple[Any, ...]]:
    """The rows of a table as they lie in its files, layer after layer."""
    files = [storage.read_parquet(file.name) for file in catalog.sharded[table]]
    return [tuple(row.values()) for file in files for row in file.to_pylist()]


def lot(feature: int, part: int) -> int:
    x = (feature * 69069 + part * 22695477 + 1013904223) % 2147483647
    return (x * x % 2147483647 + x * 1103515245) % 2147483647


def reference(documents: list[Document], top: int, of_decile: int, bins: int) -> dict[str, list[Any]]:
    """Every table as lists sorted feature by feature give it."""
    tables: dict[str, list[Any]] = defaultdict(list)
    seen = Counter(token for document in documents for token in document.tokens)
    for layer in (1, 4):
        found: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)
        for doc, document in enumerate(documents):
            for position, token in enumerate(document.tokens):
                for feature, value in document.active[layer][position].items():
                    found[feature].append((-value, doc, position, token))
        for feature, activations in sorted(found.items()):
            activations.sort()
            n, parts = len(activations), defaultdict(list)
            for place, one in enumerate(activations):
                parts[place * 10 * of_decile // n].append(one)
            kinds = defaultdict(list, top=activations[:top])
            for part, members in parts.items():
                drawn = members[lot(feature, part) % len(members)]
                kinds[f"decile {10 - part // of_decile}"].append(drawn)
            for kind, members in sorted(kinds.items(), key=lambda item: (len(item[0]), item[0])):
                for place, (negative, doc, position, token) in enumerate(members, 1):
                    row = (layer, feature, kind, place, doc, position, token, -negative)
                    tables["feature_examples"].append(row)
            largest = -activations[0][0]
            binned = Counter(min(bins, 1 + math.floor(-a * bins / largest)) for a, *_ in activations)
            for index, count in sorted(binned.items()):
                edges = (largest * (index - 1) / bins, largest * index / bins)
                tables["feature_histogram"].append((layer, feature, index, *edges, count))
            tokens = Counter(token for *_, token in activations)
            entropy = sum(count / n * math.log2(n / count) for count in tokens.values())
            first = min(tokens, key=lambda token: (-tokens[token], token))
            summary = (layer, feature, n, largest, first, tokens[first], pytest.approx(entropy, rel=1e-8))
            tables["feature_summary"].append(summary)
            for token, count in sorted(tokens.items(), key=lambda item: (-item[1], item[0])):
                values = [-a for a, _, _, of in activations if of == token]
                lift = Fraction(count, n) / Fraction(seen[token], seen.total())
                row = (layer, token, feature, count, max(values), math.fsum(values), float(lift), entropy)
                tables["feature_tokens"].append(tuple(pytest.approx(value, rel=1e-8) for value in row))
    return tables


@pytest.mark.parametrize(("seed", "starts"), [(0, [7, 22]), (1, []), (2, [3, 3, 20])])
@pytest.mark.slow
def test_tables_are_what_lists_give(storage: Storage, seed: int, starts: list[int]) -> None:
    documents = random_documents(seed, 40, features=12)
    catalog = build(run_with(make_config(storage, **FEW), storage, cut_up(documents, starts, 31)), *GROUPS)
    expected = reference(documents[:31], 3, 2, 7)
    for table in MADE:
        assert rows_of(storage, catalog, table) == expected[table]
    check_tables(make_config(storage), storage, catalog)


_BASELINES: dict[int, dict[str, list[Any]]] = {}


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1),
    starts=st.lists(st.integers(1, 29), max_size=6),
    order=st.integers(0, 999),
    threads=st.sampled_from([1, 2, 5]),
)
def test_sharding_order_and_threads_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, starts: list[int], order: int, threads: int
) -> None:
    # Few values, so that many activations are equally strong.
    documents = [
        replace(
            document,
            active={
                layer: [{f: float(round(v) + 1) for f, v in active.items()} for active in of]
                for layer, of in document.active.items()
            },
        )
        for document in random_documents(seed, 30, features=6)
    ]

    def tables(starts: list[int], order: int, threads: int) -> dict[str, list[Any]]:
        storage = Storage(str(tmp_path_factory.mktemp("root")))
        config = make_config(storage, duckdb={"threads": threads}, **FEW)
        catalog = build(run_with(config, storage, cut_up(documents, starts, 25), seed=order), *GROUPS)
        return {table: rows_of(storage, catalog, table) for table in MADE}

    if seed not in _BASELINES:
        _BASELINES[seed] = tables([], 0, 1)
    assert tables(starts, order, threads) == _BASELINES[seed]


def test_what_is_drawn_is_spread_over_every_part() -> None:
    """Of one part of many features, and of many parts of one, each tenth of the ranks is drawn as often."""
    for drawn in (
        [lot(feature, 7) % 1000 for feature in range(20_000)],
        [lot(3, part) % 1000 for part in range(20_000)],
    ):
        tenths = Counter(rank // 100 for rank in drawn)
        assert all(1800 < tenths[tenth] < 2200 for tenth in range(10)), tenths


@pytest.mark.slow
def test_a_layer_that_activates_nothing_has_empty_tables(storage: Storage) -> None:
    documents = [Document(tokens=[3, 4], active={1: [{}, {}], 4: [{}, {}]})]
    catalog = build(run_with(make_config(storage), storage, cut_up(documents, [], 1)), *GROUPS)
    for table in MADE:
        assert rows_of(storage, catalog, table) == []
    check_tables(make_config(storage), storage, catalog)


@pytest.mark.slow
def test_tables_have_the_schemas_columns(storage: Storage) -> None:
    publish(
        storage,
        build(run_with(make_config(storage), storage, cut_up(random_documents(3, 9), [4], 9)), *GROUPS),
    )
    with connect(storage) as connection:
        for table in MADE:
            schema = connection.sql(f"FROM {table}").to_arrow_table().schema
            assert [(f.name, f.type) for f in schema] == [(f.name, f.type) for f in TABLES[table]]


@pytest.mark.slow
def test_a_folder_depends_on_what_is_in_it_alone(storage: Storage) -> None:
    cuts = cut_up(random_documents(7, 20), [9], 20)
    first = build(run_with(make_config(storage, **FEW), storage, cuts), *GROUPS)
    same = build(run_with(make_config(storage, graph={"rarefaction_m": 7}, **FEW), storage, cuts), *GROUPS)
    assert first.lineage["graph"] != same.lineage["graph"]
    assert first.lineage["features"] == same.lineage["features"]
    other = run_with(make_config(storage, features={**FEW["features"], "top_examples": 4}), storage, cuts)
    assert FEATURE_TABLES.planned(other) is None
    assert build(other, *GROUPS).lineage["features"] != first.lineage["features"]


@pytest.mark.slow
def test_a_root_from_before_these_tables_is_read_and_completed(storage: Storage) -> None:
    run = run_with(make_config(storage), storage, cut_up(random_documents(8, 12), [], 12))
    publish(storage, build(run, CorpusTables(), GRAPH))
    with connect(storage) as connection:
        assert connection.execute("SELECT count(*) > 0 FROM edges").fetchone() == (True,)
    assert not are_published(run, GROUPS)
    catalog = candidate(storage, [group.build(run) for group in GROUPS])
    check_tables(run.config, storage, catalog)
    publish(storage, catalog)
    assert are_published(run, GROUPS)
    assert set(MADE) <= set(read_catalog(storage).sharded)


@pytest.mark.slow
def test_activations_many_times_larger_than_memory(storage: Storage) -> None:
    """3 million activations, a third of them of one feature, of which DuckDB may hold a few; what numpy sorts."""
    rng, n, layer = np.random.default_rng(0), 3_000_000, 3
    feature = np.where(rng.random(n) < 1 / 3, 77, rng.integers(0, 1000, n)).astype(np.int32)
    columns: dict[str, Any] = {
        "doc": np.arange(n, dtype=np.int32) // 100,
        "position": np.arange(n, dtype=np.int32) % 100,
        "token_id": rng.integers(0, 50, n).astype(np.int32),
        "feature_id": feature,
        "activation": rng.integers(1, 5000, n).astype(np.float32),
    }
    storage.write_parquet("f/activations.parquet", pa.table(columns), row_group_size=100_000)
    shard = TokenShard(folder="t", source="a", doc_offset=0, n_documents=n // 100, n_tokens=n, n_rejects=0)
    part = GraphShard(shard=shard, n_documents=n // 100, n_tokens=n)
    rows = pa.table(columns).group_by(["token_id", "feature_id"])
    edges = rows.aggregate([("activation", "count"), ("activation", "max"), ("activation", "sum")])
    features = [FeatureShard(layer=layer, folder="f", part=part, n_activations=n, n_edges=edges.num_rows)]
    names = ["token_id", "feature_id", "n", "max_activation", "sum_activation"]
    edges = edges.rename_columns(names).append_column("layer", pa.array([layer] * edges.num_rows, pa.int32()))
    storage.write_parquet("e.parquet", edges)
    seen = np.bincount(columns["token_id"])
    tokens = pa.table({"layer": pa.array([layer] * 50, pa.int32()), "token_id": range(50), "count": seen})
    storage.write_parquet("d.parquet", tokens)
    n_of, degree_of = np.bincount(feature), np.bincount(edges["feature_id"].to_numpy())
    degrees = {"feature_id": pa.array(range(1000), pa.int32()), "degree": degree_of, "n": n_of}
    storage.write_parquet("n.parquet", pa.table({"layer": pa.array([layer] * 1000, pa.int32()), **degrees}))
    inputs = Catalog(
        tables={"token_degree": "d.parquet", "feature_degree": "n.parquet"},
        sharded={
            "edges": [ShardFile(name="e.parquet", layer=layer)],
            "activations": graph_inputs(features, layer)["activations"],
        },
    )
    config = make_config(storage, (layer,), duckdb={"memory_limit": "32MB", "threads": 1})
    ensure_layer(config, storage, layer, features, inputs)
    files = sorted(name for name in storage.sizes("tables") if name.endswith(".parquet"))
    assert sum("feature_examples-" in name for name in files) > 4

    def made(table: str) -> pa.Table:
        return pa.concat_tables([storage.read_parquet(name) for name in files if f"/{table}-" in name])

    top = made("feature_examples")
    top = top.filter(pc.equal(top["kind"], "top"))
    order = np.lexsort([np.arange(n), -columns["activation"], feature])
    _, starts = np.unique(feature[order], return_index=True)
    expected = (starts[:, None] + np.arange(20)).ravel()
    place = top["doc_id"].to_numpy() * 100 + top["position"].to_numpy()
    assert np.array_equal(place, order[expected])
    assert pc.sum(made("feature_histogram")["n"]).as_py() == n
    assert made("feature_tokens").num_rows == edges.num_rows
