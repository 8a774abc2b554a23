-- Every token of the tokenized corpus (PAPER 1.1), by rank: count descending, token id ascending.
-- The corpus has $n_documents documents. Function tokens are the shortest prefix of the ranking whose share of all occurrences reaches $share.
WITH counted AS (
    SELECT token_id, sum(count)::BIGINT AS count, sum(doc_count)::BIGINT AS doc_count
    FROM shard_token_counts
    GROUP BY token_id
),
ranked AS (
    SELECT
        *,
        row_number() OVER by_rank AS rank,
        sum(count) OVER (by_rank ROWS UNBOUNDED PRECEDING) AS cumulative,
        sum(count) OVER () AS total
    FROM counted
    WINDOW by_rank AS (ORDER BY count DESC, token_id)
)
SELECT
    token_id,
    token,
    count,
    doc_count,
    doc_count::DOUBLE / $n_documents AS doc_share,
    rank,
    count::DOUBLE / total::DOUBLE AS share,
    cumulative::DOUBLE / total::DOUBLE AS cumulative_share,
    -- The token at which the share is reached still belongs to the prefix.
    (cumulative - count)::DOUBLE / total::DOUBLE < $share AS is_function
FROM ranked
LEFT JOIN vocabulary USING (token_id)
ORDER BY rank
