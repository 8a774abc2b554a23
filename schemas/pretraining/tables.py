"""Arrow schemas of checkpoints, losses, growth and generations (PAPER 1.4): of files, and of tables."""

from __future__ import annotations

import pyarrow as pa

from schemas.arrow import schema_of
from schemas.graph.tables import TABLES as GRAPH


def _of_checkpoint(columns: pa.Schema) -> pa.Schema:
    """The same columns of many checkpoints."""
    named = schema_of(model=pa.string(), step=pa.int64())
    return pa.schema([*named, *(column for column in columns if column.name not in named.names)])


SHARD_FILES: dict[str, pa.Schema] = {
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
}

TABLES: dict[str, pa.Schema] = {
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
    "checkpoint_degree": _of_checkpoint(GRAPH["token_degree"]),
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
}


def _files_of(table: str) -> str:
    """A published table that is one file a checkpoint, which need not name it."""
    own = [f"f.{name}" for name in TABLES[table].names if name not in {"model", "step"}]
    return ", ".join(["s.model", "s.step", *own])


SHARDED: dict[str, str] = {
    "token_losses": "s.model, s.step, s.doc_offset + f.doc AS doc_id, f.position, f.loss, f.current_token_id, "
    "f.token_id",
    # made by the table stage
    **{table: _files_of(table) for table in ("document_losses", "checkpoint_degree", "checkpoint_graph")},
    # not published: the table stage reads it
    "shard_document_losses": "s.doc_offset + f.doc AS doc_id, f.current_is_function, f.next_is_function, f.n, "
    "f.loss_units",
}
