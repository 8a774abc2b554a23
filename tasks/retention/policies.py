"""Policies: who stays in the cache. Each watches (`observe`) and says how much a slot matters (`score`).

A policy is a frozen value with its options; what it remembers lies in the cache layer, as tensors per slot (`states`)
or beside them (`memory`), where it is counted in bytes and leaves with the slot it is about. All policies are served by
the same selector and the same protection (`tasks.retention.selection`), so that they differ in their scores alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from schemas.errors import ConfigError
from tasks.retention.budgets import POSITION_BYTES, CacheShape, Protection
from tasks.retention.hashing import gumbel_keys
from tasks.retention.selection import retention_probabilities, standardized

LEAST = 1e-12
"""Added before a logarithm."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Tokens that are new in a layer.

    Attributes:
        positions: (n,) in the document.
        keys: (batch, heads, n, head_dim), rotated.
        values: As `keys`.
        is_function: (batch, n) bool; None where nobody said which tokens are function tokens.
        surprisal: (batch, n) float32, −log p of each token, nats; NaN where it is not known yet.
    """

    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    is_function: torch.Tensor | None
    surprisal: torch.Tensor

    def per_head(self, of_token: torch.Tensor) -> torch.Tensor:
        """(batch, n) as (batch, heads, n)."""
        return of_token[:, None].expand(self.keys.shape[:3]).clone()


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What a chunk's queries attended to.

    Attributes:
        weights: (batch, heads, groups, q, n) float32, after softmax: the last axis sums to 1.
        queries: (batch, heads, groups, q, head_dim), rotated.
        positions: (q,) of the queries.
        scaling: What logits were multiplied by.
        softcap: Of the logits; None: none.
    """

    weights: torch.Tensor
    queries: torch.Tensor
    positions: torch.Tensor
    scaling: float
    softcap: float | None

    @property
    def by_head(self) -> torch.Tensor:
        """(batch, heads, q, n): the mean over the query heads that share a key-value head."""
        return self.weights.mean(2)


