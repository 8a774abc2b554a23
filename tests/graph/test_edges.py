"""A shard's edges against exact fractions, and a layer's merged edges against its activations, added up at once."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from math import ldexp
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.catalog import Catalog
from infra.duck import open_duckdb
from infra.storage import Storage
from schemas.config import Dask, DuckDb
from schemas.work import FeatureShard, GraphShard, TokenShard
from tasks.graph import edges
from tasks.graph.edges import edge_files, ensure_edges
from tasks.graph.features import sum_edges, write_rows
from tasks.graph.tables import graph_inputs

LAYER = 3

TWIN = """
    SELECT {layer}::INTEGER AS layer, token_id, feature_id, count(*)::BIGINT AS n, max(activation) AS max_activation,
        sum((activation::DOUBLE * 4294967296)::BIGINT)::DOUBLE / 4294967296 AS sum_activation
    FROM activations GROUP BY token_id, feature_id ORDER BY token_id, feature_id
"""
"""The slow way: every activation of the layer, as long as no edge adds up to 2^30."""

ROWS = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 2**17) | st.integers(0, 2), st.floats(2.0**-126, 2.0**127, width=32)
    ),
    max_size=40,
)


def columns(rows: list[tuple[int, int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    token, feature, value = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(token, np.int32), np.array(feature, np.int32), np.array(value, np.float32)


@given(ROWS)
@pytest.mark.slow
def test_a_shards_edges_are_what_fractions_give(rows: list[tuple[int, int, float]]) -> None:
    found, scale = sum_edges(*columns(rows))
    values: dict[tuple[int, int], list[float]] = defaultdict(list)
    for token, feature, value in rows:
        values[token, feature].append(value)
    largest = max((sum(map(Fraction, of)) for of in values.values()), default=Fraction(1))
    # As fine as 63 bits let it be; a sum just below a power of two may be rounded up to it.
    assert scale == 32 or largest * Fraction(2) ** (scale + 1) * (1 + Fraction(1, 2**50)) >= 2**61
    assert largest * Fraction(2) ** scale < 2**62
    assert [tuple(row.values()) for row in found.to_pylist()] == [
        (
            *pair,
            len(of),
            max(of),
            sum(round(Fraction(value) * Fraction(2) ** scale) for value in of) if len(of) > 1 else None,
            scale,
        )
        for pair, of in sorted(values.items())
    ]


def write_shards(
    storage: Storage, shards: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> list[FeatureShard]:
    """Feature shards of a layer whose activations are given as tokens, features and values."""
    made = []
    for index, (token, feature, value) in enumerate(shards):
        zeros = np.zeros(len(token), np.int32)
        names = ["doc", "position", "token_id", "feature_id", "activation"]
        found, scale = sum_edges(token, feature, value)
        write_rows(storage, f"f{index}", pa.table([zeros, zeros, token, feature, value], names=names), found)
        shard = TokenShard(
            folder=f"t{index}", source="a", doc_offset=index, n_documents=1, n_tokens=9, n_rejects=0
        )
        part = GraphShard(shard=shard, n_documents=1, n_tokens=9)
        made.append(
            FeatureShard(
                layer=LAYER,
                folder=f"f{index}",
                part=part,
                n_activations=len(token),
                n_edges=found.num_rows,
                scale=scale,
            )
        )
    return made


def merged(storage: Storage, features: list[FeatureShard], threads: int = 1, scheduler: str = "") -> pa.Table:
    """The layer's edges, in the order of its files' rows."""
    inputs = Catalog(sharded={"shard_edges": graph_inputs(features)["shard_edges"]})
    dask = Dask(scheduler=scheduler)
    ensure_edges(DuckDb(threads=threads), storage, LAYER, features, inputs, dask)
    files = edge_files(storage, features)
    assert files is not None
    return pa.concat_tables([storage.read_parquet(file.name) for file in files])


@pytest.mark.parametrize(("threads", "passes"), [(1, 1), (3, 1), (2, 7)])
def test_a_layers_edges_are_bit_equal_to_its_activations_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, passes: int
) -> None:
    storage = Storage(str(tmp_path))
    rng = np.random.default_rng(0)
    shards = []
    for n in (40_000, 0, 25_000, 1):
        token = rng.zipf(1.3, n) % 500
        feature = rng.zipf(1.2, n) % 3_000
        # From far below a unit, of which many add up to nothing, to massive activations.
        value = np.ldexp(1 + rng.random(n), rng.integers(-45, 14, n))
        shards.append((token.astype(np.int32), feature.astype(np.int32), value.astype(np.float32)))
    features = write_shards(storage, shards)
    assert {feature.scale for feature in features} == {32}
    monkeypatch.setattr(
        edges, "memory_bytes", lambda _: edges.BYTES_PER_ROW * sum(f.n_edges for f in features) // passes
    )
    found = merged(storage, features, threads)
    assert (len(edge_files(storage, features) or ()) > 1) == (passes > 1)
    token, feature, value = (np.concatenate(of) for of in zip(*shards, strict=True))
    with open_duckdb(storage) as connection:
        connection.register(
            "activations", pa.table({"token_id": token, "feature_id": feature, "activation": value})
        )
        expected = connection.sql(TWIN.format(layer=LAYER)).to_arrow_table()
    assert found.cast(expected.schema) == expected
    assert pa.compute.max(expected["n"]).as_py() > 100


@pytest.mark.cluster
def test_workers_make_the_same_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    rng, n = np.random.default_rng(1), 20_000
    shards = [
        (rng.zipf(1.3, n) % 500, rng.integers(0, 3_000, n), 1 + rng.random(n).astype(np.float32))
        for _ in range(3)
    ]
    shards = [(token.astype(np.int32), feature.astype(np.int32), value) for token, feature, value in shards]
    here, there = Storage(str(tmp_path / "here")), Storage(str(tmp_path / "there"))
    monkeypatch.setattr(edges, "ROWS_PER_PASS", 9_000)
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        found = merged(there, write_shards(there, shards), scheduler=cluster.scheduler_address)
    expected = merged(here, write_shards(here, shards))
    assert sorted(storage_names(there)) == sorted(storage_names(here))
    assert len(storage_names(there)) > 3
    assert found == expected


def storage_names(storage: Storage) -> list[str]:
    """The files of the table."""
    return [name for name in storage.sizes("tables") if name.endswith(".parquet")]


@settings(max_examples=20, deadline=None)
@given(shards=st.lists(ROWS, min_size=1, max_size=4), order=st.randoms())
@pytest.mark.slow
def test_shards_of_any_size_add_up_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[int, int, float]]], order: object
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("root")))
    features = write_shards(storage, [columns(rows) for rows in shards])
    found = merged(storage, features)
    order.shuffle(features)  # type: ignore[attr-defined]  # random.Random
    other = Storage(str(Path(storage.path) / "other"))
    again = merged(other, write_shards(other, [columns(rows) for rows in reversed(shards)]))
    assert found == again
    unit = ldexp(1.0, -min(feature.scale for feature in features))
    values: dict[tuple[int, int], list[Fraction]] = defaultdict(list)
    for token, feature, value in (row for rows in shards for row in rows):
        values[token, feature].append(Fraction(float(np.float32(value))))
    assert [(row["token_id"], row["feature_id"], row["n"]) for row in found.to_pylist()] == [
        (*pair, len(of)) for pair, of in sorted(values.items())
    ]
    for row, (_, of) in zip(found.to_pylist(), sorted(values.items()), strict=True):
        assert row["max_activation"] == max(of)
        # Each activation is rounded, and what a finer shard adds up to is cut off.
        assert abs(row["sum_activation"] - float(sum(of))) <= unit * (len(of) + len(shards)) + 2**-52 * float(
            sum(of)
        )
