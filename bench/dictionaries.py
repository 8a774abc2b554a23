"""Dictionaries for the benches: random JumpReLU SAEs whose every latent fires as often as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_random_dictionary(
    folder: Path, residuals: torch.Tensor, *, d_sae: int, l0: float, seed: int
) -> Path:
    """Save a random dictionary in SAELens' format.

    Directions are uniform on the sphere, `b_dec` is the mean residual, and each latent's threshold is its own
    (1 - l0 / d_sae) quantile over the residuals given: as dense as a trained dictionary's features are on
    average, and as costly to encode with; but no more uneven than the text is.

    Args:
        folder: Where.
        residuals: (n, d_model), n at least 2, of the layer that it reads, to calibrate the thresholds.
        d_sae: Number of latents.
        l0: Mean number of active latents a token.
        seed: Of the directions.
    """
    from sae_lens import SAE

    x = residuals.to(torch.float32)
    sae: Any = SAE.from_dict(
        {
            "architecture": "jumprelu",
            "d_in": x.shape[1],
            "d_sae": d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "metadata": {},
        }
    )
    directions = torch.randn(d_sae, x.shape[1], generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.b_enc.zero_()
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
        before = (x - sae.b_dec) @ sae.W_enc
        # Half-way to the next value: a threshold that is a value itself flips with the last bit of a sum.
        rank = min(len(x) - 1, max(1, round(len(x) * (1 - l0 / d_sae))))
        below, above = (before.kthvalue(k, dim=0).values for k in (rank, rank + 1))
        sae.threshold.copy_(((below + above) / 2).clamp(min=1e-3))
    sae.save_model(str(folder))
    return folder
