"""S3 for tests: moto in a process of its own, and a real Ceph gateway where its packages are installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BUCKET = "functok-tests"
CEPH = Path(__file__).parents[1] / "infra" / "ceph.sh"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running S3 server and the keys to it."""

    endpoint: str
    access_key: str
    secret_key: str

    def client(self) -> Any:
        """A plain client, to look at what is stored without functok."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )

    def environment(self) -> dict[str, str]:
        """What a user of it sets."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass(frozen=True, kw_only=True)
class S3Root:
    """A place of its own on a server: `url` is a storage root."""

    url: str
    prefix: str
    server: Server

    def objects(self) -> list[str]:
        """Keys under the root."""
        pages = (
            self.server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self.prefix)
        )
        return [entry["Key"][len(self.prefix) + 1 :] for page in pages for entry in page.get("Contents", [])]

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        uploads = self.server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [upload["Key"] for upload in uploads if upload["Key"].startswith(self.prefix)]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_moto(tmp_path_factory.mktemp("moto") / "log") as server:
        yield server


@contextmanager
def running_moto(log: Path) -> Iterator[Server]:
    """Moto with our bucket, in a process of its own whose output goes to `log`."""
    port = free_port()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(300):
            if process.poll() is not None:
                pytest.fail(f"moto_server ended: {log.read_text()}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        server = Server(
            endpoint=f"http://127.0.0.1:{port}", access_key="test-key", secret_key="test-secret-key"
        )
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    missing = [name for name in ("ceph-mon", "ceph-osd", "radosgw", "ceph") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install ceph-mon ceph-osd radosgw ceph-common")
    if os.geteuid() != 0:
        pytest.skip("a Ceph gateway is started by root alone")
    folder, port = tmp_path_factory.mktemp("ceph") / "ceph", free_port()
    started = subprocess.run(
        ["bash", str(CEPH), "start", str(folder), str(port)], capture_output=True, text=True, timeout=300
    )
    try:
        assert started.returncode == 0, started.stderr
        access, secret = started.stdout.split()
        server = Server(endpoint=f"http://127.0.0.1:{port}", access_key=access, secret_key=secret)
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        subprocess.run(["bash", str(CEPH), "stop", str(folder)], check=True, timeout=60)


@pytest.fixture(
    params=[pytest.param("moto", marks=pytest.mark.s3), pytest.param("ceph", marks=pytest.mark.s3)]
)
def s3_root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Root]:
    """A root on each of the servers in turn, with the environment that reaches it."""
    yield from _root_on(request.getfixturevalue(f"{request.param}_server"), monkeypatch)


@pytest.fixture
def moto_root(moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Root]:
    """A root on the server that is always there, with the environment that reaches it."""
    yield from _root_on(moto_server, monkeypatch)


def _root_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Root]:
    import s3fs

    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    # fsspec keeps filesystems by their arguments, and knows nothing of the environment.
    s3fs.S3FileSystem.clear_instance_cache()
    prefix = f"root-{uuid.uuid4().hex[:12]}"
    yield S3Root(url=f"s3://{BUCKET}/{prefix}", prefix=prefix, server=server)
    s3fs.S3FileSystem.clear_instance_cache()
