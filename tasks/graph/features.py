"""Feature shards: which there are, which are missing, and their making (PAPER 1.2).

Each layer's features of a part are a folder of their own, so changing one layer's dictionary recomputes
that layer alone, while one forward serves every layer that a part still misses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.addresses import without_credentials
from infra.cluster import available_cores
from infra.manifest import Manifest, load_all
from infra.storage import Storage, StoredFile
from schemas.errors import ExpectationError
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary, FeatureShard, GraphShard
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.tokenization import TOKENIZE, identity
from tasks.corpus.windows import ShardTokens, count_tokens
from tasks.dictionaries.dictionaries import DICTIONARIES, LayersStage
from tasks.dictionaries.residuals import (
    Residuals,
    ResidualShard,
    counted_once,
    forward_key,
    part_key,
    place_of,
)
from tasks.engine.checks import ask_of_made
from tasks.engine.offenders import Views
from tasks.engine.run import Run, make
from tasks.engine.stage import Made, Question, Shown, Unit, Written
from tasks.graph.extraction import LayerFeatures, compute_features, forget_loaded
from tasks.models.devices import device_client, settle
from tasks.models.model import model_key

VERSION = 3
_ROWS_PER_GROUP = 1 << 20
_EDGES_PER_GROUP = 1 << 17
"""Fewer, for a pass over a range of tokens reads those groups alone that hold some of them."""
# On the demo's shards of 16,384 tokens activations take 3.57 bytes a non-zero (3.87 with feature_id delta-packed, which
# Parquet readers before 2025 know too) and edges 4.55 each: token, feature and n 1.5; the maximum 2.1, which is 15 bits
# of mantissa and 2 of exponent; the sum 3.1 of those three in ten with n > 1, be it float64, int64 or less the maximum.


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureUnit(Unit):
    """One layer of one part.

    Attributes:
        part: The part.
        dictionary: The layer's.
        model_key: Key of the model that the work was planned for.
        residuals: The part's, where they are on disk.
    """

    part: GraphShard
    dictionary: Dictionary
    model_key: str
    residuals: ResidualShard | None = None


class Features(LayersStage[FeatureUnit, list[FeatureShard]]):
    """Which feature is active at which token of the graph's documents, layer by layer."""

    name = "features"
    needs = (TOKENIZE, DICTIONARIES)
    measure = "tokens, features"
    things = "feature shards"
    changed = "they are new or damaged, or their model, windows or dictionary changed"
    overlaps = True
    tops = ("features",)

    def units(self, run: Run) -> Sequence[FeatureUnit]:
        """A unit a part and layer: parts in corpus order, layers ascending."""
        config, storage = run.config, run.storage
        key_of_model = model_key(config.model, storage)
        forward = forward_key(config, key_of_model)
        dictionaries = run.result(DICTIONARIES)
        return [
            FeatureUnit(
                top="features",
                inputs={
                    "version": VERSION,
                    "part": part_key(part),
                    "layer": dictionary.layer,
                    "dictionary": dictionary.key,
                    "forward": forward,
                    "mantissa_bits": config.activations.mantissa_bits,
                },
                about=f"{part.shard.folder} ({part.n_tokens:,} tokens of {without_credentials(part.shard.source)})",
                size=part.n_tokens,
                together=(part.shard.folder, part.n_documents),
                part=part,
                dictionary=dictionary,
                model_key=key_of_model,
            )
            for part in graph_shards(config, run.result(TOKENIZE), storage)
            for dictionary in dictionaries
        ]

    def lines(self, missing: Sequence[FeatureUnit]) -> Sequence[str]:
        """A line a part, with the layers that it lacks."""
        layers: dict[str, list[str]] = {}
        for unit in missing:
            layers.setdefault(unit.about, []).append(str(unit.dictionary.layer))
        return [f"{about}: layers {', '.join(of)}" for about, of in layers.items()]

    def prepare(self, run: Run, missing: Sequence[FeatureUnit]) -> Sequence[FeatureUnit]:
        """Decide the number format, and find or make residuals on disk: one by one they would cost requests each."""
        settle(run.config.model, run.storage)
        layers = [dictionary.layer for dictionary in run.result(DICTIONARIES)]
        every = [unit.part for unit in run.find(self).units if unit.dictionary.layer == layers[0]]
        if run.config.activations.keep_dense:
            make(run, Residuals(every, layers), run.tell)
        parts = list({unit.together: unit.part for unit in missing}.values())
        there = Residuals(parts, [unit.dictionary.layer for unit in missing]).there(run)
        return [
            replace(unit, residuals=there.get(place_of(unit.part, unit.dictionary.layer)))
            for unit in counted_once(missing)
        ]

    def client(self, run: Run, groups: Sequence[Sequence[FeatureUnit]]) -> AbstractContextManager[Any]:
        """Several GPUs or a cluster: each worker makes whole parts."""
        return device_client(run.config, len(groups))

    def make(self, run: Run, group: Sequence[FeatureUnit]) -> Iterator[Made]:
        """The layers that one part lacks, by one forward.

        Raises:
            ModelError: if a layer or window does not fit the model, or a residual is not finite.
        """
        first = group[0]
        tokens, features = compute_features(
            run.config,
            run.storage,
            first.part,
            [unit.dictionary for unit in group],
            first.model_key,
            {unit.dictionary.layer: unit.residuals for unit in group if unit.residuals is not None},
        )

        write = partial(write_layers, run, group, tokens, features)
        yield Made(size=sum(unit.size for unit in group), write=write)

    def close(self) -> None:
        """Free model, tokenizer and dictionaries."""
        forget_loaded()

    def result(
        self, run: Run, units: Sequence[FeatureUnit], done: Mapping[str, Manifest]
    ) -> list[FeatureShard]:
        """All feature shards, parts in corpus order."""
        return [_feature_shard(unit, done[unit.folder]) for unit in units]

    def question(self, run: Run, result: list[FeatureShard]) -> Question:
        """The feature shards against their dictionaries and the token shards they were made from."""
        dictionaries = run.result(DICTIONARIES)
        sizes = [{"layer": entry.layer, "key": entry.key, "d_sae": entry.d_sae} for entry in dictionaries]
        d_sae = {entry.layer: entry.d_sae for entry in dictionaries}
        rows = [feature_row(feature) for feature in result]
        return Question(
            of={"shards": rows, "dictionaries": sizes},
            views=lambda: {"dictionaries": pa.Table.from_pylist(sizes)},
            folders=lambda: {
                feature.folder: stored_feature_views(feature, d_sae.get(feature.layer)) for feature in result
            },
            totals=FEATURE_TOTALS,
            rows=lambda: rows,
            manifests=lambda: load_all(run.storage, [feature.folder for feature in result]),
        )

    def shown(self, run: Run, result: list[FeatureShard]) -> Iterable[Shown]:
        """How much was extracted per layer."""
        rows: dict[int, dict[str, Any]] = {}
        for shard in result:
            row = rows.setdefault(
                shard.layer, {"layer": shard.layer, "shards": 0, "tokens": 0, "activations": 0}
            )
            row["shards"] += 1
            row["tokens"] += shard.part.n_tokens
            row["activations"] += shard.n_activations
        yield Shown(
            name="features", description="Activated features", rows=[rows[layer] for layer in sorted(rows)]
        )


