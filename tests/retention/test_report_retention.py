"""Retention's part of the report: each claim both ways, numbers, alt texts, charts, and what a run lacks."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import retention_catalogue
from retention_catalogue import POLICIES, Made
from rich.console import Console

from tasks.report import charts, page
from tasks.report.vocabulary import Estimate, Finding, Section
from tasks.retention import claims, report, report_costs
from tasks.retention.looks import policy_key, without_far
from tasks.retention.report_costs import losses
from tasks.retention.report_tokens import half_way, survival_rows

BEST = {"str": 0.5, "cmp": 0.5}
WORST = {"str": 2.0, "cmp": 2.0}


def made(**changed: Any) -> Made:
    """A run in which a policy's own numbers are multiplied: `loss=BEST`."""
    run = Made()
    for name, by in changed.items():
        if name in {"loss", "mass", "error", "carried", "similarity", "speed"}:
            getattr(run, name).update({policy: getattr(run, name)[policy] * by[policy] for policy in by})
        else:
            setattr(run, name, by)
    return run


def verdicts(run: Made) -> dict[str, str]:
    return {
        finding.title: finding.verdict for finding in claims.findings(retention_catalogue.connection(run))
    }


def finding(run: Made, title: str) -> Finding:
    (found,) = (one for one in claims.findings(retention_catalogue.connection(run)) if one.title == title)
    return found


@pytest.mark.parametrize(
    ("changed", "title", "verdict"),
    [
        ({"mass": BEST}, "Survival", "holds"),
        ({"mass": WORST}, "Survival", "differs"),
        ({}, "Survival", "undecided"),
        ({"carried": {"str": 0.8, "cmp": 0.8}}, "Error propagation", "holds"),
        ({"carried": {"str": 1.3, "cmp": 1.3}}, "Error propagation", "differs"),
        ({"loss": {"str": 0.02, "cmp": 0.02}}, "Coherence", "holds"),
        # Better than all baselines, yet more than is tolerated.
        ({"loss": BEST}, "Coherence", "differs"),
        ({"similarity": BEST}, "Redundancy", "holds"),
        ({"similarity": {"str": 1.1, "cmp": 1.1}}, "Redundancy", "differs"),
        ({}, "Redundancy", "undecided"),
        ({}, "Overhead and speed", "holds"),
        ({"speed": {"str": 0.5, "cmp": 0.5}}, "Overhead and speed", "differs"),
        ({"speed": {"str": 1 / 1.2, "cmp": 1 / 1.2}}, "Overhead and speed", "undecided"),
    ],
)
def test_a_claim_holds_differs_or_is_undecided(changed: Any, title: str, verdict: str) -> None:
    found = verdicts(made(**changed))
    assert [found[f"{title}: {policy}"] for policy in ("str", "cmp")] == [verdict] * 2


@pytest.mark.slow
def test_a_smaller_error_that_grows_as_the_others_do_is_not_enough() -> None:
    found = verdicts(made(error=BEST))
    assert found["Error propagation: str"] == "undecided"
    # Of a policy with tiers nothing says what is carried.
    assert found["Error propagation: cmp"] == "holds"
    assert "cannot be told" in finding(made(error=BEST), "Error propagation: cmp").text


@pytest.mark.slow
def test_one_better_baseline_at_one_budget_is_enough_to_refute() -> None:
    run = made(mass={**BEST, "tova": 0.2})
    assert verdicts(run)["Survival: str"] == "differs"
    assert "(tova) at a budget of 12.5 %" in finding(run, "Survival: str").text


def test_a_few_sequences_that_happen_to_agree_prove_nothing() -> None:
    """Four differences above 0 make every resample's mean so: without any difference, once in sixteen times."""
    of = {("stream", 2048): {"str": [0.10, 0.11, 0.35, 0.90], "tova": [0.09, 0.09, 0.09, 0.09]}}
    readings = object.__new__(claims.Readings)
    readings.resamples = 200
    readings.found = {
        (setting, policy, 0.25): {i: {"retained_mass": value} for i, value in enumerate(values)}
        for setting, policies in of.items()
        for policy, values in policies.items()
    }
    found = readings.compare(("stream", 2048), 0.25, ("str", claims.MASS), ("tova", claims.MASS))
    assert found is not None
    assert found.difference.sign == "above"
    assert found.sign(1) == "unclear"


