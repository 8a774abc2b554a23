"""The checks at every stage boundary: ask, judge, record, show, and fail naming the rows.

A check is keyed by what it is asked (the suite) and of what (folders named by content): one that was passed is
not made again, so a run with nothing to do imports nothing and reads one small file. All folders of a stage
are checked together and not each when it is made, because what must agree spans them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from infra.duck import Catalog, create_views, open_duckdb
from infra.manifest import load_all
from infra.storage import Storage
from schemas.config import Config
from schemas.expectations import SUITES
from schemas.work import CorpusShards, Dictionary, FeatureShard, Stage
from tasks.check_columns import check_columns
from tasks.data_docs import Finding
from tasks.find_offenders import Unit, find_in_units, find_in_views
from tasks.verdicts import check_key, conclude, expectations_table, passed

__all__ = ["check_dictionaries", "check_features", "check_tables", "check_tokenize", "expectations_table"]


def check_tokenize(config: Config, storage: Storage, shards: CorpusShards) -> None:
    """Check the token shards, and that they are the whole corpus.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    key = check_key("tokenize", shards=[_identity(shard) for shard in shards.shards], of=shards.vocabulary)
    if passed(storage, "tokenize", key):
        return
    manifests = load_all(storage, [shard.folder for shard in shards.shards])
    files = [
        "documents",
        "rejects",
        "token_counts",
        *(["occurrences"] if config.corpus.keep_occurrences else []),
    ]
    units = {
        shard.folder: Unit(
            folder=shard.folder,
            files={file: f"{shard.folder}/{file}.parquet" for file in files},
            columns={"folder": shard.folder, "n_documents": shard.n_documents},
            small=frozenset(files),
        )
        for shard in shards.shards
    }
    totals = {
        "documents": {
            "found_documents": "count(*)",
            "found_document_tokens": "coalesce(sum(n_tokens), 0)::BIGINT",
        },
        "rejects": {"found_rejects": "count(*)"},
        "token_counts": {"found_counted_tokens": "coalesce(sum(count), 0)::BIGINT"},
    }
    rows = [
        {**_identity(shard), "place": place, "n_records": _n_records(manifests, shard.folder)}
        for place, shard in enumerate(shards.shards)
    ]
    with open_duckdb(storage, config.duckdb) as connection:
        _put(connection, "vocabulary", storage.read_parquet(shards.vocabulary))
        findings = _check_shards(connection, storage, "tokenize", units, totals, rows, {"vocabulary"})
    conclude(storage, "tokenize", key, findings)


def check_dictionaries(config: Config, storage: Storage, dictionaries: Sequence[Dictionary]) -> None:
    """Check that every configured layer has one whole dictionary, and that those trained here pass their gate.

    Raises:
        ExpectationError: naming the expectation and the layers.
    """
    gates = {entry.layer: entry.train.gate for entry in config.sae if entry.train is not None}
    committed = load_all(storage, [dictionary.folder for dictionary in dictionaries])
    rows = []
    for dictionary in dictionaries:
        quality, gate = dictionary.quality or {}, gates.get(dictionary.layer)
        figures = ("explained_variance", "explained_variance_all", "l0", "k", "alive_share", "heldout_tokens")
        limits = ("min_explained_variance", "max_l0_deviation", "min_alive_share")
        rows.append(
            {
                **{name: getattr(dictionary, name) for name in ("layer", "folder", "key", "d_sae", "source")},
                **{name: _number(quality.get(name)) for name in figures},
                **{name: _number(getattr(gate, name, None)) for name in limits},
                "trained": gate is not None,
                "committed": dictionary.folder in committed,
            }
        )
    wanted = [
        {"layer": entry.layer, "source": entry.path or entry.release or "trained here"}
        for entry in config.sae
    ]
    key = check_key("dictionaries", rows=rows, wanted=wanted)
    if passed(storage, "dictionaries", key):
        return
    with open_duckdb(storage, config.duckdb) as connection:
        _put(connection, "dictionaries", _table(rows, _DICTIONARIES))
        _put(connection, "wanted", _table(wanted, _WANTED))
        findings = find_in_views(
            connection, SUITES["dictionaries"], {"dictionaries", "wanted"}, storage.url("dictionaries")
        )
    conclude(storage, "dictionaries", key, findings)


