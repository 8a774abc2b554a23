"""How much a cache may keep, as a share of tokens, of bytes, or in bytes, and what that is in slots of a head.

A slot is one token in one key-value head of one layer. Every head of every governed layer gets the same: what is
compared is *which* tokens are kept, and tensors stay rectangular. A budget holds at every moment after an eviction; a
chunk that is being read lies on top of it until its attention is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schemas.errors import ConfigError

POSITION_BYTES = 4
"""A slot's position in the document: int32."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What of a model decides about bytes.

    Attributes:
        layers: Governed decoder blocks: those that attend to everything. Sliding ones keep their native layer.
        heads: Key-value heads.
        groups: Query heads of each.
        head_dim: Channels of a head.
        dtype: Of keys and values.
    """

    layers: tuple[int, ...]
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one head."""
        return 2 * self.head_dim * self.dtype.itemsize

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of a full cache of one document, over all governed layers."""
        return tokens * self.token_bytes * self.heads * len(self.layers)


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What no policy may evict: without it simple scorers are hard to tell apart (PAPER 2).

    Attributes:
        sinks: First positions of the document.
        recent: Last tokens seen.
    """

    sinks: int = 4
    recent: int = 32

    def mask(self, positions: torch.Tensor, seen: int) -> torch.Tensor:
        """Which slots are protected, once `seen` tokens have been seen; a dead slot (position −1) never is.

        Args:
            positions: (…) positions, −1 where dead.
            seen: Tokens seen so far.
        """
        return (positions >= 0) & ((positions < self.sinks) | (positions >= seen - self.recent))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is kept. Exactly one of the three is given.

    Attributes:
        token_share: Of the tokens of the sequence (of the prompt, where the protocol is `prefill`), a share above 0.
            A policy with tiers gets the bytes that so many exact keys, values and positions take.
        byte_share: Of the full cache's keys and values of the same tokens; all tensors of the policy count.
        n_bytes: Of one document, all governed layers together; all tensors of the policy count.
    """

    token_share: float | None = None
    byte_share: float | None = None
    n_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.token_share, self.byte_share, self.n_bytes) if value is not None]
        if len(given) != 1 or not 0 < given[0] < float("inf"):
            raise ConfigError(
                f"{self} is no budget",
                hint="give one of token_share, byte_share and n_bytes, above 0",
            )

    def __str__(self) -> str:
        named = (
            ("token_share", self.token_share),
            ("byte_share", self.byte_share),
            ("n_bytes", self.n_bytes),
        )
        return ", ".join(f"{name} = {value}" for name, value in named if value is not None) or "nothing"

    def head_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Bytes of one head of one layer."""
        if self.n_bytes is not None:
            return self.n_bytes // (len(shape.layers) * shape.heads)
        if self.byte_share is not None:
            return int(self.byte_share * tokens * shape.token_bytes)
        return self._tokens(tokens) * (shape.token_bytes + POSITION_BYTES)

    def slots(self, shape: CacheShape, tokens: int, *, slot_bytes: int, fixed_bytes: int = 0) -> int:
        """Slots of one head of one layer.

        Args:
            shape: Of the model.
            tokens: Of the sequence, or of the prompt.
            slot_bytes: What one slot takes, its share of a policy's state included.
            fixed_bytes: What a policy keeps in one head beside its slots.
        """
        if self.token_share is not None:
            return self._tokens(tokens)
        return max(0, self.head_bytes(shape, tokens) - fixed_bytes) // slot_bytes

    def _tokens(self, tokens: int) -> int:
        # 0.29 * 100 is 28.999…: a share that means a whole number gives it.
        return int((self.token_share or 0) * tokens + 1e-9)


def require_room(slots: int, protection: Protection, what: str) -> None:
    """Whether a budget holds more than what no policy may evict.

    Args:
        slots: Of one head.
        protection: What must be kept.
        what: Policy and budget, for the error.

    Raises:
        ConfigError: if not: no choice would be left.
    """
    needed = protection.sinks + protection.recent
    if slots < max(1, needed):
        raise ConfigError(
            f"{what} leaves {slots} tokens in each head, but protection alone keeps {needed} "
            f"({protection.sinks} sinks and {protection.recent} recent tokens)",
            hint="raise the budget, lengthen the sequences, or protect fewer tokens",
        )
