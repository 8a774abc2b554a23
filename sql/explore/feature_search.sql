-- The features of one number, a layer each; of one layer where it is given.
SELECT layer, feature_id, degree, n, density
FROM feature_degree
WHERE feature_id = $feature_id AND ($layer::INTEGER IS NULL OR layer = $layer)
ORDER BY layer
