"""The explorer's pages on reactivation and steering (PAPER 1.3): cases, traits, effects, and texts before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from tasks.explore.not_run import not_run
from tasks.explore.vocabulary import (
    FEATURE,
    Asked,
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
    NotThere,
    Page,
    PageAt,
    Panel,
    Query,
    Shade,
    address,
)
from tasks.models.token_texts import visible
from tasks.report.text import passage, plain, plural, signed, visible_text
from tasks.report.vocabulary import Chart, Column, Row
from tasks.steering import report
from tasks.steering.findings import middle_strength
from tasks.steering.heat_maps import MOST_FEATURES, heat_map_chart, heat_map_of

MOST_TEXTS = 8
"""Experiments whose texts are shown as differences; the grid below has all."""

LONGEST_NAME = 80
TOP = [("Experiments", "/experiments")]
TRAIL = [*TOP, ("Steering", "/steering")]
NEIGHBOURS = [
    ("Cases", "/steering/cases"),
    ("Traits", "/steering/traits"),
    ("Before and after", "/steering/texts"),
]
SHARES = [
    Column("function", "percent", "at function tokens", digits=1),
    Column("content", "percent", "at content tokens", digits=1),
    Column("counterfactual", "percent", "in the other prompts", digits=1),
    Column("unrelated", "percent", "in other relations", digits=1),
]


def overview(asked: Asked) -> Page:
    """What cases and experiments show together."""
    there, panels = report.counted(asked.connection), list[Panel]()
    if not any(there.values()):
        panels = [not_run("steering")]
    else:
        panels = [
            Facts(facts=[(name, f"{n:,}", "") for name, n in there.items()]),
            Findings(findings=report.findings(asked.connection)),
        ]
    scores = Query.of("steering/explore_scores")
    if there["cases"] and (found := asked.rows(scores)):
        whole = [row for row in found if row["token"] is None]
        panels += [
            Figure(
                title="Own features active again at later tokens",
                chart=Chart(
                    spec=report.scores_chart(whole),
                    alt="Share of own features that are active again by layer, at later function and content tokens: "
                    "in the prompt itself, in the counterfactual one, and in unrelated ones. The table below has the "
                    "numbers.",
                ),
                query=scores,
            ),
            Grid(
                key="scores",
                caption="Own features active again (%), by layer, kind of token and token",
                query=scores,
                columns=[
                    Column("layer", "plain"),
                    Column("kind"),
                    Column("token", "token"),
                    Column("n_cases", "integer", "cases"),
                    Column("n_positions", "integer", "positions"),
                    *report.SCORE_COLUMNS,
                ],
                filters=["layer", "kind", "token"],
                note="A dash for the token: all of the kind. In parentheses 95 % intervals by case.",
            ),
        ]
    effects = Query.of("steering/explore_effects")
    if there["steering experiments"] and (found := asked.rows(effects)):
        panels += [
            Figure(
                title="What steering does, by strength",
                chart=Chart(
                    spec=report.effects_chart(found),
                    alt="A column a mode: change of the target’s log-probability, KL and change of log perplexity "
                    "against strength, with 95 % bands by experiment. The table below has the numbers.",
                ),
                query=effects,
            ),
            Grid(
                key="effects",
                caption="What steering does, means over the experiments",
                query=effects,
                columns=[
                    Link(column=column, to=_texts_of) if column.key == "setting" else column
                    for column in report.EFFECT_COLUMNS
                ],
                filters=["mode", "setting", "strength"],
                order="-target_logprob_delta",
                note="In nats; in parentheses 95 % intervals by experiment. A setting leads to its texts.",
            ),
        ]
    return Page(
        title="Steering",
        trail=TOP,
        lead="Whether function tokens carry the context’s features, and whether setting one decides the answer.",
        panels=panels,
        beside=NEIGHBOURS,
    )


def cases(asked: Asked) -> Page:
    """All cases."""
    if not asked.has("prompt_tokens", "reactivations", "reactivation_positions"):
        return Page(title="Cases", trail=TRAIL, panels=[not_run("steering")])
    layer = _layer(asked)
    return Page(
        title="Cases",
        lead="The prompts of a case differ in one place; what is active there in one prompt and in none of the others "
        "is its own. Shares are of own features that are active again at later tokens.",
        trail=TRAIL,
        panels=[
            Controls(controls=[layer]),
            Grid(
                key="cases",
                caption="Cases",
                query=Query.of("steering/explore_cases", layer=_number(layer)),
                columns=[
                    Link(
                        column=Column("case", digits=LONGEST_NAME),
                        to=lambda row: address("steering", "case", case=row["case"], layer=layer.value),
                    ),
                    Column("relation", digits=LONGEST_NAME),
                    Column("prompts", "integer"),
                    Column("own_features", "integer"),
                    *SHARES,
                ],
                order="-function",
                filters=["case", "relation", "own_features", "function"],
                bars=["function", "content"],
                note="In the other prompts: at the same position of the case’s others. In other relations: at the "
                "same token in prompts of other relations.",
            ),
        ],
    )


def case(asked: Asked) -> Page:
    """A case: where its prompts' own features are active again, and which they are."""
    if not asked.has("prompt_tokens", "reactivations", "reactivation_positions"):
        return Page(title="Case", trail=TRAIL, panels=[not_run("steering")])
    names = [row["case"] for row in asked.rows(Query(sql=_CASES))]
    name = asked.values.get("case", names[0])
    if name not in names:
        raise NotThere(
            f"there is no case {visible_text(name, LONGEST_NAME)!r}",
            hint="/steering/cases has those there are",
        )
    layer = _layer(asked)
    features = Query.of("steering/explore_case_features", case=name, layer=_number(layer))
    tokens = Query.of("steering/explore_case_tokens", case=name, layer=_number(layer))
    numbers = {
        prompt: place
        for place, prompt in enumerate(sorted({r["prompt"] for r in asked.rows(tokens)}), start=1)
    }
    place = names.index(name)
    return Page(
        title=f"Case {visible_text(name, LONGEST_NAME)}",
        lead="A token’s shade is the share of its prompt’s own features that are active again there; the marked tokens "
        "are where the prompts differ.",
        trail=[*TRAIL, ("Cases", "/steering/cases")],
        beside=[
            (
                f"{word}: {visible_text(other, LONGEST_NAME)}",
                address("steering", "case", case=other, layer=layer.value),
            )
            for word, others in (("before", names[:place][-1:]), ("next", names[place + 1 :][:1]))
            for other in others
        ],
        panels=[
            Controls(controls=[layer], keep={"case": name}),
            *_heat_map(asked, name, layer, features),
            Contexts(
                title="Own features active again, token by token",
                contexts=[
                    Context(
                        tokens=[_shade(row) for row in of],
                        about=f"prompt {numbers[prompt]}, layer {layer}",
                    )
                    for (prompt, layer), of in groupby(
                        asked.rows(tokens), key=lambda row: (row["prompt"], row["layer"])
                    )
                ],
                query=tokens,
                note="Under the cursor: how many own features are active there, and how many of the other prompts’.",
                wraps=True,
            ),
            Grid(
                key="features",
                caption="Features of the case’s prompts",
                query=features,
                columns=[
                    Column("prompt_number", "plain", "prompt"),
                    Column("layer", "plain"),
                    FEATURE,
                    Column("is_own", "mark", "own"),
                    Column("in_place", "number", "at the place"),
                    Column("largest", "number"),
                    Column("later_function", "integer", "later function tokens"),
                    Column("later_content", "integer", "later content tokens"),
                ],
                filters=["prompt_number", "layer", "feature_id", "is_own", "later_function"],
                order="-later_function",
                bars=["later_function", "later_content"],
                note="At the place: its largest activation where the prompts differ. Later: at how many of the tokens "
                "that are looked at it is active.",
            ),
        ],
    )


