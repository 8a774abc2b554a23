"""A trait's features, found from contrastive prompts: where to steer, and with what (PAPER 1.3).

The paper takes the mean difference of activations at the last function token, at the most informative layer, and
decomposes it by the SAE. Here every layer that has a dictionary is decomposed, and the most informative one is the
layer that best tells *left-out* pairs apart (`tasks.contrasts`). One content-keyed folder a trait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from infra.errors import FunctokError, about
from infra.manifest import Manifest, commit, content_key, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, steering_of
from schemas.steering import Trait
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary, TraitFeatures
from tasks.cases import check_feature_ids, read_cases
from tasks.contrasts import contrasted, given
from tasks.encoding import Encoder
from tasks.models import LoadedModel, choose_device, load_model, model_key
from tasks.prompt_features import load_encoders, residuals_of
from tasks.prompts import Prompt, last_function_position, tokenized
from tasks.tokenizers import load_tokenizer

VERSION = 1
KEPT = 64
"""Strongest features of a layer that are kept, or `steering.features` where that is more."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One trait: a folder to make or to find.

    Attributes:
        trait: The trait.
        inputs: What determines its features.
        prompts: Positive prompts, then negative ones; none where its features are given.
        positions: Of the last function token of each.
        dictionaries: Those that it is looked for in; the one layer's where its features are given.
    """

    trait: Trait
    inputs: dict[str, Any]
    prompts: tuple[Prompt, ...]
    positions: tuple[int, ...]
    dictionaries: tuple[Dictionary, ...]

    @property
    def folder(self) -> str:
        return f"traits/{content_key(**self.inputs)}"


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
) -> tuple[int, list[str]]:
    """The number of traits that are done, and a line for each that is not; raises what `find_traits` raises."""
    units = _units(config, storage, dictionaries, function_ids)
    missing = _missing(storage, units)
    return len(units) - len(missing), [unit.trait.label for unit in missing]


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
        dictionaries: The run's.
        function_ids: The corpus' function tokens.
        progress: Called after each trait with prompts read.

    Raises:
        ConfigError: if the cases cannot be used, a prompt has no function token, or a feature is in no dictionary.
        DictionaryError: if a dictionary cannot be decomposed by as asked, or no longer loads.
        ModelError: if the model cannot be loaded or a residual is not finite.
    """
    units = _units(config, storage, dictionaries, function_ids)
    missing = _missing(storage, units)
    if missing:
        total, seen = sum(len(unit.prompts) for unit in missing), 0
        progress(0, total, "prompts, traits")
        model = load_model(config.model, storage) if total else None
        device = model.device if model is not None else choose_device(config.model.device)
        needed = {entry.layer: entry for unit in missing for entry in unit.dictionaries}
        encoders = load_encoders(storage, list(needed.values()), device)
        for unit in missing:
            with about(unit.trait.label, stage="steering"):
                _make(config, storage, unit, model, encoders)
            seen += len(unit.prompts)
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
        inputs |= {"version": VERSION, "trait": trait.name, "layers": [[e.layer, e.key] for e in own]}
        units.append(
            _Unit(trait=trait, inputs=inputs, prompts=prompts, positions=positions, dictionaries=own)
        )
    return units


def _missing(storage: Storage, units: Sequence[_Unit]) -> list[_Unit]:
    done = load_all(storage, [unit.folder for unit in units])
    return [unit for unit in units if unit.folder not in done]


def _found(storage: Storage, units: Sequence[_Unit]) -> list[TraitFeatures] | None:
    if _missing(storage, units):
        return None
    return [TraitFeatures(trait=unit.trait.name, folder=unit.folder) for unit in units]


def _make(
    config: Config, storage: Storage, unit: _Unit, model: LoadedModel | None, encoders: dict[int, Encoder]
) -> None:
    if model is not None and unit.prompts:
        residuals = _at_last_function_tokens(unit, model)
        decomposition, kept = steering_of(config).decomposition, unit.inputs["kept"]
        layers, features = contrasted(encoders, residuals, decomposition, kept)
    else:
        trait, layer = unit.trait, unit.dictionaries[0].layer
        layers, features = given(encoders[layer], layer, trait.features or (), trait.values or ())
    for name, rows in (("trait_layers", layers), ("trait_features", features)):
        table = pa.Table.from_pylist(
            [{"trait": unit.trait.name, **row} for row in rows], schema=SHARD_FILES[name]
        )
        storage.write_parquet(f"{unit.folder}/{name}.parquet", table)
    commit(storage, unit.folder, Manifest(stage="steering", inputs=unit.inputs))


def _at_last_function_tokens(unit: _Unit, model: LoadedModel) -> dict[int, torch.Tensor]:
    """(n_prompts, d_model) residuals of each layer, positive prompts first."""
    wanted = [entry.layer for entry in unit.dictionaries]
    found = []
    for prompt, at in zip(unit.prompts, unit.positions, strict=True):
        # Copies of the one row, so that the other positions are freed.
        residuals = residuals_of(model, prompt.ids[: at + 1], wanted)
        found.append({layer: x[-1].clone() for layer, x in residuals.items()})
    return {layer: torch.stack([one[layer] for one in found]) for layer in wanted}
