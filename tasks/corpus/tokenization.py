"""Tokenization: from corpus files to token shards and their counts (PAPER 1.1).

A small file is one unit of work for a Dask worker: it streams records, tokenizes them in batches while the next
records are read, and closes a shard at the first document that brings it to `corpus.shard_tokens`. Of a large one all
workers tokenize parts, and its shards are cut at the same documents (`tasks.corpus.sharing`). Counts
and document counts are kept by shard and add up in SQL, so files may come and go.

Limits (`corpus.max_documents`, `max_tokens`) are applied in file order: with one, parts of all files are tokenized
ahead, and what comes after it is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from infra import verified
from infra.addresses import without_credentials
from infra.cluster import tokenization_client
from infra.manifest import Manifest, commit, load, load_all
from infra.storage import Storage
from schemas.config import Config, Corpus
from schemas.corpus.tables import VOCABULARY
from schemas.errors import CorpusError
from schemas.work import CorpusShards, TokenShard
from tasks.corpus.file_jobs import Budget, FileJob, FileShards, ShardEntry
from tasks.corpus.files import CorpusFile, content_of, corpus_files
from tasks.corpus.parts import PART_BYTES, can_be_entered
from tasks.corpus.sharing import share_files
from tasks.corpus.token_shards import (
    TOTALS,
    begun,
    find_file_shards,
    remember_shards,
    shard_views,
    tokenize_file,
)
from tasks.corpus.tokenizer_training import train_tokenizer, with_tokenizer
from tasks.engine.offenders import Views
from tasks.engine.run import Run
from tasks.engine.stage import Made, Pool, Question, Shown, Stage, Unit
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer

VERSION = 2

SMALL_BYTES = 2 << 20
"""Files that have no more bytes in all are tokenized in this process: starting a worker takes longer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileUnit(Unit):
    """One corpus file; its shards lie in numbered folders below its own.

    Attributes:
        jobs: The file's; under a limit, those of all files before it too. None: the tokenizer is to be trained first.
    """

    jobs: tuple[FileJob, ...]