@dataclass(kw_only=True)
class Held:
    """What a layer holds, as a policy sees it.

    Attributes:
        layer: Decoder block.
        seen: Tokens of the document seen so far.
        slots: How many slots of a head may stay.
        positions: (batch, heads, n) int32; −1: dead.
        alive: (batch, heads, n) bool.
        protected: (batch, heads, n) bool.
        state: The policy's own (batch, heads, n) tensors by name; `observe` puts new ones in their place.
        memory: What the policy keeps beside its slots; the same.
        keys: Gives (batch, heads, n, head_dim) all keys.
        attention: Of the chunk just read; None where the policy needs none.
        documents: (batch,) int64.
        seed: Of the run.
    """

    layer: int
    seen: int
    slots: int
    positions: torch.Tensor
    alive: torch.Tensor
    protected: torch.Tensor
    state: dict[str, torch.Tensor]
    memory: dict[str, torch.Tensor]
    keys: Callable[[], torch.Tensor]
    attention: Attention | None
    documents: torch.Tensor
    seed: int

    @property
    def candidates(self) -> torch.Tensor:
        """(batch, heads, n) bool: alive and not protected."""
        return self.alive & ~self.protected

    @property
    def free(self) -> int:
        """Slots that are left to candidates, once the protected have theirs (the fewest of any head)."""
        return max(0, self.slots - int(self.protected.sum(-1).max()))

    def gumbel(self, draw: int = 0) -> torch.Tensor:
        """(batch, heads, n) the keys of the slots' tokens (`tasks.retention.hashing`)."""
        return gumbel_keys(
            self.positions, seed=self.seed, documents=self.documents, layer=self.layer, draw=draw
        )

    def require_attention(self) -> Attention:
        """The attention, which the layer hands to every policy that needs it."""
        assert self.attention is not None
        return self.attention


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Who stays in the cache.

    Attributes:
        name: What configurations and tables call it.
        needs_attention: Whether it must see attention weights; without, a fused kernel may compute the output.
        has_sinks: Whether the sinks' protection applies to it.
        evicts: Whether it ever does.
        needs_kinds: Whether it must know which tokens are function tokens.
        states: Names and types of what it keeps of each slot.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    has_sinks: ClassVar[bool] = True
    evicts: ClassVar[bool] = True
    needs_kinds: ClassVar[bool] = False
    states: ClassVar[Mapping[str, torch.dtype]] = {}

    @property
    def state_bytes(self) -> int:
        """Bytes of what it keeps of one slot, its position included."""
        return POSITION_BYTES + sum(dtype.itemsize for dtype in self.states.values())

    def memory_bytes(self, shape: CacheShape) -> int:
        """Bytes of what it keeps beside its slots, for one key-value head."""
        return 0

    def arrive(self, arrival: Arrival) -> dict[str, torch.Tensor]:
        """The state of new slots: (batch, heads, n) each, by name, of the types that `states` says."""
        return {}

    def observe(self, held: Held, attention: Attention) -> None:
        """See a chunk's attention and keep of it what is needed. Called once a chunk, before any eviction."""
        return

    @abstractmethod
    def score(self, held: Held) -> torch.Tensor:
        """(batch, heads, n) float: the higher, the rather kept. Only called where something must go."""

    def admits(self, held: Held) -> torch.Tensor | None:
        """(batch, heads, n) bool, who may stay at all where something must go; None: everybody."""
        return None

    def visible(
        self, queries: torch.Tensor, keys: torch.Tensor, slots: int, protection: Protection
    ) -> torch.Tensor | None:
        """What a query of a chunk would still find if tokens came one by one, where positions alone decide.

        With it a chunk gives exactly what steps of one token give.

        Args:
            queries: (q,) positions.
            keys: (batch, heads, n) positions.
            slots: Of a head.
            protection: In force.

        Returns:
            (batch, heads, q, n) bool; None: all.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keeps everything: what the others are held against."""

    name = "full"
    evicts = False

    def score(self, held: Held) -> torch.Tensor:
        """The later, the higher."""
        return held.positions.float()


@dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """Keeps the last tokens, and no sinks: perplexity explodes where a model needs them (Xiao et al. 2023)."""

    name = "window"
    has_sinks = False

    def score(self, held: Held) -> torch.Tensor:
        """The later, the higher."""
        return held.positions.float()

    def visible(
        self, queries: torch.Tensor, keys: torch.Tensor, slots: int, protection: Protection
    ) -> torch.Tensor:
        """Sinks, and the tokens that were last then."""
        sinks = protection.sinks
        keys = keys[..., None, :]
        return (keys < sinks) | (keys >= queries[:, None] - (slots - sinks))


