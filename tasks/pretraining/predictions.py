"""Next-token predictions of a part of the corpus: which count, their losses, and exact sums of them (PAPER 1.4).

Sums of losses are sums of integers, `round(loss * 2^32)`, so no order of addition can change them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from schemas.config import Config
from schemas.tables import SHARD_FILES
from tasks.corpus.windows import ShardTokens
from tasks.dictionaries.residuals import shard_batches
from tasks.models.language_model import LanguageModel
from tasks.models.tokenizers import LoadedTokenizer

UNITS_PER_NAT = 2**32

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of one part, in (document, position) order of what is predicted.

    Attributes:
        token: (n,) index of the predicted token into the part's tokens; the one that predicts is before it.
        loss: (n,) nats.
    """

    token: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float32]


def predict(
    model: LanguageModel, tokens: ShardTokens, config: Config, tokenizer: LoadedTokenizer
) -> Predictions:
    """Every prediction of ordinary tokens by ordinary tokens; the tokenizer's padding id is one of the model's."""
    indices, losses = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for batch in shard_batches(config, tokens, tokenizer):
        wanted = (batch.token[:, :-1] >= 0) & (batch.token[:, 1:] >= 0)
        found = model.token_losses(torch.from_numpy(batch.input_ids), torch.from_numpy(wanted))
        indices.append(batch.token[:, 1:][wanted])
        losses.append(found.numpy()[wanted])
    index = np.concatenate(indices)
    order = np.argsort(index)
    return Predictions(token=index[order], loss=np.concatenate(losses)[order])


def loss_units(losses: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """(n,) losses in nats as whole numbers of 2^-32 nats, ties to even as DuckDB's cast rounds them."""
    return np.rint(losses.astype(np.float64) * UNITS_PER_NAT).astype(np.int64)


def sum_by_document(tokens: ShardTokens, predictions: Predictions, function_ids: Ids) -> pa.Table:
    """Predictions and their losses by document, kind of the current and kind of the next token, in this order."""
    at = predictions.token
    current, following = (np.isin(tokens.token_id[index], function_ids) for index in (at - 1, at))
    group = (tokens.doc[at].astype(np.int64) << 2) | (current.astype(np.int64) << 1) | following
    order = np.argsort(group, kind="stable")
    groups, first, n = np.unique(group[order], return_index=True, return_counts=True)
    units = loss_units(predictions.loss)[order]
    sums = np.add.reduceat(units, first) if len(first) else units
    return pa.table(
        [groups >> 2, (groups & 2) > 0, (groups & 1) > 0, n, sums], schema=SHARD_FILES["document_losses"]
    )
