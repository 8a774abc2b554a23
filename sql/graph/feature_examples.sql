-- Occurrences that show what each feature of one layer is about, here of the features from $first to $last.
-- top: its $top strongest activations, place 1 the strongest; ties in corpus order.
-- decile 1 (the weakest tenth of its activations, by rank) to decile 10 (the strongest): $of_decile of each, place 1 the
-- strongest. Each is drawn from a part of the decile, of as many ranks as the decile's other parts, by a hash of feature
-- and part in whole numbers below the prime 2^31 - 1. A feature with fewer activations than parts gives all of them.
--
-- All activations are sorted at once, not feature by feature in a window: a sort spills, a window holds a whole feature.
WITH counts AS (
    SELECT
        feature_id,
        sum(n)::BIGINT AS n,
        (sum(sum(n)) OVER (ORDER BY feature_id) - sum(n))::BIGINT AS of_features_before
    FROM edges
    WHERE layer = $layer AND feature_id BETWEEN $first AND $last
    GROUP BY feature_id
),
sorted AS (
    SELECT *, row_number() OVER () - 1 AS row
    FROM (
        SELECT feature_id, doc_id, position, token_id, activation
        FROM activations
        WHERE feature_id BETWEEN $first AND $last
        ORDER BY feature_id, activation DESC, doc_id, position
    )
),
ranked AS NOT MATERIALIZED (
    SELECT sorted.*, n, row - of_features_before AS stronger
    FROM sorted
    JOIN counts USING (feature_id)
),
parts AS (
    SELECT
        *,
        10 * $of_decile AS n_parts,
        stronger * n_parts // n AS part,
        (part * n + n_parts - 1) // n_parts AS first_of_part,
        ((part + 1) * n + n_parts - 1) // n_parts - first_of_part AS size,
        (feature_id * 69069::BIGINT + part * 22695477 + 1013904223) % 2147483647 AS x,
        (x * x % 2147483647 + x * 1103515245) % 2147483647 AS lot
    FROM ranked
),
chosen AS MATERIALIZED (
    SELECT
        feature_id,
        doc_id,
        position,
        token_id,
        activation,
        stronger,
        n,
        part,
        part // $of_decile AS from_top,
        stronger = first_of_part + lot % size AS is_drawn
    FROM parts
    WHERE stronger < $top OR is_drawn
),
examples AS NOT MATERIALIZED (
    SELECT feature_id, 0::TINYINT AS decile, stronger + 1 AS place, doc_id, position, token_id, activation
    FROM chosen
    WHERE stronger < $top
    UNION ALL
    SELECT
        feature_id,
        (10 - from_top)::TINYINT,
        -- Of the decile's parts, or where some are empty of its ranks.
        least(part - from_top * $of_decile, stronger - (from_top * n + 9) // 10) + 1,
        doc_id,
        position,
        token_id,
        activation
    FROM chosen
    WHERE is_drawn
)
SELECT
    $layer::INTEGER AS layer,
    feature_id,
    if(decile = 0, 'top', 'decile ' || decile) AS kind,
    place,
    doc_id,
    position,
    token_id,
    activation
FROM examples
ORDER BY feature_id, decile, place
