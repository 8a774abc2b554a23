"""What is made, as values: a unit is one folder, a stage says which units there are and how to make them.

A stage never looks for its folders, commits them, tells progress or knows where it runs: `tasks.engine.run` does that,
once, for all stages. Nothing here knows a stage by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import pyarrow as pa

from infra.manifest import Manifest, content_key, load_all, remember
from infra.storage import StoredFile
from schemas.arrow import declared
from schemas.config import Config
from schemas.errors import ConfigError, FunctokError
from tasks.engine import offenders

if TYPE_CHECKING:
    from tasks.engine.run import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """One folder to make or to find.

    A stage's own units add what `make` needs to know of them.

    Attributes:
        top: Top folder of the storage that it lies in.
        inputs: What its key is made of, as JSON can hold it; None where that is not known before it is made, which is
            then by `make` itself.
        about: What it is, in a line.
        size: How large it is, in the stage's measure.
        together: Units with an equal value are made in one go.
    """

    top: str
    inputs: Mapping[str, Any] | None
    about: str
    size: int = 1
    together: Hashable = None

    @cached_property
    def folder(self) -> str:
        """Its folder, named by its key; empty where that is not known yet."""
        return "" if self.inputs is None else f"{self.top}/{content_key(**self.inputs)}"


Written = tuple[Unit, Iterable[StoredFile], Mapping[str, Any]]
"""A unit whose files are written: they are committed with these stats."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """Work that is done, but for its writing.

    Attributes:
        size: How much it is, in the stage's measure.
        write: Writes files; they are committed when it returns. It may run beside what is made next (`Stage.overlaps`).
            What was committed by another process has nothing to write.
    """

    size: int = 0
    write: Callable[[], Iterable[Written]] = tuple

    @classmethod
    def of(
        cls, unit: Unit, write: Callable[[], Iterable[StoredFile]], stats: Mapping[str, Any] | None = None
    ) -> Made:
        """One unit, with stats that are known before its files are written."""
        return cls(size=unit.size, write=lambda: [(unit, write(), stats or {})])


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a stage's expectations are asked of.

    Attributes:
        small: Small tables that the expectations read, all of whose rows are part of the check's key.
        of: What that key is made of besides: a check that was passed is not made again.
        views: Makes the other tables that they read.
        put: Makes further ones by SQL on the connection; their names.
        folders: Folder to its own views, for what is asked of one folder at a time; None where nothing is.
        totals: View to {column: SQL aggregate}, counted in each folder and put beside its row of `shards`.
        rows: Makes the view `shards`, where there are folders; each row names its `folder`.
        manifests: Of the folders, where answers may stand that were given as they were made.
    """

    small: Mapping[str, pa.Table] = field(default_factory=dict)
    of: Mapping[str, Any] = field(default_factory=dict)
    views: Callable[[], Mapping[str, pa.Table]] = dict
    put: Callable[[Any], Collection[str]] = lambda connection: ()
    folders: Callable[[], Mapping[str, offenders.Views]] | None = None
    totals: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rows: Callable[[], Sequence[dict[str, Any]]] = list
    manifests: Callable[[], Mapping[str, Manifest]] = dict


