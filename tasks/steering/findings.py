"""The paper's claims on reactivation and steering (PAPER 1.3), each held against this run's numbers.

A claim holds where its 95 % intervals lie wholly on the paper's side of zero, differs where one lies wholly on the
other side, and is undecided in between. Where there are several modes, all of them count.

Intervals are percentiles over resamples of whole cases, or of whole experiments (`tasks.report.bootstrap`), the same
for all kinds of tokens, places and controls, so differences are paired: what makes a case or a prompt easy cancels.
What is tested is fixed beforehand, not picked by its outcome: all layers together, and the middle strength.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.report.bootstrap import estimates
from tasks.report.queries import resamples_of, rows, value
from tasks.report.text import listed, number, percent, plural, signed, visible_text
from tasks.report.vocabulary import (
    SAID,
    Estimate,
    Finding,
    Row,
    Sign,
    Verdict,
    beyond,
    estimate,
    every,
    untested,
)
from tasks.steering.intervals import (
    EFFECTS,
    FEWEST,
    SCORES,
    SUMS,
    by_experiment,
    by_unit,
    case_sums,
    experiment_effects,
    means_of,
    scores_of,
)

Floats = npt.NDArray[np.float64]
Setting = tuple[str, str, str, float]

TITLES = (
    "Function tokens activate the context’s features again",
    "They do so more than content tokens",
    "Steering at the last function token alone raises the target",
    "It does so more than at a content token",
    "What steering costs in fluency",
    "One layer is the most informative for all traits",
)
PAPER_LAYER = 26

FEWEST_UNITS = 6
"""Cases or experiments without which nothing is decided: among five, one sign in all is no rarity (1 in 16) where there
is no effect, and an interval from resamples of so few is too narrow."""

_DIGITS = 4
"""Of shares of features, which are small."""

_NO_PLACE = "No experiment was steered at the last function token at a strength above 0"

KINDS = ("function", "content")
LAST, CONTENT = "last function token", "content token"

_EXCESS, _GAIN, _ADVANTAGE = (
    SCORES.index("excess"),
    EFFECTS.index("target_logprob_delta"),
    EFFECTS.index("advantage"),
)


@dataclass(frozen=True, kw_only=True)
class Reactivation:
    """What the paper's claim on reactivation is tested by, all layers together.

    Attributes:
        n_cases: Cases that have own features and later tokens.
        n_relations: Their relations.
        layers: The layers.
        kinds: For each kind of token (`function`, `content`), score to its estimate.
        difference: Excess over the counterfactual prompts at function minus that at content tokens.
        layers_above: Layers at which the excess at function tokens is above zero, interval and all.
    """

    n_cases: int
    n_relations: int
    layers: tuple[int, ...]
    kinds: dict[str, dict[str, Estimate]]
    difference: Estimate
    layers_above: int


@dataclass(frozen=True, kw_only=True)
class ModeEffects:
    """What the paper's claims on steering are tested by, in one mode.

    Attributes:
        mode: `add` or `clamp`.
        strength: The strength that decides: the middle one of those swept.
        n: Experiments.
        gain: Change of the target's log-probability, steered at the last function token.
        advantage: The same minus that of random features, moved by as much.
        n_paired: Experiments that were steered at a content token too.
        difference: Change at the last function token minus that at the content token.
        best: The row of `steering_effects` at the strength of the largest gain; strength 0 counts.
    """

    mode: str
    strength: float
    n: int
    gain: Estimate
    advantage: Estimate
    n_paired: int
    difference: Estimate
    best: Row


@dataclass(frozen=True, kw_only=True)
class Steered:
    """What was steered.

    Attributes:
        n_experiments: Experiments.
        layers: Layers that were steered at.
        modes: One a mode; none where no experiment was steered at the last function token at a strength above 0.
    """

    n_experiments: int
    layers: Sequence[int]
    modes: Sequence[ModeEffects]


def measure_reactivation(connection: Any, resamples: int | None = None) -> Reactivation | None:
    """All layers together; None where no case has own features. Resamples are as the run's own, or as given."""
    resamples = resamples or resamples_of(connection, "steering")
    sums = case_sums(connection)
    sums = sums.filter([token is None for token in sums["token"].to_pylist()])
    if not len(sums):
        return None
    groups, counts = by_unit(sums, ("layer", "kind"), ("case",), SUMS)
    pooled = np.zeros((len(counts), len(KINDS), len(SUMS)))
    for place, (_, kind) in enumerate(groups):
        pooled[:, KINDS.index(kind)] += counts[:, place]
    has_kind = (pooled[:, :, SUMS.index("n_own")] > 0).sum(axis=0)

    def measured(flat: Floats) -> Floats:
        found = scores_of(flat.reshape(len(flat), len(KINDS), len(SUMS)))
        difference = found[:, 0, _EXCESS] - found[:, 1, _EXCESS]
        return np.column_stack([found.reshape(len(flat), -1), difference])

    *scores, difference = estimates(pooled.reshape(len(pooled), -1), measured, resamples)
    if has_kind.min() < FEWEST:
        difference = _without_interval(difference)
    kinds = {}
    for place, kind in enumerate(KINDS):
        mine = scores[place * len(SCORES) : (place + 1) * len(SCORES)]
        if has_kind[place] < FEWEST:
            mine = [_without_interval(value) for value in mine]
        kinds[kind] = dict(zip(SCORES, mine, strict=True))
    return Reactivation(
        n_cases=len(pooled),
        n_relations=value(
            connection, "SELECT count(DISTINCT relation) FROM reactivation_positions WHERE n_own > 0"
        ),
        layers=tuple(sorted({layer for layer, _ in groups})),
        kinds=kinds,
        difference=difference,
        layers_above=value(
            connection,
            """
            SELECT count(*) FROM reactivation_scores
            WHERE token IS NULL AND kind = 'function' AND excess_low > 0
            """,
        ),
    )


