-- Checkpoint series that losses are published of.
SELECT
    model AS series,
    max(parameters) AS parameters,
    count(*) AS checkpoints,
    min(step) AS first_step,
    max(step) AS last_step,
    arg_max(tokens, step) AS tokens,
    arg_max(source, step) AS source
FROM checkpoints
SEMI JOIN loss_buckets USING (model, step)
GROUP BY model
ORDER BY parameters, series
