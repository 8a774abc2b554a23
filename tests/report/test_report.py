"""The report's page against the tables it was made from, and against hostile tokens."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pytest
import report_catalogue
from report_reading import Page, read, svgs

from infra.duck import connect
from infra.storage import Storage
from schemas.config import DuckDb
from schemas.errors import ConfigError
from schemas.tables import TABLES
from tasks.models.token_texts import visible
from tasks.report import corpus, graph
from tasks.report.report import REPORT, write_report
from tasks.report.text import integer, percent


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> report_catalogue.Published:
    made = report_catalogue.publish(Storage(str(tmp_path_factory.mktemp("full"))))
    write_report(made.storage)
    return made


@pytest.fixture(scope="module")
def page(published: report_catalogue.Published) -> Page:
    return Page(read(published.storage))


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


@pytest.mark.slow
def test_charts_are_what_vega_lite_s_schema_allows(published: report_catalogue.Published) -> None:
    with closing(connect(published.storage)) as connection:
        builders = [*corpus.sections(connection), *graph.sections(connection)]
        drawn = [chart.spec.to_dict() for build in builders for chart in build().charts]
    assert len(drawn) > 5


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_corpus_tables_alone_make_a_report_that_says_how_to_get_the_rest(tmp_path: Path) -> None:
    made = report_catalogue.publish(Storage(str(tmp_path)), graph=False)
    assert write_report(made.storage) == made.storage.url(REPORT)
    page = Page(read(made.storage))
    text = "".join(page.text)
    assert "not published yet" in text
    assert "functok run CONFIG" in text
    assert len(page.images) == 3
    assert "Graph summary" not in page.tables


@pytest.mark.slow
def test_a_counting_run_says_that_it_has_no_positions(tmp_path: Path) -> None:
    made = report_catalogue.publish(Storage(str(tmp_path)), graph=False, occurrences=False)
    write_report(made.storage)
    page = Page(read(made.storage))
    assert "corpus.keep_occurrences" in "".join(page.text)
    assert len(page.images) == 2


@pytest.mark.slow
def test_a_graph_without_edges_is_said_to_have_none(tmp_path: Path) -> None:
    made = report_catalogue.publish(Storage(str(tmp_path)))
    for table in ("token_degree", "coverage", "graph_summary"):
        rows = made.storage.read_parquet(f"tables/{table}.parquet").to_pylist()
        kept = (
            [row | {"n_edges": 0, "activated_features": 0} for row in rows]
            if table == "graph_summary"
            else []
        )
        made.storage.write_parquet(
            f"tables/{table}.parquet", pa.Table.from_pylist(kept, schema=TABLES[table])
        )
    write_report(made.storage)
    page = Page(read(made.storage))
    assert "No token activated a feature" in "".join(page.text)
    assert len(page.images) == 3


def test_nothing_published_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tables are published") as caught:
        write_report(Storage(str(tmp_path)))
    assert "functok run" in caught.value.hint
    assert not (tmp_path / REPORT).exists()