def traits(asked: Asked) -> Page:
    """Traits, their layers and features."""
    panels: list[Panel] = [not_run("steering")]
    if asked.has("trait_layers", "trait_features"):
        panels = [
            Grid(
                key="layers",
                caption="Traits and layers",
                query=Query(sql="SELECT * FROM trait_layers"),
                columns=report.TRAIT_COLUMNS,
                order="trait",
                filters=["trait", "layer", "is_most_informative"],
                note=report.TRAIT_NOTE,
            ),
            Grid(
                key="features",
                caption="Their features, the strongest first",
                query=Query(sql="SELECT * FROM trait_features"),
                columns=[
                    Link(column=column, to=lambda row: address("feature", row["layer"], row["feature_id"]))
                    if column.key == "feature_id"
                    else column
                    for column in report.TRAIT_FEATURE_COLUMNS
                ],
                order="place",
                filters=["trait", "layer", "feature_id"],
                note=report.TRAIT_FEATURE_NOTE,
            ),
        ]
    return Page(
        title="Traits",
        lead="A trait is found from prompts that show it and the same prompts without it.",
        trail=TRAIL,
        panels=panels,
    )


def texts(asked: Asked) -> Page:
    """Texts before and after, beside those of random features, the largest effect first."""
    page = {"title": "Before and after", "trail": TRAIL}
    if not asked.has("steering", "steering_effects"):
        return Page(**page, panels=[not_run("steering")])  # type: ignore[arg-type]
    found = asked.rows(Query(sql=_SETTINGS))
    strengths = {f"{row['strength']:g}": row["strength"] for row in found if row["strength"]}
    if not strengths:
        missing = Missing(
            what="No strength but 0 was swept.", way="[steering]\nstrengths = [1.0, 2.0, 4.0, 8.0]"
        )
        return Page(**page, panels=[missing])  # type: ignore[arg-type]
    middle = middle_strength(list(strengths.values()))
    mode, place, layer, strength = (
        asked.choice(key, key.capitalize(), [(option, option) for option in options], default)
        for key, options, default in (
            ("mode", _distinct(found, "mode"), None),
            ("place", _distinct(found, "place")[::-1], None),  # the last function token first
            ("layer", ["", *_distinct(found, "layer")], None),
            ("strength", list(strengths), None if middle is None else f"{middle:g}"),
        )
    )
    layer = Choice(key="layer", label="Layer", value=layer.value, options=[("", "all"), *layer.options[1:]])
    names = [(name, visible_text(name, LONGEST_NAME)) for name in _distinct(found, "case")]
    of = asked.choice("case", "Case", [("", "all"), *names])
    one = {key: asked.values[key] for key in ("prompt", "target") if key in asked.values}
    setting = {"mode": mode.value, "place": place.value, "strength": strengths[strength.value]}
    here = {**setting, "strength": strength.value}
    query = Query.of(
        "steering/explore_texts",
        **setting,
        case=of.value or None,
        layer=_number(layer),
        prompt=one.get("prompt"),
        target=one.get("target"),
    )
    return Page(
        title="Before and after",
        lead="Greedy continuations without and with steering, beside those with random features that were moved by as "
        "much. Line ends are shown as \\n, spaces that could be missed as ␣; changes are in nats.",
        trail=TRAIL,
        beside=[("All experiments", address("steering", "texts", **here))] if one else [],
        panels=[
            Controls(controls=[of, layer, mode, place, strength], keep=one),
            Columns(panels=_means(asked, setting)),
            *_changes(asked, query, setting),
            *(_sweep(asked, of.value, one) if of.value and len(one) == 2 else []),
            Grid(
                key="texts",
                caption="All of this setting",
                query=query,
                columns=[
                    Link(
                        column=Column("case", digits=LONGEST_NAME, heading="experiment"),
                        to=lambda row: address(
                            "steering",
                            "texts",
                            **here,
                            **{k: row[k] for k in ("case", "prompt", "target")},
                        ),
                    ),
                    Column("prompt", "passage", digits=report.LONGEST_TEXT),
                    Column("target", "passage", digits=report.LONGEST_TEXT),
                    Column("layer", "plain"),
                    Column("target_logprob_delta", "change", "target log-probability"),
                    Column("random_delta", "change", "by random features"),
                    Column("advantage", "change", "over random"),
                    Column("kl", "signed", "KL"),
                    Column("log_perplexity_delta", "change", "log perplexity"),
                    Column("changed", "mark", "text changed"),
                ],
                order="-target_logprob_delta",
                filters=["case", "prompt", "target", "target_logprob_delta", "advantage", "changed"],
                empty="No experiment was steered so: choose another setting.",
            ),
        ],
    )


