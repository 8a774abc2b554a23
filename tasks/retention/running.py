"""Reading documents with a cache that forgets: chunk by chunk, teacher-forced.

Two protocols. `stream`: the budget holds after every chunk, so later keys are computed from what was left, and errors
can accumulate from token to token. `prefill`: the prompt is read exactly and compressed once, so that all kept
keys are exact; what follows is read on top and stays, as kvpress does it.

A `Reader` goes on chunk by chunk: several policies and the full run are read in lockstep, and what is compared
(logits, residual streams) need not be kept. Until something leaves its cache, a reading is the full run, and may
`follow` it rather than compute the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from schemas.errors import ConfigError, ModelError
from tasks.models.language_model import LanguageModel
from tasks.models.loading import residual_of
from tasks.models.model import require_known
from tasks.retention.attention import cache_shape, forgetting
from tasks.retention.budgets import Budget, Protection, require_room
from tasks.retention.cache import Chunk, Fates, RetentionCache, RetentionLayer, Rules
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

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """(batch, n, vocabulary) float32 on the model's device."""
        return torch.log_softmax(self.logits, dim=-1)

    @cached_property
    def probs(self) -> torch.Tensor:
        """As `log_probs`."""
        return self.log_probs.exp()

    @cached_property
    def first(self) -> torch.Tensor:
        """(batch, n) int64: the most likely tokens."""
        return self.logits.argmax(-1)


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


class Reader:
    """Reads sequences chunk by chunk; the same for any number of them at a time, up to rounding.

    Args:
        model: Which.
        ids: (batch, length) token ids, BOS included where the model needs it, any device.
        settings: Policy, budget and protocol.
        documents: (batch,) int64: what the random keys know each row by; None: 0, 1, ….
        function_tokens: (vocabulary,) bool: which tokens are function tokens, for policies that must know.
        with_residuals: Whether steps carry the output of each block.
        watch: Sees the attention of each governed layer.

    Attributes:
        cache: What is held so far.

    Raises:
        ConfigError: as `new_cache`, or if the policy must know the function tokens and nobody said.
        ModelError: as `new_cache`; if ids are outside the vocabulary, or, from its methods, a score is not finite.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: torch.Tensor,
        settings: Settings,
        *,
        documents: torch.Tensor | None = None,
        function_tokens: torch.Tensor | None = None,
        with_residuals: bool = False,
        watch: Watch | None = None,
    ) -> None:
        require_known(ids, model.vocabulary, f"the vocabulary of {model.name}")
        if settings.policy.needs_kinds and function_tokens is None:
            raise ConfigError(
                f"the policy {settings.policy.name} must be told which tokens are function tokens"
            )
        documents = torch.arange(len(ids)) if documents is None else documents
        self.cache = new_cache(model, settings, ids.shape[1], documents)
        self.cache.watch = watch
        self._model, self._settings, self._with_residuals = model, settings, with_residuals
        self._ids = ids.to(model.device)
        self._kinds = None if function_tokens is None else function_tokens.to(model.device)[self._ids]
        self._surprisal = torch.full(ids.shape, torch.nan, device=model.device)
        self._chunks = chunks_of(ids.shape[1], settings.protocol)
        self._chunk: Chunk | None = None

    def steps(self) -> Iterator[Step]:
        """Read to the end."""
        while self.begin() is not None:
            yield self.read()

    def begin(self) -> Chunk | None:
        """Go to the next chunk; None at the end. `read` or `follow` it then."""
        start, stop, evict = next(self._chunks, (0, 0, False))
        self._chunk = None
        if stop:
            self._chunk = Chunk(
                start=start,
                stop=stop,
                is_function=None if self._kinds is None else self._kinds[:, start:stop],
                surprisal=self._surprisal[:, start:stop],
                stepwise=isinstance(self._settings.protocol, Stream),
                evict=evict,
            )
            self.cache.begin(self._chunk)
        return self._chunk

    def read(self) -> Step:
        """Read the chunk."""
        chunk, module = self._chunk, self._model.module
        assert chunk is not None
        residuals: list[torch.Tensor] = []
        # Between two steps another reading may use the model.
        with (
            torch.inference_mode(),
            forgetting(module),
            _caught(self._model, residuals, self._with_residuals),
        ):
            logits = module(
                input_ids=self._ids[:, chunk.start : chunk.stop],
                position_ids=torch.arange(chunk.start, chunk.stop, device=self._ids.device)[None],
                past_key_values=self.cache,
                use_cache=True,
                retention=self.cache,
            ).logits.float()
            step = Step(
                start=chunk.start, stop=chunk.stop, logits=logits, residuals=residuals, cache=self.cache
            )
            self._learn(step)
        return step

    @property
    def is_full(self) -> bool:
        """Whether the chunk reads as it would with the full cache: nothing has left, and nothing hides in it."""
        chunk, rules = self._chunk, self.cache.rules
        assert chunk is not None
        if not all(layer.is_whole for layer in self.cache.governed):
            return False
        if not (chunk.stepwise and rules.policy.evicts and chunk.stop - chunk.start > 1):
            return True
        keys = torch.arange(chunk.stop, device=self._ids.device)
        own = keys[chunk.start :]
        visible = rules.policy.visible(own, keys.expand(1, 1, -1), rules.slots, rules.protection)
        return visible is None or bool((visible | (keys > own[:, None])).all())

    def take(self, layer: int, keys: torch.Tensor, values: torch.Tensor, attention: Attention) -> None:
        """Follow in one layer: what the chunk's forward gave there, elsewhere; eviction is this reading's own.

        Args:
            layer: Governed decoder block.
            keys: (batch, heads, n, head_dim) of the chunk, rotated.
            values: As `keys`.
            attention: The chunk's.
        """
        held = self.cache.layers[layer]
        held.update(keys, values)
        self.cache.attended(held, attention)

    def follow(self, step: Step) -> Step:
        """End a chunk that was not read, but taken layer by layer from a reading that is the same so far.

        Args:
            step: What the chunk gave there.
        """
        mine = copy(step)
        mine.cache = self.cache
        for place, layer in enumerate(step.cache.layers):
            if not isinstance(layer, RetentionLayer):
                # Native layers put new tensors in the place of old ones.
                self.cache.layers[place] = copy(layer)
        self._learn(mine)
        return mine

    def _learn(self, step: Step) -> None:
        if "surprisal" in self._settings.policy.states:
            known = next_losses(step, self._ids).to(self._ids.device)
            self._surprisal[:, step.start + 1 : step.start + 1 + known.shape[1]] = known
            self.cache.learn_surprisal(self._surprisal, step.start + 1)


def read(model: LanguageModel, ids: torch.Tensor, settings: Settings, **options: Any) -> Iterator[Step]:
    """Read sequences to their end, chunk by chunk; arguments and errors are those of `Reader`."""
    return Reader(model, ids, settings, **options).steps()


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
    return -step.log_probs[:, : targets.shape[1]].gather(-1, targets[..., None])[..., 0].cpu()


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
    reader = Reader(model, ids, whole)
    cache = reader.cache
    handles = [block.register_forward_hook(compare, with_kwargs=True) for block in model.blocks]
    try:
        for _ in reader.steps():
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
