"""The report's sections on reactivation and steering (PAPER 1.3): scores, heat maps, traits, effects, texts.

A run may have cases alone or experiments alone; what it has not been asked for has no section.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from tasks.explore.vocabulary import Query
from tasks.report import charts
from tasks.report.queries import resamples_of, rows, tables_of, value
from tasks.report.text import integer, layers_told, percent, plural, signed
from tasks.report.vocabulary import Chart, Column, Finding, Row, Section, Table
from tasks.steering import findings as claims
from tasks.steering.findings import measure_reactivation, measure_steering, middle_strength
from tasks.steering.heat_maps import MOST_FEATURES, RULE, heat_map_chart, heat_maps

HAS_OWN_GRAPHS = False

FEATURES_SHOWN = 8
MOST_TOKENS = 40
MOST_TEXTS = 600
LONGEST_TEXT = 300

SCORES = charts.Key(
    field="score",
    looks={
        "the prompt itself": charts.Look(charts.VERMILLION, "circle"),
        "counterfactual prompt, same position": charts.Look(charts.BLUE, "square"),
        "unrelated prompts, same token": charts.Look(charts.GREEN, "triangle-up"),
    },
)
SETTINGS = charts.Key(
    field="setting",
    looks={
        "trait, last function token": charts.Look(charts.VERMILLION, "circle"),
        "trait, all positions": charts.Look(charts.ORANGE, "square", charts.DASHED),
        "trait, content token": charts.Look(charts.BLUE, "triangle-up", charts.DASHDOT),
        "random, last function token": charts.Look(charts.GREEN, "diamond", charts.DOTTED),
        "random, all positions": charts.Look(charts.PURPLE, "triangle-down", charts.DOTTED),
    },
)
EFFECTS = {
    "target_logprob_delta": "change of target log-probability (nats)",
    "kl": "KL divergence (nats)",
    "log_perplexity_delta": "change of log perplexity (nats)",
}

SETTING = "control || ', ' || place AS setting"
IN_ORDER = "mode, place <> 'last function token', place, control DESC, strength"


def facts(connection: Any) -> list[tuple[str, str]]:
    """Cases, traits and experiments in numbers, for the head of the report."""
    return [(name, integer(n)) for name, n in counted(connection).items() if n]


def findings(connection: Any) -> list[Finding]:
    """The findings on reactivation and steering; none where nothing is published."""
    there, found = counted(connection), list[Finding]()
    if there["cases"]:
        found += claims.reactivation_findings(measure_reactivation(connection))
    if there["traits"]:
        found += filter(None, [claims.one_layer(trait_layers(connection))])
    if there["steering experiments"]:
        found += claims.steering_findings(measure_steering(connection))
    return found


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds each section; none where neither cases nor experiments are published."""
    there, built = counted(connection), list[Callable[[Any], Section]]()
    if there["cases"]:
        built += [_reactivation, _heat_maps]
    if there["traits"]:
        built += [_traits]
    if there["steering experiments"]:
        built += [_steering, _texts]
    return [functools.partial(build, connection) for build in built]


def counted(connection: Any) -> dict[str, int]:
    """How many cases, traits and experiments there are; what there is no table of is 0."""
    there = tables_of(connection)
    return {
        name: value(connection, f"SELECT count(DISTINCT {what}) FROM {table}") if table in there else 0
        for name, table, what in (
            ("cases", "prompt_tokens", '"case"'),
            ("traits", "trait_layers", "trait"),
            ("steering experiments", "steering", '("case", prompt, target)'),
        )
    }


