-- What every stage was checked for.
SELECT success, stage, expectation, CAST(observed AS VARCHAR) AS observed
FROM expectations
ORDER BY success, stage, expectation, observed
