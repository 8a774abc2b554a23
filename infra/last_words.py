"""The end of a command's own process: what it has said is the last that anybody reads."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def last_words() -> Iterator[None]:
    """End this process, when all that Python does at exit is done, without taking the interpreter apart.

    Prefect's threads are daemons and keep the frames of a failed run alive. Taken apart around them, the interpreter
    has DuckDB's bindings write pages of leaked objects under the error, and may crash. Enter it before anything else
    is imported: what asks to be called at exit is called in reverse order, so this comes last.
    """
    # Of an exception that leaves with its traceback.
    status = 1

    def leave() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            # The reader of a pipe may be gone.
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)

    atexit.register(leave)
    try:
        yield
        status = 0
    except SystemExit as leaving:
        code = leaving.code
        status = code if isinstance(code, int) else int(code is not None)
        raise
