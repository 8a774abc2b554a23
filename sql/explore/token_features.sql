-- The features that a token opens at a layer. share: of its occurrences that activate the feature; lift: that share over
-- the feature's share of all tokens (density).
SELECT
    e.feature_id,
    l.label,
    e.n,
    e.n / t.count AS share,
    e.n / t.count / f.density AS lift,
    e.max_activation,
    e.sum_activation / e.n AS mean_activation,
    f.degree,
    f.density
FROM edges AS e
JOIN feature_degree AS f ON f.layer = $layer AND f.feature_id = e.feature_id
JOIN token_degree AS t ON t.layer = $layer AND t.token_id = $token_id
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = e.feature_id
WHERE e.layer = $layer AND e.token_id = $token_id
ORDER BY e.n DESC, e.feature_id
