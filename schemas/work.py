"""The values that the spine's stages hand to each other: names of finished folders and small numbers, never data.

Those between the stages of an experiment are in its own `schemas.<experiment>.work`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from schemas.experiments import all_rooms

STAGES: tuple[str, ...] = (*(stage for room in all_rooms() for stage in room.stages), "tables", "report")
"""All stages' names, in the order in which they run."""

if TYPE_CHECKING:
    StageName = str
else:
    # A form and the command line offer the choice.
    StageName = Literal[STAGES]


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """A run of consecutive documents of one corpus file, tokenized.

    Attributes:
        folder: Its folder in the storage, named by content.
        source: URL of the corpus file.
        doc_offset: `doc_id` of its document 0 in this corpus.
        n_documents: Documents in it.
        n_tokens: Tokens in it, special tokens not counted.
        n_rejects: Records of its part of the file that could not be used.
        has_specials: Whether its text has special tokens, which are in a file of their own.
    """

    folder: str
    source: str
    doc_offset: int
    n_documents: int
    n_tokens: int
    n_rejects: int
    has_specials: bool = True

    @property
    def whole(self) -> GraphShard:
        """All of it, as a part."""
        return GraphShard(shard=self, n_documents=self.n_documents, n_tokens=self.n_tokens)


@dataclass(frozen=True, kw_only=True)
class CorpusShards:
    """The tokenized corpus, in file order.

    Attributes:
        shards: All shards.
        tokenizer_key: Content key of the tokenizer.
        vocabulary: File name of the vocabulary (token_id, token) in the storage.
        eos_id: The token that ends a text, which is no part of the tokenizer's key; None where it has none.
    """

    shards: tuple[TokenShard, ...]
    tokenizer_key: str
    vocabulary: str
    eos_id: int | None = None

    @property
    def n_documents(self) -> int:
        """Documents in the corpus."""
        return sum(shard.n_documents for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        """Tokens in the corpus, special tokens not counted."""
        return sum(shard.n_tokens for shard in self.shards)

    @property
    def n_rejects(self) -> int:
        """Records that could not be used."""
        return sum(shard.n_rejects for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """A sparse autoencoder ready to use: checked, and saved by SAELens in a folder of the storage.

    Attributes:
        layer: Decoder block whose output it reads.
        folder: Its folder in the storage (`cfg.json`, `sae_weights.safetensors`).
        key: Content key of the weights and their configuration.
        d_sae: Number of latents.
        source: Where it comes from, for people.
        quality: Gate figures where it was trained here: `explained_variance`,
            `explained_variance_all` (outliers included), `l0`, `k`, `alive_share`, `heldout_tokens`.
    """

    layer: int
    folder: str
    key: str
    d_sae: int
    source: str
    quality: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class GraphShard:
    """The part of a token shard that is in the graph: its first `n_documents` documents."""

    shard: TokenShard
    n_documents: int
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class FeatureShard:
    """One layer's features of one graph shard.

    Its folder holds `activations.parquet`, `edges.parquet` and, where it is of a part of its token shard,
    `counts.parquet`: those of a whole one are the token shard's own.

    Attributes:
        n_edges: Rows of `edges.parquet`.
        scale: Its sums are in units of 2^-scale.
        has_counts: Whether the folder holds `counts.parquet`.
    """

    layer: int
    folder: str
    part: GraphShard
    n_activations: int
    n_edges: int
    scale: int = 32
    has_counts: bool = True

    @property
    def counts_file(self) -> str:
        """The file that says how often each token is in the part (`token_id`, `count`)."""
        if self.has_counts:
            return f"{self.folder}/counts.parquet"
        return f"{self.part.shard.folder}/token_counts.parquet"


@dataclass(frozen=True, kw_only=True)
class HeldoutPart:
    """Held-out documents of one token shard (`tasks.corpus.heldout`).

    Attributes:
        shard: The token shard.
        documents: Their numbers inside the shard, ascending.
        n_tokens: Tokens in them, special tokens not counted.
    """

    shard: TokenShard
    documents: tuple[int, ...]
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage has, and what a run would do now.

    Attributes:
        done: Finished units.
        missing: Units that a run would make.
        reason: Why, in a sentence.
        details: A line for each unit or group that would be made.
    """

    stage: StageName
    done: int
    missing: int | None
    reason: str
    details: tuple[str, ...] = ()