class Tokenize(Stage[FileUnit, CorpusShards]):
    """Each document whole, without special tokens, and every token counted."""

    name = "tokenize"
    measure = "bytes, tokenization"
    things = "token shards"
    changed = "files are new or changed, or what tokenization reads of the configuration is"
    libraries = ("transformers",)
    tops = ("tokens", "tokenizers", "models", "heldout")
    alone = False
    retries = 1

    def subject(self, config: Config) -> str:
        """The first files' names."""
        files = [url.rstrip("/").rsplit("/", 1)[-1] for url in config.corpus.urls]
        return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")

    def units(self, run: Run) -> Sequence[FileUnit]:
        """A unit a file.

        Raises:
            ConfigError: if a URL matches nothing or has no known format.
            CorpusError: if a file cannot be read.
        """
        config = with_tokenizer(run.config, run.storage)
        if config is None:
            about = "the tokenizer is still to be trained on the corpus"
            return [FileUnit(top="tokens", inputs=None, about=about, jobs=())]
        tokenizer, corpus = load_tokenizer(config.model, run.storage), config.corpus
        reads = {
            **corpus.reads,
            "shard_tokens": corpus.shard_tokens,
            "keep_occurrences": corpus.keep_occurrences,
        }
        units = []
        for file in corpus_files(config):
            unit = FileUnit(
                top="tokens",
                inputs={
                    "version": VERSION,
                    "content": content_of(file),
                    "format": file.format,
                    "compression": file.compression,
                    "tokenizer": tokenizer.key,
                    "reads": reads,
                },
                about=f"tokenize {without_credentials(file.url)}",
                size=file.size,
                together=None if _limit(corpus).is_open else "one after another",
                jobs=(),
            )
            job = FileJob(
                file=file,
                folder=unit.folder,
                corpus=corpus,
                storage=run.storage,
                tokenizer_folder=tokenizer.folder,
            )
            units.append(replace(unit, jobs=(job,)))
        return units

    def finished(self, run: Run, units: Sequence[FileUnit]) -> Mapping[str, FileShards]:
        """The shards of each file, as far as a limit asks for any; a file that it does not reach has none."""
        if not all(unit.jobs for unit in units):
            return {}
        jobs, left = [unit.jobs[0] for unit in units], _limit(run.config.corpus)
        if load(run.storage, jobs[0].tokenizer_folder) is None:
            return {}
        if left.is_open:
            found = find_file_shards(run.storage, jobs, [left] * len(jobs))
            return {job.folder: shards for job, shards in zip(jobs, found, strict=True) if shards is not None}
        done: dict[str, FileShards] = {}
        for job in jobs:
            shards = FileShards(shards=(), is_cut=True)
            if not left.is_spent:
                there = find_file_shards(run.storage, [job], [left])[0]
                if there is None:
                    # What the files after it may hold depends on it.
                    return done
                shards = there
                left = replace(left, documents=0) if shards.is_cut else left.after(shards)
            done[job.folder] = shards
        return done

    def prepare(self, run: Run, missing: Sequence[FileUnit]) -> Sequence[FileUnit]:
        """Put the tokenizer where workers find it, and see what was begun."""
        if not missing[0].jobs:
            train_tokenizer(run.config, run.storage, run.tell)
            return []
        config = with_tokenizer(run.config, run.storage)
        assert config is not None
        write_tokenizer(run.storage, load_tokenizer(config.model, run.storage))
        if _limit(config.corpus).is_open:
            jobs = begun(run.storage, [unit.jobs[0] for unit in missing])
            return [replace(unit, jobs=(job,)) for unit, job in zip(missing, jobs, strict=True)]
        every = tuple(unit.jobs[0] for unit in run.find(self).units)
        return [replace(missing[0], size=sum(unit.size for unit in missing), jobs=every)]

    def client(self, run: Run, groups: Sequence[Sequence[FileUnit]]) -> AbstractContextManager[Any]:
        """The cluster's or this machine's workers, unless starting some takes longer than the work."""
        dask, total = run.config.dask, sum(unit.size for group in groups for unit in group)
        if not groups or (not dask.scheduler and total <= SMALL_BYTES):
            return nullcontext()
        return tokenization_client(
            dask, sum(max(1, unit.size // PART_BYTES) for group in groups for unit in group)
        )

    def shared(self, run: Run, groups: Sequence[Sequence[FileUnit]], n_workers: int) -> Collection[int]:
        """The large files that can be entered in their middle; others too, where there are fewer files than workers.

        Under a limit all files are one group. A worker alone reads while it tokenizes, and so needs no parts.
        """
        if n_workers == 1:
            return ()
        if not _limit(run.config.corpus).is_open:
            return range(len(groups))
        files = [group[0].jobs[0].file for group in groups]
        return [
            place
            for place, file in enumerate(files)
            if file.size >= 2 * PART_BYTES and (len(files) < n_workers or _is_entered(file))
        ]

    def share(
        self, run: Run, groups: Mapping[int, Sequence[FileUnit]], pool: Pool
    ) -> Iterator[tuple[int, int | Mapping[str, Manifest]]]:
        """Their shards, in order."""
        jobs = [(place, job) for place, group in groups.items() for unit in group for job in unit.jobs]
        yield from share_files(jobs, _limit(run.config.corpus), pool)

    def make(self, run: Run, group: Sequence[FileUnit]) -> Iterator[Made | int]:
        """A file's shards; under a limit those of all files, in order, as far as it reaches."""
        (unit,) = group
        if len(unit.jobs) == 1 and unit.jobs[0].budget.is_open and _limit(unit.jobs[0].corpus).is_open:
            yield from tokenize_file(unit.jobs[0])
            return
        left = _limit(unit.jobs[0].corpus)
        for job in unit.jobs:
            shards = find_file_shards(job.storage, [job], [left])[0]
            if shards is None:
                yield from tokenize_file(replace(job, budget=left))
                shards = find_file_shards(job.storage, [job], [left])[0]
                assert shards is not None
            left = left.after(shards)
            if left.is_spent or shards.is_cut:
                return

    def remember(
        self, run: Run, groups: Sequence[Sequence[FileUnit]], manifests: Mapping[str, Manifest]
    ) -> None:
        """Shards' manifests and files' lists."""
        remember_shards(
            run.storage, [job for group in groups for unit in group for job in unit.jobs], manifests
        )

    def result(self, run: Run, units: Sequence[FileUnit], done: Mapping[str, FileShards]) -> CorpusShards:
        """The tokenized corpus.

        Raises:
            CorpusError: if it has no document, more rejects than `corpus.max_reject_share` allows, or more unreadable
                files than `corpus.max_unreadable_files`.
        """
        config = with_tokenizer(run.config, run.storage)
        assert config is not None
        tokenizer = load_tokenizer(config.model, run.storage)
        shards: list[TokenShard] = []
        offset = 0
        for unit in units:
            for shard in done[unit.folder].shards:
                shards.append(
                    TokenShard(
                        folder=shard.folder,
                        source=unit.jobs[0].file.url,
                        doc_offset=offset,
                        n_documents=shard.n_documents,
                        n_tokens=shard.n_tokens,
                        n_rejects=shard.n_rejects,
                        has_specials="specials.parquet" in shard.files,
                    )
                )
                offset += shard.n_documents
        files = {unit.jobs[0].file.url: done[unit.folder] for unit in units}
        _check_usable(config.corpus, run.storage, files)
        return CorpusShards(
            shards=tuple(shards),
            tokenizer_key=tokenizer.key,
            vocabulary=f"{tokenizer.folder}/vocabulary.parquet",
            eos_id=tokenizer.tokenizer.eos_token_id,
        )

    def question(self, run: Run, result: CorpusShards) -> Question:
        """The token shards, and that they are the whole corpus."""
        storage = run.storage
        kept = ["documents", "token_counts", *["occurrences"] * run.config.corpus.keep_occurrences]

        def manifests() -> dict[str, Manifest]:
            return load_all(storage, [shard.folder for shard in result.shards])

        def views(shard: TokenShard) -> Views:
            # A shard without rejects has no file of them.
            names = (*kept, *["rejects"] * bool(shard.n_rejects))
            files = {name: f"{shard.folder}/{name}.parquet" for name in names}
            return shard_views(shard.folder, shard.n_documents, files)

        def rows() -> list[dict[str, Any]]:
            stats = {folder: manifest.stats for folder, manifest in manifests().items()}
            return [
                {
                    **identity(shard),
                    "place": place,
                    "n_records": stats.get(shard.folder, {}).get("n_records"),
                }
                for place, shard in enumerate(result.shards)
            ]

        return Question(
            of={"shards": [identity(shard) for shard in result.shards], "of": result.vocabulary},
            views=lambda: {"vocabulary": verified.read_table(storage, result.vocabulary)},
            folders=lambda: {shard.folder: views(shard) for shard in result.shards},
            totals=TOTALS,
            rows=rows,
            manifests=manifests,
        )

    def shown(self, run: Run, result: CorpusShards) -> Iterable[Shown]:
        """How much each corpus file gave."""
        sources: dict[str, list[int]] = {}
        for shard in result.shards:
            counts = sources.setdefault(without_credentials(shard.source), [0, 0, 0, 0])
            for index, more in enumerate((1, shard.n_documents, shard.n_tokens, shard.n_rejects)):
                counts[index] += more
        names = ("source", "shards", "documents", "tokens", "rejects")
        yield Shown(
            name="corpus",
            description=f"{result.n_documents:,} documents, {result.n_tokens:,} tokens and {result.n_rejects:,} "
            "rejects",
            rows=[dict(zip(names, (source, *counts), strict=True)) for source, counts in sources.items()],
        )


TOKENIZE = Tokenize()


def identity(shard: TokenShard) -> dict[str, Any]:
    """A token shard as columns."""
    names = ("folder", "source", "doc_offset", "n_documents", "n_tokens", "n_rejects")
    return {name: getattr(shard, name) for name in names}


def _is_entered(file: CorpusFile) -> bool:
    """Whether a file is likely read from its middle: whether rows of a table run over line ends is seen later."""
    return file.compression is None and file.format in ("jsonl", "txt", "parquet") and can_be_entered(file)


def _limit(corpus: Corpus) -> Budget:
    return Budget(documents=corpus.max_documents, tokens=corpus.max_tokens)


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
