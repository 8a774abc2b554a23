-- One feature: how often it is active, and how unevenly over the tokens that open it.
SELECT
    f.*,
    o.token_entropy,
    o.max_activation,
    o.sum_activation / f.n AS mean_activation,
    o.top_n / f.n AS top_share,
    t.token AS top_token,
    o.token_id AS top_token_id,
    l.label,
    l.note
FROM feature_degree AS f
LEFT JOIN (
    SELECT
        any_value(token_entropy) AS token_entropy,
        max(max_activation) AS max_activation,
        sum(sum_activation) AS sum_activation,
        max(n) AS top_n,
        arg_max(token_id, n * 4294967296 - token_id) AS token_id
    FROM feature_tokens
    WHERE layer = $layer AND feature_id = $feature_id
) AS o ON true
LEFT JOIN tokens AS t USING (token_id)
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = $feature_id
WHERE f.layer = $layer AND f.feature_id = $feature_id
