-- Continuations of one prompt, or of all, at every checkpoint, or at one.
SELECT model, step, prompt, mode, continuation
FROM generations
WHERE
    ($prompt::VARCHAR IS NULL OR prompt = $prompt)
    AND ($model::VARCHAR IS NULL OR model = $model)
    AND ($step::BIGINT IS NULL OR step = $step)
ORDER BY model, step, prompt, mode
