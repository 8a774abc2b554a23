"""A key-value cache that forgets: layers that know their tokens' positions, and evict once attention is done.

Keys are cached rotated, as the model made them, and stay at their true positions however many before them have left:
nothing is rotated again. A slot is one token in one key-value head; heads choose for themselves. A dead slot has the
position −1: in the `masked` mode all evicted slots become dead and stay where they are, physically nothing leaves; else
they are cut out, and bytes fall. Layers that see a sliding window keep the native layer of transformers, exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from tasks.retention.budgets import CacheShape, Protection
from tasks.retention.policies import Arrival, Attention, Held, MemoryPaths, Policy
from tasks.retention.selection import require_finite, select
from tasks.retention.tiers import TierSizes, Warm, longest_prefix, merge_into

NEVER = 2**31 - 1
"""The time of what has not happened."""


@dataclass(kw_only=True)
class Fates:
    """What became of each token in one layer. Times are numbers of tokens seen: t is after the t-th token was read.

    Attributes:
        warm_at: (batch, heads, n) int32: when it was quantized; `NEVER` where it was not.
        cold_at: The same: when it was merged.
        gone_at: The same: when its own slot left (of a merged token too).
        cold_into: (batch, heads, n) int32: the position that it was merged into; −1 where it was not.
    """

    warm_at: torch.Tensor
    cold_at: torch.Tensor
    gone_at: torch.Tensor
    cold_into: torch.Tensor

    @classmethod
    def of(cls, batch: int, heads: int, length: int, device: torch.device) -> Fates:
        """Of a sequence that nothing has happened to."""

        def never(value: int = NEVER) -> torch.Tensor:
            return torch.full((batch, heads, length), value, dtype=torch.int32, device=device)

        return cls(warm_at=never(), cold_at=never(), gone_at=never(), cold_into=never(-1))

    def kept(self, seen: int) -> torch.Tensor:
        """(batch, heads, n) bool: which tokens had a slot of their own once `seen` tokens were seen."""
        kept = self.gone_at > seen
        kept[..., seen:] = False
        return kept

    def note(
        self, name: str, positions: torch.Tensor, which: torch.Tensor, value: torch.Tensor | int
    ) -> None:
        """Write a value at the positions of some slots.

        Args:
            name: An attribute.
            positions: (batch, heads, m).
            which: (batch, heads, m) bool; the others are left as they are.
            value: What to write, the same shape or a number.
        """
        times: torch.Tensor = getattr(self, name)
        at = positions.long().clamp(min=0)
        # Slots that are not meant write what is there already, by way of a place behind the end.
        longer = torch.nn.functional.pad(times, (0, 1))
        at = torch.where(which, at, times.shape[-1])
        value = torch.as_tensor(value, dtype=torch.int32, device=times.device).expand(at.shape)
        setattr(self, name, longer.scatter(-1, at, value)[..., :-1].contiguous())


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens that are read in one forward.

    Attributes:
        start: Position of the first.
        stop: Behind the last.
        is_function: (batch, n) bool; None where nobody said.
        surprisal: (batch, n) float32, NaN where it is not known yet.
        stepwise: Whether a query sees what it would see if tokens came one by one (`Policy.visible`).
        evict: Whether the budget holds after it.
    """

    start: int
    stop: int
    is_function: torch.Tensor | None
    surprisal: torch.Tensor
    stepwise: bool
    evict: bool


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What all layers of a cache have in common.

    Attributes:
        policy: Who stays.
        protection: What no policy may evict; without sinks where the policy has none.
        slots: Of a head, at most; unused where there are tiers.
        tiers: Bytes of a head and its tiers; None: one exact tier.
        documents: (batch,) int64.
        seed: Of the run.
        length: Of the whole sequence.
        masked: Whether evicted slots stay, hidden.
    """

    policy: Policy
    protection: Protection
    slots: int
    tiers: TierSizes | None
    documents: torch.Tensor
    seed: int
    length: int
    masked: bool = False


@dataclass(kw_only=True)
class Slots:
    """What is known of slots beside keys and values: (batch, heads, n) each.

    Attributes:
        positions: int32 in the document; −1: dead.
        state: The policy's.
        votes: How many tokens each speaks for, float32; None where nothing is ever merged.
    """

    positions: torch.Tensor
    state: dict[str, torch.Tensor]
    votes: torch.Tensor | None

    def take(self, index: torch.Tensor) -> Slots:
        """(batch, heads, m) of them."""
        return Slots(
            positions=self.positions.gather(-1, index),
            state={name: tensor.gather(-1, index) for name, tensor in self.state.items()},
            votes=None if self.votes is None else self.votes.gather(-1, index),
        )

    def joined(self, others: Slots) -> Slots:
        """These, then the others."""
        votes = None
        if self.votes is not None and others.votes is not None:
            votes = torch.cat((self.votes, others.votes), dim=-1)
        return Slots(
            positions=torch.cat((self.positions, others.positions), dim=-1),
            state={
                name: torch.cat((tensor, others.state[name]), dim=-1) for name, tensor in self.state.items()
            },
            votes=votes,
        )

    @property
    def count(self) -> int:
        """Slots of a head, dead ones included."""
        return int(self.positions.shape[-1])

    @property
    def alive(self) -> torch.Tensor:
        """(batch, heads, n) bool."""
        return self.positions >= 0

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        votes = () if self.votes is None else (self.votes,)
        return sum(tensor.nbytes for tensor in (self.positions, *self.state.values(), *votes))


class RetentionLayer(DynamicLayer):  # type: ignore[misc]
    """One decoder block's keys and values, and what a policy needs to choose among them.

    `keys` and `values` hold the hot slots, which are exact; `warm` the rest, where there are tiers.

    Args:
        rules: What all layers have in common.
        layer: Which block.

    Attributes:
        hot: The hot slots, in the order of their positions.
        warm: Codes of the warm slots; None where there are no tiers, or nothing was read yet.
        cool: The warm slots.
        seen: Tokens read so far.
        fates: What became of each token.
        chunk: What is being read; set before a forward.
        hidden: (batch, heads, q, n) bool, or None: instead of reading, the next call attends to the keys that
            are here but these (see `tasks.retention.running.local_errors`).
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, rules: Rules, layer: int) -> None:
        super().__init__()
        self.rules, self.layer = rules, layer
        self.seen = 0
        self.hot: Slots
        self.cool: Slots
        self.warm: Warm | None = None
        self.memory: dict[str, torch.Tensor] = {}
        self.fates: Fates
        self.chunk: Chunk | None = None
        self.hidden: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a chunk's keys and values in.

        Args:
            key_states: (batch, heads, n, head_dim), rotated.
            value_states: As `key_states`.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            All keys and all values, (batch, heads, warm + hot, head_dim); the chunk's are the last.
        """
        if self.hidden is not None:
            return self.keys, self.values
        assert self.chunk is not None
        policy, chunk = self.rules.policy, self.chunk
        positions = torch.arange(chunk.start, chunk.stop, dtype=torch.int32, device=key_states.device)
        arrival = Arrival(
            positions=positions,
            keys=key_states,
            values=value_states,
            is_function=chunk.is_function,
            surprisal=chunk.surprisal,
        )
        shape = key_states.shape[:3]
        new = Slots(
            positions=positions.expand(shape).contiguous(),
            state=policy.arrive(arrival),
            votes=torch.ones(shape, device=key_states.device) if self._merges else None,
        )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.hot = key_states, value_states, new
            self.cool = new.take(torch.empty(*shape[:2], 0, dtype=torch.int64, device=key_states.device))
            self.fates = Fates.of(shape[0], shape[1], self.rules.length, key_states.device)
            if isinstance(policy, MemoryPaths):
                self.warm = Warm(policy.bits, policy.group, key_states)
        else:
            self.keys = torch.cat((self.keys, key_states), dim=-2)
            self.values = torch.cat((self.values, value_states), dim=-2)
            self.hot = self.hot.joined(new)
        self.seen = chunk.stop
        return self._all_keys(), self._all_values()

    def slots(self) -> Slots:
        """All slots, in the order of the keys that `update` gives."""
        return self.cool.joined(self.hot) if self.cool.count else self.hot

    @property
    def is_whole(self) -> bool:
        """Whether every token that was read is here as it came."""
        if not self.is_initialized:
            return True
        return not self.cool.count and self.hot.count == self.seen and bool(self.hot.alive.all())

    def hides(self, queries: int) -> torch.Tensor | None:
        """What the last queries must not see: (batch or 1, heads or 1, q, n) bool; None: nothing.

        Args:
            queries: How many there are.
        """
        if self.hidden is not None:
            return self.hidden
        rules, chunk = self.rules, self.chunk
        assert chunk is not None
        hidden = None
        positions = self.slots().positions
        own = torch.arange(self.seen - queries, self.seen, device=positions.device)
        if queries > 1:
            hidden = positions[:, :, None] > own[:, None]
            # A single query finds just what the last eviction left.
            if chunk.stepwise and rules.policy.evicts:
                visible = rules.policy.visible(own, positions, rules.slots, rules.protection)
                hidden = hidden if visible is None else hidden | ~visible
        if self._has_dead:
            dead = positions[:, :, None] < 0
            hidden = dead if hidden is None else hidden | dead
        return hidden

    def logit_bonus(self) -> torch.Tensor | None:
        """(batch, heads, n) the log of each slot's votes, added to its logits; None where nothing is ever merged."""
        votes = self.slots().votes if self._merges else None
        return None if votes is None else votes.log()

    def attended(self, attention: Attention | None) -> None:
        """Tell the policy what was attended to, and make room.

        Args:
            attention: The chunk's; None where the policy needs none.

        Raises:
            ModelError: if a score is not finite.
        """
        if self.hidden is not None:
            return
        assert self.chunk is not None
        if attention is not None and self.rules.policy.needs_attention:
            held = self._held(attention)
            self.rules.policy.observe(held, attention)
            self.memory = held.memory
            self._put_back(held.state)
        if self.chunk.evict and self.rules.policy.evicts:
            if self.rules.tiers is None:
                self._evict(attention)
            else:
                self._reassess(attention, self.rules.tiers)

    def learn_surprisal(self, surprisal: torch.Tensor, start: int) -> None:
        """Fill in what the tokens of the chunk just read turned out to be.

        Args:
            surprisal: (batch, length) float32, of all tokens, nats; NaN where it is not known.
            start: First position whose surprisal is new.
        """
        if "surprisal" not in self.rules.policy.states:
            return
        table = surprisal[:, None].expand(-1, self.hot.positions.shape[1], -1)
        for slots in (self.hot, self.cool):
            found = table.gather(-1, slots.positions.long().clamp(min=0))
            is_new = slots.positions >= start
            slots.state["surprisal"] = torch.where(is_new, found, slots.state["surprisal"])

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors that belong to what is held; the record of `fates` does not."""
        if not self.is_initialized:
            return 0
        codes = 0 if self.warm is None else self.warm.n_bytes
        memory = sum(tensor.nbytes for tensor in self.memory.values())
        return self.keys.nbytes + self.values.nbytes + self.hot.n_bytes + self.cool.n_bytes + codes + memory

    def get_seq_length(self) -> int:
        """Tokens read so far, however many have left."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that the next chunk will find, itself included, and 0."""
        held = self.slots().count if self.is_initialized else 0
        return held + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was evicted cannot come back."""
        raise NotImplementedError("a cache that evicts cannot be cropped")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused: rows are documents here, not beams."""
        raise NotImplementedError("a cache that evicts has no beams")

    @property
    def _merges(self) -> bool:
        return isinstance(self.rules.policy, MemoryPaths) and self.rules.policy.merge

    @property
    def _has_dead(self) -> bool:
        return self.rules.masked or getattr(self.rules.policy, "spread", None) is not None

    def _all_keys(self) -> torch.Tensor:
        return self.keys if self.warm is None else torch.cat((self.warm.keys(), self.keys), dim=-2)

    def _all_values(self) -> torch.Tensor:
        return self.values if self.warm is None else torch.cat((self.warm.values(), self.values), dim=-2)

    def _held(self, attention: Attention | None) -> Held:
        slots, rules = self.slots(), self.rules
        return Held(
            layer=self.layer,
            seen=self.seen,
            slots=rules.slots,
            positions=slots.positions,
            alive=slots.alive,
            protected=rules.protection.mask(slots.positions, self.seen),
            state=dict(slots.state),
            memory=dict(self.memory),
            keys=self._all_keys,
            attention=attention,
            documents=rules.documents,
            seed=rules.seed,
        )

    def _put_back(self, state: dict[str, torch.Tensor]) -> None:
        n = self.cool.count
        for name, tensor in state.items():
            self.cool.state[name], self.hot.state[name] = tensor[..., :n], tensor[..., n:]

    @property
    def _name(self) -> str:
        return f"the policy {self.rules.policy.name} in layer {self.layer}"

    def _evict(self, attention: Attention | None) -> None:
        """One exact tier: as many slots as the budget has."""
        alive = self.hot.alive
        most = int(alive.sum(-1).max()) if self._has_dead else self.hot.count
        if most <= self.rules.slots:
            return
        held = self._held(attention)
        scores = self.rules.policy.score(held)
        living = held.alive
        admitted = self.rules.policy.admits(held)
        if admitted is not None:
            living = living & (admitted | held.protected)
        index = select(scores, living, held.protected, self.rules.slots, whose=self._name)
        stays = torch.zeros_like(living).scatter(-1, index, True) & living
        self.fates.note("gone_at", self.hot.positions, held.alive & ~stays, self.seen)
        self._keep_hot(stays)

    def _keep_hot(self, stays: torch.Tensor) -> None:
        """Leave these hot slots (batch, heads, n) bool, as many as the widest head has."""
        if self.rules.masked:
            self.hot.positions = torch.where(stays, self.hot.positions, -1)
            return
        index, dead = _index_of(stays)
        self.hot = self.hot.take(index)
        self.hot.positions = torch.where(dead, -1, self.hot.positions)
        wide = index[..., None].expand(*index.shape, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(-2, wide), self.values.gather(-2, wide)

    def _reassess(self, attention: Attention | None, sizes: TierSizes) -> None:
        """Tiers: whole groups of the least significant hot slots become warm, and what no longer fits leaves."""
        policy = self.rules.policy
        assert isinstance(policy, MemoryPaths)
        assert self.warm is not None
        living = int(self.hot.alive[0, 0].sum()) if self.rules.masked else self.hot.count
        cooled = int(self.cool.alive[0, 0].sum()) if self.rules.masked else self.cool.count
        # Until something must go, all may stay exact, whatever the hot tier's share.
        if living <= sizes.hot or (not cooled and living * sizes.hot_slot <= sizes.budget):
            return
        held, n = self._held(attention), self.cool.count
        scores = policy.score(held)
        require_finite(scores, held.alive, self._name)
        ranks = torch.where(held.protected, torch.inf, torch.where(held.alive, scores, -torch.inf))
        cool_ranks, hot_ranks = ranks[..., :n], ranks[..., n:]
        demoted = policy.group * -(-(living - sizes.hot) // policy.group)
        kept = living - demoted
        order = hot_ranks.argsort(dim=-1, descending=True, stable=True)
        index = order[..., kept:living].sort(dim=-1).values
        cool_ranks = torch.cat((cool_ranks, hot_ranks.gather(-1, index)), dim=-1)
        self._demote(index)
        # The hot tier may fill up again before the next assessment.
        room = sizes.budget - sizes.hot * sizes.hot_slot
        order = cool_ranks.argsort(dim=-1, descending=True, stable=True)
        warm = longest_prefix(order, self.warm.group_of, cooled + demoted, room, sizes)
        stays = torch.zeros_like(self.cool.alive).scatter(-1, order[..., :warm], True)
        self._let_go(policy, self.cool.alive & ~stays)
        if self.rules.masked:
            self.cool.positions = torch.where(stays, self.cool.positions, -1)
        else:
            index, _ = _index_of(stays)
            self.cool = self.cool.take(index)
            self.warm.keep(index)

    def _demote(self, index: torch.Tensor) -> None:
        assert self.warm is not None
        wide = index[..., None].expand(*index.shape, self.keys.shape[-1])
        self.warm.append(self.keys.gather(-2, wide), self.values.gather(-2, wide))
        moved = self.hot.take(index)
        self.cool = self.cool.joined(moved)
        self.fates.note("warm_at", moved.positions, moved.alive, self.seen)
        self._keep_hot(self.hot.alive.scatter(-1, index, False))

    def _let_go(self, policy: MemoryPaths, dying: torch.Tensor) -> None:
        """Warm slots (batch, heads, n) bool leave: merged where they may be, else gone."""
        assert self.warm is not None
        positions = self.cool.positions
        self.fates.note("gone_at", positions, dying, self.seen)
        if not policy.merge or not bool(dying.any()):
            return
        assert self.hot.votes is not None
        assert self.cool.votes is not None
        # A sink is attended to for want of anything else: a value merged into it would be heard everywhere.
        targets = self.hot.alive & (self.hot.positions >= self.rules.protection.sinks)
        self.values, self.hot.votes, merged, into = merge_into(
            self.keys,
            self.values,
            self.hot.votes,
            targets,
            (self.warm.keys(), self.warm.values(), self.cool.votes, dying),
            policy.merge_similarity,
        )
        self.fates.note("cold_at", positions, merged, self.seen)
        self.fates.note("cold_into", positions, merged, self.hot.positions.gather(-1, into))


class RetentionCache(Cache):  # type: ignore[misc]
    """A cache with retention layers where a model attends to everything, and native ones where it slides.

    Args:
        rules: What all layers have in common.
        shape: Of the model.
        sliding: The window of each decoder block; None where it attends to everything.

    Attributes:
        watch: Called with (layer, positions, attention) after each governed layer's attention; None: nobody.
        fused: Whether a fused kernel may compute the output where nobody needs the weights.
        peak_bytes: Most bytes that the governed layers held at once, a chunk being read included.
    """

    layers: list[Any]

    def __init__(self, rules: Rules, shape: CacheShape, sliding: list[int | None]) -> None:
        super().__init__(
            layers=[
                RetentionLayer(rules, layer) if window is None else DynamicSlidingWindowLayer(window)
                for layer, window in enumerate(sliding)
            ]
        )
        self.rules, self.shape = rules, shape
        self.watch: Any = None
        self.fused = False
        self.peak_bytes = 0
        self._bytes = [0] * len(sliding)

    @property
    def governed(self) -> list[RetentionLayer]:
        """The layers that evict."""
        return [layer for layer in self.layers if isinstance(layer, RetentionLayer)]

    @property
    def needs_weights(self) -> bool:
        """Whether anybody looks at attention weights."""
        return self.rules.policy.needs_attention or self.watch is not None

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors that the governed layers hold."""
        return sum(layer.n_bytes for layer in self.governed)

    @property
    def sliding_bytes(self) -> int:
        """Bytes of the keys and values that sliding layers need."""
        return sum(
            layer.keys.numel() * layer.keys.itemsize + layer.values.numel() * layer.values.itemsize
            for layer in self.layers
            if not isinstance(layer, RetentionLayer) and layer.is_initialized
        )

    @property
    def fates(self) -> dict[int, Fates]:
        """Of each governed layer."""
        return {layer.layer: layer.fates for layer in self.governed}

    def begin(self, chunk: Chunk) -> None:
        """Say what the next forward reads."""
        for layer in self.governed:
            layer.chunk = chunk

    def learn_surprisal(self, surprisal: torch.Tensor, start: int) -> None:
        """Tell all layers what the tokens from `start` on turned out to be; as `RetentionLayer.learn_surprisal`."""
        for layer in self.governed:
            layer.learn_surprisal(surprisal, start)

    def attended(self, layer: RetentionLayer, attention: Attention | None) -> None:
        """After a layer's attention: show it, let the layer evict, and note the bytes before and after."""
        self._weigh(layer)
        if self.watch is not None and attention is not None:
            self.watch(layer.layer, layer.slots().positions, attention)
        layer.attended(attention)
        self._weigh(layer)

    def _weigh(self, layer: RetentionLayer) -> None:
        self._bytes[layer.layer] = layer.n_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self._bytes))


def _index_of(stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the slots that stay, in order, and which of them are there for want of another (heads differ)."""
    width = int(stays.sum(-1).max())
    index = (~stays).int().argsort(dim=-1, stable=True)[..., :width].sort(dim=-1).values
    return index, ~stays.gather(-1, index)


__all__ = [
    "NEVER",
    "Chunk",
    "Fates",
    "RetentionCache",
    "RetentionLayer",
    "Rules",
    "Slots",
]
