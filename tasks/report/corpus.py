"""The report's sections on the corpus (PAPER 1.1): frequencies, document coverage, two tokens over the documents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tasks.report import charts
from tasks.report.charts import KINDS, Spec
from tasks.report.queries import (
    first_rows,
    line_fit,
    line_sums,
    one,
    percentiles,
    rank_bin,
    rows,
    tables_of,
    told,
    value,
)
from tasks.report.text import integer, percent, plural, quoted, signed
from tasks.report.vocabulary import Chart, Column, Finding, Row, Section, Table, holds

SMALL_SET = 0.01
MOST_TOKENS = 500
MOST_POINTS = 2000
SPREAD_BINS = 800
KIND = "if(is_function, 'function tokens', 'content tokens') AS kind"

ZIPF_KEY = charts.Key(
    field="kind",
    looks={
        "function tokens": charts.Look(charts.FUNCTION, "circle"),
        "content tokens": charts.Look(charts.CONTENT, charts.LINE),
    },
)


def facts(connection: Any) -> list[tuple[str, str]]:
    """The corpus in numbers, for the head of the report."""
    summary = summarize(connection)
    names = {
        "n_documents": "documents",
        "n_rejects": "records not used",
        "n_tokens": "tokens",
        "n_distinct": "distinct tokens",
        "n_function": "function tokens",
    }
    return [(name, integer(summary[key])) for key, name in names.items()]


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds each section."""
    summary = summarize(connection)
    return [
        functools.partial(_frequency, connection, summary),
        functools.partial(_documents, connection, summary),
        functools.partial(_spread, connection),
    ]


def findings(connection: Any) -> list[Finding]:
    """The sections' findings by themselves, titled."""
    summary = summarize(connection)
    found = [
        replace(is_small_set(summary), title="Function tokens are a small set"),
        replace(is_nearly_everywhere(summary), title="Function tokens are nearly everywhere"),
    ]
    pair = spread_pair(connection) if "occurrences" in tables_of(connection) else []
    return [*found, *([replace(is_spread_wider(*pair), title="They are spread evenly")] if pair else [])]


def _frequency(connection: Any, summary: Row) -> Section:
    return Section(
        key="zipf",
        title="Frequency of tokens",
        shows="How often each token occurs against its frequency rank. Function tokens are the shortest prefix of "
        f"the ranking that makes up the share asked for; here it reaches {percent(summary['function_share'])}.",
        charts=[
            Chart(
                spec=zipf(frequency_points(connection), last_function_rank(connection)),
                alt="Line plot on logarithmic axes: count falls with frequency rank over "
                f"{integer(summary['n_distinct'])} tokens; a dotted line at rank {integer(summary['n_function'])} ends "
                "the function tokens.",
            )
        ],
        findings=[is_small_set(summary)],
        tables=[function_tokens(connection)],
    )


def _documents(connection: Any, summary: Row) -> Section:
    return Section(
        key="documents",
        title="Document coverage",
        shows="The share of the documents that a token is in, against its frequency rank: medians of neighbouring "
        "ranks, and a band from their 5th to their 95th percentile.",
        charts=[
            Chart(
                spec=document_coverage(document_shares(connection), last_function_rank(connection)),
                alt="Line plot: the share of documents that hold a token falls with frequency rank; median "
                f"{percent(summary['function_doc_share'])} for function and "
                f"{percent(summary['content_doc_share'], 3)} for content tokens.",
            )
        ],
        findings=[is_nearly_everywhere(summary)],
    )


