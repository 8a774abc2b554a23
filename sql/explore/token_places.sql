-- $most occurrences of a token, evenly spread over all it has in the first $documents documents, in corpus order;
-- another $sample, others.
WITH found AS (
    SELECT
        doc_id,
        position,
        row_number() OVER (ORDER BY doc_id, position) - 1 AS place,
        count(*) OVER () AS n
    FROM occurrences
    WHERE token_id = $token_id AND doc_id < $documents
),
chosen AS (
    SELECT DISTINCT (unnest(range(least($most, n))) * n + ($sample * 7919) % n) // least($most, n) AS place
    FROM (SELECT any_value(n) AS n FROM found)
    WHERE n > 0
)
SELECT doc_id, position
FROM found
JOIN chosen USING (place)
ORDER BY doc_id, position
