-- Losses of the token groups at every checkpoint, or at one, and how much they changed from the series' first one.
SELECT
    l.model,
    l.step,
    l.bucket,
    l.n,
    l.mean_loss,
    l.mean_low AS mean_loss_low,
    l.mean_high AS mean_loss_high,
    l.mean_loss - f.mean_loss AS since_first,
    l.loss_share,
    l.share_low AS loss_share_low,
    l.share_high AS loss_share_high
FROM loss_buckets AS l
JOIN (SELECT model, bucket, arg_min(mean_loss, step) AS mean_loss FROM loss_buckets GROUP BY model, bucket) AS f
    USING (model, bucket)
WHERE l.n > 0 AND ($model::VARCHAR IS NULL OR l.model = $model) AND ($step::BIGINT IS NULL OR l.step = $step)
ORDER BY l.model, l.step, l.mean_loss DESC
