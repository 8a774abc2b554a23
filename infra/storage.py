"""One storage handle for local disks, S3 and everything else fsspec knows.

Nothing outside this module asks what kind of storage it is. A file written through it appears whole or not
at all: on a local disk it is written aside, synced and renamed; on S3 an object appears when its upload is
completed, and an upload that fails is aborted. Every file is hashed as it is written: what is written knows what
it was meant to be, and no listing is needed to say so (`StoredFile`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from infra.addresses import root_name
from infra.remote_reading import ReadingFileSystem, RemoteFile
from infra.storage_errors import told, way_out
from schemas.errors import ConfigError, DamagedError, FunctokError, StorageError

LOCAL_CACHE = Path(os.environ.get("FUNCTOK_CACHE", Path.home() / ".cache" / "functok"))
_AT_ONCE = 16
_CHUNK = 8 << 20
_PIECE = 64 << 20
"""Bytes of a remote file that are hashed at once."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as it was written.

    Attributes:
        name: Relative to the storage's root.
        size: Bytes.
        sha256: Of its content, 64 hexadecimal digits.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A file as a listing shows it.

    Attributes:
        size: Bytes.
        modified: When it was written, in seconds since 1970.
        identity: What its store promises changes with the content (an ETag); empty where it promises nothing.
    """

    size: int
    modified: float
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An upload of several parts that was begun.

    Attributes:
        name: The file that it would have become.
        upload_id: The store's name for it.
        started: When, in seconds since 1970.
    """

    name: str
    upload_id: str
    started: float


class FileBeingWritten(io.RawIOBase):
    """A binary file to write, in order, which hashes what goes through it.

    Args:
        name: Relative to the storage's root.
        file: Where the bytes go.
    """

    def __init__(self, name: str, file: IO[bytes]) -> None:
        super().__init__()
        self._name, self._file = name, file
        self._size, self._digest = 0, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write bytes, or anything that shares its memory as bytes."""
        self._digest.update(content)
        self._size += memoryview(content).nbytes
        self._file.write(content)
        return memoryview(content).nbytes

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def writable(self) -> bool:
        """Yes."""
        return True

    @property
    def stored(self) -> StoredFile:
        """What was written so far; once the storage's block has ended, what is stored."""
        return StoredFile(name=self._name, size=self._size, sha256=self._digest.hexdigest())


@dataclass
class PlaceToWrite:
    """Where another writer puts a file.

    Attributes:
        path: A local path.
        stored: What is stored, once the storage's block has ended.
    """

    path: str
    stored: StoredFile | None = None


