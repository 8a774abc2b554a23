"""Progress that a stage reports without knowing who watches: a terminal bar, a Prefect artifact, or nobody."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, what)`; `what` is a few words for people ("tokens", "shards, layer 7")."""


def silent(done: int, total: int, what: str) -> None:
    """The progress that nobody watches."""


def one_by_one(progress: Progress, total: int) -> Callable[[str], None]:
    """Count for a `progress` whose work comes in pieces: called with what one is, as it is done.

    Args:
        progress: Who is told.
        total: Number of pieces.
    """
    done = count(1)
    return lambda what: progress(next(done), total, what)