FEATURES = Features()

FEATURE_TOTALS = {
    "activations": {"found_activations": "count(*)"},
    "counts": {"found_tokens": "coalesce(sum(count), 0)::BIGINT"},
}
"""What is counted in a feature shard's folder."""


def feature_views(
    folder: str, layer: int, part: GraphShard, d_sae: int | None, rows: Mapping[str, str | pa.Table]
) -> Views:
    """A feature shard's views: `activations`, `edges`, `counts`, and the `token_counts` of its token shard."""
    return Views(
        folder=folder,
        files=rows,
        columns={"folder": folder, "layer": layer, "n_documents": part.n_documents, "d_sae": d_sae},
        small=frozenset({"counts", "token_counts"}),
    )


def stored_feature_views(feature: FeatureShard, d_sae: int | None) -> Views:
    """The same of a feature shard's files."""
    rows = {file: f"{feature.folder}/{file}.parquet" for file in ("activations", "edges")}
    rows["counts"] = feature.counts_file
    rows["token_counts"] = f"{feature.part.shard.folder}/token_counts.parquet"
    return feature_views(feature.folder, feature.layer, feature.part, d_sae, rows)


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


def _feature_shard(unit: FeatureUnit, manifest: Manifest) -> FeatureShard:
    stats = manifest.stats
    return FeatureShard(
        layer=unit.dictionary.layer,
        folder=unit.folder,
        part=unit.part,
        n_activations=int(stats["n_activations"]),
        n_edges=int(stats["n_edges"]),
        scale=int(stats["scale"]),
        has_counts="counts.parquet" in manifest.files,
    )


def write_layers(
    run: Run, group: Sequence[FeatureUnit], tokens: ShardTokens, features: dict[int, LayerFeatures]
) -> Iterator[Written]:
    """Write what was found in one part, as many layers at once as there are cores; `features` is emptied."""

    def write(unit: FeatureUnit) -> Written:
        return unit, *_write_layer(run, unit, tokens, features.pop(unit.dictionary.layer))

    # Sorting, checking and compressing hold no lock of Python's.
    with ThreadPoolExecutor(min(len(group), available_cores()), "functok-layer") as pool:
        yield from pool.map(write, group)


