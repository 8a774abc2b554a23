"""How one layer tells a trait's prompts apart, and which features the difference is made of (PAPER 1.3).

Pure arithmetic on the residuals of contrastive pairs; `tasks.steering.traits` reads the prompts and keeps the
results. Sums are float64, so that no order of adding shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import DictionaryError, about
from tasks.dictionaries.encoding import Encoder, Sparse
from tasks.dictionaries.quality import DENSE_ENTRIES, Variance
from tasks.steering.directions import decoder_directions

LARGEST_SEPARATION = 1e6
"""What a separation without any spread is stored as, so that it stays a number."""

Floats = npt.NDArray[np.float64]
Decomposition = Literal["activations", "encoder"]


@dataclass(frozen=True, kw_only=True)
class Decomposed:
    """Features that a difference is made of, strongest first; see `decompose`.

    Attributes:
        feature_id: (n,) latents.
        coefficient: (n,) how much of each; above 0.
        contribution: (n,) |coefficient| times the norm of its decoder direction, descending.
        clamp_value: (n,) its mean activation over the positive prompts that activate it.
        mean_positive: (n,) its mean activation over all positive prompts.
        mean_negative: (n,) the same over the negative ones.
    """

    feature_id: npt.NDArray[np.int32]
    coefficient: Floats
    contribution: Floats
    clamp_value: Floats
    mean_positive: Floats
    mean_negative: Floats


Row = dict[str, Any]
"""A row of a file, without the trait's name."""


def contrasted(
    encoder: Encoder, layer: int, residuals: torch.Tensor, how: Decomposition, most: int
) -> tuple[Row, list[Row]]:
    """What one layer makes of a trait's prompts.

    Args:
        encoder: The layer's dictionary.
        layer: Decoder block.
        residuals: (2 * n_pairs, d_model) float32 at the last function tokens: the positive prompts, then the negative
            ones in the same order.
        how: See `decompose`.
        most: Features kept, at most.

    Returns:
        The row of `trait_layers` and those of `trait_features`, the strongest features first.
    """
    pairs = len(residuals) // 2
    positive, negative = residuals[:pairs], residuals[pairs:]
    separation, accuracy = tell_apart(positive, negative)
    with about(f"layer {layer}"):
        found = decompose(encoder, positive, negative, how, most)
    columns = {name: values.tolist() for name, values in asdict(found).items()}
    features = [
        {"layer": layer, "place": place, **dict(zip(columns, values, strict=True))}
        for place, values in enumerate(zip(*columns.values(), strict=True), 1)
    ]
    judged = {
        "layer": layer,
        "separation": separation,
        "accuracy": accuracy,
        "explained_variance": explained_variance(encoder, residuals),
        "n_pairs": pairs,
    }
    return judged, features


def given(
    encoder: Encoder, layer: int, features: Sequence[int], values: Sequence[float]
) -> tuple[Row, list[Row]]:
    """The same of features that are known: in their order, with their values as coefficients."""
    norms = decoder_directions(encoder.sae, features).double().norm(dim=1).tolist()
    rows = [
        {
            "layer": layer,
            "place": place,
            "feature_id": feature,
            "coefficient": value,
            "contribution": abs(value) * norm,
            "clamp_value": value,
        }
        for place, (feature, value, norm) in enumerate(zip(features, values, norms, strict=True), 1)
    ]
    return {"layer": layer, "n_pairs": 0}, rows


def tell_apart(positive: torch.Tensor, negative: torch.Tensor) -> tuple[float, float]:
    """How well a layer's mean difference tells prompts apart that it was not made from: leave one pair out.

    For each pair: the direction is the mean difference of the *other* pairs, of length 1; the pair's two residuals are
    projected onto it, as seen from the mean of the other pairs' residuals.

    Args:
        positive: (n_pairs, d_model) residuals, two pairs at least.
        negative: The same, in the same order.

    Returns:
        `separation`: the difference of the means of the left-out positive and of the left-out negative scores, over
        their pooled standard deviation (the root of the mean of both groups' variances, each with n - 1); at most
        `LARGEST_SEPARATION` in size. `accuracy`: the share of pairs whose positive score is the higher.
    """
    p, n = positive.double().cpu().numpy(), negative.double().cpu().numpy()
    others = len(p) - 1
    direction = ((p - n).sum(0) - (p - n)) / others
    length = np.linalg.norm(direction, axis=1, keepdims=True)
    direction = np.divide(direction, length, out=np.zeros_like(direction), where=length > 0)
    middle = ((p + n).sum(0) - (p + n)) / (2 * others)
    high, low = ((p - middle) * direction).sum(1), ((n - middle) * direction).sum(1)
    difference = float(high.mean() - low.mean())
    spread = float(np.sqrt((high.var(ddof=1) + low.var(ddof=1)) / 2))
    if abs(difference) >= LARGEST_SEPARATION * spread:
        separation = LARGEST_SEPARATION * float(np.sign(difference))
    else:
        separation = difference / spread
    return separation, float((high > low).mean())


