-- A token in the corpus.
SELECT * FROM tokens WHERE token_id = $token_id
