-- Survival by age of each kind of token, layers together, and its ratio to that under `random` at the same age. A policy
-- with tiers is shown by its tier `warm`: tokens that have a slot of their own, exact or not.
SELECT
    policy,
    budget,
    protocol,
    length,
    kind,
    age,
    at_risk,
    survival,
    survival_low,
    survival_high,
    ratio_to_random AS ratio,
    ratio_to_random_low AS ratio_low,
    ratio_to_random_high AS ratio_high
FROM retention_curves
WHERE
    policy <> 'full'
    AND ($length::BIGINT IS NULL OR length = $length)
    AND ($protocol::VARCHAR IS NULL OR protocol = $protocol)
    AND ($budget::DOUBLE IS NULL OR budget = $budget)
    AND tier = CASE
        WHEN policy IN (SELECT policy FROM retention_curves WHERE tier = 'warm') THEN 'warm' ELSE 'hot'
    END
ORDER BY length, protocol, budget, kind, age
