-- The edges of one layer (PAPER 1.2): token t and feature f, if t activated f at least once; here those of the
-- tokens from $first to $last, for a layer with more edges than memory is made in several such passes.
-- n comes from the shards' own counts, the activations' maximum and sum from every activation.
-- Sums are exact integers, multiples of 1 / $unit, so no order of addition can change them.
-- One aggregation over both inputs spills to disk; a join of two would hold more.
SELECT
    $layer::INTEGER AS layer,
    token_id,
    feature_id,
    sum(n)::BIGINT AS n,
    max(activation) AS max_activation,
    sum(units)::DOUBLE / $unit AS sum_activation
FROM (
    SELECT token_id, feature_id, n::BIGINT AS n, NULL::FLOAT AS activation, NULL::BIGINT AS units
    FROM shard_edges
    WHERE token_id BETWEEN $first AND $last
    UNION ALL
    SELECT token_id, feature_id, 0, activation, (activation::DOUBLE * $unit)::BIGINT
    FROM activations
    WHERE token_id BETWEEN $first AND $last
)
GROUP BY token_id, feature_id
ORDER BY token_id, feature_id
