"""The report's sections on reactivation and steering (PAPER 1.3): scores, heat maps, traits, effects, texts.

A run may have cases alone or experiments alone; what it has not been asked for has no section.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tasks.report.old_page import Section, picture
from tasks.report.queries import resamples_of
from tasks.report.text import integer, listed, percent, plural, signed, visible_text
from tasks.report.vocabulary import Finding
from tasks.steering import figures as steering_figures
from tasks.steering import findings as steering_findings
from tasks.steering.report_tables import (
    MOST_TEXTS,
    effects_table,
    scores_table,
    texts_table,
    token_scores_table,
    trait_features_table,
    trait_layers_table,
)
from tasks.steering.rows import (
    MOST_FEATURES,
    RULE,
    counted,
    effect_rows,
    heat_maps,
    score_rows,
    steered_texts,
    trait_features,
    trait_layers,
)
from tasks.steering.statistics import measure_reactivation, measure_steering, middle_strength
from tasks.steering.values import EffectRow, HeatMap, ScoreRow

FEATURES_SHOWN = 8
HAS_OWN_GRAPHS = False


def findings(connection: Any) -> list[Finding]:
    """The findings on reactivation and steering; none where nothing is published.

    Args:
        connection: Of `infra.duck.connect`.
    """
    there, found = counted(connection), list[Finding]()
    if there["cases"]:
        found += steering_findings.reactivation_findings(measure_reactivation(connection))
    if there["traits"]:
        found += _of_layers(connection)
    if there["experiments"]:
        found += steering_findings.steering_findings(measure_steering(connection))
    return found


def facts(connection: Any) -> list[tuple[str, str]]:
    """Cases, traits and experiments in numbers, for the head of the report."""
    names = {"cases": "cases", "traits": "traits", "experiments": "steering experiments"}
    return [(names[name], integer(n)) for name, n in counted(connection).items() if n]


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds each section that there are tables for; none where neither cases nor experiments are published."""
    there, built = counted(connection), list[Callable[[Any], Section]]()
    if there["cases"]:
        built += [_reactivation, _heat_maps]
    if there["traits"]:
        built += [_traits]
    if there["experiments"]:
        built += [_steering, _texts]
    return [functools.partial(build, connection) for build in built]


def _reactivation(connection: Any) -> Section:
    rows = score_rows(connection)
    title = "Reactivation: features of the context at later tokens"
    if not rows:
        return Section(
            key="reactivation",
            title=title,
            findings=steering_findings.reactivation_findings(None),
            missing="No prompt of any case has a feature of its own where the prompts differ, and a token after it. "
            "Look at the cases’ file (steering.cases) and at the dictionaries.",
        )
    whole = [row for row in rows if row.token is None]
    return Section(
        key="reactivation",
        title=title,
        shows="The prompts of a case differ in one place. The features active there in one prompt and in none of the "
        "others are its own: they tell the contexts apart. Shown is the share of a prompt’s own features that are "
        "active again at later tokens, which are the same in all prompts of the case: in the prompt itself, at the "
        "same position of the counterfactual prompts, and at the same token in prompts of other relations. Bars are "
        f"95 % intervals: percentiles of {integer(resamples_of(connection, 'steering'))} resamples of the cases.",
        picture=picture(
            steering_figures.scores(rows),
            "Two panels on one scale, function and content tokens: the share of own features active again, by layer. "
            f"{'; '.join(_score_told(row) for row in whole)}.",
        ),
        findings=steering_findings.reactivation_findings(measure_reactivation(connection)),
        tables=[
            scores_table(rows),
            *(
                token_scores_table(rows, kind)
                for kind in ("function", "content")
                if any(row.kind == kind for row in whole)
            ),
        ],
    )


def _score_told(row: ScoreRow) -> str:
    shares = [percent(row.scores[score].value, 1) for score in ("own", "counterfactual", "unrelated")]
    return f"layer {row.layer}, {row.kind}: {shares[0]} against {shares[1]} and {shares[2]}"


