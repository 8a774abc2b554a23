-- The next best tokens of a greedy cover: those that reach the most features which no chosen token has reached (the $rank
-- most frequent ones, and $tokens).
WITH chosen AS (
    SELECT token_id
    FROM token_degree
    WHERE layer = $layer AND (rank <= $rank OR list_contains($tokens::INTEGER[], token_id))
),
reached AS (
    SELECT DISTINCT feature_id
    FROM edges
    SEMI JOIN chosen USING (token_id)
    WHERE layer = $layer
),
-- A join with what is left is several times faster than one against what is reached.
unreached AS (
    SELECT feature_id
    FROM feature_degree
    ANTI JOIN reached USING (feature_id)
    WHERE layer = $layer
),
gains AS (
    SELECT token_id, count(*) AS new_features
    FROM edges
    JOIN unreached USING (feature_id)
    WHERE layer = $layer
    GROUP BY token_id
    ORDER BY new_features DESC, token_id
    LIMIT $most
)
SELECT
    t.token_id,
    t.token,
    t.rank,
    t.count,
    t.degree,
    n.new_features,
    n.new_features / g.activated_features AS gain,
    (n.new_features + (SELECT count(*) FROM reached)) / g.activated_features AS coverage
FROM gains AS n
JOIN token_degree AS t ON t.layer = $layer AND t.token_id = n.token_id
JOIN graph_summary AS g ON g.layer = $layer
ORDER BY n.new_features DESC, t.token_id
