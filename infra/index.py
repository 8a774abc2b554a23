"""The small files of a stage in one: what is done is found with one request and not with one for each unit.

Units are folders below one top folder (`tokens`, `features`, …), each with a small JSON file that says what it holds.
`index/<top>.json.gz` has the contents of many of these files by name. It is a copy that may be missing, old or damaged:
a listing of the top folder says which files there are and how large, and only a file of just that size is taken from
the index. All others are read themselves; whoever had to read many writes the index anew. So after a kill, or where two
runs wrote it at once, it costs requests and nothing else.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from infra.storage import Storage
from schemas.errors import StorageError

INDEXES = "index"
VERSION = 1

FEW, FEW_HERE = 2, 64
"""So few files, elsewhere and on this machine, are read themselves, and their folders listed."""

WORTH_WRITING = 8
"""The index is written anew where so many files had to be read: until then each costs a request."""

_trusted: ContextVar[bool] = ContextVar("functok_index_trusted", default=True)


@dataclass(frozen=True, kw_only=True)
class Known:
    """Small files, and what lies around them.

    Attributes:
        contents: Name to content, of those that are there.
        sizes: Name to size, of every file in the folders of `contents`, subfolders included; others may be there.
    """

    contents: dict[str, bytes]
    sizes: dict[str, int]


@contextmanager
def distrusted() -> Iterator[None]:
    """In this block every small file is read itself, and the indexes are written anew."""
    token = _trusted.set(False)
    try:
        yield
    finally:
        _trusted.reset(token)


def index_name(top: str) -> str:
    """The index of a top folder."""
    return f"{INDEXES}/{top}.json.gz"


def read_known(storage: Storage, names: Sequence[str]) -> Known:
    """The contents of those of `names` that exist, each in a folder below a top one, and sizes of the files beside."""
    if len(names) <= (FEW_HERE if storage.is_local else FEW):
        contents = storage.read_many(list(names))
        folders = dict.fromkeys(name.rsplit("/", 1)[0] for name in contents)
        sizes = {name: size for folder in folders for name, size in storage.sizes(folder).items()}
        return Known(contents=contents, sizes=sizes)
    known = Known(contents={}, sizes={})
    for top, wanted in _by_top(names).items():
        sizes = storage.sizes(top)
        there = [name for name in wanted if name in sizes]
        indexed = _fitting(_read_index(storage, top), sizes) if there and _trusted.get() else {}
        found = {name: indexed[name] for name in there if name in indexed}
        read = storage.read_many([name for name in there if name not in found])
        if len(read) >= WORTH_WRITING or (read and not _trusted.get()):
            # Who only looks (`functok status`) may have no right to write.
            with suppress(StorageError):
                _write_index(storage, top, {**indexed, **read})
        known.sizes.update(sizes)
        known.contents.update(found | read)
    return known


def remember_files(storage: Storage, contents: Mapping[str, bytes]) -> None:
    """Add small files, as they were just written, to their indexes."""
    for top, names in _by_top(contents).items():
        added = {name: contents[name] for name in names}
        known = _read_index(storage, top)
        # What is known otherwise was made anew: the old would fit a listing where sizes are equal.
        is_old = any(known.get(name, content) != content for name, content in added.items())
        if is_old or len(added) >= WORTH_WRITING:
            with suppress(StorageError):
                _write_index(storage, top, _fitting({**known, **added}, storage.sizes(top)))


def _by_top(names: Iterable[str]) -> dict[str, list[str]]:
    by_top: dict[str, list[str]] = {}
    for name in names:
        by_top.setdefault(name.split("/", 1)[0], []).append(name)
    return by_top


def _fitting(contents: Mapping[str, bytes], sizes: Mapping[str, int]) -> dict[str, bytes]:
    return {name: content for name, content in contents.items() if sizes.get(name) == len(content)}


def _read_index(storage: Storage, top: str) -> dict[str, bytes]:
    try:
        value: Any = json.loads(gzip.decompress(storage.read_bytes(index_name(top))))
        files = value["files"] if value["version"] == VERSION else {}
        return {name: text.encode() for name, text in files.items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return {}


def _write_index(storage: Storage, top: str, contents: Mapping[str, bytes]) -> None:
    files = {}
    for name, content in sorted(contents.items()):
        # One that is damaged is told by who reads it.
        with suppress(UnicodeDecodeError):
            files[name] = content.decode()
    value = json.dumps({"version": VERSION, "files": files}, ensure_ascii=False)
    storage.write_bytes(index_name(top), gzip.compress(value.encode(), compresslevel=6, mtime=0))
