"""Tokenization: from corpus files to token shards and their counts (PAPER 1.1).

A file is one unit of work for a Dask worker: it streams records, tokenizes them in batches while the next
records are read, and closes a shard at the first document that brings it to `corpus.shard_tokens`. Counts
and document counts are kept by shard and add up in SQL, so files may come and go. (Splitting one file over
several workers would need formats that can be entered in the middle; a file's tokenizer threads use the
cores instead.)

Limits (`corpus.max_documents`, `max_tokens`) are applied in file order, which makes files wait for each
other: with a limit, files are tokenized one after another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra import verified
from infra.addresses import failed_at, without_credentials
from infra.cluster import tokenization_client
from infra.hashing import content_hash
from infra.manifest import Manifest, commit, content_key, load
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, Corpus
from schemas.errors import CorpusError, FunctokError
from schemas.tables import VOCABULARY
from schemas.work import CorpusShards, TokenShard
from tasks.corpus.file_jobs import Budget, FileJob, FileShards, ShardEntry
from tasks.corpus.files import CorpusFile, corpus_files
from tasks.corpus.token_shards import begun, find_file_shards, remember_file_shards, tokenize_file
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer

VERSION = 2
_TOPIC = "functok-tokenized-bytes"

SMALL_BYTES = 2 << 20
"""Files that have no more bytes in all are tokenized in this process: starting a worker takes longer."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    jobs: list[FileJob]
    tokenizer: LoadedTokenizer
    limit: Budget


def _plan(config: Config, storage: Storage) -> _Plan:
    tokenizer = load_tokenizer(config.model, storage)
    corpus = config.corpus
    reads = {
        **corpus.reads,
        "shard_tokens": corpus.shard_tokens,
        "keep_occurrences": corpus.keep_occurrences,
    }
    jobs = []
    for file in corpus_files(config):
        try:
            identity = content_hash(file.url, config.storage.endpoint_url)
        except OSError as error:
            raise CorpusError(f"cannot read {failed_at(file.url, error)}", stage="tokenize") from error
        key = content_key(
            version=VERSION,
            content=identity,
            format=file.format,
            compression=file.compression,
            tokenizer=tokenizer.key,
            reads=reads,
        )
        jobs.append(
            FileJob(
                file=file,
                folder=f"tokens/{key}",
                corpus=corpus,
                storage=storage,
                tokenizer_folder=tokenizer.folder,
            )
        )
    return _Plan(
        jobs=jobs, tokenizer=tokenizer, limit=Budget(documents=corpus.max_documents, tokens=corpus.max_tokens)
    )


@dataclass(frozen=True, kw_only=True)
class FoundCorpus:
    """What is there of a corpus.

    Attributes:
        finished: Files whose shards are there.
        missing: Files whose are not; under a limit the first one, as the rest depends on it.
        shards: All shards, where the corpus and its vocabulary are there and current.
    """

    finished: list[CorpusFile]
    missing: list[CorpusFile]
    shards: CorpusShards | None


def find_corpus(config: Config, storage: Storage) -> FoundCorpus:
    """What is there of the corpus.

    Raises:
        CorpusError: if all is there and has no document, or more rejects than `corpus.max_reject_share` allows.
    """
    plan = _plan(config, storage)
    done = _find(plan, storage)
    return FoundCorpus(
        finished=[job.file for job, found in zip(plan.jobs, done, strict=False) if found is not None],
        missing=[job.file for job, found in zip(plan.jobs, done, strict=False) if found is None],
        shards=_assemble(config, plan, done, storage),
    )


def find_corpus_shards(config: Config, storage: Storage) -> CorpusShards | None:
    """The tokenized corpus if all of it is finished and current, else None.

    Raises:
        CorpusError: if it has no document, more rejects than `corpus.max_reject_share` allows, or more unreadable
            files than `corpus.max_unreadable_files`.
    """
    return find_corpus(config, storage).shards


def tokenize_corpus(config: Config, storage: Storage, progress: Progress = silent) -> CorpusShards:
    """Tokenize what is missing of the corpus.

    Raises:
        ConfigError: if a URL matches nothing or has no known format.
        CorpusError: if a file cannot be read, there is no document, or there are too many rejects or unreadable
            files.
    """
    plan = _plan(config, storage)
    write_tokenizer(storage, plan.tokenizer)
    if plan.limit.is_open:
        todo = [job for job, found in zip(plan.jobs, _find(plan, storage), strict=True) if found is None]
        if todo:
            todo = begun(storage, todo)
            with _Watched(config, todo, progress) as watched:
                remember_file_shards(storage, todo, watched.run(todo))
    else:
        _tokenize_in_order(config, storage, plan, progress)
    shards = _assemble(config, plan, _find(plan, storage), storage)
    if shards is None:
        raise FunctokError("token shards vanished while they were made", stage="tokenize", hint="run again")
    return shards


