"""The section of the configuration for retention: which tokens a model must keep (PAPER 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from schemas.errors import ConfigError
from schemas.sections import ExperimentSection, Section

if TYPE_CHECKING:
    from schemas.config import Config, SpineConfig

FULL = "full"
"""The policy that evicts nothing: always read, never listed."""

Share = float
ProtocolName = Literal["stream", "prefill"]

_POLICIES = ("window", "streaming", "random", "h2o", "snapkv", "tova", "function", "content", "str", "cmp")


class PolicyOptions(Section):
    """A policy under a name of its own: which one, and what of its options differs."""

    policy: str = Field("", description="Whose options these are; empty: the policy of that name.")
    window: PositiveInt | None = Field(None, description="snapkv: last queries that are kept.")
    kernel: PositiveInt | None = Field(None, description="snapkv: neighbours that are smoothed over, odd.")
    temperature: float | None = Field(None, ge=0, description="str, cmp: T; 0: no chance.")
    decay: float | None = Field(None, gt=0, lt=1, description="str, cmp: of the EMA of attention received.")
    spread: float | None = Field(None, description="str: λ of the threshold mean(p) + λ·Var(p).")
    gate: bool = Field(
        False, description="str, cmp: learned significance, from documents nobody is measured on."
    )
    hot_share: float | None = Field(None, gt=0, le=1, description="cmp: of the bytes, for exact slots.")
    bits: Literal[4, 8] | None = Field(None, description="cmp: of warm keys and values.")
    group: PositiveInt | None = Field(None, description="cmp: tokens whose keys are quantized together.")
    merge: bool | None = Field(None, description="cmp: whether values are merged into surviving keys.")
    merge_similarity: float | None = Field(
        None, ge=-1, le=1, description="cmp: cosine that a merge needs at least."
    )

    @property
    def given(self) -> Mapping[str, Any]:
        """What was set, by the policy's names of it; the gate, which is trained first, is not among them."""
        return self.model_dump(exclude={"policy", "gate"}, exclude_none=True)


class Sequences(Section):
    """Sequences of one length."""

    length: int = Field(ge=16, description="Tokens, BOS included.")
    documents: PositiveInt = Field(description="How many sequences at most.")
    policies: list[str] | None = Field(None, description="Policies that read them; none: all.")
    budgets: list[Share] | None = Field(None, description="Budgets at which they are read; none: all.")
    protocols: list[ProtocolName] | None = Field(None, description="Protocols; none: all.")


class Speed(Section):
    """How fast tokens are decoded, against the full cache in alternation."""

    policies: list[str] = Field(["streaming", "h2o", "str", "cmp"], description="Whose speed.")
    budgets: list[Share] = Field([0.25], description="At which budgets.")
    lengths: list[PositiveInt] = Field([2048, 8192], description="Tokens that there are when decoding ends.")
    tokens: PositiveInt = Field(16, description="Tokens that are decoded in a turn.")
    turns: PositiveInt = Field(5, description="Turns of each cache; one more warms up.")


class Retrieval(Section):
    """Prompts that ask for something said long before (generated from the seed)."""

    tasks: list[Literal["passkey", "multi_key", "variable_tracking"]] = Field(
        ["passkey", "multi_key", "variable_tracking"], min_length=1, description="Which."
    )
    lengths: list[PositiveInt] = Field([1024], min_length=1, description="Tokens of a prompt.")
    depths: list[float] = Field(
        [0.1, 0.5, 0.9], min_length=1, description="Where in the prompt the needle is, from 0 to 1."
    )
    n: PositiveInt = Field(8, description="Prompts of each task, length and depth.")
    policies: list[str] | None = Field(None, description="Policies; none: all.")
    budgets: list[Share] | None = Field(None, description="Budgets; none: all.")


