-- What a policy adds to the loss of each group of predictions and range of positions, in nats, paired with the full run.
SELECT
    policy,
    budget,
    protocol,
    length,
    bucket,
    position_from,
    position_to,
    sum(n)::BIGINT AS n,
    sum(loss_units - full_loss_units)::DOUBLE / 4294967296 / sum(n)::DOUBLE AS delta_nll,
    any_value(i.delta_nll_low) AS delta_nll_low,
    any_value(i.delta_nll_high) AS delta_nll_high
FROM readings
JOIN shard_reading_losses USING (folder)
LEFT JOIN intervals AS i USING (policy, budget, protocol, length, bucket, position_from, position_to)
GROUP BY policy, budget, protocol, length, bucket, position_from, position_to
ORDER BY length, protocol, min(place), bucket, position_from
