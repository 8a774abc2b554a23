"""The report's part on consolidation: each finding against tables with known answers, figures, and the page."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import consolidation_catalogue as catalogue
import numpy as np
import pyarrow as pa
import pytest
from consolidation_catalogue import BUCKETS, LARGE, SMALL, STEPS, Made
from report_reading import Page, read, svgs

from infra.duck import connect
from infra.storage import Storage
from schemas.tables import TABLES
from tasks.pretraining import report
from tasks.pretraining.findings import (
    SeriesRow,
    comparable,
    graph_rows,
    half_step,
    learned_rows,
    log_steps,
    measure,
)
from tasks.pretraining.findings import findings as findings_of
from tasks.pretraining.report import final_losses
from tasks.report import charts
from tasks.stages import write_report

HARDEST, FALLS, GAINS, GROWS = range(4)


def found(tmp_path: Path, made: Made) -> list[tuple[str, str, str]]:
    with closing(connect(catalogue.publish(Storage(str(tmp_path)), made))) as connection:
        findings = [(finding.title, finding.verdict, finding.text) for finding in findings_of(connection)]
    assert len(findings) == 4
    return findings


def test_all_four_hold_with_the_numbers_that_were_put_in(tmp_path: Path) -> None:
    hardest, falls, gains, grows = found(tmp_path, Made())
    assert [verdict for _, verdict, _ in (hardest, falls, gains, grows)] == ["holds"] * 4
    assert re.search(
        r"In small, function→content ends at 5\.00 nats \(step 256\), 0\.600 \(0.* to", hardest[2]
    )
    assert "the highest at 4 of 5 checkpoints (at all from step 4 on)" in hardest[2]
    assert "though not throughout" in hardest[2]
    # f→f falls from 8 to 3: 5.5 is 2.5 / 3 of the way from step 1 to step 4, which is 2 doublings.
    assert f"by step {2 ** (2 * 2.5 / 3):.3g} and" in falls[2]
    assert "function→content 0.600 (0.600 to 0.600) lower, content→content 0.400" in gains[2]
    assert "function→content falls most, by 12.0 %" in gains[2]
    assert "131,072 tokens into both" in gains[2]
    assert "In small, learned features go from 20 at step 1 to 700 at step 256 (of 1,024)" in grows[2]
    assert "cross-entropy recovered from none (zeros do no harm yet) to 0.95" in grows[2]
    assert "80.0 % at step 256, 60.0 % where least" in grows[2]


def test_intervals_are_those_of_documents_drawn_one_by_one(tmp_path: Path) -> None:
    """The plainest bootstrap: draw documents, sum them in a loop, take the quantities, take percentiles."""
    made = Made(noise=0.4)
    rows = catalogue.document_losses(made)
    with closing(connect(catalogue.publish(Storage(str(tmp_path)), made))) as connection:
        measured = measure(connection, resamples=60)
    by_document: dict[Any, list[Any]] = {}
    for row in rows:
        by_document.setdefault(row["doc_id"], []).append(row)
    documents, rng = sorted(by_document, key=int), np.random.default_rng(0)
    gaps, leads, orders = [], [], []
    for _ in range(60):
        sums: dict[Any, Any] = {}
        for index in rng.integers(0, len(documents), len(documents)):
            for row in by_document[documents[index]]:
                key = (row["model"], row["step"], row["bucket"])
                n, loss = sums.get(key, (0, 0.0))
                sums[key] = (n + row["n"], loss + row["loss"])
        mean = {key: loss / n for key, (n, loss) in sums.items()}
        at_end = {bucket: mean["small", 256, bucket] for bucket in BUCKETS}
        gaps.append(at_end.pop("function→content") - max(at_end.values()))
        halves = []
        for kind in ("→content", "→function"):
            curve = []
            for step in STEPS:
                parts = [sums["small", step, bucket] for bucket in BUCKETS if bucket.endswith(kind)]
                curve.append(sum(loss for _, loss in parts) / sum(n for n, _ in parts))
            level = (curve[0] + curve[-1]) / 2
            after = next(at for at, value in enumerate(curve) if value <= level)
            part = (curve[after - 1] - level) / (curve[after - 1] - curve[after])
            x0, x1 = np.log2(STEPS[after - 1]), np.log2(STEPS[after])
            halves.append(x0 + part * (x1 - x0))
        leads.append(halves[0] - halves[1])
        gain = {bucket: mean["small", 256, bucket] - mean["large", 256, bucket] for bucket in BUCKETS}
        orders.append(
            min(gain["function→content"], gain["content→content"])
            - max(gain["function→function"], gain["content→function"])
        )
    hardest, halfway, gains = measured.hardest[0], measured.halfway[0], measured.gains
    assert hardest is not None
    assert halfway is not None
    assert not isinstance(gains, str)
    for estimate, drawn in ((hardest.gap, gaps), (halfway.lead, leads), (gains.order, orders)):
        assert np.std(drawn) > 0.01
        assert [estimate.low, estimate.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-9)


def test_findings_that_do_not_hold_say_so(tmp_path: Path) -> None:
    swapped = {
        "function→function": SMALL["content→content"],
        "content→function": SMALL["function→content"],
        "function→content": SMALL["content→function"],
        "content→content": SMALL["function→function"],
    }
    better = {bucket: [*values[:-1], values[-1] - 0.5] for bucket, values in swapped.items()}
    better["function→function"] = [*swapped["function→function"][:-1], swapped["function→function"][-1] - 2]
    made = Made(
        curves={"small": swapped, "large": better},
        learned=[("small", 1, 300, 0.8, 0.9, 9.0), ("small", 256, 200, 0.8, 0.9, 9.0)],
        coverage=[("small", 1, 0.45), ("small", 256, 0.8)],
    )
    findings = found(tmp_path, made)
    assert [verdict for _, verdict, _ in findings] == ["differs"] * 4
    assert re.search(
        r"2\.500 \(2.* to 2.*\) below the highest of the others, content→f", findings[HARDEST][2]
    )
    assert "at 0 of 5 checkpoints" in findings[HARDEST][2]
    assert "doublings of the step behind →content" in findings[FALLS][2]
    assert "function→function falls most" in findings[GAINS][2]
    assert "does not hold here" in findings[GROWS][2]


@pytest.mark.slow
def test_an_interval_around_zero_is_undecided(tmp_path: Path) -> None:
    near: dict[str, Any] = {**SMALL, "content→content": (*SMALL["content→content"][:-1], 4.99)}
    level = {bucket: (*values[:-1], values[-1] - 0.3) for bucket, values in near.items()}
    even = {bucket: SMALL["function→content"] for bucket in BUCKETS}
    made = Made(curves={"small": near, "large": level}, noise=0.5, learned=None)
    findings = found(tmp_path / "a", made)
    assert [verdict for _, verdict, _ in findings] == ["undecided", "holds", "undecided", "untested"]
    assert "not every interval lies on one side of zero" in findings[HARDEST][2]
    same = found(tmp_path / "b", Made(curves={"small": even}, noise=0.5, learned=None))
    assert [verdict for _, verdict, _ in same] == ["undecided", "undecided", "untested", "untested"]


def test_one_series_leaves_the_comparison_of_sizes_untested(tmp_path: Path) -> None:
    findings = found(tmp_path, Made(curves={"small": SMALL}, trained=(), texts=False, learned=None))
    assert [verdict for _, verdict, _ in findings] == ["holds", "holds", "untested", "untested"]
    assert "One series." in findings[GAINS][2]
    assert "consolidation.growth" in findings[GROWS][2]


def test_a_larger_model_that_is_worse_is_told_so(tmp_path: Path) -> None:
    worse = {bucket: (*values[:-1], values[-1] + 0.25) for bucket, values in SMALL.items()}
    findings = found(tmp_path, Made(curves={"small": SMALL, "large": worse}, learned=None))
    assert "function→function 0.250 (0.250 to 0.250) higher" in findings[GAINS][2]
    assert "relative to the loss, none falls." in findings[GAINS][2]
    assert findings[GAINS][1] != "holds"


def test_a_short_series_is_named_beside_those_that_are_tested(tmp_path: Path) -> None:
    short = {bucket: values[-1:] for bucket, values in LARGE.items()}
    curves = {"small": SMALL, "large": short}
    findings = found(tmp_path, Made(curves=curves, steps={"large": (256,)}, learned=None))
    assert findings[FALLS][1] == "undecided"
    assert "In small, half of the fall from step 1 to step 256" in findings[FALLS][2]
    assert "Not tested in large: fewer than three checkpoints" in findings[FALLS][2]
    assert findings[HARDEST][1] == "holds"


def test_one_checkpoint_has_nothing_to_fall(tmp_path: Path) -> None:
    one = {bucket: values[-1:] for bucket, values in SMALL.items()}
    findings = found(tmp_path, Made(curves={"small": one}, steps={"small": (256,)}, learned=None))
    assert [verdict for _, verdict, _ in findings] == ["holds", "untested", "untested", "untested"]


@pytest.mark.slow
def test_a_group_without_predictions_is_not_tested(tmp_path: Path) -> None:
    without = {bucket: values for bucket, values in SMALL.items() if bucket != "function→function"}
    storage = catalogue.publish(Storage(str(tmp_path)), Made(curves={"small": without}, learned=None))
    with closing(connect(storage)) as connection:
        assert [finding.verdict for finding in findings_of(connection)] == ["untested"] * 4
        assert {row["bucket"] for row in final_losses(connection)} == set(without)
    write_report(storage)
    assert "no prediction in the held-out documents" in read(storage)


@pytest.mark.slow
def test_a_single_document_gives_numbers_without_intervals(tmp_path: Path) -> None:
    storage = catalogue.publish(Storage(str(tmp_path)), Made(documents=1, learned=None, texts=False))
    write_report(storage)
    page = Page(read(storage))
    row = page.tables["Losses at the last checkpoint"][2]
    assert (row[4], row[5], row[7]) == ("5.000", "–", "–")
    text = "".join(page.text)
    assert "0.600 (no interval) above" in text
    assert text.count("? Undecided.") == 3


def test_intervals_are_of_as_many_resamples_as_the_run_has(tmp_path: Path) -> None:
    storage = catalogue.publish(Storage(str(tmp_path)), Made(noise=0.3))
    rows = [{"key": "loss_resamples", "value": "37"}]
    storage.write_parquet("tables/run_info.parquet", pa.Table.from_pylist(rows, schema=TABLES["run_info"]))
    with closing(connect(storage)) as connection:
        assert measure(connection) == measure(connection, resamples=37)
        assert measure(connection) != measure(connection, resamples=38)


@pytest.mark.slow
def test_the_larger_model_is_the_one_with_more_parameters(tmp_path: Path) -> None:
    curves = {"a": LARGE, "b": SMALL}
    by_size = found(tmp_path / "1", Made(curves=curves, parameters={"a": 9, "b": 5}, learned=None))
    assert by_size[GAINS][1] == "holds"
    assert "From b (5 parameters) to a (9 parameters)" in by_size[GAINS][2]
    by_order = found(tmp_path / "2", Made(curves=curves, parameters={"a": 9, "b": None}, learned=None))
    assert by_order[GAINS][1] == "differs"
    assert "From a (9 parameters) to b" in by_order[GAINS][2]
    equal = found(tmp_path / "3", Made(curves=curves, parameters={"a": 9, "b": 9}, learned=None))
    assert equal[GAINS][1] == "untested"


def test_which_checkpoints_of_two_series_compare() -> None:
    def series(steps: tuple[int, ...], tokens: tuple[int | None, ...]) -> SeriesRow:
        return SeriesRow(name="s", parameters=1, source="", steps=steps, tokens=tokens)

    assert comparable(series((1, 8), (10, 80)), series((1, 4), (20, 80)))[:2] == (8, 4)
    assert comparable(series((1, 4, 8), (1, 4, 8)), series((1, 4, 9), (2, 8, 18)))[:2] == (4, 4)
    small_step, large_step, ground = comparable(series((2,), (None,)), series((3,), (None,)))
    assert (small_step, large_step) == (2, 3)
    assert "no step in common" in ground


@pytest.mark.parametrize(
    ("learned", "coverage", "verdict", "said"),
    [
        (((20, 0.8, 0.9), (700, 0.5, 0.9)), (0.6, 0.8), "undecided", "less than 75 % as good"),
        (((20, 0.8, 0.9), (700, 0.8, 0.5)), (0.6, 0.8), "undecided", "less than 75 % as good"),
        (((20, -0.2, 0.9), (700, -0.1, 0.9)), (0.6, 0.8), "undecided", "less than 75 % as good"),
        (((20, 0.8, 0.9), (700, 0.7, 0.9)), (0.96, 0.96), "undecided", "no room to rise"),
        (((20, 0.8, 0.9), (700, 0.7, 0.9)), (0.9, 0.8), "differs", "does not hold"),
        (((20, 0.8, 0.9), (700, 0.7, 0.9)), (0.5, 0.8), "differs", "50.0 % where least"),
        (((700, 0.8, 0.9),), (0.6,), "undecided", "one SAE alone has 700"),
    ],
)
def test_growth_counts_only_with_an_sae_about_as_good(
    tmp_path: Path, learned: Any, coverage: Any, verdict: str, said: str
) -> None:
    made = Made(
        curves={"small": SMALL},
        learned=[
            ("small", step, n, variance, ce, 9.0)
            for step, (n, variance, ce) in zip((1, 256), learned, strict=False)
        ],
        coverage=[("small", step, share) for step, share in zip((1, 256), coverage, strict=False)],
    )
    grows = found(tmp_path, made)[GROWS]
    assert grows[1] == verdict
    assert said in grows[2]


def test_half_steps_by_hand() -> None:
    x = log_steps((0, 1, 4))
    assert x.tolist() == [-1, 0, 2]
    # down to 3 a quarter of the way from x = 0 to 2; at once; back up and never lower
    curves = np.array([[[5.0, 9.0, 3.0], [3.5, 1.0, 2.0], [1.0, 1.0, 3.0]]])
    assert half_step(x, curves)[0].tolist() == pytest.approx([0.4, -1 + 4 / 8, np.inf])


def test_final_losses_are_the_last_checkpoints_rows(tmp_path: Path) -> None:
    with closing(connect(catalogue.publish(Storage(str(tmp_path))))) as connection:
        rows = final_losses(connection)
        told = connection.execute(
            "SELECT model, step, bucket, n, mean_loss, mean_low, mean_high, loss_share, share_low, share_high "
            "FROM loss_buckets WHERE step = 256"
        ).fetchall()
    assert [(row["model"], row["bucket"]) for row in rows] == [
        (model, bucket) for model in ("small", "large") for bucket in BUCKETS
    ]
    assert sorted(tuple(row.values()) for row in rows) == sorted(told)


def drawn(spec: Any) -> tuple[dict[str, Any], Any]:
    """A chart as Vega-Lite has it, and what gives a panel's rows."""
    written = charts.vega_lite(spec)
    return written, lambda panel: written["datasets"][panel["data"]["name"]]


