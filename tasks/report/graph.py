"""What the report asks of the graph tables. DuckDB aggregates; only thinned rows come back."""

from __future__ import annotations

import math
from typing import Any

from tasks.report.corpus import line_fit, line_sums, rank_bin
from tasks.report.rows import CoveragePoint, DegreeBin, DegreeFit, LayerCoverage, Rarefaction, RarefiedPoint
from tasks.report.text import label, shared_texts

DEGREE_BINS = 12


def degree_bins(connection: Any) -> list[DegreeBin]:
    """Degrees by log-spaced bins of rank, over the tokens that have an edge."""
    rows = connection.execute(
        f"""
        SELECT layer, CAST(quantile_disc(rank, 0.5) AS BIGINT) AS rank, count(*),
               quantile_cont(degree, 0.05), quantile_cont(degree, 0.5), quantile_cont(degree, 0.95)
        FROM token_degree WHERE degree > 0
        GROUP BY layer, {rank_bin(per_e_fold=DEGREE_BINS)} ORDER BY layer, rank
        """
    ).fetchall()
    return [
        DegreeBin(layer=layer, rank=rank, n=n, low=low, median=median, high=high)
        for layer, rank, n, low, median, high in rows
    ]


def degree_fits(connection: Any) -> list[DegreeFit]:
    """The straight lines of ln degree against ln rank, and the published power law, one a layer."""
    bins = f"""
        SELECT layer, quantile_disc(rank, 0.5) AS rank, quantile_cont(degree, 0.5) AS degree
        FROM token_degree WHERE degree > 0 GROUP BY layer, {rank_bin(per_e_fold=DEGREE_BINS)}
    """
    tokens = "SELECT layer, rank, degree FROM token_degree WHERE degree > 0"
    over_bins, over_tokens = (
        {
            layer: line_fit(tuple(sums))
            for layer, *sums in connection.execute(
                f"SELECT layer, {line_sums('rank', 'degree')} FROM ({source}) GROUP BY layer"
            ).fetchall()
        }
        for source in (bins, tokens)
    )
    rows = connection.execute("SELECT layer, alpha, xmin, ks FROM graph_summary ORDER BY layer").fetchall()
    return [
        DegreeFit(
            layer=layer,
            line=over_bins.get(layer),
            tokens=over_tokens.get(layer),
            alpha=_number(alpha),
            xmin=_number(xmin),
            ks=_number(ks),
        )
        for layer, alpha, xmin, ks in rows
    ]


def coverage_points(connection: Any) -> list[CoveragePoint]:
    """The coverage curve of each layer: the first ten ranks, log-spaced ones after them, and the last."""
    rows = connection.execute(
        f"""
        SELECT layer, min(rank) AS rank, arg_min(coverage, rank), arg_min(dictionary_coverage, rank)
        FROM coverage WHERE coverage IS NOT NULL GROUP BY layer, {rank_bin(per_e_fold=20)}
        UNION
        SELECT layer, max(rank), arg_max(coverage, rank), arg_max(dictionary_coverage, rank)
        FROM coverage WHERE coverage IS NOT NULL GROUP BY layer
        ORDER BY layer, rank
        """
    ).fetchall()
    return [
        CoveragePoint(layer=layer, rank=rank, coverage=share, dictionary_coverage=of_all)
        for layer, rank, share, of_all in rows
    ]


def layer_coverage(connection: Any) -> list[LayerCoverage]:
    """What the ten most frequent tokens and the function tokens reach, one row a layer."""
    rows = connection.execute(
        """
        SELECT c.layer, any_value(g.activated_features), any_value(g.dictionary_size),
               coalesce(max(c.coverage) FILTER (c.rank <= 10), 0),
               coalesce(max(c.coverage) FILTER (c.rank <= f.last), 0),
               min(c.rank) FILTER (c.coverage > 0.5)
        FROM coverage AS c
        JOIN graph_summary AS g USING (layer)
        CROSS JOIN (SELECT coalesce(max(rank), 0) AS last FROM tokens WHERE is_function) AS f
        GROUP BY c.layer ORDER BY c.layer
        """
    ).fetchall()
    return [
        LayerCoverage(
            layer=layer,
            activated_features=activated,
            dictionary_size=size,
            top10=top10,
            function=function,
            half_rank=half_rank,
        )
        for layer, activated, size, top10, function, half_rank in rows
    ]


