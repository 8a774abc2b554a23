"""Records of a corpus file, read as a stream.

A record is a line of a .jsonl or .txt file, a row of a .csv or .parquet file, or a whole .txt file
(`corpus.txt_records`). Every record comes out as a text or as a reject with a reason; nothing is skipped in
silence, and a file is never held whole. What cannot be read past (a truncated archive, a damaged footer) is
one reject, at the line where it was met, or at line 0 where the file has no lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec

from infra.addresses import failed_at, storage_options
from infra.errors import CorpusError
from schemas.config import Corpus
from tasks.corpus import CorpusFile
from tasks.lines import MAX_RECORD_BYTES, Lines


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record: its text, or why it has none.

    Attributes:
        line: Line (text formats) or row (Parquet) where it begins, from 1; 0 for the file itself.
        text: The document, or None for a reject.
        reason: Why it cannot be used, empty for a document.
        position: Bytes of the file read so far.
    """

    line: int
    text: str | None
    reason: str = ""
    position: int = 0


def read_records(file: CorpusFile, corpus: Corpus, skip: int = 0) -> Iterator[Record]:
    """Every record of a file after the first `skip`, in order.

    Raises:
        CorpusError: if the file cannot be opened at all.
    """
    try:
        # Held to the end: an archive's filesystem closes its file when it is collected.
        holder = fsspec.open(file.url, "rb", **storage_options(file.url, file.endpoint_url))
        opened = holder.open()
    except OSError as error:
        raise CorpusError(f"cannot open {failed_at(file.url, error)}", stage="tokenize") from error
    with opened as raw:
        if file.format == "parquet":
            yield from _parquet(raw, file, corpus.text_field, skip)
            return
        lines = Lines(raw, file.compression)
        parse = {"jsonl": _jsonl, "csv": _csv, "txt": _txt}[file.format]
        yield from parse(lines, corpus, skip)
        if lines.failure:
            yield Record(line=lines.number + 1, text=None, reason=lines.failure, position=lines.position)


def _checked(line: int, value: object, position: int) -> Record:
    if not isinstance(value, str):
        return Record(
            line=line, text=None, reason=f"text is {type(value).__name__}, not text", position=position
        )
    if not value:
        return Record(line=line, text=None, reason="empty text", position=position)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return Record(line=line, text=None, reason="text is not valid Unicode", position=position)
    return Record(line=line, text=value, position=position)


def _jsonl(lines: Lines, corpus: Corpus, skip: int) -> Iterator[Record]:
    for raw in lines:
        if lines.number <= skip:
            continue
        line, position = lines.number, lines.position
        text, reason = _decoded(raw)
        if reason:
            yield Record(line=line, text=None, reason=reason, position=position)
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = f"broken JSON: {error}" if text.strip() else "empty record"
            yield Record(line=line, text=None, reason=reason, position=position)
            continue
        if not isinstance(value, dict) or corpus.text_field not in value:
            yield Record(
                line=line, text=None, reason=f"no text field {corpus.text_field!r}", position=position
            )
        else:
            yield _checked(line, value[corpus.text_field], position)


def _txt(lines: Lines, corpus: Corpus, skip: int) -> Iterator[Record]:
    if corpus.txt_records == "file":
        if not skip:
            yield from _whole_file(lines)
        return
    for raw in lines:
        if lines.number <= skip:
            continue
        text, reason = _decoded(raw)
        if reason:
            yield Record(line=lines.number, text=None, reason=reason, position=lines.position)
        else:
            yield _checked(lines.number, text.removesuffix("\n").removesuffix("\r"), lines.position)


def _whole_file(lines: Lines) -> Iterator[Record]:
    pieces, held = [], 0
    for raw in lines:
        held += MAX_RECORD_BYTES + 1 if raw is None else len(raw)
        if held <= MAX_RECORD_BYTES and raw is not None:
            pieces.append(raw)
    text, reason = _decoded(None if held > MAX_RECORD_BYTES else b"".join(pieces))
    if lines.failure:
        return
    if reason:
        yield Record(line=1, text=None, reason=reason, position=lines.position)
    else:
        yield _checked(1, text, lines.position)


def _decoded(raw: bytes | None) -> tuple[str, str]:
    if raw is None:
        return "", f"record longer than {MAX_RECORD_BYTES >> 20} MiB"
    try:
        return raw.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"not valid UTF-8: {error.reason} at byte {error.start}"


def _csv(lines: Lines, corpus: Corpus, skip: int) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    too_long: list[int] = []

    def decoded() -> Iterator[str]:
        for raw in lines:
            if raw is None:
                too_long.append(lines.number)
            yield "\n" if raw is None else raw.decode("utf-8", errors="surrogateescape")

    reader = csv.reader(decoded(), strict=True)
    column, header, index = -1, None, 0
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.failure:
                return
            row, problem = [], f"broken CSV: {error}"
        else:
            problem = f"record longer than {MAX_RECORD_BYTES >> 20} MiB" if too_long else ""
        too_long.clear()
        if header is None:
            header = row
            column = row.index(corpus.text_field) if corpus.text_field in row else -1
            continue
        index += 1
        if index <= skip:
            continue
        if problem or not row:
            yield Record(line=line, text=None, reason=problem or "empty record", position=lines.position)
        elif column < 0 or column >= len(row):
            columns = (
                f" (columns: {', '.join(header)[:200]})"
                if column < 0
                else f" ({len(row)} of {len(header)} columns)"
            )
            reason = f"no text field {corpus.text_field!r}{columns}"
            yield Record(line=line, text=None, reason=reason, position=lines.position)
        else:
            yield _checked(line, row[column], lines.position)


def _parquet(raw: IO[bytes], file: CorpusFile, text_field: str, skip: int) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(raw)
    except (pa.ArrowException, OSError) as error:
        if not skip:
            yield Record(line=0, text=None, reason=f"unreadable Parquet file: {_first_line(error)}")
        return
    total, row = parquet.metadata.num_rows, 0
    has_field = text_field in parquet.schema_arrow.names
    for group in range(parquet.num_row_groups):
        end = row + parquet.metadata.row_group(group).num_rows
        if end <= skip:
            row = end
            continue
        reason = f"no text field {text_field!r}"
        if has_field:
            try:
                for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=[text_field]):
                    for value in _values(batch.column(0)):
                        row += 1
                        if row > skip:
                            yield _checked(row, value, file.size * row // max(1, total))
            except (pa.ArrowException, OSError) as error:
                reason = f"damaged Parquet row group {group}: {_first_line(error)}"
        for missing in range(max(row, skip), end):
            yield Record(
                line=missing + 1, text=None, reason=reason, position=file.size * missing // max(1, total)
            )
        row = end


def _values(column: Any) -> list[object]:
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return list(column.to_pylist())
    values: list[object] = []
    for value in column.cast(pa.large_binary()).to_pylist():
        # Invalid UTF-8 becomes lone surrogates, which `_checked` rejects for that record alone.
        values.append(None if value is None else value.decode("utf-8", errors="surrogateescape"))
    return values


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
