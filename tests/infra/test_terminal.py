"""Progress in the terminal: few lines, the time left, and a bar only where one can be seen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from infra.terminal import PlainLines, duration, terminal_progress


def test_plain_lines_are_few_and_say_the_time_left() -> None:
    now = [0.0]
    lines: list[str] = []
    progress = PlainLines(lines.append, every=5, clock=lambda: now[0])
    for done in range(101):
        progress(done, 100, "tokens")
        now[0] += 1
    assert lines[0] == "tokens: 0 of 100 (0%)"
    assert lines[1] == "tokens: 5 of 100 (5%), 1 min 35 s left"
    assert lines[-1] == "tokens: 100 in 1 min 40 s"
    assert len(lines) == 21


def test_work_that_was_done_before_does_not_make_the_rest_look_fast() -> None:
    now = [0.0]
    lines: list[str] = []
    progress = PlainLines(lines.append, every=5, clock=lambda: now[0])
    progress(90, 100, "shards")
    now[0] = 10
    progress(91, 100, "shards")
    assert lines[-1].endswith("1 min 30 s left")


def test_an_empty_total_is_complete() -> None:
    lines: list[str] = []
    PlainLines(lines.append)(0, 0, "nothing")
    assert lines == ["nothing: 0 in 0 s"]


def test_completion_is_said_once() -> None:
    lines: list[str] = []
    progress = PlainLines(lines.append)
    for done in (1, 2, 2, 2):
        progress(done, 2, "files")
    assert lines == ["files: 1 of 2 (50%)", "files: 2 in 0 s"]


def test_no_bar_where_nobody_sees_it() -> None:
    written = io.StringIO()
    with terminal_progress(console=Console(file=written, force_terminal=False)) as progress:
        progress(1, 2, "files")
        progress(2, 2, "files")
    assert written.getvalue().splitlines() == ["files: 1 of 2 (50%)", "files: 2 in 0 s"]
    assert "\x1b" not in written.getvalue()


def test_the_bar_leaves_a_line_for_each_finished_part() -> None:
    written = io.StringIO()
    with terminal_progress(console=Console(file=written, force_terminal=True, width=100)) as progress:
        progress(0, 10, "tokens [x]")
        progress(4, 10, "tokens [x]")
        progress(1, 3, "shards")
        progress(10, 10, "tokens [x]")
    shown = written.getvalue()
    assert "tokens [x]: 10 in 0 s" in shown
    assert "1 of 3" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (11_520, "3 h 12 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
