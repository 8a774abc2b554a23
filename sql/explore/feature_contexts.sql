-- The text around places of the corpus, $before tokens before each and $after after it; in the documents $shaded, what
-- the feature gives at every one of them.
WITH places AS (
    SELECT DISTINCT unnest($documents::BIGINT[]) AS doc_id, unnest($positions::INTEGER[]) AS at
),
active AS (
    SELECT doc_id, position, activation
    FROM activations_in($shaded, layers := [$layer])
    WHERE feature_id = $feature_id
)
SELECT p.doc_id, p.at, o.position, o.token_id, t.token, a.activation
FROM occurrences_in($documents) AS o
JOIN places AS p ON p.doc_id = o.doc_id AND o.position BETWEEN p.at - $before AND p.at + $after
LEFT JOIN tokens AS t USING (token_id)
LEFT JOIN active AS a ON a.doc_id = o.doc_id AND a.position = o.position
ORDER BY p.doc_id, p.at, o.position
