"""The tables that show one feature at a time: examples, histogram, the tokens that open it, and its logits if wanted.

They have a folder a layer, made like the edges in as many passes as `duckdb.memory_limit` wants, here over ranges of
features. What determines a folder is the layer's shards, where their documents are in the corpus, and how many examples
and bins are wanted; of the logits see `tasks.graph.logits`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.catalog import Catalog, ShardFile
from infra.duck import memory_bytes
from infra.manifest import Manifest, commit, content_key, load, load_all
from infra.progress import Progress, one_by_one, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import StorageError
from schemas.work import FeatureShard
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.run import Run
from tasks.engine.tables import TableGroup, Tables, copy_table, opened
from tasks.graph import logits
from tasks.graph.edges import id_ranges
from tasks.graph.features import FEATURES
from tasks.graph.tables import GRAPH, checked_layers, graph_inputs

VERSION = 3
"""Raise when what is in a file changes."""

MADE = ("feature_tokens", "feature_examples", "feature_histogram")
"""What each layer's folder holds, in the order in which it is made."""

SUMMARY = "feature_summary"
"""Made of the first of them."""

BYTES_PER_ROW = 100
"""Memory a pass gets for each activation: DuckDB sorts them by feature and strength."""

ROWS_PER_GROUP = 16_384
"""Rows that a reader of one feature reads at least; there are as many entries in a file's footer as groups."""


class FeatureTables(TableGroup):
    """What people look at of a feature."""

    name = "features"
    needs = (TOKENIZE, DICTIONARIES, FEATURES)

    def applies(self, config: Config) -> bool:
        """Where there is a graph."""
        return FEATURES.applies(config)

    def subject(self, config: Config) -> str:
        """The layers."""
        return f"features, {FEATURES.subject(config)}"

    def planned(self, run: Run) -> Tables | None:
        """The group as it would be published; None before its files are there."""
        features, dictionaries = run.result(FEATURES), run.result(DICTIONARIES)
        layers = checked_layers(features, dictionaries)
        folders = [(layer, _folder(run.config, layer, features)[0]) for layer in layers]
        if run.config.features.logits:
            folders += [(one.layer, logits.folder_of(run, one)[0]) for one in dictionaries]
        done = load_all(run.storage, [folder for _, folder in folders])
        if len(done) < len(folders):
            return None
        files: dict[str, list[ShardFile]] = {}
        for layer, folder in sorted(folders):
            for name in sorted(done[folder].files):
                # A table's name, then a pass'.
                table = re.split(r"[-.]", name)[0]
                files.setdefault(table, []).append(ShardFile(name=f"{folder}/{name}", layer=layer))
        parts = {"group": self.name, "folders": sorted(folder for _, folder in folders)}
        return Tables(name=self.name, key_parts=parts, sharded=files, made_by_shard=tuple(files))

    def build(self, run: Run, progress: Progress = silent) -> Tables:
        """Make what is missing, a layer at a time, after the graph that it reads.

        Raises:
            ConfigError: also if a layer has shards and no dictionary or the reverse.
            ModelError: if logits are asked for, and the model has no head.
        """
        graph = GRAPH.build(run)
        features, dictionaries = run.result(FEATURES), run.result(DICTIONARIES)
        layers = checked_layers(features, dictionaries)
        total = len(layers) * (1 + run.config.features.logits)
        advance = one_by_one(progress, total)
        progress(0, total, "feature tables")
        for layer in layers:
            own = [file for file in graph.sharded["edges"] if file.layer == layer]
            inputs = Catalog(
                tables={"token_degree": graph.tables["token_degree"]},
                sharded={"edges": own, "activations": graph_inputs(features, layer)["activations"]},
            )
            ensure_layer(run.config, run.storage, layer, features, inputs)
            advance(f"features of layer {layer}")
        if run.config.features.logits:
            logits.ensure_logits(run, ROWS_PER_GROUP, advance)
        made = self.planned(run)
        if made is None:
            raise StorageError(
                f"feature tables under {run.storage.url('tables')} vanished while they were made",
                hint="run again",
            )
        return made


FEATURE_TABLES = FeatureTables()


def ensure_layer(
    config: Config, storage: Storage, layer: int, features: Sequence[FeatureShard], inputs: Catalog
) -> None:
    """Make one layer's tables, if they are not there.

    Args:
        config: Says how many examples and bins there are; DuckDB's memory decides the number of passes, never the rows.
        storage: Where shards and tables are.
        layer: Which layer.
        features: The feature shards, of any layers.
        inputs: The layer's `edges` and `activations`, and `token_degree`.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read or written.
    """
    folder, parts = _folder(config, layer, features)
    if load(storage, folder) is not None:
        return
    resources, section = config.duckdb, config.features
    written = []
    # One connection: what it reads of small shards that lie elsewhere it reads once.
    with opened(f"the feature tables of layer {layer}", resources, storage, inputs) as connection:
        rows_per_pass = memory_bytes(resources.memory_limit) // BYTES_PER_ROW
        rows: dict[str, Any] = {"feature_id": np.empty(0, np.int32), "n": np.empty(0, np.int64)}
        if sum(feature.n_activations for feature in features if feature.layer == layer) > rows_per_pass:
            rows = connection.execute(
                "SELECT feature_id, sum(n)::BIGINT AS n FROM edges GROUP BY feature_id ORDER BY feature_id"
            ).fetchnumpy()
        ranges = id_ranges(rows["feature_id"], rows["n"], rows_per_pass)
        for table in MADE:
            for index, (first, last) in enumerate(ranges):
                written.append(
                    copy_table(
                        connection,
                        resources,
                        storage,
                        table,
                        f"{folder}/{table}-{index:04d}-of-{len(ranges):04d}.parquet",
                        f", ROW_GROUP_SIZE {ROWS_PER_GROUP}",
                        layer=layer,
                        first=first,
                        last=last,
                        top=section.top_examples,
                        of_decile=section.decile_examples,
                        bins=section.histogram_bins,
                    )
                )
    tokens = [file for file in written if file.name.startswith(f"{folder}/{MADE[0]}-")]
    told = Catalog(sharded={MADE[0]: [ShardFile(name=file.name, layer=layer) for file in tokens]})
    with opened(f"the features of layer {layer}", resources, storage, told) as connection:
        written.append(
            copy_table(connection, resources, storage, SUMMARY, f"{folder}/{SUMMARY}.parquet", layer=layer)
        )
    commit(storage, folder, Manifest(stage="tables", inputs=parts), written)


def _folder(config: Config, layer: int, features: Sequence[FeatureShard]) -> tuple[str, dict[str, Any]]:
    """The folder of one layer's tables, and what its key is made of: the shards and their places, in no order."""
    section = config.features
    parts = {
        "group": "features",
        "version": VERSION,
        "layer": layer,
        "features": sorted([f.folder, f.part.shard.doc_offset] for f in features if f.layer == layer),
        "examples": [section.top_examples, section.decile_examples],
        "bins": section.histogram_bins,
    }
    return f"tables/features-{content_key(**parts)}", parts
