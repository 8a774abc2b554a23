"""Labels of features: kept beside the run, none lost where two write, and a table."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
from explored import again, asked, publish
from small_run import D_SAE

import functok
from functok.query import run_query
from infra.storage import Storage
from schemas.config import DuckDb
from tasks.engine.catalog_file import write_catalog_file
from tasks.explore.feature import feature
from tasks.explore.labels import LABEL, LONGEST_LABEL, labels, labels_of, labels_table, write_label
from tasks.explore.search import search_page
from tasks.explore.vocabulary import Asked, Grid, Missing, Note, NotThere, Query, Refused
from tasks.report.vocabulary import Column


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "root"))
    publish(storage)
    return storage


def rows(asked: Asked) -> list[tuple[object, ...]]:
    found = asked.rows(Query(sql="SELECT * EXCLUDE (written) FROM feature_labels ORDER BY ALL"))
    return [tuple(row.values()) for row in found]


def test_a_label_is_a_row_until_it_is_taken_back(storage: Storage) -> None:
    page = asked(storage)
    assert rows(page) == []
    hostile = "<script>alert('x')</script> \u202e"
    assert (
        LABEL.act(again(page, {"layer": 1, "feature_id": 3}, label=hostile, note="why\r\nso"))
        == "/feature/1/3"
    )
    LABEL.act(again(page, {"layer": 0, "feature_id": 3}, label=" of  several\nlines "))
    assert rows(page) == [(0, 3, "of several lines", ""), (1, 3, hostile, "why\nso")]
    LABEL.act(again(page, {"layer": 1, "feature_id": 3}, label="articles"))
    assert rows(page) == [(0, 3, "of several lines", ""), (1, 3, "articles", "")]
    LABEL.act(again(page, {"layer": 1, "feature_id": 3}))
    assert rows(page) == [(0, 3, "of several lines", "")]
    assert [label.label for label in labels_of(storage, "d1", 3)] == ["", "articles", hostile]
    (shown,) = labels(page).panels
    assert isinstance(shown, Grid)
    assert [(row["layer"], row["feature_id"], row["label"]) for row in page.rows(shown.query)] == [
        (0, 3, "of several lines")
    ]
    told = [column for column in shown.columns if isinstance(column, Column)]
    assert [column.cell(row) for row in page.rows(shown.query) for column in told][:2] == [
        "0",
        "of several lines",
    ]
    assert isinstance(labels(replace(page, tables=frozenset())).panels[0], Missing)


def test_a_feature_is_found_by_what_it_is_called(storage: Storage) -> None:
    page = asked(storage)
    for layer, feature_id, label, note in (
        (1, 3, "the word *have*", ""),
        (0, 5, "HAVE, again", ""),
        (0, 2, "months", "not to have"),
        (1, 4, "weekdays", ""),
    ):
        LABEL.act(again(page, {"layer": layer, "feature_id": feature_id}, label=label, note=note))
    grids = {one.key: one for one in search_page(again(page, {}, q="Have")).panels if isinstance(one, Grid)}
    found = [(row["layer"], row["feature_id"]) for row in page.rows(grids["labels"].query)]
    assert found == [(0, 5), (1, 3), (0, 2)]
    nothing = search_page(again(page, {}, q="%"))
    assert [one.key for one in nothing.panels if isinstance(one, Grid)] == ["tokens"]


def test_nothing_is_lost_where_many_write_at_once(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_label(storage, "d0", n % 4, f"label {n}", ""), range(80)))
    kept = labels_of(storage, "d0")
    assert sorted(label.label for label in kept) == sorted(f"label {n}" for n in range(80))
    newest = {n: next(label.label for label in kept if label.feature_id == n) for n in range(4)}
    assert {feature: label for _, feature, label, _ in rows(asked(storage))} == newest


def test_one_feature_is_told_from_others_that_begin_alike(storage: Storage) -> None:
    write_label(storage, "d0", 1, "one", "")
    write_label(storage, "d0", 12, "twelve", "")
    assert [label.label for label in labels_of(storage, "d0", 1)] == ["one"]


@pytest.mark.slow
def test_labels_go_with_their_dictionary(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish(storage)
    write_label(storage, "another", 1, "of another dictionary", "")
    write_label(storage, "d1", 1, "of this one", "")
    assert rows(asked(storage)) == [(1, 1, "of this one", "")]


def test_a_page_lists_labels_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever on it features are named; one that is written here is there at once."""
    monkeypatch.setattr("tasks.explore.labels.LISTED_EVERY", 60)
    write_label(storage, "d1", 3, "first", "")
    page, asked_for, sizes = asked(storage), list[str](), Storage.sizes
    monkeypatch.setattr(
        Storage, "sizes", lambda self, folder: asked_for.append(folder) or sizes(self, folder)
    )
    for label in ("first", "second"):
        write_label(storage, "d1", 3, label, "")
        asked_for.clear()
        shown = feature(again(page, {"layer": 1, "feature_id": 3}))
        assert shown.title.endswith(f": {label}")
        assert rows(page) == [(1, 3, label, "")]
        assert asked_for.count("labels") == 1


