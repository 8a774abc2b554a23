"""95 % intervals of the four token groups' losses, by document (`tasks.report.bootstrap`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.report.bootstrap import bootstrap

Floats = npt.NDArray[np.float64]

BUCKETS = ("function→function", "function→content", "content→function", "content→content")
"""Kinds of the current and of the next token, in the order of the tables."""

TO_FUNCTION = ("function→function", "content→function")
TO_CONTENT = ("function→content", "content→content")
HARDEST = "function→content"
"""The group that is the hardest in the paper."""

INTERVALS = pa.schema(
    [
        ("bucket", pa.string()),
        *((name, pa.float64()) for name in ("mean_low", "mean_high", "share_low", "share_high")),
    ]
)


def bucket_intervals(document_losses: pa.Table, resamples: int, seed: int = 0) -> pa.Table:
    """Intervals of one checkpoint's buckets: of the mean loss, and of the share of the total loss.

    Of columns `doc_id`, `bucket`, `n`, `loss` of one checkpoint.

    Returns:
        `INTERVALS`, one row a bucket. A mean over fewer than 2 documents has no interval.
    """
    documents, document = np.unique(document_losses["doc_id"].to_numpy(), return_inverse=True)
    place = np.array([BUCKETS.index(bucket) for bucket in document_losses["bucket"].to_pylist()], dtype=int)
    counts = np.zeros((len(documents), 2, len(BUCKETS)))
    counts[document, 0, place] = document_losses["n"].to_numpy()
    counts[document, 1, place] = document_losses["loss"].to_numpy()
    ends = bootstrap(counts.reshape(len(documents), 2 * len(BUCKETS)), _means_and_shares, resamples, seed)
    means, shares = ends[: len(BUCKETS)], ends[len(BUCKETS) :]
    means[(counts[:, 0] > 0).sum(axis=0) < 2] = np.nan
    columns = [*means.T, *shares.T]
    return pa.table(
        [list(BUCKETS), *(pa.array(column, pa.float64(), from_pandas=True) for column in columns)],
        schema=INTERVALS,
    )


def _means_and_shares(sums: Floats) -> Floats:
    n, loss = sums[:, : len(BUCKETS)], sums[:, len(BUCKETS) :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.hstack([loss / n, loss / loss.sum(axis=1, keepdims=True)])
