"""The report against the tables it was made from, against hostile tokens, and in a browser."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections import Counter
from contextlib import closing
from html.parser import HTMLParser
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
from infra.errors import ConfigError
from infra.storage import Storage
from schemas.config import DuckDb
from tasks import figures, report_corpus, report_findings, report_graph
from tasks.figures_style import svg
from tasks.report import REPORT, write_report
from tasks.report_rows import DegreeFit, LayerCoverage, LineFit, Spread
from tasks.report_text import integer, listed, percent, visible

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Page(HTMLParser):
    """The report's elements, tables (by caption), images and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str]] = []
        self.text: list[str] = []
        self._cells: list[list[str]] = []
        self._caption = ""
        self._inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "img":
            self.images.append({name: value or "" for name, value in attrs})
        elif tag in {"meta", "br"}:
            return
        if tag != "img":
            self._inside.append(tag)
        if tag == "table":
            self._cells, self._caption = [], ""
        elif tag == "tr":
            self._cells.append([])
        elif tag in {"td", "th"}:
            self._cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag, f"unbalanced {tag}"
        if tag == "table":
            self.tables[self._caption] = self._cells

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "caption" in self._inside:
            self._caption += data
        elif {"td", "th"} & set(self._inside):
            self._cells[-1][-1] += data


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> report_catalogue.Published:
    made = report_catalogue.publish(Storage(str(tmp_path_factory.mktemp("full"))))
    write_report(made.storage)
    return made


@pytest.fixture(scope="module")
def page(published: report_catalogue.Published) -> Page:
    return Page(read(published.storage))


def read(storage: Storage) -> str:
    return storage.read_bytes(REPORT).decode("utf-8")


def svgs(page: Page) -> list[str]:
    prefix = "data:image/svg+xml;base64,"
    assert all(image["src"].startswith(prefix) for image in page.images)
    return [base64.b64decode(image["src"][len(prefix) :]).decode("utf-8") for image in page.images]


def test_coverage_table_has_the_papers_shape_and_the_tables_numbers(
    page: Page, published: report_catalogue.Published
) -> None:
    table = page.tables["Cumulative coverage of the activated features by the ten most frequent tokens"]
    layers = report_catalogue.LAYERS
    assert table[0] == ["rank", "token", *(f"layer {layer}" for layer in layers)]
    assert table[1:] == [
        [
            str(rank),
            visible(str(published.tokens[rank - 1]["token"])),
            *(percent(published.coverage[layer, rank]) for layer in layers),
        ]
        for rank in range(1, 11)
    ]


def test_papers_numbers_are_labelled_as_the_papers(page: Page) -> None:
    (caption,) = [name for name in page.tables if "paper" in name]
    assert "not from this run" in caption
    assert page.tables[caption][10] == ["10", "in", "48.52 %", "76.46 %", "68.27 %"]


def test_function_tokens_are_listed_whole(page: Page, published: report_catalogue.Published) -> None:
    expected = [row for row in published.tokens if row["is_function"]]
    assert [(row[0], row[1], row[3]) for row in page.tables["Function tokens"][1:]] == [
        (str(row["rank"]), visible(str(row["token"])), integer(row["count"]))
        for row in expected  # type: ignore[arg-type]
    ]


def test_run_tables_hold_gate_expectations_rejects_and_settings(page: Page) -> None:
    assert page.tables["Dictionaries"][1] == [
        "3", "trained here, <layer 3>", "2,030", "0.791", "0.652", "31.7", "32", "98.7 %", "10,000",
    ]  # fmt: skip
    assert page.tables["Dictionaries"][3][3:] == ["–"] * 6
    assert page.tables["Expectations"][1] == ["tokenize", "ids in range", "✗ no", "3 <rows>"]
    assert page.tables["Records that were not used, by reason"][1:] == [
        ["empty text", "2", "1", "data/b.jsonl", "2"],
        ["broken JSON <script>", "1", "1", "data/<b>a</b>.jsonl", "7"],
    ]
    assert ["model", "tiny & random"] in page.tables["Run"]


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
        for found in report_graph.rarefactions(connection):
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


def test_same_tables_give_the_same_bytes(tmp_path: Path, published: report_catalogue.Published) -> None:
    again = report_catalogue.publish(Storage(str(tmp_path)))
    write_report(again.storage, DuckDb(threads=1))
    assert read(again.storage) == read(published.storage)
    write_report(again.storage, DuckDb(threads=2))
    assert read(again.storage) == read(published.storage)


