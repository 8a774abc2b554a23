"""The corpus, tokenized and counted (PAPER 1.1)."""

from __future__ import annotations

from schemas.corpus.expectations import TOKENIZE
from schemas.corpus.table_expectations import CORPUS, GROUPED, TOTALS
from schemas.corpus.tables import SHARD_FILES, SHARDED, TABLES
from schemas.room import Room

ROOM = Room(
    name="corpus",
    stages=("tokenize",),
    shard_files=SHARD_FILES,
    group="corpus",
    tables=TABLES,
    required=("documents", "rejects", "tokens"),
    left_in_place=("occurrences",),
    sharded=SHARDED,
    suites={"tokenize": TOKENIZE},
    table_expectations=CORPUS,
    grouped=GROUPED,
    totals=TOTALS,
)
