"""Feature shards: which there are, which are missing, and their making (PAPER 1.2).

Each layer's features of a part are a folder of their own, so changing one layer's dictionary recomputes
that layer alone, while one forward serves every layer that a part still misses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.cluster import extraction_client, one_at_a_time
from infra.manifest import Manifest, commit, content_key, load_all, remember
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary, FeatureShard, GraphShard
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.windows import ShardTokens, count_tokens
from tasks.dictionaries.residuals import (
    Place,
    ResidualShard,
    find_residuals,
    forward_key,
    part_key,
    place_of,
    write_residuals,
)
from tasks.engine.shard_checks import FEATURE_TOTALS, ask_of_made, feature_unit
from tasks.graph.extraction import LayerFeatures, compute_features, forget_loaded
from tasks.models.devices import settle, usable_devices
from tasks.models.model import model_key

VERSION = 1
_ROWS_PER_GROUP = 1 << 20
# On the demo's shards of 16,384 tokens byte streams take 3.56 bytes a non-zero and 1.43 an edge; with
# feature_id delta-packed, which Parquet readers before 2025 know too, it is 3.87 and 1.66.


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One layer of one part: a feature folder to make or to find."""

    part: GraphShard
    dictionary: Dictionary
    model_key: str
    inputs: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"features/{content_key(**self.inputs)}"


def _units(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: Sequence[Dictionary]
) -> list[_Unit]:
    key_of_model = model_key(config.model, storage)
    forward = forward_key(config, key_of_model)
    return [
        _Unit(
            part=part,
            dictionary=dictionary,
            model_key=key_of_model,
            inputs={
                "version": VERSION,
                "part": part_key(part),
                "layer": dictionary.layer,
                "dictionary": dictionary.key,
                "forward": forward,
                "mantissa_bits": config.activations.mantissa_bits,
            },
        )
        for part in graph_shards(config, shards, storage)
        for dictionary in sorted(dictionaries, key=lambda entry: entry.layer)
    ]


@dataclass(frozen=True, kw_only=True)
class FoundFeatures:
    """What is there of a graph's features.

    Attributes:
        done: How many feature shards.
        missing: The layers that each part still misses.
        shards: All of them, parts in corpus order; None where any is missing.
    """

    done: int
    missing: dict[GraphShard, list[int]]
    shards: list[FeatureShard] | None


def find_features(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: Sequence[Dictionary]
) -> FoundFeatures:
    """What is there of the graph's features."""
    units = _units(config, storage, shards, dictionaries)
    done = load_all(storage, [unit.folder for unit in units])
    missing: dict[GraphShard, list[int]] = {}
    for unit in units:
        if unit.folder not in done:
            missing.setdefault(unit.part, []).append(unit.dictionary.layer)
    found = None if missing else [_feature_shard(unit, done[unit.folder]) for unit in units]
    return FoundFeatures(done=len(done), missing=missing, shards=found)


def find_feature_shards(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: Sequence[Dictionary]
) -> list[FeatureShard] | None:
    """All feature shards of the graph, parts in corpus order, or None if any is missing."""
    return find_features(config, storage, shards, dictionaries).shards


def _feature_shard(unit: _Unit, manifest: Manifest) -> FeatureShard:
    stats = manifest.stats
    has_extent = "max_activation" in stats
    return FeatureShard(
        layer=unit.dictionary.layer,
        folder=unit.folder,
        part=unit.part,
        n_activations=int(stats["n_activations"]),
        n_edges=int(stats["n_edges"]) if has_extent else None,
        max_activation=stats["max_activation"] if has_extent else None,
        has_counts="counts.parquet" in manifest.files,
    )


def extract_features(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    dictionaries: Sequence[Dictionary],
    progress: Progress = silent,
) -> list[FeatureShard]:
    """Make what is missing of the graph's features.

    On one device the parts are made here, one after another; with several GPUs or a Dask scheduler
    (`dask.scheduler`), each worker makes whole parts.

    Raises:
        ModelError: if a layer or window does not fit the model, or a residual is not finite.
    """
    settle(config.model, storage)
    if config.activations.keep_dense:
        layers = [dictionary.layer for dictionary in dictionaries]
        write_residuals(config, storage, graph_shards(config, shards, storage), layers, progress)
    units = _units(config, storage, shards, dictionaries)
    done = load_all(storage, [unit.folder for unit in units])
    # Files of equal content share shards: each folder is made once, however often it stands in the corpus.
    missing: dict[tuple[str, int], list[_Unit]] = {}
    for folder, unit in {unit.folder: unit for unit in units}.items():
        if folder not in done:
            missing.setdefault((unit.part.shard.folder, unit.part.n_documents), []).append(unit)
    total = sum(group[0].part.n_tokens for group in missing.values())
    seen = 0
    if missing:
        progress(0, total, "tokens, features")
        with extraction_client(config.dask, partial(usable_devices, config.model), len(missing)) as client:
            jobs = _jobs(config, storage, list(missing.values()))
            made = (
                _make_here(config, storage, jobs)
                if client is None
                else _make_on(client, config, storage, jobs)
            )
            manifests: dict[str, Manifest] = {}
            for part, of_part in made:
                manifests |= of_part
                seen += part.n_tokens
                progress(seen, total, "tokens, features")
        forget_loaded()
        remember(storage, manifests)
    found = find_feature_shards(config, storage, shards, dictionaries)
    if found is None:
        raise FunctokError("feature shards vanished while they were made", stage="features", hint="run again")
    return found


Made = tuple[GraphShard, dict[str, Manifest]]
"""A part whose layers are made, and the manifests of their folders."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one part still misses."""

    units: list[_Unit]
    on_disk: dict[Place, ResidualShard]

    @property
    def part(self) -> GraphShard:
        return self.units[0].part


