"""Which latents may be active: a superset from one approximate product, small enough to be settled one by one.

What a latent's value is, `tasks.dictionaries.encoding` says: its *settled* value, a float32 dot product of its own,
plus its bias. A screen has to name every latent that its settled value makes active, and few others. Two do:

- `Float32Screen`: the usual product, with thresholds lowered by what rounding can hide in it and in the settled value.
- `BFloat16Screen`: a product at the rate of the device's bfloat16 units, with the bound of its rounding inside it.

**The bound.** bfloat16 has 8 significant bits, so rounding to nearest errs by up to u = 2^-8, relative, and a product
of two rounded factors by up to 2u = 2^-7; half of that would miss latents (a test shows one). But by how much a row and
a latent were rounded is known, about 0.4 u in norm. With v_j = w_j / u_j for some u_j ≥ |w_j|, hats on what was
rounded, and t_j = (b_j - threshold_j) / u_j,

    x·v_j - x̂·v̂_j = (x - x̂)·v_j + x̂·(v_j - v̂_j) ≤ |x - x̂| + |x̂| |v_j - v̂_j|,

which is about 2^-8.4 |x|, or half of it where x was bfloat16 already; and it is two columns more of the product:

    x' = [x̂, 1,  1,  β, ρ]     β = |x - x̂| + σ|x| + τ     ρ = |x̂|
    w' = [v̂, t', t", 1, η]     t' + t" ≥ t                η = |v - v̂|

β, ρ, η and t" are made larger by 2^-7 of themselves before they are rounded to bfloat16, which pays for this rounding
and for that of the norms (d 2^-25 for a width d). So x'·w'_j ≥ x·v_j + t_j + σ|x| + τ.

*Active means positive.* Let the settled value be above the threshold. Rounding a sum carries it over no float32
number, so the dot product as computed is above threshold - b, and the exact one above that less γ|x||w_j| + d 2^-126,
with γ = 1.01 d 2^-24 in whatever order its terms are added and with everything too small flushed to zero. Hence
x·v_j + t_j > -γ|x| - τ/4. What remains is the adding of the K terms of x'·w'_j in float32, which errs by at most
K 2^-23 Σ|x'||w'| (tensor cores cut where others round to nearest, at 2^-24).

- |t_j| ≤ 2|x| + 2τ: Σ|x'||w'| ≤ 3.2|x| + 4τ, and σ = (K + 8) 2^-21 covers 3.2 K 2^-23, γ, and that v itself is rounded
  to float32; τ = 2^-40 covers whatever is too small for its format.
- t_j > 2|x| + 2τ: the sum is at least 0.4 t_j.
- t_j < -2|x| - 2τ: the latent is not active.

So the sum is positive for each active latent. Rounded to bfloat16, or flushed to zero, it still has no sign bit: those
whose sign bit is not set are the candidates. The proof takes d ≤ 2^15 and norms up to 2^60; who calls sees to that.

**The k largest.** With one unit for all latents the same sum, with max |t| beside |x| in β, is at least the score, and
above it by at most 2 (|x - x̂| + |x̂| max η + σ(|x| + max |t|) + 2^-14 max |t| + τ), since t' + t" is up to 2^-14.4 |t|
above t. If latents are in groups, then k of them reach the k-th largest of the groups' maxima: less that excess it is
a lower bound of the k-th largest score, nearly as large, for one pass of maxima. Sums below it are not among them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

LARGEST = 2.0**60
"""Norm, of a row or of a latent's weights, up to which screens keep their promise."""

WIDEST = 1 << 15
"""Residuals wider than this are screened in float32."""

DENSE_ENTRIES = 1 << 28
"""Float32 pre-activations held at once at most: 1 GiB."""

_SCORES = 1 << 26
"""The same of bfloat16 ones among which the largest are looked for."""

_CPU_BLOCK, _GPU_BLOCK = (1 << 10, 1 << 9), (1 << 14, 1 << 12)
"""Latents and rows of a bfloat16 product: a CPU's stays in its cache, and a GPU's has work for the weights it loads."""

_MASSIVE = 4
"""A residual of this many times the others' norm is screened apart from them."""

_GROUPS = 1 << 9
_PACKED_AT_ONCE = 1 << 12
_TINY, _UP = 2.0**-40, 1 + 2.0**-7
# The squares of numbers below 2^-63 are lost from a norm: 2^-55 in all, for the widest rows. So norms are not taken for
# less than `_TINY` where that counts.


