"""Fast tokenizers, as the files of their folder describe them, identified by their content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.manifest import content_key
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ModelError, whole_message
from tasks.models.files import (
    IN_STORAGE,
    converted_gguf,
    is_gguf,
    local_model_folder,
    refuse_missing_folder,
)
from tasks.models.token_texts import token_texts
from tasks.models.tokenizer_files import TOKENIZER_FILE, find_file, own_backend, require_ids, stated_tokens

logger = logging.getLogger(__name__)

VOCABULARY_VERSION = 2
"""Raised when the texts of tokens change, not the tokens."""

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_PROBES = (
    "in 2024, 3.14159 and 1,000,000",
    "  two blanks,\ttabs\n\nand  line ends \n",
    "I'll don't we've ’tis",
    "naïve Zürich ﬁne Å 日本語 🙂",
    "x = foo_bar(a+b)  # CamelCase\n    return",
    "The THE the",
)
"""Texts that tokenizers cut differently."""


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A fast tokenizer and what the pipeline needs to know of it.

    Attributes:
        tokenizer: The transformers tokenizer around it, for chat templates and special tokens.
        backend: The `tokenizers.Tokenizer` that all text goes through, without truncation or padding.
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

    @property
    def folder(self) -> str:
        """Where the storage keeps it, with the texts of its tokens."""
        return f"tokenizers/{content_key(tokenizer=self.key, vocabulary=VOCABULARY_VERSION)}"

    @cached_property
    def texts(self) -> dict[int, str]:
        """Every id of the vocabulary, ascending and maybe with holes, and its text as it stands between others."""
        return token_texts(self.backend)

    @property
    def highest_id(self) -> int:
        """The highest id of the vocabulary; where it has holes, more than its size says."""
        return int(max(self.backend.get_vocab(with_added_tokens=True).values()))


def load_tokenizer(model: Model, storage: Storage) -> LoadedTokenizer:
    """Load the model's tokenizer, or `model.tokenizer` if given.

    Where there is a `tokenizer.json` it is the tokenizer, whatever class of transformers the folder names; the class
    says which tokens are special, as far as the file has them.

    Raises:
        ModelError: if there is none, it is not a fast one, or its files contradict each other.
    """
    name = model.tokenizer or (str(converted_gguf(model, storage)) if is_gguf(model) else model.name)
    if made_here := name.startswith(IN_STORAGE):
        name = str(local_model_folder(name, storage))
    revision = model.revision if not model.tokenizer and not Path(name).is_dir() else None
    key = "model.tokenizer" if model.tokenizer else "model.name"
    refuse_missing_folder(name, key)
    with _explained(name, key):
        loaded = _from_auto_tokenizer(name, revision)
        file = find_file(name, TOKENIZER_FILE, revision)
        stated = stated_tokens(name, revision)
        if file is not None:
            backend = own_backend(file, stated)
            if not made_here and not is_gguf(model):
                _tell_difference(loaded, backend, name)
        else:
            backend = _without_file(loaded, name, revision)
            require_ids(backend, stated, name)
    if getattr(backend.model, "dropout", None):
        logger.warning(
            "tokenizer %s: its file asks for BPE dropout, which is for training: read without", name
        )
        backend.model.dropout = None
    backend.no_truncation()
    backend.no_padding()
    wrapped, special_ids = _wrapped(backend, loaded)
    digest = hashlib.sha256(json.dumps(json.loads(backend.to_str()), sort_keys=True).encode()).hexdigest()
    return LoadedTokenizer(
        tokenizer=wrapped,
        backend=backend,
        key=content_key(tokenizer=digest, special=special_ids, bos=wrapped.bos_token_id),
        special_ids=special_ids,
        bos_id=wrapped.bos_token_id,
        pad_id=next(i for i in (wrapped.pad_token_id, wrapped.eos_token_id, 0) if i is not None),
    )


def require_rows(tokenizer: LoadedTokenizer, rows: int | None, config: Config) -> None:
    """Whether a model has an embedding for the tokens that text is cut into, and for BOS where windows begin with it.

    Ids need not be without holes, and a token that was added behind the model's own may lie beyond its embedding, as
    `[PAD]` often does: that only matters in a text that holds it.

    Raises:
        ModelError: naming the highest id that it does not have.
    """
    added = tokenizer.backend.get_added_tokens_decoder()
    own = (i for i in tokenizer.backend.get_vocab(with_added_tokens=True).values() if i not in added)
    highest = max(own, default=0)
    if config.windows.prepend_bos and tokenizer.bos_id is not None:
        highest = max(highest, tokenizer.bos_id)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer of {config.model.tokenizer or config.model.name} has the id {highest}, but "
            f"{config.model.name} has an embedding of {rows:,} tokens",
            hint="the tokenizer is another model's; model.tokenizer names the right one",
        )


def _from_auto_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    # Without trust_remote_code transformers would ask at the terminal.
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)


def _without_file(loaded: Any, name: str, revision: str | None) -> Any:
    """The backend that transformers converted from older files.

    Raises:
        ModelError: if there were none, or it gives other ids than they do.
    """
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"the tokenizer of {name} is not a fast one", hint="functok needs a tokenizer.json")
    files = {file: find_file(name, file, revision) for file in loaded.vocab_files_names.values()}
    if not any(files.values()):
        raise ModelError(
            f"{name} has no tokenizer: neither {TOKENIZER_FILE} nor {', '.join(sorted(files))}, and a class of "
            f"transformers without a vocabulary ({type(loaded).__name__}) is none",
            hint="copy the tokenizer's files there too, or name a folder or hub id that has them as model.tokenizer",
        )
    if (vocabulary := files.get("vocab.json")) is not None:
        ids = json.loads(vocabulary.read_bytes())
        require_ids(backend, {token: {"id": token_id} for token, token_id in ids.items()}, vocabulary)
    return backend


def _tell_difference(loaded: Any, backend: Any, name: str) -> None:
    """Say in the log where transformers would read text otherwise than the file, as others may have done."""
    other = getattr(loaded, "backend_tokenizer", None)
    if other is None:
        return
    differing = [part for part in _PARTS if str(getattr(other, part)) != str(getattr(backend, part))]
    differing += [f"tokens of {text!r}" for text in _PROBES if _ids(other, text) != _ids(backend, text)][:1]
    if differing:
        logger.warning(
            "%s: transformers' %s reads text otherwise than its %s says (%s); the file is used",
            *(name, type(loaded).__name__, TOKENIZER_FILE, ", ".join(differing)),
        )


def _ids(backend: Any, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _wrapped(backend: Any, loaded: Any) -> tuple[Any, tuple[int, ...]]:
    """A transformers tokenizer around a backend, with the special tokens that the backend has, and their ids.

    A class adds its default tokens behind a vocabulary that lacks them, where the model has no embedding.
    """
    from transformers import PreTrainedTokenizerFast

    special = {token: backend.token_to_id(token) for token in loaded.all_special_tokens}
    special = {token: token_id for token, token_id in special.items() if token_id is not None}
    named = {role: str(token) for role in _ROLES if (token := getattr(loaded, role, None)) in special}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        extra_special_tokens=[token for token in special if token not in named.values()],
        chat_template=loaded.chat_template,
        clean_up_tokenization_spaces=False,
    )
    return wrapped, tuple(sorted(set(special.values())))


@contextmanager
def _explained(name: str, key: str) -> Iterator[None]:
    """Turn whatever fails while a tokenizer loads into a `ModelError` that names it, the cause and the way out."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        cause = whole_message(error)
        raise ModelError(
            f"cannot load the tokenizer of {name} ({key}): {cause}", hint=_way_out(error, cause)
        ) from error


def _way_out(error: Exception, cause: str) -> str:
    if "trust_remote_code" in cause or "custom code" in cause:
        return (
            "functok runs no code of a repository: save its tokenizer as a fast one (tokenizer.json and "
            "tokenizer_config.json without auto_map) and give that folder as model.tokenizer"
        )
    if isinstance(error, ImportError):
        return (
            "install that package beside functok, or give a folder with a tokenizer.json as model.tokenizer"
        )
    if isinstance(error, OSError):
        return (
            "is the name right, and the network or a token there that it needs? It is a directory here, a .gguf file "
            "or a hub id; model.tokenizer names another"
        )
    return "its files are damaged or contradict each other: copy them again, or name another one as model.tokenizer"
