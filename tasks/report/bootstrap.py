"""Intervals: the percentile bootstrap (Efron 1979) of anything that sums over units, such as documents, give.

What is seen in one document is not independent, so whole documents are drawn, with replacement. A seed and a number of
documents give the same draws whatever is summed, so what two calls find of the same documents is paired, and
differences may be taken within a resample.

A resample of D documents is a row of D weights, so all of them are one matrix product, in pieces of bounded memory.
Drawing rows themselves would copy every document's numbers once a resample.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tasks.report.vocabulary import Estimate

Floats = npt.NDArray[np.float64]

PERCENTILES = (2.5, 97.5)
WEIGHTS_AT_ONCE = 1 << 21
"""Weights held at a time, 16 MB in each of three arrays; at least one resample's."""


def bootstrap(counts: Floats, statistic: Callable[[Floats], Floats], resamples: int, seed: int = 0) -> Floats:
    """95 % percentile intervals of numbers that are functions of sums over documents.

    Args:
        counts: (documents, columns) finite addends of each document.
        statistic: Maps (resamples, columns) sums to (resamples, k) numbers. Resamples in which a number is
            NaN are left out of its interval.
        resamples: How many.
        seed: Of the draws.

    Returns:
        (k, 2) lower and upper end; NaN with fewer than 2 documents, or where no resample gives a number.
    """
    if len(counts) < 2:
        return np.full((statistic(counts.sum(axis=0)[None]).shape[1], 2), np.nan)
    found = statistic(resampled_sums(counts, resamples, seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        ends: Floats = np.nanpercentile(found, PERCENTILES, axis=0).T
    return ends


def estimates(sums: Floats, statistic: Callable[[Floats], Floats], resamples: int) -> list[Estimate]:
    """What a statistic of sums over units that are drawn gives, each number with its interval.

    Args:
        sums: (units, ...) addends of each unit.
        statistic: Maps (resamples, ...) sums to (resamples, k) numbers.
        resamples: How many.

    Returns:
        k estimates; an interval is NaN with fewer than 2 units.
    """
    shape = sums.shape[1:]
    flat = sums.reshape(len(sums), math.prod(shape))

    def of_flat(drawn: Floats) -> Floats:
        return statistic(drawn.reshape(len(drawn), *shape))

    values = of_flat(flat.sum(axis=0)[None])[0]
    intervals = bootstrap(flat, of_flat, resamples)
    return [
        Estimate(value=float(value), low=float(low), high=float(high))
        for value, (low, high) in zip(values, intervals, strict=True)
    ]


def resampled_sums(
    counts: Floats, resamples: int, seed: int = 0, weights_at_once: int = WEIGHTS_AT_ONCE
) -> Floats:
    """Column sums of as many documents as there are, drawn with replacement, for each resample.

    Args:
        counts: (documents, columns) finite addends of each document.
        resamples: How many.
        seed: Of the draws.
        weights_at_once: Bounds the memory; the sums do not depend on it.

    Returns:
        (resamples, columns) sums, of addends rounded as `_exact` says.
    """
    n_documents = len(counts)
    addends, rng = _exact(counts), np.random.default_rng(seed)
    sums = np.empty((resamples, counts.shape[1]))
    at_once = max(1, weights_at_once // n_documents)
    for first in range(0, resamples, at_once):
        n = min(at_once, resamples - first)
        drawn = rng.integers(0, n_documents, size=(n, n_documents))
        drawn += n_documents * np.arange(n)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=n * n_documents).reshape(n, n_documents)
        sums[first : first + n] = weights.astype(np.float64) @ addends
    return sums


def _exact(counts: Floats) -> Floats:
    """The addends, each column rounded to a power of two of which no sum of a resample has 2^53.

    So additions are exact, and neither the order in which a matrix product makes them nor its number of
    threads can change a bit. Columns of counts stay as they are.
    """
    largest = len(counts) * np.abs(counts).max(axis=0)
    units = np.array([math.ldexp(1.0, math.frexp(value)[1] - 52) if value else 1.0 for value in largest])
    rounded: Floats = np.rint(counts / units) * units
    return rounded
