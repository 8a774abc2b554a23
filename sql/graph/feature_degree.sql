-- Every feature that was activated at least once: the number of distinct tokens that activated it (degree),
-- the occurrences that did (n), and their share of the graph's tokens (density).
WITH graph_tokens AS (
    SELECT layer, sum(count) AS n_tokens
    FROM token_degree
    GROUP BY layer
)
SELECT
    layer,
    feature_id,
    count(*)::BIGINT AS degree,
    sum(n)::BIGINT AS n,
    sum(n)::DOUBLE / any_value(n_tokens)::DOUBLE AS density
FROM edges
JOIN graph_tokens USING (layer)
GROUP BY layer, feature_id
ORDER BY layer, feature_id
