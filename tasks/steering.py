"""Steering: what setting a trait's features does to the answers (PAPER 1.3).

First the traits' features are found (`tasks.traits`); then each experiment ([[steer]] of the cases' file) is swept over
modes, places, strengths and controls, one content-keyed folder each, so a sweep that is killed goes on with the first
experiment that it lacks.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from infra.errors import FunctokError, about
from infra.manifest import Manifest, commit, content_key, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, steering_of
from schemas.steering import Steer
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary, SteeredPrompt, TraitFeatures
from tasks.cases import check_cases, check_clamps, read_cases
from tasks.dictionaries import load_dictionary
from tasks.dictionary_checks import Facts, facts_of
from tasks.function_tokens import function_token_ids
from tasks.generations import continuation
from tasks.language_models import LanguageModel, load_language_model
from tasks.loaded_traits import choose_layer, load_trait
from tasks.models import model_key
from tasks.prompts import Prompt, content_position, last_function_position, target_ids, tokenized
from tasks.steering_conditions import Condition, Moved, conditions_of, moved_features
from tasks.steering_measures import Question
from tasks.steering_sweep import Effect, Experiment, sweep
from tasks.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.traits import compute_traits, find_traits, missing_traits

VERSION = 1
_SECTION = {
    *("features", "modes", "strengths", "places"),
    *("random_controls", "max_new_tokens", "seed", "batch_size"),
}
"""Settings that an experiment's rows depend on, beside what its prompt, traits and layer say."""

