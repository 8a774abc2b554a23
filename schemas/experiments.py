"""The list of experiments: the one place that names them.

An experiment is a folder in `tasks/`, `schemas/`, `sql/` and `tests/`, and its flows. Its package in `schemas` has a
`ROOM` (`schemas.room`), like those of the spine.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from schemas.room import Room

if TYPE_CHECKING:
    from schemas.config import SpineConfig

EXPERIMENTS: tuple[str, ...] = ("steering", "pretraining", "retention")
"""In the order in which their stages run."""

# The graph has two groups of tables.
_SPINE = ("corpus", "dictionaries", "graph", "graph.feature_tables")


@cache
def experiment_rooms() -> tuple[Room, ...]:
    """What each experiment brings, in the order of `EXPERIMENTS`."""
    return tuple(_room(name) for name in EXPERIMENTS)


@cache
def all_rooms() -> tuple[Room, ...]:
    """What the spine's rooms bring, from the corpus on, then what the experiments bring."""
    return (*(_room(name) for name in _SPINE), *experiment_rooms())


def asked_for(config: SpineConfig) -> tuple[str, ...]:
    """The experiments that a configuration asks for: those of which a section is there that may be left out."""
    return tuple(
        room.name
        for room in experiment_rooms()
        if any(
            field.default is None and getattr(config, key) is not None
            for key, (_, field) in room.sections.items()
        )
    )


def _room(name: str) -> Room:
    room = import_module(f"schemas.{name}").ROOM
    assert isinstance(room, Room)
    return room
