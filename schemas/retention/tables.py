"""Tables of retention (PAPER 2), and the files that they are made of.

A reading is a sequence read under a policy, budget and protocol, beside the full run. Losses are multiples of 2⁻³²
nats as integers, so that tables do not depend on the order of documents; `policy` is the name that the configuration
gives (`retention.options`), and `length` the tokens of a sequence.
"""

from __future__ import annotations

import pyarrow as pa

from schemas.arrow import schema_of


def _of_setup(**columns: pa.DataType) -> pa.Schema:
    return schema_of(
        policy=pa.string(), budget=pa.float64(), protocol=pa.string(), length=pa.int64(), **columns
    )


SHARD_FILES: dict[str, pa.Schema] = {
    # in a reading's folder, one row: sums over its predictions, and bytes over its chunks
    "reading_sums": schema_of(
        n=pa.int64(),
        loss_units=pa.int64(),
        full_loss_units=pa.int64(),
        kl_units=pa.int64(),
        agreed=pa.int64(),
        chunks=pa.int64(),  # after which the budget held, once something had to leave
        hot_bytes=pa.int64(),  # summed over these chunks: exact keys and values
        warm_bytes=pa.int64(),  # codes, scales and zeros
        state_bytes=pa.int64(),  # positions, votes, and what the policy remembers
        most_bytes=pa.int64(),  # after any chunk after which the budget held
        peak_bytes=pa.int64(),
        full_bytes=pa.int64(),  # of the full run's cache of the same tokens, once
        allowed_bytes=pa.int64(),
        most_slots=pa.int64(),
        allowed_slots=pa.int64(),
    ),
    # a row a bucket and range of positions
    "reading_losses": schema_of(
        bucket=pa.string(),
        position_from=pa.int64(),
        position_to=pa.int64(),
        n=pa.int64(),
        loss_units=pa.int64(),
        full_loss_units=pa.int64(),
    ),
    # a row a governed layer
    "reading_layers": schema_of(
        layer=pa.int32(),
        n=pa.int64(),  # tokens that the medians and means are of
        error=pa.float64(),
        local_error=pa.float64(),
        retained_mass=pa.float64(),
        attention_entropy=pa.float64(),
        full_attention_entropy=pa.float64(),
        key_similarity=pa.float64(),
        full_key_similarity=pa.float64(),
        kept=pa.int64(),
        kept_function=pa.int64(),
    ),
    # a row a layer, kind, tier and age: exact counts of a life table
    "reading_survival": schema_of(
        layer=pa.int32(),
        kind=pa.string(),
        tier=pa.string(),
        age=pa.int64(),
        at_risk=pa.int64(),
        died=pa.int64(),
    ),
    # a learned gate: a row a layer, key-value head and signal (`bias` too)
    "gate_weights": schema_of(
        layer=pa.int32(), head=pa.int32(), signal=pa.string(), weight=pa.float64(), explained=pa.float64()
    ),
    # a row a turn of a policy's cache and of the full one, in alternation
    "decode_turns": schema_of(
        turn=pa.int32(), seconds=pa.float64(), full_seconds=pa.float64(), tokens=pa.int64()
    ),
    # a row a prompt
    "retrieval_answers": schema_of(
        policy=pa.string(),
        budget=pa.float64(),
        task=pa.string(),
        length=pa.int64(),
        depth=pa.float64(),
        number=pa.int64(),
        n_tokens=pa.int64(),  # of the answer
        exact_match=pa.bool_(),
        answer_logprob=pa.float64(),
    ),
}

