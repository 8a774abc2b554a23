-- `retention_survival` over all layers: counts of lives and deaths are added, then S(age) = Π (1 − died / at risk).
WITH counts AS (
    SELECT
        policy,
        budget,
        protocol,
        length,
        kind,
        tier,
        age,
        min(place) AS place,
        sum(at_risk)::BIGINT AS at_risk,
        sum(died)::BIGINT AS died
    FROM readings
    JOIN shard_reading_survival USING (folder)
    GROUP BY policy, budget, protocol, length, kind, tier, age
),
curves AS (
    SELECT
        *,
        list_product(
            list(1 - died::DOUBLE / at_risk::DOUBLE) OVER (
                PARTITION BY policy, budget, protocol, length, kind, tier
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
    c.kind,
    c.tier,
    c.age,
    c.at_risk,
    c.died,
    c.survival,
    i.survival_low,
    i.survival_high,
    c.survival / nullif(r.survival, 0) AS ratio_to_random,
    i.ratio_to_random_low,
    i.ratio_to_random_high
FROM curves AS c
LEFT JOIN intervals AS i USING (policy, budget, protocol, length, kind, tier, age)
LEFT JOIN curves AS r
    ON r.policy = 'random'
    AND r.tier = 'hot'
    AND r.budget = c.budget
    AND r.protocol = c.protocol
    AND r.length = c.length
    AND r.kind = c.kind
    AND r.age = c.age
ORDER BY c.length, c.protocol, c.place, c.kind, c.tier, c.age
