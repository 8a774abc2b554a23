-- Shares of own features that are active again (PAPER 1.3), over all cases, by layer and kind of token, and by the
-- text of the token (null for all of a kind); with 95 % intervals by case (see tasks/steering/intervals.py). What
-- `reactivation_sums` counts as matched is what the unrelated prompts are compared with.
WITH sums AS (
    SELECT
        layer,
        kind,
        token,
        count(*) AS n_cases,
        sum(n_positions)::BIGINT AS n_positions,
        sum(n_own)::DOUBLE AS n_own,
        sum(own)::DOUBLE AS own,
        sum(counterfactual_units)::DOUBLE / 4294967296 AS counterfactual,
        nullif(sum(matched_n_own), 0)::DOUBLE AS matched_n_own,
        sum(matched_own)::DOUBLE AS matched_own,
        sum(unrelated_units)::DOUBLE / 4294967296 AS unrelated
    FROM case_sums
    GROUP BY layer, kind, token
)
SELECT
    s.layer,
    s.kind,
    s.token,
    s.n_cases,
    s.n_positions,
    s.own / s.n_own AS own,
    i.own_low,
    i.own_high,
    s.counterfactual / s.n_own AS counterfactual,
    i.counterfactual_low,
    i.counterfactual_high,
    s.unrelated / s.matched_n_own AS unrelated,
    i.unrelated_low,
    i.unrelated_high,
    (s.own - s.counterfactual) / s.n_own AS excess,
    i.excess_low,
    i.excess_high,
    (s.matched_own - s.unrelated) / s.matched_n_own AS excess_unrelated,
    i.excess_unrelated_low,
    i.excess_unrelated_high
FROM sums AS s
LEFT JOIN intervals AS i
    ON i.layer = s.layer AND i.kind = s.kind AND i.token IS NOT DISTINCT FROM s.token
ORDER BY s.layer, s.kind DESC, s.token NULLS FIRST
