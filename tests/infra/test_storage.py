"""The one storage handle, on a local disk and on S3: whole files or none, and errors that say where."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3 import BUCKET, S3Root, Server, free_port
from s3_proxy import Faults, Proxy

from infra.catalog import Catalog, ShardFile
from infra.duck import create_views, open_duckdb, view_of_shards
from infra.remote_reading import AT_LEAST, WHOLE, FileEnds, RemoteFile
from infra.storage import Storage, StoredFile, json_bytes, unsealed
from schemas.errors import ConfigError, DamagedError, StorageError

NAMES = [
    "plain.txt",
    "a folder/with spaces.txt",
    "ünï/日本語 🙂.txt",
    "a+b&c=d%20e#f.txt",
    "it's {quoted} [1] *.txt",
]


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "a root with ü"))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest) -> Storage:
    """The same on a disk and on moto; what only a real server shows is asked of `s3_root`."""
    if request.param == "local":
        return request.getfixturevalue("local")  # type: ignore[no-any-return]  # a fixture's value
    return request.getfixturevalue("moto_storage")  # type: ignore[no-any-return]  # a fixture's value


@pytest.fixture
def moto_storage(moto_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    for name, value in moto_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    return Storage(f"s3://{BUCKET}/{tmp_path.name}", moto_server.endpoint)


def s3_at(server: Server, monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    import s3fs

    for name, value in {**server.environment(), **changed}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


# ---- reading and writing
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_by_its_name(storage: Storage, name: str) -> None:
    storage.write_bytes(name, b"content")
    assert storage.exists(name)
    assert storage.read_bytes(name) == b"content"
    assert storage.read_many([name, "not there", "nor/this"]) == {name: b"content"}
    assert storage.sizes() == {name: 7}
    with storage.fs.open(storage.full(name)) as file:
        assert file.read() == b"content"


def test_empty_and_missing(storage: Storage) -> None:
    assert storage.sizes() == {}
    assert storage.sizes("no/such") == {}
    assert storage.read_many([]) == {}
    assert storage.read_many(["no/such"]) == {}
    assert storage.read_json("no/such.json") is None
    assert not storage.exists("no/such")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("no/such")
    storage.delete("no/such")
    storage.write_bytes("empty", b"")
    assert storage.sizes() == {"empty": 0}
    assert storage.read_bytes("empty") == b""


def test_read_many_reads_many(storage: Storage) -> None:
    contents = {f"f/{place}/x": f"{place}".encode() for place in range(50)}
    for name, content in contents.items():
        storage.write_bytes(name, content)
    assert storage.read_many([*contents, "f/51/x"]) == contents
    assert len(storage.sizes("f")) == 50


def test_json_and_parquet(storage: Storage) -> None:
    value = {"b": [1, 2.5, None], "a": "日本"}
    storage.write_json("v.json", value)
    assert storage.read_json("v.json") == value
    storage.write_bytes("bad.json", b'{"a": ')
    with pytest.raises(StorageError, match=r"bad\.json is not valid JSON"):
        storage.read_json("bad.json")
    table = pa.table({"x": pa.array(range(10), pa.int32()), "y": ["ü"] * 10})
    storage.write_parquet("t.parquet", table)
    assert storage.read_parquet("t.parquet").equals(table)
    assert storage.read_parquet("t.parquet", columns=["x"]).column_names == ["x"]


def test_sizes_and_delete_stop_at_the_folder(storage: Storage) -> None:
    for name in ("t/1/a", "t/1/sub/b", "t/12/a", "t/1.txt"):
        storage.write_bytes(name, b"xy")
    assert storage.sizes("t/1") == {"t/1/a": 2, "t/1/sub/b": 2}
    storage.delete("t/1")
    assert storage.sizes() == {"t/12/a": 2, "t/1.txt": 2}
    storage.delete("t/1.txt")
    assert storage.sizes() == {"t/12/a": 2}


def test_upload_and_local_folder(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "made here"
    (folder / "sub").mkdir(parents=True)
    (folder / "a b.bin").write_bytes(b"1" * 1000)
    (folder / "sub" / "ü.bin").write_bytes(b"2")
    storage.upload(folder, "up/there")
    assert storage.sizes() == {"up/there/a b.bin": 1000, "up/there/sub/ü.bin": 1}
    copy = storage.local_folder("up/there")
    assert (copy / "a b.bin").read_bytes() == b"1" * 1000
    assert (copy / "sub" / "ü.bin").read_bytes() == b"2"
    assert storage.local_folder("up/there") == copy


def test_an_empty_folder_is_not_remembered_as_a_copy(moto_storage: Storage) -> None:
    with pytest.raises(StorageError, match="later"):
        moto_storage.local_folder("later")
    moto_storage.write_bytes("later/a", b"1")
    assert (moto_storage.local_folder("later") / "a").read_bytes() == b"1"


# ---- whole or not at all
def write_half(
    storage: Storage, name: str, error: BaseException, size: int = 10, look: Callable[[], None] = lambda: None
) -> None:
    with storage.write(name) as file:
        for _ in range(0, size, 1 << 20):
            file.write(os.urandom(min(size, 1 << 20)))
        look()
        raise error


def test_a_failed_write_leaves_what_was_there(storage: Storage) -> None:
    storage.write_bytes("f/new.json", b"old")
    for name in ("f/new.json", "f/other.json"):
        with pytest.raises(RuntimeError, match="my own"):
            write_half(storage, name, RuntimeError("my own"))
    assert storage.read_bytes("f/new.json") == b"old"
    assert storage.sizes() == {"f/new.json": 3}
    assert [path for path in storage.fs.find(storage.path) if not path.endswith("f/new.json")] == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(storage: Storage) -> None:
    storage.write_bytes("x", b"old")
    with storage.write("x") as file:
        file.write(b"the new one")
        assert storage.read_bytes("x") == b"old"
        assert storage.sizes() == {"x": 3}
    assert storage.read_bytes("x") == b"the new one"


def test_another_writer_gets_a_path(storage: Storage) -> None:
    with open_duckdb(storage) as connection, storage.write_by_path("t/made.parquet") as place:
        connection.execute(f"COPY (SELECT 7 AS x) TO '{place.path}' (FORMAT parquet)")
    assert storage.read_parquet("t/made.parquet").to_pylist() == [{"x": 7}]
    assert list(storage.sizes()) == ["t/made.parquet"]
    assert place.stored == stored("t/made.parquet", storage.read_bytes("t/made.parquet"))


def test_what_is_written_is_known_by_size_and_hash(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "a.bin").write_bytes(b"1" * 1000)
    table = pa.table({"x": range(100_000)})
    written = [
        storage.write_bytes("b", b"content"),
        storage.write_bytes("empty", b""),
        storage.write_json("v.json", {"b": 1}),
        storage.write_parquet("t.parquet", table, row_group_size=1000),
        *storage.upload(tmp_path / "up", "f"),
    ]
    assert [file.name for file in written] == ["b", "empty", "v.json", "t.parquet", "f/a.bin"]
    assert written == [stored(file.name, storage.read_bytes(file.name)) for file in written]


def stored(name: str, content: bytes) -> StoredFile:
    return StoredFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_a_failed_upload_of_several_parts_is_aborted(s3_root: S3Root) -> None:
    storage = Storage(s3_root.url)
    began: list[str] = []

    def look() -> None:
        began.extend(s3_root.unfinished_uploads())

    with pytest.raises(KeyboardInterrupt):
        write_half(storage, "big", KeyboardInterrupt(), size=120 << 20, look=look)
    assert began == [f"{s3_root.prefix}/big"]
    assert s3_root.objects() == []
    assert s3_root.unfinished_uploads() == []


def test_an_upload_that_cannot_be_completed_is_aborted(
    s3_root: S3Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs.core import S3File

    def lost(self: Any) -> None:
        raise ConnectionResetError("the network went away")

    storage = Storage(s3_root.url)
    monkeypatch.setattr(S3File, "commit", lost)
    with pytest.raises(StorageError, match="network went away"):
        storage.write_bytes("big", os.urandom(120 << 20))
    monkeypatch.undo()
    assert s3_root.objects() == []
    assert s3_root.unfinished_uploads() == []


def test_a_file_of_several_parts_arrives_whole(s3_root: S3Root) -> None:
    storage, content = Storage(s3_root.url), os.urandom(120 << 20)
    storage.write_bytes("big", content)
    assert storage.sizes() == {"big": len(content)}
    assert storage.read_bytes("big") == content
    assert s3_root.unfinished_uploads() == []


def test_a_real_server_does_what_moto_does(s3_root: S3Root, tmp_path: Path) -> None:
    storage = Storage(s3_root.url)
    for name in NAMES:
        storage.write_bytes(name, name.encode())
    assert storage.read_many([*NAMES, "not there"]) == {name: name.encode() for name in NAMES}
    assert set(storage.sizes()) == set(s3_root.objects()) == set(NAMES)
    storage.delete("a folder")
    storage.delete("ünï")
    assert set(storage.sizes()) == {NAMES[0], NAMES[3], NAMES[4]}
    for name in (NAMES[0], NAMES[3], NAMES[4]):
        storage.delete(name)
    assert s3_root.objects() == []


# ---- errors
@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB, where we may mount one."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a disk cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(tiny_disk: Path) -> None:
    storage = Storage(str(tiny_disk))
    storage.write_bytes("a.bin", b"1" * 1000)
    with pytest.raises(StorageError, match=r"b\.bin.*No space left on device.*check space") as raised:
        storage.write_bytes("b.bin", b"2" * 200_000)
    assert raised.value.retryable
    assert storage.sizes() == {"a.bin": 1000}
    assert [path.name for path in tiny_disk.iterdir()] == ["a.bin"]


def test_a_disk_that_is_full_when_synced(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    local.write_bytes("b.bin", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"b\.bin.*No space left on device"):
        local.write_bytes("b.bin", b"new")
    monkeypatch.undo()
    assert local.read_bytes("b.bin") == b"old"
    assert os.listdir(local.path) == ["b.bin"]


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        Storage(str(tmp_path / "file")).write_bytes("x", b"")
    with pytest.raises(StorageError, match=r"below a file: give a folder") as told:
        Storage(str(tmp_path / "file")).read_json("x")
    assert "space" not in str(told.value)


@pytest.mark.s3
def test_a_missing_bucket(moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_at(moto_server, monkeypatch)
    storage = Storage("s3://no-such-bucket/root")
    assert storage.sizes() == {}
    assert storage.read_json("catalog.json") is None
    storage.delete("x")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/root/x.*bucket"):
        storage.write_bytes("x", b"1")


@pytest.mark.s3
def test_wrong_credentials_on_ceph(ceph_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for changed in ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, {"AWS_ACCESS_KEY_ID": "nobody"}):
        s3_at(ceph_server, monkeypatch, **changed)
        storage = Storage(f"s3://{BUCKET}/root")
        attempts: list[Callable[[Storage], object]] = [
            lambda storage: storage.write_bytes("x", b"1"),
            lambda storage: storage.read_many(["x", "y"]),
            lambda storage: storage.sizes(),
            lambda storage: storage.exists("x"),
            lambda storage: storage.read_json("x"),
            lambda storage: storage.delete("x"),
        ]
        for attempt in attempts:
            with pytest.raises(StorageError, match=f"s3://{BUCKET}/root") as raised:
                attempt(storage)
            for secret in ("not-the-secret", ceph_server.secret_key):
                assert secret not in f"{raised.value!r} {raised.value} {raised.value.hint}"


@pytest.mark.s3
def test_no_credentials(moto_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3_at(moto_server, monkeypatch, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none either"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="credentials"):
        Storage(f"s3://{BUCKET}/root").write_bytes("x", b"1")


@pytest.mark.s3
def test_a_refused_connection(moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_at(moto_server, monkeypatch, AWS_MAX_ATTEMPTS="1")
    storage = Storage(f"s3://{BUCKET}/root", f"http://127.0.0.1:{free_port()}")
    for attempt in (lambda: storage.exists("x"), lambda: storage.write_bytes("x", b"1")):
        with pytest.raises(StorageError, match=f"s3://{BUCKET}/root/x") as raised:
            attempt()
        assert raised.value.retryable
        assert moto_server.secret_key not in str(raised.value)


@pytest.mark.parametrize("root", ["s3://key:secret@bucket/x", "sftp://me:secret@host/x"])
def test_secrets_do_not_belong_in_a_root(root: str) -> None:
    with pytest.raises(ConfigError, match="environment") as raised:
        Storage(root)
    assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        Storage("s3://bucket/x", "http://me:secret@127.0.0.1:1")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("root", ["runs/*", "runs/[1]", "s3://bucket/a?b"])
def test_a_root_that_is_a_pattern_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        Storage(root)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(StorageError, match="nosuch"):
        Storage("nosuch://x/y")


# ---- between processes and readers
def test_a_pickled_storage_is_the_same(storage: Storage) -> None:
    storage.write_bytes("x", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert (copy.root, copy.endpoint_url, copy.read_bytes("x")) == (storage.root, storage.endpoint_url, b"1")


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/x")
    monkeypatch.chdir("/")
    storage.write_bytes("a", b"1")
    assert (tmp_path / "runs" / "x" / "a").read_bytes() == b"1"


@pytest.mark.process
def test_it_is_cheap_to_import() -> None:
    heavy = (
        "torch",
        "transformers",
        "sae_lens",
        "great_expectations",
        "prefect",
        "pandas",
        "duckdb",
        "s3fs",
        "dask",
    )
    code = f"import sys, infra.manifest; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def shard_files(storage: Storage, n: int) -> list[ShardFile]:
    files = []
    for place in range(n):
        name = f"tokens/with space {place}/documents.parquet"
        doc = pa.array(range(3), pa.int32())
        numbers = pa.array([place] * 3, pa.int64())
        storage.write_parquet(
            name, pa.table({"doc": doc, "line": numbers, "n_chars": numbers, "n_tokens": numbers})
        )
        files.append(ShardFile(name=name, doc_offset=3 * place, source=f"it's {place}.txt"))
    return files


def test_duckdb_reads_shards_from_several_threads(storage: Storage) -> None:
    files = shard_files(storage, 12)
    with open_duckdb(storage) as connection:
        view_of_shards(
            connection, storage, "documents", [*files, ShardFile(name=files[0].name, doc_offset=36)]
        )
        expected = (39, 0, 38, 3 * sum(range(12)), 13)

        def read(_: int) -> Any:
            with connection.cursor() as cursor:
                return cursor.execute(
                    "SELECT count(*), min(doc_id), max(doc_id), sum(n_tokens), count(DISTINCT source) FROM documents"
                ).fetchone()

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(read, range(6))) == {expected}


def test_duckdb_reads_a_real_server(s3_root: S3Root) -> None:
    storage = Storage(s3_root.url)
    files = shard_files(storage, 5)
    with open_duckdb(storage) as connection:
        view_of_shards(connection, storage, "documents", files)
        assert connection.execute("SELECT count(*), max(doc_id) FROM documents").fetchone() == (15, 14)


@pytest.mark.parametrize("place", ["layer=7/source=x", "ü {a,b} it's", "#1 50%"])
def test_views_do_not_depend_on_what_the_root_is_called(tmp_path: Path, place: str) -> None:
    storage = Storage(str(tmp_path / place))
    files = shard_files(storage, 2)
    storage.write_parquet("tables/tokens.parquet", pa.table({"token_id": [1]}))
    with open_duckdb(storage) as connection:
        catalog = Catalog(tables={"tokens": "tables/tokens.parquet"}, sharded={"documents": files})
        create_views(connection, storage, catalog)
        assert [row[0] for row in connection.execute("DESCRIBE tokens").fetchall()] == ["token_id"]
        rows = connection.execute(
            "SELECT source, count(*) FROM documents GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        assert rows == [("it's 0.txt", 3), ("it's 1.txt", 3)]


# ---- what a refusal says
@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "InvalidAccessKeyId", "check the credentials first: AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "check the credentials first: AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", "check the credentials first: AWS_ACCESS_KEY_ID"),
        (400, "InvalidToken", "check the credentials first: AWS_ACCESS_KEY_ID"),
        (400, "ExpiredToken", "the credentials have expired"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (400, "AuthorizationHeaderMalformed", "set AWS_DEFAULT_REGION"),
    ],
)
def test_a_refusal_says_its_way_out(
    s3_proxy: Proxy,
    moto_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    words: str,
) -> None:
    s3_at(moto_server, monkeypatch)
    storage = Storage(f"s3://{BUCKET}/root", s3_proxy.endpoint)
    attempts: list[Callable[[], object]] = [
        lambda: storage.read_bytes("x"),
        lambda: storage.read_parquet("x"),
        lambda: storage.sizes(),
        lambda: storage.write_bytes("x", b"1"),
        storage.require_place,
    ]
    s3_proxy.faults = Faults(refusal=(status, code))
    try:
        for attempt in attempts:
            with pytest.raises(StorageError, match=code) as raised:
                attempt()
            assert words in raised.value.hint
            assert moto_server.secret_key not in f"{raised.value!r} {raised.value}"
    finally:
        s3_proxy.faults = Faults()


@pytest.mark.s3
def test_a_refusal_without_a_body_is_about_credentials(
    s3_proxy: Proxy, moto_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_at(moto_server, monkeypatch)
    s3_proxy.faults = Faults(refusal=(403, "InvalidAccessKeyId"))
    try:
        with pytest.raises(StorageError, match="403") as raised:
            Storage(f"s3://{BUCKET}/root", s3_proxy.endpoint).exists("x")
    finally:
        s3_proxy.faults = Faults()
    assert raised.value.hint.startswith("check the credentials first")


@pytest.mark.s3
def test_status_of_a_missing_bucket_says_so(
    moto_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from functok.cli import main

    s3_at(moto_server, monkeypatch)
    (tmp_path / "a.toml").write_text('[corpus]\nurls = ["a.txt"]\n[model]\nname = "m"\n')
    config, root = str(tmp_path / "a.toml"), "s3://no-such-bucket/root"
    for command in (["status", config], ["run", config], ["query", "SHOW TABLES"], ["report"]):
        with pytest.raises(SystemExit):
            main([*command, "--root", root])
        told = capsys.readouterr().err
        assert "there is no bucket no-such-bucket" in told, command
        assert "way out: create it, or check storage.root" in told


def test_errors_of_libraries_that_no_server_answers() -> None:
    from botocore.exceptions import (
        ClientError,
        ConnectTimeoutError,
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    from infra.storage_errors import way_out

    assert "there are no credentials" in str(way_out(NoCredentialsError()))
    partial = PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY")
    assert "there are no credentials" in str(way_out(partial))
    for error in (
        EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        ConnectTimeoutError(endpoint_url="http://127.0.0.1:1"),
    ):
        assert "the endpoint does not answer" in str(way_out(error))
        wrapped = OSError("s3fs")
        wrapped.__cause__ = error
        assert "the endpoint does not answer" in str(way_out(wrapped))
    elsewhere = ClientError({"Error": {"Code": "PermanentRedirect", "Message": "use another"}}, "GetObject")
    assert "set AWS_DEFAULT_REGION" in str(way_out(elsewhere))
    assert "check space and permissions" in str(way_out(OSError(errno.ENOSPC, "full")))
    assert way_out(ValueError("no storage's")) is None


# ---- reading from elsewhere
@pytest.mark.parametrize("size", [1, 1000, WHOLE, WHOLE + 1, 3 * WHOLE])
def test_a_file_elsewhere_is_read_as_it_is(size: int) -> None:
    memory = fsspec.filesystem("memory")
    content = os.urandom(size)
    memory.pipe_file("/remote/file", content)
    with RemoteFile("/remote/file", memory) as file:
        assert file.size == size
        assert file.read() == content
        rng = random.Random(size)
        for _ in range(20):
            start = rng.randrange(size)
            length = rng.choice([0, 1, 100, AT_LEAST + 5])
            file.seek(start)
            assert file.read(length) == content[start : start + length]
            assert file.tell() == min(size, start + length)
        file.seek(-1, os.SEEK_END)
        assert file.read(10) == content[-1:]


def test_ends_of_files_are_kept_up_to_a_bound() -> None:
    memory = fsspec.filesystem("memory")
    asked: list[str] = []

    class Counting:
        def size(self, path: str) -> int:
            asked.append(path)
            return int(memory.size(path))

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            return bytes(memory.cat_file(path, start=start, end=end))

    ends = FileEnds(Counting(), kept=250)
    for name in "abc":
        memory.pipe_file(f"/ends/{name}", name.encode() * 100)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert ends.end(f"/ends/{name}") == (name.encode() * 100, 100)
    assert asked == ["/ends/a", "/ends/b", "/ends/c", "/ends/b"]
    assert [ends.size(f"/ends/{name}") for name in "abc"] == [100, 100, 100]
    assert len(asked) == 4


def test_a_disk_is_listed_as_fsspec_lists_it(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "root"))
    assert storage.listing() == {}
    for name in ("a", "b/c", "b/layer=7/d [1]*?", "b/.e.01234567.tmp", "ü/日本/f"):
        storage.write_bytes(name, name.encode())
    (tmp_path / "root/empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/g").write_bytes(b"1")
    (tmp_path / "root/b/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/b/link").symlink_to(tmp_path / "root/a")
    (tmp_path / "root/b/dangling").symlink_to(tmp_path / "nowhere")
    for prefix in ("", "b", "b/layer=7", "empty", "a", "nowhere"):
        found = storage.fs.find(storage.full(prefix), detail=True)
        obvious = {
            path.removeprefix(f"{storage.path}/"): (info["size"], info["mtime"])
            for path, info in found.items()
            if info.get("type") == "file"
        }
        listed = {name: (file.size, file.modified) for name, file in storage.listing(prefix).items()}
        assert (listed, list(listed)) == (obvious, list(obvious)), prefix
    link = tmp_path / "linked-root"
    link.symlink_to(tmp_path / "root")
    assert Storage(str(link)).sizes() == storage.sizes()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just('\n "checksum": "x"'),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "checks", "checksum ", "z", "é"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(
    value=st.dictionaries(st.sampled_from(["a", "b", "checksums", "z"]), json_values, max_size=4),
    data=st.data(),
)
@pytest.mark.slow
def test_stored_json_is_what_was_written_or_refused(value: dict[str, Any], data: st.DataObject) -> None:
    content = json_bytes(value)
    assert unsealed(content, "x.json") == value
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(content)
    flipped[place] ^= 1 << bit
    with pytest.raises(DamagedError):
        unsealed(bytes(flipped), "x.json")
