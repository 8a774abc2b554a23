"""The token shards of one corpus file: finding them, and making them as a stream.

A file's shards are numbered folders below the file's own, `tokens/<file key>/00000`, each with a manifest;
`file.json` lists them when the file is done and has several. A shard that a limit cuts short is a folder of its own,
`00003-first-120`, so that another limit never mistakes it for the whole. After a kill, finished shards are
kept, and the records that they hold are read over without being tokenized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra import verified
from infra.index import read_known, remember_files
from infra.manifest import Manifest, load, load_all, manifest_files, manifests_of
from infra.storage import Storage, StoredFile, json_bytes, unsealed
from schemas.errors import DamagedError, whole_message
from schemas.tables import SHARD_FILES
from tasks.corpus.file_jobs import Budget, FileJob, FileShards, ShardEntry
from tasks.corpus.records import Record, batches, read_records
from tasks.engine.checks import ask_of_made
from tasks.engine.offenders import Views
from tasks.engine.stage import Made, Unit

TOTALS = {
    "documents": {
        "found_documents": "count(*)",
        "found_document_tokens": "coalesce(sum(n_tokens), 0)::BIGINT",
    },
    "rejects": {"found_rejects": "count(*)"},
    "token_counts": {"found_counted_tokens": "coalesce(sum(count), 0)::BIGINT"},
}
"""What is counted in a token shard's folder."""

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 2_000_000


def shard_views(folder: str, n_documents: int, rows: Mapping[str, str | pa.Table]) -> Views:
    """A token shard's views: `documents`, `token_counts` and, where there are any, `rejects` and `occurrences`."""
    files = {"rejects": SHARD_FILES["rejects"].empty_table(), **rows}
    columns: dict[str, str | int | None] = {"folder": folder, "n_documents": n_documents}
    return Views(folder=folder, files=files, columns=columns, small=frozenset(files))


def _list_names(job: FileJob, budget: Budget) -> list[str]:
    whole = f"{job.folder}/file.json"
    return (
        [whole]
        if budget.is_open
        else [whole, f"{job.folder}/file-first-{budget.documents}-{budget.tokens}.json"]
    )


def find_file_shards(
    storage: Storage, jobs: Sequence[FileJob], budgets: Sequence[Budget]
) -> list[FileShards | None]:
    """What is finished of each file within its budget; None where it is not."""
    names = [_list_names(job, budget) for job, budget in zip(jobs, budgets, strict=True)]
    with storage.listed_once():
        known = read_known(storage, [name for group in names for name in group])
        listed: dict[str, FileShards] = {}
        for name, content in known.contents.items():
            # One that is damaged is written anew, from the shards that are there.
            with suppress(DamagedError):
                listed[name] = _from_json(unsealed(content, storage.url(name)))
        without = [job for job, group in zip(jobs, names, strict=True) if not listed.keys() & set(group)]
        alone = load_all(storage, [_first(job) for job in without])
    found: list[FileShards | None] = []
    for job, group, budget in zip(jobs, names, budgets, strict=True):
        there = [listed[name] for name in group if name in listed and _is_whole(listed[name], known.sizes)]
        manifest = alone.get(_first(job))
        if manifest is not None and manifest.stats["ends_file"]:
            there.append(_of_one(_first(job), manifest))
        fitting = (entry for entry in there if budget.allows(entry.n_documents, entry.n_tokens))
        found.append(next(fitting, None))
    return found


def _first(job: FileJob) -> str:
    return f"{job.folder}/{0:05d}"


def _of_one(folder: str, manifest: Manifest) -> FileShards:
    """The shards of a file that has one: its manifest says all that a list would."""
    return FileShards(shards=(_entry(folder, manifest),), is_cut=False)


def begun(storage: Storage, jobs: Sequence[FileJob]) -> list[FileJob]:
    """The same jobs, knowing of which of them something is there already."""
    there = {"/".join(name.split("/", 2)[:2]) for name in storage.sizes("tokens")}
    return [replace(job, has_begun=job.folder in there) for job in jobs]


def _from_json(value: dict[str, Any]) -> FileShards:
    return FileShards(shards=tuple(ShardEntry(**shard) for shard in value["shards"]), is_cut=value["is_cut"])


