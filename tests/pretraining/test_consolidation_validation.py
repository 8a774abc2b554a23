"""Good consolidations pass every expectation; each expectation catches the rows planted against it, and names them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from builders import commit_again, commit_found, run_of
from consolidation_run import PUBLIC, WINDOW, ConsolidationRun, built, consolidation_run

from infra.catalog import Catalog
from infra.manifest import Manifest
from infra.storage import Storage
from schemas.errors import ExpectationError, StorageError
from schemas.expectation import Expectation
from schemas.expectations import SUITES
from schemas.pretraining.section import losses_of
from schemas.pretraining.table_expectations import CONSOLIDATION
from schemas.tables import TABLES
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine import checks
from tasks.engine.checks import check_tables, expectations_table
from tasks.engine.run import Run
from tasks.engine.tables import candidate, publish
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.generations import GENERATIONS
from tasks.pretraining.growth import GROWTH
from tasks.pretraining.losses import LOSSES
from tasks.pretraining.tables import CONSOLIDATION as CONSOLIDATION_TABLES

CHECKED = {stage.name: stage for stage in (CHECKPOINTS, LOSSES, GROWTH, GENERATIONS)}
FIRST = ("small", 1)

RunPlant = tuple[Callable[[ConsolidationRun], None], str]
FramePlant = tuple[str, Callable[[pd.DataFrame], pd.DataFrame], str]


def check(stage: str, run: ConsolidationRun, storage: Storage) -> None:
    checks.check(run.on(storage), CHECKED[stage])


def check_built(run: Run, catalog: Catalog | None = None) -> None:
    """Hold its tables against their expectations; they are built if they are not given."""
    catalog = catalog or built(run)
    check_tables(run.config, run.storage, catalog, CONSOLIDATION_TABLES.beside(run.storage, catalog))


def set_in(frame: pd.DataFrame, row: int, **values: Any) -> None:
    for column, value in values.items():
        position = frame.columns.get_loc(column)
        assert isinstance(position, int)
        frame.iloc[row, position] = value


# ---- what is done to the run, and text of a row that the message must show


def in_frame(name: str, key: Any, text: str, row: int = 0, **values: Any) -> RunPlant:
    return lambda run: set_in(getattr(run, name)[key], row, **values), text


def in_features(file: str, text: str, row: int = 0, **values: Any) -> RunPlant:
    return lambda run: set_in(run.features[*FIRST, 0][file], row, **values), text


def again(name: str, key: Any, text: str) -> RunPlant:
    def plant(run: ConsolidationRun) -> None:
        frame = getattr(run, name)[key]
        getattr(run, name)[key] = pd.concat([frame, frame.iloc[:1]])

    return plant, text


def without(name: str, key: Any, text: str) -> RunPlant:
    def plant(run: ConsolidationRun) -> None:
        getattr(run, name)[key] = getattr(run, name)[key].iloc[1:]

    return plant, text


def feature_rows(file: str, text: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> RunPlant:
    def plant(run: ConsolidationRun) -> None:
        frames = run.features[*FIRST, 0]
        frames[file] = change(frames[file])

    return plant, text


def checkpoint(place: int, text: str, **values: Any) -> RunPlant:
    def plant(run: ConsolidationRun) -> None:
        run.checkpoints[place] = replace(run.checkpoints[place], **values)

    return plant, text


def only_small(name: str) -> Callable[[ConsolidationRun], None]:
    def plant(run: ConsolidationRun) -> None:
        kept = [
            entry for entry in getattr(run, name) if getattr(entry, "checkpoint", entry).series == "small"
        ]
        setattr(run, name, kept)

    return plant


def backwards(run: ConsolidationRun) -> None:
    run.checkpoints[:2] = run.checkpoints[1::-1]


def twice(name: str) -> Callable[[ConsolidationRun], None]:
    def plant(run: ConsolidationRun) -> None:
        getattr(run, name).append(getattr(run, name)[0])

    return plant


def one_loss_shard_less(run: ConsolidationRun) -> None:
    run.losses.pop()


def more_predictions(run: ConsolidationRun) -> None:
    run.losses[0] = replace(run.losses[0], n_predictions=9)


def summed(plant: RunPlant) -> RunPlant:
    """The same with sums by document in place of single losses."""

    def change(run: ConsolidationRun) -> None:
        losses = losses_of(run.config).model_copy(update={"keep_tokens": False})
        run.config = run.config.model_copy(update={"losses": losses})
        plant[0](run)

    return change, plant[1]


def sae(text: str, **values: Any) -> RunPlant:
    def plant(run: ConsolidationRun) -> None:
        run.grown[0] = replace(run.grown[0], **values)

    return plant, text


def feature_shard(text: str, **values: Any) -> RunPlant:
    def plant(run: ConsolidationRun) -> None:
        first, *others = run.grown[0].features
        run.grown[0] = replace(run.grown[0], features=(replace(first, **values), *others))

    return plant, text


def fewer_tokens(run: ConsolidationRun) -> None:
    first, *others = run.grown[0].features
    part = replace(first.part, n_tokens=first.part.n_tokens - 1)
    run.grown[0] = replace(run.grown[0], features=(replace(first, part=part), *others))


def one_part_twice(run: ConsolidationRun) -> None:
    first = run.grown[0].features[0]
    run.grown[0] = replace(run.grown[0], features=(first, first))


PLANTS: dict[str, dict[str, RunPlant]] = {
    "checkpoints": {
        "one checkpoint a step": checkpoint(1, "model: small, step: 1, rows: 2", step=1),
        "steps ascend": (backwards, "model: small, step: 1, step_before: 10"),
        "every series has checkpoints": (
            only_small("checkpoints"),
            "model: large, is_configured: True, has_checkpoints: False",
        ),
        "checkpoints are whole": checkpoint(0, "key: , committed: True", key=""),
        "tokens shown rise": checkpoint(3, "tokens: 64, tokens_before: 64", tokens=64),
    },
    "losses": {
        "one shard a checkpoint and place": (
            twice("losses"),
            "model: small, step: 1, doc_offset: 0, rows: 2",
        ),
        "every series has losses": (only_small("losses"), "model: large"),
        "checkpoints read the same documents": (one_loss_shard_less, "model: large, step: 10"),
        "predictions are all there": (more_predictions, "n_predictions: 9"),
        "loss keys are unique": again("token_losses", (*FIRST, 0), "position: 1, rows: 2"),
        "losses are possible": in_frame("token_losses", (*FIRST, 1), "loss: inf", loss=float("inf")),
        "losses are of held-out predictions": in_frame(
            "token_losses", (*FIRST, 0), "position: 7", position=7
        ),
        "every prediction has its loss": without("token_losses", (*FIRST, 0), "counted_n: "),
        "sums of losses have unique keys": summed(again("document_losses", (*FIRST, 0), "rows: 2")),
        "sums of losses are possible": summed(
            in_frame("document_losses", (*FIRST, 1), "loss_units: -1", loss_units=-1)
        ),
        "every prediction is in a sum": summed(in_frame("document_losses", (*FIRST, 0), "counted_n: ", n=70)),
    },
    "growth": {
        "one SAE a checkpoint": (twice("grown"), "model: small, step: 1, rows: 2"),
        "every series has SAEs": (only_small("grown"), "model: large"),
        "SAEs are whole": in_frame("learned", FIRST, "configured_size: 300", dictionary_size=299),
        "learned ≤ alive ≤ dictionary": in_frame(
            "learned",
            FIRST,
            "learned_features: 19, dense_features: 2, alive_features: 20",
            learned_features=19,
        ),
        "figures are possible": in_frame("learned", FIRST, "explained_variance: 1.5", explained_variance=1.5),
        "recovered loss follows from the losses": in_frame(
            "learned", FIRST, "ce_recovered: 0.75", ce_recovered=0.75
        ),
        "SAEs are judged on the same tokens": in_frame(
            "learned", FIRST, "heldout_tokens: 499, most_tokens: 500", heldout_tokens=499
        ),
        "one shard a checkpoint and place": (one_part_twice, "doc_offset: 0, rows: 2"),
        "checkpoints see the same documents": (fewer_tokens, "model: small, step: 1"),
        "activations are all there": feature_shard("n_activations: 1", n_activations=1),
        "sum(counts) = tokens in the graph": feature_rows(
            "counts", "folder: features/small-1-0", lambda frame: frame.iloc[1:]
        ),
        "activation keys are unique": feature_rows(
            "activations", "rows: 2", lambda frame: pd.concat([frame, frame.iloc[:1]])
        ),
        "activation documents are in range": in_features("activations", "doc: 9", doc=9),
        "feature ids are in the dictionary": in_features("activations", "feature_id: 300", feature_id=300),
        "activations are positive": in_features("activations", "activation: 0.0", activation=0.0),
        "edge keys are unique": feature_rows(
            "edges", "rows: 2", lambda frame: pd.concat([frame, frame.iloc[:1]])
        ),
        "edges are possible": in_features("edges", "n: 0", n=0),
        "edges.n = activations grouped": in_features("edges", "told_features: ", feature_id=299),
        "counted tokens are unique": feature_rows(
            "counts", "rows: 2", lambda frame: pd.concat([frame, frame.iloc[:1]])
        ),
        "edges are of counted tokens": feature_rows("counts", "count: None", lambda frame: frame.iloc[:1]),
        "token ids are the corpus' own": in_features("counts", "token_id: 300", token_id=300),
    },
    "generations": {
        "one continuation a prompt and mode": again(
            "texts", FIRST, "model: small, step: 1, prompt: The, mode: greedy, rows: 2"
        ),
        "every prompt is continued": without(
            "texts", ("large", 10), "prompt: The, mode: greedy, configured_seed: None"
        ),
        "continuations are text": in_frame("texts", FIRST, "mode: greedy", continuation=None),
    },
}


# ---- for the published tables: which file, what is done to it, and text of a row that the message must show


def cell(table: str, text: str, row: int = 0, **values: Any) -> FramePlant:
    def plant(frame: pd.DataFrame) -> pd.DataFrame:
        set_in(frame, row, **values)
        return frame

    return table, plant, text


def repeated(table: str, text: str = "rows: 2") -> FramePlant:
    return table, lambda frame: pd.concat([frame, frame.iloc[:1]]), text


def dropped(table: str, text: str) -> FramePlant:
    return table, lambda frame: frame.iloc[1:], text


TABLE_PLANTS: dict[str, FramePlant] = {
    "checkpoint keys are unique": repeated("checkpoints", "model: small, step: 1, rows: 2"),
    "training loss keys are unique": repeated("training_losses", "model: small, step: 1, rows: 2"),
    "training losses are possible": cell("training_losses", "loss: inf", loss=float("inf")),
    "document loss keys are unique": repeated("document_losses"),
    "document losses are possible": cell("document_losses", "loss: -1.0", loss=-1.0),
    "document_losses = predictions of the documents": cell("document_losses", "n: 77", n=77),
    "document_losses = token_losses grouped": cell("document_losses", "loss: 123.0", loss=123.0),
    "bucket keys are unique": repeated("loss_buckets", "bucket: function→function, rows: 2"),
    "every checkpoint has the four buckets": cell("loss_buckets", "bucket: function→", bucket="function→"),
    "buckets count the same predictions": cell("loss_buckets", "n: 1, most: ", n=1),
    "loss_buckets = document_losses grouped": cell("loss_buckets", "mean_loss: 9.5", mean_loss=9.5),
    "loss shares sum to 1": cell("loss_buckets", "loss_share: 0.9", loss_share=0.9),
    "intervals contain the mean": cell("loss_buckets", "mean_low: 99.0", mean_low=99.0),
    "learned_features keys are unique": repeated("learned_features", "model: small, step: 1, rows: 2"),
    "SAEs are of checkpoints": cell("learned_features", "model: small, step: 3", step=3),
    "every SAE has its graph": dropped("learned_features", "dictionary_size: None"),
    "checkpoint_degree keys are unique": repeated("checkpoint_degree"),
    "checkpoint_degree is of counted tokens": cell("checkpoint_degree", "tokens_rank: 1", rank=9),
    "checkpoints count the same tokens": dropped("checkpoint_degree", "checkpoints: 3, all_checkpoints: 4"),
    "checkpoints' rarefied degree is at most the degree": cell(
        "checkpoint_degree", "rarefied_degree: 999.0", rarefied_degree=999.0
    ),
    "one graph a checkpoint": repeated("checkpoint_graph", "model: small, step: 1, rows: 2"),
    "checkpoint_graph = checkpoint_degree grouped": cell("checkpoint_graph", "n_tokens: 3", n_tokens=3),
    "checkpoint graphs are possible": cell(
        "checkpoint_graph", "function_features: 0", function_features=0, content_features=0
    ),
    "checkpoint coverages are shares": cell("checkpoint_graph", "top10_coverage: 1.5", top10_coverage=1.5),
    "generation keys are unique": repeated("generations"),
    "every checkpoint has the same prompts": dropped("generations", "model: small, step: 1, prompt: The"),
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, ConsolidationRun, Catalog]:
    """Good tables, only to be copied."""
    storage = Storage(str(tmp_path_factory.mktemp("good")))
    run = consolidation_run(storage)
    return storage, run, built(run.write(storage))


@pytest.fixture
def copied(
    tables: tuple[Storage, ConsolidationRun, Catalog], tmp_path: Path
) -> tuple[Storage, ConsolidationRun, Catalog]:
    good, run, catalog = tables
    shutil.copytree(good.path, tmp_path / "copy")
    return Storage(str(tmp_path / "copy")), copy.deepcopy(run), catalog


def asked_alone(stage: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Expectation:
    """Ask one expectation of a stage alone, which is quick; of good data all are asked."""
    entry = next(entry for entry in SUITES[stage] if entry.name == name)
    monkeypatch.setitem(SUITES, stage, (entry,))
    return entry


def told_of(error: ExpectationError, name: str) -> str:
    return next(part for part in str(error).split("; and ") if repr(name) in part)


def test_every_expectation_has_its_plant() -> None:
    assert {stage: set(plants) for stage, plants in PLANTS.items()} == {
        stage: {entry.name for entry in SUITES[stage]} for stage in CHECKED
    }
    assert set(TABLE_PLANTS) == {entry.name for entry in CONSOLIDATION}
    for suite in SUITES.values():
        assert len({entry.name for entry in suite}) == len(suite)


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in CHECKED for name in PLANTS[stage]])
def test_planted_rows_are_caught_and_named(
    stage: str,
    name: str,
    copied: tuple[Storage, ConsolidationRun, Catalog],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = asked_alone(stage, name, monkeypatch)
    storage, run, _ = copied
    plant, row = PLANTS[stage][name]
    plant(run)
    run.write(storage)
    with pytest.raises(ExpectationError) as raised:
        check(stage, run, storage)
    told = str(raised.value)
    assert told.startswith(f"[{stage}] the expectation {name!r} on the table {entry.table} ")
    assert row in told


@pytest.mark.parametrize("name", TABLE_PLANTS)
def test_planted_rows_of_tables_are_caught_and_named(
    name: str, copied: tuple[Storage, ConsolidationRun, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = asked_alone("tables", name, monkeypatch)
    storage, run, catalog = copied
    table, change, row = TABLE_PLANTS[name]
    file = catalog.tables[table] if table in catalog.tables else catalog.sharded[table][0].name
    found = storage.read_parquet(file)
    planted = change(found.to_pandas())
    storage.write_parquet(file, pa.Table.from_pandas(planted, schema=found.schema, preserve_index=False))
    commit_again(storage, file.rpartition("/")[0])
    with pytest.raises(ExpectationError) as raised:
        check_built(run.on(storage), catalog)
    told = str(raised.value)
    assert told.startswith(f"[tables] the expectation {name!r} on the table {entry.table} ")
    assert row in told


@pytest.mark.slow
@pytest.mark.usefixtures("great_expectations")
def test_good_data_passes_and_is_shown(storage: Storage) -> None:
    run = consolidation_run(storage)
    run.write(storage)
    for stage in CHECKED:
        check(stage, run, storage)
    catalog = built(run.on(storage))
    check_built(run.on(storage), catalog)
    publish(storage, catalog)
    rows = expectations_table(storage).to_pylist()
    asked = {(row["stage"], row["expectation"]) for row in rows}
    of_sums = {entry.name for entry in SUITES["losses"] if entry.table == "document_losses"}
    assert asked >= {
        (stage, entry.name) for stage in CHECKED for entry in SUITES[stage] if entry.name not in of_sums
    }
    assert asked >= {("tables", entry.name) for entry in CONSOLIDATION}
    assert {(row["success"], row["observed"]) for row in rows} == {(True, 0)}
    index = storage.read_bytes("data_docs/index.html").decode()
    assert all(f"validations/{stage}/" in index for stage in CHECKED)


@pytest.mark.slow
def test_what_was_passed_is_not_asked_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    run = consolidation_run(storage)
    run.write(storage)
    for stage in CHECKED:
        check(stage, run, storage)
    monkeypatch.delattr(checks, "judge")
    for stage in CHECKED:
        check(stage, run, storage)


@pytest.mark.slow
def test_sums_by_document_pass_and_wrong_kinds_do_not(storage: Storage) -> None:
    run = consolidation_run(storage, losses={"keep_tokens": False, "resamples": 120})
    run.write(storage)
    check("losses", run, storage)
    asked = {row["expectation"] for row in expectations_table(storage).to_pylist()}
    assert "every prediction is in a sum" in asked
    assert "loss keys are unique" not in asked
    check_built(run.on(storage))
    # Sums that another share of function tokens gave have as many predictions, of other kinds.
    run.config = run.config.model_copy(
        update={"function_tokens": run.config.function_tokens.model_copy(update={"share": 0.6})}
    )
    with pytest.raises(ExpectationError, match="document_losses = predictions of the documents"):
        check_built(run.on(storage))


@pytest.mark.slow
def test_a_consolidation_without_saes_or_texts_is_good(storage: Storage) -> None:
    run = consolidation_run(storage, consolidation=PUBLIC)
    run.write(storage)
    check_built(run.on(storage, growth=[], generations=[]))
    asked = {row["expectation"] for row in expectations_table(storage).to_pylist()}
    assert "loss shares sum to 1" in asked
    assert "one graph a checkpoint" not in asked


def test_missing_tables_are_named(copied: tuple[Storage, ConsolidationRun, Catalog]) -> None:
    storage, run, catalog = copied
    tables = {name: file for name, file in catalog.tables.items() if name != "loss_buckets"}
    sharded = {name: files for name, files in catalog.sharded.items() if name != "checkpoint_graph"}
    with pytest.raises(ExpectationError) as raised:
        check_built(run.on(storage), replace(catalog, tables=tables, sharded=sharded))
    assert "{table: checkpoint_graph, column: model, type: VARCHAR, found: None}" in str(raised.value)
    n = len(TABLES["loss_buckets"]) + len(TABLES["checkpoint_graph"])
    assert storage.read_json("validation/tables.json")["results"][0]["observed"] == n


@pytest.mark.slow
def test_a_checkpoint_that_is_not_committed_is_named(storage: Storage) -> None:
    run = consolidation_run(storage)
    run.write(storage)
    storage.delete("checkpoints/large-1/manifest.json")
    with pytest.raises(
        ExpectationError, match=r"step: 1, source: storage:checkpoints/large-1, .*committed: False"
    ):
        check("checkpoints", run, storage)


@pytest.mark.slow
def test_special_tokens_and_windows_predict_nothing(storage: Storage) -> None:
    run = consolidation_run(storage)
    run.write(storage)
    # A token of a held-out document that turns out special: what it predicts, and what predicts it, is no prediction.
    folder = run.shards.shards[0].folder
    document = next(doc for doc in run.parts[0].documents if len(run.documents[0][doc].tokens) > 4)
    occurrences = storage.read_parquet(f"{folder}/occurrences.parquet").to_pandas()
    ordinary = occurrences[(occurrences.doc != document) | (occurrences.position != 2)]
    table = pa.Table.from_pandas(ordinary, preserve_index=False)
    storage.write_parquet(f"{folder}/occurrences.parquet", table)
    with pytest.raises(ExpectationError) as raised:
        check("losses", run, storage)
    told = told_of(raised.value, "losses are of held-out predictions")
    assert f"doc: {document}, position: 2" in told
    assert f"doc: {document}, position: 3" in told
    assert "is not met by 8 rows" in told  # two in the folder of each of four checkpoints, which stands twice


@pytest.mark.slow
def test_a_broken_file_is_a_storage_error(storage: Storage) -> None:
    run = consolidation_run(storage)
    run.write(storage)
    storage.write_bytes("losses/tokens-small-1-1/token_losses.parquet", b"PAR1 nothing PAR1")
    with pytest.raises(StorageError, match="losses/tokens-small-1-1"):
        check("losses", run, storage)
    storage.delete(f"{run.shards.shards[1].folder}/occurrences.parquet")
    with pytest.raises(StorageError, match=r"occurrences\.parquet"):
        check("losses", run, storage)
    commit_found(storage, "losses/tokens-small-1-1", Manifest(stage="test", inputs={}))


def test_a_consolidation_that_is_kept_is_asked_what_it_was_made_with(
    copied: tuple[Storage, ConsolidationRun, Catalog],
) -> None:
    storage, run, catalog = copied
    publish(storage, catalog)
    other = run.config.model_copy(
        update={
            "consolidation": None,
            "windows": run.config.windows.model_copy(update={"context_size": 64}),
            "graph": run.config.graph.model_copy(update={"rarefaction_m": 9}),
        }
    )
    of_corpus = run_of(other, storage, {TOKENIZE: run.shards})
    kept = candidate(storage, [CorpusTables().build(of_corpus)])
    assert "consolidation" in kept.lineage
    check_built(of_corpus, kept)
    made_with = CONSOLIDATION_TABLES.beside(storage, kept)["made_with"].to_pylist()
    assert made_with == [{"window": WINDOW, "resamples": 200, "m": 5}]
