"""Which documents are held out: by a hash of their tokens, so that a document and its copies are on one side.

The hash does not depend on the corpus around a document, so files may come and go. Hashes are kept by token
shard, 20 bytes a document: whoever asks again reads no token.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra import verified
from infra.manifest import Manifest, commit, content_key, load_all
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError, StorageError
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, HeldoutPart, TokenShard
from tasks.corpus.windows import read_shard_tokens

VERSION = 1
_HASHES = 2**64


def heldout_parts(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    max_tokens: int | None,
    seen: npt.NDArray[np.uint64] | None = None,
) -> tuple[HeldoutPart, ...]:
    """The held-out documents in file order, as far as `max_tokens` allows.

    A document is in whole or not at all; the first one that would bring the total above `max_tokens` ends
    them. A document without a token is in none.

    Args:
        config: The configuration; its `heldout_share` matters here.
        storage: Where the shards are.
        shards: The tokenized corpus.
        max_tokens: Tokens in all parts at most; None: no limit.
        seen: Hashes (`document_hashes`) of documents that are in no part, nor any copy of them.

    Raises:
        ConfigError: if the configuration holds none out.
        CorpusError: if no document is held out, or not a single one fits. It knows no stage: several ask here.
    """
    share = _share(config)
    left = max_tokens
    parts: list[HeldoutPart] = []
    any_heldout = False
    for shard, (hashes, lengths) in zip(shards.shards, document_hashes(storage, shards.shards), strict=True):
        wanted = _is_heldout(hashes, share) & (lengths > 0)
        if seen is not None:
            wanted &= ~np.isin(hashes, seen)
        (documents,) = np.nonzero(wanted)
        any_heldout = any_heldout or len(documents) > 0
        ends = np.cumsum(lengths[documents])
        fitting = len(documents) if left is None else int((ends <= left).sum())
        if fitting:
            total = int(ends[fitting - 1])
            parts.append(
                HeldoutPart(shard=shard, documents=tuple(documents[:fitting].tolist()), n_tokens=total)
            )
            left = None if left is None else left - total
        if fitting < len(documents):
            break
    if not any_heldout:
        raise CorpusError(
            f"no document of {shards.n_documents:,} is held out by heldout_share = {share}",
            hint="raise it, or give more documents",
        )
    if not parts:
        raise CorpusError(
            f"no held-out document fits into {max_tokens:,} tokens",
            hint="raise max_tokens of the stage that asks for them",
        )
    return tuple(parts)


def heldout_documents(config: Config, storage: Storage, shard: TokenShard) -> npt.NDArray[np.bool_]:
    """(n_documents,) whether each document of a shard is held out.

    Raises:
        ConfigError: if the configuration holds none out.
    """
    return _is_heldout(document_hashes(storage, [shard])[0][0], _share(config))


def heldout_key(part: HeldoutPart) -> dict[str, str]:
    """What determines a part: its shard's content and which documents of it count."""
    return {"shard": part.shard.folder, "documents": content_key(documents=part.documents)}


def document_hashes(
    storage: Storage, shards: Sequence[TokenShard]
) -> list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
    """For each shard, (n_documents,) hash of the tokens and number of ordinary tokens of every document.

    They are computed where nobody has yet, from all of a shard's tokens, and kept where the root can be written.

    Raises:
        StorageError: if a shard cannot be read.
    """
    folders = {
        shard.folder: f"heldout/{content_key(version=VERSION, shard=shard.folder)}" for shard in shards
    }
    done = load_all(storage, folders.values())
    found: dict[str, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = {}
    for shard in shards:
        folder = folders[shard.folder]
        if shard.folder in found:
            continue
        if folder in done:
            table = verified.read_table(storage, f"{folder}/heldout.parquet")
        else:
            table = _hashed(storage, shard)
            _keep(storage, folder, shard, table)
        found[shard.folder] = (table["hash"].to_numpy(), table["n_tokens"].to_numpy())
    return [found[shard.folder] for shard in shards]


def _keep(storage: Storage, folder: str, shard: TokenShard, hashes: pa.Table) -> None:
    # Who only looks (`functok status`) may have no right to write; who makes something is told by what it makes.
    with suppress(StorageError):
        written = storage.write_parquet(f"{folder}/heldout.parquet", hashes)
        commit(storage, folder, Manifest(stage="heldout", inputs={"shard": shard.folder}), [written])


def _share(config: Config) -> float:
    if config.heldout_share is None:
        raise ConfigError("this configuration holds no document out of training")
    return config.heldout_share


def _is_heldout(hashes: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    if share >= 1:
        return np.ones(len(hashes), dtype=bool)
    return hashes < np.uint64(int(share * _HASHES))


def _hashed(storage: Storage, shard: TokenShard) -> pa.Table:
    tokens = read_shard_tokens(storage, shard.whole)
    starts = np.searchsorted(tokens.doc, np.arange(shard.n_documents + 1))
    ids = np.ascontiguousarray(tokens.token_id, dtype="<i4")
    hashes = [
        int.from_bytes(hashlib.blake2b(ids[first:last].tobytes(), digest_size=8).digest(), "little")
        for first, last in itertools.pairwise(starts)
    ]
    lengths = np.bincount(tokens.doc[tokens.rows], minlength=shard.n_documents)
    return pa.table(
        [
            np.arange(shard.n_documents, dtype=np.int32),
            np.array(hashes, dtype=np.uint64),
            lengths.astype(np.int64),
        ],
        schema=SHARD_FILES["heldout"],
    )
