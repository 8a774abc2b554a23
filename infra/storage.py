"""One storage handle for local disks, S3 and everything else fsspec knows.

Nothing outside this module asks what kind of storage it is. A file written through it appears whole or not
at all: on a local disk it is written aside, synced and renamed; on S3 an object appears when its upload is
completed, and an upload that fails is aborted.

The module is over 300 lines because everything that knows storage is here, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ConfigError, StorageError

LOCAL_CACHE = Path(os.environ.get("FUNCTOK_CACHE", Path.home() / ".cache" / "functok"))
_AT_ONCE = 16


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
        if set(self.root) & set("*?["):
            raise ConfigError(
                f"the storage {self.root} would be read as a pattern", hint="use a place without *, ? and ["
            )

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
                    file.close()
                except BaseException as error:
                    _abort(file)
                    bucket = self.path.split("/", 1)[0]
                    if isinstance(error, FileNotFoundError) and not self.fs.exists(bucket):
                        raise StorageError(
                            f"storage failed at {self.url(name)}: there is no bucket {bucket}",
                            hint="create it, or check storage.root and the endpoint",
                        ) from error
                    raise

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


def _check_address(*addresses: str | None) -> None:
    for address in addresses:
        if address and re.search(r"://[^/]*@", address):
            place = re.sub(r"://[^/]*@", "://…@", address)
            raise ConfigError(
                f"{place} holds credentials",
                hint="take them out of it: they come from the environment (AWS_*)",
            )


def _abort(file: Any) -> None:
    # A file that is not closed would upload what it has when it is collected.
    file.closed = True
    # The error that led here is the one to tell.
    with suppress(Exception):
        if hasattr(file, "discard"):
            file.discard()


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _is_temporary(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name.startswith(".") and name.endswith(".tmp")
