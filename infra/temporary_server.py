"""Prefect's API for one run: a child on 127.0.0.1 with a home and a database of its own, which ends with its parent.

Prefect can start such a server itself, but that one shares the user's database with every other server, and outlives
a parent that was killed. Here a socket between the two tells the child of its parent's end however that comes, from
the first moment on: it is open before the child is. The API listens on a socket that the parent has opened, so that
no other program can take the port.

The database starts as a copy of an empty one, which is kept in the cache by Prefect's version: making its tables
takes Prefect's migrations 10 s, copying them none. Where Prefect's settings name a database, such as a
team's PostgreSQL, the server uses that one.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from infra.children import own_program
from schemas.errors import FunctokError

START_SECONDS = 180.0
"""How long the server may take: 3 s on two idle cores, 10 s more where the empty database must be made."""

_HOME_PREFIX = "functok-prefect-"
_LEFT_BEHIND_SECONDS = 60.0
_ORPHAN_SECONDS = 1.0

_LEAN = {
    "PREFECT_API_DATABASE_MIGRATE_ON_START": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
"""What a database that is a copy, and gone after the run, does not need: 3 s of work at each start."""


def empty_database(cache: Path) -> Path:
    """Where the empty database lies, for the versions that decide its tables."""
    return cache / "prefect" / f"empty-{version('prefect')}-{version('sqlalchemy')}.db"


class TemporaryServer:
    """A running (or starting) server.

    Args:
        environment: What the server sees; Prefect's settings among them.
        empty: Where the empty database is, or is to be kept; None for a server that uses the database which the
            environment names.
    """

    def __init__(self, environment: Mapping[str, str], empty: Path | None) -> None:
        self.is_private = empty is not None
        _remove_left_behind()
        self._home, lock = _new_home()
        own = {"PREFECT_HOME": str(self._home)} | (_LEAN if self.is_private else {})
        self._line, childs_end = socket.socketpair()
        with socket.socket() as listener, childs_end:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.api_url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            descriptors = [listener.fileno(), childs_end.fileno()]
            try:
                self._process = subprocess.Popen(
                    [
                        *own_program("infra.temporary_server"),
                        *(str(part) for part in (*descriptors, os.getpid(), self._home)),
                        *([str(empty)] if empty is not None else []),
                    ],
                    env={**environment, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[*descriptors, lock],
                    # Ctrl-C is for the run, which needs its API to say that it was interrupted
                    start_new_session=True,
                )
            finally:
                os.close(lock)

    def is_ready(self) -> bool:
        """Whether the API answers.

        Raises:
            FunctokError: if the server has ended.
        """
        return self._is_told(0.0)

    def wait_until_ready(self) -> None:
        """Wait until the API answers.

        Raises:
            FunctokError: if it ends or does not answer in time.
        """
        if not self._is_told(START_SECONDS):
            raise FunctokError(
                f"Prefect's temporary server did not answer within {START_SECONDS:.0f} s",
                hint="see why with --debug; PREFECT_API_URL=… uses a running server",
            )

    def stop(self) -> None:
        """End the server, and remove its home."""
        try:
            if self.is_private:
                self._process.kill()
            else:
                self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        finally:
            self._line.close()
            shutil.rmtree(self._home, ignore_errors=True)

    def _is_told(self, seconds: float) -> bool:
        readable, _, _ = select.select([self._line], [], [], seconds)
        if not readable:
            return False
        if self._line.recv(1, socket.MSG_PEEK):
            return True
        status = self._process.wait()
        raise FunctokError(
            f"Prefect's temporary server ended with status {status} while starting",
            hint="see why with --debug; PREFECT_API_URL=… uses a running server",
        )


def _new_home() -> tuple[Path, int]:
    """A new folder, and the descriptor of a lock that lives as long as a process that has it."""
    home = Path(tempfile.mkdtemp(prefix=_HOME_PREFIX))
    lock = os.open(home / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return home, lock


def _remove_left_behind() -> None:
    """Remove the homes of servers that were killed with their parents."""
    for home in Path(tempfile.gettempdir()).glob(f"{_HOME_PREFIX}*"):
        try:
            if home.stat().st_uid != os.getuid() or time.time() - home.stat().st_mtime < _LEFT_BEHIND_SECONDS:
                continue
            lock = os.open(home / "lock", os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def serve(listener: int, line: int, parent: int, home: Path, empty: Path | None) -> None:
    """Serve Prefect's API until the parent is gone.

    Args:
        listener: Descriptor of the socket to listen on.
        line: Descriptor of the socket to the parent: told when the API answers, closed when the parent ends.
        parent: Its process number.
        home: Prefect's home of this server; removed with it.
        empty: Where the empty database is, or is to be kept; None if the server uses another database.
    """
    told = socket.socket(fileno=line)
    threading.Thread(target=_end_with, args=(told, parent, home), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                told.send(b"1")

    if empty is not None:
        _provide(home / "prefect.db", empty)
    app = create_app(ephemeral=True, final=True)
    config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    Server(config).run(sockets=[socket.socket(fileno=listener)])


def _provide(database: Path, empty: Path) -> None:
    """Make the database as a copy of the empty one, which is made first where it is not there or damaged."""
    if empty.is_file():
        shutil.copyfile(empty, database)
        if _is_sound(database):
            return
        database.unlink()
    from prefect.server.database import provide_database_interface

    asyncio.run(provide_database_interface().create_db())
    empty.parent.mkdir(parents=True, exist_ok=True)
    aside = empty.with_name(f".{empty.name}.{os.getpid()}")
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(aside)) as target:
        source.backup(target)
    aside.replace(empty)


def _is_sound(database: Path) -> bool:
    with closing(sqlite3.connect(database)) as connection:
        try:
            [answer] = connection.execute("PRAGMA quick_check(1)").fetchone()
            [n_versions] = connection.execute("SELECT count(*) FROM alembic_version").fetchone()
        except sqlite3.Error:
            return False
    return bool(answer == "ok" and n_versions == 1)


def _end_with(line: socket.socket, parent: int, home: Path) -> None:
    """End this process with its parent: the line closes, or, were a copy of it open elsewhere, we are orphans."""
    try:
        while os.getppid() == parent:
            readable, _, _ = select.select([line], [], [], _ORPHAN_SECONDS)
            # An error is an end, too: what the parent had not read is lost with it.
            if readable and not line.recv(1):
                break
    finally:
        shutil.rmtree(home, ignore_errors=True)
        os._exit(1)


if __name__ == "__main__":
    _listener, _line, _parent, _place, *_empty = sys.argv[1:]
    serve(int(_listener), int(_line), int(_parent), Path(_place), Path(_empty[0]) if _empty else None)
