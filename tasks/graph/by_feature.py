"""Rows of a layer by feature, and what is shown of each: examples, histogram, and the tokens that open it.

DuckDB sorts by several keys, and carries whole rows along: for 10⁸ activations that takes three times as long as the
graph itself. Here a counting sort brings the rows of each feature together, and as many at a time as the processor's
caches hold are sorted as one 64-bit number each: feature, strength, place. numpy does that with vector instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK_BITS = 17
"""A block has at most 2^17 rows, unless they are of one feature."""

_PRIME = 2147483647


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Consecutive features with all of their rows, the strongest first.

    Attributes:
        feature: (F,) distinct, ascending.
        start: (F,) first row of each.
        n: (F,) rows of each, above 0.
        row: (n,) rows of the columns that were sorted: by feature, the strongest first, of equal ones those before.
    """

    feature: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    n: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]


class ByFeature:
    """Rows by feature.

    Args:
        feature: (n,) feature of each row, above or equal 0.
        strength: (n,) whole numbers from 0, by which a feature's rows are sorted, the largest first.
    """

    def __init__(self, feature: npt.NDArray[np.int32], strength: npt.NDArray[np.unsignedinteger]) -> None:
        from scipy.sparse import csr_array

        kind = np.int32 if len(feature) < 1 << 31 else np.int64
        rows, whole = np.arange(len(feature), dtype=kind), np.array([0, len(feature)], kind)
        n_features = int(feature.max(initial=-1)) + 1
        columns = csr_array((rows, feature, whole), shape=(1, n_features)).tocsc()
        n = np.diff(columns.indptr)
        self._strength, self._rows = strength, columns.data
        self._feature = np.flatnonzero(n)
        self._n = n[self._feature].astype(np.int64)
        self._end = np.cumsum(self._n)
        self._most = int(strength.max(initial=0))

    def ranges(self, most: int | None = None) -> list[tuple[int, int]]:
        """Ranges of features, by their numbers among the distinct ones, that are a block each: of `most` at most."""
        largest = 1 << min(_BLOCK_BITS, (64 - self._most.bit_length()) // 2)
        bounds = [0]
        while bounds[-1] < len(self._end):
            first = bounds[-1]
            before = self._end[first] - self._n[first]
            end = int(np.searchsorted(self._end, before + largest, side="right"))
            bounds.append(max(first + 1, end if most is None else min(end, first + most)))
        return list(pairwise(bounds))

    def block(self, first: int, end: int) -> Block:
        """The block of the features first … end - 1 of the distinct ones."""
        n = self._n[first:end]
        rows = self._rows[self._end[first] - n[0] : self._end[end - 1]]
        bits = [size.bit_length() for size in (len(rows) - 1, self._most)]
        # What is sorted: feature, then how much weaker than the strongest, then the place among the rows.
        key = np.repeat(np.arange(end - first, dtype=np.uint64) << np.uint64(bits[1]), n)
        key += np.uint64(self._most) - self._strength[rows]
        key <<= np.uint64(bits[0])
        key |= np.arange(len(rows), dtype=np.uint64)
        key.sort()
        key &= np.uint64((1 << bits[0]) - 1)
        return Block(feature=self._feature[first:end], start=np.cumsum(n) - n, n=n, row=rows[key])


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """Which of each feature's activations are shown, in the table's order.

    Attributes:
        feature: (e,) place of the feature among those asked for.
        decile: (e,) 0: top; 1 (the weakest tenth) to 10.
        place: (e,) from 1, the strongest.
        rank: (e,) how many of the feature's activations are stronger, or as strong and earlier in the corpus.
    """

    feature: npt.NDArray[np.int64]
    decile: npt.NDArray[np.int8]
    place: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]


