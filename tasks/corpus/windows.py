"""Windows and batches: how a shard's documents become model inputs.

A window is seen alone: it is right-padded in a batch of windows of similar length, so no attention crosses
windows or documents, and nothing is cropped or dropped. (Packing without padding would use every position,
but needs block-diagonal masks that not every architecture takes.) Batches are a function of the shard alone,
so that its features do not depend on workers or on what other shards there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra import verified
from infra.storage import Storage
from schemas.tables import SHARD_FILES
from schemas.work import GraphShard, HeldoutPart

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ShardTokens:
    """A shard's tokens in (doc, position) order, special tokens in the text included.

    Attributes:
        doc: (n,) document number inside the shard.
        position: (n,) position in the document, from 0.
        token_id: (n,) ids.
        is_special: (n,) fed to the model but in no table.
        whole_counts: How often each token is in all of the token shard, of which this may be a part.
    """

    doc: Ints
    position: Ints
    token_id: Ints
    is_special: Bools
    whole_counts: pa.Table | None = None

    @property
    def rows(self) -> Longs:
        """(n_rows,) indices of the tokens that are in the tables."""
        return np.flatnonzero(~self.is_special)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows of similar length, right-padded.

    Attributes:
        input_ids: (windows, padded length) ids, BOS and padding included.
        token: (windows, padded length) index into the shard's tokens; -1 where nothing is kept
            (BOS, padding, special tokens).
    """

    input_ids: Longs
    token: Longs


def read_shard_tokens(storage: Storage, part: GraphShard) -> ShardTokens:
    """The tokens of the first `part.n_documents` documents of a token shard."""
    columns = []
    for name, is_there in (("occurrences", True), ("specials", part.shard.has_specials)):
        table = (
            verified.read_table(storage, f"{part.shard.folder}/{name}.parquet")
            if is_there
            else SHARD_FILES[name].empty_table()
        )
        columns.append([table[column].to_numpy() for column in ("doc", "position", "token_id")])
    doc, position, token_id = (np.concatenate(pair) for pair in zip(*columns, strict=True))
    is_special = np.repeat([False, True], [len(columns[0][0]), len(columns[1][0])])
    order = np.lexsort((position, doc)) if is_special.any() else np.arange(len(doc))
    order = order[doc[order] < part.n_documents]
    return ShardTokens(
        doc=doc[order],
        position=position[order],
        token_id=token_id[order],
        is_special=is_special[order],
        whole_counts=count_tokens(token_id[~is_special]),
    )


def count_tokens(token_id: Ints) -> pa.Table:
    """How often each token occurs: columns `token_id` (ascending) and `count`."""
    return pa.table([*np.unique(token_id, return_counts=True)], schema=SHARD_FILES["counts"])


def read_heldout_tokens(storage: Storage, part: HeldoutPart) -> ShardTokens:
    """The tokens of a part's held-out documents, numbered as in their shard."""
    tokens = read_shard_tokens(storage, part.shard.whole)
    kept = np.isin(tokens.doc, np.array(part.documents, dtype=np.int32))
    arrays = ("doc", "position", "token_id", "is_special")
    return ShardTokens(**{name: getattr(tokens, name)[kept] for name in arrays})


def batches(
    tokens: ShardTokens, *, context_size: int, bos_id: int | None, pad_id: int, batch_tokens: int
) -> Iterator[Batch]:
    """Cut a shard into windows and yield them in batches, longest first.

    Args:
        tokens: The shard's tokens.
        context_size: Tokens per window at most, BOS included.
        bos_id: Fed before every window; None for no BOS.
        pad_id: Any valid id; no real position sees it.
        batch_tokens: Padded tokens per batch at most, except that a batch has at least one window.
    """
    if not len(tokens.doc):
        return
    prefix = 0 if bos_id is None else 1
    is_start = np.ones(len(tokens.doc), dtype=bool)
    is_start[1:] = (tokens.doc[1:] != tokens.doc[:-1]) | (tokens.position[1:] % (context_size - prefix) == 0)
    starts = np.flatnonzero(is_start)
    lengths = np.diff(np.append(starts, len(tokens.doc)))
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        padded = int(lengths[order[first]]) + prefix
        chosen = order[first : first + max(1, batch_tokens // padded)]
        first += len(chosen)
        yield _pad(tokens, starts[chosen], lengths[chosen], bos_id=bos_id, pad_id=pad_id, prefix=prefix)


def _pad(
    tokens: ShardTokens, starts: Longs, lengths: Longs, *, bos_id: int | None, pad_id: int, prefix: int
) -> Batch:
    offsets = np.arange(int(lengths.max()))
    real = offsets[None, :] < lengths[:, None]
    index = np.where(real, starts[:, None] + offsets[None, :], 0)
    input_ids = np.where(real, tokens.token_id[index], pad_id).astype(np.int64)
    kept = np.where(real & ~tokens.is_special[index], index, -1)
    if prefix:
        column = np.full((len(starts), 1), bos_id, dtype=np.int64)
        input_ids = np.concatenate([column, input_ids], axis=1)
        kept = np.concatenate([np.full_like(column, -1), kept], axis=1)
    return Batch(input_ids=input_ids, token=kept)
