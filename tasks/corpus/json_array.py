"""The elements of one JSON array, read as a stream: a file is never held whole, an element is."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import NamedTuple

from schemas.errors import whole_message
from tasks.corpus.lines import MAX_RECORD_BYTES, Lines

BLANKS = " \t\r\n"
"""What may stand between the parts of JSON."""


class Element(NamedTuple):
    """One element: its value, its own text, and the line where it begins, from 1."""

    value: object
    text: str
    line: int


def json_elements(lines: Lines) -> Iterator[Element]:
    """The elements of a JSON array, in order; bytes that are not UTF-8 come out as lone surrogates.

    Args:
        lines: The file, of which nothing was read yet. Told where the array is broken, as what comes after it cannot
            be read.
    """
    text = _Text(lines.pieces())
    try:
        text.next_sign("[")
        sign = text.next_sign("]")
        while sign != "]":
            yield text.element()
            sign = text.next_sign(",]")
            if not sign:
                raise ValueError("an element is followed by neither a comma nor the end of the array")
        if not text.is_at_end():
            raise ValueError("the array is followed by more")
    except (ValueError, RecursionError) as error:
        left = text.drain()
        lines.number = text.line - 1
        # Where the archive broke off, the array did with it.
        lines.fail(lines.failure or f"broken JSON: {whole_message(error)}", left)


class _Text:
    """A stream of text, of which `rest` is held and read up to `at`."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._counted = 0
        self.rest, self.at, self.line, self.is_complete = "", 0, 1, False

    def next_sign(self, wanted: str) -> str:
        """The next sign, read over, if it is one of those wanted; else nothing. Blanks before it are read over."""
        self._skip_blanks()
        sign = self.rest[self.at : self.at + 1]
        if not sign or sign not in wanted:
            return ""
        self.at += 1
        return sign

    def is_at_end(self) -> bool:
        """Whether only blanks are left."""
        self._skip_blanks()
        return self.at == len(self.rest)

    def element(self) -> Element:
        """The value that comes next.

        Raises:
            ValueError: if there is none.
        """
        self._skip_blanks()
        while True:
            try:
                value, end = self._json.raw_decode(self.rest, self.at)
            except (ValueError, RecursionError):
                # It may only be cut here.
                if not self._more():
                    raise
                continue
            # A number may go on.
            if end == len(self.rest) and self._more():
                continue
            element = Element(value, self.rest[self.at : end], self._line_here())
            self.at = end
            return element

    def _skip_blanks(self) -> None:
        while True:
            while self.rest[self.at : self.at + 1] in (*BLANKS,):
                self.at += 1
            if self.at < len(self.rest) or not self._more():
                return

    def drain(self) -> int:
        """Bytes of what is left, which is read over."""
        self._line_here()
        held = len(self.rest[self.at :].encode("utf-8", "surrogateescape"))
        return held + sum(len(piece) for piece in self._pieces)

    def _line_here(self) -> int:
        self.line += self.rest.count("\n", self._counted, self.at)
        self._counted = self.at
        return self.line

    def _more(self) -> bool:
        """Whether there was more to read; what is held doubles, so that a long element is not parsed too often."""
        held = len(self.rest) - self.at
        if self.is_complete or held > MAX_RECORD_BYTES:
            return False
        self._line_here()
        parts, added = [self.rest[self.at :]], 0
        while added <= held and (piece := next(self._pieces, b"")):
            parts.append(self._decoder.decode(piece))
            added += len(parts[-1])
        if added <= held:
            parts.append(self._decoder.decode(b"", final=True))
            self.is_complete = True
        self.rest, self.at, self._counted = "".join(parts), 0, 0
        return len(self.rest) > held
