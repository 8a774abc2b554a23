-- Cumulative coverage (PAPER 1.2, its table): going down the ranking, the features that each token adds to
-- those of all tokens before it; as a share of the activated features (ends at exactly 1), and of the dictionary.
WITH first_reached AS (
    SELECT e.layer, e.feature_id, min(t.rank) AS rank
    FROM edges AS e
    JOIN token_degree AS t USING (layer, token_id)
    GROUP BY e.layer, e.feature_id
),
added AS (
    SELECT layer, rank, count(*) AS new_features
    FROM first_reached
    GROUP BY layer, rank
),
running AS (
    SELECT
        t.layer,
        t.rank,
        t.token_id,
        t.token,
        coalesce(a.new_features, 0)::BIGINT AS new_features,
        sum(coalesce(a.new_features, 0)) OVER (
            PARTITION BY t.layer ORDER BY t.rank ROWS UNBOUNDED PRECEDING
        )::BIGINT AS cumulative_features
    FROM token_degree AS t
    LEFT JOIN added AS a USING (layer, rank)
),
activated AS (
    SELECT layer, count(*) AS features
    FROM first_reached
    GROUP BY layer
)
SELECT
    r.layer,
    r.rank,
    r.token_id,
    r.token,
    r.new_features,
    r.cumulative_features,
    r.cumulative_features::DOUBLE / a.features::DOUBLE AS coverage,
    r.cumulative_features::DOUBLE / d.dictionary_size::DOUBLE AS dictionary_coverage
FROM running AS r
JOIN dictionaries AS d USING (layer)
LEFT JOIN activated AS a USING (layer)
ORDER BY r.layer, r.rank
