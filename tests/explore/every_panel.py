"""A page with every kind of panel, full of text that would do harm if it were not escaped."""

from __future__ import annotations

from tasks.explore.vocabulary import (
    Action,
    Asked,
    Box,
    Change,
    Choice,
    Columns,
    Context,
    Contexts,
    Controls,
    Facts,
    Figure,
    Findings,
    Grid,
    Link,
    Missing,
    Note,
    NotThere,
    Page,
    PageAt,
    Query,
    Refused,
    Shade,
    Slider,
    address,
)
from tasks.report import charts
from tasks.report.vocabulary import Chart, Column, Finding

HOSTILE = "<script>alert(1)</script> \"><img src=x onerror=alert(2)> {{ 7 * 7 }} {% raw %} ${1} 'x' \u202e"
"""What a corpus may hold."""

TOKENS = Query(sql="SELECT token_id, token, rank, count, share, is_function FROM tokens WHERE rank <= $last")


def every(asked: Asked) -> Page:
    """Every kind of panel."""
    query = Query(sql=TOKENS.sql, values={"last": asked.number("last", 1000, 1, 1000)})
    found = asked.rows(query)
    key = charts.Key.cycled("kind", ["share"])
    spec = charts.single(
        charts.series(
            [{**row, "kind": "share"} for row in sorted(found, key=lambda row: row["rank"])],
            charts.log("rank", "rank"),
            charts.share("share", "share", top=None),
            key,
        )
    )
    figure = Figure(
        title="Shares", chart=Chart(spec=spec, alt=f"Shares. {HOSTILE}", caption=HOSTILE), query=query
    )
    grid = Grid(
        key="tokens",
        caption="Tokens",
        query=query,
        columns=[
            Column("rank", "plain"),
            Link(column=Column("token", "token"), to=lambda row: address("part", row["token_id"])),
            Column("count", "integer"),
            Column("share", "percent"),
            Column("is_function", "mark", "function"),
        ],
        order="rank",
        filters=["token", "count", "is_function", "token_id"],
        bars=["count"],
        page_size=5,
        note=HOSTILE,
    )
    context = Context(
        about=f"document 0, {HOSTILE}",
        to="/part/1",
        tokens=[
            Shade(text="the "),
            Shade(text="quick ", strength=0.2, value="0.2"),
            Shade(text=HOSTILE, strength=1, value=HOSTILE, to="/part/2", mark=True),
            Shade(text=" lost", strength=0.5, value="3.2 nats", kind="loss"),
            Shade(text=" gone", strength=0.5, kind="gone"),
        ],
    )
    return Page(
        title="Every panel",
        lead=f"What pages are made of. {HOSTILE}",
        trail=[("Start", "/")],
        beside=[("layer 1", address("every", layer=1)), ("next: part 1", address("part", 1))],
        panels=[
            Controls(
                controls=[
                    Choice(key="layer", label="layer", options=[("0", "0"), ("1", HOSTILE)], value="0"),
                    Slider(key="last", label="ranks up to", low=1, high=1000, value=query.values["last"]),
                    Box(key="text", label="text", value=HOSTILE, suggestions=["the", HOSTILE]),
                ],
            ),
            Facts(title="Facts", facts=[("tokens", "12", ""), ("label", HOSTILE, "/part/1")], query=query),
            Findings(
                title="Findings",
                findings=[
                    Finding(title="A claim", verdict="holds", text=HOSTILE),
                    Finding(title="Another", verdict="differs", text="It does not hold."),
                    Finding(text="Found."),
                ],
            ),
            Columns(panels=[figure, grid]),
            Contexts(title="Contexts", contexts=[context, context], query=query, note="Darker is more."),
            Contexts(title="A document", contexts=[context], wraps=True),
            Change(title="Steered", before="it was at the gym today", after=f"it was at {HOSTILE} today"),
            Note(
                to="/keep",
                title="Label",
                controls=[
                    Box(key="label", label="label", value=HOSTILE),
                    Box(key="note", label="note", is_long=True),
                ],
                said="Kept beside the run.",
            ),
            Missing(what="There are no dictionaries.", way='[[sae]]\nlayer = 7\npath = "saes/7"'),
        ],
    )


def part(asked: Asked) -> Page:
    """A page with a part in its address, that may not be there."""
    number = asked.part("number")
    if number < 0:
        raise Refused("numbers are not negative", hint="ask for 0")
    row = asked.row(Query(sql="SELECT token FROM tokens WHERE token_id = $id", values={"id": number}))
    if row is None:
        raise NotThere(f"token {number} is not in this run", hint="look at /every")
    return Page(title=f"Token {row['token']}", panels=[], trail=[("Every panel", "/every")])


PAGES = (
    PageAt(path="/every", title="Every panel", build=every, menu=True),
    PageAt(path="/part/{number}", title="A part", build=part),
)


def _keep(asked: Asked) -> str:
    """What the form of the page sends is noted in the context."""
    if asked.values.get("label") == "refused":
        raise Refused("no such label", hint="another one")
    asked.context["kept"].append(dict(asked.values))
    return "/every"


ACTIONS = (Action(path="/keep", act=_keep),)
