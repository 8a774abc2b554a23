"""The numbers that the paper's findings on losses are tested by, each with a 95 % interval.

Intervals are percentiles over resamples of the held-out documents (`tasks.report.bootstrap`). A resample draws whole
documents, the same for every checkpoint, model and token group, so differences are paired: what makes a
document hard for all of them cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.pretraining.loss_intervals import BUCKETS
from tasks.pretraining.report_checkpoints import graph_rows, learned_rows, series_of
from tasks.pretraining.rows import (
    HARDEST,
    TO_CONTENT,
    TO_FUNCTION,
    Gains,
    Halfway,
    Hardest,
    Measured,
    SeriesRow,
)
from tasks.report.bootstrap import estimates
from tasks.report.queries import resamples_of

Floats = npt.NDArray[np.float64]
Checkpoints = Sequence[tuple[str, int]]

FEWEST_STEPS = 3
"""Checkpoints that say when a loss fell."""

_HARDEST = BUCKETS.index(HARDEST)
_FUNCTION = [BUCKETS.index(bucket) for bucket in TO_FUNCTION]
_CONTENT = [BUCKETS.index(bucket) for bucket in TO_CONTENT]


def measure(connection: Any, resamples: int | None = None) -> Measured:
    """Everything that the findings are tested by, from a connection of `infra.duck.connect` that has losses.

    Args:
        connection: The connection.
        resamples: Of the documents; None: as many as the run's own intervals have.
    """
    resamples = resamples or resamples_of(connection, "loss")
    series = series_of(connection)
    return Measured(
        series=tuple(series),
        hardest=tuple(hardest(connection, one, resamples) for one in series),
        halfway=tuple(halfway(connection, one, resamples) for one in series),
        gains=_compared(connection, series, resamples),
        learned=tuple(learned_rows(connection)),
        graphs=tuple(graph_rows(connection)),
    )


def hardest(connection: Any, series: SeriesRow, resamples: int) -> Hardest | None:
    """How function→content compares with the other groups; None where a group has no prediction."""
    sums = _sums(connection, [(series.name, step) for step in series.steps])
    means = _means(sums.sum(axis=0))
    if not np.isfinite(means).all():
        return None
    is_highest = means.argmax(axis=-1) == _HARDEST
    not_highest = np.flatnonzero(~is_highest)
    since = 0 if not len(not_highest) else int(not_highest[-1]) + 1
    others = np.delete(means[-1], _HARDEST)
    return Hardest(
        model=series.name,
        step=series.steps[-1],
        loss=float(means[-1, _HARDEST]),
        next_bucket=[bucket for bucket in BUCKETS if bucket != HARDEST][int(others.argmax())],
        gap=estimates(sums[:, -1:], lambda of: _gap(_means(of)[:, 0]), resamples)[0],
        highest_at=int(is_highest.sum()),
        checkpoints=len(series.steps),
        since=series.steps[since] if since < len(series.steps) else None,
    )


def halfway(connection: Any, series: SeriesRow, resamples: int) -> Halfway | None:
    """When each group has made half of its fall; None with too few checkpoints, or a group without a prediction.

    Of two checkpoints, half of the fall would lie in the middle between them, whatever the losses are.
    """
    if len(series.steps) < FEWEST_STEPS:
        return None
    sums = _sums(connection, [(series.name, step) for step in series.steps])
    if not np.isfinite(_means(sums.sum(axis=0))).all():
        return None
    x = log_steps(series.steps)

    def measured(of: Floats) -> Floats:
        pools = np.stack([of[:, :, _FUNCTION].sum(axis=2), of[:, :, _CONTENT].sum(axis=2)], axis=2)
        single, pooled = (np.minimum(half_step(x, _means(part)), x[-1]) for part in (of, pools))
        lead = pooled[:, 1] - pooled[:, 0]
        order = single[:, _CONTENT].min(axis=1) - single[:, _FUNCTION].max(axis=1)
        return np.column_stack([lead, order])

    lead, order = estimates(sums, measured, resamples)
    steps = 2 ** half_step(x, _means(sums.sum(axis=0))[None])[0]
    return Halfway(
        model=series.name,
        first=series.steps[0],
        last=series.steps[-1],
        steps=dict(zip(BUCKETS, steps.tolist(), strict=True)),
        lead=lead,
        order=order,
    )


def gains(connection: Any, small: SeriesRow, large: SeriesRow, resamples: int) -> Gains | None:
    """How much lower the larger model's losses are; None where a group has no prediction."""
    small_step, large_step, ground = comparable(small, large)
    sums = _sums(connection, [(small.name, small_step), (large.name, large_step)])
    means = _means(sums.sum(axis=0))
    if not np.isfinite(means).all():
        return None

    def measured(of: Floats) -> Floats:
        both = _means(of)
        gain = both[:, 0] - both[:, 1]
        order = gain[:, _CONTENT].min(axis=1) - gain[:, _FUNCTION].max(axis=1)
        return np.column_stack([gain, order, _gap(gain)[:, 0]])

    *by_bucket, order, lead = estimates(sums, measured, resamples)
    return Gains(
        small=small,
        large=large,
        small_step=small_step,
        large_step=large_step,
        ground=ground,
        by_bucket=dict(zip(BUCKETS, by_bucket, strict=True)),
        relative=dict(zip(BUCKETS, (1 - means[1] / means[0]).tolist(), strict=True)),
        order=order,
        lead=lead,
    )


