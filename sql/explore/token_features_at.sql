-- The features that are active at one token of a document.
SELECT a.layer, a.feature_id, l.label, a.activation, f.degree, f.density
FROM activations_in([$doc_id], layers := $layers) AS a
JOIN feature_degree AS f ON f.layer = a.layer AND f.feature_id = a.feature_id
LEFT JOIN feature_labels AS l ON l.layer = a.layer AND l.feature_id = a.feature_id
WHERE a.doc_id = $doc_id AND a.position = $position
ORDER BY a.layer, a.activation DESC, a.feature_id