@dataclass(frozen=True, kw_only=True)
class Streaming(Window):
    """Keeps sinks and the last tokens (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453), with true positions.

    The paper numbers positions anew within the cache; keys here are cached rotated and stay where they were.
    """

    name = "streaming"
    has_sinks = True


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keeps a uniform sample: the null hypothesis. After t tokens a token is there with probability B / t.

    Attributes:
        redraw: Draw anew at every eviction instead, which keeps a token n evictions long with (B / (B + 1))ⁿ:
            for the test that shows why a key is drawn once.
    """

    name = "random"
    redraw: bool = False

    def score(self, held: Held) -> torch.Tensor:
        """The key of the token."""
        return held.gumbel(draw=held.seen if self.redraw else 0)


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(Policy):
    """Keeps what received most attention so far, summed over queries and query heads (H2O, arXiv 2306.14048)."""

    name = "h2o"
    needs_attention = True
    states = {"received": torch.float32}  # noqa: RUF012

    def arrive(self, arrival: Arrival) -> dict[str, torch.Tensor]:
        """Nothing received yet."""
        return {"received": _zeros(arrival)}

    def observe(self, held: Held, attention: Attention) -> None:
        """Add up what each slot received."""
        held.state["received"] = held.state["received"] + attention.weights.sum((2, 3))

    def score(self, held: Held) -> torch.Tensor:
        """The sum so far."""
        return held.state["received"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keeps what the last queries attend to, smoothed over neighbours (SnapKV, arXiv 2404.14469).

    The last `window` queries are kept, and at an eviction attend once more to all that is there: their mean
    attention, averaged over `kernel` neighbouring slots, is the score. Slots of the window itself come first.

    Attributes:
        window: Queries.
        kernel: Slots, odd. Both defaults are kvpress's.
    """

    name = "snapkv"
    needs_attention = True
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(
                f"snapkv cannot have a window of {self.window} and a kernel of {self.kernel}",
                hint="both are 1 or more, and the kernel is odd",
            )

    def memory_bytes(self, shape: CacheShape) -> int:
        """The last queries."""
        return self.window * shape.groups * shape.head_dim * shape.dtype.itemsize

    def observe(self, held: Held, attention: Attention) -> None:
        """Keep the last queries."""
        queries = attention.queries
        if "queries" in held.memory:
            queries = torch.cat((held.memory["queries"], queries), dim=-2)
        held.memory["queries"] = queries[..., -self.window :, :].clone()

    def score(self, held: Held) -> torch.Tensor:
        """What the last queries attend to, smoothed."""
        attention, queries = held.require_attention(), held.memory["queries"]
        batch, heads, groups, n, dim = queries.shape
        logits = queries.reshape(batch, heads, groups * n, dim) @ held.keys().transpose(-1, -2)
        logits = logits.view(batch, heads, groups, n, -1).float() * attention.scaling
        if attention.softcap is not None:
            logits = torch.tanh(logits / attention.softcap) * attention.softcap
        own = torch.arange(held.seen - n, held.seen, device=logits.device)[:, None]
        positions = held.positions[:, :, None, None]
        weights = logits.masked_fill((positions > own) | (positions < 0), -torch.inf).softmax(-1)
        received = weights.mean((2, 3))
        in_window = held.positions >= held.seen - self.window
        received = torch.where(in_window, 0, received)
        # Neighbours are the next that live; the dead, whose attention is 0, go behind the last.
        order = (~held.alive).int().argsort(dim=-1, stable=True)
        smooth = torch.nn.functional.avg_pool1d(
            received.gather(-1, order), self.kernel, stride=1, padding=self.kernel // 2
        )
        smooth = torch.zeros_like(smooth).scatter(-1, order, smooth)
        return torch.where(in_window, smooth.amax(-1, keepdim=True) + 1, smooth)


@dataclass(frozen=True, kw_only=True)
class Tova(Policy):
    """Keeps what the last query attends to, the same tokens in all heads (TOVA, arXiv 2401.06104)."""

    name = "tova"
    needs_attention = True

    def score(self, held: Held) -> torch.Tensor:
        """What the last query attends to, the mean over all heads."""
        last = held.require_attention().weights[..., -1, :]
        return last.mean((1, 2))[:, None].expand(held.positions.shape)


@dataclass(frozen=True, kw_only=True)
class _KindFirst(Policy):
    """Keeps one kind first, and within a kind a uniform sample, so that age and position match `random`'s."""

    needs_kinds = True
    states = {"is_function": torch.bool}  # noqa: RUF012
    wants_function: ClassVar[bool]

    def arrive(self, arrival: Arrival) -> dict[str, torch.Tensor]:
        """Which kind each token is."""
        assert arrival.is_function is not None
        return {"is_function": arrival.per_head(arrival.is_function)}

    def score(self, held: Held) -> torch.Tensor:
        """The key of the token, and more than any key where it is of the wanted kind."""
        wanted = held.state["is_function"] == self.wants_function
        # Gumbel keys of 23 bits lie between −3 and 17.
        return held.gumbel() + 100.0 * wanted


