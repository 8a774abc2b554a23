"""What a process keeps between the units of retention's stages: the model, and how sequences are read for it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ModelError
from schemas.retention.work import Sequence
from schemas.work import CorpusShards
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.models.model import model_key, require_key
from tasks.models.tokenizers import load_tokenizer
from tasks.retention.sequences import SequenceTokens, read_sequence


def loaded_model(model: Model, storage: Storage, planned: str) -> LanguageModel:
    """The model, loaded once a process.

    Raises:
        ModelError: if it cannot be loaded, or is not the one that the work was planned for.
    """
    found, key = _loaded(model, storage, planned)
    require_key(model, key, planned)
    return found


@lru_cache(maxsize=1)
def _loaded(model: Model, storage: Storage, planned: str) -> tuple[LanguageModel, str]:
    return load_language_model(model, storage), model_key(model, storage)


def forget_loaded() -> None:
    """Free the model."""
    _loaded.cache_clear()


def sequence_tokens(
    config: Config, storage: Storage, shards: CorpusShards, sequence: Sequence
) -> SequenceTokens:
    """A sequence's tokens, with BOS where windows begin with it.

    Raises:
        ModelError: if the tokenizer has no BOS token, and windows begin with one.
    """
    bos_id = None
    if config.windows.prepend_bos:
        bos_id = load_tokenizer(config.model, storage).bos_id
        if bos_id is None:
            raise ModelError(
                f"the tokenizer of {config.model.tokenizer or config.model.name} has no BOS token",
                hint="set windows.prepend_bos = false",
            )
    return read_sequence(storage, shards.shards, sequence, bos_id=bos_id, eos_id=shards.eos_id)


def function_mask(function_ids: npt.NDArray[Any], vocabulary: int) -> torch.Tensor:
    """(vocabulary,) bool."""
    mask = np.zeros(vocabulary, dtype=bool)
    mask[function_ids[function_ids < vocabulary]] = True
    return torch.from_numpy(mask)