@pytest.mark.slow
def test_charts_have_a_panel_a_series_and_one_scale(tmp_path: Path) -> None:
    storage = catalogue.publish(Storage(str(tmp_path)))
    with closing(connect(storage)) as connection:
        losses, rows_of = drawn(report.losses_by_group(report.bucket_losses(connection)))
        degree, degrees_of = drawn(report.degree_by_checkpoint(report.degree_bins(connection)))
        coverage, shares_of = drawn(report.coverage_by_checkpoint(graph_rows(connection)))
        learned, learned_of = drawn(report.learned_features(learned_rows(connection)))
        training, _ = drawn(report.training_loss(report.training_points(connection)))
    for spec in (losses, degree, coverage):
        assert [panel["title"] for panel in spec["concat"]] == ["small", "large"]
        assert spec["resolve"]["scale"] == {"x": "shared", "y": "shared"}
        for panel in spec["concat"]:
            assert {layer["encoding"]["x"]["scale"]["type"] for layer in panel["layer"]} == {"log"}
    _, large = losses["concat"]
    for bucket in BUCKETS:
        mine = [row for row in rows_of(large) if row["bucket"] == bucket]
        assert [row["step"] for row in mine] == list(STEPS)
        assert [row["mean_loss"] for row in mine] == pytest.approx(LARGE[bucket])
    band, line, marks = large["layer"]
    assert (band["mark"]["type"], band["encoding"]["y"]["field"], band["encoding"]["y2"]["field"]) == (
        "area",
        "mean_loss_low",
        "mean_loss_high",
    )
    # Colour is the next kind, line and marker the current one: no two groups look the same in either alone.
    looks = [
        encoding["scale"]["range"]
        for encoding in (
            line["encoding"]["color"],
            line["encoding"]["strokeDash"],
            marks["encoding"]["shape"],
        )
    ]
    assert len({(colour, tuple(dash), shape) for colour, dash, shape in zip(*looks, strict=True)}) == 4
    assert len({shape for shape in looks[2]}) == len({colour for colour in looks[0]}) == 2
    assert {row["checkpoint"] for row in degrees_of(degree["concat"][0])} == {"step 1", "step 256"}
    shares = shares_of(coverage["concat"][0])
    assert {row["tokens"] for row in shares} == {
        "function tokens",
        "content tokens",
        "ten most frequent tokens",
    }
    grid = coverage["concat"][0]["layer"][0]["encoding"]["y"]["axis"]["gridOpacity"]
    assert grid["condition"]["test"] == "datum.value === 0.5"
    first, beside = learned["hconcat"]
    panels = [first, *beside["vconcat"]]
    titles = ["learned features", "explained variance", "L0", "CE recovered"]
    assert [panel["title"] for panel in panels] == titles
    for panel in panels:
        low, high = panel["layer"][0]["encoding"]["y"]["scale"]["domain"]
        assert low <= 0
        assert high >= 1
        assert {row["series"] for row in learned_of(panel)} == {"small", "large"}
    (line,) = training["layer"][0]["layer"]
    assert line["encoding"]["strokeDash"]["scale"]["domain"] == ["small", "large"]
    assert "columns" in line["encoding"]["strokeDash"]["legend"]


