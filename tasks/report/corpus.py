"""What the report asks of the corpus tables. DuckDB aggregates; only thinned rows come back.

Whatever has to be summed is summed as integers and medians are exact, so that the numbers do not depend on
the order in which DuckDB's threads finish.
"""

from __future__ import annotations

from typing import Any

from tasks.report.rows import CorpusSummary, DocumentShareBin, FrequencyPoint, LineFit, Spread

LOG_SCALE = 1_000_000
SPREAD_BINS = 800
RESAMPLES = 1000


def rank_bin(rank: str = "rank", per_e_fold: int = 40) -> str:
    """SQL for the number of a log-spaced bin; ranks up to `per_e_fold` have a bin of their own."""
    return f"CAST(floor(ln({rank}) * {per_e_fold}) AS INTEGER)"


def line_sums(x: str, y: str) -> str:
    """SQL columns `n, sx, sy, sxx, sxy, syy` of ln x and ln y in millionths, exact whatever the order."""
    lx, ly = (f"CAST(round(ln({value}) * {LOG_SCALE}) AS HUGEINT)" for value in (x, y))
    return (
        f"count(*) AS n, sum({lx}) AS sx, sum({ly}) AS sy, sum({lx} * {lx}) AS sxx, "
        f"sum({lx} * {ly}) AS sxy, sum({ly} * {ly}) AS syy"
    )


def line_fit(sums: tuple[Any, ...]) -> LineFit | None:
    """The least-squares line of the sums `n, sx, sy, sxx, sxy, syy`; None where none is defined."""
    n, sx, sy, sxx, sxy, syy = (int(value or 0) for value in sums)
    var_x, var_y, cov = n * sxx - sx * sx, n * syy - sy * sy, n * sxy - sx * sy
    if var_x == 0 or var_y == 0:
        return None
    slope = cov / var_x
    return LineFit(
        n=n,
        slope=slope,
        intercept=(sy - slope * sx) / n / LOG_SCALE,
        r2=cov * cov / (var_x * var_y),
    )


def tables_of(connection: Any) -> set[str]:
    """Names of the tables and views that this connection has."""
    return {
        name for (name,) in connection.execute("SELECT table_name FROM information_schema.tables").fetchall()
    }


def resamples_of(connection: Any, section: str) -> int:
    """Bootstrap resamples of this run's own intervals: of its `loss` or of its `steering`."""
    if "run_info" not in tables_of(connection):
        return RESAMPLES
    row = connection.execute("SELECT value FROM run_info WHERE key = ?", [f"{section}_resamples"]).fetchone()
    return RESAMPLES if row is None else int(row[0])


def count_documents(connection: Any) -> int:
    """Documents in the corpus: as the run has told, so that no shard is opened to count them."""
    if "run_info" in tables_of(connection):
        told = connection.execute("SELECT value FROM run_info WHERE key = 'documents'").fetchone()
        if told is not None:
            return int(told[0])
    return int(connection.execute("SELECT count(*) FROM documents").fetchone()[0])


def corpus_summary(connection: Any) -> CorpusSummary:
    """The corpus in numbers."""
    n_documents = count_documents(connection)
    (n_rejects,) = connection.execute("SELECT count(*) FROM rejects").fetchone()
    row = connection.execute(
        """
        SELECT CAST(sum(count) AS BIGINT), count(*), count(*) FILTER (is_function),
               coalesce(CAST(sum(count) FILTER (is_function) AS BIGINT), 0),
               max(count), arg_min(token, rank),
               count(*) FILTER (is_function AND doc_share > 0.5),
               count(*) FILTER (NOT is_function AND doc_share < 0.05),
               quantile_cont(doc_share, 0.5) FILTER (is_function),
               quantile_cont(doc_share, 0.5) FILTER (NOT is_function)
        FROM tokens
        """
    ).fetchone()
    line = connection.execute(
        f"""
        SELECT {line_sums("rank", "count")}
        FROM (SELECT min(rank) AS rank, arg_min(count, rank) AS count FROM tokens GROUP BY {rank_bin()})
        """
    ).fetchone()
    n_tokens, n_distinct, n_function, in_function, top, top_token, wide, rare, f_median, c_median = row
    return CorpusSummary(
        n_documents=n_documents,
        n_rejects=n_rejects,
        n_tokens=n_tokens or 0,
        n_distinct=n_distinct,
        n_function=n_function,
        function_share=in_function / n_tokens if n_tokens else 0.0,
        top_share=top / n_tokens if n_tokens else 0.0,
        top_token=top_token or "",
        line=line_fit(line),
        function_widespread=wide,
        content_rare=rare,
        function_doc_share=f_median,
        content_doc_share=c_median,
    )


