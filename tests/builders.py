"""Committed shards made from plain Python values, without a tokenizer, a model or a dictionary, and runs of them."""

from __future__ import annotations

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra.catalog import Catalog
from infra.manifest import MANIFEST, Manifest, commit, content_key, load, manifests_of
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.corpus.tables import VOCABULARY
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary, FeatureShard, GraphShard, TokenShard
from tasks.engine.run import Found, Run
from tasks.engine.stage import Stage
from tasks.engine.tables import TableGroup, candidate
from tasks.graph.features import sum_edges

Active = dict[int, float]
"""What one occurrence activates: feature id to activation."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document: its tokens, and for each layer what each of them activates."""

    tokens: list[int]
    active: dict[int, list[Active]]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One token shard: documents of one source, and how many of them are in the graph."""

    source: str
    documents: list[Document]
    in_graph: int


def random_documents(
    seed: int, n: int, *, layers: Sequence[int] = (1, 4), vocabulary: int = 23, features: int = 40
) -> list[Document]:
    """Documents of 0 to 29 tokens of skewed frequency; some occurrences activate nothing."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(vocabulary)]
    documents = []
    for _ in range(n):
        tokens = rng.choices(range(vocabulary), weights, k=rng.randrange(30))
        active = {
            layer: [
                {
                    min(features - 1, int(features ** rng.random()) - 1 + token % 3): _activation(rng)
                    for _ in range(rng.randrange(5))
                }
                for token in tokens
            ]
            for layer in layers
        }
        documents.append(Document(tokens=tokens, active=active))
    return documents


def make_config(storage: Storage, layers: Sequence[int] = (1, 4), **sections: dict[str, object]) -> Config:
    """A configuration that fits the shards of this module."""
    values: dict[str, object] = {
        "corpus": {"urls": ["a.jsonl"]},
        "model": {"name": "tiny"},
        "sae": [{"layer": layer, "path": f"sae-{layer}"} for layer in layers],
        "graph": {"rarefaction_m": 5},
        "storage": {"root": storage.root},
        **sections,
    }
    return Config.model_validate(values)


class GivenRun(Run):
    """A run of which some stages are finished: what they made is given, and not looked for. On a worker too."""

    def __init__(self, config: Config, storage: Storage, given: Mapping[Stage[Any, Any], Any]) -> None:
        super().__init__(config, storage)
        self._given = {stage.name: result for stage, result in given.items()}

    def find(self, stage: Stage[Any, Any]) -> Found[Any]:
        """Nothing is missing of what is given."""
        return Found(units=(), done={}) if stage.name in self._given else super().find(stage)

    def is_finished(self, stage: Stage[Any, Any]) -> bool:
        """What is given is finished, whatever it needs."""
        return stage.name in self._given or super().is_finished(stage)

    def result(self, stage: Stage[Any, Any]) -> Any:
        """What is given, or else what is found."""
        return self._given[stage.name] if stage.name in self._given else super().result(stage)


def run_of(config: Config, storage: Storage, given: Mapping[Stage[Any, Any], Any]) -> GivenRun:
    """A run whose results of some stages are given: `run_of(config, storage, {TOKENIZE: shards})`.

    Args:
        config: The configuration.
        storage: Where the run and the given shards are.
        given: Stage to what it made; what such a stage needs is not asked for.
    """
    return GivenRun(config, storage, given)


def build(run: Run, *groups: TableGroup) -> Catalog:
    """The catalogue that publishing these groups of a run would leave."""
    return candidate(run.storage, [group.build(run) for group in groups])


def write_corpus(storage: Storage, cuts: Sequence[Cut], vocabulary: int = 23, seed: int = 0) -> CorpusShards:
    """Commit token shards; rows of a file that has no order of its own come in one chosen by `seed`."""
    rng = random.Random(seed)
    shards, offset = [], 0
    for cut in cuts:
        documents, counts, doc_counts, occurrences = [], Counter[int](), Counter[int](), []
        for doc, document in enumerate(cut.documents):
            documents.append(
                {
                    "doc": doc,
                    "line": doc,
                    "n_chars": 3 * len(document.tokens),
                    "n_tokens": len(document.tokens),
                }
            )
            counts.update(document.tokens)
            doc_counts.update(set(document.tokens))
            occurrences += [
                {"doc": doc, "position": position, "token_id": token}
                for position, token in enumerate(document.tokens)
            ]
        rows = {
            "documents": documents,
            "rejects": [{"line": 99, "reason": "empty", "lost_bytes": 0, "lost_lines": 1}],
            "token_counts": [
                {"token_id": t, "count": n, "doc_count": doc_counts[t]} for t, n in counts.items()
            ],
            "occurrences": occurrences,
            "specials": [],
        }
        rng.shuffle(rows["token_counts"])
        folder = f"tokens/{content_key(documents=[[d.tokens, d.active] for d in cut.documents])}"
        _write(storage, folder, rows)
        shards.append(
            TokenShard(
                folder=folder,
                source=cut.source,
                doc_offset=offset,
                n_documents=len(documents),
                n_tokens=len(occurrences),
                n_rejects=1,
            )
        )
        offset += len(documents)
    words = [{"token_id": token, "token": token_text(token)} for token in range(vocabulary)]
    storage.write_parquet("vocabulary.parquet", pa.Table.from_pylist(words, schema=VOCABULARY))
    return CorpusShards(shards=tuple(shards), tokenizer_key="t", vocabulary="vocabulary.parquet")


