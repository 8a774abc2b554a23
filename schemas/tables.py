"""Tables and the files that they are made of, put together from what each room has in `schemas.<room>.tables`."""

from __future__ import annotations

import pyarrow as pa

from schemas.experiments import all_rooms

SHARD_FILES: dict[str, pa.Schema] = {
    name: schema for room in all_rooms() for name, schema in room.shard_files.items()
}
"""Schema of every file that a stage writes for a shard, a checkpoint, a case or an experiment.

Files of a shard carry `doc`, the document's number inside the shard, so that a shard does not change when the corpus
around it does; the catalogue's views add the shard's offset and give `doc_id`.
"""

TABLES: dict[str, pa.Schema] = {name: schema for room in all_rooms() for name, schema in room.tables.items()}
"""Schema of every table that is published."""

MEMBERS: dict[str, tuple[str, ...]] = {
    group: tuple(table for room in all_rooms() if room.group == group for table in room.tables)
    for group in dict.fromkeys(room.group for room in all_rooms())
}
"""Group of tables, which is made and replaced as one (`infra.catalog.Catalog.lineage`), to all tables it may have."""

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