def measure_steering(connection: Any, resamples: int | None = None) -> Steered:
    """Each mode at its middle strength. Resamples are as the run's own intervals, or as given."""
    resamples = resamples or resamples_of(connection, "steering")
    groups, values = by_experiment(experiment_effects(connection))
    of = {group: values[:, place] for place, group in enumerate(groups)}
    last = rows(
        connection,
        f"SELECT * FROM steering_effects WHERE place = '{LAST}' AND control = 'trait' ORDER BY mode, strength",
    )
    layers = rows(connection, "SELECT DISTINCT layer FROM steering ORDER BY layer")
    return Steered(
        n_experiments=len(values),
        layers=[row["layer"] for row in layers],
        modes=[
            _mode(strength, of, [row for row in last if row["mode"] == mode], resamples)
            for mode in sorted({group[0] for group in groups})
            if (strength := middle_strength([g[3] for g in groups if g[:3] == (mode, LAST, "trait")]))
            is not None
        ],
    )


def middle_strength(strengths: Sequence[float]) -> float | None:
    """The median of the strengths above 0, the lower of two; None where there is none."""
    swept = sorted({strength for strength in strengths if strength > 0})
    return swept[(len(swept) - 1) // 2] if swept else None


def _mode(strength: float, of: dict[Setting, Floats], swept: Sequence[Row], resamples: int) -> ModeEffects:
    mode = swept[0]["mode"]
    last = of[mode, LAST, "trait", strength]
    content = of.get((mode, CONTENT, "trait", strength), np.full_like(last, np.nan))
    gain, advantage = last[:, _GAIN], last[:, _ADVANTAGE]
    difference = gain - content[:, _GAIN]
    return ModeEffects(
        mode=mode,
        strength=strength,
        n=int(np.isfinite(gain).sum()),
        gain=_mean(gain, resamples),
        advantage=_mean(advantage, resamples),
        n_paired=int(np.isfinite(difference).sum()),
        difference=_mean(difference, resamples),
        best=max(swept, key=lambda row: (row["target_logprob_delta"], -row["strength"])),
    )


def _mean(values: Floats, resamples: int) -> Estimate:
    """Mean of the values that are there."""
    known = np.isfinite(values)
    counts = np.column_stack([np.where(known, values, 0.0), known])
    (found,) = estimates(counts, means_of, resamples)
    return found if known.sum() >= FEWEST else _without_interval(found)


def _without_interval(found: Estimate) -> Estimate:
    return Estimate(value=found.value, low=math.nan, high=math.nan)


def reactivation_findings(measured: Reactivation | None) -> list[Finding]:
    """Both claims on reactivation."""
    return [is_active_again(measured), more_than_content(measured)]


def steering_findings(steered: Steered) -> list[Finding]:
    """Both claims on steering, and what it costs."""
    return [raises_the_target(steered), more_than_content_token(steered), fluency(steered)]


def is_active_again(measured: Reactivation | None) -> Finding:
    """Own features at later function tokens: more than in the counterfactual and in unrelated prompts."""
    scores = measured.kinds["function"] if measured is not None else {}
    if measured is None or math.isnan(scores["own"].value):
        return untested(
            TITLES[0], "No case has a feature of its own and a later function token that is looked at"
        )
    verdict, said = _decided(
        [scores["excess"].sign, scores["excess_unrelated"].sign], measured.n_cases, "case"
    )
    unrelated = (
        "no prompt of another relation has these tokens"
        if math.isnan(scores["excess_unrelated"].value)
        else f"{_beyond(scores['excess_unrelated'])} that at the same token in prompts of other relations"
    )
    layers = plural(len(measured.layers), "layer")
    return Finding(
        title=TITLES[0],
        verdict=verdict,
        text=f"Over {plural(measured.n_cases, 'case')} of {plural(measured.n_relations, 'relation')} and {layers} "
        f"together, a share of {_share(scores['own'])} of a prompt’s own features is active again at a later function "
        f"token. That is {_beyond(scores['excess'])} the same features’ share in the counterfactual prompt, at the "
        f"same position (above it, interval and all, at {measured.layers_above} of {layers}), and {unrelated}. "
        f"{_anyway(scores)}That later function tokens activate the features which tell two contexts apart, more than "
        f"in the other context and in unrelated ones, {said}.",
    )


def more_than_content(measured: Reactivation | None) -> Finding:
    """The excess over the counterfactual prompt, at function against content tokens of the same cases."""
    if measured is None or math.isnan(measured.difference.value):
        return untested(TITLES[1], "The cases lack later function tokens or later content tokens")
    verdict, said = _decided([measured.difference.sign], measured.n_cases, "case")
    excess = {kind: measured.kinds[kind]["excess"] for kind in ("function", "content")}
    return Finding(
        title=TITLES[1],
        verdict=verdict,
        text=f"The excess over the counterfactual prompt is {_share(excess['function'])} at later function tokens "
        f"and {_share(excess['content'])} at later content tokens: function tokens are "
        f"{_beyond(measured.difference)} content tokens. That it is function tokens above all {said}.",
    )


def raises_the_target(steered: Steered) -> Finding:
    """Above zero and above random features moved by as much, at the middle strength."""
    if not steered.modes:
        return untested(TITLES[2], _NO_PLACE)
    signs = [sign for mode in steered.modes for sign in (mode.gain.sign, mode.advantage.sign)]
    verdict, said = _decided(signs, min(mode.n for mode in steered.modes), "experiment")
    told = [
        f"In mode {mode.mode} at strength {mode.strength:g}, the target’s log-probability changes by "
        f"{estimate(mode.gain)} nats over {plural(mode.n, 'experiment')}, {_over_random(mode)}."
        for mode in steered.modes
    ]
    return Finding(
        title=TITLES[2],
        verdict=verdict,
        text=f"{' '.join(told)} The strength is the middle one of those swept (the lower of two), not the best. That "
        "setting a trait’s features at a prompt’s last function token alone makes the answer likelier, and more so "
        f"than random features, {said}.",
    )


def more_than_content_token(steered: Steered) -> Finding:
    """The same features at the last function token against a content token, in the same experiments."""
    tested = [mode for mode in steered.modes if mode.n_paired]
    if not tested:
        why = "no experiment was steered both at the last function token and at a content token"
        return untested(TITLES[3], why)
    signs = [mode.difference.sign for mode in tested]
    verdict, said = _decided(signs, min(mode.n_paired for mode in tested), "experiment")
    told = [
        f"In mode {mode.mode} at strength {mode.strength:g}, the target’s change at the last function token is "
        f"{beyond(mode.difference)} that at the last content token before it "
        f"({plural(mode.n_paired, 'experiment')})."
        for mode in tested
    ]
    return Finding(
        title=TITLES[3],
        verdict=verdict,
        text=f"{' '.join(told)} That the function token is the better place {said}.",
    )


def fluency(steered: Steered) -> Finding:
    """Perplexity at the strength with the largest gain; the paper does not measure it."""
    if not steered.modes:
        return untested(TITLES[4], _NO_PLACE)
    return Finding(
        title=TITLES[4],
        text=" ".join(_cost(mode) for mode in steered.modes)
        + " A strength chosen by its gain flatters that gain; the cost is that of the same strength.",
    )


def one_layer(rows: Sequence[Row]) -> Finding | None:
    """Whether all traits found from prompts share their most informative layer; None where that is no question."""
    found = [row for row in rows if row["is_most_informative"] and row["separation"] is not None]
    n_layers = len({row["layer"] for row in rows})
    if len(found) < 2 or n_layers < 2:
        return None
    layers = sorted({row["layer"] for row in found})
    verdict: Verdict = "holds" if len(layers) == 1 else "differs"
    told = [
        f"layer {layer} for {listed([visible_text(row['trait']) for row in found if row['layer'] == layer])}"
        for layer in layers
    ]
    return Finding(
        title=TITLES[5],
        verdict=verdict,
        text=f"Of {plural(n_layers, 'layer')} that have a dictionary, the one that separates left-out prompts best is "
        f"{listed(told)}. That it is the same for all traits (in the paper layer {PAPER_LAYER} of Gemma2-9B) "
        f"{SAID[verdict]}.",
    )


def _decided(signs: Sequence[Sign], n: int, unit: str) -> tuple[Verdict, str]:
    """The verdict on a claim that rests on `n` cases or experiments, and how it is said."""
    if n < FEWEST_UNITS:
        return "undecided", f"is undecided here: {plural(n, unit)} are too few ({FEWEST_UNITS} at least)"
    verdict = every(signs)
    return verdict, SAID[verdict]


def _share(value: Estimate) -> str:
    return estimate(value, _DIGITS)


def _beyond(value: Estimate) -> str:
    return beyond(value, digits=_DIGITS)


def _anyway(scores: Mapping[str, Estimate]) -> str:
    """How large the finding is: what part of the activations does not need the context."""
    own, anyway = scores["own"].value, scores["counterfactual"].value
    if not own > 0 or math.isnan(anyway):
        return ""
    if anyway >= own:
        return "At least as many would be expected without the context. "
    return f"Of 100 such activations, {100 * anyway / own:.0f} would be expected without the context. "


def _over_random(mode: ModeEffects) -> str:
    if math.isnan(mode.advantage.value):
        return "with no random features to compare with"
    return f"{beyond(mode.advantage)} that under random features moved by as much"


def _cost(mode: ModeEffects) -> str:
    best = mode.best
    gain, cost = (Estimate.of(best, effect) for effect in ("target_logprob_delta", "log_perplexity_delta"))
    if best["strength"] == 0:
        return (
            f"In mode {mode.mode}, no strength raises the target on average, so there is no gain to pay for."
        )
    return (
        f"In mode {mode.mode}, the largest mean gain is {estimate(gain)} nats at strength {best['strength']:g}, where "
        f"{percent(best['changed'], 0)} of the texts change, {_times(cost)}, and KL is {signed(best['kl'])} nats."
    )


def _times(logarithm: Estimate) -> str:
    if math.isnan(logarithm.value):
        return "perplexity is unknown, as no text was generated"
    value, low, high = (_factor(end) for end in (logarithm.value, logarithm.low, logarithm.high))
    between = "" if math.isnan(logarithm.low) else f" ({low} to {high})"
    return f"their perplexity under the unsteered model is {value} times{between} what it was"


def _factor(logarithm: float) -> str:
    return number(math.exp(min(logarithm, 700.0)))