@dataclass(frozen=True, kw_only=True)
class FunctionFirst(_KindFirst):
    """Keeps function tokens before content tokens."""

    name = "function"
    wants_function = True


@dataclass(frozen=True, kw_only=True)
class ContentFirst(_KindFirst):
    """Keeps content tokens before function tokens."""

    name = "content"
    wants_function = False


SIGNALS = ("received", "log_norm", "surprisal", "log_age")
"""What a gate sees of a token, each standardized among the candidates of its head."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Learned significance: s = w·E(t) + b in each layer and head (trained by `tasks.retention.gate`).

    Attributes:
        weights: (layers, heads, signals + 1) float32, the last one b; rows of layers that nobody trained are NaN.
    """

    weights: torch.Tensor

    def significance(self, layer: int, signals: torch.Tensor) -> torch.Tensor:
        """(batch, heads, n) of (batch, heads, n, signals)."""
        weights = self.weights[layer].to(signals.device)
        return (signals * weights[None, :, None, :-1]).sum(-1) + weights[None, :, None, -1]


@dataclass(frozen=True, kw_only=True)
class StructuredRetention(Policy):
    """STR (arXiv 2502.03102): a token's significance, read from its context, is its probability of being kept.

    The paper's formulas are known second-hand alone: p = σ(w·E(t) + b) with learned w, b, kept where
    p ≥ τ = mean(p) + λ·Var(p). What is soundest of it is the default here; the rest are options.

    Significance s = z(EMA of attention received) + z(log ‖value‖) + z(surprisal), z over the candidates of a head.
    Retention probability p = σ((s − τ) / T), τ solving Σp = budget. Selection: the B largest of s / T + Gumbel key,
    which is weighted reservoir sampling with odds p / (1 − p) (τ cancels), the key hashed once from the token.

    A token's surprisal is known once the token before it was read: that of a chunk's own tokens after the
    chunk. Until then its z is 0, the mean.

    Attributes:
        temperature: T; 0: the B most significant, no chance.
        decay: Of the EMA, for each query. Its start at 0 is corrected for (divided by 1 − decay^age).
        spread: λ of the second-hand threshold on p = σ(s): where something must go, what is below
            mean(p) + λ·Var(p) goes as well, so that less than the budget may be kept. None: no threshold.
        gate: Learned significance in place of the sum.
    """

    name = "str"
    needs_attention = True
    states = {  # noqa: RUF012
        "received": torch.float32,
        "log_norm": torch.float32,
        "surprisal": torch.float32,
    }
    temperature: float = 1.0
    decay: float = 0.99
    spread: float | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf") or not 0 < self.decay < 1:
            raise ConfigError(
                f"{self.name} cannot have a temperature of {self.temperature} and a decay of {self.decay}",
                hint="the temperature is 0 or more, and the decay between 0 and 1",
            )

    def arrive(self, arrival: Arrival) -> dict[str, torch.Tensor]:
        """Nothing received yet; the norm of the value; the surprisal as far as it is known."""
        return {
            "received": _zeros(arrival),
            "log_norm": (arrival.values.float().norm(dim=-1) + LEAST).log(),
            "surprisal": arrival.per_head(arrival.surprisal.float()),
        }

    def observe(self, held: Held, attention: Attention) -> None:
        """Let the EMA of attention received go on by the queries of a chunk, in their order."""
        n = attention.positions.shape[0]
        age = torch.arange(n - 1, -1, -1, device=attention.weights.device)
        fading = (1 - self.decay) * self.decay**age
        recent = (attention.by_head * fading[:, None]).sum(-2)
        held.state["received"] = self.decay**n * held.state["received"] + recent

    def signals(self, held: Held) -> torch.Tensor:
        """(batch, heads, n, signals) as `SIGNALS` names them."""
        age = (held.seen - held.positions).clamp(min=1).float()
        received = held.state["received"] / (1 - self.decay**age)
        surprisal, among = held.state["surprisal"], held.candidates
        signals = (
            standardized(received, among),
            standardized(held.state["log_norm"], among),
            standardized(surprisal, among, unknown=surprisal.isnan()),
            standardized(age.log(), among),
        )
        return torch.stack(signals, dim=-1)

    def significance(self, held: Held) -> torch.Tensor:
        """(batch, heads, n) s."""
        signals = self.signals(held)
        if self.gate is not None:
            return self.gate.significance(held.layer, signals)
        return signals[..., :3].sum(-1)

    def probabilities(self, held: Held) -> torch.Tensor:
        """(batch, heads, n) p of the candidates; they sum to the slots that are free for them."""
        return retention_probabilities(self.significance(held), held.candidates, held.free, self.temperature)

    def score(self, held: Held) -> torch.Tensor:
        """Significance and chance."""
        # s + T·G orders as s / T + G does, and needs no special case at T = 0.
        significance = self.significance(held)
        return significance + self.temperature * held.gumbel() if self.temperature else significance

    def admits(self, held: Held) -> torch.Tensor | None:
        """Who passes the second-hand threshold, where there is one."""
        if self.spread is None:
            return None
        among = held.candidates
        p = torch.sigmoid(self.significance(held))
        count = among.sum(-1, keepdim=True).clamp(min=1)
        mean = (p * among).sum(-1, keepdim=True) / count
        variance = ((p - mean).square() * among).sum(-1, keepdim=True) / count
        return p >= mean + self.spread * variance