_CASES = 'SELECT DISTINCT "case" FROM prompt_tokens ORDER BY "case"'
_SETTINGS = """
SELECT DISTINCT "case", layer, mode, place, strength FROM steering WHERE control = 'trait'
ORDER BY "case", layer, mode, place, strength
""".strip()


def _layer(asked: Asked) -> Choice:
    """The layer that is chosen, at first the one at which prompts have most own features; `all`: empty."""
    found = asked.rows(Query.of("steering/explore_layers"))
    layers = [
        (plain(row["layer"]), plain(row["layer"])) for row in sorted(found, key=lambda row: row["layer"])
    ]
    return asked.choice("layer", "Layer", [("", "all"), *layers], found[0]["layer"] if found else "")


def _number(layer: Choice) -> int | None:
    return int(layer.value) if layer.value else None


def _distinct(found: Sequence[Row], key: str) -> list[str]:
    return [plain(value) for value in sorted({row[key] for row in found})]


def _texts_of(row: Row) -> str | None:
    if row["control"] != "trait" or not row["strength"]:
        return None
    return address("steering", "texts", mode=row["mode"], place=row["place"], strength=plain(row["strength"]))


def _heat_map(asked: Asked, name: str, layer: Choice, query: Query) -> list[Panel]:
    """Own features over tokens, at one layer."""
    if not layer.value:
        return []
    found = heat_map_of(asked.connection, name, int(layer.value))
    if not found.features:
        return [Missing(what=f"No prompt of this case has a feature of its own at layer {layer.value}.")]
    note = (
        f"Of each prompt the {MOST_FEATURES} own features that are most active at the place, strongest first."
    )
    chart = heat_map_chart(found)
    return [
        Figure(
            title="Own features over the prompts",
            chart=Chart(spec=chart.spec, alt=chart.alt, caption=f"{chart.caption} {note}"),
            query=query,
        )
    ]


