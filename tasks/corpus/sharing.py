"""Files whose tokenization all workers share.

Parts of files are tokenized ahead by whoever is free, in the order of the corpus; where shards end is told here, from
how many tokens each document has, as it would be of one file after another by one process. So shards do not depend on
how many workers there are, nor on the parts. What waits is bounded: parts that are asked for, pieces of the shards that
are open, and shards that are being written. Texts and tokens lie with the workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infra.manifest import Manifest, manifests_of
from schemas.errors import FunctokError
from tasks.corpus.file_jobs import Budget, FileJob, ShardEntry
from tasks.corpus.parts import LineRange, Part, parts_of, rest_of
from tasks.corpus.pieces import Cut, tell, tokenize_part, write_shards
from tasks.corpus.token_shards import Cutter, find_file_shards, finished_shards, write_list
from tasks.engine.stage import Pool


def share_files(
    jobs: Sequence[tuple[int, FileJob]], limit: Budget, pool: Pool
) -> Iterator[tuple[int, int | Mapping[str, Manifest]]]:
    """Make what is missing of the shards of files, and list them.

    Args:
        jobs: In corpus order, each with a number that names it.
        limit: What may be taken of all together.
        pool: The workers.

    Yields:
        The number of a file with bytes of it that were read, or with shards that were committed.
    """
    ahead, writing, left = _Ahead([job for _, job in jobs], pool), _Writing(pool), limit
    for place, (number, of_file) in enumerate(jobs):
        job, reading = replace(of_file, budget=left), ahead.reading(place)
        if not left.is_open:
            there = find_file_shards(job.storage, [job], [left])[0]
            if there is not None:
                left = left.after(there)
                ahead.close(place)
                if left.is_spent or there.is_cut:
                    break
                continue
            reading.begin_with(*finished_shards(job))
        shards = _Shards(job, reading.finished, number, ends_file=reading.ends_file)
        while not shards.cutter.is_cut and (tokenized := ahead.take(place)) is not None:
            part, told = tokenized.part, tokenized.told.result()
            if told.is_open and isinstance(part, LineRange) and part.end < job.file.size:
                reading.go_on(
                    rest_of(
                        job.file,
                        job.corpus,
                        part,
                        shards.n_lines if part.lines_before is None else part.lines_before,
                    )
                )
                continue
            yield number, part.n_bytes
            yield from writing.add(shards, shards.add(part, tokenized.piece, told))
        yield from writing.add(shards, shards.end(), is_last=True)
        ahead.close(place)
        left = shards.cutter.left
        if shards.cutter.is_cut or left.is_spent:
            break
    # What was tokenized in vain is not waited for.
    del ahead
    yield from writing.settle()


@dataclass
class _Tokenized:
    """A part that is or will be tokenized: futures of its piece and of what is told of it."""

    part: Part
    piece: Any
    told: Any


class _Reading:
    """A file that is being read: its parts, as they are asked for."""

    def __init__(self, job: FileJob) -> None:
        self._job = job
        self._error: FunctokError | None = None
        self.waiting: deque[_Tokenized] = deque()
        self._set(*finished_shards(job))

    def _set(self, finished: Mapping[str, ShardEntry], ends_file: bool) -> None:
        self.finished, self.ends_file = finished, ends_file
        n_records, n_bytes = (
            sum(getattr(entry, name) for entry in finished.values()) for name in ("n_records", "n_bytes")
        )
        file, corpus = self._job.file, self._job.corpus
        self.go_on(iter(()) if ends_file else parts_of(file, corpus, n_records, n_bytes))

    def begin_with(self, finished: Mapping[str, ShardEntry], ends_file: bool) -> None:
        """Begin anew, if other shards of it than was thought are there, or a limit lets fewer in."""
        if finished.keys() != self.finished.keys() or ends_file != self.ends_file:
            self._set(finished, ends_file)

    def go_on(self, parts: Iterator[Part]) -> None:
        """Go on with these parts; what was asked for is dropped."""
        self.waiting.clear()
        self._parts, self._is_over, self._error = parts, False, None

    def ask(self, pool: Pool) -> bool:
        """Let the next part be tokenized, if there is any."""
        if self._is_over:
            return False
        try:
            part = next(self._parts, None)
        except FunctokError as error:
            # Told when it is this file's turn: a limit may come before.
            part, self._error = None, error
        self._is_over = part is None
        if part is not None:
            piece = pool.submit(tokenize_part, self._job, part)
            self.waiting.append(_Tokenized(part=part, piece=piece, told=pool.submit(tell, piece, priority=1)))
        return part is not None

    def take(self, pool: Pool) -> _Tokenized | None:
        """The next of its parts; None where there are no more.

        Raises:
            FunctokError: if it cannot be read on.
        """
        if not self.waiting and not self.ask(pool):
            if self._error is not None:
                raise self._error
            return None
        return self.waiting.popleft()


class _Ahead:
    """Files that are read ahead, so that no worker waits for where shards end, nor for the end of a file."""

    def __init__(self, jobs: Sequence[FileJob], pool: Pool) -> None:
        self._jobs, self._pool, self._most = jobs, pool, 2 * pool.size + 2
        self._open: dict[int, _Reading] = {}
        self._next = 0

    def reading(self, place: int) -> _Reading:
        """A file by its place."""
        while self._next <= place:
            self._begin()
        return self._open[place]

    def take(self, place: int) -> _Tokenized | None:
        """The next part of the file whose turn it is, once more is asked for."""
        while sum(len(reading.waiting) for reading in self._open.values()) < self._most:
            if any(reading.ask(self._pool) for reading in self._open.values()):
                continue
            if self._next == len(self._jobs) or len(self._open) >= self._most:
                break
            self._begin()
        return self._open[place].take(self._pool)

    def close(self, place: int) -> None:
        """A file is done."""
        del self._open[place]

    def _begin(self) -> None:
        self._open[self._next] = _Reading(self._jobs[self._next])
        self._next += 1


class _Shards:
    """The shards of a file, cut from its pieces."""

    def __init__(
        self, job: FileJob, finished: Mapping[str, ShardEntry], number: int, *, ends_file: bool
    ) -> None:
        self.job, self.number, self._is_whole = job, number, ends_file
        self.cutter = Cutter(job, finished, ends_file=ends_file)
        self._finished = list(finished)
        self.manifests: dict[str, Manifest] = {}
        self.n_lines = 0
        self._pieces: list[_Placed] = []
        self._first = self._last = 0

    def add(self, part: Part, piece: Any, told: Any) -> _Cuts | None:
        """The next piece: the shards that it fills, if any."""
        before = self.n_lines if part.lines_before is None else 0
        self.n_lines = before + told.n_lines
        n, trails = len(told.n_kept), told.ends_in_rejects
        self._pieces.append(_Placed(piece=piece, lines_before=before, n_documents=n, ends_in_rejects=trails))
        cuts: list[Cut] = []
        for n_kept in told.n_kept:
            if not self.cutter.fits(n_kept):
                break
            self._last += 1
            if folder := self.cutter.take(n_kept):
                cuts.append(self._cut(folder, ends_file=False))
            if self.cutter.is_cut:
                break
        return self._made(cuts)

    def end(self) -> _Cuts | None:
        """The last shard, if there is one."""
        folder = "" if self._is_whole else self.cutter.end()
        return self._made([self._cut(folder, ends_file=not self.cutter.is_cut)] if folder else [])

    def _cut(self, folder: str, *, ends_file: bool) -> Cut:
        first, self._first = self._first, self._last
        return Cut(folder=folder, first=first, last=self._last, ends_file=ends_file)

    def _made(self, cuts: list[Cut]) -> _Cuts | None:
        pieces = tuple(self._pieces)
        # Of those before the open shard, only what waits for its first document is needed.
        while self._pieces and self._pieces[0].is_over(self._first):
            dropped = self._pieces.pop(0)
            self._first, self._last = self._first - dropped.n_documents, self._last - dropped.n_documents
        return _Cuts(cuts=tuple(cuts), pieces=pieces) if cuts else None

    def write_list(self) -> None:
        """List them; all are there."""
        manifests = manifests_of(self.job.storage, self._finished) | self.manifests
        write_list(self.job, self.cutter.folders, manifests, is_cut=self.cutter.is_cut)


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A piece, and what the numbers of its lines are short of."""

    piece: Any
    lines_before: int
    n_documents: int
    ends_in_rejects: bool

    def is_over(self, first: int) -> bool:
        """Whether nothing of it is left for a shard that begins with document `first`."""
        return self.n_documents + self.ends_in_rejects <= first


