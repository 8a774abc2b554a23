"""The engine: what of a stage is there, what is missing and why, and making it.

A unit is done when its folder's manifest is there and fits (`infra.manifest`); the manifest is written last, here and
nowhere else. Units that belong together are made in one go, in this process or on Dask workers; a killed run goes on
with the first that is missing.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast
from uuid import uuid4

from infra.allocator import freed_memory_kept
from infra.cluster import one_at_a_time
from infra.index import distrusted
from infra.manifest import Manifest, commit
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError, not_finished
from schemas.work import StagePlan
from tasks.engine.stage import Made, Stage, Unit

U = TypeVar("U", bound=Unit)
R = TypeVar("R")

_TELL_SECONDS = 1.0
"""How often a worker tells its progress."""


@dataclass(frozen=True, kw_only=True)
class Found(Generic[U]):
    """What is there of a stage.

    Attributes:
        units: All units, in order.
        done: What is there of each, by its folder.
        refused: Why units that are there are not used.
    """

    units: Sequence[U]
    done: Mapping[str, Any]
    refused: Sequence[FunctokError] = ()

    @property
    def missing(self) -> list[U]:
        """The units that are to be made; of equal ones, which share a folder, the first."""
        seen, missing = set(self.done), list[U]()
        for unit in self.units:
            if unit.folder not in seen:
                missing.append(unit)
                seen |= {unit.folder} - {""}
        return missing

    @property
    def is_finished(self) -> bool:
        """Whether nothing is missing, and all that is there is used."""
        return not self.refused and not self.missing


class Run:
    """A configuration on a storage, and what of its stages is there: looked for once, when asked.

    Args:
        config: The configuration, its tokenizer resolved where that can be.
        storage: Where everything is.

    Attributes:
        tell: Who is told of progress that has a measure of its own (training, steps of a stage in a stage); nobody on a
            worker.
    """

    def __init__(self, config: Config, storage: Storage, tell: Progress = silent) -> None:
        self.config, self.storage, self.tell = config, storage, tell
        self._found: dict[Stage[Any, Any], Found[Any]] = {}
        self._results: dict[Stage[Any, Any], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Results may name every shard of a corpus: a worker gets what it needs with its units.
        return {**self.__dict__, "tell": silent, "_found": {}, "_results": {}}

    def find(self, stage: Stage[U, Any]) -> Found[U]:
        """What is there of a stage whose needs are finished.

        Raises:
            FunctokError: if a stage that it needs is not finished, or its units cannot be told.
        """
        if stage not in self._found:
            units = stage.units(self)
            done = stage.finished(self, units)
            refused = tuple(stage.refused(self, units, done))
            self._found[stage] = Found(units=units, done=done, refused=refused)
        return self._found[stage]

    def is_finished(self, stage: Stage[Any, Any]) -> bool:
        """Whether a stage has nothing to do, and those that it needs have not."""
        return all(map(self.is_finished, stage.needs)) and self.find(stage).is_finished

    def result(self, stage: Stage[Any, R]) -> R:
        """What a finished stage made.

        Raises:
            FunctokError: naming the first stage that is not finished, and how to run it.
        """
        for needed in stage.needs:
            self.result(needed)
        found = self.find(stage)
        if found.refused:
            raise found.refused[0]
        if found.missing:
            raise not_finished(stage.name, self.storage.root)
        if stage not in self._results:
            self._results[stage] = stage.result(self, found.units, found.done)
        return cast("R", self._results[stage])

    def under(self, config: Config, *shared: Stage[Any, Any]) -> Run:
        """A run of another configuration on the same storage, which takes what these finished stages made from here."""
        other = Run(config, self.storage)
        for stage in shared:
            other._results[stage], other._found[stage] = self.result(stage), self.find(stage)
        return other

    def forget(self, stage: Stage[Any, Any]) -> None:
        """Look for a stage again the next time."""
        self._found.pop(stage, None)
        self._results.pop(stage, None)


def make(run: Run, stage: Stage[Any, R], progress: Progress = silent) -> R:
    """Make what is missing of a stage, telling `progress` what is done in its measure.

    Raises:
        FunctokError: what the stage raises; also if a stage that it needs is not finished.
    """
    for needed in stage.needs:
        run.result(needed)
    before: list[str] = []
    while missing := run.find(stage).missing:
        # What is made may make further units known; what is missing after it was made has vanished.
        wanted = [unit.folder or unit.about for unit in missing]
        if wanted == before:
            raise FunctokError(
                f"{stage.things} vanished while they were made", stage=stage.name, hint="run again"
            )
        try:
            _make(run, stage, missing, progress)
        finally:
            # Another try goes on after what was committed before an error.
            run.forget(stage)
        before = wanted
    return run.result(stage)


def _make(run: Run, stage: Stage[U, Any], missing: Sequence[U], progress: Progress) -> None:
    manifests: dict[str, Manifest] = {}
    before, run.tell = run.tell, progress
    try:
        groups = _groups(stage.prepare(run, missing))
        watch = _Watch(stage, groups, progress)
        with stage.client(run, groups) as client:
            made = (
                _here(run, stage, groups, watch) if client is None else _on(client, run, stage, groups, watch)
            )
            for some in made:
                manifests |= some
    finally:
        stage.close()
        run.tell = before
    stage.remember(run, groups, manifests)


def plan(run: Run, stages: Sequence[Stage[Any, Any]]) -> list[StagePlan]:
    """What each stage has, and what a run would do now; behind an unfinished stage as far as it can be known.

    Reads no weights, and makes nothing of a stage.
    """
    return [_plan(run, stage) for stage in stages]


@contextmanager
def looking(storage: Storage, *, verify: bool = False) -> Iterator[None]:
    """List the storage once for everything that is looked for in the block.

    Args:
        storage: The storage.
        verify: Read every manifest itself, and write the indexes (`infra.index`) anew.

    Raises:
        StorageError: if there is no such bucket, or it does not answer.
    """
    storage.require_place()
    with storage.listed_once(), distrusted() if verify else nullcontext(), _uncollected():
        yield


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for values that hold each other: among what is found of 100,000 shards it takes ten seconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _plan(run: Run, stage: Stage[Any, Any]) -> StagePlan:
    unfinished = [needed for needed in stage.needs if not run.is_finished(needed)]
    if unfinished:
        # One that nobody asked for waits for those that it needs, and is done with them.
        asked = [needed for needed in unfinished if needed.applies(run.config)] or unfinished
        names = [needed.name for needed in asked]
        reason = f"known once {' and '.join(names)} {'is' if len(names) == 1 else 'are'} done"
        return StagePlan(stage=stage.name, done=0, missing=None, reason=reason)
    found = run.find(stage)
    missing = found.missing
    if found.refused:
        return StagePlan(
            stage=stage.name,
            done=0,
            missing=len(found.units),
            reason="; ".join(error.message for error in found.refused),
            details=tuple(f"{error.message}; way out: {error.hint}" for error in found.refused),
        )
    return StagePlan(
        stage=stage.name,
        done=len({unit.folder or id(unit) for unit in found.units}) - len(missing),
        missing=len(missing),
        reason=f"{stage.things}: {stage.changed}" if missing else f"all {stage.things} are there",
        details=tuple(stage.lines(missing)),
    )


def _groups(units: Sequence[U]) -> list[list[U]]:
    """Units that are made in one go, in the order of the first of each."""
    groups: dict[Hashable, list[U]] = {}
    for unit in units:
        groups.setdefault(id(unit) if unit.together is None else (unit.together,), []).append(unit)
    return list(groups.values())


class _Watch:
    """Adds up what the groups tell, which may come from any thread."""

    def __init__(self, stage: Stage[Any, Any], groups: Sequence[Sequence[Unit]], progress: Progress) -> None:
        self._sizes = [sum(unit.size for unit in group) for group in groups]
        self._done = [0] * len(groups)
        self._total_size, self._total_done = sum(self._sizes), 0
        self._measure, self._progress = stage.measure, progress
        self._lock = threading.Lock()
        self._tell()

    def add(self, group: int, size: int) -> None:
        """A group has done so much more."""
        self.reach(group, self._done[group] + size)

    def reach(self, group: int, size: int | None = None) -> None:
        """A group has done so much in all; None: it is done."""
        with self._lock:
            whole, before = self._sizes[group], self._done[group]
            self._done[group] = whole if size is None else max(before, min(size, whole))
            if self._done[group] > before:
                self._total_done += self._done[group] - before
                self._tell()

    def _tell(self) -> None:
        if self._measure and self._sizes:
            self._progress(self._total_done, self._total_size, self._measure)


def _here(
    run: Run, stage: Stage[U, Any], groups: Sequence[Sequence[U]], watch: _Watch
) -> Iterator[dict[str, Manifest]]:
    with freed_memory_kept(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="functok-write") as writer:
        waiting: tuple[int, int, Future[dict[str, Manifest]]] | None = None
        for index, group in enumerate(groups):
            for made in stage.make(run, group):
                if isinstance(made, int):
                    watch.add(index, made)
                    continue
                # What is written lies in memory: one thing at a time waits for it.
                if waiting is not None:
                    yield _written(watch, *waiting)
                waiting = index, made.size, writer.submit(_write, run, stage, made)
                if not stage.overlaps:
                    yield _written(watch, *waiting)
                    waiting = None
            if waiting is None:
                # A limit may have ended it before all was read.
                watch.reach(index)
            if stage.loads:
                _free()
        if waiting is not None:
            yield _written(watch, *waiting)


def _written(
    watch: _Watch, index: int, size: int, writing: Future[dict[str, Manifest]]
) -> dict[str, Manifest]:
    manifests = writing.result()
    watch.add(index, size)
    return manifests


def _on(
    client: Any, run: Run, stage: Stage[U, Any], groups: Sequence[Sequence[U]], watch: _Watch
) -> Iterator[dict[str, Manifest]]:
    from distributed import as_completed

    topic = f"functok-{uuid4().hex}"
    client.subscribe_topic(topic, lambda event: watch.reach(*event[1]))
    work = _alone_on_worker if stage.alone else _on_worker
    pool = _Pool(client, run, stage)
    shared = {index: groups[index] for index in stage.shared(run, groups, pool.size)}
    index_of = {
        pool.submit(work, run, stage, group, topic, index): index
        for index, group in enumerate(groups)
        if index not in shared
    }
    for index, done in stage.share(run, shared, pool) if shared else ():
        if isinstance(done, int):
            watch.add(index, done)
        else:
            yield dict(done)
        if any(future.status == "error" for future in index_of):
            break
    for index in shared:
        watch.reach(index)
    for future in as_completed(list(index_of)):
        manifests: dict[str, Manifest] = future.result()
        watch.reach(index_of[future])
        yield manifests
    client.unsubscribe_topic(topic)


class _Pool:
    """The workers of a Dask client, for a stage."""

    def __init__(self, client: Any, run: Run, stage: Stage[Any, Any]) -> None:
        self._client, self._run, self._stage = client, run, stage
        self.size = max(1, sum(client.nthreads().values()))

    def submit(self, function: Callable[..., Any], *args: Any, priority: int = 0) -> Any:
        return self._client.submit(
            function, *args, pure=False, retries=self._stage.retries, priority=priority
        )

    def commit(self, function: Callable[..., Iterable[Made]], *args: Any) -> Any:
        return self.submit(_committed, self._run, self._stage, function, *args, priority=2)


def _committed(
    run: Run, stage: Stage[Any, Any], function: Callable[..., Iterable[Made]], *args: Any
) -> dict[str, Manifest]:
    manifests: dict[str, Manifest] = {}
    for made in function(*args):
        manifests |= _write(run, stage, made)
    return manifests


def _on_worker(
    run: Run, stage: Stage[U, Any], group: Sequence[U], topic: str, index: int
) -> dict[str, Manifest]:
    from distributed import get_worker

    worker, manifests, done, told = get_worker(), dict[str, Manifest](), 0, 0.0
    for made in stage.make(run, group):
        if isinstance(made, Made):
            manifests |= _write(run, stage, made)
        done += made if isinstance(made, int) else made.size
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            worker.log_event(topic, [index, done])
    if stage.loads:
        _free()
    return manifests


@one_at_a_time
def _alone_on_worker(
    run: Run, stage: Stage[U, Any], group: Sequence[U], topic: str, index: int
) -> dict[str, Manifest]:
    return _on_worker(run, stage, group, topic, index)


def _free() -> None:
    # Modules know each other in circles. Looking for them takes a second, once all libraries are loaded.
    gc.collect()


def _write(run: Run, stage: Stage[Any, Any], made: Made) -> dict[str, Manifest]:
    return {
        unit.folder: commit(
            run.storage,
            unit.folder,
            Manifest(stage=stage.name, inputs=dict(unit.inputs or {}), stats=dict(stats)),
            files,
        )
        for unit, files, stats in made.write()
    }
