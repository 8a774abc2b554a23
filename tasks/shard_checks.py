"""What the checks of all stages share: folders asked each and together, and tables put where all can see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from infra.storage import Storage
from schemas.expectations import SUITES
from schemas.work import FeatureShard, Stage, TokenShard
from tasks.data_docs import Finding
from tasks.find_offenders import Unit, find_in_units, find_in_views


def check_shards(
    connection: Any,
    storage: Storage,
    stage: Stage,
    units: Mapping[str, Unit],
    totals: Mapping[str, Mapping[str, str]],
    rows: list[dict[str, Any]],
    views: set[str],
) -> list[Finding]:
    """Ask each folder once (files of equal content share one), then all of them together as `shards`.

    Args:
        connection: A DuckDB connection.
        storage: Where the folders are.
        stage: Whose suite is asked.
        units: Folder to its views.
        totals: View to {column: SQL aggregate}, counted in each folder and put beside its `rows`.
        rows: The view `shards`; each names its `folder`.
        views: Tables that the connection has.

    Raises:
        ExpectationError: if a file lacks a column.
        StorageError: if a file cannot be read.
    """
    suite = SUITES[stage]
    within = [entry for entry in suite if entry.shard]
    findings, found = find_in_units(connection, storage, within, list(units.values()), totals, views)
    found_in = dict(zip(units, found, strict=True))
    put(connection, "shards", pa.Table.from_pylist([{**row, **found_in[row["folder"]]} for row in rows]))
    across = [entry for entry in suite if not entry.shard]
    findings += find_in_views(connection, across, views | {"shards"}, storage.root)
    order = {entry.name: place for place, entry in enumerate(suite)}
    return sorted(findings, key=lambda finding: order[finding.expectation.name])


def identity(shard: TokenShard) -> dict[str, Any]:
    """A token shard as columns."""
    names = ("folder", "source", "doc_offset", "n_documents", "n_tokens", "n_rejects")
    return {name: getattr(shard, name) for name in names}


FEATURE_TOTALS = {
    "activations": {"found_activations": "count(*)"},
    "counts": {"found_tokens": "coalesce(sum(count), 0)::BIGINT"},
}
"""What is counted in a feature shard's folder."""


def feature_unit(feature: FeatureShard, d_sae: int | None) -> Unit:
    """A feature shard's views, its token shard's counts among them."""
    return Unit(
        folder=feature.folder,
        files={
            **{file: f"{feature.folder}/{file}.parquet" for file in ("activations", "edges", "counts")},
            "token_counts": f"{feature.part.shard.folder}/token_counts.parquet",
        },
        columns={
            "folder": feature.folder,
            "layer": feature.layer,
            "n_documents": feature.part.n_documents,
            "d_sae": d_sae,
        },
        small=frozenset({"counts", "token_counts"}),
    )


def feature_row(feature: FeatureShard) -> dict[str, Any]:
    """A feature shard as columns."""
    return {
        **identity(feature.part.shard),
        "token_folder": feature.part.shard.folder,
        "n_documents": feature.part.n_documents,
        "n_tokens": feature.part.n_tokens,
        "folder": feature.folder,
        "layer": feature.layer,
        "n_activations": feature.n_activations,
    }


def put(connection: Any, name: str, table: pa.Table) -> None:
    """Make a table of a connection."""
    # A registered table is seen from its connection alone, a real one from the folders' cursors too.
    connection.register("_put", table)
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _put")
    connection.unregister("_put")


def rows_table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows by name as a table."""
    return pa.Table.from_pylist(rows, schema=schema)
