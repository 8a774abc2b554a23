-- Layers of the cases, the one at which prompts have most own features first.
SELECT layer, count(*) FILTER (is_own AND in_place) AS own
FROM reactivations
GROUP BY layer
ORDER BY own DESC, layer
