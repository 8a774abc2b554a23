"""Ctrl-C: obeyed wherever it strikes, told once.

Python runs a signal's handler between two of its own instructions, so a library that computes for a minute cannot be
interrupted by it. What can be told to end (a DuckDB query) registers with `ends_on_interrupt`; a thread that the
signal wakes at once tells it. Libraries also swallow the exception or turn it into one of theirs: `was_interrupted`
remembers, and `require_uninterrupted` raises it again.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Protocol

STATUS = 130
"""Exit status of what Ctrl-C has ended: 128 + SIGINT."""


class Interruptible(Protocol):
    """What can be told, from another thread, to end what it does."""

    def interrupt(self) -> object:
        """End what is going on."""


class _State:
    def __init__(self) -> None:
        self.asked, self.told, self.query_ended = False, False, False
        self.ended: weakref.WeakSet[Interruptible] = weakref.WeakSet()
        self.wakes: socket.socket | None = None
        self.all_told = threading.Semaphore(0)


_state = _State()


@contextmanager
def interruptible(*, ends_process: bool = True) -> Iterator[None]:
    """Answer Ctrl-C in this block: the first ends it with `KeyboardInterrupt`, a second ends the process.

    The second needs no tidying up: servers, workers and trainings end when their parent is gone. A block of the main
    thread only; elsewhere it changes nothing.

    Args:
        ends_process: Whether the process ends when the block was interrupted, so that a Ctrl-C that comes until
            then is the second one. A program that goes on is left as it was.

    Raises:
        KeyboardInterrupt: if Ctrl-C came, whatever the block raised for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, woken_before = signal.signal(signal.SIGINT, _ask), _watch()
    _state.asked = _state.told = False
    try:
        yield
    except BaseException as error:
        if _state.asked and not _state.told:
            raise KeyboardInterrupt from error
        raise
    finally:
        if not ends_process:
            _state.asked = False
            signal.set_wakeup_fd(woken_before)
        if not _state.asked:
            signal.signal(signal.SIGINT, before)


def was_interrupted() -> bool:
    """Whether Ctrl-C came in this block."""
    return _state.asked


def require_uninterrupted() -> None:
    """Do nothing where no Ctrl-C came.

    Raises:
        KeyboardInterrupt: if one came and a library kept it to itself.
    """
    if _state.asked:
        raise KeyboardInterrupt


def ends_on_interrupt(work: Interruptible) -> None:
    """Have `work.interrupt()` called as soon as Ctrl-C comes, as long as it lives."""
    _state.ended.add(work)


@contextmanager
def ends_query_only() -> Iterator[None]:
    """Let Ctrl-C end what is going on in this block, but not remember it: a prompt goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _end_query)
    _watch()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def one_query() -> Iterator[None]:
    """One answer of a prompt within `ends_query_only`.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended it, whatever the library made of that.
    """
    _state.query_ended = False
    while _state.all_told.acquire(blocking=False):
        pass
    try:
        yield
    except Exception as error:
        if _state.query_ended:
            raise KeyboardInterrupt from error
        raise
    finally:
        if _state.query_ended:
            # Else what is told to end late would be the next query.
            _state.all_told.acquire(timeout=1)


def end_interrupted(hint: str = "") -> NoReturn:
    """Say that Ctrl-C ended the command, and exit with its status."""
    _state.told = True
    print("interrupted" + (f": {hint}" if hint else ""), file=sys.stderr)
    raise SystemExit(STATUS)


def _ask(_number: int, _frame: FrameType | None) -> None:
    if _state.asked:
        os._exit(STATUS)
    _state.asked = True
    with suppress(OSError):
        os.write(2, b"\nstopping (Ctrl-C again: at once)\n")
    raise KeyboardInterrupt


def _end_query(_number: int, _frame: FrameType | None) -> None:
    _state.query_ended = True
    raise KeyboardInterrupt


def _watch() -> int:
    """Have each signal wake a thread, which is started once; returns the descriptor that was woken before."""
    if _state.wakes is None:
        wakes, woken = socket.socketpair()
        woken.setblocking(False)
        # Kept open by what keeps it: a socket that is collected is closed.
        _state.wakes = woken
        threading.Thread(target=_tell, args=(wakes,), name="interrupts", daemon=True).start()
    return signal.set_wakeup_fd(_state.wakes.fileno(), warn_on_full_buffer=False)


def _tell(wakes: socket.socket) -> None:
    while number := wakes.recv(1):
        if number[0] == signal.SIGINT:
            for work in list(_state.ended):
                # A connection that was closed has nothing to end.
                with suppress(Exception):
                    work.interrupt()
            _state.all_told.release()
