-- The features in whose label or note a text is, those whose label begins with it first.
SELECT
    l.layer,
    l.feature_id,
    l.label,
    l.note,
    f.degree
FROM feature_labels AS l
LEFT JOIN feature_degree AS f ON f.layer = l.layer AND f.feature_id = l.feature_id
WHERE contains(lower(l.label), lower($typed)) OR contains(lower(l.note), lower($typed))
ORDER BY NOT starts_with(lower(l.label), lower($typed)), NOT contains(lower(l.label), lower($typed)), l.layer, l.feature_id
