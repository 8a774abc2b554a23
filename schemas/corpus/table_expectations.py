"""What must hold of the corpus' tables, before they are published."""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows, differ

GROUPED = {"occurrences": {"occurrences_by_token": "token_id", "occurrences_by_document": "doc_id"}}
TOTALS = {"occurrences": "count(*) AS n, min(position) AS first_position"}

CORPUS: tuple[Expectation, ...] = (
    Query(
        name="doc_id counts from 0",
        table="documents",
        meaning="The documents' keys are 0 … n - 1.",
        offenders="""SELECT min(doc_id) AS first_doc_id, max(doc_id) AS last_doc_id, count(*) AS documents
            FROM documents HAVING first_doc_id <> 0 OR last_doc_id <> documents - 1""",
    ),
    Query(
        name="doc_id is unique",
        table="documents",
        meaning="No two documents have one key.",
        offenders="""SELECT doc_id, count(*) AS rows, min(source) AS source FROM documents
            GROUP BY doc_id HAVING rows > 1""",
    ),
    Keys(name="token_id is unique", table="tokens", meaning="A token is one row.", columns=("token_id",)),
    Rows(
        name="tokens are decoded and counted",
        table="tokens",
        meaning="Every token has its text, and 1 ≤ doc_count ≤ count.",
        must="token IS NOT NULL AND token_id >= 0 AND doc_count BETWEEN 1 AND count",
        show="token_id, token, count, doc_count, rank",
    ),
    Query(
        name="sum(documents.n_tokens) = sum(tokens.count)",
        table="tokens",
        needs=("documents",),
        meaning="Every token of every document is counted once.",
        offenders="""SELECT * FROM (SELECT sum(n_tokens) AS document_tokens FROM documents),
            (SELECT sum(count) AS counted FROM tokens) WHERE coalesce(document_tokens, 0) <> coalesce(counted, 0)""",
    ),
    Query(
        name="sum(tokens.count) = count(occurrences)",
        table="tokens",
        needs=("occurrences_by_token",),
        meaning="Each token's count is the number of its occurrences.",
        offenders=differ(
            "SELECT token_id, n AS count FROM occurrences_by_token",
            "SELECT token_id, count FROM tokens",
            "token_id",
            "count",
        ),
    ),
    Query(
        name="occurrences stand in their documents",
        table="occurrences",
        needs=("documents", "occurrences_by_document"),
        meaning="Each document has as many occurrences as it has tokens, at positions from 0.",
        offenders=differ(
            "SELECT doc_id, n AS n_tokens, first_position >= 0 AS placed FROM occurrences_by_document",
            "SELECT doc_id, n_tokens, true AS placed FROM documents WHERE n_tokens > 0",
            "doc_id",
            "n_tokens",
            "placed",
        ),
    ),
    Query(
        name="ranks follow counts",
        table="tokens",
        meaning="rank is 1 … n by count descending, token_id ascending.",
        offenders="""SELECT * FROM (SELECT token_id, token, count, rank,
            row_number() OVER (ORDER BY count DESC, token_id) AS expected_rank FROM tokens)
            WHERE rank IS DISTINCT FROM expected_rank""",
    ),
    Query(
        name="shares are counts over sums",
        table="tokens",
        needs=("documents",),
        meaning="share, doc_share and cumulative_share follow from the counts, and the last reaches 1.",
        offenders="""SELECT * FROM (SELECT token_id, rank, count, doc_count, share, doc_share, cumulative_share,
                sum(count) OVER (ORDER BY rank) AS running, sum(count) OVER () AS total,
                (SELECT count(*) FROM documents) AS documents FROM tokens)
            WHERE (abs(share - count / total) <= 1e-12 AND abs(cumulative_share - running / total) <= 1e-9
                AND abs(doc_share - doc_count / documents) <= 1e-12) IS NOT TRUE""",
    ),
    Query(
        name="function tokens are the shortest prefix",
        table="tokens",
        needs=("settings",),
        meaning="The function tokens are the shortest prefix of the ranking whose share reaches the configured one.",
        offenders="""SELECT * FROM (SELECT token_id, token, rank, count, is_function, function_share,
                (sum(count) OVER (ORDER BY rank) - count) / sum(count) OVER () < function_share AS expected
            FROM tokens, settings) WHERE is_function IS DISTINCT FROM expected""",
    ),
    Rows(
        name="rejects say what and why",
        table="rejects",
        meaning="Every reject names its file and the reason.",
        must="length(source) > 0 AND length(reason) > 0",
        show="source, line, reason",
    ),
)
