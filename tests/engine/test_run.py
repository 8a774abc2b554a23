"""The engine on a small stage of its own: units are files of numbers, made in groups, here and on workers."""

from __future__ import annotations

import concurrent.futures
import pickle
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import make_config, run_of

from infra.manifest import MANIFEST, Manifest, load
from infra.progress import silent
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import FunctokError
from tasks.engine import run as engine
from tasks.engine.checks import check, record_name
from tasks.engine.run import Run, make, plan
from tasks.engine.stage import Made, Pool, Question, Stage, Unit

LOG: list[Any] = []
"""What the stages of a test did, in order; on workers, too, which are threads here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Numbers(Unit):
    """A file of numbers."""

    numbers: tuple[int, ...] = ()


def numbers(*values: int, together: Hashable = None) -> Numbers:
    return Numbers(
        top="sums",
        inputs={"numbers": values},
        about=f"the sum of {values}",
        size=len(values),
        together=together,
        numbers=values,
    )


class Sums(Stage[Numbers, list[int]]):
    """Writes each unit's numbers; results are their sums."""

    name, measure, things, changed = "sums", "numbers", "sums", "their numbers are new"

    def __init__(self, *wanted: Numbers) -> None:
        self.wanted = wanted

    def units(self, run: Run) -> Sequence[Numbers]:
        LOG.append("units")
        return self.wanted

    def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Any]:
        LOG.append([unit.numbers for unit in group])
        for unit in group:
            yield Made.of(unit, partial(self.write, run, unit), {"sum": sum(unit.numbers)})

    def write(self, run: Run, unit: Numbers) -> list[StoredFile]:
        return [run.storage.write_json(f"{unit.folder}/numbers.json", list(unit.numbers))]

    def close(self) -> None:
        LOG.append("closed")

    def result(self, run: Run, units: Sequence[Numbers], done: Mapping[str, Manifest]) -> list[int]:
        return [done[unit.folder].stats["sum"] for unit in units]


class Doubled(Sums):
    """Needs the sums, and doubles them."""

    name = "doubled"

    def __init__(self, *sums: Sums) -> None:
        super().__init__()
        self.sums = self.needs = sums  # type: ignore[misc]

    def units(self, run: Run) -> Sequence[Numbers]:
        return [numbers(total, total) for sums in self.sums for total in run.result(sums)]


@pytest.fixture(autouse=True)
def _nothing_done() -> None:
    LOG.clear()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


@pytest.fixture
def run(storage: Storage) -> Run:
    return opened(storage)


def opened(storage: Storage) -> Run:
    """A run that knows nothing yet."""
    return Run(make_config(storage), storage)


def made() -> list[Any]:
    """The groups that were made, in order."""
    return [entry for entry in LOG if isinstance(entry, list)]


# ---- finding and making


def test_units_that_belong_together_are_made_in_one_go_in_the_order_of_the_first(run: Run) -> None:
    some = [numbers(1, together="a"), numbers(2), numbers(3, 4, together="a")]
    stage = Sums(*some, numbers(5, together=0), numbers(6, together=0), numbers(7))
    assert make(run, stage) == [1, 2, 7, 5, 6, 7]
    assert made() == [[(1,), (3, 4)], [(2,)], [(5,), (6,)], [(7,)]]
    assert LOG[-2:] == ["closed", "units"]


def test_a_unit_is_committed_under_the_key_of_its_inputs(run: Run, storage: Storage) -> None:
    unit = numbers(3, 4)
    assert unit.folder.startswith("sums/")
    assert unit.folder != numbers(4, 3).folder
    assert not run.is_finished(Sums(unit))
    make(run, Sums(unit))
    manifest = load(storage, unit.folder)
    assert manifest is not None
    assert (manifest.stage, manifest.inputs, manifest.stats) == ("sums", {"numbers": [3, 4]}, {"sum": 7})
    assert list(manifest.files) == ["numbers.json"]


