"""Progress for people at a terminal: a bar with the time left, or plain lines where nobody can see a bar.

A bar is drawn only where standard error is a terminal; in a log file or a CI job the same progress comes out
as a line every few seconds. Results go to standard output, so that progress never mixes with them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from infra.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PLAIN_SECONDS = 5.0
"""A plain line at most this often."""


@contextmanager
def terminal_progress(*, console: Console | None = None, plain: bool = False) -> Iterator[Progress]:
    """A `Progress` that draws on standard error while the block runs.

    Args:
        console: Where to draw; standard error if not given.
        plain: Write lines even on a terminal (with `--debug`, when log lines would tear the bar).

    Yields:
        The callback `progress(done, total, what)`. Each new `what` starts a bar of its own; one that is
        complete becomes a line with the time that it took. Safe to call from several threads.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    if plain or not console.is_terminal:
        yield PlainLines(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return

    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}", style="dim"),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
    ) as bars:
        yield LiveBars(bars)


class LiveBars:
    """Progress as rich bars, one for each `what` that is not complete."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._open: dict[str, tuple[TaskID, float]] = {}
        self._completed: tuple[str, int] | None = None
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Move the bar `what` to `done` of `total`."""
        amount = f"{done:,} of {total:,}"
        with self._lock:
            if done >= total and self._completed == (what, total):
                return
            if what not in self._open:
                bar = self._bars.add_task(what, total=total, amount=amount)
                self._open[what] = (bar, time.monotonic())
            bar, started = self._open[what]
            self._bars.update(bar, completed=done, total=total, amount=amount)
            if done >= total:
                del self._open[what]
                self._completed = (what, total)
                self._bars.remove_task(bar)
                line = f"{what}: {total:,} in {duration(time.monotonic() - started)}"
                self._bars.console.print(line, markup=False, highlight=False)


class PlainLines:
    """Progress as lines of text, one every few seconds and one when something is complete.

    Args:
        write: Takes a finished line, without its newline.
        every: Seconds between two lines at least; completion is always said.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        every: float = PLAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every, self._clock = write, every, clock
        self._started: dict[str, tuple[float, int]] = {}
        self._completed: tuple[str, int] | None = None
        self._last = -every
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Say where `what` is, if it is complete or the last line is old enough."""
        with self._lock:
            if done >= total and self._completed == (what, total):
                return
            now = self._clock()
            started, at_start = self._started.setdefault(what, (now, done))
            if done >= total:
                del self._started[what]
                self._completed = (what, total)
                self._write(f"{what}: {total:,} in {duration(now - started)}")
            elif now - self._last >= self._every:
                self._last = now
                share = done / total if total else 1.0
                line = f"{what}: {done:,} of {total:,} ({share:.0%})"
                if done > at_start and now > started:
                    left = (total - done) * (now - started) / (done - at_start)
                    line += f", {duration(left)} left"
                self._write(line)


def duration(seconds: float) -> str:
    """A time span for people: `4 s`, `2 min 5 s`, `3 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def printable(text: str) -> str:
    """A text for one line of a terminal: line ends as \\n, \\r and \\t, other control characters as symbols.

    Tokens come from a corpus, and a corpus may hold the sequences that command a terminal.
    """
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(named.get(sign) or _symbol(sign) for sign in text)


def _symbol(sign: str) -> str:
    code = ord(sign)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\ufffd" if 0x7F <= code < 0xA0 else sign
