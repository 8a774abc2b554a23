"""The tables of single features against slow, obvious references: sorted lists, `Fraction` and `math.log2`."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
from infra.duck import connect, memory_bytes
from infra.storage import Storage
from schemas.config import Config, DuckDb
from schemas.graph.feature_tables import TABLES
from schemas.work import FeatureShard, GraphShard, TokenShard
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.checks import check_tables
from tasks.engine.run import Run
from tasks.engine.tables import are_published, candidate, publish
from tasks.graph import by_feature, feature_tables
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
    fewest_apart=st.sampled_from([2, 99]),
)
def test_sharding_order_threads_and_passes_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    starts: list[int],
    order: int,
    threads: int,
    fewest_apart: int,
) -> None:
    """Also where passes hold so few rows that there is one a feature, which reads its own or the whole layer."""
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
    with (
        patch.object(feature_tables, "BYTES_PER_ROW", memory_bytes(DuckDb().memory_limit) // 120),
        patch.object(feature_tables, "FEWEST_APART", fewest_apart),
    ):
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


LAYER = 3


def one_layer(
    storage: Storage, columns: dict[str, Any], copies: int = 1
) -> tuple[list[FeatureShard], Catalog, pa.Table]:
    """Feature shards of these activations, each with the same, what the tables are made of, and their edges."""
    n, n_documents = len(columns["doc"]), int(columns["doc"].max()) + 1
    storage.write_parquet("f/activations.parquet", pa.table(columns), row_group_size=100_000)
    shards = [
        TokenShard(
            folder="t",
            source="a",
            doc_offset=n_documents * at,
            n_documents=n_documents,
            n_tokens=n,
            n_rejects=0,
        )
        for at in range(copies)
    ]
    rows = pa.table(columns).group_by(["token_id", "feature_id"])
    edges = rows.aggregate([("activation", "count"), ("activation", "max"), ("activation", "sum")])
    names = ["token_id", "feature_id", "n", "max_activation", "sum_activation"]
    edges = edges.rename_columns(names).append_column("layer", pa.array([LAYER] * edges.num_rows, pa.int32()))
    edges = edges.set_column(2, "n", pc.multiply(edges["n"], copies))
    features = [
        FeatureShard(
            layer=LAYER,
            folder="f",
            part=GraphShard(shard=shard, n_documents=n_documents, n_tokens=n),
            n_activations=n,
            n_edges=edges.num_rows,
        )
        for shard in shards
    ]
    storage.write_parquet("e.parquet", edges)
    seen = np.bincount(columns["token_id"]) * copies
    tokens = {"token_id": range(len(seen)), "count": seen}
    feature, n_of = np.unique(columns["feature_id"], return_counts=True)
    degree = np.bincount(edges["feature_id"].to_numpy())[feature]
    degrees = {"feature_id": feature, "degree": degree, "n": n_of * copies}
    for name, table in {"d.parquet": tokens, "n.parquet": degrees}.items():
        layer = pa.array([LAYER] * len(next(iter(table.values()))), pa.int32())
        storage.write_parquet(name, pa.table({"layer": layer, **table}))
    inputs = Catalog(
        tables={"token_degree": "d.parquet", "feature_degree": "n.parquet"},
        sharded={
            "edges": [ShardFile(name="e.parquet", layer=LAYER)],
            "activations": graph_inputs(features, LAYER)["activations"],
        },
    )
    return features, inputs, edges


def few_of_each(n: int) -> dict[str, Any]:
    """One activation of each of n features."""
    return {
        "doc": np.arange(n, dtype=np.int32) // 100,
        "position": np.arange(n, dtype=np.int32) % 100,
        "token_id": np.arange(n, dtype=np.int32) % 50,
        "feature_id": np.arange(n, dtype=np.int32),
        "activation": np.ones(n, np.float32),
    }


def test_files_that_wait_to_be_sorted_fit_into_memory(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of threads: a file has the activations of a shard, which may be large."""
    features, inputs, _ = one_layer(storage, few_of_each(20_000), copies=12)
    config = make_config(storage, (LAYER,), duckdb={"memory_limit": "6MB", "threads": 8})
    begun, waiting = [0], list[int]()
    read, add = feature_tables._Layer._occurrences, feature_tables._Columns.add

    def reading(*args: Any) -> Any:
        begun[0] += 1
        return read(*args)

    def adding(columns: Any, rows: pa.Table) -> None:
        if "doc_id" in rows.column_names:
            time.sleep(0.02)
            waiting.append(begun[0])
            begun[0] -= 1
        add(columns, rows)

    monkeypatch.setattr(feature_tables._Layer, "_occurrences", reading)
    monkeypatch.setattr(feature_tables._Columns, "add", adding)
    ensure_layer(config, storage, LAYER, features, inputs)
    assert len(waiting) >= 12
    # A quarter of memory is 2.5 of them, besides the one that is being added.
    assert max(waiting) <= 3


def test_features_of_few_activations_are_drawn_from_a_few_at_a_time(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, inputs, _ = one_layer(storage, few_of_each(50_000))
    shown = {"top_examples": 30, "decile_examples": 4}
    config = make_config(storage, (LAYER,), features=shown)
    asked, draw = list[int](), by_feature.example_ranks

    def drawing(feature: Any, n: Any, top: int, of_decile: int) -> Any:
        asked.append(len(feature))
        return draw(feature, n, top, of_decile)

    monkeypatch.setattr(feature_tables, "example_ranks", drawing)
    ensure_layer(config, storage, LAYER, features, inputs)
    assert sum(asked) == 50_000
    assert max(asked) * (30 + 10 * 4) <= 1 << 19


@pytest.mark.slow
def test_activations_many_times_larger_than_memory(storage: Storage) -> None:
    """3 million activations, a third of them of one feature, of which DuckDB may hold a few; what numpy sorts."""
    rng, n = np.random.default_rng(0), 3_000_000
    feature = np.where(rng.random(n) < 1 / 3, 77, rng.integers(0, 1000, n)).astype(np.int32)
    columns: dict[str, Any] = {
        "doc": np.arange(n, dtype=np.int32) // 100,
        "position": np.arange(n, dtype=np.int32) % 100,
        "token_id": rng.integers(0, 50, n).astype(np.int32),
        "feature_id": feature,
        "activation": rng.integers(1, 5000, n).astype(np.float32),
    }
    features, inputs, edges = one_layer(storage, columns)
    config = make_config(storage, (LAYER,), duckdb={"memory_limit": "32MB", "threads": 1})
    ensure_layer(config, storage, LAYER, features, inputs)
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
