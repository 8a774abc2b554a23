"""What of an address is shown, and whether a file is missing or its host."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest
from s3 import S3Root, free_port

from infra.addresses import is_unreachable, storage_options, without_credentials
from infra.errors import CorpusError, StorageError
from infra.storage import Storage
from schemas.config import Config
from tasks.cases import read_cases
from tasks.corpus import corpus_files


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("/data/part-?.jsonl", "/data/part-?.jsonl"),
        ("/data/year=2020/a?b=c.jsonl", "/data/year=2020/a?b=c.jsonl"),
        ("s3://bucket/a?.jsonl", "s3://bucket/a?.jsonl"),
        ("s3://bucket/a.jsonl?versionId=x1", "s3://bucket/a.jsonl"),
        ("hf://datasets/a/b@main/x.parquet", "hf://datasets/a/b@main/x.parquet"),
        ("abfs://key:se/cret@host/a.txt", "abfs://key:se/cret@host/a.txt"),
        ("https://u:p@s@host/x?X-Amz-Signature=s", "https://host/x"),
        ("zip://in.txt::https://u:p@host/x.zip?sig=s#t", "zip://in.txt::https://host/x.zip"),
        ("postgresql+asyncpg://u:p@host/db?password=p", "postgresql+asyncpg://host/db"),
    ],
)
def test_no_secret_of_an_address_is_shown(address: str, shown: str) -> None:
    assert without_credentials(address) == shown


class Empty(BaseHTTPRequestHandler):
    """A host that answers, and has no file."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def host() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def missing(url: str) -> FileNotFoundError:
    with pytest.raises(FileNotFoundError) as caught, fsspec.open(url, "rb") as file:
        file.read()
    return caught.value


def test_a_host_that_does_not_answer_is_no_missing_file(host: str, tmp_path: Path) -> None:
    assert is_unreachable(missing(f"http://127.0.0.1:{free_port()}/cases.toml"))
    assert not is_unreachable(missing(f"{host}/cases.toml"))
    assert not is_unreachable(missing(str(tmp_path / "cases.toml")))


@pytest.mark.s3
def test_a_missing_object_is_a_missing_file(s3_root: S3Root) -> None:
    assert not is_unreachable(missing(f"{s3_root.url}/cases.toml"))


def config(tmp_path: Path, url: str) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": [url]},
            "model": {"name": "m"},
            "sae": [{"layer": 0, "path": "p"}],
            "steering": {"cases": url},
            "storage": {"root": str(tmp_path)},
        }
    )


def test_errors_tell_them_apart(tmp_path: Path) -> None:
    asked = config(tmp_path, f"http://127.0.0.1:{free_port()}/file.jsonl")
    with pytest.raises(StorageError, match=r"cannot read steering\.cases = http.*ClientConnectorError"):
        read_cases(asked, Storage(str(tmp_path)))
    with pytest.raises(CorpusError, match=r"cannot list http.*check the URL, the network"):
        corpus_files(asked)


def test_only_what_lies_on_s3_has_its_endpoint() -> None:
    endpoint = "http://127.0.0.1:9000"
    assert storage_options("s3://b/a", endpoint) == {"endpoint_url": endpoint}
    assert storage_options("zip://a::s3://b/a.zip", endpoint) == {"s3": {"endpoint_url": endpoint}}
    assert storage_options("https://host/a", endpoint) == {}
    assert storage_options("s3://b/a", None) == {}