@dataclass(frozen=True, kw_only=True)
class MemoryPaths(StructuredRetention):
    """CMP (arXiv 2502.03102): STR's ranks fill tiers within one budget of bytes (`tasks.retention.tiers`).

    Hot slots are exact; warm ones are integers, quantized once; what falls below them is cold where its value can be
    merged into the most similar surviving hot key, which then has a vote more, and else it is gone. Every layer
    re-assesses its tiers after each chunk.

    Attributes:
        hot_share: Of the bytes, for exact slots.
        bits: Of warm keys and values, 8 or 4.
        group: Tokens whose keys are quantized together.
        merge: Whether anything becomes cold.
        merge_similarity: Cosine that a key and its target have at least.
    """

    name = "cmp"
    hot_share: float = 0.5
    bits: int = 8
    group: int = 32
    merge: bool = True
    merge_similarity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (8, 4) or not 0 < self.hot_share <= 1 or self.group < 1:
            raise ConfigError(
                f"cmp cannot have bits = {self.bits}, hot_share = {self.hot_share} and group = {self.group}",
                hint="bits are 8 or 4, the share is above 0 and at most 1, and a group has a token or more",
            )
        if self.spread is not None:
            raise ConfigError("cmp fills its tiers by rank and takes no threshold", hint="leave out spread")

    @property
    def state_bytes(self) -> int:
        """Bytes of what it keeps of one slot: its vote too, where anything is merged."""
        return super().state_bytes + 4 * self.merge


_KINDS: tuple[type[Policy], ...] = (
    Full,
    Window,
    Streaming,
    Random,
    HeavyHitters,
    SnapKV,
    Tova,
    FunctionFirst,
    ContentFirst,
    StructuredRetention,
    MemoryPaths,
)

POLICIES: Mapping[str, type[Policy]] = {kind.name: kind for kind in _KINDS}
"""All policies by name."""


def policy_named(name: str, **options: Any) -> Policy:
    """A policy with its options.

    Raises:
        ConfigError: if there is no such policy, it has no such option, or cannot have such a value.
    """
    if name not in POLICIES:
        raise ConfigError(f"there is no policy {name!r}", hint=f"choose one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    known = [option.name for option in fields(kind)]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(
            f"the policy {name} has no option {unknown[0]!r}",
            hint=f"it has {', '.join(known)}" if known else "it has none",
        )
    return kind(**options)


def _zeros(arrival: Arrival) -> torch.Tensor:
    return torch.zeros(arrival.keys.shape[:3], dtype=torch.float32, device=arrival.keys.device)
