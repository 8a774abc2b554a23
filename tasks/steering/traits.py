"""A trait's features, found from contrastive prompts: where to steer, and with what (PAPER 1.3).

The paper takes the mean difference of activations at the last function token, at the most informative layer, and
decomposes it by the SAE. Here every layer that has a dictionary is decomposed, and the most informative one is the
layer that best tells *left-out* pairs apart (`tasks.steering.contrasts`); `tasks.steering.loaded_traits` says which.
One content-keyed folder a trait and layer: another SAE at a layer makes that layer's alone anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from infra.manifest import Manifest, commit, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError, about
from schemas.steering.section import Trait, steering_of
from schemas.steering.work import LayerFolder, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary
from tasks.dictionaries.encoding import Encoder
from tasks.models.devices import choose_device
from tasks.models.model import LoadedModel, load_model, model_key
from tasks.models.tokenizers import load_tokenizer
from tasks.steering.cases import check_feature_ids, read_cases
from tasks.steering.contrasts import contrasted, given
from tasks.steering.layer_folders import label_at, layer_folders
from tasks.steering.prompt_features import load_encoders, residuals_of
from tasks.steering.prompts import Prompt, last_function_position, tokenized

VERSION = 1
KEPT = 64
"""Strongest features of a layer that are kept, or `steering.features` where that is more."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One trait: folders to make or to find.

    Attributes:
        trait: The trait.
        of_layers: What determines its features, for each layer that it is looked for at, ascending; for the one layer
            alone where its features are given.
        prompts: Positive prompts, then negative ones; none where its features are given.
        positions: Of the last function token of each.
    """

    trait: Trait
    of_layers: dict[int, dict[str, Any]]
    prompts: tuple[Prompt, ...]
    positions: tuple[int, ...]

    @property
    def layers(self) -> tuple[LayerFolder, ...]:
        return layer_folders("traits", self.of_layers)

    @property
    def found(self) -> TraitFeatures:
        return TraitFeatures(trait=self.trait.name, layers=self.layers)


@dataclass(frozen=True, kw_only=True)
class _Lack:
    """The layers at which a trait is still to be looked for."""

    unit: _Unit
    layers: tuple[LayerFolder, ...]

    @property
    def label(self) -> str:
        """How messages name it: with its layers, where others are there."""
        return label_at(self.unit.trait.label, self.layers, len(self.unit.of_layers))


def find_traits(
    config: Config, storage: Storage, dictionaries: Sequence[Dictionary], function_ids: Ids
) -> list[TraitFeatures] | None:
    """The features of all traits, in the order of the cases' file, or None if any is missing.

    Raises:
        ConfigError: if the cases cannot be used, a prompt has no function token, or a feature is in no dictionary.
    """
    return _found(storage, _units(config, storage, dictionaries, function_ids))


def missing_traits(
    config: Config, storage: Storage, dictionaries: Sequence[Dictionary], function_ids: Ids
) -> tuple[list[TraitFeatures], list[str]]:
    """The traits that are done, and a line for each that is not; raises what `find_traits` raises."""
    units = _units(config, storage, dictionaries, function_ids)
    lacks = _lacks(storage, units)
    lacking = {lack.unit.trait.name for lack in lacks}
    return [unit.found for unit in units if unit.trait.name not in lacking], [lack.label for lack in lacks]


def compute_traits(
    config: Config,
    storage: Storage,
    dictionaries: Sequence[Dictionary],
    function_ids: Ids,
    progress: Progress = silent,
) -> list[TraitFeatures]:
    """Find what is missing of the traits' features.

    Args:
        config: The configuration.
        storage: Where everything is.
        dictionaries: The run's. A trait's prompts are read once for all layers that it lacks.
        function_ids: The corpus' function tokens.
        progress: Called after each trait with prompts read.

    Raises:
        ConfigError: if the cases cannot be used, a prompt has no function token, or a feature is in no dictionary.
        DictionaryError: if a dictionary cannot be decomposed by as asked, or no longer loads.
        ModelError: if the model cannot be loaded or a residual is not finite.
    """
    units = _units(config, storage, dictionaries, function_ids)
    lacks = _lacks(storage, units)
    if lacks:
        total, seen = sum(len(lack.unit.prompts) for lack in lacks), 0
        progress(0, total, "prompts, traits")
        model = load_model(config.model, storage) if total else None
        device = model.device if model is not None else choose_device(config.model.device)
        needed = {entry.layer for lack in lacks for entry in lack.layers}
        encoders = load_encoders(storage, [entry for entry in dictionaries if entry.layer in needed], device)
        for lack in lacks:
            with about(lack.unit.trait.label, stage="steering"):
                _make(config, storage, lack, model, encoders)
            seen += len(lack.unit.prompts)
            progress(seen, total, "prompts, traits")
    found = _found(storage, units)
    if found is None:
        raise FunctokError("traits vanished while they were found", stage="steering", hint="run again")
    return found


def _units(
    config: Config, storage: Storage, dictionaries: Sequence[Dictionary], function_ids: Ids
) -> list[_Unit]:
    section = steering_of(config)
    with about(stage="steering"):
        cases = read_cases(config, storage)
        check_feature_ids(cases, dictionaries)
    by_layer = sorted(dictionaries, key=lambda entry: entry.layer)
    function, tokenizer = frozenset(function_ids.tolist()), load_tokenizer(config.model, storage)
    key_of_model = model_key(config.model, storage) if cases.trait else ""
    units = []
    for trait in cases.trait:
        prompts: tuple[Prompt, ...] = ()
        positions: tuple[int, ...] = ()
        if trait.positive is None or trait.negative is None:
            own = tuple(entry for entry in by_layer if entry.layer == trait.layer)
            inputs: dict[str, Any] = {"features": trait.features, "values": trait.values}
        else:
            with about(trait.label, stage="steering"):
                texts = (*trait.positive, *trait.negative)
                prompts = tuple(tokenized(text, config, tokenizer) for text in texts)
                positions = tuple(last_function_position(prompt, function) for prompt in prompts)
            own = tuple(by_layer)
            inputs = {
                "model": key_of_model,
                "n_pairs": len(trait.positive),
                # What comes after the last function token is not seen there, and not read.
                "ids": [p.ids[: at + 1] for p, at in zip(prompts, positions, strict=True)],
                "decomposition": section.decomposition,
                "kept": max(KEPT, section.features),
            }
        of_layers = {
            entry.layer: inputs
            | {"version": VERSION, "trait": trait.name, "layer": entry.layer, "dictionary": entry.key}
            for entry in own
        }
        units.append(_Unit(trait=trait, of_layers=of_layers, prompts=prompts, positions=positions))
    return units


def _lacks(storage: Storage, units: Sequence[_Unit]) -> list[_Lack]:
    done = load_all(storage, [entry.folder for unit in units for entry in unit.layers])
    lacks = [
        _Lack(unit=unit, layers=tuple(entry for entry in unit.layers if entry.folder not in done))
        for unit in units
    ]
    return [lack for lack in lacks if lack.layers]


def _found(storage: Storage, units: Sequence[_Unit]) -> list[TraitFeatures] | None:
    return None if _lacks(storage, units) else [unit.found for unit in units]


def _make(
    config: Config,
    storage: Storage,
    lack: _Lack,
    model: LoadedModel | None,
    encoders: Mapping[int, Encoder],
) -> None:
    unit, how = lack.unit, steering_of(config).decomposition
    residuals = {} if model is None or not unit.prompts else _at_last_function_tokens(lack, model)
    for entry in lack.layers:
        layer, inputs = entry.layer, unit.of_layers[entry.layer]
        if residuals:
            judged, features = contrasted(encoders[layer], layer, residuals[layer], how, inputs["kept"])
        else:
            judged, features = given(
                encoders[layer], layer, unit.trait.features or (), unit.trait.values or ()
            )
        written = []
        for name, rows in (("trait_layers", [judged]), ("trait_features", features)):
            table = pa.Table.from_pylist(
                [{"trait": unit.trait.name, **row} for row in rows], schema=SHARD_FILES[name]
            )
            written.append(storage.write_parquet(f"{entry.folder}/{name}.parquet", table))
        commit(storage, entry.folder, Manifest(stage="steering", inputs=inputs), written)


def _at_last_function_tokens(lack: _Lack, model: LoadedModel) -> dict[int, torch.Tensor]:
    """(n_prompts, d_model) residuals of each layer that the trait lacks, positive prompts first."""
    wanted = [entry.layer for entry in lack.layers]
    found = []
    for prompt, at in zip(lack.unit.prompts, lack.unit.positions, strict=True):
        # Copies of the one row, so that the other positions are freed.
        residuals = residuals_of(model, prompt.ids[: at + 1], wanted)
        found.append({layer: x[-1].clone() for layer, x in residuals.items()})
    return {layer: torch.stack([one[layer] for one in found]) for layer in wanted}
