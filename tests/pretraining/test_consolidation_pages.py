"""The explorer's pages on consolidation: numbers against SQL, the slider, texts side by side, and what a run lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import consolidation_catalogue as catalogue
import duckdb
import pytest
from consolidation_catalogue import HOSTILE_PROMPT, HOSTILE_TEXT, STEPS, Made
from page_reading import built, cells, grid, of, rows

from infra.duck import connect
from infra.storage import Storage
from tasks.explore.vocabulary import (
    Change,
    Controls,
    Facts,
    Figure,
    Findings,
    Grid,
    Missing,
    NotThere,
    Refused,
    Slider,
)
from tasks.pretraining.pages import PAGES
from tasks.pretraining.report import findings
from tasks.report.text import passage

CHECKPOINT, GENERATIONS = "/pretraining/checkpoint", "/pretraining/generations"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return catalogue.publish(Storage(str(tmp_path_factory.mktemp("full"))))


@pytest.fixture
def connection(storage: Storage) -> Iterator[Any]:
    with closing(connect(storage)) as connection:
        yield connection


@pytest.mark.slow
def test_the_overview_has_the_report_s_findings_charts_and_numbers(connection: Any) -> None:
    page = built(PAGES, "/pretraining", connection)
    assert [one for panel in of(page, Findings) for one in panel.findings] == findings(connection)
    assert len(of(page, Figure)) == 5
    found = rows(grid(page, "losses").query, connection)
    (n,) = connection.execute("SELECT count(*) FROM loss_buckets WHERE n > 0").fetchone()
    assert len(found) == n
    last = next(
        row
        for row in found
        if (row["model"], row["step"], row["bucket"]) == ("small", 256, "content→content")
    )
    assert last["since_first"] == pytest.approx(4.4 - 8.1)
    assert [row["series"] for row in rows(grid(page, "series").query, connection)] == ["small", "large"]


@pytest.mark.parametrize(
    ("values", "at"), [({}, 5), ({"at": "2"}, 2), ({"step": "16"}, 3), ({"at": "2", "step": "16"}, 2)]
)
def test_the_slider_chooses_a_checkpoint(connection: Any, values: dict[str, str], at: int) -> None:
    page = built(PAGES, CHECKPOINT, connection, series="large", **values)
    step = STEPS[at - 1]
    assert page.title == f"large, step {step:,}"
    (slider,) = [one for panel in of(page, Controls) for one in panel.controls if isinstance(one, Slider)]
    assert (slider.low, slider.high, slider.value) == (1, 5, at)
    found = rows(grid(page, "losses").query, connection)
    expected = connection.execute(
        "SELECT mean_loss FROM loss_buckets WHERE model = 'large' AND step = ? ORDER BY 1 DESC", [step]
    ).fetchall()
    assert [row["mean_loss"] for row in found] == [loss for (loss,) in expected]
    assert len(page.beside) == (1 if at in {1, 5} else 2)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (CHECKPOINT, {"series": "none"}),
        (CHECKPOINT, {"step": "17"}),
        (CHECKPOINT, {"at": "77"}),
        (GENERATIONS, {"prompt": "9"}),
        (GENERATIONS, {"mode": "none"}),
        (GENERATIONS, {"first": "x"}),
    ],
)
def test_what_cannot_be_chosen_is_said(connection: Any, path: str, values: dict[str, str]) -> None:
    with pytest.raises((NotThere, Refused), match=next(iter(values))):
        built(PAGES, path, connection, **values)


@pytest.mark.slow
def test_a_checkpoint_with_a_graph_has_its_degrees_beside_the_last_ones(connection: Any) -> None:
    page = built(PAGES, CHECKPOINT, connection, series="small", at="1")
    assert len(of(page, Figure)) == 1
    found = {row["token_id"]: row for row in rows(grid(page, "tokens").query, connection)}
    expected = connection.execute(
        "SELECT step, degree FROM checkpoint_degree WHERE model = 'small' AND token_id = 3 ORDER BY step"
    ).fetchall()
    assert [(1, found[3]["degree"]), (256, found[3]["last_degree"])] == expected
    assert dict(fact[:2] for fact in of(page, Facts)[0].facts)["learned features"] == "20 of 1,024 at layer 2"
    page = built(PAGES, CHECKPOINT, connection, series="small", at="2")
    assert not of(page, Figure)
    assert "these have: 1, 256" in of(page, Missing)[0].what


def test_two_checkpoints_of_one_prompt_stand_beside_each_other(connection: Any) -> None:
    page = built(PAGES, GENERATIONS, connection, prompt="1", mode="sampled", first="1", second="7")
    (change,) = of(page, Change)
    assert change.title == "small, step 1 → large, step 4"
    assert change.before == passage(f"{HOSTILE_TEXT} again")
    assert "\u202e" not in change.before
    assert change.note == passage(HOSTILE_PROMPT)
    found = rows(grid(page, "texts").query, connection)
    assert {row["prompt"] for row in found} == {HOSTILE_PROMPT}
    assert len(found) == 2 * 2 * len(STEPS)
    assert "</code><script>" in cells(grid(page, "texts"), connection)[0][-1]  # the page's HTML escapes it


@pytest.mark.parametrize("path", [page.path for page in PAGES])
def test_a_run_without_it_is_told_what_to_add(path: str) -> None:
    (missing,) = of(built(PAGES, path, duckdb.connect()), Missing)
    assert "consolidation" in missing.way


@pytest.mark.slow
def test_losses_alone(tmp_path: Path) -> None:
    made = Made(learned=None, coverage=(), trained=(), texts=False)
    with closing(connect(catalogue.publish(Storage(str(tmp_path)), made))) as connection:
        assert len(of(built(PAGES, "/pretraining", connection), Figure)) == 1
        assert [one.key for one in of(built(PAGES, CHECKPOINT, connection), Grid)] == ["losses"]
        assert of(built(PAGES, GENERATIONS, connection), Missing)


def test_a_checkpoint_is_kept_where_a_series_ends_earlier(tmp_path: Path) -> None:
    made = Made(
        steps={"small": (1, 4, 16, 64, 256), "large": (2, 8, 32, 128, 512)}, learned=None, coverage=()
    )
    with closing(connect(catalogue.publish(Storage(str(tmp_path)), made))) as connection:
        assert built(PAGES, CHECKPOINT, connection, series="large", step="8").title == "large, step 8"
        with pytest.raises(NotThere, match="no step 4"):
            built(PAGES, CHECKPOINT, connection, series="large", step="4")
