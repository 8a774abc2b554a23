"""The report's sections on the token-feature graph (PAPER 1.2): degree, coverage, degree at equal frequency."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tasks.models.token_texts import label, shared_texts, visible
from tasks.report import charts
from tasks.report.charts import KINDS, Spec
from tasks.report.corpus import KIND, last_function_rank
from tasks.report.queries import (
    DEGREE_BINS,
    line_fit,
    line_sums,
    one,
    percentiles,
    rank_bin,
    rows,
    tables_of,
    value,
)
from tasks.report.text import integer, layers_told, listed, percent, signed
from tasks.report.vocabulary import Chart, Column, Finding, Row, Section, Table, holds

TABLES = {"token_degree", "coverage", "graph_summary"}
NO_GRAPH = (
    "The graph’s tables are not published yet. Give the configuration an [[sae]] entry for each layer, then run "
    "“functok run CONFIG”; this section appears when its last stage, report, has finished."
)
NO_EDGES = (
    "No token activated a feature at any layer. Look at the dictionaries below: do they fit this model and "
    "these layers?"
)

STRAIGHT = 0.95
SATURATED = 0.95
TOP = 10

# arXiv 2510.08203, cumulative share of the activated features: Gemma2-9B, layers 9, 20 and 31.
PAPER_LAYERS = (9, 20, 31)
PAPER_COVERAGE: tuple[tuple[int, str, tuple[float, float, float]], ...] = (
    (1, ".", (0.2319, 0.5132, 0.3721)),
    (2, ",", (0.3201, 0.6245, 0.4978)),
    (3, "the", (0.3688, 0.6693, 0.5515)),
    (4, "\n", (0.3968, 0.7130, 0.5986)),
    (5, "and", (0.4121, 0.7197, 0.6148)),
    (6, "to", (0.4316, 0.7307, 0.6330)),
    (7, "of", (0.4600, 0.7443, 0.6516)),
    (8, " ", (0.4744, 0.7570, 0.6708)),
    (9, "a", (0.4796, 0.7612, 0.6774)),
    (10, "in", (0.4852, 0.7646, 0.6827)),
)


def facts(connection: Any) -> list[tuple[str, str]]:
    """The graph in numbers, for the head of the report; none where it is not published."""
    if not tables_of(connection) >= TABLES:
        return []
    summary = one(
        connection,
        "SELECT count(*) AS layers, CAST(sum(n_edges) AS BIGINT) AS edges, max(n_tokens) AS tokens FROM graph_summary",
    )
    names = {"layers": "layers", "edges": "edges", "tokens": "tokens in the graph"}
    return [(name, integer(summary[key])) for key, name in names.items()]


def sections(connection: Any, *, is_expected: bool = True) -> list[Callable[[], Section]]:
    """What builds each section; one that says what is missing where there is no graph or it has no edge.

    Args:
        connection: Of `infra.duck.connect`.
        is_expected: Whether a graph that is not published is missed.
    """
    is_published = tables_of(connection) >= TABLES
    if is_published and value(connection, "SELECT max(n_edges) FROM graph_summary"):
        return [functools.partial(build, connection) for build in (_degree, _coverage, _rarefied)]
    missing = NO_EDGES if is_published else NO_GRAPH
    nothing = Section(key="graph", title="Token-feature graph: degree and coverage", missing=missing)
    return [lambda: nothing] if is_published or is_expected else []


def findings(connection: Any) -> list[Finding]:
    """The sections' findings by themselves, titled; none where there is no graph or it has no edge."""
    if not tables_of(connection) >= TABLES or not value(connection, "SELECT max(n_edges) FROM graph_summary"):
        return []
    measured = rarefactions(connection)
    return [
        replace(is_straight(degree_fits(connection)), title="Degree falls with rank along a straight line"),
        replace(reaches_half(layer_coverage(connection)), title="Ten tokens reach most features"),
        *([replace(is_left_when_rarefied(measured), title="Degree at equal frequency")] if measured else []),
    ]


def _degree(connection: Any) -> Section:
    fits = degree_fits(connection)
    slopes = [f"{signed(fit['slope'])} at layer {fit['layer']}" for fit in fits if fit["slope"] is not None]
    return Section(
        key="degree",
        title="Degree against rank",
        shows="How many distinct features a token activated, against its frequency rank: medians of neighbouring "
        "ranks, a band from their 5th to their 95th percentile, and the straight line through the medians.",
        charts=[
            Chart(
                spec=degree_rank(degree_bins(connection), fits),
                alt="One panel a layer, logarithmic axes: degree falls with frequency rank; fitted slopes "
                f"{', '.join(slopes)}.",
            )
        ],
        findings=[is_straight(fits)],
        tables=[fits_table(fits), summary_table(connection)],
    )


