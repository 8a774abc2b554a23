"""What must hold of the tokenized corpus.

Views of the suite `tokenize`: `shards` (one row a shard, with what its manifest says and what was found in its files),
`vocabulary`, and of each shard `documents`, `rejects`, `token_counts` and, where kept, `occurrences`.
"""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows, differ

TOKENIZE: tuple[Expectation, ...] = (
    Query(
        name="shards follow each other",
        table="shards",
        meaning="A shard's first document number is the number of documents before it.",
        offenders="""SELECT * FROM (SELECT folder, source, doc_offset,
            coalesce(sum(n_documents) OVER (ORDER BY place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)
            AS documents_before FROM shards) WHERE doc_offset <> documents_before""",
    ),
    Query(
        name="documents + rejects = records read",
        table="shards",
        meaning="Every record read is a document or a reject, and each is in its file.",
        offenders="""SELECT folder, source, n_records, n_documents, n_rejects,
            found_documents, found_rejects FROM shards WHERE n_documents + n_rejects IS DISTINCT FROM n_records
            OR found_documents <> n_documents OR found_rejects <> n_rejects""",
    ),
    Query(
        name="sum(documents.n_tokens) = sum(tokens.count)",
        table="shards",
        meaning="Documents, token counts and the manifest agree on how many tokens there are.",
        offenders="""SELECT folder, source, n_tokens, found_document_tokens, found_counted_tokens FROM shards
            WHERE found_document_tokens <> n_tokens OR found_counted_tokens <> n_tokens""",
    ),
    Keys(
        name="document keys are unique",
        table="documents",
        shard=True,
        meaning="No document number stands twice in a shard.",
        columns=("doc",),
    ),
    Rows(
        name="document numbers are in range",
        table="documents",
        shard=True,
        meaning="0 ≤ doc < documents of the shard.",
        must="doc BETWEEN 0 AND n_documents - 1",
        show="folder, doc, line",
    ),
    Rows(
        name="documents have text",
        table="documents",
        shard=True,
        meaning="A document has characters; tokens are counted from 0.",
        must="n_chars > 0 AND n_tokens >= 0 AND line >= 0",
        show="folder, doc, line, n_chars, n_tokens",
    ),
    Rows(
        name="rejects say why",
        table="rejects",
        shard=True,
        meaning="Every reject has a reason, and says how many bytes it stands for.",
        must="length(reason) > 0 AND lost_bytes >= 0",
        show="folder, line, reason, lost_bytes",
    ),
    Keys(
        name="counted tokens are unique",
        table="token_counts",
        shard=True,
        meaning="A shard counts a token in one row.",
        columns=("token_id",),
    ),
    Rows(
        name="token counts are possible",
        table="token_counts",
        shard=True,
        meaning="1 ≤ doc_count ≤ count, and no more documents than the shard has.",
        must="doc_count BETWEEN 1 AND least(count, n_documents)",
        show="folder, token_id, count, doc_count",
    ),
    Query(
        name="token ids are in the vocabulary",
        table="token_counts",
        shard=True,
        needs=("vocabulary",),
        meaning="Every token id is one of the tokenizer's.",
        offenders="SELECT folder, token_id, count FROM token_counts ANTI JOIN vocabulary USING (token_id)",
    ),
    Keys(
        name="occurrence keys are unique",
        table="occurrences",
        shard=True,
        meaning="A position of a document holds one token.",
        columns=("doc", "position"),
    ),
    Rows(
        name="positions are from 0",
        table="occurrences",
        shard=True,
        meaning="position ≥ 0 in a document of the shard.",
        must="position >= 0 AND doc BETWEEN 0 AND n_documents - 1",
        show="folder, doc, position, token_id",
    ),
    Query(
        name="sum(tokens.count) = count(occurrences)",
        table="token_counts",
        shard=True,
        needs=("occurrences",),
        meaning="Each token's count and document count are those of its occurrences.",
        offenders=differ(
            """SELECT folder, token_id, count(*) AS count, count(DISTINCT doc) AS doc_count
            FROM occurrences GROUP BY ALL""",
            "SELECT folder, token_id, count, doc_count FROM token_counts",
            "folder, token_id",
            "count",
            "doc_count",
        ),
    ),
    Query(
        name="documents.n_tokens = occurrences grouped",
        table="documents",
        shard=True,
        needs=("occurrences",),
        meaning="Each document has as many occurrences as it has tokens.",
        offenders=differ(
            "SELECT folder, doc, count(*) AS n_tokens FROM occurrences GROUP BY ALL",
            "SELECT folder, doc, n_tokens FROM documents WHERE n_tokens > 0",
            "folder, doc",
            "n_tokens",
        ),
    ),
)
