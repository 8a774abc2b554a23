"""Tiers of memory within one budget of bytes: hot (exact), warm (integers), cold (merged into another), gone.

A token moves down only: what was quantized stays the codes it became, with the scale of its group, however many of
the group have left, so that no error is added twice; and a group's scale is kept as long as one of its members is.
A merged value is a weighted mean, the weights being votes: how many tokens a slot speaks for. In attention a slot
with p votes has log p added to its logit, as if p tokens had that key and value (proportional attention, Bolya et al.
2023, arXiv 2210.09461). Only hot slots are merged into: a warm value would have to be quantized again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schemas.errors import ConfigError
from tasks.retention.budgets import CacheShape, Protection
from tasks.retention.policies import MemoryPaths
from tasks.retention.quantization import quantize, unpacked

_NUMBER = 4
"""Bytes of a scale, a zero, or a group's number."""


@dataclass(frozen=True, kw_only=True)
class TierSizes:
    """The budget of one head in bytes, and what everything in it takes.

    Attributes:
        budget: All of it.
        hot: Slots of the hot tier, at most.
        hot_slot: Bytes of a hot slot.
        warm_slot: Bytes of a warm slot.
        warm_group: Bytes of a group: scale and zero of each channel of its keys.
    """

    budget: int
    hot: int
    hot_slot: int
    warm_slot: int
    warm_group: int


def tier_sizes(policy: MemoryPaths, shape: CacheShape, head_bytes: int, protection: Protection) -> TierSizes:
    """How a head's bytes are shared between the tiers.

    Args:
        policy: Its options.
        shape: Of the model.
        head_bytes: The budget of one head.
        protection: In force.

    Raises:
        ConfigError: if the hot tier has no room for what is protected and one group that can be demoted.
    """
    hot_slot = shape.token_bytes + policy.state_bytes
    hot = int(policy.hot_share * head_bytes) // hot_slot
    needed = protection.sinks + protection.recent + policy.group
    if hot < needed:
        raise ConfigError(
            f"cmp with hot_share = {policy.hot_share} has {hot} hot slots in each head, but protection and one group "
            f"need {needed} ({protection.sinks} sinks, {protection.recent} recent tokens, a group of {policy.group})",
            hint="raise the budget or hot_share, protect fewer tokens, or choose a smaller group",
        )
    return TierSizes(
        budget=head_bytes,
        hot=hot,
        hot_slot=hot_slot,
        warm_slot=2 * shape.head_dim * policy.bits // 8 + 3 * _NUMBER + policy.state_bytes,
        warm_group=2 * shape.head_dim * _NUMBER,
    )


