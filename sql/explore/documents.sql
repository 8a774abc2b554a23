-- The documents of the corpus, and the first tokens of each.
SELECT d.doc_id, b.begins, d.source, d.n_tokens, d.n_chars
FROM documents AS d
LEFT JOIN (
    SELECT o.doc_id, string_agg(coalesce(t.token, '–'), '' ORDER BY o.position) AS begins
    FROM occurrences AS o
    LEFT JOIN tokens AS t USING (token_id)
    WHERE o.position < $most
    GROUP BY o.doc_id
) AS b USING (doc_id)
ORDER BY d.doc_id
