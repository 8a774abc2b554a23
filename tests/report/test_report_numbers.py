"""What the report's queries and findings say, against numpy, scipy and plain counting."""

from __future__ import annotations

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

from infra.duck import connect
from infra.storage import Storage
from tasks.report import corpus as report_corpus
from tasks.report import figures
from tasks.report import findings as report_findings
from tasks.report import graph as report_graph
from tasks.report.rows import DegreeFit, LayerCoverage, LineFit, Spread
from tasks.report.style import svg
from tasks.report.text import listed, visible


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> report_catalogue.Published:
    return report_catalogue.publish(Storage(str(tmp_path_factory.mktemp("full"))))


def test_fits_equal_numpy_on_the_same_tokens(published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        fits = report_graph.degree_fits(connection)
    assert [fit.layer for fit in fits] == list(report_catalogue.LAYERS)
    for fit in fits:
        pairs = [(rank, d) for (layer, rank), d in published.degrees.items() if layer == fit.layer and d > 0]
        x, y = np.log(np.array(pairs, dtype=float)).T
        slope, intercept = np.polyfit(x, y, 1)
        assert fit.tokens is not None
        assert fit.line is not None
        assert fit.tokens.slope == pytest.approx(slope, abs=1e-5)
        assert fit.tokens.intercept == pytest.approx(intercept, abs=1e-4)
        assert fit.tokens.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-5)
        assert fit.line.n < fit.tokens.n


def test_rarefaction_equals_scipy(published: report_catalogue.Published) -> None:
    from scipy.stats import spearmanr

    with closing(connect(published.storage)) as connection:
        rows = connection.execute(
            "SELECT layer, is_function, count, degree, rarefied_degree FROM token_degree "
            "WHERE rarefied_degree IS NOT NULL"
        ).fetchall()
        measured = report_graph.rarefactions(connection)
        assert [found.layer for found in measured] == list(report_catalogue.LAYERS)
        for found in measured:
            mine = [row for row in rows if row[0] == found.layer]
            assert found.n_function + found.n_content == len(mine)
            assert found.function_median == pytest.approx(np.median([row[4] for row in mine if row[1]]))
            assert found.content_median == pytest.approx(np.median([row[4] for row in mine if not row[1]]))
            counts = [row[2] for row in mine]
            assert found.raw_correlation == pytest.approx(spearmanr(counts, [row[3] for row in mine])[0])
            assert found.rarefied_correlation == pytest.approx(spearmanr(counts, [row[4] for row in mine])[0])


def test_coverage_by_ten_and_by_function_tokens(published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        layers = report_graph.layer_coverage(connection)
        points = report_graph.coverage_points(connection)
    last = max(int(str(row["rank"])) for row in published.tokens if row["is_function"])
    for layer in layers:
        assert layer.top10 == published.coverage[layer.layer, 10]
        assert layer.function == published.coverage[layer.layer, last]
    for point in points:
        assert point.coverage == published.coverage[point.layer, point.rank]
    assert {point.rank for point in points} >= {1, 2, 10, len(published.tokens)}


def test_spread_finds_the_burst_and_counts_it(published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        function, content = report_corpus.spread_pair(connection)
        for spread in (function, content):
            per_document = dict(
                connection.execute(
                    "SELECT doc_id, count(*) FROM occurrences JOIN tokens USING (token_id) WHERE token = ? GROUP BY 1",
                    [spread.token],
                ).fetchall()
            )
            assert spread.width == 1
            assert list(spread.means) == [per_document.get(doc, 0) for doc in range(spread.n_documents)]
            assert spread.most == max(per_document.values())
            assert spread.top_share == pytest.approx(max(per_document.values()) / spread.count)
    assert function.token == " the"
    assert max(range(150), key=lambda doc: content.means[doc]) in range(40, 45)


def test_neighbouring_documents_share_a_bin(monkeypatch: pytest.MonkeyPatch, published: Any) -> None:
    monkeypatch.setattr(report_corpus, "SPREAD_BINS", 40)
    with closing(connect(published.storage)) as connection:
        function, _ = report_corpus.spread_pair(connection)
    assert function.width == 4
    assert len(function.means) == 38
    widths = [4] * 37 + [2]
    assert sum(mean * width for mean, width in zip(function.means, widths, strict=True)) == pytest.approx(
        function.count
    )


def test_large_vocabularies_are_thinned_in_sql() -> None:
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE tokens AS SELECT i + 1 AS rank, 1000000000 // (i + 1) AS count, i < 100 AS is_function, "
        "1.0 / (i + 1) AS doc_share FROM range(300000) AS r(i)"
    )
    points = report_corpus.frequency_points(connection)
    assert len(points) < 600
    assert [point.rank for point in points[:100]] == list(range(1, 101))
    assert all(point.count == 10**9 // point.rank for point in points)
    bins = report_corpus.document_shares(connection)
    assert len(bins) < 400
    assert sum(row.n for row in bins) == 300_000


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


def test_a_hostile_token_in_a_figure_is_text() -> None:
    spread = {
        "rank": 1,
        "count": 3,
        "doc_count": 2,
        "doc_share": 0.5,
        "n_documents": 4,
        "most": 2,
        "top_share": 0.5,
    }
    rows = [
        Spread(token="</text><script>x</script>", is_function=True, width=1, means=[1, 2, 0, 0], **spread),
        Spread(token="$\\frac$ ]]>&", is_function=False, width=1, means=[0, 0, 1, 2], **spread),
    ]
    root = ElementTree.fromstring(svg(figures.token_spread(rows)))
    text = "".join(root.itertext())
    assert "</text><script>x</scrip" in text
    assert r"$\frac$␣]]>&" in text
    assert not [element for element in root.iter() if element.tag.endswith("script")]


def test_findings_that_do_not_hold_say_so() -> None:
    line = LineFit(n=10, slope=-0.5, intercept=3.0, r2=0.60)
    bent = report_findings.degree_rank(
        [DegreeFit(layer=4, line=line, tokens=line, alpha=2.0, xmin=1.0, ks=0.1)]
    )
    assert bent.verdict == "differs"
    assert "0.600" in bent.text
    assert "does not hold at layer 4" in bent.text
    common = {"layer": 4, "activated_features": 900, "dictionary_size": 1000, "half_rank": None}
    low = report_findings.coverage([LayerCoverage(top10=0.31, function=0.45, **common)])
    assert low.verdict == "differs"
    assert "31.00 %" in low.text
    assert "at no layer" in low.text
    high = report_findings.coverage([LayerCoverage(top10=0.61, function=0.75, **common)])
    assert high.verdict == "holds"
    assert "fills up early" not in high.text


def test_single_figures_can_be_had_as_files(tmp_path: Path, published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        figure = figures.coverage_curves(report_graph.coverage_points(connection), cut=7)
    figure.savefig(tmp_path / "coverage.png")
    assert (tmp_path / "coverage.png").read_bytes().startswith(b"\x89PNG")


def test_lists_read_as_sentences() -> None:
    assert [listed([]), listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