def _reactivation(connection: Any) -> Section:
    key, title = "reactivation", "Reactivation: features of the context at later tokens"
    found = score_rows(connection)
    if not found:
        return Section(
            key=key,
            title=title,
            findings=claims.reactivation_findings(None),
            missing="No prompt of any case has a feature of its own where the prompts differ, and a token after it. "
            "Look at the cases’ file (steering.cases) and at the dictionaries.",
        )
    whole = [row for row in found if row["token"] is None]
    told = [
        f"layer {row['layer']}, {row['kind']}: {percent(row['own'], 1)} against {percent(row['counterfactual'], 1)} "
        f"and {percent(row['unrelated'], 1)}"
        for row in whole
    ]
    return Section(
        key=key,
        title=title,
        shows="The prompts of a case differ in one place. The features active there in one prompt and in none of the "
        "others are its own: they tell the contexts apart. Shown is the share of a prompt’s own features that are "
        "active again at later tokens, which are the same in all prompts of the case: in the prompt itself, at the "
        "same position of the counterfactual prompts, and at the same token in prompts of other relations. Bars are "
        f"95 % intervals: percentiles of {integer(resamples_of(connection, 'steering'))} resamples of the cases.",
        charts=[
            Chart(
                spec=scores_chart(whole),
                alt="Two panels on one scale, function and content tokens: the share of own features active again, by "
                f"layer. {'; '.join(told)}.",
            )
        ],
        findings=claims.reactivation_findings(measure_reactivation(connection)),
        tables=[
            Table(
                caption="Own features active again (%), by layer and kind of token",
                columns=[
                    Column("layer", "plain"),
                    Column("kind"),
                    Column("n_cases", "integer", "cases"),
                    Column("n_positions", "integer", "positions"),
                    *SCORE_COLUMNS,
                ],
                rows=whole,
                note="Per cent of own features that are active: in the prompt itself, at the same position of the "
                "case’s other prompts, and at the same token in prompts of other relations; then the differences. In "
                "parentheses 95 % intervals by case.",
            ),
            *(
                token_scores_table(found, kind)
                for kind in claims.KINDS
                if any(row["kind"] == kind for row in whole)
            ),
        ],
    )


def _heat_maps(connection: Any) -> Section:
    key, title, maps = "heat-maps", "Reactivation in single cases", heat_maps(connection)
    if not maps:
        return Section(key=key, title=title, missing="No case has an own feature and a later function token.")
    return Section(
        key=key,
        title=title,
        shows=f"{RULE} Down are own features of both prompts (of each the {MOST_FEATURES} that are most active at the "
        "place, strongest first), across the tokens from a little before the place on; special tokens are left out. "
        "A colour is an activation over the feature’s largest in the case, grey where it is not active. The frame is "
        "the place where the prompts differ; function tokens are bold.",
        charts=[heat_map_chart(found) for found in maps],
    )


def _traits(connection: Any) -> Section:
    layers = trait_layers(connection)
    return Section(
        key="traits",
        title="Traits: layers and features",
        shows="A trait is found from prompts that show it and the same prompts without it: the mean difference at "
        "their last function tokens. The most informative layer is the one at which left-out pairs are furthest "
        "apart along it; its dictionary takes the difference apart into features. Explained variance below 0 says that "
        "the dictionary reconstructs these residuals worse than their mean does: what tells the prompts apart is "
        "smaller than its errors.",
        findings=[*filter(None, [claims.one_layer(layers)])],
        tables=[
            Table(
                caption="Traits and layers",
                columns=TRAIT_COLUMNS,
                rows=layers,
                note=TRAIT_NOTE,
            ),
            Table(
                caption="The traits’ strongest features",
                columns=TRAIT_FEATURE_COLUMNS,
                rows=rows(
                    connection,
                    "SELECT f.* FROM trait_features AS f JOIN trait_layers AS l USING (trait, layer) "
                    f"WHERE l.is_most_informative AND place <= {FEATURES_SHOWN} ORDER BY trait, layer, place",
                ),
                note=f"At the most informative layer. {TRAIT_FEATURE_NOTE}",
            ),
        ],
    )


def _steering(connection: Any) -> Section:
    effects, steered = effect_rows(connection), measure_steering(connection)
    strongest = max(row["strength"] for row in effects)
    told = [
        f"{row['mode']}, {row['setting']} {signed(row['target_logprob_delta'])}"
        for row in effects
        if row["strength"] == strongest
    ]
    return Section(
        key="steering",
        title="Steering",
        shows=f"A trait’s features are set at {layers_told(steered.layers)}, by adding their decoder directions (add) "
        "or by clamping their activations (clamp), at the prompt’s last function token alone, at all positions, or, as "
        "a control, at the last content token of its text; as another control, random features are moved by as much. "
        f"Means over {plural(steered.n_experiments, 'experiment')}; bands are 95 % intervals: percentiles of "
        f"{integer(resamples_of(connection, 'steering'))} resamples of the experiments. Strengths stand at equal "
        "distances.",
        charts=[
            Chart(
                spec=effects_chart(effects),
                alt="A column a mode: change of the target’s log-probability, KL and change of log perplexity against "
                f"strength. Changes of the target at strength {strongest:g}: {'; '.join(told)} nats.",
            )
        ],
        findings=claims.steering_findings(steered),
        tables=[
            Table(
                caption="What steering does",
                columns=EFFECT_COLUMNS,
                rows=effects,
                note="Changes from the unsteered model in nats, means over the experiments; in parentheses 95 % "
                "intervals by experiment. Random: features drawn at random, moved by as much as the trait’s. "
                "Relative norm: of the change at the steered position, to the residual’s norm there.",
            )
        ],
    )


