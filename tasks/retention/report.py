"""The report's sections on retention (PAPER 2): claims, frontier, survival, errors, losses, speed and retrieval.

What the run has no tables for has no section. Charts that show one budget show the middle one of those that most
policies were read at; the tables have all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.report.queries import resamples_of, rows, tables_of, value
from tasks.report.text import integer, listed, percent
from tasks.report.vocabulary import Column, Finding, Section, Table
from tasks.retention import claims
from tasks.retention.report_costs import errors, frontier, frontier_rows, frontier_table, losses, speed
from tasks.retention.report_tokens import retrieval, survival

if TYPE_CHECKING:
    from rich.console import Console

HAS_OWN_GRAPHS = False


def facts(connection: Any) -> list[tuple[str, str]]:
    """What was read, for the head of the report."""
    if "retention" not in tables_of(connection):
        return []
    found = rows(
        connection,
        "SELECT length, max(n_documents) AS n FROM retention GROUP BY length ORDER BY length",
    )
    policies, budgets = (
        value(connection, f"SELECT count(DISTINCT {column}) FROM retention WHERE policy <> 'full'")
        for column in ("policy", "budget")
    )
    read = listed([f"{integer(row['n'])} of {integer(row['length'])} tokens" for row in found])
    return [
        ("retention policies", integer(policies)),
        ("retention budgets", integer(budgets)),
        ("retention sequences", read),
    ]


def findings(connection: Any) -> list[Finding]:
    """The paper's five claims about each of its policies, and function against content; none where nothing was read."""
    return claims.findings(connection)


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds each section that there are rows for; none where no table is published."""
    there = tables_of(connection)
    if "retention" not in there or not value(connection, "SELECT count(*) FROM retention"):
        return []
    built = [claims_section] if claims.is_judgeable(connection) else []
    built += [frontier]
    built += [
        build
        for table, build in (
            ("retention_curves", survival),
            ("retention_layers", errors),
            ("retention_margins", losses),
            ("retention_speed", speed),
            ("retention_retrieval", retrieval),
        )
        if table in there and value(connection, f"SELECT count(*) FROM {table}")
    ]
    return [functools.partial(build, connection) for build in built]


def closing(connection: Any, console: Console) -> None:
    """Print the frontier: what each policy and budget costs."""
    if "retention" not in tables_of(connection):
        return
    from rich.table import Table as Printed
    from rich.text import Text

    table = frontier_table(frontier_rows(connection))
    printed = Printed(title=table.caption)
    for column in table.columns:
        printed.add_column(column.name, justify="left" if column.look == "text" else "right")
    for cells in table.cells:
        printed.add_row(*map(Text, cells))
    console.print(printed)


def claims_section(connection: Any) -> Section:
    """The paper's claims, and what they were compared with."""
    judged = claims.judge(connection)
    return Section(
        key="retention",
        title="Retention: the paper’s claims",
        shows="What arXiv 2502.03102 claims of structured token retention (str) and of memory paths (cmp), held "
        f"against {listed(claims.BASELINES)} at equal bytes (within {percent(claims.EQUAL_BYTES, 0)}). A difference "
        "is turned so that it is above 0 where the claim is right; in parentheses its 95 % interval: percentiles of "
        f"{integer(resamples_of(connection, 'retention'))} resamples of the sequences, the same for both sides. A "
        "claim holds where it is right at every budget against every baseline, by less than 2.5 % chance, and differs "
        "where it is wrong against one, by less than 2.5 % chance over the number of comparisons; in between it is "
        "undecided. Chances are of a t test, which knows how few sequences there are: an interval on one side of zero "
        "is not enough. The table shows the comparison that a verdict rests on.",
        findings=claims.findings(connection),
        tables=[claims_table(judged)] if judged else [],
    )


def claims_table(judged: Sequence[claims.Judged]) -> Table:
    """A row a claim, policy, budget and measure."""
    return Table(
        caption="Claims",
        columns=[
            Column("claim"),
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("length", "integer"),
            Column("measure"),
            Column("own", "number", digits=4),
            Column("others", "number", "the other’s", digits=4),
            Column("hardest", heading="hardest to beat"),
            Column("compared", "integer", "compared with"),
            Column("difference", "change", digits=4, shows="both"),
            Column("verdict"),
        ],
        rows=[one.row for one in judged],
        note="Each row has a verdict of its own, over all that it was compared with.",
    )