def _find(plan: _Plan, storage: Storage) -> list[FileShards | None]:
    """What is there of each file, up to where the limit is reached."""
    if plan.limit.is_open:
        return find_file_shards(storage, plan.jobs, [plan.limit] * len(plan.jobs))
    found: list[FileShards | None] = []
    left = plan.limit
    for job in plan.jobs:
        shards = find_file_shards(storage, [job], [left])[0]
        found.append(shards)
        if shards is None:
            break
        left = left.after(shards)
        if left.is_spent or shards.is_cut:
            break
    return found


def _tokenize_in_order(config: Config, storage: Storage, plan: _Plan, progress: Progress) -> None:
    left = plan.limit
    for index, job in enumerate(plan.jobs):
        shards = find_file_shards(storage, [job], [left])[0]
        if shards is None:
            with _Watched(config, plan.jobs[: index + 1], progress) as watched:
                shards = watched.run([job.within(left)])[0]
        left = left.after(shards)
        if left.is_spent or shards.is_cut:
            return


def _assemble(
    config: Config, plan: _Plan, found: list[FileShards | None], storage: Storage
) -> CorpusShards | None:
    folder = plan.tokenizer.folder
    if any(file is None for file in found) or load(storage, folder) is None:
        return None
    shards: list[TokenShard] = []
    offset = 0
    for job, file in zip(plan.jobs, found, strict=False):
        assert file is not None
        for shard in file.shards:
            shards.append(
                TokenShard(
                    folder=shard.folder,
                    source=job.file.url,
                    doc_offset=offset,
                    n_documents=shard.n_documents,
                    n_tokens=shard.n_tokens,
                    n_rejects=shard.n_rejects,
                    has_specials="specials.parquet" in shard.files,
                )
            )
            offset += shard.n_documents
    corpus = CorpusShards(
        shards=tuple(shards),
        tokenizer_key=plan.tokenizer.key,
        vocabulary=f"{folder}/vocabulary.parquet",
        eos_id=plan.tokenizer.tokenizer.eos_token_id,
    )
    files = {job.file.url: file for job, file in zip(plan.jobs, found, strict=False) if file is not None}
    _check_usable(config.corpus, storage, files)
    return corpus


def _check_usable(corpus: Corpus, storage: Storage, files: Mapping[str, FileShards]) -> None:
    """Refuse a corpus of which too much could not be used; `files` by their URLs, in corpus order."""
    entries = [(url, entry) for url, file in files.items() for entry in file.shards]
    n_documents, n_rejects, n_bytes, lost_bytes = (
        sum(getattr(entry, name) for _, entry in entries)
        for name in ("n_documents", "n_rejects", "n_bytes", "lost_bytes")
    )
    read = n_documents + n_rejects
    of_records = n_rejects / read if read else 0.0
    of_bytes = lost_bytes / n_bytes if n_bytes else 0.0
    if max(of_records, of_bytes) > corpus.max_reject_share:
        if of_records < of_bytes:
            entries.sort(key=lambda named: -named[1].lost_bytes)
        raise CorpusError(
            f"{n_rejects} of {read} records ({of_records:.2%}), {lost_bytes:,} of {n_bytes:,} bytes ({of_bytes:.2%}), "
            f"cannot be used, more than corpus.max_reject_share = {corpus.max_reject_share:.2%}; the "
            f"{'largest' if of_records < of_bytes else 'first'}: {_examples(storage, entries, of_records < of_bytes)}",
            hint="mend the files, set corpus.text_field, corpus.format or corpus.csv, or raise corpus.max_reject_share",
            stage="tokenize",
        )
    if not n_documents:
        rejected = (
            f": all {read} records read cannot be used; the first: {_examples(storage, entries)}"
            if read
            else ""
        )
        raise CorpusError(
            f"the corpus has no document{rejected}",
            hint="check corpus.text_field" if read else "check corpus.urls and the limits",
            stage="tokenize",
        )
    unreadable = [(url, file) for url, file in files.items() if file.is_unreadable]
    if len(unreadable) > corpus.max_unreadable_files and corpus.max_reject_share < 1:
        shown = "; ".join(
            _examples(storage, [(url, entry) for entry in reversed(file.shards)], True, n=1)
            for url, file in unreadable[:3]
        )
        raise CorpusError(
            f"{len(unreadable)} of {len(files)} files gave no document or could not be read to their end, more than "
            f"corpus.max_unreadable_files = {corpus.max_unreadable_files}: {shown}",
            hint="mend the files, leave them out of corpus.urls, or raise corpus.max_unreadable_files",
            stage="tokenize",
        )


