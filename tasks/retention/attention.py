"""The attention function that a forgetting cache needs, and the models that it can serve.

transformers calls it in place of its own (`AttentionInterface`). Nothing builds a mask for it: what a query may see
follows from positions alone, for keys of which any may be missing. Output and weights are computed as transformers'
`eager` does (softmax in float32); where a policy needs no weights, a fused kernel may compute the output instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from schemas.errors import ModelError
from tasks.models.model import text_config
from tasks.retention.budgets import CacheShape
from tasks.retention.cache import RetentionCache, RetentionLayer
from tasks.retention.policies import Attention

NAME = "retention"
"""What transformers knows the function by."""

ARCHITECTURES = ("llama", "gemma2", "gemma3", "gemma3_text", "gpt_neox")
"""`model_type` of the configurations whose attention is known to fit."""


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    retention: RetentionCache | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to what the cache holds, then let it evict.

    Args:
        module: The model's attention module.
        query: (batch, query heads, q, head_dim), rotated.
        key: (batch, key-value heads, n, head_dim), as the cache gave them.
        value: As `key`.
        attention_mask: Unused: positions say it all, and sequences are not padded.
        scaling: Of the logits; None: 1 / √head_dim.
        softcap: logits ← softcap · tanh(logits / softcap) (Gemma-2).
        retention: The cache, handed through the model's forward.

    Returns:
        (batch, q, query heads, head_dim), and None in place of the weights.
    """
    assert retention is not None, "a model prepared by `forgetting` is called with retention=cache"
    layer = retention.layers[module.layer_idx]
    batch, query_heads, q, dim = query.shape
    heads, n = key.shape[1], key.shape[2]
    groups = query_heads // heads
    scaling = dim**-0.5 if scaling is None else scaling
    governed = isinstance(layer, RetentionLayer)
    hidden = layer.hides(q) if governed else _outside_window(layer, q, n, key.device)
    bonus = layer.logit_bonus() if governed else None
    grouped = query.reshape(batch, heads, groups * q, dim)
    if retention.fused and softcap is None and bonus is None and not retention.needs_weights:
        seen = None if hidden is None else ~hidden.repeat(1, 1, groups, 1)
        output = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=seen, scale=scaling
        )
        if governed:
            retention.attended(layer, None)
    else:
        # In place: each copy would be one more pass over all queries and keys.
        logits = (grouped @ key.transpose(-1, -2)).mul_(scaling).view(batch, heads, groups, q, n)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if bonus is not None:
            logits = logits + bonus[:, :, None, None]
        if hidden is not None:
            logits.masked_fill_(hidden[:, :, None], -torch.inf)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
        output = weights.to(query.dtype).view(batch, heads, groups * q, n) @ value
        if governed:
            own = torch.arange(layer.seen - q, layer.seen, device=key.device)
            seen_by = Attention(
                weights=weights,
                queries=query.view(batch, heads, groups, q, dim),
                positions=own,
                scaling=scaling,
                softcap=softcap,
            )
            retention.attended(layer, seen_by)
    output = output.view(batch, query_heads, q, dim).transpose(1, 2).contiguous()
    return output, None


def _outside_window(layer: Any, queries: int, n: int, device: torch.device) -> torch.Tensor | None:
    """(1, 1, q, n) bool: what queries of a sliding layer do not see; its keys are the last n tokens."""
    last, window = int(layer.cumulative_length), int(layer.sliding_window)
    keys = torch.arange(last - n, last, device=device)
    own = torch.arange(last - queries, last, device=device)[:, None]
    outside = (keys > own) | (keys <= own - window)
    return outside[None, None]


def cache_shape(module: Any, name: str) -> tuple[CacheShape, list[int | None]]:
    """What of a model decides about its cache, and the window of each block (None: it attends to everything).

    Args:
        module: The transformers model.
        name: What errors call it.

    Raises:
        ModelError: if its attention cannot be replaced, reads both ways, or is not known to fit.
    """
    config = text_config(module.config)
    kind = str(config.model_type)
    if kind not in ARCHITECTURES or not getattr(module, "_supports_attention_backend", False):
        raise ModelError(
            f"model {name}: the attention of {type(module).__name__} ({kind}) is not known to work with a cache that "
            "evicts",
            hint=f"retention works with {', '.join(ARCHITECTURES)}",
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"model {name} reads both ways", hint="retention needs a decoder")
    n_layers, query_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or query_heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * n_layers
    sliding = [int(config.sliding_window) if kind == "sliding_attention" else None for kind in kinds]
    governed = tuple(layer for layer, window in enumerate(sliding) if window is None)
    if not governed:
        raise ModelError(
            f"model {name}: all its layers slide, and none is left for a policy to govern",
            hint="choose a model some of whose layers attend to everything",
        )
    shape = CacheShape(
        layers=governed,
        heads=heads,
        groups=query_heads // heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // query_heads),
        dtype=module.get_input_embeddings().weight.dtype,
    )
    return shape, sliding


@contextmanager
def forgetting(module: Any) -> Iterator[None]:
    """Within the block the model's attention is `attend`: call it with `past_key_values=cache, retention=cache`.

    Args:
        module: The transformers model, of a kind that `cache_shape` accepts.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = text_config(module.config)._attn_implementation
    module.set_attn_implementation(NAME)
    try:
        yield
    finally:
        module.set_attn_implementation(before)
