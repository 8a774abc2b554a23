"""Arrow schemas of every file that a stage writes for a shard, a checkpoint, a case or an experiment.

Files of a shard carry `doc`, the document's number inside the shard, so that a shard does not change when
the corpus around it does; the catalogue's views add the shard's offset and give `doc_id`.
"""

from __future__ import annotations

import pyarrow as pa

from schemas.experiments import all_rooms

SHARD_FILES: dict[str, pa.Schema] = {
    name: schema for room in all_rooms() for name, schema in room.shard_files.items()
}
