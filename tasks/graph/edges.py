"""The edges of a layer: the one table that is larger than memory, made in passes over ranges of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from infra.catalog import Catalog, ShardFile
from infra.duck import memory_bytes
from infra.manifest import Manifest, commit, content_key, load, load_all
from infra.storage import Storage
from schemas.config import DuckDb
from schemas.errors import ExpectationError
from schemas.work import FeatureShard
from tasks.engine.tables import opened, write_table

VERSION = 1
"""Raise when what is in an edges file changes."""

BYTES_PER_ROW = 40
"""Memory a pass gets for each row of the shards' edges.

DuckDB 2.0 spills an aggregation as long as it has about 10 bytes a row, and fails at 3.
"""


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
    resources: DuckDb, storage: Storage, layer: int, features: Sequence[FeatureShard], inputs: Catalog
) -> None:
    """Make one layer's edges, if they are not there.

    Args:
        resources: Limits of DuckDB; its memory decides the number of passes, never the rows.
        storage: Where shards and tables are.
        layer: Which layer.
        features: The feature shards, of any layers.
        inputs: `shard_edges` and `activations` of this layer's shards.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        ExpectationError: if an activation is not a finite number.
        StorageError: if a file cannot be read or written.
    """
    folder, parts = edge_folder(layer, features)
    if load(storage, folder) is not None:
        return
    own = [feature for feature in features if feature.layer == layer]
    rows_per_pass = memory_bytes(resources.memory_limit) // BYTES_PER_ROW
    largest = _largest(resources, storage, layer, own, inputs)
    if _rows(own) <= rows_per_pass:
        ranges = id_ranges(np.empty(0, np.int32), np.empty(0, np.int64), rows_per_pass)
    else:
        ranges = id_ranges(*_rows_by_token(resources, storage, layer, inputs), rows_per_pass)
    unit = _unit(layer, largest)
    # The number of passes is in the name, so that files of different cuts never mix.
    names = [f"edges-{index:04d}-of-{len(ranges):04d}.parquet" for index in range(len(ranges))]
    written = [
        write_table(
            resources,
            storage,
            "edges",
            f"{folder}/{name}",
            inputs,
            layer=layer,
            unit=unit,
            first=first,
            last=last,
        )
        for name, (first, last) in zip(names, ranges, strict=True)
    ]
    commit(storage, folder, Manifest(stage="tables", inputs=parts), written)


def _rows(features: Sequence[FeatureShard]) -> float:
    return sum(math.inf if feature.n_edges is None else feature.n_edges for feature in features)


def _largest(
    resources: DuckDb, storage: Storage, layer: int, features: Sequence[FeatureShard], inputs: Catalog
) -> float | None:
    """The largest activation of a layer; a shard's manifest has its own, older ones are read."""
    if all(feature.n_edges is not None for feature in features):
        # NaN is the largest of all to SQL, and would be nothing to max().
        found = [feature.max_activation for feature in features if feature.max_activation is not None]
        return float(np.max(found)) if found else None
    with opened(f"the edges of layer {layer}", resources, storage, inputs) as connection:
        (largest,) = connection.execute("SELECT max(activation) FROM activations").fetchone()
    return cast("float | None", largest)


def _rows_by_token(
    resources: DuckDb, storage: Storage, layer: int, inputs: Catalog
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    with opened(f"the edges of layer {layer}", resources, storage, inputs) as connection:
        rows = connection.execute(
            "SELECT token_id, count(*) AS n FROM shard_edges GROUP BY token_id ORDER BY token_id"
        ).fetchnumpy()
    return rows["token_id"], rows["n"]


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


def _unit(layer: int, largest: float | None) -> float:
    """Units per 1.0 in which a layer's activations are added: 2^32, less where they would leave 63 bits."""
    # NaN is the greatest of all in DuckDB's order.
    if largest is not None and not math.isfinite(largest):
        raise ExpectationError(
            f"layer {layer} has an activation that is {largest}",
            hint="the model or its dictionary overflows: set model.dtype = float32, and delete the layer's features",
        )
    exponent = math.frexp(largest or 1.0)[1]
    return math.ldexp(1.0, min(32, 62 - exponent))
