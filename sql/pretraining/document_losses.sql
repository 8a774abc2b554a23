-- One checkpoint's losses (PAPER 1.4), summed by held-out document and bucket: what the current token is, then
-- what the next one is. Single losses are in token_losses; where they are not kept, the shards have their sums:
-- one of the two inputs is empty.
-- Sums are exact integers, of round(loss * 2^32), so no order of addition can change them.
WITH losses AS (
    SELECT
        l.doc_id,
        this.is_function AS current_is_function,
        next.is_function AS next_is_function,
        1 AS n,
        (l.loss::DOUBLE * 4294967296)::BIGINT AS loss_units
    FROM token_losses AS l
    JOIN tokens AS this ON this.token_id = l.current_token_id
    JOIN tokens AS next ON next.token_id = l.token_id
    UNION ALL
    SELECT doc_id, current_is_function, next_is_function, n, loss_units
    FROM shard_document_losses
)
SELECT
    doc_id,
    if(current_is_function, 'function', 'content') || '→' || if(next_is_function, 'function', 'content') AS bucket,
    sum(n)::BIGINT AS n,
    sum(loss_units)::DOUBLE / 4294967296 AS loss
FROM losses
GROUP BY doc_id, current_is_function, next_is_function
ORDER BY doc_id, NOT current_is_function, NOT next_is_function