def test_what_is_there_is_not_made_again_and_what_is_damaged_is(run: Run, storage: Storage) -> None:
    units = [numbers(1), numbers(2), numbers(3)]
    make(run, Sums(*units))
    LOG.clear()
    assert make(opened(storage), Sums(*units)) == [1, 2, 3]
    assert made() == []
    assert "closed" not in LOG
    storage.delete(f"{units[0].folder}/{MANIFEST}")
    storage.write_bytes(f"{units[2].folder}/numbers.json", b"cut")
    assert make(opened(storage), Sums(*units, numbers(4))) == [1, 2, 3, 4]
    assert made() == [[(1,)], [(3,)], [(4,)]]


def test_equal_units_share_a_folder_that_is_made_once(run: Run, storage: Storage) -> None:
    stage = Sums(numbers(1, 2), numbers(9), numbers(1, 2))
    assert len(run.find(stage).missing) == 2
    assert make(run, stage) == [3, 9, 3]
    assert made() == [[(1, 2)], [(9,)]]
    (told,) = plan(opened(storage), [stage])
    assert (told.done, told.missing) == (2, 0)


def test_a_run_looks_once_until_it_is_told_to_look_again(run: Run) -> None:
    stage = Sums(numbers(1))
    make(opened(run.storage), stage)
    LOG.clear()
    assert run.result(stage) == run.result(stage) == [1]
    assert run.result(stage) is run.result(stage)
    assert LOG == ["units"]
    run.storage.delete(run.find(stage).units[0].folder)
    assert run.is_finished(stage)
    run.forget(stage)
    assert not run.is_finished(stage)


def test_a_stage_prepares_once_for_all_that_is_missing(run: Run) -> None:
    class Prepared(Sums):
        def prepare(self, run: Run, missing: Sequence[Numbers]) -> Sequence[Numbers]:
            LOG.append(("prepare", len(missing)))
            return [replace(unit, together="all") for unit in reversed(missing)]

    make(run, Prepared(numbers(1), numbers(2), numbers(3)))
    assert LOG[1] == ("prepare", 3)
    assert made() == [[(3,), (2,), (1,)]]


def test_what_was_committed_is_remembered_together(run: Run) -> None:
    remembered: list[Any] = []

    class Remembering(Sums):
        def remember(self, run: Run, groups: Any, manifests: Mapping[str, Manifest]) -> None:
            remembered.append((len(groups), sorted(manifest.stats["sum"] for manifest in manifests.values())))

    make(run, Remembering(numbers(1), numbers(2, together="a"), numbers(3, together="a")))
    assert remembered == [(2, [1, 2, 3])]


def test_what_another_process_commits_has_nothing_to_write(run: Run) -> None:
    class Elsewhere(Sums):
        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            make(opened(run.storage), Sums(*self.wanted))
            yield Made(size=sum(unit.size for unit in group))

    seen: list[tuple[int, int, str]] = []
    assert make(run, Elsewhere(numbers(1, 2)), lambda *told: seen.append(told)) == [3]
    assert seen == [(0, 2, "numbers"), (2, 2, "numbers")]


# ---- stages that need others


def test_a_stage_reads_the_results_of_those_that_it_needs(run: Run) -> None:
    sums, other = Sums(numbers(1, 2)), Sums(numbers(5))
    stage = Doubled(sums, other)
    with pytest.raises(
        FunctokError, match="the stage sums is not finished for this configuration in"
    ) as caught:
        make(run, stage)
    assert caught.value.hint.startswith("run it first: functok run CONFIG --only sums")
    assert caught.value.stage == "sums"
    assert made() == []
    make(run, sums)
    assert not run.is_finished(stage)
    make(run, other)
    assert make(run, stage) == [6, 10]
    assert run.is_finished(stage)


def test_a_stage_is_not_finished_before_those_that_it_needs(run: Run, storage: Storage) -> None:
    class Behind(Doubled):
        """Its units are known whatever is there."""

        def units(self, run: Run) -> Sequence[Numbers]:
            return [numbers(3, 3)]

    sums = Sums(numbers(1, 2))
    stage = Behind(sums)
    make(run, sums)
    make(run, stage)
    storage.delete(sums.wanted[0].folder)
    after = opened(storage)
    assert not after.is_finished(stage)
    with pytest.raises(FunctokError, match="the stage sums is not finished"):
        after.result(stage)


