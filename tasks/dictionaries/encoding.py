"""Sparse features straight from residuals: what `sae.encode` gives, without its dense passes.

`sae.encode` is the reference. It makes about six dense passes over (tokens, latents); for the common
architectures one fused product with `b = b_enc - b_dec @ W_enc` and one comparison give the same support in
half the time. Any other architecture goes through `sae.encode` itself. Products are float32 without TF32:
bf16 flips about 1 % of the active entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_DENSE_ENTRIES = 1 << 28
"""Pre-activations held at once at most: 1 GiB of float32."""


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Non-zero features, in (row, feature) order.

    Attributes:
        row: (n,) int64 row of the input.
        feature: (n,) int64 latent.
        value: (n,) float32 activation, above 0.
    """

    row: torch.Tensor
    feature: torch.Tensor
    value: torch.Tensor


class Encoder:
    """A dictionary's encoder on a device.

    Args:
        sae: A SAELens SAE; its decoder is not used and may be freed by the caller.
        device: Where to encode.
    """

    def __init__(self, sae: Any, device: torch.device) -> None:
        self.d_sae = int(sae.cfg.d_sae)
        self.sae = sae.to(device=device, dtype=torch.float32)
        self.is_fused, self._encode = _strategy(self.sae)
        self._rows = max(1, _DENSE_ENTRIES // self.d_sae)

    @torch.inference_mode()
    def __call__(self, residuals: torch.Tensor) -> Sparse:
        """Encode (N, d_model) residuals of any dtype."""
        found = []
        for first in range(0, len(residuals), self._rows):
            sparse = self._encode(residuals[first : first + self._rows].to(torch.float32))
            found.append((sparse[0] + first, sparse[1], sparse[2]))
        if not found:
            empty = torch.empty(0, dtype=torch.int64, device=residuals.device)
            return Sparse(row=empty, feature=empty, value=empty.to(torch.float32))
        row, feature, value = (
            torch.cat(column) if len(found) > 1 else column[0] for column in zip(*found, strict=True)
        )
        return Sparse(row=row, feature=feature, value=value)


_Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _strategy(sae: Any) -> tuple[bool, Callable[[torch.Tensor], _Triple]]:
    architecture = sae.cfg.architecture()
    plain = getattr(sae.cfg, "reshape_activations", "none") == "none"
    if not plain or architecture not in {"standard", "jumprelu", "topk"}:
        return False, lambda x: _nonzeros(sae.encode(x))
    bias = sae.b_enc.detach().clone()
    if sae.cfg.apply_b_dec_to_input:
        bias -= sae.b_dec.detach() @ sae.W_enc.detach()
    weight = sae.W_enc.detach()

    def before_activation(x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, sae.run_time_activation_norm_fn_in(x), weight)

    if architecture == "topk":
        scale = sae.W_dec.detach().norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
        return True, lambda x: _top_k(before_activation(x), int(sae.cfg.k), scale)
    threshold = sae.threshold.detach().clamp(min=0) if architecture == "jumprelu" else bias.new_zeros(())
    return True, lambda x: _above(before_activation(x), threshold)


def _above(values: torch.Tensor, threshold: torch.Tensor) -> _Triple:
    row, feature = torch.nonzero(values > threshold, as_tuple=True)
    return row, feature, values[row, feature]


def _nonzeros(dense: torch.Tensor) -> _Triple:
    if dense.is_sparse:
        dense = dense.to_dense()
    return _above(dense, dense.new_zeros(()))


def _top_k(before: torch.Tensor, k: int, scale: torch.Tensor | None) -> _Triple:
    scores = before if scale is None else before * scale
    values, features = torch.topk(scores, k=k, dim=-1, sorted=False)
    features, order = torch.sort(features, dim=-1)
    values = values.gather(-1, order)
    row, slot = torch.nonzero(values > 0, as_tuple=True)
    return row, features[row, slot], values[row, slot]
