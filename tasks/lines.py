"""Lines of a possibly compressed file, with nothing lost of what can be read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from infra.errors import CorpusError

MAX_RECORD_BYTES = 256 << 20
_CHUNK = 1 << 20


class Lines:
    """Lines of a possibly compressed file as bytes, line ends included; what stops it is in `failure`.

    A line longer than `MAX_RECORD_BYTES` comes out as None.
    """

    def __init__(self, raw: IO[bytes], compression: str | None) -> None:
        self.raw, self.compression = raw, compression
        self.number = 0
        self.failure = ""

    @property
    def position(self) -> int:
        """Bytes of the stored file read so far."""
        return int(self.raw.tell())

    def __iter__(self) -> Iterator[bytes | None]:
        pieces: list[bytes] = []
        held, first = 0, True
        for chunk in self._chunks():
            if first:
                chunk, first = chunk.removeprefix(b"\xef\xbb\xbf"), False
            start = 0
            while (end := chunk.find(b"\n", start)) >= 0:
                line = b"".join([*pieces, chunk[start : end + 1]])
                pieces, held, start, too_long = [], 0, end + 1, held > MAX_RECORD_BYTES
                self.number += 1
                yield None if too_long else line
            held += len(chunk) - start
            if held <= MAX_RECORD_BYTES:
                pieces.append(chunk[start:])
            else:
                pieces = []
        # The last line of a file that broke off is not whole: it is part of the failure.
        if held and not self.failure:
            self.number += 1
            yield None if held > MAX_RECORD_BYTES else b"".join(pieces)

    def _chunks(self) -> Iterator[bytes]:
        try:
            if self.compression is None:
                while chunk := self.raw.read(_CHUNK):
                    yield chunk
            else:
                yield from self._decompressed(_decompressor(self.compression))
        except OSError as error:
            raise CorpusError(f"reading failed: {error}", stage="tokenize") from error

    def _decompressed(self, make: Callable[[], Any]) -> Iterator[bytes]:
        stream: Any = None
        while chunk := self.raw.read(_CHUNK):
            while chunk:
                stream = stream or make()
                try:
                    plain = stream.decompress(chunk)
                except Exception as error:
                    # zlib.error and zstandard.ZstdError share no base class of their own.
                    self.failure = f"damaged {self.compression} data: {error}"
                    return
                if plain:
                    yield plain
                chunk, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        if stream is not None:
            self.failure = f"truncated {self.compression} file"


def _decompressor(compression: str) -> Callable[[], Any]:
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    import zstandard

    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
