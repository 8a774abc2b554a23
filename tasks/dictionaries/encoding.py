"""Sparse features straight from residuals: what `sae.encode` gives, without its dense passes.

`sae.encode` is the reference. It makes about six dense passes over (tokens, latents), all of them for some ten to a
hundred active latents a token. For the common architectures a latent's value is its *settled* one: the float32 dot
product of the residual and the latent's weights, plus `b = b_enc - b_dec @ W_enc`. It is computed for the few latents
that a screen names (`tasks.dictionaries.screening`), each by itself, in an order that depends on the width alone. So a
token's features are the same bits whatever it was batched with, in any number of threads, and whichever screen named
them; a dense product's last bits depend on its shape. Any other architecture goes through `sae.encode` itself, as does
a dictionary of numbers beyond 2^60.

bfloat16 alone would flip about 1 % of the active entries. Nothing here is TF32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tasks.dictionaries.screening import (
    DENSE_ENTRIES,
    LARGEST,
    WIDEST,
    BFloat16Screen,
    Float32Screen,
    Screen,
    has_bfloat16_units,
    places,
)

Way = Literal["bfloat16", "float32", "sae.encode"]

_PAIRS_AT_ONCE = 1 << 14

# PyTorch says so of any use of CSR. The only one here is `sampled_addmm`, whose bits are tested.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


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
        sae: A SAELens SAE; its decoder is not used and may be freed by the caller. Its `W_enc` becomes a view of the
            transposed weights, so that they are held once.
        device: Where to encode.
        way: One of the ways below, instead of the one that suits device and dictionary.

    Attributes:
        d_sae: Number of latents.
        sae: The SAE, on the device in float32.
        way: In which format latents are screened, or `sae.encode`. Features are the same bits by `bfloat16` as by
            `float32`.
    """

    def __init__(self, sae: Any, device: torch.device, way: Way | None = None) -> None:
        self.d_sae = int(sae.cfg.d_sae)
        self.sae = sae.to(device=device, dtype=torch.float32)
        self.way: Way = way or _way(self.sae, device)
        self._encode: _Settled | _Dense = (
            _Dense(self.sae) if self.way == "sae.encode" else _Settled(self.sae, self.way)
        )

    @torch.inference_mode()
    def __call__(self, residuals: torch.Tensor) -> Sparse:
        """Encode (N, d_model) residuals of any dtype."""
        found = []
        for first in range(0, len(residuals), self._encode.rows):
            x = residuals[first : first + self._encode.rows].to(torch.float32)
            row, feature, value = self._encode(x)
            found.append((row + first, feature, value))
        if not found:
            empty = torch.empty(0, dtype=torch.int64, device=residuals.device)
            return Sparse(row=empty, feature=empty, value=empty.to(torch.float32))
        row, feature, value = (
            torch.cat(column) if len(found) > 1 else column[0] for column in zip(*found, strict=True)
        )
        return Sparse(row=row, feature=feature, value=value)


_Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _way(sae: Any, device: torch.device) -> Way:
    """A function of architecture, weights and device alone."""
    plain = getattr(sae.cfg, "reshape_activations", "none") == "none"
    architecture = sae.cfg.architecture()
    if not plain or architecture not in {"standard", "jumprelu", "topk"}:
        return "sae.encode"
    sizes = [
        sae.W_enc.detach().norm(dim=0),
        sae.b_dec.detach().norm(),
        sae.b_enc.detach().abs(),
        getattr(sae, "threshold", sae.b_enc).detach().abs(),
    ]
    if architecture == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
        sizes.append(sae.W_dec.detach().norm(dim=-1))
    if not all(bool((size <= LARGEST).all()) for size in sizes):
        return "sae.encode"
    return "bfloat16" if has_bfloat16_units(device) and sae.cfg.d_in <= WIDEST else "float32"


