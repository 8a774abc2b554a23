"""What must hold of readings, of the learned gate, and of speeds (PAPER 2).

Views of the `retention` suite: `shards` (a row a reading, with its setup and `sequence`), `wanted` (the configured
setups), and of each reading's folder `reading_sums`, `reading_losses`, `reading_layers` and `reading_survival`. Of
`retention_gate`: `gate_weights`. Of `retention_speed`: `decode_turns`.
"""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows

RETENTION: tuple[Expectation, ...] = (
    Keys(
        name="one reading a sequence and setup",
        table="shards",
        meaning="No sequence was read twice under one policy, budget and protocol.",
        columns=("policy", "budget", "protocol", "length", "sequence"),
    ),
    Query(
        name="every setup has readings",
        table="shards",
        needs=("wanted",),
        meaning="The configured policies, budgets, protocols and lengths are those that have readings.",
        offenders="""SELECT policy, budget, protocol, length, w.policy IS NOT NULL AS is_configured,
                s.policy IS NOT NULL AS has_readings
            FROM wanted AS w FULL JOIN (SELECT DISTINCT policy, budget, protocol, length FROM shards) AS s
            USING (policy, budget, protocol, length) WHERE w.policy IS NULL OR s.policy IS NULL""",
    ),
    Query(
        name="setups read the same text",
        table="shards",
        meaning="All policies and budgets have read the same sequences, and as many predictions of each count.",
        offenders="""SELECT * FROM (SELECT policy, budget, protocol, length, sequence, found_predictions,
                max(found_predictions) OVER (PARTITION BY protocol, length, sequence) AS most_predictions,
                count(*) OVER (PARTITION BY policy, budget, protocol, length) AS sequences,
                max(sequence + 1) OVER (PARTITION BY length) AS most_sequences FROM shards)
            WHERE found_predictions <> most_predictions OR sequences <> most_sequences""",
    ),
    Query(
        name="a reading is one row",
        table="reading_sums",
        shard=True,
        meaning="A reading has one row of sums.",
        offenders="SELECT any_value(folder) AS folder, count(*) AS n_rows FROM reading_sums HAVING count(*) <> 1",
    ),
    Rows(
        name="sums of a reading are possible",
        table="reading_sums",
        shard=True,
        meaning="Predictions are there, losses are at least 0, and so is KL, up to rounding.",
        must="""n >= 1 AND loss_units >= 0 AND full_loss_units >= 0 AND kl_units >= -(n * 65536)
            AND agreed >= 0 AND agreed <= n AND chunks >= 1""",
        show="folder, policy, n, loss_units, full_loss_units, kl_units, agreed, chunks",
    ),
    Rows(
        name="budgets are kept",
        table="reading_sums",
        shard=True,
        meaning="After no chunk does a reading hold more slots or bytes than its budget allows.",
        must="""coalesce(most_slots <= allowed_slots, true) AND coalesce(most_bytes <= allowed_bytes, true)
            AND (policy = 'full' OR allowed_bytes IS NOT NULL)""",
        show="folder, policy, protocol, most_slots, allowed_slots, most_bytes, allowed_bytes",
    ),
    Rows(
        name="the full cache equals itself",
        table="reading_sums",
        shard=True,
        meaning="Read twice, the full cache gives the same logits to the bit, and holds the same bytes.",
        must="""policy <> 'full' OR (loss_units = full_loss_units AND kl_units = 0 AND agreed = n
            AND most_bytes = full_bytes AND hot_bytes + warm_bytes + state_bytes = full_bytes)""",
        show="""folder, loss_units, full_loss_units, kl_units, agreed, n, most_bytes, full_bytes, hot_bytes, warm_bytes,
            state_bytes""",
    ),
    Rows(
        name="bytes of tiers add up",
        table="reading_sums",
        shard=True,
        meaning="What tiers and state hold after chunks is at most what the reading held, and that at most its peak.",
        must="""hot_bytes > 0 AND warm_bytes >= 0 AND state_bytes >= 0
            AND hot_bytes + warm_bytes + state_bytes <= chunks * most_bytes
            AND hot_bytes + warm_bytes + state_bytes >= most_bytes AND most_bytes <= peak_bytes""",
        show="folder, policy, chunks, hot_bytes, warm_bytes, state_bytes, most_bytes, peak_bytes",
    ),
    Keys(
        name="groups of losses are unique",
        table="reading_losses",
        shard=True,
        meaning="A bucket and range of positions is one row.",
        columns=("bucket", "position_from"),
    ),
    Query(
        name="groups of losses add up",
        table="reading_losses",
        shard=True,
        needs=("reading_sums",),
        meaning="Over all buckets and positions they are the reading's own sums.",
        offenders="""SELECT s.folder, s.n, l.n AS counted_n, s.loss_units, l.loss_units AS counted_loss_units,
                s.full_loss_units, l.full_loss_units AS counted_full_loss_units
            FROM reading_sums AS s, (SELECT sum(n) AS n, sum(loss_units) AS loss_units,
                sum(full_loss_units) AS full_loss_units FROM reading_losses) AS l
            WHERE s.n IS DISTINCT FROM l.n OR s.loss_units IS DISTINCT FROM l.loss_units
                OR s.full_loss_units IS DISTINCT FROM l.full_loss_units""",
    ),
    Keys(
        name="layers of a reading are unique",
        table="reading_layers",
        shard=True,
        meaning="A layer is one row.",
        columns=("layer",),
    ),
    Rows(
        name="figures of layers are possible",
        table="reading_layers",
        shard=True,
        meaning="Errors and entropies are at least 0, masses from 0 to 1, similarities cosines.",
        must="""coalesce(error >= 0 AND isfinite(error), true)
            AND coalesce(local_error >= 0 AND isfinite(local_error), true)
            AND coalesce(retained_mass BETWEEN -1e-4 AND 1.0001, true)
            AND coalesce(attention_entropy >= -1e-4 AND full_attention_entropy >= -1e-4, true)
            AND coalesce(abs(key_similarity) <= 1.0001, true) AND coalesce(abs(full_key_similarity) <= 1.0001, true)
            AND coalesce(kept_function BETWEEN 0 AND kept, true)""",
        show="""folder, policy, layer, error, local_error, retained_mass, attention_entropy, key_similarity, kept,
            kept_function""",
    ),
    Rows(
        name="the full cache has no error",
        table="reading_layers",
        shard=True,
        meaning="Read twice, residual streams are the same to the bit, and no attention is lost.",
        must="""policy <> 'full' OR coalesce(error = 0 AND coalesce(local_error = 0, true)
            AND coalesce(retained_mass > 0.9999 AND attention_entropy = full_attention_entropy, true), true)""",
        show="folder, layer, error, local_error, retained_mass, attention_entropy, full_attention_entropy",
    ),
    Keys(
        name="ages of a life table are unique",
        table="reading_survival",
        shard=True,
        meaning="A layer, kind, tier and age is one row.",
        columns=("layer", "kind", "tier", "age"),
    ),
    Query(
        name="lives end once",
        table="reading_survival",
        shard=True,
        meaning="Who is there to leave at an age was there at the age before and stayed.",
        offenders="""SELECT * FROM (SELECT folder, policy, layer, kind, tier, age, at_risk, died,
                lag(at_risk - died) OVER (PARTITION BY layer, kind, tier ORDER BY age) AS stayed
            FROM reading_survival) WHERE died < 0 OR died > at_risk OR at_risk < 1 OR at_risk > stayed""",
    ),
    Query(
        name="tiers are nested",
        table="reading_survival",
        shard=True,
        meaning="At each age as many or more have a slot (warm) as are exact (hot), and live on (cold) as have a slot.",
        offenders="""SELECT a.folder, a.layer, a.kind, a.age, a.tier, a.at_risk, b.tier AS better_tier,
                b.at_risk AS better_at_risk
            FROM reading_survival AS a JOIN reading_survival AS b USING (layer, kind, age)
            WHERE ((a.tier = 'warm' AND b.tier = 'hot') OR (a.tier = 'cold' AND b.tier = 'warm'))
                AND a.at_risk < b.at_risk""",
    ),
)

GATE: tuple[Expectation, ...] = (
    Keys(
        name="weights of a gate are unique",
        table="gate_weights",
        meaning="A layer, head and signal has one weight.",
        columns=("layer", "head", "signal"),
    ),
    Rows(
        name="weights of a gate are numbers",
        table="gate_weights",
        meaning="Weights are finite, and no more than everything is explained.",
        must="isfinite(weight) AND explained <= 1.0001",
        show="layer, head, signal, weight, explained",
    ),
)

SPEED: tuple[Expectation, ...] = (
    Rows(
        name="turns take time",
        table="decode_turns",
        meaning="A turn decodes some tokens in some time.",
        must="seconds > 0 AND full_seconds > 0 AND tokens > 0",
        show="turn, seconds, full_seconds, tokens",
    ),
)