def test_a_given_result_is_not_looked_for(storage: Storage) -> None:
    sums = Sums(numbers(1, 2))
    given = run_of(make_config(storage), storage, {sums: [50]})
    assert given.is_finished(sums)
    assert make(given, Doubled(sums)) == [100]
    assert "units" not in LOG


# ---- what is known later


class Growing(Sums):
    """Its second unit is the sum of the first, and known once that is there."""

    name = "growing"

    def units(self, run: Run) -> Sequence[Numbers]:
        first = load(run.storage, self.wanted[0].folder)
        if first is None:
            return [*self.wanted, Numbers(top="sums", inputs=None, about="what follows the first")]
        return [*self.wanted, numbers(first.stats["sum"], 100)]

    def prepare(self, run: Run, missing: Sequence[Numbers]) -> Sequence[Numbers]:
        return [unit for unit in missing if unit.folder]


def test_units_that_become_known_are_made_in_the_same_run(run: Run, storage: Storage) -> None:
    stage = Growing(numbers(1, 2))
    (told,) = plan(run, [stage])
    assert (told.done, told.missing) == (0, 2)
    assert told.details == ("the sum of (1, 2)", "what follows the first")
    assert make(run, stage) == [3, 103]
    assert made() == [[(1, 2)], [(3, 100)]]
    (told,) = plan(opened(storage), [stage])
    assert (told.done, told.missing) == (2, 0)


def test_a_unit_may_be_known_by_its_making_alone(run: Run) -> None:
    class Unknown(Sums):
        def units(self, run: Run) -> Sequence[Numbers]:
            there = load(run.storage, numbers(7).folder) is not None
            return [numbers(7) if there else Numbers(top="sums", inputs=None, about="some number")]

        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            return super().make(run, [numbers(7) for _ in group])

    assert make(run, Unknown()) == [7]
    assert made() == [[(7,)]]


def test_preparing_may_make_units_known_and_leave_nothing_to_make(run: Run) -> None:
    first = numbers(3)

    class Trained(Sums):
        def units(self, run: Run) -> Sequence[Numbers]:
            is_there = load(run.storage, first.folder) is not None
            return [numbers(9) if is_there else Numbers(top="sums", inputs=None, about="to be trained")]

        def prepare(self, run: Run, missing: Sequence[Numbers]) -> Sequence[Numbers]:
            if missing[0].folder:
                return missing
            make(opened(run.storage), Sums(first))
            run.tell(1, 1, "training")
            return []

    told: list[tuple[int, int, str]] = []
    assert make(run, Trained(), lambda *report: told.append(report)) == [9]
    assert told == [(1, 1, "training"), (0, 1, "numbers"), (1, 1, "numbers")]


@pytest.mark.parametrize("unit", [numbers(1), Numbers(top="sums", inputs=None, about="never known")])
def test_what_is_missing_after_it_was_made_has_vanished(run: Run, unit: Numbers) -> None:
    class Forgetful(Sums):
        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            LOG.append([])
            yield from ()

    with pytest.raises(FunctokError, match="sums vanished while they were made") as caught:
        make(run, Forgetful(unit))
    assert (caught.value.stage, caught.value.hint) == ("sums", "run again")
    assert made() == [[]]


# ---- what is there and not used


class Gated(Sums):
    """Sums above ten are refused."""

    def refused(
        self, run: Run, units: Sequence[Numbers], done: Mapping[str, Manifest]
    ) -> Sequence[FunctokError]:
        return [
            FunctokError(f"{unit.about} is above ten", hint="take smaller ones", stage=self.name)
            for unit in units
            if unit.folder in done and done[unit.folder].stats["sum"] > 10
        ]


