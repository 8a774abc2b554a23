"""The report's tables. A cell is text; what is not there is a dash; long lists are cut, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.report.findings import PAPER_COVERAGE, PAPER_LAYERS
from tasks.report.graph import top_coverage
from tasks.report.page import Column, Table, number_column, number_columns
from tasks.report.rows import DegreeFit, LineFit, Rarefaction
from tasks.report.text import integer, number, percent, signed, visible

MOST_TOKENS, MOST_ROWS = 500, 300


def coverage_table(connection: Any) -> Table:
    """Cumulative coverage by the ten most frequent tokens, one column a layer, as the paper has it."""
    layers = [
        layer for (layer,) in connection.execute("SELECT DISTINCT layer FROM coverage ORDER BY 1").fetchall()
    ]
    return Table(
        caption="Cumulative coverage of the activated features by the ten most frequent tokens",
        columns=_coverage_columns(layers),
        rows=[
            [integer(rank), shown, *(percent(by_layer.get(layer)) for layer in layers)]
            for rank, shown, by_layer in top_coverage(connection)
        ],
    )


def paper_coverage_table() -> Table:
    """The same table as the paper published it."""
    return Table(
        caption="For comparison, the paper’s own numbers (not from this run)",
        columns=_coverage_columns(PAPER_LAYERS),
        rows=[
            [integer(rank), visible(token), *(percent(share) for share in shares)]
            for rank, token, shares in PAPER_COVERAGE
        ],
        note="Gemma2-9B, Gemma Scope dictionaries of 2²⁰ features, 5 million tokens of SlimPajama: another "
        "model, corpus and dictionary width than here unless the run’s settings below say so.",
    )


def function_tokens_table(connection: Any) -> Table:
    """The function tokens by rank."""
    rows = connection.execute(
        """
        SELECT rank, token, token_id, count, share, cumulative_share, doc_share
        FROM tokens WHERE is_function ORDER BY rank LIMIT ?
        """,
        [MOST_TOKENS],
    ).fetchall()
    return Table(
        caption="Function tokens",
        columns=[
            number_column("rank"),
            Column(name="token", kind="token"),
            *number_columns("token id", "count", "share", "cumulative share", "share of documents"),
        ],
        rows=[
            [
                integer(rank),
                visible(token),
                str(token_id),
                integer(count),
                percent(share),
                percent(cumulative),
                percent(doc_share),
            ]
            for rank, token, token_id, count, share, cumulative, doc_share in rows
        ],
        note=_cut_note(connection, "SELECT count(*) FROM tokens WHERE is_function", MOST_TOKENS),
    )


def graph_summary_table(connection: Any) -> Table:
    """Each layer's graph in numbers."""
    rows = connection.execute(
        """
        SELECT layer, dictionary_size, activated_features, n_tokens, n_edges, mean_l0
        FROM graph_summary ORDER BY layer
        """
    ).fetchall()
    return Table(
        caption="Graph summary",
        columns=number_columns(
            "layer",
            "dictionary size",
            "activated features",
            "of the dictionary",
            "tokens",
            "edges",
            "mean L0",
        ),
        rows=[
            [
                str(layer),
                integer(size),
                integer(activated),
                percent(activated / size if size else None),
                integer(n_tokens),
                integer(n_edges),
                number(l0),
            ]
            for layer, size, activated, n_tokens, n_edges, l0 in rows
        ],
        note="The paper: over 900,000 features activated at each layer, over 87 % of the dictionary.",
    )


def fits_table(fits: Sequence[DegreeFit]) -> Table:
    """The straight lines of degree against rank, and the power law of the degrees."""
    return Table(
        caption="Fits of token degree",
        columns=number_columns(
            "layer",
            "slope",
            "R²",
            "slope, single tokens",
            "R², single tokens",
            "alpha",
            "xmin",
            "KS distance",
        ),
        rows=[
            [
                str(fit.layer),
                *(_of_line(fit.line)),
                *(_of_line(fit.tokens)),
                number(fit.alpha),
                number(fit.xmin),
                number(fit.ks),
            ]
            for fit in fits
        ],
        note="Slope and R²: least squares of ln degree on ln rank, over medians of log-spaced bins of rank, where "
        "every decade weighs the same, and over single tokens, where the many rare ones decide. Alpha, xmin and KS "
        "distance: the power law fitted to the distribution of degrees from xmin on (graph_summary).",
    )