def _compared(connection: Any, series: Sequence[SeriesRow], resamples: int) -> Gains | str:
    if len(series) < 2:
        return "one series"
    small, large = series[0], series[-1]
    if small.parameters is not None and small.parameters == large.parameters:
        return f"all series have {small.parameters:,} parameters"
    found = gains(connection, small, large, resamples)
    return found or "a token group has no prediction in the held-out documents"


def comparable(small: SeriesRow, large: SeriesRow) -> tuple[int, int, str]:
    """Which checkpoints of two series to compare, and why those.

    The last of each if both were shown as many tokens; else the last step that both have; else the last
    of each, although one may have seen more.
    """
    if small.tokens[-1] is not None and small.tokens[-1] == large.tokens[-1]:
        return (
            small.steps[-1],
            large.steps[-1],
            f"the last checkpoint of each, {small.tokens[-1]:,} tokens into both",
        )
    common = set(small.steps) & set(large.steps)
    if common:
        return max(common), max(common), "the last step that both have"
    return (
        small.steps[-1],
        large.steps[-1],
        "the last checkpoint of each, as they have no step in common: one may have seen more tokens",
    )


def log_steps(steps: Sequence[int]) -> Floats:
    """log2 of each step; a step 0 stands one doubling before the next checkpoint's."""
    first = steps[1] / 2 if steps[0] == 0 else steps[0]
    return np.log2(np.array([first, *steps[1:]], dtype=np.float64))


def half_step(x: Floats, means: Floats) -> Floats:
    """Where curves first are down to the middle between their first and their last value.

    Args:
        x: (checkpoints,) ascending.
        means: (resamples, checkpoints, groups).

    Returns:
        (resamples, groups) in units of `x`, linear between checkpoints; infinite for a curve that ends no
        lower than it begins.
    """
    first, last = means[:, 0], means[:, -1]
    level = (first + last) / 2
    # A curve that falls has its first value above the level, so this is at least 1.
    after = np.maximum((means <= level[:, None]).argmax(axis=1), 1)
    y1 = np.take_along_axis(means, after[:, None], axis=1)[:, 0]
    y0 = np.take_along_axis(means, after[:, None] - 1, axis=1)[:, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        at = x[after - 1] + (x[after] - x[after - 1]) * (y0 - level) / (y0 - y1)
    return np.where(first <= last, np.inf, at)


def _gap(means: Floats) -> Floats:
    """(resamples, 1) function→content minus the highest of the other groups, of (resamples, groups)."""
    others = np.delete(means, _HARDEST, axis=1)
    gap: Floats = (means[:, _HARDEST] - others.max(axis=1))[:, None]
    return gap


def _means(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = sums[..., 0] / sums[..., 1]
    return means


def _sums(connection: Any, checkpoints: Checkpoints) -> Floats:
    """(documents, checkpoints, groups, 2): summed loss and number of predictions of every held-out document."""
    import pyarrow as pa

    wanted = pa.table(
        {
            "model": pa.array([model for model, _ in checkpoints], pa.string()),
            "step": pa.array([step for _, step in checkpoints], pa.int64()),
            "checkpoint": pa.array(range(len(checkpoints)), pa.int64()),
        }
    )
    connection.register("_wanted", wanted)
    found = connection.execute(
        """
        SELECT doc_id, checkpoint, list_position(?, bucket) - 1 AS bucket, loss, n
        FROM document_losses JOIN _wanted USING (model, step)
        """,
        [list(BUCKETS)],
    ).fetchnumpy()
    connection.unregister("_wanted")
    _, document = np.unique(found["doc_id"], return_inverse=True)
    sums = np.zeros((int(document.max(initial=-1)) + 1, len(checkpoints), len(BUCKETS), 2))
    sums[document, found["checkpoint"], found["bucket"], 0] = found["loss"]
    sums[document, found["checkpoint"], found["bucket"], 1] = found["n"]
    return sums
