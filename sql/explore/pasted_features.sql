-- What was found active in a text, and what is known of it here.
WITH found AS (
    SELECT
        unnest($layers::INTEGER[]) AS layer,
        unnest($feature_ids::INTEGER[]) AS feature_id,
        unnest($activations::DOUBLE[]) AS activation,
        unnest($tokens::INTEGER[]) AS token_id,
        unnest($counts::INTEGER[]) AS n
)
SELECT s.layer, s.feature_id, l.label, s.activation, t.token, s.n, coalesce(f.degree, 0) AS degree, f.density
FROM found AS s
LEFT JOIN tokens AS t USING (token_id)
LEFT JOIN feature_degree AS f ON f.layer = s.layer AND f.feature_id = s.feature_id
LEFT JOIN feature_labels AS l ON l.layer = s.layer AND l.feature_id = s.feature_id
ORDER BY s.activation DESC, s.layer, s.feature_id
