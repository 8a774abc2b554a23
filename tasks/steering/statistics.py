"""The numbers that the paper's claims on reactivation and steering are tested by, each with a 95 % interval.

Intervals are percentiles over resamples of whole cases, or of whole experiments (`tasks.report.bootstrap`), the same
for all kinds of tokens, places and controls, so differences are paired: what makes a case or a prompt easy cancels.
What is tested is fixed beforehand, not picked by its outcome: all layers together, and the middle strength.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.report.bootstrap import estimates
from tasks.report.queries import resamples_of
from tasks.report.vocabulary import Estimate
from tasks.steering.intervals import (
    EFFECTS,
    FEWEST,
    SCORES,
    SUMS,
    by_unit,
    case_sums,
    experiment_effects,
    means_of,
    scores_of,
)
from tasks.steering.rows import effect_rows, score_rows
from tasks.steering.values import EffectRow, ModeEffects, Reactivation, Steered

Floats = npt.NDArray[np.float64]
Setting = tuple[str, str, str, float]

KINDS = ("function", "content")
LAST, CONTENT = "last function token", "content token"

_EXCESS, _GAIN, _ADVANTAGE = (
    SCORES.index("excess"),
    EFFECTS.index("target_logprob_delta"),
    EFFECTS.index("advantage"),
)


def measure_reactivation(connection: Any, resamples: int | None = None) -> Reactivation | None:
    """All layers together, from a connection of `infra.duck.connect`; None where no case has own features.

    Args:
        connection: The connection, with the table `reactivation_positions`.
        resamples: Of the cases; None: as many as the run's own intervals have.
    """
    resamples = resamples or resamples_of(connection, "steering")
    sums = case_sums(connection)
    sums = sums.filter([token is None for token in sums["token"].to_pylist()])
    if not len(sums):
        return None
    groups, counts = by_unit(sums, ("layer", "kind"), ("case",), SUMS)
    pooled = np.zeros((len(counts), len(KINDS), len(SUMS)))
    for place, (_, kind) in enumerate(groups):
        pooled[:, KINDS.index(kind)] += counts[:, place]
    has_kind = (pooled[:, :, SUMS.index("n_own")] > 0).sum(axis=0)

    def measured(flat: Floats) -> Floats:
        found = scores_of(flat.reshape(len(flat), len(KINDS), len(SUMS)))
        difference = found[:, 0, _EXCESS] - found[:, 1, _EXCESS]
        return np.column_stack([found.reshape(len(flat), -1), difference])

    *scores, difference = estimates(pooled.reshape(len(pooled), -1), measured, resamples)
    if has_kind.min() < FEWEST:
        difference = _without_interval(difference)
    kinds = {}
    for place, kind in enumerate(KINDS):
        mine = scores[place * len(SCORES) : (place + 1) * len(SCORES)]
        enough = has_kind[place] >= FEWEST
        kinds[kind] = dict(
            zip(SCORES, mine if enough else [_without_interval(value) for value in mine], strict=True)
        )
    (n_relations,) = connection.execute(
        "SELECT count(DISTINCT relation) FROM reactivation_positions WHERE n_own > 0"
    ).fetchone()
    return Reactivation(
        n_cases=len(pooled),
        n_relations=n_relations,
        layers=tuple(sorted({layer for layer, _ in groups})),
        kinds=kinds,
        difference=difference,
        by_layer=tuple(row for row in score_rows(connection) if row.token is None),
    )


def measure_steering(connection: Any, resamples: int | None = None) -> Steered:
    """Each mode at its middle strength, from a connection that has the table `steering`.

    Args:
        connection: Of `infra.duck.connect`.
        resamples: Of the experiments; None: as many as the run's own intervals have.
    """
    resamples = resamples or resamples_of(connection, "steering")
    effects = experiment_effects(connection)
    groups, values = by_unit(
        effects,
        ("mode", "place", "control", "strength"),
        ("case", "prompt", "target"),
        EFFECTS,
        absent=math.nan,
    )
    of = {group: values[:, place] for place, group in enumerate(groups)}
    rows = effect_rows(connection)
    layers = connection.execute("SELECT DISTINCT layer FROM steering ORDER BY layer").fetchall()
    return Steered(
        n_experiments=len(values),
        layers=[layer for (layer,) in layers],
        modes=[
            _mode(mode, strength, of, rows, resamples)
            for mode in sorted({group[0] for group in groups})
            if (strength := middle_strength([g[3] for g in groups if g[:3] == (mode, LAST, "trait")]))
            is not None
        ],
    )


def middle_strength(strengths: Sequence[float]) -> float | None:
    """The median of the strengths above 0, the lower of two; None where there is none."""
    swept = sorted({strength for strength in strengths if strength > 0})
    return swept[(len(swept) - 1) // 2] if swept else None


def _mode(
    mode: str, strength: float, of: dict[Setting, Floats], rows: Sequence[EffectRow], resamples: int
) -> ModeEffects:
    last = of[mode, LAST, "trait", strength]
    nowhere = np.full_like(last, np.nan)
    content = of.get((mode, CONTENT, "trait", strength), nowhere)
    gain, advantage = last[:, _GAIN], last[:, _ADVANTAGE]
    difference = gain - content[:, _GAIN]
    mine = [row for row in rows if (row.mode, row.place, row.control) == (mode, LAST, "trait")]
    return ModeEffects(
        mode=mode,
        strength=strength,
        n=int(np.isfinite(gain).sum()),
        gain=_mean(gain, resamples),
        advantage=_mean(advantage, resamples),
        n_paired=int(np.isfinite(difference).sum()),
        difference=_mean(difference, resamples),
        best=max(mine, key=lambda row: (row.effects["target_logprob_delta"].value, -row.strength)),
    )


def _mean(values: Floats, resamples: int) -> Estimate:
    """Mean of the values that are there."""
    known = np.isfinite(values)
    counts = np.column_stack([np.where(known, values, 0.0), known])
    (found,) = estimates(counts, means_of, resamples)
    return found if known.sum() >= FEWEST else _without_interval(found)


def _without_interval(found: Estimate) -> Estimate:
    return Estimate(value=found.value, low=math.nan, high=math.nan)
