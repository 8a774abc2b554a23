-- All tokens that open a feature. share: of the token's occurrences; of_feature: of the feature's activations.
SELECT
    e.token_id,
    d.token,
    if(d.is_function, 'function', 'content') AS kind,
    d.rank,
    e.n,
    e.n / f.n AS of_feature,
    e.n / d.count AS share,
    e.lift,
    e.max_activation,
    e.sum_activation / e.n AS mean_activation
FROM feature_tokens AS e
JOIN feature_degree AS f ON f.layer = $layer AND f.feature_id = $feature_id
LEFT JOIN token_degree AS d ON d.layer = $layer AND d.token_id = e.token_id
WHERE e.layer = $layer AND e.feature_id = $feature_id
ORDER BY e.n DESC, e.token_id
