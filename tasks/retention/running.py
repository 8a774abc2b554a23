"""Reading documents with a cache that forgets: chunk by chunk, teacher-forced.

Two protocols. `stream`: the budget holds after every chunk, so later keys are computed from what was left, and errors
can accumulate from token to token. `prefill`: the prompt is read exactly and compressed once, so that all kept
keys are exact; what follows is read on top and stays, as kvpress does it.

`read` is a generator: several policies and the full run are read in lockstep by zipping theirs, and what is compared
(logits, residual streams) need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from schemas.errors import ConfigError, ModelError
from tasks.models.language_model import LanguageModel
from tasks.models.loading import residual_of
from tasks.models.model import require_known
from tasks.retention.attention import cache_shape, forgetting
from tasks.retention.budgets import Budget, Protection, require_room
from tasks.retention.cache import Chunk, Fates, RetentionCache, Rules
from tasks.retention.policies import Attention, Full, MemoryPaths, Policy
from tasks.retention.tiers import tier_sizes

Watch = Callable[[int, torch.Tensor, Attention], None]
"""Called as `watch(layer, positions, attention)` in each governed layer after a chunk's attention, before its eviction:
positions (batch, heads, n) of the keys that `attention.weights` are over, −1 where dead."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Read in chunks, and evict after each.

    Attributes:
        chunk: Tokens of a forward; 1 is the reference.
    """

    chunk: int = 64


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Read the prompt exactly, compress it, and go on.

    Attributes:
        prompt: Tokens of the prompt.
        chunk: Tokens of a forward, in the prompt and after it.
    """

    prompt: int
    chunk: int = 64


Protocol = Stream | Prefill


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How documents are read.

    Attributes:
        policy: Who stays in the cache.
        budget: How much; None: all, which only `full` may.
        protocol: When it is enforced.
        protection: What no policy may evict.
        seed: Of the random keys.
        masked: Whether evicted slots stay, hidden: for tests.
        fused: Whether attention may be computed by a fused kernel where nobody needs its weights: faster, and rounded
            otherwise.
    """

    policy: Policy
    budget: Budget | None
    protocol: Protocol
    protection: Protection = field(default_factory=Protection)
    seed: int = 0
    masked: bool = False
    fused: bool = False


@dataclass(kw_only=True)
class Step:
    """What a chunk gave.

    Attributes:
        start: Position of its first token.
        stop: Behind its last.
        logits: (batch, n, vocabulary) float32 on the model's device: row t predicts the token at start + t + 1.
        residuals: Of each decoder block the (batch, n, d_model) output, where asked for; else empty.
        cache: As it is after the chunk's eviction.
    """

    start: int
    stop: int
    logits: torch.Tensor
    residuals: list[torch.Tensor]
    cache: RetentionCache


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is left of a document once it was read.

    Attributes:
        losses: (batch, length − 1) float32 on the CPU, nats: of predicting tokens 1 and on.
        fates: Of each governed layer: when each token became warm, cold, and left.
        bytes_after: Bytes of the governed layers' tensors after each chunk.
        peak_bytes: The most they ever were, a chunk being read included.
        sliding_bytes: Bytes of the native sliding layers at the end.
        full_bytes: Bytes of the keys and values of a full cache of the governed layers, for all rows.
    """

    losses: torch.Tensor
    fates: dict[int, Fates]
    bytes_after: list[int]
    peak_bytes: int
    sliding_bytes: int
    full_bytes: int


