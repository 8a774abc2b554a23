"""Memory consolidation: checkpoints of pre-training, their losses, SAEs and texts (PAPER 1.4)."""

from __future__ import annotations

from pydantic import Field

from schemas.pretraining.expectations import CHECKPOINTS, GENERATIONS, GROWTH, LOSSES
from schemas.pretraining.section import Consolidation, Losses
from schemas.pretraining.table_expectations import CONSOLIDATION
from schemas.pretraining.tables import SHARD_FILES, SHARDED, TABLES
from schemas.room import Room

ROOM = Room(
    name="pretraining",
    sections={
        "consolidation": (
            Consolidation | None,
            Field(
                None, description="Checkpoints of pre-training: losses by token group, and how features grow."
            ),
        ),
        "losses": (Losses, Field(default_factory=Losses)),
    },
    stages=("checkpoints", "losses", "growth", "generations"),
    shard_files=SHARD_FILES,
    group="consolidation",
    tables=TABLES,
    required=("checkpoints", "document_losses", "loss_buckets"),
    together=(("learned_features", "checkpoint_degree", "checkpoint_graph"),),
    left_in_place=("token_losses",),
    sharded=SHARDED,
    suites={"checkpoints": CHECKPOINTS, "losses": LOSSES, "growth": GROWTH, "generations": GENERATIONS},
    table_expectations=CONSOLIDATION,
)
