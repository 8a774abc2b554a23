"""Rows of some documents from their shards alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infra.catalog import Catalog, ShardFile
from infra.duck import create_views, open_duckdb, telling_damage
from infra.manifest import Manifest, commit
from infra.storage import Storage
from schemas.errors import DamagedError
from schemas.tables import SHARD_FILES

# Document numbers and layers of shards; one has no documents, and begins where the next does.
SHARDS = [(0, 0, 3), (3, 0, 0), (3, 0, 2), (5, 0, 4), (0, 1, 3), (3, 1, 2)]


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Storage, Any]:
    storage, files = Storage(str(tmp_path)), []
    for number, (offset, layer, n) in enumerate(SHARDS):
        rows = [
            {"doc": doc, "position": position, "token_id": 1, "feature_id": number, "activation": 1.0}
            for doc in range(n)
            for position in range(3)
        ]
        name = f"features/{number}/activations.parquet"
        stored = storage.write_parquet(name, pa.Table.from_pylist(rows, schema=SHARD_FILES["activations"]))
        commit(storage, f"features/{number}", Manifest(stage="features", inputs={}), [stored])
        files.append(ShardFile(name=name, doc_offset=offset, layer=layer))
    connection = open_duckdb(storage)
    create_views(connection, storage, Catalog(sharded={"activations": files}))
    return storage, connection


@pytest.mark.parametrize("documents", [[0], [2, 3], [4, 4, 0], [8], [9], [100], [-1], []])
@pytest.mark.parametrize("layers", [None, [0], [1], [0, 1], [7], []])
def test_it_has_the_rows_that_the_view_has(
    opened: tuple[Storage, Any], documents: list[int], layers: list[int] | None
) -> None:
    _, connection = opened
    columns = "layer, doc_id, position, feature_id"
    values = {"documents": documents, "layers": layers}
    narrow = connection.execute(
        f"SELECT {columns} FROM activations_in($documents, layers := $layers) ORDER BY ALL", values
    ).fetchall()
    whole = connection.execute(
        f"SELECT {columns} FROM activations WHERE doc_id IN (SELECT unnest($documents::BIGINT[])) "
        "AND ($layers::INTEGER[] IS NULL OR list_contains($layers, layer)) ORDER BY ALL",
        values,
    ).fetchall()
    assert narrow == whole


def test_shards_of_other_documents_are_not_read(opened: tuple[Storage, Any]) -> None:
    storage, connection = opened
    name = "features/3/activations.parquet"
    storage.write_bytes(name, storage.read_bytes(name)[:-1] + b"?")
    count = "SELECT count(*) FROM activations_in([0, 4], layers := [0])"
    assert connection.execute(count).fetchone() == (6,)
    with pytest.raises(DamagedError, match=name), telling_damage():
        connection.execute("SELECT count(*) FROM activations_in([5])").fetchone()