def _texts(connection: Any) -> Section:
    strength = middle_strength([row["strength"] for row in effect_rows(connection)])
    tables = (
        []
        if strength is None
        else [
            texts_table(steered_texts(connection, strength), "Before and after, at the middle strength"),
            texts_table(steered_texts(connection), "Before and after, the trait at all strengths"),
        ]
    )
    return Section(
        key="steered-texts",
        title="Before and after",
        shows="Greedy continuations without and with steering. Line ends are shown as \\n, spaces that could be missed "
        "as ␣. The first table has every experiment and setting at one strength, the middle one of those swept above "
        "0 (the lower of two); of random features the first draw. Changes of the target’s log-probability and KL are "
        "in nats.",
        tables=tables,
        missing="" if tables else "No strength above 0 was swept (steering.strengths).",
    )


# What the tables say.


def score_rows(connection: Any) -> list[dict[str, Any]]:
    """The table `reactivation_scores`: by layer, `function` first, all of a kind before single tokens."""
    return rows(connection, Query.of("steering/explore_scores").sql)


def trait_layers(connection: Any) -> list[dict[str, Any]]:
    """The table `trait_layers`."""
    return rows(connection, "SELECT * FROM trait_layers ORDER BY trait, layer")


def effect_rows(connection: Any) -> list[dict[str, Any]]:
    """The table `steering_effects`, and `setting`: its control and place."""
    return rows(connection, Query.of("steering/explore_effects").sql)


def steered_texts(connection: Any, strength: float | None = None) -> list[dict[str, Any]]:
    """Texts before and after at a strength, of random features the first draw's; None: the trait's at all but 0."""
    return rows(
        connection,
        f"""
        SELECT "case", prompt, target, mode, place, control, {SETTING}, strength, baseline_text AS before,
            if(steered_text = baseline_text, '(as before)', steered_text) AS after,
            target_logprob_delta, kl
        FROM steering
        WHERE CASE WHEN $strength::DOUBLE IS NULL THEN control = 'trait' AND strength <> 0
            ELSE strength = $strength AND draw <= 1 END
        ORDER BY "case", prompt, target, {IN_ORDER}
        """,
        {"strength": strength},
    )


# Tables.

TRAIT_COLUMNS = [
    Column("trait"),
    Column("layer", "plain"),
    Column("n_pairs", "integer", "pairs"),
    Column("separation", "signed"),
    Column("accuracy", "percent", digits=0),
    Column("explained_variance", "signed", digits=3),
    Column("is_most_informative", "mark", "most informative"),
]
TRAIT_NOTE = (
    "Separation: difference of the means of left-out positive and negative prompts along the "
    "direction found without them, in standard deviations. Accuracy: share of left-out pairs in the "
    "right order. Explained variance: of the dictionary, at the last function tokens of these prompts. A "
    "trait whose features are given has none of them."
)
TRAIT_FEATURE_COLUMNS = [
    Column("trait"),
    Column("layer", "plain"),
    Column("place", "integer"),
    Column("feature_id", "plain", "feature"),
    Column("coefficient", "signed", digits=3),
    Column("contribution", "signed", digits=3),
    Column("clamp_value", "signed", digits=3),
    Column("mean_positive", "signed", digits=3),
    Column("mean_negative", "signed", digits=3),
]
TRAIT_FEATURE_NOTE = (
    "Contribution: coefficient times the norm of the decoder’s "
    "direction. Clamp value: mean activation over the positive prompts that activate the feature."
)
EFFECT_COLUMNS = [
    Column("mode"),
    Column("setting", heading="features and place"),
    Column("strength", "plain"),
    Column("n", "integer", "experiments"),
    Column("target_logprob_delta", "signed", "target log-probability", shows="both"),
    Column("advantage", "signed", "over random", shows="both"),
    Column("kl", "signed", "KL", shows="both"),
    Column("log_perplexity_delta", "signed", "log perplexity", shows="both"),
    Column("changed", "percent", "texts changed", digits=0),
    Column("relative_norm", "number"),
]
SCORE_COLUMNS = [
    Column("own", "signed", digits=1, shows="both", factor=100),
    Column("counterfactual", "signed", digits=1, shows="both", factor=100),
    Column("unrelated", "signed", digits=1, shows="both", factor=100),
    Column("excess", "signed", digits=1, shows="both", factor=100),
    Column("excess_unrelated", "signed", "excess over unrelated", digits=1, shows="both", factor=100),
]


