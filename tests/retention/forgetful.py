"""Tiny models that read with a cache that forgets, and what plain code says about their attention."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tasks.models.language_model import LanguageModel
from tasks.retention.budgets import Budget, Protection
from tasks.retention.policies import POLICIES, Policy, policy_named
from tasks.retention.running import Protocol, Reading, Settings, Stream, read, run

ARCHITECTURES = ("llama", "gemma2", "gemma3", "gpt_neox")
VOCABULARY, LENGTH, POSITIONS = 300, 96, 128
PROTECTION = Protection(sinks=2, recent=4)
FUNCTION = torch.arange(VOCABULARY) % 3 == 0


def model(architecture: str = "llama") -> LanguageModel:
    """A random three-block model whose attention is far from uniform; the same one each time."""
    return _model(architecture)


@functools.cache
def _model(architecture: str) -> LanguageModel:
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        Gemma3TextConfig,
        GPTNeoXConfig,
        LlamaConfig,
    )

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    gemma = {**shape, **grouped, "query_pre_attn_scalar": 8, "sliding_window": 16}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = {
        "llama": lambda: LlamaConfig(**shape, **grouped),
        # At Gemma's own cap of 50 the attention of a random model is the same without it.
        "gemma2": lambda: Gemma2Config(**gemma, layer_types=kinds, attn_logit_softcapping=2.0),
        "gemma3": lambda: Gemma3TextConfig(**gemma, layer_types=kinds),
        "gpt_neox": lambda: GPTNeoXConfig(**shape),
    }[architecture]()
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return LanguageModel(module.eval().requires_grad_(False), architecture, POSITIONS)


def ids(rows: int = 1, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """(rows, length) token ids."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def policy(name: str, **options: Any) -> Policy:
    """A policy of a size that fits the models here."""
    small = {"snapkv": {"window": 8}, "cmp": {"group": 4}}.get(name, {})
    return policy_named(name, **{**small, **options})


def settings(
    policy: Policy, share: float = 0.25, protocol: Protocol | None = None, **options: Any
) -> Settings:
    """With a budget that is a share of tokens, streaming in chunks of 8 by default."""
    budget = options.pop("budget", Budget(token_share=share))
    protocol = Stream(chunk=8) if protocol is None else protocol
    return Settings(policy=policy, budget=budget, protocol=protocol, **{"protection": PROTECTION, **options})


def reading(
    policy: Policy, architecture: str = "llama", rows: int = 1, documents: Any = None, **options: Any
) -> Reading:
    """A whole reading of `ids(rows)`."""
    how = settings(policy, **options)
    return run(model(architecture), ids(rows), how, documents=documents, function_tokens=FUNCTION)


def logits(policy: Policy, architecture: str = "llama", rows: int = 1, **options: Any) -> torch.Tensor:
    """(rows, length, vocabulary) all logits."""
    steps = read(model(architecture), ids(rows), settings(policy, **options), function_tokens=FUNCTION)
    return torch.cat([step.logits for step in steps], dim=1)


def share_of(name: str, share: float = 0.25) -> float:
    """More for the policy whose hot tier has half of it."""
    return 2 * share if name == "cmp" else share


@functools.cache
def attentions(architecture: str = "llama", rows: int = 1) -> list[torch.Tensor]:
    """Of each block (rows, query heads, length, length) the attention weights of transformers' own eager function."""
    module = model(architecture).module
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.no_grad():
        found = module(input_ids=ids(rows), output_attentions=True, use_cache=False).attentions
    module.set_attn_implementation(before)
    return list(found)


EVICTING = tuple(name for name in POLICIES if name != "full")
