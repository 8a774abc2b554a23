-- The edges of one layer by feature, here of the features from $first to $last: the tokens that open each, those that
-- do so most often first.
-- lift: the token's share of the feature's activations over its share of the graph's tokens; 1 is what chance gives.
-- token_entropy: Shannon entropy, in bits, of the tokens of the feature's activations: 0 where one token has them all,
-- log2(degree) where all of its tokens have as many. log2(N) less the mean of log2(n), which is a sum of exact multiples
-- of 2^-32, so no order of addition can change it; to nine decimals.
WITH features AS (
    SELECT
        feature_id,
        sum(n)::DOUBLE AS total,
        sum((n * log2(n) * 4294967296)::HUGEINT)::DOUBLE / 4294967296 AS information,
        greatest(0, round(log2(total) - information / total, 9)) AS token_entropy
    FROM edges
    WHERE layer = $layer AND feature_id BETWEEN $first AND $last
    GROUP BY feature_id
),
shares AS (
    SELECT token_id, count::DOUBLE / sum(count) OVER ()::DOUBLE AS share
    FROM token_degree
    WHERE layer = $layer
)
SELECT
    e.layer,
    e.token_id,
    e.feature_id,
    e.n,
    e.max_activation,
    e.sum_activation,
    e.n / f.total / s.share AS lift,
    f.token_entropy
FROM edges AS e
JOIN features AS f USING (feature_id)
JOIN shares AS s USING (token_id)
WHERE e.layer = $layer AND e.feature_id BETWEEN $first AND $last
ORDER BY e.feature_id, e.n DESC, e.token_id
