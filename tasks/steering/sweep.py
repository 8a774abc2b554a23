"""One experiment's sweep: its conditions, batch by batch, each beside the unsteered model (PAPER 1.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from schemas.errors import about
from tasks.models.language_model import LanguageModel
from tasks.steering.conditions import Condition, Moved, intervention_of, random_features
from tasks.steering.directions import Directions, directions_of
from tasks.steering.interventions import Intervention, change_norms
from tasks.steering.measures import Question, answers, divergences, perplexities, residual_at


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
    """Run an experiment's conditions in batches of one size, with the SAELens SAE of the layer that is steered.

    Everything that can be refused without a forward of a batch is refused before the first one.

    Yields:
        The effects of each batch's conditions, in the order of `experiment.conditions`.
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
        # Row by row against the same row of the unsteered pass; those beyond the conditions are idle.
        kl = divergences(found.log_probs[: len(some)], baseline.log_probs[: len(some)])
        yield [
            Effect(
                feature_ids=directions[condition.draw].feature_ids,
                baseline=baseline.new[row],
                steered=found.new[row],
                kl=kl[row],
                target_logprob=baseline.target[row],
                target_logprob_delta=found.target[row] - baseline.target[row],
                baseline_perplexity=known.get(baseline.new[row]),
                perplexity=known.get(found.new[row]),
                relative_norm=norms[first + row],
            )
            for row, condition in enumerate(some)
        ]


def check_experiment(sae: Any, experiment: Experiment) -> None:
    """Refuse what `sweep` would refuse before it asks the model anything, with the SAE on the CPU and no model.

    Raises:
        ConfigError: if the dictionary is too small for random controls.
        DictionaryError: naming the condition, if features cannot be set as asked.
    """
    _interventions(sae, experiment, torch.device("cpu"))


def _interventions(
    sae: Any, experiment: Experiment, device: torch.device
) -> tuple[dict[int, Directions], list[list[Intervention]]]:
    """The directions of the trait's features (draw 0) and of each draw of random ones, and what each condition does."""
    own, directions, rows = experiment.moved, dict[int, Directions](), list[list[Intervention]]()
    for draw in sorted({condition.draw for condition in experiment.conditions}):
        features = own.feature_ids
        if draw:
            features = random_features(experiment.seed, experiment.prompt, draw, features, int(sae.cfg.d_sae))
        directions[draw] = directions_of(sae, experiment.question.layer, features, device)
    for condition in experiment.conditions:
        with about(str(condition)):
            rows.append(intervention_of(condition, own.values[condition.mode], directions))
    return directions, rows


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
