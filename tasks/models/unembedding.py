"""From the residual stream to the vocabulary: a model's final norm and its head, without its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from infra.storage import Storage
from schemas.config import Model
from schemas.errors import ModelError
from tasks.models.devices import prepared_device, settle_dtype
from tasks.models.loading import load_ends


@dataclass(frozen=True, kw_only=True)
class Unembedding:
    """What a direction of the residual stream does to the logits, up to the scale that a context gives it.

    This is the logit lens with the final norm folded in: its weight is kept, its division by the length of the whole
    residual is not, nor are biases, scaling and soft capping of the logits, which are the same for every direction.

    Attributes:
        weight: (vocabulary, d_model) float32, the head.
        gain: (d_model,) float32, what the final norm multiplies with (Gemma's 1 + weight).
        centres: Whether the norm takes away the mean first, as a LayerNorm does.
    """

    weight: torch.Tensor
    gain: torch.Tensor
    centres: bool

    def logits(self, directions: torch.Tensor) -> torch.Tensor:
        """(n, d_model) directions, on any device, to (n, vocabulary) logits on the head's."""
        directions = directions.to(self.weight)
        if self.centres:
            directions = directions - directions.mean(-1, keepdim=True)
        return (directions * self.gain) @ self.weight.T


@torch.inference_mode()
def load_unembedding(model: Model, storage: Storage) -> Unembedding:
    """A model's final norm and head, on its device; no block is read.

    Raises:
        ModelError: if it has no head, or no final norm, or they cannot be loaded.
    """
    device, dtype = prepared_device(model), settle_dtype(model, storage)
    module = load_ends(model, storage, dtype)
    norm, head = final_norm(module, model.name), module.get_output_embeddings()
    weight = head.weight.to(device, torch.float32)
    # Signs of mean 0 and variance 1, which every norm only multiplies with its weight (and adds its bias).
    signs = torch.ones(weight.shape[1], dtype=torch.float32)
    signs[1::2] = -1
    norm = norm.float()
    gain = signs * (norm(signs) - norm(-signs)) / 2
    ones = torch.ones_like(signs)
    return Unembedding(weight=weight, gain=gain.to(device), centres=torch.equal(norm(ones), norm(-ones)))


def final_norm(module: Any, name: str) -> torch.nn.Module:
    """The norm between the last block and the head of a causal model.

    Raises:
        ModelError: if the model has no head, or no such norm.
    """
    if module.get_output_embeddings() is None:
        raise ModelError(
            f"model {name}: {type(module).__name__} has no head, so features promote no tokens",
            hint="set features.logits = false",
        )
    children = module.get_decoder().named_children()
    norms = [child for _, child in children if "norm" in type(child).__name__.lower()]
    if not norms:
        raise ModelError(
            f"model {name}: found no final norm in {type(module).__name__}, which features.logits folds in",
            hint="set features.logits = false",
        )
    last: torch.nn.Module = norms[-1]
    return last
