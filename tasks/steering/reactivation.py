"""The features of each case's prompts at every position and layer: what function tokens re-activate (PAPER 1.3).

Two prompts of a case differ in one place, and later tokens are the same. What is kept here is what is active where;
which features tell the contexts apart and come back is SQL over it. One content-keyed folder a case for its tokens, and
one a case and layer for its features: another SAE at a layer makes that layer's alone anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from infra.manifest import Manifest, commit, content_key, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError, about
from schemas.steering.section import Case
from schemas.steering.work import CaseFeatures, LayerFolder
from schemas.tables import SHARD_FILES
from schemas.work import Dictionary
from tasks.dictionaries.encoding import Encoder
from tasks.graph.features import round_mantissa
from tasks.models.model import LoadedModel, load_model, model_key
from tasks.models.tokenizers import load_tokenizer
from tasks.steering.cases import place_of, read_cases
from tasks.steering.layer_folders import label_at, layer_folders
from tasks.steering.prompt_features import load_encoders, residuals_of
from tasks.steering.prompts import Prompt, tokenized

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One case: folders to make or to find.

    Attributes:
        case: The case.
        inputs: What determines its tokens.
        of_layers: By layer, ascending: what determines its features.
        prompts: Its prompts, tokenized.
        place: [first, end) positions at which they differ.
    """

    case: Case
    inputs: dict[str, Any]
    of_layers: dict[int, dict[str, Any]]
    prompts: tuple[Prompt, ...]
    place: tuple[int, int]

    @property
    def folder(self) -> str:
        return f"reactivation/{content_key(**self.inputs)}"

    @property
    def layers(self) -> tuple[LayerFolder, ...]:
        return layer_folders("reactivation", self.of_layers)

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.folder, *(entry.folder for entry in self.layers))

    @property
    def n_tokens(self) -> int:
        """Tokens that are not special."""
        return sum(not special for prompt in self.prompts for special in prompt.is_special)


@dataclass(frozen=True, kw_only=True)
class _Lack:
    """What a case lacks: its tokens, its features at some layers, or both."""

    unit: _Unit
    has_tokens: bool
    layers: tuple[LayerFolder, ...]

    @property
    def label(self) -> str:
        """How messages name it: with its layers, where others are there."""
        return label_at(self.unit.case.label, self.layers, len(self.unit.of_layers))


def find_reactivations(
    config: Config, storage: Storage, dictionaries: Sequence[Dictionary]
) -> list[CaseFeatures] | None:
    """The features of all cases, in the order of their file, or None if any is missing.

    Raises:
        ConfigError: if the cases cannot be used.
    """
    return _found(storage, _units(config, storage, dictionaries))


def missing_reactivations(
    config: Config, storage: Storage, dictionaries: Sequence[Dictionary]
) -> tuple[int, list[str]]:
    """The number of cases that are done, and a line for each that is not.

    Raises:
        ConfigError: if the cases cannot be used.
    """
    units = _units(config, storage, dictionaries)
    lacks = _lacks(storage, units)
    return len(units) - len(lacks), [lack.label for lack in lacks]


def compute_reactivations(
    config: Config, storage: Storage, dictionaries: Sequence[Dictionary], progress: Progress = silent
) -> list[CaseFeatures]:
    """Make what is missing of the cases' features.

    Args:
        config: The configuration.
        storage: Where everything is.
        dictionaries: The run's: every one of their layers is read. A case's prompts are read once for all layers
            that it lacks.
        progress: Called after each case with tokens read.

    Returns:
        One for each `[[case]]`, in the order of their file.

    Raises:
        ConfigError: if the cases cannot be used.
        DictionaryError: if a dictionary no longer loads.
        ModelError: if the model cannot be loaded or a residual is not finite.
    """
    units = _units(config, storage, dictionaries)
    lacks = _lacks(storage, units)
    if lacks:
        total, seen = sum(lack.unit.n_tokens for lack in lacks), 0
        progress(0, total, "tokens, cases")
        needed = {entry.layer for lack in lacks for entry in lack.layers}
        model = load_model(config.model, storage) if needed else None
        own = [entry for entry in dictionaries if entry.layer in needed]
        encoders = {} if model is None else load_encoders(storage, own, model.device)
        for lack in lacks:
            with about(lack.unit.case.label, stage="reactivation"):
                _make(config, storage, lack, model, encoders)
            seen += lack.unit.n_tokens
            progress(seen, total, "tokens, cases")
    found = _found(storage, units)
    if found is None:
        raise FunctokError("cases vanished while they were made", stage="reactivation", hint="run again")
    return found


