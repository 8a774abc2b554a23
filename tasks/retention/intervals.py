"""Intervals of retention's tables: 95 % percentile bootstrap over whole sequences (`tasks.report.bootstrap`).

The same sequences have the same draws under every setup, so intervals of two policies are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.tables import TABLES
from tasks.report.bootstrap import bootstrap

Floats = npt.NDArray[np.float64]

SETUP = ("policy", "budget", "protocol", "length")
UNIT = 2.0**-32


def prediction_intervals(connection: Any, resamples: int) -> pa.Table:
    """Of each setup the ends of perplexity ratio, KL and agreement."""
    found = connection.execute(
        f"SELECT {', '.join(SETUP)}, sequence, n, loss_units - full_loss_units AS delta, kl_units, agreed "
        "FROM readings JOIN shard_reading_sums USING (folder) ORDER BY ALL"
    ).fetchnumpy()

    def statistic(sums: Floats) -> Floats:
        n, delta, kl, agreed = sums.T
        return np.stack([np.exp(delta / n), kl / n, agreed / n], axis=1)

    rows = []
    for setup, here in _setups(found):
        n, delta, kl, agreed = (
            found[name][here].astype(np.float64) for name in ("n", "delta", "kl_units", "agreed")
        )
        ends = bootstrap(np.stack([n, delta * UNIT, kl * UNIT, agreed], axis=1), statistic, resamples)
        rows.append(setup | _named(("perplexity_ratio", "kl", "top1_agreement"), ends))
    return _table(
        rows,
        SETUP,
        [f"{name}_{end}" for name in ("perplexity_ratio", "kl", "top1_agreement") for end in _ENDS],
        "retention",
    )


def loss_intervals(connection: Any, resamples: int, *keys: str) -> pa.Table:
    """Of each setup, and group of predictions that `keys` tell apart, the ends of what a policy adds to the loss.

    Args:
        connection: With the views `readings` and `shard_reading_losses`.
        resamples: How many.
        keys: Of `bucket`, `position_from`, `position_to`; those left out are null.
    """
    every = ("bucket", "position_from", "position_to")
    found = connection.execute(
        f"SELECT {', '.join(SETUP)}, {', '.join(keys)}, sequence, sum(n)::DOUBLE AS n, "
        "sum(loss_units - full_loss_units)::DOUBLE AS delta "
        "FROM readings JOIN shard_reading_losses USING (folder) GROUP BY ALL ORDER BY ALL"
    ).fetchnumpy()
    rows = []
    for setup, here in _setups(found):
        groups = list(zip(*(found[key][here].tolist() for key in keys), strict=True))
        names = sorted(set(groups))
        place = np.array([names.index(group) for group in groups])
        sequences, row = np.unique(found["sequence"][here], return_inverse=True)
        sums = np.zeros((len(sequences), 2, len(names)))
        sums[row, 0, place] = found["n"][here]
        sums[row, 1, place] = found["delta"][here] * UNIT
        ends = bootstrap(sums.reshape(len(sequences), -1), _ratios(len(names)), resamples)
        rows += [
            setup | dict(zip(keys, group, strict=True)) | _named(("delta_nll",), ends[number : number + 1])
            for number, group in enumerate(names)
        ]
    return _table(rows, (*SETUP, *every), ["delta_nll_low", "delta_nll_high"], "retention_losses")


def layer_intervals(connection: Any, resamples: int) -> pa.Table:
    """Of each setup and layer the ends of error, carried error and retained mass."""
    found = connection.execute(
        f"SELECT {', '.join(SETUP)}, layer, sequence, error, local_error, retained_mass "
        "FROM readings JOIN shard_reading_layers USING (folder) ORDER BY ALL"
    ).fetchnumpy()
    names = ("error", "local_error", "retained_mass")

    def statistic(sums: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            error, local, mass = (sums[:, place] / sums[:, place + 3] for place in range(3))
            carried = np.where(local > 0, error / local, np.nan)
        return np.stack([error, carried, mass], axis=1)

    rows = []
    # What is null comes masked.
    numbers: Floats = np.stack(
        [np.ma.filled(np.ma.asarray(found[name], float), np.nan) for name in names], axis=1
    )
    for setup, here in _setups(found):
        for layer in np.unique(found["layer"][here]):
            values = numbers[here & (found["layer"] == layer)]
            known = np.isfinite(values)
            sums = np.concatenate([np.where(known, values, 0), known.astype(np.float64)], axis=1)
            ends = bootstrap(sums, statistic, resamples)
            rows.append(setup | {"layer": int(layer)} | _named(("error", "carried", "retained_mass"), ends))
    wanted = [f"{name}_{end}" for name in ("error", "carried", "retained_mass") for end in _ENDS]
    return _table(rows, (*SETUP, "layer"), wanted, "retention_layers")


def survival_intervals(connection: Any, resamples: int) -> pa.Table:
    """Of each setup, kind, tier and age, layers together, the ends of survival, and of its ratio to `random`'s.

    A resample has the same sequences under both policies.

    Args:
        connection: With the views `readings` and `shard_reading_survival`.
        resamples: How many.
    """
    keys = (*SETUP, "kind", "tier")
    found = connection.execute(
        f"SELECT {', '.join(keys)}, sequence, age, sum(at_risk)::DOUBLE, sum(died)::DOUBLE "
        "FROM readings JOIN shard_reading_survival USING (folder) GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    curves: dict[tuple[Any, ...], dict[int, dict[int, tuple[float, float]]]] = {}
    for *key, sequence, age, at_risk, died in found:
        curves.setdefault(tuple(key), {}).setdefault(sequence, {})[age] = at_risk, died
    rows = []
    for key, own in curves.items():
        random = curves.get(("random", *key[1:-1], "hot"), {})
        ages = sorted({age for of in own.values() for age in of})
        sums = np.array(
            [
                [[of.get(sequence, {}).get(age, (0, 0)) for age in ages] for of in (own, random)]
                for sequence in own
            ],
            dtype=np.float64,
        )
        ends = bootstrap(sums.reshape(len(own), -1), _survivals(len(ages)), resamples)
        rows += [
            dict(zip(keys, key, strict=True))
            | {"age": age}
            | _named(("survival", "ratio_to_random"), ends[[place, len(ages) + place]])
            for place, age in enumerate(ages)
        ]
    wanted = [f"{name}_{end}" for name in ("survival", "ratio_to_random") for end in _ENDS]
    return _table(rows, (*keys, "age"), wanted, "retention_curves")


def _survivals(ages: int) -> Callable[[Floats], Floats]:
    """Survival at each age, then its ratio to random's; NaN from where a resample has nobody at risk on."""

    def statistic(sums: Floats) -> Floats:
        at_risk, died = np.moveaxis(sums.reshape(-1, 2, ages, 2), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            survival = np.cumprod(1 - died / at_risk, axis=-1)
            ratio = survival[:, 0] / survival[:, 1]
        return np.concatenate([survival[:, 0], ratio], axis=1)

    return statistic


_ENDS = ("low", "high")


def _ratios(k: int) -> Callable[[Floats], Floats]:
    def statistic(sums: Floats) -> Floats:
        n, delta = sums[:, :k], sums[:, k:]
        # A group that a resample has none of has no mean.
        with np.errstate(divide="ignore", invalid="ignore"):
            means: Floats = np.where(n > 0, delta / n, np.nan)
        return means

    return statistic


def _setups(found: dict[str, Any]) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.bool_]]]:
    """Each setup that has rows, and which rows are its own."""
    every = list(zip(*(found[name].tolist() for name in SETUP), strict=True))
    for setup in sorted(set(every)):
        here = np.array([other == setup for other in every])
        yield dict(zip(SETUP, setup, strict=True)), here


def _named(names: Sequence[str], ends: Floats) -> dict[str, float | None]:
    return {
        f"{name}_{end}": float(value) if np.isfinite(value) else None
        for name, pair in zip(names, ends, strict=True)
        for end, value in zip(_ENDS, pair, strict=True)
    }


def _table(rows: list[dict[str, Any]], keys: Sequence[str], columns: Sequence[str], like: str) -> pa.Table:
    schema = pa.schema([TABLES[like].field(name) for name in (*keys, *columns)])
    return pa.Table.from_pylist(rows, schema=schema)
