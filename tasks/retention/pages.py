"""The explorer's pages on retention (PAPER 2): the report's sections at any length, protocol and budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.explore.not_run import not_run
from tasks.explore.sections import figures, given, grid
from tasks.explore.vocabulary import (
    Asked,
    Choice,
    Controls,
    Findings,
    Grid,
    Missing,
    Page,
    PageAt,
    Panel,
    Query,
)
from tasks.report.text import integer, percent, plain
from tasks.report.vocabulary import Column, Row, Section
from tasks.retention import claims
from tasks.retention.looks import middle_budget, place_of
from tasks.retention.report import claims_section
from tasks.retention.report_costs import errors, frontier, losses, speed
from tasks.retention.report_tokens import retrieval, survival

TITLE, ADDRESS = "Retention", "/retention"
TOP = [("Experiments", "/experiments")]

SHOWN: Mapping[str, Callable[[Any], str]] = {
    "length": lambda value: f"{integer(value)} tokens",
    "protocol": str,
    "budget": lambda value: percent(value, 1),
}
"""How what can be chosen is told."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A section of the report, at a place that the reader chooses.

    Attributes:
        name: In the address.
        title: Of the page.
        table: That has what can be chosen.
        of: What is chosen, in this order: what comes later depends on what was chosen before.
        section: From the connection and what was chosen.
        query: In `sql/retention/`.
        columns: Of the grid; none: those of the section's first table.
        order: Of the grid.
        filters: Of the grid.
        way: What to add to a configuration to get it.
    """

    name: str
    title: str
    table: str
    of: Sequence[str]
    section: Callable[[Any, Row], Section]
    query: str
    columns: Sequence[Column] = ()
    order: str
    filters: Sequence[str] = ("policy",)
    way: str = "[[retention.sequences]]\nlength = 2048\ndocuments = 8"


PLACE = ("length", "protocol", "budget")


def _place(at: Row) -> tuple[tuple[str, int], float]:
    return (at["protocol"], at["length"]), at["budget"]


VIEWS = (
    View(
        name="frontier",
        title="Perplexity against bytes",
        table="retention",
        of=("length", "protocol"),
        section=lambda connection, at: frontier(connection, (at["protocol"], at["length"])),
        query="explore_frontier",
        order="perplexity_ratio",
        filters=("policy", "budget", "kv_bytes_share", "perplexity_ratio"),
    ),
    View(
        name="survival",
        title="Survival",
        table="retention_curves",
        of=PLACE,
        section=lambda connection, at: survival(connection, _place(at)),
        query="explore_survival",
        columns=(
            Column("policy"),
            Column("kind"),
            Column("age", "integer"),
            Column("at_risk", "integer", "at risk (all heads)"),
            Column("survival", "percent", digits=2, shows="both"),
            Column("ratio", "decimal", "÷ random", shows="both"),
        ),
        order="age",
        filters=("policy", "kind", "age"),
    ),
    View(
        name="losses",
        title="What it costs",
        table="retention_margins",
        of=PLACE,
        section=lambda connection, at: losses(connection, _place(at)),
        query="explore_losses",
        columns=(
            Column("policy"),
            Column("tokens"),
            Column("position_from", "integer"),
            Column("position_to", "integer"),
            Column("n", "integer", "predictions"),
            Column("delta_nll", "change", "nats above the full run", digits=3, shows="both"),
        ),
        order="delta_nll",
        filters=("policy", "tokens", "position_from"),
    ),
    View(
        name="layers",
        title="Errors by layer",
        table="retention_layers",
        of=PLACE,
        section=lambda connection, at: errors(connection, _place(at)),
        query="explore_layers",
        columns=(
            Column("policy"),
            Column("layer", "plain"),
            Column("error", "number", shows="both"),
            Column("local_error", "number"),
            Column("carried", "number", shows="both"),
            Column("retained_mass", "percent", "attention on survivors", digits=1, shows="both"),
            Column("attention_entropy", "number"),
            Column("key_similarity", "number"),
            Column("function_share", "percent", "function tokens among the kept", digits=1),
        ),
        order="layer",
        filters=("policy", "layer", "error"),
    ),
    View(
        name="speed",
        title="Speed",
        table="retention_speed",
        of=("budget",),
        section=lambda connection, at: speed(connection, at["budget"]),
        query="explore_speed",
        order="-speed_ratio",
        filters=("policy", "length"),
        way='[retention.speed]\npolicies = ["streaming", "str", "cmp"]\nbudgets = [0.125]\nlengths = [2048]',
    ),
    View(
        name="retrieval",
        title="Retrieval",
        table="retention_retrieval",
        of=("budget",),
        section=lambda connection, at: retrieval(connection, at["budget"]),
        query="explore_retrieval",
        columns=(
            Column("task"),
            Column("length", "integer"),
            Column("policy"),
            Column("depth", "percent", digits=0),
            Column("n", "integer", "prompts"),
            Column("exact_match", "percent", "exact", digits=1),
            Column("full_exact_match", "percent", "full’s", digits=1),
            Column("counts", "met"),
            Column("answer_logprob", "signed", "log-probability"),
            Column("full_answer_logprob", "signed", "full’s"),
        ),
        order="-answer_logprob",
        filters=("task", "length", "policy", "depth"),
        way="[retention.retrieval]\nlengths = [512]\ndepths = [0.1, 0.5, 0.9]\nn = 8",
    ),
)
LINKS = [("Claims", "/retention/claims"), *((view.title, f"/retention/{view.name}") for view in VIEWS[1:])]


def view_of(view: View, asked: Asked) -> Page:
    """A section of the report at the place that is chosen, and a grid of all that is there."""
    found = asked.rows(_there(view)) if asked.has(view.table) else []
    what = f"This run has nothing on {view.title.lower()}: nothing was read under a policy that forgets."
    panels: list[Panel] = [
        Missing(what=what, way=view.way) if asked.has("retention") else not_run("retention")
    ]
    lead = ""
    if found:
        choices, at = _chosen(asked, view, found)
        section = view.section(asked.connection, at)
        query = Query.of(f"retention/{view.query}", **at)
        (table, *_) = section.tables
        shown = grid("rows", table, query, order=view.order, filters=view.filters)
        if view.columns:
            shown = Grid(
                key="rows",
                caption=f"All of {view.title.lower()} at this place",
                query=query,
                columns=view.columns,
                order=view.order,
                filters=view.filters,
            )
        lead = section.shows
        panels = [
            Controls(controls=choices),
            *figures(section, query),
            *([Findings(findings=section.findings)] if section.findings else []),
            shown,
        ]
    is_first = view is VIEWS[0]
    return Page(
        title=TITLE if is_first else view.title,
        lead=lead,
        panels=panels,
        trail=TOP if is_first else [*TOP, (TITLE, ADDRESS)],
        beside=LINKS if is_first else [],
    )


def all_claims(asked: Asked) -> Page:
    """The paper's claims with verdicts, and every comparison that they rest on."""
    panels: list[Panel] = [not_run("retention")]
    lead = ""
    if claims.is_judgeable(asked.connection):
        section = claims_section(asked.connection)
        lead, panels = section.shows, [Findings(findings=section.findings)]
        panels += [
            grid(
                "claims",
                table,
                given(table),
                order="claim",
                filters=["claim", "policy", "budget", "hardest", "verdict"],
            )
            for table in section.tables
        ]
    return Page(title="Claims", lead=lead, trail=[*TOP, (TITLE, ADDRESS)], panels=panels)


