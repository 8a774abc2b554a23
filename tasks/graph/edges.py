"""The edges of a layer: the one table that is larger than memory, made in passes over ranges of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.catalog import Catalog, ShardFile
from infra.cluster import running_cluster
from infra.duck import memory_bytes
from infra.manifest import Manifest, commit, content_key, load, load_all
from infra.storage import Storage, StoredFile
from schemas.config import Dask, DuckDb
from schemas.work import FeatureShard
from tasks.engine.tables import copy_table, opened

VERSION = 2
"""Raise when what is in an edges file changes."""

BYTES_PER_ROW = 40
"""Memory a pass gets for each row of the shards' edges.

DuckDB 2.0 spills an aggregation as long as it has about 10 bytes a row, and fails at 3.
"""

ROWS_PER_PASS = 1 << 21
"""Rows of a pass where memory has room for more: a pass over 7 million takes a third longer, as caches hold less."""

PASSES = 64
"""As many there are at most, unless memory wants more: each is a file that readers open."""

ENCODING = ", PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT 1000"
"""Byte streams and deltas: a third less time to write than dictionaries of values that seldom repeat, a quarter less
bytes, as fast to read."""


def edge_folder(layer: int, features: Sequence[FeatureShard]) -> tuple[str, dict[str, Any]]:
    """The folder of one layer's edges, and what its key is made of: the shards, in no order."""
    folders = sorted(feature.folder for feature in features if feature.layer == layer)
    parts = {"group": "edges", "version": VERSION, "layer": layer, "features": folders}
    return f"tables/edges-{content_key(**parts)}", parts


def edge_files(storage: Storage, features: Sequence[FeatureShard]) -> list[ShardFile] | None:
    """The finished edges of all layers, by layer and token; None if those of a layer are missing."""
    layers = sorted({feature.layer for feature in features})
    folders = {layer: edge_folder(layer, features)[0] for layer in layers}
    done = load_all(storage, folders.values())
    if set(done) != set(folders.values()):
        return None
    return [
        ShardFile(name=f"{folder}/{name}", layer=layer)
        for layer, folder in folders.items()
        for name in sorted(done[folder].files)
    ]


def ensure_edges(
    resources: DuckDb,
    storage: Storage,
    layer: int,
    features: Sequence[FeatureShard],
    inputs: Catalog,
    dask: Dask,
) -> None:
    """Make one layer's edges, if they are not there.

    Args:
        resources: Limits of DuckDB; its memory decides the number of passes, never the rows.
        storage: Where shards and tables are.
        layer: Which layer.
        features: The feature shards, of any layers.
        inputs: `shard_edges` of this layer's shards.
        dask: Where a scheduler is running, its workers make the passes, each in a DuckDB of its own, of these limits.

    Raises:
        ConfigError: if DuckDB cannot work within its limits, or the scheduler does not answer.
        StorageError: if a file cannot be read or written.
    """
    folder, parts = edge_folder(layer, features)
    if load(storage, folder) is not None:
        return
    own = [feature for feature in features if feature.layer == layer]
    rows, scale = sum(feature.n_edges for feature in own), min(feature.scale for feature in own)
    rows_per_pass = min(
        memory_bytes(resources.memory_limit) // BYTES_PER_ROW, max(ROWS_PER_PASS, rows // PASSES)
    )
    counted: dict[str, Any] = {"token_id": np.empty(0, np.int32), "n": np.empty(0, np.int64)}
    if rows > rows_per_pass:
        with opened(f"the edges of layer {layer}", resources, storage, inputs) as connection:
            counted = connection.execute(
                "SELECT token_id, count(*) AS n FROM shard_edges GROUP BY token_id ORDER BY token_id"
            ).fetchnumpy()
    ranges = id_ranges(counted["token_id"], counted["n"], rows_per_pass)
    # The number of passes is in the name, so that files of different cuts never mix.
    names = [f"{folder}/edges-{index:04d}-of-{len(ranges):04d}.parquet" for index in range(len(ranges))]
    passes = [
        {"name": name, "first": first, "last": last}
        for name, (first, last) in zip(names, ranges, strict=True)
    ]
    merge = partial(_merge, resources, storage, inputs, layer=layer, scale=scale)
    with running_cluster(dask) as client:
        if client is None:
            written = merge(passes)
        else:
            made = client.gather(client.map(merge, [[one] for one in passes], pure=False))
            written = [file for files in made for file in files]
    commit(storage, folder, Manifest(stage="tables", inputs=parts), written)


def _merge(
    resources: DuckDb,
    storage: Storage,
    inputs: Catalog,
    passes: Sequence[Mapping[str, Any]],
    layer: int,
    scale: int,
) -> list[StoredFile]:
    # One connection: what it reads of small shards that lie elsewhere it reads once, and so their footers.
    with opened(f"the edges of layer {layer}", resources, storage, inputs) as connection:
        connection.execute("SET parquet_metadata_cache = true")
        bound: dict[str, Any] = {"layer": layer, "scale": scale, "unit": math.ldexp(1.0, scale)}
        return [
            copy_table(connection, resources, storage, "edges", options=ENCODING, **one, **bound)
            for one in passes
        ]


def id_ranges(
    ids: npt.NDArray[np.int32], rows: npt.NDArray[np.int64], rows_per_pass: int
) -> list[tuple[int, int]]:
    """Cut tokens or features into consecutive ranges of about equal numbers of rows.

    Args:
        ids: (T,) distinct, ascending.
        rows: (T,) rows of each; one with more than its share of them gets a range of its own.
        rows_per_pass: Rows a range should have at most.

    Returns:
        First and last id of each range, both included; together they hold every 32-bit id.
    """
    lowest, highest = -(2**31), 2**31 - 1
    total = int(rows.sum())
    passes = max(1, math.ceil(total / max(1, rows_per_pass)))
    before = np.cumsum(rows) - rows
    starts = np.searchsorted(before, np.arange(1, passes) * total / passes)
    firsts = [int(ids[start]) for start in np.unique(starts) if 0 < start < len(ids)]
    return list(zip([lowest, *firsts], [*(first - 1 for first in firsts), highest], strict=True))