def _examples(
    storage: Storage, entries: Sequence[tuple[str, ShardEntry]], largest: bool = False, n: int = 3
) -> str:
    """Some rejects, with file and line: the first, or of each shard those that lost most."""
    examples: list[str] = []
    for url, entry in entries:
        if len(examples) < n and entry.n_rejects:
            rows = verified.read_table(storage, f"{entry.folder}/rejects.parquet").to_pylist()
            if largest:
                rows.sort(key=lambda row: -row["lost_bytes"])
            examples += [f"{without_credentials(url)}:{row['line']}: {row['reason']}" for row in rows[:n]]
    return "; ".join(examples[:n])


def write_tokenizer(storage: Storage, tokenizer: LoadedTokenizer) -> None:
    """Put the tokenizer where workers find it without transformers, and the decoded vocabulary beside it."""
    folder = tokenizer.folder
    if load(storage, folder) is not None:
        return
    vocabulary = pa.table([list(tokenizer.texts), list(tokenizer.texts.values())], schema=VOCABULARY)
    written = [
        storage.write_bytes(f"{folder}/tokenizer.json", tokenizer.backend.to_str().encode()),
        storage.write_json(f"{folder}/special_ids.json", list(tokenizer.special_ids)),
        storage.write_parquet(f"{folder}/vocabulary.parquet", vocabulary),
    ]
    commit(storage, folder, Manifest(stage="tokenizer", inputs={"key": tokenizer.key}), written)


class _Watched:
    """Runs file jobs and reports the bytes they have read: on a Dask cluster, or here where that is no gain."""

    def __init__(self, config: Config, jobs: list[FileJob], progress: Progress) -> None:
        self._dask, self._progress = config.dask, progress
        self._total = sum(job.file.size for job in jobs)
        self._read: dict[str, int] = {}
        self._lock, self._n_jobs = threading.Lock(), len(jobs)
        self._is_small = not config.dask.scheduler and self._total <= SMALL_BYTES

    def __enter__(self) -> _Watched:
        if self._is_small:
            return self
        self._context = tokenization_client(self._dask, self._n_jobs)
        self._client, _ = self._context.__enter__()
        self._client.subscribe_topic(_TOPIC, self._heard)
        return self

    def __exit__(self, *details: Any) -> None:
        if not self._is_small:
            self._context.__exit__(*details)

    def run(self, jobs: list[FileJob]) -> list[FileShards]:
        """Run jobs on the workers; results in the order of `jobs`."""
        self._progress(0, self._total, "bytes, tokenization")
        if self._is_small:
            return [self._run_here(job) for job in jobs]
        from distributed import as_completed

        futures = self._client.map(_run_job, jobs, pure=False, retries=1)
        index_of = {future.key: index for index, future in enumerate(futures)}
        results: dict[int, FileShards] = {}
        for future in as_completed(futures):
            index = index_of[future.key]
            results[index] = future.result()
            self._report(jobs[index].file.url, jobs[index].file.size)
        return [results[index] for index in range(len(jobs))]

    def _run_here(self, job: FileJob) -> FileShards:
        shards = tokenize_file(job, lambda position: self._report(job.file.url, position))
        self._report(job.file.url, job.file.size)
        return shards

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        message = event[1]
        self._report(str(message["url"]), int(message["bytes"]))

    def _report(self, url: str, position: int) -> None:
        with self._lock:
            self._read[url] = max(position, self._read.get(url, 0))
            done = min(sum(self._read.values()), self._total)
        self._progress(done, self._total, "bytes, tokenization")


def _run_job(job: FileJob) -> FileShards:
    from distributed import get_worker

    worker, last = get_worker(), [0.0]

    def report(position: int) -> None:
        if time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            worker.log_event(_TOPIC, {"url": job.file.url, "bytes": position})

    return tokenize_file(job, report)