def test_a_title_hides_nothing(storage: Storage) -> None:
    """What turns the order of letters around would turn the title's, and what stands after it."""
    page = asked(storage)
    for label in ("good \u202edab", "have"):
        write_label(storage, "d1", 3, label, "")
    shown = feature(again(page, {"layer": 1, "feature_id": 3}))
    assert shown.title == "Feature 3 of layer 1: have"
    assert [one.said for one in shown.panels if isinstance(one, Note) and "\u202e" in one.said] == []
    write_label(storage, "d1", 3, "good \u202edab", "")
    shown = feature(again(page, {"layer": 1, "feature_id": 3}))
    assert shown.title == r"Feature 3 of layer 1: good \u{202e}dab"


def test_a_damaged_label_hides_no_other(storage: Storage) -> None:
    write_label(storage, "d0", 1, "kept", "")
    (name,) = storage.sizes("labels")
    storage.write_bytes(name.replace("/1-", "/2-"), storage.read_bytes(name).replace(b"kept", b"kepp"))
    assert rows(asked(storage)) == [(0, 1, "kept", "")]


def test_what_cannot_be_labelled_is_said(storage: Storage) -> None:
    page = asked(storage)
    with pytest.raises(Refused, match="201 characters"):
        LABEL.act(again(page, {"layer": 0, "feature_id": 1}, label="x" * (LONGEST_LABEL + 1)))
    with pytest.raises(NotThere, match=f"no feature {D_SAE[0]}"):
        LABEL.act(again(page, {"layer": 0, "feature_id": D_SAE[0]}, label="x"))
    with pytest.raises(Refused, match="layer 5"):
        LABEL.act(again(page, {"layer": 5, "feature_id": 0}, label="x"))
    assert rows(page) == []


@pytest.mark.slow
def test_labels_are_in_queries_in_python_and_in_a_catalogue_file(
    storage: Storage, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "feature_labels" not in functok.open(storage.root).tables
    write_label(storage, "d1", 5, "verbs, past", "")
    assert functok.open(storage.root).table("feature_labels")["label"].to_pylist() == ["verbs, past"]
    run_query(storage, "SELECT layer, feature_id, label FROM feature_labels", "csv")
    assert capfd.readouterr().out.splitlines()[1] == '1,5,"verbs, past"'
    file = tmp_path / "run.duckdb"
    write_catalog_file(storage, str(file), DuckDb(), labels_table(storage))
    with duckdb.connect(str(file), read_only=True) as connection:
        assert connection.execute("SELECT layer, feature_id, label FROM feature_labels").fetchall() == [
            (1, 5, "verbs, past")
        ]
