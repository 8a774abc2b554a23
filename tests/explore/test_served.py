"""The explorer's server: grids, charts, kept pages, downloads, forms, the console, who may ask, and what changes."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from every_panel import ACTIONS, HOSTILE, PAGES
from republished import Roots
from small_run import small_run
from starlette.testclient import TestClient

from functok.explorer import app as explorer_app
from functok.explorer.app import build_app
from functok.explorer.tables import Tables
from infra.catalog import CATALOG, write_catalog
from infra.storage import Storage
from tasks.explore.vocabulary import Asked, Page, PageAt, Query

HERE = "http://127.0.0.1:4300"
TOKEN = "a-token-of-this-start"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("root")))
    write_catalog(storage, small_run().write(storage))
    return storage


@pytest.fixture(scope="module")
def kept() -> list[dict[str, str]]:
    return []


@pytest.fixture(scope="module")
def client(storage: Storage, kept: list[dict[str, str]]) -> Iterator[TestClient]:
    app = build_app(storage, PAGES, ACTIONS, token=TOKEN, context={"kept": kept})
    with TestClient(app, base_url=HERE) as client:
        assert client.get(f"/every?token={TOKEN}", follow_redirects=False).headers["location"] == "/every"
        yield client


def rows_of(text: str) -> list[list[str]]:
    """The cells of the page's grid."""
    body = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    assert body is not None
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    ]


def tokens_of(storage: Storage, sql: str) -> list[Any]:
    with Tables(storage).reader() as reader:
        return [value for (value,) in reader.execute(sql).fetchall()]


def test_every_panel_is_drawn_and_no_text_is_html(client: TestClient) -> None:
    text = client.get("/every").text
    for shown in (
        "Facts",
        "As in the paper",
        "Not as in the paper",
        "Contexts",
        "Steered",
        "Kept beside the run",
        "[[sae]]",
    ):
        assert shown in text
    for planted in ("<script>alert", '"><img', "onerror=alert(2)>"):
        assert planted not in text
    # Text of templates is text: nothing of it is computed.
    assert "{{ 7 * 7 }}" in text
    assert "49" not in re.sub(r"[\d.]{3,}", "", text)
    scripts = re.findall(r"<script([^>]*)>", text)
    assert all(' src="/static/' in one or "application/json" in one for one in scripts)
    (spec,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert json.loads(spec)["config"]["legend"]


def test_a_grid_is_sorted_by_its_headings(client: TestClient, storage: Storage) -> None:
    text = client.get("/every").text
    assert [row[0] for row in rows_of(text)] == ["1", "2", "3", "4", "5"]
    (to,) = re.findall(r'<a href="([^"]*tokens\.sort=-count[^"]*)"', text)
    by_count = tokens_of(storage, "SELECT count FROM tokens ORDER BY count DESC")
    assert [int(row[2]) for row in rows_of(client.get(to.replace("&amp;", "&")).text)] == by_count[:5]
    ascending = client.get("/every?tokens.sort=count").text
    assert [int(row[2]) for row in rows_of(ascending)] == sorted(by_count)[:5]
    assert 'aria-sort="ascending"' in ascending
    unknown = client.get("/every?tokens.sort=nothing").text
    assert rows_of(unknown) == rows_of(text)
    assert "It has no nothing to be sorted by." in unknown


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("tokens.colour=red", "This table cannot be filtered by colour."),
        ("tokens.page=99", "It has no page 99."),
        ("tokens.page=x", "It has no page x."),
        ("tokens.sort=-", ""),
        ("tokens.page=2&tokens.sort=-count&others.page=7", ""),
    ],
)
def test_what_a_grid_does_not_have_is_said(client: TestClient, typed: str, said: str) -> None:
    assert re.findall(r'class="wrong" role="alert">([^<]*)<', client.get(f"/every?{typed}").text) == [
        said
    ] * bool(said)


