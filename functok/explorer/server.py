"""`functok explore`: the explorer on a port of this machine, and the browser on it."""

from __future__ import annotations

import uvicorn

from functok.explorer.app import build_app
from infra.storage import Storage

PORT = 4300


def serve(storage: Storage, host: str = "127.0.0.1", port: int = PORT, *, browser: bool = True) -> None:
    """Serve until told to stop."""
    server = uvicorn.Server(uvicorn.Config(build_app(storage), host=host, port=port, log_level="warning"))
    print(f"explore: http://{host}:{port}/", flush=True)
    server.run()
