"""Steering: what setting a trait's features does to the answers (PAPER 1.3).

First the traits' features are found (`tasks.steering.traits`); then each experiment ([[steer]] of the cases' file) is
swept over modes, places, strengths and controls, one content-keyed folder each (`tasks.steering.experiments`), so a
sweep that is killed goes on with the first experiment that it lacks.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from infra import verified
from infra.manifest import Manifest, commit, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError, about
from schemas.steering.section import Cases
from schemas.steering.work import SteeredPrompt, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, Dictionary
from tasks.corpus.function_tokens import function_token_ids
from tasks.dictionaries.dictionaries import load_dictionary
from tasks.dictionaries.facts import Facts, facts_of
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.models.text_generation import continuation
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.steering.cases import check_cases, check_clamps, read_cases
from tasks.steering.conditions import Condition
from tasks.steering.experiments import Asked, Unit, asked_of, known_traits, units_of
from tasks.steering.sweep import Effect, check_experiment, sweep
from tasks.steering.traits import Ids, compute_traits, find_traits, missing_traits

Made = tuple[list[TraitFeatures], list[SteeredPrompt]]


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
    cases, asked = _asked(config, storage, function_ids)
    steered = _found(
        storage, units_of(config, storage, asked, known_traits(storage, cases, traits), dictionaries)
    )
    return None if steered is None else (traits, steered)


def missing_steering(
    config: Config, storage: Storage, shards: CorpusShards, dictionaries: Sequence[Dictionary]
) -> tuple[int, list[str]]:
    """The number of traits and experiments that are done, and a line for each that is not.

    An experiment counts as done where its own traits are known and its rows are there, whatever other traits lack.
    Reads no weights.

    Raises:
        ConfigError: if the cases cannot be used, an experiment's prompt has no function token, or its dictionary is too
            small for random controls.
    """
    function_ids = function_token_ids(config, storage, shards)
    traits, missing = missing_traits(config, storage, dictionaries, function_ids)
    cases, asked = _asked(config, storage, function_ids)
    units = units_of(config, storage, asked, known_traits(storage, cases, traits), dictionaries)
    lacking = {unit.folder for unit in _missing(storage, units)}
    done = [unit.asked for unit in units if unit.folder not in lacking]
    return len(traits) + len(done), [*missing, *(one.steer.label for one in asked if one not in done)]


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
    # What is wrong with an experiment is told before the traits' model is loaded, where it is known by then.
    known, _ = missing_traits(config, storage, dictionaries, function_ids)
    cases, asked = _asked(config, storage, function_ids)
    early = units_of(config, storage, asked, known_traits(storage, cases, known), dictionaries)
    checked = _checked(config, storage, _missing(storage, early))
    traits = compute_traits(config, storage, dictionaries, function_ids, progress)
    # The model without its head must not lie beside the one with it.
    gc.collect()
    units = units_of(config, storage, asked, known_traits(storage, cases, traits), dictionaries)
    missing = _missing(storage, units)
    if missing:
        _checked(config, storage, [unit for unit in missing if unit.folder not in checked])
        total, seen = sum(len(unit.conditions) for unit in missing), 0
        progress(0, total, "steered texts, steering")
        for size in _run(config, storage, missing):
            seen += size
            progress(seen, total, "steered texts, steering")
    steered = _found(storage, units)
    if steered is None:
        raise FunctokError("experiments vanished while they were made", stage="steering", hint="run again")
    return traits, steered


def _asked(config: Config, storage: Storage, function_ids: Ids) -> tuple[Cases, list[Asked]]:
    with about(stage="steering"):
        cases = read_cases(config, storage)
    return cases, asked_of(config, storage, cases, frozenset(function_ids.tolist()))


def _checked(config: Config, storage: Storage, units: Sequence[Unit]) -> set[str]:
    """The folders of these experiments, all of which can be steered as asked: that needs SAEs, and no model."""
    for sae, unit in _with_sae(storage, units):
        with about(unit.asked.steer.label, stage="steering"):
            check_experiment(sae, unit.experiment(config))
    return {unit.folder for unit in units}


def _facts(storage: Storage, dictionaries: Sequence[Dictionary]) -> dict[int, Facts]:
    saved = {entry.layer: verified.read_bytes(storage, f"{entry.folder}/cfg.json") for entry in dictionaries}
    return {layer: facts_of(json.loads(configuration)) for layer, configuration in saved.items()}


def _missing(storage: Storage, units: Sequence[Unit]) -> list[Unit]:
    done = load_all(storage, [unit.folder for unit in units])
    return [unit for unit in units if unit.folder not in done]


def _found(storage: Storage, units: Sequence[Unit]) -> list[SteeredPrompt] | None:
    if _missing(storage, units):
        return None
    entries = [(unit.asked.steer, unit.folder) for unit in units]
    return [SteeredPrompt(case=steer.title, prompt=steer.prompt, folder=folder) for steer, folder in entries]


def _with_sae(storage: Storage, units: Sequence[Unit]) -> Iterator[tuple[Any, Unit]]:
    """Experiments layer by layer, each with its SAE on the CPU."""
    dictionaries = {unit.dictionary.layer: unit.dictionary for unit in units}
    for layer, dictionary in sorted(dictionaries.items()):
        sae = load_dictionary(storage, dictionary, "cpu")
        for unit in units:
            if unit.dictionary.layer == layer:
                yield sae, unit


def _run(config: Config, storage: Storage, units: Sequence[Unit]) -> Iterator[int]:
    """Make experiments, layer by layer, yielding the conditions of each batch as it is done."""
    tokenizer = load_tokenizer(config.model, storage)
    model = load_language_model(config.model, storage)
    for sae, unit in _with_sae(storage, units):
        with about(unit.asked.steer.label, stage="steering"):
            yield from _make(config, storage, unit, model, sae, tokenizer)


def _make(
    config: Config,
    storage: Storage,
    unit: Unit,
    model: LanguageModel,
    sae: Any,
    tokenizer: LoadedTokenizer,
) -> Iterator[int]:
    effects: list[Effect] = []
    for some in sweep(model, sae, unit.experiment(config)):
        effects += some
        yield len(some)
    rows = [
        _as_row(unit, condition, effect, tokenizer)
        for condition, effect in zip(unit.conditions, effects, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema=SHARD_FILES["steering"])
    written = storage.write_parquet(f"{unit.folder}/steering.parquet", table)
    stats = {"n_conditions": len(rows)}
    commit(storage, unit.folder, Manifest(stage="steering", inputs=unit.inputs, stats=stats), [written])


def _as_row(unit: Unit, condition: Condition, effect: Effect, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """A row of the table; texts are decoded as they go on from the prompt."""
    columns, steer = asdict(condition) | asdict(effect), unit.asked.steer
    columns |= {
        f"{text}_text": continuation(unit.asked.prompt.ids, columns.pop(text), tokenizer)
        for text in ("baseline", "steered")
    }
    return columns | {
        "case": steer.title,
        "prompt": steer.prompt,
        "target": steer.target,
        "traits": " + ".join(steer.traits),
        "layer": unit.dictionary.layer,
    }