def frequency_points(connection: Any) -> list[FrequencyPoint]:
    """Every function token (up to 2,000) and log-spaced ranks of the others."""
    rows = connection.execute(
        f"""
        SELECT rank, count, is_function FROM tokens WHERE is_function AND rank <= 2000
        UNION
        SELECT min(rank), arg_min(count, rank), arg_min(is_function, rank) FROM tokens GROUP BY {rank_bin()}
        ORDER BY rank
        """
    ).fetchall()
    return [FrequencyPoint(rank=rank, count=count, is_function=flag) for rank, count, flag in rows]


def document_shares(connection: Any) -> list[DocumentShareBin]:
    """Document shares by log-spaced bins of rank, function and content tokens apart."""
    rows = connection.execute(
        f"""
        SELECT CAST(quantile_disc(rank, 0.5) AS BIGINT) AS rank, is_function, count(*),
               quantile_cont(doc_share, 0.05), quantile_cont(doc_share, 0.5), quantile_cont(doc_share, 0.95)
        FROM tokens GROUP BY {rank_bin(per_e_fold=20)}, is_function ORDER BY rank
        """
    ).fetchall()
    return [
        DocumentShareBin(rank=rank, is_function=flag, n=n, low=low, median=median, high=high)
        for rank, flag, n, low, median, high in rows
    ]


def spread_pair(connection: Any) -> list[Spread]:
    """A function token and a content token over the documents, as `of` and `Tokyo` in the paper.

    The function token is the most frequent one that is a word (two or more letters), else the most frequent
    one. The content token is, among those of three or more letters that are in at least 1 % of the
    documents and in two of them, the one with the most occurrences per document that holds it; ties go to
    the more frequent. Empty where no token qualifies for either.
    """
    chosen = [
        connection.execute(
            r"""
            SELECT token_id FROM tokens WHERE is_function
            ORDER BY regexp_full_match(trim(token), '\p{L}{2,}') DESC, rank LIMIT 1
            """
        ).fetchone(),
        connection.execute(
            r"""
            SELECT token_id FROM tokens
            WHERE NOT is_function AND regexp_full_match(trim(token), '\p{L}{3,}')
              AND doc_share >= 0.01 AND doc_count >= 2
            ORDER BY count / doc_count DESC, rank LIMIT 1
            """
        ).fetchone(),
    ]
    token_ids = [row[0] for row in chosen if row is not None]
    if len(token_ids) < len(chosen):
        return []
    # Both in one scan: occurrences are a file a shard.
    connection.execute(
        """
        CREATE OR REPLACE TEMP TABLE _spread AS
        SELECT token_id, doc_id, count(*) AS n FROM occurrences WHERE token_id IN (?, ?) GROUP BY ALL
        """,
        token_ids,
    )
    spreads = [_spread(connection, token_id) for token_id in token_ids]
    connection.execute("DROP TABLE _spread")
    return spreads


def _spread(connection: Any, token_id: int) -> Spread:
    n_documents = count_documents(connection)
    width = -(-n_documents // SPREAD_BINS)
    token = connection.execute(
        "SELECT token, is_function, rank, count, doc_count, doc_share FROM tokens WHERE token_id = ?",
        [token_id],
    ).fetchone()
    (most,) = connection.execute("SELECT max(n) FROM _spread WHERE token_id = ?", [token_id]).fetchone()
    (top,) = connection.execute(
        "SELECT sum(n) FROM (SELECT n FROM _spread WHERE token_id = ? ORDER BY n DESC LIMIT ?)",
        [token_id, max(1, n_documents // 100)],
    ).fetchone()
    sums: dict[int, int] = dict(
        connection.execute(
            "SELECT doc_id // ?, CAST(sum(n) AS BIGINT) FROM _spread WHERE token_id = ? GROUP BY 1",
            [width, token_id],
        ).fetchall()
    )
    starts = range(0, n_documents, width)
    return Spread(
        token=token[0],
        is_function=token[1],
        rank=token[2],
        count=token[3],
        doc_count=token[4],
        doc_share=token[5],
        n_documents=n_documents,
        most=most or 0,
        top_share=(top or 0) / token[3],
        width=width,
        means=[sums.get(start // width, 0) / min(width, n_documents - start) for start in starts],
    )
