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

from infra import verified
from infra.duck import Catalog, create_views, open_duckdb
from infra.manifest import MANIFEST, load_all
from infra.storage import Storage
from schemas.config import Config
from schemas.expectations import GROUPED, SUITES, TOTALS
from schemas.tables import LEFT_IN_PLACE
from schemas.work import CorpusShards, Dictionary, FeatureShard
from tasks.engine.columns import check_columns
from tasks.engine.offenders import find_in_views
from tasks.engine.shard_checks import (
    FEATURE_TOTALS,
    TOKEN_TOTALS,
    check_shards,
    feature_row,
    identity,
    put,
    rows_table,
    stored_feature_unit,
    token_unit,
)
from tasks.engine.verdicts import check_key, conclude, expectations_table, passed

__all__ = ["check_dictionaries", "check_features", "check_tables", "check_tokenize", "expectations_table"]


def check_tokenize(config: Config, storage: Storage, shards: CorpusShards) -> None:
    """Check the token shards, and that they are the whole corpus.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    key = check_key("tokenize", shards=[identity(shard) for shard in shards.shards], of=shards.vocabulary)
    if passed(storage, "tokenize", key):
        return
    manifests = load_all(storage, [shard.folder for shard in shards.shards])
    wanted = ["documents", "token_counts", *(["occurrences"] if config.corpus.keep_occurrences else [])]
    units = {}
    for shard in shards.shards:
        manifest = manifests.get(shard.folder)
        # A shard without rejects has no file of them.
        rejects = manifest is None or "rejects.parquet" in manifest.files
        files = [*wanted, *(["rejects"] if rejects else [])]
        units[shard.folder] = token_unit(
            shard.folder, shard.n_documents, {file: f"{shard.folder}/{file}.parquet" for file in files}
        )
    rows = [
        {**identity(shard), "place": place, "n_records": _n_records(manifests, shard.folder)}
        for place, shard in enumerate(shards.shards)
    ]
    with open_duckdb(storage, config.duckdb) as connection:
        put(connection, "vocabulary", verified.read_table(storage, shards.vocabulary))
        findings = check_shards(
            connection, storage, "tokenize", units, TOKEN_TOTALS, rows, {"vocabulary"}, manifests
        )
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
        put(connection, "dictionaries", rows_table(rows, _DICTIONARIES))
        put(connection, "wanted", rows_table(wanted, _WANTED))
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
    rows = [feature_row(feature) for feature in features]
    sizes = [{"layer": entry.layer, "key": entry.key, "d_sae": entry.d_sae} for entry in dictionaries]
    key = check_key("features", shards=rows, dictionaries=sizes)
    if passed(storage, "features", key):
        return
    d_sae = {entry.layer: entry.d_sae for entry in dictionaries}
    units = {feature.folder: stored_feature_unit(feature, d_sae.get(feature.layer)) for feature in features}
    manifests = load_all(storage, units)
    with open_duckdb(storage, config.duckdb) as connection:
        put(connection, "dictionaries", rows_table(sizes, _SIZES))
        findings = check_shards(
            connection, storage, "features", units, FEATURE_TOTALS, rows, {"dictionaries"}, manifests
        )
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
    made_with = _made_with(storage, checked)
    key = check_key("tables", catalog=checked.to_json(), settings=settings, made_with=made_with)
    if passed(storage, "tables", key):
        return
    views = {*checked.tables, *checked.sharded}
    with open_duckdb(storage, config.duckdb) as connection:
        create_views(connection, storage, checked)
        put(connection, "settings", rows_table(settings, _SETTINGS))
        asked = views | {"settings"}
        if made_with:
            put(connection, "made_with", rows_table(made_with, _MADE_WITH))
            asked.add("made_with")
        columns = check_columns(connection, checked, views)
        findings = [columns]
        if columns.count == 0:
            # Asked about often; a query of a view opens its file again, which S3 answers slowly.
            for table in views.difference(LEFT_IN_PLACE):
                connection.execute(f"CREATE TEMP TABLE {table} AS SELECT * FROM main.{table}")
            for table in views.intersection(GROUPED):
                asked |= group_once(connection, table)
            findings += find_in_views(connection, SUITES["tables"], asked, storage.root)
    conclude(storage, "tables", key, findings)


def group_once(connection: Any, table: str) -> set[str]:
    """Make the grouped tables of one that is a file a shard, of one scan; their names."""
    groups = GROUPED[table]
    sets = ", ".join(f"({columns})" for columns in groups.values())
    keys = sorted({column for columns in groups.values() for column in columns.split(", ")})
    places = ", ".join(f"grouping({column}) AS without_{column}" for column in keys)
    connection.execute(
        f"CREATE TEMP TABLE _grouped AS SELECT {', '.join(keys)}, {places}, {TOTALS[table]} FROM {table} "
        f"GROUP BY GROUPING SETS ({sets})"
    )
    for name, columns in groups.items():
        kept = columns.split(", ")
        within = " AND ".join(f"without_{column} = {int(column not in kept)}" for column in keys)
        others = ", ".join([*(set(keys) - set(kept)), *(f"without_{column}" for column in keys)])
        connection.execute(
            f"CREATE TEMP TABLE {name} AS SELECT * EXCLUDE ({others}) FROM _grouped WHERE {within}"
        )
    connection.execute("DROP TABLE _grouped")
    return set(groups)


def _made_with(storage: Storage, catalog: Catalog) -> list[dict[str, Any]]:
    """What a consolidation was made with: one that is kept from an earlier run may be of another configuration."""
    if "loss_buckets" not in catalog.tables:
        return []
    manifest = storage.read_json(f"{catalog.tables['loss_buckets'].rsplit('/', 1)[0]}/{MANIFEST}")
    return [] if manifest is None else [{name: manifest["inputs"].get(name) for name in _MADE_WITH.names}]


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
_MADE_WITH = pa.schema([("window", pa.int64()), ("resamples", pa.int64()), ("m", pa.int64())])
_DICTIONARIES = pa.schema(
    [
        *[("layer", pa.int32()), ("folder", pa.string()), ("key", pa.string()), ("d_sae", pa.int64())],
        *[("source", pa.string()), ("trained", pa.bool_()), ("committed", pa.bool_())],
        *[(name, pa.float64()) for name in _FLOATS + _LIMITS],
    ]
)