def example_ranks(
    feature_id: npt.NDArray[np.int64], n: npt.NDArray[np.int64], top: int, of_decile: int
) -> Ranks:
    """Choose occurrences that show what features are about.

    top: the strongest activations. decile 1 (the weakest tenth of a feature's activations, by rank) to decile 10 (the
    strongest): some of each, each drawn from a part of the decile, of as many ranks as its other parts, by a hash of
    feature and part in whole numbers below 2^31 - 1. A feature with fewer activations than parts gives all of them.

    Args:
        feature_id: (F,) the features.
        n: (F,) activations of each, above 0.
        top: How many of the strongest.
        of_decile: How many of each decile.
    """
    n_parts = 10 * of_decile
    # Parts are counted from the strongest; the table begins with the weakest decile.
    part = np.arange(n_parts).reshape(10, of_decile)[::-1].ravel()
    from_top = part // of_decile
    n, feature = n[:, None], feature_id[:, None]
    first = -(-part * n // n_parts)
    size = -(-(part + 1) * n // n_parts) - first
    x = (feature * 69069 + part * 22695477 + 1013904223) % _PRIME
    lot = (x * x % _PRIME + x * 1103515245) % _PRIME
    drawn = first + lot % np.maximum(size, 1)
    # Of the decile's parts, or where some are empty of its ranks.
    place = np.minimum(part % of_decile, drawn - -(-from_top * n // 10)) + 1
    strongest = np.broadcast_to(np.arange(top), (len(n), top))
    is_there = np.concatenate([strongest < n, size > 0], axis=1)

    def flat(of_top: npt.NDArray[Any], of_parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
        every = np.concatenate([of_top, np.broadcast_to(of_parts, drawn.shape)], axis=1)
        chosen: npt.NDArray[Any] = every[is_there]
        return chosen

    return Ranks(
        feature=np.repeat(np.arange(len(n)), is_there.sum(axis=1)),
        decile=flat(np.zeros_like(strongest), 10 - from_top).astype(np.int8),
        place=flat(strongest + 1, place),
        rank=flat(strongest, drawn),
    )


def bins_of(
    activation: npt.NDArray[np.float32], largest: npt.NDArray[np.float64] | float, bins: int
) -> npt.NDArray[np.int32]:
    """The bin, numbered from 1, of each activation: of equal width from 0 to the feature's largest.

    A bin holds low ≤ activation < high, the last one its high too.
    """
    share = activation.astype(np.float64) * bins / largest
    return np.minimum(1 + np.floor(share).astype(np.int32), bins)


def histogram(block: Block, activation: npt.NDArray[np.float32], bins: int) -> dict[str, npt.NDArray[Any]]:
    """How strong the activations of each feature of a block are.

    Args:
        block: The features, by activation.
        activation: (n,) of each row of the columns, above 0.
        bins: How many of a feature; those of no activation are left out.

    Returns:
        `feature_id`, `bin`, `low`, `high` and `n`, by feature and bin.
    """
    # Backwards, so that bins ascend within a feature.
    found, n = activation[block.row[::-1]], block.n[::-1]
    largest = found[np.cumsum(n) - 1].astype(np.float64)
    bin_ = bins_of(found, np.repeat(largest, n), bins)
    place = np.repeat(np.arange(len(n)), n)
    start = np.flatnonzero((np.diff(bin_, prepend=0) != 0) | (np.diff(place, prepend=-1) != 0))
    forwards = np.argsort(-place[start], kind="stable")
    counts = np.diff(start, append=len(found))[forwards]
    place, bin_ = place[start][forwards], bin_[start][forwards]
    return {
        "feature_id": block.feature[::-1][place],
        "bin": bin_,
        **edges_of_bins(bin_, largest[place], bins),
        "n": counts,
    }


def edges_of_bins(
    bin_: npt.NDArray[np.int32], largest: npt.NDArray[np.float64] | float, bins: int
) -> dict[str, npt.NDArray[np.float64]]:
    """`low` and `high` of bins."""
    return {"low": largest * (bin_ - 1) / bins, "high": largest * bin_ / bins}


def tokens_of(
    block: Block, edges: Mapping[str, npt.NDArray[Any]], share: npt.NDArray[np.float64]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """The edges of each feature of a block, the tokens that open it most often first, and a row that sums them up.

    lift: the token's share of the feature's activations over its share of the graph's tokens; 1 is what chance gives.
    token_entropy: Shannon entropy, in bits, of the tokens of the feature's activations: 0 where one token has them all,
    log2(degree) where all of its tokens have as many. log2(N) less the mean of log2(n); to nine decimals.

    Args:
        block: The features, by n.
        edges: (n,) columns of `edges`, by token.
        share: (T,) share of the graph's tokens of each token_id.

    Returns:
        Columns of `feature_tokens`, and of `feature_summary`, whose token_id is the token that opens the feature most
        often, of equals the first.
    """
    found = {name: column[block.row] for name, column in edges.items()}
    n = found["n"].astype(np.float64)
    total = np.add.reduceat(n, block.start)
    information = np.add.reduceat(n * np.log2(n), block.start)
    entropy = np.maximum(0, np.round(np.log2(total) - information / total, 9))
    summary = {
        "feature_id": block.feature,
        "n": total.astype(np.int64),
        "max_activation": np.maximum.reduceat(found["max_activation"], block.start),
        "token_id": found["token_id"][block.start],
        "top_n": found["n"][block.start],
        "token_entropy": entropy,
    }
    lift = n / np.repeat(total, block.n) / share[found["token_id"]]
    of_feature = {"feature_id": block.feature, "token_entropy": entropy}
    repeated = {name: np.repeat(column, block.n) for name, column in of_feature.items()}
    return {**found, "lift": lift, **repeated}, summary
