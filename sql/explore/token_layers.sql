-- A token at each layer, beside the other tokens of about its count ($factor times less to $factor times more), and its
-- rarefied degree beside those of all other tokens that have one. Ties count as half below: a percentile is
-- the share of the others that it is above.
WITH own AS (
    SELECT * FROM token_degree WHERE token_id = $token_id
),
others AS (
    SELECT
        o.layer,
        p.degree,
        p.rarefied_degree,
        p.count BETWEEN o.count / $factor AND o.count * $factor AS is_alike,
        sign(p.degree - o.degree) AS side,
        sign(p.rarefied_degree - o.rarefied_degree) AS rarefied_side
    FROM own AS o
    JOIN token_degree AS p ON p.layer = o.layer AND p.token_id <> o.token_id
),
compared AS (
    SELECT
        layer,
        count(*) FILTER (is_alike) AS alike,
        quantile_cont(degree, 0.5) FILTER (is_alike) AS alike_median,
        count(*) FILTER (is_alike AND side < 0) + count(*) FILTER (is_alike AND side = 0) / 2 AS below,
        count(rarefied_side) AS rarefied,
        count(*) FILTER (rarefied_side < 0) + count(*) FILTER (rarefied_side = 0) / 2 AS rarefied_below
    FROM others
    GROUP BY layer
)
SELECT
    o.layer,
    o.count,
    o.degree,
    o.degree / g.activated_features AS share,
    coalesce(c.alike, 0) AS alike,
    c.alike_median,
    c.below / nullif(c.alike, 0) AS percentile,
    o.rarefied_degree,
    o.m,
    c.rarefied_below / nullif(c.rarefied, 0) AS rarefied_percentile
FROM own AS o
JOIN graph_summary AS g USING (layer)
LEFT JOIN compared AS c USING (layer)
ORDER BY o.layer
