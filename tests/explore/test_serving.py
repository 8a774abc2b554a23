"""The explorer as a process serves it: ports, readers at once while runs publish, readers who leave, S3."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import httpx
import pytest
from every_panel import ACTIONS, PAGES
from republished import Roots
from s3 import S3Root, Server
from starlette.testclient import TestClient

import functok
from functok.explorer.app import build_app
from functok.explorer.server import Served
from functok.explorer.tables import Generation, Reader, Stopped, Tables
from infra.storage import Storage
from schemas.errors import ConfigError
from tasks.explore.vocabulary import Asked, Page, PageAt, Query

SLOW = "SELECT count(*) FROM range(100000000) a, range(1000) b WHERE a.range * b.range % 7 = 1"


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(Storage(str(tmp_path)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("functok.explorer.tables.ASKED_EVERY", 0.05)


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_readers_see_whole_runs_and_old_ones_go(roots: Roots) -> None:
    """Readers at once while runs publish under them: no error, and nothing of old runs is kept."""
    app = build_app(roots.storage, PAGES, (), token="t")
    known: list[weakref.ref[Generation]] = []
    seen: set[str] = set()
    failures: list[str] = []
    published = threading.Event()

    def read(client: TestClient, number: int) -> None:
        while not published.is_set():
            answer = client.get(f"/every?tokens.sort=-count&last={1 + number}0")
            found = re.search(r'data-generation="(\w+)"', answer.text)
            if answer.status_code != 200 or found is None:
                failures.append(answer.text)
            else:
                seen.add(found[1])

    made = Generation.__init__

    def noted(self: Generation, *arguments: Any) -> None:
        made(self, *arguments)
        known.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch, TestClient(app, base_url="http://127.0.0.1") as client:
        patch.setattr(Generation, "__init__", noted)
        threads = [threading.Thread(target=read, args=(client, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for number in range(1, 5):
            roots.publish_next()
            until = time.monotonic() + 30
            while len(known) < number and time.monotonic() < until:
                time.sleep(0.05)
        published.set()
        for thread in threads:
            thread.join()
        gc.collect()
        kept = sum(one() is not None for one in known)
    assert not failures, failures[0]
    assert len(known) == 4
    assert len(seen) > 2
    assert kept == 1


@pytest.mark.slow
def test_a_reader_who_leaves_has_the_query_ended(roots: Roots) -> None:
    ended = threading.Event()

    def slow(asked: Asked) -> Page:
        try:
            asked.rows(Query(sql=SLOW))
        except Stopped:
            ended.set()
            raise
        raise AssertionError("it was not ended")

    pages = [PageAt(path="/slow", title="Slow", build=slow)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("functok.explorer.app.all_pages", lambda: pages)
        with Served(roots.storage, port=0) as served:
            with pytest.raises(httpx.ReadTimeout):
                httpx.get(f"http://127.0.0.1:{served.port}/slow", timeout=1)
            assert ended.wait(10)


def test_a_stopped_reader_asks_nothing_more(roots: Roots) -> None:
    reader = Reader(Tables(roots.storage).current())
    reader.stop("nobody waits")
    with pytest.raises(Stopped, match="nobody waits"):
        reader.execute("SELECT 1")


def test_the_database_reads_the_root_and_nothing_else(
    roots: Roots, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "a.txt"
    outside.write_text("secret")
    with Tables(roots.storage).reader() as reader:
        assert reader.execute("SELECT count(*) FROM tokens").fetchone()[0] > 0
        for sql in (
            f"SELECT * FROM read_text('{outside}')",
            "SET threads = 1",
            "SELECT * FROM reader",
            "LOAD httpfs",
        ):
            with pytest.raises(duckdb.Error):
                reader.execute(sql)


def test_a_root_may_be_a_link_or_hold_some(roots: Roots, tmp_path_factory: pytest.TempPathFactory) -> None:
    """DuckDB follows links before it looks whether it may read there."""
    folder = tmp_path_factory.mktemp("links")
    (folder / "root").symlink_to(roots.storage.root)
    (folder / "other").mkdir()
    for entry in Path(roots.storage.root).iterdir():
        (folder / "other" / entry.name).symlink_to(entry)
    for name in ("root", "other"):
        with Tables(Storage(str(folder / name))).reader() as reader:
            assert reader.execute("SELECT count(*) > 0 FROM activations").fetchone() == (True,)


def test_views_are_made_when_they_are_asked_for(roots: Roots) -> None:
    with Tables(roots.storage).reader() as reader:
        made = "SELECT count(*) FROM duckdb_views() WHERE NOT internal AND view_name = 'coverage'"
        assert "coverage" in reader.tables
        names = reader._cursor.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        assert names == [("feature_labels",)]
        reader.execute("SELECT max(coverage) FROM coverage")
        assert reader._cursor.execute(made).fetchone() == (1,)
        assert {name for (name,) in reader.execute("SHOW TABLES").fetchall()} >= reader.tables


@pytest.mark.slow
def test_python_explores_a_root_and_closes_it(roots: Roots) -> None:
    with functok.open(roots.storage.root).explore() as explorer:
        with httpx.Client(follow_redirects=True) as client:
            assert client.get(explorer.address).status_code == 200
            assert client.get(f"http://127.0.0.1:{explorer.port}/sql?q=SELECT+1").status_code == 200
        assert explorer.address.split("token=")[1] not in repr(explorer)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{explorer.port}/")


@pytest.mark.slow
def test_a_taken_port_gives_the_next_one(roots: Roots) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Served(roots.storage, port=port) as served:
            assert port < served.port < port + 100


def test_a_root_without_tables_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished tables"):
        Served(Storage(str(tmp_path)))


@pytest.mark.process
def test_the_command_prints_the_address_and_ends_with_ctrl_c(roots: Roots) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "functok", "explore", "--root", roots.storage.root]
        process = subprocess.Popen(
            [*command, "--no-browser", "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert f"port {port} is taken" in process.stdout.readline()
    try:
        assert roots.storage.root in process.stdout.readline()
        address = process.stdout.readline().strip()
        with httpx.Client(follow_redirects=True) as client:
            assert client.get(address).status_code == 200
        # Where it is asked while it ends.
        asking = threading.Thread(target=_ask_slowly, args=(address,), daemon=True)
        asking.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors


def _ask_slowly(address: str) -> None:
    with suppress(httpx.HTTPError), httpx.Client(follow_redirects=True, timeout=30) as client:
        client.get(address)
        client.get(f"{address.split('?')[0]}sql", params={"q": SLOW, "seconds": "60"})


@pytest.mark.s3
def test_a_root_on_s3_is_explored(
    moto_root: S3Root, moto_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    roots = Roots(Storage(moto_root.url, os.environ.get("AWS_ENDPOINT_URL")))
    app = build_app(roots.storage, PAGES, ACTIONS, token="t", context={"kept": []})
    with TestClient(app, base_url="http://127.0.0.1") as client:
        client.get("/every?token=t")
        shown = client.get("/every")
        assert shown.status_code == 200
        answer = client.get("/sql", params={"q": "SELECT count(*) AS n FROM activations"})
        assert "<tbody>" in answer.text
        for url in ("s3://another-bucket/a.parquet", "/etc/passwd", f"{moto_root.url}/../outside.parquet"):
            refused = client.get("/sql", params={"q": f"SELECT * FROM read_parquet('{url}')"})
            assert refused.status_code == 400, url
        settings = client.get("/sql", params={"q": "FROM duckdb_settings()", "result.page": "1"})
        for text in (shown.text, answer.text, settings.text, caplog.text):
            assert moto_server.secret_key not in text
            assert moto_server.access_key not in text
