"""Pieces: the tokenized parts of a file, and the shards that are put together of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.addresses import without_credentials
from schemas.errors import about
from tasks.corpus.file_jobs import FileJob
from tasks.corpus.parts import Part
from tasks.corpus.records import Record
from tasks.corpus.token_shards import OpenShard, made_shard, tokenized, tokenizer_of
from tasks.engine.stage import Made


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """The documents of a part in order, and its rejects.

    Attributes:
        ids: Tokens of all documents.
        ends: Of each document, where its tokens end in `ids`.
        documents: Of each, a row: the line where it begins, characters, bytes, and tokens that are not special.
        rejects: Each with the number of documents before it.
        n_lines: The last line of its part, counted as the part counts lines.
        is_open: Whether the part ends within a row that goes on after it.
    """

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    rejects: Sequence[tuple[int, Record]]
    n_lines: int
    is_open: bool


@dataclass(frozen=True, kw_only=True)
class Told:
    """What of a piece tells where shards end.

    Attributes:
        n_kept: Of each document, tokens that are not special.
        ends_in_rejects: Whether rejects come after its last document.
        n_lines: As of the piece.
        is_open: As of the piece.
    """

    n_kept: list[int]
    ends_in_rejects: bool
    n_lines: int
    is_open: bool


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A shard of some pieces.

    Attributes:
        folder: Its folder.
        first: Its first document, counted from the first of the first piece.
        last: The document after its last.
        ends_file: Whether the file ends with it.
    """

    folder: str
    first: int
    last: int
    ends_file: bool


def tokenize_part(job: FileJob, part: Part) -> Piece:
    """Read and tokenize a part of a job's file.

    Raises:
        StorageError: naming the file, if the storage stops answering.
    """
    backend, special = tokenizer_of(job.storage, job.tokenizer_folder)
    records, lines = part.read(job.file, job.corpus)
    found: list[npt.NDArray[np.int32]] = []
    documents: list[tuple[int, int, int]] = []
    rejects: list[tuple[int, Record]] = []
    with about(without_credentials(job.file.url)):
        for record, ids in tokenized(records, backend):
            if ids is None:
                rejects.append((len(found), record))
            else:
                found.append(ids)
                documents.append((record.line, len(record.text or ""), record.n_bytes))
    ids = np.concatenate([*found, np.empty(0, np.int32)])
    ends = np.cumsum([len(some) for some in found], dtype=np.int64)
    n_kept = np.concatenate([[0], np.cumsum(~np.isin(ids, special))])
    kept = np.diff(n_kept[ends], prepend=0).reshape(-1, 1)
    columns = np.array(documents, dtype=np.int64).reshape(-1, 3)
    return Piece(
        ids=ids,
        ends=ends,
        documents=np.hstack([columns, kept]),
        rejects=rejects,
        n_lines=lines.number if lines else 0,
        is_open=lines is not None and lines.is_open,
    )


def tell(piece: Piece) -> Told:
    """What of a piece tells where shards end."""
    return Told(
        n_kept=piece.documents[:, 3].tolist(),
        ends_in_rejects=bool(piece.rejects) and piece.rejects[-1][0] == len(piece.ends),
        n_lines=piece.n_lines,
        is_open=piece.is_open,
    )


def write_shards(
    job: FileJob, cuts: Sequence[Cut], lines_before: Sequence[int], *pieces: Piece
) -> Iterator[Made]:
    """Make shards of pieces.

    Args:
        job: Of their file.
        cuts: The shards.
        lines_before: Of each piece, what its lines' numbers are short of.
        pieces: Pieces that follow each other.
    """
    _, special = tokenizer_of(job.storage, job.tokenizer_folder)
    for cut in cuts:
        shard, first = OpenShard(job, special), 0
        for piece, before in zip(pieces, lines_before, strict=True):
            _add(shard, piece, cut.first - first, cut.last - first, before)
            first += len(piece.ends)
        yield made_shard(shard, cut.folder, ends_file=cut.ends_file)


def _add(shard: OpenShard, piece: Piece, first: int, last: int, lines_before: int) -> None:
    """Add a piece's documents from `first` on before `last`, which may lie outside of it, and rejects around them."""
    n = len(piece.ends)
    first, last = max(0, first), min(n, last)
    rejects = [(place, record) for place, record in piece.rejects if first <= place <= last]
    starts = [0, *piece.ends.tolist()]
    for place, (line, n_chars, n_bytes, n_kept) in enumerate(piece.documents[first:last].tolist(), first):
        while rejects and rejects[0][0] == place:
            shard.add_reject(_moved(rejects.pop(0)[1], lines_before))
        ids = piece.ids[starts[place] : starts[place + 1]]
        shard.add_document(line + lines_before, n_chars, n_bytes, ids, n_kept)
    # They wait for a document of the next piece, or for the file's end.
    for _, record in rejects:
        shard.add_reject(_moved(record, lines_before))


def _moved(record: Record, lines_before: int) -> Record:
    return record._replace(line=record.line + lines_before)
