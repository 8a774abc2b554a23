"""Arrow schemas of every file and table that functok writes.

Files of a shard carry `doc`, the document's number inside the shard, so that a shard does not change when
the corpus around it does; the catalogue's views add the shard's offset and give `doc_id`.
"""

from __future__ import annotations

import pyarrow as pa


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


SHARD_FILES: dict[str, pa.Schema] = {
    # in a token shard's folder
    "documents": _schema(doc=pa.int32(), line=pa.int64(), n_chars=pa.int64(), n_tokens=pa.int64()),
    "rejects": _schema(line=pa.int64(), reason=pa.string()),
    "token_counts": _schema(token_id=pa.int32(), count=pa.int64(), doc_count=pa.int64()),
    "occurrences": _schema(doc=pa.int32(), position=pa.int32(), token_id=pa.int32()),
    # special tokens found in the text: fed to the model, in no table
    "specials": _schema(doc=pa.int32(), position=pa.int32(), token_id=pa.int32()),
    # in a feature shard's folder
    "activations": _schema(
        doc=pa.int32(),
        position=pa.int32(),
        token_id=pa.int32(),
        feature_id=pa.int32(),
        activation=pa.float32(),
    ),
    "edges": _schema(token_id=pa.int32(), feature_id=pa.int32(), n=pa.int32()),
    "counts": _schema(token_id=pa.int32(), count=pa.int64()),
    # of one shard's documents, to hold some out
    "heldout": _schema(doc=pa.int32(), hash=pa.uint64(), n_tokens=pa.int64()),
    # in a loss shard's folder: `position` and `token_id` of the predicted token, `current_token_id` before it
    "token_losses": _schema(
        doc=pa.int32(),
        position=pa.int32(),
        current_token_id=pa.int32(),
        token_id=pa.int32(),
        loss=pa.float32(),
    ),
    # instead of it, where single losses are not kept; loss_units is the sum of round(loss * 2^32)
    "document_losses": _schema(
        doc=pa.int32(),
        current_is_function=pa.bool_(),
        next_is_function=pa.bool_(),
        n=pa.int64(),
        loss_units=pa.int64(),
    ),
    # of the SAE of a checkpoint on held-out text: tokens that activated a feature, where any did
    "densities": _schema(feature_id=pa.int32(), n=pa.int64()),
    # in a grown SAE's folder, one row
    "learned": _schema(
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
    "generations": _schema(prompt=pa.string(), continuation=pa.string(), mode=pa.string(), seed=pa.int64()),
    # in a finished training's folder
    "training_losses": _schema(
        step=pa.int64(),
        tokens=pa.int64(),
        loss=pa.float64(),
        learning_rate=pa.float64(),
        gradient_norm=pa.float64(),
    ),
}

VOCABULARY = _schema(token_id=pa.int32(), token=pa.string())

TABLES: dict[str, pa.Schema] = {
    "documents": _schema(doc_id=pa.int64(), source=pa.string(), n_chars=pa.int64(), n_tokens=pa.int64()),
    "rejects": _schema(source=pa.string(), line=pa.int64(), reason=pa.string()),
    "tokens": _schema(
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
    "occurrences": _schema(doc_id=pa.int64(), position=pa.int32(), token_id=pa.int32()),
    "activations": _schema(
        layer=pa.int32(),
        doc_id=pa.int64(),
        position=pa.int32(),
        token_id=pa.int32(),
        feature_id=pa.int32(),
        activation=pa.float32(),
    ),
    "edges": _schema(
        layer=pa.int32(),
        token_id=pa.int32(),
        feature_id=pa.int32(),
        n=pa.int64(),
        max_activation=pa.float32(),
        sum_activation=pa.float64(),
    ),
    "token_degree": _schema(
        layer=pa.int32(),
        token_id=pa.int32(),
        token=pa.string(),
        rank=pa.int64(),
        count=pa.int64(),
        is_function=pa.bool_(),
        degree=pa.int64(),
        rarefied_degree=pa.float64(),
        m=pa.int64(),
    ),
    "feature_degree": _schema(
        layer=pa.int32(), feature_id=pa.int32(), degree=pa.int64(), n=pa.int64(), density=pa.float64()
    ),
    "coverage": _schema(
        layer=pa.int32(),
        rank=pa.int64(),
        token_id=pa.int32(),
        token=pa.string(),
        new_features=pa.int64(),
        cumulative_features=pa.int64(),
        coverage=pa.float64(),
        dictionary_coverage=pa.float64(),
    ),
    "graph_summary": _schema(
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
    "dictionaries": _schema(
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
    "run_info": _schema(key=pa.string(), value=pa.string()),
    # consolidation (PAPER 1.4)
    "checkpoints": _schema(
        model=pa.string(),
        step=pa.int64(),
        source=pa.string(),
        tokens=pa.int64(),
        parameters=pa.int64(),
    ),
    "training_losses": _schema(
        model=pa.string(),
        step=pa.int64(),
        tokens=pa.int64(),
        loss=pa.float64(),
        learning_rate=pa.float64(),
        gradient_norm=pa.float64(),
    ),
    "token_losses": _schema(
        model=pa.string(),
        step=pa.int64(),
        doc_id=pa.int64(),
        position=pa.int32(),
        loss=pa.float32(),
        current_token_id=pa.int32(),
        token_id=pa.int32(),
    ),
    "document_losses": _schema(
        model=pa.string(),
        step=pa.int64(),
        doc_id=pa.int64(),
        bucket=pa.string(),
        n=pa.int64(),
        loss=pa.float64(),  # nats, summed
    ),
    "loss_buckets": _schema(
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
    "learned_features": _schema(
        model=pa.string(),
        step=pa.int64(),
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
    "checkpoint_degree": _schema(
        model=pa.string(),
        step=pa.int64(),
        layer=pa.int32(),
        token_id=pa.int32(),
        token=pa.string(),
        rank=pa.int64(),
        count=pa.int64(),
        is_function=pa.bool_(),
        degree=pa.int64(),
        rarefied_degree=pa.float64(),
        m=pa.int64(),
    ),
    # each checkpoint's graph in a row: features that function tokens, content tokens, and the ten most frequent
    # tokens activated, as counts and as shares of the activated ones
    "checkpoint_graph": _schema(
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
    "generations": _schema(
        model=pa.string(),
        step=pa.int64(),
        prompt=pa.string(),
        continuation=pa.string(),
        mode=pa.string(),
        seed=pa.int64(),
    ),
}
