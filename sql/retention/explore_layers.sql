-- Errors layer by layer, at one place.
SELECT * FROM retention_layers
WHERE policy <> 'full' AND length = $length AND protocol = $protocol AND budget = $budget
ORDER BY policy, layer
