"""The pages of `functok up` without Prefect: what is served, to whom, and what is said where nothing can be."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

import pytest
from s3 import S3Root
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from infra import web_server
from infra.published import KnownRoot
from infra.storage import Storage

HTML = "<!DOCTYPE html><title>functok report</title>Zürich"


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, KnownRoot]:
    """The roots that the server knows: one with a report, one without, one that is a file."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "report.html").write_text(HTML, encoding="utf-8")
    (tmp_path / "whole" / "catalog.json").write_text("{}")
    (tmp_path / "file").write_text("")
    roots = {
        name: KnownRoot(name=name, root=str(tmp_path / name)) for name in ("whole", "empty", "file", "<b>")
    }
    monkeypatch.setattr(web_server, "known_root", roots.get)
    monkeypatch.setattr(web_server, "known_roots", lambda: list(roots.values()))
    return roots


@pytest.fixture
def pages(known: dict[str, KnownRoot], monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The whole app, around a Prefect that has one page."""

    async def anything(_: Any) -> HTMLResponse:
        return HTMLResponse("Prefect")

    async def block_types(_: Any) -> JSONResponse:
        return JSONResponse(
            [{"name": "Secret", "logo_url": "https://cdn.example/ü.png?w=1", "slug": "secret"}]
        )

    ui = Starlette(routes=[Route("/api/block_types/filter", block_types), Route("/{path:path}", anything)])
    ui.add_middleware(GZipMiddleware, minimum_size=1)
    monkeypatch.setattr("prefect.server.api.server.create_app", lambda **_: ui)
    monkeypatch.setattr("prefect.__ui_v2_static_path__", Path("v2"))
    return TestClient(web_server.build_app("127.0.0.1"), base_url="http://127.0.0.1:4200")


def test_a_known_report_is_served_with_a_policy_of_its_own(pages: TestClient) -> None:
    answer = pages.get("/functok/whole/report")
    assert (answer.status_code, answer.text) == (200, HTML)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "script-src" not in policy
    assert (
        "access-control-allow-origin"
        not in pages.get("/functok/whole/report", headers={"origin": "http://evil.example"}).headers
    )


def test_a_known_root_says_how_it_is_explored(pages: TestClient, known: dict[str, KnownRoot]) -> None:
    answer = pages.get("/functok/whole/explore")
    assert answer.status_code == 200
    assert f"functok explore --root {known['whole'].root}" in answer.text
    assert pages.get("/functok/unknown/explore").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("empty", 404, "There is no report.html in"),
        ("file", 502, "storage failed at"),
        ("unknown", 404, "under the name unknown"),
        ("..%2Fwhole", 404, "no such page"),
        ("%2Fetc", 404, ""),
        ("whole/report/../catalog.json", 404, "no such page"),
        ("whole/catalog.json", 404, "no such page"),
    ],
)
def test_nothing_else_is_served_and_it_is_said_why(
    pages: TestClient, path: str, status: int, said: str
) -> None:
    last = path if "/" in path else f"{path}/report"
    answer = pages.get(f"/functok/{last}")
    assert answer.status_code == status
    assert said in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_names_are_escaped_in_the_list_of_reports(pages: TestClient) -> None:
    listed = pages.get("/functok").text
    assert 'href="/functok/whole/report"' in listed
    assert "<b>" not in listed
    assert "&lt;b&gt;" in listed


def test_a_storage_that_does_not_answer_is_said(
    pages: TestClient, known: dict[str, KnownRoot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_server, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(Storage, "read_bytes", lambda self, name: time.sleep(1))
    answer = pages.get("/functok/whole/report")
    assert answer.status_code == 504
    assert "has not answered" in answer.text


def test_only_names_of_this_machine_are_answered(pages: TestClient) -> None:
    for host in ("127.0.0.1:4200", "localhost:4200", "[::1]:4200"):
        assert pages.get("/dashboard", headers={"host": host}).status_code == 200
    for path in ("/dashboard", "/api/health", "/functok/whole/report"):
        refused = pages.get(path, headers={"host": "rebound.example:4200"})
        assert refused.status_code == 400, "a name elsewhere that leads here"
    assert isinstance(web_server.build_app("0.0.0.0"), TrustedHostMiddleware)
    anywhere = TestClient(web_server.build_app("0.0.0.0"), base_url="http://machine.example")
    assert anywhere.get("/dashboard").status_code == 200, "whoever listens for others has names unknown here"


def test_prefects_pages_may_load_from_this_server_alone(pages: TestClient) -> None:
    policy = pages.get("/dashboard").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "*" not in policy
    assert " ws://127.0.0.1:9 " in f"{web_server.ui_policy('http://127.0.0.1:9/api')} ".replace(";", " ")
    assert pages.get("/api/block_types/filter").json() == [
        {"name": "Secret", "logo_url": None, "slug": "secret"}
    ]
    for path in web_server.CDN_PAGES:
        assert "another host" in pages.get(path).text


def test_reports_ask_for_what_the_api_asks_for(pages: TestClient) -> None:
    from prefect.settings import PREFECT_SERVER_API_AUTH_STRING, temporary_settings

    with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: "admin:pass"}):
        for given in ({}, {"authorization": "Basic " + base64.b64encode(b"admin:no").decode()}):
            refused = pages.get("/functok/whole/report", headers=given)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
        right = {"authorization": "Basic " + base64.b64encode(b"admin:pass").decode()}
        assert pages.get("/functok/whole/report", headers=right).text == HTML


@pytest.mark.s3
def test_a_report_on_s3_is_served_and_a_server_that_is_gone_is_said(
    pages: TestClient, known: dict[str, KnownRoot], moto_root: S3Root
) -> None:
    storage = Storage(moto_root.url)
    storage.write_bytes("report.html", HTML.encode())
    known["s3"] = KnownRoot(name="s3", root=storage.root)
    assert pages.get("/functok/s3/report").text == HTML
    known["missing"] = KnownRoot(name="missing", root="s3://no-such-bucket-here/run")
    missing = pages.get("/functok/missing/report")
    assert missing.status_code in {404, 502}
    assert "s3://no-such-bucket-here/run" in missing.text
