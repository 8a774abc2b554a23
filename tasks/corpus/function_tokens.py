"""The corpus' function tokens, for stages whose results depend on them (PAPER 1.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from infra import verified
from infra.manifest import load
from infra.storage import Storage
from schemas.config import Config
from schemas.work import CorpusShards
from sql import read_sql
from tasks.corpus.tables import corpus_group
from tasks.engine.tables import Tables, opened

_computed: dict[str, npt.NDArray[np.int32]] = {}
"""By the key of the corpus' tables: a run asks several times before the table stage has made them."""


def function_token_ids(config: Config, storage: Storage, shards: CorpusShards) -> npt.NDArray[np.int32]:
    """(n,) ids of the function tokens, ascending: from the table `tokens`, or by its SQL where there is none yet.

    Nothing is written: `functok status` asks here, too.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read.
    """
    group = corpus_group(config, shards)
    name = group.tables["tokens"]
    if load(storage, name.rsplit("/", 1)[0]) is None:
        if group.key not in _computed:
            _computed[group.key] = _compute(config, storage, shards, group)
        return _computed[group.key].copy()
    table = verified.read_table(storage, name, columns=["token_id", "is_function"])
    is_function = table["is_function"].to_numpy(zero_copy_only=False)
    ids: npt.NDArray[np.int32] = np.sort(table["token_id"].to_numpy()[is_function])
    return ids


def _compute(config: Config, storage: Storage, shards: CorpusShards, group: Tables) -> npt.NDArray[np.int32]:
    query = f"SELECT token_id FROM ({read_sql('tokens')}) WHERE is_function ORDER BY token_id"
    with opened("the function tokens", config.duckdb, storage, group.inputs) as connection:
        parameters = {"share": config.function_tokens.share, "n_documents": shards.n_documents}
        found = connection.execute(query, parameters).fetchnumpy()
    ids: npt.NDArray[np.int32] = found["token_id"].astype(np.int32)
    return ids
