"""How the suite is cut: what goes to one process, what begins first, and which tests `make test-fast` leaves out.

A test is marked by what it starts, mostly here and by its fixtures, so that nobody has to remember.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
STARTS = {
    "prefect_api": "server",
    "prefect_database": "server",
    "moto_server": "s3",
    "ceph_server": "s3",
}
"""Fixtures to the markers of what they start."""

SLOW = ("server", "cluster", "s3", "chromium", "process", "slow")
"""Markers of what `make test-fast` leaves out; the first five may start processes."""

TOGETHER = {
    # `prefect_api`: its server starts for 8 s, and takes a tenth of a core while it waits.
    "prefect": (
        "end_to_end/test_flows.py",
        "end_to_end/test_readme.py",
        "infra/test_deployments.py",
        "infra/test_interrupt.py",
        "infra/test_run_api.py",
        "retention/test_retention_end_to_end.py",
    ),
    # `finished`, a whole run: 8 s in each process that wants it.
    "finished": (
        "end_to_end/test_api.py",
        "end_to_end/test_cli.py",
        "engine/test_stages.py",
        "upkeep/test_gc.py",
        "upkeep/test_integrity.py",
    ),
}
"""Groups of files that use what takes long to make."""

EACH_ARCHITECTURE = (
    "llama",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt_neox")),
)
"""Those of `tiny`, for tests that compute a second for each: one is enough for `make test-fast`."""

LONGEST = (
    "infra/test_up.py",
    "end_to_end/test_end_to_end.py",
    "prefect",
    "pretraining/test_pretraining_processes.py",
    "infra/test_requests.py",
    "infra/test_ui_chromium.py",
    "explore/test_explorer_chromium.py",
    "ceph",
    "pretraining/test_consolidation_end_to_end.py",
    "finished",
    "end_to_end/test_bench.py",
    "steering/test_steering_end_to_end.py",
    "graph/test_tables.py",
    "graph/test_features.py",
    "end_to_end/test_contributing.py",
    "pretraining/test_consolidation_validation.py",
    "corpus/test_sharing.py",
    "corpus/test_tokenization.py",
    "retention/test_retention_cache.py",
    "engine/test_validation.py",
    "retention/test_measures.py",
    "retention/test_retention_stages.py",
    "steering/test_report_steering.py",
)
"""Groups that begin first, the longest before the others, so that all processes end together."""


def arrange(items: list[pytest.Item]) -> None:
    """Mark tests by what they start, and put the longest groups first."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for marker in {STARTS[name] for name in fixtures if name in STARTS}:
            item.add_marker(marker)
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(LONGEST)))


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process: those of a file share its fixtures, others a server that starts long."""
    path, _, name = nodeid.partition("::")
    file = path.removeprefix(f"{TESTS.name}/")
    if "ceph" in name:
        return "ceph"
    return next((name for name, files in TOGETHER.items() if file in files), file)


class Groups(LoadScopeScheduling):
    """Gives groups to processes, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


class Starts:
    """Fails a test that starts another Python, which imports for seconds, and has no marker that says so."""

    def __init__(self) -> None:
        self._running: pytest.Item | None = None
        sys.addaudithook(self._hear)
        start = multiprocessing.process.BaseProcess.start

        def heard(process: Any) -> None:
            self._refuse()
            start(process)

        multiprocessing.process.BaseProcess.start = heard  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Know which test runs, from its fixtures on."""
        self._running = item
        try:
            return (yield)
        finally:
            self._running = None

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name.startswith("python"):
            self._refuse()

    def _refuse(self) -> None:
        item = self._running
        if item is not None and not any(item.get_closest_marker(name) for name in SLOW):
            pytest.fail(
                f"{item.nodeid} starts a process: mark it `process`, for make test-fast to leave it out"
            )
