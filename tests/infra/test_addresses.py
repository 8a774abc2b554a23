"""What of an address is shown, and whether a file is missing or its host."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from s3 import S3Root, free_port

from flows.retry import is_transient
from infra.addresses import (
    is_unreachable,
    root_name,
    short_name,
    storage_options,
    without_credentials,
)
from infra.config_file import refuse_secrets
from infra.storage import Storage
from schemas.config import Config, Sae
from schemas.errors import ConfigError, CorpusError, StorageError
from tasks.corpus import files as corpus
from tasks.corpus.files import CorpusFile, corpus_files
from tasks.corpus.records import read_records
from tasks.corpus.tokenization import TOKENIZE
from tasks.corpus.tokenizer_training import find_tokenizer
from tasks.dictionaries.facts import source_of
from tasks.engine.run import Run, plan
from tasks.steering.cases import read_cases


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("/data/part-?.jsonl", "/data/part-?.jsonl"),
        ("/data/year=2020/a?b=c.jsonl", "/data/year=2020/a?b=c.jsonl"),
        ("s3://bucket/a?.jsonl", "s3://bucket/a?.jsonl"),
        ("s3://bucket/a.jsonl?versionId=x1", "s3://bucket/a.jsonl"),
        ("hf://datasets/a/b@main/x.parquet", "hf://datasets/a/b@main/x.parquet"),
        ("github://org:repo@v1/a.txt", "github://org:repo@v1/a.txt"),
        ("abfs://key:se/cret@host/a.txt", "abfs://key:se/cret@host/a.txt"),
        ("https://u:p@s@host/x?X-Amz-Signature=s", "https://host/x"),
        ("zip://in.txt::https://u:p@host/x.zip?sig=s#t", "zip://in.txt::https://host/x.zip"),
        ("postgresql+asyncpg://u:p@host/db?password=p", "postgresql+asyncpg://host/db"),
    ],
)
def test_no_secret_of_an_address_is_shown(address: str, shown: str) -> None:
    assert without_credentials(address) == shown


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"corpus": {"urls": ["a.txt", "https://hunter2@host/a.txt"]}}, "corpus.urls.1"),
        ({"corpus": {"urls": ["zip://a.txt::http://hunter2@host/a.zip"]}}, "corpus.urls.0"),
        ({"dask": {"scheduler": "tcp://me:hunter2@host:8786"}}, "dask.scheduler"),
        ({"sae": [{"layer": 0, "path": "https://host/sae?sig=hunter2"}]}, "sae.0.path"),
        (
            {"sae": [{"layer": 0, "train": {"d_sae": 8, "k": 2, "start_from": "https://h/s?token=hunter2"}}]},
            "sae.0.train.start_from",
        ),
        (
            {
                "consolidation": {
                    "series": [{"name": "a", "folder": "f"}],
                    "growth": {
                        "layer": 0,
                        "train": {"d_sae": 8, "k": 2, "start_from": "https://h/s?X-Amz-Signature=hunter2"},
                    },
                }
            },
            "consolidation.growth.train.start_from",
        ),
    ],
)
def test_a_secret_is_refused_wherever_it_stands(change: dict[str, Any], place: str) -> None:
    values = {"corpus": {"urls": ["a.txt"]}, "model": {"name": "m"}}
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(Config.model_validate(values | change))
    assert caught.value.message.startswith(f"{place} carries")
    assert "hunter2" not in str(caught.value)


def test_what_is_no_secret_is_not_refused() -> None:
    series = {"name": "a", "folder": "f"}
    prompts = ["Go to https://me:word@host/?token=1 and"]
    refuse_secrets(
        Config.model_validate(
            {
                "corpus": {
                    "urls": [
                        "sftp://me@host/a.txt",
                        "hf://datasets/a/b@main/x.parquet",
                        "github://org:repo@v1/a.txt",
                        "https://host/a.txt?v=2",
                    ]
                },
                "model": {"name": "m"},
                "consolidation": {"series": [series], "generations": {"prompts": prompts}},
            }
        )
    )


TOKENIZER = SimpleNamespace(key="t", folder="tokenizers/t")
SIGNED = CorpusFile(url="https://host/a.txt?v=hunter2", format="txt", compression=None, size=1)


def refusing(url: str, *_: object, **__: object) -> None:
    raise OSError(f"no answer from {url}")


READERS: dict[str, Callable[[Config, Storage], object]] = {
    "tokenization": lambda asked, storage: Run(asked, storage).find(TOKENIZE),
    "tokenizer_training": find_tokenizer,
    "records": lambda asked, _: list(read_records(SIGNED, asked.corpus)),
}


@pytest.mark.parametrize("module", READERS)
def test_a_file_that_cannot_be_read_is_named_without_its_query(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, storage = config(tmp_path, "a.txt"), Storage(str(tmp_path))
    monkeypatch.setattr("fsspec.open", refusing)
    monkeypatch.setattr("tasks.corpus.files.content_hash", refusing)
    for plans in ("tokenization", "tokenizer_training"):
        monkeypatch.setattr(f"tasks.corpus.{plans}.corpus_files", lambda _: [SIGNED])
    monkeypatch.setattr("tasks.corpus.tokenization.load_tokenizer", lambda *_: TOKENIZER)
    monkeypatch.setattr("tasks.corpus.tokenizer_training._vocabulary_size", lambda _: 300)
    with pytest.raises(CorpusError, match=r"https://host/a\.txt: OSError") as caught:
        READERS[module](asked, storage)
    assert "hunter2" not in str(caught.value)


def test_a_plan_names_files_without_their_query(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tasks.corpus.tokenization.corpus_files", lambda _: [SIGNED])
    monkeypatch.setattr("tasks.corpus.files.content_hash", lambda *_: "k")
    monkeypatch.setattr("tasks.corpus.tokenization.load_tokenizer", lambda *_: TOKENIZER)
    [tokenize] = plan(Run(config(tmp_path, "a.txt"), Storage(str(tmp_path))), [TOKENIZE])
    assert tokenize.details == ("tokenize https://host/a.txt",)


def test_a_dictionary_is_named_without_its_query() -> None:
    saved = Sae(layer=3, path="https://host/sae?v=hunter2")
    assert source_of(saved) == "https://host/sae"


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


def test_a_repository_that_a_hub_does_not_have_is_a_missing_file() -> None:
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    answer = httpx.Response(404, request=httpx.Request("GET", "https://hub/none"))
    error = FileNotFoundError("none")
    error.__cause__ = RepositoryNotFoundError("404", response=answer)
    assert isinstance(error.__cause__, OSError)
    assert not is_unreachable(error)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://h/a.jsonl.gz?download=true", ("jsonl", "gzip")),
        ("https://h/get?path=corpus.jsonl", ("jsonl", None)),
        ("https://h/files/x?name=a.csv.zst", ("csv", "zstd")),
    ],
)
def test_a_format_stands_before_a_query_or_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, kind: tuple[str, str | None]
) -> None:
    monkeypatch.setattr(corpus, "_expand", lambda url, _endpoint: [url])
    monkeypatch.setattr(corpus, "_size", lambda _url, _endpoint: 7)
    (file,) = corpus_files(config(tmp_path, url))
    assert (file.format, file.compression) == kind


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
    with pytest.raises(
        StorageError, match=r"cannot read steering\.cases = http.*ClientConnectorError"
    ) as read:
        read_cases(asked, Storage(str(tmp_path)))
    with pytest.raises(StorageError, match=r"cannot list http.*check the URL, the network") as listed:
        corpus_files(asked)
    assert is_transient(read.value)
    assert is_transient(listed.value)


def test_only_what_lies_on_s3_has_its_endpoint() -> None:
    endpoint = "http://127.0.0.1:9000"
    assert storage_options("s3://b/a", endpoint) == {"endpoint_url": endpoint}
    assert storage_options("zip://a::s3://b/a.zip", endpoint) == {"s3": {"endpoint_url": endpoint}}
    assert storage_options("https://host/a", endpoint) == {}
    assert storage_options("s3://b/a", None) == {}


def test_a_roots_name_is_short_legal_and_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = (
        f"{tmp_path}/a/demo",
        f"{tmp_path}/b/demo",
        "s3://bucket/a/demo",
        "s3://bucket/b/demo",
        "s3://bucket",
        "/",
        f"{tmp_path}/Ünïcode and spaces_{'x' * 80}",
        "s3://bucket/日本",
    )
    names = [root_name(root) for root in roots]
    assert len(set(names)) == len(roots)
    assert all(re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,29}[a-z0-9])", name) for name in names), names
    assert names[0].startswith("demo-")
    assert root_name("s3://bucket/a/demo") != root_name("s3://bucket/a/demo", "http://127.0.0.1:9000")
    # However it is written, as the storage itself sees it.
    monkeypatch.chdir(tmp_path)
    spellings = ("a/demo", "./a/demo/", f"file://{tmp_path}/a/demo", f"{tmp_path}/b/../a/demo")
    assert {root_name(root) for root in spellings} == {names[0]}
    assert {Storage(root).name for root in spellings} == {names[0]}
    assert Storage("s3://bucket/a/demo/").name == names[2]


def test_models_are_named_as_people_call_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets" / "SmolLM2").mkdir(parents=True)
    assert short_name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert short_name("gpt2") == "gpt2"
    assert short_name("assets/SmolLM2") == "SmolLM2"
    assert short_name(f"{tmp_path}/assets/SmolLM2/") == "SmolLM2"
    assert short_name("/models/x.Q8_0.gguf") == "x.Q8_0.gguf"
    assert short_name("small, large") == "small, large"
