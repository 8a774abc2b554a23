-- What steering did in each experiment and setting (no table of the catalogue): random draws averaged, and the
-- trait's advantage over them. Numbers are summed as integers, of round(number * 2^48), so no order of addition can
-- change them.
WITH averaged AS (
    SELECT
        mode,
        place,
        control,
        strength,
        "case",
        prompt,
        target,
        sum((target_logprob_delta * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656
            / nullif(count(target_logprob_delta), 0) AS target_logprob_delta,
        sum((kl * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656 / nullif(count(kl), 0) AS kl,
        sum(((ln(perplexity) - ln(baseline_perplexity)) * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656
            / nullif(count(perplexity + baseline_perplexity), 0) AS log_perplexity_delta,
        count(*) FILTER (steered_text <> baseline_text)::DOUBLE / count(*) AS changed,
        sum((relative_norm * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656
            / nullif(count(relative_norm), 0) AS relative_norm
    FROM steering
    GROUP BY mode, place, control, strength, "case", prompt, target
)
SELECT
    a.mode,
    a.place,
    a.control,
    a.strength,
    a."case",
    a.prompt,
    a.target,
    a.target_logprob_delta,
    a.target_logprob_delta - r.target_logprob_delta AS advantage,
    a.kl,
    a.log_perplexity_delta,
    a.changed,
    a.relative_norm
FROM averaged AS a
LEFT JOIN averaged AS r
    ON a.control = 'trait'
    AND r.control = 'random'
    AND r.mode = a.mode
    AND r.place = a.place
    AND r.strength = a.strength
    AND r."case" = a."case"
    AND r.prompt = a.prompt
    AND r.target = a.target
ORDER BY a.mode, a.place, a.control, a.strength, a."case", a.prompt, a.target
