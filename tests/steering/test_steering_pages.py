"""The explorer's pages on cases and steering: numbers against SQL, choices, hostile texts, and what a run lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import duckdb
import pytest
import steering_catalogue as catalogue
from page_reading import asked, built, cells, grid, of, rows
from steering_catalogue import HOSTILE, LAYERS, Made

from infra.duck import connect
from infra.storage import Storage
from tasks.explore.vocabulary import Change, Contexts, Controls, Facts, Figure, Findings, Missing, NotThere
from tasks.report.text import passage
from tasks.steering.pages import PAGES, case
from tasks.steering.report import findings

PATHS = [page.path for page in PAGES]
NAME = "capitals 0"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    made = Storage(str(tmp_path_factory.mktemp("full")))
    catalogue.built(made)
    return made


@pytest.fixture
def connection(storage: Storage) -> Iterator[Any]:
    with closing(connect(storage)) as connection:
        yield connection


@pytest.mark.slow
def test_the_overview_has_the_report_s_findings_and_numbers(connection: Any) -> None:
    page = built(PAGES, "/steering", connection)
    assert [one for panel in of(page, Findings) for one in panel.findings] == findings(connection)
    (n,) = connection.execute("SELECT count(*) FROM steering_effects").fetchone()
    assert len(rows(grid(page, "effects").query, connection)) == n
    assert len(of(page, Figure)) == 2


def test_cases_have_their_shares(connection: Any) -> None:
    page = built(PAGES, "/steering/cases", connection, layer="4")
    found = {row["case"]: row for row in rows(grid(page, "cases").query, connection)}
    names = {name for (name,) in connection.execute('SELECT DISTINCT "case" FROM prompt_tokens').fetchall()}
    assert found.keys() == names
    own, chances = connection.execute(
        'SELECT sum(own), sum(n_own) FROM reactivation_positions WHERE "case" = ? AND layer = 4 AND is_function',
        [NAME],
    ).fetchone()
    assert found[NAME]["function"] == pytest.approx(float(own) / float(chances))
    (n,) = connection.execute(
        'SELECT count(DISTINCT feature_id) FROM reactivations WHERE "case" = ? AND layer = 4 AND is_own',
        [NAME],
    ).fetchone()
    assert found[NAME]["own_features"] == n
    whole = rows(grid(built(PAGES, "/steering/cases", connection, layer=""), "cases").query, connection)
    assert all(row["own_features"] >= found[row["case"]]["own_features"] for row in whole)


def test_a_case_has_its_heat_map_its_tokens_and_its_features(connection: Any) -> None:
    page = built(PAGES, "/steering/case", connection, case=NAME, layer="4")
    (figure,) = of(page, Figure)
    assert NAME in figure.chart.alt
    found = rows(grid(page, "features").query, connection)
    (n,) = connection.execute(
        'SELECT count(DISTINCT (prompt, feature_id)) FROM reactivations WHERE "case" = ? AND layer = 4',
        [NAME],
    ).fetchone()
    assert len(found) == n
    later = connection.execute(
        'SELECT count(*) FROM reactivations JOIN prompt_tokens USING ("case", prompt, position) '
        'WHERE "case" = ? AND layer = 4 AND reactivations.is_function AND looked_at',
        [NAME],
    ).fetchone()[0]
    assert sum(row["later_function"] for row in found) == later
    (link,) = [column for column in grid(page, "features").columns if hasattr(column, "to")]
    assert link.to(found[0]) == f"/feature/4/{found[0]['feature_id']}"
    (texts,) = of(page, Contexts)
    assert [context.about for context in texts.contexts] == ["prompt 1, layer 4", "prompt 2, layer 4"]
    shares = connection.execute(
        'SELECT own / n_own FROM reactivation_positions WHERE "case" = ? AND layer = 4 AND n_own > 0 '
        "ORDER BY prompt, position",
        [NAME],
    ).fetchall()
    shown = [token for context in texts.contexts for token in context.tokens]
    assert [token.strength for token in shown if "own features" in token.value] == [
        pytest.approx(share) for (share,) in shares
    ]
    assert sum(token.mark for token in shown) == 4
    assert "\\n" in {token.text for token in shown}


def test_all_layers_stand_below_each_other(connection: Any) -> None:
    page = built(PAGES, "/steering/case", connection, case=NAME, layer="")
    (texts,) = of(page, Contexts)
    assert len(texts.contexts) == 2 * len(LAYERS)
    assert not of(page, Figure)


@pytest.mark.parametrize("layer", ["4", "1"])
def test_a_layer_is_chosen(connection: Any, layer: str) -> None:
    (controls,) = of(built(PAGES, "/steering/case", connection, case=NAME, layer=layer), Controls)
    assert getattr(controls.controls[0], "value", None) == layer


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("/steering/case", {"layer": "nonsense"}),
        ("/steering/cases", {"layer": "9"}),
        ("/steering/texts", {"strength": "77"}),
        ("/steering/texts", {"mode": "none"}),
        ("/steering/texts", {"case": "none"}),
    ],
)
def test_what_cannot_be_chosen_is_said(connection: Any, path: str, values: dict[str, str]) -> None:
    ((key, value),) = values.items()
    with pytest.raises(NotThere, match=f"no {key} {value}"):
        built(PAGES, path, connection, **values)


def test_a_case_that_is_not_there_says_so(connection: Any) -> None:
    with pytest.raises(NotThere, match="no case"):
        case(asked(connection, case=HOSTILE))


def test_texts_are_sorted_by_effect_and_stand_beside_random_ones(connection: Any) -> None:
    values = {"mode": "add", "place": "last function token", "strength": "4"}
    page = built(PAGES, "/steering/texts", connection, **values)
    found = rows(grid(page, "texts").query, connection)
    expected = connection.execute(
        "SELECT target_logprob_delta FROM steering WHERE control = 'trait' AND mode = 'add' AND strength = 4 "
        "AND place = 'last function token' ORDER BY 1 DESC"
    ).fetchall()
    assert [row["target_logprob_delta"] for row in found] == [delta for (delta,) in expected]
    row = found[0]
    random = connection.execute(
        "SELECT avg(target_logprob_delta) FROM steering WHERE control = 'random' AND mode = 'add' AND strength = 4 "
        "AND place = 'last function token' AND \"case\" = ? AND prompt = ? AND target = ?",
        [row["case"], row["prompt"], row["target"]],
    ).fetchone()[0]
    assert row["advantage"] == pytest.approx(row["target_logprob_delta"] - random)
    changes = of(page, Change)
    assert len(changes) == 2 * len(found)
    assert changes[0].after == passage(f"{HOSTILE} add 4")
    assert "\u202e" not in changes[0].after
    assert changes[1].title.startswith("random features, draw 1")
    assert changes[1].after == changes[1].before
    facts, random_facts = of(page, Facts)
    low, high = connection.execute(
        "SELECT advantage_low, advantage_high FROM steering_effects WHERE control = 'trait' AND mode = 'add' "
        "AND strength = 4 AND place = 'last function token'"
    ).fetchone()
    assert f"({low:.2f} to {high:.2f})" in {name: value for name, value, _ in facts.facts}["over random"]
    assert "over random" not in {name for name, *_ in random_facts.facts}


@pytest.mark.slow
def test_one_experiment_has_all_draws_and_its_sweep(connection: Any) -> None:
    whole = grid(built(PAGES, "/steering/texts", connection), "texts")
    row = rows(whole.query, connection)[0]
    strongest = grid(built(PAGES, "/steering/texts", connection, strength="4"), "texts")
    (link,) = [column for column in strongest.columns if hasattr(column, "to")]
    at = dict(parse_qsl(urlsplit(link.to(row)).query))
    assert at["strength"] == "4"
    assert len(cells(grid(built(PAGES, "/steering/texts", connection, **at), "texts"), connection)) == 1
    one = {key: row[key] for key in ("case", "prompt", "target")}
    page = built(PAGES, "/steering/texts", connection, **one)
    assert len(cells(grid(page, "texts"), connection)) == 1
    assert len(of(page, Change)) == 1 + Made().draws
    assert len(of(page, Figure)) == 1
    (other,) = {"trait 0", "trait 1"} - {row["case"]}
    page = built(PAGES, "/steering/texts", connection, case=other)
    assert {row["case"] for row in rows(grid(page, "texts").query, connection)} == {other}


@pytest.mark.parametrize("path", PATHS)
def test_a_run_without_it_is_told_what_to_add(path: str) -> None:
    page = built(PAGES, path, duckdb.connect())
    (missing,) = of(page, Missing)
    assert "[steering]" in missing.way


@pytest.mark.parametrize(("made", "shown"), [(Made(experiments=0), 1), (Made(cases=0), 1)])
@pytest.mark.slow
def test_cases_or_experiments_alone(tmp_path: Path, made: Made, shown: int) -> None:
    storage = Storage(str(tmp_path))
    catalogue.built(storage, made)
    with closing(connect(storage)) as connection:
        for path in PATHS:
            page = built(PAGES, path, connection)
            if path == "/steering":
                assert len(of(page, Figure)) == shown


@pytest.mark.slow
def test_a_case_without_a_feature_of_its_own_says_so(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    run = catalogue.steering_run(storage, Made(cases=1, experiments=0))
    run.features[NAME] = [row for row in run.features[NAME] if row["position"] not in {3, 4}]
    catalogue.published(run.write(storage))
    with closing(connect(storage)) as connection:
        page = built(PAGES, "/steering/case", connection, case=NAME)
        assert not of(page, Figure)
        assert "no prompt of this case has" in of(page, Missing)[0].what.lower()
        found = rows(grid(built(PAGES, "/steering/cases", connection), "cases").query, connection)
        assert next(row for row in found if row["case"] == NAME)["function"] is None
