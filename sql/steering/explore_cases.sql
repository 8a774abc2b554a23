-- Cases, and how much of their prompts' own features is active again at later tokens; of all layers, or of one.
-- Without a feature of their own, or a token after the place, shares are null.
WITH again AS (
    SELECT
        "case",
        sum(own) FILTER (is_function)::DOUBLE / nullif(sum(n_own) FILTER (is_function), 0)::DOUBLE AS function,
        sum(own) FILTER (NOT is_function)::DOUBLE / nullif(sum(n_own) FILTER (NOT is_function), 0)::DOUBLE AS content,
        sum(counterfactual)::DOUBLE / nullif(sum(n_counterfactual), 0)::DOUBLE AS counterfactual,
        sum(unrelated)::DOUBLE / nullif(sum(n_unrelated), 0)::DOUBLE AS unrelated
    FROM reactivation_positions
    WHERE $layer::INTEGER IS NULL OR layer = $layer
    GROUP BY "case"
),
own AS (
    SELECT "case", count(DISTINCT (layer, feature_id)) AS own_features
    FROM reactivations
    WHERE is_own AND ($layer::INTEGER IS NULL OR layer = $layer)
    GROUP BY "case"
)
SELECT
    "case",
    any_value(relation) AS relation,
    count(DISTINCT prompt) AS prompts,
    coalesce(any_value(own_features), 0) AS own_features,
    any_value(function) AS function,
    any_value(content) AS content,
    any_value(counterfactual) AS counterfactual,
    any_value(unrelated) AS unrelated
FROM prompt_tokens
LEFT JOIN again USING ("case")
LEFT JOIN own USING ("case")
GROUP BY "case"
