"""Held-out documents as sequences of one length: long ones cut, short ones joined (PAPER 2).

Documents are taken in corpus order. One that fills a sequence or more gives whole ones, cut from its beginning; its
rest and shorter documents are joined, with EOS between them where the tokenizer has one, until a sequence is full (EOS
fills a last place of one token).
What is left of the document that fills it is not used, so that a joined sequence begins with a document or with the
rest of a long one. A sequence is known by the pieces that it is made of: a file that joins the corpus behind the
others changes none.

Only ordinary tokens are read: special tokens in a text are left out. BOS comes first where `windows.prepend_bos` says
so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import CorpusError
from schemas.retention.work import Piece, Sequence
from schemas.work import CorpusShards, HeldoutPart, TokenShard
from tasks.corpus.heldout import document_hashes, heldout_documents, heldout_parts
from tasks.corpus.windows import read_heldout_tokens

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SequenceTokens:
    """A sequence's tokens.

    Attributes:
        ids: (length,) token ids.
        is_special: (length,) BOS and EOS.
        document: (length,) which piece each token is of; that of the piece before for EOS.
    """

    ids: Ints
    is_special: Bools
    document: Ints

    @property
    def predictions(self) -> Bools:
        """(length − 1,) whether the prediction of token t + 1 counts: both tokens are ordinary, of one document."""
        ordinary = ~self.is_special
        counting: Bools = ordinary[:-1] & ordinary[1:] & (self.document[:-1] == self.document[1:])
        return counting


def heldout_sequences(
    config: Config, storage: Storage, shards: CorpusShards, length: int, most: int
) -> list[Sequence]:
    """Sequences of held-out documents.

    Args:
        config: Says what is held out, and whether sequences begin with BOS.
        storage: Where the shards are.
        shards: The tokenized corpus.
        length: Tokens of a sequence.
        most: How many at most.

    Raises:
        CorpusError: if no document is held out, or all of them together do not fill one sequence.
    """
    parts = heldout_parts(config, storage, shards, None)
    lengths = document_hashes(storage, [part.shard for part in parts])
    documents = [
        (part.shard.folder, doc, int(of[doc]))
        for part, (_, of) in zip(parts, lengths, strict=True)
        for doc in part.documents
    ]
    found = join(documents, length, most, begins=config.windows.prepend_bos, ends=shards.eos_id is not None)
    if not found:
        total = sum(n for _, _, n in documents)
        raise CorpusError(
            f"the {len(documents):,} held-out documents have {total:,} tokens, which do not fill a sequence of "
            f"{length:,}",
            hint="raise retention.heldout_share, shorten retention.sequences, or give more documents",
        )
    return found


def training_sequences(
    config: Config, storage: Storage, shards: CorpusShards, length: int, most: int
) -> list[Sequence]:
    """Sequences of documents that are not held out, in corpus order.

    Raises:
        CorpusError: if they do not fill one.
    """

    def seen() -> Iterator[tuple[str, int, int]]:
        for shard in shards.shards:
            ((_, lengths),) = document_hashes(storage, [shard])
            for doc in np.flatnonzero(~heldout_documents(config, storage, shard) & (lengths > 0)):
                yield shard.folder, int(doc), int(lengths[doc])

    found = join(seen(), length, most, begins=config.windows.prepend_bos, ends=shards.eos_id is not None)
    if not found:
        raise CorpusError(
            f"documents that are not held out do not fill a sequence of {length:,} tokens to train a gate on",
            hint="lower retention.heldout_share or retention.gate_length, or give more documents",
        )
    return found


def join(
    documents: Iterable[tuple[str, int, int]], length: int, most: int, *, begins: bool, ends: bool
) -> list[Sequence]:
    """Cut long documents and join short ones.

    Args:
        documents: Folder of the shard, number in it, and ordinary tokens of each, in order; taken as far as needed.
        length: Tokens of a sequence.
        most: How many sequences at most.
        begins: Whether a sequence begins with BOS.
        ends: Whether EOS stands between two documents.
    """
    room = length - int(begins)
    found: list[Sequence] = []
    open_pieces: list[Piece] = []
    filled = 0

    def close(pieces: list[Piece]) -> None:
        found.append(Sequence(length=length, pieces=tuple(pieces)))

    for folder, doc, n in documents:
        first = 0
        while n - first >= room and len(found) < most:
            close([Piece(folder=folder, doc=doc, first=first, stop=first + room)])
            first += room
        if len(found) >= most:
            break
        if first == n:
            continue
        between = int(ends and bool(open_pieces))
        taken = min(n - first, room - filled - between)
        open_pieces.append(Piece(folder=folder, doc=doc, first=first, stop=first + taken))
        filled += between + taken
        # EOS alone can fill the last place; a document behind it could not.
        if filled >= room - int(ends):
            close(open_pieces)
            open_pieces, filled = [], 0
    return found


def read_sequence(
    storage: Storage,
    shards: Many[TokenShard],
    sequence: Sequence,
    *,
    bos_id: int | None,
    eos_id: int | None,
) -> SequenceTokens:
    """The tokens of a sequence.

    Args:
        storage: Where the shards are.
        shards: All that its pieces are of.
        sequence: Which.
        bos_id: First; None: nothing.
        eos_id: Between documents; None: nothing.
    """
    by_folder = {shard.folder: shard for shard in shards}
    ids: list[npt.NDArray[np.int64]] = []
    special: list[bool] = []
    document: list[int] = []

    def put(tokens: npt.NDArray[np.int64], piece: int, is_special: bool) -> None:
        ids.append(tokens)
        special.extend([is_special] * len(tokens))
        document.extend([piece] * len(tokens))

    if bos_id is not None:
        put(np.array([bos_id]), 0, True)
    for place, piece in enumerate(sequence.pieces):
        if place and eos_id is not None:
            put(np.array([eos_id]), place - 1, True)
        part = HeldoutPart(shard=by_folder[piece.folder], documents=(piece.doc,), n_tokens=0)
        tokens = read_heldout_tokens(storage, part)
        ordinary = tokens.token_id[~tokens.is_special][piece.first : piece.stop]
        put(ordinary.astype(np.int64), place, False)
    if eos_id is not None and len(document) == sequence.length - 1:
        put(np.array([eos_id]), len(sequence.pieces) - 1, True)
    return SequenceTokens(ids=np.concatenate(ids), is_special=np.array(special), document=np.array(document))
