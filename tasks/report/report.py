"""The report: one HTML file with the paper's figures and tables, made from the published tables alone.

It needs nothing else to be read: no script, no font, no address outside it. The same tables give the same
bytes. Figures of the graph appear when the graph's tables are published, those of cases, of experiments and of
checkpoints when theirs are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from infra.duck import CATALOG, connect, telling_damage
from infra.manifest import content_key
from infra.progress import Progress, silent
from infra.published import REPORT
from infra.storage import Storage
from schemas.config import DuckDb
from schemas.errors import ConfigError, DamagedError
from tasks.pretraining.report import consolidation_facts, consolidation_sections
from tasks.report import figures
from tasks.report import findings as report_findings
from tasks.report import tables as report_tables
from tasks.report.corpus import corpus_summary, document_shares, frequency_points, spread_pair, tables_of
from tasks.report.graph import (
    coverage_points,
    degree_bins,
    degree_fits,
    layer_coverage,
    rarefactions,
    rarefied_points,
)
from tasks.report.page import Section, Table, picture, render
from tasks.report.rows import CorpusSummary
from tasks.report.text import integer, percent, quoted, signed
from tasks.steering.report import steering_facts, steering_sections

VERSION = 3
RECEIPT = "report.json"
CORPUS_TABLES = {"documents", "rejects", "tokens"}
GRAPH_TABLES = {"token_degree", "coverage", "graph_summary"}
NO_GRAPH = (
    "The graph’s tables are not published yet. Give the configuration an [[sae]] entry for each layer, then run "
    "“functok run CONFIG”; this section appears when its last stage, report, has finished."
)
NO_EDGES = (
    "No token activated a feature at any layer. Look at the dictionaries below: do they fit this model and "
    "these layers?"
)


def write_report(storage: Storage, resources: DuckDb | None = None, progress: Progress = silent) -> str:
    """Write `report.html` in the storage's root and give its address.

    Args:
        storage: The run's root.
        resources: Limits of DuckDB.
        progress: Told of each section.

    Raises:
        ConfigError: if no corpus tables are published under this root.
        StorageError: if the tables cannot be read or the report cannot be written.
    """
    key = _report_key(storage)
    with telling_damage(), closing(connect(storage, resources)) as connection:
        html = build_report(connection, storage, progress)
    written = storage.write_bytes(REPORT, html.encode("utf-8"))
    files = {"files": {REPORT: written.size}, "hashes": {REPORT: written.sha256}}
    storage.write_json(RECEIPT, {"key": key, **files})
    return storage.url(REPORT)


def is_report_current(storage: Storage) -> bool:
    """Whether the report is there and of the tables that are published now."""
    try:
        receipt = storage.read_json(RECEIPT)
        if not receipt or receipt.get("key") != _report_key(storage):
            return False
        size, digest = receipt["files"][REPORT], receipt["hashes"][REPORT]
        return bool(storage.hash_of(REPORT, size) == digest)
    except (DamagedError, FileNotFoundError, KeyError):
        return False


def _report_key(storage: Storage) -> str:
    return content_key(catalog=storage.read_json(CATALOG), version=VERSION)


def build_report(connection: Any, storage: Storage, progress: Progress = silent) -> str:
    """The report's HTML from a connection of `infra.duck.connect`.

    Raises:
        ConfigError: if no corpus tables are published.
    """
    tables = tables_of(connection)
    if not tables >= CORPUS_TABLES:
        raise ConfigError(
            f"no tables are published under {storage.root}",
            hint="`functok run CONFIG` makes them, or give the right --root",
            stage="report",
        )
    summary = corpus_summary(connection)
    if not summary.n_tokens:
        raise ConfigError(
            f"the corpus under {storage.root} has no token", hint="see the table rejects", stage="report"
        )
    has_edges = (
        tables >= GRAPH_TABLES
        and connection.execute("SELECT count(*) FROM graph_summary WHERE n_edges > 0").fetchone()[0] > 0
    )
    # A run of checkpoints has no graph of its own unless it asks for one.
    consolidation = consolidation_sections(connection)
    builders: list[Callable[[], Section]] = [
        lambda: _zipf(connection, summary),
        lambda: _document_coverage(connection, summary),
        lambda: _spread(connection, tables),
        *(
            [
                lambda: _degree(connection),
                lambda: _coverage(connection, summary),
                lambda: _rarefied(connection),
            ]
            if has_edges
            else [lambda: _no_graph(tables)] * (not consolidation or tables >= GRAPH_TABLES)
        ),
        *steering_sections(connection),
        *consolidation,
        lambda: _run(connection, tables),
    ]
    sections: list[Section] = []
    for done, build in enumerate(builders):
        progress(done, len(builders), "report sections")
        sections.append(build())
    progress(len(builders), len(builders), "report sections")
    return render("functok report", _facts(connection, summary, tables), sections)


def _facts(connection: Any, summary: CorpusSummary, tables: set[str]) -> list[tuple[str, str]]:
    facts = [
        ("documents", integer(summary.n_documents)),
        ("records not used", integer(summary.n_rejects)),
        ("tokens", integer(summary.n_tokens)),
        ("distinct tokens", integer(summary.n_distinct)),
        ("function tokens", integer(summary.n_function)),
    ]
    if tables >= GRAPH_TABLES:
        layers, edges, in_graph = connection.execute(
            "SELECT count(*), CAST(sum(n_edges) AS BIGINT), max(n_tokens) FROM graph_summary"
        ).fetchone()
        facts += [
            ("layers", integer(layers)),
            ("edges", integer(edges)),
            ("tokens in the graph", integer(in_graph)),
        ]
    return facts + steering_facts(connection) + consolidation_facts(connection)


def _zipf(connection: Any, summary: CorpusSummary) -> Section:
    return Section(
        key="zipf",
        title="Frequency of tokens",
        shows="How often each token occurs against its frequency rank. Function tokens are the shortest prefix of "
        f"the ranking that makes up the share asked for; here it reaches {percent(summary.function_share)}.",
        picture=picture(
            figures.zipf(frequency_points(connection)),
            f"Line plot on logarithmic axes: count falls with frequency rank over {integer(summary.n_distinct)} "
            f"tokens; a dotted line at rank {integer(summary.n_function)} ends the function tokens.",
        ),
        findings=[report_findings.zipf(summary)],
        tables=[report_tables.function_tokens_table(connection)],
    )


def _document_coverage(connection: Any, summary: CorpusSummary) -> Section:
    return Section(
        key="documents",
        title="Document coverage",
        shows="The share of the documents that a token is in, against its frequency rank: medians of neighbouring "
        "ranks, and a band from their 5th to their 95th percentile.",
        picture=picture(
            figures.document_coverage(document_shares(connection), summary.n_function or None),
            "Line plot: the share of documents that hold a token falls with frequency rank; median "
            f"{percent(summary.function_doc_share)} for function and "
            f"{percent(summary.content_doc_share, 3)} for content tokens.",
        ),
        findings=[report_findings.document_coverage(summary)],
    )


def _spread(connection: Any, tables: set[str]) -> Section:
    key, title = "spread", "Two tokens over the documents"
    if "occurrences" not in tables:
        return Section(
            key=key,
            title=title,
            missing="This run counted tokens only and kept no positions. Set corpus.keep_occurrences = true and run "
            "again to see where tokens stand.",
        )
    spreads = spread_pair(connection)
    if not spreads:
        return Section(
            key=key,
            title=title,
            missing="This corpus has no content word of three or more letters that is in two documents and in 1 % "
            "of them. A larger corpus has.",
        )
    width = spreads[0].width
    each = "each document" if width == 1 else f"{width} neighbouring documents (mean)"
    return Section(
        key=key,
        title=title,
        shows=f"Occurrences in {each}, along the corpus. Above, the most frequent function token that is a word; "
        "below, of the content words in at least 1 % of the documents (and in two), the one with the most "
        "occurrences per document that holds it.",
        picture=picture(
            figures.token_spread(spreads),
            f"Two panels of occurrences per document: {quoted(spreads[0].token)} is in "
            f"{percent(spreads[0].doc_share, 1)} of the documents, {quoted(spreads[1].token)} in "
            f"{percent(spreads[1].doc_share, 1)}.",
        ),
        findings=[report_findings.token_spread(spreads)],
    )


def _degree(connection: Any) -> Section:
    fits = degree_fits(connection)
    return Section(
        key="degree",
        title="Degree against rank",
        shows="How many distinct features a token activated, against its frequency rank: medians of neighbouring "
        "ranks, a band from their 5th to their 95th percentile, and the straight line through the medians.",
        picture=picture(
            figures.degree_rank(degree_bins(connection), fits),
            "One panel a layer, logarithmic axes: degree falls with frequency rank; fitted slopes "
            + ", ".join(f"{signed(fit.line.slope)} at layer {fit.layer}" for fit in fits if fit.line)
            + ".",
        ),
        findings=[report_findings.degree_rank(fits)],
        tables=[report_tables.fits_table(fits), report_tables.graph_summary_table(connection)],
    )


def _coverage(connection: Any, summary: CorpusSummary) -> Section:
    layers = layer_coverage(connection)
    return Section(
        key="coverage",
        title="Coverage",
        shows="The share of the activated features that the tokens up to a rank have activated, one curve a layer.",
        picture=picture(
            figures.coverage_curves(coverage_points(connection), summary.n_function or None),
            "Rising curves of cumulative coverage against frequency rank; the ten most frequent tokens reach "
            + ", ".join(f"{percent(layer.top10)} at layer {layer.layer}" for layer in layers)
            + ".",
        ),
        findings=[report_findings.coverage(layers)],
        tables=[report_tables.coverage_table(connection), report_tables.paper_coverage_table()],
    )


def _rarefied(connection: Any) -> Section:
    key, title, rows = "rarefied", "Degree at equal frequency", rarefactions(connection)
    points = rarefied_points(connection)
    if not points:
        return Section(
            key=key,
            title=title,
            missing="No token occurs often enough to be rarefied. Lower graph.rarefaction_m, or put more tokens into "
            "the graph, and run again.",
        )
    return Section(
        key=key,
        title=title,
        shows="A token that occurs more often has had more chances to activate features. The rarefied degree is the "
        f"degree expected from {integer(rows[0].m)} of its occurrences, drawn without replacement "
        "(Σ over features of 1 − C(N−n, m) / C(N, m)), so that frequent and rare tokens compare fairly.",
        picture=picture(
            figures.rarefied_degree(points),
            f"One panel a layer, logarithmic axes: degree at {integer(rows[0].m)} occurrences against raw degree, "
            "function and content tokens apart.",
        ),
        findings=[report_findings.rarefaction(rows)],
        tables=[report_tables.rarefaction_table(rows)],
    )


def _no_graph(tables: set[str]) -> Section:
    return Section(
        key="graph",
        title="Token-feature graph: degree and coverage",
        missing=NO_EDGES if tables >= GRAPH_TABLES else NO_GRAPH,
    )


def _run(connection: Any, tables: set[str]) -> Section:
    parts: list[tuple[str, Any]] = [
        ("dictionaries", report_tables.dictionaries_table),
        ("expectations", report_tables.expectations_table),
        ("rejects", report_tables.rejects_table),
        ("run_info", report_tables.run_info_table),
    ]
    made: list[Table] = [build(connection) for name, build in parts if name in tables]
    return Section(
        key="run",
        title="The run: dictionaries, checks, rejects, settings",
        shows="What the tables above were made from, and what they were checked for.",
        tables=made,
    )
