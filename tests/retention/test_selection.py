"""Keys, the selector and the probabilities, by themselves."""

from __future__ import annotations

import math

import pytest
import torch

from schemas.errors import ConfigError, ModelError
from tasks.retention.budgets import Budget, CacheShape, Protection, require_room
from tasks.retention.hashing import gumbel_keys, uniform_keys
from tasks.retention.policies import POLICIES, policy_named
from tasks.retention.selection import retention_probabilities, select, standardized

SHAPE = CacheShape(layers=(0, 2), heads=3, groups=2, head_dim=8, dtype=torch.float32)


def positions(*rows: int, heads: int = 2, n: int = 50) -> torch.Tensor:
    return torch.arange(n).expand(len(rows), heads, n)


def test_a_key_is_a_function_of_the_token_alone() -> None:
    documents = torch.tensor([7, 11, 10**12])
    whole = gumbel_keys(positions(0, 1, 2), seed=5, documents=documents, layer=3)
    alone = gumbel_keys(positions(0), seed=5, documents=documents[2:], layer=3)
    assert torch.equal(whole[2:], alone)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = gumbel_keys(positions(0, 1, 2)[..., order], seed=5, documents=documents, layer=3)
    assert torch.equal(shuffled, whole[..., order])
    chunk = gumbel_keys(positions(0, 1, 2)[..., 20:30], seed=5, documents=documents, layer=3)
    assert torch.equal(chunk, whole[..., 20:30])


def test_whatever_names_a_token_changes_its_key() -> None:
    documents = torch.tensor([7, 8])
    keys = uniform_keys(positions(0, 1), seed=5, documents=documents, layer=3)
    others = [
        uniform_keys(positions(0, 1), seed=6, documents=documents, layer=3),
        uniform_keys(positions(0, 1), seed=5, documents=documents, layer=4),
        uniform_keys(positions(0, 1), seed=5, documents=documents, layer=3, draw=1),
        keys.flip(0),
        keys.flip(1),
        keys.roll(1, -1),
    ]
    assert all((other != keys).float().mean() > 0.99 for other in others)


def test_keys_are_uniform_and_never_0_or_1() -> None:
    keys = uniform_keys(torch.arange(5_000).expand(20, 4, 5_000), seed=0, documents=torch.arange(20), layer=0)
    n = keys.numel()
    assert keys.min() > 0
    assert keys.max() < 1
    counts = torch.histc(keys, bins=20, min=0, max=1)
    chi_square = float(((counts - n / 20).square() / (n / 20)).sum())
    assert chi_square < 19 + 5 * math.sqrt(2 * 19)  # 19 degrees of freedom, five standard deviations
    rows = keys.reshape(80, -1)
    correlation = torch.corrcoef(rows) - torch.eye(80)
    assert correlation.abs().max() < 6 / math.sqrt(5_000)


def test_protected_slots_stay_and_the_rest_goes_by_score() -> None:
    scores = torch.tensor([[[0.0, 9, 5, 1, 5, 2]]])
    alive = torch.tensor([[[True, True, True, True, True, True]]])
    protected = torch.tensor([[[True, False, False, False, False, True]]])
    assert select(scores, alive, protected, 4, whose="x").tolist() == [[[0, 1, 2, 5]]]
    alive[..., 1] = False
    assert select(scores, alive, protected, 4, whose="x").tolist() == [[[0, 2, 4, 5]]]


def test_a_score_that_is_not_finite_is_refused_by_name() -> None:
    scores, alive = torch.zeros(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool)
    scores[..., 2] = torch.nan
    protected = torch.zeros_like(alive)
    with pytest.raises(ModelError, match="the policy h2o in layer 3 are not finite"):
        select(scores, alive, protected, 2, whose="the policy h2o in layer 3")
    alive[..., 2] = False
    assert select(scores, alive, protected, 3, whose="x").tolist() == [[[0, 1, 3]]]


