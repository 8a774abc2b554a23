-- Of the tokens that have a share of $least of a feature's activations, and more than one, the one that opens it at the
-- largest share of its own occurrences.
SELECT e.token_id, d.token, e.n / d.count AS share
FROM feature_tokens AS e
JOIN feature_degree AS f ON f.layer = $layer AND f.feature_id = $feature_id
JOIN token_degree AS d ON d.layer = $layer AND d.token_id = e.token_id
WHERE e.layer = $layer AND e.feature_id = $feature_id AND e.n > 1 AND e.n >= $least * f.n
ORDER BY share DESC, e.n DESC, e.token_id
LIMIT 1
