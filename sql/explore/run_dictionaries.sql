-- The dictionaries, what was measured of them, and how much of them the graph reached.
SELECT
    d.*,
    g.activated_features,
    g.activated_features / nullif(d.dictionary_size, 0) AS activated_share,
    g.n_edges,
    g.mean_l0
FROM dictionaries AS d
LEFT JOIN graph_summary AS g USING (layer)
ORDER BY d.layer
