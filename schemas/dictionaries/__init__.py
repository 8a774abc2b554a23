"""The dictionaries (sparse autoencoders), one a layer."""

from __future__ import annotations

from schemas.dictionaries.expectations import DICTIONARIES
from schemas.dictionaries.tables import TABLES
from schemas.room import Room

ROOM = Room(
    name="dictionaries",
    stages=("dictionaries",),
    group="graph",
    tables=TABLES,
    required=tuple(TABLES),
    suites={"dictionaries": DICTIONARIES},
)
