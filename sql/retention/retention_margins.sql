-- `retention_losses` over all positions (which are null then), and over all buckets.
WITH sums AS (
    SELECT
        policy,
        budget,
        protocol,
        length,
        bucket,
        position_from,
        position_to,
        min(place) AS place,
        sum(n)::BIGINT AS n,
        sum(loss_units - full_loss_units)::DOUBLE / 4294967296 / sum(n)::DOUBLE AS delta_nll
    FROM readings
    JOIN shard_reading_losses USING (folder)
    GROUP BY GROUPING SETS (
        (policy, budget, protocol, length, bucket),
        (policy, budget, protocol, length, position_from, position_to)
    )
)
SELECT
    s.policy,
    s.budget,
    s.protocol,
    s.length,
    s.bucket,
    s.position_from,
    s.position_to,
    s.n,
    s.delta_nll,
    i.delta_nll_low,
    i.delta_nll_high
FROM sums AS s
LEFT JOIN intervals AS i
    ON i.policy = s.policy
    AND i.budget = s.budget
    AND i.protocol = s.protocol
    AND i.length = s.length
    AND i.bucket IS NOT DISTINCT FROM s.bucket
    AND i.position_from IS NOT DISTINCT FROM s.position_from
ORDER BY s.length, s.protocol, s.place, s.bucket NULLS LAST, s.position_from
