"""Documents, and a window of one token by token: the features that are active there, and what else was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.explore.examples import NO_OCCURRENCES, in_text
from tasks.explore.features import NO_GRAPH, layers_of, require_feature
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
    Link,
    Missing,
    NotThere,
    Page,
    PageAt,
    Panel,
    Query,
    Shade,
    TokenValues,
    address,
)
from tasks.models.token_texts import visible
from tasks.report.queries import told
from tasks.report.text import integer, number
from tasks.report.vocabulary import Column, Row

WINDOW, STACKED = 256, 96
"""Tokens of a window, of one layer and of all stacked."""

STRONGEST = 5
"""Features told of a token under the cursor."""

BEGINS = 14
"""Tokens of a document that a list shows."""

MOST_TOKENS = 20_000_000
"""Of a corpus whose documents' beginnings are read for a list of them."""

BY = {
    "strongest": "the strongest activation",
    "active": "how many features are active",
    "feature": "one feature",
}


def texts(asked: Asked) -> Page:
    """The documents of the corpus."""
    n_tokens = told(asked.connection, "tokens")
    is_read = asked.has("occurrences") and (n_tokens is None or int(n_tokens) <= MOST_TOKENS)
    to_text = Link(
        column=Column("doc_id", "plain", "document"), to=lambda row: address("text", row["doc_id"])
    )
    begins: list[Column | Link] = [Column("begins", digits=100)] if is_read else []
    return Page(
        title="Texts",
        lead="Every document of the corpus, to be read token by token.",
        panels=[
            Grid(
                key="documents",
                caption="Documents",
                query=Query.of("explore/documents", most=BEGINS)
                if is_read
                else Query.of("explore/documents_bare"),
                columns=[
                    to_text,
                    *begins,
                    Column("source"),
                    Column("n_tokens", "integer", "tokens"),
                    Column("n_chars", "integer", "characters"),
                ],
                order="doc_id",
                filters=["doc_id", *(["begins"] if is_read else []), "source", "n_tokens", "n_chars"],
                note=f"The first {BEGINS} tokens of each can be searched: type below “begins”."
                if is_read
                else "",
                empty="No document is so.",
            )
        ],
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What an experiment has measured at the tokens of a window.

    Attributes:
        what: What it is.
        told: Each time it was measured, as it is told, to its row.
        chosen: The one of them that is shown.
    """

    what: TokenValues
    told: Mapping[str, Row]
    chosen: str

    def query(self, place: Mapping[str, object]) -> Query:
        """The values in a window."""
        return Query.of(self.what.values, **place, **self.told[self.chosen])


@dataclass(frozen=True, kw_only=True)
class _Window:
    """What of a document is shown.

    Attributes:
        doc_id: The document.
        first: Position of its first token.
        last: Position of the last one.
        layers: The layers, ascending.
        feature_id: The feature that is looked for; None: none.
        measured: What experiments have measured of this corpus, by name.
        at: Position of the token whose features are listed; None: of none.
    """

    doc_id: int
    first: int
    last: int
    layers: Sequence[int]
    feature_id: int | None
    measured: Mapping[str, _Measured]
    at: int | None


def text(asked: Asked) -> Page:
    """A window of a document.

    Raises:
        NotThere: if there is no such document, or what it is asked with.
        Refused: if it is asked for a token that it does not have.
    """
    doc_id = asked.part("doc_id")
    document = asked.row(
        Query(sql="SELECT * FROM documents_in([$doc_id]) WHERE doc_id = $doc_id", values={"doc_id": doc_id})
    )
    if document is None:
        raise NotThere(f"there is no document {doc_id}", hint="/texts lists them")
    title, trail = f"Document {doc_id}", [("Texts", "/texts")]
    if not asked.has("occurrences"):
        return Page(title=title, panels=[NO_OCCURRENCES], trail=trail)
    layers = layers_of(asked) if asked.has("activations") else []
    chosen = asked.chosen("layer", [*layers, "all"]) if layers else ""
    size = STACKED if chosen == "all" else WINDOW
    n_tokens = document["n_tokens"]
    last = max(0, n_tokens - 1)
    first = asked.number("from", 0, 0, last)
    window = _Window(
        doc_id=doc_id,
        first=first,
        last=first + size - 1,
        layers=layers if chosen == "all" else [int(chosen)] if chosen else [],
        feature_id=_feature(asked, int(chosen)) if chosen not in ("", "all") else None,
        measured=_measured(asked),
        at=asked.whole("at", 0, last),
    )
    here = {
        "from": first or None,
        "layer": chosen or None,
        "feature": window.feature_id,
        "by": asked.values.get("by"),
        "of": asked.values.get("of"),
    }
    shown, by = _shown(asked, window, here)
    return Page(
        title=title,
        lead=f"{integer(n_tokens)} tokens of {document['source']}; these are {integer(first)} to "
        f"{integer(min(n_tokens, first + size) - 1)}."
        if n_tokens
        else f"An empty document of {document['source']}.",
        panels=[*_controls(asked, window, chosen, by, here), *shown, *_at(asked, window)],
        trail=trail,
        beside=_beside(asked, window, n_tokens, size, here),
    )


PAGES = (
    PageAt(path="/texts", title="Texts", build=texts, menu=True),
    PageAt(path="/text/{doc_id}", title="Text", build=text),
)


def _feature(asked: Asked, layer: int) -> int | None:
    """The feature that is looked for."""
    feature_id = asked.whole("feature", 0, 2**31 - 1)
    if feature_id is not None:
        require_feature(asked, layer, feature_id)
    return feature_id


def _measured(asked: Asked) -> dict[str, _Measured]:
    found = []
    for one in asked.brought:
        if isinstance(one, TokenValues) and asked.has(*one.needs):
            told_of = {one.told(row): row for row in asked.rows(one.series)}
            if told_of:
                found.append((one, told_of))
    every = [told for _, told_of in found for told in told_of]
    return {
        one.name: _Measured(
            what=one,
            told=told_of,
            chosen=asked.chosen("of", list(told_of), default=next(reversed(told_of)), elsewhere=every),
        )
        for one, told_of in found
    }


def _shown(asked: Asked, window: _Window, here: Mapping[str, object]) -> tuple[list[Panel], str]:
    """The texts, and what shades them."""
    place = {"doc_id": window.doc_id, "first": window.first, "last": window.last}
    tokens = asked.rows(Query.of("explore/text_tokens", **place))
    query = Query.of(
        "explore/text_active",
        **place,
        layers=list(window.layers),
        feature_id=-1 if window.feature_id is None else window.feature_id,
        most=STRONGEST,
    )
    active: dict[int, dict[int, Row]] = {layer: {} for layer in window.layers}
    for row in asked.rows(query) if window.layers else []:
        active[row["layer"]][row["position"]] = row
    queries = {name: one.query(place) for name, one in window.measured.items()}
    values = {
        name: {row["position"]: float(row["value"]) for row in asked.rows(of)} for name, of in queries.items()
    }
    choices = [
        *(["strongest", "active"] if window.layers else []),
        *(["feature"] if window.feature_id is not None and window.layers else []),
        *(name for name, of in values.items() if of),
    ]
    default = "feature" if "feature" in choices else None
    by = asked.chosen("by", choices, default, elsewhere=_kinds(window))
    contexts = []
    for layer in window.layers if by not in values else []:
        shades = _shades(tokens, _values(active[layer], by), active[layer], values, window, here)
        contexts.append(Context(tokens=shades, about=f"layer {layer}"))
    nearest = active[window.layers[0]] if window.layers else {}
    for name, of in values.items():
        if of and (by == name or len(window.layers) > 1):
            one = window.measured[name]
            shades = _shades(tokens, of, nearest, values, window, here, one.what.kind)
            contexts.append(Context(tokens=shades, about=f"{name} of {one.chosen}"))
    if not contexts:
        contexts.append(Context(tokens=_shades(tokens, {}, {}, values, window, here)))
    note = f"Shade: {_kinds(window)[by]}. " if by else ""
    note += (
        "The strongest features of a token are under the cursor; a click on it lists all."
        if window.layers
        else ""
    )
    panels: list[Panel] = [
        Contexts(
            title="", contexts=contexts, query=queries.get(by, query if window.layers else None),
            note=note, wraps=True,
        )
    ]  # fmt: skip
    nowhere = not any(row["own"] for row in nearest.values())
    if not window.layers:
        panels.append(NO_GRAPH)
    elif tokens and not any(active.values()):
        read = told(asked.connection, "graph_documents")
        panels.append(
            Missing(
                what="No feature is active here"
                + (f": features were read in the first {int(read):,} documents." if read else "."),
                way="[activations]\nmax_documents = …  # or max_tokens: more of the corpus",
            )
        )
    elif tokens and window.feature_id is not None and nowhere:
        where = address("feature", window.layers[0], window.feature_id)
        panels.append(
            Missing(
                what=f"Feature {window.feature_id} is active at none of these tokens.",
                way=f"{where} shows where it is",
            )
        )
    return panels, by


def _kinds(window: _Window) -> dict[str, str]:
    """What can shade a text, and how it is told."""
    return BY | {name: one.what.shown for name, one in window.measured.items()}


def _values(active: Mapping[int, Row], by: str) -> dict[int, float]:
    """What shades each position."""
    column = {"strongest": "strongest", "active": "active", "feature": "own"}[by]
    return {position: float(row[column] or 0) for position, row in active.items()}


def _shades(
    tokens: Sequence[Row],
    values: Mapping[int, float],
    active: Mapping[int, Row],
    measured: Mapping[str, Mapping[int, float]],
    window: _Window,
    here: Mapping[str, object],
    kind: Literal["activation", "loss", "gone"] = "activation",
) -> list[Shade]:
    largest = max(values.values(), default=0.0)
    shades = []
    for token in tokens:
        position = token["position"]
        told_of = [visible(token["token"])]
        if (row := active.get(position)) is not None:
            strongest = [f"{one['feature_id']}: {number(one['activation'])}" for one in row["features"]]
            told_of.append(f"{row['active']} active; {', '.join(strongest)}")
            if window.feature_id is not None:
                told_of.append(f"feature {window.feature_id}: {number(row['own'] or 0)}")
        told_of += [f"{name} {number(of[position])}" for name, of in measured.items() if position in of]
        shades.append(
            Shade(
                text=in_text(token["token"]),
                strength=values.get(position, 0.0) / largest if largest > 0 else 0.0,
                value=" · ".join(told_of),
                to=address("text", window.doc_id, **{**here, "at": position}),
                mark=position == window.at,
                kind=kind,
            )
        )
    return shades


def _controls(asked: Asked, window: _Window, chosen: str, by: str, here: Mapping[str, object]) -> list[Panel]:
    controls: list[Control] = []
    if chosen:
        options = [(str(layer), str(layer)) for layer in layers_of(asked)]
        if len(options) > 1:
            options.append(("all", "all, stacked"))
        controls.append(Choice(key="layer", label="Layer", options=options, value=chosen))
    kinds = [key for key in BY if key in ("strongest", "active") and window.layers]
    kinds += ["feature"] * (window.feature_id is not None) + list(window.measured)
    if len(kinds) > 1:
        options = [(kind, _kinds(window)[kind]) for kind in kinds]
        controls.append(Choice(key="by", label="Shade by", options=options, value=by))
    if (one := window.measured.get(by)) is not None:
        options = [(name, name) for name in one.told]
        controls.append(Choice(key="of", label=f"{by.capitalize()} of", options=options, value=one.chosen))
    if window.layers and chosen != "all":
        value = "" if window.feature_id is None else str(window.feature_id)
        controls.append(Box(key="feature", label="Feature", value=value, placeholder="a number"))
    controls.append(Box(key="from", label="From token", value=str(window.first)))
    return [Controls(controls=controls)]


def _at(asked: Asked, window: _Window) -> list[Panel]:
    """The features of the token that was clicked on."""
    at = window.at
    if at is None or not window.layers:
        return []
    token = asked.row(Query.of("explore/text_tokens", doc_id=window.doc_id, first=at, last=at))
    if token is None:
        return []
    return [
        Grid(
            key="at",
            caption=f"The features that are active at token {at:,}, {visible(token['token'])}",
            query=Query.of(
                "explore/token_features_at", doc_id=window.doc_id, position=at, layers=list(window.layers)
            ),
            columns=[
                Column("layer", "plain"),
                FEATURE,
                Column("label"),
                Column("activation", "number", digits=4),
                Column("degree", "integer", "tokens that open it"),
                Column("density", "percent", digits=3),
            ],
            order="-activation",
            filters=["layer", "feature_id", "label", "activation", "degree", "density"],
            bars=["activation"],
            empty="No feature is active at this token.",
        )
    ]


def _beside(
    asked: Asked, window: _Window, n_tokens: int, size: int, here: Mapping[str, object]
) -> list[tuple[str, str]]:
    found = []
    if window.first > 0:
        before = {**here, "from": max(0, window.first - size) or None}
        found.append(("tokens before", address("text", window.doc_id, **before)))
    if window.first + size < n_tokens:
        found.append(
            ("tokens after", address("text", window.doc_id, **{**here, "from": window.first + size}))
        )
    elsewhere = {"layer": here["layer"], "feature": here["feature"], "by": here["by"]}
    for name, doc_id in (("document before", window.doc_id - 1), ("next document", window.doc_id + 1)):
        query = Query(
            sql="SELECT 1 FROM documents_in([$doc_id]) WHERE doc_id = $doc_id", values={"doc_id": doc_id}
        )
        if doc_id >= 0 and asked.value(query) is not None:
            found.append((name, address("text", doc_id, **elsewhere)))
    return found
