"""The tokenization of one corpus file as values: the job, its limit, and the shards that came of it."""

from __future__ import annotations

from dataclasses import dataclass

from infra.storage import Storage
from schemas.config import Corpus
from tasks.corpus.files import CorpusFile


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Documents and tokens that may still be taken; None is no limit."""

    documents: int | None = None
    tokens: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is no limit at all."""
        return self.documents is None and self.tokens is None

    @property
    def is_spent(self) -> bool:
        """Whether a limit is reached."""
        return self.documents == 0 or self.tokens == 0

    def allows(self, documents: int, tokens: int) -> bool:
        """Whether that many fit."""
        return (self.documents is None or documents <= self.documents) and (
            self.tokens is None or tokens <= self.tokens
        )

    def after(self, shards: FileShards) -> Budget:
        """What a file leaves of it."""
        return self.without(shards.n_documents, shards.n_tokens)

    def without(self, documents: int, tokens: int) -> Budget:
        """What is left when so much is taken."""
        return Budget(
            documents=None if self.documents is None else self.documents - documents,
            tokens=None if self.tokens is None else self.tokens - tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One finished shard of a file.

    Attributes:
        n_records: Records of the file that it covers: documents and rejects.
        n_bytes: Bytes of the file's text that they are.
        lost_bytes: Those of the rejects.
        ends_early: Whether the file could not be read to its end.
        files: Its files' sizes, to notice damage with one listing.
    """

    folder: str
    n_documents: int
    n_tokens: int
    n_rejects: int
    n_records: int
    n_bytes: int
    lost_bytes: int
    ends_early: bool
    files: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class FileShards:
    """The shards of one file.

    Attributes:
        shards: In order.
        is_cut: Whether a limit ended it before the file did.
    """

    shards: tuple[ShardEntry, ...]
    is_cut: bool

    @property
    def n_documents(self) -> int:
        """Documents taken of the file."""
        return sum(shard.n_documents for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        """Tokens taken of the file."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def is_unreadable(self) -> bool:
        """Whether the file ended early, or gave no document of what is in it."""
        is_all_lost = (
            not self.is_cut and not self.n_documents and any(shard.lost_bytes for shard in self.shards)
        )
        return is_all_lost or any(shard.ends_early for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class FileJob:
    """What a worker needs to tokenize one file; `has_begun` is false where nothing of it can be there yet."""

    file: CorpusFile
    folder: str
    corpus: Corpus
    storage: Storage
    tokenizer_folder: str
    budget: Budget = Budget()
    has_begun: bool = True