def test_units_that_are_refused_are_made_once_and_said(run: Run, storage: Storage) -> None:
    stage = Gated(numbers(5, 6), numbers(1), numbers(20))
    with pytest.raises(FunctokError, match=r"the sum of \(5, 6\) is above ten"):
        make(run, stage)
    assert len(made()) == 3
    LOG.clear()
    after = opened(storage)
    assert not after.is_finished(stage)
    with pytest.raises(FunctokError, match=r"the sum of \(5, 6\) is above ten"):
        make(after, stage)
    assert made() == []
    (told,) = plan(after, [stage])
    assert (told.done, told.missing) == (0, 3)
    assert told.reason == "the sum of (5, 6) is above ten; the sum of (20,) is above ten"
    assert told.details[1] == "the sum of (20,) is above ten; way out: take smaller ones"
    # The others are used where they are asked for alone.
    assert make(opened(storage), Gated(numbers(1))) == [1]
    with pytest.raises(FunctokError, match="above ten"):
        make(after, Doubled(stage))


# ---- what a run would do


def test_plans_say_what_is_there_and_why_not(run: Run, storage: Storage) -> None:
    class Others(Sums):
        name = "others"

    sums, other = Sums(numbers(1), numbers(2)), Others(numbers(3))
    both = Doubled(sums, other)
    told = plan(run, [sums, both])
    assert (told[0].stage, told[0].done, told[0].missing) == ("sums", 0, 2)
    assert told[0].reason == "sums: their numbers are new"
    assert told[0].details == ("the sum of (1,)", "the sum of (2,)")
    assert (told[1].stage, told[1].done, told[1].missing) == ("doubled", 0, None)
    assert told[1].reason == "known once sums and others are done"
    assert made() == []
    make(run, sums)
    assert plan(run, [both])[0].reason == "known once others is done"

    class Unasked(Others):
        name, section = "unasked", "nowhere"

        def lacking(self, config: Config) -> str:
            return self.section

    assert Unasked().refuse(run.config).hint == "add [nowhere]"
    assert (
        plan(opened(storage), [Doubled(other, Unasked(numbers(8)))])[0].reason == "known once others is done"
    )
    make(run, other)
    told = plan(run, [sums, both])
    assert (told[0].done, told[0].missing, told[0].reason) == (2, 0, "all sums are there")
    assert told[0].details == ()
    assert (told[1].done, told[1].missing) == (0, 3)
    make(run, both)
    storage.delete(numbers(2, 2).folder)
    assert [(each.done, each.missing) for each in plan(opened(storage), [both])] == [(2, 1)]


# ---- writing


def test_each_unit_is_written_before_the_next_is_made(run: Run) -> None:
    class Watched(Sums):
        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            for made in super().make(run, group):
                yield made
                assert load(run.storage, group[0].folder) is not None
                LOG.append("seen")

    make(run, Watched(numbers(1), numbers(2)))
    assert LOG.count("seen") == 2


class Overlapping(Sums):
    """A unit is written while the next is made: its writing waits for that."""

    overlaps = True

    def __init__(self, *wanted: Numbers) -> None:
        super().__init__(*wanted)
        self.begun = [threading.Event() for _ in range(len(wanted) + 1)]
        self.begun[-1].set()
        self.written: list[int] = []

    def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
        place = self.wanted.index(group[0])
        LOG.append((place, list(self.written)))
        self.begun[place].set()
        yield from super().make(run, group)

    def write(self, run: Run, unit: Numbers) -> list[StoredFile]:
        place = self.wanted.index(unit)
        assert self.begun[place + 1].wait(30), "the next is not made before this is written"
        time.sleep(0.05)
        self.written.append(place)
        return super().write(run, unit)


def test_what_is_made_is_written_beside_the_making_of_the_next_and_one_waits_at_most(run: Run) -> None:
    stage = Overlapping(*map(numbers, range(5)))
    assert make(run, stage) == [0, 1, 2, 3, 4]
    assert stage.written == [0, 1, 2, 3, 4]
    for place, written in (entry for entry in LOG if isinstance(entry, tuple)):
        # What was made before the last is written: two lie in memory at most.
        assert written[: max(0, place - 1)] == list(range(place - 1))


