"""Loading a checkpoint so that it reads the corpus as the spine's model does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError, ModelError
from schemas.pretraining.work import Checkpoint
from schemas.sections import Model
from tasks.dictionaries.residuals import with_padding_for
from tasks.models.files import explained, location, revision
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.models.model import check_windows, context_length, model_key, require_key
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer


def config_of(config: Config, checkpoint: Checkpoint) -> Config:
    """The configuration under which the spine's functions read a checkpoint: its model, and no dictionary."""
    return config.model_copy(update={"model": checkpoint.model, "sae": []})


def open_checkpoint(
    config: Config, storage: Storage, checkpoint: Checkpoint
) -> tuple[LanguageModel, LoadedTokenizer]:
    """A checkpoint's model, and the corpus' tokenizer as it suits the model (its padding id is in the vocabulary)."""
    tokenizer = check_checkpoint(config, storage, checkpoint)
    model = load_language_model(checkpoint.model, storage)
    require_key(checkpoint.model, model_key(checkpoint.model, storage), checkpoint.key)
    return model, with_padding_for(model.vocabulary, tokenizer)


def check_checkpoint(config: Config, storage: Storage, checkpoint: Checkpoint) -> LoadedTokenizer:
    """Whether a checkpoint can be read as the corpus is, as far as can be told without its weights.

    Returns:
        The corpus' tokenizer.

    Raises:
        ModelError: if it has no configuration, is too short for the windows, its own tokenizer gives ids to other
            tokens than the corpus' does, or there is no BOS token where windows begin with one.
    """
    tokenizer = load_tokenizer(config.model, storage)
    if config.windows.prepend_bos and tokenizer.bos_id is None:
        raise ModelError(
            f"the tokenizer of {config.model.tokenizer or config.model.name} has no BOS token",
            hint="set windows.prepend_bos = false",
        )
    _check_vocabulary(checkpoint.model, storage, tokenizer)
    check_windows(config_of(config, checkpoint), context_length(checkpoint.model, storage))
    return tokenizer


def _check_vocabulary(model: Model, storage: Storage, tokenizer: LoadedTokenizer) -> None:
    """Where a checkpoint comes with a tokenizer.json, its ids must mean what the corpus' ids mean.

    Not the tokenizers' keys are compared: revisions of one model differ in what no id depends on.
    """
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    with explained(model):
        found = cached_file(
            location(model, storage),
            "tokenizer.json",
            **revision(model),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if found is None:
        return
    own = {index: token for token, index in Tokenizer.from_file(found).get_vocab().items()}
    corpus = {index: token for token, index in tokenizer.backend.get_vocab().items()}
    for index in sorted(corpus.keys() & own.keys() - set(tokenizer.special_ids)):
        if own[index] != corpus[index]:
            raise ModelError(
                f"its own tokenizer is another one than the corpus': id {index} is {own[index]!r} in {found}, and "
                f"{corpus[index]!r} in the corpus",
                hint="name its tokenizer as model.tokenizer, or leave the series out",
            )


@contextmanager
def named(checkpoint: Checkpoint, stage: str, of: type[FunctokError] = ModelError) -> Iterator[None]:
    """Say in every such error of the block, which knows no checkpoints, which one it is about, and in which stage."""
    try:
        yield
    except of as error:
        message = f"checkpoint {checkpoint.series}, step {checkpoint.step}: {error.message}"
        raise type(error)(message, hint=error.hint, stage=stage) from error