def test_a_row_shows_the_comparison_that_its_verdict_rests_on() -> None:
    """The smallest difference may be clear, and a larger one not: then that one is why nothing is decided."""

    def compared(other: str, value: float, width: float, chance: float) -> claims.Compared:
        difference = Estimate(value=value, low=value - width, high=value + width)
        return claims.Compared(other=other, own=0.0, others=value, difference=difference, chance=chance)

    clear, unclear = compared("clear", 0.1, 0.01, 0.999), compared("unclear", 0.2, 0.5, 0.7)
    judged = claims.Judged(
        claim="", measure="", policy="str", budget=0.25, length=2048, compared=[clear, unclear]
    )
    assert (judged.verdict, judged.hardest.other) == ("undecided", "unclear")
    assert "some of these differences may be chance" in finding(made(), "Survival: str").text


@pytest.mark.slow
def test_without_any_difference_hardly_a_claim_is_refuted() -> None:
    refuted = 0
    for own_noise in (0.01, 0.02, 0.03, 0.05, 0.1):
        found = verdicts(made(own_noise=own_noise))
        refuted += sum(
            found[f"{title}: {policy}"] == "differs"
            for title in ("Survival", "Redundancy", "Error propagation")
            for policy in ("str", "cmp")
        )
    # 30 claims of 15 to 30 comparisons each: 95 % intervals alone refute about every third.
    assert refuted <= 2


def test_the_loss_of_all_tokens_stands_beside_that_of_the_groups() -> None:
    connection = retention_catalogue.connection(made())
    section = losses(connection)
    (table,) = section.tables
    told = {(row["policy"], row["budget"]): row["all tokens"] for row in table.rows}
    for policy, budget, ratio in connection.execute(
        "SELECT policy, budget, perplexity_ratio FROM retention WHERE policy <> 'full'"
    ).fetchall():
        assert told[policy, budget] == pytest.approx(math.log(ratio))
    assert "str all tokens 0." in section.charts[0].alt


@pytest.mark.parametrize(("error", "drawn"), [(0.0, 0), (0.001, 1)])
def test_a_run_in_which_nothing_is_lost_has_a_report(
    monkeypatch: pytest.MonkeyPatch, error: float, drawn: int
) -> None:
    """Budgets of 1: errors are 0, or all of quantization, and what is carried is not known."""
    nothing = {"error": error, "local_error": 0.0, "carried": None, "carried_low": None, "carried_high": None}
    there = report_costs.layer_rows(retention_catalogue.connection(made()))
    monkeypatch.setattr(report_costs, "layer_rows", lambda _: [row | nothing for row in there])
    charts_of = report_costs.errors(None).charts
    assert len(charts_of) == drawn
    assert all(page.image(chart).width > 0 for chart in charts_of)


def test_baselines_of_other_bytes_are_not_compared() -> None:
    run = made(mass={**BEST, "h2o": 0.1}, bytes_more={"h2o": 0.3})
    found = finding(run, "Survival: str")
    assert found.verdict == "holds"
    assert "Not compared, for they may take other bytes: h2o." in found.text
    bytes_more = dict.fromkeys(claims.BASELINES, 0.3)
    found_without = verdicts(made(loss={"str": 0.02}, similarity=BEST, bytes_more=bytes_more))
    for claim in ("Survival", "Error propagation", "Coherence", "Redundancy"):
        assert found_without[f"{claim}: str"] == "untested"


def test_window_and_the_probes_are_no_baselines() -> None:
    run = made(mass={**BEST, "window": 0.01, "function": 0.01, "content": 0.01})
    assert verdicts(run)["Survival: str"] == "holds"


def test_differences_are_paired_by_sequence() -> None:
    """Sequences differ by 30 %, policies by 3 %: unpaired, nothing could be told."""
    run = made(loss={"str": 0.97 * 0.1, "cmp": 0.97 * 0.1, **dict.fromkeys(claims.BASELINES, 0.1)})
    rows = [
        one for one in claims.judge(retention_catalogue.connection(run)) if one.measure == claims.LOSS.title
    ]
    assert {one.verdict for one in rows} == {"holds"}
    widths = {one.hardest.difference.high - one.hardest.difference.low for one in rows}
    assert max(widths) < 0.002


