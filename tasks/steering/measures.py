"""What steering does to a prompt's answer, row by row against the unsteered model (PAPER 1.3).

All rows of a batch are the same prompt, so nothing is padded, and the unsteered pass has the same shape: a row that
nothing is done to is equal to the unsteered one to the bit, at any number of rows. Therefore rows are compared with
the same row of the unsteered pass, never with another one: products round differently from row to row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from schemas.errors import ModelError, about
from tasks.models.language_model import LanguageModel
from tasks.steering.interventions import Intervention, steered

Row = Sequence[Intervention]
"""What is done to one row of a batch; nothing where it is empty."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a model.

    Attributes:
        ids: Token ids of the prompt, all that the model sees.
        target: Token ids of the continuation whose log-probability is measured.
        layer: Decoder block after which it is steered.
        max_new_tokens: Tokens generated at most.
        stop_ids: Ids that end a text.
    """

    ids: tuple[int, ...]
    target: tuple[int, ...]
    layer: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answers, one entry a row.

    Attributes:
        log_probs: (rows, vocabulary) float32, of the token after the prompt.
        target: Log-probability of the target in nats, summed over its tokens, each given those before it.
        new: Token ids generated greedily.
    """

    log_probs: torch.Tensor
    target: tuple[float, ...]
    new: tuple[tuple[int, ...], ...]


def answers(
    model: LanguageModel, question: Question, rows: Sequence[Row], names: Sequence[str] | None = None
) -> Answers:
    """Ask a model the same question in every row of a batch.

    Args:
        model: The model.
        question: The prompt and what follows it.
        rows: What is done to each row; where every position is steered, those of the target and of the generated
            tokens are too.
        names: How errors call each row; None: unsteered.

    Raises:
        ModelError: naming layer and row, if logits are not finite.
    """
    names = names or ["unsteered"] * len(rows)
    ids = torch.tensor([question.ids] * len(rows))
    with _one_pass(model, question.layer, rows):
        log_probs = model.next_log_probs(ids)
    # Minus infinity is a token that the model rules out.
    _refuse(question, ~(log_probs.isnan() | (log_probs == torch.inf)).any(dim=1), names)
    whole = torch.tensor([(*question.ids, *question.target)] * len(rows))
    wanted = torch.zeros(len(rows), whole.shape[1] - 1, dtype=torch.bool)
    wanted[:, len(question.ids) - 1 :] = True
    with _one_pass(model, question.layer, rows):
        losses = model.token_losses(whole, wanted)[:, len(question.ids) - 1 :]
    _refuse(question, losses.isfinite().all(dim=1), names)
    generating = f"layer {question.layer}, while generating with {'; '.join(dict.fromkeys(names))}"
    with about(generating), _one_pass(model, question.layer, rows):
        new = model.generate_rows(ids, question.max_new_tokens, question.stop_ids)
    return Answers(
        log_probs=log_probs,
        target=tuple((-losses.double().sum(dim=1)).tolist()),
        new=tuple(tuple(text) for text in new),
    )


def divergences(changed: torch.Tensor, baseline: torch.Tensor) -> list[float]:
    """KL divergences from the baseline's distributions, row by row: Σ p_changed (log p_changed - log p_baseline).

    Of (rows, vocabulary) float32 log-probabilities, in nats, in float64; infinite where the baseline rules out a token
    that the changed model does not.
    """
    found = []
    for row, reference in zip(changed, baseline, strict=True):
        # Rounded to float32, probabilities no longer add up to 1, and a divergence could be below 0.
        log_p, log_q = (torch.log_softmax(values.double(), dim=0) for values in (row, reference))
        possible = log_p > -torch.inf
        log_p, log_q = log_p[possible], log_q[possible]
        found.append(max(0.0, float((log_p.exp() * (log_p - log_q)).sum())))
    return found


def perplexities(
    model: LanguageModel, question: Question, texts: Iterable[Sequence[int]], batch_size: int
) -> dict[tuple[int, ...], float]:
    """The perplexity of texts given the prompt, under the model as it is: exp(mean loss in nats over its tokens).

    Texts are ids after the prompt, `batch_size` a forward at most; empty ones have no perplexity and are left out.

    Raises:
        ModelError: if one is not finite.
    """
    different = [text for text in dict.fromkeys(tuple(text) for text in texts) if text]
    start, found = len(question.ids), {}
    for first in range(0, len(different), batch_size):
        some = different[first : first + batch_size]
        longest = max(map(len, some))
        ids = torch.zeros(len(some), start + longest, dtype=torch.int64)
        wanted = torch.zeros(len(some), start + longest - 1, dtype=torch.bool)
        for row, text in enumerate(some):
            ids[row, : start + len(text)] = torch.tensor((*question.ids, *text))
            wanted[row, start - 1 : start - 1 + len(text)] = True
        losses = model.token_losses(ids, wanted).double()
        for text, own, chosen in zip(some, losses, wanted, strict=True):
            found[text] = float(own[chosen].mean().exp())
            if not math.isfinite(found[text]):
                raise ModelError(
                    "the perplexity of a steered text under the unsteered model is not finite",
                    hint="try model.dtype = 'float32', or leave out the highest strengths",
                )
    return found


@torch.inference_mode()
def residual_at(model: LanguageModel, question: Question) -> torch.Tensor:
    """(positions, d_model) float32 residual stream of the prompt after the layer, unsteered, on the model's device."""
    found: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        found.append(hidden[0].to(torch.float32, copy=True))
        return hidden

    with model.replaced(question.layer, keep):
        model.next_log_probs(torch.tensor([question.ids]))
    (residual,) = found
    return residual


@contextmanager
def _one_pass(model: LanguageModel, layer: int, rows: Sequence[Row]) -> Iterator[None]:
    # A batch whose rows are all untouched runs in the same way as one that is steered: a replacement may change how
    # a model cuts its batches.
    with model.replaced(layer, lambda hidden: hidden), steered(model, rows):
        yield


def _refuse(question: Question, is_finite: torch.Tensor, names: Sequence[str]) -> None:
    """Refuse rows whose logits are not finite; (rows,) bool."""
    wrong = torch.nonzero(~is_finite).flatten().tolist()
    if wrong:
        raise ModelError(
            f"layer {question.layer}, {names[wrong[0]]}: the logits are not finite"
            + (f" (nor are those of {len(wrong) - 1} other rows)" if len(wrong) > 1 else ""),
            hint="try model.dtype = 'float32', or leave that strength out",
        )
