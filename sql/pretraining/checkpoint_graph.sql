-- One checkpoint's graph in a row (PAPER 1.4): the distinct features that function tokens, content tokens, and the
-- ten most frequent tokens of the corpus activated, and their shares of all that were activated.
WITH reached AS (
    SELECT
        e.feature_id,
        count(*) AS edges,
        sum(e.n) AS activations,
        bool_or(d.is_function) AS by_function,
        bool_or(NOT d.is_function) AS by_content,
        bool_or(d.rank <= 10) AS by_top10
    FROM edges AS e
    JOIN checkpoint_degree AS d USING (token_id)
    GROUP BY e.feature_id
),
features AS (
    SELECT
        coalesce(sum(edges), 0)::BIGINT AS edges,
        coalesce(sum(activations), 0)::BIGINT AS activations,
        count(*) AS activated,
        count(*) FILTER (by_function) AS by_function,
        count(*) FILTER (by_content) AS by_content,
        count(*) FILTER (by_top10) AS by_top10
    FROM reached
),
graph_tokens AS (
    SELECT layer, sum(count)::BIGINT AS n_tokens
    FROM checkpoint_degree
    GROUP BY layer
)
SELECT
    g.layer,
    $dictionary_size::BIGINT AS dictionary_size,
    g.n_tokens,
    f.edges AS n_edges,
    f.activations::DOUBLE / g.n_tokens::DOUBLE AS mean_l0,
    f.activated AS activated_features,
    f.by_function AS function_features,
    f.by_content AS content_features,
    f.by_function::DOUBLE / nullif(f.activated, 0)::DOUBLE AS function_coverage,
    f.by_content::DOUBLE / nullif(f.activated, 0)::DOUBLE AS content_coverage,
    f.by_top10::DOUBLE / nullif(f.activated, 0)::DOUBLE AS top10_coverage
FROM graph_tokens AS g
CROSS JOIN features AS f
