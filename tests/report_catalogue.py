"""A small published catalogue for the report's tests: a seeded Zipf corpus and a simulated graph.

Written straight as Parquet by the schemas, without the pipeline, so that the report is tested alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from infra.catalog import Catalog, ShardFile, write_catalog
from infra.storage import Storage
from schemas.tables import SHARD_FILES, TABLES

HOSTILE = [
    " the",
    "<script>document.title='pwned'</script>",
    "\n",
    " $x^2$",
    '"><img src=x onerror=document.title="pwned">',
    " ",
    "\u202eevil\x00\x1b",
    "&amp;{{ 7*7 }}",
    " of",
    "</style>",
]
LAYERS = (3, 8, 12)
M = 20


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was published, as Python values to hold the report against."""

    storage: Storage
    tokens: list[dict[str, object]]
    coverage: dict[tuple[int, int], float]
    degrees: dict[tuple[int, int], int]


def publish(
    storage: Storage,
    *,
    graph: bool = True,
    occurrences: bool = True,
    n_documents: int = 150,
    vocabulary: int = 700,
) -> Published:
    """Publish a corpus group, and a graph group where asked; equal arguments give equal tables."""
    rng = np.random.default_rng(5)
    texts = [
        *HOSTILE,
        *(f" w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(vocabulary - len(HOSTILE))),
    ]
    weights = 1 / np.arange(1, vocabulary + 1) ** 1.05
    documents = [
        rng.choice(vocabulary, size=int(rng.integers(60, 200)), p=weights / weights.sum()).tolist()
        for _ in range(n_documents)
    ]
    for number in range(40, 45):  # one topic word that comes in a burst
        documents[number] += [300] * 25
    counts = Counter(token for document in documents for token in document)
    doc_counts = Counter(token for document in documents for token in set(document))
    total, running = sum(counts.values()), 0
    rows: list[dict[str, object]] = []
    for rank, (token, count) in enumerate(
        sorted(counts.items(), key=lambda item: (-item[1], item[0])), start=1
    ):
        is_function = running / total < 0.40
        running += count
        rows.append(
            {
                "token_id": token,
                "token": texts[token],
                "count": count,
                "doc_count": doc_counts[token],
                "doc_share": doc_counts[token] / n_documents,
                "rank": rank,
                "share": count / total,
                "cumulative_share": running / total,
                "is_function": is_function,
            }
        )
    tables: dict[str, str] = {}
    sharded: dict[str, list[ShardFile]] = {}

    def write(name: str, values: list[dict[str, object]], schema: pa.Schema | None = None) -> None:
        tables[name] = f"tables/{name}.parquet"
        storage.write_parquet(tables[name], pa.Table.from_pylist(values, schema=schema or TABLES[name]))

    write("tokens", rows)
    write(
        "rejects",
        [
            {
                "source": "data/<b>a</b>.jsonl",
                "line": 7,
                "reason": "broken JSON <script>",
                "lost_bytes": 0,
                "lost_lines": 1,
            },
            {"source": "data/b.jsonl", "line": 2, "reason": "empty text", "lost_bytes": 0, "lost_lines": 1},
            {"source": "data/b.jsonl", "line": 9, "reason": "empty text", "lost_bytes": 0, "lost_lines": 1},
        ],
    )
    write("run_info", [{"key": "model", "value": "tiny & random"}, {"key": "functok", "value": "0.1.0"}])
    write(
        "expectations",
        [
            {"stage": "tables", "expectation": "coverage ends at 1", "success": True, "observed": "1.0"},
            {"stage": "tokenize", "expectation": "ids in range", "success": False, "observed": "3 <rows>"},
        ],
        pa.schema(
            [
                ("stage", pa.string()),
                ("expectation", pa.string()),
                ("success", pa.bool_()),
                ("observed", pa.string()),
            ]
        ),
    )
    _write_shards(storage, documents, sharded, occurrences=occurrences)
    coverage: dict[tuple[int, int], float] = {}
    degrees: dict[tuple[int, int], int] = {}
    lineage = {"corpus": "c"}
    if graph:
        lineage["graph"] = "g"
        coverage, degrees = _write_graph(write, rows, rng)
    write_catalog(storage, Catalog(tables=tables, sharded=sharded, lineage=lineage))
    return Published(storage=storage, tokens=rows, coverage=coverage, degrees=degrees)


def _write_shards(
    storage: Storage, documents: list[list[int]], sharded: dict[str, list[ShardFile]], *, occurrences: bool
) -> None:
    half = len(documents) // 2
    for offset, part in ((0, documents[:half]), (half, documents[half:])):
        lengths = [
            {"doc": doc, "line": doc, "n_chars": 5 * len(tokens), "n_tokens": len(tokens)}
            for doc, tokens in enumerate(part)
        ]
        places = [
            {"doc": doc, "position": position, "token_id": token}
            for doc, tokens in enumerate(part)
            for position, token in enumerate(tokens)
        ]
        for table, values in (("documents", lengths), ("occurrences", places)):
            if table == "documents" or occurrences:
                name = f"tokens/{offset}/{table}.parquet"
                storage.write_parquet(name, pa.Table.from_pylist(values, schema=SHARD_FILES[table]))
                sharded.setdefault(table, []).append(
                    ShardFile(name=name, doc_offset=offset, source="data/b.jsonl")
                )


def _write_graph(
    write: object, rows: list[dict[str, object]], rng: np.random.Generator
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], int]]:
    assert callable(write)
    token_degree, curve, summary, dictionaries = [], [], [], []
    coverage: dict[tuple[int, int], float] = {}
    degrees: dict[tuple[int, int], int] = {}
    for layer in LAYERS:
        size = 2000 + 10 * layer
        edges: dict[int, Counter[int]] = defaultdict(Counter)
        for row in rows:
            rank, count = int(str(row["rank"])), int(str(row["count"]))
            own = rng.permutation(size)[: 60 + 1200 // rank]
            for feature in own[rng.integers(0, len(own), size=min(6 * count, 6000))].tolist():
                edges[rank][feature] = min(count, edges[rank][feature] + 1)
        reached: set[int] = set()
        activated = len({feature for found in edges.values() for feature in found})
        for row in rows:
            rank, count = int(str(row["rank"])), int(str(row["count"]))
            found = edges[rank]
            new = set(found) - reached
            reached |= new
            degrees[layer, rank] = len(found)
            coverage[layer, rank] = len(reached) / activated
            shared = {"layer": layer, "rank": rank, "token_id": row["token_id"], "token": row["token"]}
            token_degree.append(
                shared
                | {
                    "count": count,
                    "is_function": row["is_function"],
                    "degree": len(found),
                    "rarefied_degree": _rarefied(found, count) if count >= M else None,
                    "m": M,
                }
            )
            curve.append(
                shared
                | {
                    "new_features": len(new),
                    "cumulative_features": len(reached),
                    "coverage": len(reached) / activated,
                    "dictionary_coverage": len(reached) / size,
                }
            )
        summary.append(
            {
                "layer": layer,
                "dictionary_size": size,
                "activated_features": activated,
                "n_tokens": sum(int(str(row["count"])) for row in rows),
                "n_edges": sum(len(found) for found in edges.values()),
                "mean_l0": 6.0,
                "alpha": 2.25 if layer != LAYERS[-1] else None,
                "xmin": 31.0 if layer != LAYERS[-1] else None,
                "ks": 0.0431 if layer != LAYERS[-1] else None,
            }
        )
        trained = layer != LAYERS[-1]
        dictionaries.append(
            {
                "layer": layer,
                "dictionary_size": size,
                "source": f"trained here, <layer {layer}>",
                "k": 32.0 if trained else None,
                "l0": 31.7 if trained else None,
                "explained_variance": 0.791 if trained else None,
                "explained_variance_all": 0.652 if trained else None,
                "alive_share": 0.987 if trained else None,
                "heldout_tokens": 10_000.0 if trained else None,
            }
        )
    for name, values in (
        ("token_degree", token_degree),
        ("coverage", curve),
        ("graph_summary", summary),
        ("dictionaries", dictionaries),
    ):
        write(name, values)
    return coverage, degrees


def _rarefied(found: Counter[int], count: int) -> float:
    draws = math.comb(count, M)
    return sum(1 - math.comb(count - n, M) / draws for n in found.values())
