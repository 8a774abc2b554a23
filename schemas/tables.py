"""Arrow schemas of every table that functok publishes; `schemas.shard_files` has those of what they are made of."""

from __future__ import annotations

import pyarrow as pa

from schemas.shard_files import SHARD_FILES, VOCABULARY, schema_of

__all__ = ["SHARD_FILES", "TABLES", "VOCABULARY"]


def _of_checkpoint(columns: pa.Schema) -> pa.Schema:
    """The same columns of many checkpoints."""
    named = schema_of(model=pa.string(), step=pa.int64())
    return pa.schema([*named, *(column for column in columns if column.name not in named.names)])


_TOKEN_DEGREE = schema_of(
    layer=pa.int32(),
    token_id=pa.int32(),
    token=pa.string(),
    rank=pa.int64(),
    count=pa.int64(),
    is_function=pa.bool_(),
    degree=pa.int64(),
    rarefied_degree=pa.float64(),
    m=pa.int64(),
)

TABLES: dict[str, pa.Schema] = {
    "documents": schema_of(doc_id=pa.int64(), source=pa.string(), n_chars=pa.int64(), n_tokens=pa.int64()),
    "rejects": schema_of(
        source=pa.string(), line=pa.int64(), reason=pa.string(), lost_bytes=pa.int64(), lost_lines=pa.int64()
    ),
    "tokens": schema_of(
        token_id=pa.int32(),
        token=pa.string(),
        count=pa.int64(),
        doc_count=pa.int64(),
        doc_share=pa.float64(),
        rank=pa.int64(),
        share=pa.float64(),
        cumulative_share=pa.float64(),
        is_function=pa.bool_(),
    ),
    "occurrences": schema_of(doc_id=pa.int64(), position=pa.int32(), token_id=pa.int32()),
    "activations": schema_of(
        layer=pa.int32(),
        doc_id=pa.int64(),
        position=pa.int32(),
        token_id=pa.int32(),
        feature_id=pa.int32(),
        activation=pa.float32(),
    ),
    "edges": schema_of(
        layer=pa.int32(),
        token_id=pa.int32(),
        feature_id=pa.int32(),
        n=pa.int64(),
        max_activation=pa.float32(),
        sum_activation=pa.float64(),
    ),
    "token_degree": _TOKEN_DEGREE,
    "feature_degree": schema_of(
        layer=pa.int32(), feature_id=pa.int32(), degree=pa.int64(), n=pa.int64(), density=pa.float64()
    ),
    "coverage": schema_of(
        layer=pa.int32(),
        rank=pa.int64(),
        token_id=pa.int32(),
        token=pa.string(),
        new_features=pa.int64(),
        cumulative_features=pa.int64(),
        coverage=pa.float64(),
        dictionary_coverage=pa.float64(),
    ),
    "graph_summary": schema_of(
        layer=pa.int32(),
        dictionary_size=pa.int64(),
        activated_features=pa.int64(),
        n_tokens=pa.int64(),
        n_edges=pa.int64(),
        mean_l0=pa.float64(),
        alpha=pa.float64(),
        xmin=pa.float64(),
        ks=pa.float64(),
    ),
    # beyond the contract: what the report says about the run
    "dictionaries": schema_of(
        layer=pa.int32(),
        dictionary_size=pa.int64(),
        source=pa.string(),
        k=pa.float64(),
        l0=pa.float64(),
        explained_variance=pa.float64(),
        explained_variance_all=pa.float64(),
        alive_share=pa.float64(),
        heldout_tokens=pa.float64(),
    ),
    "run_info": schema_of(key=pa.string(), value=pa.string()),
    # consolidation (PAPER 1.4)
    "checkpoints": schema_of(
        model=pa.string(),
        step=pa.int64(),
        source=pa.string(),
        tokens=pa.int64(),
        parameters=pa.int64(),
    ),
    "training_losses": _of_checkpoint(SHARD_FILES["training_losses"]),
    "token_losses": schema_of(
        model=pa.string(),
        step=pa.int64(),
        doc_id=pa.int64(),
        position=pa.int32(),
        loss=pa.float32(),
        current_token_id=pa.int32(),
        token_id=pa.int32(),
    ),
    "document_losses": schema_of(
        model=pa.string(),
        step=pa.int64(),
        doc_id=pa.int64(),
        bucket=pa.string(),
        n=pa.int64(),
        loss=pa.float64(),  # nats, summed
    ),
    "loss_buckets": schema_of(
        model=pa.string(),
        step=pa.int64(),
        bucket=pa.string(),
        n=pa.int64(),
        mean_loss=pa.float64(),
        loss_share=pa.float64(),
        mean_low=pa.float64(),
        mean_high=pa.float64(),
        share_low=pa.float64(),
        share_high=pa.float64(),
    ),
    "learned_features": _of_checkpoint(SHARD_FILES["learned"]),
    "checkpoint_degree": _of_checkpoint(_TOKEN_DEGREE),
    # each checkpoint's graph in a row: features that function tokens, content tokens, and the ten most frequent
    # tokens activated, as counts and as shares of the activated ones
    "checkpoint_graph": schema_of(
        model=pa.string(),
        step=pa.int64(),
        layer=pa.int32(),
        dictionary_size=pa.int64(),
        n_tokens=pa.int64(),
        n_edges=pa.int64(),
        mean_l0=pa.float64(),
        activated_features=pa.int64(),
        function_features=pa.int64(),
        content_features=pa.int64(),
        function_coverage=pa.float64(),
        content_coverage=pa.float64(),
        top10_coverage=pa.float64(),
    ),
    "generations": _of_checkpoint(SHARD_FILES["generations"]),
    # reactivation and steering (PAPER 1.3); positions count the tokens that the model sees, from 0
    "prompt_tokens": schema_of(
        case=pa.string(),
        relation=pa.string(),
        prompt=pa.string(),
        position=pa.int32(),
        token_id=pa.int32(),
        token=pa.string(),
        is_function=pa.bool_(),
        in_text=pa.bool_(),
        in_place=pa.bool_(),
        looked_at=pa.bool_(),
    ),
    "reactivations": schema_of(
        case=pa.string(),
        prompt=pa.string(),
        position=pa.int32(),
        token=pa.string(),
        is_function=pa.bool_(),
        layer=pa.int32(),
        feature_id=pa.int32(),
        activation=pa.float32(),
        relation=pa.string(),
        token_id=pa.int32(),
        in_place=pa.bool_(),
        is_own=pa.bool_(),  # active where the prompts differ, in this prompt and in no other of its case
    ),
    # how many of a prompt's own features are active again at a later position: in the prompt itself, at the same
    # position of the case's other prompts, and at the same token in prompts of other relations. n_… are the
    # chances: own features times prompts or occurrences.
    "reactivation_positions": schema_of(
        case=pa.string(),
        relation=pa.string(),
        prompt=pa.string(),
        layer=pa.int32(),
        position=pa.int32(),
        token_id=pa.int32(),
        token=pa.string(),
        is_function=pa.bool_(),
        in_text=pa.bool_(),
        n_own=pa.int64(),
        own=pa.int64(),
        n_counterfactual=pa.int64(),
        counterfactual=pa.int64(),
        n_unrelated=pa.int64(),
        unrelated=pa.int64(),
    ),
    # the same as shares, over all cases, with 95 % intervals by case; token is null for all of a kind. A position
    # weighs as many as its prompt has own features, in every share; `unrelated` and the excess over it are of the
    # positions whose token stands in prompts of other relations.
    "reactivation_scores": schema_of(
        layer=pa.int32(),
        kind=pa.string(),  # `function` or `content`
        token=pa.string(),
        n_cases=pa.int64(),
        n_positions=pa.int64(),
        **{
            f"{score}{end}": pa.float64()
            for score in ("own", "counterfactual", "unrelated", "excess", "excess_unrelated")
            for end in ("", "_low", "_high")
        },
    ),
    "trait_layers": SHARD_FILES["trait_layers"].append(pa.field("is_most_informative", pa.bool_())),
    "trait_features": SHARD_FILES["trait_features"],
    "steering": SHARD_FILES["steering"],
    # means over the experiments, with 95 % intervals by experiment; the advantage is over the random controls of
    # the same setting, null for these
    "steering_effects": schema_of(
        mode=pa.string(),
        place=pa.string(),
        control=pa.string(),
        strength=pa.float64(),
        n=pa.int64(),
        **{
            f"{effect}{end}": pa.float64()
            for effect in ("target_logprob_delta", "advantage", "kl", "log_perplexity_delta")
            for end in ("", "_low", "_high")
        },
        changed=pa.float64(),  # share of the texts that are not the unsteered model's
        relative_norm=pa.float64(),
    ),
}