def _heat_maps(connection: Any) -> Section:
    maps = heat_maps(connection)
    key, title = "heat-maps", "Reactivation in single cases"
    if not maps:
        return Section(key=key, title=title, missing="No case has an own feature and a later function token.")
    return Section(
        key=key,
        title=title,
        shows=f"{RULE} Down are own features of both prompts (of each the {MOST_FEATURES} that are most active at the "
        "place, strongest first), across the tokens from a little before the place on; special tokens are left out. "
        "A colour is an activation over the feature’s largest in the case, grey where it is not active. The frame is "
        "the place where the prompts differ; function tokens are bold.",
        pictures=[
            picture(
                steering_figures.heat_map(found),
                steering_figures.heat_map_alt(found),
                _heat_map_caption(found),
            )
            for found in maps
        ],
    )


def _heat_map_caption(found: HeatMap) -> str:
    shown = [found.owners.count(panel) for panel in range(len(found.panels))]
    features = listed([f"{n} of {own}" for n, own in zip(shown, found.own, strict=True)])
    more = "" if found.prompts == len(found.panels) else f" Two of its {found.prompts} prompts are shown."
    return (
        f"{visible_text(found.case)} ({visible_text(found.relation)}), layer {found.layer}: "
        f"{percent(found.share, 1)} of own features are active again at the case’s later function tokens. Shown are "
        f"{features} own features of the prompts.{more}"
    )


def _traits(connection: Any) -> Section:
    rows = trait_layers(connection)
    return Section(
        key="traits",
        title="Traits: layers and features",
        shows="A trait is found from prompts that show it and the same prompts without it: the mean difference at "
        "their last function tokens. The most informative layer is the one at which left-out pairs are furthest "
        "apart along it; its dictionary takes the difference apart into features. Explained variance below 0 says that "
        "the dictionary reconstructs these residuals worse than their mean does: what tells the prompts apart is "
        "smaller than its errors.",
        findings=_of_layers(connection),
        tables=[trait_layers_table(rows), trait_features_table(trait_features(connection, FEATURES_SHOWN))],
    )


def _of_layers(connection: Any) -> list[Finding]:
    found = steering_findings.one_layer(trait_layers(connection))
    return [] if found is None else [found]


def _steering(connection: Any) -> Section:
    rows, steered = effect_rows(connection), measure_steering(connection)
    layers = (
        f"layer{'s' if len(steered.layers) > 1 else ''} {listed([str(layer) for layer in steered.layers])}"
    )
    return Section(
        key="steering",
        title="Steering",
        shows=f"A trait’s features are set at {layers}, by adding their decoder directions (add) or by clamping their "
        "activations (clamp), at the prompt’s last function token alone, at all positions, or, as a control, at the "
        "last content token of its text; as another control, random features are moved by as much. Means over "
        f"{plural(steered.n_experiments, 'experiment')}; bands are 95 % intervals: percentiles of "
        f"{integer(resamples_of(connection, 'steering'))} resamples of the experiments. Strengths stand at equal "
        "distances.",
        picture=picture(
            steering_figures.effects(rows),
            "A column a mode: change of the target’s log-probability, KL and change of log perplexity against "
            f"strength. {_effects_told(rows)}",
        ),
        findings=steering_findings.steering_findings(steered),
        tables=[effects_table(rows)],
    )


def _effects_told(rows: list[EffectRow]) -> str:
    last = max(row.strength for row in rows)
    told = [
        f"{row.mode}, {row.control}, {row.place} {signed(row.effects['target_logprob_delta'].value)}"
        for row in rows
        if row.strength == last
    ]
    return f"Changes of the target at strength {last:g}: {'; '.join(told)} nats."


def _texts(connection: Any) -> Section:
    rows = effect_rows(connection)
    strength = middle_strength([row.strength for row in rows])
    tables = []
    for at, caption in (
        (strength, "Before and after, at the middle strength"),
        (None, "Before and after, the trait at all strengths"),
    ):
        if strength is not None:
            found = steered_texts(connection, at)
            tables.append(texts_table(found[:MOST_TEXTS], caption, len(found)))
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
