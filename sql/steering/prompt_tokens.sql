-- The tokens of the cases' prompts (PAPER 1.3), special ones left out. Function tokens are the corpus' own; a token
-- that the corpus lacks is a content token.
SELECT
    p."case",
    p.relation,
    p.prompt,
    p.position,
    p.token_id,
    p.token,
    coalesce(t.is_function, false) AS is_function,
    p.in_text,
    p.in_place,
    p.looked_at
FROM shard_prompt_tokens AS p
LEFT JOIN tokens AS t USING (token_id)
ORDER BY p."case", p.prompt, p.position
