"""The loss of every next-token prediction of held-out documents, at every checkpoint (PAPER 1.4).

One unit of work is a checkpoint and one token shard's held-out documents. Its windows are the spine's, and a
prediction counts where the token that predicts and the token that is predicted are both ordinary ones of the same
window: so the first token of a window is predicted by none, and special tokens are in no table. Batches are a
function of the part alone, so losses do not depend on workers or on what other shards there are.

Single losses are kept, or (`losses.keep_tokens` = false) their exact sums by document and kind of token: the tables
are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infra.addresses import without_credentials
from infra.manifest import Manifest, commit, content_key, load_all
from infra.progress import Progress, silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import FunctokError, ModelError, about
from schemas.pretraining.section import losses_of
from schemas.pretraining.work import Checkpoint, LossShard
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, HeldoutPart
from tasks.corpus.function_tokens import function_token_ids
from tasks.corpus.heldout import heldout_key, heldout_parts
from tasks.corpus.windows import ShardTokens, read_heldout_tokens
from tasks.dictionaries.residuals import forward_key
from tasks.pretraining.checkpoint_jobs import named, open_checkpoint, run_by_checkpoint
from tasks.pretraining.predictions import Ids, Predictions, predict, sum_by_document

VERSION = 1
_ROWS_PER_GROUP = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One checkpoint's losses over one part: a folder to make or to find."""

    checkpoint: Checkpoint
    part: HeldoutPart
    inputs: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"losses/{content_key(**self.inputs)}"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one checkpoint still misses.

    Attributes:
        function_ids: Function tokens, where losses are summed by kind; None where single ones are kept.
    """

    checkpoint: Checkpoint
    units: tuple[_Unit, ...]
    function_ids: Ids | None


def find_losses(
    config: Config, storage: Storage, shards: CorpusShards, checkpoints: Sequence[Checkpoint]
) -> list[LossShard] | None:
    """All loss shards, checkpoints in the order given, parts in corpus order, or None if any is missing.

    Raises:
        CorpusError: if no document is held out.
    """
    units = _units(config, storage, shards, checkpoints, _function_ids(config, storage, shards))
    return _found(storage, units)


def missing_losses(
    config: Config, storage: Storage, shards: CorpusShards, checkpoints: Sequence[Checkpoint]
) -> tuple[int, list[str]]:
    """How many loss shards are done, and a line for each that is missing.

    Raises:
        CorpusError: if no document is held out.
    """
    units = _units(config, storage, shards, checkpoints, _function_ids(config, storage, shards))
    done = load_all(storage, [unit.folder for unit in units])
    return len(done), [
        f"{unit.checkpoint.series}, step {unit.checkpoint.step}: {len(unit.part.documents):,} documents "
        f"({unit.part.n_tokens:,} tokens) of {without_credentials(unit.part.shard.source)}"
        for folder, unit in {unit.folder: unit for unit in units}.items()
        if folder not in done
    ]


def compute_losses(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    checkpoints: Sequence[Checkpoint],
    progress: Progress = silent,
) -> list[LossShard]:
    """Make what is missing of the losses; a checkpoint is loaded once for all that it misses.

    Returns:
        All loss shards, checkpoints in the order given, parts in corpus order.

    Raises:
        CorpusError: if no document is held out.
        ModelError: if a checkpoint does not fit the corpus' tokens or the windows, or a loss is not finite.
    """
    function_ids = _function_ids(config, storage, shards)
    units = _units(config, storage, shards, checkpoints, function_ids)
    done = load_all(storage, [unit.folder for unit in units])
    # Equal shards, or equal weights under two names, have one folder: it is made once.
    missing: dict[str, list[_Unit]] = {}
    for folder, unit in {unit.folder: unit for unit in units}.items():
        if folder not in done:
            missing.setdefault(unit.checkpoint.key, []).append(unit)
    jobs = [
        _Job(checkpoint=group[0].checkpoint, units=tuple(group), function_ids=function_ids)
        for group in missing.values()
    ]
    if jobs:
        total = sum(unit.part.n_tokens for job in jobs for unit in job.units)
        seen = 0
        progress(0, total, "tokens, losses")
        for size in run_by_checkpoint(config, storage, jobs, partial(_make, config, storage)):
            seen += size
            progress(seen, total, "tokens, losses")
    found = _found(storage, units)
    if found is None:
        raise FunctokError("loss shards vanished while they were made", stage="losses", hint="run again")
    return found


def _function_ids(config: Config, storage: Storage, shards: CorpusShards) -> Ids | None:
    """(n,) ids of the function tokens where the files depend on them, else None."""
    return None if losses_of(config).keep_tokens else function_token_ids(config, storage, shards)


def _units(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    checkpoints: Sequence[Checkpoint],
    function_ids: Ids | None,
) -> list[_Unit]:
    kept: dict[str, Any] = {"keep_tokens": losses_of(config).keep_tokens}
    if function_ids is not None:
        kept["function_tokens"] = content_key(ids=function_ids.tolist())
    with about(stage="losses"):
        parts = heldout_parts(config, storage, shards, losses_of(config).max_tokens)
    keys = [heldout_key(part) for part in parts]
    return [
        _Unit(
            checkpoint=checkpoint,
            part=part,
            inputs={
                "version": VERSION,
                **key,
                **forward_key(config, checkpoint.key),
                **kept,
            },
        )
        for checkpoint in checkpoints
        for part, key in zip(parts, keys, strict=True)
    ]


def _found(storage: Storage, units: Sequence[_Unit]) -> list[LossShard] | None:
    done = load_all(storage, [unit.folder for unit in units])
    if any(unit.folder not in done for unit in units):
        return None
    return [
        LossShard(
            checkpoint=unit.checkpoint,
            part=unit.part,
            folder=unit.folder,
            n_predictions=int(done[unit.folder].stats["n_predictions"]),
        )
        for unit in units
    ]


def _make(config: Config, storage: Storage, job: _Job) -> Iterator[int]:
    """Make a checkpoint's missing units, yielding the tokens of each as it is done."""
    with named(job.checkpoint, "losses"):
        model, tokenizer = open_checkpoint(config, storage, job.checkpoint)
        for unit in job.units:
            tokens = read_heldout_tokens(storage, unit.part)
            predictions = predict(model, tokens, config, tokenizer)
            _refuse_not_finite(unit.part, tokens, predictions)
            _write(storage, unit, tokens, predictions, job.function_ids)
            yield unit.part.n_tokens


