-- Loss above the full run's at one place: by token group over all positions, and by position over all groups.
SELECT *, coalesce(bucket, 'all tokens') AS tokens
FROM retention_margins
WHERE policy <> 'full' AND length = $length AND protocol = $protocol AND budget = $budget
ORDER BY policy, bucket NULLS FIRST, position_from NULLS FIRST
