-- Features whose decoder directions are nearest to one's, and what is known of them here.
WITH near AS (
    SELECT unnest($feature_ids::INTEGER[]) AS feature_id, unnest($cosines::DOUBLE[]) AS cosine
)
SELECT s.feature_id, l.label, s.cosine, coalesce(f.degree, 0) AS degree, coalesce(f.density, 0) AS density
FROM near AS s
LEFT JOIN feature_degree AS f ON f.layer = $layer AND f.feature_id = s.feature_id
LEFT JOIN feature_labels AS l ON l.layer = $layer AND l.feature_id = s.feature_id
ORDER BY s.cosine DESC, s.feature_id