def decompose(
    encoder: Encoder,
    positive: torch.Tensor,
    negative: torch.Tensor,
    how: Decomposition,
    most: int,
) -> Decomposed:
    """The features that the mean difference of a trait's prompts is made of.

    Only features with a positive coefficient that at least one positive prompt activates count.

    Args:
        encoder: The layer's dictionary.
        positive: (n_pairs, d_model) float32 residuals on the dictionary's device.
        negative: The same of the negative prompts.
        how: Where coefficients come from. `activations`: the mean activation over the positive prompts less that over
            the negative ones. `encoder`: the difference of the mean residuals, as the dictionary's encoder takes them,
            through its weights, without bias and threshold.
        most: Features kept at most.

    Raises:
        DictionaryError: if the dictionary has no encoder weights and `how` asks for them.
    """
    sae, pairs = encoder.sae, len(positive)
    candidates, activations = _activations(encoder(torch.cat([positive, negative])), pairs)
    on, off = activations[:pairs], activations[pairs:]
    chosen = torch.from_numpy(candidates).to(positive.device)
    coefficient = on.mean(0) - off.mean(0)
    if how == "encoder":
        coefficient = _through_encoder(sae, positive, negative, chosen)
    norms = decoder_directions(sae, chosen).double().norm(dim=1).cpu().numpy()
    contribution = np.abs(coefficient) * norms
    order = np.lexsort((candidates, -contribution))
    order = order[coefficient[order] > 0][:most]
    return Decomposed(
        feature_id=candidates[order].astype(np.int32),
        coefficient=coefficient[order],
        contribution=contribution[order],
        clamp_value=(on.sum(0) / np.maximum(1, (on > 0).sum(0)))[order],
        mean_positive=on.mean(0)[order],
        mean_negative=off.mean(0)[order],
    )


def explained_variance(encoder: Encoder, residuals: torch.Tensor) -> float:
    """The share of the variance of (n, d_model) residuals that the dictionary reconstructs."""
    variance = Variance()
    with torch.inference_mode():
        for x in torch.split(residuals, max(1, DENSE_ENTRIES // encoder.d_sae)):
            sparse = encoder(x)
            dense = x.new_zeros((len(x), encoder.d_sae))
            dense[sparse.row, sparse.feature] = sparse.value
            variance.add(x, (encoder.sae.decode(dense) - x).double().square().sum(1))
    return variance.explained()


def _activations(sparse: Sparse, pairs: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """The features that a positive prompt activates, ascending, and their (2 * pairs, n) activations."""
    row, feature = sparse.row.cpu().numpy(), sparse.feature.cpu().numpy()
    value = sparse.value.cpu().numpy()
    candidates = np.unique(feature[row < pairs])
    is_one = np.isin(feature, candidates)
    activations = np.zeros((2 * pairs, len(candidates)))
    activations[row[is_one], np.searchsorted(candidates, feature[is_one])] = value[is_one]
    return candidates, activations


def _through_encoder(
    sae: Any, positive: torch.Tensor, negative: torch.Tensor, chosen: torch.Tensor
) -> Floats:
    if getattr(sae, "W_enc", None) is None:
        raise DictionaryError(
            f"a {sae.cfg.architecture()} dictionary has no encoder weights that residuals can be passed through",
            hint="set steering.decomposition = 'activations'",
        )
    with torch.inference_mode():
        # Dictionaries that scale what they read (layer_norm, constant_norm_rescale) see the scaled residuals.
        means = [sae.run_time_activation_norm_fn_in(x).double().mean(0) for x in (positive, negative)]
        found: Floats = ((means[0] - means[1]) @ sae.W_enc.detach()[:, chosen].double()).cpu().numpy()
    return found
