"""What the checks of all stages share: folders asked each and together, and tables put where all can see them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from infra.duck import open_duckdb
from infra.manifest import Manifest, content_key
from infra.storage import Storage
from schemas.config import DuckDb
from schemas.expectation import Expectation
from schemas.expectations import SUITES
from schemas.tables import SHARD_FILES
from schemas.work import FeatureShard, GraphShard, Stage, TokenShard
from tasks.engine.data_docs import Finding
from tasks.engine.offenders import Answer, Unit, applying, find_in_units, find_in_views, merged

ASKED = "asked"
"""Where a manifest's stats keep what was asked of the folder as it was made, and what was found."""


def ask_of_made(
    storage: Storage,
    stage: Stage,
    unit: Unit,
    totals: Mapping[str, Mapping[str, str]],
    relations: Mapping[str, pa.Table] | None = None,
    resources: DuckDb | None = None,
) -> dict[str, Any]:
    """Ask what a stage expects of one folder, of the rows that are about to be written into it.

    Args:
        storage: Where the folder will be.
        stage: Whose suite is asked.
        unit: The folder, with its rows.
        totals: View to {column: SQL aggregate}, as `check_shards` takes them.
        relations: Tables that the suite needs besides.
        resources: Limits of DuckDB, which gets one thread of them: other folders are made meanwhile.

    Returns:
        `{ASKED: …}`, for the manifest's stats: `check_shards` takes the answers from there, as long as the same is
        asked.
    """
    within = _within(stage)
    limits = (resources or DuckDb()).model_copy(update={"threads": 1})
    with open_duckdb(storage, limits) as connection:
        for name, table in (relations or {}).items():
            put(connection, name, table)
        views = set(relations or {})
        ((findings, found),) = find_in_units(connection, storage, within, [unit], totals, views, threads=1)
    told = {
        # In pairs, as a manifest sorts the keys of what it holds.
        finding.expectation.name: [finding.count, [_plain(list(row.items())) for row in finding.rows]]
        for finding in findings
        if finding.count
    }
    return {ASKED: {"key": _asked_key(stage, totals), "found": told, "totals": found}}


def check_shards(
    connection: Any,
    storage: Storage,
    stage: Stage,
    units: Mapping[str, Unit],
    totals: Mapping[str, Mapping[str, str]],
    rows: list[dict[str, Any]],
    views: set[str],
    manifests: Mapping[str, Manifest] | None = None,
) -> list[Finding]:
    """Ask each folder once (files of equal content share one), then all of them together as `shards`.

    A folder of which the same was asked when it was made is not read again: its manifest has the answers.

    Args:
        connection: A DuckDB connection.
        storage: Where the folders are.
        stage: Whose suite is asked.
        units: Folder to its views.
        totals: View to {column: SQL aggregate}, counted in each folder and put beside its `rows`.
        rows: The view `shards`; each names its `folder`.
        views: Tables that the connection has.
        manifests: Folder to its manifest, where answers may be taken from.

    Raises:
        ExpectationError: if a file lacks a column.
        StorageError: if a file cannot be read.
    """
    suite, within, key = SUITES[stage], _within(stage), _asked_key(stage, totals)
    answers: dict[str, Answer] = {}
    for folder in units:
        told = manifests[folder].stats.get(ASKED) if manifests and folder in manifests else None
        if told is not None and told["key"] == key:
            answers[folder] = _answer(within, views | set(units[folder].files), told)
    left = {folder: unit for folder, unit in units.items() if folder not in answers}
    asked = find_in_units(connection, storage, within, list(left.values()), totals, views) if left else []
    answers |= zip(left, asked, strict=True)
    findings = merged(within, [answers[folder][0] for folder in units])
    shards = [{**row, **answers[row["folder"]][1]} for row in rows]
    put(connection, "shards", pa.Table.from_pylist(shards))
    across = [entry for entry in suite if not entry.shard]
    findings += find_in_views(connection, across, views | {"shards"}, storage.root)
    order = {entry.name: place for place, entry in enumerate(suite)}
    return sorted(findings, key=lambda finding: order[finding.expectation.name])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _within(stage: Stage) -> list[Expectation]:
    return [entry for entry in SUITES[stage] if entry.shard]


def _asked_key(stage: Stage, totals: Mapping[str, Mapping[str, str]]) -> str:
    return content_key(asked=[repr(entry) for entry in _within(stage)], totals=totals)


def _answer(within: Sequence[Expectation], there: set[str], told: Mapping[str, Any]) -> Answer:
    findings = []
    for entry in applying(within, there):
        count, rows = told["found"].get(entry.name, (0, ()))
        findings.append(Finding(expectation=entry, count=count, rows=tuple(map(dict, rows))))
    return findings, dict(told["totals"])


def identity(shard: TokenShard) -> dict[str, Any]:
    """A token shard as columns."""
    names = ("folder", "source", "doc_offset", "n_documents", "n_tokens", "n_rejects")
    return {name: getattr(shard, name) for name in names}


Rows = Mapping[str, str | pa.Table]
"""View to its Parquet file, or to the rows themselves."""

TOKEN_TOTALS = {
    "documents": {
        "found_documents": "count(*)",
        "found_document_tokens": "coalesce(sum(n_tokens), 0)::BIGINT",
    },
    "rejects": {"found_rejects": "count(*)"},
    "token_counts": {"found_counted_tokens": "coalesce(sum(count), 0)::BIGINT"},
}
"""What is counted in a token shard's folder."""


def token_unit(folder: str, n_documents: int, rows: Rows) -> Unit:
    """A token shard's views: `documents`, `token_counts` and, where there are any, `rejects` and `occurrences`."""
    files = {"rejects": SHARD_FILES["rejects"].empty_table(), **rows}
    return Unit(
        folder=folder,
        files=files,
        columns={"folder": folder, "n_documents": n_documents},
        small=frozenset(files),
    )


FEATURE_TOTALS = {
    "activations": {"found_activations": "count(*)"},
    "counts": {"found_tokens": "coalesce(sum(count), 0)::BIGINT"},
}
"""What is counted in a feature shard's folder."""


def feature_unit(folder: str, layer: int, part: GraphShard, d_sae: int | None, rows: Rows) -> Unit:
    """A feature shard's views: `activations`, `edges`, `counts`, and the `token_counts` of its token shard."""
    return Unit(
        folder=folder,
        files=rows,
        columns={"folder": folder, "layer": layer, "n_documents": part.n_documents, "d_sae": d_sae},
        small=frozenset({"counts", "token_counts"}),
    )


def stored_feature_unit(feature: FeatureShard, d_sae: int | None) -> Unit:
    """The same of a feature shard's files."""
    rows = {file: f"{feature.folder}/{file}.parquet" for file in ("activations", "edges")}
    rows["counts"] = feature.counts_file
    rows["token_counts"] = f"{feature.part.shard.folder}/token_counts.parquet"
    return feature_unit(feature.folder, feature.layer, feature.part, d_sae, rows)


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
