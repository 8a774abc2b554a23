-- A window of a document, token by token.
SELECT o.position, o.token_id, t.token
FROM occurrences_in([$doc_id]) AS o
LEFT JOIN tokens AS t USING (token_id)
WHERE o.doc_id = $doc_id AND o.position BETWEEN $first AND $last
ORDER BY o.position
