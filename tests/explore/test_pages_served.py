"""The pages of features and texts as they are served: they come out, and nothing of a run is HTML in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import commit_found
from explored import publish
from s3 import BUCKET, S3Root, Server
from s3_proxy import Proxy
from small_run import SmallRun, small_run
from starlette.testclient import TestClient

from functok.explorer import tables
from functok.explorer.app import build_app
from infra.manifest import Manifest
from infra.storage import Storage
from tasks.explore import labels
from tasks.explore.labels import write_label

HOSTILE = "<script>alert('planted')</script>"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    storage, run = Storage(str(tmp_path_factory.mktemp("root"))), small_run()
    plant(run)
    publish(storage, run)
    write_label(storage, "d1", 3, HOSTILE, HOSTILE)
    return TestClient(build_app(storage), base_url="http://127.0.0.1")


def plant(run: SmallRun) -> None:
    for table in ("tokens", "token_degree"):
        run.tables[table].loc[lambda rows: rows.token_id <= 1, "token"] = HOSTILE


@pytest.mark.parametrize(
    "address",
    [
        "/features",
        "/features?layer=1&features.sort=token_entropy&features.label=script",
        "/feature/1/3",
        "/feature/0/5?tokens.sort=token&coactive.sort=-lift",
        "/labels",
        "/texts?documents.begins=script",
        "/text/3",
        "/text/3?layer=all&at=2",
        "/text/2?layer=1&feature=3&by=feature",
        "/paste",
    ],
)
def test_a_page_comes_out_and_text_stays_text(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    assert "<script>alert" not in answer.text
    if address not in {"/paste", "/features"}:
        assert "&lt;script&gt;alert" in answer.text


@pytest.mark.parametrize(
    "address", ["/feature/1/99", "/feature/7/0", "/feature/x/0", "/features?layer=9", "/text/99", "/text/-1"]
)
def test_what_is_not_there_is_said(client: TestClient, address: str) -> None:
    assert client.get(address).status_code == 404


@pytest.mark.s3
def test_pages_on_s3_are_those_on_disk(moto_root: S3Root, client: TestClient, tmp_path: Path) -> None:
    storage, run = Storage(moto_root.url), small_run()
    plant(run)
    publish(storage, run)
    write_label(storage, "d1", 3, HOSTILE, HOSTILE)
    remote = TestClient(build_app(storage), base_url="http://127.0.0.1")
    for address in ("/features?layer=1", "/text/3?layer=all&at=2", "/texts"):
        here, there = (
            re.sub(r"<footer.*", "", one.get(address).text, flags=re.DOTALL) for one in (client, remote)
        )
        assert here == there
    shown = remote.get("/feature/1/3")
    assert shown.status_code == 200
    assert "Fetch the dictionary of this layer" in shown.text
    assert remote.get("/feature/1/3?neighbours=yes").status_code == 200


@pytest.mark.s3
@pytest.mark.parametrize(
    ("address", "most"),
    [
        ("/", 0),
        ("/tokens", 0),
        ("/cover?layer=0&tokens=3", 0),
        ("/text/3?layer=all", 0),
        ("/sql?q=SELECT+count(*)+FROM+activations", 0),
        ("/token/3", 1),
        ("/features", 1),
        ("/feature/1/3", 1),
    ],
)
def test_a_page_seen_before_asks_s3_for_the_catalogue_and_labels_alone(
    published_on_s3: TestClient, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, address: str, most: int
) -> None:
    published_on_s3.get(address)
    monkeypatch.setattr(tables, "ASKED_EVERY", 0)
    # Listed once a page, however long the page takes here.
    monkeypatch.setattr(labels, "LISTED_EVERY", 60)
    labels._listed.clear()
    s3_proxy.clear()
    assert published_on_s3.get(address).status_code == 200
    catalogue, *rest = s3_proxy.requests
    assert catalogue.startswith("GET ")
    assert catalogue.endswith("/catalog.json")
    assert len(rest) == most, rest
    assert all("labels" in request for request in rest), rest


@pytest.fixture(scope="module")
def published_on_s3(moto_server: Server, s3_proxy: Proxy) -> Iterator[TestClient]:
    """The pages of a root behind the proxy that counts requests, without a label."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto_server.environment().items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        storage = Storage(f"s3://{BUCKET}/pages", s3_proxy.endpoint)
        publish(storage, small_run())
        commit_found(storage, "tables", Manifest(stage="tables", inputs={}))
        client = TestClient(build_app(storage, token="t"), base_url="http://127.0.0.1")
        client.get("/?token=t")
        yield client
    s3fs.S3FileSystem.clear_instance_cache()
