"""Features of a dictionary as directions of the residual stream (PAPER 1.3).

The decoder's direction is what a feature writes, the encoder's what reads it; they are not the same, and those of
different features overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from schemas.errors import DictionaryError

_CLAMPED = ("standard", "jumprelu")
"""Architectures of which a latent is active where its own pre-activation is above a threshold of its own."""

_LEAST_READING = 1e-3
"""Of encoder · decoder, both of unit length: below this, no change along the directions sets what is read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Some features of a dictionary, as float32 tensors on the model's device.

    Attributes:
        layer: Decoder block after which the dictionary reads the residual stream.
        feature_ids: F latents.
        decoder: (F, d_model), what an activation of 1 adds to the dictionary's reconstruction.
        encoder: (d_model, F); a residual's pre-activations are `residual @ encoder + bias`.
        bias: (F,), the decoder's bias on the encoder's side included.
        threshold: (F,), 0 or more; a feature is active where its pre-activation is above.
        normalization: SAELens' `normalize_activations`: `layer_norm` and `constant_norm_rescale` scale
            reconstructions, position by position.
        objection: Why the features cannot be clamped (`encoder`, `bias` and `threshold` are then NaN); empty where
            they can.
    """

    layer: int
    feature_ids: tuple[int, ...]
    decoder: torch.Tensor
    encoder: torch.Tensor
    bias: torch.Tensor
    threshold: torch.Tensor
    normalization: str = "none"
    objection: str = ""

    def scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, 1) float32 by which the dictionary scales its reconstruction of (…, d_model) residuals."""
        hidden = hidden.float()
        if self.normalization == "layer_norm":
            deviation: torch.Tensor = hidden.std(dim=-1, keepdim=True)
            return deviation
        if self.normalization == "constant_norm_rescale":
            norm: torch.Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return norm / math.sqrt(hidden.shape[-1])
        return torch.ones_like(hidden[..., :1])

    @cached_property
    def double_encoder(self) -> torch.Tensor:
        """(d_model, F) float64."""
        return self.encoder.double()

    @cached_property
    def inverse(self) -> torch.Tensor:
        """(F, F) float64: pre-activations' wanted changes @ it = coefficients of the decoder directions.

        Raises:
            DictionaryError: if the encoder does not tell changes along these directions apart.
        """
        # On the CPU: a few numbers, and every machine inverts them alike.
        decoder, encoder = self.decoder.double().cpu(), self.encoder.double().cpu()
        gram = decoder @ encoder
        cosines = gram / (decoder.norm(dim=1)[:, None] * encoder.norm(dim=0)).clamp(min=1e-300)
        if not float(torch.linalg.svdvals(cosines).min()) >= _LEAST_READING:
            raise DictionaryError(
                f"layer {self.layer}: {named(self.feature_ids)} cannot be clamped: the encoder does not read them "
                "apart along their decoder directions",
                hint='leave one out, or steer with mode = "add" alone: steering.modes = ["add"]',
            )
        inverse: torch.Tensor = torch.linalg.inv(gram)
        return inverse.to(self.decoder.device)


def directions_of(sae: Any, layer: int, feature_ids: Sequence[int], device: torch.device | str) -> Directions:
    """The directions of some features of a SAELens SAE.

    Raises:
        DictionaryError: if a feature is outside the dictionary or named twice, or what it decodes to is not a
            residual.
    """
    d_sae, architecture = int(sae.cfg.d_sae), str(sae.cfg.architecture())
    for feature in feature_ids:
        if not 0 <= feature < d_sae:
            raise DictionaryError(
                f"layer {layer}: there is no feature {feature}: the dictionary has {d_sae:,}",
                hint=f"features are counted from 0: choose among 0 to {d_sae - 1}",
            )
    if len(set(feature_ids)) < len(feature_ids):
        raise DictionaryError(
            f"layer {layer}: a feature is named twice in {list(feature_ids)}", hint="name it once"
        )
    if getattr(sae.cfg, "reshape_activations", "none") != "none":
        raise DictionaryError(
            f"layer {layer}: the dictionary reshapes its input ({sae.cfg.reshape_activations}): it reads attention "
            "heads",
            hint="choose a residual-stream SAE",
        )
    normalization = str(sae.cfg.normalize_activations)
    chosen = list(feature_ids)

    def ready(weights: torch.Tensor) -> torch.Tensor:
        return weights.detach().to(device=device, dtype=torch.float32).contiguous()

    decoder = ready(decoder_directions(sae, chosen))
    objection = clamp_objection(architecture, normalization)
    encoder, bias, threshold = torch.full_like(decoder.T, torch.nan), *torch.full((2, len(chosen)), torch.nan)
    if not objection:
        encoder, bias = ready(sae.W_enc[:, chosen]), ready(sae.b_enc[chosen])
        if sae.cfg.apply_b_dec_to_input:
            bias = bias - ready(sae.b_dec) @ encoder
        threshold = torch.zeros_like(bias)
        if architecture == "jumprelu":
            threshold = ready(sae.threshold[chosen]).clamp(min=0)
    return Directions(
        layer=layer,
        feature_ids=tuple(chosen),
        decoder=decoder,
        encoder=encoder,
        bias=bias.to(device),
        threshold=threshold.to(device),
        normalization=normalization,
        objection=objection,
    )


def decoder_directions(sae: Any, feature_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """(F, d_model) what an activation of 1 of each feature adds to the reconstruction."""
    decoder: torch.Tensor = sae.W_dec.detach()[feature_ids]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        decoder = decoder / decoder.norm(dim=1, keepdim=True)
    return decoder


def clamp_objection(architecture: str, normalization: str) -> str:
    """Why features of such a dictionary cannot be clamped, in SAELens' names of both; empty where they can."""
    if architecture not in _CLAMPED:
        return f"whether a feature of a {architecture} dictionary is active depends on others"
    if normalization != "none":
        return f"this {architecture} dictionary normalizes what it reads ({normalization})"
    return ""


def named(feature_ids: Sequence[int]) -> str:
    """Features, for people."""
    return f"feature{'s' * (len(feature_ids) != 1)} {', '.join(map(str, feature_ids))}"
