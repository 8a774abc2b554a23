"""Finding what somebody types: a token by its text or id, a feature by its number or by what people call it."""

from __future__ import annotations

import re

from tasks.explore.vocabulary import (
    FEATURE,
    Asked,
    Box,
    Controls,
    Facts,
    Grid,
    Link,
    Page,
    PageAt,
    Panel,
    Query,
    address,
)
from tasks.models.token_texts import DOTTED_CIRCLE, NAMED
from tasks.report.vocabulary import Column

_FEATURE = (
    re.compile(
        r"/?(?:feature[\s/]*)?(?:(?:layer|l)?\s*(?P<layer>\d{1,9})\s*[\s/:,]\s*)?(?:feature\s*)?(?P<feature>\d{1,9})",
        re.ASCII | re.IGNORECASE,
    ),
    re.compile(
        r"feature\s*(?P<feature>\d{1,9})\s*(?:of|at|in|,)?\s*layer\s*(?P<layer>\d{1,9})",
        re.ASCII | re.IGNORECASE,
    ),
)
"""How a feature is written: `1201`, `15/1201`, `layer 15, feature 1201`, `feature 1201 of layer 15`."""

TO_SEARCH = "look for it by its text: /search"
"""Where to go from an id that is no token of the corpus."""

PLACEHOLDER = r"␣the  \n  <0xE2>  1201"
_SHOWN = {shown: character for character, shown in NAMED.items()}
_ESCAPE = re.compile("|".join([*map(re.escape, _SHOWN), r"\\u\{([0-9a-f]{1,6})\}"]))


def search_page(asked: Asked) -> Page:
    """Tokens by text, what a number may be, and features by their labels."""
    typed = asked.values.get("q", "")
    panels: list[Panel] = [
        Controls(controls=[Box(key="q", label="Text or id", value=typed, placeholder=PLACEHOLDER)])
    ]
    if typed:
        panels += [*_numbered(asked, typed), found(typed), *_labelled(asked, typed.strip())]
    return Page(
        title="Search",
        lead=r"A token's text, whole or in part. Spaces may be typed as they are shown, ␣, line ends as \n, bytes that "
        "are no text as <0xE2>. Features by number, or by the words of their labels.",
        panels=panels,
        trail=[("Tokens", "/tokens")],
    )


PAGES = (PageAt(path="/search", title="Search", build=search_page),)


def meant(typed: str) -> str:
    r"""The text that a visible one stands for: `␣the` is ` the`, `\n` a line end, `\u{200b}` what cannot be seen."""

    def of(match: re.Match[str]) -> str:
        if match[1] is None:
            return _SHOWN[match[0]]
        point = int(match[1], 16)
        return chr(point) if point <= 0x10FFFF and not 0xD800 <= point <= 0xDFFF else match[0]

    return _ESCAPE.sub(of, typed.removeprefix(DOTTED_CIRCLE) or typed)


def search(typed: str) -> Query:
    """The tokens that fit, best first; a number is an id too."""
    text = meant(typed)
    number = typed.strip()
    token_id = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None
    return Query.of("explore/token_search", typed=typed, meant=text, word=text.strip(" "), token_id=token_id)


def found(typed: str) -> Panel:
    """What was found."""
    return Grid(
        key="tokens",
        caption="Tokens",
        query=search(typed),
        columns=[
            Link(column=Column("token", "token"), to=lambda row: address("token", row["token_id"])),
            Column("match"),
            Column("token_id", "plain", "id"),
            Column("rank", "integer"),
            Column("count", "integer"),
            Column("doc_share", "percent", "documents"),
            Column("kind"),
        ],
        order="place",
        filters=["match", "kind"],
        empty="No token of this corpus has that in its text. A word may be several tokens: try its beginning. A "
        "feature is found by its number, with its layer or without: 1201, or 15/1201.",
    )


def _labelled(asked: Asked, typed: str) -> list[Panel]:
    """The features that somebody has called so."""
    if not typed or not asked.has("feature_labels", "feature_degree"):
        return []
    query = Query.of("explore/label_search", typed=typed)
    if asked.row(Query(sql=f"SELECT 1 FROM ({query.sql}) LIMIT 1", values=query.values)) is None:
        return []
    return [
        Grid(
            key="labels",
            caption="Features with a label or note of that text",
            query=query,
            columns=[
                Column("layer", "plain"),
                FEATURE,
                Column("label"),
                Column("note"),
                Column("degree", "integer", "tokens that open it"),
            ],
            order="",
            page_size=10,
        )
    ]


def _numbered(asked: Asked, typed: str) -> list[Panel]:
    """A number may be a feature's, alone or with its layer."""
    match = next(filter(None, (form.fullmatch(typed.strip()) for form in _FEATURE)), None)
    if match is None or not asked.has("feature_degree"):
        return []
    digits, layer = match["feature"], match["layer"]
    query = Query.of(
        "explore/feature_search", feature_id=int(digits), layer=None if layer is None else int(layer)
    )
    facts = [
        (
            f"feature {digits} at layer {row['layer']}",
            f"{row['degree']:,} tokens open it",
            address("feature", row["layer"], digits),
        )
        for row in asked.rows(query)
    ]
    return [Facts(title="Features of this number", facts=facts, query=query)] if facts else []
