-- The features that are active in a window of a document at some layers: a row a token and layer, how many of them, the
-- largest activation, the $most strongest features, and what one feature gives.
SELECT
    layer,
    position,
    count(*) AS active,
    max(activation) AS strongest,
    max(activation) FILTER (feature_id = $feature_id) AS own,
    (list({'feature_id': feature_id, 'activation': activation} ORDER BY activation DESC, feature_id))[:$most] AS features
FROM activations_in([$doc_id], layers := $layers)
WHERE doc_id = $doc_id AND position BETWEEN $first AND $last
GROUP BY layer, position
ORDER BY layer, position
