-- What one experiment's steering does at every strength; of the draws of random features the mean, least and most.
WITH measured AS (
    SELECT
        mode,
        control || ', ' || place AS setting,
        strength,
        target_logprob_delta,
        kl,
        ln(perplexity) - ln(baseline_perplexity) AS log_perplexity_delta
    FROM steering
    WHERE "case" = $case AND prompt = $prompt AND target = $target
)
SELECT
    mode,
    setting,
    strength,
    avg(target_logprob_delta) AS target_logprob_delta,
    min(target_logprob_delta) AS target_logprob_delta_low,
    max(target_logprob_delta) AS target_logprob_delta_high,
    avg(kl) AS kl,
    min(kl) AS kl_low,
    max(kl) AS kl_high,
    avg(log_perplexity_delta) AS log_perplexity_delta,
    min(log_perplexity_delta) AS log_perplexity_delta_low,
    max(log_perplexity_delta) AS log_perplexity_delta_high
FROM measured
GROUP BY mode, setting, strength
ORDER BY mode, setting, strength
