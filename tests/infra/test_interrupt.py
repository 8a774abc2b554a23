"""Ctrl-C at a real terminal: what it ends, what it leaves, and what is said."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import tiny
from pty_terminal import CTRL_C, CTRL_D, Terminal

from infra.interrupt import STATUS

pytestmark = pytest.mark.process
REPOSITORY = Path(__file__).parents[2]
FOREVER = "SELECT count(*) FROM range(3000000000) a, range(100000) b"


def at_terminal(folder: Path, *arguments: object, **environment: str) -> Terminal:
    command = [sys.executable, "-m", "functok", *(str(argument) for argument in arguments)]
    return Terminal(command, {**os.environ, "XDG_STATE_HOME": str(folder), **environment}, REPOSITORY)


def processes_with(text: str) -> list[str]:
    """Command lines of processes in whose environment the text is."""
    found = []
    for process in psutil.process_iter():
        try:
            if text in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def eventually_none_with(text: str) -> None:
    deadline = time.monotonic() + 60
    while left := processes_with(text):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.fixture(scope="module")
def large(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose tokenization needs workers and some seconds."""
    folder = tmp_path_factory.mktemp("large")
    texts = tiny.texts(1000, longest=2000)
    for name in "ab":
        tiny.write_jsonl(folder / f"{name}.jsonl", texts)
    config = (finished / "tiny.toml").read_text()
    config = config.replace(f'"{finished}/corpus.jsonl"', f'"{folder}/a.jsonl", "{folder}/b.jsonl"')
    (folder / "large.toml").write_text(config)
    return folder / "large.toml"


@pytest.mark.parametrize("moment", ["importing", "starting the server", "in a Dask stage"])
def test_ctrl_c_ends_a_run_and_says_what_is_kept(
    moment: str, large: Path, tmp_path: Path, prefect_api: str
) -> None:
    environment = {"FUNCTOK_MARK": str(tmp_path)}
    if moment == "in a Dask stage":
        environment["PREFECT_API_URL"] = prefect_api
    with at_terminal(tmp_path, "run", large, "--root", tmp_path / "root", **environment) as terminal:
        if moment == "importing":
            while not psutil.Process(terminal.process.pid).children():
                time.sleep(0.01)
            time.sleep(0.5)
        elif moment == "starting the server":
            terminal.until("Prefect: a temporary server")
        else:
            while not any("spawn_main" in command for command in processes_with(str(tmp_path))):
                assert terminal.process.poll() is None, terminal.end()
                time.sleep(0.1)
            time.sleep(3)
        terminal.press(CTRL_C)
        status, shown = terminal.end()
    assert status == STATUS, shown
    assert "Traceback" not in shown
    assert "Error" not in shown
    last = shown.strip().splitlines()[-1]
    if moment == "importing":
        assert last.startswith("interrupted")
    else:
        assert last == "interrupted: finished work is kept; run the same command again to continue"
    eventually_none_with(str(tmp_path))
    if moment == "in a Dask stage":
        wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED"]}}}}
        left = httpx.post(f"{prefect_api}/flow_runs/filter", json=wanted).raise_for_status().json()
        assert [run["name"] for run in left if "large" in str(run["parameters"])] == []


def test_ctrl_c_ends_a_query_and_not_the_prompt_which_remembers(finished: Path, tmp_path: Path) -> None:
    history = tmp_path / "functok" / "query_history"
    with at_terminal(tmp_path, "query", "--root", finished / "run") as terminal:
        terminal.until("functok> ")
        terminal.press(f"{FOREVER};\n")
        time.sleep(2)
        terminal.press(CTRL_C)
        assert "^Cinterrupted" in terminal.until("functok> ")
        terminal.press("SELECT 40 + 2 AS a; SELECT ';' || 17 * 3 AS b;\n")
        shown = terminal.until("functok> ")
        assert "42" in shown
        assert ";51" in shown
        terminal.press("SELECT ';\n")
        terminal.until("...> ")
        terminal.press("' AS c, 'hunter2' AS password;\n")
        terminal.until("functok> ")
        terminal.press("SELECT half\n")
        terminal.until("...> ")
        # Between showing a prompt and waiting for keys, Python's readline leaves a signal until the next key.
        time.sleep(0.5)
        terminal.press(CTRL_C)
        terminal.until("functok> ")
        terminal.press("SELECT 1\n")
        terminal.until("...> ")
        terminal.press(".quit\n")
        status, shown = terminal.end()
    assert status == 0, shown
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "40 + 2" in history.read_text()
    assert "hunter2" not in history.read_text()
    with at_terminal(tmp_path, "query", "--root", finished / "run") as terminal:
        terminal.until("functok> ")
        terminal.press("\x10\n")  # the line before, and run it
        assert "42" in terminal.until("functok> ")
        terminal.press(CTRL_D)
        status, shown = terminal.end()
    assert status == 0, shown


def test_ctrl_c_ends_a_query_of_one_line_with_its_own_status(finished: Path, tmp_path: Path) -> None:
    with at_terminal(tmp_path, "query", FOREVER, "--root", finished / "run") as terminal:
        time.sleep(6)
        terminal.press(CTRL_C)
        status, shown = terminal.end()
    assert status == STATUS, shown
    assert shown.strip().endswith("interrupted")
    assert "Traceback" not in shown
