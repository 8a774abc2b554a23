"""The list of experiments: the one place that names them.

An experiment is a folder in `tasks/`, `schemas/`, `sql/` and `tests/`, and its flows. Its package in `schemas` has a
`ROOM` (`schemas.room`), like those of the spine.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from schemas.room import Room

EXPERIMENTS: tuple[str, ...] = ("steering", "pretraining")
"""In the order in which their stages run."""

_SPINE = ("corpus", "dictionaries", "graph")


@cache
def experiment_rooms() -> tuple[Room, ...]:
    """What each experiment brings, in the order of `EXPERIMENTS`."""
    return tuple(_room(name) for name in EXPERIMENTS)


@cache
def all_rooms() -> tuple[Room, ...]:
    """What the spine's rooms bring, from the corpus on, then what the experiments bring."""
    return (*(_room(name) for name in _SPINE), *experiment_rooms())


def _room(name: str) -> Room:
    room = import_module(f"schemas.{name}").ROOM
    assert isinstance(room, Room)
    return room
