-- What the scores of reactivation are made of, by case (no table of the catalogue): for each layer and kind of token,
-- and for each text of a token, sums over the later positions of prompts that have own features.
-- A position weighs as many as its prompt has own features, in all shares alike, so that they compare; `matched` are
-- the positions whose token stands in prompts of other relations. Shares are summed as integers, of
-- round(share * own features * 2^32), so no order of addition can change them.
WITH weighed AS (
    SELECT
        layer,
        if(is_function, 'function', 'content') AS kind,
        token,
        "case",
        n_own,
        own,
        (n_own * counterfactual::DOUBLE / n_counterfactual * 4294967296)::BIGINT AS counterfactual_units,
        n_unrelated > 0 AS is_matched,
        (n_own * unrelated::DOUBLE / nullif(n_unrelated, 0) * 4294967296)::BIGINT AS unrelated_units
    FROM reactivation_positions
    WHERE n_own > 0
)
SELECT
    layer,
    kind,
    token,
    "case",
    count(*) AS n_positions,
    sum(n_own)::BIGINT AS n_own,
    sum(own)::BIGINT AS own,
    sum(counterfactual_units)::BIGINT AS counterfactual_units,
    coalesce(sum(n_own) FILTER (is_matched), 0)::BIGINT AS matched_n_own,
    coalesce(sum(own) FILTER (is_matched), 0)::BIGINT AS matched_own,
    coalesce(sum(unrelated_units), 0)::BIGINT AS unrelated_units
FROM weighed
GROUP BY GROUPING SETS ((layer, kind, "case"), (layer, kind, token, "case"))
ORDER BY layer, kind, token NULLS FIRST, "case"
