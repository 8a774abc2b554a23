-- Tokens decoded a second: medians over turns, which alternate with the full cache's; the ratio is the median of paired
-- turns, between the lowest and the highest of them.
SELECT
    policy,
    budget,
    length,
    count(*) AS turns,
    max(tokens) AS tokens,
    max(tokens) / median(seconds) AS tokens_per_second,
    max(tokens) / median(full_seconds) AS full_tokens_per_second,
    median(full_seconds / seconds) AS speed_ratio,
    min(full_seconds / seconds) AS speed_ratio_low,
    max(full_seconds / seconds) AS speed_ratio_high,
    any_value(kv_bytes) AS kv_bytes,
    any_value(full_kv_bytes) AS full_kv_bytes,
    any_value(device) AS device,
    any_value(threads) AS threads,
    any_value(load) AS load
FROM decode_turns
GROUP BY policy, budget, length
ORDER BY length, policy, budget