def _coverage(connection: Any) -> Section:
    layers = layer_coverage(connection)
    reached = [f"{percent(layer['top10'])} at layer {layer['layer']}" for layer in layers]
    return Section(
        key="coverage",
        title="Coverage",
        shows="The share of the activated features that the tokens up to a rank have activated, one curve a layer.",
        charts=[
            Chart(
                spec=coverage_curves(coverage_points(connection), last_function_rank(connection)),
                alt="Rising curves of cumulative coverage against frequency rank; the ten most frequent tokens reach "
                f"{', '.join(reached)}.",
            )
        ],
        findings=[reaches_half(layers)],
        tables=[coverage_table(connection), paper_coverage_table()],
    )


def _rarefied(connection: Any) -> Section:
    key, title, measured = "rarefied", "Degree at equal frequency", rarefactions(connection)
    points = rarefied_points(connection)
    if not points:
        return Section(
            key=key,
            title=title,
            missing="No token occurs often enough to be rarefied. Lower graph.rarefaction_m, or put more tokens into "
            "the graph, and run again.",
        )
    m = integer(measured[0]["m"])
    return Section(
        key=key,
        title=title,
        shows="A token that occurs more often has had more chances to activate features. The rarefied degree is the "
        f"degree expected from {m} of its occurrences, drawn without replacement "
        "(Σ over features of 1 − C(N−n, m) / C(N, m)), so that frequent and rare tokens compare fairly.",
        charts=[
            Chart(
                spec=rarefied_degree(points),
                alt=f"One panel a layer, logarithmic axes: degree at {m} occurrences against raw degree, function and "
                "content tokens apart.",
            )
        ],
        findings=[is_left_when_rarefied(measured)],
        tables=[rarefaction_table(measured)],
    )


# What the tables say.


def degree_bins(connection: Any) -> list[dict[str, Any]]:
    """Percentiles of degrees by layer and log-spaced bins of rank, over the tokens that have an edge."""
    return rows(
        connection,
        f"""
        SELECT layer, CAST(quantile_disc(rank, 0.5) AS BIGINT) AS rank, {percentiles("degree")}
        FROM token_degree WHERE degree > 0
        GROUP BY layer, {rank_bin(per_e_fold=DEGREE_BINS)} ORDER BY layer, rank
        """,
    )


def degree_fits(connection: Any) -> list[dict[str, Any]]:
    """The straight lines of ln degree against ln rank, and the published power law, one row a layer.

    Returns:
        `layer`; `slope`, `intercept` and `r2` of the line through the medians of log-spaced bins of rank, so that
        every decade weighs the same, and `n`, its bins; the same of single tokens, where the many rare ones decide,
        as `token_slope` and so on; null where no line is defined. `alpha`, `xmin`, `ks`: the power law.
    """
    bins = f"""
        SELECT layer, quantile_disc(rank, 0.5) AS rank, quantile_cont(degree, 0.5) AS degree
        FROM token_degree WHERE degree > 0 GROUP BY layer, {rank_bin(per_e_fold=DEGREE_BINS)}
    """
    tokens = "SELECT layer, rank, degree FROM token_degree WHERE degree > 0"
    over_bins, over_tokens = (
        {
            sums["layer"]: line_fit(sums)
            for sums in rows(
                connection, f"SELECT layer, {line_sums('rank', 'degree')} FROM ({source}) GROUP BY layer"
            )
        }
        for source in (bins, tokens)
    )

    def lines(layer: int) -> dict[str, float | None]:
        return {
            f"{prefix}{name}": None if (line := of.get(layer)) is None else getattr(line, name)
            for prefix, of in (("", over_bins), ("token_", over_tokens))
            for name in ("n", "slope", "intercept", "r2")
        }

    laws = rows(connection, "SELECT layer, alpha, xmin, ks FROM graph_summary ORDER BY layer")
    return [law | lines(law["layer"]) for law in laws]


def coverage_points(connection: Any) -> list[dict[str, Any]]:
    """The coverage curve of each layer: the first ten ranks, log-spaced ones after them, and the last."""
    return rows(
        connection,
        f"""
        SELECT layer, min(rank) AS rank, arg_min(coverage, rank) AS coverage
        FROM coverage WHERE coverage IS NOT NULL GROUP BY layer, {rank_bin(per_e_fold=20)}
        UNION
        SELECT layer, max(rank), arg_max(coverage, rank)
        FROM coverage WHERE coverage IS NOT NULL GROUP BY layer
        ORDER BY layer, rank
        """,
    )


