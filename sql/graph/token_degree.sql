-- Degree of every token that occurs in the graph's documents (PAPER 1.2): its number of distinct features.
--
-- rarefied_degree is the expected degree at m = $m of the token's N occurrences, drawn without replacement:
--     sum over f of 1 - C(N - n, m) / C(N, m),    n = occurrences of the token that activated f.
-- The ratio equals the product over i < k of 1 - b / (N - i), k = min(n, m), b = max(n, m). lgamma would lose
-- eight digits at N = 10^6, and 1 - ratio the rest where n is small, so the same is computed from
--     S = sum over i < k of atanh(b / (2 (N - i) - b)),    1 - ratio = 2 tanh(S) / (1 + tanh(S)),
-- which keeps full relative precision. Above 1,024 factors, blocks of them are taken at their midpoint.
-- Probabilities are added as exact multiples of 2^-60, so no order of addition can change a sum.
WITH counts AS (
    SELECT layer, token_id, sum(count)::BIGINT AS count
    FROM shard_graph_counts
    GROUP BY layer, token_id
),
spectrum AS (
    SELECT layer, token_id, n, count(*) AS features
    FROM edges
    GROUP BY layer, token_id, n
),
drawn AS (
    SELECT s.layer, s.token_id, c.count AS total, s.n, s.features
    FROM spectrum AS s
    JOIN counts AS c USING (layer, token_id)
    WHERE c.count >= $m
),
factors AS (
    SELECT
        total,
        n,
        greatest(n, $m::BIGINT) AS b,
        least(n, $m::BIGINT, 1024) AS steps,
        least(n, $m::BIGINT)::DOUBLE / least(n, $m::BIGINT, 1024) AS width
    FROM (SELECT DISTINCT total, n FROM drawn WHERE n <= total - $m::BIGINT)
),
exponents AS (
    SELECT
        total,
        n,
        list_sum(list_transform(
            range(steps),
            lambda j: width * atanh(b / (2 * (total - ((j + 0.5::DOUBLE) * width - 0.5::DOUBLE)) - b))
        )) AS s
    FROM factors
),
probabilities AS (
    SELECT total, n, (2 * tanh(s) / (1 + tanh(s)) * 1152921504606846976)::BIGINT::HUGEINT AS units
    FROM exponents
),
degrees AS (
    SELECT layer, token_id, sum(features)::BIGINT AS degree
    FROM spectrum
    GROUP BY layer, token_id
),
rarefied AS (
    SELECT
        d.layer,
        d.token_id,
        -- More activations than N - m cannot be missed by m draws.
        sum(d.features * coalesce(p.units, 1152921504606846976::HUGEINT))::DOUBLE / 1152921504606846976
            AS rarefied_degree
    FROM drawn AS d
    LEFT JOIN probabilities AS p USING (total, n)
    GROUP BY d.layer, d.token_id
)
SELECT
    c.layer,
    c.token_id,
    t.token,
    t.rank,
    c.count,
    t.is_function,
    coalesce(d.degree, 0)::BIGINT AS degree,
    CASE WHEN c.count >= $m THEN coalesce(r.rarefied_degree, 0) END AS rarefied_degree,
    $m::BIGINT AS m
FROM counts AS c
JOIN tokens AS t USING (token_id)
LEFT JOIN degrees AS d USING (layer, token_id)
LEFT JOIN rarefied AS r USING (layer, token_id)
ORDER BY c.layer, t.rank