TABLES: dict[str, pa.Schema] = {
    # a row a reading, which the report pairs by sequence: sums over predictions, and means over layers
    "retention_readings": _of_setup(
        sequence=pa.int64(),
        n=pa.int64(),
        delta_nll_sum=pa.float64(),
        kl_sum=pa.float64(),
        agreed=pa.int64(),
        retained_mass=pa.float64(),
        log_carried=pa.float64(),
        last_error=pa.float64(),
        key_similarity=pa.float64(),
        full_key_similarity=pa.float64(),
    ),
    "retention": _of_setup(
        kv_bytes_share=pa.float64(),
        n_documents=pa.int64(),
        n_tokens=pa.int64(),
        perplexity=pa.float64(),
        full_perplexity=pa.float64(),
        perplexity_ratio=pa.float64(),
        perplexity_ratio_low=pa.float64(),
        perplexity_ratio_high=pa.float64(),
        kl=pa.float64(),
        kl_low=pa.float64(),
        kl_high=pa.float64(),
        top1_agreement=pa.float64(),
        top1_agreement_low=pa.float64(),
        top1_agreement_high=pa.float64(),
        kv_bytes_mean=pa.float64(),
        kv_bytes_peak=pa.int64(),
        kv_bytes_most=pa.int64(),
        kv_bytes_allowed=pa.int64(),
        hot_bytes_mean=pa.float64(),
        warm_bytes_mean=pa.float64(),
        state_bytes_mean=pa.float64(),
        slots_most=pa.int64(),
        slots_allowed=pa.int64(),
        tokens_per_second=pa.float64(),
        full_tokens_per_second=pa.float64(),
        speed_ratio=pa.float64(),
    ),
    # over tokens that were read after something had first to leave: before, a reading is the full run, and would only
    # dilute PAPER 2's medians over tokens
    "retention_layers": _of_setup(
        layer=pa.int32(),
        n_documents=pa.int64(),
        error=pa.float64(),
        error_low=pa.float64(),
        error_high=pa.float64(),
        local_error=pa.float64(),
        carried=pa.float64(),
        carried_low=pa.float64(),
        carried_high=pa.float64(),
        retained_mass=pa.float64(),
        retained_mass_low=pa.float64(),
        retained_mass_high=pa.float64(),
        attention_entropy=pa.float64(),
        full_attention_entropy=pa.float64(),
        key_similarity=pa.float64(),
        full_key_similarity=pa.float64(),
        function_share=pa.float64(),
    ),
    "retention_survival": _of_setup(
        layer=pa.int32(),
        kind=pa.string(),
        tier=pa.string(),
        age=pa.int64(),
        survival=pa.float64(),
        at_risk=pa.int64(),
        died=pa.int64(),
        ratio_to_random=pa.float64(),
    ),
    # the same over all layers
    "retention_curves": _of_setup(
        kind=pa.string(),
        tier=pa.string(),
        age=pa.int64(),
        at_risk=pa.int64(),
        died=pa.int64(),
        survival=pa.float64(),
        survival_low=pa.float64(),
        survival_high=pa.float64(),
        ratio_to_random=pa.float64(),
        ratio_to_random_low=pa.float64(),
        ratio_to_random_high=pa.float64(),
    ),
    "retention_losses": _of_setup(
        bucket=pa.string(),
        position_from=pa.int64(),
        position_to=pa.int64(),
        n=pa.int64(),
        delta_nll=pa.float64(),
        delta_nll_low=pa.float64(),
        delta_nll_high=pa.float64(),
    ),
    # the same over all positions (position_* null), and over all buckets (bucket null)
    "retention_margins": _of_setup(
        bucket=pa.string(),
        position_from=pa.int64(),
        position_to=pa.int64(),
        n=pa.int64(),
        delta_nll=pa.float64(),
        delta_nll_low=pa.float64(),
        delta_nll_high=pa.float64(),
    ),
    "retention_speed": schema_of(
        policy=pa.string(),
        budget=pa.float64(),
        length=pa.int64(),
        turns=pa.int64(),
        tokens=pa.int64(),
        tokens_per_second=pa.float64(),
        full_tokens_per_second=pa.float64(),
        speed_ratio=pa.float64(),
        speed_ratio_low=pa.float64(),
        speed_ratio_high=pa.float64(),
        kv_bytes=pa.int64(),
        full_kv_bytes=pa.int64(),
        device=pa.string(),
        threads=pa.int32(),
        load=pa.float64(),
    ),
    "retention_gates": schema_of(
        layer=pa.int32(), head=pa.int32(), signal=pa.string(), weight=pa.float64(), explained=pa.float64()
    ),
    "retention_retrieval": schema_of(
        policy=pa.string(),
        budget=pa.float64(),
        task=pa.string(),
        length=pa.int64(),
        depth=pa.float64(),
        n=pa.int64(),
        full_exact_match=pa.float64(),
        exact_match=pa.float64(),
        answer_logprob=pa.float64(),
        full_answer_logprob=pa.float64(),
        counts=pa.bool_(),  # whether the full model solves the task in 90 % or more
    ),
}

SHARDED: dict[str, str] = {
    f"shard_{name}": "s.source AS folder, " + ", ".join(f"f.{column}" for column in SHARD_FILES[name].names)
    for name in (
        *("reading_sums", "reading_losses", "reading_layers", "reading_survival"),
        "retrieval_answers",
    )
}
"""Not published: the table stage reads them. `source` of a file is its folder, which says what was read how."""
