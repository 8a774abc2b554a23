-- Survival by age of each kind of token, layers together, and its ratio to that under `random` at the same age: counts
-- of lives and deaths are added over layers, then S(age) = Π (1 − died / at risk). A policy with tiers is shown by its
-- tier `warm`: tokens that have a slot of their own, exact or not.
WITH pooled AS (
    SELECT policy, budget, protocol, length, kind, tier, age, sum(at_risk) AS at_risk, sum(died) AS died
    FROM retention_survival
    WHERE
        ($length::BIGINT IS NULL OR length = $length)
        AND ($protocol::VARCHAR IS NULL OR protocol = $protocol)
        AND ($budget::DOUBLE IS NULL OR budget = $budget)
        AND tier = CASE
            WHEN policy IN (SELECT policy FROM retention_survival WHERE tier = 'warm') THEN 'warm' ELSE 'hot'
        END
    GROUP BY ALL
),
curves AS (
    SELECT
        *,
        product(1 - died / at_risk) OVER (
            PARTITION BY policy, budget, protocol, length, kind ORDER BY age
        ) AS survival
    FROM pooled
    WHERE at_risk > 0
)
SELECT
    c.policy,
    c.budget,
    c.protocol,
    c.length,
    c.kind,
    c.age,
    c.at_risk::BIGINT AS at_risk,
    c.survival,
    c.survival / nullif(r.survival, 0) AS ratio
FROM curves AS c
LEFT JOIN curves AS r
    ON r.policy = 'random'
    AND (r.budget, r.protocol, r.length, r.kind, r.age) = (c.budget, c.protocol, c.length, c.kind, c.age)
WHERE c.policy <> 'full'
ORDER BY c.length, c.protocol, c.budget, c.kind, c.age
