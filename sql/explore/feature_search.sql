-- The features of one number, a layer each.
SELECT layer, feature_id, degree, n, density FROM feature_degree WHERE feature_id = $feature_id ORDER BY layer