class Warm:
    """Keys and values as codes, and the scales that their groups share.

    Args:
        bits: 8 or 4.
        group: Tokens whose keys are quantized together.

    Attributes:
        group_of: (batch, heads, n) int32: the row of the tables that a slot's keys were quantized with.
        key_scale: (batch, heads, groups, head_dim) float32.
        key_zero: As `key_scale`.
    """

    def __init__(self, bits: int, group: int, like: torch.Tensor) -> None:
        batch, heads, _, dim = like.shape
        self.bits, self.group, self.dtype = bits, group, like.dtype

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(batch, heads, 0, width, dtype=dtype, device=like.device)

        self.key_codes = self.value_codes = empty(dim * bits // 8, torch.uint8)
        self.value_scale = self.value_zero = empty(1, torch.float32)
        self.key_scale = self.key_zero = empty(dim, torch.float32)
        self.group_of = torch.empty(batch, heads, 0, dtype=torch.int32, device=like.device)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Quantize tokens and put them behind those that are here; the only place where anything is quantized.

        Args:
            keys: (batch, heads, n, head_dim), n a multiple of the group.
            values: As `keys`.
        """
        batch, heads, n, dim = keys.shape
        groups = n // self.group
        found = quantize(keys.reshape(batch, heads, groups, self.group, dim), self.bits, dim=-2)
        first = self.key_scale.shape[2]
        numbers = torch.arange(first, first + groups, dtype=torch.int32, device=keys.device)
        numbers = numbers.repeat_interleave(self.group).expand(batch, heads, n)
        self.group_of = torch.cat((self.group_of, numbers), dim=-1)
        self.key_codes = torch.cat((self.key_codes, found.codes.reshape(batch, heads, n, -1)), dim=-2)
        self.key_scale = torch.cat((self.key_scale, found.scale.squeeze(-2)), dim=-2)
        self.key_zero = torch.cat((self.key_zero, found.zero.squeeze(-2)), dim=-2)
        found = quantize(values, self.bits, dim=-1)
        self.value_codes = torch.cat((self.value_codes, found.codes), dim=-2)
        self.value_scale = torch.cat((self.value_scale, found.scale), dim=-2)
        self.value_zero = torch.cat((self.value_zero, found.zero), dim=-2)

    def keep(self, index: torch.Tensor) -> None:
        """Leave these slots, as the codes they are, and the scales of their groups.

        Args:
            index: (batch, heads, m) int64.
        """
        wide = index[..., None]
        for name in ("key_codes", "value_codes", "value_scale", "value_zero"):
            whole: torch.Tensor = getattr(self, name)
            setattr(self, name, whole.gather(-2, wide.expand(*index.shape, whole.shape[-1])))
        self.group_of = self.group_of.gather(-1, index)
        self._leave_groups()

    def _leave_groups(self) -> None:
        batch, heads, total, dim = self.key_scale.shape
        used = torch.zeros(batch, heads, total, dtype=torch.bool, device=self.group_of.device)
        used.scatter_(-1, self.group_of.long(), torch.ones_like(self.group_of, dtype=torch.bool))
        width = int(used.sum(-1).max()) if used.numel() else 0
        # Heads whose groups are fewer keep some dead rows: tensors are rectangular.
        rows = (~used).int().argsort(dim=-1, stable=True)[..., :width]
        place = used.int().cumsum(-1) - 1
        self.group_of = place.gather(-1, self.group_of.long()).int()
        wide = rows[..., None].expand(batch, heads, width, dim)
        self.key_scale, self.key_zero = self.key_scale.gather(-2, wide), self.key_zero.gather(-2, wide)

    def keys(self) -> torch.Tensor:
        """(batch, heads, n, head_dim) what the codes of the keys stand for."""
        row = self.group_of.long()[..., None].expand(*self.group_of.shape, self.key_scale.shape[-1])
        scale, zero = self.key_scale.gather(-2, row), self.key_zero.gather(-2, row)
        return (unpacked(self.key_codes, self.bits).float() * scale + zero).to(self.dtype)

    def values(self) -> torch.Tensor:
        """(batch, heads, n, head_dim) what the codes of the values stand for."""
        codes = unpacked(self.value_codes, self.bits).float()
        return (codes * self.value_scale + self.value_zero).to(self.dtype)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            tensor.nbytes
            for tensor in (
                *(self.key_codes, self.value_codes, self.value_scale, self.value_zero),
                *(self.key_scale, self.key_zero, self.group_of),
            )
        )


def longest_prefix(
    order: torch.Tensor, group_of: torch.Tensor, alive: int, free: int, sizes: TierSizes
) -> int:
    """How many warm slots stay, best first, so that they and the groups they need fit.

    Args:
        order: (batch, heads, n) slots, best first; the living come before the dead.
        group_of: (batch, heads, n) of the slots in place.
        alive: Living slots of a head.
        free: Bytes of a head.
        sizes: What a slot and a group take.
    """
    ranked = group_of.long().gather(-1, order)[..., :alive]
    if not alive:
        return 0
    # A slot opens its group if no better one did: its place is the first of that group.
    place = torch.arange(alive, device=ranked.device).expand_as(ranked)
    first = torch.full((*ranked.shape[:2], int(ranked.max()) + 1), alive, device=ranked.device)
    first = first.scatter_reduce(-1, ranked, place, "amin")
    opened = (first.gather(-1, ranked) == place).cumsum(-1)
    # Tensors are rectangular: all heads pay for the head with most groups.
    cost = (place[0, 0] + 1) * sizes.warm_slot + opened.amax((0, 1)) * sizes.warm_group
    return int((cost <= free).sum())


def merge_into(
    hot_keys: torch.Tensor,
    hot_values: torch.Tensor,
    votes: torch.Tensor,
    targets: torch.Tensor,
    dying: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    least_similarity: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the values of dying slots into the hot slots whose keys are most similar.

    v ← (Σ votes · v) / Σ votes over the target and all that merge into it; votes add up.

    Args:
        hot_keys: (batch, heads, n, head_dim).
        hot_values: As `hot_keys`.
        votes: (batch, heads, n) float32.
        targets: (batch, heads, n) bool: which hot slots may be merged into.
        dying: Keys (batch, heads, m, head_dim), values, votes (batch, heads, m), and (batch, heads, m) bool
            which of them are to be merged.
        least_similarity: Cosine below which nothing is merged.

    Returns:
        New values, new votes, (batch, heads, m) bool which were merged, and (batch, heads, m) int64 into which slot.
    """
    keys, values, weights, wanted = dying
    cosine = _unit(keys) @ _unit(hot_keys).transpose(-1, -2)
    cosine = cosine.masked_fill(~targets[..., None, :], -torch.inf)
    similarity, into = cosine.max(-1)
    merged = wanted & (similarity >= least_similarity)
    weights = torch.where(merged, weights, 0)
    total = votes.scatter_add(-1, into, weights)
    wide = into[..., None].expand(values.shape)
    sums = hot_values.float() * votes[..., None]
    sums = sums.scatter_add(-2, wide, values.float() * weights[..., None])
    touched = torch.zeros_like(votes, dtype=torch.bool)
    touched = touched.scatter_reduce(-1, into, merged, "amax")
    # An untouched value must not even be rounded.
    new = torch.where(touched[..., None], (sums / total[..., None]).to(hot_values.dtype), hot_values)
    return new, total, merged, into


def _unit(keys: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(keys.float(), dim=-1)
