-- Tokens of similar count at one layer, evenly thinned to about $most of them; $token_id itself is among them.
WITH own AS (
    SELECT count FROM token_degree WHERE layer = $layer AND token_id = $token_id
),
near AS (
    SELECT
        d.token_id,
        d.token,
        d.count,
        d.degree,
        d.is_function,
        row_number() OVER (ORDER BY d.rank) AS place,
        count(*) OVER () AS n
    FROM token_degree AS d, own
    WHERE d.layer = $layer AND d.count BETWEEN own.count / $factor AND own.count * $factor AND d.degree > 0
)
SELECT token_id, token, count, degree, is_function
FROM near
WHERE token_id = $token_id OR place % ceil(n / $most)::BIGINT = 0
ORDER BY place
