-- What steering does (PAPER 1.3): means over the experiments, which count alike, with 95 % intervals by experiment
-- (see tasks/steering/intervals.py). Perplexities compare where there is text with and without steering.
WITH means AS (
    SELECT
        mode,
        place,
        control,
        strength,
        count(*) AS n,
        sum((target_logprob_delta * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656
            / nullif(count(target_logprob_delta), 0) AS target_logprob_delta,
        sum((advantage * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656 / nullif(count(advantage), 0) AS advantage,
        sum((kl * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656 / nullif(count(kl), 0) AS kl,
        sum((log_perplexity_delta * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656
            / nullif(count(log_perplexity_delta), 0) AS log_perplexity_delta,
        sum((changed * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656 / count(*) AS changed,
        sum((relative_norm * 281474976710656)::HUGEINT)::DOUBLE / 281474976710656
            / nullif(count(relative_norm), 0) AS relative_norm
    FROM experiment_effects
    GROUP BY mode, place, control, strength
)
SELECT
    m.mode,
    m.place,
    m.control,
    m.strength,
    m.n,
    m.target_logprob_delta,
    i.target_logprob_delta_low,
    i.target_logprob_delta_high,
    m.advantage,
    i.advantage_low,
    i.advantage_high,
    m.kl,
    i.kl_low,
    i.kl_high,
    m.log_perplexity_delta,
    i.log_perplexity_delta_low,
    i.log_perplexity_delta_high,
    m.changed,
    m.relative_norm
FROM means AS m
LEFT JOIN intervals AS i USING (mode, place, control, strength)
ORDER BY m.mode, m.place, m.control DESC, m.strength