class Storage:
    """A folder at a URL, addressed by relative names with forward slashes.

    Args:
        root: A local path or any fsspec URL, `s3://bucket/prefix` among them.
        endpoint_url: S3 endpoint if not AWS; `AWS_ENDPOINT_URL` does the same.

    Raises:
        ConfigError: if the address holds credentials or characters that readers take for patterns.
        StorageError: if nothing knows how to open it.
    """

    def __init__(self, root: str, endpoint_url: str | None = None) -> None:
        _check_address(root, endpoint_url)
        self.endpoint_url = endpoint_url
        self._listings: dict[str, dict[str, int]] | None = None
        options: dict[str, Any] = {}
        if root.startswith("s3://"):
            # Field notes: read-ahead makes columnar scans 3x slower, cached listings hide other writers.
            options = {"default_cache_type": "none", "use_listings_cache": False}
            if endpoint_url:
                options["endpoint_url"] = endpoint_url
        try:
            self.fs, path = fsspec.core.url_to_fs(root, **options)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"cannot open the storage {root}: {error}", hint="use a local path or s3://bucket/prefix"
            ) from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.path: str = os.path.abspath(path) if self.is_local else path.rstrip("/")
        self.root: str = self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))
        if set(self.root) & set("*?["):
            raise ConfigError(
                f"the storage {self.root} would be read as a pattern", hint="use a place without *, ? and ["
            )

    @property
    def name(self) -> str:
        """Short and stable: see `infra.addresses.root_name`."""
        return root_name(self.root, self.endpoint_url)

    def __reduce__(self) -> tuple[type[Storage], tuple[str, str | None]]:
        return Storage, (self.root, self.endpoint_url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and (self.root, self.endpoint_url) == (
            other.root,
            other.endpoint_url,
        )

    def __hash__(self) -> int:
        return hash((self.root, self.endpoint_url))

    def full(self, name: str) -> str:
        """The filesystem path of `name` (no protocol)."""
        return f"{self.path}/{name}" if name else self.path

    def url(self, name: str) -> str:
        """The address of `name` that any other reader understands: an absolute path or a URL."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        """Whether the file `name` is there."""
        with self._explained(name):
            # fsspec's own isfile says no where the answer is that it could not ask.
            try:
                return bool(self.fs.info(self.full(name))["type"] == "file")
            except FileNotFoundError:
                return False

    def require_place(self, name: str = "") -> None:
        """Do nothing where files can be asked for; a folder on a disk is made when something is written.

        Args:
            name: The file that it is about, for the message.

        Raises:
            StorageError: if there is no such bucket, or it cannot be asked for what it holds.
        """
        if not hasattr(self.fs, "call_s3"):
            return
        bucket, _, prefix = self.path.partition("/")
        with self._explained(""):
            try:
                self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=1)
            except FileNotFoundError as error:
                at = f" at {self.endpoint_url}" if self.endpoint_url else ""
                raise StorageError(
                    f"storage failed at {self.url(name)}: there is no bucket {bucket}{at}",
                    hint="create it, or check storage.root, the endpoint and whose credentials these are",
                ) from error

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every file under `prefix`, one listing: relative name to size in bytes."""
        listings = {} if self._listings is None else self._listings
        if prefix not in listings:
            files = self._files(prefix)
            listings[prefix] = {name: int(info["size"]) for name, info in files if not is_temporary(name)}
        return dict(listings[prefix])

    @contextmanager
    def listed_once(self) -> Iterator[None]:
        """In this block a folder is listed once, however often it is asked for; until something is written."""
        before, self._listings = self._listings, {} if self._listings is None else self._listings
        try:
            yield
        finally:
            self._listings = before

    def _changed(self) -> None:
        if self._listings is not None:
            self._listings = {}

    def listing(self, prefix: str = "") -> dict[str, FoundFile]:
        """Every file under `prefix`, what a killed writer left aside included: relative name to what is known of it."""
        return {
            name: FoundFile(
                size=int(info["size"]),
                modified=_seconds(info.get("mtime") or info.get("LastModified")),
                identity=str(info.get("ETag") or info.get("etag") or ""),
            )
            for name, info in self._files(prefix)
        }

    def _files(self, prefix: str) -> list[tuple[str, dict[str, Any]]]:
        """Every file under `prefix`, one listing: relative name, and what the filesystem says of it."""
        if self.is_local:
            return sorted(_local_files(self.full(prefix), len(self.path) + 1), key=itemgetter(0))
        with self._explained(prefix):
            try:
                if prefix and hasattr(self.fs, "call_s3"):
                    # Of a path under which there is nothing, s3fs asks twice more whether it is a file.
                    found = self.fs.find(self.path, detail=True, prefix=f"{prefix}/")
                else:
                    found = self.fs.find(self.full(prefix), detail=True)
            except FileNotFoundError:
                return []
        start = len(self.path) + 1
        return [(path[start:], info) for path, info in found.items() if info.get("type") == "file"]

    def hash_of(self, name: str, size: int) -> str:
        """SHA-256 of a file of `size` bytes, read as it is now.

        Raises:
            FileNotFoundError: if it is not there.
        """
        with self._explained(name):
            if self.is_local:
                with open(self.full(name), "rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            if size <= _PIECE:
                return hashlib.sha256(self.read_bytes(name)).hexdigest()
            digest = hashlib.sha256()
            for start in range(0, size, _PIECE):
                digest.update(self.fs.cat_file(self.full(name), start=start, end=min(start + _PIECE, size)))
            return digest.hexdigest()

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`.

        Raises:
            FileNotFoundError: if it is not there.
        """
        with self._explained(name):
            # Otherwise s3fs asks for the size first, to fetch what is large in pieces.
            at_once = {"max_concurrency": 1} if hasattr(self.fs, "call_s3") else {}
            return bytes(self.fs.cat_file(self.full(name), **at_once))

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """The contents of those of `names` that exist, fetched together."""
        if not names:
            return {}

        def read(name: str) -> bytes | None:
            try:
                return self.read_bytes(name)
            except FileNotFoundError:
                return None

        # Not fs.cat: it takes names with brackets for patterns.
        with ThreadPoolExecutor(min(_AT_ONCE, len(names))) as pool:
            contents = list(pool.map(read, names))
        return {name: content for name, content in zip(names, contents, strict=True) if content is not None}

    def read_json(self, name: str) -> Any:
        """The JSON value in `name`, or None where there is none.

        Raises:
            DamagedError: if it is not what `write_json` wrote.
        """
        try:
            content = self.read_bytes(name)
        except FileNotFoundError:
            return None
        return unsealed(content, self.url(name))

    @contextmanager
    def write(self, name: str) -> Iterator[FileBeingWritten]:
        """A file to write; it appears as `name` when the block ends without an error."""
        self._changed()
        with self._explained(name):
            if self.is_local:
                with put_aside(Path(self.full(name))) as aside, open(aside, "wb") as file:
                    yield FileBeingWritten(name, file)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                file = self.fs.open(self.full(name), "wb")
                try:
                    yield FileBeingWritten(name, file)
                    file.close()
                except BaseException as error:
                    _abort(file)
                    if isinstance(error, FileNotFoundError):
                        self.require_place(name)
                    raise

    @contextmanager
    def write_by_path(self, name: str, scratch: str | None = None) -> Iterator[PlaceToWrite]:
        """A local path for another writer (DuckDB's COPY); what it wrote becomes `name` when the block ends well.

        Args:
            name: The file.
            scratch: Folder for a file on its way to another machine; the system's own if not given.
        """
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="functok-", dir=scratch) as folder:
                place = PlaceToWrite(f"{folder}/{name.rsplit('/', 1)[-1]}")
                yield place
                place.stored = self._copy(Path(place.path), name)
            return
        self._changed()
        with self._explained(name):
            with put_aside(Path(self.full(name))) as aside:
                place = PlaceToWrite(str(aside))
                yield place
                with open(aside, "rb+") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
                    size = os.fstat(file.fileno()).st_size
            place.stored = StoredFile(name=name, size=size, sha256=digest)

    def write_bytes(self, name: str, content: bytes) -> StoredFile:
        """Write `name` whole."""
        with self.write(name) as file:
            file.write(content)
        return file.stored

    def write_json(self, name: str, value: Any) -> StoredFile:
        """Write a JSON value, keys sorted; an object gets a checksum of itself."""
        return self.write_bytes(name, json_bytes(value))

    def write_parquet(self, name: str, table: pa.Table, **options: Any) -> StoredFile:
        """Write an Arrow table as Parquet (zstd unless told otherwise)."""
        options.setdefault("compression", "zstd")
        # Other tools may ask for them when they read: pyarrow does, DuckDB 2.0 does not.
        options.setdefault("write_page_checksum", True)
        with self.write(name) as file:
            pq.write_table(table, file, **options)
        return file.stored

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read a Parquet file whole."""
        path = self.full(name)
        with self._explained(name), open(path, "rb") if self.is_local else RemoteFile(path, self.fs) as file:
            return pq.read_table(file, columns=columns)

    def for_duckdb(self, check: Callable[[str, bytes], object]) -> ReadingFileSystem | None:
        """A filesystem through which DuckDB reads what lies here; None where it can read it by itself."""
        if self.is_local:
            return None
        start = len(self.path) + 1
        return ReadingFileSystem(self.fs, lambda path, content: check(path[start:], content))

    def upload(self, folder: Path, prefix: str) -> list[StoredFile]:
        """Copy every file of a local folder under `prefix`."""
        return [
            self._copy(path, f"{prefix}/{path.relative_to(folder).as_posix()}")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]

    def _copy(self, source: Path, name: str) -> StoredFile:
        with self.write(name) as file, open(source, "rb") as content:
            shutil.copyfileobj(content, file, _CHUNK)
        return file.stored

    def local_folder(self, prefix: str) -> Path:
        """A local folder with the files under `prefix`: the folder itself, or a copy cached by address.

        Prefixes are keyed by content, so a complete copy never goes stale.

        Raises:
            StorageError: if nothing is there to copy.
        """
        if self.is_local:
            return Path(self.full(prefix))
        address = hashlib.sha256(self.url(prefix).encode()).hexdigest()[:20]
        target = LOCAL_CACHE / "objects" / address
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{address}."))
            try:
                names = self.sizes(prefix)
                if not names:
                    raise StorageError(
                        f"there is nothing at {self.url(prefix)}", hint="run again: it will be made anew"
                    )
                for name in names:
                    destination = aside / name[len(prefix) + 1 :]
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    with self._explained(name):
                        self.fs.get_file(self.full(name), str(destination))
                try:
                    aside.rename(target)
                except OSError:
                    if not target.exists():
                        raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return target

    def delete(self, prefix: str) -> None:
        """Remove everything under `prefix`, if anything is there."""
        self._changed()
        path = self.full(prefix)
        with self._explained(prefix):
            if not self.is_local:
                try:
                    found = self.fs.find(path)
                except FileNotFoundError:
                    return
                # Not fs.rm: it takes names with brackets for patterns.
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    list(pool.map(self.fs.rm_file, found))
            elif os.path.isdir(path):
                shutil.rmtree(path)
            else:
                Path(path).unlink(missing_ok=True)

    def unfinished_uploads(self) -> list[Upload]:
        """Uploads of several parts that were begun under this root and neither completed nor aborted."""
        if not hasattr(self.fs, "abort_mpu"):
            return []
        bucket, _, prefix = self.path.partition("/")
        found: list[Upload] = []
        marker: dict[str, str] = {}
        with self._explained(""):
            while True:
                page = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **marker)
                found += [
                    Upload(
                        name=entry["Key"].removeprefix(f"{prefix}/"),
                        upload_id=entry["UploadId"],
                        started=_seconds(entry["Initiated"]),
                    )
                    for entry in page.get("Uploads", [])
                ]
                if not page.get("IsTruncated"):
                    return found
                marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, name: str, upload_id: str) -> None:
        """Give up an upload of `unfinished_uploads`: its parts are removed."""
        bucket, _, key = self.full(name).partition("/")
        with self._explained(name):
            self.fs.abort_mpu(bucket, key, upload_id)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FunctokError):
            raise
        except Exception as error:
            hint = way_out(error)
            if hint is None:
                raise
            raise StorageError(f"storage failed at {self.url(name)}: {told(error)}", hint=hint) from error


REPAIR = "`functok verify CONFIG --repair` makes anew what is damaged, and what was made from it"
"""The way out wherever a stored file is not what was written."""

_CHECKSUM = "checksum"


def json_bytes(value: Any) -> bytes:
    """JSON as it is stored: keys sorted, and in an object the key `checksum`, of the rest of it."""
    if isinstance(value, dict):
        # As it will be read: numbers that are keys become text, and sort as text.
        value = json.loads(_json(value))
        value.pop(_CHECKSUM, None)
        value[_CHECKSUM] = hashlib.sha256(_json(value)).hexdigest()
    return _json(value)


def unsealed(content: bytes, place: str) -> Any:
    """The value of stored JSON, its checksum taken out; JSON from before checksums is taken as it is.

    Args:
        content: The file.
        place: Its address, for the error.

    Raises:
        DamagedError: if it is no JSON, or not what its checksum says.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DamagedError(f"{place} is not valid JSON: it is damaged ({error})", hint=REPAIR) from error
    if isinstance(value, dict):
        # All of it, so that a byte between the values counts too, and one in the name of the checksum.
        if (
            not _is_as_written(content)
            and (_CHECKSUM in value or _has_checksum(value))
            and json_bytes(value) != content
        ):
            raise DamagedError(f"{place} is damaged: it is not what its checksum says", hint=REPAIR)
        value.pop(_CHECKSUM, None)
    return value


_SEAL = re.compile(rb',?\n "checksum": "([0-9a-f]{64})"(,?)')
"""The checksum's line: a line begins with one space in the outermost object alone, and in no text."""


def _is_as_written(content: bytes) -> bool:
    """Whether stored JSON without its checksum's line is what the checksum says; False may also mean not to know.

    Writing the value again takes a hundred times as long, as its lines keep Python from writing JSON in C.
    """
    seal = _SEAL.search(content)
    if seal is None:
        return False
    before = b"," if seal[0].startswith(b",") and seal[2] else b""
    rest = content[: seal.start()] + before + content[seal.end() :]
    return hashlib.sha256(rest).hexdigest().encode() == seal[1]


def is_sealed(content: bytes) -> bool:
    """Whether stored JSON carries a checksum."""
    return f'"{_CHECKSUM}"'.encode() in content


def _has_checksum(value: dict[str, Any]) -> bool:
    """Whether a value is the checksum of all others, under whatever name."""
    digests = [key for key, entry in value.items() if isinstance(entry, str) and len(entry) == 64]
    return any(
        hashlib.sha256(_json({k: entry for k, entry in value.items() if k != key})).hexdigest() == value[key]
        for key in digests
    )


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode()


def _check_address(*addresses: str | None) -> None:
    for address in addresses:
        if address and re.search(r"://[^/]*@", address):
            place = re.sub(r"://[^/]*@", "://…@", address)
            raise ConfigError(
                f"{place} holds credentials",
                hint="take them out of it: they come from the environment (AWS_*)",
            )


@contextmanager
def put_aside(target: Path) -> Iterator[Path]:
    """A path beside `target`, which becomes it when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _local_files(folder: str, start: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file below a folder, or the file of that name, its path from `start` on; links below it are none.

    It is fsspec's `find`, which takes several times as long.
    """
    if os.path.isfile(folder):
        stat = os.stat(folder)
        yield folder[start:], {"size": stat.st_size, "mtime": stat.st_mtime}
        return
    left = [folder]
    while left:
        # What vanishes meanwhile, or may not be read, is not there.
        with suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        stat = entry.stat(follow_symlinks=False)
                        yield entry.path[start:], {"size": stat.st_size, "mtime": stat.st_mtime}


def _abort(file: Any) -> None:
    # A file that is not closed would upload what it has when it is collected.
    file.closed = True
    # The error that led here is the one to tell.
    with suppress(Exception):
        if hasattr(file, "discard"):
            file.discard()


def _seconds(time: Any) -> float:
    if hasattr(time, "timestamp"):
        return float(time.timestamp())
    return float(time or 0.0)


def is_temporary(path: str) -> bool:
    """Whether a file is one that a writer has put aside and not yet renamed."""
    name = path.rsplit("/", 1)[-1]
    return name.startswith(".") and name.endswith(".tmp")
