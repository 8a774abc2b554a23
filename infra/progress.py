"""Progress that a stage reports without knowing who watches: a terminal bar, a Prefect artifact, or nobody."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, what)`; `what` is a few words for people ("tokens", "shards, layer 7")."""


def silent(done: int, total: int, what: str) -> None:
    """The progress that nobody watches."""
