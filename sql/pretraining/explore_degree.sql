-- Degrees of tokens at one checkpoint, and at the series' last that has a graph.
SELECT c.token_id, c.token, c.rank, c.count, c.is_function, c.layer, c.degree, c.rarefied_degree, l.degree AS last_degree
FROM checkpoint_degree AS c
LEFT JOIN checkpoint_degree AS l
    ON l.model = c.model AND l.token_id = c.token_id AND l.layer = c.layer
    AND l.step = (SELECT max(step) FROM checkpoint_degree WHERE model = $model)
WHERE c.model = $model AND c.step = $step
ORDER BY c.rank
