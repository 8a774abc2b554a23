"""A token where it stands: some of its occurrences with the text around, and which features differ between two."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from tasks.explore.examples import NO_OCCURRENCES, in_text
from tasks.explore.vocabulary import (
    Asked,
    Context,
    Contexts,
    Controls,
    Facts,
    Grid,
    Link,
    Missing,
    Panel,
    Query,
    Shade,
    Slider,
    address,
)
from tasks.report.text import integer, percent, plural
from tasks.report.vocabulary import Column, Row

SHOWN = 12
WIDTH = 20
"""Tokens shown before the one that a context is of, and after it."""

SAMPLES = 99


class Place(NamedTuple):
    """A token's place in the corpus: its document, and its position there."""

    doc_id: int
    position: int

    @property
    def name(self) -> str:
        """As an address has it."""
        return f"{self.doc_id}:{self.position}"


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Occurrences of a token.

    Attributes:
        texts: The text around each.
        query: What they were made with; None where no occurrence is kept.
    """

    texts: dict[Place, Context]
    query: Query | None


def sampled(asked: Asked, token_id: int, layer: int | None) -> Sampled:
    """Occurrences spread evenly over the documents that are in the graph, or over all where the token is in none."""
    if not asked.has("occurrences"):
        return Sampled(texts={}, query=None)
    sample = asked.number("sample", 0, 0, SAMPLES)
    in_graph = (
        asked.value(Query.of("explore/graph_documents")) if asked.has("run_info", "activations") else None
    )
    rows: list[Row] = []
    for documents in dict.fromkeys((in_graph, 2**62)):
        if documents is not None and not rows:
            rows = asked.rows(
                Query.of(
                    "explore/token_places", token_id=token_id, documents=documents, most=SHOWN, sample=sample
                )
            )
    places = [Place(row["doc_id"], row["position"]) for row in rows]
    query = Query.of(
        "explore/contexts",
        doc_ids=[place.doc_id for place in places],
        positions=[place.position for place in places],
        width=WIDTH,
    )
    texts: dict[Place, list[Shade]] = {place: [] for place in places}
    for row in asked.rows(query) if places else []:
        at = Place(row["doc_id"], row["at"])
        texts[at].append(
            Shade(
                text=in_text(row["token"]),
                mark=row["position"] == at.position,
                to=address("token", row["token_id"], layer=layer),
            )
        )
    return Sampled(
        texts={
            place: Context(
                tokens=tokens,
                about=f"{place.doc_id}:{place.position}",
                to=address(
                    "text",
                    place.doc_id,
                    **{"from": max(0, place.position - WIDTH)},
                    layer=layer,
                    at=place.position,
                ),
            )
            for place, tokens in texts.items()
        },
        query=query,
    )


def contexts(asked: Asked, found: Sampled) -> list[Panel]:
    """The occurrences, and a choice of others."""
    if found.query is None:
        return [NO_OCCURRENCES]
    return [
        Controls(
            controls=[
                Slider(
                    key="sample",
                    label="Other occurrences",
                    low=0,
                    high=SAMPLES,
                    value=asked.number("sample", 0, 0, SAMPLES),
                )
            ],
            keep=kept(asked, "layer"),
            title="Where it stands",
        ),
        Contexts(
            title="",
            contexts=list(found.texts.values()),
            query=found.query,
            note=f"{plural(len(found.texts), 'occurrence')}, spread evenly over those in the corpus; before each, its "
            "document and position.",
        ),
    ]


def compared(asked: Asked, found: Sampled, layer: int | None) -> list[Panel]:
    """Which features differ between two of the occurrences that are in the graph."""
    if layer is None or found.query is None or not asked.has("activations", "feature_degree"):
        return []
    title = "Two contexts compared"
    in_graph = asked.value(Query.of("explore/graph_documents")) if asked.has("run_info") else None
    known = [place for place in found.texts if in_graph is None or place.doc_id < in_graph]
    if len(known) < 2:
        return [
            Missing(
                what=f"{title}: features are known of {integer(len(known))} of these occurrences, and it takes two.",
                way="Raise activations.max_documents or activations.max_tokens, and run again.",
            )
        ]
    options = [
        (place.name, f"{place.doc_id}:{place.position} {_excerpt(found.texts[place])}") for place in known
    ]
    choices = [
        asked.choice(key, label, options, options[default][0])
        for key, label, default in (("first", "First", 0), ("second", "Second", 1))
    ]
    first, second = (Place(*map(int, choice.value.split(":"))) for choice in choices)
    query = Query.of(
        "explore/contexts_compared",
        layer=layer,
        first_doc=first.doc_id,
        first_position=first.position,
        second_doc=second.doc_id,
        second_position=second.position,
    )
    counted = Counter(row["active_in"] for row in asked.rows(query))
    either = counted.total()
    return [
        Controls(title=title, controls=choices, keep=kept(asked, "layer", "sample")),
        Contexts(
            title="",
            contexts=[found.texts[place] for place in dict.fromkeys((first, second))],
            query=found.query,
        ),
        Facts(
            facts=[
                ("features in both", integer(counted["both"]), ""),
                ("in the first alone", integer(counted["first alone"]), ""),
                ("in the second alone", integer(counted["second alone"]), ""),
                ("shared", percent(counted["both"] / either if either else None), ""),
            ],
            query=query,
        ),
        Grid(
            key="compared",
            caption=f"Features of layer {layer} at the two, those that differ most first",
            query=query,
            columns=[
                Link(
                    column=Column("feature_id", "plain", "feature"),
                    to=lambda row: address("feature", layer, row["feature_id"]),
                ),
                Column("label"),
                Column("active_in"),
                Column("first", "number"),
                Column("second", "number"),
                Column("difference", "change"),
                Column("apart", "number"),
                Column("degree", "integer", "tokens that open it"),
                Column("density", "percent", digits=3),
            ],
            order="-apart",
            filters=["feature_id", "label", "active_in", "first", "second", "degree", "density"],
            bars=["apart"],
            page_size=25,
            note="The model saw each window alone, so a token’s features can differ only by what stands before it.",
            empty=f"Neither of them activates a feature at layer {layer}.",
        ),
    ]


def kept(asked: Asked, *keys: str) -> dict[str, str]:
    """What an address says under some names, for a form to keep."""
    return {key: asked.values[key] for key in keys if key in asked.values}


def _excerpt(context: Context) -> str:
    """A few words up to the token that a context is of, for a list of choices."""
    at = next(place for place, shade in enumerate(context.tokens) if shade.mark)
    return "…" + "".join(shade.text for shade in context.tokens[max(0, at - 5) : at + 1])[-40:]
