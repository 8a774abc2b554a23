"""What must hold of the published tables of retention (see `schemas.expectation`)."""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows

_SETUP = ("policy", "budget", "protocol", "length")

TABLES: tuple[Expectation, ...] = (
    Keys(
        name="retention keys are unique",
        table="retention",
        meaning="A policy, budget, protocol and length is one row.",
        columns=_SETUP,
    ),
    Rows(
        name="retention is possible",
        table="retention",
        meaning="Perplexities are at least 1, shares are shares, and intervals hold what they are of.",
        must="""budget > 0 AND budget <= 1 AND n_documents >= 1 AND n_tokens >= 1 AND perplexity >= 1
            AND full_perplexity >= 1 AND kl >= -1e-4 AND top1_agreement BETWEEN 0 AND 1
            AND abs(perplexity_ratio * full_perplexity / perplexity - 1) < 1e-6
            AND coalesce(perplexity_ratio_low <= perplexity_ratio_high, true)
            AND coalesce(kl_low <= kl_high, true) AND coalesce(top1_agreement_low <= top1_agreement_high, true)""",
        show="policy, budget, protocol, length, perplexity, full_perplexity, perplexity_ratio, kl, top1_agreement",
    ),
    Rows(
        name="the full cache is its own measure",
        table="retention",
        meaning="Under `full` perplexity, predictions and bytes are exactly those of the full run.",
        must="""policy <> 'full' OR (budget = 1 AND perplexity_ratio = 1 AND kl = 0 AND top1_agreement = 1
            AND kv_bytes_share = 1)""",
        show="policy, protocol, length, perplexity_ratio, kl, top1_agreement, kv_bytes_share",
    ),
    Rows(
        name="budgets are kept in every row",
        table="retention",
        meaning="No policy ever held more slots or bytes than its budget allows.",
        must="coalesce(slots_most <= slots_allowed, true) AND coalesce(kv_bytes_most <= kv_bytes_allowed, true)",
        show="policy, budget, protocol, length, slots_most, slots_allowed, kv_bytes_most, kv_bytes_allowed",
    ),
    Rows(
        name="bytes of all tensors add up",
        table="retention",
        meaning="Exact and quantized slots and state are all bytes; their mean is at most the most, that the peak.",
        must="""abs(hot_bytes_mean + warm_bytes_mean + state_bytes_mean - kv_bytes_mean) <= 1e-6 * kv_bytes_mean
            AND kv_bytes_mean <= kv_bytes_most AND kv_bytes_most <= kv_bytes_peak""",
        show="""policy, budget, protocol, length, hot_bytes_mean, warm_bytes_mean, state_bytes_mean, kv_bytes_mean,
            kv_bytes_most, kv_bytes_peak""",
    ),
    Query(
        name="every setup has the full cache's row",
        table="retention",
        meaning="Each protocol and length has a row of `full`, of the same text.",
        offenders="""SELECT r.policy, r.budget, r.protocol, r.length, r.n_tokens, f.n_tokens AS full_n_tokens
            FROM retention AS r LEFT JOIN (SELECT * FROM retention WHERE policy = 'full') AS f USING (protocol, length)
            WHERE r.n_tokens IS DISTINCT FROM f.n_tokens OR r.n_documents IS DISTINCT FROM f.n_documents""",
    ),
    Keys(
        name="layer keys are unique",
        table="retention_layers",
        meaning="A layer of a setup is one row.",
        columns=(*_SETUP, "layer"),
    ),
    Rows(
        name="layers are possible",
        table="retention_layers",
        meaning="Errors are at least 0, carried is error over local error, shares are shares.",
        must="""coalesce(error >= 0, true) AND coalesce(local_error >= 0, true)
            AND coalesce(abs(carried * local_error - error) <= 1e-9 + 1e-6 * error, true)
            AND coalesce(retained_mass BETWEEN -1e-4 AND 1.0001, true)
            AND coalesce(function_share BETWEEN 0 AND 1, true)""",
        show="policy, budget, protocol, length, layer, error, local_error, carried, retained_mass, function_share",
    ),
    Keys(
        name="survival keys are unique",
        table="retention_survival",
        meaning="An age of a layer, kind and tier of a setup is one row.",
        columns=(*_SETUP, "layer", "kind", "tier", "age"),
    ),
    Query(
        name="survival falls with age",
        table="retention_survival",
        meaning="A share from 0 to 1 that never rises with age.",
        offenders="""SELECT * FROM (SELECT policy, budget, protocol, length, layer, kind, tier, age, survival,
                lag(survival) OVER (PARTITION BY policy, budget, protocol, length, layer, kind, tier ORDER BY age)
                    AS survival_before
            FROM retention_survival) WHERE survival < 0 OR survival > 1 OR survival > survival_before""",
    ),
    Rows(
        name="nothing leaves the full cache",
        table="retention_survival",
        meaning="Under `full` every token survives, and `random` is as good as itself.",
        must="""(policy <> 'full' OR (survival = 1 AND died = 0))
            AND (policy <> 'random' OR survival = 0 OR ratio_to_random = 1)""",
        show="policy, layer, kind, age, survival, died, ratio_to_random",
    ),
    Query(
        name="curves are of all lives",
        table="retention_curves",
        needs=("retention_survival",),
        meaning="Each age of a kind and tier is one row, of the lives of all layers, and a share.",
        offenders="""SELECT c.policy, c.budget, c.protocol, c.length, c.kind, c.tier, c.age, c.at_risk,
                s.at_risk AS summed, c.survival, c.survival_low, c.survival_high
            FROM retention_curves AS c FULL JOIN (SELECT policy, budget, protocol, length, kind, tier, age,
                sum(at_risk) AS at_risk, sum(died) AS died FROM retention_survival GROUP BY ALL) AS s
            USING (policy, budget, protocol, length, kind, tier, age)
            WHERE c.at_risk IS DISTINCT FROM s.at_risk OR c.died IS DISTINCT FROM s.died
                OR c.survival NOT BETWEEN 0 AND 1 OR coalesce(c.survival_low > c.survival_high, false)""",
    ),
    Keys(
        name="loss groups are unique",
        table="retention_losses",
        meaning="A bucket and range of positions of a setup is one row.",
        columns=(*_SETUP, "bucket", "position_from"),
    ),
    Query(
        name="loss groups are all predictions",
        table="retention_losses",
        needs=("retention",),
        meaning="Their predictions add up to the setup's, and their losses to what its perplexity has more.",
        offenders="""SELECT r.policy, r.budget, r.protocol, r.length, r.n_tokens, l.n, ln(r.perplexity_ratio) AS delta,
                l.delta AS delta_of_groups
            FROM retention AS r LEFT JOIN (SELECT policy, budget, protocol, length, sum(n) AS n,
                sum(n * delta_nll) / sum(n) AS delta FROM retention_losses GROUP BY ALL) AS l
            USING (policy, budget, protocol, length)
            WHERE r.n_tokens IS DISTINCT FROM l.n OR abs(ln(r.perplexity_ratio) - l.delta) > 1e-6 OR l.delta IS NULL""",
    ),
    Query(
        name="margins are sums of loss groups",
        table="retention_margins",
        needs=("retention_losses",),
        meaning="Over positions, and over buckets, predictions are those of the groups.",
        offenders="""WITH summed AS (SELECT policy, budget, protocol, length, bucket, position_from, sum(n) AS n
                FROM retention_losses GROUP BY GROUPING SETS ((policy, budget, protocol, length, bucket),
                    (policy, budget, protocol, length, position_from)))
            SELECT m.policy, m.budget, m.protocol, m.length, m.bucket, m.position_from, m.n, s.n AS summed_n
            FROM retention_margins AS m LEFT JOIN summed AS s ON s.policy = m.policy AND s.budget = m.budget
                AND s.protocol = m.protocol AND s.length = m.length AND s.bucket IS NOT DISTINCT FROM m.bucket
                AND s.position_from IS NOT DISTINCT FROM m.position_from WHERE m.n IS DISTINCT FROM s.n""",
    ),
    Keys(
        name="speed keys are unique",
        table="retention_speed",
        meaning="A policy, budget and length is one row.",
        columns=("policy", "budget", "length"),
    ),
    Rows(
        name="speeds are possible",
        table="retention_speed",
        meaning="Tokens take time, and the median of paired turns is between the lowest and highest.",
        must="""tokens_per_second > 0 AND full_tokens_per_second > 0 AND speed_ratio BETWEEN speed_ratio_low
            AND speed_ratio_high AND turns >= 1""",
        show="policy, budget, length, tokens_per_second, full_tokens_per_second, speed_ratio",
    ),
    Keys(
        name="retrieval keys are unique",
        table="retention_retrieval",
        meaning="A policy, budget, task, length and depth is one row.",
        columns=("policy", "budget", "task", "length", "depth"),
    ),
    Rows(
        name="retrieval is possible",
        table="retention_retrieval",
        meaning="Matches are shares of some prompts, and log-probabilities are at most 0.",
        must="""n >= 1 AND exact_match BETWEEN 0 AND 1 AND full_exact_match BETWEEN 0 AND 1
            AND answer_logprob <= 1e-4""",
        show="policy, budget, task, length, depth, n, exact_match, full_exact_match, answer_logprob",
    ),
)