def top_coverage(connection: Any, ranks: int = 10) -> list[tuple[int, str, dict[int, float]]]:
    """The paper's coverage table: rank, label of the token, and each layer's cumulative coverage."""
    shared = shared_texts(connection)
    found: dict[int, tuple[str, dict[int, float]]] = {}
    for rank, token, token_id, layer, coverage in connection.execute(
        "SELECT rank, token, token_id, layer, coverage FROM coverage WHERE rank <= ? ORDER BY rank, layer",
        [ranks],
    ).fetchall():
        found.setdefault(rank, (label(token, token_id, shared), {}))[1][layer] = coverage
    return [(rank, shown, by_layer) for rank, (shown, by_layer) in found.items()]


def rarefied_points(connection: Any) -> list[RarefiedPoint]:
    """Rarefied against raw degree, tokens of nearly equal degree together, function and content apart."""
    rows = connection.execute(
        f"""
        SELECT layer, is_function, count(*), quantile_cont(degree, 0.5) AS degree,
               quantile_cont(rarefied_degree, 0.5)
        FROM token_degree WHERE degree > 0 AND rarefied_degree > 0
        GROUP BY layer, is_function, {rank_bin("degree", per_e_fold=30)}
        ORDER BY layer, is_function, degree
        """
    ).fetchall()
    return [
        RarefiedPoint(layer=layer, is_function=flag, n=n, degree=degree, rarefied_degree=rarefied)
        for layer, flag, n, degree, rarefied in rows
    ]


def rarefactions(connection: Any) -> list[Rarefaction]:
    """Medians and Spearman correlations at m occurrences, one row a layer.

    Tied values share their mean rank; twice that rank is an integer, so the sums are exact.
    """
    rows = connection.execute(
        """
        WITH ranked AS (
          SELECT layer, m, is_function, rarefied_degree,
                 2 * rank() OVER (PARTITION BY layer ORDER BY count)
                   + count(*) OVER (PARTITION BY layer, count) - 1 AS x,
                 2 * rank() OVER (PARTITION BY layer ORDER BY degree)
                   + count(*) OVER (PARTITION BY layer, degree) - 1 AS raw,
                 2 * rank() OVER (PARTITION BY layer ORDER BY rarefied_degree)
                   + count(*) OVER (PARTITION BY layer, rarefied_degree) - 1 AS fair
          FROM token_degree WHERE rarefied_degree IS NOT NULL
        )
        SELECT layer, any_value(m), count(*) FILTER (is_function), count(*) FILTER (NOT is_function),
               quantile_cont(rarefied_degree, 0.5) FILTER (is_function),
               quantile_cont(rarefied_degree, 0.5) FILTER (NOT is_function),
               count(*), sum(x), sum(CAST(x AS HUGEINT) * x), sum(raw), sum(CAST(raw AS HUGEINT) * raw),
               sum(CAST(x AS HUGEINT) * raw), sum(fair), sum(CAST(fair AS HUGEINT) * fair),
               sum(CAST(x AS HUGEINT) * fair)
        FROM ranked GROUP BY layer ORDER BY layer
        """
    ).fetchall()
    found: list[Rarefaction] = []
    for layer, m, n_function, n_content, function, content, *sums in rows:
        n, sx, sxx, sr, srr, sxr, sf, sff, sxf = (int(value) for value in sums)
        found.append(
            Rarefaction(
                layer=layer,
                m=m,
                n_function=n_function,
                n_content=n_content,
                function_median=function,
                content_median=content,
                raw_correlation=_correlation(n, sx, sxx, sr, srr, sxr),
                rarefied_correlation=_correlation(n, sx, sxx, sf, sff, sxf),
            )
        )
    return found


def _correlation(n: int, sx: int, sxx: int, sy: int, syy: int, sxy: int) -> float | None:
    var_x, var_y = n * sxx - sx * sx, n * syy - sy * sy
    return None if var_x == 0 or var_y == 0 else (n * sxy - sx * sy) / math.sqrt(var_x * var_y)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
