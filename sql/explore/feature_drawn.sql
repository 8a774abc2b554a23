-- Features of a layer, evenly thinned to about $most of them: in how many tokens' occurrences each is active, and how
-- unevenly these are spread over the tokens that open it; in each row, how many features of some kinds there are.
WITH placed AS (
    SELECT
        f.feature_id,
        f.density,
        o.token_entropy,
        o.top_n / f.n >= $one_token AS is_of_one,
        row_number() OVER (ORDER BY f.n, f.feature_id) AS place
    FROM feature_degree AS f
    JOIN feature_summary AS o ON o.layer = $layer AND o.feature_id = f.feature_id
    WHERE f.layer = $layer
),
-- As windows over all rows these would take seconds.
counted AS (
    SELECT
        count(*) AS n_features,
        count(*) FILTER (is_of_one) AS n_of_one,
        count(*) FILTER (token_entropy >= $many_tokens) AS n_of_many,
        count(*) FILTER (density >= $dense) AS n_dense
    FROM placed
)
SELECT
    feature_id,
    density,
    token_entropy,
    if(is_of_one, 'mostly one token', 'several tokens') AS kind,
    n_features,
    n_of_one,
    n_of_many,
    n_dense
FROM placed
CROSS JOIN counted
WHERE place % ceil(n_features / $most)::BIGINT = 0
ORDER BY kind, feature_id