def _spread(connection: Any) -> Section:
    key, title = "spread", "Two tokens over the documents"
    if "occurrences" not in tables_of(connection):
        return Section(
            key=key,
            title=title,
            missing="This run counted tokens only and kept no positions. Set corpus.keep_occurrences = true and run "
            "again to see where tokens stand.",
        )
    pair = spread_pair(connection)
    if not pair:
        return Section(
            key=key,
            title=title,
            missing="This corpus has no content word of three or more letters that is in two documents and in 1 % "
            "of them. A larger corpus has.",
        )
    width = pair[0]["width"]
    each = "each document" if width == 1 else f"{width} neighbouring documents (mean)"
    told = ", ".join(
        f"{quoted(spread['token'])} is in {percent(spread['doc_share'], 1)} of the documents"
        for spread in pair
    )
    return Section(
        key=key,
        title=title,
        shows=f"Occurrences in {each}, along the corpus. Above, the most frequent function token that is a word; "
        "below, of the content words in at least 1 % of the documents (and in two), the one with the most "
        "occurrences per document that holds it.",
        charts=[Chart(spec=token_spread(pair), alt=f"Two panels of occurrences per document: {told}.")],
        findings=[is_spread_wider(*pair)],
    )


# What the tables say.


def summarize(connection: Any) -> dict[str, Any]:
    """The corpus in numbers.

    Returns:
        `n_documents`, `n_rejects`, `n_tokens`, `n_distinct`, `n_function`; `function_share` and `top_share` of all
        tokens, `top_token`; `function_widespread`: function tokens in more than half of the documents, `content_rare`:
        content tokens in fewer than one in twenty, and both kinds' median share of documents, `function_doc_share` and
        `content_doc_share`; `line`: of ln count against ln rank over log-spaced ranks.
    """
    summary = one(
        connection,
        """
        SELECT coalesce(CAST(sum(count) AS BIGINT), 0) AS n_tokens, count(*) AS n_distinct,
               count(*) FILTER (is_function) AS n_function,
               coalesce(sum(count) FILTER (is_function) / sum(count), 0) AS function_share,
               coalesce(max(count) / sum(count), 0) AS top_share, arg_min(token, rank) AS top_token,
               count(*) FILTER (is_function AND doc_share > 0.5) AS function_widespread,
               count(*) FILTER (NOT is_function AND doc_share < 0.05) AS content_rare,
               quantile_cont(doc_share, 0.5) FILTER (is_function) AS function_doc_share,
               quantile_cont(doc_share, 0.5) FILTER (NOT is_function) AS content_doc_share
        FROM tokens
        """,
    )
    sums = one(
        connection,
        f"""
        SELECT {line_sums("rank", "count")}
        FROM (SELECT min(rank) AS rank, arg_min(count, rank) AS count FROM tokens GROUP BY {rank_bin()})
        """,
    )
    n_rejects = value(connection, "SELECT count(*) FROM rejects")
    return summary | {
        "n_documents": count_documents(connection),
        "n_rejects": n_rejects,
        "line": line_fit(sums),
    }


def count_documents(connection: Any) -> int:
    """Documents in the corpus: as the run has told, so that no shard is opened to count them."""
    return int(told(connection, "documents") or value(connection, "SELECT count(*) FROM documents"))


def last_function_rank(connection: Any) -> int | None:
    """The rank at which function tokens end; None where there are none."""
    rank: int | None = value(connection, "SELECT max(rank) FROM tokens WHERE is_function")
    return rank


def frequency_points(connection: Any) -> list[dict[str, Any]]:
    """Rank, count and kind of every function token (up to 2,000) and of log-spaced ranks of the others."""
    return rows(
        connection,
        f"""
        SELECT rank, count, {KIND} FROM (
            SELECT rank, count, is_function FROM tokens WHERE is_function AND rank <= {MOST_POINTS}
            UNION
            SELECT min(rank), arg_min(count, rank), arg_min(is_function, rank) FROM tokens GROUP BY {rank_bin()}
        )
        ORDER BY rank
        """,
    )


def document_shares(connection: Any) -> list[dict[str, Any]]:
    """Percentiles of document shares by log-spaced bins of rank, both kinds apart."""
    return rows(
        connection,
        f"""
        SELECT CAST(quantile_disc(rank, 0.5) AS BIGINT) AS rank, {KIND}, {percentiles("doc_share")}
        FROM tokens GROUP BY {rank_bin(per_e_fold=20)}, is_function ORDER BY rank
        """,
    )


