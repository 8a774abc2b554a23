"""The power law of token degree, fitted by the `powerlaw` package (Clauset, Shalizi and Newman 2009)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = 1
MAX_CANDIDATES = 64
"""Values of xmin that are tried at most: each costs up to 0.3 s on 200,000 degrees."""


@dataclass(frozen=True, kw_only=True)
class PowerLawFit:
    """A discrete power law p(d) ∝ d^-alpha for d ≥ xmin.

    Attributes:
        alpha: The exponent.
        xmin: The degree from which on the law holds: the candidate with the smallest `ks`.
        ks: Kolmogorov-Smirnov distance between the data from `xmin` on and the law.
    """

    alpha: float
    xmin: float
    ks: float


def fit_power_law(degrees: npt.ArrayLike, max_candidates: int = MAX_CANDIDATES) -> PowerLawFit | None:
    """Fit a discrete power law to the degrees above 0.

    With at most `max_candidates` candidates for xmin the result is that of `powerlaw.Fit(degrees,
    discrete=True)`; with more, that of the best of so many, spread evenly on a log scale.

    Args:
        degrees: Integers of any order and shape (N,); zeros are left out.
        max_candidates: Values of xmin to try, which bounds the time.

    Returns:
        The fit, or None where there is none to make: fewer than four distinct degrees, or no valid fit.
    """
    data = np.sort(np.asarray(degrees, dtype=np.float64).ravel())
    data = data[data > 0]
    # powerlaw itself leaves out the two largest values, and wants two to choose from.
    possible = np.unique(data)[:-2]
    if len(possible) < 2:
        return None
    fits = [_fit_from(data, xmin) for xmin in _spread(possible, max_candidates)]
    valid = [fit for fit in fits if fit is not None]
    return min(valid, key=lambda fit: fit.ks, default=None)


def _spread(values: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.float64]:
    if len(values) <= n:
        return values
    wanted = np.geomspace(values[0], values[-1], n)
    return np.unique(values[np.searchsorted(values, wanted * (1 - 1e-9))])


def _fit_from(data: npt.NDArray[np.float64], xmin: float) -> PowerLawFit | None:
    import powerlaw

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # Descending: it tests value by value, in Python, whether they ascend, and sorts them in C where they do not.
        law: Any = powerlaw.Fit(data[::-1], discrete=True, xmin=xmin, verbose=0).power_law
        valid = law.in_range() and not law.noise_flag
    if not valid or not np.isfinite([law.alpha, law.D]).all():
        return None
    return PowerLawFit(alpha=float(law.alpha), xmin=float(xmin), ks=float(law.D))
