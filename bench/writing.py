"""Writing what was found in a part: edges, checks, Parquet, manifests left out; in turns with how it was once done.

Features of power-law tokens and features, as `bench.tables` has them, for three layers of one part.

- `ours`: `write_layers`, as the stage `features` calls it: layers at once, as many as there are cores.
- `one_core`: the same, one layer after another.
- `sorted_pairs`: how it was until the edges carried sums: `np.unique` of 64-bit pairs, and a check that groups all
  activations by edge once more; one layer after another.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from bench.common import Side, alternate, emit, figure, parser, ratio, spread
from bench.synthetic import (
    DICTIONARY_SIZE,
    LAYERS,
    TOKENS_PER_SHARD,
    dictionary_of,
    draw_features,
    draw_tokens,
    places,
    whole_shard,
)
from infra.duck import open_duckdb
from infra.storage import Storage
from schemas.config import Config, DuckDb
from schemas.expectation import Query, differ
from schemas.expectations import SUITES
from schemas.tables import SHARD_FILES
from tasks.corpus.windows import ShardTokens, count_tokens
from tasks.engine.offenders import find_in_units
from tasks.engine.run import Run
from tasks.graph.extraction import LayerFeatures
from tasks.graph.features import FEATURE_TOTALS, FeatureUnit, feature_views, write_layers, write_rows

GROUPED = "edges.n = activations grouped"
KEYS = "folder, layer, token_id, feature_id"
BY_EDGE = differ(
    f"SELECT {KEYS}, count(*) AS n FROM activations GROUP BY ALL", f"SELECT {KEYS}, n FROM edges", KEYS, "n"
)


def main() -> None:
    """Draw the features, write them in turns, and print what it took."""
    arguments = parser("writing", __doc__)
    arguments.add_argument("--tokens", type=int, default=TOKENS_PER_SHARD, help="tokens of the part")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
        emit("writing", measure(chosen.tokens, chosen.rounds, root))


def measure(n_tokens: int, rounds: int, root: str) -> dict[str, Any]:
    """Write the same features in turns; everything is written under `root`."""
    rng, storage = np.random.default_rng(0), Storage(root)
    doc, position = places(n_tokens)
    tokens = ShardTokens(
        doc=doc.astype(np.int32),
        position=position.astype(np.int32),
        token_id=draw_tokens(n_tokens, rng),
        is_special=np.zeros(n_tokens, bool),
    )
    tokens = replace(tokens, whole_counts=count_tokens(tokens.token_id))
    part = whole_shard("t", n_tokens)
    found, group = {}, []
    for layer in LAYERS:
        of, feature, value = draw_features(tokens.token_id, rng)
        found[layer] = LayerFeatures(token=of, feature=feature, value=value, way="float32")
        group.append(
            FeatureUnit(
                top="features",
                inputs={"layer": layer},
                about=f"layer {layer}",
                part=part,
                dictionary=dictionary_of(layer),
                model_key="m",
            )
        )
    config = Config.model_validate(
        {
            "corpus": {"urls": ["synthetic"]},
            "model": {"name": "synthetic"},
            "sae": [{"layer": layer, "path": "synthetic"} for layer in LAYERS],
            "storage": {"root": root},
        }
    )
    run, written = Run(config, storage), list[Any]()

    def ours() -> None:
        written[:] = write_layers(run, group, tokens, dict(found))

    def one_core() -> None:
        for unit in group:
            list(write_layers(run, [unit], tokens, dict(found)))

    def sorted_pairs() -> None:
        for unit in group:
            write_sorted_pairs(storage, unit, tokens, found[unit.dictionary.layer])

    sides = [Side(name=side.__name__, run=side) for side in (ours, one_core, sorted_pairs)]
    cpu: dict[str, list[float]] = {}
    seconds = alternate(sides, rounds, cpu)
    nonzeros = sum(len(of.value) for of in found.values())
    edges = sum(stats["n_edges"] for _, _, stats in written)
    sizes = np.sum([[file.size for file in files[:2]] for _, files, _ in written], axis=0)
    return {
        "limits": "One core's sorts, hashes and zstd; the disk is cached.",
        "figures": [
            figure(
                "writing on one core: speed over sorting pairs and grouping by edge",
                ratio(cpu["sorted_pairs"], cpu["one_core"]),
                "≥",
                1.5,
            ),
            figure(
                "writing: speed of layers at once over one after another",
                ratio(seconds["one_core"], seconds["ours"]),
            ),
            *(
                figure(
                    f"writing, {name}: M non-zeros a CPU second",
                    spread([nonzeros / s / 1e6 for s in cpu[name]]),
                )
                for name in cpu
            ),
            figure("synthetic activations: bytes a non-zero", spread([sizes[0] / nonzeros])),
            figure("synthetic edges: bytes an edge", spread([sizes[1] / edges])),
        ],
        "nonzeros": nonzeros,
        "edges": edges,
    }


def write_sorted_pairs(
    storage: Storage, unit: FeatureUnit, tokens: ShardTokens, features: LayerFeatures
) -> None:
    """One layer, as it was written before."""
    token_id = tokens.token_id[features.token]
    columns = [
        tokens.doc[features.token],
        tokens.position[features.token],
        token_id,
        features.feature,
        features.value,
    ]
    activations = pa.table(columns, schema=SHARD_FILES["activations"])
    pairs, n = np.unique(token_id.astype(np.int64) * DICTIONARY_SIZE + features.feature, return_counts=True)
    schema = pa.schema([SHARD_FILES["edges"].field(name) for name in ("token_id", "feature_id", "n")])
    edges = pa.table([pairs // DICTIONARY_SIZE, pairs % DICTIONARY_SIZE, n], schema=schema)
    counts = count_tokens(tokens.token_id)
    views = feature_views(
        unit.folder,
        unit.dictionary.layer,
        unit.part,
        DICTIONARY_SIZE,
        {"activations": activations, "edges": edges, "counts": counts, "token_counts": tokens.whole_counts},
    )
    asked = [
        replace(entry, offenders=BY_EDGE) if isinstance(entry, Query) and entry.name == GROUPED else entry
        for entry in SUITES["features"]
        if entry.shard and entry.name != "edges are possible"
    ]
    with open_duckdb(storage, DuckDb(threads=1)) as connection:
        find_in_units(connection, storage, asked, [views], FEATURE_TOTALS, set(), threads=1)
    write_rows(storage, f"old-{unit.folder}", activations, edges)


if __name__ == "__main__":
    main()