def token_scores_table(scores: Sequence[Row], kind: str) -> Table:
    """The scores of single tokens of a kind, the ones in most cases and positions first."""
    mine = [row for row in scores if row["token"] is not None and row["kind"] == kind]
    mine.sort(key=lambda row: (-row["n_cases"], -row["n_positions"], row["token"], row["layer"]))
    return Table(
        caption=f"Own features active again (%) at single {kind} tokens",
        columns=[
            Column("token", "token"),
            Column("layer", "plain"),
            Column("n_cases", "integer", "cases"),
            Column("n_positions", "integer", "positions"),
            *SCORE_COLUMNS,
        ],
        rows=mine[:MOST_TOKENS],
        note=_left(len(mine) - MOST_TOKENS, "reactivation_scores"),
    )


def texts_table(texts: Sequence[Row], caption: str) -> Table:
    """Texts before and after; of very many the first."""
    return Table(
        caption=caption,
        columns=[
            Column("case", heading="experiment"),
            Column("prompt", "passage", digits=LONGEST_TEXT),
            Column("target", "passage", digits=LONGEST_TEXT),
            Column("mode"),
            Column("setting", heading="features and place"),
            Column("strength", "plain"),
            Column("before", "passage", digits=LONGEST_TEXT),
            Column("after", "passage", digits=LONGEST_TEXT),
            Column("target_logprob_delta", "change", "target log-probability"),
            Column("kl", "signed", "KL"),
        ],
        rows=texts[:MOST_TEXTS],
        note=_left(len(texts) - MOST_TEXTS, "steering"),
    )


def _left(n: int, table: str) -> str:
    return f"{plural(n, 'more row')}: in the table {table}." if n > 0 else ""


# Charts.


def scores_chart(whole: Sequence[Row]) -> charts.Spec:
    """Shares of own features that are active again, by layer: a panel a kind of token, 95 % intervals by case."""

    def panel(place: int, x: charts.Axis, y: charts.Axis) -> charts.Layers:
        shares = [
            {"layer": row["layer"], "score": name}
            | {
                end: row[f"{score}{suffix}"]
                for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
            }
            for row in whole
            for score, name in zip(("own", "counterfactual", "unrelated"), SCORES.looks, strict=True)
            if row["kind"] == claims.KINDS[place]
        ]
        return charts.intervals(shares, x, y, SCORES, ("low", "high"))

    return charts.panels(
        [f"at later {kind} tokens" for kind in claims.KINDS],
        panel,
        charts.ordinal("layer", "layer"),
        charts.share("value", "own features active again", top=None),
    )


def effects_chart(effects: Sequence[Row]) -> charts.Spec:
    """What steering does against its strength: a column a mode, a row a measure, bands of 95 % by experiment."""
    modes = sorted({row["mode"] for row in effects})
    key = SETTINGS.only({row["setting"] for row in effects})
    strength = charts.ordinal("strength", "strength")

    def panels(effect: str, name: str, *, is_first: bool, is_last: bool) -> charts.Spec:
        return charts.panels(
            [f"mode: {mode}" if is_first else "" for mode in modes],
            lambda place, x, y: charts.series(
                [row for row in effects if row["mode"] == modes[place]],
                x,
                y,
                key,
                band=(f"{effect}_low", f"{effect}_high"),
                opacity=0.15,
            ),
            strength if is_last else strength.untitled(),
            charts.linear(effect, name, zero=True, emphasised=0),
        )

    last = len(EFFECTS) - 1
    return charts.below(
        *(
            panels(effect, name, is_first=place == 0, is_last=place == last)
            for place, (effect, name) in enumerate(EFFECTS.items())
        )
    )
