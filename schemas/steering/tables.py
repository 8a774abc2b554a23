"""Arrow schemas of reactivation and steering (PAPER 1.3): of files of cases, traits and experiments, and of tables."""

from __future__ import annotations

import pyarrow as pa

from schemas.arrow import schema_of

SHARD_FILES: dict[str, pa.Schema] = {
    # in a case's folder: the tokens of its prompts, special ones left out
    "prompt_tokens": schema_of(
        case=pa.string(),
        relation=pa.string(),
        prompt=pa.string(),
        position=pa.int32(),
        token_id=pa.int32(),
        token=pa.string(),
        in_text=pa.bool_(),  # of the prompt itself, not of the chat template around it
        in_place=pa.bool_(),  # where the case's prompts differ
        looked_at=pa.bool_(),  # after that place, and not left out by the case's look_at
    ),
    # in its folder for a layer: what is active at each of them
    "prompt_features": schema_of(
        prompt=pa.string(),
        position=pa.int32(),
        layer=pa.int32(),
        feature_id=pa.int32(),
        activation=pa.float32(),
    ),
    # in a trait's folder for a layer
    "trait_layers": schema_of(
        trait=pa.string(),
        layer=pa.int32(),
        separation=pa.float64(),  # of left-out prompts, in standard deviations; null for given features
        accuracy=pa.float64(),  # share of left-out pairs in the right order
        explained_variance=pa.float64(),  # of the dictionary, at the last function tokens of its prompts
        n_pairs=pa.int64(),
    ),
    "trait_features": schema_of(
        trait=pa.string(),
        layer=pa.int32(),
        place=pa.int32(),  # 1 for the strongest
        feature_id=pa.int32(),
        coefficient=pa.float64(),
        contribution=pa.float64(),  # |coefficient| times the norm of the decoder's direction
        clamp_value=pa.float64(),  # mean activation over the positive prompts that activate it
        mean_positive=pa.float64(),
        mean_negative=pa.float64(),
    ),
    # in an experiment's folder
    "steering": schema_of(
        case=pa.string(),
        prompt=pa.string(),
        target=pa.string(),
        traits=pa.string(),
        layer=pa.int32(),
        feature_ids=pa.list_(pa.int32()),
        mode=pa.string(),
        place=pa.string(),
        position=pa.int32(),  # null where every position is steered
        control=pa.string(),  # `trait` or `random`
        draw=pa.int32(),  # of a random control, from 1; 0 for the trait
        strength=pa.float64(),
        baseline_text=pa.string(),
        steered_text=pa.string(),
        kl=pa.float64(),
        target_logprob=pa.float64(),  # of the unsteered model
        target_logprob_delta=pa.float64(),
        baseline_perplexity=pa.float64(),
        perplexity=pa.float64(),
        relative_norm=pa.float64(),  # of the change at the steered position, to the residual's norm there
    ),
}

TABLES: dict[str, pa.Schema] = {
    # positions count the tokens that the model sees, from 0
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

SHARDED: dict[str, str] = {
    # not published: the table stage reads them
    "shard_prompt_tokens": 'f."case", f.relation, f.prompt, f.position, f.token_id, f.token, f.in_text, f.in_place, '
    "f.looked_at",
    # `source` is the case here: what is active in its prompts does not name it
    "shard_prompt_features": 's.source AS "case", f.prompt, f.position, f.layer, f.feature_id, f.activation',
}