def test_hostile_tokens_are_inert(page: Page, published: report_catalogue.Published) -> None:
    assert page.tags["script"] == 0
    assert page.tags["style"] == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    text = "".join(page.text)
    shown = [str(row["token"]) for row in published.tokens[:10]]
    assert len({*shown} & {*report_catalogue.HOSTILE}) >= 8
    assert all(visible(token) in text for token in shown)
    assert "\u202e" not in text
    for picture in svgs(page):
        tags = {element.tag.rsplit("}", 1)[-1] for element in ElementTree.fromstring(picture).iter()}
        assert not tags & {"script", "foreignObject", "image", "a"}


def test_nothing_outside_the_file_is_referred_to(page: Page, published: report_catalogue.Published) -> None:
    html = read(published.storage)
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    assert not page.tags.keys() & {"link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for _, name, value in page.attributes:
        if name in {"href", "src", "srcset", "action"}:
            assert value.startswith(("#", "data:image/svg+xml;base64,"))
    for picture in svgs(page):
        for namespace in ('"http://www.w3.org/2000/svg"', '"http://www.w3.org/1999/xlink"'):
            picture = picture.replace(namespace, "")
        assert "http" not in picture
        assert not re.search(r"url\((?!#)", picture)


def test_every_picture_has_a_text_that_stands_for_it(page: Page) -> None:
    assert len(page.images) == 6
    assert all(len(image["alt"]) > 40 for image in page.images)


def test_corpus_tables_alone_make_a_report_that_says_how_to_get_the_rest(tmp_path: Path) -> None:
    made = report_catalogue.publish(Storage(str(tmp_path)), graph=False)
    assert write_report(made.storage) == made.storage.url(REPORT)
    page = Page(read(made.storage))
    text = "".join(page.text)
    assert "not published yet" in text
    assert "functok run CONFIG" in text
    assert len(page.images) == 3
    assert "Graph summary" not in page.tables


def test_a_counting_run_says_that_it_has_no_positions(tmp_path: Path) -> None:
    made = report_catalogue.publish(Storage(str(tmp_path)), graph=False, occurrences=False)
    write_report(made.storage)
    page = Page(read(made.storage))
    assert "corpus.keep_occurrences" in "".join(page.text)
    assert len(page.images) == 2


def test_nothing_published_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tables are published") as caught:
        write_report(Storage(str(tmp_path)))
    assert "functok run" in caught.value.hint
    assert not (tmp_path / REPORT).exists()


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


def browser() -> str:
    """The first Chromium on the path.

    A machine without one fails, so that CI cannot quietly stop looking at the page.
    """
    if os.environ.get("FUNCTOK_SKIP_CHROMIUM") == "1":
        pytest.skip("FUNCTOK_SKIP_CHROMIUM=1")
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    pytest.fail(
        f"none of {', '.join(BROWSERS)} is installed: `apt-get install chromium`, or set FUNCTOK_SKIP_CHROMIUM=1"
    )


def chromium(page: Path, profile: Path, *options: str) -> str:
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.chromium
def test_report_opens_in_chromium(tmp_path: Path, published: report_catalogue.Published) -> None:
    html = read(published.storage)
    # The probe counts what decoded and how much text was laid out. The policy that forbids scripts is taken
    # out for it, so that hostile tokens have nothing but their escaping between them and execution.
    probe = (
        "<script>addEventListener('load', () => {"
        "const d = document, all = [...d.images];"
        "d.body.dataset.images = all.filter(i => i.complete && i.naturalWidth > 0).length;"
        "d.body.dataset.wide = d.documentElement.scrollWidth <= innerWidth;"
        "d.body.dataset.requests = performance.getEntriesByType('resource')"
        ".filter(e => !e.name.startsWith('data:')).length;"
        "d.body.dataset.shown = d.title;"
        "})</script>"
    )
    page = tmp_path / "probe.html"
    without_policy = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", html)
    page.write_text(without_policy.replace("</body>", probe + "</body>"), encoding="utf-8")
    dom = chromium(page, tmp_path / "profile-1", "--window-size=1200,900", "--dump-dom")
    found = dict(re.findall(r"data-(images|wide|requests|shown)=\"([^\"]*)\"", dom))
    assert found == {"images": "6", "wide": "true", "requests": "0", "shown": "functok report"}

    original, shot = tmp_path / "report.html", tmp_path / "report.png"
    original.write_text(html, encoding="utf-8")
    chromium(original, tmp_path / "profile-2", "--window-size=1200,2400", f"--screenshot={shot}")
    from matplotlib.image import imread

    pixels = imread(shot)
    assert pixels.shape[:2] == (2400, 1200)
    for colour in (figures.FUNCTION, figures.CONTENT):
        wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        drawn = np.abs(pixels[..., :3] - wanted).max(axis=-1) < 0.03
        assert drawn.sum() > 200, f"the figures' colour {colour} is not on the page"
