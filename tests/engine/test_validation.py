"""Good data passes every expectation; each expectation catches the rows planted against it, and names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from builders import (
    Cut,
    build,
    commit_found,
    make_config,
    make_dictionary,
    random_documents,
    run_of,
    write_corpus,
    write_features,
)
from s3 import S3Root
from small_run import SmallRun, resize, small_run

from infra.catalog import Catalog, read_catalog
from infra.manifest import Manifest
from infra.storage import Storage
from schemas.errors import ExpectationError, StorageError
from schemas.expectations import SUITES
from schemas.experiments import experiment_rooms
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine import checks
from tasks.engine.checks import check_tables, expectations_table
from tasks.engine.data_docs import Finding
from tasks.engine.tables import publish
from tasks.graph.features import FEATURES
from tasks.graph.tables import GRAPH
from tasks.stages import stage_named

CHECKED: tuple[str, ...] = ("tokenize", "dictionaries", "features", "tables")
ASKED = {
    stage: [
        entry
        for entry in SUITES[stage]
        if not any(
            entry in (*room.suites.get(stage, ()), *room.table_expectations) for room in experiment_rooms()
        )
    ]
    for stage in CHECKED
}
"""The spine's; what experiments ask is planted among their own tests."""


def check(stage: str, run: SmallRun, storage: Storage, catalog: Catalog) -> None:
    if stage == "tables":
        check_tables(run.config, storage, catalog)
    else:
        checks.check(run.given(storage), stage_named(stage))


def set_in(frame: pd.DataFrame, row: int, **values: Any) -> None:
    for column, value in values.items():
        position = frame.columns.get_loc(column)
        assert isinstance(position, int)
        frame.iloc[row, position] = value