def _write_layer(
    run: Run, unit: FeatureUnit, tokens: ShardTokens, features: LayerFeatures
) -> tuple[list[StoredFile], dict[str, Any]]:
    config, storage = run.config, run.storage
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
    if not np.isfinite(values.max(initial=0)):
        raise ExpectationError(
            f"layer {unit.dictionary.layer} has an activation that is {values.max()}, of {unit.about}",
            hint="the model or its dictionary overflows: set model.dtype = float32",
            stage="features",
        )
    edges, scale = sum_edges(token_id, features.feature, values)
    counts = count_tokens(tokens.token_id[tokens.rows])
    rows = {"activations": activations, "edges": edges, "counts": counts}
    # The shard's own counts are those of its occurrences, as the check of the tokens has asked.
    asked = ask_of_made(
        storage,
        "features",
        feature_views(
            unit.folder,
            unit.dictionary.layer,
            unit.part,
            unit.dictionary.d_sae,
            {**rows, "token_counts": tokens.whole_counts},
        ),
        FEATURE_TOTALS,
        resources=config.duckdb,
    )
    written = write_rows(storage, unit.folder, activations, edges)
    if unit.part.n_documents < unit.part.shard.n_documents:
        written.append(storage.write_parquet(f"{unit.folder}/counts.parquet", counts))
    stats = {
        "n_activations": len(features.value),
        "n_edges": edges.num_rows,
        "n_tokens": unit.part.n_tokens,
        "encoded_by": features.way,
        "scale": scale,
        **asked,
    }
    return written, stats


def write_rows(storage: Storage, folder: str, activations: pa.Table, edges: pa.Table) -> list[StoredFile]:
    """Write a feature shard's activations and edges, each column in the encoding that takes the fewest bytes."""
    return [
        storage.write_parquet(
            f"{folder}/activations.parquet",
            activations,
            row_group_size=_ROWS_PER_GROUP,
            use_dictionary=["doc", "token_id"],
            column_encoding={
                "position": "DELTA_BINARY_PACKED",
                "feature_id": "BYTE_STREAM_SPLIT",
                "activation": "BYTE_STREAM_SPLIT",
            },
        ),
        storage.write_parquet(
            f"{folder}/edges.parquet",
            edges,
            row_group_size=_EDGES_PER_GROUP,
            use_dictionary=["token_id", "n", "scale"],
            column_encoding={
                "feature_id": "BYTE_STREAM_SPLIT",
                "max_activation": "BYTE_STREAM_SPLIT",
                "sum_units": "BYTE_STREAM_SPLIT",
            },
        ),
    ]


def sum_edges(
    token_id: npt.NDArray[np.int32], feature_id: npt.NDArray[np.int32], activation: npt.NDArray[np.float32]
) -> tuple[pa.Table, int]:
    """Edges of a shard: (token, feature) pairs with what the occurrences that activated them add up to.

    Args:
        token_id: (n,) token of each activation, in any order.
        feature_id: (n,) feature of each activation.
        activation: (n,) finite, above 0.

    Returns:
        Rows sorted by (token_id, feature_id), and their `scale`: sums count units of 2^-scale. It is 32, less where an
        edge's sum would leave 63 bits. Each activation is rounded to units before it is added, so no order of addition
        can change a sum. Where n = 1, the sum is that of the maximum alone, and NULL.
    """
    from scipy.sparse import csr_array

    # Transposing a sparse matrix is a counting sort: by feature, then by token, each stable.
    rows, whole = np.arange(len(feature_id), dtype=np.int32), np.array([0, len(feature_id)], np.int32)
    n_tokens, n_features = (int(ids.max(initial=0)) + 1 for ids in (token_id, feature_id))
    by_feature = csr_array((rows, feature_id, whole), shape=(1, n_features)).tocsc()
    order = by_feature.data
    by_token = csr_array(
        (activation[order], token_id[order], by_feature.indptr), shape=(n_features, n_tokens)
    ).tocsc()
    rows_of_token, feature_id, values = np.diff(by_token.indptr), by_token.indices, by_token.data
    is_first = np.diff(feature_id, prepend=np.int32(-1)) != 0
    is_first[by_token.indptr[:-1][rows_of_token > 0]] = True
    starts = np.flatnonzero(is_first)
    n = np.diff(starts, append=len(values))
    exponent = int(np.frexp(np.add.reduceat(values, starts, dtype=np.float64).max(initial=1.0))[1])
    scale = min(32, 62 - exponent)
    # Most edges are of one activation.
    is_sum = n > 1
    summed = values[np.repeat(is_sum, n)].astype(np.float64) * math.ldexp(1.0, scale)
    units = np.zeros(len(n), np.int64)
    units[is_sum] = np.add.reduceat(np.rint(summed).astype(np.int64), np.cumsum(n[is_sum]) - n[is_sum])
    columns = [
        np.repeat(np.arange(n_tokens, dtype=np.int32), rows_of_token)[starts],
        feature_id[starts],
        n,
        np.maximum.reduceat(values, starts),
        pa.array(units, mask=~is_sum),
        np.full(len(n), scale),
    ]
    return pa.table(columns, schema=SHARD_FILES["edges"]), scale


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
