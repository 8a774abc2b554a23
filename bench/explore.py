"""How fast the explorer's pages answer, on a local root of 100 million synthetic activations.

Publishes the tables of the shards of `bench.tables` (made once under `--root`, and kept), then asks the server for
every kind of page, in turns, once without counting it: `python -m bench.explore`.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import emit, figure, parser, say, spread
from bench.synthetic import LAYERS
from bench.tables import make_shards
from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config

TARGET = 2
"""Seconds a page may take (median)."""


def main() -> None:
    """Make and publish the tables, where they are missing; ask for the pages, and print how long they took."""
    arguments = parser("explore", __doc__)
    arguments.add_argument("--root", default="runs/bench-tables", help="where shards and tables are kept")
    arguments.add_argument("--activations", type=float, default=100e6, help="activations in all")
    chosen = arguments.parse_args()
    storage = Storage(chosen.root)
    publish_root(storage, int(chosen.activations))
    with connect(storage) as connection:
        n_edges, n_nonzeros = connection.execute(
            "SELECT sum(n_edges), sum(mean_l0 * n_tokens) FROM graph_summary"
        ).fetchone()
        pages = addresses(connection)
    seconds, cpu = ask(storage, pages, chosen.rounds)
    found = [figure(f"explore: seconds of {page}", spread(seconds[page]), "≤", TARGET) for page in pages]
    emit(
        "explore",
        {
            "figures": found,
            "cpu_seconds": {page: spread(cpu[page]) for page in pages},
            "limits": "DuckDB's scans of one layer's edges and activations: memory and cores; the disk is cached.",
            "input": {"activations": round(n_nonzeros), "edges": int(n_edges), "addresses": pages},
        },
    )


def publish_root(storage: Storage, activations: int) -> None:
    """Publish the tables of a corpus and a graph of so many activations; those that are there are not made again."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from builders import run_of

    from tasks.corpus.tokenization import TOKENIZE
    from tasks.dictionaries.dictionaries import DICTIONARIES
    from tasks.engine.tables import candidate, publish
    from tasks.graph.features import FEATURES
    from tasks.stages import table_groups

    shards, features, dictionaries = make_shards(storage, activations)
    config = Config.model_validate(
        {
            "corpus": {"urls": ["synthetic"]},
            "model": {"name": "synthetic"},
            "sae": [{"layer": layer, "path": "synthetic"} for layer in LAYERS],
            "storage": {"root": storage.root},
        }
    )
    run = run_of(config, storage, {TOKENIZE: shards, DICTIONARIES: dictionaries, FEATURES: features})
    publish(storage, candidate(storage, [group.build(run) for group in table_groups(config)]))


def addresses(connection: Any) -> dict[str, str]:
    """Kind of page to an address: of tokens and features that open much, where pages have most to read."""

    def first(sql: str) -> Any:
        return connection.execute(sql).fetchone()[0]

    layer = first("SELECT min(layer) FROM graph_summary")
    most, middling = (first(f"SELECT token_id FROM tokens WHERE rank = {rank}") for rank in (1, 50))
    document = first("SELECT max(doc_id) // 2 FROM documents")
    ranks = min(1000, first("SELECT max(rank) FROM token_degree"))
    dense, usual = (
        first(f"SELECT feature_id FROM feature_degree WHERE layer = {layer} ORDER BY {order} LIMIT 1")
        for order in ("n DESC, feature_id", "abs(degree - 100), feature_id")
    )
    return {
        "overview": "/",
        "tokens": "/tokens",
        "tokens, by degree": f"/tokens?tokens.sort=-degree_{layer}",
        "search": "/search?q=7",
        "the most frequent token": f"/token/{most}?layer={layer}",
        "a token of rank 50": f"/token/{middling}?layer={layer}",
        "coverage by one token": f"/cover?layer={layer}&tokens={middling}",
        "coverage by 1,000 tokens": f"/cover?layer={layer}&rank={ranks}",
        "features": f"/features?layer={layer}",
        "the densest feature": f"/feature/{layer}/{dense}",
        "a feature of 100 tokens": f"/feature/{layer}/{usual}",
        "text": f"/text/{document}?layer={layer}",
    }


def ask(
    storage: Storage, pages: dict[str, str], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each page on the clock, and of all threads, which a busy machine disturbs less; in turns.

    Raises:
        SystemExit: if a page cannot be shown.
    """
    from fastapi.testclient import TestClient

    from functok.explorer.app import build_app

    seconds: dict[str, list[float]] = {page: [] for page in pages}
    cpu: dict[str, list[float]] = {page: [] for page in pages}
    with TestClient(build_app(storage), base_url="http://127.0.0.1") as client:
        for turn in range(rounds + 1):
            for page, address in pages.items():
                started, started_cpu = time.perf_counter(), time.process_time()
                answered = client.get(address)
                if answered.status_code != 200:
                    raise SystemExit(f"{address} answered {answered.status_code}: {answered.text[:2000]}")
                if turn:
                    seconds[page].append(time.perf_counter() - started)
                    cpu[page].append(time.process_time() - started_cpu)
    for page, took in seconds.items():
        say(f"{statistics.median(took):6.3f} s, {statistics.median(cpu[page]):6.3f} s of CPU  {page}")
    return seconds, cpu


if __name__ == "__main__":
    main()
