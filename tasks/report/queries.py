"""How sections ask DuckDB. It aggregates; only thinned rows come back.

Whatever has to be summed is summed as integers and medians are exact, so that the numbers do not depend on the order in
which DuckDB's threads finish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

LOG_SCALE = 1_000_000
RESAMPLES = 1000
DEGREE_BINS = 12
"""Bins of rank per e-fold where degrees are drawn."""


def rows(connection: Any, query: str, parameters: Any = None) -> list[dict[str, Any]]:
    """A query's rows by the names of their columns; a number that is not finite is null."""
    found = connection.execute(query, parameters)
    names = [column[0] for column in found.description]
    return [dict(zip(names, map(_finite, row), strict=True)) for row in found.fetchall()]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one(connection: Any, query: str, parameters: Any = None) -> dict[str, Any]:
    """The only row of a query."""
    (row,) = rows(connection, query, parameters)
    return row


def value(connection: Any, query: str, parameters: Any = None) -> Any:
    """The first value of a query's first row; None where there is no row."""
    row = connection.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def tables_of(connection: Any) -> set[str]:
    """Names of the tables and views that this connection has.

    A reader of the explorer knows them (`tables`), and makes a view only of those that are asked for.
    """
    known = getattr(connection, "tables", None)
    if known is not None:
        return set(known)
    return {row["table_name"] for row in rows(connection, "SELECT table_name FROM information_schema.tables")}


def told(connection: Any, key: str) -> str | None:
    """What the run says of itself under a key of `run_info`."""
    if "run_info" not in tables_of(connection):
        return None
    found: str | None = value(connection, "SELECT value FROM run_info WHERE key = ?", [key])
    return found


def resamples_of(connection: Any, section: str) -> int:
    """Bootstrap resamples of this run’s own intervals, as a section of its settings says."""
    return int(told(connection, f"{section}_resamples") or RESAMPLES)


def rank_bin(rank: str = "rank", per_e_fold: int = 40) -> str:
    """SQL for the number of a log-spaced bin; ranks up to `per_e_fold` have a bin of their own."""
    return f"CAST(floor(ln({rank}) * {per_e_fold}) AS INTEGER)"


def percentiles(of: str) -> str:
    """SQL columns `n, low, median, high` of a bin: how many, and their 5th, 50th and 95th percentile."""
    return (
        f"count(*) AS n, quantile_cont({of}, 0.05) AS low, quantile_cont({of}, 0.5) AS median, "
        f"quantile_cont({of}, 0.95) AS high"
    )


@dataclass(frozen=True, kw_only=True)
class LineFit:
    """Least squares of ln y = `intercept` + `slope` · ln x over `n` points, and its R²."""

    n: int
    slope: float
    intercept: float
    r2: float


def line_sums(x: str, y: str) -> str:
    """SQL columns `n, sx, sy, sxx, sxy, syy` of ln x and ln y in millionths, exact whatever the order."""
    lx, ly = (f"CAST(round(ln({value}) * {LOG_SCALE}) AS HUGEINT)" for value in (x, y))
    return (
        f"count(*) AS n, sum({lx}) AS sx, sum({ly}) AS sy, sum({lx} * {lx}) AS sxx, "
        f"sum({lx} * {ly}) AS sxy, sum({ly} * {ly}) AS syy"
    )


def line_fit(sums: dict[str, Any]) -> LineFit | None:
    """The least-squares line of a row of `line_sums`; None where none is defined."""
    n, sx, sy, sxx, sxy, syy = (int(sums[name] or 0) for name in ("n", "sx", "sy", "sxx", "sxy", "syy"))
    var_x, var_y, cov = n * sxx - sx * sx, n * syy - sy * sy, n * sxy - sx * sy
    if var_x == 0 or var_y == 0:
        return None
    slope = cov / var_x
    return LineFit(
        n=n,
        slope=slope,
        intercept=(sy - slope * sx) / n / LOG_SCALE,
        r2=cov * cov / (var_x * var_y),
    )


def first_rows(connection: Any, query: str, most: int) -> tuple[list[dict[str, Any]], str]:
    """A query's first rows, and a note that there are more of them, where there are."""
    n = value(connection, f"SELECT count(*) FROM ({query})")
    note = f"The first {most:,} of {n:,}; the others are in the table." if n > most else ""
    return rows(connection, f"{query} LIMIT {most}"), note
