"""The explorer's pages on retention: numbers against SQL, what can be chosen, and what a run lacks."""

from __future__ import annotations

from typing import Any

import duckdb
import pytest
import retention_catalogue
from page_reading import built, cells, grid, of, rows
from retention_catalogue import BUDGETS, POLICIES, Made

from tasks.explore.vocabulary import Choice, Controls, Figure, Findings, Missing
from tasks.retention import claims
from tasks.retention.pages import PAGES

PATHS = [page.path for page in PAGES]


@pytest.fixture(scope="module")
def connection() -> Any:
    return retention_catalogue.connection(
        Made(protocols=("stream", "prefill"), sequences={1024: 12, 2048: 12})
    )


def choices(page: Any) -> dict[str, Choice]:
    found = [one for panel in of(page, Controls) for one in panel.controls]
    return {one.key: one for one in found if isinstance(one, Choice)}


@pytest.mark.parametrize("protocol", ["stream", "prefill"])
@pytest.mark.parametrize("length", [1024, 2048])
def test_the_frontier_of_a_setting(connection: Any, length: int, protocol: str) -> None:
    page = built(PAGES, "/retention", connection, length=str(length), protocol=protocol)
    found = rows(grid(page, "rows").query, connection)
    expected = connection.execute(
        "SELECT policy, budget, perplexity_ratio FROM retention WHERE length = ? AND protocol = ? ORDER BY ALL",
        [length, protocol],
    ).fetchall()
    assert sorted((row["policy"], row["budget"], row["perplexity_ratio"]) for row in found) == expected
    (figure,) = of(page, Figure)
    assert f"{protocol}, {length:,} tokens" in figure.chart.alt
    assert len(of(page, Figure)) == 1


@pytest.mark.parametrize("path", ["/retention/survival", "/retention/losses", "/retention/layers"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.slow
def test_a_place_is_chosen(connection: Any, path: str, budget: float) -> None:
    values = {"length": "1024", "protocol": "prefill", "budget": f"{budget:g}"}
    page = built(PAGES, path, connection, **values)
    assert {key: one.value for key, one in choices(page).items()} == values
    found = rows(grid(page, "rows").query, connection)
    assert {row["policy"] for row in found} == {*POLICIES}
    assert {(row["length"], row["protocol"], row["budget"]) for row in found} == {(1024, "prefill", budget)}
    assert of(page, Figure)
    assert "prefill, 1,024 tokens" in page.lead


@pytest.mark.slow
def test_survival_is_the_product_of_what_was_left(connection: Any) -> None:
    page = built(PAGES, "/retention/survival", connection, length="1024", protocol="stream")
    found = rows(grid(page, "rows").query, connection)
    curve = [row for row in found if row["policy"] == "window" and row["kind"] == "content"]
    assert [row["age"] for row in curve] == [0, 256, 512, 768]
    left = 1.0
    for row in curve:
        at_risk, died = connection.execute(
            "SELECT sum(at_risk), sum(died) FROM retention_survival WHERE length = 1024 AND protocol = 'stream' "
            "AND policy = 'window' AND kind = 'content' AND age = ? AND budget = ?",
            [row["age"], row["budget"]],
        ).fetchone()
        left *= 1 - float(died) / float(at_risk)
        assert (row["at_risk"], row["survival"]) == (at_risk, pytest.approx(left))


@pytest.mark.slow
def test_what_is_chosen_first_says_what_can_be_chosen_then(connection: Any) -> None:
    found = retention_catalogue.connection(Made(sequences={1024: 12, 2048: 12}))
    found.execute("DELETE FROM retention_layers WHERE length = 1024 AND budget <> ?", [BUDGETS[0]])
    page = built(PAGES, "/retention/layers", found, length="1024", budget=f"{BUDGETS[-1]:g}")
    assert choices(page)["budget"].value == f"{BUDGETS[0]:g}"
    assert [option for option, _ in choices(page)["budget"].options] == [f"{BUDGETS[0]:g}"]


@pytest.mark.parametrize(
    ("path", "table"),
    [("/retention/speed", "retention_speed"), ("/retention/retrieval", "retention_retrieval")],
)
def test_speed_and_retrieval(connection: Any, path: str, table: str) -> None:
    page = built(PAGES, path, connection, budget="0.25")
    (n,) = connection.execute(
        f"SELECT count(*) FROM {table} WHERE budget = 0.25 OR policy = 'full'"
    ).fetchone()
    assert len(rows(grid(page, "rows").query, connection)) == n


@pytest.mark.slow
def test_claims_have_verdicts_and_comparisons(connection: Any) -> None:
    page = built(PAGES, "/retention/claims", connection)
    assert [one for panel in of(page, Findings) for one in panel.findings] == claims.findings(connection)
    found = rows(grid(page, "claims").query, connection)
    assert found == [pytest.approx(one.row, nan_ok=True) for one in claims.judge(connection)]
    assert len(cells(grid(page, "claims"), connection)) == len(found) > 10


@pytest.mark.parametrize("path", PATHS)
def test_a_run_without_it_is_told_what_to_add(path: str) -> None:
    (missing,) = of(built(PAGES, path, duckdb.connect()), Missing)
    assert "[retention]" in missing.way


def test_a_run_of_the_full_cache_alone_is_told_too(connection: Any) -> None:
    found = retention_catalogue.connection()
    for (table,) in found.execute(
        "SELECT table_name FROM duckdb_tables() WHERE table_name <> 'run_info'"
    ).fetchall():
        found.execute(f"DELETE FROM {table} WHERE policy <> 'full'")
    for path in PATHS[:-1]:
        assert of(built(PAGES, path, found), Missing)
    built(PAGES, PATHS[-1], found)
