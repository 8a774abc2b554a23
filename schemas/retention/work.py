"""The values that the stages of retention hand to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive ordinary tokens of one document.

    Attributes:
        folder: Folder of the token shard.
        doc: Number of the document inside the shard.
        first: First of its ordinary tokens.
        stop: Behind the last.
    """

    folder: str
    doc: int
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """What is read in one go: BOS where windows begin with it, then pieces of documents with EOS between them.

    Attributes:
        length: Tokens, BOS and EOS included.
        pieces: In order.
    """

    length: int
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> list[list[str | int]]:
        """What determines it, as JSON can hold it."""
        return [[piece.folder, piece.doc, piece.first, piece.stop] for piece in self.pieces]


@dataclass(frozen=True, kw_only=True, order=True)
class Setup:
    """Under what a sequence is read.

    Attributes:
        policy: Name that the configuration gives it.
        budget: Share; 1 for the full cache.
        protocol: `stream` or `prefill`.
        length: Tokens of the sequences.
    """

    policy: str
    budget: float
    protocol: str
    length: int


@dataclass(frozen=True, kw_only=True)
class ReadSequence:
    """One sequence, read under one setup; its folder has the files `reading_*`."""

    setup: Setup
    sequence: Sequence
    folder: str


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """One policy's speed at one budget and length; its folder has `decode_turns.parquet`.

    Attributes:
        kv_bytes: That its cache held.
        full_kv_bytes: That the full one held.
        device: Where.
        threads: Of a CPU.
        load: Load average of the machine as it began.
    """

    policy: str
    budget: float
    length: int
    folder: str
    kv_bytes: int
    full_kv_bytes: int
    device: str
    threads: int
    load: float
