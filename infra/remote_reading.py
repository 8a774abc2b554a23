"""Reading Parquet files that lie elsewhere with as few requests as can be.

A file under a content key never changes, so its size is asked once and never again. Its last bytes are fetched
first: they hold the footer, come with the size of the whole, and are all of a small file. What else is read of a
large one is fetched by the ranges that are asked for. So a small file takes one request whenever it is scanned, and
a large one takes one more than its ranges.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

WHOLE = 4 << 20
"""A file of at most so many bytes is read whole, in one request."""

KEPT = 64 << 20
"""Of the files that DuckDB read last, so many bytes are kept: it opens a file several times in one scan."""

AT_LEAST = 1 << 20
"""What a request for a range fetches at least, in bytes: a request takes as long as a megabyte."""


class FileEnds:
    """The sizes of files, and the last bytes of those that were asked for last.

    Args:
        fs: An fsspec filesystem.
        kept: Bytes that are kept at most.
        check: Called with the path and the content of each file that is read whole; raises if it is not what it should
            be.
    """

    def __init__(
        self, fs: Any, kept: int = 0, check: Callable[[str, bytes], object] = lambda path, content: None
    ) -> None:
        self._fs, self._kept, self._room, self._check = fs, kept, kept, check
        self._sizes: dict[str, int] = {}
        self._ends: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        # Threads that want one file at once fetch it once.
        self._fetching = [threading.Lock() for _ in range(64)]

    def size(self, path: str) -> int:
        """Bytes of a file."""
        known = self._sizes.get(path)
        return self.end(path)[1] if known is None else known

    def end(self, path: str) -> tuple[bytes, int]:
        """The last bytes of a file, all of a small one, and its size."""
        with self._fetching[hash(path) % len(self._fetching)]:
            with self._lock:
                if path in self._ends:
                    self._ends.move_to_end(path)
                    return self._ends[path], self._sizes[path]
            content, size = _read_end(self._fs, path, WHOLE)
            if len(content) == size:
                self._check(path, content)
            with self._lock:
                self._sizes[path] = size
                if len(content) <= self._kept:
                    self._room -= len(content)
                    self._ends[path] = content
                while self._room < 0:
                    self._room += len(self._ends.popitem(last=False)[1])
        return content, size


class RemoteFile(io.RawIOBase):
    """A file to read; nothing is asked for before it is read.

    Args:
        path: Its path, as `fs` knows it.
        fs: Where it is.
        ends: What is known of the files there.
    """

    def __init__(self, path: str, fs: Any, ends: FileEnds | None = None) -> None:
        super().__init__()
        self.path, self._fs, self._ends = path, fs, ends or FileEnds(fs)
        self._position = 0
        self._start, self._held = 0, b""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        if not self._held:
            self._held, size = self._ends.end(self.path)
            self._start = size - len(self._held)
        return self._ends.size(self.path)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset`, from the start, from here or from the end."""
        before = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}
        self._position = offset + (self.size if whence == io.SEEK_END else before[whence])
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end; all that is left where it is negative."""
        end = self.size if size < 0 else min(self.size, self._position + size)
        content = self._between(self._position, end) if end > self._position else b""
        self._position += len(content)
        return content

    def readall(self) -> bytes:
        """All that is left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; the number of bytes that were left for it."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _between(self, start: int, end: int) -> bytes:
        if not self._start <= start <= end <= self._start + len(self._held):
            stop = min(self.size, max(end, start + AT_LEAST))
            self._held = bytes(self._fs.cat_file(self.path, start=start, end=stop))
            self._start = start
        return self._held[start - self._start : end - self._start]


def _read_end(fs: Any, path: str, n_bytes: int) -> tuple[bytes, int]:
    """The last `n_bytes` of a file, or all of a smaller one, and the size of the whole."""
    if not hasattr(fs, "call_s3"):
        size = int(fs.size(path))
        return bytes(fs.cat_file(path, start=max(0, size - n_bytes), end=size)), size
    from fsspec.asyn import sync
    from s3fs.core import _error_wrapper

    # s3fs asks for the size first; the answer to a range from the end tells it.
    bucket, key, _ = fs.split_path(path)

    async def read() -> tuple[bytes, int]:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=-{n_bytes}")
        content = await answer["Body"].read()
        total = str(answer.get("ContentRange", "")).rpartition("/")[2]
        return bytes(content), int(total) if total.isdigit() else len(content)

    # Again where it breaks off: s3fs itself does so around the asking alone.
    content, size = sync(fs.loop, _error_wrapper, read, retries=fs.retries)
    return content, size


class ReadingFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """What DuckDB reads through: the files of another filesystem, whose sizes are asked once.

    Args:
        fs: The other filesystem.
        check: As of `FileEnds`.
    """

    cachable = False

    def __init__(self, fs: Any, check: Callable[[str, bytes], object]) -> None:
        super().__init__()
        self.protocol = fs.protocol
        self._fs = fs
        self._ends = FileEnds(fs, KEPT, check)

    def _path(self, path: str) -> str:
        return str(self._fs._strip_protocol(path))

    def open(self, path: str, mode: str = "rb", **_: Any) -> RemoteFile:
        """A file to read; nothing is asked before it is read.

        Raises:
            ValueError: if it is to be written: `Storage.write_by_path` is for that.
        """
        if "r" not in mode:
            raise ValueError(f"{path} is only read through this filesystem")
        return RemoteFile(self._path(path), self._fs, self._ends)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return self._ends.size(self._path(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size and type of a file."""
        return {"name": self._path(path), "size": self.size(path), "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        """Yes: a file that is not there is told when it is read."""
        return True

    def isfile(self, path: str) -> bool:
        """Yes, as what is read is named by a catalogue or a manifest."""
        return True

    def glob(self, path: str, maxdepth: int | None = None, **_: Any) -> list[str]:
        """The file itself: names are no patterns here."""
        return [self._path(path)]

    def modified(self, path: str) -> datetime:
        """Always the same: a name is a content key."""
        return datetime(2000, 1, 1, tzinfo=UTC)
