"""Errors that say what went wrong, where, whether trying again can help, and the way out.

The orchestrator decides by type: only `retryable` errors are retried (see `flows.retry`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 1_000
"""Characters of a library's message that are told: some list every weight of a model."""


class FunctokError(Exception):
    """An error that is shown to the user as one clear line.

    Args:
        message: What is wrong, naming the input and the place.
        hint: The way out.
        stage: The stage it happened in, if known.
    """

    retryable = False

    def __init__(self, message: str, *, hint: str = "", stage: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.stage = message, hint, stage

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.stage)

    def __str__(self) -> str:
        where = f"[{self.stage}] " if self.stage else ""
        way_out = f" ({self.hint})" if self.hint else ""
        return f"{where}{self.message}{way_out}"


def _rebuild(kind: type[FunctokError], message: str, hint: str, stage: str) -> FunctokError:
    return kind(message, hint=hint, stage=stage)


class ConfigError(FunctokError):
    """The configuration is wrong: trying again cannot help."""


class CorpusError(FunctokError):
    """The corpus cannot be used as asked."""


class ModelError(FunctokError):
    """The model or its tokenizer cannot be loaded or used."""


class DictionaryError(FunctokError):
    """A sparse autoencoder does not fit, or did not pass its gate."""


class TrainingError(FunctokError):
    """A pre-training diverged: its loss or gradient is no longer finite."""


class ExpectationError(FunctokError):
    """Data that a stage made or read does not meet its expectations."""


class StorageError(FunctokError):
    """The storage failed; another try may succeed."""

    retryable = True


class DamagedError(StorageError):
    """A stored file is not what was written: trying again cannot help, making it anew can."""

    retryable = False


@contextmanager
def about(subject: str = "", *, stage: str = "") -> Iterator[None]:
    """Say in every error of the block what it is about, and in which stage it is.

    Args:
        subject: For instance `[[trait]] 'Speak Chinese'`; said where the error does not say it.
        stage: The stage, where the error does not know it.
    """
    try:
        yield
    except FunctokError as error:
        message = error.message if subject in error.message else f"{subject}: {error.message}"
        raise type(error)(message, hint=error.hint, stage=error.stage or stage) from error


def whole_message(error: BaseException, *, with_type: bool = False) -> str:
    """An error of a library as one line: all that it says, of a quoted traceback its last line.

    The first line alone is often the beginning of a sentence ("the following keys are missing:").

    Args:
        error: What was raised.
        with_type: Whether to say its type first; said alone where it says nothing.
    """
    name, text = type(error).__name__, str(error).strip()
    if text.startswith("Traceback (most recent call last)"):
        text = text.splitlines()[-1]
    text = " ".join(text.split())
    # A file's bytes may be in it, decoded as they are not.
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]} … (--debug shows all of it)"
    if not text:
        return name
    return f"{name}: {text}" if with_type else text


def not_finished(stage: str, root: str) -> FunctokError:
    """The error that something needs a stage which is not finished."""
    return FunctokError(
        f"the stage {stage} is not finished for this configuration in {root}",
        stage=stage,
        hint=f"run it first: functok run CONFIG --only {stage} (functok status says what is missing)",
    )
