"""The checks at the boundaries of the checkpoint stages (PAPER 1.4), made as those of `tasks.engine.validation` are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infra import verified
from infra.duck import open_duckdb
from infra.manifest import load_all
from infra.storage import Storage
from schemas.config import Config
from schemas.expectations import SUITES
from schemas.pretraining.section import consolidation_of, losses_of
from schemas.pretraining.work import Checkpoint, GeneratedTexts, GrownSae, LossShard
from schemas.tables import SHARD_FILES, TABLES
from schemas.work import HeldoutPart
from tasks.engine.offenders import Unit, find_in_views
from tasks.engine.shard_checks import (
    FEATURE_TOTALS,
    check_shards,
    feature_row,
    identity,
    put,
    rows_table,
    stored_feature_unit,
)
from tasks.engine.table_sql import explained
from tasks.engine.verdicts import check_key, conclude, passed
from tasks.models.files import IN_STORAGE
from tasks.pretraining.table_plan import checkpoint_rows, window_of


def check_checkpoints(config: Config, storage: Storage, checkpoints: Sequence[Checkpoint]) -> None:
    """Check that every configured series has its checkpoints, in order, and that those made here are whole.

    Raises:
        ExpectationError: naming the expectation and the checkpoints.
    """
    folders = {
        checkpoint.model.name: checkpoint.model.name.removeprefix(IN_STORAGE)
        for checkpoint in checkpoints
        if checkpoint.model.name.startswith(IN_STORAGE)
    }
    committed = load_all(storage, folders.values())
    rows = [
        {
            **row,
            "place": place,
            "key": checkpoint.key,
            "committed": folders.get(checkpoint.model.name) in {None, *committed},
        }
        for place, (checkpoint, row) in enumerate(zip(checkpoints, checkpoint_rows(checkpoints), strict=True))
    ]
    wanted = _series(config)
    key = check_key("checkpoints", rows=rows, wanted=wanted)
    if passed(storage, "checkpoints", key):
        return
    with open_duckdb(storage, config.duckdb) as connection:
        put(connection, "checkpoints", rows_table(rows, _CHECKPOINTS))
        put(connection, "wanted", rows_table(wanted, _SERIES))
        findings = find_in_views(
            connection, SUITES["checkpoints"], {"checkpoints", "wanted"}, storage.url("checkpoints")
        )
    conclude(storage, "checkpoints", key, findings)


def check_losses(config: Config, storage: Storage, losses: Sequence[LossShard]) -> None:
    """Check the loss shards against the held-out documents of the token shards they were made from.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    parts = list(dict.fromkeys(loss.part for loss in losses))
    place = {part: index for index, part in enumerate(parts)}
    rows = [
        {
            **identity(loss.part.shard),
            "folder": loss.folder,
            "part": place[loss.part],
            "n_documents": len(loss.part.documents),
            "n_tokens": loss.part.n_tokens,
            "n_predictions": loss.n_predictions,
            **_named(loss.checkpoint),
        }
        for loss in losses
    ]
    wanted = _series(config)
    documents = [[part.shard.folder, part.documents] for part in parts]
    key = check_key("losses", shards=rows, wanted=wanted, window=window_of(config), documents=documents)
    if passed(storage, "losses", key):
        return
    file, count = ("token_losses", "count(*)")
    if not losses_of(config).keep_tokens:
        file, count = ("document_losses", "coalesce(sum(n), 0)::BIGINT")
    units = {
        loss.folder: Unit(
            folder=loss.folder,
            files={file: f"{loss.folder}/{file}.parquet"},
            columns={"folder": loss.folder, "part": place[loss.part]},
        )
        for loss in losses
    }
    totals = {file: {"found_predictions": count}}
    with open_duckdb(storage, config.duckdb) as connection:
        put(connection, "wanted", rows_table(wanted, _SERIES))
        _put_predictions(config, storage, connection, parts)
        views = {"wanted", "predictions", "expected"}
        findings = check_shards(connection, storage, "losses", units, totals, rows, views)
    conclude(storage, "losses", key, findings)


