"""`functok explore`: the explorer on a port of this machine, in a thread of its own, and the browser on it."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
import webbrowser
from contextlib import suppress
from typing import Any

import uvicorn

from functok.explorer.app import build_app
from infra.storage import Storage
from schemas.errors import ConfigError

PORT, PORTS_TRIED = 4300, 100
OWN_MODEL = "run"
"""The model that the run was made with, where it was read from."""

SECONDS_TO_LEAVE = 3
"""How long answers that are on their way have, when the explorer is closed."""


class Served:
    """An explorer that is served.

    Args:
        storage: The root.
        host: Address to listen on.
        port: The first port that is tried, and then those after it; 0: any.
        model: To encode pasted text with: `OWN_MODEL`, or where the run's model is now; None: no text is encoded.

    Raises:
        ConfigError: if nothing is published, or no port is free.
    """

    def __init__(
        self,
        storage: Storage,
        host: str = "127.0.0.1",
        port: int = PORT,
        model: str | None = None,
    ) -> None:
        context = {} if model is None else {"encode": _encode(storage, model)}
        self._token = secrets.token_urlsafe(24)
        app = build_app(storage, token=self._token, host=host, context=context)
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._host = _shown(host)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SECONDS_TO_LEAVE,
            # SQL is in addresses, so that they can be shared.
            h11_max_incomplete_event_size=1 << 20,
            http="h11",
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="explorer", daemon=True
        )
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    @property
    def address(self) -> str:
        """What a browser opens; it holds the token that lets it run SQL and keep labels."""
        return f"http://{self._host}:{self.port}/?token={self._token}"

    def __repr__(self) -> str:
        return f"<explorer at http://{self._host}:{self.port}/>"

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def wait(self) -> None:
        """Wait until it is closed, or Ctrl-C ends the wait."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop serving; queries that run are ended."""
        self._server.should_exit = True
        self._thread.join(SECONDS_TO_LEAVE + 2)
        self._socket.close()

    def open_browser(self) -> bool:
        """Open the reader's browser on it, if there is one that has a window."""
        if sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}:
            return False
        with suppress(webbrowser.Error):
            return webbrowser.open(self.address)
        return False


def serve(
    storage: Storage,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    browser: bool = True,
    model: str | None = None,
) -> None:
    """Serve until Ctrl-C; arguments and errors as those of `Served`."""
    with Served(storage, host, port, model) as served:
        if port not in {0, served.port}:
            print(f"port {port} is taken; this is port {served.port}", flush=True)
        print(f"{storage.root}\n  {served.address}\nCtrl-C ends it", flush=True)
        if browser:
            served.open_browser()
        served.wait()


def _encode(storage: Storage, model: str) -> Any:
    """What encodes pasted text; it loads its model when it is first asked."""
    from tasks.explore.encoding import Encode

    return Encode(storage, None if model == OWN_MODEL else model)


def _shown(host: str) -> str:
    """The address that a browser on this machine asks."""
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _listening(host: str, port: int) -> socket.socket:
    """A socket on the first port that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last: OSError | None = None
    for tried in [0] if port == 0 else range(port, min(65_536, port + PORTS_TRIED)):
        try:
            return socket.create_server((host, tried), family=family, backlog=128)
        except OSError as error:
            last = error
    raise ConfigError(
        f"cannot listen on {host}, port {port}: {last}", hint="give another --host or --port"
    ) from last
