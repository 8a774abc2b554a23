"""The learned gate: what it predicts, and that its sums add."""

from __future__ import annotations

import forgetful
import pytest
import torch
from forgetful import LENGTH, PROTECTION, policy, reading

from schemas.errors import ConfigError
from tasks.retention.gate import gate_sums, train_gate
from tasks.retention.policies import SIGNALS


def test_the_target_is_the_attention_that_a_token_goes_on_to_receive() -> None:
    """One chunk boundary, one layer, by hand: Σ y x's constant and Σ y² of standardized targets."""
    half = LENGTH // 2
    sums = gate_sums(forgetful.model(), forgetful.ids(), protection=PROTECTION, chunk=half)
    middle = slice(PROTECTION.sinks, half - PROTECTION.recent)
    assert bool((sums.n == half - PROTECTION.sinks - PROTECTION.recent).all())
    for layer, weights in enumerate(forgetful.attentions()):
        later = weights.unflatten(1, (2, 2)).mean(2)[0, :, half:, :half].mean(-2).log()[:, middle]
        y = (later - later.mean(-1, keepdim=True)) / later.std(-1, keepdim=True, unbiased=False)
        age = (half - torch.arange(half)).float()[middle].log()
        x = (age - age.mean()) / age.std(unbiased=False)
        assert torch.allclose(sums.targets[layer, :, -2].float(), (x * y).sum(-1), atol=0.05)
        assert torch.allclose(sums.square[layer].float(), y.square().sum(-1), atol=0.01)


def test_sums_of_documents_add_up() -> None:
    model = forgetful.model("gemma2")
    given = {"protection": PROTECTION, "chunk": 16}
    parts = [gate_sums(model, row[None], protection=PROTECTION, chunk=16) for row in forgetful.ids(3)]
    whole = gate_sums(model, forgetful.ids(3), protection=PROTECTION, chunk=16)
    added = parts[0] + parts[1] + parts[2]
    for name in ("products", "targets", "square", "n"):
        assert torch.allclose(getattr(whole, name), getattr(added, name), atol=0.05)
    gate, explained = train_gate(model, (row[None] for row in forgetful.ids(3)), **given)
    assert gate.weights.shape == (3, 2, len(SIGNALS) + 1)
    assert bool(gate.weights[1].isnan().all()), "a sliding layer has no gate"
    assert bool((explained[[0, 2]] > 0).all())
    assert bool((explained[[0, 2]] <= 1).all())


def test_the_solution_is_least_squares() -> None:
    sums = gate_sums(forgetful.model(), forgetful.ids(2), protection=PROTECTION, chunk=16)
    gate, explained = sums.gate(ridge=0.0)
    expected = torch.linalg.solve(sums.products, sums.targets)
    assert torch.allclose(gate.weights.double(), expected, rtol=1e-3, atol=1e-4)
    worse, _ = sums.gate(ridge=10.0)
    assert worse.weights[..., :-1].abs().sum() < gate.weights[..., :-1].abs().sum()
    assert explained.min() > 0


def test_a_gate_takes_the_place_of_the_sum() -> None:
    gate, _ = train_gate(forgetful.model(), [forgetful.ids(4, seed=9)], protection=PROTECTION, chunk=16)
    learned = reading(policy("str", temperature=0.0, gate=gate))
    summed = reading(policy("str", temperature=0.0))
    assert not torch.equal(learned.losses, summed.losses)
    assert learned.fates[0].kept(LENGTH).sum() == summed.fates[0].kept(LENGTH).sum()


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a document"):
        train_gate(forgetful.model(), [], protection=PROTECTION)
    with pytest.raises(ConfigError, match="sequences of 96 tokens in chunks of 96"):
        gate_sums(forgetful.model(), forgetful.ids(), protection=PROTECTION, chunk=96)