def new_cache(
    model: LanguageModel, settings: Settings, length: int, documents: torch.Tensor
) -> RetentionCache:
    """An empty cache for sequences of one length; all that can be wrong with the settings is said here.

    Args:
        model: Which.
        settings: Policy, budget and protocol.
        length: Tokens of the sequences.
        documents: (batch,) int64, of which documents they are.

    Raises:
        ConfigError: if the budget has no room for what is protected, the policy cannot be run so, or a chunk or
            prompt is no number of tokens.
        ModelError: if the model's attention does not fit, or it was built for fewer positions.
    """
    shape, sliding = cache_shape(model.module, model.name)
    if model.context_length is not None and length > model.context_length:
        raise ModelError(
            f"sequences of {length:,} tokens are longer than {model.name} was built for "
            f"({model.context_length:,} positions)",
            hint=f"read sequences of {model.context_length:,} tokens or fewer",
        )
    policy, protocol = settings.policy, settings.protocol
    if protocol.chunk < 1:
        raise ConfigError(f"a chunk of {protocol.chunk} tokens cannot be read", hint="1 is the smallest")
    counted = length
    if isinstance(protocol, Prefill):
        if not 1 <= protocol.prompt <= length:
            raise ConfigError(
                f"a prompt of {protocol.prompt} tokens cannot be read of sequences of {length}",
                hint="a prompt has a token at least, and all of the sequence at most",
            )
        counted = protocol.prompt
    protection = settings.protection if policy.has_sinks else replace(settings.protection, sinks=0)
    slots, tiers = length, None
    if policy.evicts:
        if settings.budget is None:
            raise ConfigError(f"the policy {policy.name} needs a budget", hint="only full has none")
        if isinstance(policy, MemoryPaths):
            if len(documents) > 1:
                raise ConfigError("cmp reads one document at a time: its tiers are sized by document")
            tiers = tier_sizes(policy, shape, settings.budget.head_bytes(shape, counted), protection)
        else:
            slots = settings.budget.slots(
                shape,
                counted,
                slot_bytes=shape.token_bytes + policy.state_bytes,
                fixed_bytes=policy.memory_bytes(shape),
            )
            require_room(slots, protection, f"{policy.name} with {settings.budget}")
    rules = Rules(
        policy=policy,
        protection=protection,
        slots=slots,
        tiers=tiers,
        documents=documents.to(model.device),
        seed=settings.seed,
        length=length,
        masked=settings.masked,
    )
    cache = RetentionCache(rules, shape, sliding)
    cache.fused = settings.fused
    return cache


def read(
    model: LanguageModel,
    ids: torch.Tensor,
    settings: Settings,
    *,
    documents: torch.Tensor | None = None,
    function_tokens: torch.Tensor | None = None,
    with_residuals: bool = False,
    watch: Watch | None = None,
) -> Iterator[Step]:
    """Read sequences chunk by chunk; the same for any number of them at a time, up to rounding.

    Args:
        model: Which.
        ids: (batch, length) token ids, BOS included where the model needs it, any device.
        settings: Policy, budget and protocol.
        documents: (batch,) int64: what the random keys know each row by; None: 0, 1, ….
        function_tokens: (vocabulary,) bool: which tokens are function tokens, for policies that must know.
        with_residuals: Whether steps carry the output of each block.
        watch: Sees the attention of each governed layer.

    Raises:
        ConfigError: as `new_cache`, or if the policy must know the function tokens and nobody said.
        ModelError: as `new_cache`; if ids are outside the vocabulary, or a score is not finite.
    """
    require_known(ids, model.vocabulary, f"the vocabulary of {model.name}")
    if settings.policy.needs_kinds and function_tokens is None:
        raise ConfigError(f"the policy {settings.policy.name} must be told which tokens are function tokens")
    documents = torch.arange(len(ids)) if documents is None else documents
    cache = new_cache(model, settings, ids.shape[1], documents)
    cache.watch = watch
    ids = ids.to(model.device)
    kinds = None if function_tokens is None else function_tokens.to(model.device)[ids]
    return _steps(model, ids, settings, cache, kinds, with_residuals)


def run(model: LanguageModel, ids: torch.Tensor, settings: Settings, **options: Any) -> Reading:
    """Read sequences to their end; arguments and errors are those of `read`."""
    losses, after, last = [], [], None
    for step in read(model, ids, settings, **options):
        losses.append(next_losses(step, ids))
        after.append(step.cache.n_bytes)
        last = step
    assert last is not None
    cache = last.cache
    return Reading(
        losses=torch.cat(losses, dim=1),
        fates=cache.fates,
        bytes_after=after,
        peak_bytes=cache.peak_bytes,
        sliding_bytes=cache.sliding_bytes,
        full_bytes=len(ids) * cache.shape.full_bytes(ids.shape[1]),
    )


def next_losses(step: Step, ids: torch.Tensor) -> torch.Tensor:
    """(batch, up to n) float32 on the CPU, nats: of the tokens at start + 1 to stop, as far as there are any."""
    targets = ids[:, step.start + 1 : step.stop + 1].to(step.logits.device)
    logits = step.logits[:, : targets.shape[1]]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu()