@pytest.mark.parametrize("kind", [Sums, Overlapping])
def test_an_error_in_writing_ends_the_making_and_keeps_what_is_finished(
    run: Run, storage: Storage, kind: type[Sums]
) -> None:
    class Failing(kind):  # type: ignore[misc, valid-type]
        def write(self, run: Run, unit: Numbers) -> list[StoredFile]:
            written: list[StoredFile] = super().write(run, unit)
            if unit.numbers == (2,):
                raise OSError("no space left")
            return written

    units = [numbers(1), numbers(2), numbers(3), numbers(4)]
    with pytest.raises(OSError, match="no space left"):
        make(run, Failing(*units))
    assert LOG[-1] == "closed"
    assert [load(storage, unit.folder) is not None for unit in units] == [True, False, False, False]
    LOG.clear()
    assert make(opened(storage), Sums(*units)) == [1, 2, 3, 4]
    assert made() == [[(2,)], [(3,)], [(4,)]]


@pytest.mark.parametrize("kind", [Sums, Overlapping])
@pytest.mark.parametrize("error", [FunctokError("no"), KeyboardInterrupt()])
def test_an_error_in_making_keeps_what_waits_to_be_written(
    run: Run, storage: Storage, kind: type[Sums], error: BaseException
) -> None:
    class Failing(kind):  # type: ignore[misc, valid-type]
        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            for unit, made in zip(group, super().make(run, group), strict=True):
                if unit.numbers == (3,):
                    raise error
                yield made

    told: list[tuple[int, int, str]] = []
    run.tell = lambda *_: None
    before, units = run.tell, [numbers(1), numbers(2), numbers(3), numbers(4)]
    with pytest.raises(type(error)):
        make(run, Failing(*units), lambda *report: told.append(report))
    assert LOG[-1] == "closed"
    assert run.tell is before
    assert [load(storage, unit.folder) is not None for unit in units] == [True, True, False, False]
    LOG.clear()
    assert make(opened(storage), Sums(*units)) == [1, 2, 3, 4]
    assert made() == [[(3,)], [(4,)]]


# ---- progress


def test_progress_adds_up_what_is_told_between_and_what_is_written(run: Run) -> None:
    class Telling(Sums):
        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            for unit, made in zip(group, super().make(run, group), strict=True):
                for _ in unit.numbers[:-1]:
                    yield 1
                yield replace(made, size=1)

    told: list[tuple[int, int, str]] = []
    make(
        run,
        Telling(numbers(1, 1, 1), numbers(2, together="a"), numbers(3, 3, together="a")),
        lambda *r: told.append(r),
    )
    assert told == [(done, 6, "numbers") for done in range(7)]


def test_progress_rises_to_the_whole_whatever_a_group_tells(run: Run) -> None:
    class Wrong(Sums):
        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            yield 0
            if group[0].numbers[0] == 9:
                yield 100
            # Neither says how large what it made is: a limit may have ended it.
            for made in super().make(run, group):
                yield replace(made, size=0)

    told: list[tuple[int, int, str]] = []
    make(run, Wrong(numbers(1, 2), numbers(9, 9, 9)), lambda *report: told.append(report))
    assert told == [(0, 5, "numbers"), (2, 5, "numbers"), (5, 5, "numbers")]


def test_a_stage_without_a_measure_tells_by_itself(run: Run) -> None:
    class Own(Sums):
        measure = ""

        def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
            run.tell(3, 4, "steps")
            # A stage in a stage tells of itself, and gives the telling back.
            make(run, Sums(numbers(8)), run.tell)
            run.tell(4, 4, "steps")
            return super().make(run, group)

    told: list[tuple[int, int, str]] = []
    make(run, Own(numbers(1)), lambda *report: told.append(report))
    assert told == [(3, 4, "steps"), (0, 1, "numbers"), (1, 1, "numbers"), (4, 4, "steps")]
    assert run.tell is silent


# ---- workers


