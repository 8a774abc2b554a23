-- A layer's features: how often each is active, how many tokens open it and how unevenly, and what people call it.
-- top_share: of its activations, those at the token that opens it most often; is_between: its density lies between two bounds.
WITH opened AS (
    SELECT
        feature_id,
        any_value(token_entropy) AS token_entropy,
        max(max_activation) AS max_activation,
        max(n) AS top_n,
        arg_max(token_id, n * 4294967296 - token_id) AS token_id
    FROM feature_tokens
    WHERE layer = $layer
    GROUP BY feature_id
)
SELECT
    f.feature_id,
    l.label,
    t.token,
    o.token_id,
    o.top_n / f.n AS top_share,
    o.token_entropy,
    f.degree,
    f.n,
    f.density,
    o.max_activation,
    f.density BETWEEN $low AND $high AS is_between
FROM feature_degree AS f
LEFT JOIN opened AS o USING (feature_id)
LEFT JOIN tokens AS t USING (token_id)
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = f.feature_id
WHERE f.layer = $layer
ORDER BY f.n DESC, f.feature_id
