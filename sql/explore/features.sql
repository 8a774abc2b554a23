-- A layer's features: how often each is active, how many tokens open it and how unevenly, and what people call it.
-- top_share: of its activations, those at the token that opens it most often; is_between: its density lies between two bounds.
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
LEFT JOIN feature_summary AS o ON o.layer = $layer AND o.feature_id = f.feature_id
LEFT JOIN tokens AS t USING (token_id)
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = f.feature_id
WHERE f.layer = $layer
ORDER BY f.n DESC, f.feature_id
