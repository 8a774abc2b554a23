-- One row a layer: how much of the dictionary the graph reached, its size, the mean number of active features
-- per token, and the power law of token degree (see tasks/graph/power_law.py).
WITH tokens_of AS (
    SELECT layer, sum(count)::BIGINT AS n_tokens, sum(degree)::BIGINT AS n_edges
    FROM token_degree
    GROUP BY layer
),
features_of AS (
    SELECT layer, count(*) AS activated_features, sum(n) AS nonzeros
    FROM feature_degree
    GROUP BY layer
)
SELECT
    d.layer,
    d.dictionary_size,
    coalesce(f.activated_features, 0)::BIGINT AS activated_features,
    t.n_tokens,
    t.n_edges,
    coalesce(f.nonzeros, 0)::DOUBLE / t.n_tokens::DOUBLE AS mean_l0,
    p.alpha,
    p.xmin,
    p.ks
FROM dictionaries AS d
JOIN tokens_of AS t USING (layer)
LEFT JOIN features_of AS f USING (layer)
LEFT JOIN power_law_fits AS p USING (layer)
ORDER BY d.layer
