-- What is active at each token of the cases' prompts (PAPER 1.3). A feature is a prompt's own where it is active at
-- the place in which the case's prompts differ, in this prompt and in no other of the case.
WITH active AS (
    SELECT
        t."case",
        t.prompt,
        t.position,
        t.token,
        t.is_function,
        f.layer,
        f.feature_id,
        f.activation,
        t.relation,
        t.token_id,
        t.in_place
    FROM shard_prompt_features AS f
    JOIN prompt_tokens AS t USING ("case", prompt, position)
),
own AS (
    SELECT "case", layer, feature_id, min(prompt) AS prompt
    FROM active
    WHERE in_place
    GROUP BY "case", layer, feature_id
    HAVING count(DISTINCT prompt) = 1
)
SELECT a.*, o.feature_id IS NOT NULL AS is_own
FROM active AS a
LEFT JOIN own AS o USING ("case", layer, feature_id, prompt)
ORDER BY a."case", a.prompt, a.layer, a.position, a.feature_id