@pytest.mark.slow
def test_a_grid_is_paged(client: TestClient) -> None:
    second = client.get("/every?tokens.page=2").text
    assert [row[0] for row in rows_of(second)] == ["6", "7", "8", "9"]
    assert "6–9 of 9" in second
    for beyond in ("99", "0", "x", "-1", "9" * 30):
        assert client.get("/every", params={"tokens.page": beyond}).status_code == 200
    assert "6–9 of 9" in client.get("/every?tokens.page=99").text


@pytest.mark.parametrize(
    ("column", "typed", "condition"),
    [
        ("token", "T1", "contains(lower(token), 't1')"),
        ("count", ">= 2", "count >= 2"),
        ("count", "1", "count = 1"),
        ("count", "> 1 < 8", "count > 1 AND count < 8"),
        ("count", "< 1e1", "count < 10"),
        ("count", "> 100 % <= 300%", "count > 1 AND count <= 3"),
        ("is_function", "yes", "is_function"),
        ("token_id", "!= 3", "token_id <> 3"),
    ],
)
def test_a_grid_is_filtered(
    client: TestClient, storage: Storage, column: str, typed: str, condition: str
) -> None:
    text = client.get("/every", params={f"tokens.{column}": typed}).text
    expected = tokens_of(storage, f"SELECT rank FROM tokens WHERE {condition} ORDER BY rank")
    assert [int(row[0]) for row in rows_of(text)] == expected[:5]
    assert 'role="alert"' not in text


def test_a_blank_is_typed_as_it_is_shown(client: TestClient) -> None:
    assert "Nothing is left by these filters" in client.get("/every", params={"tokens.token": "␣t"}).text


@pytest.mark.parametrize(
    ("column", "typed"),
    [("count", "many"), ("count", ">="), ("count", "1; DROP"), ("count", "% 3"), ("is_function", "maybe")],
)
def test_a_wrong_filter_is_told_where_it_is(client: TestClient, column: str, typed: str) -> None:
    answer = client.get("/every", params={f"tokens.{column}": typed})
    assert answer.status_code == 200
    assert f'id="wrong-tokens-{column}" role="alert">type ' in answer.text
    assert rows_of(answer.text)


@pytest.mark.parametrize("typed", ["'; DROP TABLE tokens; --", '" OR 1=1', "$last", "%", "\\", "{0}"])
def test_what_is_typed_is_bound(client: TestClient, typed: str) -> None:
    answer = client.get("/every", params={"tokens.token": typed})
    assert answer.status_code == 200
    assert "Nothing is left by these filters" in answer.text


def test_a_grid_is_downloaded_whole_as_sorted_and_filtered(client: TestClient, storage: Storage) -> None:
    asked = {"download": "tokens", "tokens.sort": "-count", "tokens.count": "> 1"}
    expected = tokens_of(storage, "SELECT token_id FROM tokens WHERE count > 1 ORDER BY count DESC, token_id")
    answer = client.get("/every", params=asked | {"format": "csv"})
    assert answer.headers["content-disposition"] == 'attachment; filename="tokens.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [int(row["token_id"]) for row in rows] == expected
    table = pq.read_table(io.BytesIO(client.get("/every", params=asked | {"format": "parquet"}).content))
    assert table.column("token_id").to_pylist() == expected
    assert client.get("/every", params=asked | {"format": "xls"}).status_code == 400
    assert client.get("/every?download=nothing").status_code == 404


def test_a_large_download_is_streamed(client: TestClient) -> None:
    answer = client.get("/sql", params={"q": "SELECT range AS a FROM range(300000)", "download": "result"})
    lines = answer.text.splitlines()
    assert len(lines) == 300_001
    assert sum(map(int, lines[1:])) == 299_999 * 150_000


def test_a_page_is_kept_as_one_file(client: TestClient) -> None:
    answer = client.get("/every?save=&tokens.sort=-count")
    assert answer.headers["content-disposition"] == 'attachment; filename="Every-panel.html"'
    text = answer.text
    assert "<script" not in text
    # No script brings the marked token of a longer text into view.
    assert 'class="panel contexts"' in client.get("/every").text
    assert 'class="panel contexts"' not in text
    assert not re.findall(r'(?:src|href|action)="(?!data:)', text)
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert "data:image/svg+xml;base64," in text
    assert "SELECT * FROM" in text
    assert "<style>" in text


