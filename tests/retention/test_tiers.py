"""Codes, tiers, merging, and the bytes of it all."""

from __future__ import annotations

from typing import Any

import forgetful
import pytest
import torch
from forgetful import policy, reading

from schemas.errors import ConfigError
from tasks.retention import running
from tasks.retention.budgets import Budget, CacheShape
from tasks.retention.cache import NEVER
from tasks.retention.policies import MemoryPaths
from tasks.retention.quantization import packed, quantize, unpacked
from tasks.retention.running import Stream, read
from tasks.retention.tiers import TierSizes, Warm, longest_prefix, merge_into, tier_sizes


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [-1, -2])
def test_a_code_is_half_a_scale_off_at_most(bits: int, dim: int) -> None:
    given = numbers(2, 3, 32, 16) * torch.logspace(-3, 3, 16)
    given[0, 0] = 7.5
    found = quantize(given, bits, dim)
    error = (found.floats(torch.float32) - given).abs()
    assert bool((error <= found.scale / 2 * (1 + 1e-4) + 1e-5 * given.abs()).all())
    assert error[0, 0].max() == 0
    assert found.codes.nbytes == given.numel() * bits // 8
    # The extremes are met exactly, up to rounding: the scale is not wider than it must be.
    scale = (given.amax(dim, keepdim=True) - given.amin(dim, keepdim=True)) / (2**bits - 1)
    assert torch.allclose(found.scale[1:], scale[1:])


