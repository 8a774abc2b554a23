"""`functok verify`: read everything under a root, tell what is damaged, and clear it away so that it is made anew.

Every file is hashed as it lies there (nothing remembered is trusted) and held against its manifest; JSON of ours
carries a checksum of itself; the catalogue must name files that are there. It reads each byte once: SHA-256 takes
about 0.7 s a GB, so a disk or a network is the limit.

What was made from a damaged folder is told by the manifests: their `inputs` name the folders, or the keys of the
folders, that they were made from. Readers refuse damaged files (`infra.verified`), but whether something was made
before or after a byte flipped cannot be known, so `repair` clears that away too, unless told otherwise.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from infra.catalog import CATALOG, catalog_of
from infra.manifest import MANIFEST, Manifest, forget, from_json
from infra.progress import Progress, silent
from infra.storage import FoundFile, Storage, is_sealed, is_temporary, unsealed
from schemas.errors import DamagedError
from tasks.report.report import RECEIPT

_AT_ONCE = 8
_KEY = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A damaged file.

    Attributes:
        name: The file.
        why: What is wrong with it, in words.
    """

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a root was found to be.

    Attributes:
        n_files: Files that were read and held against what is known of them.
        n_bytes: Their bytes.
        damaged: Those that are not what was written, by name.
        suspects: Finished folders that were made, directly or not, from a damaged one.
        unknown: Files that nothing says what they should be: remains, and what an older functok wrote.
    """

    n_files: int
    n_bytes: int
    damaged: tuple[Damage, ...] = ()
    suspects: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass
class _Root:
    """What the small files of a root say of the others."""

    listing: dict[str, FoundFile]
    manifests: dict[str, Manifest] = field(default_factory=dict)
    expected: dict[str, tuple[int, str]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)
    unsealed: set[str] = field(default_factory=set)


def verify_root(storage: Storage, progress: Progress = silent) -> Verification:
    """Read everything under a root that manifests, receipts and the catalogue name, and all JSON.

    Raises:
        StorageError: if the storage fails.
    """
    root = _Root(listing={name: found for name, found in storage.listing().items() if not is_temporary(name)})
    _read_small(storage, root)
    hashed = {name: entry for name, entry in root.expected.items() if name not in root.damaged}
    total, read = sum(size for size, _ in hashed.values()), 0

    def judge(name: str) -> str | None:
        size, digest = hashed[name]
        found = root.listing.get(name)
        if found is None:
            return "it is not there"
        if found.size != size:
            return f"it has {found.size} bytes, of {size} that were written"
        try:
            return None if storage.hash_of(name, size) == digest else "its content is not what was written"
        except FileNotFoundError:
            return "it is not there"

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, why in zip(hashed, pool.map(judge, hashed), strict=True):
            if why is not None:
                root.damaged[name] = why
            read += hashed[name][0]
            progress(read, total, "bytes read")
    known = root.expected.keys() | root.small
    checked = known & root.listing.keys()
    return Verification(
        n_files=len(checked),
        n_bytes=sum(root.listing[name].size for name in checked),
        damaged=tuple(Damage(name=name, why=why) for name, why in sorted(root.damaged.items())),
        suspects=tuple(sorted(_made_from(root, _folders(root.damaged)))),
        unknown=tuple(sorted((root.listing.keys() - known) | root.unsealed)),
    )


def repair(storage: Storage, found: Verification, *, suspects: bool = True) -> list[str]:
    """Remove what is damaged and, with `suspects`, what was made from it, so that the next run makes it anew.

    Returns:
        The folders and files that were removed.
    """
    removed: list[str] = []
    for folder in dict.fromkeys(
        (*_folders(entry.name for entry in found.damaged), *found.suspects * suspects)
    ):
        # Without a manifest a folder is not done, whatever of it is left if this is killed.
        storage.delete(f"{folder}/{MANIFEST}")
        storage.delete(folder)
        forget(storage, folder)
        removed.append(folder)
    for entry in found.damaged:
        if not _folder_of(entry.name):
            storage.delete(entry.name)
            removed.append(entry.name)
    return removed


def _read_small(storage: Storage, root: _Root) -> None:
    """Read manifests, receipts and all other JSON of ours."""
    names = [name for name in root.listing if _is_ours(name)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        contents = dict(zip(names, pool.map(storage.read_bytes, names), strict=True))
    for name in names:
        if name.endswith(f"/{MANIFEST}"):
            folder = name[: -len(MANIFEST) - 1]
            try:
                manifest = from_json(contents[name], storage.url(name))
            except DamagedError as error:
                root.damaged[name] = error.message
            else:
                root.manifests[folder] = manifest
                _expect(root, f"{folder}/", manifest.files, manifest.hashes)
            root.small.add(name)
    for name in names:
        if name not in root.small and name not in root.expected:
            root.small.add(name)
            try:
                _read_json(storage, root, name, contents[name])
            except DamagedError as error:
                root.damaged[name] = error.message
            if name.endswith(".json") and not is_sealed(contents[name]) and name not in root.damaged:
                root.unsealed.add(name)


def _is_ours(name: str) -> bool:
    return name.endswith((".json", ".json.gz"))


def _read_json(storage: Storage, root: _Root, name: str, content: bytes) -> None:
    place = storage.url(name)
    if name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DamagedError(f"{place} is damaged: {error}") from error
    value = unsealed(content, place)
    try:
        if name == RECEIPT:
            _expect(root, "", value["files"], value["hashes"])
        if name == CATALOG:
            gone = [file for file in catalog_of(storage, value).files if file not in root.listing]
            if gone:
                raise DamagedError(f"{place} names {gone[0]}, which is not there")
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{place} is damaged: it has not the form that functok gives it") from error


def _expect(root: _Root, folder: str, files: Mapping[str, int], hashes: Mapping[str, str]) -> None:
    for name, size in files.items():
        if name in hashes:
            root.expected[f"{folder}{name}"] = size, hashes[name]


def _folder_of(name: str) -> str:
    """The folder that is made anew as one where a file of it is damaged; empty for a file that stands alone."""
    folder, _, file = name.rpartition("/")
    if name.startswith(("data_docs/", "validation/results/")):
        return "/".join(name.split("/")[: 1 if name.startswith("data_docs/") else 3])
    stands_alone = file != MANIFEST and file.endswith((".json", ".json.gz")) and not _KEY.search(folder)
    is_list_of_shards = name.startswith("tokens/") and file.startswith("file")
    return "" if stands_alone or is_list_of_shards else folder


def _folders(names: Iterable[str]) -> list[str]:
    return [folder for folder in dict.fromkeys(map(_folder_of, names)) if folder]


def _made_from(root: _Root, folders: Iterable[str]) -> set[str]:
    """The finished folders whose inputs name one of `folders` or its key, and those made from these."""
    naming: dict[str, list[str]] = {}
    for folder, manifest in root.manifests.items():
        for text in _named(manifest.inputs):
            naming.setdefault(text, []).append(folder)
    start = set(folders)
    reached, left = set(start), list(start)
    while left:
        origin = left.pop()
        for key in (origin, *_KEY.findall(origin.rpartition("/")[2])):
            new = set(naming.get(key, ())) - reached
            reached |= new
            left += new
    return reached - start


def _named(inputs: Mapping[str, Any]) -> set[str]:
    """Every text in a manifest's inputs, and every key in those."""
    texts = set(re.findall(r'"([^"\\]+)"', json.dumps(inputs)))
    return (
        texts
        | {key for text in texts if "/" not in text for key in _KEY.findall(text)}
        | {text.rpartition("/")[0] for text in texts if text.endswith(".parquet")}
    )
