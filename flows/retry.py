"""What is tried again: what another try can mend, by type, never by message."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from infra.interrupt import was_interrupted
from schemas.errors import FunctokError

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun


def worth_retrying(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: whether the failure is one that another try can mend."""
    if was_interrupted():
        return False
    error = state.data if isinstance(state.data, BaseException) else state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


def is_transient(error: BaseException) -> bool:
    """Whether trying again can help.

    It can after lost connections, full disks, killed Dask workers and whatever a `FunctokError` declares
    retryable; it cannot where a file is missing or forbidden, or the request was refused as wrong.
    """
    if isinstance(error, FunctokError):
        cause = error.__cause__
        # An error that was told again, with the place it is about, stands before what caused it.
        while isinstance(cause, FunctokError):
            cause = cause.__cause__
        return error.retryable and (cause is None or not _is_permanent(cause))
    if _is_permanent(error):
        return False
    return isinstance(
        error,
        (
            OSError,
            *_types("distributed", "KilledWorker"),
            *_types("httpx", "TransportError"),
            *_types("botocore.exceptions", "BotoCoreError", "ClientError"),
        ),
    )


def _is_permanent(error: BaseException) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return True
    if isinstance(error, _types("botocore.exceptions", "ClientError")):
        response: dict[str, Any] = getattr(error, "response", {})
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
        return status < 500 and status not in (408, 429)
    return isinstance(
        error,
        (
            ValueError,
            ImportError,
            *_types("botocore.exceptions", "NoCredentialsError", "ParamValidationError"),
        ),
    )


def _types(module: str, *names: str) -> tuple[type[BaseException], ...]:
    """Exception types of a library, if it has been imported: else none of them can have been raised."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded is not None else ()