def test_a_chart_is_an_image_without_a_script(client: TestClient) -> None:
    assert '<noscript><img src="/every?chart=0"' in client.get("/every").text
    answer = client.get("/every?chart=0")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.text.startswith("<svg")
    assert client.get("/every?chart=7").status_code == 404


def test_what_is_not_there_or_refused_is_said(client: TestClient) -> None:
    for address, status, said in (
        ("/part/99", 404, "token 99 is not in this run"),
        ("/part/x", 404, "is no whole number"),
        ("/part/-1", 400, "numbers are not negative"),
        ("/nowhere", 404, "there is no such page"),
    ):
        answer = client.get(address)
        assert (answer.status_code, said in answer.text) == (status, True), address
    assert client.head("/every").status_code == 200


def test_a_form_is_kept(client: TestClient, kept: list[dict[str, str]]) -> None:
    own = {"origin": HERE}
    answer = client.post("/keep", data={"label": HOSTILE, "note": "é"}, headers=own, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/every")
    assert kept == [{"label": HOSTILE, "note": "é"}]
    assert client.post("/keep", data={"label": "refused"}, headers=own).status_code == 400
    assert client.post("/keep", data={"label": "x" * (2 << 20)}, headers=own).status_code == 400
    for headers in (
        {},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
    ):
        assert client.post("/keep", data={"label": "a"}, headers=headers).status_code == 403
    assert len(kept) == 1


def test_only_names_of_this_machine_are_answered(client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "192.168.0.7", "", "["):
        assert client.get("/every", headers={"host": host}).status_code == 421
    for host in ("localhost:4300", "[::1]:4300", "127.0.0.1"):
        assert client.get("/every", headers={"host": host}).status_code == 200


def test_the_token_is_needed_and_told_to_nobody(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    app = build_app(storage, PAGES, ACTIONS, token=TOKEN, context={"kept": []})
    with TestClient(app, base_url=HERE) as stranger:
        assert stranger.get("/sql?q=SELECT+1").status_code == 400
        assert stranger.post("/keep", data={"label": "a"}, headers={"origin": HERE}).status_code == 403
        assert stranger.get("/every?token=wrong").status_code == 200
        assert not stranger.cookies
        answer = stranger.get(f"/every?token={TOKEN}&layer=1", follow_redirects=False)
        assert answer.headers["location"] == "/every?layer=1"
        assert re.search("HttpOnly.*SameSite=strict", answer.headers["set-cookie"], re.IGNORECASE)
        assert stranger.get("/sql?q=SELECT+1").status_code == 200
        shown = "".join(stranger.get(path).text for path in ("/every", "/sql?q=SELECT+1", "/nowhere"))
    assert TOKEN not in shown
    assert TOKEN not in caplog.text


def test_where_others_can_reach_it_all_pages_need_the_token(storage: Storage) -> None:
    with TestClient(build_app(storage, PAGES, (), token=TOKEN, host="0.0.0.0"), base_url=HERE) as client:
        assert client.get("/every").status_code == 403
        assert client.get(f"/every?token={TOKEN}").status_code == 200
        assert client.get("/every", headers={"host": "192.168.0.7:4300"}).status_code == 200
        assert client.get("/every", headers={"host": "evil.example"}).status_code == 421


def test_nothing_outside_may_be_loaded(client: TestClient) -> None:
    policy = client.get("/every").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name, kind in (
        ("explorer.css", "text/css"),
        ("explorer.js", "text/javascript"),
        ("icon.svg", "image/svg+xml"),
    ):
        assert client.get(f"/static/{name}").headers["content-type"].startswith(kind)
    for name in ("nothing.js", "..%2fapp.py", "%2e%2e/app.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_own_javascript_is_short() -> None:
    script = Path(explorer_app.__file__).with_name("static") / "explorer.js"
    assert len(script.read_text().splitlines()) < 200


def test_the_console_runs_a_select(client: TestClient, storage: Storage) -> None:
    answer = client.get(
        "/sql", params={"q": "SELECT token, count FROM tokens ORDER BY rank;", "result.count": "> 2"}
    )
    expected = tokens_of(storage, "SELECT count FROM tokens WHERE count > 2 ORDER BY rank")
    assert [int(row[1]) for row in rows_of(answer.text)] == expected
    drawn = client.get("/sql", params={"q": "FROM tokens", "x": "rank", "y": "count", "mark": "line"}).text
    assert "count against rank" in drawn
    assert "application/json" in drawn
    assert len(rows_of(client.get("/sql", params={"q": "FROM tokens", "rows": "2"}).text)) == 2
    assert "READ_PARQUET" in client.get("/sql", params={"q": "FROM tokens", "explain": "1"}).text
    assert ["tokens"] in rows_of(client.get("/sql", params={"q": "SHOW TABLES"}).text)
    numbers = "SELECT 'nan'::DOUBLE, '-inf'::FLOAT, 0.1::FLOAT, 1234567.8, 1e-7 / 3, true, NULL, [1.5, NULL]"
    (as_they_are,) = rows_of(client.get("/sql", params={"q": numbers}).text)
    assert as_they_are == [
        *("nan", "-inf", "0.1", "1234567.8", "3.3333333333333334e-08", "true", "NULL", "[1.5, NULL]")
    ]
    hostile = client.get(
        "/sql", params={"q": f"SELECT '{HOSTILE.replace(chr(39), chr(39) * 2)}' AS \"<script>\""}
    ).text
    assert "<script>alert" not in hostile
    assert 'aria-label="Filter <script>' not in hostile


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("COPY tokens TO '{root}/x.csv'", "COPY"),
        ("ATTACH '{root}/x.db'", "ATTACH"),
        ("PRAGMA database_list", "PRAGMA"),
        ("SET threads = 1", "SET"),
        ("INSTALL httpfs", "LOAD"),
        ("LOAD httpfs", "LOAD"),
        ("CREATE TABLE a AS SELECT 1", "CREATE"),
        ("DROP VIEW tokens", "DROP"),
        ("WITH a AS (SELECT 1) INSERT INTO tokens SELECT * FROM a", "INSERT"),
        ("EXPLAIN ANALYZE DELETE FROM tokens", "EXPLAIN"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("SELECT 1; COPY tokens TO 'x'", "2 statements"),
        ("", ""),
        ("SELEC 1", "no SQL"),
        ("SELECT * FROM nothing", "nothing"),
        ("SELECT * FROM read_text('/etc/passwd')", "disabled"),
        ("SELECT * FROM read_text('{root}/../outside')", "disabled"),
        ("SELECT * FROM '/etc/passwd'", ""),
        ("SELECT * FROM pandas_scan(1)", "pandas_scan()"),
        ("SELECT * FROM tokens WHERE EXISTS (FROM python_arrow_scan(1))", "python_arrow_scan()"),
        ("FROM query('FROM pandas_scan(1)')", "query()"),
        ("FROM enable_logging()", "enable_logging()"),
        ("FROM duckdb_secrets()", "duckdb_secrets()"),
        ("SELECT write_log('a')", "write_log()"),
        ("SELECT 1) AS a, (SELECT 2", "no SQL"),
        ("SELECT getenv('AWS_SECRET_ACCESS_KEY')", "getenv"),
        ("SELECT token::INT FROM tokens", "Conversion Error"),
        ("SELECT error('as asked for')", "as asked for"),
    ],
)
def test_the_console_does_nothing_else(client: TestClient, storage: Storage, sql: str, named: str) -> None:
    before = sorted(Path(storage.root).rglob("*"))
    answer = client.get("/sql", params={"q": sql.format(root=storage.root)})
    assert answer.status_code == (400 if sql else 200)
    assert named in answer.text
    assert 'id="sql"' in answer.text
    assert "<tbody>" not in answer.text
    assert sorted(Path(storage.root).rglob("*")) == before


def test_a_page_of_another_server_runs_no_sql(client: TestClient) -> None:
    for site in ("cross-site", "same-site"):
        answer = client.get("/sql", params={"q": "SELECT 42 AS answer"}, headers={"sec-fetch-site": site})
        assert "SELECT 42 AS answer" in answer.text
        assert "<tbody>" not in answer.text


SLOW = "SELECT count(*) FROM range(100000000) a, range(1000) b WHERE a.range * b.range % 7 = 1"


@pytest.mark.slow
def test_a_query_ends_with_its_time(client: TestClient) -> None:
    begun = time.monotonic()
    answer = client.get("/sql", params={"q": SLOW, "seconds": "1"})
    assert time.monotonic() - begun < 10
    assert answer.status_code == 503
    assert "longer than 1 s" in answer.text
    assert f">{SLOW}</textarea>" in answer.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rows": "0"}, "rows cannot be 0"),
        ({"rows": "100001"}, "1 to 100,000"),
        ({"seconds": "soon"}, "seconds cannot be soon"),
        ({"mark": "pie"}, "points, line, bars"),
    ],
)
def test_limits_that_cannot_be_are_said(client: TestClient, values: dict[str, str], said: str) -> None:
    answer = client.get("/sql", params={"q": "SELECT 1", **values})
    assert answer.status_code == 400
    assert said in answer.text


