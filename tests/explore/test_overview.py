"""The explorer's first page and the choice of tokens, against sets of features counted one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pandas as pd
import pytest
import report_catalogue
from explored import publish
from page_reading import OneStatement, built, cells, grid, of, rows
from small_run import D_SAE, SmallRun, small_run

from infra.duck import connect
from infra.storage import Storage
from tasks.explore import cover, overview
from tasks.explore.cover import cover_address
from tasks.explore.vocabulary import (
    Asked,
    Controls,
    Facts,
    Figure,
    Findings,
    Grid,
    Link,
    Missing,
    NotThere,
    Query,
    Refused,
    Slider,
)
from tasks.report import corpus, graph
from tasks.report.vocabulary import Finding


@pytest.fixture(scope="module")
def run() -> SmallRun:
    run = small_run(1)
    run.tables["run_info"] = pd.DataFrame(
        [{"key": "model", "value": "<b>m</b>"}, {"key": "documents", "value": "5"}]
    )
    # As a dictionary has it that is not filled at once.
    run.tables["edges"] = run.tables["edges"].query("feature_id % 5 < 2 or token_id == feature_id % 3")
    for layer in D_SAE:
        of_layer = run.tables["edges"].query("layer == @layer")
        summary = run.tables["graph_summary"]
        summary.loc[summary.layer == layer, "activated_features"] = of_layer.feature_id.nunique()
    kept = run.tables["edges"].groupby(["layer", "feature_id"]).size().reset_index()[["layer", "feature_id"]]
    run.tables["feature_degree"] = run.tables["feature_degree"].merge(kept)
    return run


@pytest.fixture(scope="module")
def connection(run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    storage = Storage(str(tmp_path_factory.mktemp("overview")))
    publish(storage, run)
    with closing(connect(storage)) as connection:
        yield connection


def features(run: SmallRun, layer: int) -> dict[int, set[int]]:
    """Token to the features that it opens."""
    of_layer = run.tables["edges"].query("layer == @layer")
    return {token: set(found) for token, found in of_layer.groupby("token_id").feature_id}


@pytest.mark.parametrize(
    ("rank", "chosen"), [(0, []), (1, []), (3, []), (0, [4]), (0, [4, 0, 2]), (2, [3, 1])]
)
@pytest.mark.parametrize("layer", list(D_SAE))
def test_chosen_tokens_reach_what_they_open_together(
    run: SmallRun, connection: Any, layer: int, rank: int, chosen: list[int]
) -> None:
    opened, ranked = features(run, layer), run.tables["tokens"].sort_values("rank").token_id.tolist()
    there = [token for token in chosen if token in ranked]
    made = built(
        cover.PAGES, "/cover", connection, layer=str(layer), rank=str(rank), tokens=",".join(map(str, chosen))
    )
    every = set().union(*opened.values())
    reached = set().union(*(opened.get(token, set()) for token in ranked[:rank]))
    for row in rows(grid(made, "chosen").query, connection) if there else []:
        token = there[row["place"] - 1]
        assert (row["token_id"], row["new_features"]) == (token, len(opened.get(token, set()) - reached))
        reached |= opened.get(token, set())
        assert (row["cumulative_features"], row["coverage"]) == (len(reached), len(reached) / len(every))
    (facts,) = of(made, Facts)
    n_chosen = min(rank, len(ranked)) + len(there)
    assert [value for _, value, _ in facts.facts][:2] == [str(n_chosen), f"{len(reached)} of {len(every)}"]
    gains = {
        token: len(found - reached)
        for token, found in opened.items()
        if token not in there and token not in ranked[:rank] and found - reached
    }
    best = sorted(gains, key=lambda token: (-gains[token], token))[:10]
    found = rows(grid(made, "next").query, connection)
    assert [(row["token_id"], row["new_features"]) for row in found] == [
        (token, gains[token]) for token in best
    ]
    for row in found:
        assert row["coverage"] == (len(reached) + row["new_features"]) / len(every)
    link = grid(made, "next").columns[0]
    assert isinstance(link, Link)
    if best:
        assert link.to(found[0]) == cover_address(layer, min(rank, len(ranked)), [*there, best[0]])


@pytest.mark.slow
def test_ranks_reach_what_the_table_coverage_says(run: SmallRun, tmp_path: Any) -> None:
    whole = small_run(2)
    storage = Storage(str(tmp_path))
    publish(storage, whole)
    with closing(connect(storage)) as connection:
        for row in whole.tables["coverage"].itertuples():
            made = Query.of("explore/chosen_coverage", layer=row.layer, rank=row.rank, tokens=[])
            (total,) = rows(made, connection)
            assert (total["cumulative_features"], total["coverage"]) == (
                row.cumulative_features,
                row.coverage,
            )


@pytest.mark.slow
def test_a_token_is_added_by_its_text_or_asked_about(run: SmallRun, connection: Any) -> None:
    made = built(cover.PAGES, "/cover", connection, tokens="3", add="t1")
    assert [row["token_id"] for row in rows(grid(made, "chosen").query, connection)] == [3, 1]
    assert of(made, Controls)[0].keep == {"tokens": "3,1"}
    unclear = built(cover.PAGES, "/cover", connection, tokens="3", add="t")
    which = grid(unclear, "which")
    assert {row["token"] for row in rows(which.query, connection)} == set(run.tables["tokens"].token)
    assert isinstance(which.columns[0], Link)
    assert which.columns[0].to({"token_id": 5}) == "/cover?layer=0&rank=0&tokens=3%2C5"
    assert (
        rows(grid(built(cover.PAGES, "/cover", connection, add="nowhere"), "which").query, connection) == []
    )


@pytest.mark.parametrize("named", ["0,0,0", "", "0,,1,", " 1 , 0"])
def test_tokens_are_named_by_their_ids(connection: Any, named: str) -> None:
    made = built(cover.PAGES, "/cover", connection, tokens=named)
    kept = list(dict.fromkeys(one.strip() for one in named.split(",") if one.strip()))
    assert of(made, Controls)[0].keep == ({"tokens": ",".join(kept)} if kept else {})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        *(({"tokens": named}, "cannot have") for named in ("x", "1,,x", "9" * 20, "²", "-1")),
        ({"tokens": "0,77"}, "token 77 does not occur"),
        ({"tokens": ",".join(map(str, range(201)))}, "201 tokens"),
        *(({"rank": rank}, f"rank cannot be {rank}") for rank in ("-5", "99", "x", "9" * 20)),
        ({"layer": "9"}, "no layer 9"),
    ],
)
def test_what_cannot_be_chosen_is_said(connection: Any, values: dict[str, str], said: str) -> None:
    with pytest.raises((NotThere, Refused), match=said) as told:
        built(cover.PAGES, "/cover", connection, **values)
    assert told.value.hint


def test_the_first_page_says_what_the_run_is(run: SmallRun, connection: Any) -> None:
    made = built(overview.PAGES, "/", OneStatement(connection), rank="2")
    told, numbers, reached = of(made, Facts)
    assert ("model", "<b>m</b>", "") in told.facts
    assert ("tokens", str(run.shards.n_tokens), "") in numbers.facts
    assert reached.facts[0][1] == "2"
    slider = next(one for one in of(made, Controls)[0].controls if isinstance(one, Slider))
    assert (slider.value, slider.high) == (2, len(run.tables["tokens"]))
    assert [row["activated_share"] for row in rows(grid(made, "dictionaries").query, connection)] == [
        run.tables["edges"].query("layer == @layer").feature_id.nunique() / d_sae
        for layer, d_sae in D_SAE.items()
    ]
    curve = rows(of(made, Figure)[0].query, connection)
    expected = run.tables["coverage"].query("layer == 0").set_index("rank").coverage
    assert {row["rank"]: row["coverage"] for row in curve}.items() <= dict(expected).items()


@pytest.mark.slow
def test_findings_are_those_of_the_report(tmp_path: Any) -> None:
    storage = Storage(str(tmp_path))
    report_catalogue.publish(storage)
    with closing(connect(storage)) as connection:
        told = overview.findings(connection)
        sections = [build() for build in (*corpus.sections(connection), *graph.sections(connection))]
        in_report = [finding for section in sections for finding in section.findings]
        assert [(one.text, one.verdict) for one in told] == [(one.text, one.verdict) for one in in_report]
        assert all(one.title for one in told)
        # This catalogue has no edges.
        made = built(overview.PAGES, "/", OneStatement(connection))
        assert [one.text for one in of(made, Findings)[0].findings] == [one.text for one in told]
        assert of(made, Missing)
        failed = [cell for cell in cells(grid(made, "expectations"), connection) if "✗" in cell[0]]
        assert failed == [["✗ no", "tokenize", "ids in range", "3 <rows>"]]
        assert ("expectations not met", "1", "#expectations") in of(made, Facts)[-1].facts


def test_a_run_without_dictionaries_says_what_to_add(tmp_path: Any) -> None:
    storage = Storage(str(tmp_path))
    report_catalogue.publish(storage, graph=False)
    with closing(connect(storage)) as connection:
        for pages, path in ((overview.PAGES, "/"), (cover.PAGES, "/cover")):
            (missing,) = of(built(pages, path, connection), Missing)
            assert "[[sae]]" in missing.way
            assert not [one for one in of(built(pages, path, connection), Grid) if one.key == "next"]


def test_findings_that_are_known_are_not_computed_again(connection: Any) -> None:
    known = overview.findings(connection)[:1]
    page = overview.overview(
        Asked(
            connection=connection,
            tables=frozenset({"tokens", "documents", "rejects"}),
            context={"kept": {"findings": known}},
        )
    )
    assert of(page, Findings)[0].findings == known


def test_what_experiments_found_is_asked_once_for_the_tables_of_a_run(connection: Any) -> None:
    asked_of: list[str] = []

    class Told:
        def facts(self, _: Any) -> list[tuple[str, str]]:
            return []

        def findings(self, _: Any) -> list[Finding]:
            asked_of.append("findings")
            return [Finding(title="told by an experiment", text="It holds.", verdict="holds")]

    page = Asked(
        connection=connection,
        tables=frozenset({"tokens", "documents", "rejects"}),
        context={"kept": {}, "parts": [Told()]},
    )
    for _ in range(2):
        (shown,) = of(overview.overview(page), Findings)
        assert shown.findings[-1].title == "told by an experiment"
    assert asked_of == ["findings"]


def test_a_value_in_a_comment_or_a_text_is_no_value() -> None:
    query = Query(sql="-- of $a\nSELECT '$a' AS a, $a AS b -- $a", values={"a": "x\n'; DROP"})
    assert query.text == "-- of $a\nSELECT '$a' AS a, 'x\n''; DROP' AS b -- $a"
