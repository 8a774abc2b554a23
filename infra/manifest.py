"""Content keys and manifests: what is done, and how we know.

Anything costly lives in a folder of its own, named by a key that hashes what determines it: the content of
its inputs, the part of the configuration that its stage reads, and the stage's code version. The folder is
done when it holds `manifest.json`, which is written last and names every other file with its size and hash, taken
as the file was written. A folder without a manifest is the remains of a killed process; nobody reads it, and the
next run overwrites it. What many manifests say is also in one file (`infra.index`), which is never more than they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from infra.index import read_known, remember_files
from infra.storage import REPAIR, Storage, StoredFile, json_bytes, unsealed
from schemas.errors import DamagedError

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one finished folder holds.

    Attributes:
        stage: The stage that made it.
        inputs: What its key was made of, readable.
        files: Relative file name to size in bytes.
        hashes: Relative file name to SHA-256; empty in a manifest from before hashes were kept.
        stats: Small numbers that other stages need without opening the files.
    """

    stage: str
    inputs: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)


def content_key(**parts: Any) -> str:
    """A 20-digit hexadecimal key of JSON-able parts, independent of their order."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def commit(storage: Storage, folder: str, manifest: Manifest, written: Iterable[StoredFile]) -> Manifest:
    """Record what was written into `folder` as its finished content; the manifest is written last.

    Args:
        storage: Where the folder is.
        folder: Its name.
        manifest: Stage, inputs and stats.
        written: Every file of the folder, as the storage has told it.

    Returns:
        The manifest with its files.

    Raises:
        ValueError: if a file is of another folder.
        StorageError: if the manifest cannot be written.
    """
    files = {
        file.name.removeprefix(f"{folder}/"): file for file in sorted(written, key=lambda file: file.name)
    }
    for name, file in files.items():
        if name == file.name:
            raise ValueError(f"{name} is not in {folder}")
    done = replace(
        manifest,
        files={name: file.size for name, file in files.items()},
        hashes={name: file.sha256 for name, file in files.items()},
    )
    storage.write_json(f"{folder}/{MANIFEST}", asdict(done))
    _keep(storage, folder, done)
    return done


def load(storage: Storage, folder: str) -> Manifest | None:
    """The manifest of a finished folder, or None."""
    return load_all(storage, [folder]).get(folder)


def load_all(storage: Storage, folders: Iterable[str]) -> dict[str, Manifest]:
    """The manifests of those folders that are finished, fetched together.

    A manifest that names a file that is gone or has another size does not count: the folder is damaged
    and will be made again.
    """
    wanted = list(dict.fromkeys(folders))
    for asked in _asked:
        asked.update(wanted)
    known = read_known(storage, [f"{folder}/{MANIFEST}" for folder in wanted])
    manifests: dict[str, Manifest] = {}
    for folder in wanted:
        try:
            name = f"{folder}/{MANIFEST}"
            manifest = from_json(known.contents[name], storage.url(name))
        except (KeyError, DamagedError):
            continue
        _keep(storage, folder, manifest)
        if all(known.sizes.get(f"{folder}/{name}") == size for name, size in manifest.files.items()):
            manifests[folder] = manifest
    return manifests


def remember(storage: Storage, manifests: Mapping[str, Manifest]) -> None:
    """Write manifests of folders that were just committed into their index, so that nobody needs to read each."""
    remember_files(storage, manifest_files(manifests))


def manifest_files(manifests: Mapping[str, Manifest]) -> dict[str, bytes]:
    """Folder to manifest as file name to content, as it is stored."""
    return {f"{folder}/{MANIFEST}": json_bytes(asdict(manifest)) for folder, manifest in manifests.items()}


def manifests_of(storage: Storage, folders: Iterable[str]) -> dict[str, Manifest]:
    """The manifests of folders, whether or not their files are there; those read before are not read again.

    Raises:
        DamagedError: naming a manifest that is damaged.
    """
    wanted = list(folders)
    absent = [folder for folder in wanted if (storage, folder) not in _read]
    for name, content in read_known(storage, [f"{folder}/{MANIFEST}" for folder in absent]).contents.items():
        _keep(storage, name[: -len(MANIFEST) - 1], from_json(content, storage.url(name)))
    return {folder: _read[storage, folder] for folder in wanted if (storage, folder) in _read}


_read: dict[tuple[Storage, str], Manifest] = {}
_MOST_KEPT = 1_000_000
"""Manifests that a process remembers, some 2 KB each: of 10⁵ shards and three layers 400,000."""


def forget(storage: Storage, folder: str) -> None:
    """Read a folder's manifest again the next time: another process may have made the folder anew."""
    _read.pop((storage, folder), None)


def _keep(storage: Storage, folder: str, manifest: Manifest) -> None:
    if len(_read) >= _MOST_KEPT:
        _read.clear()
    _read[storage, folder] = manifest


def from_json(content: bytes, place: str) -> Manifest:
    """A manifest as it is stored.

    Raises:
        DamagedError: if it is damaged, naming `place`.
    """
    value = unsealed(content, place)
    try:
        return Manifest(**value)
    except TypeError as error:
        raise DamagedError(f"{place} is damaged: it is no manifest ({error})", hint=REPAIR) from error


@contextmanager
def asked_for() -> Iterator[set[str]]:
    """Collect the folders that are asked for in the block: those that are current for who asks."""
    asked: set[str] = set()
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)


_asked: list[set[str]] = []
