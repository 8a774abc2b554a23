"""Which tokens a feature's decoder direction promotes and suppresses: the table `feature_logits`.

It depends on dictionaries, model and tokenizer alone, never on the corpus, so its folders (one a layer) stay when
documents join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from infra import verified
from infra.catalog import Catalog
from infra.manifest import Manifest, commit, content_key, load
from infra.storage import StoredFile
from schemas.errors import ModelError
from schemas.work import Dictionary
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES, load_dictionary
from tasks.engine.run import Run
from tasks.engine.tables import copy_table, opened
from tasks.models.language_model import CHUNK_BYTES
from tasks.models.model import model_key
from tasks.models.unembedding import Unembedding, load_unembedding

VERSION = 1
"""Raise when what is in a file changes."""

TABLE = "feature_logits"


def folder_of(run: Run, dictionary: Dictionary) -> tuple[str, dict[str, Any]]:
    """The folder of one layer's table, and what its key is made of."""
    config, corpus = run.config, run.result(TOKENIZE)
    parts = {
        "group": TABLE,
        "version": VERSION,
        "layer": dictionary.layer,
        "dictionary": dictionary.key,
        "model": model_key(config.model, run.storage),
        "vocabulary": corpus.vocabulary,
        "tokens": config.features.logit_tokens,
    }
    return f"tables/{TABLE}-{content_key(**parts)}", parts


def ensure_logits(run: Run, rows_per_group: int, advance: Callable[[str], None]) -> None:
    """Make the table of each layer that has none.

    Args:
        run: The run.
        rows_per_group: Rows of a row group.
        advance: Told what was done, a layer at a time.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        ModelError: if the model has no head or no final norm, or gives something that is no number.
        StorageError: if a file cannot be read or written.
    """
    unembedding: Unembedding | None = None
    for dictionary in run.result(DICTIONARIES):
        folder, parts = folder_of(run, dictionary)
        if load(run.storage, folder) is None:
            unembedding = unembedding or load_unembedding(run.config.model, run.storage)
            written = _write(run, dictionary, unembedding, folder, rows_per_group)
            commit(run.storage, folder, Manifest(stage="tables", inputs=parts), [written])
        advance(f"logits of layer {dictionary.layer}")


def _write(
    run: Run, dictionary: Dictionary, unembedding: Unembedding, folder: str, rows_per_group: int
) -> StoredFile:
    storage, resources, vocabulary = run.storage, run.config.duckdb, run.result(TOKENIZE).vocabulary
    # Special tokens are in no table; rows of the head without a token are padding.
    special = verified.read_json(storage, f"{vocabulary.rpartition('/')[0]}/special_ids.json")
    known = verified.read_table(storage, vocabulary, columns=["token_id"])["token_id"].to_numpy()
    ids = np.setdiff1d(known[known < len(unembedding.weight)], special)
    decoder = load_dictionary(storage, dictionary).W_dec.detach()
    found = pa.concat_tables(extremes(unembedding, decoder, ids, run.config.features.logit_tokens))
    with opened(
        f"the table {TABLE}", resources, storage, Catalog(tables={"vocabulary": vocabulary})
    ) as connection:
        connection.register("extreme_logits", found)
        return copy_table(
            connection,
            resources,
            storage,
            TABLE,
            f"{folder}/{TABLE}.parquet",
            f", ROW_GROUP_SIZE {rows_per_group}",
            layer=dictionary.layer,
        )


@torch.inference_mode()
def extremes(
    unembedding: Unembedding, decoder: torch.Tensor, token_ids: npt.NDArray[np.integer[Any]], k: int
) -> Iterator[pa.Table]:
    """The tokens of the largest and of the smallest logits of each feature, some features at a time.

    Args:
        unembedding: Of the model.
        decoder: (features, d_model), a direction a feature.
        token_ids: (n,) ascending, the tokens that are looked at.
        k: Tokens of each sign, at most; equal logits in the order of their ids.

    Yields:
        Rows of `feature_id`, `sign`, `place`, `token_id`, `logit`.

    Raises:
        ModelError: if a logit is not finite.
    """
    ids = torch.from_numpy(token_ids.astype(np.int64))
    k = min(k, len(ids))
    for first in range(0, len(decoder), size := max(1, CHUNK_BYTES // (4 * len(unembedding.weight)))):
        logits = unembedding.logits(decoder[first : first + size])[:, ids.to(unembedding.weight.device)]
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(
                "the logits of a feature's direction are not finite", hint="set features.logits = false"
            )
        features = np.arange(first, first + len(logits), dtype=np.int32)
        for sign, largest in (("promoted", True), ("suppressed", False)):
            chosen = logits.topk(k, largest=largest).indices.sort().values
            values, order = logits.gather(1, chosen).sort(descending=largest, stable=True)
            yield pa.table(
                {
                    "feature_id": features.repeat(k),
                    "sign": pa.array([sign] * len(features) * k),
                    "place": np.tile(np.arange(1, k + 1), len(features)),
                    "token_id": ids[chosen.gather(1, order).cpu()].numpy().astype(np.int32).ravel(),
                    "logit": values.cpu().numpy().ravel(),
                }
            )
