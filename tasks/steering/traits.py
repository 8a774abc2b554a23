"""A trait's features, found from contrastive prompts: where to steer, and with what (PAPER 1.3).

The paper takes the mean difference of activations at the last function token, at the most informative layer, and
decomposes it by the SAE. Here every layer that has a dictionary is decomposed, and the most informative one is the
layer that best tells *left-out* pairs apart (`tasks.steering.contrasts`); `tasks.steering.loaded_traits` says which.
One content-keyed folder a trait and layer. `tasks.steering.steering` makes them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from schemas.errors import about
from schemas.steering.section import Cases, Trait, steering_of
from schemas.steering.work import TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.run import Run
from tasks.engine.stage import Made, Written
from tasks.models.model import model_key
from tasks.models.tokenizers import load_tokenizer
from tasks.steering.cases import check_feature_ids
from tasks.steering.contrasts import contrasted, given
from tasks.steering.prompt_features import LayerUnit, Readers, layer_folders, residuals_of
from tasks.steering.prompts import Prompt, last_function_position, tokenized

VERSION = 2
KEPT = 64
"""Strongest features of a layer that are kept, or `steering.features` where that is more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TraitUnit(LayerUnit):
    """One layer of a trait.

    Attributes:
        dictionary: The layer's.
        trait: The trait.
        prompts: Positive prompts, then negative ones; none where its features are given.
        positions: Of the last function token of each.
    """

    dictionary: Dictionary
    trait: Trait
    prompts: tuple[Prompt, ...]
    positions: tuple[int, ...]


def trait_units(run: Run, cases: Cases, function_ids: Collection[int]) -> list[TraitUnit]:
    """The traits' layers, in the order of the cases' file, layers ascending; of one whose features are given, its own.

    Raises:
        ConfigError: if a prompt has no function token, or a feature is in no dictionary.
    """
    config, section = run.config, steering_of(run.config)
    dictionaries = run.result(DICTIONARIES)
    by_layer = sorted(dictionaries, key=lambda entry: entry.layer)
    check_feature_ids(cases, dictionaries)
    tokenizer = load_tokenizer(config.model, run.storage)
    key_of_model = model_key(config.model, run.storage) if cases.trait else ""
    units = []
    for trait in cases.trait:
        prompts: tuple[Prompt, ...] = ()
        positions: tuple[int, ...] = ()
        if trait.positive is None or trait.negative is None:
            own = [entry for entry in by_layer if entry.layer == trait.layer]
            inputs: dict[str, Any] = {"features": trait.features, "values": trait.values}
        else:
            own = by_layer
            with about(trait.label):
                texts = (*trait.positive, *trait.negative)
                prompts = tuple(tokenized(text, config, tokenizer) for text in texts)
                positions = tuple(last_function_position(prompt, function_ids) for prompt in prompts)
            inputs = {
                "model": key_of_model,
                "n_pairs": len(trait.positive),
                # What comes after the last function token is not seen there, and not read.
                "ids": [p.ids[: at + 1] for p, at in zip(prompts, positions, strict=True)],
                "decomposition": section.decomposition,
                "kept": max(KEPT, section.features),
            }
        inputs |= {"version": VERSION, "trait": trait.name}
        units += [
            TraitUnit(
                top="traits",
                inputs={**inputs, "layer": entry.layer, "dictionary": entry.key},
                about=trait.label,
                size=len(prompts),
                together=trait.name,
                dictionary=entry,
                n_layers=len(own),
                trait=trait,
                prompts=prompts,
                positions=positions,
            )
            for entry in own
        ]
    return units


def found_traits(units: Sequence[TraitUnit]) -> list[TraitFeatures]:
    """The traits of these layers."""
    by_name: dict[str, list[TraitUnit]] = {}
    for unit in units:
        by_name.setdefault(unit.trait.name, []).append(unit)
    return [TraitFeatures(trait=name, layers=layer_folders(of)) for name, of in by_name.items()]


def find_trait(run: Run, group: Sequence[TraitUnit], readers: Readers) -> Made:
    """The features of one trait at the layers that it lacks: its prompts are read once for all of them.

    Features that are given need no model.
    """
    trait, section = group[0].trait, steering_of(run.config)
    residuals = _at_last_function_tokens(run, group, readers)
    found = []
    for unit in group:
        layer, encoder = unit.dictionary.layer, readers.encoder(run, unit.dictionary)
        if residuals:
            most = max(KEPT, section.features)
            judged, features = contrasted(encoder, layer, residuals[layer], section.decomposition, most)
        else:
            judged, features = given(encoder, layer, trait.features or (), trait.values or ())
        found.append({"trait_layers": [judged], "trait_features": features})

    def write() -> Iterator[Written]:
        for unit, files in zip(group, found, strict=True):
            tables = {
                name: pa.Table.from_pylist(
                    [{"trait": trait.name, **row} for row in rows], schema=SHARD_FILES[name]
                )
                for name, rows in files.items()
            }
            yield (
                unit,
                [run.storage.write_parquet(f"{unit.folder}/{n}.parquet", t) for n, t in tables.items()],
                {},
            )

    return Made(size=sum(unit.size for unit in group), write=write)


def _at_last_function_tokens(
    run: Run, group: Sequence[TraitUnit], readers: Readers
) -> dict[int, torch.Tensor]:
    """(n_prompts, d_model) residuals of each layer, positive prompts first; none of given features."""
    first, wanted = group[0], [unit.dictionary.layer for unit in group]
    if not first.prompts:
        return {}
    model, found = readers.model(run), []
    for prompt, at in zip(first.prompts, first.positions, strict=True):
        # Copies of the one row, so that the other positions are freed.
        residuals = residuals_of(model, prompt.ids[: at + 1], wanted)
        found.append({layer: x[-1].clone() for layer, x in residuals.items()})
    return {layer: torch.stack([one[layer] for one in found]) for layer in wanted}
