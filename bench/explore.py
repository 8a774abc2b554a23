"""How fast the explorer's pages answer, on a local root of 100 million synthetic activations.

Publishes the tables of the shards of `bench.tables` (made and kept under `--root`), then builds every page as the
server does, warm, each on a connection that it keeps: `python -m bench.explore`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.tables import LAYERS, make_shards
from infra.storage import Storage
from schemas.config import Config


def publish_root(storage: Storage, activations: int) -> None:
    """Publish the tables of a corpus and a graph of so many activations; what is there is taken as it is."""
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


if __name__ == "__main__":
    publish_root(Storage(sys.argv[1]), 100_000_000)
