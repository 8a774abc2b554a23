"""Texts that show what a feature is about: its strongest activations, and a sample of each decile of them."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.explore.vocabulary import Asked, Context, Contexts, Missing, Panel, Query, Shade, address
from tasks.models.token_texts import OPEN_BOX, visible
from tasks.report.text import number
from tasks.report.vocabulary import Row

TOP, OF_DECILE = 12, 3
"""Examples that are shown."""

BEFORE, AFTER = 24, 10
"""Tokens around an example."""

NO_OCCURRENCES = Missing(
    what="This run kept no positions of tokens, so there is no text to show.",
    way="[corpus]\nkeep_occurrences = true",
)


def examples_of(asked: Asked, layer: int, feature_id: int) -> list[Row]:
    """A feature's examples, the strongest first, then decile by decile from the strongest to the weakest."""
    if not asked.has("feature_examples"):
        return []
    rows = asked.rows(Query.of("explore/feature_examples", layer=layer, feature_id=feature_id))
    return sorted(rows, key=lambda row: (-_decile(row["kind"]), row["place"]))


def contexts(
    asked: Asked, layer: int, feature_id: int, examples: Sequence[Row], *, is_top: bool
) -> list[Panel]:
    """The texts of the strongest activations, or of each decile.

    The strongest ones' whole texts are shaded by what the feature gives there; of the others, the example alone.
    """
    if not asked.has("occurrences"):
        return [NO_OCCURRENCES] if is_top else []
    wanted = [
        row
        for row in examples
        if (row["kind"] == "top") is is_top and row["place"] <= (TOP if is_top else OF_DECILE)
    ]
    if not wanted:
        return []
    documents, positions = places_of(wanted)
    query = Query.of(
        "explore/feature_contexts",
        layer=layer,
        feature_id=feature_id,
        documents=documents,
        positions=positions,
        shaded=sorted(set(documents)) if is_top and asked.has("activations") else [],
        before=BEFORE,
        after=AFTER,
    )
    around: dict[tuple[int, int], list[Row]] = {}
    for row in asked.rows(query):
        around.setdefault((row["doc_id"], row["at"]), []).append(row)
    largest = max(row["activation"] for row in examples)
    shown = [_context(row, around, largest, layer, feature_id) for row in wanted]
    if is_top:
        note = (
            "Shade: how strong it is at each token; its value is under the cursor. Underlined: the example."
        )
        return [Contexts(title="Where it is strongest", contexts=shown, query=query, note=note)]
    note = (
        "A few of each tenth of its activations, drawn by lot: what it is about beyond its strongest. Underlined: the "
        "example; the others are not shaded."
    )
    return [Contexts(title="A sample of all its activations", contexts=shown, query=query, note=note)]


def places_of(examples: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Documents and positions of examples."""
    return [row["doc_id"] for row in examples], [row["position"] for row in examples]


def in_text(token: str | None) -> str:
    """A token as it stands among others: nothing hidden in it but a single blank before a word."""
    shown = visible(token, 200)
    return shown.replace(OPEN_BOX, " ") if token and token.strip(" ") and "  " not in token else shown


def _context(
    example: Row, around: dict[tuple[int, int], list[Row]], largest: float, layer: int, feature_id: int
) -> Context:
    doc_id, at = example["doc_id"], example["position"]
    tokens = []
    for row in around.get((doc_id, at), []):
        is_example = row["position"] == at
        value = example["activation"] if is_example else row["activation"]
        tokens.append(
            Shade(
                text=in_text(row["token"]),
                strength=min(1.0, value / largest) if value and largest else 0.0,
                value=f"{visible(row['token'])}: {number(value, 4)}" if value else visible(row["token"]),
                to=address("token", row["token_id"], layer=layer),
                mark=is_example,
            )
        )
    value, kind = number(example["activation"], 4), example["kind"]
    return Context(
        tokens=tokens,
        about=f"{value}, document {doc_id}" if kind == "top" else f"{kind}: {value}",
        to=address("text", doc_id, **{"from": max(0, at - BEFORE)}, layer=layer, feature=feature_id, at=at),
    )


def _decile(kind: str) -> int:
    """Of an example's kind; 11 of the strongest."""
    number_ = kind.rpartition(" ")[2]
    return int(number_) if number_.isdigit() else 11
