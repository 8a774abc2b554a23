-- Texts before and after steering by a trait, a row an experiment, in one setting; beside it what random features that
-- were moved by as much did to the target, the mean of their draws.
WITH random AS (
    SELECT "case", prompt, target, layer, avg(target_logprob_delta) AS random_delta
    FROM steering
    WHERE control = 'random' AND mode = $mode AND place = $place AND strength = $strength
    GROUP BY ALL
)
SELECT
    "case",
    prompt,
    target,
    layer,
    feature_ids,
    baseline_text,
    steered_text,
    steered_text <> baseline_text AS changed,
    target_logprob_delta,
    random_delta,
    target_logprob_delta - random_delta AS advantage,
    kl,
    ln(perplexity) - ln(baseline_perplexity) AS log_perplexity_delta,
    relative_norm
FROM steering
LEFT JOIN random USING ("case", prompt, target, layer)
WHERE
    control = 'trait' AND mode = $mode AND place = $place AND strength = $strength
    AND ($case::VARCHAR IS NULL OR "case" = $case)
    AND ($prompt::VARCHAR IS NULL OR prompt = $prompt)
    AND ($target::VARCHAR IS NULL OR target = $target)
    AND ($layer::INTEGER IS NULL OR layer = $layer)
ORDER BY target_logprob_delta DESC NULLS LAST, "case", prompt, target