def _jobs(config: Config, storage: Storage, groups: Sequence[list[_Unit]]) -> list[_Job]:
    parts = [group[0].part for group in groups]
    layers = sorted({unit.dictionary.layer for group in groups for unit in group})
    # Asked for all parts together: each would cost requests of its own.
    found = find_residuals(config, storage, parts, layers)
    return [
        _Job(
            units=group,
            on_disk={
                place: found[place]
                for place in (place_of(unit.part, unit.dictionary.layer) for unit in group)
                if place in found
            },
        )
        for group in groups
    ]


def _make_here(config: Config, storage: Storage, jobs: Sequence[_Job]) -> Iterator[Made]:
    # Writing a part overlaps the next part's forward; at most one part waits to be written.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="functok-write") as writer:
        pending: tuple[GraphShard, Future[dict[str, Manifest]]] | None = None
        for job in jobs:
            tokens, features = _compute(config, storage, job)
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = job.part, writer.submit(_write_part, config, storage, job, tokens, features)
        if pending is not None:
            yield pending[0], pending[1].result()


@one_at_a_time
def _make_part(config: Config, storage: Storage, job: _Job) -> Made:
    tokens, features = _compute(config, storage, job)
    return job.part, _write_part(config, storage, job, tokens, features)


def _compute(config: Config, storage: Storage, job: _Job) -> tuple[ShardTokens, dict[int, LayerFeatures]]:
    dictionaries = [unit.dictionary for unit in job.units]
    key_of_model = job.units[0].model_key
    return compute_features(config, storage, job.part, dictionaries, key_of_model, job.on_disk)


def _make_on(client: Any, config: Config, storage: Storage, jobs: Sequence[_Job]) -> Iterator[Made]:
    from distributed import as_completed

    for future in as_completed([client.submit(_make_part, config, storage, job, pure=False) for job in jobs]):
        yield future.result()


def _write_part(
    config: Config, storage: Storage, job: _Job, tokens: ShardTokens, features: dict[int, LayerFeatures]
) -> dict[str, Manifest]:
    return {
        unit.folder: _write_layer(config, storage, unit, tokens, features.pop(unit.dictionary.layer))
        for unit in job.units
    }


def _write_layer(
    config: Config, storage: Storage, unit: _Unit, tokens: ShardTokens, features: LayerFeatures
) -> Manifest:
    token_id = tokens.token_id[features.token]
    values = round_mantissa(features.value, config.activations.mantissa_bits)
    activations = pa.table(
        [
            tokens.doc[features.token],
            tokens.position[features.token],
            token_id,
            features.feature,
            values,
        ],
        schema=SHARD_FILES["activations"],
    )
    edges = count_edges(token_id, features.feature, unit.dictionary.d_sae)
    counts = count_tokens(tokens.token_id[tokens.rows])
    rows = {"activations": activations, "edges": edges, "counts": counts}
    # The shard's own counts are those of its occurrences, as the check of the tokens has asked.
    asked = ask_of_made(
        storage,
        "features",
        feature_unit(
            unit.folder,
            unit.dictionary.layer,
            unit.part,
            unit.dictionary.d_sae,
            {**rows, "token_counts": tokens.whole_counts},
        ),
        FEATURE_TOTALS,
        resources=config.duckdb,
    )
    written_activations = storage.write_parquet(
        f"{unit.folder}/activations.parquet",
        activations,
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=["doc", "token_id"],
        column_encoding={
            "position": "DELTA_BINARY_PACKED",
            "feature_id": "BYTE_STREAM_SPLIT",
            "activation": "BYTE_STREAM_SPLIT",
        },
    )
    written_edges = storage.write_parquet(
        f"{unit.folder}/edges.parquet",
        edges,
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=["token_id", "n"],
        column_encoding={"feature_id": "BYTE_STREAM_SPLIT"},
        compression_level=9,
    )
    written = [written_activations, written_edges]
    if unit.part.n_documents < unit.part.shard.n_documents:
        written.append(storage.write_parquet(f"{unit.folder}/counts.parquet", counts))
    stats = {
        "n_activations": len(features.value),
        "n_edges": edges.num_rows,
        "n_tokens": unit.part.n_tokens,
        "max_activation": float(values.max()) if len(values) else None,
        **asked,
    }
    manifest = Manifest(stage="features", inputs=unit.inputs, stats=stats)
    return commit(storage, unit.folder, manifest, written)


def count_edges(token_id: npt.NDArray[np.int32], feature_id: npt.NDArray[np.int32], d_sae: int) -> pa.Table:
    """Edges of a shard: (token, feature) pairs with the number of occurrences that activated them.

    Args:
        token_id: (n,) token of each activation.
        feature_id: (n,) feature of each activation.
        d_sae: Dictionary size.

    Returns:
        Rows sorted by (token_id, feature_id).
    """
    pairs, n = np.unique(token_id.astype(np.int64) * d_sae + feature_id, return_counts=True)
    return pa.table([pairs // d_sae, pairs % d_sae, n], schema=SHARD_FILES["edges"])


def round_mantissa(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Round to `bits` explicit mantissa bits, ties to even; the sign of a value never changes.

    With 15 bits the last byte of a stored activation is zero, which brings a non-zero under 4 bytes at a
    relative error of at most 2^-16.
    """
    dropped = 23 - bits
    if dropped == 0:
        return values
    raw = values.view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1) + ((raw >> np.uint32(dropped)) & np.uint32(1))
    return (((raw + half) >> np.uint32(dropped)) << np.uint32(dropped)).view(np.float32)
