-- Occurrences that show what each feature of one layer is about, here of the features from $first to $last.
-- top: its $top strongest activations, place 1 the strongest; ties in corpus order.
-- decile 1 (the weakest tenth of its activations) to decile 10 (the strongest): $of_decile of each, drawn by a lot,
-- place in the order of the draw, so that the first few are a sample too. A feature with fewer than ten activations
-- leaves deciles empty. The lot is a hash of feature and occurrence in whole numbers below the prime 2^31 - 1.
WITH ranked AS (
    SELECT
        feature_id,
        doc_id,
        position,
        token_id,
        activation,
        row_number() OVER (PARTITION BY feature_id ORDER BY activation DESC, doc_id, position) AS strength,
        count(*) OVER (PARTITION BY feature_id) AS n
    FROM activations
    WHERE feature_id BETWEEN $first AND $last
),
lots AS (
    SELECT
        *,
        10 - (strength - 1) * 10 // n AS decile,
        (doc_id * 1664525 + position * 22695477::BIGINT + feature_id * 69069::BIGINT + 1013904223) % 2147483647 AS x,
        (x * x % 2147483647 + x * 1103515245) % 2147483647 AS lot
    FROM ranked
),
drawn AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY feature_id, decile ORDER BY lot, doc_id, position) AS draw
    FROM lots
    -- Of many activations, hundreds for each that is wanted are enough to draw from.
    WHERE strength <= $top OR lot::DOUBLE * n < 2147483647.0::DOUBLE * 10 * 200 * $of_decile
    QUALIFY strength <= $top OR draw <= $of_decile
)
SELECT $layer::INTEGER AS layer, feature_id, 'top' AS kind, strength AS place, doc_id, position, token_id, activation
FROM drawn
WHERE strength <= $top
UNION ALL
SELECT $layer::INTEGER, feature_id, 'decile ' || decile, draw, doc_id, position, token_id, activation
FROM drawn
WHERE draw <= $of_decile
ORDER BY feature_id, kind, place
