"""Which documents are in the graph."""

from __future__ import annotations

from infra import verified
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError
from schemas.work import CorpusShards, GraphShard


def graph_shards(config: Config, shards: CorpusShards, storage: Storage) -> tuple[GraphShard, ...]:
    """The corpus' documents in file order, as far as `activations.max_documents` and `max_tokens` allow.

    A document is in whole or not at all: the first one that would bring the total above `max_tokens` ends
    the graph.

    Raises:
        CorpusError: if not a single document fits.
    """
    documents_left = config.activations.max_documents
    tokens_left = config.activations.max_tokens
    parts: list[GraphShard] = []
    for shard in shards.shards:
        n_documents, n_tokens = shard.n_documents, shard.n_tokens
        ends_here = False
        if documents_left is not None and n_documents > documents_left:
            n_documents, ends_here = documents_left, True
        if tokens_left is not None and n_tokens > tokens_left:
            ends_here = True
        if ends_here:
            n_documents, n_tokens = _fitting(storage, shard.folder, n_documents, tokens_left)
        if n_documents:
            parts.append(GraphShard(shard=shard, n_documents=n_documents, n_tokens=n_tokens))
        if documents_left is not None:
            documents_left -= n_documents
        if tokens_left is not None:
            tokens_left -= n_tokens
        if ends_here or documents_left == 0:
            break
    if not parts:
        raise CorpusError(
            "no document fits into the graph",
            hint=f"raise activations.max_tokens (now {config.activations.max_tokens})",
        )
    return tuple(parts)


def _fitting(storage: Storage, folder: str, n_documents: int, tokens_left: int | None) -> tuple[int, int]:
    lengths = verified.read_table(storage, f"{folder}/documents.parquet", columns=["n_tokens"])[
        "n_tokens"
    ].to_pylist()
    total = 0
    for index, length in enumerate(lengths[:n_documents]):
        if tokens_left is not None and total + length > tokens_left:
            return index, total
        total += length
    return n_documents, total
