"""Reactivation and steering (PAPER 1.3)."""

from __future__ import annotations

from pydantic import Field

from schemas.room import Room
from schemas.steering.expectations import STEERING
from schemas.steering.reactivation_expectations import REACTIVATION
from schemas.steering.section import Steering
from schemas.steering.table_expectations import STEERING_TABLES
from schemas.steering.tables import SHARD_FILES, SHARDED, TABLES

ROOM = Room(
    name="steering",
    sections={
        "steering": (
            Steering | None,
            Field(None, description="Reactivation of features at function tokens, and steering by them."),
        )
    },
    stages=("reactivation", "steering"),
    shard_files=SHARD_FILES,
    group="steering",
    tables=TABLES,
    together=(
        ("prompt_tokens", "reactivations", "reactivation_positions", "reactivation_scores"),
        ("trait_layers", "trait_features"),
        ("steering", "steering_effects"),
    ),
    sharded=SHARDED,
    suites={"reactivation": REACTIVATION, "steering": STEERING},
    table_expectations=STEERING_TABLES,
)