def check_features(
    config: Config, storage: Storage, features: Sequence[FeatureShard], dictionaries: Sequence[Dictionary]
) -> None:
    """Check the feature shards against their dictionaries and the token shards they were made from.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    rows = [
        {
            **_identity(feature.part.shard),
            "token_folder": feature.part.shard.folder,
            "n_documents": feature.part.n_documents,
            "n_tokens": feature.part.n_tokens,
            "folder": feature.folder,
            "layer": feature.layer,
            "n_activations": feature.n_activations,
        }
        for feature in features
    ]
    sizes = [{"layer": entry.layer, "key": entry.key, "d_sae": entry.d_sae} for entry in dictionaries]
    key = check_key("features", shards=rows, dictionaries=sizes)
    if passed(storage, "features", key):
        return
    d_sae = {entry.layer: entry.d_sae for entry in dictionaries}
    units = {
        feature.folder: Unit(
            folder=feature.folder,
            files={
                **{file: f"{feature.folder}/{file}.parquet" for file in ("activations", "edges", "counts")},
                "token_counts": f"{feature.part.shard.folder}/token_counts.parquet",
            },
            columns={
                "folder": feature.folder,
                "layer": feature.layer,
                "n_documents": feature.part.n_documents,
                "d_sae": d_sae.get(feature.layer),
            },
            small=frozenset({"counts", "token_counts"}),
        )
        for feature in features
    }
    totals = {
        "activations": {"found_activations": "count(*)"},
        "counts": {"found_tokens": "coalesce(sum(count), 0)::BIGINT"},
    }
    with open_duckdb(storage, config.duckdb) as connection:
        _put(connection, "dictionaries", _table(sizes, _SIZES))
        findings = _check_shards(connection, storage, "features", units, totals, rows, {"dictionaries"})
    conclude(storage, "features", key, findings)


def check_tables(config: Config, storage: Storage, catalog: Catalog) -> None:
    """Check a candidate catalogue: every table against the contract and against the others.

    Expectations on tables that it does not have (a graph, occurrences) do not apply; a table that its groups
    (`Catalog.lineage`) should have does.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    settings = [
        {"function_share": config.function_tokens.share, "rarefaction_m": config.graph.rarefaction_m},
    ]
    # Results of checks are published with the tables, and are not what is checked.
    tables = {name: file for name, file in catalog.tables.items() if name != "expectations"}
    checked = replace(catalog, tables=tables)
    key = check_key("tables", catalog=checked.to_json(), settings=settings)
    if passed(storage, "tables", key):
        return
    views = {*checked.tables, *checked.sharded}
    with open_duckdb(storage, config.duckdb) as connection:
        create_views(connection, storage, checked)
        _put(connection, "settings", _table(settings, _SETTINGS))
        columns = check_columns(connection, checked, views)
        findings = [columns]
        if columns.count == 0:
            # Asked about often; a query of a view opens its file again, which S3 answers slowly.
            for table in views - {"activations", "edges", "occurrences"}:
                connection.execute(f"CREATE TEMP TABLE {table} AS SELECT * FROM main.{table}")
            findings += find_in_views(connection, SUITES["tables"], views | {"settings"}, storage.root)
    conclude(storage, "tables", key, findings)


def _check_shards(
    connection: Any,
    storage: Storage,
    stage: Stage,
    units: Mapping[str, Unit],
    totals: Mapping[str, Mapping[str, str]],
    rows: list[dict[str, Any]],
    views: set[str],
) -> list[Finding]:
    """Ask each folder once (files of equal content share one), then all of them together as `shards`."""
    suite = SUITES[stage]
    within = [entry for entry in suite if entry.shard]
    findings, found = find_in_units(connection, storage, within, list(units.values()), totals, views)
    found_in = dict(zip(units, found, strict=True))
    _put(connection, "shards", pa.Table.from_pylist([{**row, **found_in[row["folder"]]} for row in rows]))
    across = [entry for entry in suite if not entry.shard]
    findings += find_in_views(connection, across, views | {"shards"}, storage.root)
    order = {entry.name: place for place, entry in enumerate(suite)}
    return sorted(findings, key=lambda finding: order[finding.expectation.name])


def _identity(shard: Any) -> dict[str, Any]:
    names = ("folder", "source", "doc_offset", "n_documents", "n_tokens", "n_rejects")
    return {name: getattr(shard, name) for name in names}


def _n_records(manifests: Mapping[str, Any], folder: str) -> int | None:
    manifest = manifests.get(folder)
    return None if manifest is None else manifest.stats.get("n_records")


def _number(value: Any) -> float | None:
    # NaN would compare as greater than every gate.
    return None if value is None or math.isnan(value) else float(value)


_FLOATS = ("explained_variance", "explained_variance_all", "l0", "k", "alive_share", "heldout_tokens")
_LIMITS = ("min_explained_variance", "max_l0_deviation", "min_alive_share")
_SIZES = pa.schema([("layer", pa.int32()), ("key", pa.string()), ("d_sae", pa.int64())])
_WANTED = pa.schema([("layer", pa.int32()), ("source", pa.string())])
_SETTINGS = pa.schema([("function_share", pa.float64()), ("rarefaction_m", pa.int64())])
_DICTIONARIES = pa.schema(
    [
        *[("layer", pa.int32()), ("folder", pa.string()), ("key", pa.string()), ("d_sae", pa.int64())],
        *[("source", pa.string()), ("trained", pa.bool_()), ("committed", pa.bool_())],
        *[(name, pa.float64()) for name in _FLOATS + _LIMITS],
    ]
)


def _put(connection: Any, name: str, table: pa.Table) -> None:
    # A registered table is seen from its connection alone, a real one from the folders' cursors too.
    connection.register("_put", table)
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _put")
    connection.unregister("_put")


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)
