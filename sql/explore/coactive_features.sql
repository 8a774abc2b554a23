-- The features that are active at places where one is, a sample of them. lift: how many times more often than anywhere.
WITH places AS (
    SELECT DISTINCT unnest($documents::BIGINT[]) AS doc_id, unnest($positions::INTEGER[]) AS position
),
active AS (
    SELECT
        a.feature_id,
        count(*) AS n,
        (SELECT count(*) FROM places) AS places,
        max(a.activation) AS max_activation
    FROM activations_in($documents, layers := [$layer]) AS a
    JOIN places USING (doc_id, position)
    WHERE a.feature_id <> $feature_id
    GROUP BY a.feature_id
)
SELECT
    a.feature_id,
    l.label,
    a.n,
    a.n / a.places AS share,
    a.n / a.places / f.density AS lift,
    a.max_activation,
    f.degree,
    f.density
FROM active AS a
JOIN feature_degree AS f ON f.layer = $layer AND f.feature_id = a.feature_id
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = a.feature_id
ORDER BY a.n DESC, lift DESC, a.feature_id
