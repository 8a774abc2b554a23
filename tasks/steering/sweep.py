"""One experiment's sweep: its conditions, batch by batch, each beside the unsteered model (PAPER 1.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from schemas.errors import about
from tasks.models.language_model import LanguageModel
from tasks.steering.conditions import Condition, Moved, intervention_of, random_features
from tasks.steering.interventions import Directions, Intervention, change_norms, directions_of
from tasks.steering.measures import Answers, Question, answers, divergences, perplexities, residual_at


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is swept.

    Attributes:
        question: The prompt, its target, and the layer that is steered.
        moved: The features that are moved, with their values at strength 1.
        conditions: How.
        seed: Of the random features.
        prompt: The prompt's text, on which the random features depend.
        batch_size: Conditions of a forward at most.
    """

    question: Question
    moved: Moved
    conditions: Sequence[Condition]
    seed: int
    prompt: str
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one condition does; all but the texts are columns of the table `steering`.

    Attributes:
        feature_ids: The features that are moved.
        baseline: Token ids that the unsteered model generates.
        steered: Token ids that are generated instead.
        kl: Divergence of the next token's distribution from the unsteered one, in nats.
        target_logprob: Log-probability of the target without steering, in nats.
        target_logprob_delta: What steering adds to it.
        baseline_perplexity: Of the text without steering, under the unsteered model; None where it is empty.
        perplexity: Of the steered text, under the unsteered model; None where it is empty.
        relative_norm: Norm of the change over that of the residual, where it acts; the mean over the prompt's
            positions where it acts at every position.
    """

    feature_ids: tuple[int, ...]
    baseline: tuple[int, ...]
    steered: tuple[int, ...]
    kl: float
    target_logprob: float
    target_logprob_delta: float
    baseline_perplexity: float | None
    perplexity: float | None
    relative_norm: float


def sweep(model: LanguageModel, sae: Any, experiment: Experiment) -> Iterator[list[Effect]]:
    """Run an experiment's conditions in batches of one size.

    Everything that can be refused without a forward of a batch is refused before the first one.

    Args:
        model: The model.
        sae: The SAELens SAE of the layer that is steered.
        experiment: What is swept.

    Yields:
        The effects of each batch's conditions, in the order of `experiment.conditions`.

    Raises:
        ConfigError: if the dictionary is too small for random controls.
        DictionaryError: naming the condition, if features cannot be set as asked.
        ModelError: naming layer and condition, if logits are not finite.
    """
    question, conditions = experiment.question, experiment.conditions
    if not conditions:
        return
    directions, rows = _interventions(sae, experiment, model.device)
    norms = _relative_norms(residual_at(model, question), rows)
    n_batches = -(-len(rows) // experiment.batch_size)
    size = -(-len(rows) // n_batches)
    baseline = answers(model, question, [()] * size)
    known = perplexities(model, question, baseline.new, experiment.batch_size)
    for first in range(0, len(rows), size):
        some = conditions[first : first + size]
        # All batches have the shape of the unsteered one, so that their rows can be compared with its rows.
        idle = size - len(some)
        found = answers(
            model,
            question,
            [*rows[first : first + size], *[()] * idle],
            [*map(str, some), *["unsteered"] * idle],
        )
        new = [text for text in found.new if text not in known]
        known |= perplexities(model, question, new, experiment.batch_size)
        features = [directions[condition.draw].feature_ids for condition in some]
        yield _effects(features, found, baseline, known, norms[first : first + size])


def check_experiment(sae: Any, experiment: Experiment) -> None:
    """Refuse what `sweep` would refuse before it asks the model anything, without a model.

    Args:
        sae: The SAELens SAE of the layer that is steered, on the CPU.
        experiment: What would be swept.

    Raises:
        ConfigError: if the dictionary is too small for random controls.
        DictionaryError: naming the condition, if features cannot be set as asked.
    """
    _interventions(sae, experiment, torch.device("cpu"))


def _interventions(
    sae: Any, experiment: Experiment, device: torch.device
) -> tuple[dict[int, Directions], list[list[Intervention]]]:
    """The directions by draw, and what each condition does."""
    directions = _directions(sae, experiment, device)
    return directions, [_row(condition, experiment.moved, directions) for condition in experiment.conditions]


def _directions(sae: Any, experiment: Experiment, device: torch.device) -> dict[int, Directions]:
    """By draw: those of the trait's features (0), and of each draw of random ones."""
    layer, own = experiment.question.layer, experiment.moved.feature_ids
    drawn = {
        draw: random_features(experiment.seed, experiment.prompt, draw, own, int(sae.cfg.d_sae))
        if draw
        else own
        for draw in sorted({condition.draw for condition in experiment.conditions})
    }
    return {draw: directions_of(sae, layer, features, device) for draw, features in drawn.items()}


def _row(condition: Condition, moved: Moved, directions: Mapping[int, Directions]) -> list[Intervention]:
    with about(str(condition)):
        row = intervention_of(condition, moved.values[condition.mode], directions)
    return row


def _relative_norms(residual: torch.Tensor, rows: Sequence[Sequence[Intervention]]) -> list[float]:
    """Each row's change over the unsteered residual, as norms; 0 where nothing is done."""
    found = []
    for row in rows:
        relative = 0.0
        for intervention in row:
            at = intervention.position
            here = residual if at is None else residual[at : at + 1]
            change, whole = change_norms(intervention, here)
            relative += float((change.double() / whole.double()).mean())
        found.append(relative)
    return found


def _effects(
    features: Sequence[tuple[int, ...]],
    found: Answers,
    baseline: Answers,
    known: Mapping[tuple[int, ...], float],
    norms: Sequence[float],
) -> list[Effect]:
    """Row by row against the same row of the unsteered pass; rows beyond the features' are idle."""
    kl = divergences(found.log_probs[: len(features)], baseline.log_probs[: len(features)])
    return [
        Effect(
            feature_ids=features[row],
            baseline=baseline.new[row],
            steered=found.new[row],
            kl=kl[row],
            target_logprob=baseline.target[row],
            target_logprob_delta=found.target[row] - baseline.target[row],
            baseline_perplexity=known.get(baseline.new[row]),
            perplexity=known.get(found.new[row]),
            relative_norm=norms[row],
        )
        for row in range(len(features))
    ]
