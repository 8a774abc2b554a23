"""The bytes of a corpus file, decompressed where it is compressed, in pieces of a bounded size.

A few bytes may inflate to gigabytes, so no decompressor is asked for more than `PIECE_BYTES` at a time. Members,
frames and streams of one file follow each other, as the programs of these formats allow; zeros after them are
padding, anything else is told.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol

import fsspec

from infra.addresses import storage_options
from schemas.errors import StorageError, whole_message

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 1 << 20
FETCH_BYTES = 2 << 20
_TAIL_BYTES = 1 << 16
_READ_BYTES = 1 << 18
_MAGIC_BYTES = 10
_LARGEST_WINDOW_LOG = 31
"""Public dumps are made with `zstd --long=31`; readers refuse more than 27 by default."""

_MAGIC: dict[str, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}


class _Decompressor(Protocol):
    """What the decompressors of bz2, lzma and zstd have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        plain = self._stream.decompress(self._stream.unconsumed_tail + data, max_length)
        self.needs_input = not self._stream.unconsumed_tail and len(plain) < max_length
        return plain


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    "gzip": _Gzip,
    "zstd": lambda: zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW_LOG}
    ),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


class PlainBytes:
    """The bytes of a stored file without its compression, in pieces of at most `PIECE_BYTES`.

    Args:
        raw: The stored file, opened.
        compression: `gzip`, `zstd`, `bz2`, `xz`, or None for none.
        size: Bytes as stored, 0 where not known.
        is_certain: Whether the compression was asked for. Else the first bytes decide: what a name says may be
            wrong (a web server that decompresses `.gz` on the way, a dump without an ending).

    Attributes:
        failure: Why the file could not be read to its end; empty where it was.
        lost_bytes: Bytes that could not be read then. Inside compressed data an estimate: the stored bytes that are
            left, times how far those before them inflated; 0 where the file simply ends too early.
        ends_early: Whether it is unknown how much there was after the failure.
        is_stored: Whether they are the stored bytes themselves; known once the first came out.
    """

    def __init__(self, raw: IO[bytes], compression: str | None, size: int, *, is_certain: bool) -> None:
        self._raw, self._named, self._size, self._is_certain = raw, compression, size, is_certain
        self.failure, self.lost_bytes, self.ends_early, self.is_stored = "", 0, False, False

    @property
    def position(self) -> int:
        """Bytes of the stored file read so far."""
        return int(self._raw.tell())

    def __iter__(self) -> Iterator[bytes]:
        """Pieces in order.

        Raises:
            StorageError: if the storage stops answering.
        """
        head = self._read(_READ_BYTES)
        # A web server may send a few bytes at first.
        while len(head) < _MAGIC_BYTES and (more := self._read(_READ_BYTES)):
            head += more
        compression = self._named if self._is_certain else self._told_by(head)
        self.is_stored = compression is None
        if compression is None:
            while head:
                yield head
                head = self._read(PIECE_BYTES)
        elif head:
            yield from self._inflated(compression, head)
        else:
            self._fail(f"empty file, not {compression} data", 0, ends_early=True)

    def _told_by(self, head: bytes) -> str | None:
        for kind, magic in _MAGIC.items():
            if magic.match(head):
                return kind
        return None if head and _is_text(head) else self._named

    def _inflated(self, kind: str, chunk: bytes) -> Iterator[bytes]:
        stream, made = _DECOMPRESSORS[kind](), 0
        while chunk:
            try:
                fed = chunk
                while fed or not stream.needs_input:
                    plain = stream.decompress(fed, PIECE_BYTES)
                    fed = b""
                    made += len(plain)
                    if plain:
                        yield plain
                    if stream.eof:
                        break
            except (zlib.error, lzma.LZMAError, zstd.ZstdError, OSError, ValueError, MemoryError) as error:
                lost = self._estimate(len(chunk), made)
                self._fail(f"damaged {kind} data: {whole_message(error)}", lost, ends_early=True)
                return
            if not stream.eof:
                chunk = self._read(_READ_BYTES)
                continue
            rest = self._after_padding(stream.unused_data)
            if not rest:
                return
            if not _MAGIC[kind].match(rest):
                lost = self._estimate(len(rest), made)
                self._fail(f"damaged {kind} data: what follows it is none", lost, ends_early=False)
                return
            stream, chunk = _DECOMPRESSORS[kind](), rest
        self._fail(f"truncated {kind} file", 0, ends_early=True)

    def _estimate(self, unused: int, made: int) -> int:
        """Bytes that the stored bytes from the last `unused` on would have given, as far as those before tell."""
        position = self.position
        left = max(0, self._size - position) + unused
        return round(left * max(1.0, made / max(1, position - unused)))

    def _after_padding(self, rest: bytes) -> bytes:
        """What follows zeros, at least as long as a magic number where there is as much."""
        rest = rest.lstrip(b"\0")
        while len(rest) < _MAGIC_BYTES and (more := self._read(_READ_BYTES)):
            rest = (rest + more).lstrip(b"\0")
        return rest

    def _fail(self, failure: str, lost_bytes: int, *, ends_early: bool) -> None:
        self.failure, self.lost_bytes, self.ends_early = failure, lost_bytes, ends_early

    def _read(self, n_bytes: int) -> bytes:
        try:
            return self._raw.read(n_bytes)
        except Exception as error:
            # Each filesystem has errors of its own; not all are OSErrors.
            raise _unread(whole_message(error)) from error


