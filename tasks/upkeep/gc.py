"""`functok gc`: what nothing reaches any more, and why; and deleting it beside a run without harm.

Certainly dead, whatever is configured, once it is older than a limit:

- what killed writers left: files put aside, folders named by a key and without a manifest, files that a finished
  folder's manifest does not name, uploads to S3 that were never completed;
- replaced tables: those that the catalogue does not name and that are older than it. Younger ones may be a run's that
  has not published yet.

Finished work (shards, features, dictionaries, residuals, …) is never dead merely because the catalogue does not name
it: another configuration of this root may. Given all configurations that matter, what none of them asks for is told
too; each must be finished up to its tables, as only then all of its keys are known.

Nothing finished is removed while its age is below the limit, and what is unfinished is asked for once more right
before it is removed: a run that works meanwhile has younger files. What is removed are the files that were found, one
by one, and never a folder with all that is in it; names that no stage makes are left alone.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra import storage as storage_module
from infra.catalog import CATALOG, Catalog, read_catalog
from infra.manifest import MANIFEST, asked_for, forget
from infra.storage import FoundFile, Storage, is_temporary, unsealed
from infra.verified import read_bytes
from schemas.config import Config
from schemas.errors import ConfigError
from tasks.stages import open_run, plan_run, unit_folders, working_stages

_UNIT = re.compile(r"[^/]+/([a-z0-9_-]+-)?[0-9a-f]{20}(/(\d{5}(-first-\d+)?|state-\d+))?")
"""How stages name the folders that they make: by a key, and below it shards and states by number."""

Kind = Literal["unfinished", "table", "unit", "file", "upload", "cache"]


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Something that nothing reaches.

    Attributes:
        name: Folder, file or upload, relative to the root; a local path where it is of the local cache.
        kind: What it is, which says how it is removed.
        n_bytes: Its bytes; 0 where the store does not say.
        why: Why it is dead, in words.
        files: Of a folder, the files that are dead.
        upload_id: Of an upload, the store's name for it.
    """

    name: str
    kind: Kind
    n_bytes: int
    why: str
    files: tuple[str, ...] = ()
    upload_id: str = ""


def find_garbage(
    storage: Storage, configs: Sequence[Config] = (), *, older_than: float, now: float | None = None
) -> list[Garbage]:
    """What nothing reaches.

    Args:
        storage: The root.
        configs: All configurations that matter, each finished; none: finished work is left alone.
        older_than: Seconds; what is younger is left alone.
        now: The time, in seconds since 1970; default: now.

    Raises:
        ConfigError: if a configuration is of another root, or not finished.
        DamagedError: if the catalogue is damaged.
    """
    reached = reached_by(storage, configs) if configs else None
    units = unit_folders()
    before = (time.time() if now is None else now) - older_than
    catalog = read_catalog(storage)
    listing = storage.listing()
    finished = {name[: -len(MANIFEST) - 1] for name in listing if name.endswith(f"/{MANIFEST}")}
    tops = {name.split("/", 1)[0] for name in listing}
    by_owner: dict[str, dict[str, FoundFile]] = {}
    loose: dict[str, dict[str, FoundFile]] = {}
    found: list[Garbage] = []
    for name, file in listing.items():
        owner, folder = _owner(name, finished), name.rpartition("/")[0]
        if is_temporary(name):
            found += _of_file(name, file, before, "put aside by a writer that was killed")
        elif name.startswith("index/") and name.split("/")[1].split(".")[0] not in tops:
            found += _of_file(name, file, before, "an index of what is no longer there")
        elif owner is not None:
            by_owner.setdefault(owner, {})[name] = file
        elif name.split("/", 1)[0] in units and _UNIT.fullmatch(folder) and not name.endswith(".json"):
            loose.setdefault(folder, {})[name] = file
    for folder, files in loose.items():
        if _newest(files) < before:
            why = "without a manifest: its writer was killed"
            found.append(_of_folder(folder, "unfinished", files, why))
    named = _named(catalog)
    published = listing[CATALOG].modified if CATALOG in listing else 0.0
    for folder, files in sorted(by_owner.items()):
        top, newest = folder.split("/", 1)[0], _newest(files)
        is_kept = newest >= before or folder in named or folder in (reached or ())
        if not is_kept and top == "tables":
            if newest < published:
                found.append(_of_folder(folder, "table", files, "replaced: the catalogue does not name it"))
        elif not is_kept and reached is not None and top in units:
            found.append(_of_folder(folder, "unit", files, "no configuration given needs it"))
        else:
            found += _unnamed(storage, folder, files, before)
    for upload in storage.unfinished_uploads():
        if upload.started < before:
            why, upload_id = "an upload that was never completed", upload.upload_id
            found.append(Garbage(name=upload.name, kind="upload", n_bytes=0, why=why, upload_id=upload_id))
    return sorted([*found, *_in_cache(before)], key=lambda entry: (entry.why, entry.name))