def layer_coverage(connection: Any) -> list[dict[str, Any]]:
    """What the ten most frequent tokens (`top10`) and all function tokens (`function`) reach, one row a layer."""
    return rows(
        connection,
        f"""
        SELECT c.layer, any_value(g.activated_features) AS activated_features,
               any_value(g.dictionary_size) AS dictionary_size,
               coalesce(max(c.coverage) FILTER (c.rank <= {TOP}), 0) AS top10,
               coalesce(max(c.coverage) FILTER (c.rank <= f.last), 0) AS function
        FROM coverage AS c
        JOIN graph_summary AS g USING (layer)
        CROSS JOIN (SELECT coalesce(max(rank), 0) AS last FROM tokens WHERE is_function) AS f
        GROUP BY c.layer ORDER BY c.layer
        """,
    )


def rarefied_points(connection: Any) -> list[dict[str, Any]]:
    """Rarefied against raw degree, tokens of nearly equal degree together, function and content apart."""
    return rows(
        connection,
        f"""
        SELECT layer, {KIND}, count(*) AS n, quantile_cont(degree, 0.5) AS degree,
               quantile_cont(rarefied_degree, 0.5) AS rarefied_degree
        FROM token_degree AS t WHERE t.degree > 0 AND t.rarefied_degree > 0
        GROUP BY layer, is_function, {rank_bin("t.degree", per_e_fold=30)}
        ORDER BY layer, is_function, 4
        """,
    )


