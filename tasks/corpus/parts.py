"""Parts of one corpus file that workers tokenize each alone, in order.

Where a file can be entered in its middle, a part is a range of it that its worker reads itself: bytes of lines,
row groups of Parquet. Of other files (compressed, an array of JSON, rows that run over line ends, members of
archives) one reader makes parts that hold what is to be tokenized: it reads 200 to 400 MB of text a second out of gzip,
zstd or CSV, and a core tokenizes 2 (BPE of 49,152 tokens), so frames of zstd are not entered one by one. Which parts
there are changes no shard: those are cut from the records of all parts, one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import IO, ClassVar, Protocol, cast

from fsspec.core import url_to_fs

from infra.addresses import storage_options
from infra.remote_reading import RemoteFile
from schemas.config import Corpus
from tasks.corpus.decompression import FETCH_BYTES, StoredLines
from tasks.corpus.files import CorpusFile
from tasks.corpus.lines import Lines
from tasks.corpus.records import (
    Header,
    Record,
    batches,
    failed,
    is_record_a_line,
    is_table,
    line_records,
    lines_of,
    opened,
    parquet_records,
    read_header,
    read_records,
    row_records,
    too_long,
)

PART_BYTES = FETCH_BYTES
"""What a part has at least, in bytes of text: a second of a core's time, and one request where a worker reads it."""

MAX_GROUP_BYTES = 64 << 20
"""A Parquet file whose row groups hold more text than this is read by one: a row group has no middle to enter."""

_BATCH_RECORDS = 8192


class Part(Protocol):
    """A part of a file."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the stored file that it is, for progress."""
        ...

    @property
    def lines_before(self) -> int | None:
        """Lines of the file before it; None: those of the parts before it, and it counts lines from its own first."""
        ...

    def read(self, file: CorpusFile, corpus: Corpus) -> tuple[Iterator[Record], Lines | None]:
        """Its records in order, and the lines that they are made of where it has some of the file's own."""
        ...


@dataclass(frozen=True, kw_only=True)
class WholeFile:
    """All of a small file but the first `skip` records."""

    skip: int
    n_bytes: int
    lines_before: ClassVar[int] = 0

    def read(self, file: CorpusFile, corpus: Corpus) -> tuple[Iterator[Record], None]:
        """Its records."""
        return read_records(file, corpus, self.skip), None


@dataclass(frozen=True, kw_only=True)
class LineRange:
    """The lines of a file that begin between two bytes, each a record, or rows under a header.

    Rows may run over line ends: whether they do at the end of the range is told by `Lines.is_open`. Where they do not,
    the next range begins with a row.
    """

    start: int
    end: int
    lines_before: int | None
    header: Header | None

    @property
    def n_bytes(self) -> int:
        """Its bytes."""
        return self.end - self.start

    def read(self, file: CorpusFile, corpus: Corpus) -> tuple[Iterator[Record], Lines]:
        """Its records, and its lines."""
        # Where the first line begins is known where it is known which it is.
        is_line_start = self.lines_before is not None
        stored = StoredLines(
            file.url, file.endpoint_url, self.start, self.end, file.size, is_line_start=is_line_start
        )
        lines = Lines(stored, is_part=True, before=self.lines_before or 0)
        if self.header is None:
            return line_records(lines, file, corpus), lines
        return row_records(lines, file, corpus, self.header), lines


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """Row groups of a Parquet file, without the first `skip` rows of the file."""

    groups: range
    skip: int
    n_bytes: int
    lines_before: ClassVar[int] = 0

    def read(self, file: CorpusFile, corpus: Corpus) -> tuple[Iterator[Record], None]:
        """Its records."""
        fs, path = url_to_fs(file.url, **storage_options(file.url, file.endpoint_url))
        raw = RemoteFile(path, fs)
        return parquet_records(cast("IO[bytes]", raw), file, corpus.text_field, self.skip, self.groups), None


@dataclass(frozen=True, kw_only=True)
class LineBlock:
    """Whole lines, each a record, that were read already."""

    content: bytes = field(repr=False)
    lines_before: int
    n_bytes: int
    position: ClassVar[int] = 0
    failure: ClassVar[str] = ""
    lost_bytes: ClassVar[int] = 0
    ends_early: ClassVar[bool] = False
    is_stored: ClassVar[bool] = False

    def __iter__(self) -> Iterator[bytes]:
        """They are a source of lines."""
        yield self.content

    def read(self, file: CorpusFile, corpus: Corpus) -> tuple[Iterator[Record], Lines]:
        """Its records, and its lines."""
        lines = Lines(self, is_part=True, before=self.lines_before)
        return line_records(lines, file, corpus), lines


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records that were read already."""

    records: tuple[Record, ...] = field(repr=False)
    n_bytes: int
    lines_before: ClassVar[int] = 0

    def read(self, file: CorpusFile, corpus: Corpus) -> tuple[Iterator[Record], None]:
        """Them."""
        return iter(self.records), None


def parts_of(file: CorpusFile, corpus: Corpus, n_records: int, n_bytes: int) -> Iterator[Part]:
    """The parts of a file after its first records, in order; what must be read for them is read as they are asked for.

    Args:
        file: The file.
        corpus: How it is read.
        n_records: Records that are left out.
        n_bytes: Bytes of text that they are.

    Raises:
        CorpusError: if the file cannot be opened.
        StorageError: if the storage stops answering.
    """
    # One whose size is not known may be large.
    if 0 < file.size <= PART_BYTES and file.compression is None and file.format != "parquet":
        yield WholeFile(skip=n_records, n_bytes=file.size)
        return
    with opened(file) as raw:
        if file.format == "parquet":
            parts = _row_groups(raw, file, corpus, n_records)
        else:
            parts = _text_parts(raw, file, corpus, n_records, n_bytes)
        yield from parts


def rest_of(file: CorpusFile, corpus: Corpus, part: LineRange, lines_before: int) -> Iterator[Part]:
    """What a file has from the beginning of a range of rows on, read by one: rows run over the range's end."""
    rest = replace(part, end=file.size)
    records, lines = rest.read(file, corpus)
    # Counted on from here.
    lines.number = lines_before
    return _batched(records, part.start)


