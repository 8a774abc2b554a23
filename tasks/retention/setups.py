"""What the configuration asks for, as settings of readings; and what can be refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, about
from schemas.retention.section import FULL, PolicyOptions, Retention, retention_of
from schemas.retention.work import Setup
from tasks.dictionaries.facts import Facts
from tasks.models.devices import resolve_dtype
from tasks.models.language_model import LanguageModel
from tasks.models.loading import model_outline
from tasks.models.model import context_length
from tasks.retention.attention import cache_shape
from tasks.retention.budgets import Budget, CacheShape, Protection
from tasks.retention.policies import SIGNALS, Full, Gate, Policy, policy_named
from tasks.retention.running import Prefill, Protocol, Settings, Stream, new_cache


def policy_of(section: Retention, name: str, gate: Gate | None = None) -> Policy:
    """A policy by the name that the configuration gives it.

    Args:
        section: The section.
        name: One of `retention.policies`, or `full`.
        gate: What its learned gate is, where it has one.

    Raises:
        ConfigError: if there is no such policy, or an option is not one of its own.
    """
    if name == FULL:
        return Full()
    options = section.options.get(name, PolicyOptions())
    given = dict(options.given)
    if options.gate:
        given["gate"] = gate
    return policy_named(options.policy or name, **given)


def has_gate(section: Retention, name: str) -> bool:
    """Whether a policy has a learned gate."""
    return name in section.options and section.options[name].gate


def budget_of(section: Retention, share: float) -> Budget:
    """A budget of the section's kind."""
    return Budget(token_share=share) if section.budget_of == "tokens" else Budget(byte_share=share)


def protection_of(section: Retention) -> Protection:
    """What no policy evicts."""
    return Protection(sinks=section.sinks, recent=section.recent)


def setups(section: Retention) -> list[Setup]:
    """All that is read, in the configuration's order; the full cache first, under each protocol."""
    found = []
    for entry in section.sequences:
        for protocol in entry.protocols or section.protocols:
            found.append(Setup(policy=FULL, budget=1.0, protocol=protocol, length=entry.length))
            found += [
                Setup(policy=name, budget=budget, protocol=protocol, length=entry.length)
                for name in section.policies
                if entry.policies is None or name in entry.policies
                for budget in entry.budgets or section.budgets
            ]
    return found


def settings_of(section: Retention, setup: Setup, gate: Gate | None = None) -> Settings:
    """How a setup is read.

    Raises:
        ConfigError: as `policy_of`.
    """
    protocol: Protocol = Stream(chunk=section.chunk)
    if setup.protocol == "prefill":
        protocol = Prefill(prompt=section.prompt_of(setup.length), chunk=section.chunk)
    return Settings(
        policy=policy_of(section, setup.policy, gate),
        budget=None if setup.policy == FULL else budget_of(section, setup.budget),
        protocol=protocol,
        protection=protection_of(section),
        seed=section.seed,
    )


def policy_key(section: Retention, name: str, gate_folder: str | None) -> dict[str, Any]:
    """What determines a policy: which it is, its options as they are given, and the gate it has."""
    options = section.options.get(name, PolicyOptions())
    return {
        "policy": options.policy or name,
        "options": dict(options.given),
        "gate": gate_folder if options.gate else None,
    }


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """What of a model can be known without its weights, as `new_cache` asks for it."""

    module: Any
    name: str
    context_length: int | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def check_fit(config: Config, storage: Storage, known: Mapping[int, Facts]) -> None:
    """Refuse, before any work, what cannot be read.

    Args:
        config: The configuration.
        storage: Where converted models are.
        known: Of the dictionaries; retention reads none.

    Raises:
        ConfigError: if a policy or option is not known, or a budget has no room for what is protected.
        ModelError: if the model's attention is not known to fit, or sequences are longer than its positions.
    """
    section = retention_of(config)
    with about(stage="retention"):
        for name in section.policies:
            policy_of(section, name, _no_gate() if has_gate(section, name) else None)
        outline = _outline(config, storage)
        for setup in setups(section):
            refuse_unfit(outline, section, setup, "retention.sequences")
        if section.speed is not None:
            for setup in speed_setups(section):
                before = setup.length - decoded_tokens(section.speed.tokens, section.speed.turns)
                if before < 1:
                    raise ConfigError(
                        f"retention.speed decodes {setup.length - before:,} tokens, which leaves none of "
                        f"{setup.length:,} to come before",
                        hint="lower its tokens or turns, or raise its lengths",
                    )
                reading = Prefill(prompt=before, chunk=1)
                refuse_unfit(outline, section, setup, "retention.speed.lengths", reading)
        if section.retrieval is not None:
            for setup in retrieval_setups(section):
                refuse_unfit(outline, section, setup, "retention.retrieval.lengths")


def speed_setups(section: Retention) -> list[Setup]:
    """What is timed; `length` are the tokens that there are when decoding ends."""
    assert section.speed is not None
    return [
        Setup(policy=name, budget=budget, protocol="stream", length=length)
        for length in section.speed.lengths
        for name in section.speed.policies
        for budget in section.speed.budgets
    ]


def retrieval_setups(section: Retention) -> list[Setup]:
    """Under what contexts are read before they are asked about; the full cache first, at each length."""
    asked = section.retrieval
    assert asked is not None
    return [
        Setup(policy=name, budget=budget, protocol="stream", length=length)
        for length in asked.lengths
        for name in (
            FULL,
            *(name for name in section.policies if name in (asked.policies or section.policies)),
        )
        for budget in ((1.0,) if name == FULL else asked.budgets or section.budgets)
    ]


def decoded_tokens(tokens: int, turns: int) -> int:
    """Tokens that each cache decodes where its speed is measured: a turn more than count."""
    return tokens * (turns + 1)


def refuse_unfit(
    outline: LanguageModel, section: Retention, setup: Setup, place: str, protocol: Protocol | None = None
) -> None:
    """Whether a setup, which the configuration has at `place`, can be read; an outline of the model is enough.

    Raises:
        ConfigError: if not.
        ModelError: the same, of the model.
    """
    gate = _no_gate() if has_gate(section, setup.policy) else None
    settings = settings_of(section, setup, gate)
    if protocol is not None:
        settings = replace(settings, protocol=protocol)
    with about(f"{place}: {setup.policy} at {setup.budget:g}, {setup.length:,} tokens"):
        new_cache(outline, settings, setup.length, torch.zeros(1, dtype=torch.int64))


def shape_of(config: Config, storage: Storage) -> CacheShape:
    """What of the model decides about its cache, without reading a weight.

    Raises:
        ModelError: if its attention is not known to fit.
    """
    outline = _outline(config, storage)
    return cache_shape(outline.module, outline.name)[0]


def _outline(config: Config, storage: Storage) -> LanguageModel:
    module = model_outline(config.model, storage, with_head=True).to(resolve_dtype(config.model, storage))
    outline = _Outline(
        module=module, name=config.model.name, context_length=context_length(config.model, storage)
    )
    return cast("LanguageModel", outline)


def _no_gate() -> Gate:
    return Gate(weights=torch.full((1, 1, len(SIGNALS) + 1), torch.nan))