class StoredLines:
    """The stored bytes of those lines, each ended by a line feed, that begin in a range of a file.

    Ranges that follow each other so have each line once, whatever their borders cut; only the range is fetched, and
    of what follows it the end of its last line.

    Args:
        url: The file.
        endpoint_url: S3 endpoint if not AWS.
        start: First byte of the range.
        end: The byte after its last.
        size: Bytes of the file.
        is_line_start: Whether a line is known to begin at `start`.
    """

    failure, lost_bytes, ends_early, is_stored = "", 0, False, True

    def __init__(
        self, url: str, endpoint_url: str | None, start: int, end: int, size: int, *, is_line_start: bool
    ) -> None:
        self._fs, self._path = fsspec.core.url_to_fs(url, **storage_options(url, endpoint_url))
        self._end, self._size, self._is_in_line = end, size, not is_line_start
        # The byte before tells whether a line begins at the first.
        self.position = start - self._is_in_line

    def __iter__(self) -> Iterator[bytes]:
        """Pieces in order.

        Raises:
            StorageError: if the storage stops answering.
        """
        ends_line = True
        while self.position < self._end:
            content = self._next(min(FETCH_BYTES, self._end - self.position))
            if self._is_in_line:
                feed = content.find(b"\n")
                if feed < 0:
                    continue
                content, self._is_in_line = content[feed + 1 :], False
            if content:
                yield content
                ends_line = content.endswith(b"\n")
        while not ends_line and self.position < self._size:
            content = self._next(_TAIL_BYTES)
            feed = content.find(b"\n")
            ends_line = feed >= 0
            yield content[: feed + 1] if ends_line else content

    def _next(self, n_bytes: int) -> bytes:
        start, stop = self.position, min(self._size, self.position + n_bytes)
        try:
            content = bytes(self._fs.cat_file(self._path, start=start, end=stop))
        except Exception as error:
            raise _unread(whole_message(error)) from error
        if len(content) != stop - start:
            raise _unread(f"{len(content):,} bytes came where {stop - start:,} were asked for, at {start:,}")
        self.position = stop
        return content


def _unread(why: str) -> StorageError:
    return StorageError(
        f"reading failed: {why}",
        hint="check the network and credentials, then run again: finished shards are kept",
        stage="tokenize",
    )


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut.
        return error.start > len(head) - 4
    return True