def test_a_reader_does_not_wait_for_what_cannot_be_ended(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB is interrupted between two pieces of work, and one function's call on gigabytes is one piece."""
    monkeypatch.setattr(explorer_app, "LATE", 0.2)
    is_asked, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def deaf(*_: object) -> None:
        is_asked.set()
        may_end.wait(30)
        ended.set()

    monkeypatch.setattr("functok.explorer.console.result", deaf)
    with TestClient(build_app(storage, PAGES, (), token=TOKEN), base_url=HERE) as client:
        client.get(f"/every?token={TOKEN}")
        answer = client.get("/sql", params={"q": "SELECT 'deaf'", "seconds": "1"})
        assert is_asked.is_set()
        assert not ended.is_set()
        assert answer.status_code == 503
        assert "longer than 1 s" in answer.text
        assert ">SELECT &#39;deaf&#39;</textarea>" in answer.text
        may_end.set()
        assert ended.wait(10)
        assert client.get("/every").status_code == 200


@pytest.mark.slow
def test_a_page_ends_with_its_time(storage: Storage) -> None:
    def slow(asked: Asked) -> Page:
        asked.rows(Query(sql=SLOW))
        raise AssertionError("it was not ended")

    pages = [PageAt(path="/slow", title="Slow", build=slow)]
    with TestClient(build_app(storage, pages, (), page_seconds=0.5), base_url=HERE) as client:
        answer = client.get("/slow")
    assert answer.status_code == 503
    assert "longer than 0.5 s" in answer.text


@pytest.mark.slow
def test_new_tables_are_moved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("functok.explorer.tables.ASKED_EVERY", 0.0)
    storage = Storage(str(tmp_path))
    roots = Roots(storage)
    with TestClient(build_app(storage, PAGES, ()), base_url=HERE) as client:
        before = client.get("/every").text
        name = client.get("/generation").json()["generation"]
        assert f'data-generation="{name}"' in before
        roots.publish_next()
        assert client.get("/generation").json()["generation"] != name
        after = client.get("/every").text
        assert rows_of(after) != rows_of(before)
        assert f'data-generation="{name}"' not in after
        # A catalogue that cannot be read, or is gone, leaves the tables that there are.
        storage.write_bytes(CATALOG, b"{")
        assert client.get("/every").status_code == 200
        (tmp_path / CATALOG).unlink()
        assert rows_of(client.get("/every").text) == rows_of(after)
