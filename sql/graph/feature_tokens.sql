-- The edges of one layer by feature, here of the features from $first to $last: the tokens that open each, those that
-- do so most often first.
-- lift: the token's share of the feature's activations over its share of the graph's tokens; 1 is what chance gives.
-- token_entropy: Shannon entropy, in bits, of the tokens of the feature's activations: 0 where one token has them all,
-- log2(degree) where all of its tokens have as many. A sum of exact multiples of 2^-32 over n * log2(N / n), so no
-- order of addition can change it.
WITH own AS (
    SELECT token_id, feature_id, n, max_activation, sum_activation
    FROM edges
    WHERE layer = $layer AND feature_id BETWEEN $first AND $last
),
totals AS (
    SELECT feature_id, sum(n)::DOUBLE AS total
    FROM own
    GROUP BY feature_id
),
entropies AS (
    SELECT
        feature_id,
        any_value(total) AS total,
        sum((n * log2(total / n) * 4294967296)::HUGEINT)::DOUBLE / 4294967296 / any_value(total) AS token_entropy
    FROM own
    JOIN totals USING (feature_id)
    GROUP BY feature_id
),
shares AS (
    SELECT token_id, count::DOUBLE / sum(count) OVER ()::DOUBLE AS share
    FROM token_degree
    WHERE layer = $layer
)
SELECT
    $layer::INTEGER AS layer,
    token_id,
    feature_id,
    n,
    max_activation,
    sum_activation,
    n / total / share AS lift,
    token_entropy
FROM own
JOIN entropies USING (feature_id)
JOIN shares USING (token_id)
ORDER BY feature_id, n DESC, token_id
