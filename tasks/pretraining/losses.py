"""The loss of every next-token prediction of held-out documents, at every checkpoint (PAPER 1.4).

One unit of work is a checkpoint and one token shard's held-out documents. Its windows are the spine's, and a
prediction counts where the token that predicts and the token that is predicted are both ordinary ones of the same
window: so the first token of a window is predicted by none, and special tokens are in no table. Batches are a
function of the part alone, so losses do not depend on workers or on what other shards there are.

Single losses are kept, or (`losses.keep_tokens` = false) their exact sums by document and kind of token: the tables
are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra.addresses import without_credentials
from infra.manifest import Manifest, content_key
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import ModelError, about
from schemas.pretraining.section import losses_of
from schemas.pretraining.work import Checkpoint, LossShard
from schemas.tables import SHARD_FILES
from schemas.work import HeldoutPart
from tasks.corpus.function_tokens import function_token_ids
from tasks.corpus.heldout import heldout_key, heldout_parts
from tasks.corpus.tokenization import TOKENIZE, identity
from tasks.corpus.windows import ShardTokens, read_heldout_tokens
from tasks.dictionaries.residuals import forward_key
from tasks.engine.offenders import Views
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Stage, Unit
from tasks.engine.tables import explained
from tasks.models.devices import device_client, settle
from tasks.pretraining.checkpoints import CHECKPOINTS, key_columns, wanted_series
from tasks.pretraining.loading import check_checkpoint, named, open_checkpoint
from tasks.pretraining.predictions import Ids, Predictions, predict, sum_by_document

VERSION = 1
_ROWS_PER_GROUP = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class LossUnit(Unit):
    """One checkpoint's losses over one part.

    Attributes:
        checkpoint: The checkpoint.
        part: The held-out documents of a token shard.
        function_ids: (n,) function tokens, where losses are summed by kind; None where single ones are kept.
    """

    checkpoint: Checkpoint
    part: HeldoutPart
    function_ids: Ids | None


class Losses(Stage[LossUnit, list[LossShard]]):
    """What each checkpoint loses on held-out documents, prediction by prediction."""

    name = "losses"
    section = "consolidation"
    needs = (TOKENIZE, CHECKPOINTS)
    measure = "tokens, losses"
    things = "losses"
    changed = "held-out documents or checkpoints are new, or how they are read changed"
    loads = True
    libraries = ("torch", "transformers")
    tops = ("losses",)

    def units(self, run: Run) -> Sequence[LossUnit]:
        """A unit a checkpoint and part: checkpoints in order, parts in corpus order."""
        config, storage, shards = run.config, run.storage, run.result(TOKENIZE)
        section = losses_of(config)
        kept: dict[str, Any] = {"keep_tokens": section.keep_tokens}
        # The files depend on them where kinds are summed.
        function_ids = None if section.keep_tokens else function_token_ids(config, storage, shards)
        if function_ids is not None:
            kept["function_tokens"] = content_key(ids=function_ids.tolist())
        with about(stage=self.name):
            parts = heldout_parts(config, storage, shards, section.max_tokens)
        keys = [heldout_key(part) for part in parts]
        return [
            LossUnit(
                top="losses",
                inputs={"version": VERSION, **key, **forward_key(config, checkpoint.key), **kept},
                about=f"{checkpoint.series}, step {checkpoint.step}: {len(part.documents):,} documents "
                f"({part.n_tokens:,} tokens) of {without_credentials(part.shard.source)}",
                size=part.n_tokens,
                # Equal weights under two names are one checkpoint, which is loaded once.
                together=checkpoint.key,
                checkpoint=checkpoint,
                part=part,
                function_ids=function_ids,
            )
            for checkpoint in run.result(CHECKPOINTS)
            for part, key in zip(parts, keys, strict=True)
        ]

    def prepare(self, run: Run, missing: Sequence[LossUnit]) -> Sequence[LossUnit]:
        """Decide number formats, and refuse what does not fit the corpus before the first forward."""
        for checkpoint in {unit.together: unit.checkpoint for unit in missing}.values():
            settle(checkpoint.model, run.storage)
            # Of a hub's, each would cost requests.
            if Path(checkpoint.model.name).is_dir():
                with named(checkpoint, self.name):
                    check_checkpoint(run.config, run.storage, checkpoint)
        return missing

    def client(self, run: Run, groups: Sequence[Sequence[LossUnit]]) -> AbstractContextManager[Any]:
        """Several GPUs or a cluster: each worker makes whole checkpoints."""
        return device_client(run.config, len(groups))

    def make(self, run: Run, group: Sequence[LossUnit]) -> Iterator[Made]:
        """The parts that one checkpoint lacks."""
        with named(group[0].checkpoint, self.name):
            model, tokenizer = open_checkpoint(run.config, run.storage, group[0].checkpoint)
            for unit in group:
                tokens = read_heldout_tokens(run.storage, unit.part)
                predictions = predict(model, tokens, run.config, tokenizer)
                _refuse_not_finite(unit.part, tokens, predictions)
                stats = {"n_predictions": len(predictions.loss), "n_tokens": unit.part.n_tokens}
                yield Made.of(unit, partial(_write, run.storage, unit, tokens, predictions), stats)

    def result(self, run: Run, units: Sequence[LossUnit], done: Mapping[str, Manifest]) -> list[LossShard]:
        """All loss shards, checkpoints in order, parts in corpus order."""
        return [
            LossShard(
                checkpoint=unit.checkpoint,
                part=unit.part,
                folder=unit.folder,
                n_predictions=int(done[unit.folder].stats["n_predictions"]),
            )
            for unit in units
        ]

    def question(self, run: Run, result: list[LossShard]) -> Question:
        """The loss shards against the held-out documents of the token shards they were made from."""
        config = run.config
        parts = list(dict.fromkeys(loss.part for loss in result))
        place = {part: index for index, part in enumerate(parts)}
        rows = [
            {
                **identity(loss.part.shard),
                "folder": loss.folder,
                "part": place[loss.part],
                "n_documents": len(loss.part.documents),
                "n_tokens": loss.part.n_tokens,
                "n_predictions": loss.n_predictions,
                **key_columns(loss.checkpoint),
            }
            for loss in result
        ]
        file, count = file_of(config), "count(*)"
        if not losses_of(config).keep_tokens:
            count = "coalesce(sum(n), 0)::BIGINT"
        return Question(
            small={"wanted": wanted_series(config)},
            of={
                "shards": rows,
                "window": window_of(config),
                "documents": [[part.shard.folder, part.documents] for part in parts],
            },
            put=lambda connection: _put_predictions(run, connection, parts),
            folders=lambda: {
                loss.folder: Views(
                    folder=loss.folder,
                    files={file: f"{loss.folder}/{file}.parquet"},
                    columns={"folder": loss.folder, "part": place[loss.part]},
                )
                for loss in result
            },
            totals={file: {"found_predictions": count}},
            rows=lambda: rows,
        )


LOSSES = Losses()


def file_of(config: Config) -> str:
    """What a loss shard holds: single losses where these are kept, else their sums."""
    return "token_losses" if losses_of(config).keep_tokens else "document_losses"


def window_of(config: Config) -> int:
    """Tokens of a document that a window holds: at multiples of it, another window begins."""
    return config.windows.context_size - int(config.windows.prepend_bos)


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
    storage: Storage, unit: LossUnit, tokens: ShardTokens, predictions: Predictions
) -> list[StoredFile]:
    if unit.function_ids is not None:
        sums = sum_by_document(tokens, predictions, unit.function_ids)
        return [storage.write_parquet(f"{unit.folder}/document_losses.parquet", sums)]
    at, ids = predictions.token, tokens.token_id
    columns = [tokens.doc[at], tokens.position[at], ids[at - 1], ids[at], predictions.loss]
    written = storage.write_parquet(
        f"{unit.folder}/token_losses.parquet",
        pa.table(columns, schema=SHARD_FILES["token_losses"]),
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=["doc", "current_token_id", "token_id"],
        column_encoding={"position": "DELTA_BINARY_PACKED", "loss": "BYTE_STREAM_SPLIT"},
    )
    return [written]


def _put_predictions(run: Run, connection: Any, parts: Sequence[HeldoutPart]) -> Collection[str]:
    """Make the tables `predictions` and `expected`: what windows of the held-out documents predict, by part.

    Neighbours in a document of which neither is special, and the later one does not begin a window.
    """
    connection.execute(
        "CREATE TABLE predictions (part BIGINT, doc INTEGER, position INTEGER, current_token_id INTEGER, "
        "token_id INTEGER)"
    )
    for part, heldout in enumerate(parts):
        name = f"{heldout.shard.folder}/occurrences.parquet"
        connection.register("_documents", pa.table({"doc": np.array(heldout.documents, dtype=np.int32)}))
        with explained(f"the check of {name}", run.config.duckdb, run.storage):
            connection.execute(
                "INSERT INTO predictions WITH here AS (SELECT doc, position, token_id "
                "FROM read_parquet($url, hive_partitioning = false) SEMI JOIN _documents USING (doc)) "
                "SELECT $part, this.doc, this.position, before.token_id, this.token_id FROM here AS this "
                "JOIN here AS before ON before.doc = this.doc AND before.position = this.position - 1 "
                "WHERE this.position % $window <> 0",
                {"url": run.storage.url(name), "part": part, "window": window_of(run.config)},
            )
        connection.unregister("_documents")
    connection.execute(
        "CREATE TABLE expected AS SELECT part, doc, count(*) AS n FROM predictions GROUP BY ALL"
    )
    return "predictions", "expected"
