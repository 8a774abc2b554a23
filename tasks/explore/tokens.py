"""The ranking of the tokens, and one token: its degree, the features that it opens, where it stands."""

from __future__ import annotations

from tasks.explore.contexts import compared, contexts, sampled
from tasks.explore.cover import cover_address
from tasks.explore.features import NO_GRAPH, layers_of
from tasks.explore.search import PLACEHOLDER, TO_SEARCH, found
from tasks.explore.vocabulary import (
    Asked,
    Box,
    Controls,
    Facts,
    Figure,
    Grid,
    Link,
    Missing,
    NotThere,
    Page,
    PageAt,
    Panel,
    Query,
    address,
)
from tasks.models.token_texts import shared_texts, visible
from tasks.report import charts
from tasks.report.text import integer, percent, plural
from tasks.report.vocabulary import Chart, Column, Row

ALIKE = 1.5
"""Tokens up to so many times as frequent, or less, are of similar count."""

AROUND = 10
"""As `ALIKE`, of the tokens that are drawn."""

MOST_DRAWN = 400

DRAWN = charts.Key(
    field="kind", looks={**charts.KINDS.looks, "this token": charts.Look(charts.ORANGE, "diamond", size=140)}
)


def ranking(asked: Asked) -> Page:
    """All tokens by rank, with their degrees at each layer."""
    typed = asked.values.get("q", "")
    query = Query.of("explore/token_ranking")
    columns: list[Column | Link] = [
        Column("rank", "integer"),
        Link(column=Column("token", "token"), to=lambda row: address("token", row["token_id"])),
        Column("token_id", "plain", "id"),
        Column("kind"),
        Column("count", "integer"),
        Column("doc_share", "percent", "documents"),
        Column("cumulative_share", "percent", "up to here"),
    ]
    filters, note = ["token", "kind", "rank", "count", "doc_share"], ""
    if asked.has("token_degree"):
        layers = layers_of(asked)
        measured = [
            f"max(d.{degree}) FILTER (d.layer = {layer}) AS {degree}_{layer}"
            for layer in layers
            for degree in ("degree", "rarefied_degree")
        ]
        # A column a layer cannot be bound; layers are numbers.
        query = Query(
            sql=f"SELECT {', '.join(['r.*', *measured])}\nFROM (\n{query.sql}\n) AS r\n"
            "LEFT JOIN token_degree AS d ON d.token_id = r.token_id\nGROUP BY ALL"
        )
        for layer in layers:
            columns += [
                Column(f"degree_{layer}", "integer", f"degree, layer {layer}"),
                Column(f"rarefied_degree_{layer}", "number", "rarefied", digits=4),
            ]
            filters += [f"degree_{layer}", f"rarefied_degree_{layer}"]
        m = asked.value(Query(sql="SELECT max(m) FROM token_degree"))
        note = (
            "Degree: distinct features that the token activates at least once. Rarefied: the degree expected of "
            f"{integer(m)} of its occurrences, so that frequent and rare tokens compare; a dash where it has fewer."
        )
    return Page(
        title="Tokens",
        lead="Every token of the corpus by frequency. Function tokens are the most frequent ones, up to the share of "
        "all that this run was given.",
        panels=[
            Controls(controls=[Box(key="q", label="Text or id", value=typed, placeholder=PLACEHOLDER)]),
            found(typed)
            if typed
            else Grid(
                key="tokens",
                caption="Tokens",
                query=query,
                columns=columns,
                order="rank",
                filters=filters,
                bars=["count"],
                note=note,
                empty="No token is so.",
            ),
        ],
    )


def token(asked: Asked) -> Page:
    """One token.

    Raises:
        NotThere: if the corpus does not have it.
    """
    token_id = asked.part("token_id")
    query = Query.of("explore/one_token", token_id=token_id)
    row = asked.row(query)
    if row is None:
        raise NotThere(f"the token {token_id} does not occur in this corpus", hint=TO_SEARCH)
    layers = layers_of(asked)
    layer = int(asked.chosen("layer", layers)) if layers else None
    places = sampled(asked, token_id, layer)
    return Page(
        title=f"Token {visible(row['token'])}",
        lead=f"{'A function' if row['is_function'] else 'A content'} token, rank {integer(row['rank'])}.",
        panels=[
            _facts(asked, row, query),
            *([NO_GRAPH] if layer is None else _in_the_graph(asked, row, layer)),
            *contexts(asked, places),
            *compared(asked, places, layer),
        ],
        trail=[("Tokens", "/tokens")],
        beside=[
            *((f"layer {n}", address("token", token_id, layer=n)) for n in layers if n != layer),
            *([] if layer is None else [("coverage with it", cover_address(layer, 0, [token_id]))]),
            *_neighbours(asked, row["rank"], layer),
        ],
    )


PAGES = (
    PageAt(path="/tokens", title="Tokens", build=ranking, menu=True),
    PageAt(path="/token/{token_id}", title="Token", build=token),
)


