"""Arrow schemas of the token-feature graph (PAPER 1.2): of a feature shard's files, and of the tables."""

from __future__ import annotations

import pyarrow as pa

from schemas.arrow import schema_of

SHARD_FILES: dict[str, pa.Schema] = {
    # in a feature shard's folder
    "activations": schema_of(
        doc=pa.int32(),
        position=pa.int32(),
        token_id=pa.int32(),
        feature_id=pa.int32(),
        activation=pa.float32(),
    ),
    # sum_units: the activations' sum, in units of 2^-scale; NULL where n = 1, for it is the maximum
    "edges": schema_of(
        token_id=pa.int32(),
        feature_id=pa.int32(),
        n=pa.int32(),
        max_activation=pa.float32(),
        sum_units=pa.int64(),
        scale=pa.int32(),
    ),
    "counts": schema_of(token_id=pa.int32(), count=pa.int64()),
}

TABLES: dict[str, pa.Schema] = {
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
    "token_degree": schema_of(
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
}

SHARDED: dict[str, str] = {
    "activations": "s.layer, s.doc_offset + f.doc AS doc_id, f.position, f.token_id, f.feature_id, f.activation",
    # one file a layer, made by the table stage
    "edges": "f.layer, f.token_id, f.feature_id, f.n, f.max_activation, f.sum_activation",
    # not published: the table stage reads them
    "shard_edges": "s.layer, f.token_id, f.feature_id, f.n, f.max_activation, f.sum_units, f.scale",
    "shard_graph_counts": "s.layer, f.token_id, f.count",
}