def _is_whole(shards: FileShards, sizes: dict[str, int]) -> bool:
    return all(
        sizes.get(f"{shard.folder}/{name}") == size
        for shard in shards.shards
        for name, size in shard.files.items()
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardUnit(Unit):
    """One shard of a file: a numbered folder below the file's own."""

    place: str

    @cached_property
    def folder(self) -> str:
        """The folder below the file's."""
        return self.place


def tokenize_file(job: FileJob) -> Iterator[Made | int]:
    """Make what is missing of a file's shards, and list them.

    Yields:
        Each shard, to be written before the next is made, and bytes of the file read between.
    """
    backend, special = tokenizer_of(job.storage, job.tokenizer_folder)
    finished, ends_file = finished_shards(job)
    cutter = Cutter(job, finished, ends_file=ends_file)
    position, is_over = 0, ends_file or cutter.is_cut
    if not is_over:
        skip = sum(entry.n_records for entry in finished.values())
        records = read_records(job.file, job.corpus, skip)
        shard = OpenShard(job, special)
        for record, ids in tokenized(records, backend):
            if record.position > position:
                yield record.position - position
                position = record.position
            if ids is None:
                shard.add_reject(record)
                continue
            n_kept = len(ids) - int(np.isin(ids, special).sum())
            if not cutter.fits(n_kept):
                break
            shard.add_document(record.line, len(record.text or ""), record.n_bytes, ids, n_kept)
            if folder := cutter.take(n_kept):
                yield made_shard(shard, folder, ends_file=False)
                shard = OpenShard(job, special)
            if cutter.is_cut:
                break
        if folder := cutter.end():
            yield made_shard(shard, folder, ends_file=not cutter.is_cut)
    write_list(job, cutter.folders, manifests_of(job.storage, cutter.folders), is_cut=cutter.is_cut)


def made_shard(shard: OpenShard, folder: str, *, ends_file: bool) -> Made:
    """A shard that is full, to be written into its folder."""
    inputs = {"tokenizer": shard.job.tokenizer_folder}
    unit = ShardUnit(top="tokens", inputs=inputs, about=folder, size=0, place=folder)
    return Made(write=lambda: [(unit, *shard.close(folder, ends_file=ends_file))])


def write_list(
    job: FileJob, folders: Sequence[str], manifests: Mapping[str, Manifest], *, is_cut: bool
) -> None:
    """List the shards of a file, all of which are there, where a list is needed to know it."""
    made = FileShards(shards=tuple(_entry(folder, manifests[folder]) for folder in folders), is_cut=is_cut)
    if _is_listed(made):
        job.storage.write_json(_list_name(job, made), _to_json(made))


class Cutter:
    """Where a file's shards end: at the first document that brings one to `corpus.shard_tokens`, and at the limit.

    Args:
        job: The file's.
        finished: Its shards that are there.
        ends_file: Whether the file ends with them.

    Attributes:
        folders: Of its shards so far, in order.
        left: What its limit leaves, besides the open shard.
        is_cut: Whether the limit is reached.
    """

    def __init__(self, job: FileJob, finished: Mapping[str, ShardEntry], *, ends_file: bool) -> None:
        self._folder, self._shard_tokens = job.folder, job.corpus.shard_tokens
        self.folders, self.left = list(finished), _left(job.budget, finished.values())
        self.is_cut = not ends_file and self.left.is_spent
        self._n_documents = self._n_tokens = 0

    def fits(self, n_kept: int) -> bool:
        """Whether the limit lets a document of so many tokens in; it is reached where not."""
        self.is_cut = not self.left.allows(self._n_documents + 1, self._n_tokens + n_kept)
        return not self.is_cut

    def take(self, n_kept: int) -> str:
        """Take it into the open shard; the shard's folder if it is full, and empty if not."""
        self._n_documents, self._n_tokens = self._n_documents + 1, self._n_tokens + n_kept
        folder = self._close("") if self._n_tokens >= self._shard_tokens else ""
        self.is_cut = self.left.documents == self._n_documents
        return folder

    def end(self) -> str:
        """End the file, or what is taken of it; the folder of the last shard, and empty if there is none.

        A file that is not cut has one, also where nothing is left for it: it says that the file ends here.
        """
        if not self.is_cut:
            return self._close("")
        return self._close(f"-first-{self._n_documents}") if self._n_documents else ""

    def _close(self, ending: str) -> str:
        self.folders.append(f"{self._folder}/{len(self.folders):05d}{ending}")
        self.left = self.left.without(self._n_documents, self._n_tokens)
        self._n_documents = self._n_tokens = 0
        return self.folders[-1]


def remember_shards(storage: Storage, jobs: Sequence[FileJob], manifests: Mapping[str, Manifest]) -> None:
    """Write what was just made of some files into the index, their lists too, so that nobody needs to read each."""
    of_job: dict[str, dict[str, Manifest]] = {}
    for folder, manifest in manifests.items():
        of_job.setdefault(folder.rsplit("/", 1)[0], {})[folder] = manifest
    lists: dict[str, bytes] = {}
    for job in jobs:
        own = of_job.get(job.folder, {})
        folders = [f"{job.folder}/{number:05d}" for number in range(len(own))]
        # A limit may not have reached the file; of one that was begun earlier, not all shards were made now.
        if own and own.keys() == set(folders) and own[folders[-1]].stats["ends_file"]:
            shards = tuple(_entry(folder, own[folder]) for folder in folders)
            made = FileShards(shards=shards, is_cut=False)
            if _is_listed(made):
                lists[_list_name(job, made)] = json_bytes(_to_json(made))
    remember_files(storage, lists | manifest_files(manifests))


def _is_listed(shards: FileShards) -> bool:
    """Whether a file's shards are in a list: a shard that is all of its file says so itself."""
    return shards.is_cut or len(shards.shards) > 1


def _list_name(job: FileJob, shards: FileShards) -> str:
    return _list_names(job, job.budget)[-1] if shards.is_cut else f"{job.folder}/file.json"


def _to_json(shards: FileShards) -> dict[str, Any]:
    return {"shards": [asdict(entry) for entry in shards.shards], "is_cut": shards.is_cut}


def _left(budget: Budget, entries: Iterable[ShardEntry]) -> Budget:
    return budget.after(FileShards(shards=tuple(entries), is_cut=False))


def finished_shards(job: FileJob) -> tuple[dict[str, ShardEntry], bool]:
    """Shards that are there already, in order by folder, and whether the file ends with them."""
    entries: dict[str, ShardEntry] = {}
    left = job.budget
    while job.has_begun:
        folder = f"{job.folder}/{len(entries):05d}"
        manifest = load(job.storage, folder)
        if manifest is None:
            break
        entry = _entry(folder, manifest)
        if not left.allows(entry.n_documents, entry.n_tokens):
            break
        entries[folder], left = entry, left.without(entry.n_documents, entry.n_tokens)
        if manifest.stats["ends_file"]:
            return entries, True
    return entries, False


_STATS = ("n_documents", "n_tokens", "n_rejects", "n_records", "n_bytes", "lost_bytes", "ends_early")


def _entry(folder: str, manifest: Manifest) -> ShardEntry:
    stats = {name: manifest.stats[name] for name in _STATS}
    return ShardEntry(folder=folder, files=manifest.files, **stats)


class OpenShard:
    """A shard that is being filled.

    Rejects wait for the next document, so that a shard cut after n documents is a function of n alone.

    Args:
        job: Its file's.
        special: Ids of special tokens.
    """

    def __init__(self, job: FileJob, special: npt.NDArray[np.int64]) -> None:
        self.job, self._special = job, special
        self._ids: list[npt.NDArray[np.int32]] = []
        self._documents: list[tuple[int, int, int]] = []
        self._rejects: list[Record] = []
        self._waiting: list[Record] = []
        self._document_bytes = self._n_tokens = 0

    def add_reject(self, record: Record) -> None:
        """Note a record that cannot be used."""
        self._waiting.append(record)

    def add_document(
        self, line: int, n_chars: int, n_bytes: int, ids: npt.NDArray[np.int32], n_kept: int
    ) -> None:
        """Take a document in, of whose tokens `n_kept` are not special."""
        self._rejects += self._waiting
        self._waiting = []
        self._ids.append(ids)
        self._documents.append((line, n_chars, n_kept))
        self._document_bytes += n_bytes
        self._n_tokens += n_kept

    def close(self, folder: str, *, ends_file: bool) -> tuple[list[StoredFile], dict[str, Any]]:
        """Write the shard; its files and stats."""
        if ends_file:
            self._rejects += self._waiting
        storage = self.job.storage
        lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        token_id = np.concatenate([*self._ids, np.empty(0, np.int32)])
        doc = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        starts = np.cumsum(lengths) - lengths
        position = (np.arange(len(token_id)) - np.repeat(starts, lengths)).astype(np.int32)
        is_special = np.isin(token_id, self._special)
        kept = ~is_special
        line, n_chars, n_tokens = (
            (list(column) for column in zip(*self._documents, strict=True))
            if self._documents
            else ([], [], [])
        )
        tables: dict[str, list[Any]] = {
            "documents": [np.arange(len(lengths), dtype=np.int32), line, n_chars, n_tokens],
            "rejects": [
                [record.line for record in self._rejects],
                [_storable(record.reason) for record in self._rejects],
                [record.lost_bytes for record in self._rejects],
                [record.n_lines for record in self._rejects],
            ],
            "token_counts": _counts(doc[kept], token_id[kept]),
        }
        if self.job.corpus.keep_occurrences:
            tables["occurrences"] = [doc[kept], position[kept], token_id[kept]]
            tables["specials"] = [doc[is_special], position[is_special], token_id[is_special]]
        made = {
            name: pa.table(columns, schema=SHARD_FILES[name])
            for name, columns in tables.items()
            # What has no rows is not written: each file is a request to write, and more to read.
            if name not in _WHERE_ANY or len(columns[0])
        }
        stats: dict[str, Any] = {
            "n_documents": len(lengths),
            "n_tokens": self._n_tokens,
            "n_rejects": len(self._rejects),
            "n_records": len(lengths) + len(self._rejects),
            "n_bytes": self._document_bytes + sum(record.n_bytes for record in self._rejects),
            "lost_bytes": sum(record.lost_bytes for record in self._rejects),
            "ends_early": any(record.ends_early for record in self._rejects),
            "ends_file": ends_file,
        }
        asked = {name: rows for name, rows in made.items() if name != "specials"}
        vocabulary = _vocabulary(storage, self.job.tokenizer_folder)
        stats |= ask_of_made(
            storage,
            "tokenize",
            shard_views(folder, len(lengths), asked),
            TOTALS,
            {"vocabulary": vocabulary},
        )
        written = [
            storage.write_parquet(f"{folder}/{name}.parquet", table, **_WRITE_OPTIONS.get(name, {}))
            for name, table in made.items()
        ]
        return written, stats


_WHERE_ANY = ("rejects", "specials")
"""Files that a shard has only where they have rows."""


def _storable(reason: str) -> str:
    """A reason may quote the file (a column's name), whose bytes need not be UTF-8."""
    return reason.encode("utf-8", "backslashreplace").decode()


_WRITE_OPTIONS: dict[str, dict[str, Any]] = {
    "occurrences": {
        "use_dictionary": ["doc", "token_id"],
        "column_encoding": {"position": "DELTA_BINARY_PACKED"},
        "row_group_size": 1 << 20,
    }
}


def _counts(doc: npt.NDArray[np.int32], token_id: npt.NDArray[np.int32]) -> list[npt.NDArray[Any]]:
    ids, counts = np.unique(token_id, return_counts=True)
    # Sorted here: without counts np.unique hashes, which takes ten times as long.
    pairs = np.sort(token_id.astype(np.int64) << 32 | doc)
    distinct = pairs[np.diff(pairs, prepend=-1) != 0]
    return [ids, counts, np.unique(distinct >> 32, return_counts=True)[1]]


def tokenized(
    records: Iterator[Record], backend: Any
) -> Iterator[tuple[Record, npt.NDArray[np.int32] | None]]:
    """Records with their token ids, None for rejects; a batch is tokenized while the next is read."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: Future[list[tuple[Record, npt.NDArray[np.int32] | None]]] | None = None
        for batch in batches(records, _BATCH_DOCUMENTS, _BATCH_CHARACTERS):
            submitted = pool.submit(_encode, backend, batch)
            if pending is not None:
                yield from pending.result()
            pending = submitted
        if pending is not None:
            yield from pending.result()


def _encode(backend: Any, batch: list[Record]) -> list[tuple[Record, npt.NDArray[np.int32] | None]]:
    texts = [record.text for record in batch if record.text is not None]
    try:
        encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
    except Exception:
        # The tokenizer names no culprit: find it, so that only its record is lost.
        return [_encode_one(backend, record) for record in batch]
    return [
        (record, None if record.text is None else np.array(next(encodings).ids, dtype=np.int32))
        for record in batch
    ]


def _encode_one(backend: Any, record: Record) -> tuple[Record, npt.NDArray[np.int32] | None]:
    if record.text is None:
        return record, None
    try:
        return record, np.array(backend.encode(record.text, add_special_tokens=False).ids, dtype=np.int32)
    except Exception as error:
        return record._replace(text=None, reason=f"the tokenizer failed: {whole_message(error)}"), None


@lru_cache(maxsize=1)
def tokenizer_of(storage: Storage, folder: str) -> tuple[Any, npt.NDArray[np.int64]]:
    """The tokenizer of a folder of the storage, and the ids of its special tokens."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(verified.read_bytes(storage, f"{folder}/tokenizer.json").decode())
    return backend, np.array(verified.read_json(storage, f"{folder}/special_ids.json"), dtype=np.int64)


@lru_cache(maxsize=1)
def _vocabulary(storage: Storage, folder: str) -> pa.Table:
    return verified.read_table(storage, f"{folder}/vocabulary.parquet")
