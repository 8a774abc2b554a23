"""The model that is trained, its loss, and its optimizer.

The loss of a whole row of logits costs more memory than all the rest of a small model: it is taken in chunks
of tokens, and the gradient with it, so that no more logits exist at once and none is computed twice (as Liger's
fused linear cross-entropy does on GPUs). On two cores (256 wide, 4,096 tokens, 8,192 a forward) head and loss took
0.28 s so and 0.44 s through `F.cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch

from schemas.pretraining.section import Pretraining, Shape
from tasks.models.files import constructed_alone
from tasks.models.tokenizers import LoadedTokenizer
from tasks.pretraining.plan import TrainingPlan

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once."""

_INITIAL_DEVIATION = 0.02


def build_model(plan: TrainingPlan, tokenizer: LoadedTokenizer) -> Any:
    """A `LlamaForCausalLM` of the plan's shape, in float32 on the CPU, initialized from torch's global seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = plan.shape
    config = LlamaConfig(
        vocab_size=tokenizer.highest_id + 1,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size or default_intermediate_size(shape),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        max_position_embeddings=plan.context_size,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tie_embeddings,
        initializer_range=_INITIAL_DEVIATION,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.tokenizer.eos_token_id,
        # transformers would fix the padding token's embedding at zero, and it may be BOS.
        pad_token_id=None,
        # Only this implementation takes packed batches of several rows by their position ids.
        attn_implementation="sdpa",
    )
    with constructed_alone():
        module = LlamaForCausalLM(config)
    module.generation_config.pad_token_id = tokenizer.pad_id
    return module


def default_intermediate_size(shape: Shape) -> int:
    """8/3 of the width, rounded up to a multiple of 32."""
    return -(-8 * shape.hidden_size // (3 * 32)) * 32


def count_parameters(module: torch.nn.Module) -> int:
    """Numbers in the weights, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


class PackedLanguageModel(torch.nn.Module):
    """A causal language model whose forward gives the summed loss of packed rows.

    Args:
        causal: The transformers model.
        autocast: What its forward and backward run in; None: as they are.
    """

    def __init__(self, causal: Any, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.causal, self._autocast = causal, autocast

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The cross-entropy in nats, summed over all positions, float32; arguments are (rows, tokens)."""
        kind = input_ids.device.type
        with torch.autocast(kind, dtype=self._autocast, enabled=self._autocast is not None):
            hidden = self.causal.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        arguments = (hidden.flatten(0, 1), self.causal.lm_head.weight, labels.flatten(), self._autocast)
        loss: torch.Tensor = _SummedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy, summed over tokens, whose gradients are computed with the loss, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None
    ) -> torch.Tensor:
        """hidden (n, width), weight (vocabulary, width), labels (n,); products in `dtype`, sums in float32."""
        dtype = dtype or weight.dtype
        head = weight.to(dtype)
        hidden_gradient = torch.empty_like(hidden)
        # A sharded model gives its weight in bfloat16, which is too coarse to add many chunks in.
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(first, first + CHUNK_TOKENS)
            inputs, targets = hidden[chunk].to(dtype), labels[chunk, None]
            logits = (inputs @ head.T).float()
            normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (normalizer - logits.gather(1, targets)).sum()
            # d loss / d logits = softmax - one-hot, in the place of the logits.
            gradient = logits.sub_(normalizer).exp_()
            gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
            gradient = gradient.to(dtype)
            hidden_gradient[chunk] = gradient @ head
            if dtype == weight_gradient.dtype:
                weight_gradient.addmm_(gradient.T, inputs)
            else:
                weight_gradient += gradient.T @ inputs
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        """The gradients of the forward, scaled; in place, as a backward runs once."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient.mul_(outputs[0]), weight_gradient.mul_(outputs[0]), None, None


def make_optimizer(model: torch.nn.Module, train: Pretraining) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices (embeddings among them), none on norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.beta1, train.beta2), fused=True)
