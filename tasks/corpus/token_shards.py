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
from tasks.corpus.records import Record, read_records
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
    backend, special = _tokenizer(job.storage, job.tokenizer_folder)
    finished, ends_file = _finished_shards(job)
    folders, left = list(finished), _left(job.budget, finished.values())
    position = 0

    def close(shard: _OpenShard, folder: str, *, ends_file: bool) -> Made:
        nonlocal left
        folders.append(folder)
        left = left.without(shard.n_documents, shard.n_tokens)
        unit = ShardUnit(
            top="tokens", inputs={"tokenizer": job.tokenizer_folder}, about=folder, size=0, place=folder
        )
        return Made(write=lambda: [(unit, *shard.close(folder, ends_file=ends_file))])

    is_cut = not ends_file and left.is_spent
    if not ends_file and not is_cut:
        skip = sum(entry.n_records for entry in finished.values())
        records = read_records(job.file, job.corpus, skip)
        shard = _OpenShard(job, special)
        for record, ids in _tokenized(records, backend):
            if record.position > position:
                yield record.position - position
                position = record.position
            if ids is None:
                shard.add_reject(record)
                continue
            n_kept = shard.n_kept(ids)
            if not left.allows(shard.n_documents + 1, shard.n_tokens + n_kept):
                is_cut = True
                break
            shard.add_document(record, ids, n_kept)
            if shard.n_tokens >= job.corpus.shard_tokens:
                yield close(shard, f"{job.folder}/{len(folders):05d}", ends_file=False)
                shard = _OpenShard(job, special)
            if left.documents == shard.n_documents:
                is_cut = True
                break
        name = f"{job.folder}/{len(folders):05d}"
        if is_cut:
            if shard.n_documents:
                yield close(shard, f"{name}-first-{shard.n_documents}", ends_file=False)
        else:
            # Also where nothing is left: it says that the file ends here.
            yield close(shard, name, ends_file=True)
    manifests = manifests_of(job.storage, folders)
    made = FileShards(shards=tuple(_entry(folder, manifests[folder]) for folder in folders), is_cut=is_cut)
    if _is_listed(made):
        job.storage.write_json(_list_name(job, made), _to_json(made))


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


def _finished_shards(job: FileJob) -> tuple[dict[str, ShardEntry], bool]:
    """Shards that are there already, in order by folder, and whether the file ends with them."""
    entries: dict[str, ShardEntry] = {}
    while job.has_begun:
        folder = f"{job.folder}/{len(entries):05d}"
        manifest = load(job.storage, folder)
        if manifest is None:
            break
        entry = _entry(folder, manifest)
        if not _left(job.budget, entries.values()).allows(entry.n_documents, entry.n_tokens):
            break
        entries[folder] = entry
        if manifest.stats["ends_file"]:
            return entries, True
    return entries, False


_STATS = ("n_documents", "n_tokens", "n_rejects", "n_records", "n_bytes", "lost_bytes", "ends_early")


def _entry(folder: str, manifest: Manifest) -> ShardEntry:
    stats = {name: manifest.stats[name] for name in _STATS}
    return ShardEntry(folder=folder, files=manifest.files, **stats)


class _OpenShard:
    """A shard that is being filled.

    Rejects wait for the next document, so that a shard cut after n documents is a function of n alone.
    """

    def __init__(self, job: FileJob, special: npt.NDArray[np.int64]) -> None:
        self._job, self._special = job, special
        self._ids: list[npt.NDArray[np.int32]] = []
        self._documents: list[tuple[int, int, int]] = []
        self._rejects: list[Record] = []
        self._waiting: list[Record] = []
        self._document_bytes = 0
        self.n_tokens = 0

    @property
    def n_documents(self) -> int:
        """Documents so far."""
        return len(self._ids)

    def n_kept(self, ids: npt.NDArray[np.int32]) -> int:
        """How many of a document's tokens are not special."""
        return len(ids) - int(np.isin(ids, self._special).sum())

    def add_reject(self, record: Record) -> None:
        """Note a record that cannot be used."""
        self._waiting.append(record)

    def add_document(self, record: Record, ids: npt.NDArray[np.int32], n_kept: int) -> None:
        """Take a document in, of whose tokens `n_kept` are not special."""
        self._rejects += self._waiting
        self._waiting = []
        self._ids.append(ids)
        self._documents.append((record.line, len(record.text or ""), n_kept))
        self._document_bytes += record.n_bytes
        self.n_tokens += n_kept

    def close(self, folder: str, *, ends_file: bool) -> tuple[list[StoredFile], dict[str, Any]]:
        """Write the shard; its files and stats."""
        if ends_file:
            self._rejects += self._waiting
        storage = self._job.storage
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
        if self._job.corpus.keep_occurrences:
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
            "n_tokens": self.n_tokens,
            "n_rejects": len(self._rejects),
            "n_records": len(lengths) + len(self._rejects),
            "n_bytes": self._document_bytes + sum(record.n_bytes for record in self._rejects),
            "lost_bytes": sum(record.lost_bytes for record in self._rejects),
            "ends_early": any(record.ends_early for record in self._rejects),
            "ends_file": ends_file,
        }
        asked = {name: rows for name, rows in made.items() if name != "specials"}
        vocabulary = _vocabulary(storage, self._job.tokenizer_folder)
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


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text or "")
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenized(
    records: Iterator[Record], backend: Any
) -> Iterator[tuple[Record, npt.NDArray[np.int32] | None]]:
    """Records with their token ids, None for rejects; a batch is tokenized while the next is read."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: Future[list[tuple[Record, npt.NDArray[np.int32] | None]]] | None = None
        for batch in _batches(records):
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
def _tokenizer(storage: Storage, folder: str) -> tuple[Any, npt.NDArray[np.int64]]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(verified.read_bytes(storage, f"{folder}/tokenizer.json").decode())
    return backend, np.array(verified.read_json(storage, f"{folder}/special_ids.json"), dtype=np.int64)


@lru_cache(maxsize=1)
def _vocabulary(storage: Storage, folder: str) -> pa.Table:
    return verified.read_table(storage, f"{folder}/vocabulary.parquet")
