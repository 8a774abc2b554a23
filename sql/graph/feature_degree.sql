-- Every feature that was activated at least once: the number of distinct tokens that activated it (degree),
-- the occurrences that did (n), and their share of the graph's tokens (density).
WITH graph_tokens AS (
    SELECT layer, sum(count) AS n_tokens
    FROM token_degree
    GROUP BY layer
),
features AS (
    SELECT layer, feature_id, count(*)::BIGINT AS degree, sum(n)::BIGINT AS n
    FROM edges
    GROUP BY layer, feature_id
)
SELECT
    layer,
    feature_id,
    degree,
    n,
    n::DOUBLE / n_tokens::DOUBLE AS density
FROM features
JOIN graph_tokens USING (layer)
ORDER BY layer, feature_id