def test_the_difference_is_that_of_the_sums() -> None:
    connection = retention_catalogue.connection(made(loss=BEST))
    (judged,) = (
        one
        for one in claims.judge(connection)
        if (one.policy, one.budget, one.measure) == ("str", 0.25, claims.LOSS.title)
    )
    sums = dict(
        connection.execute(
            "SELECT policy, sum(delta_nll_sum) / sum(n) FROM retention_readings WHERE budget = 0.25 GROUP BY policy"
        ).fetchall()
    )
    assert len(judged.compared) == len(claims.BASELINES)
    for one in judged.compared:
        assert one.own == pytest.approx(sums["str"])
        assert one.difference.value == pytest.approx(sums[one.other] - sums["str"])
        assert one.difference.low < one.difference.value < one.difference.high
    assert judged.hardest.difference.value == min(one.difference.value for one in judged.compared)


@pytest.mark.slow
def test_claims_are_judged_while_streaming_and_at_the_longest_length_with_enough_sequences() -> None:
    run = made(sequences={1024: 20, 2048: 9, 8192: 3}, protocols=("prefill", "stream"))
    assert claims.Readings(retention_catalogue.connection(run)).setting == ("stream", 2048)
    few = made(sequences={1024: 5, 8192: 3})
    assert claims.Readings(retention_catalogue.connection(few)).setting == ("stream", 1024)
    exact = made(protocols=("prefill",))
    assert verdicts(exact)["Error propagation: str"] == "untested"
    assert verdicts(exact)["Survival: str"] == "undecided"


@pytest.mark.parametrize(
    ("function", "content", "said"),
    [
        (0.5, 1.0, "Function tokens are"),
        (1.0, 0.5, "Content tokens are"),
        (1.0, 1.0, "not the same, or not clear"),
    ],
)
def test_function_against_content(function: float, content: float, said: str) -> None:
    found = finding(made(loss={"function": function, "content": content}), "Function against content tokens")
    assert (found.verdict, said in found.text) == ("own", True)


def test_a_refuted_claim_needs_less_than_its_share_of_chance() -> None:
    below = Estimate(value=-0.2, low=-0.3, high=-0.1)
    one = claims.Compared(other="h2o", own=1, others=2, difference=below, chance=0.004)
    assert one.sign(among=5) == "below"
    assert one.sign(among=10) == "unclear"
    assert claims.Compared(other="full", own=1, others=2, difference=below).sign(among=99) == "below"


def test_options_of_a_policy_are_judged_as_it_is() -> None:
    assert [claims.family(name) for name in ("str", "str-gate", "cmp_4bit", "stream")] == [
        "str",
        "str",
        "cmp",
        "stream",
    ]


def built(run: Made) -> dict[str, Section]:
    sections = report.sections(retention_catalogue.connection(run))
    return {section.key: section for section in (build() for build in sections)}


@pytest.mark.slow
def test_every_section_has_charts_that_can_be_drawn_and_told() -> None:
    found = built(made(loss=BEST, mass=BEST))
    assert list(found) == [
        "retention",
        *(f"retention-{name}" for name in ("frontier", "survival", "layers", "losses", "speed", "retrieval")),
    ]
    for section in found.values():
        for chart in section.charts:
            assert charts.svg(chart.spec).startswith("<svg")
            assert len(chart.alt) > 60
            assert "None" not in chart.alt
        for table in section.tables:
            assert all(len(cells) == len(table.columns) for cells in table.cells)
            assert not any("None" in cell or "nan" in cell for cells in table.cells for cell in cells)
    frontier = found["retention-frontier"]
    assert "window" in frontier.charts[0].caption
    assert f"at 25.0 % from {math.exp(0.04 * _scale()):.3f} (" in frontier.charts[0].alt
    assert [finding.verdict for finding in frontier.findings] == ["holds"]


