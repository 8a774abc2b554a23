"""Fast tokenizers, identified by their content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import ModelError
from infra.manifest import content_key
from infra.storage import Storage
from schemas.config import Model
from tasks.model_files import (
    IN_STORAGE,
    converted_gguf,
    is_gguf,
    local_model_folder,
    refuse_missing_folder,
)


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A fast tokenizer and what the pipeline needs to know of it.

    Attributes:
        backend: The `tokenizers.Tokenizer`, without truncation or padding.
        key: Content key of the tokenizer and its special ids.
        special_ids: Ids that are fed where needed and excluded from every table, ascending.
        bos_id: Id that begins a window, or None.
        pad_id: Id that fills batches; never seen by a real position.
    """

    tokenizer: Any
    backend: Any
    key: str
    special_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int

    def decode_vocabulary(self) -> tuple[list[int], list[str]]:
        """Every id and its decoded text."""
        ids = list(range(len(self.tokenizer)))
        return ids, [self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]


def load_tokenizer(model: Model, storage: Storage) -> LoadedTokenizer:
    """Load the model's tokenizer, or `model.tokenizer` if given.

    Raises:
        ModelError: if there is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    name = model.tokenizer or (str(converted_gguf(model, storage)) if is_gguf(model) else model.name)
    if name.startswith(IN_STORAGE):
        name = str(local_model_folder(name, storage))
    revision = (
        {"revision": model.revision}
        if model.revision and not model.tokenizer and not Path(name).is_dir()
        else {}
    )
    refuse_missing_folder(name, "model.tokenizer" if model.tokenizer else "model.name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, **revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot load a tokenizer from {name}: {first_line}",
            hint="is model.name right? It is a directory here, a .gguf file or a hub id; model.tokenizer names another",
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"the tokenizer of {name} is not a fast one", hint="functok needs a tokenizer.json")
    backend.no_truncation()
    backend.no_padding()
    special_ids = tuple(sorted(set(tokenizer.all_special_ids)))
    digest = hashlib.sha256(json.dumps(json.loads(backend.to_str()), sort_keys=True).encode()).hexdigest()
    return LoadedTokenizer(
        tokenizer=tokenizer,
        backend=backend,
        key=content_key(tokenizer=digest, special=special_ids, bos=tokenizer.bos_token_id),
        special_ids=special_ids,
        bos_id=tokenizer.bos_token_id,
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
    )
