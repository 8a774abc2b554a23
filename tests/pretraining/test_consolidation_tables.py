"""The tables of a consolidation against pandas, Python sets and the slow bootstrap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from builders import Cut, make_dictionary, random_documents, run_of, write_corpus, write_features
from consolidation_run import (
    D_SAE,
    LAYER,
    PROMPTS,
    PUBLIC,
    SERIES,
    STEPS,
    UNIT,
    ConsolidationRun,
    built,
    consolidation_run,
    corpus_tables,
    function_tokens,
)

from infra.catalog import Catalog, read_catalog
from infra.duck import connect, create_views, open_duckdb
from infra.storage import Storage
from schemas.config import Config, DuckDb
from schemas.pretraining.section import losses_of
from schemas.tables import TABLES
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.catalog_file import write_catalog_file
from tasks.engine.run import Run
from tasks.engine.tables import Tables, are_published, candidate, publish, write_table
from tasks.graph.features import FEATURES
from tasks.graph.tables import GRAPH
from tasks.pretraining.loss_intervals import BUCKETS, bucket_intervals
from tasks.pretraining.tables import CONSOLIDATION
from tasks.report.bootstrap import bootstrap, resampled_sums

MADE = (
    "checkpoints",
    "training_losses",
    "token_losses",
    "document_losses",
    "loss_buckets",
    "learned_features",
    "checkpoint_degree",
    "checkpoint_graph",
    "generations",
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


@dataclass(frozen=True)
class Made:
    """A run and its tables, only to be read."""

    storage: Storage
    run: ConsolidationRun
    catalog: Catalog


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    storage = Storage(str(tmp_path_factory.mktemp("made")))
    run = consolidation_run(storage)
    catalog = built(run.write(storage))
    publish(storage, catalog)
    return Made(storage, run, catalog)


def frame_of(storage: Storage, catalog: Catalog, query: str) -> pd.DataFrame:
    with open_duckdb(storage) as connection:
        create_views(connection, storage, catalog)
        frame: pd.DataFrame = connection.sql(query).df()
    return frame


def all_losses(run: ConsolidationRun) -> pd.DataFrame:
    """Every loss with its model, step, global document and bucket."""
    function, frames = function_tokens(run), []
    for loss in run.losses:
        place = [shard.folder for shard in run.shards.shards].index(loss.part.shard.folder)
        key = (loss.checkpoint.series, loss.checkpoint.step)
        frame = run.token_losses[*key, place]
        kinds = [
            frame[column].map(lambda token: "function" if token in function else "content")
            for column in ("current_token_id", "token_id")
        ]
        frames.append(
            frame.assign(
                model=key[0],
                step=key[1],
                doc_id=frame.doc + loss.part.shard.doc_offset,
                bucket=kinds[0] + "→" + kinds[1],
            )
        )
    return pd.concat(frames)


def test_buckets_and_shares_are_what_pandas_gives(made: Made) -> None:
    storage, run, catalog = made.storage, made.run, made.catalog
    losses = all_losses(run)
    assert losses.doc_id.nunique() > len(run.parts[0].documents) + len(run.parts[1].documents)
    units = np.rint(losses.loss.astype(float) * UNIT).astype(np.int64)
    grouped = losses.assign(units=units).groupby(["model", "step", "doc_id", "bucket"])
    expected = grouped.agg(n=("units", "size"), units=("units", "sum")).reset_index()
    found = frame_of(storage, catalog, "FROM document_losses ORDER BY model, step, doc_id, bucket")
    expected = expected.sort_values(["model", "step", "doc_id", "bucket"]).reset_index(drop=True)
    assert found[["model", "step", "doc_id", "bucket", "n"]].equals(
        expected[["model", "step", "doc_id", "bucket", "n"]]
    )
    assert (found.loss == expected.units / UNIT).all()

    buckets = storage.read_parquet(catalog.tables["loss_buckets"]).to_pandas()
    assert list(buckets.bucket) == list(BUCKETS) * 4
    assert list(zip(buckets.model, buckets.step, strict=True))[::4] == [
        (model, step) for model in sorted(SERIES) for step in STEPS
    ]
    for row in buckets.itertuples():
        own = losses[(losses.model == row.model) & (losses.step == row.step)]
        mine = own[own.bucket == row.bucket].loss.astype(float)
        assert row.n == len(mine) > 0
        assert row.mean_loss == pytest.approx(mine.mean(), rel=1e-6)
        assert row.loss_share == pytest.approx(mine.sum() / own.loss.astype(float).sum(), rel=1e-6)
        assert row.mean_low < row.mean_loss < row.mean_high
        assert row.share_low < row.loss_share < row.share_high
    for name in MADE:
        assert name in {*catalog.tables, *catalog.sharded}


def test_intervals_are_those_of_the_slow_bootstrap(made: Made) -> None:
    storage, run, catalog = made.storage, made.run, made.catalog
    buckets = storage.read_parquet(catalog.tables["loss_buckets"]).to_pandas()
    losses = all_losses(run)
    documents = sorted(losses.doc_id.unique())
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(documents), len(documents)) for _ in range(losses_of(run.config).resamples)]
    for (model, step), own in losses.groupby(["model", "step"]):
        by_document = {
            document: {bucket: rows.loss.astype(float).tolist() for bucket, rows in group.groupby("bucket")}
            for document, group in own.groupby("doc_id")
        }
        means: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
        shares: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
        for draw in draws:
            drawn: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
            for index in draw:
                for bucket, values in by_document[documents[index]].items():
                    drawn[bucket] += values
            total = sum(map(sum, drawn.values()))
            for bucket, values in drawn.items():
                shares[bucket].append(sum(values) / total)
                if values:
                    means[bucket].append(sum(values) / len(values))
        for row in buckets[(buckets.model == model) & (buckets.step == step)].itertuples():
            expected = [*np.percentile(means[row.bucket], (2.5, 97.5))]
            expected += [*np.percentile(shares[row.bucket], (2.5, 97.5))]
            found = [row.mean_low, row.mean_high, row.share_low, row.share_high]
            assert found == pytest.approx(expected, rel=1e-7)


def test_resamples_do_not_depend_on_memory_threads_or_what_else_is_summed() -> None:
    rng = np.random.default_rng(1)
    counts = np.column_stack(
        [rng.integers(0, 99, 301), rng.exponential(1e5, 301), rng.exponential(1e-5, 301)]
    )
    whole = resampled_sums(counts, 50)
    for weights_at_once in (1, 302, 3_000):
        assert (resampled_sums(counts, 50, weights_at_once=weights_at_once) == whole).all()
    assert (resampled_sums(counts[:, ::-1], 50) == whole[:, ::-1]).all()
    assert (resampled_sums(counts, 20) == whole[:20]).all()
    assert (resampled_sums(counts, 50, seed=1) != whole).any()
    # the numbers of a resample: as many documents as there are
    assert (resampled_sums(np.ones((301, 1)), 9) == 301).all()
    order = rng.permutation(301)
    drawn = np.random.default_rng(0).integers(0, 301, (50, 301))
    slow = np.array([[sum(counts[i, column] for i in sorted(row)) for column in range(3)] for row in drawn])
    assert whole == pytest.approx(slow, rel=1e-9)
    assert (whole[:, 0] == slow[:, 0]).all()
    # exact sums: any order of the documents in a resample gives the same bits
    weights = np.stack([np.bincount(row, minlength=301) for row in drawn]).astype(float)
    quantum = 2.0**-26
    exact = np.rint(counts[:, 1:2] / quantum) * quantum
    assert (weights @ exact == weights[:, order] @ exact[order]).all()


def test_a_difference_has_the_interval_of_paired_resamples() -> None:
    rng = np.random.default_rng(2)
    hard = rng.exponential(5, 80)
    counts = np.column_stack([hard, hard + 0.1 + rng.normal(0, 0.01, 80), np.ones(80)])

    def means_and_difference(sums: Any) -> Any:
        first, second = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
        return np.column_stack([first, second, second - first])

    (low, high), _, (below, above) = bootstrap(counts, means_and_difference, 500)
    assert high - low > 1
    assert 0.09 < below < 0.1 < above < 0.11


def test_too_few_documents_have_no_interval(storage: Storage) -> None:
    losses = pa.table(
        {
            "doc_id": pa.array([4, 4, 9], pa.int64()),
            "bucket": [BUCKETS[0], BUCKETS[1], BUCKETS[0]],
            "n": [3, 1, 2],
            "loss": [3.0, 7.0, 4.0],
        }
    )
    assert bucket_intervals(losses.slice(0, 2), 99).drop(["bucket"]).to_pylist() == [
        dict.fromkeys(("mean_low", "mean_high", "share_low", "share_high"))
    ] * len(BUCKETS)
    first, second, third, fourth = bucket_intervals(losses, 999).to_pylist()
    assert (first["mean_low"], first["mean_high"]) == (1.0, 2.0)
    assert (second["mean_low"], second["mean_high"]) == (None, None)
    assert (second["share_low"], second["share_high"]) == (0.0, 0.7)
    assert third == {**fourth, "bucket": BUCKETS[2]}
    assert (third["mean_low"], third["share_low"], third["share_high"]) == (None, 0.0, 0.0)
    assert bucket_intervals(losses.slice(0, 0), 9).num_rows == len(BUCKETS)
    nothing = bootstrap(np.zeros((0, 2)), lambda sums: sums, 9)
    assert nothing.shape == (2, 2)
    assert np.isnan(nothing).all()


def test_a_checkpoint_without_a_prediction_of_a_bucket_has_the_row(storage: Storage) -> None:
    checkpoints = pa.table({"model": ["m", "m"], "step": pa.array([1, 2], pa.int64())})
    losses = pa.table(
        {
            "model": ["m"],
            "step": pa.array([1], pa.int64()),
            "doc_id": pa.array([0], pa.int64()),
            "bucket": [BUCKETS[2]],
            "n": pa.array([4], pa.int64()),
            "loss": [2.0],
        }
    )
    schema = {"model": pa.string(), "step": pa.int64(), "bucket": pa.string()}
    ends = dict.fromkeys(("mean_low", "mean_high", "share_low", "share_high"), pa.float64())
    inputs = {
        "checkpoints": checkpoints,
        "document_losses": losses,
        "intervals": pa.schema([*(schema | ends).items()]).empty_table(),
    }
    write_table(DuckDb(), storage, "loss_buckets", "b.parquet", Catalog(), inputs)
    found = storage.read_parquet("b.parquet")
    assert found.schema.names == TABLES["loss_buckets"].names
    rows = [tuple(row.values())[1:6] for row in found.to_pylist()]
    assert rows[:4] == [
        (1, bucket, 4 if place == 2 else 0, 0.5 if place == 2 else None, 1.0 if place == 2 else 0.0)
        for place, bucket in enumerate(BUCKETS)
    ]
    assert rows[4:] == [(2, bucket, 0, None, None) for bucket in BUCKETS]


@pytest.mark.slow
def test_sums_by_document_give_the_tables_of_single_losses_to_the_bit(tmp_path: Path) -> None:
    found = []
    for keep in (True, False):
        storage = Storage(str(tmp_path / str(keep)))
        run = consolidation_run(storage, losses={"keep_tokens": keep, "resamples": 150})
        catalog = built(run.write(storage))
        assert ("token_losses" in catalog.sharded) == keep
        assert not [name for name in catalog.sharded if name.startswith("shard_")]
        with open_duckdb(storage) as connection:
            create_views(connection, storage, catalog)
            assert (
                "token_losses" in {row[0] for row in connection.execute("SHOW TABLES").fetchall()}
            ) == keep
        files = [file.name for file in catalog.sharded["document_losses"]]
        found.append([storage.read_parquet(name) for name in (*files, catalog.tables["loss_buckets"])])
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_token_losses_stand_where_their_documents_do(made: Made) -> None:
    storage, run, catalog = made.storage, made.run, made.catalog
    found = frame_of(storage, catalog, "FROM token_losses ORDER BY model, step, doc_id, position")
    expected = all_losses(run).sort_values(["model", "step", "doc_id", "position"]).reset_index(drop=True)
    assert len(found) == len(expected)
    for column in TABLES["token_losses"].names:
        assert (found[column] == expected[column]).all(), column
    tokens = frame_of(
        storage,
        catalog,
        "SELECT count(*) FROM token_losses AS l JOIN occurrences AS o USING (doc_id, position) "
        "WHERE l.token_id = o.token_id",
    )
    assert tokens.iloc[0, 0] == len(expected)


def test_degrees_and_graphs_are_what_sets_give(made: Made) -> None:
    storage, run, catalog = made.storage, made.run, made.catalog
    function = function_tokens(run)
    ranks = storage.read_parquet(catalog.tables["tokens"], columns=["token_id", "rank"]).to_pylist()
    top10 = {row["token_id"] for row in ranks if row["rank"] <= 10}
    degrees = frame_of(storage, catalog, "FROM checkpoint_degree")
    graphs = frame_of(storage, catalog, "FROM checkpoint_graph").set_index(["model", "step"])
    assert len(graphs) == 4
    for grown in run.grown:
        key = (grown.checkpoint.series, grown.checkpoint.step)
        places = [0, 1, 0]
        edges = {
            (token, feature)
            for place in places
            for token, feature in run.features[*key, place]["edges"][["token_id", "feature_id"]].itertuples(
                index=False
            )
        }
        activations = sum(len(run.features[*key, place]["activations"]) for place in places)
        counts = (
            pd.concat([run.features[*key, place]["counts"] for place in places])
            .groupby("token_id")["count"]
            .sum()
        )
        mine = degrees[(degrees.model == key[0]) & (degrees.step == key[1])].set_index("token_id")
        assert mine["count"].sort_index().to_dict() == counts.sort_index().to_dict()
        for token, row in mine.iterrows():
            assert row.degree == len({feature for t, feature in edges if t == token})
            assert row.is_function == (token in function)
        everything = {feature for _, feature in edges}
        by = {
            "function": {feature for token, feature in edges if token in function},
            "content": {feature for token, feature in edges if token not in function},
            "top10": {feature for token, feature in edges if token in top10},
        }
        row = graphs.loc[key]
        assert (row.layer, row.dictionary_size, row.n_tokens) == (LAYER, D_SAE, counts.sum())
        assert (row.n_edges, row.activated_features) == (len(edges), len(everything))
        assert row.mean_l0 == pytest.approx(activations / counts.sum(), rel=1e-15)
        assert (row.function_features, row.content_features) == (len(by["function"]), len(by["content"]))
        assert 0 < len(by["function"]) < len(by["top10"]) < len(everything)
        for kind, features in by.items():
            assert row[f"{kind}_coverage"] == len(features) / len(everything)


def test_a_checkpoints_degrees_are_the_spines(made: Made) -> None:
    storage, run, catalog = made.storage, made.run, made.catalog
    grown = run.grown[2]
    given = {TOKENIZE: run.shards, DICTIONARIES: [grown.dictionary], FEATURES: grown.features}
    graph = GRAPH.build(run_of(run.config.model_copy(update={"consolidation": None}), storage, given))
    index = [file.model == "large" and file.step == 1 for file in catalog.sharded["checkpoint_degree"]].index(
        True
    )
    mine = storage.read_parquet(catalog.sharded["checkpoint_degree"][index].name)
    assert mine == storage.read_parquet(graph.tables["token_degree"])
    summary = storage.read_parquet(graph.tables["graph_summary"]).to_pylist()[0]
    row = storage.read_parquet(catalog.sharded["checkpoint_graph"][index].name).to_pylist()[0]
    shared = ("layer", "dictionary_size", "activated_features", "n_tokens", "n_edges", "mean_l0")
    assert {name: row[name] for name in shared} == {name: summary[name] for name in shared}


@pytest.mark.slow
def test_a_checkpoint_that_activates_nothing_has_its_row(storage: Storage) -> None:
    run = consolidation_run(storage)
    for place in (0, 1):
        frames = run.features["small", 1, place]
        for name in ("activations", "edges"):
            frames[name] = frames[name].iloc[:0]
    graphs = frame_of(
        storage, built(run.write(storage)), "FROM checkpoint_graph WHERE model = 'small' AND step = 1"
    )
    (row,) = graphs.to_dict("records")
    assert (row["activated_features"], row["n_edges"], row["mean_l0"]) == (0, 0, 0.0)
    assert pd.isna(row["function_coverage"])


def test_small_files_are_gathered_with_model_and_step(made: Made) -> None:
    storage, catalog = made.storage, made.catalog
    generations = storage.read_parquet(catalog.tables["generations"]).to_pylist()
    # as generated: checkpoints in order, prompts as configured
    assert [(row["model"], row["step"], row["prompt"], row["mode"]) for row in generations] == [
        (model, step, prompt, mode)
        for model in SERIES
        for step in STEPS
        for prompt in PROMPTS
        for mode in ("greedy", "sampled")
    ]
    assert generations[1]["seed"] == 3
    learned = storage.read_parquet(catalog.tables["learned_features"]).to_pylist()
    assert [(row["model"], row["step"], row["learned_features"]) for row in learned] == [
        ("small", 1, 10),
        ("small", 10, 11),
        ("large", 1, 12),
        ("large", 10, 13),
    ]
    training = storage.read_parquet(catalog.tables["training_losses"]).to_pylist()
    assert [(row["model"], row["step"]) for row in training] == [(m, s) for m in SERIES for s in (1, 2, 3)]
    checkpoints = storage.read_parquet(catalog.tables["checkpoints"]).to_pylist()
    assert checkpoints[1] == {
        "model": "small",
        "step": 10,
        "source": "storage:checkpoints/small-10",
        "tokens": 640,
        "parameters": 1000,
    }


def test_tables_have_the_contracts_columns(made: Made) -> None:
    storage, catalog = made.storage, made.catalog
    with open_duckdb(storage) as connection:
        create_views(connection, storage, catalog)
        for table in MADE:
            schema = connection.sql(f"FROM {table}").to_arrow_table().schema
            assert [(f.name, f.type) for f in schema] == [(f.name, f.type) for f in TABLES[table]], table


@pytest.mark.slow
def test_only_what_was_asked_for_has_tables(storage: Storage) -> None:
    run = consolidation_run(storage, consolidation=PUBLIC)
    run.write(storage)
    catalog = built(run.on(storage, growth=[], generations=[]))
    assert {*catalog.tables} == {"tokens", "run_info", "checkpoints", "loss_buckets"}
    assert {*catalog.sharded} == {"documents", "rejects", "occurrences", "token_losses", "document_losses"}


def made_files(storage: Storage) -> dict[str, int]:
    tables = Path(storage.path, "tables")
    return {str(path.relative_to(tables)): path.stat().st_mtime_ns for path in tables.rglob("*.parquet")}


@pytest.mark.slow
def test_one_more_checkpoint_makes_its_own_files(storage: Storage) -> None:
    run = consolidation_run(storage)
    run.write(storage)
    first = built(run.on(storage, first=3))
    before = made_files(storage)
    second = built(run.on(storage))
    after = made_files(storage)
    assert {name: after[name] for name in before} == before
    new = sorted(
        name.split("-")[0] + "/" + name.split("/")[1].split("-")[0] for name in set(after) - set(before)
    )
    assert new == [
        "checkpoint_graph/checkpoint_degree.parquet",
        "checkpoint_graph/checkpoint_graph.parquet",
        *(
            f"consolidation/{table}.parquet"
            for table in ("checkpoints", "generations", "learned_features", "loss_buckets", "training_losses")
        ),
        "document_losses/document_losses.parquet",
        "edges/edges",
    ]
    for table in ("document_losses", "checkpoint_degree", "checkpoint_graph"):
        assert second.sharded[table][:3] == first.sharded[table]
        assert second.sharded[table][3] not in first.sharded[table]
    assert built(run.on(storage)) == second
    assert made_files(storage) == after


@pytest.mark.slow
def test_equal_checkpoints_of_two_series_count_in_both(storage: Storage) -> None:
    run = consolidation_run(storage)
    run.write(storage)
    folders = {
        (loss.checkpoint.step, loss.part): loss.folder
        for loss in run.stored_losses
        if loss.checkpoint.series == "small"
    }
    losses = [replace(loss, folder=folders[loss.checkpoint.step, loss.part]) for loss in run.stored_losses]
    catalog = built(run.on(storage, losses=losses))
    for table, value in (
        ("loss_buckets", "mean_loss"),
        ("document_losses", "loss"),
        ("token_losses", "loss"),
    ):
        found = frame_of(
            storage,
            catalog,
            f"SELECT model, step, count(*) AS n, sum({value}::DOUBLE) AS s FROM {table} GROUP BY ALL",
        )
        values = found.pivot(index="step", columns="model")
        assert (values["n"]["small"] == values["n"]["large"]).all()
        assert values["s"]["small"].tolist() == pytest.approx(values["s"]["large"].tolist())


@pytest.mark.slow
def test_the_group_joins_what_is_published_and_what_was_just_made(storage: Storage) -> None:
    run = consolidation_run(storage)
    whole, grown = run.write(storage), run.grown[0]

    def corpus_and_graph(given: dict[Any, Any]) -> list[Tables]:
        return [group.build(run_of(run.config, storage, given)) for group in (corpus_tables(), GRAPH)]

    spine = {TOKENIZE: run.shards, DICTIONARIES: [grown.dictionary], FEATURES: grown.features}
    both = candidate(storage, [*corpus_and_graph(spine), CONSOLIDATION.build(whole)])
    assert set(both.lineage) == {"corpus", "graph", "consolidation"}
    assert {"coverage", "loss_buckets"} <= set(both.tables)
    assert read_catalog(storage) == Catalog(), "building publishes nothing"
    publish(storage, both)
    # What is published stays, whichever group is made again.
    again = candidate(storage, [corpus_tables().build(whole)])
    assert set(again.lineage) == {"corpus", "graph", "consolidation"}
    assert set(built(whole).tables) | {"expectations"} == set(read_catalog(storage).tables)

    # Another corpus takes both with it.
    other = write_corpus(storage, [Cut(source="a", documents=random_documents(5, 9), in_graph=9)])
    alone = candidate(storage, [corpus_tables().build(run_of(run.config, storage, {TOKENIZE: other}))])
    assert set(alone.lineage) == {"corpus"}
    cuts = [Cut(source="a", documents=random_documents(5, 9, layers=(LAYER,)), in_graph=9)]
    shards = write_corpus(storage, cuts)
    dictionary = make_dictionary(LAYER)
    made = write_features(storage, cuts, shards, [dictionary])
    catalog = candidate(
        storage, corpus_and_graph({TOKENIZE: shards, DICTIONARIES: [dictionary], FEATURES: made})
    )
    assert set(catalog.lineage) == {"corpus", "graph"}
    assert not {*MADE} & {*catalog.tables, *catalog.sharded}


@pytest.mark.slow
def test_tables_are_found_where_they_are_current(storage: Storage) -> None:
    run = consolidation_run(storage)
    whole = run.write(storage)

    def are_found(of: Run) -> bool:
        return are_published(of, [corpus_tables(), CONSOLIDATION])

    publish(storage, built(whole))
    assert are_found(whole)
    assert not are_found(run.on(storage, first=3))
    assert not are_found(run.on(storage, generations=[]))
    fewer = consolidation_run(storage, losses={"resamples": 199})
    assert not are_found(fewer.on(storage))
    storage.delete(read_catalog(storage).sharded["checkpoint_degree"][2].name)
    assert not are_found(whole)
    publish(storage, built(whole))
    assert are_found(whole)


def test_the_catalogue_file_has_the_tables(made: Made, tmp_path: Path) -> None:
    storage = made.storage
    target = tmp_path / "c.duckdb"
    write_catalog_file(storage, str(target), DuckDb())
    with duckdb.connect(str(target), read_only=True) as theirs, connect(storage) as ours:
        for table in MADE:
            found = theirs.execute(f"FROM {table} ORDER BY ALL").fetchall()
            assert found == ours.execute(f"FROM {table} ORDER BY ALL").fetchall()
            assert found, table
        copied = {
            row[0]
            for row in theirs.execute(
                "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'data'"
            ).fetchall()
        }
    assert {"document_losses", "checkpoint_degree", "_shards_token_losses"} <= copied
    assert not {"token_losses", "_shards_document_losses"} & copied


@pytest.mark.slow
def test_run_info_names_the_series(storage: Storage) -> None:
    run = consolidation_run(storage, consolidation=PUBLIC)

    def info_of(config: Config) -> dict[str, str]:
        made = corpus_tables().build(run_of(config, storage, {TOKENIZE: run.shards}))
        rows = storage.read_parquet(made.tables["run_info"]).to_pylist()
        return {row["key"]: row["value"] for row in rows}

    info = info_of(run.config)
    assert info["series"] == "small: /small; large: /large"
    assert info["heldout_share"] == "0.5"
    assert int(info["heldout_documents"]) == sum(len(part.documents) for part in run.parts)
    assert int(info["heldout_tokens"]) == sum(part.n_tokens for part in run.parts)
    assert info["loss_resamples"] == "200"
    assert "training_tokens" not in info
    trained = run.config.model_dump()
    trained["model"] = {}
    trained["consolidation"] |= {
        "series": [{"name": "tiny", "shape": {"hidden_size": 64, "layers": 3, "heads": 2}}],
        "train": {"tokens": 5000, "vocabulary_size": 512},
    }
    info = info_of(type(run.config).model_validate(trained))
    assert (info["model"], info["training_tokens"]) == ("tiny", "5000")
    assert info["series"] == "tiny: 3 blocks of width 64, trained here"
    assert info["tokenizer"] == "byte-level BPE of 512 tokens, trained on the corpus"
