"""One feature: what opens it, where it is active, what is active beside it, and what people say of it."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.errors import FunctokError
from tasks.dictionaries.published import cosines, neuronpedia_address
from tasks.explore.examples import contexts, examples_of, places_of
from tasks.explore.features import NO_FEATURE_TABLES, NO_GRAPH, density_bounds, opened_by, require_feature
from tasks.explore.labels import LABEL, dictionary_of, labels_of
from tasks.explore.vocabulary import (
    Asked,
    Box,
    Choice,
    Columns,
    Controls,
    Facts,
    Figure,
    Grid,
    Link,
    Missing,
    Note,
    Page,
    PageAt,
    Panel,
    Query,
    address,
)
from tasks.models.token_texts import visible
from tasks.report import charts
from tasks.report.text import DASH, integer, number, percent, plural, visible_text
from tasks.report.vocabulary import Chart, Column, Row

NEIGHBOURS = 20
SUREST_SHARE = 0.01
"""Of a feature's activations, for a token to be called the one that opens it most surely."""

SAMPLED = 40
"""Places at which features are looked for that are active with one."""


def feature(asked: Asked) -> Page:
    """A feature of a layer.

    Raises:
        NotThere: if the layer does not have it.
    """
    layer, feature_id = asked.part("layer"), asked.part("feature_id")
    title, trail = f"Feature {feature_id} of layer {layer}", [("Features", address("features", layer=layer))]
    if not asked.has("feature_degree", "graph_summary"):
        return Page(title=title, panels=[NO_GRAPH], trail=trail)
    require_feature(asked, layer, feature_id)
    if not asked.has("feature_tokens"):
        return Page(title=title, panels=[NO_FEATURE_TABLES], trail=trail)
    query = Query.of("explore/feature", layer=layer, feature_id=feature_id)
    row = asked.row(query)
    note = _note(asked, layer, feature_id)
    panels: list[Panel]
    if row is None:
        panels = [
            Missing(
                what="No token activates this feature here.",
                way="More text may: raise activations.max_documents or activations.max_tokens, and run again.",
            ),
            note,
            *_logits(asked, layer, feature_id),
            *_neighbours(asked, layer, feature_id),
        ]
    else:
        examples = examples_of(asked, layer, feature_id)
        panels = [
            Columns(panels=[_facts(asked, row, query), *_histogram(asked, layer, feature_id)]),
            *contexts(asked, layer, feature_id, examples, is_top=True),
            note,
            _tokens(layer, feature_id, row),
            *contexts(asked, layer, feature_id, examples, is_top=False),
            *_logits(asked, layer, feature_id),
            *_coactive(asked, layer, feature_id, examples),
            *_neighbours(asked, layer, feature_id),
        ]
    label = row["label"] if row is not None else None
    return Page(
        title=f"{title}: {visible_text(label)}" if label else title,
        panels=panels,
        lead="What activates it, and what is known of it. One that a single token opens (0 bits) is about that token; "
        "one that many tokens open is about what stands around them, if about anything: see where it is "
        "strongest, and whether the sample of all its activations below says the same.",
        trail=trail,
        beside=_beside(asked, layer, feature_id),
    )


PAGES = (PageAt(path="/feature/{layer}/{feature_id}", title="Feature", build=feature),)


def _facts(asked: Asked, row: Row, query: Query) -> Facts:
    layer, feature_id, bounds = row["layer"], row["feature_id"], density_bounds(asked)
    facts = [
        (
            "opened most by",
            f"{visible(row['top_token'])} ({percent(row['top_share'], 1)} of its activations)",
            "" if row["top_token_id"] is None else address("token", row["top_token_id"], layer=layer),
        ),
        *_surest(asked, layer, feature_id),
        ("token entropy", opened_by(row["token_entropy"], row["top_share"]), ""),
        ("tokens that open it", integer(row["degree"]), ""),
        ("activations", f"{integer(row['n'])}, at {percent(row['density'], 3)} of all tokens", ""),
        ("largest", number(row["max_activation"], 4), ""),
        ("mean where active", number(row["mean_activation"], 4), ""),
    ]
    if bounds is not None:
        called, low, high = bounds
        is_between = "yes" if low <= row["density"] <= high else "no"
        facts.append((called, f"{is_between} (density {percent(low, 4)} to {percent(high, 1)})", ""))
    source = asked.value(
        Query(sql="SELECT source FROM dictionaries WHERE layer = $layer", values={"layer": layer})
    ) if asked.has("dictionaries") else None  # fmt: skip
    if source:
        facts.append(("dictionary", source, ""))
        elsewhere = neuronpedia_address(source, feature_id)
        if elsewhere is not None:
            facts.append(("Neuronpedia", elsewhere.removeprefix("https://www."), elsewhere))
    return Facts(facts=facts, query=query)


