-- The four buckets of every checkpoint (PAPER 1.4): their predictions, mean loss in nats, and share of the total
-- loss; with 95 % intervals by document (see tasks/pretraining/loss_intervals.py). A bucket without a prediction has no
-- mean.
-- Documents' losses are multiples of 2^-32: as integers they add up in any order.
WITH buckets AS (
    SELECT *
    FROM (VALUES
        (1, 'function→function'),
        (2, 'function→content'),
        (3, 'content→function'),
        (4, 'content→content')
    ) AS listed (place, bucket)
),
sums AS (
    SELECT model, step, bucket, sum(n)::BIGINT AS n, sum((loss * 4294967296)::HUGEINT) AS loss_units
    FROM document_losses
    GROUP BY model, step, bucket
),
totals AS (
    SELECT model, step, sum(loss_units) AS loss_units
    FROM sums
    GROUP BY model, step
)
SELECT
    c.model,
    c.step,
    b.bucket,
    coalesce(s.n, 0)::BIGINT AS n,
    s.loss_units::DOUBLE / 4294967296 / s.n::DOUBLE AS mean_loss,
    coalesce(s.loss_units, 0)::DOUBLE / nullif(t.loss_units, 0)::DOUBLE AS loss_share,
    i.mean_low,
    i.mean_high,
    i.share_low,
    i.share_high
FROM checkpoints AS c
CROSS JOIN buckets AS b
LEFT JOIN sums AS s USING (model, step, bucket)
LEFT JOIN totals AS t USING (model, step)
LEFT JOIN intervals AS i USING (model, step, bucket)
ORDER BY c.model, c.step, b.place
