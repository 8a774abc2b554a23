"""What a failed run's log says: the sentence and the way out; its traceback only where it is asked for.

Prefect logs each failure of a step, of its flow and of the flow above with a traceback of its own engine. These are
left out unless its log level is DEBUG: `functok up --debug` for all runs, the job variable
`{"env": {"PREFECT_LOGGING_LEVEL": "DEBUG"}}` for one that is started in the UI, `functok run --debug` in a terminal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import FunctokError

LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine")
"""Where Prefect tells of failures: in the logs that the UI shows, and in what a worker prints."""


class ClearFailures(logging.Filter):
    """Says each exception of a record in words, and drops its traceback.

    Attributes:
        keeps_tracebacks: Whether they are kept, whatever the level.
    """

    keeps_tracebacks = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is never dropped."""
        if self.keeps_tracebacks or logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            return True
        failure = record.exc_info[1] if record.exc_info else None
        named = record.args if isinstance(record.args, tuple) else ()
        errors = [error for error in (failure, *named) if isinstance(error, BaseException)]
        if not errors:
            return True
        text = record.getMessage()
        for error in errors:
            text = text.replace(repr(error), in_words(error))
        if failure is not None and in_words(failure) not in text:
            text = f"{text}: {in_words(failure)}"
        record.msg, record.args = text, ()
        record.exc_info = record.exc_text = None
        return True


_clear_failures = ClearFailures()


def tell_failures_clearly() -> None:
    """Have the runs of this process log failures in words."""
    for name in LOGGERS:
        # Added once, however often this is called.
        logging.getLogger(name).addFilter(_clear_failures)


@contextmanager
def tracebacks(*, wanted: bool) -> Iterator[None]:
    """Keep tracebacks in the logs of this block's runs, if wanted."""
    before = _clear_failures.keeps_tracebacks
    _clear_failures.keeps_tracebacks = wanted or before
    try:
        yield
    finally:
        _clear_failures.keeps_tracebacks = before


def in_words(error: BaseException) -> str:
    """An error as a sentence, with the way out on a line of its own."""
    if isinstance(error, FunctokError):
        where = f"[{error.stage}] " if error.stage else ""
        return f"{where}{error.message}" + (f"\nWay out: {error.hint}" if error.hint else "")
    if type(error).__module__.split(".")[0] == "prefect":
        return str(error)
    return (
        f"unexpected {type(error).__name__}: {error}\nWay out: run again with the log level DEBUG (functok up --debug) "
        "for the traceback"
    )
