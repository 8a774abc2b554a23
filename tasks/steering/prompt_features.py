"""The residual stream and the features of single prompts (PAPER 1.3).

A prompt is a forward of its own: in a batch, padding and another shape of the products would round differently, and a
feature at its threshold would depend on the prompt's neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from infra.storage import Storage
from schemas.errors import ModelError
from schemas.work import Dictionary
from tasks.dictionaries.dictionaries import load_dictionary
from tasks.dictionaries.encoding import Encoder, build_encoder
from tasks.models.model import LoadedModel


def residuals_of(model: LoadedModel, ids: Sequence[int], layers: Iterable[int]) -> dict[int, torch.Tensor]:
    """The residual stream after each of some decoder blocks, at every position of one prompt.

    Args:
        model: The decoder.
        ids: The prompt's token ids, BOS and the chat template's included.
        layers: Decoder blocks, counted from 0.

    Returns:
        (n_tokens, d_model) float32 of each layer, on the model's device.

    Raises:
        ModelError: if the prompt is empty, longer than the model's context or has ids outside its vocabulary, there is
            no such block, or a residual is not finite.
    """
    wanted = sorted(set(layers))
    _check(model, ids, wanted)
    found: dict[int, torch.Tensor] = {}

    def receive(layer: int, hidden: torch.Tensor) -> None:
        # A copy: what comes after the block may change its output in place.
        found[layer] = hidden[0].to(torch.float32, copy=True)

    if wanted:
        model.forward(torch.tensor([list(ids)]), wanted, receive)
    for layer in wanted:
        if not bool(torch.isfinite(found[layer]).all()):
            raise ModelError(
                f"layer {layer}: the residual stream of a prompt is not finite",
                hint="try model.dtype = 'float32'",
            )
    return found


def load_encoders(
    storage: Storage, dictionaries: Sequence[Dictionary], device: torch.device
) -> dict[int, Encoder]:
    """Every dictionary's own encoder on a device, by layer; the SAE itself is the encoder's `sae`.

    Raises:
        DictionaryError: if a dictionary's files no longer load.
    """
    return {
        entry.layer: build_encoder(load_dictionary(storage, entry, device), device) for entry in dictionaries
    }


def _check(model: LoadedModel, ids: Sequence[int], layers: Sequence[int]) -> None:
    if not ids:
        raise ModelError("a prompt has no token", hint="give it text")
    if model.context_length is not None and len(ids) > model.context_length:
        raise ModelError(
            f"a prompt of {len(ids)} tokens is longer than the model was built for ({model.context_length})",
            hint="shorten it",
        )
    for layer in layers:
        if not 0 <= layer < model.n_layers:
            raise ModelError(f"the model has no block {layer}: it has {model.n_layers}")