def table_of(columns: str, rows: Iterable[Sequence[Any]]) -> pa.Table:
    """A small table from its columns, as SQL declares them, and its rows.

    >>> table_of("layer INTEGER, key VARCHAR", [(7, "a"), (15, "b")]).num_rows
    2
    """
    schema = declared(columns)
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A small table of what a stage has made, for those who watch.

    Attributes:
        name: Names it, in a word or two with hyphens.
        description: What it shows.
        rows: Column to value.
    """

    name: str
    description: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Image:
    """A picture for those who watch.

    Attributes:
        name: Names it, in a word or two with hyphens.
        description: What it shows.
        url: Its address, such as a data URI.
    """

    name: str
    description: str
    url: str


class Pool(Protocol):
    """Workers that a stage asks for more than whole groups."""

    @property
    def size(self) -> int:
        """How many calls they work at once."""
        ...

    def submit(self, function: Callable[..., Any], *args: Any, priority: int = 0) -> Any:
        """The future of a call; futures among its arguments stand for their results, which stay with the workers."""
        ...

    def commit(self, function: Callable[..., Iterable[Made]], *args: Any) -> Any:
        """The same, before other calls, of one that makes units: a worker commits them. Their manifests, by folder."""
        ...


U = TypeVar("U", bound=Unit)
R = TypeVar("R")


class Asked:
    """What a configuration asks for: always, or by a section of an experiment.

    Attributes:
        section: Where that is in the configuration, such as `consolidation.growth`; empty: it is always asked for.
    """

    section: ClassVar[str] = ""

    def applies(self, config: Config) -> bool:
        """Whether a configuration asks for it."""
        return not self.lacking(config)

    def lacking(self, config: Config) -> str:
        """What the configuration lacks that would ask for it."""
        found: Any = config
        parts = self.section.split(".") if self.section else []
        for n, part in enumerate(parts, 1):
            found = getattr(found, part)
            if found is None:
                return ".".join(parts[:n])
        return ""

    def subject(self, config: Config) -> str:
        """What a run of it is about, in a few words: `layer 7, 15, 22`."""
        return str(getattr(config, self.section.partition(".")[0]).subject) if self.section else ""


class Stage(Asked, ABC, Generic[U, R]):
    """A stage: `U` are its units, `R` is what stages after it get.

    Attributes:
        name: Its name: of its flow, its manifests, its expectations.
        measure: What sizes count, and of what, as progress says it: `tokens, features`. Empty where what is made tells
            its own progress (`Run.tell`).
        things: What its units are, for messages: `feature shards`.
        changed: Why units may be missing, for `functok status`.
        needs: Stages whose results it reads; they are finished before its units are asked for.
        overlaps: Whether what is made is written beside the making of the next; then at most one waits to be written.
        alone: Whether a process makes one group at a time (a model, a device); several threads may else.
        loads: Whether each group loads a model of its own, whose memory the next needs.
        retries: How often a worker tries a group again before the run fails.
        libraries: Libraries that take seconds to import and that it uses: they are imported while a server starts.
        tops: Top folders of the storage whose folders are its units, or are made by the way.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[Stage[Any, Any], ...]] = ()
    measure: ClassVar[str] = "units"
    things: ClassVar[str] = "units"
    changed: ClassVar[str] = "they are new or damaged, or what determines them changed"
    overlaps: ClassVar[bool] = False
    alone: ClassVar[bool] = True
    loads: ClassVar[bool] = False
    retries: ClassVar[int] = 0
    libraries: ClassVar[tuple[str, ...]] = ()
    tops: ClassVar[tuple[str, ...]] = ()

    def refuse(self, config: Config) -> FunctokError:
        """Why it does not apply to a configuration that asked for it by name, and what would make it."""
        if lacking := self.lacking(config):
            example = f"{lacking.partition('.')[0]}.toml"
            is_shown = (files("configs") / example).is_file()
            return ConfigError(
                f"this configuration has no {lacking} section, so there are no {self.things}",
                stage=self.name,
                hint=f"configs/{example} shows one" if is_shown else f"add [{lacking}]",
            )
        return FunctokError(f"the stage {self.name} does not apply to this configuration", stage=self.name)

    @abstractmethod
    def units(self, run: Run) -> Sequence[U]:
        """All units that a run asks for, in order. Reads manifests and small files, never weights."""

    def finished(self, run: Run, units: Sequence[U]) -> Mapping[str, Any]:
        """What is there of the units, by their folders: their manifests."""
        return load_all(run.storage, [unit.folder for unit in units if unit.folder])

    def refused(self, run: Run, units: Sequence[U], done: Mapping[str, Any]) -> Sequence[FunctokError]:
        """Why units that are there are not used."""
        return ()

    def prepare(self, run: Run, missing: Sequence[U]) -> Sequence[U]:
        """What is done once for all units that are missing, before the first is made.

        Checks that need no costly work, and what would cost requests of its own if each unit asked for it.

        Returns:
            The units to make, knowing more than before where that helps.
        """
        return missing

    def client(self, run: Run, groups: Sequence[Sequence[U]]) -> AbstractContextManager[Any]:
        """A Dask client whose workers make the groups; None: they are made here, one after another."""
        return nullcontext()

    @abstractmethod
    def make(self, run: Run, group: Sequence[U]) -> Iterator[Made | int]:
        """Make the units of a group; it runs here or on a worker, where `run` has no results but finds them again.

        Yields:
            What is done and is to be written, and numbers: progress in between, in the stage's measure.
        """

    def shared(self, run: Run, groups: Sequence[Sequence[U]], n_workers: int) -> Collection[int]:
        """Which groups all workers share, by their places; each of the others goes whole to one of them."""
        return ()

    def share(
        self, run: Run, groups: Mapping[int, Sequence[U]], pool: Pool
    ) -> Iterator[tuple[int, int | Mapping[str, Manifest]]]:
        """Make the groups that the workers share, by their places.

        Yields:
            A group's place, with progress in the stage's measure or with what was committed of it.
        """
        raise NotImplementedError(f"{self.name} has no groups to share")

    def close(self) -> None:
        """Free what was kept between groups."""

    def remember(self, run: Run, groups: Sequence[Sequence[U]], manifests: Mapping[str, Manifest]) -> None:
        """Write what was just committed into the index, so that nobody needs to read each of its files."""
        remember(run.storage, manifests)

    @abstractmethod
    def result(self, run: Run, units: Sequence[U], done: Mapping[str, Any]) -> R:
        """What stages after it get: values that name folders, never data. `done` is of all units, from `finished`."""

    def lines(self, missing: Sequence[U]) -> Sequence[str]:
        """What of the missing units `functok status` lists."""
        return [unit.about for unit in missing]

    def question(self, run: Run, result: R) -> Question | None:
        """What its expectations are asked of; None where it has none."""
        return None

    def shown(self, run: Run, result: R) -> Iterable[Shown]:
        """What people see of it in Prefect."""
        return ()