def rarefactions(connection: Any) -> list[dict[str, Any]]:
    """Medians and Spearman correlations at m occurrences, one row a layer.

    Tied values share their mean rank; twice that rank is an integer, so the sums are exact.

    Returns:
        `layer`, `m`; `n_function` and `n_content`: tokens that occur at least m times; `function_median` and
        `content_median` of their rarefied degrees, and the `ratio` of these; Spearman's correlation of count with
        degree, `raw_correlation`, and with rarefied degree, `rarefied_correlation`. Null where not defined.
    """
    found = rows(
        connection,
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
        SELECT layer, any_value(m) AS m, count(*) FILTER (is_function) AS n_function,
               count(*) FILTER (NOT is_function) AS n_content,
               quantile_cont(rarefied_degree, 0.5) FILTER (is_function) AS function_median,
               quantile_cont(rarefied_degree, 0.5) FILTER (NOT is_function) AS content_median,
               count(*) AS n, sum(x) AS sx, sum(CAST(x AS HUGEINT) * x) AS sxx,
               sum(raw) AS sr, sum(CAST(raw AS HUGEINT) * raw) AS srr, sum(CAST(x AS HUGEINT) * raw) AS sxr,
               sum(fair) AS sf, sum(CAST(fair AS HUGEINT) * fair) AS sff, sum(CAST(x AS HUGEINT) * fair) AS sxf
        FROM ranked GROUP BY layer ORDER BY layer
        """,
    )
    return [
        row
        | {
            "ratio": row["function_median"] / row["content_median"]
            if row["function_median"] is not None and row["content_median"]
            else None,
            "raw_correlation": _correlation(*(row[key] for key in ("n", "sx", "sxx", "sr", "srr", "sxr"))),
            "rarefied_correlation": _correlation(
                *(row[key] for key in ("n", "sx", "sxx", "sf", "sff", "sxf"))
            ),
        }
        for row in found
    ]


def _correlation(*sums: int) -> float | None:
    n, sx, sxx, sy, syy, sxy = map(int, sums)
    var_x, var_y = n * sxx - sx * sx, n * syy - sy * sy
    return None if var_x == 0 or var_y == 0 else (n * sxy - sx * sy) / math.sqrt(var_x * var_y)


# Tables.


def coverage_table(connection: Any) -> Table:
    """Cumulative coverage by the ten most frequent tokens, one column a layer, as the paper has it."""
    shared = shared_texts(connection)
    found: dict[int, dict[str, Any]] = {}
    layers = [row["layer"] for row in rows(connection, "SELECT DISTINCT layer FROM coverage ORDER BY layer")]
    for row in rows(connection, f"SELECT * FROM coverage WHERE rank <= {TOP} ORDER BY rank, layer"):
        first = {"rank": row["rank"], "token": label(row["token"], row["token_id"], shared)}
        found.setdefault(row["rank"], first)[f"layer_{row['layer']}"] = row["coverage"]
    return Table(
        caption="Cumulative coverage of the activated features by the ten most frequent tokens",
        columns=_coverage_columns(layers),
        rows=list(found.values()),
    )


def paper_coverage_table() -> Table:
    """The same table as the paper published it."""
    return Table(
        caption="For comparison, the paper’s own numbers (not from this run)",
        columns=_coverage_columns(PAPER_LAYERS),
        rows=[
            {"rank": rank, "token": visible(token)}
            | {f"layer_{layer}": share for layer, share in zip(PAPER_LAYERS, shares, strict=True)}
            for rank, token, shares in PAPER_COVERAGE
        ],
        note="Gemma2-9B, Gemma Scope dictionaries of 2²⁰ features, 5 million tokens of SlimPajama: another "
        "model, corpus and dictionary width than here unless the run’s settings below say so.",
    )


def _coverage_columns(layers: Sequence[int]) -> list[Column]:
    return [
        Column("rank", "integer"),
        Column("token", "code"),
        *(Column(f"layer_{layer}", "percent") for layer in layers),
    ]


def summary_table(connection: Any) -> Table:
    """Each layer's graph in numbers."""
    return Table(
        caption="Graph summary",
        columns=[
            Column("layer", "plain"),
            Column("dictionary_size", "integer"),
            Column("activated_features", "integer"),
            Column("of_the_dictionary", "percent"),
            Column("n_tokens", "integer", "tokens"),
            Column("n_edges", "integer", "edges"),
            Column("mean_l0", "number", "mean L0"),
        ],
        rows=rows(
            connection,
            "SELECT *, activated_features / nullif(dictionary_size, 0) AS of_the_dictionary "
            "FROM graph_summary ORDER BY layer",
        ),
        note="The paper: over 900,000 features activated at each layer, over 87 % of the dictionary.",
    )


def fits_table(fits: Sequence[Row]) -> Table:
    """The straight lines of degree against rank, and the power law of the degrees."""
    return Table(
        caption="Fits of token degree",
        columns=[
            Column("layer", "plain"),
            Column("slope", "signed"),
            Column("r2", "signed", "R²", digits=3),
            Column("token_slope", "signed", "slope, single tokens"),
            Column("token_r2", "signed", "R², single tokens", digits=3),
            Column("alpha", "number"),
            Column("xmin", "number"),
            Column("ks", "number", "KS distance"),
        ],
        rows=fits,
        note="Slope and R²: least squares of ln degree on ln rank, over medians of log-spaced bins of rank, where "
        "every decade weighs the same, and over single tokens, where the many rare ones decide. Alpha, xmin and KS "
        "distance: the power law fitted to the distribution of degrees from xmin on (graph_summary).",
    )


def rarefaction_table(measured: Sequence[Row]) -> Table:
    """Degrees at an equal number of occurrences."""
    m = integer(measured[0]["m"])
    return Table(
        caption=f"Degree at {m} occurrences of each token",
        columns=[
            Column("layer", "plain"),
            Column("n_function", "integer", "function tokens"),
            Column("n_content", "integer", "content tokens"),
            Column("function_median", "number", "median, function", digits=4),
            Column("content_median", "number", "median, content", digits=4),
            Column("ratio", "signed"),
            Column("raw_correlation", "signed", "correlation of frequency with degree"),
            Column("rarefied_correlation", "signed", "with rarefied degree"),
        ],
        rows=measured,
        note=f"Of the tokens that occur at least {m} times in the graph’s documents.",
    )


# Charts.


def degree_rank(bins: Sequence[Row], fits: Sequence[Row]) -> Spec:
    """Degree against frequency rank per layer, both logarithmic, with the least-squares line.

    Markers are medians of neighbouring ranks; the band is their 5th to 95th percentile.
    """
    with_bins = {row["layer"] for row in bins}
    drawn = [fit for fit in fits if fit["layer"] in with_bins]
    names = [f"layer {fit['layer']}" for fit in drawn]
    key = charts.Key.cycled("layer", names, is_shown=False)

    def panel(place: int, x: charts.Axis, y: charts.Axis) -> charts.Layers:
        fit = drawn[place]
        mine = [row | {"layer": names[place]} for row in bins if row["layer"] == fit["layer"]]
        points = charts.series(mine, x, y, key, band=("low", "high"), lines=False)
        if fit["slope"] is None:
            return points
        ends = [
            {"rank": rank, "median": math.exp(fit["intercept"] + fit["slope"] * math.log(rank))}
            for rank in (mine[0]["rank"], mine[-1]["rank"])
        ]
        return points + charts.line(ends, x, y)

    titles = [
        name if fit["slope"] is None else f"{name}: slope {signed(fit['slope'])}, R² {fit['r2']:.3f}"
        for name, fit in zip(names, drawn, strict=True)
    ]
    x, y = charts.log("rank", "frequency rank"), charts.log("median", "degree (distinct features)")
    return charts.panels(titles, panel, x, y)


def coverage_curves(points: Sequence[Row], cut: int | None) -> Spec:
    """Share of the activated features reached by the most frequent tokens, one curve a layer."""
    named = [row | {"layer": f"layer {row['layer']}"} for row in points]
    names = list(dict.fromkeys(row["layer"] for row in named))
    return charts.single(
        charts.series(
            named,
            charts.log("rank", "frequency rank"),
            charts.share("coverage", "activated features reached", emphasised=0.5),
            charts.Key.cycled("layer", names),
            marks=max(1, len(named) // max(1, len(names)) // 14),
        ),
        *charts.cut_at(cut),
    )


def rarefied_degree(points: Sequence[Row]) -> Spec:
    """Rarefied against raw degree per layer, both logarithmic; tokens of nearly equal degree together."""
    layers = sorted({row["layer"] for row in points})
    return charts.panels(
        [f"layer {layer}" for layer in layers],
        lambda place, x, y: charts.series(
            [row for row in points if row["layer"] == layers[place]], x, y, KINDS, lines=False
        ),
        charts.log("degree", "degree (distinct features)"),
        charts.log("rarefied_degree", "rarefied degree"),
    )


# Findings.


def is_straight(fits: Sequence[Row]) -> Finding:
    """Degree against rank is a straight line on log-log axes: R² of at least 0.95 at every layer."""
    told = [
        f"layer {fit['layer']} "
        + ("has no line" if fit["r2"] is None else f"has slope {signed(fit['slope'])} (R² {fit['r2']:.3f})")
        for fit in fits
    ]
    bent = [fit["layer"] for fit in fits if fit["r2"] is None or fit["r2"] < STRAIGHT]
    where = layers_told(bent or [fit["layer"] for fit in fits])
    return Finding(
        text=f"{listed(told).replace('layer', 'Layer', 1)}. That degree "
        f"against rank is a straight line (R² of at least {STRAIGHT} over log-spaced ranks) {holds(not bent)} at "
        f"{where}.",
        verdict="differs" if bent else "holds",
    )


def reaches_half(layers: Sequence[Row]) -> Finding:
    """The ten most frequent tokens reach over half of the features at most layers (paper: at two of three)."""
    over = [layer["layer"] for layer in layers if layer["top10"] > 0.5]
    at_most = 2 * len(over) > len(layers)
    full = [
        layer
        for layer in layers
        if layer["dictionary_size"] and layer["activated_features"] >= SATURATED * layer["dictionary_size"]
    ]
    caution = (
        f" Mind that {listed([percent(layer['activated_features'] / layer['dictionary_size']) for layer in full])} of "
        f"the dictionary was activated at {layers_told([layer['layer'] for layer in full])}: a dictionary this narrow "
        "fills up early."
        if full
        else ""
    )
    return Finding(
        text=f"The ten most frequent tokens reach {listed([percent(layer['top10']) for layer in layers])} of the "
        f"activated features at {layers_told([layer['layer'] for layer in layers])}, all function tokens "
        f"{listed([percent(layer['function']) for layer in layers])}. That ten tokens reach more than half at most "
        f"layers (in the paper at two of three) {holds(at_most)} here: they do "
        f"{f'at {layers_told(over)}' if over else 'at no layer'}.{caution}",
        verdict="holds" if at_most else "differs",
    )


def is_left_when_rarefied(measured: Sequence[Row]) -> Finding:
    """How much of a function token's degree is left at an equal number of occurrences."""
    ratios = {row["layer"]: row["ratio"] for row in measured if row["ratio"] is not None}
    medians = (
        f"{listed([f'{ratio:.2f}' for ratio in ratios.values()])} times as many features as a content token at "
        f"{layers_told(list(ratios))} (medians)"
        if ratios
        else "a number of features that cannot be compared: no token of one of the kinds occurs often enough"
    )
    raw, rarefied = (
        listed([signed(row[f"{name}_correlation"]) for row in measured]) for name in ("raw", "rarefied")
    )
    return Finding(
        text=f"At {integer(measured[0]['m'])} occurrences each, a function token activates {medians}. Spearman’s "
        f"correlation of frequency with degree is {raw}, with rarefied degree {rarefied}: the difference is what mere "
        "sampling adds."
    )
