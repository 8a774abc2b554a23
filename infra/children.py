"""Child processes that live and die together, and leave nothing behind.

Each child leads a session of its own, so that Ctrl-C reaches only the parent, which stops them in order. What
runs is written to a file beside Prefect's database: a parent that was killed leaves children, and the next
one, which would find their port taken, stops them first.

What children print goes to a file each, which outlives them; errors among it are told by the parent as they come.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from schemas.errors import ConfigError, FunctokError

GRACE_SECONDS = 8.0
"""How long a child may take to end after SIGTERM before it is killed."""

TOLD_AGAIN_SECONDS = 600.0
"""An error that a child repeats is told again after this time."""

_ERROR = re.compile(r"\|\s*(?:ERROR|CRITICAL)\s*\||^(?:ERROR|CRITICAL)\b|^[\w.]*(?:Error|Exception)\b")


_OWN_PACKAGES = Path(__file__).resolve().parent.parent / "functok" / "own_packages.py"


def own_program(module: str) -> list[str]:
    """The command line of a child that is a module of ours, whatever lies in the working directory."""
    return [sys.executable, str(_OWN_PACKAGES), module]


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived while something was being started."""


def require_free_port(host: str, port: int) -> None:
    """Do nothing where the port can be bound.

    Raises:
        ConfigError: if it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                hint=f"stop what uses it, or choose another: --port {port + 1}",
            ) from error


class Children:
    """A context in which children are started; leaving it stops them all, last started first.

    Args:
        name: Names the record file; one parent at a time per name.
        environment: What the children see.
        directory: Where they run.

    Raises:
        ConfigError: on entering, if another parent of that name is alive.
    """

    def __init__(self, *, name: str, environment: Mapping[str, str], directory: Path) -> None:
        home = Path(environment.get("PREFECT_HOME") or Path.home() / ".prefect").expanduser()
        self.environment, self.directory = dict(environment), directory
        self._record = home / f"functok-{name}.json"
        self.logs = home / f"functok-{name}-logs"
        self._children: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        self._before_stop: list[Callable[[], object]] = []
        self._errors: dict[str, ErrorLines] = {}
        self._asked = threading.Event()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Children:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        self._clean_up_after_crash()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._ask)
        self._write_record()
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._stop_all()
        finally:
            self._record.unlink(missing_ok=True)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def start(self, name: str, module: str, *arguments: str) -> None:
        """Start `python -m module arguments…` as a child; what it prints goes to a file in `logs`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{name.replace(' ', '-')}.log"
        if path.exists():
            path.replace(path.with_suffix(".previous.log"))
        log = open(path, "w+b")  # noqa: SIM115 - lives as long as the child
        self._errors[name] = ErrorLines(path)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._children[name] = (process, log)
        self._write_record()

    def run(self, name: str, module: str, *arguments: str, timeout: float) -> None:
        """Run a child to its end.

        Raises:
            FunctokError: if it fails, with its last lines, or takes longer than `timeout` seconds.
            Stopped: if the parent is asked to stop meanwhile.
        """
        self.start(name, module, *arguments)
        process, _ = self._children[name]
        self.until(lambda: process.poll() is not None, f"`{name}` to finish", timeout, finite=name)
        if process.returncode != 0:
            raise self._died(name)
        del self._children[name], self._errors[name]
        self._write_record()

    def until(
        self, ready: Callable[[], bool], what: str, timeout: float, *, finite: str | None = None
    ) -> None:
        """Wait until `ready()`.

        Args:
            ready: Asked every fifth of a second.
            what: What is waited for, for people.
            timeout: Seconds to wait at most.
            finite: The child that may end meanwhile.

        Raises:
            FunctokError: if a child dies first, or at the timeout.
            Stopped: if the parent is asked to stop.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            self._require_alive(finite)
            if time.monotonic() > deadline:
                said = (f"\n{name}:\n{last_lines(log)}" for name, (_, log) in self._children.items())
                raise FunctokError(f"waited {timeout:.0f} s in vain for {what}{''.join(said)}")
            if self._asked.wait(0.2):
                raise Stopped(what)

    def wait(
        self,
        say: Callable[[str], object] = print,
        every: Callable[[], object] = lambda: None,
        seconds: float = 30.0,
    ) -> None:
        """Wait until the parent is asked to stop; meanwhile tell the errors that children print.

        Args:
            say: Takes lines for people.
            every: Called again and again; its errors do not end the waiting.
            seconds: How long it is not called.

        Raises:
            FunctokError: if a child dies first.
        """
        due = time.monotonic() + seconds
        while not self._asked.wait(0.5):
            self._require_alive(None)
            for name, errors in self._errors.items():
                for line in errors.new():
                    say(f"the {name} reports: {line} (all of it: {errors.path})")
            if time.monotonic() >= due:
                try:
                    every()
                except Exception as error:
                    say(f"while looking after the runs: {type(error).__name__}: {error}")
                due = time.monotonic() + seconds

    def before_stop(self, action: Callable[[], object]) -> None:
        """Have `action` called when every child but the first is gone; its errors don't stop the stopping."""
        self._before_stop.append(action)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked.set()

    def _require_alive(self, finite: str | None) -> None:
        for name, (process, _) in self._children.items():
            if name != finite and process.poll() is not None:
                raise self._died(name)

    def _died(self, name: str) -> FunctokError:
        process, log = self._children[name]
        return FunctokError(
            f"the {name} ended with status {process.returncode}:\n{last_lines(log)}",
            hint="the other parts were stopped; run `functok up` again when the cause is gone",
        )

    def _stop_all(self) -> None:
        processes = [process for process, _ in self._children.values()]
        end_processes([process.pid for process in processes[1:]])
        for action in self._before_stop:
            if processes and processes[0].poll() is None:
                try:
                    action()
                except Exception as error:
                    print(f"while stopping: {error}", file=sys.stderr)
        end_processes([process.pid for process in processes[:1]])
        for process, log in self._children.values():
            process.wait()
            log.close()
        self._children.clear()

    def _write_record(self) -> None:
        pids = [os.getpid(), *(process.pid for process, _ in self._children.values())]
        entries = [[pid, _birth(pid)] for pid in pids]
        aside = self._record.with_suffix(".tmp")
        aside.write_text(json.dumps(entries))
        aside.replace(self._record)

    def _clean_up_after_crash(self) -> None:
        owner, others = _alive(self._record)
        if owner is not None:
            raise ConfigError(
                f"`functok up` is already running here (process {owner})",
                hint="use it, stop it with Ctrl-C, or choose another --port",
            )
        end_processes(others)


