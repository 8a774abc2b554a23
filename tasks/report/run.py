"""The report's last section: what the run was made from, what was checked, and what was not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.report.queries import cut_note, rows, tables_of
from tasks.report.vocabulary import Column, Section, Table

MOST_ROWS = 300


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds the section."""
    tables = tables_of(connection)
    shown = {
        "dictionaries": dictionaries,
        "expectations": expectations,
        "rejects": rejects,
        "run_info": settings,
    }
    return [
        lambda: Section(
            key="run",
            title="The run: dictionaries, checks, rejects, settings",
            shows="What the tables above were made from, and what they were checked for.",
            tables=[build(connection) for name, build in shown.items() if name in tables],
        )
    ]


def dictionaries(connection: Any) -> Table:
    """The dictionaries and, where they were trained here, the figures of their gate."""
    return Table(
        caption="Dictionaries",
        columns=[
            Column("layer", "plain"),
            Column("source"),
            Column("dictionary_size", "integer", "features"),
            Column("explained_variance", "number"),
            Column("explained_variance_all", "number", "with outliers"),
            Column("l0", "number", "L0"),
            Column("k", "number"),
            Column("alive_share", "percent", "alive", digits=1),
            Column("heldout_tokens", "integer", "held-out tokens"),
        ],
        rows=rows(connection, "SELECT * FROM dictionaries ORDER BY layer"),
        note="Measured on held-out tokens where the dictionary was trained here; a dash where it was not. Explained "
        "variance leaves massive activations out, the column beside it has them in.",
    )


def expectations(connection: Any) -> Table:
    """What every stage was checked for, failures first."""
    return Table(
        caption="Expectations",
        columns=[
            Column("stage"),
            Column("expectation"),
            Column("success", "met", "met"),
            Column("observed"),
        ],
        rows=rows(
            connection,
            f"""
            SELECT stage, expectation, success, CAST(observed AS VARCHAR) AS observed FROM expectations
            ORDER BY success, stage, expectation, 4 LIMIT {MOST_ROWS}
            """,
        ),
        note=cut_note(connection, "SELECT count(*) FROM expectations", MOST_ROWS),
    )


def rejects(connection: Any) -> Table:
    """Records that were not used, by reason."""
    return Table(
        caption="Records that were not used, by reason",
        columns=[
            Column("reason"),
            Column("records", "integer"),
            Column("files", "integer"),
            Column("first_in"),
            Column("first_line", "integer", "line"),
        ],
        rows=rows(
            connection,
            f"""
            SELECT reason, count(*) AS records, count(DISTINCT source) AS files,
                   arg_min(source, (source, line)) AS first_in, arg_min(line, (source, line)) AS first_line
            FROM rejects GROUP BY reason ORDER BY records DESC, reason LIMIT {MOST_ROWS}
            """,
        ),
        note=cut_note(connection, "SELECT count(DISTINCT reason) FROM rejects", MOST_ROWS),
    )


def settings(connection: Any) -> Table:
    """What the run was."""
    return Table(
        caption="Run",
        columns=[Column("key", heading="setting"), Column("value")],
        rows=rows(connection, f"SELECT key, value FROM run_info ORDER BY key, value LIMIT {MOST_ROWS}"),
        note=cut_note(connection, "SELECT count(*) FROM run_info", MOST_ROWS),
    )
