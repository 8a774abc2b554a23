"""Arrow schemas of every file that a stage writes for a shard, a checkpoint, a case or an experiment.

Files of a shard carry `doc`, the document's number inside the shard, so that a shard does not change when
the corpus around it does; the catalogue's views add the shard's offset and give `doc_id`.
"""

from __future__ import annotations

import pyarrow as pa


def schema_of(**columns: pa.DataType) -> pa.Schema:
    """A schema of nullable columns, in the order given."""
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


SHARD_FILES: dict[str, pa.Schema] = {
    # in a token shard's folder
    "documents": schema_of(doc=pa.int32(), line=pa.int64(), n_chars=pa.int64(), n_tokens=pa.int64()),
    # of what was not used: its uncompressed bytes, 0 for empty records, and its lines (rows), null where not known
    "rejects": schema_of(line=pa.int64(), reason=pa.string(), lost_bytes=pa.int64(), lost_lines=pa.int64()),
    "token_counts": schema_of(token_id=pa.int32(), count=pa.int64(), doc_count=pa.int64()),
    "occurrences": schema_of(doc=pa.int32(), position=pa.int32(), token_id=pa.int32()),
    # special tokens found in the text: fed to the model, in no table
    "specials": schema_of(doc=pa.int32(), position=pa.int32(), token_id=pa.int32()),
    # in a feature shard's folder
    "activations": schema_of(
        doc=pa.int32(),
        position=pa.int32(),
        token_id=pa.int32(),
        feature_id=pa.int32(),
        activation=pa.float32(),
    ),
    "edges": schema_of(token_id=pa.int32(), feature_id=pa.int32(), n=pa.int32()),
    "counts": schema_of(token_id=pa.int32(), count=pa.int64()),
    # of one shard's documents, to hold some out
    "heldout": schema_of(doc=pa.int32(), hash=pa.uint64(), n_tokens=pa.int64()),
    # in a loss shard's folder: `position` and `token_id` of the predicted token, `current_token_id` before it
    "token_losses": schema_of(
        doc=pa.int32(),
        position=pa.int32(),
        current_token_id=pa.int32(),
        token_id=pa.int32(),
        loss=pa.float32(),
    ),
    # instead of it, where single losses are not kept; loss_units is the sum of round(loss * 2^32)
    "document_losses": schema_of(
        doc=pa.int32(),
        current_is_function=pa.bool_(),
        next_is_function=pa.bool_(),
        n=pa.int64(),
        loss_units=pa.int64(),
    ),
    # of the SAE of a checkpoint on held-out text: tokens that activated a feature, where any did
    "densities": schema_of(feature_id=pa.int32(), n=pa.int64()),
    # in a grown SAE's folder, one row
    "learned": schema_of(
        layer=pa.int32(),
        dictionary_size=pa.int64(),
        learned_features=pa.int64(),
        l0=pa.float64(),
        explained_variance=pa.float64(),
        ce_recovered=pa.float64(),
        alive_features=pa.int64(),
        dense_features=pa.int64(),
        ce=pa.float64(),
        ce_sae=pa.float64(),
        ce_zero=pa.float64(),
        heldout_tokens=pa.int64(),
        min_density=pa.float64(),
        max_density=pa.float64(),
    ),
    # in a folder of generations
    "generations": schema_of(prompt=pa.string(), continuation=pa.string(), mode=pa.string(), seed=pa.int64()),
    # in a finished training's folder
    "training_losses": schema_of(
        step=pa.int64(),
        tokens=pa.int64(),
        loss=pa.float64(),
        learning_rate=pa.float64(),
        gradient_norm=pa.float64(),
    ),
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

VOCABULARY = schema_of(token_id=pa.int32(), token=pa.string())
