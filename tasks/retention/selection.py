"""The one selector of all policies: what is protected, then what scores highest, as many as there are slots."""

from __future__ import annotations

import torch

from schemas.errors import ModelError


def select(
    scores: torch.Tensor, alive: torch.Tensor, protected: torch.Tensor, slots: int, *, whose: str
) -> torch.Tensor:
    """Which slots stay.

    Ties go to the earlier slot, on every device.

    Args:
        scores: (batch, heads, n); the higher, the rather kept.
        alive: (batch, heads, n) bool; dead slots come last and carry any score.
        protected: (batch, heads, n) bool; kept before all others.
        slots: How many stay at most.
        whose: Policy and layer, for the error.

    Returns:
        (batch, heads, min(slots, n)) int64 indices, ascending.

    Raises:
        ModelError: if the score of a living slot is not finite.
    """
    require_finite(scores, alive, whose)
    infinity = torch.full_like(scores, torch.inf)
    ranked = torch.where(protected, infinity, torch.where(alive, scores, -infinity))
    best = ranked.argsort(dim=-1, descending=True, stable=True)[..., : min(slots, scores.shape[-1])]
    return best.sort(dim=-1).values


def require_finite(scores: torch.Tensor, alive: torch.Tensor, whose: str) -> None:
    """Whether all scores of living slots are finite.

    Raises:
        ModelError: naming whose they are, if not.
    """
    if not bool((torch.isfinite(scores) | ~alive).all()):
        raise ModelError(
            f"the scores of {whose} are not finite: some token's attention, value or surprisal is not",
            hint="try model.dtype = 'float32'",
        )


def standardized(
    numbers: torch.Tensor, among: torch.Tensor, unknown: torch.Tensor | None = None
) -> torch.Tensor:
    """z: how many standard deviations a number is above the mean of its row; 0 where it is not known or all are equal.

    Args:
        numbers: (…, n).
        among: (…, n) bool, the entries whose mean and deviation count.
        unknown: (…, n) bool, the entries that are not known; None: none.

    Returns:
        (…, n) float32.
    """
    numbers = numbers.float()
    unknown = torch.zeros_like(among) if unknown is None else unknown
    known = among & ~unknown
    count = known.sum(-1, keepdim=True).clamp(min=1)
    filled = torch.where(known, numbers, 0)
    mean = filled.sum(-1, keepdim=True) / count
    centred = numbers - mean
    deviation = (torch.where(known, centred, 0).square().sum(-1, keepdim=True) / count).sqrt()
    # Rounding leaves a deviation to equal numbers.
    flat = deviation <= 1e-6 * mean.abs().clamp(min=1e-12)
    return torch.where(unknown | flat, 0, centred / torch.where(flat, 1, deviation))


def retention_probabilities(
    significance: torch.Tensor, among: torch.Tensor, expected: int, temperature: float
) -> torch.Tensor:
    """p = σ((s − τ) / T), τ such that the p of a row sum to the number that is to be kept.

    Args:
        significance: (…, n) s.
        among: (…, n) bool: who may be kept or not; others get 0.
        expected: How many of them are kept.
        temperature: T; at 0 the highest have 1 and the others 0.

    Returns:
        (…, n) float32; all 1 in a row with no more than `expected`.
    """
    count = among.sum(-1, keepdim=True)
    if temperature == 0:
        order = torch.where(among, significance, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        first = torch.zeros_like(among).scatter(-1, order[..., :expected], True)
        return (among & first).float()
    scaled = significance.double() / temperature
    low = torch.where(among, scaled, torch.inf).amin(-1, keepdim=True) - 40
    high = torch.where(among, scaled, -torch.inf).amax(-1, keepdim=True) + 40
    for _ in range(64):
        middle = (low + high) / 2
        total = (torch.sigmoid(scaled - middle) * among).sum(-1, keepdim=True)
        low, high = torch.where(total > expected, middle, low), torch.where(total > expected, high, middle)
    found = torch.sigmoid(scaled - (low + high) / 2)
    return torch.where(among, torch.where(count <= expected, 1.0, found), 0.0).float()