def write_features(
    storage: Storage,
    cuts: Sequence[Cut],
    shards: CorpusShards,
    dictionaries: Sequence[Dictionary],
    seed: int = 0,
) -> list[FeatureShard]:
    """Commit feature shards of the documents that are in the graph, rows in an order chosen by `seed`."""
    rng = random.Random(seed)
    made = []
    for dictionary in dictionaries:
        for cut, shard in zip(cuts, shards.shards, strict=True):
            documents = cut.documents[: cut.in_graph]
            if not documents:
                continue
            activations = [
                {
                    "doc": doc,
                    "position": position,
                    "token_id": token,
                    "feature_id": feature,
                    "activation": value,
                }
                for doc, document in enumerate(documents)
                for position, token in enumerate(document.tokens)
                for feature, value in document.active[dictionary.layer][position].items()
            ]
            edges, scale = edges_of(activations)
            counts = Counter(token for document in documents for token in document.tokens)
            rows = {
                "activations": activations,
                "edges": edges.to_pylist(),
                "counts": [{"token_id": t, "count": n} for t, n in counts.items()],
            }
            for table in rows.values():
                rng.shuffle(table)
            folder = f"features/{content_key(shard=shard.folder, n=cut.in_graph, dictionary=dictionary.key)}"
            _write(storage, folder, rows)
            part = GraphShard(shard=shard, n_documents=len(documents), n_tokens=counts.total())
            made.append(
                FeatureShard(
                    layer=dictionary.layer,
                    folder=folder,
                    part=part,
                    n_activations=len(activations),
                    n_edges=edges.num_rows,
                    scale=scale,
                )
            )
    rng.shuffle(made)
    return made


def edges_of(activations: Sequence[Mapping[str, Any]]) -> tuple[pa.Table, int]:
    """The edges of a shard's activations, and their scale."""
    rows = pa.Table.from_pylist(list(activations), schema=SHARD_FILES["activations"])
    return sum_edges(*(rows[name].to_numpy() for name in ("token_id", "feature_id", "activation")))


def make_dictionary(
    layer: int, d_sae: int = 64, key: str = "k", quality: dict[str, float] | None = None
) -> Dictionary:
    """A dictionary that no file belongs to: the tables read its size alone."""
    return Dictionary(
        layer=layer,
        folder=f"dictionaries/{key}{layer}",
        key=f"{key}{layer}",
        d_sae=d_sae,
        source="test",
        quality=quality,
    )


def token_text(token: int) -> str:
    """What the vocabulary says of a token."""
    return f"<{token}'\n>"


def _activation(rng: random.Random) -> float:
    value = rng.expovariate(0.3) + 1e-3
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _write(storage: Storage, folder: str, rows: dict[str, list[dict[str, object]]]) -> None:
    if load(storage, folder) is not None:
        return
    for name, table in rows.items():
        storage.write_parquet(
            f"{folder}/{name}.parquet", pa.Table.from_pylist(table, schema=SHARD_FILES[name])
        )
    commit_found(storage, folder, Manifest(stage="test", inputs={}))


def commit_again(storage: Storage, folder: str) -> None:
    """Commit a folder anew after one of its files was changed, as if it had been made like that."""
    commit_found(storage, folder, manifests_of(storage, [folder])[folder])


def commit_found(storage: Storage, folder: str, manifest: Manifest) -> Manifest:
    """Commit whatever lies in a folder, as if it had been written just so."""
    found = {name: storage.read_bytes(name) for name in storage.sizes(folder) if not name.endswith(MANIFEST)}
    written = [
        StoredFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in found.items()
    ]
    return commit(storage, folder, manifest, written)