def _scale() -> float:
    """What the noise makes of the mean loss of `str` at a quarter, whose own is 0.04."""
    connection = retention_catalogue.connection(made(loss=BEST, mass=BEST))
    ((ratio,),) = connection.execute(
        "SELECT min(ln(perplexity_ratio)) FROM retention WHERE budget = 0.25"
    ).fetchall()
    return float(ratio) / 0.04


@pytest.mark.slow
def test_survival_is_kaplan_meiers_over_layers_and_relative_to_random() -> None:
    rows = half_way(survival_rows(retention_catalogue.connection(made())))
    found = {(row["policy"], row["kind"]): row for row in rows if row["budget"] == 0.25}
    left = 10_000
    for _ in range(5):  # ages 0 to 1,024
        left -= int(left * 0.2)
    random = found["random", "function"]
    assert (random["age"], random["at_risk"]) == (1024, 4 * 4096)
    assert random["survival"] == pytest.approx(left / 10_000)
    assert random["ratio"] == 1
    assert found["str", "function"]["ratio"] == 1
    assert found["str", "content"]["ratio"] < 0.7
    # A policy with tiers is shown by its tier warm, which loses half as many.
    assert found["cmp", "function"]["survival"] == pytest.approx(0.9**5, rel=1e-3)
    text = built(made())["retention-survival"].findings[0].text
    assert "str function tokens (1.69 times as many)" in text
    assert "h2o neither kind clearly" in text


@pytest.mark.slow
def test_retrieval_counts_exact_matches_only_of_solved_tasks() -> None:
    section = built(made())["retention-retrieval"]
    assert [chart.caption for chart in section.charts] == ["Exact answers.", "Log-probability of the answer."]
    assert "passkey, 1,024 tokens, full 100.0 %" in section.charts[0].alt
    assert "multi key" not in section.charts[0].alt
    assert "not of multi key, 1,024 tokens, whose exact matches do not count" in section.findings[0].text
    section = built(made(exact=False))["retention-retrieval"]
    assert [chart.caption for chart in section.charts] == ["Log-probability of the answer."]
    assert "no exact match counts here" in section.findings[0].text


@pytest.mark.slow
def test_what_is_not_published_has_no_section() -> None:
    missing = ("retention_speed", "retention_retrieval", "retention_curves", "retention_readings")
    run = made(without=missing)
    assert list(built(run)) == ["retention-frontier", "retention-layers", "retention-losses"]
    connection = retention_catalogue.connection(run)
    assert report.findings(connection) == []
    assert verdicts(made(without=("retention_speed",)))["Overhead and speed: str"] == "untested"
    nothing = retention_catalogue.connection(made(without=tuple(retention_catalogue.tables(Made()))))
    assert (report.sections(nothing), report.findings(nothing), report.facts(nothing)) == ([], [], [])


def test_the_head_of_the_report_and_the_closing_print() -> None:
    connection = retention_catalogue.connection(made(sequences={2048: 12, 8192: 3}))
    assert report.facts(connection) == [
        ("retention policies", "10"),
        ("retention budgets", "3"),
        ("retention sequences", "12 of 2,048 tokens and 3 of 8,192 tokens"),
    ]
    printed = io.StringIO()
    report.closing(connection, Console(file=printed, width=200))
    lines = [line for line in printed.getvalue().splitlines() if "│" in line]
    assert len(lines) == 2 * (1 + 3 * len(POLICIES))
    assert sum("8,192" in line for line in lines) == 1 + 3 * len(POLICIES)


def test_a_policy_far_from_all_others_is_left_out_of_a_chart() -> None:
    rows = [{"policy": name, "x": value} for name, value in (("a", 1.0), ("a", 2.0), ("b", 3.0), ("c", 10.0))]
    assert without_far(rows, "x") == (rows[:3], ["c"])
    assert without_far(rows[:3], "x") == (rows[:3], [])
    assert without_far(rows[:2], "x") == (rows[:2], [])


def test_policies_look_the_same_in_every_chart() -> None:
    rows = [{"policy": name} for name in (*POLICIES, "str-gate", "other")]
    whole, some = policy_key(rows), policy_key(rows[3:5])
    assert some.looks["h2o"] == whole.looks["h2o"]
    looks = [(look.colour, look.shape, tuple(look.dash)) for look in whole.looks.values()]
    assert len(set(looks)) == len(looks)