def test_two_codes_share_a_byte() -> None:
    codes = torch.randint(0, 16, (3, 5, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert packed(codes, 4).shape == (3, 5, 4)
    assert torch.equal(unpacked(packed(codes, 4), 4), codes)
    with pytest.raises(ConfigError, match="cannot quantize 7 channels to 4 bits"):
        quantize(numbers(2, 7), 4, -1)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_leaves_takes_nothing_else_along(bits: int) -> None:
    warm = Warm(bits, 4, numbers(1, 2, 1, 8))
    keys, values = numbers(1, 2, 12, 8, seed=1), numbers(1, 2, 12, 8, seed=2)
    warm.append(keys[..., :8, :], values[..., :8, :])
    warm.append(keys[..., 8:, :], values[..., 8:, :])
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        again = quantize(keys[..., part, :], bits, -2).floats(torch.float32)
        assert torch.equal(warm.keys()[..., part, :], again)
    before = warm.keys(), warm.values()
    # One head loses its first group, the other parts of all.
    index = torch.tensor([[[4, 6, 8, 11], [0, 5, 9, 10]]])
    warm.keep(index)
    wide = index[..., None].expand(1, 2, 4, 8)
    assert torch.equal(warm.keys(), before[0].gather(-2, wide))
    assert torch.equal(warm.values(), before[1].gather(-2, wide))
    assert warm.key_scale.shape[2] == 3
    warm.keep(torch.tensor([[[0, 1], [1, 1]]]))
    assert warm.key_scale.shape[2] == 1
    assert torch.equal(warm.keys()[0, 0], before[0][0, 0, [4, 6]])
    assert torch.equal(warm.keys()[0, 1], before[0][0, 1, [5, 5]])
    warm.keep(torch.empty(1, 2, 0, dtype=torch.int64))
    assert warm.n_bytes == 0


def test_the_longest_prefix_pays_for_the_groups_it_opens() -> None:
    sizes = TierSizes(budget=0, hot=0, hot_slot=0, warm_slot=10, warm_group=100)
    group_of = torch.tensor([[[0, 0, 1, 1, 2], [0, 0, 0, 1, 1]]], dtype=torch.int32)
    order = torch.tensor([[[0, 2, 1, 3, 4], [0, 1, 2, 3, 4]]])
    costs = [110, 220, 230, 240, 350]
    for free in (0, 109, 110, 219, 220, 240, 349, 350, 1000):
        expected = sum(cost <= free for cost in costs)
        assert longest_prefix(order, group_of, 5, free, sizes) == expected
    assert longest_prefix(order, group_of, 3, 1000, sizes) == 3
    assert longest_prefix(order[..., :0], group_of[..., :0], 0, 1000, sizes) == 0


def test_merging_two_equal_tokens_changes_no_attention() -> None:
    """p votes add log p: the same as p tokens with that key and value."""
    keys, values, query = numbers(1, 1, 5, 8), numbers(1, 1, 5, 8, seed=1), numbers(1, 1, 1, 8, seed=2)
    keys[..., 4, :], values[..., 4, :] = keys[..., 1, :], values[..., 1, :]
    whole = torch.softmax(query @ keys.transpose(-1, -2), dim=-1) @ values
    everybody = torch.ones(1, 1, 4, dtype=torch.bool)
    dying = (keys[..., 4:, :], values[..., 4:, :], torch.ones(1, 1, 1), everybody[..., :1])
    new, votes, merged, into = merge_into(
        keys[..., :4, :], values[..., :4, :], torch.ones(1, 1, 4), everybody, dying, 0.9
    )
    assert votes.tolist() == [[[1, 2, 1, 1]]]
    assert merged.tolist() == [[[True]]]
    assert into.tolist() == [[[1]]]
    merged_logits = query @ keys[..., :4, :].transpose(-1, -2) + votes.log()[..., None, :]
    assert torch.allclose(torch.softmax(merged_logits, dim=-1) @ new, whole, atol=1e-6)


def test_a_merged_value_is_the_mean_of_all_it_speaks_for_and_others_keep_every_bit() -> None:
    hot_keys, hot = torch.eye(4, 8).expand(1, 1, 4, 8), numbers(1, 1, 4, 8)
    keys = torch.stack((hot_keys[0, 0, 2] * 3, hot_keys[0, 0, 2] * 2, hot_keys[0, 0, 1], hot_keys[0, 0, 0]))
    values, votes = numbers(4, 8, seed=1)[None, None], torch.tensor([[[2.0, 1, 1, 1]]])
    targets = torch.tensor([[[False, True, True, True]]])
    wanted = torch.tensor([[[True, True, False, True]]])
    before = torch.tensor([[[1.0, 1, 3, 1]]])
    new, total, merged, _ = merge_into(
        hot_keys, hot, before, targets, (keys[None, None], values, votes, wanted), 0.5
    )
    # The third is not wanted, and the fourth resembles a slot that may not be merged into.
    assert merged.tolist() == [[[True, True, False, False]]]
    assert total.tolist() == [[[1, 1, 6, 1]]]
    expected = (3 * hot[0, 0, 2] + 2 * values[0, 0, 0] + values[0, 0, 1]) / 6
    assert torch.allclose(new[0, 0, 2], expected, atol=1e-6)
    assert torch.equal(new[..., [0, 1, 3], :], hot[..., [0, 1, 3], :])


def test_merging_off_equals_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tiers, nothing similar enough to merge is nothing merged."""

    def sizes(given: MemoryPaths, *_: Any) -> TierSizes:
        return TierSizes(budget=3_000, hot=16, hot_slot=84, warm_slot=44, warm_group=64)

    monkeypatch.setattr(running, "tier_sizes", sizes)
    off = reading(policy("cmp", merge=False))
    never = reading(policy("cmp", merge_similarity=1.5))
    merging = reading(policy("cmp", merge_similarity=0.0))
    assert torch.equal(off.losses, never.losses)
    assert torch.equal(off.fates[1].gone_at, never.fates[1].gone_at)
    assert bool((never.fates[1].cold_at == NEVER).all())
    assert not torch.equal(off.losses, merging.losses)
    # The first layer's scores differ in votes alone: whoever left, left at the same time.
    assert bool((merging.fates[0].cold_at != NEVER).any())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.slow
def test_tokens_move_down_only_and_are_quantized_once(
    bits: int, chunk: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized: list[int] = []
    append = Warm.append

    def counting(self: Warm, keys: torch.Tensor, values: torch.Tensor) -> None:
        quantized.append(keys.shape[2])
        append(self, keys, values)

    monkeypatch.setattr(Warm, "append", counting)
    how = forgetful.settings(policy("cmp", bits=bits), share=0.5, protocol=Stream(chunk=chunk), masked=masked)
    exact: dict[tuple[int, int], torch.Tensor] = {}
    for step in read(forgetful.model(), forgetful.ids(), how):
        for layer in step.cache.governed:
            assert layer.warm is not None
            keys, positions = layer.warm.keys(), layer.cool.positions
            for head in range(2):
                alive = positions[0, head] >= 0
                at = positions[0, head][alive].tolist()
                for position, key in zip(at, keys[0, head][alive], strict=True):
                    known = exact.setdefault((layer.layer * 2 + head, position), key)
                    assert torch.equal(known, key)
            assert (layer.cool.alive[0, 0].sum() > 0) == (
                bool((layer.fates.warm_at != NEVER).any()) and step.stop > 8
            ) or step.stop < 40
            hot = set(layer.hot.positions[0, 0].tolist()) - {-1}
            assert not hot & set(layer.cool.positions[0, 0].tolist())
    fates = step.cache.fates
    for layer, fate in fates.items():
        assert bool((fate.warm_at <= fate.gone_at).all())
        assert bool(((fate.cold_at == NEVER) | (fate.cold_at == fate.gone_at)).all())
        assert torch.equal(fate.cold_into >= 0, fate.cold_at != NEVER)
        assert bool(((fate.gone_at == NEVER) | (fate.warm_at != NEVER)).all())
        assert len({int(fate.warm_at[0, head].ne(NEVER).sum()) for head in range(2)}) == 1
        assert layer in (0, 1, 2)
    assert all(n % 4 == 0 for n in quantized)
    assert sum(quantized) == sum(int(fate.warm_at[0, 0].ne(NEVER).sum()) for fate in fates.values())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("merge", [False, True])
def test_tiers_add_up_to_their_budget(bits: int, merge: bool) -> None:
    given = policy("cmp", bits=bits, merge=merge)
    budget = Budget(byte_share=0.6)
    how = forgetful.settings(given, budget=budget)
    for step in read(forgetful.model(), forgetful.ids(), how):
        sizes = step.cache.rules.tiers
        assert sizes is not None
        for layer in step.cache.governed:
            assert layer.warm is not None
            groups = layer.warm.key_scale.shape[2]
            tiers = layer.hot.count * sizes.hot_slot + layer.cool.count * sizes.warm_slot
            assert layer.n_bytes == 2 * (tiers + groups * sizes.warm_group)
            assert layer.n_bytes <= 2 * sizes.budget
    assert layer.cool.count > 8


def test_a_hot_tier_without_room_is_refused() -> None:
    shape = CacheShape(layers=(0,), heads=1, groups=1, head_dim=64, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"cmp with hot_share = 0\.5 has 18 hot slots"):
        tier_sizes(MemoryPaths(), shape, 10_000, forgetful.PROTECTION)
    sizes = tier_sizes(MemoryPaths(bits=4), shape, 100_000, forgetful.PROTECTION)
    assert (sizes.hot_slot, sizes.warm_slot, sizes.warm_group) == (276, 96, 512)
    assert sizes.warm_slot + sizes.warm_group / 32 < sizes.hot_slot / 2