class _Dense:
    """The SAE's own way."""

    def __init__(self, sae: Any) -> None:
        self._sae = sae
        self.rows = max(1, DENSE_ENTRIES // int(sae.cfg.d_sae))

    def __call__(self, x: torch.Tensor) -> _Triple:
        dense = self._sae.encode(x)
        if dense.is_sparse:
            dense = dense.to_dense()
        row, feature = torch.nonzero(dense > 0, as_tuple=True)
        return row, feature, dense[row, feature]


class _Settled:
    """Screens, settles what is left, and keeps what is active."""

    def __init__(self, sae: Any, way: Literal["bfloat16", "float32"]) -> None:
        with torch.no_grad():
            self._weight = sae.W_enc.detach().T.contiguous()
            sae.W_enc.data = self._weight.T
            bias = sae.b_enc.detach().clone()
            if sae.cfg.apply_b_dec_to_input:
                every = torch.arange(len(bias), device=bias.device)
                bias = settled(-sae.b_dec.detach()[None], self._weight, bias, torch.zeros_like(every), every)
            self._bias, self._threshold, self._scale, self._k = bias, None, None, 0
            architecture = sae.cfg.architecture()
            if architecture == "topk":
                self._k = int(sae.cfg.k)
                if sae.cfg.rescale_acts_by_decoder_norm:
                    self._scale = sae.W_dec.detach().norm(dim=-1)
            elif architecture == "jumprelu":
                self._threshold = sae.threshold.detach().clamp(min=0)
            else:
                self._threshold = torch.zeros_like(bias)
            screen = BFloat16Screen if way == "bfloat16" else Float32Screen
            self._screen: Screen = screen(self._weight, bias, self._threshold, self._scale)
        self._normalized = sae.run_time_activation_norm_fn_in
        self.rows = self._screen.rows

    def __call__(self, x: torch.Tensor) -> _Triple:
        x = self._normalized(x).contiguous()
        row, latent = self._candidates(x)
        value = settled(x, self._weight, self._bias, row, latent)
        if self._threshold is not None:
            kept = places(value > self._threshold[latent])
        else:
            if self._scale is not None:
                value = value * self._scale[latent]
            kept = _largest(row, value, self._k)
        return row[kept], latent[kept], value[kept]

    def _candidates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A superset of what is active, in (row, latent) order."""
        n = len(self._bias)
        beyond = ~(x.norm(dim=1) <= LARGEST)
        screened = x.masked_fill(beyond[:, None], 0) if beyond.any() else x
        pair = self._screen.largest(screened, self._k) if self._k else self._screen.above(screened)
        if screened is not x:
            every = torch.nonzero(beyond) * n + torch.arange(n, device=x.device)
            pair = torch.sort(torch.cat([pair[~beyond[pair // n]], every.flatten()])).values
        row = pair // n
        return row, pair - row * n


def settled(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, row: torch.Tensor, latent: torch.Tensor
) -> torch.Tensor:
    """Pre-activations of some latents, each a function of its row, its weights and its bias alone.

    Args:
        x: (N, d) float32, contiguous.
        weight: (d_sae, d) float32, contiguous.
        bias: (d_sae,).
        row: (n,) ascending rows of x.
        latent: (n,) latents.
    """
    value = bias[latent]
    if not len(row):
        return value
    if x.device.type == "cpu":
        # PyTorch's kernel takes a transposed second factor as it lies, and adds up each entry alone, in vectors.
        ends = torch.bincount(row, minlength=len(x)).cumsum(0)
        some = torch.sparse_csr_tensor(
            torch.cat([ends.new_zeros(1), ends]), latent, value, (len(x), len(weight)), check_invariants=False
        )
        done: torch.Tensor = torch.sparse.sampled_addmm(some, x, weight.T).values()
        return done
    return value + _dots(x, weight, row, latent)


def _dots(x: torch.Tensor, weight: torch.Tensor, row: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Dot products elsewhere: CUDA chooses the order of a sum by its shape, so every sum here has the same shape."""
    lacking = -len(row) % _PAIRS_AT_ONCE
    row, latent = (torch.nn.functional.pad(index, (0, lacking)) for index in (row, latent))
    sums = [
        (x[row[first : first + _PAIRS_AT_ONCE]] * weight[latent[first : first + _PAIRS_AT_ONCE]]).sum(1)
        for first in range(0, len(row), _PAIRS_AT_ONCE)
    ]
    return torch.cat(sums)[: len(row) - lacking]


def _largest(row: torch.Tensor, score: torch.Tensor, k: int) -> torch.Tensor:
    """Ascending places of scores above 0 and among the k largest of their row, of equal ones the first; rows ascend."""
    above = places(score > 0)
    row = row[above]
    # Above 0, float32 is ordered as integers are.
    order = torch.sort((row << 32) - score[above].view(torch.int32), stable=True).indices
    n_of_row = torch.bincount(row)
    rank = torch.arange(len(row), device=row.device) - (n_of_row.cumsum(0) - n_of_row)[row]
    return torch.sort(above[order[rank < k]]).values
