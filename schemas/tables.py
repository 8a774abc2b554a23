"""The tables that functok publishes, put together from what each room has: their schemas, groups and views.

Each room's own are in `schemas.<room>.tables`; `schemas.shard_files` has the schemas of the files they are made of.
"""

from __future__ import annotations

import pyarrow as pa

from schemas.corpus.tables import VOCABULARY
from schemas.experiments import all_rooms
from schemas.shard_files import SHARD_FILES

__all__ = [
    "LEFT_IN_PLACE",
    "MEMBERS",
    "SHARDED_SELECT",
    "SHARD_FILES",
    "TABLES",
    "TOGETHER",
    "VOCABULARY",
]

TABLES: dict[str, pa.Schema] = {name: schema for room in all_rooms() for name, schema in room.tables.items()}

MEMBERS: dict[str, tuple[str, ...]] = {
    group: tuple(table for room in all_rooms() if room.group == group for table in room.tables)
    for group in dict.fromkeys(room.group for room in all_rooms())
}
"""Group of tables, which is made and replaced as one (`infra.duck.Catalog.lineage`), to all tables it may have."""

TOGETHER: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((room.group, room.required) for room in all_rooms() if room.required),
    *(("", together) for room in all_rooms() for together in room.together),
)
"""Tables that are there together: where the group of that name is published, or, named `""`, where one of them is."""

LEFT_IN_PLACE: tuple[str, ...] = tuple(table for room in all_rooms() for table in room.left_in_place)
"""Tables that stay views over the Parquet files themselves in a DuckDB file: every other one is copied into it."""

SHARDED_SELECT: dict[str, str] = {
    view: columns for room in all_rooms() for view, columns in room.sharded.items()
}
"""View over a shard's file each to the columns it selects, from the file's `f` and the shard's `s`."""
