"""Prefect's API of one run: which it is, that runs share no database, and that its server ends with the run, always."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from prefect_home import HOME

from infra import temporary_server
from infra.children import ports_in_use
from infra.prefect_api import server_version
from infra.run_api import chosen_api, run_api, running_server
from infra.storage import LOCAL_CACHE
from infra.temporary_server import TemporaryServer, empty_database
from schemas.errors import FunctokError

REPOSITORY = Path(__file__).parents[2]
_PARENT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from infra.temporary_server import TemporaryServer
server = TemporaryServer(dict(os.environ), Path(sys.argv[1]))
if sys.argv[2] == "copied":
    # a process that was forked has a copy of the line to the server
    copy = os.fork()
    if copy == 0:
        os.closerange(0, 3)
        time.sleep(60)
    print(copy, end=" ")
print(server._process.pid, server._home, flush=True)
if sys.argv[2] == "ready":
    server.wait_until_ready()
elif sys.argv[2] != "at once":
    time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["at once", "starting", "copied", "ready"])
def test_a_server_whose_parent_is_killed_ends_and_leaves_nothing(moment: str, prefect_api: str) -> None:
    empty = empty_database(LOCAL_CACHE)
    assert empty.is_file()
    done = subprocess.run(
        [sys.executable, "-c", _PARENT, str(empty), moment], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    *copies, pid, home = done.stdout.split()
    try:
        eventually_gone(int(pid), Path(home))
    finally:
        for copy in copies:
            os.kill(int(copy), signal.SIGKILL)


def eventually_gone(pid: int, home: Path) -> None:
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) or home.exists():
        assert time.monotonic() < deadline, f"process {pid} lives: {psutil.pid_exists(pid)}, {home} is there"
        time.sleep(0.1)


@pytest.mark.process
def test_what_was_killed_with_its_parent_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(temporary_server, "_LEFT_BEHIND_SECONDS", -1.0)
    dead, lock_of_dead = temporary_server._new_home()
    os.close(lock_of_dead)
    living, lock = temporary_server._new_home()
    temporary_server._remove_left_behind()
    assert not dead.exists()
    assert living.exists()
    os.close(lock)


@pytest.mark.usefixtures("prefect_api")
def test_a_run_of_its_own_never_opens_the_users_database() -> None:
    assert not (HOME / "prefect.db").exists()


def test_a_damaged_empty_database_is_not_used(prefect_api: str, tmp_path: Path) -> None:
    sound = empty_database(LOCAL_CACHE)
    assert temporary_server._is_sound(sound)
    content = sound.read_bytes()
    for name, damaged in {"cut": content[:9000], "nothing": b"", "noise": b"x" * 9000}.items():
        (tmp_path / name).write_bytes(damaged)
        assert not temporary_server._is_sound(tmp_path / name), name


@pytest.fixture
def no_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Settings as where no server is known, with an empty home."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    with temporary_settings({PREFECT_HOME: tmp_path}, restore_defaults={PREFECT_API_URL}):
        yield tmp_path


def note(home: Path, port: int, pid: int, born: float) -> None:
    (home / f"functok-up-{port}.json").write_text(json.dumps([[pid, born]]))


def test_a_run_uses_functok_up_where_it_runs_and_says_so(
    prefect_api: str, no_api: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL

    port = urlsplit(prefect_api).port
    assert port is not None
    assert running_server() is None
    born = psutil.Process().create_time()
    note(no_api, port, os.getpid(), born - 100)
    assert running_server() is None, "another process has the number since"
    note(no_api, port, os.getpid(), born)
    (no_api / "functok-up-x.json").write_text("{")
    assert ports_in_use(no_api) == [port]
    with run_api():
        assert PREFECT_API_URL.value() == prefect_api
    assert f"seen at {prefect_api.removesuffix('/api')} (functok up)" in capsys.readouterr().err
    note(no_api, 9, os.getpid(), born)
    assert running_server() == prefect_api, "one that does not answer is left out"
    assert server_version("http://127.0.0.1:9/api") is None


def test_a_server_of_another_version_is_not_used(
    prefect_api: str, no_api: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(no_api, urlsplit(prefect_api).port or 0, os.getpid(), psutil.Process().create_time())
    monkeypatch.setattr("infra.prefect_api.server_version", lambda _url: "2.0")
    assert running_server() is None


@pytest.mark.usefixtures("no_api")
def test_a_temporary_server_says_that_its_record_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    class Unstarted(TemporaryServer):
        def __init__(self, environment: dict[str, str], empty: Path | None) -> None:
            started.append(environment)
            self.is_private, self.api_url = empty is not None, "http://127.0.0.1:9/api"

        def stop(self) -> None:
            started.append({})

    monkeypatch.setattr("infra.temporary_server.TemporaryServer", Unstarted)
    with chosen_api() as api:
        assert "ends with it" in api.note
    assert started[1:] == [{}]

    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

    database = "postgresql+asyncpg://me:pw@127.0.0.1:9/team"
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: database}), chosen_api() as api:
        assert "stays in your database" in api.note
        assert "pw" not in api.note
    assert started[2]["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == database


@pytest.mark.process
def test_a_server_that_ends_while_it_starts_is_an_error_of_ours(tmp_path: Path) -> None:
    server = TemporaryServer(
        {**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_SSL_CERT_FILE": ""}, None
    )
    server._process.kill()
    try:
        with pytest.raises(FunctokError, match="ended with status"):
            server.wait_until_ready()
    finally:
        server.stop()
