-- How strong the activations of each feature of one layer are, here of the features from $first to $last: $bins bins
-- of equal width from 0 to the feature's largest activation, as feature browsers draw them, numbered from 1.
-- A bin holds low ≤ activation < high, the last one its high too; bins of no activation are left out.
WITH largest AS (
    SELECT feature_id, max(max_activation)::DOUBLE AS largest
    FROM edges
    WHERE layer = $layer
    GROUP BY feature_id
),
counted AS (
    SELECT
        feature_id,
        least(1 + floor(activation::DOUBLE * $bins / largest), $bins)::INTEGER AS bin,
        any_value(largest) AS largest,
        count(*) AS n
    FROM activations
    JOIN largest USING (feature_id)
    WHERE feature_id BETWEEN $first AND $last
    GROUP BY feature_id, bin
)
SELECT
    $layer::INTEGER AS layer,
    feature_id,
    bin,
    largest * (bin - 1) / $bins AS low,
    largest * bin / $bins AS high,
    n
FROM counted
ORDER BY feature_id, bin
