"""Prefect's API for one run: a child on 127.0.0.1 that ends with its parent, however that ends.

Prefect can start such a server itself, but that one outlives a parent that was killed. This one watches its
parent, and listens on a socket that the parent has opened, so that no other program can take the port.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

from infra.errors import FunctokError

START_SECONDS = 180.0
"""How long the server may take: 5 s on two idle cores, 15 s with a new database, much more on busy ones."""


class TemporaryServer:
    """A running (or starting) server.

    Args:
        environment: What the server sees; Prefect's settings among them.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.api_url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            descriptor = listener.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "infra.temporary_server", str(descriptor), str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor],
                # Ctrl-C is for the run, which needs its API to say that it was interrupted
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """Whether the API answers at once (the socket is open before it does)."""
        from infra.prefect_api import health

        return health(self.api_url, seconds=0.2)

    def wait_until_ready(self) -> None:
        """Wait until the API answers.

        Raises:
            FunctokError: if it ends or does not answer in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self._process.poll() is not None:
                raise FunctokError(
                    f"Prefect's temporary server ended with status {self._process.returncode} while starting",
                    hint="see why with --debug; PREFECT_API_URL=… uses a running server",
                )
            if time.monotonic() > deadline:
                raise FunctokError(
                    f"Prefect's temporary server did not answer within {START_SECONDS:.0f} s",
                    hint="see why with --debug; PREFECT_API_URL=… uses a running server",
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(descriptor: int, parent: int) -> None:
    """Serve Prefect's API on an open socket until the process `parent` is gone."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    config = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