class Workers:
    """Stands in for a Dask client: two threads, which get what they work on as bytes."""

    def __init__(self) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        self.topics: dict[str, Any] = {}
        self.n_topics, self.retries = 0, set[int]()

    def subscribe_topic(self, topic: str, heard: Any) -> None:
        self.topics[topic], self.n_topics = heard, self.n_topics + 1

    def unsubscribe_topic(self, topic: str) -> None:
        del self.topics[topic]

    def log_event(self, topic: str, message: Any) -> None:
        self.topics[topic]((time.time(), message))

    def nthreads(self) -> dict[str, int]:
        return {"a": 1, "b": 1}

    def submit(self, work: Any, *arguments: Any, pure: bool, retries: int, priority: int) -> Any:
        assert not pure
        self.retries.add(retries)
        content = pickle.dumps(arguments)

        def tried() -> Any:
            for left in range(retries, -1, -1):
                try:
                    return pickle.loads(pickle.dumps(work(*pickle.loads(content))))
                except OSError:
                    if not left:
                        raise
            raise AssertionError

        future: Any = self.pool.submit(tried)
        future.status = "pending"
        future.add_done_callback(
            lambda done: setattr(done, "status", "error" if done.exception() else "finished")
        )
        return future


CLIENT = Workers()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    client = Workers()
    monkeypatch.setattr("distributed.as_completed", concurrent.futures.as_completed)
    monkeypatch.setattr("distributed.get_worker", lambda: SimpleNamespace(log_event=client.log_event))
    monkeypatch.setattr(f"{__name__}.CLIENT", client)
    return client


class OnWorkers(Sums):
    """Made on workers where there are several groups."""

    retries = 1

    def client(self, run: Run, groups: Sequence[Sequence[Numbers]]) -> AbstractContextManager[Any]:
        return nullcontext(CLIENT if len(groups) > 1 else None)

    def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
        LOG.append(("tell is silent", run.tell is silent))
        for unit in group:
            yield 0
            yield from super().make(run, [unit])


