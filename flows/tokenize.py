"""Stage 1 (PAPER 1.1): tokenize the corpus, each document whole, and count every token."""

from __future__ import annotations

from flows.artifacts import show_corpus
from flows.support import needed, open_storage, reported_progress, stage_flow, step
from infra.storage import Storage
from schemas.config import Config
from schemas.work import CorpusShards


@stage_flow("tokenize", "tokenize for {title}")
def tokenize(config: Config) -> None:
    """Tokenize what is missing of the corpus into shards with counts.

    Args:
        config: The whole configuration; `corpus`, `model` (its tokenizer) and `dask` matter here.
    """
    storage = open_storage(config)
    config = train_tokenizer(config, storage)
    shards = cut_and_count(config, storage)
    check_tokens(config, storage, shards)
    show_corpus(storage, shards)


@step("tokenize", "tokenizer")
def train_tokenizer(config: Config, storage: Storage) -> Config:
    """Train the corpus' own tokenizer, where that is asked for; the configuration that names it."""
    if config.vocabulary_size is None:
        return config
    from tasks.corpus import tokenizer_training as corpus_tokenizer

    with reported_progress("tokenize") as progress:
        corpus_tokenizer.train_tokenizer(config, storage, progress)
    return needed(corpus_tokenizer.with_tokenizer(config, storage), "tokenize", storage)


@step("tokenize", "{corpus}")
def cut_and_count(config: Config, storage: Storage) -> CorpusShards:
    """Cut the corpus files into token shards with counts; finished ones are kept."""
    from tasks.corpus import tokenization

    with reported_progress("tokenize") as progress:
        return tokenization.tokenize_corpus(config, storage, progress)


@step("tokenize", "check")
def check_tokens(config: Config, storage: Storage, shards: CorpusShards) -> None:
    """Hold the shards against their expectations."""
    from tasks.engine import validation

    validation.check_tokenize(config, storage, shards)


@step("tokenize", "look for tokens")
def finished_tokens(config: Config, storage: Storage) -> tuple[Config, CorpusShards] | None:
    """The tokenized corpus, for a later stage; None if any of it is missing.

    With it the configuration that names its tokenizer, where that was trained here.
    """
    from tasks.corpus import tokenization
    from tasks.corpus import tokenizer_training as corpus_tokenizer

    resolved = corpus_tokenizer.with_tokenizer(config, storage)
    shards = None if resolved is None else tokenization.find_corpus_shards(resolved, storage)
    return None if resolved is None or shards is None else (resolved, shards)
