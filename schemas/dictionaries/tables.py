"""Arrow schema of the table of dictionaries: beyond the contract, what the report says about the run."""

from __future__ import annotations

import pyarrow as pa

from schemas.arrow import schema_of

TABLES: dict[str, pa.Schema] = {
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
}