@pytest.mark.slow
def test_step_0_has_its_place_on_the_axis(tmp_path: Path) -> None:
    made = Made(curves={"small": SMALL}, steps={"small": (0, 1, 8, 64, 512)}, learned=None)
    with closing(connect(catalogue.publish(Storage(str(tmp_path)), made))) as connection:
        spec = report.losses_by_group(report.bucket_losses(connection))
        assert findings_of(connection)[FALLS].verdict == "holds"
    marks = [
        mark.attrib["transform"]
        for group in ElementTree.fromstring(charts.svg(spec)).iter()
        if "mark-symbol role-mark" in group.attrib.get("class", "")
        for mark in group
    ]
    places = sorted({float(place.removeprefix("translate(").split(",")[0]) for place in marks})
    assert len(places) == 5
    assert (np.diff(places) > 5).all()


def test_training_in_numbers(tmp_path: Path) -> None:
    with closing(connect(catalogue.publish(Storage(str(tmp_path))))) as connection:
        small, large = report.training_rows(connection)
        heldout = {3 * doc for doc in range(catalogue.DOCUMENTS)}
        lengths = connection.execute("SELECT doc_id, n_tokens FROM documents").fetchall()
    assert (small["model"], large["model"]) == ("small", "large")
    assert (small["steps"], small["tokens"]) == (256, 256 * 512)
    assert small["first_loss"] == pytest.approx(8)
    assert small["last_loss"] == pytest.approx(np.median([3 + 5 / step**0.3 for step in (254, 255, 256)]))
    assert small["epochs"] == pytest.approx(256 * 512 / sum(n for doc, n in lengths if doc not in heldout))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    made = catalogue.publish(Storage(str(tmp_path_factory.mktemp("full"))), Made(noise=0.3))
    write_report(made)
    return made


