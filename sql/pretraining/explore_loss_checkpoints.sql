-- Checkpoints whose losses were measured token by token, in their order.
SELECT model, step FROM loss_buckets GROUP BY model, step ORDER BY model, step
