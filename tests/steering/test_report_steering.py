"""The report's part on reactivation and steering: findings both ways, heat maps by their rule, and the page."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steering_catalogue as catalogue
from PIL import Image
from report_reading import Page, read, svgs
from steering_catalogue import Made

from infra.duck import connect
from infra.storage import Storage
from tasks.report import charts
from tasks.report.vocabulary import Estimate
from tasks.stages import write_report
from tasks.steering import findings as steering_findings
from tasks.steering.findings import Reactivation, measure_reactivation, measure_steering, middle_strength
from tasks.steering.heat_maps import GROUND, heat_map, heat_map_chart, heat_maps
from tasks.steering.report import (
    SCORES,
    counted,
    effect_rows,
    effects_chart,
    facts,
    findings,
    score_rows,
    scores_chart,
    steered_texts,
    token_scores_table,
)

NAN = math.nan


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    made = Storage(str(tmp_path_factory.mktemp("full")))
    catalogue.built(made)
    write_report(made)
    return made


@pytest.fixture
def connection(storage: Storage) -> Iterator[Any]:
    with closing(connect(storage)) as connection:
        yield connection


def estimate(value: float, low: float = NAN, high: float = NAN) -> Estimate:
    return Estimate(value=value, low=low, high=high)


def reactivation(
    excess: Estimate, unrelated: Estimate, difference: Estimate, own: float = 0.5
) -> Reactivation:
    scores = {
        "own": estimate(own, own - 0.1, own + 0.1),
        "counterfactual": estimate(0.1, 0.05, 0.2),
        "unrelated": estimate(0.1, 0.05, 0.2),
        "excess": excess,
        "excess_unrelated": unrelated,
    }
    return Reactivation(
        n_cases=20,
        n_relations=4,
        layers=(5, 9),
        kinds={"function": scores, "content": scores},
        difference=difference,
        layers_above=1,
    )


ABOVE, BELOW, AROUND = estimate(0.4, 0.3, 0.5), estimate(-0.4, -0.5, -0.3), estimate(0.1, -0.1, 0.3)


@pytest.mark.parametrize(
    ("excess", "unrelated", "verdict", "said"),
    [
        (ABOVE, ABOVE, "holds", "0.4000 (0.3000 to 0.5000) above the same features’ share"),
        (ABOVE, AROUND, "undecided", "not every interval"),
        (AROUND, ABOVE, "undecided", "0.1000 (−0.1000 to 0.3000) above"),
        (BELOW, ABOVE, "differs", "0.4000 (0.3000 to 0.5000) below"),
        (ABOVE, BELOW, "differs", "does not hold here"),
        (ABOVE, estimate(NAN), "undecided", "no prompt of another relation has these tokens"),
        (estimate(0.4), estimate(0.4), "undecided", "0.4000 (no interval) above"),
    ],
)
def test_reactivation_is_judged_by_both_controls(
    excess: Estimate, unrelated: Estimate, verdict: str, said: str
) -> None:
    finding = steering_findings.is_active_again(reactivation(excess, unrelated, ABOVE))
    assert finding.verdict == verdict
    assert said in finding.text


@pytest.mark.parametrize(
    ("difference", "verdict", "said"),
    [
        (ABOVE, "holds", "above content tokens"),
        (BELOW, "differs", "0.4000 (0.3000 to 0.5000) below content tokens"),
        (AROUND, "undecided", "is undecided here"),
        (estimate(NAN), "untested", "lack later function tokens"),
    ],
)
def test_function_against_content_tokens(difference: Estimate, verdict: str, said: str) -> None:
    finding = steering_findings.more_than_content(reactivation(ABOVE, ABOVE, difference))
    assert finding.verdict == verdict
    assert said in finding.text


def test_without_own_features_nothing_is_tested() -> None:
    assert [f.verdict for f in steering_findings.reactivation_findings(None)] == ["untested"] * 2
    without = reactivation(estimate(NAN), estimate(NAN), estimate(NAN), own=NAN)
    assert steering_findings.is_active_again(without).verdict == "untested"


@pytest.mark.parametrize(
    ("own", "counterfactual", "said"),
    [
        (0.5, 0.4, "Of 100 such activations, 80 would be expected without the context."),
        (0.4, 0.4, "At least as many would be expected without the context."),
        (0.4, 0.5, "At least as many would be expected without the context."),
    ],
)
def test_what_is_active_anyway(own: float, counterfactual: float, said: str) -> None:
    measured = reactivation(ABOVE, ABOVE, ABOVE, own=own)
    measured.kinds["function"]["counterfactual"] = estimate(counterfactual)
    assert said in steering_findings.is_active_again(measured).text


@pytest.mark.slow
def test_few_cases_and_experiments_decide_nothing(tmp_path: Path) -> None:
    for n, verdict in ((5, "undecided"), (6, "holds")):
        # One experiment has no content token.
        found = verdicts(tmp_path / str(n), Made(experiments=n + 1))
        assert found[PLACE][0] == verdict
        assert found[RAISES][0] == "holds"
    few = replace(reactivation(ABOVE, ABOVE, ABOVE), n_cases=5)
    for finding in steering_findings.reactivation_findings(few):
        assert finding.verdict == "undecided"
        assert "5 cases are too few (6 at least)" in finding.text


def verdicts(tmp_path: Path, made: Made) -> dict[str, tuple[str, str]]:
    storage = Storage(str(tmp_path))
    catalogue.built(storage, made)
    with closing(connect(storage)) as connection:
        return {finding.title: (finding.verdict, finding.text) for finding in findings(connection)}


AGAIN, MORE, RAISES, PLACE, COST, LAYER = steering_findings.TITLES


def test_all_hold_with_the_numbers_that_were_put_in(connection: Any) -> None:
    found = {finding.title: (finding.verdict, finding.text) for finding in findings(connection)}
    assert {title: verdict for title, (verdict, _) in found.items()} == {
        AGAIN: "holds",
        MORE: "holds",
        RAISES: "holds",
        PLACE: "holds",
        COST: "own",
        LAYER: "holds",
    }
    assert "at 2 of 2 layers" in found[AGAIN][1]
    assert "In mode clamp at strength 2" in found[RAISES][1]
    assert "the middle one of those swept (the lower of two), not the best" in found[RAISES][1]
    assert "(7 experiments)" in found[PLACE][1]
    assert "nats at strength 4, where 100 % of the texts change" in found[COST][1]
    assert f"{math.exp(0.4):.3g} times" in found[COST][1]
    assert "layer 4 for trait 0 and trait 1" in found[LAYER][1]


@pytest.mark.slow
def test_a_negative_result_comes_out_as_one(tmp_path: Path) -> None:
    falls: Mapping[str, Mapping[float, float]] = {"add": {0.0: 0.0, 1.0: -1.0, 2.0: -2.0}}
    made = Made(
        cases=4, function=0.05, content=0.7, counterfactual=0.6, unrelated=0.5, gain=falls, layers=(4, 1)
    )
    found = verdicts(tmp_path, made)
    assert {title: verdict for title, (verdict, _) in found.items()} == {
        AGAIN: "differs",
        MORE: "differs",
        RAISES: "differs",
        PLACE: "differs",
        COST: "own",
        LAYER: "differs",
    }
    assert "no strength raises the target on average" in found[COST][1]
    assert "at 0 of 2 layers" in found[AGAIN][1]
    assert "layer 1 for trait 1 and layer 4 for trait 0" in found[LAYER][1]


@pytest.mark.slow
def test_raising_no_more_than_random_features_is_not_enough(tmp_path: Path) -> None:
    same: Mapping[str, Mapping[float, float]] = {"add": {0.0: 0.0, 1.0: 1.0}}
    made = Made(cases=1, gain=same, random_gain=1.0, content_gain=1.0, noise=0.5)
    assert verdicts(tmp_path / "a", made)[RAISES][0] == "undecided"
    found = verdicts(tmp_path / "b", replace(made, random_gain=3.0, content_gain=2.0, noise=0.1))
    assert [found[title][0] for title in (RAISES, PLACE)] == ["differs", "differs"]
    assert "below that under random features" in found[RAISES][1]
    alone = verdicts(tmp_path / "c", replace(made, draws=0, noise=0.1))
    assert alone[RAISES][0] == "undecided"
    assert "no random features to compare with" in alone[RAISES][1]


@pytest.mark.slow
def test_a_single_case_and_experiment_decide_nothing(tmp_path: Path) -> None:
    found = verdicts(tmp_path, Made(cases=1, relations=("one",), experiments=1, given=True))
    assert {found[title][0] for title in (AGAIN, MORE, RAISES, PLACE)} == {"undecided"}
    assert "(no interval)" in found[AGAIN][1]
    assert LAYER not in found


@pytest.mark.slow
def test_only_strength_zero_leaves_steering_untested(tmp_path: Path) -> None:
    found = verdicts(tmp_path, Made(cases=1, gain={"add": {0.0: 0.0}}))
    assert [found[title][0] for title in (RAISES, PLACE, COST)] == ["untested"] * 3
    write_report(Storage(str(tmp_path)))
    assert "No strength above 0 was swept" in read(Storage(str(tmp_path)))


def test_middle_strength() -> None:
    assert middle_strength([0, 8, 1, 4, 2, 2]) == 2
    assert middle_strength([3.0, 0, 1, 2]) == 2
    assert middle_strength([0.0]) is None


def test_one_layer_needs_two_layers_and_two_traits() -> None:
    def row(trait: str, layer: int, best: bool, separation: float | None = 1.0) -> dict[str, Any]:
        return {"trait": trait, "layer": layer, "separation": separation, "is_most_informative": best}

    two = [row("a", 1, True), row("a", 2, False), row("b", 1, True), row("b", 2, False)]
    finding = steering_findings.one_layer(two)
    assert finding is not None
    assert finding.verdict == "holds"
    assert steering_findings.one_layer(two[:2]) is None
    assert steering_findings.one_layer([two[0], two[2]]) is None
    assert steering_findings.one_layer([*two[:2], row("b", 2, True, None)]) is None


def test_pooled_numbers_are_those_of_cases_drawn_one_by_one(connection: Any) -> None:
    """The plainest bootstrap over all layers: draw cases, sum their positions in a loop, take differences."""
    rows = connection.execute(
        'SELECT "case", is_function, n_own, own, counterfactual, n_counterfactual FROM reactivation_positions '
        "WHERE n_own > 0"
    ).fetchall()
    cases = sorted({row[0] for row in rows})

    def difference(drawn: list[str]) -> float:
        excess = {}
        for kind in (True, False):
            mine = [row for case in drawn for row in rows if row[0] == case and row[1] == kind]
            excess[kind] = sum(row[3] - row[2] * row[4] / row[5] for row in mine) / sum(
                row[2] for row in mine
            )
        return excess[True] - excess[False]

    measured = measure_reactivation(connection, resamples=40)
    assert measured is not None
    assert measured.n_cases == 16
    rng = np.random.default_rng(0)
    drawn = [difference([cases[i] for i in rng.integers(0, len(cases), len(cases))]) for _ in range(40)]
    assert measured.difference.value == pytest.approx(difference(cases), abs=1e-9)
    ends = [measured.difference.low, measured.difference.high]
    assert ends == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-9)


def test_the_difference_of_places_is_paired(connection: Any) -> None:
    rows = connection.execute(
        "SELECT prompt, mode, place, target_logprob_delta FROM steering WHERE control = 'trait' AND strength = 2"
    ).fetchall()
    by = {(prompt, mode, place): value for prompt, mode, place, value in rows}
    pairs = [
        by[prompt, "add", "last function token"] - by[prompt, "add", "content token"]
        for prompt in sorted({row[0] for row in rows})
        if (prompt, "add", "content token") in by
    ]
    steered = measure_steering(connection)
    add = steered.modes[0]
    assert (steered.n_experiments, add.mode, add.strength, add.n, add.n_paired) == (
        8,
        "add",
        2,
        8,
        len(pairs),
    )
    assert add.difference.value == pytest.approx(np.mean(pairs), abs=1e-9)
    assert np.min(pairs) <= add.difference.low < add.difference.value < add.difference.high <= np.max(pairs)
    # Paired, what is an experiment's own cancels.
    assert add.difference.high - add.difference.low < 2 * (add.gain.high - add.gain.low)


def test_heat_maps_are_chosen_by_the_rule(connection: Any) -> None:
    own = connection.execute(
        'SELECT layer, count(DISTINCT ("case", prompt, feature_id)) FROM reactivations WHERE is_own GROUP BY layer'
    ).fetchall()
    layer = max(own, key=lambda row: (row[1], -row[0]))[0]
    rows = connection.execute(
        'SELECT relation, "case", sum(own), sum(n_own) FROM reactivation_positions '
        "WHERE layer = ? AND is_function GROUP BY ALL HAVING sum(n_own) > 0",
        [layer],
    ).fetchall()
    expected = []
    for relation in ("capitals", "opposites"):
        ranked = sorted((a / b, case) for name, case, a, b in rows if name == relation)
        expected.append((ranked[(len(ranked) - 1) // 2][1], ranked[(len(ranked) - 1) // 2][0]))
    maps = heat_maps(connection)
    assert [(found.case, found.share) for found in maps] == expected
    assert {found.layer for found in maps} == {layer}
    assert [found.case for found in heat_maps(connection, limit=1)] == [expected[0][0]]


def test_a_heat_map_has_the_activations(connection: Any) -> None:
    found = heat_maps(connection)[0]
    active = {
        (prompt, position, feature): (value, is_own)
        for prompt, position, feature, value, is_own in connection.execute(
            'SELECT prompt, position, feature_id, activation, is_own FROM reactivations WHERE "case" = ? AND layer = ?',
            [found.case, found.layer],
        ).fetchall()
    }
    assert len(set(found.features)) == len(found.features) == sum(found.own) > 2
    for panel in found.panels:
        assert panel.tokens == (
            " rare",
            " t5",
            *panel.tokens[2:4],
            " rare",
            "\n",
            " <b>unseen</b>",
            "\n",
            "\n",
        )
        assert panel.in_place == (False, False, True, True, *[False] * 5)
        assert panel.is_function == (False, False, False, False, False, True, False, True, True)
        for row, feature in enumerate(found.features):
            largest = max(value for (_, _, other), (value, _) in active.items() if other == feature)
            for column in range(9):
                value, _ = active.get((panel.prompt, column + 1, feature), (0.0, False))
                assert panel.values[row][column] == value / largest
    for feature, owner in zip(found.features, found.owners, strict=True):
        assert {
            prompt for (prompt, _, other), (_, is_own) in active.items() if other == feature and is_own
        } == {found.panels[owner].prompt}


@pytest.mark.slow
def test_a_long_prompt_loses_its_middle(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    run = catalogue.steering_run(storage, Made(cases=1, relations=("long",), experiments=0))
    (case,) = run.tokens
    for row in run.tokens[case]:
        row["position"] += 60 * (row["position"] > 4)
    template = next(row for row in run.tokens[case] if row["position"] > 60)
    for prompt in {row["prompt"] for row in run.tokens[case]}:
        run.tokens[case] += [{**template, "prompt": prompt, "position": p} for p in range(5, 65)]
    for row in run.features[case]:
        row["position"] += 60 * (row["position"] > 4)
    catalogue.published(run.write(storage))
    with closing(connect(storage)) as connection:
        (found,) = heat_maps(connection)
    for panel in found.panels:
        assert len(panel.tokens) == 41
        assert [place for place, token in enumerate(panel.tokens) if token is None] == [16]
        assert panel.tokens[-2:] == ("\n", "\n")
    first, second = charts.vega_lite(heat_map(found))["hconcat"]
    assert (first["width"], second["width"]) == (41 * 24, 41 * 24)


@pytest.mark.slow
def test_the_heat_map_is_a_picture_of_the_values(connection: Any) -> None:
    found = heat_maps(connection)[0]
    chart = heat_map_chart(found)
    spec = charts.vega_lite(chart.spec)

    def rows(layer: dict[str, Any]) -> list[dict[str, Any]]:
        return list(spec["datasets"][layer["data"]["name"]])

    for place, (drawn, panel) in enumerate(zip(spec["hconcat"], found.panels, strict=True)):
        cells, frame, bold, normal, *names = drawn["layer"]
        values = {(row["row"], row["column"]): row["activation"] for row in rows(cells)}
        assert values == {
            (row, column): value for row, line in enumerate(panel.values) for column, value in enumerate(line)
        }
        colour = cells["encoding"]["color"]
        assert colour["value"] == GROUND
        assert (colour["condition"]["test"], colour["condition"]["scale"]["domain"]) == (
            "datum.activation > 0",
            [0, 1],
        )
        assert colour["condition"]["legend"]["title"] == "activation / largest"
        [framed] = rows(frame)
        assert (framed["column"], framed["right"]) == (2, 4)
        assert bold["mark"]["fontWeight"] == "bold"
        assert (5.5, r"\n") in [(row["column"], row["token"]) for row in rows(bold)]
        assert [row["column"] for row in rows(bold)] == [
            column + 0.5 for column, is_function in enumerate(panel.is_function) if is_function
        ]
        assert len(rows(bold)) + len(rows(normal)) == len(panel.tokens)
        assert len(names) == (place == 0)
    uri = charts.png_uri(chart.spec)
    assert uri == charts.png_uri(heat_map(found))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))
    assert pixels.shape[1] > 400
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 5
    assert "\u202e" not in chart.alt
    assert found.case in chart.alt


@pytest.mark.slow
def test_charts_show_the_tables(connection: Any) -> None:
    whole = [row for row in score_rows(connection) if row["token"] is None]
    spec = charts.vega_lite(scores_chart(whole))
    assert len(spec["concat"]) == 2
    for panel, kind in zip(spec["concat"], ("function", "content"), strict=True):
        drawn = {
            (row["layer"], row["score"]): (row["low"], row["value"], row["high"])
            for row in spec["datasets"][panel["data"]["name"]]
        }
        assert drawn == {
            (row["layer"], name): (row[f"{score}_low"], row[score], row[f"{score}_high"])
            for row in whole
            for score, name in zip(("own", "counterfactual", "unrelated"), SCORES.looks, strict=True)
            if row["kind"] == kind
        }
    effects = effect_rows(connection)
    spec = charts.vega_lite(effects_chart(effects))
    lines = [line["concat"] for line in spec["vconcat"]]
    assert [len(line) for line in lines] == [2, 2, 2]
    assert [panel["title"] for panel in lines[0]] == ["mode: add", "mode: clamp"]
    band, line, marks = lines[0][0]["layer"]
    assert line["encoding"]["y"]["field"] == "target_logprob_delta"
    assert (band["encoding"]["y"]["field"], band["encoding"]["y2"]["field"]) == (
        "target_logprob_delta_low",
        "target_logprob_delta_high",
    )
    for channel, encoded in (("shape", marks), ("strokeDash", line), ("color", marks)):
        assert len(encoded["encoding"][channel]["scale"]["domain"]) == 5
    drawn = spec["datasets"][lines[0][0]["data"]["name"]]
    assert drawn == [row for row in effects if row["mode"] == "add"]


def test_texts_before_and_after(connection: Any) -> None:
    rows = steered_texts(connection, 2.0)
    assert {row["strength"] for row in rows} == {2}
    # 8 experiments of which one has no content token, 2 modes
    assert len(rows) == 2 * (8 * 4 + 7)
    assert rows[0]["place"] == "last function token"
    every = steered_texts(connection)
    assert {(row["control"], row["strength"]) for row in every} == {("trait", s) for s in (1, 2, 4, 8)}
    assert len(every) == 2 * 4 * (8 * 2 + 7)


def test_the_page_has_every_section(storage: Storage) -> None:
    html = read(storage)
    page = Page(html)
    keys = re.findall(r'<section id="([^"]+)"', html)
    assert keys == [
        "zipf", "documents", "spread", "graph", "reactivation", "heat-maps", "traits", "steering", "steered-texts",
        "run",
    ]  # fmt: skip
    assert len(page.images) == 2 + 1 + 2 + 1
    assert all(len(image["alt"]) > 40 for image in page.images)
    assert len(svgs(page)) == len(page.images)
    text = "".join(page.text)
    for fact in ("cases16", "traits2", "steering experiments8"):
        assert fact in re.sub(r"\s", "", text).replace("steeringexperiments", "steering experiments")
    assert html.count("<figcaption>") == 2
    assert "the one in the middle when its cases are ranked" in text
    scores = page.tables["Own features active again (%), by layer and kind of token"]
    assert [row[:2] for row in scores[1:]] == [
        ["1", "function"],
        ["1", "content"],
        ["4", "function"],
        ["4", "content"],
    ]
    assert page.tables["Own features active again (%) at single function tokens"][1][0] == r"\n"
    texts = page.tables["Before and after, at the middle strength"]
    assert len(texts) == 1 + 2 * (8 * 4 + 7)
    assert texts[1][6:8] == [
        "It is here, 0.",
        r"</code><script>document.title='pwned'</script>\n\n␣␣of\u{202e} add 2",
    ]
    assert any(row[7] == "(as before)" for row in texts)
    assert len(page.tables["Before and after, the trait at all strengths"]) == 1 + 2 * 4 * (8 * 2 + 7)
    assert len(page.tables["The traits’ strongest features"]) == 1 + 2 * 8
    assert len(page.tables["What steering does"]) == 1 + 2 * 5 * 5


def test_hostile_texts_are_inert(storage: Storage) -> None:
    html = read(storage)
    page = Page(html)
    assert page.tags["script"] == 0
    assert page.tags["i"] == page.tags["b"] == 0
    assert "\u202e" not in html
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", html))


@pytest.mark.slow
def test_same_tables_give_the_same_bytes(storage: Storage) -> None:
    first = read(storage)
    write_report(storage)
    assert read(storage) == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "keys", "told"),
    [
        (Made(cases=2, experiments=0), ["reactivation", "heat-maps"], [("cases", "4")]),
        (
            Made(cases=0, experiments=2),
            ["traits", "steering", "steered-texts"],
            [("traits", "2"), ("steering experiments", "2")],
        ),
    ],
)
def test_what_was_not_asked_for_has_no_section(
    tmp_path: Path, made: Made, keys: list[str], told: list[tuple[str, str]]
) -> None:
    storage = Storage(str(tmp_path))
    catalogue.built(storage, made)
    write_report(storage)
    assert re.findall(r'<section id="([^"]+)"', read(storage))[4:-1] == keys
    with closing(connect(storage)) as connection:
        assert facts(connection) == told


@pytest.mark.slow
def test_cases_without_own_features_say_so(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    run = catalogue.steering_run(storage, Made(cases=1, experiments=0))
    for rows in run.features.values():
        rows[:] = [row for row in rows if row["position"] not in (3, 4)]
    catalogue.published(run.write(storage))
    write_report(storage)
    html = read(storage)
    assert "No prompt of any case has a feature of its own" in html
    assert html.count("– Not tested.") == 2


@pytest.mark.slow
def test_without_steering_there_is_none_of_it(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    catalogue.built(storage, Made(cases=0, experiments=0))
    with closing(connect(storage)) as connection:
        assert counted(connection) == {"cases": 0, "traits": 0, "steering experiments": 0}
        assert facts(connection) == findings(connection) == heat_maps(connection) == []
    write_report(storage)
    assert "steering" not in re.sub(
        r"<code>.*?</code>|<style>.*?</style>", "", read(storage).split("<main>")[0]
    )


def test_many_tokens_are_cut_and_counted(connection: Any) -> None:
    row = next(row for row in score_rows(connection) if row["token"] is not None)
    table = token_scores_table([row | {"token": f" {n}"} for n in range(50)], row["kind"])
    assert len(table.rows) == 40
    assert table.note.startswith("10 more rows")