def check_growth(config: Config, storage: Storage, grown: Sequence[GrownSae]) -> None:
    """Check what the SAEs of checkpoints have learned, and the feature shards of each.

    Raises:
        ExpectationError: naming the expectation, the table and offending rows.
        StorageError: if a file cannot be read.
    """
    growth = consolidation_of(config).growth
    assert growth is not None
    committed = load_all(
        storage, [folder for entry in grown for folder in (entry.dictionary.folder, entry.folder)]
    )
    saes = [
        {
            **_named(entry.checkpoint),
            "folder": entry.folder,
            "dictionary_layer": entry.dictionary.layer,
            "d_sae": entry.dictionary.d_sae,
            "committed": {entry.dictionary.folder, entry.folder} <= set(committed),
            "configured_size": growth.train.d_sae,
            "configured_min": growth.min_density,
            "configured_max": growth.max_density,
        }
        for entry in grown
    ]
    rows = [
        {**feature_row(feature), **_named(entry.checkpoint)} for entry in grown for feature in entry.features
    ]
    wanted = _series(config)
    key = check_key("growth", saes=saes, shards=rows, wanted=wanted)
    if passed(storage, "growth", key):
        return
    learned = []
    for sae in saes:
        found = verified.read_table(storage, f"{sae['folder']}/learned.parquet").to_pylist()
        learned += [{**sae, **row, "n_rows": len(found)} for row in found or [{}]]
    units = {
        feature.folder: stored_feature_unit(feature, entry.dictionary.d_sae)
        for entry in grown
        for feature in entry.features
    }
    manifests = load_all(storage, units)
    with open_duckdb(storage, config.duckdb) as connection:
        put(connection, "wanted", rows_table(wanted, _SERIES))
        put(connection, "learned", rows_table(learned, _LEARNED))
        views = {"wanted", "learned"}
        findings = check_shards(connection, storage, "growth", units, FEATURE_TOTALS, rows, views, manifests)
    conclude(storage, "growth", key, findings)


def check_generations(config: Config, storage: Storage, generated: Sequence[GeneratedTexts]) -> None:
    """Check that every checkpoint continues every prompt, greedily and sampled.

    Raises:
        ExpectationError: naming the expectation and the prompts.
        StorageError: if a file cannot be read.
    """
    from tasks.pretraining.generations import MODES

    section = consolidation_of(config).generations
    assert section is not None
    checkpoints = [{**_named(texts.checkpoint), "folder": texts.folder} for texts in generated]
    wanted = [
        {"prompt": prompt, "mode": mode, "seed": section.seed if mode == "sampled" else None}
        for prompt in section.prompts
        for mode in MODES
    ]
    key = check_key("generations", checkpoints=checkpoints, wanted=wanted)
    if passed(storage, "generations", key):
        return
    rows = [
        {**checkpoint, **row}
        for checkpoint in checkpoints
        for row in verified.read_table(storage, f"{checkpoint['folder']}/generations.parquet").to_pylist()
    ]
    with open_duckdb(storage, config.duckdb) as connection:
        put(connection, "checkpoints", rows_table(checkpoints, _MADE))
        put(connection, "wanted", rows_table(wanted, _PROMPTS))
        put(connection, "generations", rows_table(rows, TABLES["generations"]))
        views = {"generations", "checkpoints", "wanted"}
        findings = find_in_views(connection, SUITES["generations"], views, storage.url("generations"))
    conclude(storage, "generations", key, findings)


def _put_predictions(config: Config, storage: Storage, connection: Any, parts: Sequence[HeldoutPart]) -> None:
    """The tables `predictions` and `expected`: what windows of the held-out documents predict, by part.

    Neighbours in a document of which neither is special, and the later one does not begin a window.
    """
    connection.execute(
        "CREATE TABLE predictions (part BIGINT, doc INTEGER, position INTEGER, current_token_id INTEGER, "
        "token_id INTEGER)"
    )
    for part, heldout in enumerate(parts):
        name = f"{heldout.shard.folder}/occurrences.parquet"
        connection.register("_documents", pa.table({"doc": np.array(heldout.documents, dtype=np.int32)}))
        with explained(f"the check of {name}", config.duckdb, storage):
            connection.execute(
                "INSERT INTO predictions WITH here AS (SELECT doc, position, token_id "
                "FROM read_parquet($url, hive_partitioning = false) SEMI JOIN _documents USING (doc)) "
                "SELECT $part, this.doc, this.position, before.token_id, this.token_id FROM here AS this "
                "JOIN here AS before ON before.doc = this.doc AND before.position = this.position - 1 "
                "WHERE this.position % $window <> 0",
                {"url": storage.url(name), "part": part, "window": window_of(config)},
            )
        connection.unregister("_documents")
    connection.execute(
        "CREATE TABLE expected AS SELECT part, doc, count(*) AS n FROM predictions GROUP BY ALL"
    )


def _series(config: Config) -> list[dict[str, Any]]:
    return [{"model": series.name} for series in consolidation_of(config).series]


def _named(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"model": checkpoint.series, "step": checkpoint.step}


_SERIES = pa.schema([("model", pa.string())])
_MADE = pa.schema([("model", pa.string()), ("step", pa.int64()), ("folder", pa.string())])
_PROMPTS = pa.schema([("prompt", pa.string()), ("mode", pa.string()), ("seed", pa.int64())])
_CHECKPOINTS = pa.schema(
    [
        *TABLES["checkpoints"],
        *[("place", pa.int64()), ("key", pa.string()), ("committed", pa.bool_())],
    ]
)
_LEARNED = pa.schema(
    [
        *_MADE,
        *[("dictionary_layer", pa.int32()), ("d_sae", pa.int64()), ("committed", pa.bool_())],
        *[
            ("configured_size", pa.int64()),
            ("configured_min", pa.float64()),
            ("configured_max", pa.float64()),
        ],
        *[("n_rows", pa.int64()), *SHARD_FILES["learned"]],
    ]
)
