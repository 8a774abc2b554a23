"""Which share of a layer's features chosen tokens reach, and which token would add most to them."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.explore.features import NO_GRAPH, layers_of
from tasks.explore.search import TO_SEARCH, search
from tasks.explore.vocabulary import (
    Asked,
    Box,
    Choice,
    Control,
    Controls,
    Facts,
    Figure,
    Grid,
    Link,
    NotThere,
    Page,
    PageAt,
    Panel,
    Query,
    Refused,
    Slider,
    address,
)
from tasks.models.token_texts import visible
from tasks.report import charts
from tasks.report.text import integer, percent, plural
from tasks.report.vocabulary import Chart, Column, Row

RANKS_ON_SLIDER = 1000
FIRST_RANKS = 10
NEXT = 10
MOST_CHOSEN = 200
"""Tokens in an address."""

CURVES = charts.Key(
    field="tokens",
    looks={
        "the most frequent": charts.Look(charts.BLUE, charts.LINE),
        "the chosen": charts.Look(charts.VERMILLION, "diamond", size=140),
    },
)


def cover(asked: Asked) -> Page:
    """Tokens of one's own choice."""
    return Page(
        title="Choose tokens",
        lead="What share of the features do a few tokens reach together? Of all the features of a layer that any token "
        "activates here, a token reaches those that it activates at least once.",
        panels=coverage(asked, is_choosing=True),
        trail=[("Overview", "/")],
    )


PAGES = (PageAt(path="/cover", title="Choose tokens", build=cover, menu=True),)


def coverage(asked: Asked, *, is_choosing: bool = False) -> list[Panel]:
    """A choice of tokens by rank, and where that is asked for by name; what they reach, and what would add most."""
    if not asked.has("coverage", "edges", "token_degree", "graph_summary"):
        return [NO_GRAPH]
    layers = layers_of(asked)
    layer = int(asked.chosen("layer", layers))
    tokens = _tokens(asked) if is_choosing else []
    typed = asked.values.get("add", "") if is_choosing else ""
    candidates = _candidates(asked, typed) if typed else []
    if len(candidates) == 1:
        tokens = list(dict.fromkeys([*tokens, candidates[0]["token_id"]]))
    last = asked.value(Query.of("explore/last_rank")) or 0
    rank = asked.number("rank", 0 if is_choosing else min(FIRST_RANKS, last), 0, last)
    reached = Query.of("explore/chosen_coverage", layer=layer, rank=rank, tokens=tokens)
    total = asked.rows(reached)[-1]
    controls: list[Control] = [
        Choice(
            key="layer", label="Layer", options=[(str(n), f"layer {n}") for n in layers], value=str(layer)
        ),
        Slider(
            key="rank",
            label="The most frequent tokens",
            low=0,
            high=min(last, max(RANKS_ON_SLIDER, rank)),
            value=rank,
        ),
    ]
    if is_choosing:
        controls.append(Box(key="add", label="and this token", placeholder="␣the, or its id"))
    n_chosen, named = rank + len(tokens), _listed(tokens)
    facts = [
        ("tokens", integer(n_chosen), ""),
        ("features reached", f"{integer(total['cumulative_features'])} of {integer(total['activated'])}", ""),
        ("share", percent(total["coverage"]), ""),
    ]
    panels: list[Panel] = [
        Controls(
            title="Coverage",
            controls=controls,
            keep={} if named is None else {"tokens": named},
        ),
        Facts(facts=facts, query=reached),
        _curve(asked, layer, n_chosen, total["coverage"]),
        _next(layer, rank, tokens),
    ]
    if typed and len(candidates) != 1:
        panels.insert(1, _which(layer, rank, tokens, typed))
    if tokens:
        panels.insert(-1, _chosen(reached, layer, rank, tokens))
    return panels


def _tokens(asked: Asked) -> list[int]:
    """The tokens that an address names (`tokens=5,17`), each once.

    Raises:
        Refused: if something in it is no id, or there are more than `MOST_CHOSEN`.
        NotThere: if the corpus does not have one of them.
    """
    parts = list(filter(None, map(str.strip, asked.values.get("tokens", "").split(","))))
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) < 10):
            what = f"the tokens of this address cannot have {visible(part)} among them"
            raise Refused(what, hint="tokens=5,17: ids with commas between them; /search finds a token’s id")
    ids = list(dict.fromkeys(map(int, parts)))
    if len(ids) > MOST_CHOSEN:
        raise Refused(f"these are {len(ids):,} tokens", hint=f"{MOST_CHOSEN} can be chosen at once")
    known = Query(
        sql="SELECT token_id FROM tokens WHERE list_contains($ids::INTEGER[], token_id)", values={"ids": ids}
    )
    there = {row["token_id"] for row in asked.rows(known)} if ids else set()
    for token in ids:
        if token not in there:
            raise NotThere(f"the token {token} does not occur in this corpus", hint=TO_SEARCH)
    return ids


