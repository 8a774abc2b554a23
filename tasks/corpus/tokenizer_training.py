"""A tokenizer trained on the corpus: byte-level BPE, by the library `tokenizers`.

It is trained on all documents that the corpus' records give, held-out ones too: which documents are held out
is a hash of their tokens, which there are none of before there is a tokenizer. What it learns of held-out
text is pair frequencies; no model sees a held-out document. `corpus.max_documents` is respected,
`corpus.max_tokens` cannot be, for the same reason. A file that joins the corpus gives another tokenizer, and
so everything after it anew: where the corpus grows, name an existing tokenizer (`model.tokenizer`) instead.

Bit-deterministic: merges are chosen by count and then by pair, and do not depend on threads.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.manifest import Manifest, commit, content_key, load
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError
from tasks.corpus.files import content_of, corpus_files
from tasks.corpus.records import read_records
from tasks.models.files import IN_STORAGE

VERSION = 2
END_OF_TEXT = "<|endoftext|>"
"""The one special token: BOS, EOS and padding. In no table."""

_DOCUMENTS_A_REPORT = 200


def train_tokenizer(config: Config, storage: Storage, progress: Progress = silent) -> str:
    """Train the tokenizer of `Config.vocabulary_size` tokens, a fast one of transformers, unless it is there.

    Returns:
        Its name for `model.tokenizer`, `storage:tokenizers-trained/<key>`.

    Raises:
        ConfigError: if none is to be trained, or a corpus URL is wrong.
        CorpusError: if the corpus has no document.
    """
    folder, inputs = _place(config)
    if load(storage, folder) is None:
        backend = _train(config, progress)
        with tempfile.TemporaryDirectory() as aside:
            _wrapped(backend).save_pretrained(aside)
            storage.delete(folder)
            written = storage.upload(Path(aside), folder)
        stats = {"vocabulary_size": backend.get_vocab_size()}
        commit(storage, folder, Manifest(stage="tokenizer", inputs=inputs, stats=stats), written)
    return f"{IN_STORAGE}{folder}"


def find_tokenizer(config: Config, storage: Storage) -> str | None:
    """The trained tokenizer's name for `model.tokenizer`; None where it is still to be trained."""
    folder, _ = _place(config)
    return None if load(storage, folder) is None else f"{IN_STORAGE}{folder}"


def with_tokenizer(config: Config, storage: Storage) -> Config | None:
    """The configuration with its trained tokenizer as `model.tokenizer`.

    Returns:
        None where the tokenizer is still to be trained; `config` itself where none is trained here.
    """
    if config.vocabulary_size is None:
        return config
    name = find_tokenizer(config, storage)
    if name is None:
        return None
    return config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": name})})


def _place(config: Config) -> tuple[str, dict[str, Any]]:
    """The folder, and what determines it."""
    inputs = {
        "version": VERSION,
        "vocabulary_size": _vocabulary_size(config),
        "files": [[content_of(file), file.format, file.compression] for file in corpus_files(config)],
        "reads": {**config.corpus.reads, "max_documents": config.corpus.max_documents},
    }
    return f"tokenizers-trained/{content_key(**inputs)}", inputs


def _vocabulary_size(config: Config) -> int:
    if config.vocabulary_size is None:
        raise ConfigError(
            "no tokenizer is trained here",
            hint="give the vocabulary_size of one to train, or model.tokenizer",
        )
    return config.vocabulary_size


def _train(config: Config, progress: Progress) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = _vocabulary_size(config)
    backend = Tokenizer(models.BPE())
    # GPT-2's own cutting, and every byte in the alphabet: no text is unknown, and decoding gives it back.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    n_documents = [0]
    backend.train_from_iterator(_documents(config, progress, n_documents), trainer)
    if not n_documents[0]:
        raise CorpusError(
            "the corpus has no document to train a tokenizer on",
            hint="check corpus.urls and corpus.text_field",
            stage="tokenize",
        )
    if backend.get_vocab_size() < size:
        logging.getLogger(__name__).warning(
            "the corpus has pairs enough for a vocabulary of %s only, not %s", backend.get_vocab_size(), size
        )
    return backend


def _documents(config: Config, progress: Progress, n_documents: list[int]) -> Iterator[str]:
    """The corpus' documents as texts; `n_documents[0]` counts them."""
    files = corpus_files(config)
    total, before, what = sum(file.size for file in files), 0, "bytes, training the tokenizer"
    for file in files:
        for record in read_records(file, config.corpus):
            if record.text is None:
                continue
            if n_documents[0] == config.corpus.max_documents:
                progress(total, total, what)
                return
            n_documents[0] += 1
            if n_documents[0] % _DOCUMENTS_A_REPORT == 0:
                progress(min(before + record.position, total), total, what)
            yield record.text
        before += file.size
    progress(total, total, what)


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
