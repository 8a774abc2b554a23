-- The share of a layer's activated features that the most frequent tokens reach: the first ten ranks, log-spaced ones
-- after them, and the last.
SELECT min(rank) AS rank, arg_min(coverage, rank) AS coverage
FROM coverage
WHERE layer = $layer AND coverage IS NOT NULL
GROUP BY CAST(floor(ln(rank) * 20) AS INTEGER)
UNION
SELECT max(rank), arg_max(coverage, rank)
FROM coverage
WHERE layer = $layer AND coverage IS NOT NULL
ORDER BY rank