@pytest.mark.parametrize("seconds", [-1.0, 1e9])
def test_workers_make_what_one_process_makes(
    run: Run, workers: Workers, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(engine, "_TELL_SECONDS", seconds)
    units = [numbers(1, 2, together="a"), numbers(3, together="a"), *(numbers(n, n, n) for n in range(4, 9))]
    told: list[tuple[int, int, str]] = []
    assert make(run, OnWorkers(*units), lambda *report: told.append(report)) == [3, 3, 12, 15, 18, 21, 24]
    assert workers.n_topics == 1
    assert workers.topics == {}
    assert workers.retries == {1}
    assert sorted(made()) == sorted([[unit.numbers] for unit in units])
    assert ("tell is silent", False) not in LOG
    assert (told[0], told[-1]) == ((0, 18, "numbers"), (18, 18, "numbers"))
    assert told == sorted(told)
    # What a worker tells in between, where enough time has passed: the group of two before its end.
    assert len(told) == 1 + (7 if seconds < 0 else 6)


def test_one_group_is_made_here_although_there_are_workers(run: Run, workers: Workers) -> None:
    assert make(run, OnWorkers(numbers(1, 2))) == [3]
    assert workers.n_topics == 0


class Shared(OnWorkers):
    """Groups of large numbers are made by calls of their own, each of which makes a unit."""

    def shared(self, run: Run, groups: Sequence[Sequence[Numbers]], n_workers: int) -> list[int]:
        LOG.append(("workers", n_workers))
        return [place for place, group in enumerate(groups) if group[0].numbers[0] >= 100]

    def share(
        self, run: Run, groups: Mapping[int, Sequence[Numbers]], pool: Pool
    ) -> Iterator[tuple[int, int | Mapping[str, Manifest]]]:
        for place, group in groups.items():
            yield place, 1
            for unit in group:
                yield place, pool.commit(partial(self.one, run), unit).result()

    def one(self, run: Run, unit: Numbers) -> Iterator[Made]:
        LOG.append(("shared", unit.numbers))
        yield Made.of(unit, partial(self.write, run, unit), {"sum": sum(unit.numbers)})


def test_groups_that_workers_share_are_made_beside_the_others(run: Run, workers: Workers) -> None:
    units = [numbers(1), numbers(100, 1, 1, together="a"), numbers(2), numbers(200, together="a")]
    told: list[tuple[int, int, str]] = []
    assert make(run, Shared(*units), lambda *report: told.append(report)) == [1, 102, 2, 200]
    assert ("workers", 2) in LOG
    assert [entry[1] for entry in LOG if entry[0] == "shared"] == [(100, 1, 1), (200,)]
    assert sorted(made()) == [[(1,)], [(2,)]]
    assert (told[0], told[-1]) == ((0, 6, "numbers"), (6, 6, "numbers"))
    assert told == sorted(told)
    LOG.clear()
    assert make(run, Shared(*units)) == [1, 102, 2, 200]
    assert not [entry for entry in LOG if entry[0] == "shared"]


class Failing(OnWorkers):
    """Fails once, or always, at numbers that are said."""

    once = True

    def write(self, run: Run, unit: Numbers) -> list[StoredFile]:
        if unit.numbers[0] == 2 and not (self.once and "failed" in LOG):
            LOG.append("failed")
            raise OSError("the worker's disk is full")
        return super().write(run, unit)


class FailingAlways(Failing):
    once = False


def test_a_worker_tries_again_and_then_the_error_ends_the_making(
    run: Run, storage: Storage, workers: Workers
) -> None:
    units = [numbers(1), numbers(2), numbers(3)]
    assert make(run, Failing(*units)) == [1, 2, 3]
    assert LOG.count("failed") == 1
    storage.delete(units[1].folder)
    storage.delete(units[2].folder)
    with pytest.raises(OSError, match="the worker's disk is full"):
        make(opened(storage), FailingAlways(*units))
    assert LOG[-1] == "closed"
    assert load(storage, units[1].folder) is None


class Meeting(OnWorkers):
    """Each group waits for another to be made beside it."""

    alone = False
    barrier = threading.Barrier(2)

    def make(self, run: Run, group: Sequence[Numbers]) -> Iterator[Made | int]:
        try:
            self.barrier.wait(self.seconds())
        except threading.BrokenBarrierError:
            LOG.append("nobody came")
        return super().make(run, group)

    def seconds(self) -> float:
        return 30


class Shy(Meeting):
    alone = True
    barrier = threading.Barrier(2)

    def seconds(self) -> float:
        return 0.2


def test_a_process_makes_one_group_at_a_time_unless_the_stage_allows_several(
    run: Run, workers: Workers
) -> None:
    make(run, Meeting(numbers(1), numbers(2)))
    assert "nobody came" not in LOG
    make(run, Shy(numbers(3), numbers(4)))
    assert LOG.count("nobody came") == 2


def test_a_worker_gets_no_results_and_finds_them_again(storage: Storage) -> None:
    told: list[Any] = []
    run = Run(make_config(storage), storage, lambda *report: told.append(report))
    stage = Sums(numbers(1, 2))
    make(run, stage)
    assert run.result(stage) == [3]
    content = pickle.dumps(run)
    assert len(content) == len(pickle.dumps(opened(storage)))
    there = pickle.loads(content)
    assert (there.config, there.storage.root) == (run.config, storage.root)
    LOG.clear()
    assert there.result(stage) == [3]
    assert LOG == ["units"]
    there.tell(1, 1, "x")
    assert told == []
    unit = pickle.loads(pickle.dumps(stage.wanted[0]))
    assert (unit.folder, unit.numbers) == (stage.wanted[0].folder, (1, 2))


# ---- checks


def test_a_stage_without_a_question_is_asked_nothing(run: Run, storage: Storage) -> None:
    stage = Sums(numbers(1))
    with pytest.raises(FunctokError, match="the stage sums is not finished"):
        check(run, stage)
    make(run, stage)
    check(run, stage)
    assert not storage.exists(record_name(stage.name))


def test_a_suite_that_asks_each_folder_needs_the_folders(run: Run) -> None:
    class Counted(Sums):
        name = "tokenize"

        def question(self, run: Run, result: list[int]) -> Question:
            return Question(of={"sums": result})

    stage = Counted(numbers(1))
    make(run, stage)
    with pytest.raises(AssertionError, match=r"suite of tokenize .* has no folders"):
        check(run, stage)
