"""Which tokens must a model keep: reading with a cache that forgets (PAPER 2)."""

from __future__ import annotations

from pydantic import Field

from schemas.retention.expectations import GATE, RETENTION, SPEED
from schemas.retention.retrieval_expectations import RETRIEVAL
from schemas.retention.section import Retention
from schemas.retention.table_expectations import TABLES as TABLE_EXPECTATIONS
from schemas.retention.tables import SHARD_FILES, SHARDED, TABLES
from schemas.room import Room

ROOM = Room(
    name="retention",
    sections={
        "retention": (
            Retention | None,
            Field(None, description="Which tokens a model must keep: policies, budgets, and what they cost."),
        )
    },
    stages=("retention_gate", "retention", "retention_speed", "retrieval"),
    shard_files=SHARD_FILES,
    group="retention",
    tables=TABLES,
    required=(
        "retention",
        "retention_layers",
        "retention_survival",
        "retention_curves",
        "retention_losses",
        "retention_margins",
        "retention_readings",
    ),
    sharded=SHARDED,
    suites={"retention_gate": GATE, "retention": RETENTION, "retention_speed": SPEED, "retrieval": RETRIEVAL},
    table_expectations=TABLE_EXPECTATIONS,
)