def test_the_page_has_every_section_and_no_hint_at_a_graph_nobody_asked_for(storage: Storage) -> None:
    html = read(storage)
    page = Page(html)
    keys = re.findall(r'<section id="([^"]+)"', html)
    assert keys == [
        "zipf", "documents", "spread", "consolidation", "training", "losses", "learned", "checkpoint-degree",
        "checkpoint-coverage", "generations", "run",
    ]  # fmt: skip
    assert "not published yet" not in html
    assert len(page.images) == 3 + 5
    assert all(len(image["alt"]) > 40 for image in page.images)
    assert html.count('<p class="finding ') == 3 + 4 + 1
    assert (
        html.count('<p class="finding undecided">\n<strong>The larger model gains most on →content</strong>')
        == 1
    )
    assert html.count("? Undecided.") == 1
    assert len(page.tables["Losses at the last checkpoint"]) == 1 + 8
    assert page.tables["Losses at the last checkpoint"][2][:5] == [
        "small",
        "256",
        "function→content",
        *["559", "5.000"],
    ]


def test_hostile_prompts_and_texts_are_inert_and_nothing_outside_is_referred_to(storage: Storage) -> None:
    html = read(storage)
    page = Page(html)
    assert page.tags["script"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    (caption,) = [name for name in page.tables if "onerror" in name]
    table = page.tables[caption]
    assert table[0] == ["series", "step", "greedy", "sampled"]
    assert len(table) == 1 + 2 * len(STEPS)
    assert table[1][2].startswith(
        r"</code><script>document.title='pwned'</script>\n\n␣␣of\u{202e} the\ttown {{ 7*7 }} and so"
    )
    assert table[1][3].endswith("and so on again")
    assert page.tables["2. “Once upon”"][1][2] == r"␣a␣␣time\n"
    assert "\u202e" not in html
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    for picture in svgs(page):
        for namespace in ('"http://www.w3.org/2000/svg"', '"http://www.w3.org/1999/xlink"'):
            picture = picture.replace(namespace, "")
        assert "http" not in picture


@pytest.mark.slow
def test_what_was_not_asked_for_has_no_section(tmp_path: Path) -> None:
    made = Made(curves={"small": SMALL}, trained=(), texts=False, learned=None)
    storage = catalogue.publish(Storage(str(tmp_path)), made, graph=True)
    write_report(storage)
    keys = re.findall(r'<section id="([^"]+)"', read(storage))
    assert keys == [
        "zipf", "documents", "spread", "degree", "coverage", "rarefied", "consolidation", "losses", "run",
    ]  # fmt: skip


@pytest.mark.slow
def test_empty_tables_count_as_not_asked_for(tmp_path: Path) -> None:
    storage = catalogue.publish(Storage(str(tmp_path)))
    for name in (
        "learned_features",
        "checkpoint_degree",
        "checkpoint_graph",
        "generations",
        "training_losses",
    ):
        storage.write_parquet(f"tables/{name}.parquet", TABLES[name].empty_table())
    write_report(storage)
    assert re.findall(r'<section id="([^"]+)"', read(storage))[3:] == ["consolidation", "losses", "run"]
    for name in ("loss_buckets", "document_losses"):
        storage.write_parquet(f"tables/{name}.parquet", pa.Table.from_pylist([], schema=TABLES[name]))
    with closing(connect(storage)) as connection:
        assert findings_of(connection) == []
        assert final_losses(connection) == []


@pytest.mark.slow
def test_same_tables_give_the_same_bytes(tmp_path: Path, storage: Storage) -> None:
    again = catalogue.publish(Storage(str(tmp_path)), Made(noise=0.3))
    write_report(again)
    assert read(again) == read(storage)
