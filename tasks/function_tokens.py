"""The corpus' function tokens, for stages whose results depend on them (PAPER 1.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from infra.storage import Storage
from schemas.config import Config
from schemas.work import CorpusShards


def function_token_ids(config: Config, storage: Storage, shards: CorpusShards) -> npt.NDArray[np.int32]:
    """(n,) ids of the function tokens, ascending, from the table `tokens`, which is made where it is missing.

    Raises:
        ConfigError: if DuckDB cannot work within its limits.
        StorageError: if a file cannot be read or written.
    """
    # The table stage plans its groups from the very stages that ask here.
    from tasks.tables import build_corpus_tables

    name = build_corpus_tables(config, storage, shards).tables["tokens"]
    table = storage.read_parquet(name, columns=["token_id", "is_function"])
    is_function = table["is_function"].to_numpy(zero_copy_only=False)
    ids: npt.NDArray[np.int32] = np.sort(table["token_id"].to_numpy()[is_function])
    return ids