def rarefaction_table(layers: Sequence[Rarefaction]) -> Table:
    """Degrees at an equal number of occurrences."""
    return Table(
        caption=f"Degree at {integer(layers[0].m)} occurrences of each token",
        columns=number_columns(
            "layer",
            "function tokens",
            "content tokens",
            "median, function",
            "median, content",
            "ratio",
            "correlation of frequency with degree",
            "with rarefied degree",
        ),
        rows=[
            [
                str(row.layer),
                integer(row.n_function),
                integer(row.n_content),
                number(row.function_median, 4),
                number(row.content_median, 4),
                signed(row.ratio),
                signed(row.raw_correlation),
                signed(row.rarefied_correlation),
            ]
            for row in layers
        ],
        note=f"Of the tokens that occur at least {integer(layers[0].m)} times in the graph’s documents.",
    )


def dictionaries_table(connection: Any) -> Table:
    """The dictionaries and, where they were trained here, the figures of their gate."""
    rows = connection.execute(
        """
        SELECT layer, source, dictionary_size, explained_variance, explained_variance_all, l0, k, alive_share,
               heldout_tokens
        FROM dictionaries ORDER BY layer
        """
    ).fetchall()
    return Table(
        caption="Dictionaries",
        columns=[
            number_column("layer"),
            Column(name="source"),
            *number_columns(
                "features", "explained variance", "with outliers", "L0", "k", "alive", "held-out tokens"
            ),
        ],
        rows=[
            [
                str(layer),
                _plain(source),
                integer(size),
                number(variance),
                number(variance_all),
                number(l0),
                number(k),
                percent(alive, 1),
                integer(heldout),
            ]
            for layer, source, size, variance, variance_all, l0, k, alive, heldout in rows
        ],
        note="Measured on held-out tokens where the dictionary was trained here; a dash where it was not. Explained "
        "variance leaves massive activations out, the column beside it has them in.",
    )


def expectations_table(connection: Any) -> Table:
    """What every stage was checked for, failures first."""
    rows = connection.execute(
        """
        SELECT stage, expectation, success, CAST(observed AS VARCHAR) FROM expectations
        ORDER BY success, stage, expectation, 4 LIMIT ?
        """,
        [MOST_ROWS],
    ).fetchall()
    return Table(
        caption="Expectations",
        columns=[Column(name=name) for name in ("stage", "expectation", "met", "observed")],
        rows=[
            [_plain(stage), _plain(expectation), "✓ yes" if success else "✗ no", _plain(observed)]
            for stage, expectation, success, observed in rows
        ],
        note=_cut_note(connection, "SELECT count(*) FROM expectations", MOST_ROWS),
    )


def rejects_table(connection: Any) -> Table:
    """Records that were not used, by reason."""
    rows = connection.execute(
        """
        SELECT reason, count(*) AS n, count(DISTINCT source), arg_min(source, (source, line)),
               arg_min(line, (source, line))
        FROM rejects GROUP BY reason ORDER BY n DESC, reason LIMIT ?
        """,
        [MOST_ROWS],
    ).fetchall()
    return Table(
        caption="Records that were not used, by reason",
        columns=[
            Column(name="reason"),
            number_column("records"),
            number_column("files"),
            Column(name="first in"),
            number_column("line"),
        ],
        rows=[
            [_plain(reason), integer(n), integer(files), _plain(source), integer(line)]
            for reason, n, files, source, line in rows
        ],
        note=_cut_note(connection, "SELECT count(DISTINCT reason) FROM rejects", MOST_ROWS),
    )


def run_info_table(connection: Any) -> Table:
    """What the run was."""
    rows = connection.execute(
        "SELECT key, value FROM run_info ORDER BY key, value LIMIT ?", [MOST_ROWS]
    ).fetchall()
    return Table(
        caption="Run",
        columns=[Column(name="setting"), Column(name="value")],
        rows=[[_plain(key), _plain(value)] for key, value in rows],
        note=_cut_note(connection, "SELECT count(*) FROM run_info", MOST_ROWS),
    )


def _coverage_columns(layers: Any) -> list[Column]:
    return [
        number_column("rank"),
        Column(name="token", kind="token"),
        *(number_column(f"layer {layer}") for layer in layers),
    ]


def _plain(text: str | None) -> str:
    return "–" if text is None else visible(text, 400).replace("␣", " ")


def _of_line(line: LineFit | None) -> tuple[str, str]:
    return ("–", "–") if line is None else (signed(line.slope), f"{line.r2:.3f}")


def _cut_note(connection: Any, count: str, most: int) -> str:
    (n,) = connection.execute(count).fetchone()
    return f"The first {most:,} of {n:,}; the others are in the table." if n > most else ""
