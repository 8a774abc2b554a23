-- The tokens around some places of the corpus, $width before each and after it.
WITH places AS (
    SELECT unnest($doc_ids::BIGINT[]) AS doc_id, unnest($positions::BIGINT[]) AS at
)
SELECT p.doc_id, p.at, o.position, o.token_id, t.token
FROM occurrences_in($doc_ids) AS o
JOIN places AS p ON p.doc_id = o.doc_id AND o.position BETWEEN p.at - $width AND p.at + $width
LEFT JOIN tokens AS t USING (token_id)
ORDER BY p.doc_id, p.at, o.position
