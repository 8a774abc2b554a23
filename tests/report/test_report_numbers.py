"""What the report's queries and findings say, against numpy, scipy and plain counting."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import duckdb
import numpy as np
import pytest
import report_catalogue
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.duck import connect
from infra.storage import Storage
from tasks.models.token_texts import visible
from tasks.report import charts, corpus, graph
from tasks.report.text import listed, number, quoted
from tasks.report.vocabulary import Column, Estimate, beyond, every


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> report_catalogue.Published:
    return report_catalogue.publish(Storage(str(tmp_path_factory.mktemp("full"))))


def test_fits_equal_numpy_on_the_same_tokens(published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        fits = graph.degree_fits(connection)
    assert [fit["layer"] for fit in fits] == list(report_catalogue.LAYERS)
    for fit in fits:
        pairs = [
            (rank, d) for (layer, rank), d in published.degrees.items() if layer == fit["layer"] and d > 0
        ]
        x, y = np.log(np.array(pairs, dtype=float)).T
        slope, intercept = np.polyfit(x, y, 1)
        assert fit["token_slope"] == pytest.approx(slope, abs=1e-5)
        assert fit["token_intercept"] == pytest.approx(intercept, abs=1e-4)
        assert fit["token_r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-5)
        assert fit["n"] < fit["token_n"] == len(pairs)


@pytest.mark.slow
def test_rarefaction_equals_scipy(published: report_catalogue.Published) -> None:
    from scipy.stats import spearmanr

    with closing(connect(published.storage)) as connection:
        rows = connection.execute(
            "SELECT layer, is_function, count, degree, rarefied_degree FROM token_degree "
            "WHERE rarefied_degree IS NOT NULL"
        ).fetchall()
        measured = graph.rarefactions(connection)
        assert [found["layer"] for found in measured] == list(report_catalogue.LAYERS)
        for found in measured:
            mine = [row for row in rows if row[0] == found["layer"]]
            assert found["n_function"] + found["n_content"] == len(mine)
            assert found["function_median"] == pytest.approx(np.median([row[4] for row in mine if row[1]]))
            assert found["content_median"] == pytest.approx(np.median([row[4] for row in mine if not row[1]]))
            counts = [row[2] for row in mine]
            assert found["raw_correlation"] == pytest.approx(spearmanr(counts, [row[3] for row in mine])[0])
            assert found["rarefied_correlation"] == pytest.approx(
                spearmanr(counts, [row[4] for row in mine])[0]
            )


def test_coverage_by_ten_and_by_function_tokens(published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        layers = graph.layer_coverage(connection)
        points = graph.coverage_points(connection)
    last = max(int(str(row["rank"])) for row in published.tokens if row["is_function"])
    for layer in layers:
        assert layer["top10"] == published.coverage[layer["layer"], 10]
        assert layer["function"] == published.coverage[layer["layer"], last]
    for point in points:
        assert point["coverage"] == published.coverage[point["layer"], point["rank"]]
    assert {point["rank"] for point in points} >= {1, 2, 10, len(published.tokens)}


def test_spread_finds_the_burst_and_counts_it(published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        function, content = corpus.spread_pair(connection)
        for spread in (function, content):
            per_document = dict(
                connection.execute(
                    "SELECT doc_id, count(*) FROM occurrences JOIN tokens USING (token_id) WHERE token = ? GROUP BY 1",
                    [spread["token"]],
                ).fetchall()
            )
            assert spread["width"] == 1
            assert spread["means"] == [per_document.get(doc, 0) for doc in range(spread["n_documents"])]
            assert spread["most"] == max(per_document.values())
            assert spread["top_share"] == pytest.approx(max(per_document.values()) / spread["count"])
    assert function["token"] == " the"
    assert max(range(150), key=lambda doc: content["means"][doc]) in range(40, 45)


def test_neighbouring_documents_share_a_bin(monkeypatch: pytest.MonkeyPatch, published: Any) -> None:
    monkeypatch.setattr(corpus, "SPREAD_BINS", 40)
    with closing(connect(published.storage)) as connection:
        function, _ = corpus.spread_pair(connection)
    assert function["width"] == 4
    assert len(function["means"]) == 38
    widths = [4] * 37 + [2]
    total = sum(mean * width for mean, width in zip(function["means"], widths, strict=True))
    assert total == pytest.approx(function["count"])


def test_large_vocabularies_are_thinned_in_sql() -> None:
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE tokens AS SELECT i + 1 AS rank, 1000000000 // (i + 1) AS count, i < 100 AS is_function, "
        "1.0 / (i + 1) AS doc_share FROM range(300000) AS r(i)"
    )
    points = corpus.frequency_points(connection)
    assert len(points) < 600
    assert [point["rank"] for point in points[:100]] == list(range(1, 101))
    assert all(point["count"] == 10**9 // point["rank"] for point in points)
    bins = corpus.document_shares(connection)
    assert len(bins) < 400
    assert sum(row["n"] for row in bins) == 300_000


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\n", r"\n"),
        (" the", "␣the"),
        ("\u202e\x00", r"\u{202e}\u{0}"),
        ("\u0301x", "◌\u0301x"),
        ("\ud800", r"\u{d800}"),
        ("東京", "東京"),
        ("a" * 70, "a" * 60 + "…"),
        (None, "–"),
    ],
)
def test_tokens_are_shown_with_nothing_hidden(token: str | None, shown: str) -> None:
    assert visible(token) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_any_token_can_stand_in_a_figure(token: str) -> None:
    shown = visible(token, 1000)
    assert shown.isprintable()
    assert " " not in shown
    element = ElementTree.Element("text")
    element.text = shown
    assert ElementTree.fromstring(ElementTree.tostring(element)).text == (shown or None)


HOSTILE = [
    "</text><script>x</script>",
    "$\\frac$ ]]>&",
    "datum.n > 0 ? 'a' : 1",
    '"]}; alert(1)',
    "a\nb",
    "שלום",
    "\u0301x",
    "{'signal': 'width'}",
    "",
]


@pytest.mark.parametrize("token", HOSTILE)
def test_a_hostile_token_in_a_chart_is_text(token: str) -> None:
    common = {"is_function": True, "rank": 1, "n_documents": 4, "width": 1}
    title = corpus.token_spread([{"token": token, "means": [1, 2, 0, 0], **common}])
    row = {"kind": visible(token), "rank": 1, "median": 0.5, "low": 0.4, "high": 0.6}
    key = charts.Key.cycled("kind", [visible(token)])
    x, y = charts.log("rank", "rank"), charts.share("median", "share")
    legend = charts.panels(
        [visible(token)],
        lambda _, x, y: charts.series([row, row | {"rank": 2}], x, y, key, band=("low", "high")),
        x,
        y,
    )
    for spec, shown in ((title, quoted(token)), (legend, visible(token))):
        root = ElementTree.fromstring(charts.svg(spec))
        texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
        assert any(shown in text for text in texts)
        tags = {element.tag.rsplit("}", 1)[-1] for element in root.iter()}
        assert not tags & {"script", "foreignObject", "image", "a"}


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/data.json", "https://example.org/data.json", "data.json"]
)
def test_charts_load_nothing(url: str) -> None:
    import altair as alt

    with pytest.raises(ValueError, match="not allowed"):
        charts.svg(alt.Chart(alt.UrlData(url=url)).mark_point())


def test_ink_follows_the_readers_scheme_and_data_does_not() -> None:
    rows = [{"kind": name, "rank": rank, "n": rank} for name in charts.KINDS.looks for rank in (1, 2)]
    drawn = charts.svg(
        charts.single(charts.series(rows, charts.log("rank", "r"), charts.log("n", "n"), charts.KINDS))
    )
    assert "prefers-color-scheme:dark" in drawn
    assert drawn.count(charts.INK) == 1
    assert drawn.count('="currentColor"') > 20
    assert all(look.colour in drawn for look in charts.KINDS.looks.values())


def test_a_series_of_larger_markers_is_drawn_larger() -> None:
    look = charts.Look(charts.BLUE, "circle")
    key = charts.Key(field="s", looks={"a": look, "b": look, "c": look._replace(size=400)})
    rows = [{"x": n, "y": n, "s": s} for n, s in enumerate("abc", 1)]
    x, y = charts.log("x", "x"), charts.log("y", "y")
    (marks,) = charts.vega_lite(charts.series(rows, x, y, key, lines=False))["layer"]
    assert marks["encoding"]["size"] == {
        "condition": [{"test": 'datum["s"] === "c"', "value": 400}],
        "value": charts.MARK,
    }


def test_a_series_has_marks_lines_and_a_band_of_its_rows() -> None:
    rows = [{"s": name, "x": x, "y": 2.0 * x, "low": x, "high": math.nan} for name in "ab" for x in (1, 2, 3)]
    key = charts.Key.cycled("s", ["a", "b"])
    spec = charts.vega_lite(
        charts.series(rows, charts.log("x", "x"), charts.linear("y", "y"), key, band=("low", "high"), marks=2)
    )
    band, line, marks = spec["layer"]
    assert (band["mark"]["type"], band["encoding"]["y"]["field"], band["encoding"]["y2"]) == (
        "area",
        "low",
        {"field": "high"},
    )
    assert line["encoding"]["strokeDash"]["scale"]["range"] == [[1, 0], [6, 3]]
    assert marks["encoding"]["shape"]["scale"]["range"] == ["circle", "square"]
    assert spec["datasets"][spec["data"]["name"]] == [row | {"high": None} for row in rows]
    thinned = spec["datasets"][marks["data"]["name"]]
    assert [(row["s"], row["x"]) for row in thinned] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)]
    # Neither colour nor marker nor line is alone: they tell the same series apart.
    for channel in ("color", "shape"):
        assert marks["encoding"][channel]["scale"]["domain"] == ["a", "b"]


def test_findings_that_do_not_hold_say_so() -> None:
    bent = graph.is_straight([{"layer": 4, "slope": -0.5, "r2": 0.60}])
    assert bent.verdict == "differs"
    assert "0.600" in bent.text
    assert "does not hold at layer 4" in bent.text
    common = {"layer": 4, "activated_features": 900, "dictionary_size": 1000}
    low = graph.reaches_half([common | {"top10": 0.31, "function": 0.45}])
    assert low.verdict == "differs"
    assert "31.00 %" in low.text
    assert "at no layer" in low.text
    high = graph.reaches_half([common | {"top10": 0.61, "function": 0.75}])
    assert high.verdict == "holds"
    assert "fills up early" not in high.text


@pytest.mark.slow
def test_single_charts_can_be_had_as_files(tmp_path: Path, published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        spec = graph.coverage_curves(graph.coverage_points(connection), cut=7)
    (tmp_path / "coverage.png").write_bytes(charts.png(spec))
    width, height = Image.open(tmp_path / "coverage.png").size
    assert width > 1.5 * charts.WIDTH
    assert height > 1.5 * charts.HEIGHT
    assert charts.png(spec) == charts.png(spec)


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (Column("x", "integer"), "1,234"),
        (Column("x", "plain"), "1234.5"),
        (Column("x", "number"), "1,234"),
        (Column("x", "decimal"), "1,234.50"),
        (Column("x", "percent", digits=0), "123450 %"),
        (Column("x", "change"), "+1234.50"),
        (Column("down", "change"), "−0.12"),
        (Column("down", "signed", digits=1, factor=100), "−12.5"),
        (Column("down", "signed", shows="both"), "−0.12 (−0.20 to 0.10)"),
        (Column("down", "percent", shows="interval", digits=1), "−20.0 % to 10.0 %"),
        (Column("half", "signed", shows="both"), "0.50"),
        (Column("half", "signed", shows="interval"), "–"),
        (Column("absent", "number"), "–"),
        (Column("absent", "signed", shows="both"), "–"),
        (Column("nan", "signed"), "–"),
        (Column("said", "number"), "no fall"),
        (Column("text"), "two words␣"),
        (Column("text", "token"), "two␣words␣"),
        (Column("empty", "passage"), "(ended at once)"),
        (Column("yes", "met"), "✓ yes"),
        (Column("absent", "mark"), ""),
    ],
)
def test_a_cell_is_set_by_its_columns_kind(column: Column, shown: str) -> None:
    row = {
        "x": 1234.5, "down": -0.125, "down_low": -0.2, "down_high": 0.1, "half": 0.5, "half_low": None,
        "half_high": None, "nan": math.nan, "said": "no fall", "text": "two words ", "empty": "", "yes": True,
    }  # fmt: skip
    assert column.cell(row) == shown


def test_signs_make_verdicts() -> None:
    assert [every(signs) for signs in (["above"], ["above", "unclear"], ["unclear", "below"], [])] == [
        "holds", "undecided", "differs", "undecided",
    ]  # fmt: skip
    assert Estimate(value=math.nan, low=math.nan, high=math.nan).sign == "unclear"
    assert beyond(Estimate(value=-0.3, low=-0.4, high=-0.1), digits=1) == "0.3 (0.1 to 0.4) below"


def test_lists_read_as_sentences() -> None:
    assert [listed([]), listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


@pytest.mark.parametrize(
    ("value", "alone", "in_a_column"),
    [
        (18.0, "18", "18.0"),
        (0.5, "0.5", "0.500"),
        (9.314, "9.31", "9.31"),
        (999.7, "1,000", "1,000"),
        (250.0, "250", "250"),
        (0.0, "0", "0"),
        (0.00002, "2e-05", "2.00e-05"),
        (18, "18", "18"),
        (None, "–", "–"),
    ],
)
def test_numbers_of_a_column_have_as_many_digits(value: float | None, alone: str, in_a_column: str) -> None:
    assert number(value) == alone
    assert Column("x", "number").cell({"x": value}) == in_a_column


def test_a_logarithmic_axis_has_its_decades() -> None:
    """A label at 900 would leave no room for that at 1k."""
    rows = [{"x": x, "y": y, "kind": "k"} for x, y in ((450, 390), (900, 1500), (4400, 3100))]
    key = charts.Key.cycled("kind", ["k"])
    spec = charts.single(charts.series(rows, charts.log("x", "x"), charts.log("y", "y"), key, lines=False))
    shown = [
        text.text
        for text in ElementTree.fromstring(charts.svg(spec)).iter("{http://www.w3.org/2000/svg}text")
        if text.get("opacity") != "0"
    ]
    assert shown.count("1k") == 2
    assert "900" not in shown
