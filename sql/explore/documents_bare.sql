-- The documents of the corpus.
SELECT doc_id, source, n_tokens, n_chars FROM documents ORDER BY doc_id
