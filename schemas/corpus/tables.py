"""Arrow schemas of the corpus: of the files that tokenizing writes for a shard, and of the tables made of them."""

from __future__ import annotations

import pyarrow as pa

from schemas.arrow import schema_of

SHARD_FILES: dict[str, pa.Schema] = {
    # in a token shard's folder
    "documents": schema_of(doc=pa.int32(), line=pa.int64(), n_chars=pa.int64(), n_tokens=pa.int64()),
    # of what was not used: its uncompressed bytes, 0 for empty records, and its lines (rows), null where not known
    "rejects": schema_of(line=pa.int64(), reason=pa.string(), lost_bytes=pa.int64(), lost_lines=pa.int64()),
    "token_counts": schema_of(token_id=pa.int32(), count=pa.int64(), doc_count=pa.int64()),
    "occurrences": schema_of(doc=pa.int32(), position=pa.int32(), token_id=pa.int32()),
    # special tokens found in the text: fed to the model, in no table
    "specials": schema_of(doc=pa.int32(), position=pa.int32(), token_id=pa.int32()),
    # of one shard's documents, to hold some out
    "heldout": schema_of(doc=pa.int32(), hash=pa.uint64(), n_tokens=pa.int64()),
}

VOCABULARY = schema_of(token_id=pa.int32(), token=pa.string())
"""Of the file of all the tokenizer's tokens, as text."""

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
    "run_info": schema_of(key=pa.string(), value=pa.string()),
}

SHARDED: dict[str, str] = {
    "documents": "s.doc_offset + f.doc AS doc_id, s.source, f.n_chars, f.n_tokens",
    # whatever else its files say: those of older roots do not count what was lost
    "rejects": "s.source, f.* EXCLUDE (filename)",
    "occurrences": "s.doc_offset + f.doc AS doc_id, f.position, f.token_id",
    # not published: the table stage reads it
    "shard_token_counts": "f.token_id, f.count, f.doc_count",
}
