-- The features that are active in a case's prompts, a row a prompt, layer and feature: the prompt's own first.
SELECT
    dense_rank() OVER (ORDER BY prompt) AS prompt_number,
    layer,
    feature_id,
    bool_or(is_own) AS is_own,
    max(activation) FILTER (in_place) AS in_place,
    max(activation) AS largest,
    count(*) FILTER (NOT in_place AND is_function AND looked_at) AS later_function,
    count(*) FILTER (NOT in_place AND NOT is_function AND looked_at) AS later_content
FROM reactivations
JOIN (SELECT "case", prompt, position, looked_at FROM prompt_tokens) USING ("case", prompt, position)
WHERE "case" = $case AND ($layer::INTEGER IS NULL OR layer = $layer)
GROUP BY prompt, layer, feature_id
ORDER BY prompt_number, layer, is_own DESC, in_place DESC NULLS LAST, feature_id
