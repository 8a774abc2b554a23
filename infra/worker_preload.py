"""Loaded by every Dask worker that we start: Ctrl-C is for who started it, and a terminal sends it to all.

A worker that is interrupted by itself prints its traceback; it is ended with its cluster, in order.
"""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(_worker: Any) -> None:
    """Leave Ctrl-C alone; Dask calls this in the worker's main thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