def spread_pair(connection: Any) -> list[dict[str, Any]]:
    """A function token and a content token over the documents, as `of` and `Tokyo` in the paper.

    The function token is the most frequent one that is a word (two or more letters), else the most frequent one. The
    content token is, among those of three or more letters that are in at least 1 % of the documents and in two of
    them, the one with the most occurrences per document that holds it; ties go to the more frequent.

    Returns:
        The tokens' columns of `tokens`, and `most`: occurrences in one document; `top_share`: share of the occurrences
        that the hundredth of the documents with the most of it hold; `n_documents`; `width`: neighbouring documents
        that one of `means` stands for, the mean occurrences per document, along `doc_id`. None where no token
        qualifies for either.
    """
    chosen = [
        *rows(
            connection,
            r"""
            SELECT * FROM tokens WHERE is_function
            ORDER BY regexp_full_match(trim(token), '\p{L}{2,}') DESC, rank LIMIT 1
            """,
        ),
        *rows(
            connection,
            r"""
            SELECT * FROM tokens
            WHERE NOT is_function AND regexp_full_match(trim(token), '\p{L}{3,}')
              AND doc_share >= 0.01 AND doc_count >= 2
            ORDER BY count / doc_count DESC, rank LIMIT 1
            """,
        ),
    ]
    if len(chosen) < 2:
        return []
    # Both in one scan: occurrences are a file a shard.
    connection.execute(
        """
        CREATE OR REPLACE TEMP TABLE _spread AS
        SELECT token_id, doc_id, count(*) AS n FROM occurrences WHERE token_id IN (?, ?) GROUP BY ALL
        """,
        [token["token_id"] for token in chosen],
    )
    n_documents = count_documents(connection)
    pair = [token | _spread_of(connection, token, n_documents) for token in chosen]
    connection.execute("DROP TABLE _spread")
    return pair


