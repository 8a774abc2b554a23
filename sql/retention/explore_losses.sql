-- Loss above the full run's at one place: of all tokens, by token group over all positions, and by position over all
-- groups. The first is what perplexity rises by.
WITH margins AS (
    SELECT * FROM retention_margins
    UNION ALL BY NAME
    SELECT
        policy,
        budget,
        protocol,
        length,
        n_tokens AS n,
        ln(perplexity_ratio) AS delta_nll,
        ln(perplexity_ratio_low) AS delta_nll_low,
        ln(perplexity_ratio_high) AS delta_nll_high
    FROM retention
)
SELECT *, coalesce(bucket, 'all tokens') AS tokens
FROM margins
WHERE policy <> 'full' AND length = $length AND protocol = $protocol AND budget = $budget
ORDER BY policy, bucket NULLS FIRST, position_from NULLS FIRST
