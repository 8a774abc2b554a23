"""The report's last section: what the run was made from, what was checked, and what was not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.report.queries import first_rows, rows, tables_of
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
            Column("k", "plain"),
            Column("alive_share", "percent", "alive", digits=1),
            Column("heldout_tokens", "integer", "held-out tokens"),
        ],
        rows=rows(connection, "SELECT * FROM dictionaries ORDER BY layer"),
        note="Measured on held-out tokens where the dictionary was trained here; a dash where it was not. Explained "
        "variance leaves massive activations out, the column beside it has them in.",
    )


def expectations(connection: Any) -> Table:
    """What every stage was checked for, failures first."""
    query = """
        SELECT stage, expectation, success, CAST(observed AS VARCHAR) AS observed FROM expectations
        ORDER BY success, stage, expectation, 4
    """
    found, note = first_rows(connection, query, MOST_ROWS)
    return Table(
        caption="Expectations",
        columns=[
            Column("stage"),
            Column("expectation"),
            Column("success", "met", "met"),
            Column("observed"),
        ],
        rows=found,
        note=note,
    )


def rejects(connection: Any) -> Table:
    """Records that were not used, by reason."""
    query = """
        SELECT reason, count(*) AS records, count(DISTINCT source) AS files,
               arg_min(source, (source, line)) AS first_in, arg_min(line, (source, line)) AS first_line
        FROM rejects GROUP BY reason ORDER BY records DESC, reason
    """
    found, note = first_rows(connection, query, MOST_ROWS)
    return Table(
        caption="Records that were not used, by reason",
        columns=[
            Column("reason"),
            Column("records", "integer"),
            Column("files", "integer"),
            Column("first_in"),
            Column("first_line", "integer", "line"),
        ],
        rows=found,
        note=note,
    )


def settings(connection: Any) -> Table:
    """What the run was."""
    found, note = first_rows(connection, "SELECT key, value FROM run_info ORDER BY key, value", MOST_ROWS)
    columns = [Column("key", heading="setting"), Column("value")]
    return Table(caption="Run", columns=columns, rows=found, note=note)
