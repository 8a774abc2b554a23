-- One feature: how often it is active, and how unevenly over the tokens that open it.
SELECT
    f.*,
    o.token_entropy,
    o.max_activation,
    (
        SELECT sum(sum_activation) FROM feature_tokens WHERE layer = $layer AND feature_id = $feature_id
    ) / f.n AS mean_activation,
    o.top_n / f.n AS top_share,
    t.token AS top_token,
    o.token_id AS top_token_id,
    l.label,
    l.note
FROM feature_degree AS f
LEFT JOIN feature_summary AS o USING (layer, feature_id)
LEFT JOIN tokens AS t USING (token_id)
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = $feature_id
WHERE f.layer = $layer AND f.feature_id = $feature_id