def local_errors(
    model: LanguageModel,
    ids: torch.Tensor,
    settings: Settings,
    fates: dict[int, Fates],
) -> torch.Tensor:
    """What each layer alone would do wrong: fed the full run's inputs and keys, with the policy's evictions (PAPER 2).

    e(l, t) = ‖h_evicted − h_full‖ / ‖h_full‖ over the block's output. Only evictions count: keys and values are
    those of the full run, neither quantized nor merged. Layers that slide have none.

    Args:
        model: Which.
        ids: (batch, length) as they were read.
        settings: As they were read.
        fates: What became of the tokens.

    Returns:
        (blocks, batch, length) float32 on the CPU.
    """
    policy, protocol = settings.policy, settings.protocol
    rules = new_cache(model, settings, ids.shape[1], torch.arange(len(ids))).rules
    errors = torch.zeros(len(model.blocks), *ids.shape)
    at = {id(block): layer for layer, block in enumerate(model.blocks)}
    again = False

    def compare(block: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal again
        layer = at[id(block)]
        if again or layer not in fates:
            return
        held = cache.layers[layer]
        chunk = held.chunk
        positions = held.hot.positions
        own = torch.arange(chunk.start, chunk.stop, device=positions.device)
        hidden = positions[:, :, None] > own[:, None]
        hidden = hidden | (fates[layer].gone_at[..., : chunk.stop] <= chunk.start)[:, :, None]
        if isinstance(protocol, Stream) and policy.evicts and chunk.stop - chunk.start > 1:
            visible = policy.visible(own, positions, rules.slots, rules.protection)
            hidden = hidden if visible is None else hidden | ~visible
        held.hidden, again = hidden, True
        try:
            found = residual_of(block(*args, **kwargs)).float()
        finally:
            held.hidden, again = None, False
        exact = residual_of(output).float()
        error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
        errors[layer, :, chunk.start : chunk.stop] = error.cpu()

    whole = replace(settings, policy=Full(), budget=None)
    cache = new_cache(model, whole, ids.shape[1], torch.arange(len(ids)))
    handles = [block.register_forward_hook(compare, with_kwargs=True) for block in model.blocks]
    try:
        for _ in _steps(model, ids.to(model.device), whole, cache, None, False):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return errors


def chunks_of(length: int, protocol: Protocol) -> Iterator[tuple[int, int, bool]]:
    """Start, stop, and whether the budget holds after it, of each chunk of a sequence."""
    if isinstance(protocol, Stream):
        for start in range(0, length, protocol.chunk):
            yield start, min(start + protocol.chunk, length), True
        return
    for begin, end in ((0, protocol.prompt), (protocol.prompt, length)):
        for start in range(begin, end, protocol.chunk):
            stop = min(start + protocol.chunk, end)
            yield start, stop, stop == protocol.prompt


def _steps(
    model: LanguageModel,
    ids: torch.Tensor,
    settings: Settings,
    cache: RetentionCache,
    kinds: torch.Tensor | None,
    with_residuals: bool,
) -> Iterator[Step]:
    surprisal = torch.full(ids.shape, torch.nan, device=ids.device)
    for start, stop, evict in chunks_of(ids.shape[1], settings.protocol):
        cache.begin(
            Chunk(
                start=start,
                stop=stop,
                is_function=None if kinds is None else kinds[:, start:stop],
                surprisal=surprisal[:, start:stop],
                stepwise=isinstance(settings.protocol, Stream),
                evict=evict,
            )
        )
        residuals: list[torch.Tensor] = []
        # Between two steps another reading may use the model.
        with torch.inference_mode(), forgetting(model.module), _caught(model, residuals, with_residuals):
            logits = model.module(
                input_ids=ids[:, start:stop],
                position_ids=torch.arange(start, stop, device=ids.device)[None],
                past_key_values=cache,
                use_cache=True,
                retention=cache,
            ).logits.float()
            step = Step(start=start, stop=stop, logits=logits, residuals=residuals, cache=cache)
            known = next_losses(step, ids).to(ids.device)
            surprisal[:, start + 1 : start + 1 + known.shape[1]] = known
            cache.learn_surprisal(surprisal, start + 1)
        yield step


@contextmanager
def _caught(model: LanguageModel, residuals: list[torch.Tensor], wanted: bool) -> Iterator[None]:
    def catch(_block: Any, _inputs: Any, output: Any) -> None:
        residuals.append(residual_of(output))

    handles = [block.register_forward_hook(catch) for block in model.blocks] if wanted else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