def _there(view: View) -> Query:
    keys = dict.fromkeys(["policy", *(PLACE if "length" in view.of else view.of)])
    return Query(
        sql=f"SELECT DISTINCT {', '.join(keys)} FROM {view.table} WHERE policy <> 'full' ORDER BY ALL"
    )


def _chosen(asked: Asked, view: View, found: list[Row]) -> tuple[list[Choice], Row]:
    """A control each of what can be chosen, and what is; at first what most policies have, as in the report."""
    choices, at, everywhere = list[Choice](), Row(), found
    for key in view.of:
        options = {plain(row[key]): row[key] for row in sorted(found, key=lambda row: row[key])}
        default: Any = middle_budget(found)
        if "length" in view.of:
            (protocol, length), budget = place_of(found)
            default = {"protocol": protocol, "length": length, "budget": budget}[key]
        shown = [(option, SHOWN[key](value)) for option, value in options.items()]
        elsewhere = [plain(row[key]) for row in everywhere]
        choices.append(asked.choice(key, key.capitalize(), shown, plain(default), elsewhere=elsewhere))
        at[key] = options[choices[-1].value]
        found = [row for row in found if row[key] == at[key]]
    return choices, at


PAGES = (
    *(
        PageAt(
            path=ADDRESS if view is VIEWS[0] else f"{ADDRESS}/{view.name}",
            title=TITLE if view is VIEWS[0] else view.title,
            build=functools.partial(view_of, view),
        )
        for view in VIEWS
    ),
    PageAt(path=f"{ADDRESS}/claims", title="Claims", build=all_claims),
)
