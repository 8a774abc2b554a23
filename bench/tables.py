"""All tables from 100 million synthetic non-zeros, the memory that takes, and what those of single features add.

Makes shards of power-law tokens and features for three layers (kept for the next run), then builds the tables
in a fresh process: `python -m bench.tables`. Beside that, in processes of their own: a bare GROUP BY of the same rows,
the edges as they were once made, and the edges made by one Dask worker and by two.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench.common import emit, figure, memory_gb, parser, ratio, say, spread
from bench.synthetic import (
    DICTIONARY_SIZE,
    DOCUMENT,
    L0,
    LAYERS,
    TOKENS_PER_SHARD,
    VOCABULARY_SIZE,
    dictionary_of,
    draw_features,
    draw_tokens,
    places,
    whole_shard,
)
from infra.catalog import Catalog
from infra.duck import create_views, open_duckdb
from infra.manifest import Manifest, commit, content_key, load
from infra.storage import Storage
from schemas.config import Config, Dask, DuckDb
from schemas.corpus.tables import VOCABULARY
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary, FeatureShard
from tasks.engine.tables import Tables, opened
from tasks.graph.features import VERSION, sum_edges, write_rows
from tasks.graph.tables import graph_inputs

SIDES = ("build", "bare", "activations", "workers")
"""What is timed, in processes of their own."""

GROUPED_SIDES = ("bare", "activations")

GROUPED = {
    "bare": "SELECT token_id, feature_id, sum(n) AS n, max(max_activation) AS largest, sum(sum_units) AS units "
    "FROM shard_edges GROUP BY token_id, feature_id",
    "activations": """
        SELECT layer, token_id, feature_id, sum(n)::BIGINT AS n, max(activation) AS max_activation,
            sum(units)::DOUBLE / 4294967296 AS sum_activation
        FROM (
            SELECT layer, token_id, feature_id, n::BIGINT AS n, NULL::FLOAT AS activation, NULL::BIGINT AS units
            FROM shard_edges
            UNION ALL
            SELECT layer, token_id, feature_id, 0, activation, (activation::DOUBLE * 4294967296)::BIGINT
            FROM activations
        )
        GROUP BY layer, token_id, feature_id ORDER BY layer, token_id, feature_id""",
}
"""What the edges are held against, in SQL."""


def main() -> None:
    """Make the shards, build the tables in a process of its own, and print what it took."""
    arguments = parser("tables", __doc__)
    arguments.set_defaults(rounds=1)
    arguments.add_argument("--root", default="runs/bench-tables", help="where the shards are made and kept")
    arguments.add_argument("--nonzeros", type=float, default=100e6, help="activations in all")
    arguments.add_argument("--memory-limit", default=DuckDb().memory_limit, help="duckdb.memory_limit")
    arguments.add_argument("--threads", type=int, default=0, help="duckdb.threads")
    arguments.add_argument("--only", choices=SIDES, help="only build, or group, in this process")
    chosen = arguments.parse_args()
    storage = Storage(chosen.root)
    limits = DuckDb(memory_limit=chosen.memory_limit, threads=chosen.threads)
    if chosen.only == "build":
        print(json.dumps(build(storage, int(chosen.nonzeros), limits)))
        return
    if chosen.only == "workers":
        print(json.dumps(on_workers(storage, int(chosen.nonzeros), limits)))
        return
    if chosen.only:
        print(json.dumps(group(storage, int(chosen.nonzeros), limits, chosen.only)))
        return
    make_shards(storage, int(chosen.nonzeros))
    built, edge_seconds, grouped = [], [], {side: list[float]() for side in GROUPED_SIDES}
    workers: dict[str, list[float]] = {}
    for _ in range(chosen.rounds):
        storage.delete("tables")
        found = {}
        for side in SIDES:
            command = [sys.executable, "-m", "bench.tables", *sys.argv[1:], "--only", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[side] = json.loads(done.stdout)
            say(f"{side}: {found[side]['seconds']} s, {found[side]['peak_memory_gb']} GB")
        built.append(found["build"])
        of = found["build"]["seconds_of"]
        edge_seconds.append(sum(of[f"edges of layer {layer}"] for layer in LAYERS))
        for side, seconds in grouped.items():
            seconds.append(found[side]["seconds"])
        for name, value in found["workers"].items():
            workers.setdefault(name, []).append(value)
    what = f"all tables from {built[0]['nonzeros'] / 1e6:.0f} M non-zeros"
    memory = spread([entry["peak_memory_gb"] for entry in built])
    seconds = spread([entry["seconds"] for entry in built])
    added = ratio(*([entry[of] for entry in built] for of in ("feature_seconds", "graph_seconds")))
    of_stage = ratio(
        *(
            [entry[f"{of}_seconds"] + entry[f"{of}_check_seconds"] for entry in built]
            for of in ("feature", "graph")
        )
    )
    read = spread([entry["read_seconds"] for entry in built])
    figures = [
        figure(f"{what}: peak memory, GB", memory, "≤", 4),
        figure(f"{what}: seconds", seconds),
        figure(
            "edges: speed over adding up every activation",
            ratio(grouped["activations"], edge_seconds),
            "≥",
            2.5,
        ),
        figure("edges: speed over a bare GROUP BY", ratio(grouped["bare"], edge_seconds), "≥", 0.7),
        *(
            figure(
                f"edges in passes on two Dask workers of a thread each: speed over one{of}",
                ratio(workers[f"{measured} of 1"], workers[f"{measured} of 2"]),
                "≥",
                1.7,
            )
            for measured, of in (("seconds", ""), ("cpu", ", by CPU seconds of the busier"))
        ),
        figure(f"{what}, of the graph: seconds", spread([entry["graph_seconds"] for entry in built])),
        figure(
            "tables of single features, made and checked: time over the rest of the stage", of_stage, "≤", 1.5
        ),
        figure("the same, of making alone over making the others", added),
        figure("one feature's examples, histogram and tokens: seconds to read", read),
    ]
    emit("tables", {"figures": figures, "built": built})


def group(storage: Storage, nonzeros: int, limits: DuckDb, side: str) -> dict[str, float]:
    """What the edges are held against: all layers' rows grouped by one COPY each, in no order.

    Args:
        storage: Where the shards are.
        nonzeros: As many shards.
        limits: DuckDB's.
        side: `bare`: the shards' edges. `activations`: these and every activation, sorted, as edges were once made.
    """
    _, features, _ = make_shards(storage, nonzeros)
    read_once(storage, features)
    seconds = 0.0
    for layer in LAYERS:
        views = graph_inputs(features, layer)
        catalog = Catalog(sharded={view: views[view] for view in ("shard_edges", "activations")})
        with opened(side, limits, storage, catalog) as connection, tempfile.NamedTemporaryFile() as file:
            started = time.perf_counter()
            connection.execute(f"COPY ({GROUPED[side]}) TO '{file.name}' (FORMAT parquet, COMPRESSION zstd)")
            seconds += time.perf_counter() - started
    return {"seconds": round(seconds, 1), "peak_memory_gb": round(memory_gb(), 2)}


def on_workers(storage: Storage, nonzeros: int, limits: DuckDb) -> dict[str, float]:
    """The edges of all layers in passes on one Dask worker and on two, each a process with one thread of DuckDB.

    Returns:
        Seconds, and CPU seconds of the worker that had most.
    """
    from infra.cluster import _local
    from tasks.graph.edges import edge_folder, ensure_edges

    _, features, _ = make_shards(storage, nonzeros)
    read_once(storage, features)
    alone = limits.model_copy(update={"threads": 1})
    found: dict[str, float] = {}
    for n in (1, 2):
        for layer in LAYERS:
            storage.delete(edge_folder(layer, features)[0])
        with _local(n, {}) as client:
            client.run(__import__, "tasks.graph.edges")
            before, started = client.run(time.process_time), time.perf_counter()
            for layer in LAYERS:
                inputs = Catalog(sharded={"shard_edges": graph_inputs(features, layer)["shard_edges"]})
                scheduler = Dask(scheduler=client.scheduler.address)
                ensure_edges(alone, storage, layer, features, inputs, scheduler)
            found[f"seconds of {n}"] = round(time.perf_counter() - started, 2)
            after = client.run(time.process_time)
            found[f"cpu of {n}"] = round(max(after[worker] - before[worker] for worker in before), 2)
    return {**found, "seconds": found["seconds of 2"], "peak_memory_gb": round(memory_gb(), 2)}


def build(storage: Storage, nonzeros: int, limits: DuckDb) -> dict[str, object]:
    """Build the groups of tables from the shards that are there, and read those of some features."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from builders import run_of

    from tasks.corpus.tables import CorpusTables
    from tasks.corpus.tokenization import TOKENIZE
    from tasks.dictionaries.dictionaries import DICTIONARIES
    from tasks.engine.checks import check_tables
    from tasks.engine.tables import merged
    from tasks.graph.feature_tables import FEATURE_TABLES
    from tasks.graph.features import FEATURES
    from tasks.graph.tables import GRAPH

    shards, features, dictionaries = make_shards(storage, nonzeros)
    read_once(storage, features)
    config = Config.model_validate(
        {
            "corpus": {"urls": ["synthetic"]},
            "model": {"name": "synthetic"},
            "sae": [{"layer": layer, "path": "synthetic"} for layer in LAYERS],
            "duckdb": limits.model_dump(),
            "storage": {"root": storage.root},
        }
    )
    steps: dict[str, float] = {}
    last = started = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.perf_counter()
        steps[what] = round(steps.get(what, 0) + now - last, 1)
        last = now

    run = run_of(config, storage, {TOKENIZE: shards, DICTIONARIES: dictionaries, FEATURES: features})
    corpus = CorpusTables().build(run)
    graph = GRAPH.build(run, progress)
    between = time.perf_counter()
    shown = FEATURE_TABLES.build(run, progress)
    ended = time.perf_counter()
    checks = {}
    for what, groups in (("graph", [corpus, graph]), ("features", [corpus, graph, shown])):
        started_check = time.perf_counter()
        check_tables(config, storage, merged(Catalog(), *groups))
        checks[what] = time.perf_counter() - started_check
    edges = [file.name for file in graph.sharded["edges"]]
    return {
        "nonzeros": sum(feature.n_activations for feature in features),
        "feature_shards": len(features),
        "edges": count_rows(storage, edges),
        "edge_files": len(edges),
        "memory_limit": limits.memory_limit,
        "threads": limits.threads,
        "seconds": round(ended - started, 1),
        "graph_seconds": round(between - started, 3),
        "feature_seconds": round(ended - between, 3),
        "graph_check_seconds": round(checks["graph"], 3),
        "feature_check_seconds": round(checks["features"] - checks["graph"], 3),
        "read_seconds": round(read_features(storage, shown), 4),
        "peak_memory_gb": round(memory_gb(), 2),
        "seconds_of": steps,
    }


