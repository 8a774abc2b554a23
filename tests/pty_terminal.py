"""A program at a terminal of its own, as a person has it: what it shows, and the keys that are pressed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """A running program whose standard streams are a terminal.

    Args:
        command: The program.
        environment: What it sees.
        folder: Where it runs.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._here, there = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            env={**environment, "TERM": "dumb"},
            cwd=folder,
            stdin=there,
            stdout=there,
            stderr=there,
        )
        os.close(there)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._here)

    def press(self, keys: bytes | str) -> None:
        """Type."""
        os.write(self._here, keys if isinstance(keys, bytes) else keys.encode())

    def until(self, text: str, seconds: float = 120.0) -> str:
        """Wait for a text to be shown; returns what was shown up to it and forgets that."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown:\n{self.shown}"
            assert self._read(1.0) or self.process.poll() is None or text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def end(self, seconds: float = 120.0) -> tuple[int, str]:
        """Wait for the end; returns the exit status and what was shown."""
        deadline = time.monotonic() + seconds
        while self._read(0.2) or self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end:\n{self.shown}"
        return self.process.wait(), self.shown

    def _read(self, seconds: float) -> bool:
        readable, _, _ = select.select([self._here], [], [], seconds)
        if not readable:
            return False
        try:
            content = os.read(self._here, 65536)
        except OSError:  # the program has closed its side
            return False
        self.shown += content.decode(errors="replace").replace("\r\n", "\n")
        return bool(content)
