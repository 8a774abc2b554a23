-- How many of a prompt's own features are active again at each later position (PAPER 1.3): in the prompt itself, at
-- the same position of the case's other prompts, and at the same token in prompts of other relations, there too after
-- the place where prompts differ: before it stands what all prompts share, such as a chat template. n_… are the
-- chances: own features, times other prompts, times those occurrences. Positions are the content tokens after the
-- place in which the prompts differ, and the function tokens there that the case looks at.
WITH own AS (
    SELECT DISTINCT "case", relation, prompt, layer, feature_id
    FROM reactivations
    WHERE is_own
),
sizes AS (
    SELECT "case", prompt, layer, count(*) AS n_own
    FROM own
    GROUP BY "case", prompt, layer
),
places AS (
    SELECT
        "case",
        max(position) FILTER (in_place) AS last_position,
        count(DISTINCT prompt) - 1 AS other_prompts
    FROM prompt_tokens
    GROUP BY "case"
),
after_place AS (
    SELECT t.*, p.other_prompts
    FROM prompt_tokens AS t
    JOIN places AS p USING ("case")
    WHERE t.position > p.last_position
),
later AS (
    SELECT t.*, l.layer
    FROM after_place AS t
    CROSS JOIN (SELECT DISTINCT layer FROM reactivations) AS l
    WHERE t.looked_at OR NOT t.is_function
),
again AS (
    SELECT
        o."case",
        o.prompt,
        o.layer,
        a.position,
        count(*) FILTER (a.prompt = o.prompt) AS own,
        count(*) FILTER (a.prompt <> o.prompt) AS counterfactual
    FROM own AS o
    JOIN reactivations AS a USING ("case", layer, feature_id)
    GROUP BY o."case", o.prompt, o.layer, a.position
),
-- how often a token stands there in the prompts of each relation, and of all
standing AS (
    SELECT relation, token_id, count(*) AS n, sum(count(*)) OVER (PARTITION BY token_id) AS n_all
    FROM after_place
    GROUP BY relation, token_id
),
-- and how often it does so with a feature active
active_in_relation AS (
    SELECT t.relation, t.token_id, r.layer, r.feature_id, count(*) AS n
    FROM reactivations AS r
    JOIN after_place AS t USING ("case", prompt, position)
    GROUP BY t.relation, t.token_id, r.layer, r.feature_id
),
active_anywhere AS (
    SELECT token_id, layer, feature_id, sum(n) AS n
    FROM active_in_relation
    GROUP BY token_id, layer, feature_id
),
elsewhere AS (
    SELECT o."case", o.prompt, o.layer, a.token_id, sum(a.n - coalesce(r.n, 0)) AS unrelated
    FROM own AS o
    JOIN active_anywhere AS a USING (layer, feature_id)
    LEFT JOIN active_in_relation AS r
        ON r.relation = o.relation
        AND r.token_id = a.token_id
        AND r.layer = a.layer
        AND r.feature_id = a.feature_id
    GROUP BY o."case", o.prompt, o.layer, a.token_id
)
SELECT
    t."case",
    t.relation,
    t.prompt,
    t.layer,
    t.position,
    t.token_id,
    t.token,
    t.is_function,
    t.in_text,
    coalesce(s.n_own, 0)::BIGINT AS n_own,
    coalesce(a.own, 0)::BIGINT AS own,
    (coalesce(s.n_own, 0) * t.other_prompts)::BIGINT AS n_counterfactual,
    coalesce(a.counterfactual, 0)::BIGINT AS counterfactual,
    (coalesce(s.n_own, 0) * (c.n_all - c.n))::BIGINT AS n_unrelated,
    coalesce(e.unrelated, 0)::BIGINT AS unrelated
FROM later AS t
LEFT JOIN sizes AS s USING ("case", prompt, layer)
LEFT JOIN again AS a USING ("case", prompt, layer, position)
JOIN standing AS c USING (relation, token_id)
LEFT JOIN elsewhere AS e USING ("case", prompt, layer, token_id)
ORDER BY t."case", t.prompt, t.layer, t.position