def _facts(asked: Asked, row: Row, query: Query) -> Panel:
    text = row["token"]
    same = "others have its text too" if text in shared_texts(asked.connection) else ""
    return Facts(
        facts=[
            ("text", visible(text, 400), ""),
            ("characters", " ".join(f"U+{ord(character):04X}" for character in (text or "")[:12]), ""),
            ("id", f"{row['token_id']}{f' ({same})' if same else ''}", ""),
            ("occurrences", f"{integer(row['count'])}, {percent(row['share'], 3)} of all", ""),
            ("documents", f"{integer(row['doc_count'])}, {percent(row['doc_share'])} of all", ""),
        ],
        query=query,
    )


def _neighbours(asked: Asked, rank: int, layer: int | None) -> list[tuple[str, str]]:
    """The token before it in the ranking, and the next."""
    query = Query.of("explore/neighbours", rank=rank)
    return [
        (
            f"{'before' if row['rank'] < rank else 'next'}: {visible(row['token'], 24)}",
            address("token", row["token_id"], layer=layer),
        )
        for row in asked.rows(query)
    ]


def _in_the_graph(asked: Asked, row: Row, layer: int) -> list[Panel]:
    token_id = row["token_id"]
    query = Query.of("explore/token_layers", token_id=token_id, factor=ALIKE)
    rows = asked.rows(query)
    if not rows:
        return [
            Missing(
                what="This token is in none of the documents whose features were read.",
                way="Raise activations.max_documents or activations.max_tokens, and run again.",
            )
        ]
    here = next(one for one in rows if one["layer"] == layer)
    degrees = Grid(
        key="layers",
        caption="Degree at each layer, and where that stands",
        query=query,
        columns=[
            Link(
                column=Column("layer", "plain"), to=lambda one: address("token", token_id, layer=one["layer"])
            ),
            Column("degree", "integer"),
            Column("share", "percent", "of the active features"),
            Column("alike", "integer", "tokens of similar count"),
            Column("alike_median", "decimal", "their median degree", digits=1),
            Column("percentile", "percent", "has more than so many", digits=0),
            Column("rarefied_degree", "number", "rarefied degree", digits=4),
            Column("rarefied_percentile", "percent", "more than so many of all", digits=0),
        ],
        order="layer",
        note=f"Of similar count: {ALIKE:g} times less to {ALIKE:g} times more frequent in the graph’s documents; ties "
        f"count half. Rarefied: expected of {integer(here['m'])} occurrences, so held against all tokens that have as "
        "many.",
    )
    whole = f" ({integer(row['count'])} in the whole corpus)" if here["count"] < row["count"] else ""
    opened = Grid(
        key="features",
        caption=f"The features that it opens at layer {layer}",
        query=Query.of("explore/token_features", layer=layer, token_id=token_id),
        columns=[
            Link(
                column=Column("feature_id", "plain", "feature"),
                to=lambda one: address("feature", layer, one["feature_id"]),
            ),
            Column("label"),
            Column("n", "integer", "occurrences"),
            Column("share", "percent", "share of its occurrences"),
            Column("lift", "number"),
            Column("max_activation", "number", "max"),
            Column("mean_activation", "number", "mean"),
            Column("degree", "integer", "tokens that open it"),
            Column("density", "percent", "density", digits=3),
        ],
        order="-n",
        filters=["feature_id", "label", "n", "share", "lift", "max_activation", "degree", "density"],
        bars=["share"],
        page_size=20,
        note=f"In its {plural(here['count'], 'occurrence')} in the documents whose features were read{whole}. Lift: "
        "how many times more often the feature is active at this token than at any. Density: the share of all tokens "
        "at which it is.",
        empty=f"It activates no feature at layer {layer}.",
    )
    return [degrees, *_peers(asked, row, here), opened]


def _peers(asked: Asked, row: Row, here: Row) -> list[Panel]:
    """The chart of degree against count, of tokens about as frequent."""
    layer, token_id = here["layer"], row["token_id"]
    query = Query.of("explore/token_peers", layer=layer, token_id=token_id, factor=AROUND, most=MOST_DRAWN)
    points = [
        one
        | {
            "kind": "this token"
            if one["token_id"] == token_id
            else "function tokens"
            if one["is_function"]
            else "content tokens"
        }
        for one in asked.rows(query)
    ]
    if len(points) < 2 or not here["degree"]:
        return []
    x, y = charts.log("count", "occurrences"), charts.log("degree", f"degree at layer {layer}")
    ordered = sorted(points, key=lambda one: list(DRAWN.looks).index(one["kind"]))
    standing = (
        f"Its degree is larger than that of {integer(round(here['percentile'] * here['alike']))} of the "
        f"{plural(here['alike'], 'token')} of similar count."
        if here["alike"]
        else "No other token is of similar count."
    )
    return [
        Figure(
            chart=Chart(
                spec=charts.single(charts.series(ordered, x, y, DRAWN, lines=False)),
                alt=f"Degree against occurrences of {plural(len(points), 'token')}, both logarithmic: this one has "
                f"{plural(here['degree'], 'feature')} in {plural(here['count'], 'occurrence')}.",
                caption=f"Tokens from {AROUND} times less to {AROUND} times more frequent"
                f"{', thinned' if len(points) >= MOST_DRAWN / 2 else ''}. {standing}",
            ),
            query=query,
            title="Against tokens of its frequency",
        )
    ]
