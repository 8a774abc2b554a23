"""Training that starts from a saved SAE, as SAE-Track does along checkpoints (`train.start_from`).

A saved dictionary reads raw residuals x and gives raw activations; its training form reads z = (x - m) * s and
gives activations in those units. With the encoder written as (x - b_dec) @ W_enc + b_enc, the training form is

    W_enc' = W_enc,  b_enc' = s * b_enc,  W_dec' = W_dec,  b_dec' = s * (b_dec - m),

whose pre-activations are s times the saved ones, and whose reconstruction of z is the scaled reconstruction of x.
Only the product of a latent's encoder and decoder norms matters to a BatchTopK SAE that rescales by decoder norm; how
it is shared decides how far a step of the optimizer turns them. It is shared in equal parts, as SAELens' own
initialization does and as training ends (of 256 latents, encoders had a mean norm of 0.66 and decoders of 0.61). With
decoders of norm 0.1, as fresh ones have, the first steps forget the start: after 300 an explained variance of 0.57,
with equal parts 0.64, with a fresh start 0.60.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.config import Sae
from tasks.dictionaries.facts import Facts, refusal
from tasks.dictionaries.sources import copy_saved, saved_content, saved_facts

_ARCHITECTURES = ("jumprelu", "standard", "topk")


@dataclass(frozen=True, kw_only=True)
class Start:
    """A saved SAE's weights, its encoder written as `(x - b_dec) @ w_enc + b_enc`, activations in raw units.

    Attributes:
        w_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        w_dec: (d_sae, d_in).
        b_dec: (d_in,).
    """

    w_enc: torch.Tensor
    b_enc: torch.Tensor
    w_dec: torch.Tensor
    b_dec: torch.Tensor


def start_content(entry: Sae, endpoint_url: str | None) -> dict[str, str]:
    """Content hashes of the files that an entry's training starts from (see `saved_content`)."""
    return saved_content(_as_saved(entry), endpoint_url)


def start_facts(entry: Sae, endpoint_url: str | None) -> Facts:
    """What the SAE that an entry's training starts from says of itself; raises as `load_start`, weights unread."""
    facts = saved_facts(_as_saved(entry), endpoint_url)
    _check_start(facts, entry)
    return facts


def load_start(entry: Sae, endpoint_url: str | None, d_model: int, n_layers: int) -> Start:
    """The weights that an entry's training starts from, checked.

    Thresholds are not read: training sets its own.

    Raises:
        DictionaryError: if a file is missing or damaged, or the SAE is not one of the same layer and size with
            one encoder and one decoder, on raw residuals.
    """
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as aside:
        facts = copy_saved(_as_saved(entry), endpoint_url, Path(aside), d_model, n_layers)
        _check_start(facts, entry)
        sae: Any = SAE.load_from_disk(aside, device="cpu", dtype="float32")
    w_enc, w_dec, b_dec = sae.W_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach()
    b_enc = sae.b_enc.detach()
    if not sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc + b_dec @ w_enc
    return Start(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec)


@torch.no_grad()
def start_training_from(sae: Any, start: Start, mean: torch.Tensor, scale: float) -> None:
    """Give a fresh training SAE the weights of a saved one.

    Args:
        sae: SAELens' BatchTopK training SAE.
        start: The saved weights.
        mean: (d_in,) subtracted from residuals before training.
        scale: What they are multiplied by after that.
    """
    assert sae.cfg.apply_b_dec_to_input
    assert sae.cfg.rescale_acts_by_decoder_norm
    encoder, decoder = start.w_enc.norm(dim=0), start.w_dec.norm(dim=1)
    strength = encoder * decoder
    # A latent that reads or writes nothing has no direction to start from: it keeps its fresh one.
    told = strength > 0
    norm = strength[told].sqrt()
    at = told.to(sae.device)
    sae.W_dec[at] = (start.w_dec[told] * (norm / decoder[told])[:, None]).to(sae.W_dec)
    sae.W_enc[:, at] = (start.w_enc[:, told] * (decoder[told] / norm)).to(sae.W_enc)
    sae.b_enc[at] = (scale * start.b_enc[told] * (decoder[told] / norm)).to(sae.b_enc)
    sae.b_dec.copy_(scale * (start.b_dec - mean.to(start.b_dec)))


def _check_start(facts: Facts, entry: Sae) -> None:
    assert entry.train is not None
    if facts.d_sae != entry.train.d_sae:
        raise refusal(
            _as_saved(entry),
            f"has {facts.d_sae} latents: a dictionary of train.d_sae = {entry.train.d_sae} cannot start from it",
            f"set train.d_sae = {facts.d_sae}, or leave train.start_from out",
        )
    if facts.architecture not in _ARCHITECTURES or facts.normalize_activations != "none":
        raise refusal(
            _as_saved(entry),
            f"({facts.architecture}, normalize_activations = {facts.normalize_activations}) is nothing that "
            "a BatchTopK dictionary can start from",
            f"give one of {', '.join(_ARCHITECTURES)} without normalization, or leave train.start_from out",
        )


def _as_saved(entry: Sae) -> Sae:
    assert entry.train is not None
    return Sae(layer=entry.layer, path=entry.train.start_from)
