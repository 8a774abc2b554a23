"""How well a dictionary reconstructs: explained variance, L0 and living latents on tokens it was not trained on."""

from __future__ import annotations

from typing import Any

import torch

from schemas.errors import DictionaryError
from tasks.dictionaries.sample import ResidualSample

DENSE_ENTRIES = 1 << 26
"""Dense activations held at once at most: 256 MiB of float32."""


@torch.inference_mode()
def measure(sae: Any, sample: ResidualSample, longest: float) -> dict[str, float]:
    """Quality of a saved dictionary on the held-out tokens alone.

    Args:
        sae: The dictionary in its inference form.
        sample: The split.
        longest: Norm above which a residual is an outlier.

    Returns:
        `explained_variance`: 1 - squared error / squared distance from the held-out mean, without outliers;
        `explained_variance_all`: the same with them; `l0`: mean latents above 0 a token; `alive_share`: share
        of latents above 0 on at least one held-out token; `heldout_tokens`; `heldout_outliers`.
    """
    every, usual = Variance(), Variance()
    alive = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    n_active = 0
    rows = max(1, DENSE_ENTRIES // sae.cfg.d_sae)
    for piece in sample.pieces(heldout=True):
        for x in torch.split(piece.to(sae.device), rows):
            features = sae.encode(x)
            alive |= (features > 0).any(0)
            n_active += int((features > 0).sum())
            error = (sae.decode(features) - x).double().square().sum(1)
            is_usual = x.norm(dim=1) <= longest
            every.add(x, error)
            usual.add(x[is_usual], error[is_usual])
    if every.n == 0:
        raise DictionaryError("no held-out tokens to judge a dictionary on", hint="raise train.heldout_share")
    return {
        "explained_variance": usual.explained(),
        "explained_variance_all": every.explained(),
        "l0": n_active / every.n,
        "alive_share": float(alive.double().mean()),
        "heldout_tokens": float(every.n),
        "heldout_outliers": float(every.n - usual.n),
    }


class Variance:
    """Squared error and variance over any number of pieces, in float64; no residual is kept."""

    def __init__(self) -> None:
        self.n, self.error, self.square = 0, 0.0, 0.0
        self.total: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor, error: torch.Tensor) -> None:
        """Count (n, d_model) residuals and the (n,) squared errors of their reconstructions."""
        wide = x.double()
        self.n += len(x)
        self.error += float(error.sum())
        self.square += float(wide.square().sum())
        self.total = self.total + wide.sum(0)

    def explained(self) -> float:
        """1 - squared error / squared distance from the mean of what was counted; 0 where that is nothing."""
        mean_square = float(torch.as_tensor(self.total).square().sum()) / max(1, self.n)
        variance = self.square - mean_square
        return 1 - self.error / variance if variance > 0 else 0.0
