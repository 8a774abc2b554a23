"""The token-feature graph (PAPER 1.2)."""

from __future__ import annotations

from schemas.graph.expectations import FEATURES
from schemas.graph.table_expectations import GRAPH, GROUPED, TOTALS
from schemas.graph.tables import SHARD_FILES, SHARDED, TABLES
from schemas.room import Room

ROOM = Room(
    name="graph",
    stages=("features",),
    shard_files=SHARD_FILES,
    group="graph",
    tables=TABLES,
    required=tuple(TABLES),
    left_in_place=("activations", "edges"),
    sharded=SHARDED,
    suites={"features": FEATURES},
    table_expectations=GRAPH,
    grouped=GROUPED,
    totals=TOTALS,
)
