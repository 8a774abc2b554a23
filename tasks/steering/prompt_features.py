"""The residual stream and the features of single prompts (PAPER 1.3), read layer by layer for cases and traits.

A prompt is a forward of its own: in a batch, padding and another shape of the products would round differently, and a
feature at its threshold would depend on the prompt's neighbours. What a layer says lies in a folder of its own, so that
another SAE makes that layer's alone anew, while one forward serves every layer that a case or a trait lacks.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from schemas.errors import ModelError
from schemas.steering.work import LayerFolder
from schemas.work import Dictionary
from tasks.dictionaries.dictionaries import load_dictionary
from tasks.dictionaries.encoding import Encoder
from tasks.engine.run import Run
from tasks.engine.stage import Unit
from tasks.models.devices import choose_device
from tasks.models.model import LoadedModel, load_model


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerUnit(Unit):
    """One layer of a case or of a trait.

    Attributes:
        dictionary: The layer's; None: what no layer has to do with (a case's tokens).
        n_layers: How many layers its case or trait has.
    """

    dictionary: Dictionary | None
    n_layers: int


U = TypeVar("U", bound=LayerUnit)


def read_once(missing: Sequence[U]) -> list[U]:
    """The units, of which one of each case or trait has its size: one forward serves all of its layers."""
    seen = set[Hashable]()
    units = []
    for unit in missing:
        units.append(replace(unit, size=0) if unit.together in seen else unit)
        seen.add(unit.together)
    return units


def layer_folders(units: Iterable[LayerUnit]) -> tuple[LayerFolder, ...]:
    """Where the layers of a case or of a trait are."""
    return tuple(
        LayerFolder(layer=unit.dictionary.layer, folder=unit.folder)
        for unit in units
        if unit.dictionary is not None
    )


def labels_of(missing: Sequence[LayerUnit]) -> list[str]:
    """How `functok status` names what is missing: with its layers, where others are there."""
    groups: dict[Hashable, list[LayerUnit]] = {}
    for unit in missing:
        groups.setdefault(unit.together, []).append(unit)
    labels = []
    for units in groups.values():
        layers = [str(entry.layer) for entry in layer_folders(units)]
        is_whole = not layers or len(layers) == units[0].n_layers
        which = "" if is_whole else f", layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
        labels.append(f"{units[0].about}{which}")
    return labels


class Readers:
    """The model without its head, and dictionaries; loaded when first asked for, and kept until `forget`."""

    def __init__(self) -> None:
        self._model: LoadedModel | None = None
        self._encoders: dict[str, Encoder] = {}

    def model(self, run: Run) -> LoadedModel:
        """The run's model."""
        if self._model is None:
            self._model = load_model(run.config.model, run.storage)
        return self._model

    def encoder(self, run: Run, dictionary: Dictionary) -> Encoder:
        """A dictionary's own encoder, where the model is or would be; the SAE itself is the encoder's `sae`."""
        if dictionary.folder not in self._encoders:
            device = choose_device(run.config.model.device) if self._model is None else self._model.device
            sae = load_dictionary(run.storage, dictionary, device)
            self._encoders[dictionary.folder] = Encoder(sae, device)
        return self._encoders[dictionary.folder]

    def forget(self) -> None:
        """Free all of them."""
        self._model, self._encoders = None, {}
        # Modules know each other in circles; what is loaded next needs their memory.
        gc.collect()


def residuals_of(model: LoadedModel, ids: Sequence[int], layers: Iterable[int]) -> dict[int, torch.Tensor]:
    """(n_tokens, d_model) float32 residual stream after each of some decoder blocks, on the model's device.

    Of one prompt, whose ids hold BOS and the chat template's.

    Raises:
        ModelError: if the prompt is empty, longer than the model's context or has ids outside its vocabulary, there is
            no such block, or a residual is not finite.
    """
    wanted = sorted(set(layers))
    if not ids:
        raise ModelError("a prompt has no token", hint="give it text")
    if model.context_length is not None and len(ids) > model.context_length:
        raise ModelError(
            f"a prompt of {len(ids)} tokens is longer than the model was built for ({model.context_length})",
            hint="shorten it",
        )
    for layer in wanted:
        if not 0 <= layer < model.n_layers:
            raise ModelError(f"the model has no block {layer}: it has {model.n_layers}")
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
