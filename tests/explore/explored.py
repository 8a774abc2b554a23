"""A small published run as the explorer's pages see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from builders import commit_found
from small_run import SmallRun, small_run

from infra.duck import CATALOG, Catalog, connect, read_catalog
from infra.manifest import Manifest
from infra.storage import Storage
from tasks.explore.labels import add_feature_labels
from tasks.explore.vocabulary import Asked
from tasks.report.queries import tables_of


def publish(storage: Storage, run: SmallRun | None = None) -> Catalog:
    """Write a small run, its feature shards committed as those of dictionaries `d<layer>`, and publish it."""
    run = run or small_run()
    catalog = run.write(storage)
    for feature in run.features:
        made = {"dictionary": f"d{feature.layer}", "layer": feature.layer}
        commit_found(storage, feature.folder, Manifest(stage="features", inputs=made))
    storage.write_json(CATALOG, catalog.to_json())
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
    )


def again(asked: Asked, parts: Mapping[str, object], **values: str) -> Asked:
    """The same connection, asked for something else."""
    return replace(asked, parts={key: str(part) for key, part in parts.items()}, values=values)
