"""The values that reactivation and steering hand to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerFolder:
    """What one layer says of a case or of a trait: a folder of its own, so that another SAE makes it alone anew."""

    layer: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class CaseFeatures:
    """The features of one case's prompts, at every position and layer.

    Attributes:
        case: Its name.
        folder: Holds `prompt_tokens.parquet`.
        layers: Ascending; the folder of each holds `prompt_features.parquet`.
        n_tokens: Tokens of its prompts, special ones not counted.
    """

    case: str
    folder: str
    layers: tuple[LayerFolder, ...]
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class TraitFeatures:
    """A trait's strongest features at every layer, and how well each layer tells its prompts apart.

    Attributes:
        trait: Its name.
        layers: Ascending; the folder of each holds `trait_layers.parquet`, one row, and `trait_features.parquet`.
    """

    trait: str
    layers: tuple[LayerFolder, ...]


@dataclass(frozen=True, kw_only=True)
class SteeredPrompt:
    """One experiment's whole sweep; its folder holds `steering.parquet`."""

    case: str
    prompt: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class Steered:
    """What the stage steering has made, each in the order of the cases' file."""

    traits: tuple[TraitFeatures, ...] = ()
    experiments: tuple[SteeredPrompt, ...] = ()
