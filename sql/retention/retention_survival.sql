-- Kaplan-Meier curves (tasks/retention/survival.py says what a life is): the product over ages of the share that stayed,
-- and its ratio to `random`'s at the same age, kind, layer, budget, protocol and length (its `hot` tier: it has no other).
WITH counts AS (
    SELECT
        policy,
        budget,
        protocol,
        length,
        layer,
        kind,
        tier,
        age,
        min(place) AS place,
        sum(at_risk)::BIGINT AS at_risk,
        sum(died)::BIGINT AS died
    FROM readings
    JOIN shard_reading_survival USING (folder)
    GROUP BY policy, budget, protocol, length, layer, kind, tier, age
),
curves AS (
    SELECT
        *,
        -- A list has an order of its own: whatever the threads, factors are multiplied from the first age on.
        list_product(
            list(1 - died::DOUBLE / at_risk::DOUBLE) OVER (
                PARTITION BY policy, budget, protocol, length, layer, kind, tier
                ORDER BY age
            )
        ) AS survival
    FROM counts
)
SELECT
    c.policy,
    c.budget,
    c.protocol,
    c.length,
    c.layer,
    c.kind,
    c.tier,
    c.age,
    c.survival,
    c.at_risk,
    c.died,
    c.survival / nullif(r.survival, 0) AS ratio_to_random
FROM curves AS c
LEFT JOIN curves AS r
    ON r.policy = 'random'
    AND r.tier = 'hot'
    AND r.budget = c.budget
    AND r.protocol = c.protocol
    AND r.length = c.length
    AND r.layer = c.layer
    AND r.kind = c.kind
    AND r.age = c.age
ORDER BY c.length, c.protocol, c.place, c.layer, c.kind, c.tier, c.age
