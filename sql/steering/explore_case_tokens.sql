-- A case's prompts token by token, at every layer, with how many of the prompt's own features are active again there.
SELECT
    t.prompt,
    l.layer,
    t.position,
    t.token_id,
    t.token,
    t.is_function,
    t.in_place,
    p.n_own,
    p.own,
    p.n_counterfactual,
    p.counterfactual
FROM prompt_tokens AS t
CROSS JOIN (SELECT DISTINCT layer FROM reactivations) AS l
LEFT JOIN reactivation_positions AS p USING ("case", prompt, position, layer)
WHERE t."case" = $case AND ($layer::INTEGER IS NULL OR l.layer = $layer)
ORDER BY t.prompt, l.layer, t.position
