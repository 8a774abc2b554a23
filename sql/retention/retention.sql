-- Each policy, budget, protocol and length: predictions against the full run, and bytes. Losses are sums of multiples of
-- 2^-32 nats. Bytes are means over the moments at which the budget holds and something had to leave
-- (tasks/retention/measures.py), and kv_bytes_share is of the full run's cache. Speed where it was measured.
WITH sums AS (
    SELECT
        policy,
        budget,
        protocol,
        length,
        min(place) AS place,
        count(*) AS n_documents,
        sum(n) AS n,
        sum(loss_units) AS loss_units,
        sum(full_loss_units) AS full_loss_units,
        sum(kl_units) AS kl_units,
        sum(agreed) AS agreed,
        sum(chunks) AS chunks,
        sum(hot_bytes) AS hot_bytes,
        sum(warm_bytes) AS warm_bytes,
        sum(state_bytes) AS state_bytes,
        max(most_bytes) AS most_bytes,
        max(peak_bytes) AS peak_bytes,
        max(full_bytes) AS full_bytes,
        min(allowed_bytes) AS allowed_bytes,
        max(most_slots) AS most_slots,
        min(allowed_slots) AS allowed_slots
    FROM readings
    JOIN shard_reading_sums USING (folder)
    GROUP BY policy, budget, protocol, length
)
SELECT
    policy,
    budget,
    protocol,
    length,
    (hot_bytes + warm_bytes + state_bytes)::DOUBLE / chunks::DOUBLE / full_bytes::DOUBLE AS kv_bytes_share,
    n_documents::BIGINT AS n_documents,
    n::BIGINT AS n_tokens,
    exp(loss_units::DOUBLE / 4294967296 / n::DOUBLE) AS perplexity,
    exp(full_loss_units::DOUBLE / 4294967296 / n::DOUBLE) AS full_perplexity,
    exp((loss_units - full_loss_units)::DOUBLE / 4294967296 / n::DOUBLE) AS perplexity_ratio,
    i.perplexity_ratio_low,
    i.perplexity_ratio_high,
    kl_units::DOUBLE / 4294967296 / n::DOUBLE AS kl,
    i.kl_low,
    i.kl_high,
    agreed::DOUBLE / n::DOUBLE AS top1_agreement,
    i.top1_agreement_low,
    i.top1_agreement_high,
    (hot_bytes + warm_bytes + state_bytes)::DOUBLE / chunks::DOUBLE AS kv_bytes_mean,
    peak_bytes::BIGINT AS kv_bytes_peak,
    most_bytes::BIGINT AS kv_bytes_most,
    allowed_bytes::BIGINT AS kv_bytes_allowed,
    hot_bytes::DOUBLE / chunks::DOUBLE AS hot_bytes_mean,
    warm_bytes::DOUBLE / chunks::DOUBLE AS warm_bytes_mean,
    state_bytes::DOUBLE / chunks::DOUBLE AS state_bytes_mean,
    most_slots::BIGINT AS slots_most,
    allowed_slots::BIGINT AS slots_allowed,
    s.tokens_per_second,
    s.full_tokens_per_second,
    s.speed_ratio
FROM sums
LEFT JOIN intervals AS i USING (policy, budget, protocol, length)
LEFT JOIN speeds AS s USING (policy, budget, length)
ORDER BY length, protocol, place
