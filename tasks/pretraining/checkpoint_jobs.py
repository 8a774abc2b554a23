"""Work that reads checkpoint after checkpoint: loading one for the corpus, and giving each to a device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from infra.cluster import extraction_client, one_at_a_time
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import FunctokError, ModelError
from schemas.pretraining.work import Checkpoint
from schemas.work import Stage
from tasks.dictionaries.residuals import with_padding_for
from tasks.models.devices import settle, usable_devices
from tasks.models.files import explained, location, revision
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.models.model import check_windows, context_length, model_key, require_key
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.pretraining.checkpoints import config_of


class CheckpointJob(Protocol):
    """What is to be done with one checkpoint."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Which one."""


Job = TypeVar("Job", bound=CheckpointJob)


def run_by_checkpoint(
    config: Config, storage: Storage, jobs: Sequence[Job], steps: Callable[[Job], Iterator[int]]
) -> Iterator[int]:
    """Do one job a checkpoint: here, one after another, or on several GPUs or a Dask cluster, one a worker.

    Args:
        config: Says where (`dask.scheduler`, `model.device`).
        storage: Where everything is.
        jobs: What is to be done, one a checkpoint.
        steps: Does a job, yielding the size of each finished piece; picklable.

    Yields:
        Sizes of what is done: pieces as they finish where they are done here, else whole jobs.
    """
    for job in jobs:
        settle(job.checkpoint.model, storage)
    with extraction_client(config.dask, partial(usable_devices, config.model), len(jobs)) as client:
        if client is None:
            for job in jobs:
                yield from steps(job)
                # Modules know each other in circles; the next checkpoint needs their memory.
                gc.collect()
        else:
            yield from _on_workers(client, jobs, steps)


def _on_workers(client: Any, jobs: Sequence[Job], steps: Callable[[Job], Iterator[int]]) -> Iterator[int]:
    from distributed import as_completed

    futures = [client.submit(_whole, steps, job, pure=False) for job in jobs]
    for future in as_completed(futures):
        yield future.result()


@one_at_a_time
def _whole(steps: Callable[[Job], Iterator[int]], job: Job) -> int:
    done = sum(steps(job))
    gc.collect()
    return done


def open_checkpoint(
    config: Config, storage: Storage, checkpoint: Checkpoint
) -> tuple[LanguageModel, LoadedTokenizer]:
    """A checkpoint's model, and the corpus' tokenizer as it suits the model (its padding id is in the vocabulary).

    Raises:
        ModelError: if it cannot be loaded, is another than where it was found, or as `check_checkpoint`.
    """
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
def named(checkpoint: Checkpoint, stage: Stage, of: type[FunctokError] = ModelError) -> Iterator[None]:
    """Say in every such error of the block, which knows no checkpoints, which one it is about, and in which stage."""
    try:
        yield
    except of as error:
        message = f"checkpoint {checkpoint.series}, step {checkpoint.step}: {error.message}"
        raise type(error)(message, hint=error.hint, stage=stage) from error
