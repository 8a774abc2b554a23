"""A layer's features: how often each is active, how many tokens open it, and how unevenly."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.explore.vocabulary import (
    Asked,
    Choice,
    Columns,
    Controls,
    DensityBounds,
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
from tasks.report import charts
from tasks.report.text import integer, percent
from tasks.report.vocabulary import Chart, Column

DRAWN = 600
"""Features of a chart at most, about."""

ONE_TOKEN, MANY_TOKENS, DENSE = 0.5, 5, 0.1
"""Kinds of features: by the share of its first token, its token entropy in bits, its density; at least."""

NO_GRAPH = Missing(
    what="This run has counted tokens only: it has no dictionary, so there are no features.",
    way='[[sae]]\nlayer = 12\npath = "…"  # or release and sae_id, or train = {…}',
)
NO_FEATURE_TABLES = Missing(
    what="This run was made before tables by feature were kept: examples, histograms, and the tokens of each feature.",
    way="Run `functok run CONFIG` again: the tables alone are made anew.",
)
KINDS = charts.Key(
    field="kind",
    looks={
        "mostly one token": charts.Look(charts.VERMILLION, "circle"),
        "several tokens": charts.Look(charts.BLUE, "triangle-up"),
    },
)


def features(asked: Asked) -> Page:
    """All features of a layer that are active anywhere."""
    lead = (
        "Every feature that any token activates here. Token entropy tells features of one token (0 bits) from those "
        "that many tokens open, which are about the context."
    )
    if not asked.has("feature_degree", "graph_summary"):
        return Page(title="Features", panels=[NO_GRAPH], lead=lead)
    layers = layers_of(asked)
    layer = int(asked.chosen("layer", layers))
    panels: list[Panel] = [
        Controls(
            controls=[
                Choice(
                    key="layer", label="Layer", options=[(str(n), str(n)) for n in layers], value=str(layer)
                )
            ]
        )
    ]
    if not asked.has("feature_summary"):
        return Page(title="Features", panels=[*panels, NO_FEATURE_TABLES], lead=lead)
    return Page(
        title=f"Features of layer {layer}",
        lead=lead,
        panels=[*panels, *_kinds(asked, layer), _grid(asked, layer)],
        beside=[
            *((f"layer {n}", address("features", layer=n)) for n in layers if n != layer),
            ("all labels", address("labels")),
        ],
    )


def layers_of(asked: Asked) -> list[int]:
    """The layers that have a graph, ascending."""
    if not asked.has("graph_summary"):
        return []
    found = asked.rows(Query(sql="SELECT layer FROM graph_summary ORDER BY layer"))
    return [row["layer"] for row in found]


def require_feature(asked: Asked, layer: int, feature_id: int) -> None:
    """See that a layer of the graph has a feature.

    Raises:
        NotThere: if it does not, or there is no such layer.
    """
    size = asked.value(
        Query(sql="SELECT dictionary_size FROM graph_summary WHERE layer = $layer", values={"layer": layer})
    )
    if size is None:
        layers = ", ".join(map(str, layers_of(asked)))
        raise NotThere(f"this run has no features of layer {layer}", hint=f"it has those of {layers}")
    if not 0 <= feature_id < size:
        raise NotThere(f"layer {layer} has no feature {feature_id}", hint=f"it has {size:,}, from 0")


def density_bounds(asked: Asked) -> tuple[str, float, float] | None:
    """What this run calls features between two densities, and these; None where it calls none so."""
    for one in asked.brought:
        if isinstance(one, DensityBounds) and asked.has(*one.needs):
            found = asked.row(one.bounds)
            if found is not None and found["low"] is not None:
                return one.name, found["low"], found["high"]
    return None


def opened_by(entropy: float | None, top_share: float | None) -> str:
    """What a token entropy says, in words."""
    if entropy is None or top_share is None:
        return "not known"
    tokens = 2**entropy
    return f"{entropy:.2f} bits, as of {tokens:,.1f} tokens alike; the first has {percent(top_share, 0)}"


def _grid(asked: Asked, layer: int) -> Grid:
    bounds = density_bounds(asked)
    called, low, high = bounds or ("", None, None)
    summary = asked.row(
        Query(
            sql="SELECT dictionary_size, activated_features FROM graph_summary WHERE layer = $layer",
            values={"layer": layer},
        )
    )
    assert summary is not None
    never = summary["dictionary_size"] - summary["activated_features"]
    columns: list[Column | Link] = [
        Link(
            column=Column("feature_id", "plain", "feature"),
            to=lambda row: address("feature", layer, row["feature_id"]),
        ),
        Column("label"),
        Link(
            column=Column("token", "token", "first token"),
            to=lambda row: (
                None if row["token_id"] is None else address("token", row["token_id"], layer=layer)
            ),
        ),
        Column("top_share", "percent", "its share", digits=0),
        Column("token_entropy", "decimal", "token entropy, bits"),
        Column("degree", "integer", "tokens that open it"),
        Column("n", "integer", "activations"),
        Column("density", "percent", digits=3),
        Column("max_activation", "number", "max"),
    ]
    filters = [
        "feature_id",
        "label",
        "token",
        "top_share",
        "token_entropy",
        "degree",
        "n",
        "density",
        "max_activation",
    ]
    note = (
        "First token: the one that opens it most often. Density: share of all tokens at which it is active."
    )
    if bounds is not None:
        note += f" {called.capitalize()}: its density is {percent(low, 4)} to {percent(high, 1)}."
        columns.append(Column("is_between", "mark", called))
        filters.append("is_between")
    return Grid(
        key="features",
        caption=f"{integer(summary['activated_features'])} features; {integer(never)} more are active nowhere here",
        query=Query.of("explore/features", layer=layer, low=low, high=high),
        columns=columns,
        order="-n",
        filters=filters,
        bars=["density", "token_entropy"],
        note=note,
        empty="No feature is so.",
    )


def _kinds(asked: Asked, layer: int) -> list[Panel]:
    """How many features are of one token, of many, dense; and a chart of them."""
    query = Query.of(
        "explore/feature_drawn",
        layer=layer,
        most=DRAWN,
        one_token=ONE_TOKEN,
        many_tokens=MANY_TOKENS,
        dense=DENSE,
    )
    points = asked.rows(query)
    if len(points) < 2:
        return []
    total = points[0]["n_features"]

    def kind(name: str, n: int, column: str, least: float) -> tuple[str, str, str]:
        to = address("features", layer=layer, **{f"features.{column}": f">= {least:g}"})
        return name, f"{integer(n)}, {percent(n / total, 0)}", to

    facts = [
        kind("mostly one token’s", points[0]["n_of_one"], "top_share", ONE_TOKEN),
        kind(
            f"of many tokens, {MANY_TOKENS} bits or more",
            points[0]["n_of_many"],
            "token_entropy",
            MANY_TOKENS,
        ),
        kind(f"dense, at {percent(DENSE, 0)} of all tokens or more", points[0]["n_dense"], "density", DENSE),
    ]
    chart = charts.single(
        charts.series(
            points,
            charts.log("density", "share of tokens at which it is active"),
            charts.linear("token_entropy", "token entropy, bits", zero=True),
            KINDS.only({point["kind"] for point in points}),
            lines=False,
        )
    ).properties(width=380, height=200)
    figure = Figure(
        title="One token, or many",
        chart=Chart(
            spec=chart,
            alt=f"Token entropy against density of {len(points)} features of layer {layer}.",
            caption=f"Mostly one token: at least half of the activations are its own.{_thinned(points)}",
        ),
        query=query,
    )
    return [Columns(panels=[Facts(facts=facts, title="What there is", query=query), figure])]


def _thinned(points: Sequence[object]) -> str:
    return " Evenly thinned." if len(points) >= DRAWN / 2 else ""


PAGES = (PageAt(path="/features", title="Features", build=features, menu=True),)
