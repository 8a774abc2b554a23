-- The edges of one layer (PAPER 1.2): token t and feature f, if t activated f at least once; here those of the
-- tokens from $first to $last, for a layer with more edges than memory is made in several such passes.
-- Sums are exact integers, multiples of 2^-$scale, the coarsest scale of the layer's shards, so no order of addition
-- can change them.
SELECT
    $layer::INTEGER AS layer,
    token_id,
    feature_id,
    sum(n)::BIGINT AS n,
    max(max_activation) AS max_activation,
    sum(coalesce(sum_units >> (scale - $scale), (max_activation::DOUBLE * $unit)::BIGINT))::DOUBLE / $unit
        AS sum_activation
FROM shard_edges
WHERE token_id BETWEEN $first AND $last
GROUP BY token_id, feature_id
ORDER BY token_id, feature_id
