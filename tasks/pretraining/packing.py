"""Training text packed into rows: every training token is a target exactly once an epoch, none is padding.

An epoch's stream is `sep document sep document …`, its documents in an order drawn from (seed, epoch); epochs follow
each other without a gap, so nothing is dropped and no row is short: position p of the stream is position p mod L of
epoch p div L, where L (tokens and separators) is the same for every epoch. Row r feeds the positions [rC, rC + C) and
predicts [rC + 1, rC + C + 1). What is fed at a row's start was the last target of the row before: where windows begin
with BOS, BOS stands in its place, so that every piece of a document begins as the windows do that the model is judged
on (`tasks.corpus.windows`). The only position that is never a target is the very first separator.

A row is a function of its number: the position in the data is the optimizer step, and any process can make any row.
The alternative, cropping documents to rows that begin with BOS (nanochat), throws about a third of the tokens away;
padding wastes as many.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra import storage as storage_module
from infra.manifest import content_key
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError, StorageError
from schemas.pretraining.section import consolidation_of
from schemas.work import CorpusShards, GraphShard, TokenShard
from tasks.corpus import heldout
from tasks.corpus.heldout import heldout_documents
from tasks.corpus.windows import read_shard_tokens

VERSION = 1
"""Part of the key of every training: raise it when the same documents give other rows."""

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """The documents that are trained on, one after another.

    Attributes:
        tokens: (n_tokens,) ids, special ones inside texts included; a file on the local disk.
        starts: (n_documents + 1,) where each document begins, and where the last one ends.
    """

    tokens: Ints
    starts: Longs

    @property
    def n_documents(self) -> int:
        """Documents; each has at least one token."""
        return len(self.starts) - 1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed rows, each of shape (n_rows, context_size).

    Attributes:
        input_ids: What is fed.
        position_ids: From 0 in each piece; transformers keeps attention inside a piece by them.
        labels: What each position predicts.
    """

    input_ids: Longs
    position_ids: Longs
    labels: Longs


def training_shards(shards: CorpusShards) -> list[TokenShard]:
    """The token shards to train on: files of equal content share theirs, and it is trained on once."""
    return list({shard.folder: shard for shard in shards.shards}.values())


def training_text(config: Config, storage: Storage, shards: CorpusShards) -> TrainingText:
    """All documents that are not held out, in corpus order; written to the local cache at the first call.

    Raises:
        CorpusError: if every document is held out.
        StorageError: if the cache cannot be written.
    """
    wanted = training_shards(shards)
    share = consolidation_of(config).heldout_share
    key = content_key(
        version=[VERSION, heldout.VERSION],
        shards=[[shard.folder, shard.n_documents] for shard in wanted],
        heldout_share=share,
    )
    folder = storage_module.LOCAL_CACHE / "training-text" / key
    try:
        if not folder.exists():
            _write(config, storage, wanted, folder)
        starts = np.load(folder / "starts.npy", allow_pickle=False)
        if len(starts) < 2:
            raise CorpusError(
                f"none of {shards.n_documents:,} documents is left to train on: consolidation.heldout_share = "
                f"{share} holds them all out",
                hint="lower it, or give more documents",
                stage="checkpoints",
            )
        tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r", shape=(int(starts[-1]),))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot keep the training text in {folder}: {error}",
            hint="free some space, or set FUNCTOK_CACHE to another folder; delete that one if it is damaged",
            stage="checkpoints",
        ) from error
    return TrainingText(tokens=tokens, starts=starts)


def _write(config: Config, storage: Storage, shards: list[TokenShard], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        lengths = [np.zeros(0, dtype=np.int64)]
        with open(aside / "tokens.bin", "wb") as file:
            for shard in shards:
                part = GraphShard(shard=shard, n_documents=shard.n_documents, n_tokens=shard.n_tokens)
                tokens = read_shard_tokens(storage, part)
                is_trained_on = ~heldout_documents(config, storage, shard)
                np.ascontiguousarray(tokens.token_id[is_trained_on[tokens.doc]], dtype=np.int32).tofile(file)
                found = np.bincount(tokens.doc, minlength=shard.n_documents)
                lengths.append(found[is_trained_on & (found > 0)])
        starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        np.save(aside / "starts.npy", starts, allow_pickle=False)
        try:
            os.rename(aside, folder)
        except OSError:
            # Another process was faster.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class PackedRows:
    """Rows of the endless stream of epochs, by their number.

    Args:
        text: What is trained on.
        context_size: Tokens of a row.
        seed: Of the order of documents.
        separator: Fed before each document (BOS).
        end: Predicted after each document (EOS).
        begins_rows: Whether the separator is fed in the place of a row's first token.
    """

    def __init__(
        self,
        text: TrainingText,
        *,
        context_size: int,
        seed: int,
        separator: int,
        end: int,
        begins_rows: bool,
    ) -> None:
        self._text, self._context_size, self._seed = text, context_size, seed
        self._separator, self._end, self._begins_rows = separator, end, begins_rows
        self._orders: dict[int, tuple[Longs, Longs]] = {}

    @property
    def epoch_length(self) -> int:
        """Positions of an epoch: its tokens, and a separator for each document."""
        return len(self._text.tokens) + self._text.n_documents

    def rows(self, first: int, count: int) -> Rows:
        """Rows `first`, …, `first + count - 1`."""
        size = self._context_size
        stream, is_separator = self._stream(first * size, count * size + 1)
        fed = np.where(is_separator[:-1], self._separator, stream[:-1]).reshape(count, size)
        labels = np.where(is_separator[1:], self._end, stream[1:]).reshape(count, size)
        begins = is_separator[:-1].reshape(count, size).copy()
        begins[:, 0] = True
        if self._begins_rows:
            fed[:, 0] = self._separator
        columns = np.arange(size)
        piece_starts = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        return Rows(input_ids=fed, position_ids=columns - piece_starts, labels=labels)

    def _stream(self, first: int, count: int) -> tuple[Longs, Bools]:
        """(count,) ids from a position of the endless stream, and where they are separators (the id is then 0)."""
        stream, is_separator = np.empty(count, dtype=np.int64), np.empty(count, dtype=bool)
        done = 0
        while done < count:
            epoch, offset = divmod(first + done, self.epoch_length)
            taken = min(count - done, self.epoch_length - offset)
            piece = slice(done, done + taken)
            stream[piece], is_separator[piece] = self._of_epoch(epoch, np.arange(offset, offset + taken))
            done += taken
        return stream, is_separator

    def _of_epoch(self, epoch: int, offsets: Longs) -> tuple[Longs, Bools]:
        order, begins = self._order(epoch)
        slot = np.searchsorted(begins, offsets, side="right") - 1
        within = offsets - begins[slot]
        is_separator = within == 0
        index = self._text.starts[order[slot]] + within - 1
        return np.where(is_separator, 0, self._text.tokens[np.where(is_separator, 0, index)]), is_separator

    def _order(self, epoch: int) -> tuple[Longs, Longs]:
        """The documents in an epoch's order, and where each one's separator is in its stream."""
        if epoch not in self._orders:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._text.n_documents)
            lengths = np.diff(self._text.starts)[order] + 1
            # A step reads at most from an epoch's end and the next one's beginning.
            self._orders = {kept: value for kept, value in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = (order, np.cumsum(lengths) - lengths)
        return self._orders[epoch]
