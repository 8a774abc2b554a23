"""Records of a corpus file, read as a stream.

A record is a line of a .jsonl or .txt file, a row of a .csv, .tsv or .parquet file, an element of a .json array, or a
whole .txt file (`corpus.txt_records`). Every record comes out as a text or as a reject with a reason; nothing is
skipped in silence, and a file is never held whole. A reject may stand for more than one record (a quote that is never
closed, a truncated archive, a damaged footer), so each says how many bytes it covers. What cannot be read past is one
reject, at the line where it was met, or at line 0 where the file has no lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, NamedTuple

import fsspec

from infra.addresses import failed_at, storage_options, without_credentials
from schemas.config import Corpus
from schemas.errors import CorpusError, about, whole_message
from schemas.sections import Csv
from tasks.corpus.decompression import PlainBytes
from tasks.corpus.files import CorpusFile, is_unicode
from tasks.corpus.json_array import BLANKS, json_elements
from tasks.corpus.lines import MAX_RECORD_BYTES, Lines

_DELIMITERS = {"csv": ",", "tsv": "\t"}

EMPTY_RECORD = "empty record"
EMPTY_TEXT = "empty text"


class Record(NamedTuple):
    """One record: its text, or why it has none.

    Attributes:
        line: Line (text formats), row (Parquet) or element's line (JSON arrays) where it begins, from 1; 0 for the
            file itself.
        text: The document, or None for a reject.
        reason: Why it cannot be used, empty for a document.
        position: Bytes of the stored file read so far.
        n_bytes: Bytes of the file's text (uncompressed, UTF-8) that it covers, line ends included.
        n_lines: Lines or rows that it covers; None where that is not known.
        ends_early: Whether nothing is known of what came after it.
    """

    line: int
    text: str | None
    reason: str = ""
    position: int = 0
    n_bytes: int = 0
    n_lines: int | None = 1
    ends_early: bool = False

    @property
    def lost_bytes(self) -> int:
        """Bytes of a reject; none where there was nothing in it to lose."""
        is_kept = self.text is not None or self.reason in (EMPTY_RECORD, EMPTY_TEXT)
        return 0 if is_kept else self.n_bytes


def read_records(file: CorpusFile, corpus: Corpus, skip: int = 0) -> Iterator[Record]:
    """Every record of a file after the first `skip`, in order.

    Raises:
        CorpusError: if the file cannot be opened at all.
        StorageError: naming the file, if the storage stops answering while it is read.
    """
    with opened(file) as raw:
        if file.format == "parquet":
            yield from parquet_records(raw, file, corpus.text_field, skip)
        else:
            yield from _text_records(raw, file, corpus, skip)


@contextmanager
def opened(file: CorpusFile) -> Iterator[IO[bytes]]:
    """A file to read; errors of the block name it.

    Raises:
        CorpusError: if it cannot be opened.
    """
    try:
        # Held to the end: an archive's filesystem closes its file when it is collected.
        holder = fsspec.open(file.url, "rb", **storage_options(file.url, file.endpoint_url))
        raw = holder.open()
    except OSError as error:
        raise CorpusError(f"cannot open {failed_at(file.url, error)}", stage="tokenize") from error
    with raw, about(without_credentials(file.url)):
        yield raw


def lines_of(raw: IO[bytes], file: CorpusFile, corpus: Corpus) -> Lines:
    """The lines of an opened file of text."""
    source = PlainBytes(raw, file.compression, file.size, is_certain=corpus.compression != "auto")
    return Lines(source, quote=corpus.csv.quote if is_table(file) else "")


def is_table(file: CorpusFile) -> bool:
    """Whether a file is a table with delimiters, whose rows may have several lines."""
    return file.format in _DELIMITERS


def is_record_a_line(lines: Lines, file: CorpusFile, corpus: Corpus) -> bool:
    """Whether every line of a file is a record."""
    if file.format == "json":
        # Else it is one array of records.
        return not lines.head.lstrip(BLANKS.encode()).startswith(b"[")
    return file.format == "jsonl" or (file.format == "txt" and corpus.txt_records == "line")


def line_records(lines: Lines, file: CorpusFile, corpus: Corpus, skip: int = 0) -> Iterator[Record]:
    """The records of a file, or of a part of it, of which every line is one."""
    if file.format == "txt":
        return islice(_txt(lines), skip, None)
    return _jsonl(lines, corpus.text_field, skip)


def _text_records(raw: IO[bytes], file: CorpusFile, corpus: Corpus, skip: int) -> Iterator[Record]:
    lines = lines_of(raw, file, corpus)
    records: Iterator[Record]
    if is_table(file):
        records = islice(_csv(lines, file, corpus), skip, None)
    elif is_record_a_line(lines, file, corpus):
        records = line_records(lines, file, corpus, skip)
    elif file.format == "json":
        records = _json(lines, corpus.text_field, skip)
    else:
        records = islice(_whole_file(lines), skip, None)
    yield from records
    yield from failed(lines)


def failed(lines: Lines) -> Iterator[Record]:
    """The reject that stands for what could not be read after the lines that came out, if there is any."""
    if lines.failure:
        yield Record(
            line=lines.number + 1,
            text=None,
            reason=lines.failure,
            position=lines.position,
            n_bytes=lines.take_lost(),
            n_lines=None,
            ends_early=lines.ends_early,
        )


def too_long(lines: Lines, n_bytes: int) -> Record:
    """The reject that stands for a line that came out as None."""
    return Record(lines.number, None, _decoded(None)[1], lines.position, n_bytes)


def batches(records: Iterable[Record], most: int, characters: int) -> Iterator[list[Record]]:
    """Records in lists of at most so many, each closed by the one that brings it to so many characters."""
    batch: list[Record] = []
    held = 0
    for record in records:
        batch.append(record)
        held += len(record.text or "")
        if len(batch) >= most or held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _checked(line: int, value: object, position: int, n_bytes: int, n_lines: int = 1) -> Record:
    reason = ""
    if not isinstance(value, str):
        reason = f"text is {type(value).__name__}, not text"
    elif not value:
        reason = EMPTY_TEXT
    elif not value.isascii() and not is_unicode(value):
        reason = "text is not valid Unicode"
    if reason:
        return Record(line, None, reason, position, n_bytes, n_lines)
    return Record(line, str(value), "", position, n_bytes, n_lines)


def _jsonl(lines: Lines, text_field: str, skip: int) -> Iterator[Record]:
    for raw in lines:
        n_bytes = lines.take()
        if lines.number <= skip:
            continue
        line, position = lines.number, lines.position
        text, reason = _decoded(raw)
        if not reason:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = f"broken JSON: {whole_message(error)}" if text.strip() else EMPTY_RECORD
        if reason:
            yield Record(line, None, reason, position, n_bytes)
        else:
            yield _from_value(value, text, text_field, line, position, n_bytes)


def _from_value(
    value: object, text: str, text_field: str, line: int, position: int, n_bytes: int, n_lines: int = 1
) -> Record:
    """The record of a parsed JSON value, whose own text is `text`."""
    if not isinstance(value, dict) or text_field not in value:
        return Record(line, None, f"no text field {text_field!r}", position, n_bytes, n_lines)
    # Parsing has kept the last of two keys; the cheap look goes first, as this is asked of every record.
    if text.count(f'"{text_field}"') > 1 and _is_twice(text_field, text):
        reason = f"the text field {text_field!r} comes twice in it"
        return Record(line, None, reason, position, n_bytes, n_lines)
    return _checked(line, value[text_field], position, n_bytes, n_lines)


def _is_twice(key: str, text: str) -> bool:
    """Whether the outermost object of a JSON text has a key twice."""
    outermost: list[tuple[str, object]] = []

    def note(pairs: list[tuple[str, object]]) -> None:
        # Objects are ended from the inside out.
        outermost[:] = pairs

    json.loads(text, object_pairs_hook=note)
    return sum(name == key for name, _ in outermost) > 1


def _json(lines: Lines, text_field: str, skip: int) -> Iterator[Record]:
    """A file that is one array of records."""
    for element in islice(json_elements(lines), skip, None):
        line, text, n_lines = element.line, element.text, element.text.count("\n") + 1
        n_bytes = len(text.encode("utf-8", "surrogateescape"))
        if text.isascii() or is_unicode(text):
            yield _from_value(element.value, text, text_field, line, lines.position, n_bytes, n_lines)
        else:
            yield Record(line, None, "not valid UTF-8", lines.position, n_bytes, n_lines)


def _txt(lines: Lines) -> Iterator[Record]:
    for raw in lines:
        text, reason = _decoded(raw)
        n_bytes = lines.take()
        reason = reason or _binary(raw)
        if reason:
            yield Record(lines.number, None, reason, lines.position, n_bytes)
        else:
            text = text.removesuffix("\n").removesuffix("\r")
            yield _checked(lines.number, text, lines.position, n_bytes)


def _whole_file(lines: Lines) -> Iterator[Record]:
    pieces, held = [], 0
    for raw in lines:
        held += MAX_RECORD_BYTES + 1 if raw is None else len(raw)
        if held <= MAX_RECORD_BYTES and raw is not None:
            pieces.append(raw)
    whole = None if held > MAX_RECORD_BYTES else b"".join(pieces)
    text, reason = _decoded(whole)
    reason = reason or _binary(whole)
    if lines.failure:
        return
    n_bytes, n_lines = lines.take(), max(1, lines.number)
    if reason:
        yield Record(1, None, reason, lines.position, n_bytes, n_lines)
    else:
        yield _checked(1, text, lines.position, n_bytes, n_lines)


def _decoded(raw: bytes | None) -> tuple[str, str]:
    if raw is None:
        return "", f"record longer than {MAX_RECORD_BYTES >> 20} MiB"
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"not valid UTF-8: {error.reason} at byte {error.start}"


def _binary(raw: bytes | None) -> str:
    """Why bytes are no text, if so: zeros are what a crash leaves of a file, or half of UTF-16."""
    return "NUL bytes: a damaged file, or UTF-16 without its mark" if raw and b"\0" in raw else ""


class _Row(NamedTuple):
    """A row of a table: where it begins, its lines and fields, and why it is not to be trusted."""

    line: int
    n_lines: int
    fields: list[str]
    problem: str
    not_utf8: str


def _rows(lines: Lines, csv_of: Csv, delimiter: str) -> Iterator[_Row]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    problem, not_utf8, before, is_over = "", "", lines.number, False

    def decoded() -> Iterator[str]:
        nonlocal problem, not_utf8, is_over
        for raw in lines:
            text, reason = _decoded(raw)
            if raw is None:
                problem, text = reason, "\n"
            elif reason:
                # Read on, so that the row ends where it does; it is a reject.
                not_utf8, text = reason, raw.decode("utf-8", errors="surrogateescape")
            problem = problem or _binary(raw)
            yield text
        is_over = True

    reader = csv.reader(
        decoded(),
        strict=True,
        delimiter=delimiter,
        quotechar=csv_of.quote or None,
        quoting=csv.QUOTE_MINIMAL if csv_of.quote else csv.QUOTE_NONE,
        escapechar=csv_of.escape or None,
    )
    while True:
        line, problem, not_utf8 = before + reader.line_num + 1, "", ""
        try:
            fields = next(reader)
        except StopIteration:
            lines.is_open = lines.is_open or before + reader.line_num >= line
            return
        except csv.Error as error:
            if lines.failure:
                # The row that the failure cut is part of it.
                return
            # A row that is broken for another reason ends with its line, before the lines do.
            fields, problem, lines.is_open = [], f"broken CSV: {error}", is_over
        yield _Row(line, before + reader.line_num + 1 - line, fields, problem, not_utf8)


def _csv(lines: Lines, file: CorpusFile, corpus: Corpus) -> Iterator[Record]:
    rows = _rows(lines, corpus.csv, _delimiter(file, corpus))
    first = next(rows, None)
    if first is None:
        return
    header, header_bytes = Header(first, corpus.text_field), lines.take()
    if header.fault:
        yield Record(first.line, None, header.fault, lines.position, header_bytes, first.n_lines)
    record: Record | None = None
    for record in _under(header, rows, lines):
        yield record
    if record is None and header.problem and not header.fault:
        # Without rows there is no other place to say it, and a header that lacks the column may be a row itself.
        yield Record(first.line, None, header.problem, lines.position, header_bytes, first.n_lines)


def _under(header: Header, rows: Iterator[_Row], lines: Lines) -> Iterator[Record]:
    """The records of the rows under a header."""
    for row in rows:
        n_bytes = lines.take()
        reason = row.problem or (header.problem_of(row.fields) if row.fields else EMPTY_RECORD)
        text = "" if reason else row.fields[header.column]
        record = _checked(row.line, text, lines.position, n_bytes, row.n_lines)
        reason = reason or record.reason or row.not_utf8
        yield record._replace(text=None, reason=reason) if reason else record


def read_header(lines: Lines, file: CorpusFile, corpus: Corpus) -> Header | None:
    """The header of a table, of which nothing was read yet; None where no text can be found by it."""
    first = next(_rows(lines, corpus.csv, _delimiter(file, corpus)), None)
    header = None if first is None else Header(first, corpus.text_field)
    return None if header is None or header.fault or header.problem else header


def row_records(lines: Lines, file: CorpusFile, corpus: Corpus, header: Header) -> Iterator[Record]:
    """The records of some lines of a table that come after its header and begin with a row."""
    return _under(header, _rows(lines, corpus.csv, _delimiter(file, corpus)), lines)


def _delimiter(file: CorpusFile, corpus: Corpus) -> str:
    return corpus.csv.delimiter or _DELIMITERS[file.format]


class Header:
    """What the first row of a table says of the rows that follow.

    Attributes:
        column: Where the text is, -1 where that is not known.
        problem: Why it is not known.
        fault: Why the header is a reject itself; its rows may be used all the same.
    """

    def __init__(self, row: _Row, text_field: str) -> None:
        self._names, self._field = row.fields, text_field
        found = self._names.count(text_field)
        self.column = self._names.index(text_field) if found == 1 else -1
        reason = row.problem or row.not_utf8
        self.fault = f"in the header: {reason}" if reason else ""
        self.problem = ""
        if found > 1:
            self.problem = f"the text field {text_field!r} is {found} columns of the header"
        elif not found:
            known = "the header cannot be read" if row.problem else f"columns: {', '.join(self._names)[:200]}"
            self.problem = f"no text field {text_field!r} ({known})"

    def problem_of(self, row: Sequence[str]) -> str:
        """Why a row's text cannot be trusted; empty where it can.

        A row of another length was cut or joined somewhere: by a delimiter or a line end that is not quoted.
        """
        if self.problem:
            return self.problem
        share = f"({len(row)} of {len(self._names)} columns)"
        if self.column >= len(row):
            return f"no text field {self._field!r} {share}"
        if len(row) > len(self._names):
            return f"more fields than the header {share}: is a text with a delimiter not quoted?"
        if len(row) < len(self._names) and self.column == len(row) - 1:
            return f"ends with its text {share}: is a text with a line end not quoted?"
        return ""


def parquet_records(
    raw: IO[bytes], file: CorpusFile, text_field: str, skip: int, groups: range | None = None
) -> Iterator[Record]:
    """The rows of a Parquet file after the first `skip`; `groups`: those of some row groups alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(raw)
        names = parquet.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if not skip:
            reason = f"unreadable Parquet file: {whole_message(error)}"
            yield Record(0, None, reason, n_bytes=file.size, n_lines=None, ends_early=True)
        return
    total, row = parquet.metadata.num_rows, 0
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        end = row + metadata.num_rows
        if end <= skip or (groups is not None and group not in groups):
            row = end
            continue
        row_bytes = -(-metadata.total_byte_size // max(1, metadata.num_rows))
        reason = f"no text field {text_field!r}"
        if names.count(text_field) > 1:
            reason = f"the text field {text_field!r} is {names.count(text_field)} columns"
        elif text_field in names:
            try:
                for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=[text_field]):
                    for value, n_bytes in _values(batch.column(0), row_bytes):
                        row += 1
                        if row > skip:
                            yield _checked(row, value, file.size * row // max(1, total), n_bytes)
            except (pa.ArrowException, OSError) as error:
                reason = f"damaged Parquet row group {group}: {whole_message(error)}"
        for missing in range(max(row, skip), end):
            yield Record(missing + 1, None, reason, file.size * missing // max(1, total), row_bytes)
        row = end


def _values(column: Any, row_bytes: int) -> Iterator[tuple[object, int]]:
    """Values and their bytes: of a text its own, else those of a row."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        for value in column.to_pylist():
            yield value, 0 if value is None else row_bytes
        return
    for value in column.cast(pa.large_binary()).to_pylist():
        # Invalid UTF-8 becomes lone surrogates, which `_checked` rejects for that record alone.
        yield (None, 0) if value is None else (value.decode("utf-8", errors="surrogateescape"), len(value))