def can_be_entered(file: CorpusFile) -> bool:
    """Whether a file may be read from its middle: an archive's member is read from its start each time.

    What a web server sends of a file need not be what was asked for.
    """
    return "::" not in file.url and not file.url.startswith(("http://", "https://")) and file.size > 0


def _text_parts(
    raw: IO[bytes], file: CorpusFile, corpus: Corpus, n_records: int, n_bytes: int
) -> Iterator[Part]:
    lines = lines_of(raw, file, corpus)
    start = lines.starts_at if can_be_entered(file) else None
    if is_record_a_line(lines, file, corpus) and not lines.ends_in_carriage_returns:
        if start is None:
            return _blocks(lines, n_records)
        return _ranges(file, start + n_bytes, n_records, None)
    # Which line a row has that comes after others, only these tell.
    if is_table(file) and start is not None and not n_records:
        header = read_header(lines, file, corpus)
        if header is not None:
            return _ranges(file, start + lines.take(), lines.number, header)
    return _batched(read_records(file, corpus, n_records))


def _ranges(file: CorpusFile, start: int, lines_before: int, header: Header | None) -> Iterator[Part]:
    for first, end in pairwise([*range(start, file.size, PART_BYTES), file.size]):
        yield LineRange(
            start=first, end=end, lines_before=lines_before if first == start else None, header=header
        )


def _blocks(lines: Lines, skip: int) -> Iterator[Part]:
    held, held_bytes, before, position = list[bytes](), 0, skip, 0

    def block() -> Iterator[Part]:
        nonlocal held, held_bytes, before, position
        if held:
            told = lines.position - position
            yield LineBlock(content=b"".join(held), lines_before=before, n_bytes=told)
            before, position = before + len(held), position + told
        held, held_bytes = [], 0

    for raw in lines:
        n_bytes = lines.take()
        if lines.number <= skip:
            continue
        if raw is None:
            yield from block()
            yield Batch(records=(too_long(lines, n_bytes),), n_bytes=0)
            before = lines.number
            continue
        held.append(raw)
        held_bytes += n_bytes
        if held_bytes >= PART_BYTES:
            yield from block()
    yield from block()
    for record in failed(lines):
        yield Batch(records=(record,), n_bytes=0)


def _row_groups(raw: IO[bytes], file: CorpusFile, corpus: Corpus, skip: int) -> Iterator[Part]:
    sizes = _text_sizes(raw, corpus.text_field) if can_be_entered(file) else None
    if sizes is None or max((n_bytes for _, n_bytes in sizes), default=0) > MAX_GROUP_BYTES:
        yield from _batched(read_records(file, corpus, skip))
        return
    total, first, row, n_rows, n_bytes = sum(rows for rows, _ in sizes), 0, 0, 0, 0
    for group, (rows, text_bytes) in enumerate(sizes):
        row += rows
        if row <= skip:
            first = group + 1
            continue
        n_rows, n_bytes = n_rows + rows, n_bytes + text_bytes
        if n_bytes >= PART_BYTES or group == len(sizes) - 1:
            share = file.size * n_rows // max(1, total)
            yield RowGroups(groups=range(first, group + 1), skip=skip, n_bytes=share)
            first, n_rows, n_bytes = group + 1, 0, 0


def _text_sizes(raw: IO[bytes], text_field: str) -> list[tuple[int, int]] | None:
    """Rows and bytes of text of each row group; None where there is no one column of text, or no telling."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(raw).metadata
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        # Who reads it says why.
        return None
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    if paths.count(text_field) != 1:
        return None
    column = paths.index(text_field)
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return [(group.num_rows, group.column(column).total_uncompressed_size) for group in groups]


def _batched(records: Iterable[Record], position: int = 0) -> Iterator[Part]:
    for batch in batches(records, _BATCH_RECORDS, PART_BYTES):
        told = max(position, batch[-1].position)
        yield Batch(records=tuple(batch), n_bytes=told - position)
        position = told