def _spread_of(connection: Any, token: Row, n_documents: int) -> dict[str, Any]:
    width = -(-n_documents // SPREAD_BINS)
    of = "FROM _spread WHERE token_id = ?"
    token_id = token["token_id"]
    top = value(
        connection,
        f"SELECT sum(n) FROM (SELECT n {of} ORDER BY n DESC LIMIT ?)",
        [token_id, max(1, n_documents // 100)],
    )
    sums = {
        row["part"]: row["n"]
        for row in rows(
            connection,
            f"SELECT doc_id // {width} AS part, CAST(sum(n) AS BIGINT) AS n {of} GROUP BY part",
            [token_id],
        )
    }
    starts = range(0, n_documents, width)
    return {
        "most": value(connection, f"SELECT max(n) {of}", [token_id]) or 0,
        "top_share": (top or 0) / token["count"],
        "n_documents": n_documents,
        "width": width,
        "means": [sums.get(start // width, 0) / min(width, n_documents - start) for start in starts],
    }


def function_tokens(connection: Any) -> Table:
    """The function tokens by rank."""
    shown, note = first_rows(connection, "SELECT * FROM tokens WHERE is_function ORDER BY rank", MOST_TOKENS)
    return Table(
        caption="Function tokens",
        columns=[
            Column("rank", "integer"),
            Column("token", "token"),
            Column("token_id", "plain"),
            Column("count", "integer"),
            Column("share", "percent"),
            Column("cumulative_share", "percent"),
            Column("doc_share", "percent", "share of documents"),
        ],
        rows=shown,
        note=note,
    )


# Charts.


def zipf(points: Sequence[Row], cut: int | None) -> Spec:
    """Count against frequency rank, both logarithmic, with the cut between function and content tokens."""
    rank, count = charts.log("rank", "frequency rank"), charts.log("count", "count")
    function, content = ([row for row in points if row["kind"] == kind] for kind in ZIPF_KEY.looks)
    return charts.single(
        charts.series(content, rank, count, ZIPF_KEY, marks=None),
        charts.series(function, rank, count, ZIPF_KEY, lines=False),
        *charts.cut_at(cut),
    )


def document_coverage(bins: Sequence[Row], cut: int | None) -> Spec:
    """Share of the documents that a token is in against its rank: medians, and 5th to 95th percentile."""
    return charts.single(
        charts.series(
            bins,
            charts.log("rank", "frequency rank"),
            charts.share("median", "documents that hold the token"),
            KINDS,
            band=("low", "high"),
        ),
        *charts.cut_at(cut),
    )


def token_spread(pair: Sequence[Row]) -> Spec:
    """Occurrences per document along `doc_id`, one panel a token."""
    doc_id, n = (
        charts.linear("doc_id", "doc_id", nice=False),
        charts.linear("n", "occurrences per document", zero=True),
    )
    return charts.stacked(
        [
            charts.area(
                [
                    {"doc_id": min(place * spread["width"], spread["n_documents"]), "n": mean}
                    # The last step needs its right end.
                    for place, mean in enumerate([*spread["means"], spread["means"][-1]])
                ],
                doc_id if spread is pair[-1] else doc_id.untitled(),
                n,
                charts.FUNCTION if spread["is_function"] else charts.CONTENT,
            ).properties(
                title=f"{quoted(spread['token'])} ({'function' if spread['is_function'] else 'content'} token, rank "
                f"{spread['rank']:,})"
            )
            for spread in pair
        ]
    )


# Findings.


def is_small_set(summary: Row) -> Finding:
    """Function tokens are a small set: under 1 % of the distinct tokens (paper: 122 of some 128,000)."""
    n_distinct, line = summary["n_distinct"], summary["line"]
    share = summary["n_function"] / n_distinct if n_distinct else 0.0
    slope = f" The line through the ranks has slope {signed(line.slope)} (R² {line.r2:.3f})." if line else ""
    small = share < SMALL_SET
    return Finding(
        text=f"{plural(summary['n_function'], 'function token')}, {percent(share)} of the {n_distinct:,} distinct "
        f"tokens, make up {percent(summary['function_share'])} of all {summary['n_tokens']:,} tokens; "
        f"{quoted(summary['top_token'])} alone makes up {percent(summary['top_share'])}.{slope} That they are a small "
        "set (under 1 % of the distinct tokens; the paper has 122 with the LLaMA-3.1 tokenizer on SlimPajama) "
        f"{holds(small)} here.",
        verdict="holds" if small else "differs",
    )


def is_nearly_everywhere(summary: Row) -> Finding:
    """Most function tokens are in over half of the documents, most content tokens in under a twentieth."""
    n_function, wide, rare = (summary[key] for key in ("n_function", "function_widespread", "content_rare"))
    n_content = summary["n_distinct"] - n_function
    both = 2 * wide > n_function and 2 * rare > n_content
    return Finding(
        text=f"{wide:,} of {plural(n_function, 'function token')} are in more than half of the documents (median: "
        f"{percent(summary['function_doc_share'])} of them), {rare:,} of {plural(n_content, 'content token')} in "
        f"fewer than one in twenty (median: {percent(summary['content_doc_share'], 3)}). That function tokens are "
        f"nearly everywhere and content tokens in a few documents {holds(both)} for most of both kinds here.",
        verdict="holds" if both else "differs",
    )


def is_spread_wider(function: Row, content: Row) -> Finding:
    """The function token is in more documents than the content token, which comes in bursts."""
    wider = function["doc_share"] > content["doc_share"] and content["top_share"] > function["top_share"]
    return Finding(
        text=f"{quoted(function['token'])} is in {percent(function['doc_share'], 1)} of the documents and "
        f"{quoted(content['token'])} in {percent(content['doc_share'], 1)}; the 1 % of the documents that use a token "
        f"most hold {percent(function['top_share'], 1)} of the occurrences of the first and "
        f"{percent(content['top_share'], 1)} of the second. That the function token is spread wider and more "
        f"evenly (in the paper: of against Tokyo) {holds(wider)} here.",
        verdict="holds" if wider else "differs",
    )
