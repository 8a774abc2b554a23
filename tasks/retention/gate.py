"""Training a gate for STR: which of a token's signals tell how much attention it will still receive.

The second paper's p = σ(w·E(t) + b) has learned w and b, and says nothing that is known here of how they are learned.
Here E(t) are the signals that STR sums (`tasks.retention.policies.SIGNALS`), and w, b predict, in each layer and head,
z(log of the mean attention that the token receives from each later query): the least squares solution with a
ridge, from sums that add over documents, so that training has no order, no seed and no steps.

A document is read in full. At the end of each chunk but the last every token that no protection covers gives one
example: its signals as they are then, and the attention it goes on to receive until the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from schemas.errors import ConfigError
from tasks.models.language_model import LanguageModel
from tasks.retention.attention import cache_shape
from tasks.retention.budgets import Protection
from tasks.retention.policies import (
    LEAST,
    SIGNALS,
    Attention,
    Gate,
    Held,
    StructuredRetention,
)
from tasks.retention.running import Prefill, Settings, read
from tasks.retention.selection import standardized


@dataclass(frozen=True, kw_only=True)
class _Watching(StructuredRetention):
    """Evicts nothing, and notes what STR would see, and how much attention came before and in all."""

    evicts = False
    seen: list[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Layer, tokens seen, signals, candidates, and the attention received so far, after each chunk."""
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of each layer (batch, heads, n) the attention received so far."""

    def observe(self, held: Held, attention: Attention) -> None:
        """Note the chunk."""
        super().observe(held, attention)
        new = attention.by_head.sum(-2)
        before = self.received.get(held.layer)
        if before is not None:
            new = new + torch.nn.functional.pad(before, (0, new.shape[-1] - before.shape[-1]))
        self.received[held.layer] = new
        self.seen.append((held.layer, held.seen, self.signals(held), held.candidates, new))


@dataclass(kw_only=True)
class GateSums:
    """Sums over examples, which add up over documents; float64.

    Attributes:
        products: (layers, heads, signals + 1, signals + 1) Σ x xᵀ, the last entry of x being 1.
        targets: (layers, heads, signals + 1) Σ x y.
        square: (layers, heads) Σ y².
        n: (layers, heads) how many examples.
    """

    products: torch.Tensor
    targets: torch.Tensor
    square: torch.Tensor
    n: torch.Tensor

    def __add__(self, other: GateSums) -> GateSums:
        return GateSums(
            products=self.products + other.products,
            targets=self.targets + other.targets,
            square=self.square + other.square,
            n=self.n + other.n,
        )

    def gate(self, ridge: float = 1e-3) -> tuple[Gate, torch.Tensor]:
        """The gate, and how well it predicts.

        Args:
            ridge: Added to the diagonal of the mean products, b's entry excepted.

        Returns:
            The gate, and (layers, heads) the share of the target's variance that it explains; both NaN in layers
            without an example.
        """
        n = self.n[..., None].clamp(min=1)
        products, targets = self.products / n[..., None], self.targets / n
        damping = torch.full((len(SIGNALS) + 1,), ridge, dtype=torch.float64)
        damping[-1] = 1e-9
        weights = torch.linalg.solve(products + damping.diag(), targets)
        fitted = 2 * (weights * targets).sum(-1) - torch.einsum(
            "lhi,lhij,lhj->lh", weights, products, weights
        )
        mean = targets[..., -1]
        spread = self.square / n[..., 0] - mean.square()
        explained = (fitted - mean.square()) / spread.clamp(min=LEAST)
        nothing = self.n == 0
        weights = weights.masked_fill(nothing[..., None], torch.nan)
        return Gate(weights=weights.float()), explained.masked_fill(nothing, torch.nan).float()


def gate_sums(
    model: LanguageModel,
    ids: torch.Tensor,
    *,
    protection: Protection,
    decay: float = 0.99,
    chunk: int = 256,
) -> GateSums:
    """What documents say about a gate.

    Args:
        model: Which.
        ids: (batch, length) token ids.
        protection: Whose tokens are no examples.
        decay: Of the EMA, as the policy will have it.
        chunk: Tokens of a forward.

    Raises:
        ConfigError: if a sequence has one chunk alone, after which nothing is received.
        ModelError: as `tasks.retention.running.read`.
    """
    length = ids.shape[1]
    if length <= chunk:
        raise ConfigError(
            f"a gate cannot learn from sequences of {length} tokens in chunks of {chunk}",
            hint="read longer sequences, or smaller chunks",
        )
    watching = _Watching(decay=decay)
    settings = Settings(
        policy=watching, budget=None, protocol=Prefill(prompt=length, chunk=chunk), protection=protection
    )
    for _ in read(model, ids, settings):
        pass
    shape, sliding = cache_shape(model.module, model.name)
    width = len(SIGNALS) + 1
    at = (len(sliding), shape.heads)
    sums = GateSums(
        products=torch.zeros(*at, width, width, dtype=torch.float64),
        targets=torch.zeros(*at, width, dtype=torch.float64),
        square=torch.zeros(at, dtype=torch.float64),
        n=torch.zeros(at, dtype=torch.float64),
    )
    for layer, seen, signals, among, before in watching.seen:
        if seen == length:
            continue
        later = (watching.received[layer][..., :seen] - before).clamp(min=0) / (length - seen)
        target = standardized((later + LEAST).log(), among)
        examples = torch.nn.functional.pad(signals, (0, 1), value=1.0).double() * among[..., None]
        target = target.double() * among
        sums.products[layer] += torch.einsum("bhni,bhnj->hij", examples, examples).cpu()
        sums.targets[layer] += torch.einsum("bhni,bhn->hi", examples, target).cpu()
        sums.square[layer] += target.square().sum((0, 2)).cpu()
        sums.n[layer] += among.sum((0, 2)).cpu()
    return sums


def train_gate(
    model: LanguageModel, sequences: Iterable[torch.Tensor], **options: Any
) -> tuple[Gate, torch.Tensor]:
    """A gate from documents that nobody is measured on.

    Args:
        model: Which.
        sequences: (batch, length) token ids each.
        **options: Of `gate_sums`.

    Returns:
        The gate, and (layers, heads) the share of the target's variance that it explains in these documents.

    Raises:
        ConfigError: if there is no sequence, or as `gate_sums`.
        ModelError: as `gate_sums`.
    """
    total: GateSums | None = None
    for ids in sequences:
        found = gate_sums(model, ids, **options)
        total = found if total is None else total + found
    if total is None:
        raise ConfigError("a gate cannot learn without a document", hint="hold out more documents")
    return total.gate()
