"""Asking what a cache still knows: a context is read and evicted from, then a question is asked that nobody foresaw.

After the context nothing more is evicted, under either protocol. The answer is not generated token by token: greedy
decoding gives exactly the answer's tokens if and only if, fed question and answer, the model's first choice at each of
their places is the next one of them. So one forward tells the exact match and the answer's log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from schemas.errors import ModelError
from tasks.models.language_model import LanguageModel
from tasks.retention.attention import forgetting
from tasks.retention.cache import Chunk, RetentionCache
from tasks.retention.policies import MemoryPaths
from tasks.retention.prompts import Prompt
from tasks.retention.running import Settings, Step, read

AT_ONCE = 8
"""Prompts that are read side by side."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a prompt was answered.

    Attributes:
        exact_match: Whether greedy decoding begins with just the answer's tokens.
        logprob: Log-probability of all of the answer's tokens, nats.
    """

    exact_match: bool
    logprob: float


def answers(
    model: LanguageModel,
    asked: Sequence[Prompt],
    settings: Settings,
    *,
    function_tokens: torch.Tensor | None = None,
) -> list[Answer]:
    """Read each context with a policy, then ask.

    Args:
        model: Which.
        asked: Prompts whose contexts are of one length; their random keys are known by their places here.
        settings: Policy, budget and protocol, for contexts of this length.
        function_tokens: (vocabulary,) bool, for policies that must know.

    Returns:
        An answer a prompt, in their order.

    Raises:
        ConfigError: as `tasks.retention.running.read`.
        ModelError: as `read`; also if a prompt with its question and answer is longer than the model was built for, or
            the logits are not finite.
    """
    for prompt in asked:
        require_positions(prompt, model.context_length, model.name)
    # What is read side by side has one shape; tiers are sized by document.
    at_once = 1 if isinstance(settings.policy, MemoryPaths) else AT_ONCE
    places = sorted(range(len(asked)), key=lambda place: (_shape(asked[place]), place))
    found: dict[int, Answer] = {}
    for _, alike in groupby(places, key=lambda place: _shape(asked[place])):
        same = list(alike)
        for first in range(0, len(same), at_once):
            some = same[first : first + at_once]
            made = _together(model, [asked[place] for place in some], some, settings, function_tokens)
            found |= dict(zip(some, made, strict=True))
    return [found[place] for place in range(len(asked))]


def _shape(prompt: Prompt) -> tuple[int, int, int]:
    return len(prompt.context), len(prompt.question), len(prompt.answer)


def _together(
    model: LanguageModel,
    asked: Sequence[Prompt],
    places: Sequence[int],
    settings: Settings,
    function_tokens: torch.Tensor | None,
) -> list[Answer]:
    contexts = torch.tensor([prompt.context for prompt in asked])
    steps = read(model, contexts, settings, documents=torch.tensor(places), function_tokens=function_tokens)
    last: Step | None = None
    for step in steps:
        last = step
    assert last is not None
    after = torch.tensor([[*prompt.question, *prompt.answer] for prompt in asked])
    logits = _go_on(model, last.cache, after, last.stop, function_tokens)
    n = len(asked[0].answer)
    predicting, wanted = logits[:, -n - 1 : -1], after[:, -n:].to(logits.device)
    if not bool(torch.isfinite(predicting).all()):
        raise ModelError(
            f"the logits of {model.name} are not finite under the policy {settings.policy.name}",
            hint="try model.dtype = 'float32'",
        )
    of_answer = predicting.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].double().sum(-1)
    is_exact = (predicting.argmax(-1) == wanted).all(-1)
    return [
        Answer(exact_match=exact, logprob=logprob)
        for exact, logprob in zip(is_exact.tolist(), of_answer.tolist(), strict=True)
    ]


def _go_on(
    model: LanguageModel,
    cache: RetentionCache,
    ids: torch.Tensor,
    start: int,
    function_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """(batch, n, vocabulary) float32 logits of tokens after what the cache holds; nothing is evicted."""
    ids, stop = ids.to(model.device), start + ids.shape[1]
    cache.begin(
        Chunk(
            start=start,
            stop=stop,
            is_function=None if function_tokens is None else function_tokens.to(model.device)[ids],
            surprisal=torch.full(ids.shape, torch.nan, device=ids.device),
            stepwise=False,
            evict=False,
        )
    )
    with torch.inference_mode(), forgetting(model.module):
        logits: torch.Tensor = model.module(
            input_ids=ids,
            position_ids=torch.arange(start, stop, device=ids.device)[None],
            past_key_values=cache,
            use_cache=True,
            retention=cache,
        ).logits.float()
    return logits


def require_positions(prompt: Prompt, positions: int | None, name: str) -> None:
    """Whether a model has a position for all of a prompt, its question and its answer.

    Args:
        prompt: The prompt.
        positions: That the model was built for; None: any number.
        name: Of the model, for the error.

    Raises:
        ModelError: if not.
    """
    length = sum(_shape(prompt))
    if positions is not None and length > positions:
        most = positions - length + len(prompt.context)
        raise ModelError(
            f"a prompt of the task {prompt.task} has {length:,} tokens with its question and answer, more than "
            f"{name} was built for ({positions:,} positions)",
            hint=f"lower retention.retrieval.lengths to {most:,} or less",
        )