def _candidates(asked: Asked, typed: str) -> list[Row]:
    """The tokens that somebody may mean: one where its id was typed, or where one alone fits best."""
    rows = asked.rows(search(typed))
    return [row for row in rows if row["place"] == rows[0]["place"]]


def _listed(tokens: Sequence[int]) -> str | None:
    return ",".join(map(str, tokens)) or None


def cover_address(layer: int, rank: int, tokens: Sequence[int]) -> str:
    """Where these tokens are chosen."""
    return address("cover", layer=layer, rank=rank, tokens=_listed(tokens))


def _which(layer: int, rank: int, tokens: Sequence[int], typed: str) -> Panel:
    return Grid(
        key="which",
        caption="Which token? Choose one to add it",
        query=search(typed),
        columns=[
            Link(
                column=Column("token", "token"),
                to=lambda row: cover_address(layer, rank, [*tokens, row["token_id"]]),
            ),
            Column("token_id", "plain"),
            Column("match"),
            Column("count", "integer"),
        ],
        order="place",
        page_size=10,
        empty="No token of this corpus has that in its text. Spaces are shown, and may be typed, as ␣.",
    )


def _chosen(reached: Query, layer: int, rank: int, tokens: Sequence[int]) -> Panel:
    return Grid(
        key="chosen",
        caption="The chosen tokens, in their order, and what each adds to those before it",
        query=Query(sql=f"SELECT * FROM ({reached.sql}) WHERE place > 0", values=reached.values),
        columns=[
            Column("place", "integer"),
            Link(
                column=Column("token", "token"), to=lambda row: address("token", row["token_id"], layer=layer)
            ),
            Column("degree", "integer"),
            Column("new_features", "integer"),
            Column("coverage", "percent", "coverage so far"),
            Link(
                column=Column("away", "text", "take away"),
                to=lambda row: cover_address(
                    layer, rank, [token for token in tokens if token != row["token_id"]]
                ),
            ),
        ],
        order="place",
        bars=["new_features"],
        note=f"Place 0 are the {plural(rank, 'most frequent token')}." if rank else "",
    )


def _curve(asked: Asked, layer: int, n_chosen: int, share: float | None) -> Panel:
    query = Query.of("explore/coverage_curve", layer=layer)
    points = [row | {"tokens": "the most frequent"} for row in asked.rows(query)]
    chosen = [{"rank": n_chosen, "coverage": share, "tokens": "the chosen"}] if n_chosen else []
    x = charts.log("rank", "tokens")
    y = charts.share("coverage", "activated features reached", emphasised=0.5)
    return Figure(
        chart=Chart(
            spec=charts.single(
                charts.series(points, x, y, CURVES, marks=None),
                charts.series(chosen, x, y, CURVES, lines=False),
            ),
            alt=f"Rising curve of coverage against the number of most frequent tokens at layer {layer}; the "
            f"{plural(n_chosen, 'chosen token')} reach {percent(share)}.",
            caption="The share that as many of the most frequent tokens reach, and the chosen ones.",
        ),
        query=query,
    )


def _next(layer: int, rank: int, tokens: Sequence[int]) -> Panel:
    return Grid(
        key="next",
        caption="The next best tokens: those that add most features",
        query=Query.of("explore/next_tokens", layer=layer, rank=rank, tokens=list(tokens), most=NEXT),
        columns=[
            Link(
                column=Column("token", "token", "add"),
                to=lambda row: cover_address(layer, rank, [*tokens, row["token_id"]]),
            ),
            Column("new_features", "integer"),
            Column("coverage", "percent", "coverage with it"),
            Column("degree", "integer"),
            Column("rank", "integer"),
            Column("count", "integer"),
        ],
        order="-new_features",
        bars=["new_features"],
        page_size=NEXT,
        note="A greedy cover takes the best at each step. It is not proven to be the smallest, and never needs more "
        "than 1 + ln(number of features) times as many tokens as that.",
        empty="No other token adds a feature: every feature that is active here is reached.",
    )