class Screen(Protocol):
    """Names the latents that may be active."""

    rows: int
    """Rows to give at once at most, for memory's sake."""

    def above(self, x: torch.Tensor) -> torch.Tensor:
        """Pairs whose settled value may be above the latent's threshold.

        Args:
            x: (N, d) float32.

        Returns:
            (n,) int64, row * d_sae + latent, ascending.
        """

    def largest(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """Likewise pairs whose score may be above 0 and among the k largest of its row."""


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: asked of what it is, never timed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(units.get("avx512_bf16") or units.get("amx_bf16"))


class Float32Screen:
    """The product itself, whose rounding is all that has to be allowed for.

    Args:
        weight: (d_sae, d) float32, each row's norm `LARGEST` at most.
        bias: (d_sae,).
        threshold: (d_sae,) that `above` asks; None for a screen that is asked `largest`.
        scale: (d_sae,) that makes scores of values; None is 1.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        threshold: torch.Tensor | None,
        scale: torch.Tensor | None,
    ) -> None:
        self._weight, self._bias, self._threshold, self._scale = weight.T, bias, threshold, scale
        self._norms = weight.norm(dim=1).clamp(min=_TINY)
        self._error = (weight.shape[1] + 8) * 2.0**-22
        self.rows = max(1, DENSE_ENTRIES // len(bias))

    def above(self, x: torch.Tensor) -> torch.Tensor:
        """See `Screen`."""
        norms, n = x.norm(dim=1).clamp(min=_TINY), len(self._bias)
        massive = norms > _MASSIVE * norms.median()
        if not massive.any():
            return self._above(x, norms.max())
        # What rounding can hide in a massive residual is no reason to name the latents of all others.
        found = []
        for row in (places(~massive), places(massive)):
            pair = self.above(x[row])
            latent = pair % n
            found.append(row[pair // n] * n + latent)
        return torch.sort(torch.cat(found)).values

    def _above(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """`above`, of rows of at most that norm."""
        assert self._threshold is not None
        n = len(self._bias)
        least = self._threshold - (self._norms * norm + self._bias.abs()) * self._error - _TINY
        # One result's memory for all rows: a page of it is first touched once.
        step = max(_CPU_BLOCK[1], _SCORES // 16 // n)
        out, found = x.new_empty((min(step, len(x)), n)), []
        for first in range(0, len(x), step):
            some = x[first : first + step]
            values = torch.addmm(self._bias, some, self._weight, out=out[: len(some)])
            found.append(_reaching(values, least) + first * n)
        return torch.cat(found)

    def largest(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """See `Screen`."""
        scores, norms, bias = torch.addmm(self._bias, x, self._weight), self._norms, self._bias.abs()
        if self._scale is not None:
            scores, norms, bias = scores * self._scale, norms * self._scale, bias * self._scale
        norm = x.norm(dim=1).clamp(min=_TINY)
        hidden = (norm * norms.max() + bias.max()) * self._error + _TINY
        return _reaching(scores, (_kth(scores, k, hidden) - hidden)[:, None])


class BFloat16Screen:
    """A bfloat16 product that has its own bound in it, in blocks that stay in the cache.

    Args:
        weight: (d_sae, d) float32, each row's norm `LARGEST` at most, d `WIDEST` at most.
        bias: (d_sae,).
        threshold: (d_sae,) that `above` asks; None for a screen that is asked `largest`.
        scale: (d_sae,) that makes scores of values; None is 1.
    """

    rows = 1 << 13

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        threshold: torch.Tensor | None,
        scale: torch.Tensor | None,
    ) -> None:
        self._n, self._width = weight.shape
        self._is_cpu = weight.device.type == "cpu"
        self._latents, self._rows = _CPU_BLOCK if self._is_cpu else _GPU_BLOCK
        # Rows begin at multiples of 32 bytes.
        columns = -(-(self._width + 4) // 16) * 16
        self._error = (columns + 8) * 2.0**-21
        times = torch.ones_like(bias) if scale is None else scale
        over = (bias.double() - (0 if threshold is None else threshold.double())) * times
        # The second keeps t in bfloat16's range: at most 2^60.
        unit = torch.maximum(weight.norm(dim=1) * times * (1 + 2.0**-9), over.abs().float() / LARGEST)
        unit = unit.clamp(min=_TINY)
        if threshold is None:
            unit = unit.max().expand_as(unit)
        over /= unit
        high = over.to(torch.bfloat16)
        low = over - high.double()
        self._packed = weight.new_zeros((self._n, columns), dtype=torch.bfloat16)
        for first in range(0, self._n, _PACKED_AT_ONCE):
            some = slice(first, first + _PACKED_AT_ONCE)
            exact = weight[some] * (times[some] / unit[some])[:, None]
            rounded = exact.to(torch.bfloat16)
            self._packed[some, : self._width] = rounded
            self._packed[some, -1] = (exact - rounded.float()).norm(dim=1) * _UP
        self._packed[:, -4] = high
        self._packed[:, -3] = low + low.abs() * (_UP - 1)
        self._packed[:, -2] = 1
        self._roundest = float(self._packed[:, -1].max())
        self._farthest = float(over.abs().max())

    def above(self, x: torch.Tensor) -> torch.Tensor:
        """See `Screen`."""
        rows, _ = self._rounded(x, 0.0)
        least = self._empty(1, min(len(x), self._rows)).zero_()
        found = []
        for first in range(0, len(rows), self._rows):
            some = rows[first : first + self._rows].T
            out = self._empty(self._latents, some.shape[1])
            place = torch.cat(
                [
                    _reaching(self._product(start, some, out), least[0, : some.shape[1]])
                    + start * some.shape[1]
                    for start in range(0, self._n, self._latents)
                ]
            )
            found.append(self._pairs(place, first, some.shape[1]))
        return torch.cat(found)

    def largest(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """See `Screen`."""
        rows, hidden = self._rounded(x, self._farthest)
        found = []
        step = min(self._rows, max(16, _SCORES // self._n))
        for first in range(0, len(rows), step):
            some = rows[first : first + step].T
            scores = self._empty(self._n, some.shape[1])
            for start in range(0, self._n, self._latents):
                self._product(start, some, scores[start : start + self._latents])
            least = _kth(_maxima(scores, k), k, 2 * hidden[first : first + step])
            place = _reaching(scores, _down(least, scores.dtype))
            found.append(self._pairs(place, first, some.shape[1]))
        return torch.cat(found)

    def _pairs(self, place: torch.Tensor, first: int, n_rows: int) -> torch.Tensor:
        """Ascending pairs of flat indices of (d_sae, `n_rows`) from the row `first`."""
        latent = place // n_rows
        return torch.sort((place - latent * n_rows + first) * self._n + latent).values

    def _rounded(self, x: torch.Tensor, farthest: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the product, and (N,) what rounding can hide in its sums with any latent."""
        rows = x.new_zeros((len(x), self._packed.shape[1]), dtype=torch.bfloat16)
        rounded = rows[:, : self._width]
        rounded.copy_(x)
        rows[:, -4:-2] = 1
        lost = (x - rounded.float()).norm(dim=1) + (x.norm(dim=1) + farthest) * self._error + _TINY
        lost = (lost + farthest * 2.0**-14) * _UP
        norm = rounded.float().norm(dim=1) * _UP
        rows[:, -2], rows[:, -1] = lost, norm
        return rows, (lost + norm * self._roundest) * _UP

    def _empty(self, latents: int, rows: int) -> torch.Tensor:
        # A GPU can give its float32 sums as they are; a CPU's would be twice as much to look through.
        dtype = torch.bfloat16 if self._is_cpu else torch.float32
        return torch.empty((min(latents, self._n), rows), dtype=dtype, device=self._packed.device)

    def _product(self, start: int, columns: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(latents from `start` as many as fit, rows) of x'·w', in `out`."""
        some = self._packed[start : start + self._latents]
        out = out[: len(some)]
        if self._is_cpu:
            return torch.mm(some, columns, out=out)
        return torch.mm(some, columns, out_dtype=torch.float32, out=out)


def _maxima(scores: torch.Tensor, k: int) -> torch.Tensor:
    """(N, groups) what the maxima of groups of (d_sae, N) scores were at least before they were rounded, if above 0."""
    groups = max(_GROUPS, 8 * k)
    if len(scores) >= 2 * groups:
        # What makes no whole group is left out: a lower bound is wanted.
        scores = scores[: len(scores) // groups * groups].view(-1, groups, scores.shape[1]).amax(0)
    return scores.float().T.contiguous() * (1 - 0.505 * torch.finfo(scores.dtype).eps)


def _kth(scores: torch.Tensor, k: int, excess: torch.Tensor) -> torch.Tensor:
    """(N,) what the k-th largest true score of each row is at least; 0 where it may be below.

    Args:
        scores: (N, n).
        k: How many are wanted.
        excess: (N,) by how much they may be too large.
    """
    if k > scores.shape[1]:
        return torch.zeros_like(excess)
    reached = torch.topk(scores, k, dim=1, sorted=False).values.amin(1)
    return (reached - excess).clamp(min=0)


def _down(bound: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What no number that is at least `bound` is rounded below."""
    return (bound * (1 - torch.finfo(dtype).eps)).to(dtype)


def places(where: torch.Tensor) -> torch.Tensor:
    """Flat indices of what is true; NumPy's way is three times as fast as `torch.nonzero` on a CPU."""
    if where.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(where.numpy()))
    return torch.nonzero(where.flatten())[:, 0]


def _reaching(sums: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Flat indices of the sums that are at least `least`, which is not below 0 for bfloat16.

    Not below 0, bfloat16 is ordered as integers are, and one comparison of those keeps up with the cache.
    """
    if sums.dtype == torch.bfloat16:
        sums, least = sums.view(torch.int16), least.view(torch.int16)
    if sums.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(sums.numpy() >= least.numpy()))
    return places(sums >= least)