def read_once(storage: Storage, features: list[FeatureShard]) -> None:
    """Bring the shards' files into the system's cache: whichever side came first would wait for the disk."""
    for feature in features:
        for name in storage.sizes(feature.folder):
            storage.read_bytes(name)


def read_features(storage: Storage, shown: Tables) -> float:
    """Median seconds to read what is kept of one feature, of features of every frequency."""
    seconds = []
    with open_duckdb(storage) as connection:
        create_views(connection, storage, Catalog(sharded=shown.sharded))
        for feature in [n * 17 % DICTIONARY_SIZE for n in (1, 3, 10, 100, 1_000, 10_000, 100_000)] * 2:
            started = time.perf_counter()
            for table in shown.sharded:
                connection.execute(
                    f"FROM {table} WHERE layer = {LAYERS[1]} AND feature_id = {feature}"
                ).fetchall()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[len(seconds) // 2 :])


def count_rows(storage: Storage, names: list[str]) -> int:
    """Rows of Parquet files, from their footers."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(storage.full(name)).num_rows for name in names)


def make_shards(storage: Storage, nonzeros: int) -> tuple[CorpusShards, list[FeatureShard], list[Dictionary]]:
    """Shards with at least `nonzeros` activations in all; those that are there are taken as they are."""
    n_tokens = min(TOKENS_PER_SHARD, max(1, nonzeros // (L0 * len(LAYERS))))
    per_shard = n_tokens * L0 * len(LAYERS)
    shards, features = [], []
    for index in range(-(-nonzeros // per_shard)):
        rng = np.random.default_rng(index)
        token = draw_tokens(n_tokens, rng)
        folder = f"tokens/{content_key(bench='tables', shard=index, tokens=n_tokens)}"
        part = whole_shard(folder, n_tokens, index)
        if load(storage, folder) is None:
            write_token_shard(storage, folder, token)
        shards.append(part.shard)
        for layer in LAYERS:
            parts = {"version": VERSION, "shard": index, "tokens": n_tokens, "layer": layer}
            folder = f"features/{content_key(bench='tables', **parts)}"
            if load(storage, folder) is None:
                write_feature_shard(storage, folder, token, np.random.default_rng([index, layer]))
            stats = load(storage, folder).stats  # type: ignore[union-attr]  # just written
            features.append(FeatureShard(layer=layer, folder=folder, part=part, **stats))
    vocabulary = "vocabulary.parquet"
    ids = np.arange(VOCABULARY_SIZE)
    storage.write_parquet(vocabulary, pa.table([ids, ids.astype(str)], schema=VOCABULARY))
    corpus = CorpusShards(shards=tuple(shards), tokenizer_key="synthetic", vocabulary=vocabulary)
    return corpus, features, [dictionary_of(layer) for layer in LAYERS]


def write_token_shard(storage: Storage, folder: str, token: np.ndarray) -> None:
    """One shard of documents of equal length."""
    doc, position = places(len(token))
    lengths = np.bincount(doc)
    seen, counts = np.unique(token, return_counts=True)
    pairs = np.unique(doc * VOCABULARY_SIZE + token)
    doc_counts = np.bincount(pairs % VOCABULARY_SIZE, minlength=VOCABULARY_SIZE)[seen]
    numbers = np.arange(len(lengths))
    files = {
        "documents": [numbers, numbers, lengths * 4, lengths],
        "rejects": [np.empty(0, np.int64), np.empty(0, str), *[np.empty(0, np.int64)] * 2],
        "token_counts": [seen, counts, doc_counts],
        "occurrences": [doc, position, token],
    }
    written = [
        storage.write_parquet(f"{folder}/{name}.parquet", pa.table(columns, schema=SHARD_FILES[name]))
        for name, columns in files.items()
    ]
    commit(storage, folder, Manifest(stage="bench", inputs={}), written)


def write_feature_shard(storage: Storage, folder: str, token: np.ndarray, rng: np.random.Generator) -> None:
    """A layer's features of these tokens, in documents of equal length."""
    row, feature, value = draw_features(token, rng)
    columns = [row // DOCUMENT, row % DOCUMENT, token[row], feature, value]
    activations = pa.table(columns, schema=SHARD_FILES["activations"])
    edges, scale = sum_edges(token[row], feature, value)
    counts = pa.table([*np.unique(token, return_counts=True)], schema=SHARD_FILES["counts"])
    written = [
        *write_rows(storage, folder, activations, edges),
        storage.write_parquet(f"{folder}/counts.parquet", counts),
    ]
    stats = {"n_activations": len(row), "n_edges": edges.num_rows, "scale": scale}
    commit(storage, folder, Manifest(stage="bench", inputs={}, stats=stats), written)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
