"""The Prefect API of one run from a terminal: one that is there, or a temporary one.

In this order: the API that `PREFECT_API_URL` (or the user's Prefect profile) names; the server of a `functok up` that
runs on this machine, in whose UI the run is then seen; a temporary server with a database of its own
(`infra.temporary_server`), which goes with the run. So several runs and servers never lock each other's SQLite file.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.addresses import without_credentials
from infra.prefect_server import prefect_environment
from schemas.errors import FunctokError

if TYPE_CHECKING:
    from infra.temporary_server import TemporaryServer


@dataclass(frozen=True, kw_only=True)
class ChosenApi:
    """The API that a run will use.

    Attributes:
        note: A line for people: which it is, and where the run is seen.
        api_url: Its address, where that is not what Prefect's settings say.
        server: The temporary server, perhaps still starting; None where another one is used.
    """

    note: str
    api_url: str | None = None
    server: TemporaryServer | None = None


@contextmanager
def chosen_api(*, debug: bool = False) -> Iterator[ChosenApi]:
    """Choose the API of a run; a temporary server begins to start, and ends with the block.

    Raises:
        FunctokError: if the API that the settings name does not answer.
    """
    prefect_environment()
    from prefect.settings import PREFECT_API_URL

    named = PREFECT_API_URL.value()
    if named:
        _reachable(named)
        yield ChosenApi(note=f"Prefect: this run is kept by the server at {without_credentials(named)}")
        return
    if running := running_server():
        shown = running.removesuffix("/api")
        yield ChosenApi(note=f"Prefect: this run is seen at {shown} (functok up)", api_url=running)
        return
    server = _begin(debug)
    record = (
        "its record of the run ends with it" if server.is_private else "the record stays in your database"
    )
    try:
        yield ChosenApi(
            note=f"Prefect: a temporary server for this run alone; {record} (`functok up` shows and keeps runs)",
            api_url=server.api_url,
            server=server,
        )
    finally:
        server.stop()


@contextmanager
def run_api(
    *, debug: bool = False, meanwhile: Iterable[object] = (), chosen: ChosenApi | None = None
) -> Iterator[None]:
    """An API for the flows in this block; says on standard error which.

    Args:
        debug: Let Prefect log to the terminal; without it only libraries other than Prefect do.
        meanwhile: Steps of work that may overlap with a server's start, such as slow imports; they are
            taken while the server is not ready, and the rest is left.
        chosen: What `chosen_api` has given; chosen here if None.

    Raises:
        FunctokError: if the API cannot be reached or started.
    """
    if chosen is None:
        with chosen_api(debug=debug) as api, run_api(debug=debug, meanwhile=meanwhile, chosen=api):
            yield
        return
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    if not debug:
        _quiet_terminal()
    print(chosen.note, file=sys.stderr, flush=True)
    if chosen.server is not None:
        for _ in meanwhile:
            if chosen.server.is_ready():
                break
        chosen.server.wait_until_ready()
    if chosen.api_url is None:
        yield
        return
    # Each flow would wait a second for the end of its own heartbeats: nobody watches those of a temporary server, and
    # `functok up` sees by its process whether a run of this machine lives.
    with temporary_settings({PREFECT_API_URL: chosen.api_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        try:
            yield
        finally:
            _deliver()


def running_server() -> str | None:
    """The API of a `functok up` of this user and machine that answers and has our version of Prefect, if any."""
    from prefect import __version__
    from prefect.settings import PREFECT_HOME

    from infra.children import ports_in_use
    from infra.prefect_api import server_version

    for port in ports_in_use(Path(PREFECT_HOME.value()).expanduser()):
        api_url = f"http://127.0.0.1:{port}/api"
        if server_version(api_url) == __version__:
            return api_url
    return None


def _begin(debug: bool) -> TemporaryServer:
    from prefect.settings import get_current_settings

    from infra.storage import LOCAL_CACHE
    from infra.temporary_server import TemporaryServer, empty_database

    settings = get_current_settings()
    named = settings.to_environment_variables(exclude_unset=True)
    environment = dict(os.environ) | named
    environment["PREFECT_PROFILES_PATH"] = str(settings.profiles_path)
    environment["PREFECT_SERVER_UI_ENABLED"] = "false"
    if not debug:
        environment["PREFECT_SERVER_LOGGING_LEVEL"] = "CRITICAL"
    url = settings.server.database.connection_url
    default = f"sqlite+aiosqlite:///{settings.home}/prefect.db"
    is_named = "PREFECT_SERVER_DATABASE_CONNECTION_URL" in named
    is_own = is_named or (url is not None and url.get_secret_value() != default)
    return TemporaryServer(environment, None if is_own else empty_database(LOCAL_CACHE))


def _deliver() -> None:
    """Send what Prefect still has to tell its server: logs, and the events that become task runs."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    def send() -> None:
        APILogHandler().flush()
        EventsWorker.drain_all(timeout=10)

    # In the thread of an event loop, such as a notebook's, Prefect would not wait for the end of it.
    thread = threading.Thread(target=copy_context().run, args=(send,))
    thread.start()
    thread.join()


def _reachable(api_url: str) -> None:
    import httpx

    try:
        httpx.get(f"{api_url.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise FunctokError(
            f"the Prefect API at {without_credentials(api_url)} does not answer: {error}",
            hint="start it with `functok up`, or unset PREFECT_API_URL to run without a server",
        ) from error


def _quiet_terminal() -> None:
    """Keep Prefect's own log lines out of the terminal; the API still gets them, other libraries still speak.

    A failed run would otherwise print its traceback twice before the one line that explains it.
    """
    import logging

    from prefect.logging.configuration import setup_logging
    from prefect.logging.handlers import PrefectConsoleHandler

    setup_logging()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler) and _not_prefect not in handler.filters:
            handler.addFilter(_not_prefect)


def _not_prefect(record: Any) -> bool:
    # the workers that deliver logs and events have loggers of their own
    return not str(record.name).startswith(("prefect", "APILogWorker", "EventsWorker"))