def _shade(row: Row) -> Shade:
    value = "function token" if row["is_function"] else "content token"
    if row["n_own"]:
        value += f": {row['own']} of {row['n_own']} own features active again"
        value += f", {row['counterfactual']} of {row['n_counterfactual']} of the other prompts’"
    return Shade(
        text=visible(row["token"]),
        strength=row["own"] / row["n_own"] if row["n_own"] else 0.0,
        value=value,
        to=address("token", row["token_id"]),
        mark=row["in_place"],
    )


def _means(asked: Asked, setting: Mapping[str, Any]) -> list[Facts]:
    """What this setting does on average over all experiments, to the trait's features and to random ones."""
    query = Query.of("steering/explore_setting", **setting)
    return [
        Facts(
            title=f"The {row['control']} features: means over all {plural(row['n'], 'experiment')}, and 95 % intervals",
            facts=[
                (column.name, column.cell(row), "")
                for column in report.EFFECT_COLUMNS
                if column.key in {"changed", *report.EFFECTS, "advantage"} and row[column.key] is not None
            ],
            query=query,
        )
        for row in asked.rows(query)
    ]


def _changes(asked: Asked, query: Query, setting: Mapping[str, Any]) -> list[Panel]:
    """Differences of the texts with the largest effect, each beside random features'; of one experiment all draws."""
    found = asked.rows(query)
    draws: dict[Any, list[Row]] = {}
    for row in asked.rows(Query.of("steering/explore_draws", **setting)):
        draws.setdefault(_experiment(row), []).append(row)
    return [
        Columns(
            panels=[
                Change(
                    title=f"{visible_text(row['case'], LONGEST_NAME)}: {signed(row['target_logprob_delta'])} nats",
                    before=passage(row["baseline_text"]),
                    after=passage(row["steered_text"]),
                    note=f"{passage(row['prompt'], report.LONGEST_TEXT)} → "
                    f"{passage(row['target'], report.LONGEST_TEXT)} (layer {row['layer']}, features "
                    f"{', '.join(map(str, row['feature_ids']))})",
                ),
                *(
                    Change(
                        title=f"random features, draw {draw['draw']}: {signed(draw['target_logprob_delta'])} nats",
                        before=passage(draw["baseline_text"]),
                        after=passage(draw["steered_text"]),
                    )
                    for draw in draws.get(_experiment(row), [])[: None if len(found) == 1 else 1]
                ),
            ]
        )
        for row in found[:MOST_TEXTS]
    ]


def _experiment(row: Row) -> tuple[str, str, str]:
    return row["case"], row["prompt"], row["target"]


def _sweep(asked: Asked, name: str, one: Mapping[str, str]) -> list[Panel]:
    query = Query.of("steering/explore_sweep", case=name, **one)
    found = asked.rows(query)
    return (
        [
            Figure(
                title="This experiment at all strengths",
                chart=Chart(
                    spec=report.effects_chart(found),
                    alt="A column a mode: change of the target’s log-probability, KL and change of log perplexity "
                    "against strength, a line a setting.",
                    caption="Bands: from the least to the most of the random draws.",
                ),
                query=query,
            )
        ]
        if found
        else []
    )


PAGES = (
    PageAt(path="/steering", title="Steering", build=overview),
    PageAt(path="/steering/cases", title="Cases", build=cases),
    PageAt(path="/steering/case", title="Case", build=case),
    PageAt(path="/steering/traits", title="Traits", build=traits),
    PageAt(path="/steering/texts", title="Before and after", build=texts),
)