def _refuse_not_finite(part: HeldoutPart, tokens: ShardTokens, predictions: Predictions) -> None:
    (wrong,) = np.nonzero(~np.isfinite(predictions.loss))
    if len(wrong):
        token, source = predictions.token[wrong[0]], without_credentials(part.shard.source)
        raise ModelError(
            f"{len(wrong):,} of {len(predictions.loss):,} losses are not finite in {source}, the first at "
            f"document {part.shard.doc_offset + tokens.doc[token]}, position {tokens.position[token]}",
            hint="try model.dtype = 'float32', or leave this checkpoint out",
        )


def _write(
    storage: Storage, unit: _Unit, tokens: ShardTokens, predictions: Predictions, function_ids: Ids | None
) -> None:
    if function_ids is None:
        written = _write_tokens(storage, unit, tokens, predictions)
    else:
        sums = sum_by_document(tokens, predictions, function_ids)
        written = storage.write_parquet(f"{unit.folder}/document_losses.parquet", sums)
    stats = {"n_predictions": len(predictions.loss), "n_tokens": unit.part.n_tokens}
    commit(storage, unit.folder, Manifest(stage="losses", inputs=unit.inputs, stats=stats), [written])


def _write_tokens(storage: Storage, unit: _Unit, tokens: ShardTokens, predictions: Predictions) -> StoredFile:
    at = predictions.token
    return storage.write_parquet(
        f"{unit.folder}/token_losses.parquet",
        pa.table(
            [
                tokens.doc[at],
                tokens.position[at],
                tokens.token_id[at - 1],
                tokens.token_id[at],
                predictions.loss,
            ],
            schema=SHARD_FILES["token_losses"],
        ),
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=["doc", "current_token_id", "token_id"],
        column_encoding={"position": "DELTA_BINARY_PACKED", "loss": "BYTE_STREAM_SPLIT"},
    )