def test_sinks_and_recent_tokens_are_protected_and_the_dead_are_not() -> None:
    held = torch.tensor([0, 3, 4, 90, 91, 99, -1])
    mask = Protection(sinks=4, recent=9).mask(held, seen=100)
    assert mask.tolist() == [True, True, False, False, True, True, False]


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 30.0])
def test_probabilities_sum_to_the_budget(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    significance = torch.randn(2, 3, 40, generator=generator) * 3
    among = torch.rand(2, 3, 40, generator=generator) < 0.8
    p = retention_probabilities(significance, among, 12, temperature)
    assert torch.allclose(p.sum(-1), torch.full((2, 3), 12.0), atol=1e-3)
    assert bool((p[~among] == 0).all())
    best = torch.where(among, significance, -torch.inf).topk(12).indices
    if temperature <= 0.01:
        assert bool((p.gather(-1, best) >= 0.5).all())
    few = retention_probabilities(significance, among, 40, temperature)
    assert torch.equal(few, among.float())


def test_z_ignores_what_is_not_known_and_what_is_all_equal() -> None:
    numbers = torch.tensor([[1.0, 3.0, torch.nan, 100.0], [2.0, 2.0, 2.0, 9.0]])
    among = torch.tensor([[True, True, True, False], [True, True, True, False]])
    z = standardized(numbers, among, unknown=numbers.isnan())
    assert z[0].tolist() == [-1.0, 1.0, 0.0, 98.0]
    assert z[1].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_weighted_keys_keep_what_matters_as_often_as_it_should() -> None:
    """One slot of two: the Gumbel maximum is the first with odds e^s."""
    keys = gumbel_keys(torch.arange(2).expand(20_000, 1, 2), seed=1, documents=torch.arange(20_000), layer=0)
    first = (keys[:, 0, 0] + 1.0 > keys[:, 0, 1]).double().mean()
    expected = 1 / (1 + math.exp(-1.0))
    assert abs(first - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)


def test_budgets_count_tokens_or_bytes() -> None:
    assert Budget(token_share=0.29).slots(SHAPE, 100, slot_bytes=1) == 29
    assert SHAPE.full_bytes(100) == 100 * 2 * 8 * 4 * 3 * 2
    half = Budget(byte_share=0.5)
    assert half.slots(SHAPE, 100, slot_bytes=64) == 50
    assert half.slots(SHAPE, 100, slot_bytes=68) == 47
    assert half.slots(SHAPE, 100, slot_bytes=68, fixed_bytes=200) == 44
    assert Budget(n_bytes=6 * 640).slots(SHAPE, 100, slot_bytes=64) == 10
    assert Budget(n_bytes=10).slots(SHAPE, 100, slot_bytes=64, fixed_bytes=1000) == 0


@pytest.mark.parametrize(
    "given", [{}, {"token_share": 0.0}, {"token_share": 0.5, "n_bytes": 3}, {"byte_share": float("nan")}]
)
def test_what_is_no_budget_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="is no budget"):
        Budget(**given)  # type: ignore[arg-type]


def test_a_budget_that_protection_alone_exceeds_is_refused() -> None:
    require_room(36, Protection(), "random")
    with pytest.raises(ConfigError, match=r"random leaves 35 tokens .* protection alone keeps 36 \(4 sinks"):
        require_room(35, Protection(), "random")
    with pytest.raises(ConfigError, match="leaves 0 tokens"):
        require_room(0, Protection(sinks=0, recent=0), "random")


def test_unknown_policies_and_options_are_named() -> None:
    assert [policy_named(name).name for name in POLICIES] == list(POLICIES)
    with pytest.raises(ConfigError, match=r"there is no policy 'h3o'.*h2o"):
        policy_named("h3o")
    with pytest.raises(ConfigError, match="the policy str has no option 'lambda'"):
        policy_named("str", **{"lambda": 2})
    for name, options in {
        "str": {"temperature": -1.0},
        "snapkv": {"kernel": 4},
        "cmp": {"bits": 3},
    }.items():
        with pytest.raises(ConfigError, match=f"{name} cannot have"):
            policy_named(name, **options)
    with pytest.raises(ConfigError, match="cmp fills its tiers by rank"):
        policy_named("cmp", spread=1.0)
