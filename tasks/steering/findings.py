"""The paper's claims on reactivation and steering (PAPER 1.3), each held against this run's numbers.

A claim holds where its 95 % intervals lie wholly on the paper's side of zero, differs where one lies wholly on the
other side, and is undecided in between. Where there are several modes, all of them count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tasks.report.text import listed, number, percent, plural, signed, visible_text
from tasks.report.vocabulary import Estimate, Finding, Sign, Verdict, beyond, estimate, every
from tasks.steering.values import ModeEffects, Reactivation, Steered, TraitLayer

TITLES = (
    "Function tokens activate the context’s features again",
    "They do so more than content tokens",
    "Steering at the last function token alone raises the target",
    "It does so more than at a content token",
    "What steering costs in fluency",
    "One layer is the most informative for all traits",
)
PAPER_LAYER = 26

_SAID: dict[Verdict, str] = {
    "holds": "holds here",
    "differs": "does not hold here",
    "undecided": "is undecided here: not every interval lies on one side of zero",
}
FEWEST_UNITS = 6
"""Cases or experiments without which nothing is decided: among five, one sign in all is no rarity (1 in 16) where there
is no effect, and an interval from resamples of so few is too narrow."""

_DIGITS = 4
"""Of shares of features, which are small."""

_NO_PLACE = "No experiment was steered at the last function token at a strength above 0"


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
        return _untested(0, "No case has a feature of its own and a later function token that is looked at")
    verdict, said = _decided(
        [scores["excess"].sign, scores["excess_unrelated"].sign], measured.n_cases, "case"
    )
    above = [
        row for row in measured.by_layer if row.kind == "function" and row.scores["excess"].sign == "above"
    ]
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
        f"same position (above it, interval and all, at {len(above)} of {layers}), and {unrelated}. {_anyway(scores)}"
        "That later function tokens activate the features which tell two contexts apart, more than in the other "
        f"context and in unrelated ones, {said}.",
    )


def more_than_content(measured: Reactivation | None) -> Finding:
    """The excess over the counterfactual prompt, at function against content tokens of the same cases."""
    if measured is None or math.isnan(measured.difference.value):
        return _untested(1, "The cases lack later function tokens or later content tokens")
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
        return _untested(2, _NO_PLACE)
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
        return _untested(
            3, "No experiment was steered both at the last function token and at a content token"
        )
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
        return _untested(4, _NO_PLACE)
    return Finding(
        title=TITLES[4],
        text=" ".join(_cost(mode) for mode in steered.modes)
        + " A strength chosen by its gain flatters that gain; the cost is that of the same strength.",
    )


def one_layer(rows: Sequence[TraitLayer]) -> Finding | None:
    """Whether all traits found from prompts share their most informative layer; None where that is no question."""
    found = [row for row in rows if row.is_most_informative and row.separation is not None]
    if len(found) < 2 or len({row.layer for row in rows}) < 2:
        return None
    layers = sorted({row.layer for row in found})
    verdict: Verdict = "holds" if len(layers) == 1 else "differs"
    told = [
        f"layer {layer} for {listed([visible_text(row.trait) for row in found if row.layer == layer])}"
        for layer in layers
    ]
    return Finding(
        title=TITLES[5],
        verdict=verdict,
        text=f"Of {plural(len({row.layer for row in rows}), 'layer')} that have a dictionary, the one that separates "
        f"left-out prompts best is {listed(told)}. That it is the same for all traits (in the paper layer "
        f"{PAPER_LAYER} of Gemma2-9B) {_SAID[verdict]}.",
    )


def _decided(signs: Sequence[Sign], n: int, unit: str) -> tuple[Verdict, str]:
    """The verdict on a claim that rests on `n` cases or experiments, and how it is said."""
    if n < FEWEST_UNITS:
        return "undecided", f"is undecided here: {plural(n, unit)} are too few ({FEWEST_UNITS} at least)"
    verdict = every(signs)
    return verdict, _SAID[verdict]


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
    gain, cost, kl = (
        best.effects[effect] for effect in ("target_logprob_delta", "log_perplexity_delta", "kl")
    )
    if best.strength == 0:
        return (
            f"In mode {mode.mode}, no strength raises the target on average, so there is no gain to pay for."
        )
    return (
        f"In mode {mode.mode}, the largest mean gain is {estimate(gain)} nats at strength {best.strength:g}, where "
        f"{percent(best.changed, 0)} of the texts change, {_times(cost)}, and KL is {signed(kl.value)} nats."
    )


def _times(logarithm: Estimate) -> str:
    if math.isnan(logarithm.value):
        return "perplexity is unknown, as no text was generated"
    value, low, high = (_factor(end) for end in (logarithm.value, logarithm.low, logarithm.high))
    between = "" if math.isnan(logarithm.low) else f" ({low} to {high})"
    return f"their perplexity under the unsteered model is {value} times{between} what it was"


def _factor(logarithm: float) -> str:
    return number(math.exp(min(logarithm, 700.0)))


def _untested(index: int, why: str) -> Finding:
    return Finding(title=TITLES[index], verdict="untested", text=f"{why}.")