def _surest(asked: Asked, layer: int, feature_id: int) -> list[tuple[str, str, str]]:
    """Frequent tokens open much by being frequent: of those that matter to it, the one that least often does not."""
    row = asked.row(
        Query.of("explore/feature_surest", layer=layer, feature_id=feature_id, least=SUREST_SHARE)
    )
    if row is None:
        return []
    told = f"{visible(row['token'])} (at {percent(row['share'], 1)} of its occurrences)"
    return [("opened most surely by", told, address("token", row["token_id"], layer=layer))]


def _note(asked: Asked, layer: int, feature_id: int) -> Panel:
    dictionary = dictionary_of(asked, layer)
    if dictionary is None:
        return Missing(what="Labels are kept by dictionary, and this run does not say which one this is.")
    said = labels_of(asked.context["storage"], dictionary, feature_id)
    now = said[0] if said else None
    earlier = "; ".join(
        f"“{visible_text(old.label) or DASH}” ({old.written[:16].replace('T', ' ')} UTC)" for old in said[1:4]
    )
    return Note(
        to=LABEL.path.format(layer=layer, feature_id=feature_id),
        title="What do you call it?",
        controls=[
            Box(key="label", label="Label", value=now.label if now else ""),
            Box(key="note", label="Note", value=now.note if now else "", is_long=True),
        ],
        said="Kept beside the run, with its dictionary: the table feature_labels."
        + (f" Before: {earlier}." if earlier else ""),
    )


def _histogram(asked: Asked, layer: int, feature_id: int) -> list[Panel]:
    if not asked.has("feature_histogram"):
        return []
    query = Query.of("explore/feature_histogram", layer=layer, feature_id=feature_id)
    bins = asked.rows(query)
    if not bins:
        return []
    largest = max(bins, key=lambda one: one["n"])
    return [
        Figure(
            title="How strong its activations are",
            chart=Chart(
                spec=charts.bins(
                    bins,
                    charts.linear("low", "activation", zero=True),
                    "high",
                    charts.linear("n", "how often", zero=True),
                    charts.BLUE,
                ).properties(width=380, height=200),
                alt=f"{plural(sum(one['n'] for one in bins), 'activation')} up to {number(bins[-1]['high'])}; most, "
                f"{integer(largest['n'])}, between {number(largest['low'])} and {number(largest['high'])}.",
            ),
            query=query,
        )
    ]


def _tokens(layer: int, feature_id: int, row: Row) -> Grid:
    return Grid(
        key="tokens",
        caption=f"All {plural(row['degree'], 'token')} that open it",
        query=Query.of("explore/feature_opened_by", layer=layer, feature_id=feature_id),
        columns=[
            Link(
                column=Column("token", "token"), to=lambda one: address("token", one["token_id"], layer=layer)
            ),
            Column("kind"),
            Column("rank", "integer"),
            Column("n", "integer", "activations"),
            Column("of_feature", "percent", "of the feature’s", digits=1),
            Column("share", "percent", "of the token’s occurrences", digits=1),
            Column("lift", "number"),
            Column("max_activation", "number", "max"),
            Column("mean_activation", "number", "mean"),
        ],
        order="-n",
        filters=[
            "token",
            "kind",
            "rank",
            "n",
            "of_feature",
            "share",
            "lift",
            "max_activation",
            "mean_activation",
        ],
        bars=["n", "share"],
        page_size=25,
        note="Lift: how many times more often the token is among its activations than among all tokens.",
    )


