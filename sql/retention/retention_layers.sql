-- Each layer of each setup: means over the documents of what tasks/retention/measures.py finds in one (medians and means
-- over tokens). Means are of multiples of 2^-32, so that they do not depend on the order of documents.
WITH found AS (
    SELECT
        policy,
        budget,
        protocol,
        length,
        layer,
        min(place) AS place,
        count(*) AS n_documents,
        sum(round(error * 4294967296)::HUGEINT)::DOUBLE / 4294967296 / count(error) AS error,
        sum(round(local_error * 4294967296)::HUGEINT)::DOUBLE / 4294967296 / count(local_error) AS local_error,
        sum(round(retained_mass * 4294967296)::HUGEINT)::DOUBLE / 4294967296 / count(retained_mass)
            AS retained_mass,
        sum(round(attention_entropy * 4294967296)::HUGEINT)::DOUBLE / 4294967296 / count(attention_entropy)
            AS attention_entropy,
        sum(round(full_attention_entropy * 4294967296)::HUGEINT)::DOUBLE / 4294967296
            / count(full_attention_entropy) AS full_attention_entropy,
        sum(round(key_similarity * 4294967296)::HUGEINT)::DOUBLE / 4294967296 / count(key_similarity)
            AS key_similarity,
        sum(round(full_key_similarity * 4294967296)::HUGEINT)::DOUBLE / 4294967296 / count(full_key_similarity)
            AS full_key_similarity,
        sum(kept_function)::DOUBLE / nullif(sum(kept), 0)::DOUBLE AS function_share
    FROM readings
    JOIN shard_reading_layers USING (folder)
    GROUP BY policy, budget, protocol, length, layer
)
SELECT
    policy,
    budget,
    protocol,
    length,
    layer,
    n_documents,
    error,
    i.error_low,
    i.error_high,
    local_error,
    error / nullif(local_error, 0) AS carried,
    i.carried_low,
    i.carried_high,
    retained_mass,
    i.retained_mass_low,
    i.retained_mass_high,
    attention_entropy,
    full_attention_entropy,
    key_similarity,
    full_key_similarity,
    function_share
FROM found
LEFT JOIN intervals AS i USING (policy, budget, protocol, length, layer)
ORDER BY length, protocol, place, layer