class Retention(ExperimentSection):
    """Reading held-out text with a cache that forgets, under every policy and budget (PAPER 2)."""

    policies: list[str] = Field(
        list(_POLICIES),
        min_length=1,
        description="Who stays in the cache; `full`, which they are held against, is always read. Names of `options` "
        "too.",
    )
    options: dict[str, PolicyOptions] = Field(
        default_factory=dict, description="Options of policies, by the name that tables call them."
    )
    budgets: list[Share] = Field(
        [0.125, 0.25, 0.5], min_length=1, description="Shares of the full cache that are kept."
    )
    budget_of: Literal["tokens", "bytes"] = Field(
        "tokens",
        description="What budgets are shares of: tokens (a policy with tiers gets the bytes of so many), or bytes, "
        "where all that a policy remembers counts.",
    )
    protocols: list[ProtocolName] = Field(
        ["stream"],
        min_length=1,
        description="stream: the budget holds after every chunk. prefill: the prompt is read exactly, compressed once, "
        "and what follows is read on top.",
    )
    prompt_share: float = Field(0.5, gt=0, lt=1, description="prefill: of a sequence, rounded to chunks.")
    chunk: PositiveInt = Field(64, description="Tokens of a forward; 1 is the reference.")
    sequences: list[Sequences] = Field(
        [Sequences(length=2048, documents=16)], min_length=1, description="What is read, an entry a length."
    )
    heldout_share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Share of the documents, by a hash of their tokens, that no training here sees; these are read.",
    )
    sinks: NonNegativeInt = Field(4, description="First tokens of a sequence that no policy evicts.")
    recent: NonNegativeInt = Field(32, description="Last tokens that no policy evicts.")
    seed: NonNegativeInt = Field(0, description="Of the random keys of tokens.")
    layers_every: PositiveInt = Field(
        1, description="Layers are looked into in every n-th chunk: local errors cost as much as reading."
    )
    at_once: PositiveInt = Field(
        16, description="Caches that read in lockstep with one full run, at most: all lie in memory."
    )
    gate_sequences: PositiveInt = Field(
        8, description="Sequences, none of them held out, that a gate is trained on."
    )
    gate_length: int = Field(1024, ge=16, description="Tokens of each.")
    resamples: PositiveInt = Field(2000, description="Bootstrap resamples of the sequences.")
    speed: Speed | None = Field(None, description="Speed; none: not measured.")
    retrieval: Retrieval | None = Field(None, description="Retrieval; none: not measured.")

    @model_validator(mode="after")
    def _consistent(self) -> Retention:
        names = list(self.policies)
        if FULL in names or FULL in self.options:
            raise ValueError("retention: full is always read, and has no options: leave it out")
        _require_distinct("retention.policies", names)
        if unread := sorted(set(self.options) - {*names, *_POLICIES}):
            raise ValueError(f"retention.options names {unread[0]!r}, which retention.policies does not have")
        if self.trains_gate and self.heldout_share == 1:
            raise ValueError(
                "retention: a gate is trained on documents that heldout_share = 1 leaves none of"
            )
        lengths = [entry.length for entry in self.sequences]
        _require_distinct("lengths of retention.sequences", lengths)
        parts: list[tuple[str, list[str] | None, list[float] | None]] = [
            (f"retention.sequences of {entry.length} tokens", entry.policies, entry.budgets)
            for entry in self.sequences
        ]
        parts.append(("retention", None, self.budgets))
        if self.speed is not None:
            parts.append(("retention.speed", self.speed.policies, self.speed.budgets))
        if self.retrieval is not None:
            parts.append(("retention.retrieval", self.retrieval.policies, self.retrieval.budgets))
        for what, policies, budgets in parts:
            if unknown := sorted({*(policies or ())} - set(names)):
                raise ValueError(f"{what} names {unknown[0]!r}, which retention.policies does not have")
            if any(not 0 < budget <= 1 for budget in budgets or ()):
                raise ValueError(f"{what}: a budget is a share above 0 and at most 1, not {budgets}")
            _require_distinct(f"budgets of {what}", budgets or [])
        if self.retrieval is not None and any(not 0 <= depth <= 1 for depth in self.retrieval.depths):
            raise ValueError(f"retention.retrieval.depths are from 0 to 1, not {self.retrieval.depths}")
        for entry in self.sequences:
            if "prefill" in (entry.protocols or self.protocols) and not (
                self.chunk <= self.prompt_of(entry.length) < entry.length
            ):
                raise ValueError(
                    f"retention: sequences of {entry.length} tokens have no prompt of whole chunks of {self.chunk}"
                )
        return self

    def check_against(self, config: SpineConfig) -> None:
        """Whether there is a model, and its tokens are kept.

        Raises:
            ValueError: if not.
        """
        if not config.corpus.keep_occurrences:
            raise ValueError("retention needs corpus.keep_occurrences = true")
        if not config.model.name:
            raise ValueError("retention reads with a model: give model.name")

    def prompt_of(self, length: int) -> int:
        """Tokens of the prompt of a sequence, under `prefill`: whole chunks."""
        return round(self.prompt_share * length / self.chunk) * self.chunk

    @property
    def trains_gate(self) -> bool:
        """Whether any policy has a learned gate."""
        return any(self.options[name].gate for name in self.policies if name in self.options)

    @property
    def held_out(self) -> float:
        """The documents that are read."""
        return self.heldout_share

    @property
    def needs_head(self) -> bool:
        """Always: what is measured are predictions."""
        return True


def _require_distinct(what: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{what} are not all different: {values}")


def retention_of(config: Config, stage: str = "") -> Retention:
    """The section `retention`.

    Raises:
        ConfigError: in that stage, if the configuration has none.
    """
    section = config.section(Retention)
    if section is None:
        raise ConfigError(
            "this configuration has no retention section",
            stage=stage,
            hint="configs/retention.toml shows one",
        )
    return section
