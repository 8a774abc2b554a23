-- The features of one layer, a row each: how often and how strongly it is active, and how unevenly over its tokens.
-- token_id: the token that opens it most often, of equals the first; top_n: how often that does.
SELECT
    $layer::INTEGER AS layer,
    feature_id,
    sum(n)::BIGINT AS n,
    max(max_activation) AS max_activation,
    arg_max(token_id, n * 4294967296 - token_id) AS token_id,
    max(n) AS top_n,
    any_value(token_entropy) AS token_entropy
FROM feature_tokens
GROUP BY feature_id
ORDER BY feature_id