Made = tuple[list[TraitFeatures], list[SteeredPrompt]]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One experiment ([[steer]]): a folder to make or to find.

    Attributes:
        prompt: Its prompt, tokenized.
        target: Token ids of its target.
        dictionary: That of the layer that is steered.
        moved: The features that are moved, with their values at strength 1.
        conditions: The rows of its table.
        inputs: What determines them.
    """

    steer: Steer
    prompt: Prompt
    target: tuple[int, ...]
    dictionary: Dictionary
    moved: Moved
    conditions: tuple[Condition, ...]
    inputs: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"steering/{content_key(**self.inputs)}"


def find_steering(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: Sequence[Dictionary]
) -> Made | None:
    """All traits and experiments, in the order of the cases' file, or None if any is missing.

    Reads no weights.

    Raises:
        ConfigError: if the cases cannot be used.
    """
    function_ids = function_token_ids(config, storage, shards)
    traits = find_traits(config, storage, dictionaries, function_ids)
    if traits is None:
        return None
    steered = _found(storage, _units(config, storage, traits, dictionaries, frozenset(function_ids.tolist())))
    return None if steered is None else (traits, steered)


def missing_steering(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: Sequence[Dictionary]
) -> tuple[int, list[str]]:
    """The number of traits and experiments that are done, and a line for each that is not.

    Until all traits are found, no experiment counts as done: its layer is not known.

    Raises:
        ConfigError: if the cases cannot be used.
    """
    function_ids = function_token_ids(config, storage, shards)
    traits = find_traits(config, storage, dictionaries, function_ids)
    if traits is None:
        n_done, missing = missing_traits(config, storage, dictionaries, function_ids)
        experiments = read_cases(config, storage).steer
        return n_done, [*missing, *(steer.label for steer in experiments)]
    units = _units(config, storage, traits, dictionaries, frozenset(function_ids.tolist()))
    unsteered = _missing(storage, units)
    return len(traits) + len(units) - len(unsteered), [unit.steer.label for unit in unsteered]


def run_steering(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    dictionaries: Sequence[Dictionary],
    progress: Progress = silent,
) -> Made:
    """Find what is missing of the traits' features, then run the experiments that are missing.

    Args:
        config: The configuration, its tokenizer resolved.
        storage: Where everything is.
        shards: The tokenized corpus, whose function tokens say where to steer.
        dictionaries: The run's.
        progress: Called with the prompts read for traits, then with the texts steered.

    Returns:
        All traits and experiments, in the order of the cases' file.

    Raises:
        ConfigError: if the cases cannot be used, features of a dictionary cannot be clamped though that is asked
            for, the traits of an experiment have no layer to steer together at, or the dictionary is too small for
            random controls.
        DictionaryError: naming experiment and condition, if features cannot be set as asked.
        ModelError: if the model cannot be loaded, or naming experiment, layer and condition, gives what is not finite.
    """
    with about(stage="steering"):
        check_clamps(config, check_cases(config, storage), _facts(storage, dictionaries))
    function_ids = function_token_ids(config, storage, shards)
    traits = compute_traits(config, storage, dictionaries, function_ids, progress)
    # The model without its head must not lie beside the one with it.
    gc.collect()
    units = _units(config, storage, traits, dictionaries, frozenset(function_ids.tolist()))
    missing = _missing(storage, units)
    if missing:
        total, seen = sum(len(unit.conditions) for unit in missing), 0
        progress(0, total, "steered texts, steering")
        for size in _run(config, storage, missing):
            seen += size
            progress(seen, total, "steered texts, steering")
    steered = _found(storage, units)
    if steered is None:
        raise FunctokError("experiments vanished while they were made", stage="steering", hint="run again")
    return traits, steered


def _units(
    config: Config,
    storage: Storage,
    traits: Sequence[TraitFeatures],
    dictionaries: Sequence[Dictionary],
    function_ids: frozenset[int],
) -> list[_Unit]:
    section = steering_of(config)
    with about(stage="steering"):
        cases = read_cases(config, storage)
    if not cases.steer:
        return []
    at_layer = {dictionary.layer: dictionary for dictionary in dictionaries}
    folders = {trait.trait: trait.folder for trait in traits}
    loaded = {trait.trait: load_trait(storage, trait) for trait in traits}
    tokenizer, key_of_model = load_tokenizer(config.model, storage), model_key(config.model, storage)
    units = []
    for steer in cases.steer:
        with about(steer.label, stage="steering"):
            own = [loaded[name] for name in steer.traits]
            prompt = tokenized(steer.prompt, config, tokenizer)
            last = last_function_position(prompt, function_ids)
            content = content_position(prompt, function_ids)
            target = tuple(target_ids(steer.target, tokenizer))
            dictionary = at_layer[choose_layer(config, own)]
            inputs = {
                "version": VERSION,
                "model": key_of_model,
                "tokenizer": tokenizer.key,
                "title": steer.title,
                "prompt": steer.prompt,
                "ids": prompt.ids,
                "target": steer.target,
                "target_ids": target,
                "traits": [[name, folders[name]] for name in steer.traits],
                "layer": dictionary.layer,
                "dictionary": dictionary.key,
                "positions": [last, content],
                "steering": section.model_dump(include=_SECTION),
            }
            moved = moved_features([trait.strongest(dictionary.layer, section.features) for trait in own])
            units.append(
                _Unit(
                    steer=steer,
                    prompt=prompt,
                    target=target,
                    dictionary=dictionary,
                    moved=moved,
                    conditions=conditions_of(section, last, content),
                    inputs=inputs,
                )
            )
    return units


def _facts(storage: Storage, dictionaries: Sequence[Dictionary]) -> dict[int, Facts]:
    saved = {entry.layer: storage.read_bytes(f"{entry.folder}/cfg.json") for entry in dictionaries}
    return {layer: facts_of(json.loads(configuration)) for layer, configuration in saved.items()}


def _missing(storage: Storage, units: Sequence[_Unit]) -> list[_Unit]:
    done = load_all(storage, [unit.folder for unit in units])
    return [unit for unit in units if unit.folder not in done]


def _found(storage: Storage, units: Sequence[_Unit]) -> list[SteeredPrompt] | None:
    if _missing(storage, units):
        return None
    return [
        SteeredPrompt(case=unit.steer.title, prompt=unit.steer.prompt, folder=unit.folder) for unit in units
    ]


def _run(config: Config, storage: Storage, units: Sequence[_Unit]) -> Iterator[int]:
    """Make experiments, layer by layer, yielding the conditions of each batch as it is done."""
    tokenizer = load_tokenizer(config.model, storage)
    model = load_language_model(config.model, storage)
    dictionaries = {unit.dictionary.layer: unit.dictionary for unit in units}
    for layer, dictionary in sorted(dictionaries.items()):
        sae = load_dictionary(storage, dictionary, "cpu")
        for unit in units:
            if unit.dictionary.layer == layer:
                with about(unit.steer.label, stage="steering"):
                    yield from _make(config, storage, unit, model, sae, tokenizer)


def _make(
    config: Config,
    storage: Storage,
    unit: _Unit,
    model: LanguageModel,
    sae: Any,
    tokenizer: LoadedTokenizer,
) -> Iterator[int]:
    section, end = steering_of(config), tokenizer.tokenizer.eos_token_id
    experiment = Experiment(
        question=Question(
            ids=unit.prompt.ids,
            target=unit.target,
            layer=unit.dictionary.layer,
            max_new_tokens=section.max_new_tokens,
            stop_ids=() if end is None else (end,),
        ),
        moved=unit.moved,
        conditions=unit.conditions,
        seed=section.seed,
        prompt=unit.steer.prompt,
        batch_size=section.batch_size,
    )
    effects: list[Effect] = []
    for some in sweep(model, sae, experiment):
        effects += some
        yield len(some)
    rows = [
        _as_row(unit, condition, effect, tokenizer)
        for condition, effect in zip(unit.conditions, effects, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=SHARD_FILES["steering"])
    storage.write_parquet(f"{unit.folder}/steering.parquet", table)
    stats = {"n_conditions": len(rows)}
    commit(storage, unit.folder, Manifest(stage="steering", inputs=unit.inputs, stats=stats))


def _as_row(unit: _Unit, condition: Condition, effect: Effect, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """A row of the table; texts are decoded as they go on from the prompt."""
    columns = asdict(condition) | asdict(effect)
    columns |= {
        f"{text}_text": continuation(unit.prompt.ids, columns.pop(text), tokenizer)
        for text in ("baseline", "steered")
    }
    return columns | {
        "case": unit.steer.title,
        "prompt": unit.steer.prompt,
        "target": unit.steer.target,
        "traits": " + ".join(unit.steer.traits),
        "layer": unit.dictionary.layer,
    }