def delete_garbage(storage: Storage, garbage: Sequence[Garbage]) -> list[Garbage]:
    """Remove what was found, except what somebody has finished or published meanwhile.

    Returns:
        What was removed.
    """
    removed = []
    for entry in garbage:
        if entry.kind == "unfinished" and storage.exists(f"{entry.name}/{MANIFEST}"):
            continue
        if entry.kind == "table" and entry.name in _named(read_catalog(storage)):
            continue
        if entry.kind == "cache":
            shutil.rmtree(entry.name, ignore_errors=True)
        elif entry.kind == "upload":
            storage.abort_upload(entry.name, entry.upload_id)
        else:
            if entry.kind in {"table", "unit"}:
                # First of all: without it the folder is not done, whatever is left if this is killed.
                storage.delete(f"{entry.name}/{MANIFEST}")
                forget(storage, entry.name)
            for name in entry.files or (entry.name,):
                storage.delete(name)
        removed.append(entry)
    return removed


def reached_by(storage: Storage, configs: Sequence[Config]) -> set[str]:
    """The folders that these configurations ask for when they look for what is done.

    Raises:
        ConfigError: if one is of another root, or has anything to do.
    """
    from tasks.corpus.graph_documents import graph_shards
    from tasks.corpus.tokenization import TOKENIZE
    from tasks.dictionaries.residuals import Residuals

    reached: set[str] = set()
    for config in configs:
        if Storage(config.storage.root, config.storage.endpoint_url) != storage:
            raise ConfigError(
                f"the configurations have several roots: {config.storage.root} and {storage.root}",
                hint="collect one root at a time",
            )
        with asked_for() as asked:
            plans = plan_run(config, storage)
            # Of two configurations one has its tables published, and the other's are replaced ones.
            working = {stage.name for stage in working_stages(config)}
            undone = [plan.stage for plan in plans if plan.stage in working and plan.missing != 0]
            if undone:
                raise ConfigError(
                    f"a configuration of {storage.root} has the stage {undone[0]} to do: what it needs is not known "
                    "yet",
                    hint="run it first, or leave its --config out: then only what is certainly dead is told",
                )
            run = open_run(config, storage)
            shards = run.result(TOKENIZE)
            if config.activations.keep_dense:
                layers = [entry.layer for entry in config.sae]
                Residuals(graph_shards(config, shards, storage), layers).there(run)
        reached |= asked | {shard.folder for shard in shards.shards}
    return reached


def _owner(name: str, finished: set[str]) -> str | None:
    """The nearest finished folder that a file lies in, or None."""
    folder = name.rpartition("/")[0]
    while folder:
        if folder in finished:
            return folder
        folder = folder.rpartition("/")[0]
    return None


def _unnamed(storage: Storage, folder: str, files: Mapping[str, FoundFile], before: float) -> list[Garbage]:
    """The files of a finished folder that its manifest does not name."""
    value = unsealed(read_bytes(storage, f"{folder}/{MANIFEST}"), storage.url(f"{folder}/{MANIFEST}"))
    named = {f"{folder}/{name}" for name in (*value["files"], MANIFEST)}
    why = "in a finished folder whose manifest does not name it"
    unnamed = files.keys() - named
    return [entry for name in unnamed for entry in _of_file(name, files[name], before, why)]


def _named(catalog: Catalog) -> set[str]:
    """The folders of what is published."""
    return {name.rpartition("/")[0] for name in catalog.files}


def _of_file(name: str, file: FoundFile, before: float, why: str) -> list[Garbage]:
    """A dead file, where it is old enough."""
    return [Garbage(name=name, kind="file", n_bytes=file.size, why=why)] if file.modified < before else []


def _of_folder(folder: str, kind: Kind, files: Mapping[str, FoundFile], why: str) -> Garbage:
    n_bytes = sum(file.size for file in files.values())
    return Garbage(name=folder, kind=kind, n_bytes=n_bytes, why=why, files=tuple(files))


def _newest(files: Mapping[str, FoundFile]) -> float:
    return max(file.modified for file in files.values())


def _in_cache(before: float) -> list[Garbage]:
    """Copies in the local cache whose making was killed."""
    found = []
    for folder in ("objects", "training-text"):
        for path in sorted((storage_module.LOCAL_CACHE / folder).glob(".*")):
            if path.is_dir() and path.stat().st_mtime < before:
                size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
                why = "in the local cache: a copy whose making was killed"
                found.append(Garbage(name=str(path), kind="cache", n_bytes=size, why=why))
    return found
