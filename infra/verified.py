"""Reading what manifests name, and refusing what is not what was written.

Whoever computes with a stored file takes it from here: its manifest says its size and SHA-256 as it was written, and
a file that is another one is a `DamagedError` that names it, before any of it is used. What is read whole (tables,
tokenizers, weights) is hashed as it is read, each time: SHA-256 takes about 0.7 s a GB. What another reader opens
(DuckDB) is hashed before, and that is remembered on this machine until the file changes, by inode and times or by
the store's ETag; `functok verify` alone reads everything again.

A file without a manifest, or with one from before hashes were kept, is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.hashing import file_hash, recall, remember
from infra.manifest import Manifest, forget, manifests_of
from infra.remote_reading import WHOLE
from infra.storage import REPAIR, FoundFile, Storage
from schemas.errors import DamagedError

_AT_ONCE = 8


def read_bytes(storage: Storage, name: str) -> bytes:
    """The content of `name`, as it was written.

    Raises:
        FileNotFoundError: if it is not there.
        DamagedError: if it is another one.
    """
    content = storage.read_bytes(name)
    check_content(storage, name, content)
    return content


def read_json(storage: Storage, name: str) -> Any:
    """The JSON value in `name`; raises as `read_bytes`."""
    return json.loads(read_bytes(storage, name))


def read_table(storage: Storage, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, fetched whole; raises as `read_bytes`."""
    # Of a small file, `pq.read_table` takes five times as long, for it looks for partitions first.
    with pq.ParquetFile(pa.BufferReader(read_bytes(storage, name))) as file:
        return file.read(columns=None if columns is None else list(columns))


def local_folder(storage: Storage, folder: str) -> Path:
    """A local folder with the files of a finished one (`Storage.local_folder`), each hashed once a process.

    It is hashed again where a file has changed since. A copy in the local cache that is not what the manifest says is
    fetched again, once.

    Raises:
        DamagedError: naming the first file that is not what was written.
        StorageError: if nothing is there to copy.
    """
    wrong: list[str] = []
    for _ in range(2):
        local = storage.local_folder(folder)
        manifest = manifests_of(storage, [folder]).get(folder)
        wrong = (
            [] if manifest is None else [name for name in manifest.hashes if _differs(local, name, manifest)]
        )
        if not wrong:
            return local
        forget(storage, folder)
        if not storage.is_local:
            shutil.rmtree(local, ignore_errors=True)
    raise damaged(storage, f"{folder}/{wrong[0]}")


def check_content(storage: Storage, name: str, content: bytes) -> None:
    """Whether the content of `name`, read already, is what was written.

    Raises:
        DamagedError: if it is not.
    """
    _require(storage, name, hashlib.sha256(content).hexdigest())


def check_files(storage: Storage, names: Iterable[str], *, large_too: bool = True) -> None:
    """Hash files that another reader will open, those that changed since they were last hashed here.

    On another machine, small ones are left to `check_content`: they are fetched whole when they are read.

    Args:
        storage: Where they are.
        names: The files.
        large_too: Whether large ones on another machine are read once for this.

    Raises:
        DamagedError: naming the first that is not what was written.
    """
    wanted = list(dict.fromkeys(names))
    manifests = manifests_of(storage, {_folder(name) for name in wanted} - {""})
    expected = {
        name: digest
        for name in wanted
        if (digest := _hash_in(manifests.get(_folder(name)), name)) is not None
    }
    found: dict[str, FoundFile] = {}
    if not storage.is_local:
        expected = {
            name: digest
            for name, digest in expected.items()
            if large_too and manifests[_folder(name)].files.get(name.rpartition("/")[2], 0) > WHOLE
        }
        for top in dict.fromkeys(_listed_together(list(expected))):
            found |= storage.listing(top)

    def hash_now(name: str) -> str:
        try:
            if storage.is_local:
                return file_hash(Path(storage.full(name)))
            return _remote_hash(storage, name, found[name]) if name in found else ""
        except FileNotFoundError:
            return ""

    if len(expected) == 1:
        # Of most views there is one file: starting threads would take longer than looking whether it has changed.
        for name in expected:
            _require(storage, name, hash_now(name))
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, digest in zip(expected, pool.map(hash_now, expected), strict=True):
            _require(storage, name, digest)


def _require(storage: Storage, name: str, digest: str) -> None:
    """Hold a file's SHA-256, empty where it is not there, against what its manifest says, if that says anything."""
    folder = _folder(name)
    for _ in range(2):
        expected = _hash_in(manifests_of(storage, [folder] if folder else []).get(folder), name)
        if expected is None or digest == expected:
            return
        # It may have been made anew since its manifest was read.
        forget(storage, folder)
    if not digest:
        raise DamagedError(
            f"{storage.url(name)} is not there, though its manifest names it", hint="run again"
        )
    raise damaged(storage, name)


def damaged(storage: Storage, name: str) -> DamagedError:
    """The error for a file that is not what was written."""
    return DamagedError(
        f"{storage.url(name)} is damaged: its content is not what was written (another SHA-256)", hint=REPAIR
    )


def _hash_in(manifest: Manifest | None, name: str) -> str | None:
    return None if manifest is None else manifest.hashes.get(name.rpartition("/")[2])


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _differs(folder: Path, name: str, manifest: Manifest) -> bool:
    try:
        with open(folder / name, "rb") as file:
            stat = os.fstat(file.fileno())
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, manifest.hashes[name])
            if _hashed.get(folder / name) == state:
                return False
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.hashes[name]:
                return True
    except OSError:
        return True
    _hashed[folder / name] = state
    return False


_hashed: dict[Path, tuple[int | str, ...]] = {}
"""Local files that were as their manifests say, and what would change with them."""


def _remote_hash(storage: Storage, name: str, found: FoundFile) -> str:
    identity: list[str | int] = [storage.url(name), storage.endpoint_url or "", found.size, found.identity]
    known = recall(identity) if found.identity else None
    if known is None:
        known = storage.hash_of(name, found.size)
        if found.identity:
            remember(identity, known)
    return known


def _listed_together(names: Sequence[str]) -> list[str]:
    """What to list for the ETags of files: their own folders where they are few, else the folders above."""
    folders = list(dict.fromkeys(_folder(name) for name in names))
    return folders if len(folders) <= 2 else [folder.split("/", 1)[0] for folder in folders]
