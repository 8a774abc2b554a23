"""The rows that the report's part on reactivation and steering is made of (PAPER 1.3).

Shares are between 0 and 1; log-probabilities and divergences are nats; positions count all tokens that the model
sees, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.report.vocabulary import Estimate
from tasks.steering import loaded_traits


@dataclass(frozen=True, kw_only=True)
class HeatPanel:
    """One prompt of a heat map.

    Attributes:
        prompt: The prompt.
        tokens: Its tokens from a little before the place on, which is where the prompts differ; None stands for
            tokens that are left out.
        is_function: Whether each is a function token.
        in_place: Whether each is at the place.
        values: (features, tokens) activation over the feature's largest in the case; 0 where it is not active.
    """

    prompt: str
    tokens: tuple[str | None, ...]
    is_function: tuple[bool, ...]
    in_place: tuple[bool, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The own features of two prompts of a case, over the tokens of both.

    Attributes:
        case: The case.
        relation: Its relation.
        layer: Decoder block.
        share: Share of the case's own features that are active again, over its later function tokens.
        prompts: Prompts that the case has.
        panels: Its first two prompts.
        features: Feature ids, the first prompt's own before the second's, each prompt's strongest first.
        owners: For each feature, the panel whose own it is.
        own: Own features that each panel's prompt has, shown or not.
    """

    case: str
    relation: str
    layer: int
    share: float
    prompts: int
    panels: tuple[HeatPanel, ...]
    features: tuple[int, ...]
    owners: tuple[int, ...]
    own: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """How many own features are active again at tokens of a kind, or of one text; see `reactivation_scores`.

    Attributes:
        layer: Decoder block.
        kind: `function` or `content`.
        token: The token's text; None for all of the kind.
        n_cases: Cases with such a position and own features.
        n_positions: Such positions.
        scores: Score to its estimate; one that is not defined is NaN.
    """

    layer: int
    kind: str
    token: str | None
    n_cases: int
    n_positions: int
    scores: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Reactivation:
    """What the paper's claim on reactivation is tested by, all layers together.

    Attributes:
        n_cases: Cases that have own features and later tokens.
        n_relations: Their relations.
        layers: The layers.
        kinds: For each kind of token (`function`, `content`), score to its estimate.
        difference: Excess over the counterfactual prompts at function minus that at content tokens.
        by_layer: The kinds' scores at each layer.
    """

    n_cases: int
    n_relations: int
    layers: tuple[int, ...]
    kinds: dict[str, dict[str, Estimate]]
    difference: Estimate
    by_layer: tuple[ScoreRow, ...]


@dataclass(frozen=True, kw_only=True)
class TraitLayer(loaded_traits.TraitLayer):
    """How well a layer tells a trait's left-out prompts apart; None for a trait whose features are given."""

    trait: str


@dataclass(frozen=True, kw_only=True)
class TraitFeature(loaded_traits.TraitFeature):
    """One of a trait's strongest features at a layer."""

    trait: str
    layer: int
    place: int
    contribution: float
    mean_positive: float | None
    mean_negative: float | None


@dataclass(frozen=True, kw_only=True)
class EffectRow:
    """Means over the experiments of one setting; see the table `steering_effects`.

    Attributes:
        mode: `add` or `clamp`.
        place: Where in the prompt.
        control: `trait` or `random`.
        strength: Strength.
        n: Experiments.
        effects: Effect to its estimate; one that is not defined is NaN.
        changed: Share of the texts that are not the unsteered model's.
        relative_norm: Norm of the change over that of the residual.
    """

    mode: str
    place: str
    control: str
    strength: float
    n: int
    effects: dict[str, Estimate]
    changed: float
    relative_norm: float | None


@dataclass(frozen=True, kw_only=True)
class SteeredText:
    """One experiment's text before and after, in one setting."""

    case: str
    prompt: str
    target: str
    mode: str
    place: str
    control: str
    strength: float
    before: str
    after: str
    target_logprob_delta: float
    kl: float


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
        best: The effects at the strength of the largest gain; strength 0 counts.
    """

    mode: str
    strength: float
    n: int
    gain: Estimate
    advantage: Estimate
    n_paired: int
    difference: Estimate
    best: EffectRow


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
