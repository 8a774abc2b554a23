-- What chosen tokens reach at a layer: the $rank most frequent ones together (place 0), then those of $tokens in their
-- order, each with the features that none before it has reached.
WITH chosen AS (
    SELECT token_id, 0 AS place FROM token_degree WHERE layer = $layer AND rank <= $rank
    UNION ALL
    SELECT unnest($tokens::INTEGER[]), unnest(range(1, len($tokens::INTEGER[]) + 1))
),
first_reached AS (
    SELECT e.feature_id, min(c.place) AS place
    FROM edges AS e
    JOIN chosen AS c USING (token_id)
    WHERE e.layer = $layer
    GROUP BY e.feature_id
),
added AS (
    SELECT place, count(*) AS new_features FROM first_reached GROUP BY place
),
places AS (
    SELECT 0 AS place, NULL::INTEGER AS token_id
    UNION ALL
    SELECT place, token_id FROM chosen WHERE place > 0
)
SELECT
    p.place,
    p.token_id,
    t.token,
    t.rank,
    t.degree,
    coalesce(a.new_features, 0) AS new_features,
    sum(coalesce(a.new_features, 0)) OVER running::BIGINT AS cumulative_features,
    sum(coalesce(a.new_features, 0)) OVER running / g.activated_features AS coverage,
    g.activated_features AS activated,
    'take away' AS away
FROM places AS p
LEFT JOIN added AS a USING (place)
LEFT JOIN token_degree AS t ON t.layer = $layer AND t.token_id = p.token_id
JOIN graph_summary AS g ON g.layer = $layer
WINDOW running AS (ORDER BY p.place ROWS UNBOUNDED PRECEDING)
ORDER BY p.place
