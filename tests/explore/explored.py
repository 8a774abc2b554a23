"""A small published run as the explorer's pages see it, with the tables by feature made in plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from builders import commit_found
from small_run import SmallRun, small_run, summary_of

from functok.explorer.app import all_brought
from infra.catalog import Catalog, ShardFile, read_catalog, write_catalog
from infra.duck import connect
from infra.manifest import Manifest
from infra.storage import Storage
from schemas.tables import SHARD_FILES
from tasks.explore.labels import add_feature_labels
from tasks.explore.vocabulary import Asked
from tasks.report.queries import tables_of

TOP, OF_DECILE, BINS = 6, 2, 5


def activations(run: SmallRun) -> pd.DataFrame:
    """All activations, with `layer` and `doc_id`."""
    offsets = {place: shard.doc_offset for place, shard in enumerate(run.shards.shards)}
    return pd.concat(
        [
            frame.assign(layer=layer, doc_id=frame.doc + offsets[place])
            for (layer, place), frame in run.activations.items()
        ],
        ignore_index=True,
    )


def occurrences(run: SmallRun) -> pd.DataFrame:
    """All occurrences, with `doc_id`."""
    offsets = [shard.doc_offset for shard in run.shards.shards]
    return pd.concat(
        [
            frame.assign(doc_id=frame.doc + offset)
            for frame, offset in zip(run.occurrences, offsets, strict=True)
        ],
        ignore_index=True,
    )


def feature_tables(run: SmallRun) -> dict[str, pd.DataFrame]:
    """The tables that show one feature at a time."""
    examples, histogram, tokens = [], [], []
    n_tokens = run.shards.n_tokens
    count = run.tables["tokens"].set_index("token_id")["count"]
    for (layer, feature), own in activations(run).groupby(["layer", "feature_id"]):
        of = {"layer": layer, "feature_id": feature}
        ranked = own.sort_values(["activation", "doc_id", "position"], ascending=[False, True, True])
        kinds = [("top", ranked.head(TOP))]
        deciles = 10 - np.arange(len(ranked)) * 10 // len(ranked)
        kinds += [(f"decile {n}", ranked[deciles == n].tail(OF_DECILE)) for n in range(1, 11)]
        for kind, rows in kinds:
            for place, row in enumerate(rows.itertuples(), 1):
                example = {
                    name: getattr(row, name) for name in ("doc_id", "position", "token_id", "activation")
                }
                examples.append({**of, "kind": kind, "place": place, **example})
        largest = own.activation.max()
        bins = np.minimum(own.activation * BINS // largest, BINS - 1).astype(int)
        for number, n in bins.value_counts().sort_index().items():
            ends = {"low": largest * number / BINS, "high": largest * (number + 1) / BINS}
            histogram.append({**of, "bin": number + 1, **ends, "n": n})
        by_token = own.groupby("token_id").activation.agg(["size", "max", "sum"])
        share = by_token["size"] / len(own)
        entropy = float(-(share * np.log2(share)).sum()) + 0.0
        for token, row in by_token.iterrows():
            edge = {"n": row["size"], "max_activation": row["max"], "sum_activation": row["sum"]}
            lift = row["size"] / len(own) / (count[token] / n_tokens)
            tokens.append({**of, "token_id": token, **edge, "lift": lift, "token_entropy": entropy})
    return {
        "feature_examples": pd.DataFrame(examples),
        "feature_histogram": pd.DataFrame(histogram),
        "feature_summary": summary_of(pd.DataFrame(tokens)),
        "feature_tokens": pd.DataFrame(tokens).sort_values(
            ["layer", "feature_id", "n", "token_id"], ascending=[True, True, False, True]
        ),
    }


def publish(storage: Storage, run: SmallRun | None = None, **others: pd.DataFrame) -> Catalog:
    """Write a small run, its feature shards committed as those of dictionaries `d<layer>`, and publish it.

    Args:
        storage: Where.
        run: The run.
        others: Further tables, by name.
    """
    run = run or small_run()
    catalog = run.write(storage)
    for feature in run.features:
        made = {"dictionary": f"d{feature.layer}", "layer": feature.layer}
        commit_found(storage, feature.folder, Manifest(stage="features", inputs=made))
    tables = dict(catalog.tables)
    for name, frame in {**feature_tables(run), **others}.items():
        tables[name] = f"tables/{name}.parquet"
        storage.write_parquet(tables[name], pa.Table.from_pandas(frame, preserve_index=False))
    catalog = replace(catalog, tables=tables)
    write_catalog(storage, catalog)
    return catalog


def asked(
    storage: Storage,
    parts: Mapping[str, object] | None = None,
    values: Mapping[str, str] | None = None,
    **context: Any,
) -> Asked:
    """What a page of a published root is asked with."""
    catalog = read_catalog(storage)
    connection = connect(storage)
    add_feature_labels(connection, storage, catalog)
    return Asked(
        connection=connection,
        tables=frozenset(tables_of(connection)),
        parts={key: str(part) for key, part in (parts or {}).items()},
        values=values or {},
        root=storage.root,
        context={"storage": storage, "catalog": catalog, **context},
        brought=all_brought(),
    )


def again(asked: Asked, parts: Mapping[str, object], **values: str) -> Asked:
    """The same connection, asked for something else."""
    return replace(asked, parts={key: str(part) for key, part in parts.items()}, values=values)


def publish_losses(storage: Storage, catalog: Catalog, run: SmallRun, losses: Any) -> Catalog:
    """Publish losses of two checkpoints, `losses` those of the later one, of every token but a document's first."""
    files, done = [], 0
    for place, shard in enumerate(run.shards.shards):
        rows = run.occurrences[place][lambda rows: rows.position > 0]
        for step in (1, 20):
            own = losses[done : done + len(rows)] + (0 if step == 20 else 1)
            frame = rows.assign(loss=own, current_token_id=0)[SHARD_FILES["token_losses"].names]
            name = f"losses/{place}-{step}/token_losses.parquet"
            storage.write_parquet(
                name, pa.Table.from_pandas(frame, SHARD_FILES["token_losses"], preserve_index=False)
            )
            files.append(ShardFile(name=name, doc_offset=shard.doc_offset, model="m", step=step))
        done += len(rows)
    catalog = replace(catalog, sharded={**catalog.sharded, "token_losses": files})
    write_catalog(storage, catalog)
    return catalog
