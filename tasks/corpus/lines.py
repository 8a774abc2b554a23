"""Lines of a possibly compressed file, with nothing lost of what can be read."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from typing import Protocol

MAX_RECORD_BYTES = 256 << 20
_HEAD_BYTES = 1 << 16

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # Before UTF-16, whose mark this one begins with.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_ANY_LINE_END = re.compile(rb"\r\n?|\n")


class _Source(Protocol):
    """Where lines come from: what `tasks.corpus.decompression` reads, all of a file or a part of it."""

    @property
    def position(self) -> int: ...
    @property
    def failure(self) -> str: ...
    @property
    def lost_bytes(self) -> int: ...
    @property
    def ends_early(self) -> bool: ...
    @property
    def is_stored(self) -> bool: ...
    def __iter__(self) -> Iterator[bytes]: ...


class Lines:
    """Lines of a file as UTF-8 bytes, line ends included; what stops it is in `failure`.

    The head of the file tells how it is read: a byte order mark its encoding, and a carriage return where there is
    no line feed its line ends (then lines end in either, or both). A line longer than `MAX_RECORD_BYTES` comes out
    as None.

    Args:
        source: The file's bytes.
        quote: A sign between two of which line ends of the other kind are data, as in CSV; empty for none.
        is_part: Whether they are some of its lines alone, ended by line feeds: its head was looked at before.
        before: Lines of the file before these.

    Attributes:
        number: Lines of the file that came out, and those before.
        is_open: Whether they ended within a record of several lines; told by who makes records of them.
    """

    def __init__(self, source: _Source, quote: str = "", *, is_part: bool = False, before: int = 0) -> None:
        self._source, self._quote, self._is_part = source, quote.encode(), is_part
        self._given, self._taken = 0, 0
        self._failure, self._lost_bytes = "", 0
        self.number, self.is_open = before, False

    @property
    def position(self) -> int:
        """Bytes of the stored file read so far."""
        return self._source.position

    @property
    def failure(self) -> str:
        """Why the file could not be read to its end; empty where it was."""
        return self._failure or self._source.failure

    @property
    def ends_early(self) -> bool:
        """Whether it is unknown what came after the failure, and how much."""
        return bool(self._failure) or self._source.ends_early

    def take_lost(self) -> int:
        """Bytes that the failure stands for, and those of lines not taken before it."""
        return self._source.lost_bytes + self._lost_bytes + self.take()

    def take(self) -> int:
        """Bytes of the lines that came out since this was asked last."""
        taken, self._taken = self._given - self._taken, self._given
        return taken

    @property
    def head(self) -> bytes:
        """The beginning of the file as UTF-8, without a byte order mark."""
        return self._begun[0]

    @property
    def starts_at(self) -> int | None:
        """The byte of the stored file where its lines begin; None where they do not lie there as they come out."""
        mark, encoding = self._begun[2:]
        is_there = self._source.is_stored and encoding == "utf-8" and not self.ends_in_carriage_returns
        return mark if is_there else None

    def pieces(self) -> Iterator[bytes]:
        """All of the file as UTF-8, without a byte order mark; read once, instead of its lines."""
        return self._begun[1]

    def __iter__(self) -> Iterator[bytes | None]:
        if self._is_part:
            return self._split(iter(self._source), _find_line_feed)
        if self.ends_in_carriage_returns:
            return self._split(_without_cut_line_ends(self.pieces()), _find_any)
        return self._split(self.pieces(), _find_line_feed)

    @cached_property
    def _begun(self) -> tuple[bytes, Iterator[bytes], int, str]:
        pieces = iter(self._source)
        head = _fill(pieces)
        mark, encoding = next(
            (known for known in _BYTE_ORDER_MARKS if head.startswith(known[0])), (b"", "utf-8")
        )
        head = head.removeprefix(mark)
        if encoding != "utf-8":
            pieces = self._decoded(chain([head], pieces), encoding)
            head = _fill(pieces)
        return head, chain([head] if head else [], pieces), len(mark), encoding

    def fail(self, failure: str, lost_bytes: int) -> None:
        """Note that what follows cannot be read."""
        self._failure, self._lost_bytes = failure, lost_bytes

    def _decoded(self, pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(encoding)()
        for piece in chain(pieces, [b""]):
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                rest = len(error.object) - error.start + sum(len(piece) for piece in pieces)
                good = error.object[: error.start].decode(encoding)
                if good:
                    yield good.encode()
                self.fail(f"not valid {encoding.upper()}: {error.reason}", rest)
                return
            if text:
                yield text.encode()

    @cached_property
    def ends_in_carriage_returns(self) -> bool:
        """Whether lines end in carriage returns too, as the head of the file tells."""
        head = self.head
        if self._quote:
            sign = re.escape(self._quote)
            head = re.sub(sign + b"[^" + sign + b"]*" + sign, b"", head)
        # The line feed after the last sign may not be read yet.
        return b"\n" not in head and b"\r" in (head[:-1] if len(self.head) >= _HEAD_BYTES else head)

    def _split(
        self, pieces: Iterator[bytes], find_end: Callable[[bytes, int], int]
    ) -> Iterator[bytes | None]:
        parts: list[bytes] = []
        held = 0
        for piece in pieces:
            start = 0
            while end := find_end(piece, start):
                line = b"".join([*parts, piece[start:end]]) if parts else piece[start:end]
                self.number += 1
                n_bytes = held + end - start
                self._given += n_bytes
                parts, held, start = [], 0, end
                yield None if n_bytes > MAX_RECORD_BYTES else line
            if start < len(piece):
                held += len(piece) - start
                if held <= MAX_RECORD_BYTES:
                    parts.append(piece[start:])
                else:
                    parts = []
        if held:
            self._given += held
            # The last line of a file that broke off is not whole: it is part of the failure.
            if not self.failure:
                self.number += 1
                yield None if held > MAX_RECORD_BYTES else b"".join(parts)


def _fill(pieces: Iterator[bytes]) -> bytes:
    head = b""
    while len(head) < _HEAD_BYTES and (piece := next(pieces, b"")):
        head += piece
    return head


def _find_line_feed(piece: bytes, start: int) -> int:
    return piece.find(b"\n", start) + 1


def _find_any(piece: bytes, start: int) -> int:
    found = _ANY_LINE_END.search(piece, start)
    return found.end() if found else 0


def _without_cut_line_ends(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, no carriage return cut from the line feed that may follow it."""
    held = b""
    for piece in pieces:
        piece, held = held + piece, b""
        if piece.endswith(b"\r"):
            piece, held = piece[:-1], b"\r"
        if piece:
            yield piece
    if held:
        yield held
