"""One storage handle for local disks, S3 and everything else fsspec knows.

Nothing outside this module asks what kind of storage it is. A file written through it appears whole or not
at all: on a local disk it is written aside, synced and renamed; on S3 an object appears when its upload is
completed, and an upload that fails is aborted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import StorageError

LOCAL_CACHE = Path(os.environ.get("FUNCTOK_CACHE", Path.home() / ".cache" / "functok"))


class Storage:
    """A folder at a URL, addressed by relative names with forward slashes.

    Args:
        root: A local path or any fsspec URL, `s3://bucket/prefix` among them.
        endpoint_url: S3 endpoint if not AWS; `AWS_ENDPOINT_URL` does the same.
    """

    def __init__(self, root: str, endpoint_url: str | None = None) -> None:
        self.endpoint_url = endpoint_url
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
        self.is_local = bool(self.fs.async_impl is False and "file" in _protocols(self.fs))
        self.path: str = os.path.abspath(path) if self.is_local else path.rstrip("/")
        self.root: str = self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

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
            return bool(self.fs.isfile(self.full(name)))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every file under `prefix`, one listing: relative name to size in bytes."""
        with self._explained(prefix):
            try:
                found = self.fs.find(self.full(prefix), detail=True)
            except FileNotFoundError:
                return {}
        start = len(self.path) + 1
        return {
            path[start:]: int(info["size"])
            for path, info in found.items()
            if info.get("type") == "file" and not _is_temporary(path)
        }

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`.

        Raises:
            FileNotFoundError: if it is not there.
        """
        with self._explained(name):
            return bytes(self.fs.cat_file(self.full(name)))

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """The contents of those of `names` that exist, fetched together."""
        if not names:
            return {}
        paths = {self.full(name): name for name in names}
        with self._explained(names[0]):
            contents = self.fs.cat(list(paths), on_error="return", recursive=False)
        if isinstance(contents, bytes):
            contents = {next(iter(paths)): contents}
        found: dict[str, bytes] = {}
        for path, content in contents.items():
            if isinstance(content, bytes):
                found[paths[path]] = content
            elif not isinstance(content, FileNotFoundError):
                raise StorageError(f"cannot read {path}: {content}")
        return found

    def read_json(self, name: str) -> Any:
        """The JSON value in `name`, or None where there is none."""
        try:
            content = self.read_bytes(name)
        except FileNotFoundError:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise StorageError(
                f"{self.url(name)} is not valid JSON: {error}", hint="delete it and run again"
            ) from error

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write; it appears as `name` when the block ends without an error."""
        with self._explained(name):
            if self.is_local:
                target = Path(self.full(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
                try:
                    with open(aside, "wb") as file:
                        yield file
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(aside, target)
                finally:
                    aside.unlink(missing_ok=True)
            else:
                file = self.fs.open(self.full(name), "wb")
                try:
                    yield file
                except BaseException:
                    file.discard() if hasattr(file, "discard") else None
                    file.closed = True
                    raise
                file.close()

    @contextmanager
    def write_by_url(self, name: str) -> Iterator[str]:
        """An address for another writer (DuckDB's COPY); what it wrote becomes `name` when the block ends well."""
        if not self.is_local:
            yield self.url(name)
            return
        target = Path(self.full(name))
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        with self._explained(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield str(aside)
                with open(aside, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(aside, target)
            finally:
                aside.unlink(missing_ok=True)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write `name` whole."""
        with self.write(name) as file:
            file.write(content)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON value, keys sorted."""
        self.write_bytes(name, json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode())

    def write_parquet(self, name: str, table: pa.Table, **options: Any) -> None:
        """Write an Arrow table as Parquet (zstd unless told otherwise)."""
        options.setdefault("compression", "zstd")
        with self.write(name) as file:
            pq.write_table(table, file, **options)

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read a Parquet file whole."""
        with self._explained(name), self.fs.open(self.full(name), "rb") as file:
            return pq.read_table(file, columns=columns)

    def upload(self, folder: Path, prefix: str) -> None:
        """Copy every file of a local folder under `prefix`."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with (
                    self.write(f"{prefix}/{path.relative_to(folder).as_posix()}") as file,
                    open(path, "rb") as source,
                ):
                    shutil.copyfileobj(source, file, 8 << 20)

    def local_folder(self, prefix: str) -> Path:
        """A local folder with the files under `prefix`: the folder itself, or a copy cached by address.

        Prefixes are keyed by content, so a complete copy never goes stale.
        """
        if self.is_local:
            return Path(self.full(prefix))
        address = hashlib.sha256(self.url(prefix).encode()).hexdigest()[:20]
        target = LOCAL_CACHE / "objects" / address
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{address}."))
            try:
                for name in self.sizes(prefix):
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
        with self._explained(prefix):
            if self.fs.exists(self.full(prefix)):
                self.fs.rm(self.full(prefix), recursive=True)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(
                f"storage failed at {self.url(name)}: {error}",
                hint="check space, permissions, network and credentials, then run again: finished work is kept",
            ) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp"}:
                raise StorageError(
                    f"storage failed at {self.url(name)}: {error}",
                    hint="check the endpoint and the AWS_* environment, then run again",
                ) from error
            raise


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _is_temporary(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name.startswith(".") and name.endswith(".tmp")
