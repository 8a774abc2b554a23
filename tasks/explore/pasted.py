"""Text of a reader's own, encoded by the run's model: the same look as a document's."""

from __future__ import annotations

from collections import defaultdict

from infra.catalog import Catalog
from tasks.dictionaries.published import published_dictionaries
from tasks.explore.encoding import Encode, Encoded
from tasks.explore.examples import in_text
from tasks.explore.features import NO_GRAPH
from tasks.explore.vocabulary import (
    FEATURE,
    Asked,
    Box,
    Choice,
    Context,
    Contexts,
    Control,
    Controls,
    Grid,
    Missing,
    Page,
    PageAt,
    Panel,
    Query,
    Refused,
    Shade,
    address,
)
from tasks.models.token_texts import visible
from tasks.report.text import integer, number, plural
from tasks.report.vocabulary import Column

STRONGEST = 5
"""Features told of a token under the cursor."""

LISTED = 500
"""Features of a text that are listed."""

LONGEST = 20_000
"""Characters of a text."""

_BY = {"strongest": "the strongest activation", "active": "how many features are active"}


def pasted(asked: Asked) -> Page:
    """A form for a text, and what is active in it.

    Raises:
        Refused: if the text is too long, or is asked for a token that it does not have.
    """
    lead = "Your own text, through the model and the dictionaries of this run."
    encode: Encode | None = asked.context.get("encode")
    if encode is None:
        return Page(
            title="Your text",
            lead=lead,
            panels=[
                Missing(
                    what="No model is loaded: pages show what runs have stored, and compute nothing.",
                    way="functok explore --root ROOT --model run",
                )
            ],
            trail=[("Texts", "/texts")],
        )
    text = asked.values.get("text", "")
    if len(text) > LONGEST:
        raise Refused(f"this text has {len(text):,} characters", hint=f"{LONGEST:,} are read at most")
    catalog: Catalog = asked.context["catalog"]
    layers = list(published_dictionaries(asked.context["storage"], catalog))
    if not layers:
        return Page(title="Your text", lead=lead, panels=[NO_GRAPH], trail=[("Texts", "/texts")])
    chosen = asked.chosen("layer", [*layers, "all"])
    by = asked.chosen("by", list(_BY))
    options = [(str(layer), str(layer)) for layer in layers]
    controls: list[Control] = [
        Box(key="text", label="Text", value=text, placeholder="Paste a text", is_long=True),
        Choice(key="layer", label="Layer", options=[*options, ("all", "all, stacked")], value=chosen),
        Choice(key="by", label="Shade by", options=list(_BY.items()), value=by),
    ]
    panels: list[Panel] = [Controls(controls=controls)]
    if text:
        wanted = layers if chosen == "all" else [int(chosen)]
        panels += _shown(asked, encode(catalog, text, wanted), by, text, chosen)
    return Page(title="Your text", lead=lead, panels=panels, trail=[("Texts", "/texts")])


PAGES = (PageAt(path="/paste", title="Your text", build=pasted, menu=True),)


def _shown(asked: Asked, encoded: Encoded, by: str, text: str, chosen: str) -> list[Panel]:
    at = asked.whole("at", 0, len(encoded.tokens) - 1)
    contexts, rows = [], []
    for layer, found in encoded.active.items():
        by_token: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for place, feature_id, activation in found:
            by_token[place].append((activation, feature_id))
            if at in (None, place):
                rows.append((layer, feature_id, place, activation))
        values = {
            place: max(of)[0] if by == "strongest" else float(len(of)) for place, of in by_token.items()
        }
        largest = max(values.values(), default=0.0)
        contexts.append(
            Context(
                about=f"layer {layer}",
                tokens=[
                    Shade(
                        text=in_text(token),
                        strength=values.get(place, 0.0) / largest if largest else 0.0,
                        value=_told(token, by_token.get(place, [])),
                        to=address("paste", text=text, layer=chosen, by=by, at=place),
                        mark=at == place,
                    )
                    for place, (_, token) in enumerate(encoded.tokens)
                ],
            )
        )
    cut = f" Only the first {integer(len(encoded.tokens))} tokens were read." if encoded.is_cut else ""
    return [
        Contexts(
            title=f"Your text, {plural(len(encoded.tokens), 'token')}",
            contexts=contexts,
            note=f"Shade: {_BY[by]}. A click on a token lists its features.{cut}",
            wraps=True,
        ),
        _features(rows, encoded, at),
    ]


def _told(token: str, active: list[tuple[float, int]]) -> str:
    strongest = sorted(active, key=lambda one: (-one[0], one[1]))[:STRONGEST]
    told = ", ".join(f"{feature_id}: {number(activation)}" for activation, feature_id in strongest)
    return f"{visible(token)} · {len(active)} active{'; ' if told else ''}{told}"


def _features(rows: list[tuple[int, int, int, float]], encoded: Encoded, at: int | None) -> Grid:
    strongest: dict[tuple[int, int], tuple[float, int, int]] = {}
    for layer, feature_id, place, activation in rows:
        before = strongest.get((layer, feature_id), (0.0, 0, 0))
        strongest[layer, feature_id] = (
            max(before[0], activation), place if activation > before[0] else before[1], before[2] + 1
        )  # fmt: skip
    listed = sorted(strongest.items(), key=lambda one: (-one[1][0], one[0]))[:LISTED]
    where = "anywhere in it" if at is None else f"at {visible(encoded.tokens[at][1])}"
    return Grid(
        key="active",
        caption=f"The features that are active {where}",
        query=Query.of(
            "explore/pasted_features",
            layers=[layer for (layer, _), _ in listed],
            feature_ids=[feature_id for (_, feature_id), _ in listed],
            activations=[found[0] for _, found in listed],
            tokens=[encoded.tokens[found[1]][0] for _, found in listed],
            counts=[found[2] for _, found in listed],
        ),
        columns=[
            Column("layer", "plain"),
            FEATURE,
            Column("label"),
            Column("activation", "number", "strongest", digits=4),
            Column("token", "token", "at"),
            Column("n", "integer", "tokens of this text"),
            Column("degree", "integer", "tokens that open it"),
            Column("density", "percent", digits=3),
        ],
        order="-activation",
        filters=["layer", "feature_id", "label", "activation", "token", "n", "degree", "density"],
        bars=["activation"],
        note=f"The {LISTED} strongest." if len(strongest) > LISTED else "",
        empty="No feature is active here.",
    )
