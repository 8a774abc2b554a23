"""The tables against slow, obvious references: Python sets, `Fraction` and `math.comb`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from builders import (
    Cut,
    Document,
    build,
    make_config,
    make_dictionary,
    random_documents,
    run_of,
    token_text,
    write_corpus,
    write_features,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from s3 import S3Root

from infra.catalog import Catalog, ShardFile, read_catalog
from infra.duck import connect, create_views, memory_bytes, open_duckdb
from infra.manifest import load
from infra.storage import Storage
from schemas.config import Config, Dask, DuckDb
from schemas.errors import ConfigError, StorageError
from schemas.tables import MEMBERS, TABLES
from schemas.work import CorpusShards, Dictionary, FeatureShard, GraphShard, TokenShard
from tasks.corpus.tables import CorpusTables, subject_of
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.catalog_file import write_catalog_file
from tasks.engine.run import Run
from tasks.engine.tables import are_published, publish, write_table
from tasks.graph.edges import edge_files, ensure_edges, id_ranges
from tasks.graph.features import FEATURES, sum_edges
from tasks.graph.power_law import fit_power_law
from tasks.graph.tables import GRAPH, graph_inputs

LAYERS = (1, 4)
SAES = [make_dictionary(4, 50, quality={"k": 2.0, "l0": 1.9}), make_dictionary(1, 64)]
ORDER = {
    "documents": "doc_id",
    "rejects": "source, line",
    "occurrences": "doc_id, position",
    "edges": "layer, token_id, feature_id",
    "activations": "layer, doc_id, position, feature_id",
}
SPINE = (*MEMBERS["corpus"], *MEMBERS["graph"])
COMPARED = tuple(table for table in SPINE if table != "run_info")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def cut_up(documents: list[Document], starts: list[int], in_graph: int) -> list[Cut]:
    """Shards that begin at `starts`, of two sources, with the first `in_graph` documents in the graph."""
    bounds = [0, *sorted(starts), len(documents)]
    cuts = []
    for index, (start, end) in enumerate(pairwise(bounds)):
        within = max(0, min(end, in_graph) - start)
        cuts.append(Cut(source=f"{'ab'[index % 2]}.jsonl", documents=documents[start:end], in_graph=within))
    return cuts


def built(storage: Storage, cuts: list[Cut], config: Config | None = None, seed: int = 0) -> Catalog:
    shards = write_corpus(storage, cuts, seed=seed)
    features = write_features(storage, cuts, shards, SAES, seed=seed)
    return build_graph(config or make_config(storage), storage, shards, features, SAES)


def run_with(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    features: list[FeatureShard],
    dictionaries: list[Dictionary],
) -> Run:
    return run_of(config, storage, {TOKENIZE: shards, DICTIONARIES: dictionaries, FEATURES: features})


def build_graph(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    features: list[FeatureShard],
    dictionaries: list[Dictionary],
) -> Catalog:
    return build(run_with(config, storage, shards, features, dictionaries), CorpusTables(), GRAPH)


def build_corpus(config: Config, storage: Storage, shards: CorpusShards) -> Catalog:
    return build(run_of(config, storage, {TOKENIZE: shards}), CorpusTables())


def is_published(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    features: list[FeatureShard],
    dictionaries: list[Dictionary],
) -> bool:
    return are_published(run_with(config, storage, shards, features, dictionaries), [CorpusTables(), GRAPH])


def is_corpus_published(config: Config, storage: Storage, shards: CorpusShards) -> bool:
    return are_published(run_of(config, storage, {TOKENIZE: shards}), [CorpusTables()])


def rows_of(storage: Storage, catalog: Catalog, table: str) -> list[dict[str, Any]]:
    """The rows of a table as they lie in its file; of one that is kept by shard, in the order of its keys."""
    if table in catalog.tables:
        rows: list[dict[str, Any]] = storage.read_parquet(catalog.tables[table]).to_pylist()
        return rows
    with open_duckdb(storage) as connection:
        create_views(connection, storage, catalog)
        rows = connection.sql(f"FROM {table} ORDER BY {ORDER[table]}").to_arrow_table().to_pylist()
    return rows


def reference(
    documents: list[Document], in_graph: int, sizes: dict[int, int], share: Fraction, m: int
) -> dict[str, list[tuple[Any, ...]]]:
    """Every table as sets and counts give it, one occurrence at a time."""
    count: dict[int, int] = defaultdict(int)
    within: dict[int, set[int]] = defaultdict(set)
    for doc, document in enumerate(documents):
        for token in document.tokens:
            count[token] += 1
            within[token].add(doc)
    total, before, tokens, ranks, function = sum(count.values()), 0, [], {}, {}
    for rank, token in enumerate(sorted(count, key=lambda t: (-count[t], t)), 1):
        ranks[token], function[token] = rank, Fraction(before, total) < share
        before += count[token]
        doc_share = len(within[token]) / len(documents)
        row = (token, token_text(token), count[token], len(within[token]), doc_share, rank)
        tokens.append((*row, count[token] / total, before / total, function[token]))
    tables: dict[str, list[tuple[Any, ...]]] = defaultdict(list, tokens=tokens)
    seen: dict[int, int] = defaultdict(int)
    for document in documents[:in_graph]:
        for token in document.tokens:
            seen[token] += 1
    for layer in sorted(sizes):
        values: dict[tuple[int, int], list[float]] = defaultdict(list)
        for document in documents[:in_graph]:
            for token, active in zip(document.tokens, document.active[layer], strict=True):
                for feature, value in active.items():
                    values[token, feature].append(value)
        for (token, feature), found in sorted(values.items()):
            units = sum(round(Fraction(value) * 2**32) for value in found)
            tables["edges"].append((layer, token, feature, len(found), max(found), units / 2**32))
        reached: set[int] = set()
        everything = {feature for _, feature in values}
        for token in sorted(seen, key=lambda t: ranks[t]):
            mine = {feature for t, feature in values if t == token}
            expected = None
            if seen[token] >= m:
                expected = float(
                    sum(
                        1 - Fraction(comb(seen[token] - len(values[token, f]), m), comb(seen[token], m))
                        for f in mine
                    )
                )
            row = (layer, token, token_text(token), ranks[token], seen[token], function[token])
            tables["token_degree"].append((*row, len(mine), expected, m))
            new = mine - reached
            reached |= mine
            shares = (len(reached) / len(everything), len(reached) / sizes[layer])
            row = (layer, ranks[token], token, token_text(token))
            tables["coverage"].append((*row, len(new), len(reached), *shares))
        for feature in sorted(everything):
            users = [len(found) for (_, f), found in values.items() if f == feature]
            tables["feature_degree"].append(
                (layer, feature, len(users), sum(users), sum(users) / sum(seen.values()))
            )
        nonzeros = sum(len(found) for found in values.values())
        degrees = [row[6] for row in tables["token_degree"] if row[0] == layer]
        fit = fit_power_law(degrees)
        law = (fit.alpha, fit.xmin, fit.ks) if fit else (None, None, None)
        n_tokens = sum(seen.values())
        row = (layer, sizes[layer], len(everything), n_tokens, len(values), nonzeros / n_tokens)
        tables["graph_summary"].append((*row, *law))
    return tables


@pytest.mark.parametrize(
    ("seed", "in_graph", "starts"), [(0, 40, [7, 22]), (1, 31, [16]), (2, 9, [3, 3, 20])]
)
@pytest.mark.slow
def test_tables_are_what_sets_give(storage: Storage, seed: int, in_graph: int, starts: list[int]) -> None:
    documents = random_documents(seed, 40)
    catalog = built(storage, cut_up(documents, starts, in_graph))
    expected = reference(documents, in_graph, {1: 64, 4: 50}, Fraction(40, 100), 5)
    for table in ("tokens", "edges", "token_degree", "feature_degree", "coverage", "graph_summary"):
        found = [tuple(row.values()) for row in rows_of(storage, catalog, table)]
        assert len(found) == len(expected[table]) > 0
        for ours, theirs in zip(found, expected[table], strict=True):
            if table == "token_degree":
                expected_degree = None if theirs[7] is None else pytest.approx(theirs[7], rel=1e-13)
                assert ours[7] == expected_degree
                ours, theirs = ours[:7] + ours[8:], theirs[:7] + theirs[8:]
            assert ours == theirs


@pytest.mark.slow
def test_shards_become_views_with_global_numbers(storage: Storage) -> None:
    documents = random_documents(3, 25)
    catalog = built(storage, cut_up(documents, [4, 9], 20))
    assert [
        (row["doc_id"], row["source"], row["n_tokens"]) for row in rows_of(storage, catalog, "documents")
    ] == [
        (doc, "b.jsonl" if 4 <= doc < 9 else "a.jsonl", len(document.tokens))
        for doc, document in enumerate(documents)
    ]
    assert [
        (row["doc_id"], row["position"], row["token_id"]) for row in rows_of(storage, catalog, "occurrences")
    ] == [
        (doc, position, token)
        for doc, document in enumerate(documents)
        for position, token in enumerate(document.tokens)
    ]
    assert [tuple(row.values()) for row in rows_of(storage, catalog, "activations")] == [
        (layer, doc, position, document.tokens[position], feature, value)
        for layer in LAYERS
        for doc, document in enumerate(documents[:20])
        for position, active in enumerate(document.active[layer])
        for feature, value in sorted(active.items())
    ]


@pytest.mark.slow
def test_tables_have_the_contracts_columns_and_order(storage: Storage) -> None:
    catalog = built(storage, cut_up(random_documents(4, 20), [5], 20))
    assert {*catalog.tables, *catalog.sharded} == set(SPINE)
    for table in SPINE:
        with open_duckdb(storage) as connection:
            create_views(connection, storage, catalog)
            schema = connection.sql(f"FROM {table}").to_arrow_table().schema
        assert [(field.name, field.type) for field in schema] == [(f.name, f.type) for f in TABLES[table]], (
            table
        )
    for layer, file in zip(LAYERS, catalog.sharded["edges"], strict=True):
        edges = storage.read_parquet(file.name).to_pylist()
        keys = [(row["layer"], row["token_id"], row["feature_id"]) for row in edges]
        assert keys == sorted(keys)
        assert {key[0] for key in keys} == {layer}


_BASELINES: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = {}


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2),
    in_graph=st.sampled_from([13, 30]),
    starts=st.lists(st.integers(1, 29), max_size=6),
    order=st.integers(0, 999),
    threads=st.sampled_from([1, 2, 5]),
)
def test_sharding_order_and_threads_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    in_graph: int,
    starts: list[int],
    order: int,
    threads: int,
) -> None:
    documents = random_documents(seed, 30)

    def tables(starts: list[int], order: int, threads: int) -> dict[str, list[dict[str, Any]]]:
        storage = Storage(str(tmp_path_factory.mktemp("root")))
        # The source is no part of the comparison: shards of one file have one.
        cuts = [replace(cut, source="a.jsonl") for cut in cut_up(documents, starts, in_graph)]
        config = make_config(storage, duckdb={"threads": threads})
        catalog = built(storage, cuts, config, seed=order)
        return {table: rows_of(storage, catalog, table) for table in COMPARED if table != "rejects"}

    if (seed, in_graph) not in _BASELINES:
        _BASELINES[seed, in_graph] = tables([], 0, 1)
    assert tables(starts, order, threads) == _BASELINES[seed, in_graph]


@pytest.mark.slow
def test_a_large_graph_is_the_same_on_any_number_of_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 300_000
    pairs = np.unique(rng.zipf(1.3, n) % 3_000 * 10_000 + rng.zipf(1.2, n) % 10_000)
    edges = pa.table(
        {
            "layer": pa.array(np.full(len(pairs), 1), pa.int32()),
            "token_id": pa.array(pairs // 10_000, pa.int32()),
            "feature_id": pa.array(pairs % 10_000, pa.int32()),
            "n": pa.array(rng.integers(1, 60, len(pairs)), pa.int64()),
        }
    )
    degree = np.unique(pairs // 10_000)
    counts = pa.table(
        {
            "layer": pa.array(np.full(len(degree), 1), pa.int32()),
            "token_id": degree,
            "count": degree % 7 * 500 + 60,
        }
    )
    ranks = pa.table(
        {
            "token_id": degree,
            "token": degree.astype(str),
            "rank": np.arange(1, len(degree) + 1),
            "is_function": degree < 9,
        }
    )
    made = []
    for threads in (1, 4, 4):
        storage = Storage(str(tmp_path / str(len(made))))
        inputs = {
            "edges": edges.take(rng.permutation(len(edges))),
            "shard_graph_counts": counts,
            "token_degree": counts,
            "tokens": ranks,
        }
        for table in ("token_degree", "feature_degree"):
            write_table(DuckDb(threads=threads), storage, table, f"{table}.parquet", Catalog(), inputs, m=50)
        made.append(
            [storage.read_parquet(f"{table}.parquet") for table in ("token_degree", "feature_degree")]
        )
    assert made[0] == made[1] == made[2]


@pytest.mark.slow
def test_rarefied_degree_has_full_precision(storage: Storage) -> None:
    cases = [
        (n_total, n, m)
        for m in (1, 2, 100)
        for n_total in (100, 101, 250, 10**6)
        for n in (1, 2, 50, 99, 100)
    ]
    cases += [(10**6, n, 100) for n in (1_000, 500_000, 999_899, 999_900, 999_901, 10**6)]
    cases += [(10**8, 1, 100), (10**8, 3, 1), (20_000, 1, 5_000), (20_000, 7, 5_000), (90_000, 2_000, 5_000)]
    cases += [(90_000, 1_025, 1_025), (90_000, 1_500, 5_003), (12_000, 6_000, 5_000), (12_000, 6_999, 5_000)]
    for m in sorted({m for _, _, m in cases}):
        mine = [(total, n) for total, n, of in cases if of == m]
        tokens = list(range(len(mine)))
        layer = pa.array([0] * len(mine), pa.int32())
        inputs = {
            "edges": pa.table(
                {"layer": layer, "token_id": tokens, "feature_id": tokens, "n": [n for _, n in mine]}
            ),
            "shard_graph_counts": pa.table(
                {"layer": layer, "token_id": tokens, "count": [total for total, _ in mine]}
            ),
            "tokens": pa.table(
                {
                    "token_id": tokens,
                    "token": [""] * len(mine),
                    "rank": tokens,
                    "is_function": [False] * len(mine),
                }
            ),
        }
        write_table(DuckDb(), storage, "token_degree", "t.parquet", Catalog(), inputs, m=m)
        for (total, n), found in zip(
            mine, storage.read_parquet("t.parquet")["rarefied_degree"].to_pylist(), strict=True
        ):
            small, large = min(n, m), max(n, m)
            missed = Fraction(1)
            for i in range(small):
                missed *= Fraction(max(0, total - large - i), total - i)
            # Above 1,024 factors they are taken in blocks.
            assert found == pytest.approx(float(1 - missed), rel=1e-12 if small <= 1024 else 1e-6), (
                total,
                n,
                m,
            )


def test_function_tokens_end_with_the_one_that_reaches_the_share(storage: Storage) -> None:
    documents = [Document(tokens=[0, 0, 1, 1, 2], active={})]
    shards = write_corpus(storage, [Cut(source="a", documents=documents, in_graph=0)])
    for share, function in [(0.4, [0]), (0.41, [0, 1]), (0.8, [0, 1]), (1.0, [0, 1, 2])]:
        config = make_config(storage, layers=(), function_tokens={"share": share})
        rows = rows_of(storage, build_corpus(config, storage, shards), "tokens")
        assert [row["token_id"] for row in rows if row["is_function"]] == function


def one_token_graph(storage: Storage, *values: float) -> tuple[CorpusShards, list[FeatureShard]]:
    active = {1: [{0: value} for value in values]}
    cuts = [Cut(source="a", documents=[Document(tokens=[3] * len(values), active=active)], in_graph=1)]
    shards = write_corpus(storage, cuts)
    return shards, write_features(storage, cuts, shards, [make_dictionary(1)])


@pytest.mark.slow
def test_activations_of_any_size_add_up(storage: Storage) -> None:
    shards, features = one_token_graph(storage, 3e38, 1.0, 3e38)
    catalog = build_graph(make_config(storage, (1,)), storage, shards, features, [make_dictionary(1)])
    (edge,) = rows_of(storage, catalog, "edges")
    assert (edge["n"], edge["sum_activation"]) == (3, pytest.approx(6e38, rel=1e-7))


@pytest.mark.slow
def test_a_layer_that_activates_nothing_is_in_the_tables(storage: Storage) -> None:
    cuts = [Cut(source="a", documents=[Document(tokens=[3, 4], active={1: [{}, {}]})], in_graph=1)]
    shards = write_corpus(storage, cuts)
    features = write_features(storage, cuts, shards, [make_dictionary(1)])
    catalog = build_graph(make_config(storage, (1,)), storage, shards, features, [make_dictionary(1)])
    assert [row["degree"] for row in rows_of(storage, catalog, "token_degree")] == [0, 0]
    (summary,) = rows_of(storage, catalog, "graph_summary")
    assert (summary["activated_features"], summary["mean_l0"], summary["alpha"]) == (0, 0.0, None)
    assert [row["cumulative_features"] for row in rows_of(storage, catalog, "coverage")] == [0, 0]


@pytest.mark.slow
def test_files_of_equal_content_count_each(storage: Storage) -> None:
    documents = random_documents(5, 6)
    twins = [Cut(source=source, documents=documents, in_graph=6) for source in ("a.jsonl", "b.jsonl")]
    shards = write_corpus(storage, twins)
    assert shards.shards[0].folder == shards.shards[1].folder
    catalog = built(storage, twins)
    expected = reference(documents * 2, 12, {1: 64, 4: 50}, Fraction(2, 5), 5)
    for table in ("tokens", "edges"):
        assert [tuple(row.values()) for row in rows_of(storage, catalog, table)] == expected[table]


@pytest.mark.slow
def test_a_file_that_joins_gives_the_tables_of_a_fresh_run(tmp_path: Path) -> None:
    documents = random_documents(6, 30)
    grown, fresh = Storage(str(tmp_path / "grown")), Storage(str(tmp_path / "fresh"))
    publish(grown, built(grown, cut_up(documents[:20], [10], 20)))
    later = cut_up(documents, [10, 20], 30)
    publish(grown, built(grown, later))
    publish(fresh, built(fresh, later))
    for table in SPINE:
        with connect(grown) as ours, connect(fresh) as theirs:
            order = f" ORDER BY {ORDER[table]}" if table in ORDER else ""
            assert (
                ours.sql(f"FROM {table}{order}").fetchall() == theirs.sql(f"FROM {table}{order}").fetchall()
            )


@pytest.mark.slow
def test_what_is_there_is_not_made_again(storage: Storage) -> None:
    cuts = cut_up(random_documents(7, 20), [9], 20)
    shards = write_corpus(storage, cuts)
    features = write_features(storage, cuts, shards, SAES)
    config = make_config(storage)
    publish(storage, build_graph(config, storage, shards, features, SAES))
    assert is_published(config, storage, shards, features, SAES)
    times = {path: path.stat().st_mtime_ns for path in Path(storage.path, "tables").rglob("*.parquet")}
    publish(storage, build_graph(config, storage, shards, features, SAES))
    assert {
        path: path.stat().st_mtime_ns for path in Path(storage.path, "tables").rglob("*.parquet")
    } == times

    # Another dictionary for layer 4 leaves the edges of layer 1 as they are.
    changed = [make_dictionary(4, 50, key="other"), SAES[1]]
    new_features = write_features(storage, cuts, shards, changed)
    assert not is_published(config, storage, shards, new_features, changed)
    before = read_catalog(storage)
    after = build_graph(config, storage, shards, new_features, changed)
    assert after.sharded["edges"][0] == before.sharded["edges"][0]
    assert after.sharded["edges"][1] != before.sharded["edges"][1]
    assert after.lineage["corpus"] == before.lineage["corpus"]
    assert read_catalog(storage) == before, "building publishes nothing"

    for section in ({"graph": {"rarefaction_m": 6}}, {"function_tokens": {"share": 0.5}}):
        assert not is_published(make_config(storage, **section), storage, shards, features, SAES)
    assert is_published(make_config(storage, duckdb={"threads": 1}), storage, shards, features, SAES)
    edges = edge_files(storage, features)
    assert edges is not None
    storage.delete(edges[0].name.rsplit("/", 1)[0])
    # What the graph would be is not known, and nothing is planned by halves.
    assert GRAPH.planned(run_with(config, storage, shards, features, SAES)) is None
    assert not is_published(config, storage, shards, features, SAES)


@pytest.mark.slow
def test_a_new_corpus_drops_the_graph_of_the_old_one(storage: Storage) -> None:
    cuts = cut_up(random_documents(8, 12), [], 12)
    publish(storage, built(storage, cuts))
    same = build_corpus(make_config(storage), storage, write_corpus(storage, cuts))
    assert {"graph", "corpus"} == set(same.lineage)
    assert "coverage" in same.tables
    other = write_corpus(storage, cut_up(random_documents(9, 12), [], 12))
    publish(storage, build_corpus(make_config(storage), storage, other))
    published = read_catalog(storage)
    assert set(published.lineage) == {"corpus"}
    assert {"tokens", "run_info", "expectations"} == set(published.tables)
    assert {"documents", "rejects", "occurrences"} == set(published.sharded)


@pytest.mark.slow
def test_a_graph_stays_where_a_run_is_about_its_model_and_dictionaries(storage: Storage) -> None:
    cuts = cut_up(random_documents(8, 12), [], 12)
    publish(storage, built(storage, cuts))
    shards = write_corpus(storage, cuts)

    def is_kept(config: Config) -> bool:
        kept = "graph" in build_corpus(config, storage, shards).lineage
        assert kept == ("coverage" in build_corpus(config, storage, shards).tables)
        return kept

    assert is_kept(make_config(storage))
    assert is_kept(make_config(storage, (), windows={"context_size": 7}))
    assert is_kept(make_config(storage, (1, 4, 9)))
    assert not is_kept(make_config(storage, (1,)))
    renamed = make_config(storage, (), model={"name": "other"})
    for changed in (renamed, make_config(storage, (), model={"name": "tiny", "revision": "r"})):
        assert not is_kept(changed)
    assert not is_corpus_published(renamed, storage, shards)
    publish(storage, build_corpus(renamed, storage, shards))
    assert read_catalog(storage).lineage.keys() == {"corpus"}
    assert is_corpus_published(renamed, storage, shards)


def test_tables_of_another_model_are_dropped_though_their_own_are_current(storage: Storage) -> None:
    cuts = cut_up(random_documents(8, 12), [], 12)
    shards, config = write_corpus(storage, cuts), make_config(storage, ())
    publish(storage, build_corpus(config, storage, shards))
    assert is_corpus_published(config, storage, shards)
    # What was published before the catalogue said what its groups are about.
    mixed = read_catalog(storage)
    publish(storage, replace(mixed, lineage=mixed.lineage | {"graph": "g"}))
    assert not is_corpus_published(config, storage, shards)


def test_trained_dictionaries_are_others_where_other_residuals_are_read(storage: Storage) -> None:
    def subject(context: int = 64, explained: float = 0.5, **train: int) -> tuple[str, ...]:
        gate = {"min_explained_variance": explained}
        values = make_config(storage).model_dump() | {
            "sae": [{"layer": 1, "train": {"d_sae": 8, "k": 2, "gate": gate, **train}}],
            "windows": {"context_size": context},
        }
        return subject_of(Config.model_validate(values))

    assert subject() == subject(explained=0.9)
    assert len({subject(), subject(context=32), subject(seed=1)}) == 3
    assert len({subject()[0], subject(context=32)[0], subject(seed=1)[0]}) == 1


@pytest.mark.slow
def test_what_a_killed_process_left_is_made_again(storage: Storage) -> None:
    cuts = cut_up(random_documents(10, 12), [5], 12)
    first = built(storage, cuts)
    expected = {table: rows_of(storage, first, table) for table in COMPARED}
    edges, coverage = first.sharded["edges"][0].name, first.tables["coverage"]
    # Killed before the manifest; and a file cut short after it.
    os.remove(storage.full(f"{edges.rsplit('/', 1)[0]}/manifest.json"))
    Path(storage.full(edges)).write_bytes(b"PAR1")
    Path(storage.full(coverage)).write_bytes(b"PAR1")
    assert load(storage, coverage.rsplit("/", 1)[0]) is None
    again = built(storage, cuts)
    assert again == first
    assert {table: rows_of(storage, again, table) for table in COMPARED} == expected


def test_a_shard_that_is_gone_is_a_clear_error(storage: Storage) -> None:
    cuts = cut_up(random_documents(11, 8), [], 8)
    shards = write_corpus(storage, cuts)
    storage.delete(f"{shards.shards[0].folder}/token_counts.parquet")
    with pytest.raises(StorageError, match=r"tokens.*token_counts\.parquet"):
        build_corpus(make_config(storage), storage, shards)
    features = write_features(storage, cuts, shards, SAES)
    storage.delete(f"{features[0].folder}/edges.parquet")
    layer = features[0].layer
    wanted = Catalog(sharded={"shard_edges": graph_inputs(features, layer)["shard_edges"]})
    with pytest.raises(StorageError, match=r"features/.*edges\.parquet is not there"):
        ensure_edges(DuckDb(), storage, layer, features, wanted, Dask())
    assert not [name for name in storage.sizes("tables") if name.endswith("manifest.json")]


def test_layers_without_a_dictionary_are_refused(storage: Storage) -> None:
    cuts = cut_up(random_documents(12, 8), [], 8)
    shards = write_corpus(storage, cuts)
    features = write_features(storage, cuts, shards, SAES)
    with pytest.raises(ConfigError, match=r"\[1, 4\]"):
        build_graph(make_config(storage), storage, shards, features, SAES[:1])


@pytest.mark.slow
def test_edges_ten_times_larger_than_memory(storage: Storage) -> None:
    """10 million edges of 32 bytes, 320 MB, of which DuckDB may hold a tenth; the rows that numpy counts."""
    rng, n, features, pairs = np.random.default_rng(0), 5_000_000, [], []
    for index in range(2):
        token = np.sort((50_000 * rng.random(n) ** 2).astype(np.int32))
        columns = [token, rng.integers(0, 1 << 20, n).astype(np.int32)]
        edges, _ = sum_edges(*columns, np.ones(n, np.float32))
        storage.write_parquet(f"f{index}/edges.parquet", edges, row_group_size=100_000)
        shard = TokenShard(
            folder=f"t{index}", source="a", doc_offset=index, n_documents=1, n_tokens=n, n_rejects=0
        )
        part = GraphShard(shard=shard, n_documents=1, n_tokens=n)
        features.append(
            FeatureShard(layer=3, folder=f"f{index}", part=part, n_activations=n, n_edges=edges.num_rows)
        )
        pairs.append(token.astype(np.int64) << 20 | columns[1])
    inputs = graph_inputs(features, 3)
    wanted = Catalog(sharded={"shard_edges": inputs["shard_edges"]})
    ensure_edges(DuckDb(memory_limit="32MB", threads=1), storage, 3, features, wanted, Dask())
    files = edge_files(storage, features)
    assert files is not None
    assert len(files) > 10
    found = pa.concat_tables([storage.read_parquet(file.name) for file in files])
    expected, counts = np.unique(np.concatenate(pairs), return_counts=True)
    ours = found["token_id"].to_numpy().astype(np.int64) << 20 | found["feature_id"].to_numpy()
    assert np.array_equal(ours, expected)
    assert np.array_equal(found["n"].to_numpy(), counts)
    assert np.array_equal(found["sum_activation"].to_numpy(), counts)


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 50)), max_size=30, unique_by=lambda row: row[0]
    ),
    rows_per_pass=st.integers(1, 200),
)
def test_id_ranges_hold_every_token_once(rows: list[tuple[int, int]], rows_per_pass: int) -> None:
    tokens = np.array(sorted(token for token, _ in rows), np.int32)
    counts = np.array([count for _, count in rows], np.int64)
    ranges = id_ranges(tokens, counts, rows_per_pass)
    assert (ranges[0][0], ranges[-1][1]) == (-(2**31), 2**31 - 1)
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(ranges))
    largest = max(counts, default=0)
    for first, last in ranges:
        inside = counts[(tokens >= first) & (tokens <= last)]
        assert inside.sum() <= rows_per_pass + largest


def test_memory_limits_are_read_as_duckdb_reads_them() -> None:
    for limit in ("64MB", "0.5GB", "512 MiB", "2GiB", "1TB"):
        with duckdb.connect() as connection:
            connection.execute("SET memory_limit = ?", [limit])
            (theirs,) = connection.execute("SELECT current_setting('memory_limit')").fetchone() or ("",)
        number, unit = theirs.split()
        assert memory_bytes(f"{number} {unit}") == pytest.approx(memory_bytes(limit), rel=0.06)


@pytest.mark.slow
def test_too_little_memory_says_which_setting_to_raise(storage: Storage) -> None:
    counts = pa.table(
        {"token_id": np.arange(2_000_000), "count": np.arange(2_000_000), "doc_count": np.arange(2_000_000)}
    )
    storage.write_parquet("counts.parquet", counts)
    inputs = Catalog(
        tables={"vocabulary": "v.parquet"},
        sharded={"shard_token_counts": [ShardFile(name="counts.parquet")]},
    )
    storage.write_parquet("v.parquet", pa.table({"token_id": [0], "token": ["a"]}))
    with pytest.raises(ConfigError, match="memory_limit"):
        write_table(
            DuckDb(memory_limit="1MB"), storage, "tokens", "tokens.parquet", inputs, share=0.4, n_documents=1
        )


@pytest.mark.process
def test_the_catalogue_file_opens_anywhere(storage: Storage, tmp_path: Path) -> None:
    publish(storage, built(storage, cut_up(random_documents(13, 20), [6], 20)))
    target = tmp_path / "elsewhere" / "it's.duckdb"
    write_catalog_file(storage, str(target), DuckDb())
    write_catalog_file(storage, str(target), DuckDb())
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    script = (
        "import duckdb, json, sys; c = duckdb.connect(sys.argv[1], read_only=True);"
        "t = [r[0] for r in c.execute(\"SELECT table_name FROM information_schema.tables WHERE table_schema = 'main'"
        " AND table_type = 'VIEW'\").fetchall()];"
        "print(json.dumps({n: sorted(map(repr, c.execute(f'FROM {n}').fetchall())) for n in t}))"
    )
    moved = tmp_path / "other-name.duckdb"
    target.rename(moved)
    ran = subprocess.run(
        [sys.executable, "-c", script, str(moved)], cwd="/", capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    assert set(found) == {*SPINE, "expectations"}
    with connect(storage) as connection:
        for table, rows in found.items():
            assert rows == sorted(map(repr, connection.sql(f"FROM {table}").fetchall())), table
    with duckdb.connect(str(moved), read_only=True) as connection:
        in_main = connection.execute(
            "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'main'"
        ).fetchone()
        assert in_main == (0,)


def test_tables_on_s3_are_those_on_disk(storage: Storage, s3_root: S3Root, tmp_path: Path) -> None:
    cuts = cut_up(random_documents(15, 20), [6], 20)
    remote = Storage(s3_root.url)
    publish(storage, built(storage, cuts))
    publish(remote, built(remote, cuts))
    with connect(storage) as ours, connect(remote) as theirs:
        for table in COMPARED:
            expected = sorted(map(repr, ours.sql(f"FROM {table}").fetchall()))
            assert sorted(map(repr, theirs.sql(f"FROM {table}").fetchall())) == expected, table
    assert s3_root.unfinished_uploads() == []
    table = pa.table({"token_id": [1], "count": [1], "doc_count": [1], "token": ["a"]})
    same = {
        "shard_token_counts": table,
        "vocabulary": table.select(["token_id", "token"]),
    }
    nowhere = Storage("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match="there is no bucket no-such-bucket"):
        write_table(DuckDb(), nowhere, "tokens", "t.parquet", Catalog(), same, share=0.4, n_documents=1)
    # Without a way to S3 of its own, a client still opens the small tables.
    target = tmp_path / "c.duckdb"
    write_catalog_file(remote, str(target), DuckDb())
    with duckdb.connect(str(target), read_only=True) as plain, connect(storage) as ours:
        for table in ("documents", "tokens", "coverage", "graph_summary"):
            found = plain.execute(f"FROM {table} ORDER BY ALL").fetchall()
            assert found == ours.execute(f"FROM {table} ORDER BY ALL").fetchall()


@pytest.mark.process
def test_the_bench_prints_its_figures(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.tables",
        "--root",
        str(tmp_path),
        "--nonzeros",
        "5e4",
        "--threads",
        "1",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    report = json.loads(ran.stdout)
    memory = report["figures"][0]
    assert 0.05 < memory["median"] < 4
    assert memory["met"] is True
    assert 0 < report["figures"][2]["median"] < 20
    assert 0 < report["figures"][3]["median"] < 5
    assert report["built"][0]["nonzeros"] >= 5e4
    assert 0 < report["built"][0]["edges"] <= report["built"][0]["nonzeros"]


def test_no_catalogue_file_of_nothing(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is published"):
        write_catalog_file(storage, str(tmp_path / "c.duckdb"), DuckDb())
    assert list(tmp_path.glob("*.duckdb")) == []


def test_run_info_says_what_was_run_and_no_secret(storage: Storage) -> None:
    urls = ["zip://in.jsonl::https://user:pa@ss@host/x.zip?X-Amz-Signature=abc", "s3://bucket/a?.jsonl"]
    config = make_config(storage, corpus={"urls": urls}, activations={"max_documents": 3})
    shards = write_corpus(storage, cut_up(random_documents(14, 9), [4], 9))
    rows = rows_of(storage, build_corpus(config, storage, shards), "run_info")
    info = {row["key"]: row["value"] for row in rows}
    assert len(info) == len(rows)
    assert info["corpus_urls"] == "zip://in.jsonl::https://host/x.zip, s3://bucket/a?.jsonl"
    assert (info["documents"], info["rejects"], info["graph_documents"]) == ("9", "2", "3")
    assert (info["prepend_bos"], info["rarefaction_m"], info["context_size"]) == ("true", "5", "1024")


@pytest.mark.slow
def test_the_power_law_is_that_of_the_powerlaw_package() -> None:
    import powerlaw

    rng = np.random.default_rng(1)
    degrees = np.maximum(0, 60 / np.arange(1, 2_001) ** 0.7 * rng.lognormal(0, 0.3, 2_000) + 0.5).astype(int)
    theirs = powerlaw.Fit(degrees[degrees > 0], discrete=True, verbose=0)
    ours = fit_power_law(degrees)
    assert ours is not None
    assert (ours.alpha, ours.xmin, ours.ks) == pytest.approx((theirs.alpha, theirs.xmin, theirs.D), rel=1e-9)
    assert fit_power_law(rng.permutation(degrees)) == ours


def test_the_power_law_is_found_among_many_degrees() -> None:
    uniform = np.random.default_rng(2).random(20_000)
    degrees = np.floor(9.5 * (1 - uniform) ** (-1 / 1.3) + 0.5).astype(int)
    fit = fit_power_law(degrees, max_candidates=20)
    assert fit is not None
    assert fit.alpha == pytest.approx(2.3, abs=0.05)
    assert fit.ks < 0.02


@pytest.mark.parametrize("degrees", [[], [0, 0], [7], [1, 1, 2, 2, 3]])
def test_no_power_law_of_too_few_degrees(degrees: list[int]) -> None:
    assert fit_power_law(degrees) is None