def again(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its first row once more."""
    return pd.concat([frame, frame.iloc[:1]])


# ---- one plant an expectation: (what is done to the run, text of a row that the message must show)
Plant = tuple[Callable[[SmallRun], None], str]


def frame_plant(name: str, key: Any, text: str, row: int = 0, **values: Any) -> Plant:
    return lambda run: set_in(getattr(run, name)[key], row, **values), text


def twice(name: str, key: Any, text: str) -> Plant:
    def plant(run: SmallRun) -> None:
        frames = getattr(run, name)
        frames[key] = again(frames[key])

    return plant, text


def change(**values: Any) -> Callable[[SmallRun], None]:
    def plant(run: SmallRun) -> None:
        run.dictionaries[0] = dataclasses.replace(run.dictionaries[0], **values)

    return plant


def quality(**values: float) -> Callable[[SmallRun], None]:
    def plant(run: SmallRun) -> None:
        run.dictionaries[0] = dataclasses.replace(
            run.dictionaries[0], quality={**(run.dictionaries[0].quality or {}), **values}
        )

    return plant


def feature(place: int, **values: Any) -> Callable[[SmallRun], None]:
    def plant(run: SmallRun) -> None:
        run.features[place] = dataclasses.replace(run.features[place], **values)

    return plant


def no_layer_1(run: SmallRun) -> None:
    run.dictionaries.pop()


def smaller_part(run: SmallRun) -> None:
    part = dataclasses.replace(run.features[0].part, n_tokens=run.features[0].part.n_tokens - 1)
    run.features[0] = dataclasses.replace(run.features[0], part=part)


def drop(name: str, key: Any) -> Callable[[SmallRun], None]:
    def plant(run: SmallRun) -> None:
        frames = getattr(run, name)
        frames[key] = frames[key].iloc[1:]

    return plant


PLANTS: dict[str, dict[str, Plant]] = {
    "tokenize": {
        "shards follow each other": (
            lambda run: resize(run, 1, doc_offset=7),
            "doc_offset: 7, documents_before: 3",
        ),
        "documents + rejects = records read": (
            lambda run: run.stats[0].update(n_records=5),
            "n_records: 5, n_documents: 3, n_rejects: 1",
        ),
        "sum(documents.n_tokens) = sum(tokens.count)": (
            lambda run: resize(run, 0, n_tokens=15),
            "n_tokens: 15",
        ),
        "document keys are unique": twice("documents", 0, "doc: 0, rows: 2"),
        "document numbers are in range": frame_plant("documents", 0, "doc: 3", row=2, doc=3),
        "documents have text": frame_plant("documents", 1, "n_chars: 0", n_chars=0),
        "rejects say why": frame_plant("rejects", 0, "line: 99, reason: None, lost_bytes: 0", reason=None),
        "counted tokens are unique": twice("token_counts", 0, "token_id: 0, rows: 2"),
        "token counts are possible": frame_plant("token_counts", 0, "doc_count: 0", doc_count=0),
        "token ids are in the vocabulary": frame_plant(
            "token_counts", 1, "token_id: 400", row=-1, token_id=400
        ),
        "occurrence keys are unique": twice("occurrences", 0, "doc: 0, position: 0, rows: 2"),
        "positions are from 0": frame_plant("occurrences", 0, "position: -1", position=-1),
        "sum(tokens.count) = count(occurrences)": frame_plant("token_counts", 0, "told_count: 77", count=77),
        "documents.n_tokens = occurrences grouped": frame_plant(
            "documents", 1, "told_n_tokens: 13", n_tokens=13
        ),
    },
    "dictionaries": {
        "one dictionary a layer": (change(layer=1), "layer: 1, rows: 2"),
        "every layer has its dictionary": (no_layer_1, "layer: 1, dictionary: None"),
        "dictionaries are whole": (change(d_sae=0), "layer: 0, folder: dictionaries/0, d_sae: 0"),
        "figures are possible": (
            quality(explained_variance_all=float("nan")),
            "explained_variance_all: None",
        ),
        "trained dictionaries pass their gate": (quality(l0=3.0), "l0: 3.0, k: 2.0, max_l0_deviation: 0.1"),
    },
    "features": {
        "one shard a layer and place": (feature(1, layer=1), "layer: 1, doc_offset: 3, rows: 2"),
        "layers see the same documents": (smaller_part, "layer: 0"),
        "layers have dictionaries": (no_layer_1, "layer: 1"),
        "activations are all there": (feature(0, n_activations=1), "n_activations: 1"),
        "sum(counts) = tokens in the graph": (drop("counts", (0, 0)), "folder: features/0-0"),
        "activation keys are unique": twice("activations", (0, 0), "doc: 0, position: 0"),
        "activation documents are in range": frame_plant("activations", (0, 1), "doc: 2", row=-1, doc=2),
        "feature ids are in the dictionary": frame_plant(
            "activations", (1, 0), "feature_id: 8", feature_id=8
        ),
        "activations are positive": frame_plant("activations", (1, 1), "activation: 0.0", activation=0.0),
        "edge keys are unique": twice("edges", (0, 0), "rows: 2"),
        "edges are possible": frame_plant("edges", (0, 1), "n: 0", n=0),
        "edges.n = activations grouped": frame_plant("edges", (1, 0), "told_features: ", feature_id=7),
        "counted tokens are unique": twice("counts", (0, 0), "token_id: 0, rows: 2"),
        "edges are of counted tokens": (drop("counts", (1, 1)), "count: None"),
        "token ids are the corpus' own": frame_plant("counts", (1, 1), "token_id: 300", row=-1, token_id=300),
    },
    "tables": {
        "doc_id counts from 0": (lambda run: resize(run, 1, doc_offset=4), "last_doc_id: 5, documents: 5"),
        "doc_id is unique": (lambda run: resize(run, 1, doc_offset=2), "doc_id: 2, rows: 2"),
        "token_id is unique": twice("tables", "tokens", "token_id: 0, rows: 2"),
        "tokens are decoded and counted": frame_plant("tables", "tokens", "token: None", token=None),
        "sum(documents.n_tokens) = sum(tokens.count)": frame_plant(
            "tables", "tokens", "counted: 123", count=100
        ),
        "sum(tokens.count) = count(occurrences)": frame_plant("tables", "tokens", "told_count: 1", count=1),
        "occurrences stand in their documents": frame_plant("documents", 0, "doc_id: 0", n_tokens=4),
        "ranks follow counts": frame_plant("tables", "tokens", "rank: 2, expected_rank: 1", rank=2),
        "shares are counts over sums": frame_plant("tables", "tokens", "share: 0.9", share=0.9),
        "function tokens are the shortest prefix": frame_plant(
            "tables", "tokens", "is_function: True", row=-1, is_function=True
        ),
        "rejects say what and why": frame_plant("rejects", 0, "source: a.txt, line: 99, reason: ", reason=""),
        "edge keys are unique": twice("tables", "edges", "rows: 2"),
        "edges are possible": frame_plant("tables", "edges", "max_activation: 1000.0", max_activation=1000.0),
        "edges.n = activations grouped": frame_plant("tables", "edges", "token_id: 0", n=50),
        "feature_degree = activations grouped": frame_plant("tables", "feature_degree", "told_n: 500", n=500),
        "feature_degree = edges grouped": frame_plant(
            "tables", "feature_degree", "told_degree: 30", degree=30
        ),
        "feature_degree keys are unique": twice("tables", "feature_degree", "feature_id: 0, rows: 2"),
        "feature ids are in the dictionary": frame_plant(
            "tables", "feature_degree", "feature_id: 8, dictionary_size: 8", row=-1, feature_id=8
        ),
        "token_degree keys are unique": twice("tables", "token_degree", "token_id: 0, rows: 2"),
        "token_degree = edges grouped": frame_plant("tables", "token_degree", "told_degree: 99", degree=99),
        "token_degree is of counted tokens": frame_plant("tables", "token_degree", "count: 90", count=90),
        "edges count at most occurrences": frame_plant("tables", "token_degree", "count: 0", count=0),
        "degree sums are equal": frame_plant("tables", "token_degree", "layer: 0", degree=0),
        "rarefied degree is at most the degree": frame_plant(
            "tables", "token_degree", "rarefied_degree: 99.5", rarefied_degree=99.5
        ),
        "coverage keys are unique": twice("tables", "coverage", "layer: 0, rank: 1, rows: 2"),
        "coverage rises": frame_plant("tables", "coverage", "coverage: 0.01", row=1, coverage=0.01),
        "coverage ends at 1": frame_plant("tables", "coverage", "last_coverage: 0.5", row=-1, coverage=0.5),
        "coverage is features over sizes": frame_plant(
            "tables", "coverage", "dictionary_coverage: 0.123", dictionary_coverage=0.123
        ),
        "one summary a layer": twice("tables", "graph_summary", "layer: 0, rows: 2"),
        "graph_summary = edges grouped": frame_plant("tables", "graph_summary", "n_edges: 3", n_edges=3),
        "summaries are possible": frame_plant("tables", "graph_summary", "alpha: 0.5", alpha=0.5),
        "graph tokens are counted": frame_plant("tables", "graph_summary", "n_tokens: 2", n_tokens=2),
        "dictionaries are the layers'": frame_plant(
            "tables", "dictionaries", "dictionary_size: 17, summary_size: 16", dictionary_size=17
        ),
        "examples' places are unique": twice("tables", "feature_examples", "place: 1, rows: 2"),
        "examples are possible": frame_plant("tables", "feature_examples", "kind: decile 0", kind="decile 0"),
        "examples' places have no gaps": frame_plant("tables", "feature_examples", "last_place: 9", place=9),
        "examples are activations of edges": frame_plant(
            "tables", "feature_examples", "activation: 99.0", activation=99.0
        ),
        "the first example is the strongest": frame_plant(
            "tables", "feature_examples", "told_activation: 0.5", activation=0.5
        ),
        "histogram bins are unique": twice("tables", "feature_histogram", "bin: 1, rows: 2"),
        "histogram bins are possible": frame_plant("tables", "feature_histogram", "low: -1.0", low=-1.0),
        "histograms count every activation": frame_plant("tables", "feature_histogram", "n: 500", n=500),
        "feature_tokens = edges": frame_plant("tables", "feature_tokens", "layer: 0", n=500),
        "lifts are positive": frame_plant("tables", "feature_tokens", "lift: 0.0", lift=0.0),
        "token entropies are possible": frame_plant(
            "tables", "feature_tokens", "highest: 9.0", token_entropy=9.0
        ),
        "feature_summary = feature_tokens grouped": frame_plant(
            "tables", "feature_summary", "told_n: 500", n=500
        ),
        "the first token opens its feature most often": frame_plant(
            "tables", "feature_summary", "top_n: 500", top_n=500
        ),
        "logits' places are unique": twice(
            "tables", "feature_logits", "feature_id: 0, sign: promoted, place: 1"
        ),
        "logits are possible": frame_plant("tables", "feature_logits", "token: None", token=None),
        "every feature has its logits": frame_plant("tables", "feature_logits", "last_place: 2", place=2),
    },
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def test_every_expectation_has_its_plant() -> None:
    assert {stage: set(plants) for stage, plants in PLANTS.items()} == {
        stage: {expectation.name for expectation in suite} for stage, suite in ASKED.items()
    }


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in CHECKED for name in PLANTS[stage]])
def test_planted_rows_are_caught_and_named(
    stage: str, name: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked alone, which is quick; of good data all are asked.
    entry = next(entry for entry in SUITES[stage] if entry.name == name)
    monkeypatch.setitem(SUITES, stage, (entry,))
    run = small_run()
    plant, row = PLANTS[stage][name]
    plant(run)
    catalog = run.write(storage)
    with pytest.raises(ExpectationError) as raised:
        check(stage, run, storage, catalog)
    told = str(raised.value)
    assert told.startswith(f"[{stage}] the expectation {name!r} on the table {entry.table} ")
    assert row in told
    assert not raised.value.retryable


@pytest.mark.slow
def test_all_that_fail_are_told_together(storage: Storage) -> None:
    run = small_run()
    planted = ("edges are possible", "coverage ends at 1")
    for name in planted:
        PLANTS["tables"][name][0](run)
    with pytest.raises(ExpectationError) as raised:
        check("tables", run, storage, run.write(storage))
    for name in planted:
        (told,) = [part for part in str(raised.value).split("; and ") if repr(name) in part]
        assert PLANTS["tables"][name][1] in told


@pytest.mark.usefixtures("great_expectations")
@pytest.mark.slow
def test_good_data_passes_and_is_shown(storage: Storage) -> None:
    run = small_run()
    catalog = run.write(storage)
    for stage in CHECKED:
        check(stage, run, storage, catalog)
    table = expectations_table(storage).to_pylist()
    asked = {(row["stage"], row["expectation"]) for row in table}
    assert asked >= {(stage, entry.name) for stage in CHECKED for entry in ASKED[stage]}
    assert {(row["success"], row["observed"]) for row in table} == {(True, 0)}
    docs = [name for name in storage.sizes("data_docs") if "/validations/" in name]
    assert {name.split("/")[2] for name in docs} == set(CHECKED)
    index = storage.read_bytes("data_docs/index.html").decode()
    assert all(f"validations/{stage}/" in index for stage in CHECKED)
    assert (
        "No two documents have one key."
        in storage.read_bytes(next(name for name in docs if "/tables/" in name)).decode()
    )


@pytest.mark.slow
def test_what_was_passed_is_not_asked_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def judged(storage: Storage, stage: str, findings: list[Finding]) -> dict[str, bool]:
        asked.append(stage)
        return {finding.expectation.name: finding.count == 0 for finding in findings}

    monkeypatch.setattr(checks, "judge", judged)
    run = small_run()
    catalog = run.write(storage)
    for _ in range(2):
        for stage in CHECKED:
            check(stage, run, storage, catalog)
    assert asked == list(CHECKED)
    run.config = run.config.model_copy(
        update={"graph": run.config.graph.model_copy(update={"rarefaction_m": 2})}
    )
    with pytest.raises(ExpectationError, match="rarefied degree"):
        check("tables", run, storage, catalog)


@pytest.mark.slow
@pytest.mark.usefixtures("great_expectations")
def test_a_failure_is_shown_in_data_docs_and_mended_by_the_next_run(storage: Storage) -> None:
    run = small_run()
    set_in(run.tables["coverage"], -1, coverage=0.5)
    catalog = run.write(storage)
    with pytest.raises(ExpectationError, match="coverage ends at 1"):
        check("tables", run, storage, catalog)
    with pytest.raises(ExpectationError, match="coverage ends at 1"):
        check("tables", run, storage, catalog)
    failed = {row["expectation"] for row in expectations_table(storage).to_pylist() if not row["success"]}
    assert "coverage ends at 1" in failed
    pages = [name for name in storage.sizes("data_docs/validations/tables") if name.endswith(".html")]
    assert "last_coverage: 0.5" in storage.read_bytes(pages[0]).decode()
    run = small_run()
    check("tables", run, storage, run.write(storage))
    assert all(row["success"] for row in expectations_table(storage).to_pylist())
    mended = [name for name in storage.sizes("data_docs/validations/tables") if name.endswith(".html")]
    assert len(mended) == 1
    assert mended != pages


def test_a_missing_table_or_column_is_named(storage: Storage) -> None:
    run = small_run()
    catalog = run.write(storage)
    del catalog.tables["coverage"]
    tokens = storage.read_parquet("tables/tokens.parquet")
    storage.write_parquet("tables/tokens.parquet", tokens.drop_columns(["doc_share"]))
    with pytest.raises(ExpectationError) as raised:
        check("tables", run, storage, catalog)
    assert "{table: coverage, column: layer, type: INTEGER, found: None}" in str(raised.value)
    record = storage.read_json("validation/tables.json")
    assert record["results"][0]["observed"] == 9


def test_counting_only_asks_nothing_of_occurrences(storage: Storage) -> None:
    run = small_run()
    catalog = run.write(storage)
    for shard, stats in zip(run.shards.shards, run.stats, strict=True):
        storage.delete(f"{shard.folder}/occurrences.parquet")
        commit_found(storage, shard.folder, Manifest(stage="tokenize", inputs={}, stats=stats))
    corpus = run.config.corpus.model_copy(update={"keep_occurrences": False})
    run.config = run.config.model_copy(update={"corpus": corpus, "sae": []})
    check("tokenize", run, storage, catalog)
    asked = {row["expectation"] for row in expectations_table(storage).to_pylist()}
    assert "occurrence keys are unique" not in asked
    corpus_only = Catalog(
        tables={"tokens": catalog.tables["tokens"]},
        sharded={name: catalog.sharded[name] for name in ("documents", "rejects")},
        lineage={"corpus": "c"},
    )
    check("tables", run, storage, corpus_only)


@pytest.mark.slow
def test_a_layer_without_activations_is_good(storage: Storage) -> None:
    cut = Cut(source="a.jsonl", documents=random_documents(1, 4, layers=(1,)), in_graph=3)
    for document in cut.documents:
        document.active[4] = [{} for _ in document.tokens]
    config = make_config(storage)
    shards = write_corpus(storage, [cut])
    dictionaries = [make_dictionary(1), make_dictionary(4)]
    features = write_features(storage, [cut], shards, dictionaries)
    run = run_of(config, storage, {TOKENIZE: shards, DICTIONARIES: dictionaries, FEATURES: features})
    checks.check(run, FEATURES)
    check_tables(config, storage, build(run, CorpusTables(), GRAPH))


@pytest.mark.slow
def test_built_tables_pass_and_publishing_them_asks_nothing_anew(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(0, 30)
    cuts = [
        Cut(source="a.jsonl", documents=documents[:17], in_graph=17),
        Cut(source="b.jsonl", documents=documents[17:], in_graph=5),
    ]
    config = make_config(storage)
    shards = write_corpus(storage, cuts)
    dictionaries = [make_dictionary(1), make_dictionary(4)]
    features = write_features(storage, cuts, shards, dictionaries)
    run = run_of(config, storage, {TOKENIZE: shards, DICTIONARIES: dictionaries, FEATURES: features})
    checks.check(run, FEATURES)
    check_tables(config, storage, build(run, CorpusTables()))
    catalog = build(run, CorpusTables(), GRAPH)
    check_tables(config, storage, catalog)
    publish(storage, catalog)
    monkeypatch.delattr(checks, "judge")
    check_tables(config, storage, read_catalog(storage))


def test_keys_that_are_not_sorted_are_still_told_from_keys_that_repeat(storage: Storage) -> None:
    run = small_run()
    run.activations[0, 0] = run.activations[0, 0].sample(frac=1, random_state=0)
    run.edges[1, 1] = run.edges[1, 1].iloc[::-1]
    check("features", run, storage, run.write(storage))


def test_files_of_equal_content_share_a_shard(storage: Storage) -> None:
    run = small_run()
    run.write(storage)
    third = dataclasses.replace(run.shards.shards[0], source="c.txt", doc_offset=run.shards.n_documents)
    run.shards = dataclasses.replace(run.shards, shards=(*run.shards.shards, third))
    checks.check(run.given(storage), TOKENIZE)


def test_a_broken_file_is_a_storage_error(storage: Storage) -> None:
    run = small_run()
    run.write(storage)
    storage.write_bytes("features/0-0/edges.parquet", b"PAR1 nothing PAR1")
    with pytest.raises(StorageError, match="features/0-0"):
        checks.check(run.given(storage), FEATURES)


@pytest.mark.usefixtures("great_expectations")
def test_checks_and_data_docs_on_s3(s3_root: S3Root) -> None:
    storage, run = Storage(s3_root.url), small_run()
    catalog = run.write(storage)
    for stage in ("features", "tables"):
        check(stage, run, storage, catalog)
    assert all(row["success"] for row in expectations_table(storage).to_pylist())
    index = storage.read_bytes("data_docs/index.html").decode()
    assert "validations/features/" in index
    assert "validations/tables/" in index
    assert storage.exists("data_docs/static/styles/data_docs_default_styles.css")
