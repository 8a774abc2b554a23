"""What must hold of the token-feature graph's tables, before they are published."""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows, differ

# `sum_activation` adds multiples of 2^-32, `activation` is float32: sums agree to their rounding.
_CLOSE = "abs({a} - {b}) <= 1e-6 * abs({b}) + 1e-9 * {n}"

GROUPED = {
    "activations": {
        "activations_by_token": "layer, token_id",
        "activations_by_feature": "layer, feature_id",
    }
}
TOTALS = {"activations": "count(*) AS n, max(activation) AS maximum, sum(activation::DOUBLE) AS total"}

GRAPH: tuple[Expectation, ...] = (
    Keys(
        name="edge keys are unique",
        table="edges",
        meaning="An edge is one row.",
        columns=("layer", "token_id", "feature_id"),
    ),
    Rows(
        name="edges are possible",
        table="edges",
        meaning="n ≥ 1, ids from 0, 0 < max_activation ≤ sum_activation ≤ n · max_activation.",
        must="""n >= 1 AND token_id >= 0 AND feature_id >= 0 AND max_activation > 0 AND isfinite(max_activation)
            AND sum_activation >= max_activation * (1 - 1e-6) - 1e-9
            AND sum_activation <= n * max_activation * (1 + 1e-6) + 1e-9 * n""",
        show="layer, token_id, feature_id, n, max_activation, sum_activation",
    ),
    Query(
        name="edges.n = activations grouped",
        table="edges",
        needs=("activations_by_token",),
        meaning="By layer and token, edges and activations agree in number, maximum and sum.",
        offenders=f"""SELECT layer, token_id, a.n AS activations, e.n AS edges_n, a.maximum AS activations_max,
                e.maximum AS edges_max, a.total AS activations_sum, e.total AS edges_sum
            FROM activations_by_token AS a
            FULL JOIN (SELECT layer, token_id, sum(n) AS n, max(max_activation) AS maximum,
                sum(sum_activation) AS total FROM edges GROUP BY ALL) AS e USING (layer, token_id)
            WHERE (a.n = e.n AND a.maximum = e.maximum AND {_CLOSE.format(a="e.total", b="a.total", n="a.n")})
                IS NOT TRUE""",
    ),
    Query(
        name="feature_degree = activations grouped",
        table="feature_degree",
        needs=("activations_by_feature",),
        meaning="By layer and feature, the activations are those counted.",
        offenders=differ(
            "SELECT layer, feature_id, n FROM activations_by_feature",
            "SELECT layer, feature_id, n FROM feature_degree WHERE n > 0",
            "layer, feature_id",
            "n",
        ),
    ),
    Query(
        name="feature_degree = edges grouped",
        table="feature_degree",
        needs=("edges",),
        meaning="A feature's degree is the number of its edges.",
        offenders=differ(
            "SELECT layer, feature_id, count(*) AS degree, sum(n) AS n FROM edges GROUP BY ALL",
            "SELECT layer, feature_id, degree, n FROM feature_degree WHERE degree > 0",
            "layer, feature_id",
            "degree",
            "n",
        ),
    ),
    Keys(
        name="feature_degree keys are unique",
        table="feature_degree",
        meaning="A feature of a layer is one row.",
        columns=("layer", "feature_id"),
    ),
    Query(
        name="feature ids are in the dictionary",
        table="feature_degree",
        needs=("graph_summary",),
        meaning="0 ≤ feature_id < dictionary_size.",
        offenders="""SELECT layer, feature_id, dictionary_size FROM feature_degree
            LEFT JOIN graph_summary USING (layer)
            WHERE (feature_id BETWEEN 0 AND dictionary_size - 1) IS NOT TRUE""",
    ),
    Keys(
        name="token_degree keys are unique",
        table="token_degree",
        meaning="A token of a layer is one row.",
        columns=("layer", "token_id"),
    ),
    Query(
        name="token_degree = edges grouped",
        table="token_degree",
        needs=("edges",),
        meaning="A token's degree is the number of its edges.",
        offenders=differ(
            "SELECT layer, token_id, count(*) AS degree FROM edges GROUP BY ALL",
            "SELECT layer, token_id, degree FROM token_degree WHERE degree > 0",
            "layer, token_id",
            "degree",
        ),
    ),
    Query(
        name="token_degree is of counted tokens",
        table="token_degree",
        needs=("tokens",),
        meaning="A token in the graph is in `tokens`, as often there at least, with its rank and its kind.",
        offenders="""SELECT layer, token_id, d.rank, t.rank AS tokens_rank, d.count, t.count AS tokens_count,
                d.is_function, t.is_function AS tokens_is_function
            FROM token_degree AS d LEFT JOIN tokens AS t USING (token_id)
            WHERE (d.rank = t.rank AND d.is_function = t.is_function AND d.count <= t.count) IS NOT TRUE""",
    ),
    Query(
        name="edges count at most occurrences",
        table="edges",
        needs=("token_degree",),
        meaning="A token activates a feature at most as often as it occurs in the graph.",
        offenders="""SELECT layer, token_id, feature_id, n, count FROM edges
            LEFT JOIN token_degree USING (layer, token_id) WHERE (n <= count) IS NOT TRUE""",
    ),
    Query(
        name="degree sums are equal",
        table="token_degree",
        needs=("feature_degree",),
        meaning="Tokens and features count the same edges in each layer.",
        offenders=differ(
            "SELECT layer, sum(degree) AS degree FROM token_degree GROUP BY layer HAVING sum(degree) > 0",
            "SELECT layer, sum(degree) AS degree FROM feature_degree GROUP BY layer HAVING sum(degree) > 0",
            "layer",
            "degree",
        ),
    ),
    Query(
        name="rarefied degree is at most the degree",
        table="token_degree",
        needs=("settings",),
        meaning="0 ≤ rarefied_degree ≤ degree; it is null just where the token occurs less than m times.",
        offenders="""SELECT layer, token_id, count, degree, rarefied_degree, m, rarefaction_m
            FROM token_degree, settings
            WHERE (m = rarefaction_m AND (rarefied_degree IS NULL) = (count < m)
                AND coalesce(rarefied_degree, 0) BETWEEN 0 AND degree * (1 + 1e-9)) IS NOT TRUE""",
    ),
    Keys(
        name="coverage keys are unique",
        table="coverage",
        meaning="A rank of a layer is one row.",
        columns=("layer", "rank"),
    ),
    Query(
        name="coverage rises",
        table="coverage",
        meaning="By rank, cumulative_features adds up new_features ≥ 0, and coverage never falls.",
        offenders="""SELECT * FROM (SELECT layer, rank, token_id, new_features, cumulative_features, coverage,
                dictionary_coverage, sum(new_features) OVER (PARTITION BY layer ORDER BY rank) AS expected_features,
                lag(coverage, 1, 0) OVER (PARTITION BY layer ORDER BY rank) AS coverage_before FROM coverage)
            WHERE (new_features >= 0 AND cumulative_features = expected_features
                AND (coverage >= coverage_before OR (coverage IS NULL AND cumulative_features = 0))
                AND dictionary_coverage BETWEEN 0 AND 1) IS NOT TRUE""",
    ),
    Query(
        name="coverage ends at 1",
        table="coverage",
        needs=("graph_summary",),
        meaning="All tokens together reach every activated feature: the last coverage is 1.",
        offenders="""SELECT layer, last_rank, last_coverage, last_features, activated_features
            FROM graph_summary LEFT JOIN (SELECT layer, max(rank) AS last_rank, arg_max(coverage, rank)
                AS last_coverage, arg_max(cumulative_features, rank) AS last_features FROM coverage GROUP BY layer)
                USING (layer)
            WHERE activated_features > 0
                AND (abs(last_coverage - 1) <= 1e-12 AND last_features = activated_features) IS NOT TRUE""",
    ),
    Query(
        name="coverage is features over sizes",
        table="coverage",
        needs=("graph_summary",),
        meaning="coverage is of the activated features, dictionary_coverage of the dictionary.",
        offenders="""SELECT layer, rank, cumulative_features, coverage, activated_features, dictionary_coverage,
                dictionary_size FROM coverage LEFT JOIN graph_summary USING (layer)
            WHERE activated_features > 0 AND (abs(coverage - cumulative_features / activated_features) <= 1e-12
                AND abs(dictionary_coverage - cumulative_features / dictionary_size) <= 1e-12) IS NOT TRUE""",
    ),
    Keys(
        name="one summary a layer", table="graph_summary", meaning="A layer is one row.", columns=("layer",)
    ),
    Query(
        name="graph_summary = edges grouped",
        table="graph_summary",
        needs=("edges",),
        meaning="Edges, activated features and mean L0 are those of the edges.",
        offenders="""SELECT layer, n_edges, e.edges, activated_features, e.features, mean_l0,
                e.activations / n_tokens AS expected_l0
            FROM graph_summary FULL JOIN (SELECT layer, count(*) AS edges, count(DISTINCT feature_id) AS features,
                sum(n) AS activations FROM edges GROUP BY layer) AS e USING (layer)
            WHERE (n_edges = coalesce(e.edges, 0) AND activated_features = coalesce(e.features, 0)
                AND abs(mean_l0 - coalesce(e.activations, 0) / n_tokens) <= 1e-9 * (1 + mean_l0)) IS NOT TRUE""",
    ),
    Rows(
        name="summaries are possible",
        table="graph_summary",
        meaning="Activated features fit the dictionary, and the fit, where there is one, is a power law's.",
        must="""activated_features BETWEEN 0 AND dictionary_size AND n_tokens > 0
            AND coalesce(alpha > 1 AND xmin > 0 AND ks BETWEEN 0 AND 1, true)""",
        show="layer, dictionary_size, activated_features, n_tokens, alpha, xmin, ks",
    ),
    Query(
        name="graph tokens are counted",
        table="graph_summary",
        needs=("token_degree",),
        meaning="The tokens of a layer's degrees are the tokens of the graph.",
        offenders="""SELECT layer, n_tokens, counted FROM graph_summary LEFT JOIN
            (SELECT layer, sum(count) AS counted FROM token_degree GROUP BY layer) USING (layer)
            WHERE counted IS DISTINCT FROM n_tokens""",
    ),
    Query(
        name="dictionaries are the layers'",
        table="dictionaries",
        needs=("graph_summary",),
        meaning="Each layer of the graph has one dictionary, of the size that the summary says.",
        offenders="""SELECT layer, d.dictionary_size, g.dictionary_size AS summary_size
            FROM dictionaries AS d FULL JOIN graph_summary AS g USING (layer)
            WHERE d.dictionary_size IS DISTINCT FROM g.dictionary_size""",
    ),
)