def _logits(asked: Asked, layer: int, feature_id: int) -> list[Panel]:
    if not asked.has("feature_logits"):
        return [
            Missing(
                what="What it promotes and suppresses is not known: the model’s head was not read.",
                way="[features]\nlogits = true",
            )
        ]
    return [
        Columns(
            panels=[
                Grid(
                    key=sign,
                    caption=caption,
                    query=Query.of("explore/feature_logits", layer=layer, feature_id=feature_id, sign=sign),
                    columns=[
                        Link(
                            column=Column("token", "token"),
                            to=lambda one: address("token", one["token_id"], layer=layer),
                        ),
                        Column("logit", "change", digits=3),
                    ],
                    order="place",
                    bars=["logit"],
                    page_size=10,
                    note="Its decoder direction through the model’s head alone, without the layers in between.",
                )
                for sign, caption in (
                    ("promoted", "Tokens that its direction promotes"),
                    ("suppressed", "Tokens that it suppresses"),
                )
            ]
        )
    ]


def _coactive(asked: Asked, layer: int, feature_id: int, examples: Sequence[Row]) -> list[Panel]:
    if not asked.has("activations"):
        return []
    documents, positions = places_of(_spread(examples, SAMPLED))
    if not documents:
        return []
    return [
        Grid(
            key="coactive",
            caption="Features that are active with it",
            query=Query.of(
                "explore/coactive_features",
                layer=layer,
                feature_id=feature_id,
                documents=documents,
                positions=positions,
            ),
            columns=[
                _to_feature(layer),
                Column("label"),
                Column("n", "integer", "places"),
                Column("share", "percent", "of the places", digits=0),
                Column("lift", "number"),
                Column("max_activation", "number", "max"),
                Column("degree", "integer", "tokens that open it"),
                Column("density", "percent", digits=3),
            ],
            order="-n",
            filters=["feature_id", "label", "n", "share", "lift", "density"],
            bars=["share"],
            page_size=20,
            note=f"A sample: at {plural(len(positions), 'place')} of its examples, spread over its deciles. Lift: how "
            "many times more often than anywhere.",
            empty="Nothing else is active at its examples.",
        )
    ]


def _neighbours(asked: Asked, layer: int, feature_id: int) -> list[Panel]:
    storage, dictionary = asked.context.get("storage"), dictionary_of(asked, layer)
    if storage is None or dictionary is None:
        return []
    if not storage.is_local and asked.chosen("neighbours", ["no", "yes"]) == "no":
        return [
            Controls(
                title="Decoder neighbours",
                controls=[
                    Choice(
                        key="neighbours",
                        label="Fetch the dictionary of this layer",
                        options=[("no", "not now"), ("yes", "fetch it whole")],
                        value="no",
                    )
                ],
            )
        ]
    try:
        found = cosines(storage, dictionary, feature_id)
    except (FunctokError, OSError) as error:
        return [
            Missing(
                what="Decoder neighbours need the dictionary, whose files are not at hand here.",
                way=f"`functok run CONFIG` fetches or trains it again. ({error})",
            )
        ]
    order = [int(one) for one in (-found).argsort(kind="stable")[: NEIGHBOURS + 1] if one != feature_id]
    nearest = order[:NEIGHBOURS]
    return [
        Grid(
            key="neighbours",
            caption="Features whose decoder directions are nearest",
            query=Query.of(
                "explore/decoder_neighbours",
                layer=layer,
                feature_ids=nearest,
                cosines=[round(float(found[one]), 6) for one in nearest],
            ),
            columns=[
                _to_feature(layer),
                Column("label"),
                Column("cosine", "decimal", digits=3),
                Column("degree", "integer", "tokens that open it"),
                Column("density", "percent", digits=3),
            ],
            order="-cosine",
            bars=["cosine"],
            page_size=NEIGHBOURS,
            note="Cosine of the directions that they write into the residual stream.",
        )
    ]


def _to_feature(layer: int) -> Link:
    return Link(
        column=Column("feature_id", "plain", "feature"),
        to=lambda row: address("feature", layer, row["feature_id"]),
    )


def _spread(examples: Sequence[Row], most: int) -> list[Row]:
    """Of a feature's examples, so many of its deciles, evenly; its largest where there are no deciles."""
    drawn = [row for row in examples if row["kind"] != "top"] or list(examples)
    step = max(1.0, len(drawn) / most)
    return [drawn[int(place * step)] for place in range(min(most, len(drawn)))]


def _beside(asked: Asked, layer: int, feature_id: int) -> list[tuple[str, str]]:
    row = asked.row(Query.of("explore/beside_feature", layer=layer, feature_id=feature_id))
    found = [] if row is None else [("before", row["before"]), ("next", row["after"])]
    return [
        (f"{where}: feature {one}", address("feature", layer, one)) for where, one in found if one is not None
    ]
