-- Features of a layer, evenly thinned to about $most of them: in how many tokens' occurrences each is active, and how
-- unevenly these are spread over the tokens that open it; in each row, how many features of some kinds there are.
WITH placed AS (
    SELECT
        f.feature_id,
        f.density,
        o.token_entropy,
        o.top_n / f.n >= $one_token AS is_of_one,
        row_number() OVER (ORDER BY f.n, f.feature_id) AS place,
        count(*) OVER () AS n_features,
        count(*) FILTER (o.top_n / f.n >= $one_token) OVER () AS n_of_one,
        count(*) FILTER (o.token_entropy >= $many_tokens) OVER () AS n_of_many,
        count(*) FILTER (f.density >= $dense) OVER () AS n_dense
    FROM feature_degree AS f
    JOIN feature_summary AS o USING (layer, feature_id)
    WHERE f.layer = $layer
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
WHERE place % ceil(n_features / $most)::BIGINT = 0
ORDER BY kind, feature_id
