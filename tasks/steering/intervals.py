"""Intervals of reactivation scores and of steering (PAPER 1.3): percentile bootstrap, `tasks.report.bootstrap`.

Positions of one case are not independent, nor are the settings of one experiment, so whole cases and whole
experiments are drawn. All groups of a table share their draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sql import read_sql
from tasks.report.bootstrap import bootstrap

Floats = npt.NDArray[np.float64]

SCORES = ("own", "counterfactual", "unrelated", "excess", "excess_unrelated")
EFFECTS = ("target_logprob_delta", "advantage", "kl", "log_perplexity_delta")
SUMS = ("n_own", "own", "counterfactual_units", "matched_n_own", "matched_own", "unrelated_units")
"""Columns of `sql/steering/reactivation_sums.sql` that scores are made of, in the order that `scores_of` wants."""

UNIT = float(1 << 32)
FEWEST = 2
"""Cases or experiments that an interval needs."""

GROUPS_AT_ONCE = 256
"""Groups that are resampled together: bounds the memory, and changes no interval."""


def case_sums(connection: Any) -> pa.Table:
    """`sql/steering/reactivation_sums.sql`, from a connection that has `reactivation_positions`."""
    return _selected(connection, "reactivation_sums")


def experiment_effects(connection: Any) -> pa.Table:
    """`sql/steering/experiment_effects.sql`, from a connection that has `steering`."""
    return _selected(connection, "experiment_effects")


def score_intervals(sums: pa.Table, resamples: int) -> pa.Table:
    """95 % intervals of all scores, by case, of what `case_sums` gives.

    Returns:
        `layer`, `kind`, `token` and both ends of each score; null with fewer than 2 cases.
    """
    groups, counts = by_unit(sums, ("layer", "kind", "token"), ("case",), SUMS)
    ends = _ends(counts, scores_of, len(SCORES), resamples)
    ends[_few(counts, "n_own")] = np.nan
    for score in ("unrelated", "excess_unrelated"):
        ends[_few(counts, "matched_n_own"), SCORES.index(score)] = np.nan
    return _table(groups, {"layer": pa.int32(), "kind": pa.string(), "token": pa.string()}, SCORES, ends)


def effect_intervals(effects: pa.Table, resamples: int) -> pa.Table:
    """95 % intervals of all effects, by experiment, of what `experiment_effects` gives.

    Returns:
        `mode`, `place`, `control`, `strength` and both ends of each effect; null with fewer than 2 experiments.
    """
    groups, values = by_experiment(effects)
    known = np.isfinite(values)
    counts = np.concatenate([np.where(known, values, 0.0), known], axis=2)
    ends = _ends(counts, means_of, len(EFFECTS), resamples)
    ends[known.sum(axis=0) < FEWEST] = np.nan
    names = {"mode": pa.string(), "place": pa.string(), "control": pa.string(), "strength": pa.float64()}
    return _table(groups, names, EFFECTS, ends)


def scores_of(sums: Floats) -> Floats:
    """(…, 5) scores of (…, 6) sums, columns as in `SUMS`; NaN where there is no chance."""
    n, own, counterfactual, matched_n, matched_own, unrelated = np.moveaxis(sums, -1, 0)
    counterfactual, unrelated = counterfactual / UNIT, unrelated / UNIT
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [
            own / n,
            counterfactual / n,
            unrelated / matched_n,
            (own - counterfactual) / n,
            (matched_own - unrelated) / matched_n,
        ]
    return np.stack(found, axis=-1)


def means_of(sums: Floats) -> Floats:
    """(…, k) means of (…, 2 k) sums and numbers of addends; NaN where there are none."""
    k = sums.shape[-1] // 2
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = sums[..., :k] / sums[..., k:]
    return means


def _selected(connection: Any, table: str) -> pa.Table:
    return pa.table(connection.execute(read_sql(table)).fetchnumpy())


def by_unit(
    rows: pa.Table,
    group_columns: Sequence[str],
    unit_columns: Sequence[str],
    value_columns: Sequence[str],
    absent: float = 0.0,
) -> tuple[list[tuple[Any, ...]], Floats]:
    """Values of each group of rows and each of the units that are drawn.

    Args:
        rows: One row a group and unit, which these columns name.
        absent: Value of a unit that a group lacks.

    Returns:
        The groups, in order of appearance, and (units, groups, values), units in sorted order.
    """
    group_keys = list(zip(*(rows[name].to_pylist() for name in group_columns), strict=True))
    unit_keys = list(zip(*(rows[name].to_pylist() for name in unit_columns), strict=True))
    groups = {key: place for place, key in enumerate(dict.fromkeys(group_keys))}
    units = {key: place for place, key in enumerate(sorted(set(unit_keys)))}
    counts = np.full((len(units), len(groups), len(value_columns)), absent)
    at = ([units[key] for key in unit_keys], [groups[key] for key in group_keys])
    for column, name in enumerate(value_columns):
        values = pa.array(rows[name].to_pylist(), pa.float64())
        counts[(*at, column)] = values.to_numpy(zero_copy_only=False)
    return list(groups), counts


def by_experiment(effects: pa.Table) -> tuple[list[tuple[Any, ...]], Floats]:
    """The same of `EFFECTS` in each setting and experiment; NaN where an experiment lacks it."""
    settings, experiment = ("mode", "place", "control", "strength"), ("case", "prompt", "target")
    return by_unit(effects, settings, experiment, EFFECTS, absent=np.nan)


def _few(counts: Floats, column: str) -> npt.NDArray[np.intp]:
    """Groups in which too few cases have what the column counts."""
    return np.flatnonzero((counts[:, :, SUMS.index(column)] > 0).sum(axis=0) < FEWEST)


def _ends(counts: Floats, statistic: Any, k: int, resamples: int) -> Floats:
    """(groups, k, 2) ends of (units, groups, columns) counts."""
    units, n, columns = counts.shape
    ends = np.full((n, k, 2), np.nan)
    for first in range(0, n, GROUPS_AT_ONCE):
        part = counts[:, first : first + GROUPS_AT_ONCE]
        width = part.shape[1]

        def of_flat(sums: Floats, width: int = width) -> Floats:
            found: Floats = statistic(sums.reshape(len(sums), width, columns)).reshape(len(sums), width * k)
            return found

        flat = bootstrap(part.reshape(units, width * columns), of_flat, resamples)
        ends[first : first + width] = flat.reshape(width, k, 2)
    return ends


def _table(
    groups: Sequence[tuple[Any, ...]], names: dict[str, pa.DataType], values: Sequence[str], ends: Floats
) -> pa.Table:
    columns = {
        name: pa.array([key[place] for key in groups], kind)
        for place, (name, kind) in enumerate(names.items())
    }
    for place, value in enumerate(values):
        for end, suffix in enumerate(("_low", "_high")):
            columns[f"{value}{suffix}"] = pa.array(ends[:, place, end], pa.float64(), from_pandas=True)
    return pa.table(columns)
