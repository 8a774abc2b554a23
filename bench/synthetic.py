"""Shards of power-law tokens and features, for benches that need many and no model."""

from __future__ import annotations

import numpy as np

from schemas.work import Dictionary, GraphShard, TokenShard
from tasks.graph.features import round_mantissa

LAYERS = (7, 15, 22)
VOCABULARY_SIZE = 49_152
DICTIONARY_SIZE = 1 << 17
TOKENS_PER_SHARD = 131_072
DOCUMENT = 500
"""Tokens of a document."""

L0 = 40


def draw_tokens(n: int, rng: np.random.Generator) -> np.ndarray:
    """Ids of `n` tokens."""
    return (VOCABULARY_SIZE ** rng.random(n)).astype(np.int32) - 1


def places(n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Document and position of each token of a shard."""
    row = np.arange(n_tokens)
    return row // DOCUMENT, row % DOCUMENT


def whole_shard(folder: str, n_tokens: int, index: int = 0) -> GraphShard:
    """All documents of the shard `index` of a corpus whose shards are all of so many tokens."""
    n_documents = -(-n_tokens // DOCUMENT)
    shard = TokenShard(
        folder=folder,
        source="synthetic",
        doc_offset=index * n_documents,
        n_documents=n_documents,
        n_tokens=n_tokens,
        n_rejects=0,
    )
    return GraphShard(shard=shard, n_documents=n_documents, n_tokens=n_tokens)


def dictionary_of(layer: int) -> Dictionary:
    """The dictionary of a layer; it has no file."""
    return Dictionary(
        layer=layer,
        folder=f"dictionaries/{layer}",
        key=str(layer),
        d_sae=DICTIONARY_SIZE,
        source="synthetic",
    )


def draw_features(token: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, feature and value of about L0 features a token, half its own, half of the context; both power laws."""
    row = np.repeat(np.arange(len(token), dtype=np.int64), L0 + L0 // 8)
    drawn = (DICTIONARY_SIZE ** rng.random(len(row))).astype(np.int64) - 1
    own = token[row].astype(np.int64) * 7919 + drawn * 31
    feature = np.where(rng.random(len(row)) < 0.5, own, drawn * 17) % DICTIONARY_SIZE
    pairs = np.unique(row * DICTIONARY_SIZE + feature)
    row, feature = pairs // DICTIONARY_SIZE, (pairs % DICTIONARY_SIZE).astype(np.int32)
    return row, feature, round_mantissa(rng.lognormal(1, 1, len(row)).astype(np.float32), 15)