class ErrorLines:
    """The errors in a growing log: lines that say so, and last lines of tracebacks; one that recurs is told seldom.

    Args:
        path: The log.
        clock: Seconds that only grow.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._read, self._rest = 0, b""
        self._told: dict[str, float] = {}

    def new(self) -> list[str]:
        """What has come since the last call."""
        with open(self.path, "rb") as log:
            log.seek(self._read)
            content = log.read()
        self._read += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        found = [line.decode("utf-8", "replace").strip() for line in lines]
        news = [line for line in found if _ERROR.search(line) and self._is_news(line)]
        return [re.sub(r"^[\d:.]+ \| (?:ERROR|CRITICAL)\s*\| ", "", line) for line in news]

    def _is_news(self, line: str) -> bool:
        # Times, numbers of processes and addresses differ each time.
        kind = re.sub(r"[0-9a-f-]{8,}|\d+", "#", line)
        now = self._clock()
        if now - self._told.get(kind, -TOLD_AGAIN_SECONDS) < TOLD_AGAIN_SECONDS:
            return False
        self._told[kind] = now
        return True


def ports_in_use(home: Path) -> list[int]:
    """Ports of the `functok up` that run with this Prefect home, lowest first."""
    ports = []
    for record in home.glob("functok-up-*.json"):
        port = record.stem.rpartition("-")[2]
        if port.isdigit() and _alive(record)[0] is not None:
            ports.append(int(port))
    return sorted(ports)


def _alive(record: Path) -> tuple[int | None, list[int]]:
    """Of the processes in a record those that live: the parent, which is the first, and the others."""
    try:
        entries = [(int(pid), born) for pid, born in json.loads(record.read_text())]
    except (OSError, ValueError, TypeError):
        return None, []
    alive = [pid for pid, born in entries if born is not None and _birth(pid) == born]
    return (alive[0], alive[1:]) if alive and alive[0] == entries[0][0] else (None, alive)


def _birth(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def end_processes(pids: list[int]) -> None:
    """End processes and all that they started: SIGTERM, then SIGKILL for what is left."""
    family: dict[int, psutil.Process] = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            family |= {child.pid: child for child in [*process.children(recursive=True), process]}
    for process in family.values():
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(list(family.values()), timeout=GRACE_SECONDS)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=GRACE_SECONDS)


def last_lines(log: IO[bytes], lines: int = 20) -> str:
    """The end of what a child wrote, indented."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - 8192))
    text = log.read().decode("utf-8", "replace")
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])
