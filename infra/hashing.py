"""Content hashes of files, cheap to ask for again.

A local file is read whole once; its hash is remembered by path, size, device, inode, and its times of
modification and of change in nanoseconds (the latter cannot be set back), unless it was changed a moment ago.
A remote object is identified by what its store promises changes with the content (an ETag, a checksum, a
commit); where a store promises nothing, it is read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from infra.addresses import storage_options
from infra.storage import LOCAL_CACHE, put_aside

_CHUNK = 8 << 20
_SMALL = 64 << 10
"""A file of at most so many bytes is hashed each time: its remembered hash would be a file too."""

_SETTLED_NS = 2_000_000_000
_IDENTITY_KEYS = ("ETag", "etag", "blob_id", "sha256", "md5", "md5Hash", "crc32c", "CRC")


def content_hash(url: str, endpoint_url: str | None = None) -> str:
    """The hash of a file's content, or of what its store promises identifies it.

    Args:
        url: Any fsspec URL of one file, chained ones among them.
        endpoint_url: S3 endpoint if not AWS.

    Raises:
        FileNotFoundError: if the file is not there.
    """
    fs, path = fsspec.core.url_to_fs(url, **storage_options(url, endpoint_url))
    if isinstance(fs, LocalFileSystem):
        return file_hash(Path(path))
    info = fs.info(path)
    for key in _IDENTITY_KEYS:
        if info.get(key) not in (None, ""):
            identity = f"{type(fs).__name__}:{key}:{info[key]}:{info.get('size')}"
            return hashlib.sha256(identity.encode()).hexdigest()
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a local file, remembered until the file changes."""
    stat = path.stat()
    if stat.st_size <= _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    identity = _identity(path, stat)
    known = recall(identity)
    if known is not None:
        return known
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # Within a clock tick of a change, another one could leave the same times.
    is_settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
    if is_settled and _identity(path, path.stat()) == identity:
        remember(identity, digest)
    return digest


def _identity(path: Path, stat: os.stat_result) -> list[str | int]:
    return [
        str(path.resolve()),
        *(stat.st_size, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns),
    ]


def folder_hash(folder: Path, suffixes: tuple[str, ...]) -> str:
    """One hash of the files of a folder that end in `suffixes` (names and contents, subfolders left out)."""
    parts = [
        (path.name, file_hash(path))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in suffixes
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def recall(identity: Sequence[str | int]) -> str | None:
    """The hash that is remembered of what is so identified, or None."""
    try:
        known = _place(identity).read_text()
    except OSError:
        return None
    return known if len(known) == 64 else None


def remember(identity: Sequence[str | int], digest: str) -> None:
    """Remember a hash on this machine."""
    # A cache that cannot be written only costs time.
    with suppress(OSError), put_aside(_place(identity)) as aside:
        aside.write_text(digest)


def _place(identity: Sequence[str | int]) -> Path:
    name = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()[:32]
    return LOCAL_CACHE / "hashes" / name
