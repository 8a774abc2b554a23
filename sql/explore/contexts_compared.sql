-- The features that two places of the corpus activate at a layer, one of them or both.
WITH active AS (
    SELECT
        feature_id,
        max(activation) FILTER (doc_id = $first_doc AND position = $first_position) AS first,
        max(activation) FILTER (doc_id = $second_doc AND position = $second_position) AS second
    FROM activations_in([$first_doc, $second_doc], layers := [$layer])
    WHERE position IN ($first_position, $second_position)
    GROUP BY feature_id
)
SELECT
    a.feature_id,
    l.label,
    CASE WHEN a.second IS NULL THEN 'first alone' WHEN a.first IS NULL THEN 'second alone' ELSE 'both' END AS active_in,
    a.first,
    a.second,
    coalesce(a.first, 0) - coalesce(a.second, 0) AS difference,
    abs(coalesce(a.first, 0) - coalesce(a.second, 0)) AS apart,
    f.degree,
    f.density
FROM active AS a
JOIN feature_degree AS f ON f.layer = $layer AND f.feature_id = a.feature_id
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = a.feature_id
-- The other document's position is no context.
WHERE a.first IS NOT NULL OR a.second IS NOT NULL
ORDER BY apart DESC, a.feature_id
