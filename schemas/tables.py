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
}
