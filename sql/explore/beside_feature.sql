-- The features before and after one that are active here.
SELECT max(feature_id) FILTER (feature_id < $feature_id) AS before, min(feature_id) FILTER (feature_id > $feature_id) AS after
FROM feature_degree
WHERE layer = $layer
