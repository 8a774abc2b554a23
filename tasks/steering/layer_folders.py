"""Folders of single layers, of a case or of a trait: another SAE at a layer makes that layer's alone anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infra.manifest import content_key
from schemas.steering.work import LayerFolder


def layer_folders(place: str, of_layers: Mapping[int, Mapping[str, Any]]) -> tuple[LayerFolder, ...]:
    """The content-keyed folder of each layer under `place`, from what determines it."""
    return tuple(
        LayerFolder(layer=layer, folder=f"{place}/{content_key(**inputs)}")
        for layer, inputs in of_layers.items()
    )


def label_at(label: str, lacking: Sequence[LayerFolder], n_layers: int) -> str:
    """How messages name what lacks some of its layers: with these, where others are there."""
    if not lacking or len(lacking) == n_layers:
        return label
    return f"{label}, layer{'s' * (len(lacking) > 1)} {', '.join(str(entry.layer) for entry in lacking)}"