def _units(config: Config, storage: Storage, dictionaries: Sequence[Dictionary]) -> list[_Unit]:
    with about(stage="reactivation"):
        cases = read_cases(config, storage).case
    if not cases:
        return []
    tokenizer, key_of_model = load_tokenizer(config.model, storage), model_key(config.model, storage)
    by_layer = sorted(dictionaries, key=lambda entry: entry.layer)
    units = []
    for case in cases:
        with about(case.label, stage="reactivation"):
            prompts = tuple(tokenized(text, config, tokenizer) for text in case.prompts)
            place = place_of(case, prompts)
        inputs = {
            "version": VERSION,
            "case": case.name,
            "relation": case.relation,
            "look_at": case.look_at,
            "prompts": [vars(prompt) for prompt in prompts],
            "place": place,
        }
        of_layers = {
            entry.layer: {
                "version": VERSION,
                "model": key_of_model,
                "layer": entry.layer,
                "dictionary": entry.key,
                "prompts": [[prompt.text, prompt.ids, prompt.is_special] for prompt in prompts],
                "mantissa_bits": config.activations.mantissa_bits,
            }
            for entry in by_layer
        }
        units.append(_Unit(case=case, inputs=inputs, of_layers=of_layers, prompts=prompts, place=place))
    return units


def _lacks(storage: Storage, units: Sequence[_Unit]) -> list[_Lack]:
    done = load_all(storage, [folder for unit in units for folder in unit.folders])
    lacks = [
        _Lack(
            unit=unit,
            has_tokens=unit.folder in done,
            layers=tuple(entry for entry in unit.layers if entry.folder not in done),
        )
        for unit in units
    ]
    return [lack for lack in lacks if lack.layers or not lack.has_tokens]


def _found(storage: Storage, units: Sequence[_Unit]) -> list[CaseFeatures] | None:
    if _lacks(storage, units):
        return None
    return [
        CaseFeatures(case=unit.case.name, folder=unit.folder, layers=unit.layers, n_tokens=unit.n_tokens)
        for unit in units
    ]


def _make(
    config: Config, storage: Storage, lack: _Lack, model: LoadedModel | None, encoders: Mapping[int, Encoder]
) -> None:
    unit = lack.unit
    if not lack.has_tokens:
        tokens = pa.Table.from_pylist(_tokens(unit), schema=SHARD_FILES["prompt_tokens"])
        written = storage.write_parquet(f"{unit.folder}/prompt_tokens.parquet", tokens)
        stats = {"n_tokens": unit.n_tokens}
        manifest = Manifest(stage="reactivation", inputs=unit.inputs, stats=stats)
        commit(storage, unit.folder, manifest, [written])
    if model is None or not lack.layers:
        return
    wanted = {entry.layer: encoders[entry.layer] for entry in lack.layers}
    read = [_features(prompt, model, wanted, config.activations.mantissa_bits) for prompt in unit.prompts]
    for entry in lack.layers:
        features = pa.concat_tables([tables[entry.layer] for tables in read])
        written = storage.write_parquet(f"{entry.folder}/prompt_features.parquet", features)
        stats = {"n_activations": features.num_rows}
        inputs = unit.of_layers[entry.layer]
        commit(storage, entry.folder, Manifest(stage="reactivation", inputs=inputs, stats=stats), [written])


def _tokens(unit: _Unit) -> list[dict[str, Any]]:
    """The rows of `prompt_tokens`, prompts and positions in order."""
    (first, end), look_at = unit.place, unit.case.look_at
    return [
        {
            "case": unit.case.name,
            "relation": unit.case.relation,
            "prompt": prompt.text,
            "position": position,
            "token_id": prompt.ids[position],
            "token": prompt.tokens[position],
            "in_text": prompt.in_text[position],
            "in_place": first <= position < end,
            "looked_at": position >= end and (look_at is None or prompt.tokens[position] in look_at),
        }
        for prompt in unit.prompts
        for position in range(len(prompt.ids))
        if not prompt.is_special[position]
    ]


def _features(
    prompt: Prompt, model: LoadedModel, encoders: Mapping[int, Encoder], mantissa_bits: int
) -> dict[int, pa.Table]:
    """By layer, the rows of `prompt_features` of one prompt, in (position, feature) order."""
    positions = torch.tensor([at for at, special in enumerate(prompt.is_special) if not special])
    residuals, tables = residuals_of(model, prompt.ids, encoders), {}
    for layer, encoder in encoders.items():
        sparse = encoder(residuals[layer][positions.to(model.device)])
        n = len(sparse.row)
        tables[layer] = pa.table(
            [
                pa.repeat(prompt.text, n),
                positions[sparse.row.cpu()].to(torch.int32).numpy(),
                pa.repeat(pa.scalar(layer, pa.int32()), n),
                sparse.feature.to(torch.int32).cpu().numpy(),
                round_mantissa(sparse.value.cpu().numpy(), mantissa_bits),
            ],
            schema=SHARD_FILES["prompt_features"],
        )
    return tables
