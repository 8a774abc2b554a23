"""What the flows share: the shape of a flow and of a step, the flow of every stage, and where progress goes.

A step is a Prefect task around one function of `tasks/`. Its result stays in memory: the folders' own
manifests say what is done, so neither Prefect's cache nor its result storage is used. Steps are closures, as Prefect
searches what it is given for futures, every shard of a corpus too.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from flows.artifacts import shown_in_prefect
from flows.retry import worth_retrying
from infra.addresses import root_name, title_of
from infra.config_file import refuse_secrets
from infra.interrupt import require_uninterrupted
from infra.prefect_api import note_process
from infra.progress import Progress
from infra.storage import Storage
from infra.terminal import PlainLines
from schemas.config import Config
from schemas.errors import FunctokError
from tasks.engine import checks
from tasks.engine import run as engine
from tasks.engine.run import Run
from tasks.engine.stage import Stage
from tasks.stages import open_run, stage_named

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import Flow, Task

P = ParamSpec("P")
R = TypeVar("R")

RETRIES = 3
FIRST_DELAY_SECONDS = 2.0
"""Retries come after 2, 4 and 8 seconds."""

ARTIFACT_SECONDS = 1.0
"""A progress artifact is updated at most this often: each update costs 40 ms."""

LOG_SECONDS = 30.0
"""How often progress is logged in a run that nobody watches at a terminal."""

_watcher: ContextVar[Progress | None] = ContextVar("functok_watcher", default=None)


def stage_flow(name: str, run_name: str) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a function a Prefect flow.

    Args:
        name: Name of the flow and of its deployment.
        run_name: Name of its runs; `{title}` is what the run is about and where it writes.
    """

    def named() -> str:
        return run_name.format(title=title_of(runtime.flow_run.parameters["config"]))

    return flow(name=name, flow_run_name=named, persist_result=False, on_running=[note_process])


def step(
    stage: str, about: str, *, retries: int = RETRIES, first_delay: float = FIRST_DELAY_SECONDS
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function of a stage a Prefect task.

    Its runs are named by what they work on (`features: layer 7, 15, 22`), it is tried again only where
    that can help (`worth_retrying`), and a `FunctokError` that leaves it knows its stage.

    Args:
        stage: The stage that the step is part of.
        about: A few words.
        retries: Tries after the first one.
        first_delay: Seconds before the second try; each further wait is twice as long.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        @functools.wraps(function)
        def staged(*args: P.args, **kwargs: P.kwargs) -> R:
            require_uninterrupted()
            try:
                return function(*args, **kwargs)
            except FunctokError as error:
                error.stage = error.stage or stage
                raise

        return task(
            name=f"{stage}: {function.__name__.replace('_', ' ')}",
            # A format string to Prefect, and what it is about may hold braces.
            task_run_name=lambda: f"{stage}: {about}",
            retries=retries,
            retry_delay_seconds=exponential_backoff(first_delay),
            retry_condition_fn=worth_retrying,
            persist_result=False,
            cache_policy=NO_CACHE,
        )(staged)

    return decorate


def run_stage(name: str, config: Config) -> None:
    """The flow of a stage that makes units: see what is missing, make it, hold it against its expectations, show it.

    Args:
        name: The stage.
        config: The whole configuration.

    Raises:
        FunctokError: if it does not apply to the configuration, a stage that it needs is not finished, or it fails.
    """
    stage = stage_named(name)
    if not stage.applies(config):
        raise stage.refuse(config)
    about = stage.subject(config)
    run = look(name, config, open_storage(config), stage.needs)

    @step(name, about)
    def make() -> None:
        with reported_progress(name, config) as progress:
            engine.make(run, stage, progress)

    @step(name, f"check {about}")
    def check() -> None:
        checks.check(run, stage)

    make()
    check()
    shown_in_prefect(run.storage, stage.shown(run, run.result(stage)))


def look(name: str, config: Config, storage: Storage, needs: Sequence[Stage[Any, Any]]) -> Run:
    """A run whose stages `needs` are finished, for a stage that builds on them.

    Raises:
        FunctokError: naming the first that is not, and how to run it.
    """

    @step(name, "look for what it needs")
    def look() -> Run:
        run = open_run(config, storage)
        for needed in needs:
            run.result(needed)
        return run

    return look()


def open_storage(config: Config) -> Storage:
    """The storage of a run.

    Raises:
        ConfigError: if an address in the configuration carries a password, a token or a signature.
        StorageError: if it cannot be opened, or there is no such bucket.
    """
    refuse_secrets(config)
    storage = Storage(config.storage.root, config.storage.endpoint_url)
    storage.require_place()
    return storage


@contextmanager
def watching(progress: Progress | None) -> Iterator[None]:
    """Have the steps of this block report to `progress` (a terminal) as well as to Prefect."""
    token = _watcher.set(progress)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def reported_progress(stage: str, config: Config) -> Iterator[Progress]:
    """The progress of one step: to the terminal that watches or else to the log, and to an artifact."""
    logger = get_run_logger()
    watcher = _watcher.get() or PlainLines(logger.info, every=LOG_SECONDS)
    artifact = ProgressArtifact(stage, root_name(config.storage.root, config.storage.endpoint_url))

    def report(done: int, total: int, what: str) -> None:
        if threading.current_thread() is threading.main_thread():
            require_uninterrupted()
        watcher(done, total, what)
        artifact(done, total, what)

    yield report
    artifact.finish()


class ProgressArtifact:
    """Progress as a Prefect artifact, `progress-<stage>-<root>`: made on the first report, then at most once a second.

    Reports may come from any thread. An artifact that cannot be written is given up, not the stage.

    Args:
        stage: The stage that reports.
        root: Name of the root that it writes to (`infra.addresses.root_name`).
        clock: Seconds that only grow.
    """

    def __init__(self, stage: str, root: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._stage, self._root, self._clock = stage, root, clock
        self._id: UUID | None = None
        self._last, self._shown = 0.0, -1.0
        self._given_up = False
        self._lock = threading.Lock()
        self._context = copy_context()
        self._logger = get_run_logger()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show `done` of `total`, if the last update is old enough."""
        percent = round(100 * done / total, 1) if total else 100.0
        with self._lock:
            if self._id is None or self._clock() - self._last >= ARTIFACT_SECONDS:
                self._show(percent, f"{self._stage} in {self._root}: {what}")

    def finish(self) -> None:
        """Show that the step is complete, if it reported anything."""
        with self._lock:
            if self._id is not None:
                self._show(100.0, f"{self._stage} in {self._root}: complete")

    def _show(self, percent: float, description: str) -> None:
        if percent == self._shown or self._given_up:
            return
        try:
            self._context.run(self._write, percent, description)
        except Exception as error:
            self._given_up = True
            self._logger.warning("No more progress is shown in Prefect: %s", error)
        self._last, self._shown = self._clock(), percent

    def _write(self, percent: float, description: str) -> None:
        if self._id is None:
            key = f"progress-{self._stage}-{self._root}"
            made = create_progress_artifact(progress=percent, key=key, description=description)
            self._id = cast("UUID", made)  # typed for async callers, too
        else:
            update_progress_artifact(artifact_id=self._id, progress=percent, description=description)
