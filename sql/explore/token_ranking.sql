-- The tokens of the corpus by rank.
SELECT
    rank,
    token_id,
    token,
    count,
    share,
    doc_share,
    cumulative_share,
    if(is_function, 'function', 'content') AS kind
FROM tokens
ORDER BY rank