@dataclass(frozen=True, kw_only=True)
class _Cuts:
    """Shards to be made, and the pieces that hold them."""

    cuts: tuple[Cut, ...]
    pieces: tuple[_Placed, ...]


@dataclass
class _Writing:
    """Shards that are being made, the oldest first."""

    pool: Pool
    _waiting: deque[tuple[_Shards, Any, bool]] = field(default_factory=deque)

    def add(
        self, shards: _Shards, made: _Cuts | None, *, is_last: bool = False
    ) -> Iterator[tuple[int, Mapping[str, Manifest]]]:
        """Let shards of a file be made; those that were made meanwhile, where too many wait."""
        future = None
        if made is not None:
            before = tuple(placed.lines_before for placed in made.pieces)
            pieces = (placed.piece for placed in made.pieces)
            future = self.pool.commit(write_shards, shards.job, made.cuts, before, *pieces)
        if future is not None or is_last:
            self._waiting.append((shards, future, is_last))
        yield from self.settle(2 * self.pool.size)

    def settle(self, most: int = 0) -> Iterator[tuple[int, Mapping[str, Manifest]]]:
        """Wait until at most so many are left."""
        while len(self._waiting) > most:
            shards, future, is_last = self._waiting.popleft()
            if future is not None:
                manifests = future.result()
                shards.manifests.update(manifests)
                yield shards.number, manifests
            if is_last:
                shards.write_list()
